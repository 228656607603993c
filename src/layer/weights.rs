//! A layer's parameters as buffers.

use super::around::{HeldAround, LatentWeights, NormWeights, open_norm};
use super::desc::{LayerDesc, Mlp};
use crate::experts::Weight;
use crate::experts::gemm::{HeldByExpert, SwigluByExpert};
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
    /// `[E, H]`, `[E + appended, H]` where appended experts have columns; absent only where the logits are given
    /// ([`super::RouteArgs::given_logits`]).
    pub matrix: Option<Tensor<'a>>,
    /// `[E]`, added to the logits; as many as the matrix has rows.
    pub bias: Option<In<'a, f32>>,
    /// `[E]`, added to the scores for the choice only.
    pub correction_bias: Option<In<'a, f32>>,
    /// `[E]`: a factor of each expert's weight; exactly with [`crate::rules::Gating::expert_scale`].
    pub expert_scale: Option<In<'a, f32>>,
    /// `[1]`: a factor of all weights; exactly with [`crate::rules::Gating::global_scale`].
    pub global_scale: Option<In<'a, f32>>,
    /// `[H]`, of the type of activations, where the norm of the router's input has a weight.
    pub norm: Option<Tensor<'a>>,
}

impl<'a> RouterWeights<'a> {
    /// Without biases.
    pub fn new(matrix: impl Into<Tensor<'a>>) -> RouterWeights<'a> {
        RouterWeights { matrix: Some(matrix.into()), ..RouterWeights::of_logits() }
    }

    /// Nothing, for logits that are given.
    pub const fn of_logits() -> RouterWeights<'a> {
        RouterWeights {
            matrix: None,
            bias: None,
            correction_bias: None,
            expert_scale: None,
            global_scale: None,
            norm: None,
        }
    }

    /// With a weight of the norm of its input.
    #[must_use]
    pub fn norm(self, weight: impl Into<Tensor<'a>>) -> RouterWeights<'a> {
        RouterWeights { norm: Some(weight.into()), ..self }
    }

    pub(super) fn open<'b>(self, scope: &Scope<'b>, desc: &LayerDesc) -> Result<HeldRouter<'b>, Error>
    where
        'a: 'b,
    {
        let LayerDesc { hidden, experts, router_dtype, gating, .. } = *desc;
        gating::check_correction_bias(scope.operation, &gating, self.correction_bias.is_some())?;
        gating::check_scales(scope.operation, &gating, self.expert_scale.is_some(), self.global_scale.is_some())?;
        let columns = desc.logit_columns();
        let alignment = shape::row_alignment(router_dtype, hidden);
        let matrix = |tensor| scope.read_tensor("router.matrix", tensor, router_dtype, columns * hidden, alignment);
        Ok(HeldRouter {
            matrix: self.matrix.map(matrix).transpose()?,
            norm: open_norm(scope, "router.norm", desc.norms.router, self.norm, desc, hidden)?,
            bias: scope.read_some("router.bias", self.bias, columns, SCALAR)?,
            correction_bias: scope.read_some("router.correction_bias", self.correction_bias, experts, SCALAR)?,
            expert_scale: scope.read_some("router.expert_scale", self.expert_scale, experts, SCALAR)?,
            global_scale: scope.read_some("router.global_scale", self.global_scale, 1, SCALAR)?,
        })
    }
}

buffers!(RouterWeights<'a> {
    bias: In<f32>,
    correction_bias: In<f32>,
    expert_scale: In<f32>,
    global_scale: In<f32>,
});

/// A router's weights opened for reading.
pub(super) struct HeldRouter<'a> {
    pub(super) matrix: Option<Held<'a>>,
    pub(super) norm: Option<Held<'a>>,
    pub(super) bias: Option<Held<'a>>,
    pub(super) correction_bias: Option<Held<'a>>,
    pub(super) expert_scale: Option<Held<'a>>,
    pub(super) global_scale: Option<Held<'a>>,
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
    /// Numbers of the activation that differ from expert to expert.
    pub swiglu: SwigluByExpert<'a>,
    /// `[H]` of the layer's type, added to every token's sum (JetMoE). Not with a latent width.
    pub bias: Option<Tensor<'a>>,
    /// Those of norms.
    pub norms: NormWeights<'a>,
    /// Those of projections round the experts; exactly where the descriptor has a latent width.
    pub latent: Option<LatentWeights<'a>>,
}

impl<'a> ExpertWeights<'a> {
    /// Without a shared expert.
    pub const fn new(gate_up: Weight<'a>, down: Weight<'a>) -> ExpertWeights<'a> {
        let (norms, swiglu) = (NormWeights::new(), SwigluByExpert::new());
        ExpertWeights { gate_up, down, shared: None, swiglu, bias: None, norms, latent: None }
    }

    /// With a vector that is added to every token's sum.
    #[must_use]
    pub fn bias(self, bias: impl Into<Tensor<'a>>) -> ExpertWeights<'a> {
        ExpertWeights { bias: Some(bias.into()), ..self }
    }

    /// With numbers of the activation that differ from expert to expert.
    #[must_use]
    pub const fn swiglu(self, swiglu: SwigluByExpert<'a>) -> ExpertWeights<'a> {
        ExpertWeights { swiglu, ..self }
    }

    /// With a shared expert.
    #[must_use]
    pub const fn shared(self, shared: SharedWeights<'a>) -> ExpertWeights<'a> {
        ExpertWeights { shared: Some(shared), ..self }
    }

    /// With weights of norms.
    #[must_use]
    pub const fn norms(self, norms: NormWeights<'a>) -> ExpertWeights<'a> {
        ExpertWeights { norms, ..self }
    }

    /// With projections round the experts.
    #[must_use]
    pub const fn latent(self, latent: LatentWeights<'a>) -> ExpertWeights<'a> {
        ExpertWeights { latent: Some(latent), ..self }
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
        let sizes = [desc.local_experts(), desc.intermediate, desc.expert_width()];
        Ok(HeldExperts {
            mlp: open_mlp(scope, &ROUTED, &desc.mlp, [self.gate_up, self.down], sizes)?,
            shared,
            swiglu: self.swiglu.open(scope, desc.mlp.activation, desc.local_experts())?,
            bias: self.bias.map(|bias| open_bias(scope, desc, bias)).transpose()?,
            around: HeldAround::open(scope, desc, self.norms, self.latent)?,
        })
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
    pub(super) swiglu: HeldByExpert<'a>,
    bias: Option<Held<'a>>,
    pub(super) around: HeldAround<'a>,
}

/// A shared expert's.
pub(super) struct HeldShared<'a> {
    pub(super) mlp: [HeldWeight<'a>; 2],
    pub(super) gate: Option<Held<'a>>,
}

impl HeldExperts<'_> {
    /// The vector that is added to every token's sum.
    pub(super) fn bias(&self) -> Option<Address<'_>> {
        optional(&self.bias)
    }

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

/// A vector that is added to every token's sum.
fn open_bias<'a: 'b, 'b>(scope: &Scope<'b>, desc: &LayerDesc, bias: Tensor<'a>) -> Result<Held<'b>, Error> {
    let (operation, argument) = (scope.operation, "bias");
    if desc.latent.is_some() {
        return Err(Error::unsupported(operation, argument, "experts of the layer's width", "a latent width"));
    }
    let alignment = shape::row_alignment(desc.dtype, desc.hidden);
    scope.read_tensor(argument, bias, desc.dtype, desc.hidden, alignment)
}
