//! What an expert's weights look like in memory, apart from the type of activations.

use super::kinds::{Dtype, Glu, Layout};

/// How the elements of a weight are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightFormat {
    /// One number an element.
    Plain(Dtype),
}

impl From<Dtype> for WeightFormat {
    fn from(dtype: Dtype) -> WeightFormat {
        WeightFormat::Plain(dtype)
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WeightFormat::Plain(dtype) => dtype.fmt(f),
        }
    }
}

/// The form of the weights of one product, the same for every expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct WeightDesc {
    /// Storage.
    pub format: WeightFormat,
    /// Order of a matrix.
    pub layout: Layout,
    /// Where gate and up lie.
    pub glu: Glu,
}

impl WeightDesc {
    /// `[E, N, K]` without a gate, as `nn.Linear` holds it.
    pub const fn new(dtype: Dtype) -> WeightDesc {
        WeightDesc { format: WeightFormat::Plain(dtype), layout: Layout::Nk, glu: Glu::None }
    }

    /// With another order of a matrix.
    #[must_use]
    pub const fn layout(self, layout: Layout) -> WeightDesc {
        WeightDesc { layout, ..self }
    }

    /// With gate and up.
    #[must_use]
    pub const fn glu(self, glu: Glu) -> WeightDesc {
        WeightDesc { glu, ..self }
    }

    /// Elements from an expert's matrix to the next, from an output to the next and from a depth to the next, of packed tensors for `n` columns of
    /// the result and depth `k`.
    pub const fn strides(&self, n: usize, k: usize) -> [usize; 3] {
        let outputs = self.outputs(n);
        match self.layout {
            Layout::Nk => [outputs * k, k, 1],
            Layout::Kn => [outputs * k, 1, outputs],
        }
    }

    /// Outputs of one tensor for `n` columns of the result: `2 n` where it holds gate and up.
    pub(crate) const fn outputs(&self, n: usize) -> usize {
        match self.glu {
            Glu::None | Glu::Apart => n,
            Glu::Split | Glu::UpFirst | Glu::Interleaved => 2 * n,
        }
    }
}
