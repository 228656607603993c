//! Where the PTX ISA manual speaks of what a module has: sections and titles as in its editions from 8.6 on.

const INTEGER: &str = "9.7.1, Integer Arithmetic Instructions";
const EXTENDED: &str = "9.7.2, Extended-Precision Integer Arithmetic Instructions";
const FLOAT: &str = "9.7.3, Floating Point Instructions";
const COMPARE: &str = "9.7.6, Comparison and Selection Instructions";
const LOGIC: &str = "9.7.8, Logic and Shift Instructions";
const DATA: &str = "9.7.9, Data Movement and Conversion Instructions";
const TEXTURE: &str = "9.7.10, Texture Instructions";
const SURFACE: &str = "9.7.11, Surface Instructions";
const CONTROL: &str = "9.7.12, Control Flow Instructions";
const SYNCHRONISE: &str = "9.7.13, Parallel Synchronization and Communication Instructions";
const MATRIX: &str = "9.7.14, Warp Level Matrix Multiply-Accumulate Instructions";
const WARPGROUP: &str = "9.7.15, Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions";
const TCGEN: &str = "9.7.16, TensorCore 5th Generation Family Instructions";
const STACK: &str = "9.7.17, Stack Manipulation Instructions";
const VIDEO: &str = "9.7.18, Video Instructions";
const MISCELLANEOUS: &str = "9.7.19, Miscellaneous Instructions";

/// Of directives before a function's body.
pub const PERFORMANCE: &str = "11.4, Performance-Tuning Directives";
/// Of `.version` and `.target`.
pub const MODULE: &str = "11.1, PTX Module Directives";

/// The section that defines an instruction; `None` for what is no instruction of PTX.
pub fn section(opcode: &str) -> Option<&'static str> {
    Some(match opcode {
        "addc" | "subc" | "madc" => EXTENDED,
        "add" | "sub" | "mul" | "mad" | "mul24" | "mad24" | "sad" | "div" | "rem" | "abs" | "neg" | "min" | "max"
        | "popc" | "clz" | "bfind" | "fns" | "brev" | "bfe" | "bfi" | "szext" | "bmsk" | "dp4a" | "dp2a" => INTEGER,
        "testp" | "copysign" | "fma" | "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => FLOAT,
        "set" | "setp" | "selp" | "slct" => COMPARE,
        "and" | "or" | "xor" | "not" | "cnot" | "lop3" | "shf" | "shl" | "shr" => LOGIC,
        "mov" | "shfl" | "prmt" | "ld" | "ldu" | "st" | "multimem" | "prefetch" | "prefetchu" | "applypriority"
        | "discard" | "createpolicy" | "isspacep" | "cvta" | "cvt" | "mapa" | "getctarank" | "cp" | "tensormap" => DATA,
        "tex" | "tld4" | "txq" | "istypep" => TEXTURE,
        "suld" | "sust" | "sured" | "suq" => SURFACE,
        "bra" | "brx" | "call" | "ret" | "exit" => CONTROL,
        "bar"
        | "barrier"
        | "membar"
        | "fence"
        | "atom"
        | "red"
        | "vote"
        | "match"
        | "activemask"
        | "redux"
        | "griddepcontrol"
        | "elect"
        | "mbarrier"
        | "clusterlaunchcontrol" => SYNCHRONISE,
        "wmma" | "mma" | "ldmatrix" | "stmatrix" | "movmatrix" => MATRIX,
        "wgmma" => WARPGROUP,
        "tcgen05" => TCGEN,
        "stacksave" | "stackrestore" | "alloca" => STACK,
        "vadd" | "vsub" | "vabsdiff" | "vmin" | "vmax" | "vshl" | "vshr" | "vmad" | "vset" | "vadd2" | "vsub2"
        | "vavrg2" | "vabsdiff2" | "vmin2" | "vmax2" | "vset2" | "vadd4" | "vsub4" | "vavrg4" | "vabsdiff4"
        | "vmin4" | "vmax4" | "vset4" => VIDEO,
        "brkpt" | "nanosleep" | "pmevent" | "trap" | "setmaxnreg" => MISCELLANEOUS,
        _ => return None,
    })
}
