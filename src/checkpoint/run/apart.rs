//! Blocks that are no layers.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::zeros;
use crate::capacity::Ids;
use crate::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{BlockWeights, MatrixWeight, tensor, weight};
use crate::experts::Dispatched;
use crate::experts::combine::{self, CombineArgs, CombineDesc};
use crate::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use crate::experts::tiles::select_tile;
use crate::experts::unit_experts::{self, UnitExpertsArgs, UnitExpertsDesc};
use crate::layer::LayerDesc;
use crate::routers::by_sequence::{self, BySequenceArgs, BySequenceDesc};
use crate::routers::product_keys::{self, ProductKeysArgs, ProductKeysDesc};
use crate::routers::router::{self, RouterArgs, RouterDesc};
use crate::rules::{Activation, KeySplit};
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Tensor, Workspace};

const OPERATION: &str = super::OPERATION;

/// Doge's: router, product keys, dense MLP, experts of one unit onto it.
pub(super) struct UnitExperts<T> {
    router: RouterDesc,
    keys: ProductKeysDesc,
    gate_up: GemmDesc,
    down: GemmDesc,
    experts: UnitExpertsDesc,
    between: CudaSlice<T>,
    dense: CudaSlice<T>,
}

impl<T: Element> UnitExperts<T> {
    pub(super) fn new(
        desc: &LayerDesc,
        keys: usize,
        tokens: usize,
        stream: &Arc<CudaStream>,
    ) -> Result<UnitExperts<T>, Error> {
        let &LayerDesc { dtype, hidden, intermediate, experts, top_k, mlp, .. } = desc;
        let rows = Rows::Dense(tokens);
        let gate_up = GemmDesc::new(dtype, rows, intermediate, hidden).weight(mlp.gate_up).activation(mlp.activation);
        Ok(UnitExperts {
            router: RouterDesc::new(dtype, tokens, 2 * keys, hidden).weight(desc.router_dtype),
            // What released checkpoints give: transformers' own code sees the scores of the batch as two lists.
            keys: ProductKeysDesc::new(tokens, keys, top_k).split(KeySplit::Batch),
            gate_up,
            down: GemmDesc::new(dtype, rows, hidden, intermediate).weight(mlp.down),
            experts: UnitExpertsDesc::new(dtype, tokens, hidden, experts, top_k).activation(mlp.activation),
            between: zeros(stream, tokens * intermediate)?,
            dense: zeros(stream, tokens * hidden)?,
        })
    }

    #[allow(clippy::too_many_arguments)] // a block's inputs and outputs
    pub(super) fn forward(
        &mut self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &BlockWeights<DeviceBuffer>,
        [input, output]: [&DeviceBuffer; 2],
        (x, mut y): (In<'_, T>, Out<'_, T>),
        (logits, ids, shares): (&mut CudaSlice<f32>, &mut CudaSlice<i32>, &mut CudaSlice<f32>),
        observer: &mut dyn FnMut(&'static str),
    ) -> Result<(), Error> {
        let missing = Error::Missing { operation: OPERATION, argument: "router", reason: "keys have scores" };
        let matrix = tensor(weights.router.as_ref().ok_or(missing)?)?;
        match matrix {
            Tensor::Bf16(w) => router::forward(kernels, stream, &self.router, RouterArgs::new(x, w, &mut *logits))?,
            Tensor::F16(w) => router::forward(kernels, stream, &self.router, RouterArgs::new(x, w, &mut *logits))?,
            Tensor::F32(w) => router::forward(kernels, stream, &self.router, RouterArgs::new(x, w, &mut *logits))?,
        }
        observer("router");
        product_keys::forward(kernels, stream, &self.keys, ProductKeysArgs::new(&*logits, &mut *ids, &mut *shares))?;
        observer("product keys");
        let args = GemmArgs::new(x, weight(&weights.gate_up)?, &mut self.between);
        gemm::forward(kernels, stream, &self.gate_up, args)?;
        observer("dense gate_up");
        let args = GemmArgs::new(&self.between, weight(&weights.down)?, &mut self.dense);
        gemm::forward(kernels, stream, &self.down, args)?;
        observer("dense down");
        let matrices = [typed(input)?, typed(output)?];
        let args = UnitExpertsArgs::new(x, matrices, &*ids, &*shares, y.reborrow()).addend(&self.dense);
        unit_experts::forward(kernels, stream, &self.experts, args)?;
        observer("unit experts");
        Ok(())
    }
}

/// A buffer of the block's type.
pub(in crate::checkpoint) fn typed<T: Element>(buffer: &DeviceBuffer) -> Result<In<'_, T>, Error> {
    let tensor = tensor(buffer)?;
    let got = tensor.dtype();
    let wrong = Error::WrongDtype { operation: OPERATION, argument: "experts", expected: T::DTYPE, got };
    T::of_tensor(tensor).ok_or(wrong)
}

/// ViTPose+'s: a common first product, a common second one for the first columns, a sequence's expert for the last.
pub(super) struct BySequence<T> {
    tokens: usize,
    experts: usize,
    first: GemmDesc,
    second: GemmDesc,
    dispatch: DispatchDesc,
    part: GemmDesc,
    combine: CombineDesc,
    between: CudaSlice<T>,
    common: CudaSlice<T>,
    y_slots: CudaSlice<T>,
    dispatched: Dispatched,
    workspace: Workspace,
}

impl<T: Element> BySequence<T> {
    pub(super) fn new(
        desc: &LayerDesc,
        tokens: usize,
        device: &DeviceInfo,
        stream: &Arc<CudaStream>,
    ) -> Result<BySequence<T>, Error> {
        let &LayerDesc { dtype, hidden, intermediate, experts, mlp, .. } = desc;
        let dense = Rows::Dense(tokens);
        let tile = select_tile(dtype, tokens, experts, device)?.bm as usize;
        let dispatch = DispatchDesc::new(tokens, experts, 1, tile);
        let shape = dispatch.shape();
        let part = GemmDesc::new(dtype, Rows::Grouped(shape), hidden, intermediate).gather(true);
        Ok(BySequence {
            tokens,
            experts,
            first: GemmDesc::new(dtype, dense, intermediate, hidden).activation(mlp.activation),
            second: GemmDesc::new(dtype, dense, hidden, intermediate),
            dispatch,
            part: part.activation(Activation::Identity),
            combine: CombineDesc::new(dtype, shape, hidden),
            between: zeros(stream, tokens * intermediate)?,
            common: zeros(stream, tokens * hidden)?,
            y_slots: zeros(stream, shape.slots * hidden)?,
            dispatched: Dispatched::new(stream, &shape)?,
            workspace: Workspace::new(stream, dispatch::workspace_bytes(&dispatch, device)?)?,
        })
    }

    #[allow(clippy::too_many_arguments)] // a block's inputs and outputs
    pub(super) fn forward(
        &mut self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        [first, second, part]: [&MatrixWeight<DeviceBuffer>; 3],
        (index, length): (Ids<'_>, usize),
        (x, mut y): (In<'_, T>, Out<'_, T>),
        (ids, shares): (&mut CudaSlice<i32>, &mut CudaSlice<f32>),
        observer: &mut dyn FnMut(&'static str),
    ) -> Result<(), Error> {
        let mut by = BySequenceDesc::new(self.tokens, length, self.experts);
        by.index = index.format();
        by_sequence::forward(kernels, stream, &by, BySequenceArgs::new(index, &mut *ids, &mut *shares))?;
        observer("by sequence");
        let args = DispatchArgs::new(&*ids, &mut self.dispatched, &mut self.workspace);
        dispatch::forward(kernels, stream, &self.dispatch, args)?;
        observer("dispatch");
        gemm::forward(kernels, stream, &self.first, GemmArgs::new(x, weight(first)?, &mut self.between))?;
        observer("first");
        gemm::forward(kernels, stream, &self.second, GemmArgs::new(&self.between, weight(second)?, &mut self.common))?;
        observer("second");
        let args = GemmArgs::new(&self.between, weight(part)?, &mut self.y_slots).dispatched(&self.dispatched);
        gemm::forward(kernels, stream, &self.part, args)?;
        observer("experts");
        let args = CombineArgs::new(&self.y_slots, &self.dispatched, y.reborrow()).addend(&self.common);
        combine::forward(kernels, stream, &self.combine, args)?;
        observer("combine");
        Ok(())
    }
}
