//! The weights of an expert product as buffers.

use crate::Error;
use crate::Tensor;
use crate::rules::{Glu, Layout, WeightDesc, WeightFormat};
use crate::runtime::launch::{Address, Held, Scope, optional};
use crate::runtime::shape::{self, reach};

/// Weights of one product, of every expert: the matrices and, where there is one, the bias of each output.
///
/// Which tensors there are follows from [`WeightDesc`]: one, or gate and up apart.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Weight<'a> {
    /// `[E, Nb, K]` or `[E, K, Nb]`, by the layout; `Nb` is twice the columns of the result where gate and up lie together. Begins on 16
    /// bytes where rows are a multiple of 8 elements, else on an element.
    pub matrix: Tensor<'a>,
    /// `[E, Nb]`; may begin on any element.
    pub bias: Option<Tensor<'a>>,
    /// Up's matrix and bias, exactly with [`Glu::Apart`]; `matrix` and `bias` are gate's then.
    pub up: Option<(Tensor<'a>, Option<Tensor<'a>>)>,
}

impl<'a> Weight<'a> {
    /// One tensor, no bias.
    pub fn new(matrix: impl Into<Tensor<'a>>) -> Weight<'a> {
        Weight { matrix: matrix.into(), bias: None, up: None }
    }

    /// Gate and up in two tensors, no biases.
    pub fn apart(gate: impl Into<Tensor<'a>>, up: impl Into<Tensor<'a>>) -> Weight<'a> {
        Weight { matrix: gate.into(), bias: None, up: Some((up.into(), None)) }
    }

    /// With a bias of `matrix`'s outputs.
    #[must_use]
    pub fn bias(self, bias: impl Into<Tensor<'a>>) -> Weight<'a> {
        Weight { bias: Some(bias.into()), ..self }
    }

    /// With a bias of up's outputs, where gate and up are apart.
    #[must_use]
    pub fn up_bias(self, bias: impl Into<Tensor<'a>>) -> Weight<'a> {
        Weight { up: self.up.map(|(matrix, _)| (matrix, Some(bias.into()))), ..self }
    }

    /// Opens what `desc` says, at `place`.
    pub(crate) fn open<'b>(
        self,
        scope: &Scope<'b>,
        names: WeightNames,
        desc: &WeightDesc,
        place: WeightPlace,
    ) -> Result<HeldWeight<'b>, Error>
    where
        'a: 'b,
    {
        let operation = scope.operation;
        let WeightFormat::Plain(dtype) = desc.format;
        let WeightPlace { experts, n, k, strides: [expert, output, depth], alignment } = place;
        let outputs = desc.outputs(n);
        let elements = reach(&[(experts, expert), (outputs, output), (k, depth)]);
        let matrix = |name, tensor| scope.read_tensor(name, tensor, dtype, elements, alignment);
        let bias = |name, tensor: Option<Tensor<'a>>| {
            tensor
                .map(|tensor| scope.read_tensor(name, tensor, dtype, experts * outputs, dtype.bytes().into()))
                .transpose()
        };
        let (up, up_bias) = match (desc.glu, self.up) {
            (Glu::Apart, None) => {
                let reason = "the descriptor has gate and up in two tensors";
                return Err(Error::Missing { operation, argument: names.up, reason });
            }
            (Glu::Apart, Some(up)) => (Some(up.0), up.1),
            (_, Some(_)) => {
                let reason = "the descriptor has one tensor";
                return Err(Error::Unexpected { operation, argument: names.up, reason });
            }
            (_, None) => (None, None),
        };
        if desc.glu == Glu::Apart && self.bias.is_some() != up_bias.is_some() {
            let reason = "gate and up have a bias both, or neither";
            return Err(Error::Missing {
                operation,
                argument: if up_bias.is_some() { names.bias } else { names.up_bias },
                reason,
            });
        }
        Ok(HeldWeight {
            matrix: matrix(names.matrix, self.matrix)?,
            bias: bias(names.bias, self.bias)?,
            up: up.map(|tensor| matrix(names.up, tensor)).transpose()?,
            up_bias: bias(names.up_bias, up_bias)?,
            desc: *desc,
            n,
            output,
        })
    }
}

/// Sizes of a weight's tensors, and where their elements lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightPlace {
    pub(crate) experts: usize,
    /// Columns of the result.
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Elements from an expert to the next, from an output to the next, from a depth to the next.
    pub(crate) strides: [usize; 3],
    /// Boundary in bytes that each tensor begins on.
    pub(crate) alignment: u64,
}

impl WeightPlace {
    /// Of packed tensors.
    pub(crate) fn packed(desc: &WeightDesc, [experts, n, k]: [usize; 3]) -> WeightPlace {
        let WeightFormat::Plain(dtype) = desc.format;
        let width = match desc.layout {
            Layout::Nk => k,
            Layout::Kn => desc.outputs(n),
        };
        WeightPlace { experts, n, k, strides: desc.strides(n, k), alignment: shape::row_alignment(dtype, width) }
    }
}

/// What the tensors of a weight are called in errors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightNames {
    pub(crate) matrix: &'static str,
    pub(crate) bias: &'static str,
    pub(crate) up: &'static str,
    pub(crate) up_bias: &'static str,
}

/// A weight opened for reading.
pub(crate) struct HeldWeight<'a> {
    matrix: Held<'a>,
    bias: Option<Held<'a>>,
    up: Option<Held<'a>>,
    up_bias: Option<Held<'a>>,
    desc: WeightDesc,
    n: usize,
    /// Elements from an output to the next.
    output: usize,
}

/// A weight as the kernel takes it: where the outputs of the first kind begin (all, or gate's), and those of the second.
#[derive(Clone, Copy)]
pub(crate) struct WeightAddresses<'a> {
    pub(crate) b: Address<'a>,
    pub(crate) b_up: Option<Address<'a>>,
    pub(crate) bias: Option<Address<'a>>,
    pub(crate) bias_up: Option<Address<'a>>,
}

impl HeldWeight<'_> {
    pub(crate) fn addresses(&self) -> WeightAddresses<'_> {
        let WeightFormat::Plain(dtype) = self.desc.format;
        let element = dtype.bytes() as usize;
        let (matrix, bias) = (self.matrix.address(), optional(&self.bias));
        // From gate to up within one tensor: so many outputs further.
        let apart = if self.desc.glu == Glu::Interleaved { 1 } else { self.n };
        let second = (matrix.offset(apart * self.output * element), bias.map(|bias| bias.offset(apart * element)));
        match self.desc.glu {
            Glu::None => WeightAddresses { b: matrix, b_up: None, bias, bias_up: None },
            Glu::Split | Glu::Interleaved => {
                WeightAddresses { b: matrix, b_up: Some(second.0), bias, bias_up: second.1 }
            }
            Glu::UpFirst => WeightAddresses { b: second.0, b_up: Some(matrix), bias: second.1, bias_up: bias },
            Glu::Apart => {
                let (up, up_bias) = (optional(&self.up), optional(&self.up_bias));
                WeightAddresses { b: matrix, b_up: up, bias, bias_up: up_bias }
            }
        }
    }
}
