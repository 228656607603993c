//! Weights of norms and projections.

use crate::experts::Weight;
use crate::experts::rms_norm::check_weight;
use crate::experts::weight::{HeldWeight, WeightNames, WeightPlace};
use crate::layer::LayerDesc;
use crate::rules::{Gain, RmsNorm};
use crate::runtime::launch::{Held, Scope};
use crate::runtime::shape::row_alignment;
use crate::{Error, Tensor};

/// Weights of the norms round the experts, of the type of activations; exactly where a norm's gain has one.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct NormWeights<'a> {
    /// `[H]`.
    pub experts: Option<Tensor<'a>>,
    /// `[H]`, with a latent width `[L]`.
    pub slots: Option<Tensor<'a>>,
    /// `[H]`.
    pub output: Option<Tensor<'a>>,
}

impl<'a> NormWeights<'a> {
    /// None.
    pub const fn new() -> NormWeights<'a> {
        NormWeights { experts: None, slots: None, output: None }
    }

    /// With a weight of the norm of the experts' input.
    #[must_use]
    pub fn experts(self, weight: impl Into<Tensor<'a>>) -> NormWeights<'a> {
        NormWeights { experts: Some(weight.into()), ..self }
    }

    /// With a weight of the norm of each expert's output.
    #[must_use]
    pub fn slots(self, weight: impl Into<Tensor<'a>>) -> NormWeights<'a> {
        NormWeights { slots: Some(weight.into()), ..self }
    }

    /// With a weight of the norm of the sum.
    #[must_use]
    pub fn output(self, weight: impl Into<Tensor<'a>>) -> NormWeights<'a> {
        NormWeights { output: Some(weight.into()), ..self }
    }
}

/// Weights of the projections round experts of a width of their own.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct LatentWeights<'a> {
    /// `[L, H]`, and a bias `[L]`.
    pub input: Weight<'a>,
    /// `[L]`, where the norm's gain has a weight.
    pub norm: Option<Tensor<'a>>,
    /// `[H, L]`, and a bias `[H]`.
    pub output: Weight<'a>,
}

impl<'a> LatentWeights<'a> {
    /// Both projections.
    pub const fn new(input: Weight<'a>, output: Weight<'a>) -> LatentWeights<'a> {
        LatentWeights { input, norm: None, output }
    }

    /// With a weight of the norm between them.
    #[must_use]
    pub fn norm(self, weight: impl Into<Tensor<'a>>) -> LatentWeights<'a> {
        LatentWeights { norm: Some(weight.into()), ..self }
    }
}

/// All of these, opened for reading.
pub(in crate::layer) struct HeldAround<'a> {
    pub(super) experts: Option<Held<'a>>,
    pub(super) slots: Option<Held<'a>>,
    pub(super) output: Option<Held<'a>>,
    pub(super) latent: Option<HeldLatent<'a>>,
}

pub(super) struct HeldLatent<'a> {
    pub(super) input: HeldWeight<'a>,
    pub(super) norm: Option<Held<'a>>,
    pub(super) output: HeldWeight<'a>,
}

const INPUT: WeightNames = WeightNames {
    matrix: "latent.input",
    bias: "latent.input.bias",
    up: "latent.input.up",
    up_bias: "latent.input.up_bias",
};
const OUTPUT: WeightNames = WeightNames {
    matrix: "latent.output",
    bias: "latent.output.bias",
    up: "latent.output.up",
    up_bias: "latent.output.up_bias",
};

/// Opens a norm's weight of `width` elements, exactly where there is a norm whose gain has one.
pub(in crate::layer) fn open_norm<'a, 'b>(
    scope: &Scope<'b>,
    argument: &'static str,
    norm: Option<RmsNorm>,
    weight: Option<Tensor<'a>>,
    desc: &LayerDesc,
    width: usize,
) -> Result<Option<Held<'b>>, Error>
where
    'a: 'b,
{
    check_weight(scope.operation, argument, norm.map_or(Gain::One, |norm| norm.gain), weight.is_some())?;
    let alignment = row_alignment(desc.dtype, width);
    weight.map(|weight| scope.read_tensor(argument, weight, desc.dtype, width, alignment)).transpose()
}

impl<'b> HeldAround<'b> {
    pub(in crate::layer) fn open<'a>(
        scope: &Scope<'b>,
        desc: &LayerDesc,
        norms: NormWeights<'a>,
        latent: Option<LatentWeights<'a>>,
    ) -> Result<HeldAround<'b>, Error>
    where
        'a: 'b,
    {
        let (operation, argument) = (scope.operation, "latent");
        let (hidden, width) = (desc.hidden, desc.expert_width());
        let latent = match (&desc.latent, latent) {
            (None, None) => None,
            (Some(_), None) => {
                return Err(Error::Missing { operation, argument, reason: "the descriptor has a latent width" });
            }
            (None, Some(_)) => {
                return Err(Error::Unexpected { operation, argument, reason: "the descriptor has no latent width" });
            }
            (Some(latent), Some(weights)) => {
                let [input, output] = [(&latent.input, [1, width, hidden]), (&latent.output, [1, hidden, width])]
                    .map(|(weight, sizes)| WeightPlace::packed(weight, sizes));
                Some(HeldLatent {
                    input: weights.input.open(scope, INPUT, &latent.input, input)?,
                    norm: open_norm(scope, "latent.norm", latent.norm, weights.norm, desc, width)?,
                    output: weights.output.open(scope, OUTPUT, &latent.output, output)?,
                })
            }
        };
        Ok(HeldAround {
            experts: open_norm(scope, "norms.experts", desc.norms.experts, norms.experts, desc, hidden)?,
            slots: open_norm(scope, "norms.slots", desc.norms.slots, norms.slots, desc, width)?,
            output: open_norm(scope, "norms.output", desc.norms.output, norms.output, desc, hidden)?,
            latent,
        })
    }
}
