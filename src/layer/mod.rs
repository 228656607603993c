//! A whole Mixture-of-Experts layer: router, gating with dispatch, two grouped GEMMs, combine.
//!
//! With `g = gating(router(x))`:
//!
//! `y[t] = residual[t] + shared(x[t]) + sum_{e in g.ids[t]} g.weight[t,e] * W_down[e] act(W_gate_up[e] x[t])`
//!
//! or, where the weights scale the experts' input (Llama 4), `W_down[e] act(W_gate_up[e] (g.weight[t,e] x[t]))`.
//!
//! A [`LayerDesc`] describes a model's layer once; a [`LayerPlan`] holds every choice for a number of tokens, is a plain
//! value made without touching the device, and can be used again for every batch of that size. [`LayerPlan::forward`]
//! enqueues five launches (seven with a shared expert), allocates nothing and waits for nothing, so that it can be captured
//! in a CUDA graph after [`crate::Kernels::preload`]. Capture needs a stream other than the default one, where cudarc's event
//! tracking would wait for events from before the capture: turn it off with `CudaContext::disable_event_tracking` before
//! allocating the buffers of a graph.

use crate::rules::Capacity;
use crate::rules::Dtype;
use crate::rules::{Activation, Glu, Layout};
use crate::rules::{Gating, Score};
use crate::{DeviceInfo, Error, In, Out};

mod forward;
mod plan;

pub use plan::LayerPlan;

const OPERATION: &str = "layer";

/// A model's MoE layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerDesc {
    /// Type of activations and of the experts' weights.
    pub dtype: Dtype,
    /// Type of the router's weight: `dtype` or f32.
    pub router_dtype: Dtype,
    /// Hidden size `H`, a multiple of 8.
    pub hidden: usize,
    /// Intermediate size `I` of an expert, a multiple of 8.
    pub intermediate: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 32.
    pub top_k: usize,
    /// How experts are chosen and weighted.
    pub gating: Gating,
    /// What the weights of gating scale.
    pub weighting: Weighting,
    /// Limit on the slots of an expert; none is dropless. Dropped slots add nothing to `y`.
    pub capacity: Option<Capacity>,
    /// An expert's inner form.
    pub mlp: Mlp,
    /// An expert that every token goes to, with weight 1.
    pub shared: Option<SharedDesc>,
}

impl LayerDesc {
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
            weighting: Weighting::Output,
            capacity: None,
            mlp: Mlp::SWIGLU,
            shared: None,
        }
    }

    /// Makes every choice for a batch of `tokens` tokens on `device`.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn plan(&self, tokens: usize, device: &DeviceInfo) -> Result<LayerPlan, Error> {
        LayerPlan::new(self, tokens, device)
    }
}

/// What the weights of gating scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// Each expert's output, in combine: almost every model.
    Output,
    /// Each expert's input, in the first GEMM; combine adds the outputs as they are (Llama 4).
    Input,
}

/// An expert's two matrices and what is between them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mlp {
    /// How the first matrix's outputs fold into `I` columns.
    pub glu: Glu,
    /// What is applied after the first matrix.
    pub activation: Activation,
    /// Memory order of the first matrix.
    pub gate_up_layout: Layout,
    /// Memory order of the second.
    pub down_layout: Layout,
}

impl Mlp {
    /// SiLU-gated, gate rows before up rows, K-contiguous weights: `w_gate_up [E,2I,H]`, `w_down [E,H,I]`.
    pub const SWIGLU: Mlp =
        Mlp { glu: Glu::Split, activation: Activation::Silu, gate_up_layout: Layout::Nk, down_layout: Layout::Nk };

    /// `max(W x, 0)` without gate: `w_up [E,I,H]`, `w_down [E,H,I]` (Switch).
    pub const RELU: Mlp =
        Mlp { glu: Glu::None, activation: Activation::Relu, gate_up_layout: Layout::Nk, down_layout: Layout::Nk };

    /// gpt-oss: gate and up rows alternate, clamped SwiGLU, transposed weights `w_gate_up [E,H,2I]`, `w_down [E,I,H]`.
    pub const GPT_OSS: Mlp = Mlp {
        glu: Glu::Interleaved,
        activation: Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 },
        gate_up_layout: Layout::Kn,
        down_layout: Layout::Kn,
    };
}

/// A shared expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedDesc {
    /// Its intermediate size, a multiple of 8.
    pub intermediate: usize,
    /// Its inner form.
    pub mlp: Mlp,
}

/// Weights of a layer. `Nb` is `2I` with a gated unit, else `I`.
pub struct LayerWeights<'a, T, W = T> {
    /// `[E, H]`.
    pub router: In<'a, W>,
    /// `[E]`, added to the logits.
    pub router_bias: Option<In<'a, f32>>,
    /// `[E]`, added to the scores for the choice only.
    pub correction_bias: Option<In<'a, f32>>,
    /// First matrices and biases.
    pub gate_up: Linear<'a, T>,
    /// Second matrices and biases.
    pub down: Linear<'a, T>,
    /// The shared expert's; exactly where the descriptor has one.
    pub shared: Option<SharedWeights<'a, T>>,
}

/// Matrices, one for each expert, with optional biases.
pub struct Linear<'a, T> {
    /// `[E, Nb, K]` or `[E, K, Nb]`, by the layout.
    pub weight: In<'a, T>,
    /// `[E, Nb]`.
    pub bias: Option<In<'a, T>>,
}

/// Weights of a shared expert: those of one expert.
pub struct SharedWeights<'a, T> {
    /// First matrix and bias.
    pub gate_up: Linear<'a, T>,
    /// Second matrix and bias.
    pub down: Linear<'a, T>,
}

impl<T, W> Clone for LayerWeights<'_, T, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, W> Copy for LayerWeights<'_, T, W> {}

impl<T> Clone for Linear<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Linear<'_, T> {}

impl<T> Clone for SharedWeights<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedWeights<'_, T> {}

/// Inputs and outputs of a forward pass. Intermediate results that no buffer is given for stay in the workspace.
pub struct LayerArgs<'a, T> {
    /// `[T, H]`.
    pub x: In<'a, T>,
    /// `[T, H]`, added to `y`.
    pub residual: Option<In<'a, T>>,
    /// `[T, H]`, written.
    pub y: Out<'a, T>,
    /// `[T, E]`, written: the router's logits.
    pub logits: Option<Out<'a, f32>>,
    /// `[T, k]`, written: chosen experts.
    pub ids: Option<Out<'a, i32>>,
    /// `[T, k]`, written: their weights.
    pub weights: Option<Out<'a, f32>>,
    /// `[E]`, written: slots of each expert.
    pub counts: Option<Out<'a, i32>>,
}

impl<'a, T> LayerArgs<'a, T> {
    /// `x` to `y`, nothing else.
    pub fn new(x: In<'a, T>, y: Out<'a, T>) -> LayerArgs<'a, T> {
        LayerArgs { x, residual: None, y, logits: None, ids: None, weights: None, counts: None }
    }
}

/// A step of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Logits.
    Router,
    /// Gating and dispatch in one launch.
    GateDispatch,
    /// First grouped GEMM with the activation.
    GateUp,
    /// Second grouped GEMM.
    Down,
    /// The shared expert's first product.
    SharedGateUp,
    /// The shared expert's second product.
    SharedDown,
    /// Weighted sum.
    Combine,
}

impl Stage {
    /// A word for tables.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Router => "router",
            Stage::GateDispatch => "gate+dispatch",
            Stage::GateUp => "gate_up",
            Stage::Down => "down",
            Stage::SharedGateUp => "shared gate_up",
            Stage::SharedDown => "shared down",
            Stage::Combine => "combine",
        }
    }
}
