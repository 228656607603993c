//! What kind of work an instruction is.

/// Classes of instructions, by the unit that would execute them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum InstructionClass {
    /// Integer arithmetic, logic, shifts, comparisons and selections of integers.
    Integer,
    /// f32 arithmetic and comparisons.
    Float,
    /// f16 and bf16 arithmetic.
    Half,
    /// f64 arithmetic.
    Double,
    /// Approximate functions: `ex2`, `lg2`, `rcp`, `rsqrt`, `sqrt`, `sin`, `cos`, `tanh`, `div`.
    Special,
    Convert,
    Move,
    Control,
    GlobalLoad,
    GlobalStore,
    SharedLoad,
    SharedStore,
    /// Local, param and const accesses.
    OtherMemory,
    Atomic,
    /// `cp.async` and its groups.
    AsyncCopy,
    /// `ldmatrix` and `stmatrix`.
    MatrixMove,
    Matrix,
    /// `shfl`, `vote`, `match`, `redux`, `elect`.
    Exchange,
    /// Barriers and fences.
    Synchronise,
}

impl InstructionClass {
    pub const COUNT: usize = Self::Synchronise as usize + 1;

    /// All classes, in the order of their numbers.
    pub const ALL: [InstructionClass; Self::COUNT] = {
        use InstructionClass::*;
        [
            Integer,
            Float,
            Half,
            Double,
            Special,
            Convert,
            Move,
            Control,
            GlobalLoad,
            GlobalStore,
            SharedLoad,
            SharedStore,
            OtherMemory,
            Atomic,
            AsyncCopy,
            MatrixMove,
            Matrix,
            Exchange,
            Synchronise,
        ]
    };

    /// Short name, as in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Float => "f32",
            Self::Half => "f16",
            Self::Double => "f64",
            Self::Special => "special",
            Self::Convert => "convert",
            Self::Move => "move",
            Self::Control => "control",
            Self::GlobalLoad => "global load",
            Self::GlobalStore => "global store",
            Self::SharedLoad => "shared load",
            Self::SharedStore => "shared store",
            Self::OtherMemory => "other memory",
            Self::Atomic => "atomic",
            Self::AsyncCopy => "async copy",
            Self::MatrixMove => "matrix move",
            Self::Matrix => "matrix",
            Self::Exchange => "exchange",
            Self::Synchronise => "synchronise",
        }
    }
}
