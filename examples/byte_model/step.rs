//! The layer's forward and backward pass on the device: all of this library that training uses.

use cudarc::driver::CudaSlice;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    BackwardArgs, BackwardDesc, BackwardPlan, ExpertWeights, LayerArgs, LayerDesc, LayerGradients, LayerWeights,
    Measured, RouteArgs, RouterGradients, RouterWeights, Saved, WeightGradients,
};
use moe_kernels::routers::measured_gating::{RouterStats, Totals};
use moe_kernels::rules::LossGradient;
use moe_kernels::{Element, Workspace};

use super::Outcome;
use super::device::Device;

/// Weights on the device: `[E, H]`, and `[E, I or 2I, H]` and `[E, H, I]` of the experts.
pub struct Weights<T> {
    pub router: CudaSlice<f32>,
    pub experts: [CudaSlice<T>; 2],
}

impl<T: Element> Weights<T> {
    fn of_layer(&self) -> LayerWeights<'_> {
        let [gate_up, down] = &self.experts;
        let experts = ExpertWeights::new(Weight::new(gate_up), Weight::new(down));
        LayerWeights::new(RouterWeights::new(&self.router), experts)
    }
}

/// A forward pass, as its way back needs it.
pub struct Pass<T> {
    weights: Weights<T>,
    x: CudaSlice<T>,
    /// `[E]`: tokens of each expert.
    pub counts: CudaSlice<i32>,
    /// `[1]`: losses of the router.
    pub stats: CudaSlice<RouterStats>,
    /// `[E]`: tokens of each expert as the balancing loss counts them.
    loss_counts: CudaSlice<i32>,
    back: BackwardPlan,
    saved: Saved<T>,
    workspace: Workspace,
}

/// Gradients, each of the extents of what it is of.
pub struct Gradients<T> {
    pub x: CudaSlice<T>,
    pub router: CudaSlice<f32>,
    /// Where the experts are trained.
    pub experts: Option<[CudaSlice<f32>; 2]>,
}

/// `y [T, H]` of `x [T, H]`, for a router that is trained with `losses`.
pub fn forward<T: Element>(
    Device { kernels, stream, .. }: &Device,
    desc: &LayerDesc,
    losses: LossGradient,
    weights: Weights<T>,
    x: CudaSlice<T>,
) -> Outcome<(CudaSlice<T>, Pass<T>)> {
    let plan = desc.plan(x.len() / desc.hidden, kernels.device())?;
    let back = plan.backward_plan(&BackwardDesc::new().losses(Some(losses)))?;
    let mut saved = Saved::new(stream, &back)?;
    let mut workspace = Workspace::new(stream, plan.workspace_bytes().max(back.workspace_bytes()))?;
    let (mut y, mut stats) = (stream.alloc_zeros(x.len())?, stream.alloc_zeros(1)?);
    let by_expert = || stream.alloc_zeros(desc.experts);
    let (mut counts, mut loss_counts) = (by_expert()?, by_expert()?);
    let (mut probability, mut importance) = (stream.alloc_zeros(desc.experts)?, stream.alloc_zeros(desc.experts)?);
    let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
    let route = RouteArgs::new().measured(Measured::new(totals, &mut stats));
    let args = LayerArgs::new(&x, &mut y).route(route);
    plan.forward_saving(kernels, stream, &weights.of_layer(), args, &mut saved, &mut workspace)?;
    Ok((y, Pass { weights, x, counts, stats, loss_counts, back, saved, workspace }))
}

/// From `dy [T, H]`, and from the losses of the router.
pub fn backward<T: Element>(
    Device { kernels, stream, .. }: &Device,
    mut pass: Pass<T>,
    dy: &CudaSlice<T>,
    frozen: bool,
) -> Outcome<Gradients<T>> {
    let zeros = |len: usize| stream.alloc_zeros::<f32>(len);
    let (mut x, mut router) = (stream.alloc_zeros::<T>(dy.len())?, zeros(pass.weights.router.len())?);
    let [gate_up, down] = &pass.weights.experts;
    let mut experts = if frozen { None } else { Some([zeros(gate_up.len())?, zeros(down.len())?]) };
    let mut wanted = LayerGradients::new().x(&mut x).router(RouterGradients::new().matrix(&mut router));
    if let Some([gate_up, down]) = &mut experts {
        wanted = wanted.gate_up(WeightGradients::new(gate_up)).down(WeightGradients::new(down));
    }
    let mut args = BackwardArgs::new(&pass.x, dy, wanted);
    if pass.back.desc().losses.is_some_and(|losses| losses.balance != 0.0) {
        args = args.loss_counts(&pass.loss_counts);
    }
    let weights = pass.weights.of_layer();
    pass.back.backward(kernels, stream, &weights, &pass.saved, args, &mut pass.workspace)?;
    Ok(Gradients { x, router, experts })
}
