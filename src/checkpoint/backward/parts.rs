//! Steps that blocks' ways back are made of.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::{OPERATION, zeros};
use crate::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{MatrixWeight, tensor, weight};
use crate::experts::Dispatched;
use crate::experts::combine::{self, CombineArgs, CombineDesc};
use crate::experts::gemm::{self, GemmArgs, GemmDesc, Output, ProductOut, Rows};
use crate::experts::k_grouped::{self, KGroupedArgs, KGroupedDesc};
use crate::routers::router_backward::{self, RouterBackwardDesc};
use crate::rules::{Activation, Layout, WeightDesc};
use crate::{Dtype, Element, Error, In, Kernels, Out, Tensor, Workspace};

/// Where launches go.
#[derive(Clone, Copy)]
pub(super) struct Queue<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) stream: &'a Arc<CudaStream>,
}

/// All tokens as rows of one expert, and a 1 for each: for sums over tokens.
pub(super) struct Tokens {
    pub(super) count: usize,
    rows: Dispatched,
    ones: CudaSlice<f32>,
}

impl Tokens {
    pub(super) fn new(count: usize, queue: Queue<'_>) -> Result<Tokens, Error> {
        let Queue { kernels, stream } = queue;
        let desc = DispatchDesc::new(count, 1, 1, 1);
        let mut rows = Dispatched::new(stream, &desc.shape())?;
        let ids = zeros::<i32>(stream, count)?;
        let mut workspace = Workspace::new(stream, dispatch::workspace_bytes(&desc, kernels.device())?)?;
        dispatch::forward(kernels, stream, &desc, DispatchArgs::new(&ids, &mut rows, &mut workspace))?;
        let ones = stream.clone_htod(&vec![1.0; count.max(1)]).map_err(Error::driver(OPERATION))?;
        Ok(Tokens { count, rows, ones })
    }

    /// `sums [width]` of the columns of `rows [T, width]`: of a bias.
    pub(super) fn columns<T: Element>(
        &self,
        queue: Queue<'_>,
        rows: In<'_, T>,
        width: usize,
        sums: &mut CudaSlice<f32>,
    ) -> Result<(), Error> {
        let desc = RouterBackwardDesc::new(T::DTYPE, self.count, 1, width);
        router_backward::into_weight::<T>(queue.kernels, queue.stream, &desc, &self.ones, rows, sums)
    }

    /// `sums += rows`, both `[T, width]`.
    pub(super) fn add<T: Element>(
        &self,
        queue: Queue<'_>,
        rows: &CudaSlice<T>,
        width: usize,
        mut sums: Out<'_, T>,
    ) -> Result<(), Error> {
        let desc = CombineDesc::new(T::DTYPE, *self.rows.shape(), width);
        let mut args = CombineArgs::new(rows, &self.rows, sums.reborrow());
        args.accumulate = true;
        combine::forward(queue.kernels, queue.stream, &desc, args)
    }
}

/// A product of every token with a matrix `[N,K]`.
#[derive(Clone, Copy)]
pub(super) struct Dense {
    dtype: Dtype,
    n: usize,
    k: usize,
}

impl Dense {
    pub(super) fn new(dtype: Dtype, n: usize, k: usize) -> Dense {
        Dense { dtype, n, k }
    }

    /// `act(x W^T + b)`, and what stands before the activation.
    pub(super) fn forward<T: Element>(
        &self,
        queue: Queue<'_>,
        tokens: &Tokens,
        (x, matrix): (In<'_, T>, &MatrixWeight<DeviceBuffer>),
        activation: Activation,
        out: &mut CudaSlice<T>,
        pre_activation: Option<&mut CudaSlice<T>>,
    ) -> Result<(), Error> {
        let desc = GemmDesc::new(self.dtype, Rows::Dense(tokens.count), self.n, self.k).activation(activation);
        let mut args = GemmArgs::new(x, weight(matrix)?, out);
        args.pre_activation = pre_activation.map(Into::into);
        gemm::forward(queue.kernels, queue.stream, &desc, args)
    }

    /// `d W`, written, or added to what is there.
    pub(super) fn back_to_input<T: Element>(
        &self,
        queue: Queue<'_>,
        tokens: &Tokens,
        (d, matrix): (In<'_, T>, &MatrixWeight<DeviceBuffer>),
        add: bool,
        mut out: Out<'_, T>,
    ) -> Result<(), Error> {
        let desc = GemmDesc::new(self.dtype, Rows::Dense(tokens.count), self.k, self.n)
            .weight(WeightDesc::new(self.dtype).layout(Layout::Kn))
            .activation(Activation::Identity)
            .output(if add { Output::Added } else { Output::Rounded });
        let matrix = crate::experts::Weight::new(tensor(&matrix.matrix)?);
        gemm::forward(queue.kernels, queue.stream, &desc, GemmArgs::new(d, matrix, out.reborrow()))
    }

    /// Gradients of matrix and bias from those of the product and from `x`.
    pub(super) fn back_to_weight<T: Element>(
        &self,
        queue: Queue<'_>,
        tokens: &Tokens,
        (d, x): (In<'_, T>, In<'_, T>),
        gradient: &mut MatrixWeight<CudaSlice<f32>>,
    ) -> Result<(), Error> {
        let desc = KGroupedDesc::new(self.dtype, *tokens.rows.shape(), self.n, self.k).f32_out(true);
        let args = KGroupedArgs::new(d, x, &tokens.rows, ProductOut::F32((&mut gradient.matrix).into()));
        k_grouped::forward(queue.kernels, queue.stream, &desc, args)?;
        match &mut gradient.bias {
            Some(bias) => tokens.columns(queue, d, self.n, bias),
            None => Ok(()),
        }
    }
}

/// A router's product, or another one of f32 gradients: `[T,K]` with a matrix `[N,K]`.
#[derive(Clone, Copy)]
pub(super) struct Product {
    x: Dtype,
    n: usize,
    k: usize,
}

impl Product {
    pub(super) fn new(x: Dtype, n: usize, k: usize) -> Product {
        Product { x, n, k }
    }

    /// `d W`, written, or added to what is there.
    pub(super) fn back_to_input<X: Element>(
        &self,
        queue: Queue<'_>,
        tokens: &Tokens,
        (d, matrix): (In<'_, f32>, Tensor<'_>),
        add: bool,
        mut out: Out<'_, X>,
    ) -> Result<(), Error> {
        let Queue { kernels, stream } = queue;
        let desc = RouterBackwardDesc::new(self.x, tokens.count, self.n, self.k).weight(matrix.dtype()).accumulate(add);
        match matrix {
            Tensor::Bf16(matrix) => router_backward::into_x(kernels, stream, &desc, d, matrix, out.reborrow()),
            Tensor::F16(matrix) => router_backward::into_x(kernels, stream, &desc, d, matrix, out.reborrow()),
            Tensor::F32(matrix) => router_backward::into_x(kernels, stream, &desc, d, matrix, out.reborrow()),
        }
    }

    /// The matrix's gradient.
    pub(super) fn back_to_weight<X: Element>(
        &self,
        queue: Queue<'_>,
        tokens: &Tokens,
        (d, x): (In<'_, f32>, In<'_, X>),
        gradient: &mut CudaSlice<f32>,
    ) -> Result<(), Error> {
        let desc = RouterBackwardDesc::new(self.x, tokens.count, self.n, self.k);
        router_backward::into_weight::<X>(queue.kernels, queue.stream, &desc, d, x, gradient)
    }
}
