//! What a layer is.

use super::{LatentDesc, LayerPlan, Norms};
use crate::experts::gemm::KernelSet;
use crate::experts::overrides::Overrides;
use crate::rules::{
    Activation, AdmissionRule, BalanceRule, Capacity, Dtype, Gating, Glu, IdFormat, Layout, LogitRule, NullExperts,
    Score, SecondExpert, Swiglu, WeightDesc, Weighting,
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
    /// Experts per token `k`, 1 to 64; to 32 with a measure, an admission or a map, and with rules that are more than a score, groups and a bias.
    pub top_k: usize,
    /// What is done to the router's product.
    pub logits: LogitRule,
    /// How experts are chosen and weighted. With [`Gating::appended`] the layer has `E + appended` experts, of which a token goes to `k + appended`:
    /// their weights stand behind the others'.
    pub gating: Gating,
    /// Kernels chosen without regard to the number of tokens, the products' from the `sm_80` set alone: a token's result has the same bits whatever
    /// batch it is in, and wherever (products of one set add in the same order in tiles of every height). Not so where tokens compete: capacity, admission.
    pub batch_invariant: bool,
    /// How the ids of choices from elsewhere are stored ([`super::LayerArgs::choices`]); of 32 bits where an admission looks at them.
    pub choices: IdFormat,
    /// Losses and statistics that the gating takes of the batch.
    pub measure: Option<BalanceRule>,
    /// Who gets the experts that were chosen. Its `candidates` are what the gating chooses, its `top_k` is `top_k`.
    pub admission: Option<AdmissionRule>,
    /// From experts as the router knows them to those that are here.
    pub map: Option<MapDesc>,
    /// The last of the `E` experts compute nothing. Not with a map, which can say so of any expert, nor with an admission or appended experts.
    pub null: Option<NullExperts>,
    /// Limit on the rows of an expert; none is dropless. Dropped slots add nothing to `y`. Of sequences whose tokens alternate the limit is an
    /// `admission`'s ([`crate::capacity::dispatch`]).
    pub capacity: Option<Capacity>,
    /// What the weights of the choices scale.
    pub weighting: Weighting,
    /// An expert's inner form.
    pub mlp: Mlp,
    /// An expert that every token goes to.
    pub shared: Option<SharedDesc>,
    /// Factor of the sum over the routed experts, weights apart (Step 3, Laguna, MiniMax-M3); most models scale the weights:
    /// [`Gating::scale`].
    pub routed_scale: f32,
    /// RMS norms of what router and experts see, and of what experts and the whole layer yield.
    pub norms: Norms,
    /// Routed experts of a width of their own, between two projections.
    pub latent: Option<LatentDesc>,
    /// How a token's experts are added up.
    pub token_sums: TokenSums,
    /// Times that a run on a GPU measured: the products' kernels are the fastest of those that it timed ([`Overrides::leak`]).
    pub overrides: Option<&'static Overrides>,
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
            logits: LogitRule::PLAIN,
            gating: Gating::new(Score::Softmax).renormalised(),
            batch_invariant: false,
            choices: IdFormat::I32,
            measure: None,
            admission: None,
            map: None,
            null: None,
            capacity: None,
            weighting: Weighting::Output,
            mlp: Mlp::swiglu(dtype),
            shared: None,
            routed_scale: 1.0,
            norms: Norms::new(),
            latent: None,
            token_sums: TokenSums::Ordered,
            overrides: None,
        }
    }

    /// Factor of a shared expert.
    pub(super) fn shared_scale(&self) -> f32 {
        self.shared.map_or(1.0, |shared| shared.scale)
    }

    /// Width of the routed experts' inputs and outputs: `H`, or the latent one.
    pub fn expert_width(&self) -> usize {
        self.latent.map_or(self.hidden, |latent| latent.width)
    }

    /// Experts whose weights are here.
    pub fn local_experts(&self) -> usize {
        let null = self.null.map_or(0, |null| null.count);
        self.map.map_or(self.all_experts().saturating_sub(null), |map| map.local_experts)
    }

    /// Experts with those that are appended.
    pub fn all_experts(&self) -> usize {
        self.experts.saturating_add(self.gating.appended_experts())
    }

    /// Experts of a token with those that are appended: `k` of ids and weights `[T, k]`.
    pub fn all_choices(&self) -> usize {
        self.top_k.saturating_add(self.gating.appended_experts())
    }

    /// Choices of a token before an admission: as many candidates as it has, else all of them.
    pub(in crate::layer) fn candidates(&self) -> usize {
        self.admission.map_or(self.all_choices(), |rule| rule.candidates)
    }

    /// Logits of a token: `E`, and a column for each appended expert that has one.
    pub fn logit_columns(&self) -> usize {
        self.experts.saturating_add(self.gating.appended_columns())
    }

    /// Kernels that may compute its products: one set where bits must not depend on the batch.
    pub(super) const fn kernels(&self) -> KernelSet {
        if self.batch_invariant { KernelSet::Sm80 } else { KernelSet::Fastest }
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
    logits: LogitRule,
    gating: Gating,
    batch_invariant: bool,
    choices: IdFormat,
    measure: Option<BalanceRule>,
    admission: Option<AdmissionRule>,
    map: Option<MapDesc>,
    null: Option<NullExperts>,
    capacity: Option<Capacity>,
    weighting: Weighting,
    mlp: Mlp,
    shared: Option<SharedDesc>,
    routed_scale: f32,
    norms: Norms,
    latent: Option<LatentDesc>,
    token_sums: TokenSums,
    overrides: Option<&'static Overrides>,
});

/// How a whole layer adds up a token's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TokenSums {
    /// In the order of the choices, of rows that the second product has written: the same bits at each run.
    Ordered,
    /// By the second product itself, which adds each row to its token's, in f32 and atomically ([`crate::experts::gemm::Output::TokenSums`]). **Not deterministic:** additions come in
    /// the order in which blocks end, so that the last bits of `y` differ from run to run.
    ///
    /// `S H` values are neither written nor read again; `T H` of f32 are set to zero, added to and read once. That is less traffic of DRAM while these stay in
    /// L2 (`4 T H` bytes), and more where they do not, as each addition reads and writes its place. The product is one of the `sm_80` set, also on Hopper.
    /// A product of few rows an expert keeps its rows, as does one with a norm of each expert's output, and the parts of a layer
    /// ([`crate::layer::ExpertsPlan`]). Not with [`LayerDesc::batch_invariant`].
    Atomic,
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
        Mlp { gate_up: down.glu(Glu::Interleaved), activation: Activation::Swiglu(Swiglu::GPT_OSS), down }
    }
}

settings!(Mlp { gate_up: WeightDesc, activation: Activation, down: WeightDesc });

/// A shared expert. With the intermediate size and weight forms of the others it is computed in their launches, else in two of its own. On the way back its size may
/// be another.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SharedDesc {
    /// Its intermediate size.
    pub intermediate: usize,
    /// Its inner form.
    pub mlp: Mlp,
    /// Whether its output is multiplied by `sigmoid(x . gate)` (Qwen2-MoE, Qwen3-Next), else by 1.
    pub gated: bool,
    /// Factor of its output; 1/2, with a [`LayerDesc::routed_scale`] of 1/2, is the mean of both parts (Cohere 2).
    pub scale: f32,
}

impl SharedDesc {
    /// Added with weight 1.
    pub const fn new(intermediate: usize, mlp: Mlp) -> SharedDesc {
        SharedDesc { intermediate, mlp, gated: false, scale: 1.0 }
    }

    /// Whether it can be computed in the launches of `layer`'s experts: only the activation may be another.
    pub(super) fn joins(&self, layer: &LayerDesc) -> bool {
        self.intermediate == layer.intermediate && self.joins_back(layer)
    }

    /// Whether the way back can be: the intermediate size may be another too.
    pub(super) fn joins_back(&self, layer: &LayerDesc) -> bool {
        let Mlp { gate_up, down, .. } = layer.mlp;
        layer.latent.is_none() && (self.mlp.gate_up, self.mlp.down) == (gate_up, down)
    }
}

settings!(SharedDesc { mlp: Mlp, gated: bool, scale: f32 });
