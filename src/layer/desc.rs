//! What a layer is.

use super::LayerPlan;
use crate::rules::{
    Activation, AdmissionRule, BalanceRule, Capacity, Dtype, Gating, Glu, IdFormat, Layout, Score, SecondExpert,
    WeightDesc,
};
use crate::runtime::builder::settings;
use crate::{DeviceInfo, Error};

/// A model's MoE layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerDesc {
    /// Type of activations.
    pub dtype: Dtype,
    /// Type of the router's weight: `dtype` or f32.
    pub router_dtype: Dtype,
    /// Hidden size `H`. Rows of a multiple of 8 elements begin on 16 bytes, others on any element and take longer: buffers of `H` or `I` columns alike.
    pub hidden: usize,
    /// Intermediate size `I` of an expert.
    pub intermediate: usize,
    /// Experts `E` that a token's choice is among, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 32.
    pub top_k: usize,
    /// How experts are chosen and weighted.
    pub gating: Gating,
    /// The router's kernel chosen without regard to the number of tokens: a token's result has the same bits whatever batch it is in, and wherever
    /// (products add in the same order in tiles of every height). Not so where tokens compete: capacity, admission.
    pub batch_invariant: bool,
    /// How the ids of choices from elsewhere are stored ([`super::LayerArgs::choices`]).
    pub choices: IdFormat,
    /// Losses and statistics that the gating takes of the batch.
    pub measure: Option<BalanceRule>,
    /// Who gets the experts that were chosen. Its `candidates` are what the gating chooses, its `top_k` is `top_k`.
    pub admission: Option<AdmissionRule>,
    /// From experts as the router knows them to those that are here.
    pub map: Option<MapDesc>,
    /// Limit on the rows of an expert; none is dropless. Dropped slots add nothing to `y`.
    pub capacity: Option<Capacity>,
    /// What the weights of the choices scale.
    pub weighting: Weighting,
    /// An expert's inner form.
    pub mlp: Mlp,
    /// An expert that every token goes to.
    pub shared: Option<SharedDesc>,
}

impl LayerDesc {
    /// Whether a shared expert has a gate.
    pub(super) fn has_shared_gate(&self) -> bool {
        self.shared.is_some_and(|shared| shared.gated)
    }

    /// A layer in the manner of Mixtral, dropless: softmax over all experts, the chosen renormalised, SiLU-gated experts.
    /// Other models differ in a few fields.
    pub const fn new(dtype: Dtype, hidden: usize, intermediate: usize, experts: usize, top_k: usize) -> LayerDesc {
        LayerDesc {
            dtype,
            router_dtype: dtype,
            hidden,
            intermediate,
            experts,
            top_k,
            gating: Gating::new(Score::Softmax).renormalised(),
            batch_invariant: false,
            choices: IdFormat::I32,
            measure: None,
            admission: None,
            map: None,
            capacity: None,
            weighting: Weighting::Output,
            mlp: Mlp::swiglu(dtype),
            shared: None,
        }
    }

    /// Experts whose weights are here.
    pub fn local_experts(&self) -> usize {
        self.map.map_or(self.experts, |map| map.local_experts)
    }

    /// Whether its admission draws second experts.
    pub(super) fn draws(&self) -> bool {
        self.admission.is_some_and(|rule| matches!(rule.second, SecondExpert::Random { .. }))
    }

    /// Makes every choice for a batch of `tokens` tokens on `device`.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn plan(&self, tokens: usize, device: &DeviceInfo) -> Result<LayerPlan, Error> {
        LayerPlan::new(self, tokens, device)
    }
}

settings!(LayerDesc {
    router_dtype: Dtype,
    gating: Gating,
    batch_invariant: bool,
    choices: IdFormat,
    measure: Option<BalanceRule>,
    admission: Option<AdmissionRule>,
    map: Option<MapDesc>,
    capacity: Option<Capacity>,
    weighting: Weighting,
    mlp: Mlp,
    shared: Option<SharedDesc>,
});

/// What the weights of the choices scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Weighting {
    /// Each expert's output, before it is rounded: almost every model.
    Output,
    /// Each expert's input, in the first product; outputs are added as they are (Llama 4).
    Input,
    /// What the activation yields.
    Activation,
}

/// An expert map between choice and dispatch: see [`crate::capacity::expert_map`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapDesc {
    /// Experts whose weights are here.
    pub local_experts: usize,
    /// Columns of the map `R`.
    pub max_replicas: usize,
    /// Chooses the hash that deals slots to replicas.
    pub seed: u32,
}

impl MapDesc {
    /// One copy of each of `local_experts` experts.
    pub const fn new(local_experts: usize) -> MapDesc {
        MapDesc { local_experts, max_replicas: 1, seed: 0 }
    }
}

settings!(MapDesc { max_replicas: usize, seed: u32 });

/// An expert's two products and what is between them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Mlp {
    /// Weights of the first product.
    pub gate_up: WeightDesc,
    /// What is applied after the first product.
    pub activation: Activation,
    /// Weights of the second.
    pub down: WeightDesc,
}

impl Mlp {
    /// SiLU-gated, gate rows before up rows, K-contiguous weights: `w_gate_up [E,2I,H]`, `w_down [E,H,I]`.
    pub const fn swiglu(dtype: Dtype) -> Mlp {
        let down = WeightDesc::new(dtype);
        Mlp { gate_up: down.glu(Glu::Split), activation: Activation::Silu, down }
    }

    /// `max(W x, 0)` without gate: `w_up [E,I,H]`, `w_down [E,H,I]` (Switch).
    pub const fn relu(dtype: Dtype) -> Mlp {
        let weight = WeightDesc::new(dtype);
        Mlp { gate_up: weight, activation: Activation::Relu, down: weight }
    }

    /// gpt-oss: gate and up rows alternate, clamped SwiGLU, transposed weights `w_gate_up [E,H,2I]`, `w_down [E,I,H]`.
    pub const fn gpt_oss(dtype: Dtype) -> Mlp {
        let down = WeightDesc::new(dtype).layout(Layout::Kn);
        let activation = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
        Mlp { gate_up: down.glu(Glu::Interleaved), activation, down }
    }
}

settings!(Mlp { gate_up: WeightDesc, activation: Activation, down: WeightDesc });

/// A shared expert. With the intermediate size and inner form of the others it is computed in their launches, else in two of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SharedDesc {
    /// Its intermediate size.
    pub intermediate: usize,
    /// Its inner form.
    pub mlp: Mlp,
    /// Whether its output is multiplied by `sigmoid(x . gate)` (Qwen2-MoE, Qwen3-Next), else by 1.
    pub gated: bool,
}

impl SharedDesc {
    /// Added with weight 1.
    pub const fn new(intermediate: usize, mlp: Mlp) -> SharedDesc {
        SharedDesc { intermediate, mlp, gated: false }
    }
}

settings!(SharedDesc { gated: bool });
