//! A layer of our own, for a machine without checkpoints.

use moe_kernels::layer::LayerDesc;
use moe_kernels::{Dtype, Element};

use super::load::{Matrix, RouterWeight, Weights};
use super::random::Random;

/// What the layer is, for the report.
pub const STATED: &str = "Mixtral 8x7B scaled down: H and I by 8, 8 experts, 2 per token";

/// Tokens of its batch.
pub const TOKENS: usize = 128;

pub fn desc(dtype: Dtype) -> LayerDesc {
    LayerDesc::new(dtype, 4096 / 8, 14336 / 8, 8, 2)
}

/// Weights of the size that keeps activations near 1.
pub fn weights<T: Element>(desc: &LayerDesc, random: &mut Random) -> Weights<T> {
    let &LayerDesc { hidden, intermediate, experts, .. } = desc;
    let mut matrix = |rows: usize, columns: usize| {
        let values = random.normals(rows * columns, (columns as f32).sqrt().recip());
        values.into_iter().map(T::from_f32).collect::<Vec<T>>()
    };
    Weights {
        router: RouterWeight::Same(matrix(experts, hidden)),
        router_bias: None,
        correction_bias: None,
        gate_up: Matrix { weight: matrix(experts * 2 * intermediate, hidden), bias: None },
        down: Matrix { weight: matrix(experts * hidden, intermediate), bias: None },
        shared: None,
    }
}
