//! The optimiser.

use super::Real;
use super::plain::parameter::Parameter;

/// AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2), with gradients cut to a global norm.
pub struct AdamW {
    /// First and second moments of each parameter.
    moments: Vec<[Vec<Real>; 2]>,
    steps: i32,
}

const BETAS: [Real; 2] = [0.9, 0.99];
const EPSILON: Real = 1e-8;
const DECAY: Real = 0.01;
const LARGEST_NORM: f64 = 1.0;

impl AdamW {
    pub fn new() -> AdamW {
        AdamW { moments: Vec::new(), steps: 0 }
    }

    /// Moves all parameters that are not frozen, in the order of the first call, and sets all gradients to zero. Returns the gradients' norm.
    pub fn step(&mut self, mut parameters: Vec<&mut Parameter>, rate: Real) -> f64 {
        if self.moments.is_empty() {
            self.moments = parameters.iter().map(|p| [(); 2].map(|()| vec![0.0; p.value.len()])).collect();
        }
        self.steps += 1;
        let moved = parameters.iter().filter(|parameter| !parameter.frozen);
        let squares = moved.flat_map(|parameter| &parameter.gradient).map(|&g| f64::from(g).powi(2));
        let norm = squares.sum::<f64>().sqrt();
        let cut = (LARGEST_NORM / norm).min(1.0) as Real;
        let unbiased = BETAS.map(|beta| (1.0 - beta.powi(self.steps)).recip());
        for (parameter, [first, second]) in parameters.iter_mut().zip(&mut self.moments) {
            let decay = if parameter.decays { rate * DECAY } else { 0.0 };
            let Parameter { value, gradient, frozen: false, .. } = &mut **parameter else {
                parameter.gradient.fill(0.0);
                continue;
            };
            for (((value, gradient), first), second) in value.iter_mut().zip(gradient).zip(first).zip(second) {
                let g = cut * std::mem::take(gradient);
                *first = BETAS[0] * *first + (1.0 - BETAS[0]) * g;
                *second = BETAS[1] * *second + (1.0 - BETAS[1]) * g * g;
                let step = unbiased[0] * *first / ((unbiased[1] * *second).sqrt() + EPSILON);
                *value -= rate * step + decay * *value;
            }
        }
        norm
    }
}

/// The rate at a step: rising over the first `warmup`, then falling as a cosine to a tenth of the largest.
pub fn rate(largest: f64, step: usize, steps: usize, warmup: usize) -> Real {
    if step < warmup {
        return (largest * (step + 1) as f64 / warmup as f64) as Real;
    }
    let way = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
    (largest * (0.55 + 0.45 * (std::f64::consts::PI * way).cos())) as Real
}
