//! A common first product, a common second one for the first columns, and that of a sequence's expert for the last (ViTPose+).

use cudarc::driver::CudaSlice;

use super::gradients::BlockGradients;
use super::parts::{Dense, Queue, Tokens};
use super::{OPERATION, zeros};
use crate::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use crate::checkpoint::kind::Kind;
use crate::checkpoint::run::BlockInputs;
use crate::checkpoint::weights::{DeviceBlock, tensor};
use crate::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use crate::experts::combine::{self, CombineArgs, CombineDesc};
use crate::experts::gemm::{self, GemmArgs, GemmDesc, ProductOut, Rows};
use crate::experts::k_grouped::{self, Gathered, KGroupedArgs, KGroupedDesc};
use crate::experts::tiles::select_tile;
use crate::experts::{Dispatched, Weight};
use crate::layer::LayerDesc;
use crate::routers::by_sequence::{self, BySequenceArgs, BySequenceDesc};
use crate::rules::{Activation, Glu, Layout, WeightDesc};
use crate::{Element, Error, In, Workspace};

/// Both passes.
pub(super) struct Sequences<T> {
    tokens: Tokens,
    experts: usize,
    activation: Activation,
    first: Dense,
    second: Dense,
    dispatch: DispatchDesc,
    rows: Dispatched,
    workspace: Workspace,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    /// `[T]`: for sums over an expert's rows.
    ones: CudaSlice<T>,
    /// `[T,I]` each.
    pre_activation: CudaSlice<T>,
    between: CudaSlice<T>,
    d_between: CudaSlice<T>,
    d_rows: CudaSlice<T>,
}

impl<T: Element> Sequences<T> {
    pub(super) fn new(desc: &LayerDesc, count: usize, queue: Queue<'_>) -> Result<Sequences<T>, Error> {
        let stream = queue.stream;
        let &LayerDesc { dtype, hidden, intermediate, experts, mlp, .. } = desc;
        let tile = select_tile(dtype, count, experts, queue.kernels.device())?.bm as usize;
        let dispatch = DispatchDesc::new(count, experts, 1, tile);
        let rows = || zeros::<T>(stream, count * intermediate);
        let ones = vec![T::from_f32(1.0); count.max(1)];
        Ok(Sequences {
            tokens: Tokens::new(count, queue)?,
            experts,
            activation: mlp.activation,
            first: Dense::new(dtype, intermediate, hidden),
            second: Dense::new(dtype, hidden, intermediate),
            rows: Dispatched::new(stream, &dispatch.shape())?,
            workspace: Workspace::new(stream, dispatch::workspace_bytes(&dispatch, queue.kernels.device())?)?,
            dispatch,
            ids: zeros(stream, count)?,
            weights: zeros(stream, count)?,
            ones: stream.clone_htod(&ones).map_err(Error::driver(OPERATION))?,
            pre_activation: rows()?,
            between: rows()?,
            d_between: rows()?,
            d_rows: rows()?,
        })
    }

    pub(super) fn run(
        &mut self,
        queue: Queue<'_>,
        block: &DeviceBlock,
        (x, dy): (In<'_, T>, In<'_, T>),
        inputs: BlockInputs<'_>,
        gradients: &mut BlockGradients<T>,
    ) -> Result<(), Error> {
        let Queue { kernels, stream } = queue;
        let tokens = &self.tokens;
        let reason = "an expert for each sequence is the caller's to say";
        let missing = Error::Missing { operation: OPERATION, argument: "index", reason };
        let (index, length) = inputs.index.zip(tokens.count.checked_div(inputs.sequences)).ok_or(missing)?;
        let BlockGradients { x: dx, weights: of, kind: of_kind, .. } = gradients;
        let (Kind::BySequence { first, second }, Kind::BySequence { first: of_first, second: of_second }) =
            (&block.kind, of_kind)
        else {
            return Ok(());
        };
        let mut by = BySequenceDesc::new(tokens.count, length, self.experts);
        by.index = index.format();
        by_sequence::forward(kernels, stream, &by, BySequenceArgs::new(index, &mut self.ids, &mut self.weights))?;
        let args = DispatchArgs::new(&self.ids, &mut self.rows, &mut self.workspace);
        dispatch::forward(kernels, stream, &self.dispatch, args)?;
        let kept = Some(&mut self.pre_activation);
        self.first.forward(queue, tokens, (x, first), self.activation, &mut self.between, kept)?;
        let between: In<'_, T> = (&self.between).into();

        // Both second products.
        self.second.back_to_weight(queue, tokens, (dy, between), of_second)?;
        self.second.back_to_input(queue, tokens, (dy, second), false, (&mut self.d_between).into())?;
        let (shape, LayerDesc { dtype, hidden, intermediate, .. }) = (*self.rows.shape(), block.desc);
        let sums = |m, n| KGroupedDesc::new(dtype, shape, m, n).f32_out(true);
        let to = ProductOut::F32((&mut of.down.matrix).into());
        let desc = sums(hidden, intermediate).gathered(Gathered::Both);
        k_grouped::forward(kernels, stream, &desc, KGroupedArgs::new(dy, between, &self.rows, to))?;
        if let Some(bias) = &mut of.down.bias {
            let to = ProductOut::F32(bias.into());
            let desc = sums(1, hidden).gathered(Gathered::Both);
            k_grouped::forward(kernels, stream, &desc, KGroupedArgs::new(&self.ones, dy, &self.rows, to))?;
        }
        let part = GemmDesc::new(dtype, Rows::Grouped(shape), intermediate, hidden)
            .gather(true)
            .weight(WeightDesc::new(dtype).layout(Layout::Kn))
            .activation(Activation::Identity);
        let args = GemmArgs::new(dy, Weight::new(tensor(&block.weights.down.matrix)?), &mut self.d_rows);
        gemm::forward(kernels, stream, &part, args.dispatched(&self.rows))?;
        let mut args = CombineArgs::new(&self.d_rows, &self.rows, &mut self.d_between);
        args.accumulate = true;
        combine::forward(kernels, stream, &CombineDesc::new(dtype, shape, intermediate), args)?;

        // Back through the activation, into the place of the rows that are done with.
        let through = ActivationBackwardDesc::new(dtype, tokens.count, intermediate, self.activation).glu(Glu::None);
        let args = ActivationBackwardArgs::new(&self.pre_activation, &self.d_between, &mut self.d_rows);
        activation_backward::forward(kernels, stream, &through, args)?;
        let d: In<'_, T> = (&self.d_rows).into();
        self.first.back_to_weight(queue, tokens, (d, x), of_first)?;
        self.first.back_to_input(queue, tokens, (d, first), false, dx.into())
    }
}
