//! A matrix that tokens go through.

use super::Real;
use super::parameter::Parameter;
use super::products::{product, transposed};

/// `y = x Wᵀ`, without a bias.
pub struct Linear {
    /// `[outputs, inputs]`.
    pub weight: Parameter,
    /// `[T, inputs]`, of the last forward pass.
    x: Vec<Real>,
}

impl Linear {
    /// Weights of deviation `sqrt(scale / inputs)`.
    pub fn new(name: String, [outputs, inputs]: [usize; 2], scale: f64, rng: &mut fastrand::Rng) -> Linear {
        let deviation = (scale / inputs as f64).sqrt();
        Linear { weight: Parameter::normal(name, &[outputs, inputs], deviation, rng), x: Vec::new() }
    }

    fn sizes(&self) -> [usize; 2] {
        [self.weight.shape[0], self.weight.shape[1]]
    }

    /// `[T, outputs]` of `x [T, inputs]`.
    pub fn forward(&mut self, x: Vec<Real>) -> Vec<Real> {
        let [outputs, inputs] = self.sizes();
        let tokens = x.len() / inputs;
        self.x = x;
        product(&self.x, &transposed(&self.weight.value, [outputs, inputs]), [tokens, inputs, outputs])
    }

    /// `dx = dy W`, `dW = dyᵀ x`.
    pub fn backward(&mut self, dy: &[Real]) -> Vec<Real> {
        let [outputs, inputs] = self.sizes();
        let tokens = self.x.len() / inputs;
        let gradient = product(&transposed(dy, [tokens, outputs]), &self.x, [outputs, tokens, inputs]);
        self.weight.gradient.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
        product(dy, &self.weight.value, [tokens, outputs, inputs])
    }
}
