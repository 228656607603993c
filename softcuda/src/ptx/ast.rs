//! The syntax tree of a PTX module, close to the text (PTX ISA, chapters 4 and 5).
//!
//! Instructions stay uninterpreted: an opcode, its dot-separated modifiers in order, and operands. Every node carries the
//! one-based source line, so that errors, faults and profiles can point at the text.

/// A whole PTX translation unit.
#[derive(Debug, Clone, Default)]
pub struct Module {
    /// `.version major.minor`.
    pub version: (u32, u32),
    /// First word of `.target`, e.g. `sm_90a`.
    pub target: String,
    /// Further words of `.target`, e.g. `debug`, `texmode_unified`.
    pub target_options: Vec<String>,
    /// `.address_size`, 64 where absent.
    pub address_size: u32,
    /// Module-scope `.global`, `.const` and `.shared` variables in order.
    pub variables: Vec<Variable>,
    /// `.entry` and `.func`, declarations (no body) and definitions, in order.
    pub functions: Vec<Function>,
    /// `.alias alias, aliasee;` in order.
    pub aliases: Vec<(String, String)>,
    /// Source text by line, `lines[0]` is line 1.
    pub lines: Vec<String>,
}

/// A state space (PTX ISA 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    Reg,
    Const,
    Global,
    Local,
    Param,
    /// `.shared` and `.shared::cta`.
    Shared,
    /// `.shared::cluster`, of addresses only: nothing is declared in it.
    SharedCluster,
}

/// A fundamental or packed type (PTX ISA 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    BF16,
    BF16x2,
    TF32,
    E4M3,
    E5M2,
    E4M3x2,
    E5M2x2,
    F32,
    F32x2,
    F64,
}

/// Linking directive of a variable or function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Linkage {
    #[default]
    None,
    Visible,
    Extern,
    Weak,
    Common,
}

/// A variable or register declaration. `.reg .b32 %r<10>` is one declaration with `count: Some(10)`.
#[derive(Debug, Clone)]
pub struct Variable {
    pub name: String,
    pub space: Space,
    pub ty: Type,
    /// 1, or 2, 4, 8 for `.v2`, `.v4`, `.v8`.
    pub vector: u32,
    /// `.align`, in bytes, where given.
    pub align: Option<u32>,
    /// Array dimensions, outermost first; an unsized `[]` without initialiser is 0. Empty for a scalar.
    pub dims: Vec<u64>,
    /// `<N>`: the parameterised names `name0 .. name{N-1}`.
    pub count: Option<u32>,
    /// Initialiser, flattened in memory order; elements that the text leaves out of an inner list are zero here, those
    /// after the last are zero without being listed. Empty: no initialiser.
    pub init: Vec<Init>,
    pub linkage: Linkage,
    /// For a `.global` or `.const` variable declared in a function: the variable of [`Module::variables`] that it names within its
    /// scope. It is there from the module's loading to its end, as all of these spaces are.
    pub symbol: Option<String>,
    /// For `.param`: `.ptr` attributes (space, align) where given.
    pub ptr: Option<(Option<Space>, u32)>,
    pub line: u32,
}

/// One element of an initialiser.
#[derive(Debug, Clone, PartialEq)]
pub enum Init {
    Int(i128),
    F32(u32),
    F64(u64),
    /// Address of a symbol plus an offset; `generic(sym)` sets `generic`. Masked forms (`0xFF(sym)`) are a parse error.
    Symbol {
        name: String,
        offset: i64,
        generic: bool,
    },
}

/// `.entry` or `.func`.
#[derive(Debug, Clone)]
pub struct Function {
    pub name: String,
    pub is_entry: bool,
    pub linkage: Linkage,
    /// Return parameters of a `.func`, in `.reg` or `.param` space.
    pub returns: Vec<Variable>,
    pub params: Vec<Variable>,
    /// Performance and cluster directives with their numbers, e.g. `("maxntid", [256, 1, 1])`, `("noreturn", [])`.
    pub directives: Vec<(String, Vec<u64>)>,
    /// `None` for a declaration.
    pub body: Option<Vec<Statement>>,
    pub line: u32,
}

#[derive(Debug, Clone)]
pub enum Statement {
    Label {
        name: String,
        line: u32,
    },
    Variable(Variable),
    Instruction(Instruction),
    /// `{ ... }`: a scope for names.
    Block(Vec<Statement>),
    /// `label: .branchtargets a, b;` or `.calltargets`.
    Targets {
        name: String,
        targets: Vec<String>,
        line: u32,
    },
    /// `label: .callprototype ...;`
    Prototype {
        name: String,
        returns: Vec<Variable>,
        params: Vec<Variable>,
        line: u32,
    },
}

/// `@p`, `@!p`.
#[derive(Debug, Clone, PartialEq)]
pub struct Guard {
    pub negated: bool,
    pub name: String,
}

#[derive(Debug, Clone)]
pub struct Instruction {
    pub guard: Option<Guard>,
    /// First word, e.g. `ld`.
    pub opcode: String,
    /// The rest without dots, in order, `::` kept: `["global", "L2::128B", "v4", "u32"]`.
    pub modifiers: Vec<String>,
    pub operands: Vec<Operand>,
    pub line: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    /// A register, variable, label, function or special register (`%tid.x` is one name).
    Name(String),
    /// `!p`.
    NotName(String),
    /// An integer constant expression, evaluated in 64 bits: within `i64` where signed, within `u64` where unsigned.
    Int(i128),
    /// `0f3F800000`.
    F32(u32),
    /// `0d...` or a decimal floating constant expression.
    F64(u64),
    /// `{a, b, c, d}`.
    Vector(Vec<Operand>),
    /// `[base + offset]`; the base is a register or a variable, or nothing for an immediate address.
    Address { base: Option<String>, offset: i64 },
    /// `[tensorMap, {c0, c1, ...}]`, with what follows the coordinates (im2col) in order.
    TensorAddress { base: Box<Operand>, coordinates: Vec<Operand>, rest: Vec<Operand> },
    /// `a|b` (setp, shfl, elect, match).
    Pair(Box<Operand>, Box<Operand>),
    /// `%r1.x` style vector element: register and component 0 to 3.
    Element { name: String, index: u32 },
    /// `name[3]` (scaled by the element size here) or `name + 4`, in bytes: an address as a value for `mov`, the
    /// location itself for `ld` and `st`.
    SymbolOffset { name: String, offset: i64 },
    /// `_`.
    Sink,
    /// `(a, b)` lists of a `call`.
    List(Vec<Operand>),
}

impl Module {
    /// The line of `.target`, from 1; 0 for a module without a text.
    pub fn target_line(&self) -> u32 {
        let at = self.lines.iter().position(|l| l.split_whitespace().next() == Some(".target"));
        at.map_or(0, |i| i as u32 + 1)
    }
}

impl Type {
    /// Size in memory, in bytes; 1 for a predicate, which has no memory form.
    pub fn bytes(self) -> u32 {
        use Type::*;
        match self {
            Pred | B8 | U8 | S8 | E4M3 | E5M2 => 1,
            B16 | U16 | S16 | F16 | BF16 | E4M3x2 | E5M2x2 => 2,
            B32 | U32 | S32 | F16x2 | BF16x2 | TF32 | F32 => 4,
            B64 | U64 | S64 | F32x2 | F64 => 8,
            B128 => 16,
        }
    }

    /// The type a modifier such as `u32` names.
    pub fn from_name(name: &str) -> Option<Type> {
        use Type::*;
        Some(match name {
            "pred" => Pred,
            "b8" => B8,
            "b16" => B16,
            "b32" => B32,
            "b64" => B64,
            "b128" => B128,
            "u8" => U8,
            "u16" => U16,
            "u32" => U32,
            "u64" => U64,
            "s8" => S8,
            "s16" => S16,
            "s32" => S32,
            "s64" => S64,
            "f16" => F16,
            "f16x2" => F16x2,
            "bf16" => BF16,
            "bf16x2" => BF16x2,
            "tf32" => TF32,
            "e4m3" => E4M3,
            "e5m2" => E5M2,
            "e4m3x2" => E4M3x2,
            "e5m2x2" => E5M2x2,
            "f32" => F32,
            "f32x2" => F32x2,
            "f64" => F64,
            _ => return None,
        })
    }
}

impl Variable {
    /// Size of one element of the (possibly vector) type, in bytes.
    pub fn element_bytes(&self) -> u64 {
        u64::from(self.ty.bytes()) * u64::from(self.vector)
    }

    /// Size of the whole variable, in bytes; 0 for an unsized array, `None` where it overflows.
    pub fn bytes(&self) -> Option<u64> {
        self.dims.iter().try_fold(self.element_bytes(), |size, &dim| size.checked_mul(dim))
    }

    /// Alignment in bytes: as declared, else the size of an element.
    pub fn alignment(&self) -> u64 {
        self.align.map_or(self.element_bytes(), u64::from)
    }
}
