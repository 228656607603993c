//! A layer's parameters as buffers.

use super::desc::{LayerDesc, Mlp};
use crate::experts::Weight;
use crate::experts::weight::{HeldWeight, WeightNames, WeightPlace};
use crate::routers::{gating, router};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::{Error, In, Tensor};

/// Weights of a layer.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct LayerWeights<'a> {
    /// The router's.
    pub router: RouterWeights<'a>,
    /// The experts'.
    pub experts: ExpertWeights<'a>,
}

impl<'a> LayerWeights<'a> {
    /// Router and experts.
    pub const fn new(router: RouterWeights<'a>, experts: ExpertWeights<'a>) -> LayerWeights<'a> {
        LayerWeights { router, experts }
    }
}

/// Weights of a router and its choice.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct RouterWeights<'a> {
    /// `[E, H]`.
    pub matrix: Tensor<'a>,
    /// `[E]`, added to the logits.
    pub bias: Option<In<'a, f32>>,
    /// `[E]`, added to the scores for the choice only.
    pub correction_bias: Option<In<'a, f32>>,
}

impl<'a> RouterWeights<'a> {
    /// Without biases.
    pub fn new(matrix: impl Into<Tensor<'a>>) -> RouterWeights<'a> {
        RouterWeights { matrix: matrix.into(), bias: None, correction_bias: None }
    }

    pub(super) fn open<'b>(self, scope: &Scope<'b>, desc: &LayerDesc) -> Result<HeldRouter<'b>, Error>
    where
        'a: 'b,
    {
        let LayerDesc { hidden, experts, router_dtype, gating, .. } = *desc;
        gating::check_correction_bias(scope.operation, &gating, self.correction_bias.is_some())?;
        let alignment = shape::row_alignment(router_dtype, hidden);
        Ok(HeldRouter {
            matrix: scope.read_tensor("router.matrix", self.matrix, router_dtype, experts * hidden, alignment)?,
            bias: scope.read_some("router.bias", self.bias, experts, SCALAR)?,
            correction_bias: scope.read_some("router.correction_bias", self.correction_bias, experts, SCALAR)?,
        })
    }
}

buffers!(RouterWeights<'a> { bias: In<f32>, correction_bias: In<f32> });

/// A router's weights opened for reading.
pub(super) struct HeldRouter<'a> {
    pub(super) matrix: Held<'a>,
    pub(super) bias: Option<Held<'a>>,
    pub(super) correction_bias: Option<Held<'a>>,
}

/// Weights of the experts that are here.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct ExpertWeights<'a> {
    /// First product.
    pub gate_up: Weight<'a>,
    /// Second product.
    pub down: Weight<'a>,
    /// The shared expert's; exactly where the descriptor has one.
    pub shared: Option<SharedWeights<'a>>,
}

impl<'a> ExpertWeights<'a> {
    /// Without a shared expert.
    pub const fn new(gate_up: Weight<'a>, down: Weight<'a>) -> ExpertWeights<'a> {
        ExpertWeights { gate_up, down, shared: None }
    }

    /// With a shared expert.
    #[must_use]
    pub const fn shared(self, shared: SharedWeights<'a>) -> ExpertWeights<'a> {
        ExpertWeights { shared: Some(shared), ..self }
    }

    pub(super) fn open<'b>(self, scope: &Scope<'b>, desc: &LayerDesc) -> Result<HeldExperts<'b>, Error>
    where
        'a: 'b,
    {
        let operation = scope.operation;
        let shared = match (&desc.shared, self.shared) {
            (None, None) => None,
            (Some(_), None) => {
                let reason = "the descriptor has a shared expert";
                return Err(Error::Missing { operation, argument: "shared", reason });
            }
            (None, Some(_)) => {
                let reason = "the descriptor has no shared expert";
                return Err(Error::Unexpected { operation, argument: "shared", reason });
            }
            (Some(shared), Some(weights)) => {
                router::check_gate(operation, "shared.gate", shared.gated, weights.gate.is_some())?;
                let sizes = [1, shared.intermediate, desc.hidden];
                let alignment = shape::row_alignment(desc.router_dtype, desc.hidden);
                let gate = |tensor| scope.read_tensor("shared.gate", tensor, desc.router_dtype, desc.hidden, alignment);
                Some(HeldShared {
                    mlp: open_mlp(scope, &SHARED, &shared.mlp, [weights.gate_up, weights.down], sizes)?,
                    gate: weights.gate.map(gate).transpose()?,
                })
            }
        };
        let sizes = [desc.local_experts(), desc.intermediate, desc.hidden];
        Ok(HeldExperts { mlp: open_mlp(scope, &ROUTED, &desc.mlp, [self.gate_up, self.down], sizes)?, shared })
    }
}

/// Weights of a shared expert: those of one expert.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct SharedWeights<'a> {
    /// First product.
    pub gate_up: Weight<'a>,
    /// Second product.
    pub down: Weight<'a>,
    /// `[1, H]`, of the type of the router's matrix; exactly where the descriptor has a gated shared expert.
    pub gate: Option<Tensor<'a>>,
}

impl<'a> SharedWeights<'a> {
    /// Both products.
    pub const fn new(gate_up: Weight<'a>, down: Weight<'a>) -> SharedWeights<'a> {
        SharedWeights { gate_up, down, gate: None }
    }

    /// With a gate.
    #[must_use]
    pub fn gate(self, gate: impl Into<Tensor<'a>>) -> SharedWeights<'a> {
        SharedWeights { gate: Some(gate.into()), ..self }
    }
}

/// The experts' weights opened for reading.
pub(super) struct HeldExperts<'a> {
    pub(super) mlp: [HeldWeight<'a>; 2],
    pub(super) shared: Option<HeldShared<'a>>,
}

/// A shared expert's.
pub(super) struct HeldShared<'a> {
    pub(super) mlp: [HeldWeight<'a>; 2],
    pub(super) gate: Option<Held<'a>>,
}

impl HeldExperts<'_> {
    /// The weight of a shared expert's gate.
    pub(super) fn shared_gate(&self) -> Option<Address<'_>> {
        self.shared.as_ref().and_then(|shared| optional(&shared.gate))
    }
}

const ROUTED: [WeightNames; 2] = [
    WeightNames { matrix: "gate_up", bias: "gate_up.bias", up: "gate_up.up", up_bias: "gate_up.up_bias" },
    WeightNames { matrix: "down", bias: "down.bias", up: "down.up", up_bias: "down.up_bias" },
];
const SHARED: [WeightNames; 2] = [
    WeightNames {
        matrix: "shared.gate_up",
        bias: "shared.gate_up.bias",
        up: "shared.gate_up.up",
        up_bias: "shared.gate_up.up_bias",
    },
    WeightNames {
        matrix: "shared.down",
        bias: "shared.down.bias",
        up: "shared.down.up",
        up_bias: "shared.down.up_bias",
    },
];

fn open_mlp<'a, 'b>(
    scope: &Scope<'b>,
    names: &[WeightNames; 2],
    mlp: &Mlp,
    [gate_up, down]: [Weight<'a>; 2],
    [experts, intermediate, hidden]: [usize; 3],
) -> Result<[HeldWeight<'b>; 2], Error>
where
    'a: 'b,
{
    let first = WeightPlace::packed(&mlp.gate_up, [experts, intermediate, hidden]);
    let second = WeightPlace::packed(&mlp.down, [experts, hidden, intermediate]);
    Ok([gate_up.open(scope, names[0], &mlp.gate_up, first)?, down.open(scope, names[1], &mlp.down, second)?])
}
