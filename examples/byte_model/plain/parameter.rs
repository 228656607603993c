//! Numbers that are learned.

use super::Real;

/// A tensor, its gradient, and how it is trained.
#[derive(Clone)]
pub struct Parameter {
    /// Name in a saved model.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    pub value: Vec<Real>,
    /// Of the same extents. Backward passes add to it.
    pub gradient: Vec<Real>,
    /// Whether weight decay applies: to matrices, not to the factors of norms.
    pub decays: bool,
    /// Whether the optimiser leaves it as it is.
    pub frozen: bool,
}

impl Parameter {
    /// All of it this number, without decay.
    pub fn constant(name: impl Into<String>, shape: &[usize], value: Real) -> Parameter {
        let length = shape.iter().product();
        Parameter {
            name: name.into(),
            shape: shape.to_vec(),
            value: vec![value; length],
            gradient: vec![0.0; length],
            decays: false,
            frozen: false,
        }
    }

    /// Normally distributed with this deviation, cut off at two deviations, as Switch Transformers, section 2.4, draws its weights.
    pub fn normal(name: impl Into<String>, shape: &[usize], deviation: f64, rng: &mut fastrand::Rng) -> Parameter {
        let mut parameter = Parameter::constant(name, shape, 0.0);
        parameter.value.fill_with(|| (deviation * truncated_normal(rng)) as Real);
        parameter.decays = true;
        parameter
    }
}

/// By Box and Muller, drawn again beyond two deviations.
fn truncated_normal(rng: &mut fastrand::Rng) -> f64 {
    loop {
        let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
        let value = radius * (std::f64::consts::TAU * rng.f64()).cos();
        if value.abs() <= 2.0 {
            return value;
        }
    }
}
