//! Experts that compute nothing.

/// Experts that a router may choose and that compute nothing. Their slots are -1, as those of dropped choices: they have no row, and nothing of
/// them is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NullExperts {
    /// How many of the layer's experts, the last ones; less than all.
    pub count: usize,
    /// What they yield.
    pub output: NullOutput,
}

impl NullExperts {
    /// Experts that skip the token (ZAYA).
    pub const fn zero(count: usize) -> NullExperts {
        NullExperts { count, output: NullOutput::Zero }
    }

    /// Experts whose output is their input (LongCat-Flash, arXiv:2509.01322, section 2.1).
    pub const fn identity(count: usize) -> NullExperts {
        NullExperts { count, output: NullOutput::Input }
    }
}

/// What an expert yields that computes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NullOutput {
    /// Nothing.
    Zero,
    /// Its input, which is weighted as any expert's output is.
    Input,
}
