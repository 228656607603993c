//! A layer's way back: from the gradient of its output to those of its input and of every parameter, in one call.
//!
//! With `z` the pre-activations of a row, `A = act(z)`, `s` the row's weight and `dO` the row of `dy` of its token, the experts' part is
//! (SonicMoE, arXiv:2512.14080, algorithm 3)
//!
//! - `dA' = dO W_down`, by the weight in its other order;
//! - `ds = <dA', A>`, `dz = s act'(z) dA'`, and `s A` once more;
//! - `dW_down = sum dO^T (s A)` and `dW_gate_up = sum dz^T x` over the rows of each expert;
//! - `dx = sum over a token's rows of dz W_gate_up`,
//!
//! all of which are [`crate::experts::gemm_backward`], [`crate::experts::k_grouped`], [`crate::experts::gemm`] and [`crate::experts::combine`]; the router's part is [`crate::routers::gating_backward`], with the gradients of its losses, and [`crate::routers::router_backward`]. Only the
//! pre-activations, the logits and the rows of the dispatch are kept from the forward pass: [`Saved`]. Sums are made in a fixed order: the same
//! input gives the same bits. A dropped choice has no gradient; neither has the choice itself. What was dropped between the products is drawn again.
//! [`Weighting::Input`](super::Weighting::Input) and [`Weighting::Activation`](super::Weighting::Activation) go back their own way.
//!
//! Norms of what router and experts see, of each expert's output and of the sum go back too, and so does a latent width; what they normalised is made again or
//! kept.
//!
//! A residual's gradient is `dy`, and so is that of what [`super::LayerArgs::accumulate`] adds to.
//!
//! # A framework's autograd function
//!
//! ```
//! use cudarc::driver::{CudaSlice, CudaStream};
//! use moe_kernels::layer::*;
//! use moe_kernels::{Error, Kernels, Workspace};
//! # use moe_kernels::{Dtype, experts::Weight};
//! # type Stream = std::sync::Arc<CudaStream>;
//!
//! struct Moe { kernels: Kernels, plan: LayerPlan, back: BackwardPlan, workspace: Workspace }
//!
//! impl Moe {
//!     fn forward(&mut self, s: &Stream, w: &LayerWeights<'_>, x: &CudaSlice<f32>, y: &mut CudaSlice<f32>) -> Result<Saved<f32>, Error> {
//!         let mut saved = Saved::new(s, &self.back)?;
//!         self.plan.forward_saving(&self.kernels, s, w, LayerArgs::new(x, y), &mut saved, &mut self.workspace)?;
//!         Ok(saved)
//!     }
//!
//!     fn backward(&mut self, s: &Stream, w: &LayerWeights<'_>, saved: Saved<f32>, args: BackwardArgs<'_, f32>) -> Result<(), Error> {
//!         self.back.backward(&self.kernels, s, w, &saved, args, &mut self.workspace)
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = Kernels::new(stream.context())?;
//! # let (tokens, hidden, intermediate, experts) = (5, 16, 24, 4);
//! let desc = LayerDesc::new(Dtype::F32, hidden, intermediate, experts, 2);
//! let plan = desc.plan(tokens, kernels.device())?;
//! let back = plan.backward_plan(&BackwardDesc::new())?;
//! assert_eq!(back.launches(), 8);
//! let workspace = Workspace::new(&stream, plan.workspace_bytes().max(back.workspace_bytes()))?;
//! let mut moe = Moe { kernels, plan, back, workspace };
//! # let random = |n: usize| (0..n).map(|i| (i * 7919 % 251) as f32 / 250.0 - 0.5).collect::<Vec<_>>();
//! # let router = stream.clone_htod(&random(experts * hidden))?;
//! # let gate_up = stream.clone_htod(&random(experts * 2 * intermediate * hidden))?;
//! # let down = stream.clone_htod(&random(experts * hidden * intermediate))?;
//! # let x = stream.clone_htod(&random(tokens * hidden))?;
//! # let dy = stream.clone_htod(&random(tokens * hidden))?;
//! # let mut y = stream.alloc_zeros::<f32>(tokens * hidden)?;
//! # let experts_here = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down));
//! let weights = LayerWeights::new(RouterWeights::new(&router), experts_here);
//!
//! let saved = moe.forward(&stream, &weights, &x, &mut y)?;
//! let mut dx = stream.alloc_zeros::<f32>(tokens * hidden)?;
//! let mut d_router = stream.alloc_zeros::<f32>(router.len())?;
//! let (mut d_gate_up, mut d_down) = (stream.alloc_zeros::<f32>(gate_up.len())?, stream.alloc_zeros::<f32>(down.len())?);
//! let gradients = LayerGradients::new()
//!     .x(&mut dx)
//!     .router(RouterGradients::new().matrix(&mut d_router))
//!     .gate_up(WeightGradients::new(&mut d_gate_up))
//!     .down(WeightGradients::new(&mut d_down));
//! moe.backward(&stream, &weights, saved, BackwardArgs::new(&x, &dy, gradients))?;
//! assert!(stream.clone_dtoh(&dx)?.iter().all(|v| v.is_finite() && *v != 0.0));
//! # Ok(())
//! # }
//! ```
//!
//! # Memory
//!
//! [`BackwardPlan::saved_bytes`] says what [`Saved`] takes, [`BackwardDesc::recompute`] leaves the pre-activations out of it.

mod args;
mod around;
mod gradients;
mod held;
mod mlp;
mod norms;
mod pass;
mod plan;
mod router;
mod run;
mod saved;
mod shared;

pub use args::BackwardArgs;
pub use gradients::{
    LatentGradients, LayerGradients, NormGradients, RouterGradients, SharedGradients, WeightGradients,
};
pub use plan::BackwardPlan;
pub use saved::Saved;

use crate::rules::LossGradient;
use crate::runtime::builder::settings;

const OPERATION: &str = "layer_backward";

/// What a backward pass is asked for, beside the layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BackwardDesc {
    /// Who chose the experts.
    pub origin: Origin,
    /// Losses of the router, whose gradient joins that of the weights; with [`Origin::Choices`] none.
    pub losses: Option<LossGradient>,
    /// Adds the parameters' gradients to what their buffers hold (micro-batches), in f32 and once, before they are rounded; gradients of `x`, of
    /// logits and of choices are written.
    pub accumulate: bool,
    /// Whether the gradient of an expert without rows is left as it is; else it becomes zero, or with `accumulate` stays.
    pub keep_empty: bool,
    /// Computes the pre-activations once more instead of keeping them.
    pub recompute: bool,
}

impl BackwardDesc {
    /// The layer's own router, no losses, gradients written, pre-activations kept.
    pub const fn new() -> BackwardDesc {
        BackwardDesc { origin: Origin::Router, losses: None, accumulate: false, keep_empty: false, recompute: false }
    }
}

impl Default for BackwardDesc {
    fn default() -> BackwardDesc {
        BackwardDesc::new()
    }
}

settings!(BackwardDesc {
    origin: Origin,
    losses: Option<LossGradient>,
    accumulate: bool,
    keep_empty: bool,
    recompute: bool,
});

/// Who chose the experts of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Origin {
    /// The layer's router.
    Router,
    /// The layer's gating, of logits that were given ([`super::RouteArgs::given_logits`]): their gradient is returned.
    Logits,
    /// Somebody else ([`super::LayerArgs::choices`]): the gradient of the weights is returned.
    Choices,
}

/// A step of a layer's way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackwardStage {
    /// The first product once more.
    GateUp,
    /// `dy` through the second product and the activation.
    Hidden,
    /// Gradient of the second product's weight.
    DownWeight,
    /// Gradient of the second product's bias, where its weight's is not asked for, whose launch has it else.
    DownBias,
    /// Through the first product; each of its tensors.
    Input,
    /// Gradient of the first product's weight; of each of its tensors.
    GateUpWeight,
    /// Gradient of the first product's bias, where its weight's is not asked for.
    GateUpBias,
    /// From rows' weights to choices, back through an admission, where there is no [`BackwardStage::Gating`].
    Choices,
    /// From rows' weights and losses to logits and learned factors, back through an admission, with the gradients of choices where these are asked for.
    Gating,
    /// Sums of learned factors' gradients over tokens, on a device without cooperative launches; else [`BackwardStage::Gating`] has them.
    Factors,
    /// Gradient of the router's weight.
    RouterWeight,
    /// Logits through the router's product.
    RouterInput,
    /// Both in one launch, where there would be more than nine.
    RouterBoth,
    /// Gradient of the router's bias, where its weight's is not asked for.
    RouterBias,
    /// A shared expert's gate, by which the gradient of its second product's bias is weighted; only for that.
    SharedGate,
    /// [`BackwardStage::Hidden`] of the shared expert; this and the following where its rows are not in the others' launches.
    SharedHidden,
    /// [`BackwardStage::DownWeight`] of the shared expert.
    SharedDownWeight,
    /// [`BackwardStage::DownBias`] of the shared expert.
    SharedDownBias,
    /// [`BackwardStage::Input`] of the shared expert.
    SharedInput,
    /// [`BackwardStage::GateUpWeight`] of the shared expert.
    SharedGateUpWeight,
    /// [`BackwardStage::GateUpBias`] of the shared expert.
    SharedGateUpBias,
    /// [`BackwardStage::RouterWeight`] of the gate, where the layer's router has no such launch.
    SharedGateWeight,
    /// [`BackwardStage::RouterInput`] of the gate, likewise.
    SharedGateInput,
    /// Both in one launch, where there would be more than nine.
    SharedGateBoth,
    /// Gradient of the vector that is added to every token's sum, where somebody asks for it.
    Bias,
    /// Sum of a token's rows.
    Sum,
    /// What the experts saw behind a norm, once more.
    ExpertNormAgain,
    /// Through that norm.
    ExpertNorm,
    /// Gradient of its weight, where it has one.
    ExpertNormWeight,
    /// A shared expert's part of the gradient of `x`, where the others' goes through a norm.
    SharedSum,
    /// What the router saw behind a norm, once more.
    RouterNormAgain,
    /// Through that norm.
    RouterNorm,
    /// Gradient of its weight, where it has one.
    RouterNormWeight,
    /// Through the norm of the sum.
    OutputNorm,
    /// Gradient of its weight, where it has one.
    OutputNormWeight,
    /// Through the norm of each expert's output, with the gradients of the rows' weights.
    SlotNorm,
    /// Gradient of its weight, where it has one.
    SlotNormWeight,
    /// The projection to a latent width once more.
    LatentInputAgain,
    /// The norm behind it once more.
    LatentNormAgain,
    /// Through that norm.
    LatentNorm,
    /// Gradient of its weight, where it has one.
    LatentNormWeight,
    /// Gradient of the weight of the projection to a latent width.
    LatentInputWeight,
    /// Through that projection.
    LatentInput,
    /// Gradient of the weight of the projection of the experts' sum.
    LatentOutputWeight,
    /// Through that projection.
    LatentOutput,
}

impl BackwardStage {
    /// Whether it belongs to a norm, or to a projection to a latent width.
    pub const fn is_around(self) -> bool {
        use BackwardStage::*;
        matches!(
            self,
            ExpertNormAgain
                | ExpertNorm
                | ExpertNormWeight
                | RouterNormAgain
                | RouterNorm
                | RouterNormWeight
                | OutputNorm
                | OutputNormWeight
                | SlotNorm
                | SlotNormWeight
                | SharedSum
                | LatentInputAgain
                | LatentNormAgain
                | LatentNorm
                | LatentNormWeight
                | LatentInputWeight
                | LatentInput
                | LatentOutputWeight
                | LatentOutput
        )
    }

    /// A word for tables.
    pub const fn name(self) -> &'static str {
        match self {
            BackwardStage::GateUp => "gate_up again",
            BackwardStage::Hidden => "d hidden",
            BackwardStage::DownWeight => "d W down",
            BackwardStage::DownBias => "d b down",
            BackwardStage::GateUpWeight => "d W gate_up",
            BackwardStage::GateUpBias => "d b gate_up",
            BackwardStage::Choices => "d choices",
            BackwardStage::Gating => "d gating",
            BackwardStage::Factors => "d factors",
            BackwardStage::RouterWeight => "d W router",
            BackwardStage::RouterInput => "d router input",
            BackwardStage::RouterBoth => "d router",
            BackwardStage::RouterBias => "d router bias",
            BackwardStage::Bias => "d bias",
            BackwardStage::Input => "d input",
            BackwardStage::Sum => "d sum",
            BackwardStage::ExpertNormAgain => "expert norm again",
            BackwardStage::ExpertNorm => "d expert norm",
            BackwardStage::ExpertNormWeight => "d W expert norm",
            BackwardStage::SharedSum => "d shared sum",
            BackwardStage::RouterNormAgain => "router norm again",
            BackwardStage::RouterNorm => "d router norm",
            BackwardStage::RouterNormWeight => "d W router norm",
            BackwardStage::OutputNorm => "d output norm",
            BackwardStage::OutputNormWeight => "d W output norm",
            BackwardStage::SlotNorm => "d slot norm",
            BackwardStage::SlotNormWeight => "d W slot norm",
            BackwardStage::LatentInputAgain => "latent input again",
            BackwardStage::LatentNormAgain => "latent norm again",
            BackwardStage::LatentNorm => "d latent norm",
            BackwardStage::LatentNormWeight => "d W latent norm",
            BackwardStage::LatentInputWeight => "d W latent input",
            BackwardStage::LatentInput => "d latent input",
            BackwardStage::LatentOutputWeight => "d W latent output",
            BackwardStage::LatentOutput => "d latent output",
            BackwardStage::SharedHidden => "d shared hidden",
            BackwardStage::SharedGate => "shared gate",
            BackwardStage::SharedDownWeight => "d W shared down",
            BackwardStage::SharedDownBias => "d b shared down",
            BackwardStage::SharedGateUpWeight => "d W shared gate_up",
            BackwardStage::SharedGateUpBias => "d b shared gate_up",
            BackwardStage::SharedInput => "d shared input",
            BackwardStage::SharedGateWeight => "d W shared gate",
            BackwardStage::SharedGateInput => "d shared gate input",
            BackwardStage::SharedGateBoth => "d shared gate",
        }
    }
}
