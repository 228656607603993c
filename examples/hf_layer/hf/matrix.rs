//! Products of the reference with weights as they are loaded: widened number by number, never as a whole.

use moe_kernels::checkpoint::{HostBuffer, MatrixWeight};
use moe_kernels::reference::dispatch::Dispatched;
use moe_kernels::reference::gemm::{
    ExpertMatrix, ProductGradient, dense_backward, dense_gemm, grouped_backward, grouped_gemm,
};
use moe_kernels::reference::{Real, ReferenceError};
use moe_kernels::rules::{Activation, Glu, Layout, WeightDesc};

/// A weight with its extents.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    weight: &'a MatrixWeight<HostBuffer>,
    n: usize,
    k: usize,
    glu: Glu,
    layout: Layout,
}

/// Calls `$body` with the matrix in its own type.
macro_rules! typed {
    ($of:expr, |$matrix:ident| $body:expr) => {
        match &$of.weight.matrix {
            HostBuffer::Bf16(weight) => {
                let $matrix = $of.matrix(weight, $of.weight.bias.as_ref().and_then(HostBuffer::bf16));
                $body
            }
            HostBuffer::F16(weight) => {
                let $matrix = $of.matrix(weight, $of.weight.bias.as_ref().and_then(HostBuffer::f16));
                $body
            }
            HostBuffer::F32(weight) => {
                let $matrix = $of.matrix(weight, $of.weight.bias.as_ref().and_then(HostBuffer::f32));
                $body
            }
            _ => Err(ReferenceError {
                argument: "weight",
                expected: "numbers with a fraction".into(),
                found: "whole numbers".into(),
            }),
        }
    };
}

/// A matrix of numbers, as `nn.Linear` holds it.
pub fn dense<'a>(weight: &'a [f64], bias: Option<&'a [f64]>, k: usize) -> ExpertMatrix<'a, f64> {
    ExpertMatrix { weight, bias, n: weight.len() / k.max(1), k, glu: Glu::None, layout: Layout::Nk }
}

impl<'a> Matrix<'a> {
    /// `[n, k]`, or as `desc` has it.
    pub fn sized(weight: &'a MatrixWeight<HostBuffer>, n: usize, k: usize, desc: &WeightDesc) -> Matrix<'a> {
        Matrix { weight, n, k, glu: desc.glu, layout: desc.layout }
    }

    /// `[n, k]`, as `nn.Linear` holds it.
    pub fn plain(weight: &'a MatrixWeight<HostBuffer>, n: usize, k: usize) -> Matrix<'a> {
        Matrix { weight, n, k, glu: Glu::None, layout: Layout::Nk }
    }

    fn matrix<W>(&self, weight: &'a [W], bias: Option<&'a [W]>) -> ExpertMatrix<'a, W> {
        let &Matrix { n, k, glu, layout, .. } = self;
        ExpertMatrix { weight, bias, n, k, glu, layout }
    }

    pub fn dense<A: Real>(&self, a: &[A], activation: Activation) -> Result<Vec<f64>, ReferenceError> {
        typed!(self, |matrix| dense_gemm(a, &matrix, activation))
    }

    pub fn grouped<A: Real>(
        &self,
        a: &[A],
        plan: &Dispatched,
        gather: bool,
        row_scale: Option<&[f64]>,
        activation: Activation,
    ) -> Result<Vec<f64>, ReferenceError> {
        typed!(self, |matrix| grouped_gemm(a, &matrix, plan, gather, row_scale, activation))
    }

    /// What [`Matrix::dense`] passes back.
    pub fn dense_backward<A: Real>(
        &self,
        a: &[A],
        activation: Activation,
        d_out: &[f64],
    ) -> Result<ProductGradient, ReferenceError> {
        typed!(self, |matrix| dense_backward(a, &matrix, activation, d_out))
    }

    /// What [`Matrix::grouped`] passes back.
    pub fn grouped_backward<A: Real>(
        &self,
        a: &[A],
        plan: &Dispatched,
        gather: bool,
        row_scale: Option<&[f64]>,
        activation: Activation,
        d_out: &[f64],
    ) -> Result<ProductGradient, ReferenceError> {
        let activations = vec![activation; plan.counts.len()];
        typed!(self, |matrix| grouped_backward(a, &matrix, plan, gather, row_scale, &activations, d_out))
    }
}
