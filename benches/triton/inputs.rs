//! What both sides compute: weights on the device, tokens, and choices of experts.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;

use crate::Result;
use crate::cases::Case;
use crate::fill;

/// The experts of a layer.
pub struct Weights {
    /// Experts, hidden width, width of an expert.
    pub extents: [usize; 3],
    /// `[E, 2I, H]`.
    pub gate_up: CudaSlice<bf16>,
    /// `[E, H, I]`.
    pub down: CudaSlice<bf16>,
}

/// A batch whose experts are drawn uniformly, distinct for a token.
pub struct Batch {
    /// `[T, H]`.
    pub x: CudaSlice<bf16>,
    pub host_x: Vec<bf16>,
    /// `[T, k]`.
    pub ids: Vec<i32>,
    /// `[T, k]`, positive, of sum 1 for a token.
    pub weights: Vec<f32>,
    pub device_ids: CudaSlice<i32>,
    pub device_weights: CudaSlice<f32>,
}

impl Weights {
    pub fn extents_of(case: &Case) -> [usize; 3] {
        [case.shape.experts, case.shape.hidden, case.shape.intermediate]
    }

    pub fn new(stream: &Arc<CudaStream>, case: &Case) -> Result<Weights> {
        let extents = Weights::extents_of(case);
        let [experts, hidden, intermediate] = extents;
        let deviation = |fan_in: usize| 1.0 / (fan_in as f32).sqrt();
        Ok(Weights {
            extents,
            gate_up: fill::repeated(stream, experts * 2 * intermediate * hidden, deviation(hidden))?,
            down: fill::repeated(stream, experts * hidden * intermediate, deviation(intermediate))?,
        })
    }

    /// `y` of one token in f64, by the formula: `sum of w_e down_e (silu(gate_e x) * up_e x)`.
    pub fn token(&self, stream: &Arc<CudaStream>, x: &[bf16], ids: &[i32], weights: &[f32]) -> Result<Vec<f64>> {
        let [_, hidden, intermediate] = self.extents;
        let dot = |row: &[bf16], x: &[f64]| row.iter().zip(x).map(|(w, x)| f64::from(w.to_f32()) * x).sum::<f64>();
        let x: Vec<f64> = x.iter().map(|value| f64::from(value.to_f32())).collect();
        let mut y = vec![0.0; hidden];
        for (&id, &weight) in ids.iter().zip(weights) {
            let of = |all: &CudaSlice<bf16>, len: usize| {
                stream.clone_dtoh(&all.slice(id as usize * len..(id as usize + 1) * len))
            };
            let gate_up = of(&self.gate_up, 2 * intermediate * hidden)?;
            let down = of(&self.down, hidden * intermediate)?;
            let row = |r: usize| dot(&gate_up[r * hidden..][..hidden], &x);
            let silu = |gate: f64| gate / (1.0 + (-gate).exp());
            let h: Vec<f64> = (0..intermediate).map(|i| silu(row(i)) * row(intermediate + i)).collect();
            for (y, row) in y.iter_mut().zip(down.chunks_exact(intermediate)) {
                *y += f64::from(weight) * dot(row, &h);
            }
        }
        Ok(y)
    }
}

impl Batch {
    pub fn new(stream: &Arc<CudaStream>, case: &Case) -> Result<Batch> {
        let (experts, top_k, hidden) = (case.shape.experts, case.shape.top_k, case.shape.hidden);
        let mut rng = fastrand::Rng::with_seed(7);
        let host_x: Vec<bf16> = (0..case.tokens * hidden).map(|_| bf16::from_f32(2.0 * rng.f32() - 1.0)).collect();
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for _ in 0..case.tokens {
            ids.extend(rng.choose_multiple(0..experts as i32, top_k));
            let drawn: Vec<f32> = (0..top_k).map(|_| 0.1 + rng.f32()).collect();
            let sum: f32 = drawn.iter().sum();
            weights.extend(drawn.iter().map(|weight| weight / sum));
        }
        Ok(Batch {
            x: stream.clone_htod(&host_x)?,
            device_ids: stream.clone_htod(&ids)?,
            device_weights: stream.clone_htod(&weights)?,
            host_x,
            ids,
            weights,
        })
    }
}
