//! Rounding modes.

/// Rounding modes of the PTX ISA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// `.rn`: nearest, ties to even.
    Nearest,
    /// `.rna`: nearest, ties away from zero.
    NearestAway,
    /// `.rz`
    Zero,
    /// `.rm`
    Down,
    /// `.rp`
    Up,
}
