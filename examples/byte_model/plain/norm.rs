//! RMS norm.

use super::Real;
use super::parameter::Parameter;

const EPSILON: Real = 1e-6;

/// `y = g x / sqrt(mean(x²) + epsilon)` for each row (Zhang and Sennrich 2019, arXiv:1910.07467).
pub struct RmsNorm {
    /// `[H]`.
    pub gain: Parameter,
    /// `[T, H]`, of the last forward pass.
    x: Vec<Real>,
    /// `[T]`: one over each row's root.
    inverse: Vec<Real>,
}

impl RmsNorm {
    /// Of rows of `width`, with gains of 1.
    pub fn new(name: String, width: usize) -> RmsNorm {
        RmsNorm { gain: Parameter::constant(name, &[width], 1.0), x: Vec::new(), inverse: Vec::new() }
    }

    pub fn forward(&mut self, x: &[Real]) -> Vec<Real> {
        let gain = &self.gain.value;
        let width = gain.len();
        let root = |row: &[Real]| (row.iter().map(|x| x * x).sum::<Real>() / width as Real + EPSILON).sqrt();
        self.x = x.to_vec();
        self.inverse = x.chunks_exact(width).map(|row| root(row).recip()).collect();
        let rows = x.chunks_exact(width).zip(&self.inverse);
        rows.flat_map(|(row, inverse)| row.iter().zip(gain).map(move |(x, gain)| gain * x * inverse)).collect()
    }

    /// With `r` one over the root and `v = g dy`: `dx = r (v - x r² mean(v x))`, `dg = sum of dy x r`.
    pub fn backward(&mut self, dy: &[Real]) -> Vec<Real> {
        let (gain, width) = (&self.gain.value, self.gain.value.len());
        let mut dx = vec![0.0; dy.len()];
        let rows = self.x.chunks_exact(width).zip(&self.inverse);
        for ((dx, dy), (x, inverse)) in dx.chunks_exact_mut(width).zip(dy.chunks_exact(width)).zip(rows) {
            let along = (0..width).map(|i| gain[i] * dy[i] * x[i]).sum::<Real>() / width as Real;
            for i in 0..width {
                dx[i] = inverse * (gain[i] * dy[i] - x[i] * inverse * inverse * along);
                self.gain.gradient[i] += dy[i] * x[i] * inverse;
            }
        }
        dx
    }
}
