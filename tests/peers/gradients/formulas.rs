//! Gradients by the chain rule written out, and by differences.

use crate::formulas::{gelu, sigmoid};

/// A function and its slope.
#[derive(Clone, Copy)]
pub enum Curve {
    Silu,
    Gelu,
    GeluTanh,
}

impl Curve {
    pub fn value(self, v: f64) -> f64 {
        match self {
            Curve::Silu => v * sigmoid(v),
            Curve::Gelu => gelu(v),
            Curve::GeluTanh => 0.5 * v * (1.0 + (TANH_FACTOR * (v + 0.044715 * v.powi(3))).tanh()),
        }
    }

    /// By central differences: off by `h^2` of the third derivative.
    pub fn slope(self, v: f64) -> f64 {
        let h = 1e-4;
        (self.value(v + h) - self.value(v - h)) / (2.0 * h)
    }
}

/// `sqrt(2 / pi)`.
const TANH_FACTOR: f64 = 0.797_884_560_802_865_4;

/// Experts of two products.
pub struct Experts<'a> {
    pub hidden: usize,
    pub inner: usize,
    pub experts: usize,
    pub top_k: usize,
    /// Rows of gates and of up values alternate.
    pub gated: bool,
    /// Matrices lie as `[E, K, N]`.
    pub transposed: bool,
    pub curve: Curve,
    pub x: &'a [f64],
    /// Those outside `0..E` pass nothing.
    pub ids: &'a [i32],
    pub weights: &'a [f64],
    pub up: &'a [f64],
    pub up_bias: Option<&'a [f64]>,
    pub down: &'a [f64],
    pub down_bias: Option<&'a [f64]>,
}

/// What [`Experts::gradients`] yields, each as its value lies.
pub struct Gradients {
    pub x: Vec<f64>,
    pub weights: Vec<f64>,
    pub up: Vec<f64>,
    pub up_bias: Vec<f64>,
    pub down: Vec<f64>,
    pub down_bias: Vec<f64>,
}

impl Experts<'_> {
    /// Outputs of the first product.
    fn width(&self) -> usize {
        if self.gated { 2 * self.inner } else { self.inner }
    }

    /// Where row `n` and column `k` of an expert's matrix `[N, K]` lie.
    fn at(&self, e: usize, [rows, columns]: [usize; 2], n: usize, k: usize) -> usize {
        e * rows * columns + if self.transposed { k * rows + n } else { n * columns + k }
    }

    /// Of `sum dy y`, `y[t] = sum_j weights[t,j] (W2 a(W1 x[t] + b1) + b2)`.
    pub fn gradients(&self, dy: &[f64]) -> Gradients {
        let (hidden, inner, width) = (self.hidden, self.inner, self.width());
        let (first, second) = ([width, hidden], [hidden, inner]);
        let mut d = Gradients {
            x: vec![0.0; self.x.len()],
            weights: vec![0.0; self.ids.len()],
            up: vec![0.0; self.up.len()],
            up_bias: vec![0.0; self.experts * width],
            down: vec![0.0; self.down.len()],
            down_bias: vec![0.0; self.experts * hidden],
        };
        for (slot, &id) in self.ids.iter().enumerate() {
            let Some(e) = usize::try_from(id).ok().filter(|&e| e < self.experts) else { continue };
            let t = slot / self.top_k;
            let (x, dy, w) = (&self.x[t * hidden..][..hidden], &dy[t * hidden..][..hidden], self.weights[slot]);
            let bias = |bias: Option<&[f64]>, at: usize| bias.map_or(0.0, |bias| bias[at]);
            let z: Vec<f64> = (0..width)
                .map(|n| {
                    let sum: f64 = (0..hidden).map(|k| self.up[self.at(e, first, n, k)] * x[k]).sum();
                    sum + bias(self.up_bias, e * width + n)
                })
                .collect();
            let gate = |i: usize| if self.gated { z[2 * i] } else { z[i] };
            let value = |i: usize| if self.gated { z[2 * i + 1] } else { 1.0 };
            let a: Vec<f64> = (0..inner).map(|i| self.curve.value(gate(i)) * value(i)).collect();
            for (n, &dy) in dy.iter().enumerate() {
                let out: f64 = (0..inner).map(|i| self.down[self.at(e, second, n, i)] * a[i]).sum();
                d.weights[slot] += dy * (out + bias(self.down_bias, e * hidden + n));
                d.down_bias[e * hidden + n] += w * dy;
                (0..inner).for_each(|i| d.down[self.at(e, second, n, i)] += w * dy * a[i]);
            }
            for i in 0..inner {
                let of_a: f64 = (0..hidden).map(|n| w * dy[n] * self.down[self.at(e, second, n, i)]).sum();
                let of_gate = of_a * value(i) * self.curve.slope(gate(i));
                let of_z = [of_gate, of_a * self.curve.value(gate(i))];
                let rows = if self.gated { vec![2 * i, 2 * i + 1] } else { vec![i] };
                for (row, of_z) in rows.into_iter().zip(of_z) {
                    d.up_bias[e * width + row] += of_z;
                    for (k, x) in x.iter().enumerate() {
                        let at = self.at(e, first, row, k);
                        d.up[at] += of_z * x;
                        d.x[t * hidden + k] += of_z * self.up[at];
                    }
                }
            }
        }
        d
    }
}

/// The gradient of `value` at `at`, by central differences: off by `h^2` of the third derivatives, some 1e-9.
pub fn differences(at: &[f64], value: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let h = 1e-4;
    let mut moved = at.to_vec();
    (0..at.len())
        .map(|i| {
            moved[i] = at[i] + h;
            let above = value(&moved);
            moved[i] = at[i] - h;
            let below = value(&moved);
            moved[i] = at[i];
            (above - below) / (2.0 * h)
        })
        .collect()
}
