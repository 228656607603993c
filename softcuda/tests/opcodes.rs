//! The opcodes that the kernels of Triton, CUTLASS, CuTe's tutorials, DeepGEMM, llm.c and vLLM were seen to use
//! (`tests/data/opcodes.txt`): the device has all of them.

use softcuda::lower::{Environment, lower_module};

fn opcodes() -> Vec<String> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/opcodes.txt");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines = text.lines().filter(|l| !l.starts_with('#') && !l.trim().is_empty());
    lines.map(|l| l.split_whitespace().nth(1).expect("count, opcode, where").to_string()).collect()
}

/// A register of the size that a type has.
fn register(ty: &str) -> &'static str {
    match ty {
        "pred" => "%p0",
        "b8" | "u8" | "s8" | "b16" | "u16" | "s16" | "f16" | "bf16" | "e4m3x2" | "e5m2x2" => "%h0",
        "b64" | "u64" | "s64" | "f64" => "%d0",
        _ => "%r0",
    }
}

fn list(n: usize, name: &str) -> String {
    (0..n).map(|i| format!("%{name}{i}")).collect::<Vec<_>>().join(", ")
}

/// The opcode with operands that suit it.
fn instruction(opcode: &str) -> String {
    let words: Vec<&str> = opcode.split('.').collect();
    let has = |w: &str| words.contains(&w);
    let last = *words.last().unwrap();
    let r = register(last);
    let n = if has("v2") {
        2
    } else if has("v4") {
        4
    } else {
        1
    };
    let data = if n == 1 { r.to_string() } else { format!("{{{}}}", list(n, &r[1..2])) };
    let shared = opcode.contains("shared");
    let place = if shared { "[%r9]" } else { "[%d9]" };
    let tensor = |n: usize| format!("[%d8, {{{}}}]", list(n, "r"));
    let operands = match words[0] {
        "ret" | "trap" | "membar" | "griddepcontrol" => String::new(),
        "fence" if opcode.contains("tensormap") => "[%d9], 128".into(),
        "fence" => String::new(),
        "bra" => "END".into(),
        "call" => "(%r0), helper, (%r1)".into(),
        "ld" if has("param") => format!("{data}, [p0]"),
        "st" if has("param") => return format!("{{ .param .{last} q; {opcode} [q], {r}; call take_{last}, (q); }}"),
        "ld" => format!("{data}, {place}"),
        "st" => format!("{place}, {data}"),
        "atom" if has("cas") => format!("{r}, {place}, {r}, {r}"),
        "atom" => format!("{r}, {place}, {r}"),
        "red" => format!("{place}, {r}"),
        "bar" if has("red") => "%p0, 0, %p1".into(),
        "bar" if has("warp") => "-1".into(),
        "barrier" if has("cluster") => String::new(),
        "bar" | "barrier" => "0".into(),
        "bfe" => format!("{r}, {r}, %r1, %r2"),
        "bfi" => format!("{r}, {r}, {r}, %r1, %r2"),
        "bfind" | "popc" => format!("%r1, {r}"),
        "createpolicy" => "%d0, 0f3F800000".into(),
        "cvt" => {
            let (to, from) = (register(words[words.len() - 2]), r);
            let packs = words[words.len() - 2].ends_with("x2") && last == "f32";
            let second = if packs { ", %r1" } else { "" };
            format!("{to}, {from}{second}")
        }
        "cvta" if has("param") => "%d0, p0".into(),
        "cvta" => "%d0, %d1".into(),
        "elect" => "%r0|%p0, -1".into(),
        "fma" | "mad" if has("wide") => "%d0, %r0, %r1, %d1".into(),
        "fma" | "mad" => format!("{r}, {r}, {r}, {r}"),
        "mul" if has("wide") => format!("{}, {r}, {r}", if last.ends_with("16") { "%r0" } else { "%d0" }),
        "redux" => "%r0, %r1, -1".into(),
        "selp" => format!("{r}, {r}, {r}, %p0"),
        "setp" => format!("%p0, {r}, {r}"),
        "shfl" => "%r0|%p0, %r1, 1, 31, -1".into(),
        "shl" | "shr" => format!("{r}, {r}, %r1"),
        "vote" => "%r0, %p0, -1".into(),
        "prmt" => "%r0, %r1, %r2, %r3".into(),
        "ldmatrix" | "stmatrix" => {
            let n = if has("x4") { 4 } else { 2 };
            let (regs, place) = (format!("{{{}}}", list(n, "r")), "[%r9]");
            if words[0] == "ldmatrix" { format!("{regs}, {place}") } else { format!("{place}, {regs}") }
        }
        "mma" => {
            let half = opcode.ends_with("f16.f16.f16.f16");
            let c = format!("{{{}}}", if half { list(2, "r") } else { list(4, "r") });
            format!("{c}, {{{}}}, {{{}}}, {c}", list(4, "r"), list(2, "r"))
        }
        "cp" if has("commit_group") || has("wait_all") => String::new(),
        "cp" if opcode.contains("wait_group") => "0".into(),
        "cp" if has("tensor") => {
            let map = tensor(if has("2d") { 2 } else { 3 });
            let mut text = if has("bulk_group") { format!("{map}, [%r8]") } else { format!("[%r8], {map}, [%r9]") };
            if opcode.contains("multicast") {
                text += ", %h0";
            }
            if opcode.contains("cache_hint") {
                text += ", %d7";
            }
            text
        }
        "cp" => format!("[%r9], [%d9], 16{}", if opcode.contains("cache_hint") { ", %d7" } else { "" }),
        "mapa" => "%r0, %r1, %r2".into(),
        "mbarrier" if has("init") => "[%r9], 1".into(),
        "mbarrier" if has("inval") => "[%r9]".into(),
        "mbarrier" if has("try_wait") => "%p0, [%r9], %r0".into(),
        "mbarrier" if has("expect_tx") && !has("arrive") => "[%r9], %r0".into(),
        "mbarrier" if has("expect_tx") => "_, [%r9], %r0".into(),
        "mbarrier" => "_, [%r9]".into(),
        "prefetch" => "[%d9]".into(),
        "setmaxnreg" => "64".into(),
        "tensormap" if has("cp_fenceproxy") => "[%d9], [%r9], 128".into(),
        "tensormap" if ["elemtype", "swizzle_mode"].iter().any(|w| has(w)) => "[%r9], 1".into(),
        "tensormap" if has("rank") || has("global_address") => format!("[%r9], {r}"),
        "tensormap" => format!("[%r9], 0, {r}"),
        "wgmma" if has("wait_group") => "0".into(),
        "wgmma" if !has("mma_async") => String::new(),
        "wgmma" => {
            let shape = words.iter().find(|w| w.starts_with("m64n")).unwrap();
            let n: usize = shape[4..].split('k').next().unwrap().parse().unwrap();
            let d = if has("f16") && words[5] == "f16" { n / 4 } else { n / 2 };
            let transposes = if ["f16", "bf16"].contains(&last) { ", 0, 0" } else { "" };
            format!("{{{}}}, %d0, %d1, 1, 1, 1{transposes}", list(d, "w"))
        }
        // One source or two of the type of the result.
        "mov" | "neg" | "not" | "abs" | "sqrt" | "rsqrt" | "rcp" | "sin" | "cos" | "ex2" | "lg2" | "tanh" | "brev" => {
            format!("{r}, {r}")
        }
        _ => format!("{r}, {r}, {r}"),
    };
    format!("{opcode} {operands};")
}

fn module(body: &str) -> String {
    format!(
        ".version 8.6\n.target sm_90a\n.address_size 64
.func (.reg .b32 r) helper(.reg .b32 x) {{ mov.b32 r, x; ret; }}
.func take_b32(.param .b32 x) {{ ret; }}
.func take_b64(.param .b64 x) {{ ret; }}
.visible .entry k(.param .align 16 .b8 p0[64]) {{
.reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<10>, %w<128>; .reg .b64 %d<10>;
{body}
END: ret;
}}\n"
    )
}

#[test]
fn every_opcode_that_kernels_use() {
    let environment = Environment { compute_capability: (9, 0), ..Environment::default() };
    let all = opcodes();
    assert_eq!(all.len(), 388);
    let mut refused = Vec::new();
    for opcode in &all {
        let text = module(&instruction(opcode));
        let module = softcuda::ptx::parse(&text).unwrap_or_else(|e| panic!("{opcode}: {e}\n{text}"));
        if let Err(e) = lower_module(&module, &environment) {
            refused.push(format!("{opcode}: {e}"));
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

/// The operands above are right: `ptxas`, where there is one, assembles all of them.
#[test]
fn operands_are_those_that_ptxas_takes() {
    let Some(ptxas) = std::env::var_os("PTXAS").filter(|path| !path.is_empty() && path != "none") else {
        eprintln!("PTXAS is not set: not checked");
        return;
    };
    let lines: Vec<String> = opcodes().iter().map(|o| instruction(o)).collect();
    let file = std::env::temp_dir().join(format!("softcuda-opcodes-{}.ptx", std::process::id()));
    std::fs::write(&file, module(&lines.join("\n"))).unwrap();
    let mut command = std::process::Command::new(ptxas);
    let run = command.args(["-arch=sm_90a", "-O1", "-o", "/dev/null"]).arg(&file).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    std::fs::remove_file(&file).unwrap();
}
