//! Experts whose outputs go through a norm before they are weighted (Muse Spark), forth and back.

use cudarc::driver::CudaSlice;

use super::parts::{Norm, Queue};
use super::{no_way_back, zeros};
use crate::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{BlockWeights, tensor, weight};
use crate::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use crate::experts::combine::{self, CombineArgs, CombineDesc};
use crate::experts::gemm::{self, GemmArgs, GemmDesc, ProductOut, Rows};
use crate::experts::k_grouped::{self, Gathered, KGroupedArgs, KGroupedDesc};
use crate::experts::rms_norm::{self, RmsNormArgs, RmsNormDesc};
use crate::experts::rms_norm_backward::{self, Gradient, RmsNormBackwardArgs, RmsNormBackwardDesc};
use crate::experts::tiles::select_tile;
use crate::experts::{Dispatched, Weight};
use crate::layer::LayerDesc;
use crate::rules::{Activation, Glu, Layout, RmsNorm, WeightDesc, Weighting};
use crate::{Element, Error, In, Out, Workspace};

/// Both passes of a layer's experts, by choices from elsewhere.
pub(super) struct Slots<T> {
    desc: LayerDesc,
    rule: RmsNorm,
    norm: Norm,
    dispatch: DispatchDesc,
    rows: Dispatched,
    workspace: Workspace,
    /// `[S, 2I]`, and its gradient.
    pre_activation: [CudaSlice<T>; 2],
    /// `[S, I]`, and its gradient.
    between: [CudaSlice<T>; 2],
    /// `[S, width]`: the experts' outputs, and their gradients; these are also the place of the outputs after the norm, and of the inputs' gradients.
    outputs: [CudaSlice<T>; 2],
    /// `[S]`: the gradient of each row's weight.
    d_slot_weight: CudaSlice<f32>,
    /// `[T, width]`.
    y: CudaSlice<T>,
}

impl<T: Element> Slots<T> {
    /// For experts of `desc.hidden` columns.
    pub(super) fn new(
        desc: &LayerDesc,
        rule: RmsNorm,
        weights: &BlockWeights<DeviceBuffer>,
        count: usize,
        queue: Queue<'_>,
    ) -> Result<Slots<T>, Error> {
        let stream = queue.stream;
        let &LayerDesc { dtype, hidden: width, intermediate, mlp, .. } = desc;
        let packed = [mlp.gate_up.layout, mlp.down.layout] == [Layout::Nk; 2] && mlp.gate_up.glu == Glu::Split;
        let biased = weights.gate_up.bias.is_some() || weights.down.bias.is_some();
        let plain = desc.capacity.is_none() && desc.null.is_none() && desc.shared.is_none() && desc.routed_scale == 1.0;
        if !packed || biased || !plain || desc.weighting != Weighting::Output {
            return Err(no_way_back("a norm of each expert's output beside more than plain gated experts"));
        }
        let slots = count * desc.all_choices();
        let experts = desc.local_experts();
        let tile = select_tile(dtype, slots, experts, queue.kernels.device())?.bm as usize;
        let dispatch = DispatchDesc::new(count, experts, desc.all_choices(), tile);
        let rows = |width: usize| Ok::<_, Error>([zeros::<T>(stream, slots * width)?, zeros(stream, slots * width)?]);
        Ok(Slots {
            desc: *desc,
            rule,
            norm: Norm::new(rule, width, slots, stream)?,
            rows: Dispatched::new(stream, &dispatch.shape())?,
            workspace: Workspace::new(stream, dispatch::workspace_bytes(&dispatch, queue.kernels.device())?)?,
            dispatch,
            pre_activation: rows(2 * intermediate)?,
            between: rows(intermediate)?,
            outputs: rows(width)?,
            d_slot_weight: zeros(stream, slots)?,
            y: zeros(stream, count * width)?,
        })
    }

    /// The output of the last forward pass.
    pub(super) fn y(&self) -> &CudaSlice<T> {
        &self.y
    }

    /// The rows of the last pass, and the gradient of each one's weight.
    pub(super) fn d_weights(&self) -> (&Dispatched, &CudaSlice<f32>) {
        (&self.rows, &self.d_slot_weight)
    }

    pub(super) fn forward(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        x: In<'_, T>,
        (ids, shares): (&CudaSlice<i32>, &CudaSlice<f32>),
    ) -> Result<(), Error> {
        let Queue { kernels, stream } = queue;
        let LayerDesc { dtype, hidden: width, intermediate, mlp, .. } = self.desc;
        let mut args = DispatchArgs::new(ids, &mut self.rows, &mut self.workspace);
        args.weights = Some(shares.into());
        dispatch::forward(kernels, stream, &self.dispatch, args)?;
        let rows = &self.rows;
        let shape = *rows.shape();
        let first = GemmDesc::new(dtype, Rows::Grouped(shape), intermediate, width)
            .gather(true)
            .weight(mlp.gate_up)
            .activation(mlp.activation);
        let [between, _] = &mut self.between;
        let mut args = GemmArgs::new(x, weight(&weights.gate_up)?, &mut *between).dispatched(rows);
        args.pre_activation = Some((&mut self.pre_activation[0]).into());
        gemm::forward(kernels, stream, &first, args)?;
        let second = GemmDesc::new(dtype, Rows::Grouped(shape), width, intermediate)
            .weight(mlp.down)
            .activation(Activation::Identity);
        let [outputs, normed] = &mut self.outputs;
        let args = GemmArgs::new(&*between, weight(&weights.down)?, &mut *outputs).dispatched(rows);
        gemm::forward(kernels, stream, &second, args)?;
        let mut args = RmsNormArgs::new(&*outputs, &mut *normed).dispatched(rows);
        args.weight = weights.around.slots.as_ref().map(tensor).transpose()?;
        rms_norm::forward(kernels, stream, &RmsNormDesc::new(dtype, shape.slots, width, self.rule), args)?;
        let mut args = CombineArgs::new(&*normed, rows, &mut self.y);
        args.weights = Some(shares.into());
        combine::forward(kernels, stream, &CombineDesc::new(dtype, shape, width), args)
    }

    /// From `dy [T, width]` to the gradients of the matrices, of the norm's gain, of the rows' weights, and of `x`, written.
    pub(super) fn backward(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        (x, dy): (In<'_, T>, In<'_, T>),
        of: &mut BlockWeights<CudaSlice<f32>>,
        mut dx: Out<'_, T>,
    ) -> Result<(), Error> {
        let Queue { kernels, stream } = queue;
        let LayerDesc { dtype, hidden: width, intermediate, mlp, .. } = self.desc;
        let rows = &self.rows;
        let shape = *rows.shape();
        let [outputs, d_outputs] = &mut self.outputs;
        let norm = RmsNormBackwardDesc::new(dtype, shape.slots, width, self.rule);
        let mut args = RmsNormBackwardArgs::new(&*outputs, Gradient::from(dy), &mut *d_outputs).gathered(rows);
        args.weight = weights.around.slots.as_ref().map(tensor).transpose()?;
        args.row_scale = Some(rows.slot_weight().into());
        args.d_row_scale = Some((&mut self.d_slot_weight).into());
        if let Some(gain) = &mut of.around.slots {
            (args.d_weight, args.factors) = (Some(gain.into()), Some(self.norm.factors().into()));
        }
        rms_norm_backward::backward(kernels, stream, &norm, args)?;

        let turned = WeightDesc::new(dtype).layout(Layout::Kn);
        let back =
            |n, k| GemmDesc::new(dtype, Rows::Grouped(shape), n, k).weight(turned).activation(Activation::Identity);
        let [between, d_between] = &mut self.between;
        let args = GemmArgs::new(&*d_outputs, Weight::new(tensor(&weights.down.matrix)?), &mut *d_between);
        gemm::forward(kernels, stream, &back(intermediate, width), args.dispatched(rows))?;
        let [pre_activation, d_pre_activation] = &mut self.pre_activation;
        let through = ActivationBackwardDesc::new(dtype, shape.slots, intermediate, mlp.activation);
        let live = rows.offsets().slice(shape.experts..shape.experts + 1);
        let mut args = ActivationBackwardArgs::new(&*pre_activation, &*d_between, &mut *d_pre_activation);
        args.live = Some((&live).into());
        activation_backward::forward(kernels, stream, &through, args)?;
        let sums = |m, n| KGroupedDesc::new(dtype, shape, m, n).f32_out(true);
        let to = ProductOut::F32((&mut of.down.matrix).into());
        let args = KGroupedArgs::new(&*d_outputs, &*between, rows, to);
        k_grouped::forward(kernels, stream, &sums(width, intermediate), args)?;
        let to = ProductOut::F32((&mut of.gate_up.matrix).into());
        let args = KGroupedArgs::new(&*d_pre_activation, x, rows, to);
        k_grouped::forward(kernels, stream, &sums(2 * intermediate, width).gathered(Gathered::B), args)?;

        // Into the place of the outputs' gradients, which are done with.
        let args = GemmArgs::new(&*d_pre_activation, Weight::new(tensor(&weights.gate_up.matrix)?), &mut *d_outputs);
        gemm::forward(kernels, stream, &back(width, 2 * intermediate), args.dispatched(rows))?;
        let args = CombineArgs::new(&*d_outputs, rows, dx.reborrow());
        combine::forward(kernels, stream, &CombineDesc::new(dtype, shape, width), args)
    }
}
