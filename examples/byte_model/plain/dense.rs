//! A feed-forward that every token goes through: what an expert is, once.

use super::linear::Linear;
use super::model::FeedForward;
use super::parameter::Parameter;
use super::{Outcome, Real};

/// What stands between the two matrices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    /// `max(v, 0)`.
    Relu,
    /// `gelu(g) u`, GELU by tanh.
    GeluGated,
    /// `silu(g) u`.
    SiluGated,
}

impl Unit {
    pub fn is_gated(self) -> bool {
        self != Unit::Relu
    }

    /// The function and its derivative.
    fn at(self, v: Real) -> (Real, Real) {
        match self {
            Unit::Relu => (v.max(0.0), if v > 0.0 { 1.0 } else { 0.0 }),
            Unit::GeluGated => {
                let root = (2.0 / std::f64::consts::PI).sqrt() as Real;
                let tanh = (root * (v + 0.044715 * v * v * v)).tanh();
                let slope = root * (1.0 + 3.0 * 0.044715 * v * v);
                (0.5 * v * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * v * (1.0 - tanh * tanh) * slope)
            }
            Unit::SiluGated => {
                let sigmoid = 1.0 / (1.0 + (-v).exp());
                (v * sigmoid, sigmoid * (1.0 + v * (1.0 - sigmoid)))
            }
        }
    }
}

/// `W_out act(W_in x)`; with a gated unit `W_in x` are gates, then what they let through.
pub struct Dense {
    input: Linear,
    output: Linear,
    unit: Unit,
    /// `[T, I]` or `[T, 2I]`, of the last forward pass.
    before: Vec<Real>,
}

impl Dense {
    pub fn new(name: &str, [hidden, width]: [usize; 2], unit: Unit, rng: &mut fastrand::Rng) -> Dense {
        let rows = if unit.is_gated() { 2 * width } else { width };
        Dense {
            input: Linear::new(format!("{name}.input"), [rows, hidden], 1.0, rng),
            output: Linear::new(format!("{name}.output"), [hidden, width], 1.0, rng),
            unit,
            before: Vec::new(),
        }
    }

    fn width(&self) -> usize {
        self.output.weight.shape[1]
    }
}

impl FeedForward for Dense {
    fn forward(&mut self, x: Vec<Real>) -> Outcome<Vec<Real>> {
        let (unit, width) = (self.unit, self.width());
        self.before = self.input.forward(x);
        let hidden = if unit.is_gated() {
            let rows = self.before.chunks_exact(2 * width).map(|row| row.split_at(width));
            rows.flat_map(|(gates, ups)| gates.iter().zip(ups).map(|(&g, u)| unit.at(g).0 * u)).collect()
        } else {
            self.before.iter().map(|&v| unit.at(v).0).collect()
        };
        Ok(self.output.forward(hidden))
    }

    fn backward(&mut self, dy: &[Real]) -> Outcome<Vec<Real>> {
        let (unit, width) = (self.unit, self.width());
        let d_hidden = self.output.backward(dy);
        let d_before: Vec<Real> = if unit.is_gated() {
            let rows = self.before.chunks_exact(2 * width).zip(d_hidden.chunks_exact(width));
            let back = |(row, d): (&[Real], &[Real])| {
                let of = |i: usize| unit.at(row[i]);
                let gates = (0..width).map(|i| d[i] * row[width + i] * of(i).1);
                let ups = (0..width).map(|i| d[i] * of(i).0);
                gates.chain(ups).collect::<Vec<_>>()
            };
            rows.flat_map(back).collect()
        } else {
            self.before.iter().zip(d_hidden).map(|(&v, d)| d * unit.at(v).1).collect()
        };
        Ok(self.input.backward(&d_before))
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.input.weight, &mut self.output.weight]
    }
}
