//! The layer's forward and backward pass on the device: all of this library that training uses.

use cudarc::driver::CudaSlice;
use moe_kernels::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, ProductOut, Rows};
use moe_kernels::experts::k_grouped::{self, Gathered, KGroupedArgs, KGroupedDesc};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{ExpertWeights, ExpertsArgs, ExpertsPlan, LayerDesc, RouteArgs, RouterWeights};
use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use moe_kernels::routers::router_backward::{self, RouterBackwardDesc};
use moe_kernels::rules::{Activation, Layout, LossGradient, WeightDesc};
use moe_kernels::{Element, Workspace};

use super::Outcome;
use super::device::Device;

/// Weights on the device: `[E, H]`, `[E, I or 2I, H]`, `[E, H, I]`.
pub struct Weights<T> {
    pub router: CudaSlice<f32>,
    pub gate_up: CudaSlice<T>,
    pub down: CudaSlice<T>,
}

/// What the way back needs of a forward pass.
pub struct Kept<T> {
    x: CudaSlice<T>,
    logits: CudaSlice<f32>,
    ids: CudaSlice<i32>,
    counts: CudaSlice<i32>,
    dispatched: Dispatched,
    pre_activation: CudaSlice<T>,
}

/// Gradients, of the shapes of what they are of.
pub struct Gradients<T> {
    pub x: CudaSlice<T>,
    pub router: CudaSlice<f32>,
    /// Of the experts' weights, where they are trained.
    pub experts: Option<[CudaSlice<f32>; 2]>,
}

/// `y`, tokens of each expert, and what [`backward`] needs.
pub fn forward<T: Element>(
    Device { kernels, stream, .. }: &Device,
    desc: &LayerDesc,
    weights: &Weights<T>,
    x: CudaSlice<T>,
) -> Outcome<(CudaSlice<T>, Vec<i32>, Kept<T>)> {
    let tokens = x.len() / desc.hidden;
    let plan = desc.plan(tokens, kernels.device())?;
    let route = plan.route();
    let shape = route.rows();
    let products = ExpertsPlan::new(desc, &shape, kernels.device())?;
    let mut dispatched = Dispatched::new(stream, &shape)?;
    let mut workspace = Workspace::new(stream, route.workspace_bytes().max(products.workspace_bytes()))?;
    let mut logits = stream.alloc_zeros(tokens * desc.experts)?;
    let (mut ids, mut counts) = (stream.alloc_zeros(tokens * desc.top_k)?, stream.alloc_zeros(desc.experts)?);
    let args = RouteArgs::new().logits(&mut logits).ids(&mut ids);
    route.forward(kernels, stream, &RouterWeights::new(&weights.router), &x, args, &mut dispatched, &mut workspace)?;
    let mut y_slots = stream.alloc_zeros(shape.slots * desc.hidden)?;
    let columns = if desc.mlp.gate_up.glu.is_gated() { 2 } else { 1 } * desc.intermediate;
    let mut pre_activation = stream.alloc_zeros(shape.slots * columns)?;
    let experts = ExpertWeights::new(Weight::new(&weights.gate_up), Weight::new(&weights.down));
    let args = ExpertsArgs::new(&x, &dispatched, &mut y_slots).pre_activation(&mut pre_activation);
    products.forward(kernels, stream, &experts, args, &mut workspace)?;
    let mut y = stream.alloc_zeros(tokens * desc.hidden)?;
    products.combine(kernels, stream, CombineArgs::new(&y_slots, &dispatched, &mut y))?;
    let offsets = stream.clone_dtoh(dispatched.offsets())?;
    let load: Vec<i32> = offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
    stream.memcpy_htod(&load, &mut counts)?;
    Ok((y, load, Kept { x, logits, ids, counts, dispatched, pre_activation }))
}

/// Gradients from `dy [T, H]` and those of the losses of the router.
pub fn backward<T: Element>(
    Device { kernels, stream, .. }: &Device,
    desc: &LayerDesc,
    weights: &Weights<T>,
    losses: LossGradient,
    frozen: bool,
    kept: Kept<T>,
    dy: CudaSlice<T>,
) -> Outcome<Gradients<T>> {
    let &LayerDesc { hidden, intermediate: width, experts, top_k, mlp, .. } = desc;
    let Kept { x, logits, ids, counts, dispatched, pre_activation } = kept;
    let shape = *dispatched.shape();
    let (tokens, rows) = (shape.tokens, shape.slots);
    let columns = if mlp.gate_up.glu.is_gated() { 2 * width } else { width };
    let product = |n, k, gather, a: &CudaSlice<T>, weight: &CudaSlice<T>, out: &mut CudaSlice<T>| {
        let desc = GemmDesc::new(T::DTYPE, Rows::Grouped(shape), n, k)
            .gather(gather)
            .weight(WeightDesc::new(T::DTYPE).layout(Layout::Kn))
            .activation(Activation::Identity);
        let args = GemmArgs::new(a, Weight::new(weight), out).dispatched(&dispatched);
        gemm::forward(kernels, stream, &desc, args)
    };
    let mut d_hidden = stream.alloc_zeros(rows * width)?;
    product(width, hidden, true, &dy, &weights.down, &mut d_hidden)?;
    let (mut d_pre, mut weighted) = (stream.alloc_zeros(rows * columns)?, stream.alloc_zeros(rows * width)?);
    let mut d_slot_weight = stream.alloc_zeros(rows)?;
    let live = dispatched.offsets().slice(experts..experts + 1);
    let through = ActivationBackwardDesc::new(T::DTYPE, rows, width, mlp.activation).glu(mlp.gate_up.glu);
    let mut args = ActivationBackwardArgs::new(&pre_activation, &d_hidden, &mut d_pre);
    args.slot_weight = Some(dispatched.slot_weight().into());
    args.live = Some((&live).into());
    args.hidden = Some((&mut weighted).into());
    args.d_slot_weight = Some((&mut d_slot_weight).into());
    activation_backward::forward(kernels, stream, &through, args)?;
    let sums = |m, n, gathered, a: &CudaSlice<T>, b: &CudaSlice<T>| -> Outcome<CudaSlice<f32>> {
        let mut out = stream.alloc_zeros(experts * m * n)?;
        let desc = KGroupedDesc::new(T::DTYPE, shape, m, n).gathered(gathered).f32_out(true);
        let args = KGroupedArgs::new(a, b, &dispatched, ProductOut::F32((&mut out).into()));
        k_grouped::forward(kernels, stream, &desc, args)?;
        Ok(out)
    };
    let experts_gradients = match frozen {
        true => None,
        false => {
            Some([sums(columns, hidden, Gathered::B, &d_pre, &x)?, sums(hidden, width, Gathered::A, &dy, &weighted)?])
        }
    };
    let mut d_logits = stream.alloc_zeros(tokens * experts)?;
    let gating = GatingBackwardDesc::new(tokens, experts, top_k, desc.gating).losses(Some(losses));
    let mut args = GatingBackwardArgs::new(&logits, &ids, &d_slot_weight, &mut d_logits).dispatched(&dispatched);
    if losses.balance != 0.0 {
        args.counts = Some((&counts).into());
    }
    gating_backward::forward(kernels, stream, &gating, args)?;
    let router_back = RouterBackwardDesc::new(T::DTYPE, tokens, experts, hidden).weight(desc.router_dtype);
    let mut d_router = stream.alloc_zeros(experts * hidden)?;
    router_backward::into_weight::<T>(kernels, stream, &router_back, &d_logits, &x, &mut d_router)?;
    let mut dx_router = stream.alloc_zeros(tokens * hidden)?;
    router_backward::into_x::<T, f32>(kernels, stream, &router_back, &d_logits, &weights.router, &mut dx_router)?;
    let (mut dx_slots, mut dx) = (stream.alloc_zeros(rows * hidden)?, stream.alloc_zeros(tokens * hidden)?);
    product(hidden, columns, false, &d_pre, &weights.gate_up, &mut dx_slots)?;
    let args = CombineArgs::new(&dx_slots, &dispatched, &mut dx).residual(&dx_router);
    combine::forward(kernels, stream, &CombineDesc::new(T::DTYPE, shape, hidden), args)?;
    Ok(Gradients { x: dx, router: d_router, experts: experts_gradients })
}
