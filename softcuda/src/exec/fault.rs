//! Errors that a running kernel meets.

use std::fmt;

use crate::lower::Kernel;

/// What went wrong, as the hardware would class it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// Access outside every live allocation, or outside the block's shared or the thread's local memory.
    IllegalAddress,
    /// Address not a multiple of the access size.
    MisalignedAddress,
    /// A generic address of the wrong space, e.g. an atomic on local memory.
    InvalidAddressSpace,
    /// Execution ran off the end of a function, or an indirect branch left its target list.
    InvalidPc,
    /// An instruction used in a way the PTX ISA leaves undefined.
    IllegalInstruction,
    /// Calls nest deeper than the thread's stack allows.
    StackOverflow,
    /// `trap`.
    Trap,
    /// A device-side `assert`.
    Assert,
    /// Threads wait for one another and none can go on.
    Deadlock,
    /// The launch ran longer than the device allows.
    LaunchTimeout,
    /// The launch itself contradicts the kernel: block shape, parameter size, shared memory.
    InvalidLaunch,
}

impl FaultKind {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::IllegalAddress => "illegal address",
            Self::MisalignedAddress => "misaligned address",
            Self::InvalidAddressSpace => "invalid address space",
            Self::InvalidPc => "invalid program counter",
            Self::IllegalInstruction => "illegal instruction",
            Self::StackOverflow => "stack overflow",
            Self::Trap => "trap",
            Self::Assert => "device-side assertion",
            Self::Deadlock => "deadlock",
            Self::LaunchTimeout => "launch timeout",
            Self::InvalidLaunch => "invalid launch",
        }
    }
}

/// The first fault of a launch and where it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub kind: FaultKind,
    pub kernel: String,
    /// One-based PTX line, 0 where the fault belongs to the launch as a whole.
    pub line: u32,
    /// That line's text, trimmed.
    pub text: String,
    pub block: [u32; 3],
    pub thread: [u32; 3],
    /// Extents of a block.
    pub shape: [u32; 3],
    /// The address accessed, for faults of memory.
    pub address: Option<u64>,
    /// State space of the access: `global`, `shared`, `local`, `param`, `const`.
    pub space: Option<&'static str>,
    /// Bytes that one lane accessed.
    pub bytes: Option<u32>,
    pub message: String,
}

impl Fault {
    pub(crate) fn of_launch(kernel: &Kernel, kind: FaultKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            kernel: kernel.name.clone(),
            line: 0,
            text: String::new(),
            block: [0; 3],
            thread: [0; 3],
            shape: [1; 3],
            address: None,
            space: None,
            bytes: None,
            message: message.into(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; kernel `{}`", self.kind.text(), self.message, self.kernel)?;
        if self.line != 0 {
            let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
            write!(f, ", line {}: `{}`", self.line, self.text)?;
            write!(f, ", block ({bx}, {by}, {bz}), thread ({tx}, {ty}, {tz})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}
