//! A whole Mixture-of-Experts layer, and its three parts: route, experts, combine.
//!
//! With `g = gating(router(x))`:
//!
//! `y[t] = residual[t] + bias + s[t] * shared(x[t]) + r * sum_{e in g.ids[t]} g.weight[t,e] * W_down[e] act(W_gate_up[e] x[t])`
//!
//! with `s[t]` a factor, or one times the sigmoid of a gate of its own, and `r` another factor, both 1 in most models; or, where the weights scale the experts' input (Llama 4), `W_down[e] act(W_gate_up[e] (g.weight[t,e] x[t]))`; see [`Weighting`].
//!
//! A [`LayerDesc`] describes a model's layer once; a [`LayerPlan`] holds every choice for a number of tokens, is a plain
//! value made without touching the device, and can be used again for every batch of that size. [`LayerPlan::forward`]
//! enqueues five launches at most, three for up to eight tokens, allocates nothing and waits for nothing. A shared expert of the others' form and size, be its
//! activation another, is computed in their launches, another one in two more; its gate in the router's.
//!
//! The same input gives the same bits, but with [`TokenSums::Atomic`], where the second product adds onto each token's sum.
//!
//! # Parts
//!
//! [`RoutePlan::forward`] chooses experts and fills a [`crate::experts::Dispatched`], the rows of every expert;
//! [`ExpertsPlan::forward`] computes the experts over these rows; [`ExpertsPlan::combine`] adds up each token's. Between the first two
//! stands whoever has a say in where tokens go.
//!
//! # Any router
//!
//! Whatever yields ids and weights `[T, k]` ([`crate::routers::noisy`], [`crate::routers::hash`], ids that a framework has) routes a
//! layer: [`LayerArgs::choices`] in one call, [`RoutePlan::forward_choices`] in parts; admission, expert map, null experts and capacity
//! come after it as the descriptor says. Experts that choose their tokens fill a `Dispatched` themselves
//! ([`crate::routers::expert_choice`]), for which [`ExpertsPlan::new`] plans the rest.
//!
//! # Graphs
//!
//! A forward pass can be captured in a CUDA graph, on a stream other than the default one: call
//! `CudaContext::disable_event_tracking` before the buffers of the graph are allocated, and [`crate::Kernels::preload`] with
//! [`LayerPlan::kernels`] (or run the layer once) before the capture begins. A step that is missing is [`crate::Error::Capture`].
//!
//! What is drawn (dropout, an admission's second experts) is the same at each replay, unless seed and offset lie on the device:
//! [`LayerArgs::noise_state`].

mod around;
mod backward;
mod banks;
mod desc;
mod experts;
mod forward;
mod intermediates;
mod route;
#[cfg(test)]
mod tests;
mod weights;

pub use around::{LatentDesc, LatentWeights, NormWeights, Norms};
pub use backward::{
    BackwardArgs, BackwardDesc, BackwardPlan, BackwardStage, LatentGradients, LayerGradients, NormGradients, Origin,
    RouterGradients, Saved, SharedGradients, WeightGradients,
};
pub use banks::{BanksArgs, BanksPlan};
pub use desc::{LayerDesc, MapDesc, Mlp, SharedDesc, TokenSums};
pub use experts::{ExpertsArgs, ExpertsPlan};
pub use forward::{LayerArgs, LayerPlan};
pub use route::{Choices, MapTable, Measured, RouteArgs, RoutePlan};
pub use weights::{ExpertWeights, LayerWeights, RouterWeights, SharedWeights};

use crate::Selection;
pub use crate::rules::Weighting;

const OPERATION: &str = "layer";

/// A launch as planned.
#[derive(Clone, Copy, Debug)]
struct Step<D> {
    desc: D,
    selection: Selection,
}

/// A step of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// Norm of what the router sees.
    RouterNorm,
    /// Logits, and those of a shared expert's gate.
    Router,
    /// Logits of a shared expert's gate alone, where the layer's router is not asked.
    SharedGate,
    /// Router, gating and dispatch in one launch.
    Route,
    /// Gating and dispatch in one launch.
    GateDispatch,
    /// Gating, measured or not.
    Gate,
    /// Who gets what was chosen.
    Admission,
    /// Ids as this device knows them.
    Map,
    /// Rows.
    Dispatch,
    /// Norm of what the experts see.
    ExpertNorm,
    /// Projection to the experts' own width.
    LatentInput,
    /// Norm of the projected rows.
    LatentNorm,
    /// First grouped product with the activation.
    GateUp,
    /// Second grouped product.
    Down,
    /// Norm of each expert's output.
    SlotNorm,
    /// The shared expert's first product.
    SharedGateUp,
    /// The shared expert's second product.
    SharedDown,
    /// Second grouped product and the weighted sum in one launch.
    DownCombine,
    /// Weighted sum.
    Combine,
    /// Projection of the sum from the experts' own width.
    LatentOutput,
    /// Addition of a shared expert's output, or of a residual, to the projection.
    Sum,
    /// Norm of the sum.
    OutputNorm,
}

impl Stage {
    /// A word for tables.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::RouterNorm => "router norm",
            Stage::Router => "router",
            Stage::SharedGate => "shared gate",
            Stage::Route => "route",
            Stage::GateDispatch => "gate+dispatch",
            Stage::Gate => "gate",
            Stage::Admission => "admission",
            Stage::Map => "map",
            Stage::Dispatch => "dispatch",
            Stage::ExpertNorm => "expert norm",
            Stage::LatentInput => "latent input",
            Stage::LatentNorm => "latent norm",
            Stage::GateUp => "gate_up",
            Stage::Down => "down",
            Stage::SlotNorm => "slot norm",
            Stage::SharedGateUp => "shared gate_up",
            Stage::SharedDown => "shared down",
            Stage::DownCombine => "down+combine",
            Stage::Combine => "combine",
            Stage::LatentOutput => "latent output",
            Stage::Sum => "sum",
            Stage::OutputNorm => "output norm",
        }
    }
}
