//! Causal attention: what mixes the tokens of a sequence.

use super::Real;
use super::linear::Linear;
use super::parameter::Parameter;

/// `softmax(q kᵀ / sqrt(d), later tokens left out) v` by head, between two matrices (Vaswani et al. 2017, arXiv:1706.03762).
pub struct Attention {
    /// `[3H, H]`: queries, keys, values.
    pub input: Linear,
    /// `[H, H]`.
    pub output: Linear,
    heads: usize,
    /// Tokens of a sequence in the last forward pass.
    length: usize,
    /// `[T, 3H]`.
    qkv: Vec<Real>,
    /// `[sequences, heads, length, length]`: row `i` has what token `i` takes of tokens 0 to `i`.
    shares: Vec<Real>,
}

impl Attention {
    pub fn new(name: &str, hidden: usize, heads: usize, rng: &mut fastrand::Rng) -> Attention {
        Attention {
            input: Linear::new(format!("{name}.input"), [3 * hidden, hidden], 1.0, rng),
            output: Linear::new(format!("{name}.output"), [hidden, hidden], 1.0, rng),
            heads,
            length: 1,
            qkv: Vec::new(),
            shares: Vec::new(),
        }
    }

    pub fn parameters(&mut self) -> [&mut Parameter; 2] {
        [&mut self.input.weight, &mut self.output.weight]
    }

    fn hidden(&self) -> usize {
        self.output.weight.shape[0]
    }

    /// Width of a head's rows, and the factor of its scores.
    fn head(&self) -> (usize, Real) {
        let width = self.hidden() / self.heads;
        (width, (width as Real).sqrt().recip())
    }

    /// `[T, H]` of sequences of `length` rows.
    pub fn forward(&mut self, x: Vec<Real>, length: usize) -> Vec<Real> {
        let (hidden, heads) = (self.hidden(), self.heads);
        let (width, scale) = self.head();
        let tokens = x.len() / hidden;
        self.length = length;
        self.qkv = self.input.forward(x);
        self.shares = vec![0.0; tokens / length * heads * length * length];
        let mut mixed = vec![0.0; tokens * hidden];
        for (index, shares) in self.shares.chunks_exact_mut(length * length).enumerate() {
            let (first, column) = (index / heads * length, index % heads * width);
            let row =
                |token: usize, part: usize| &self.qkv[(first + token) * 3 * hidden + part * hidden + column..][..width];
            for (i, shares) in shares.chunks_exact_mut(length).enumerate() {
                let query = row(i, 0);
                let shares = &mut shares[..=i];
                for (j, share) in shares.iter_mut().enumerate() {
                    *share = scale * dot(query, row(j, 1));
                }
                softmax(shares);
                let mixed = &mut mixed[(first + i) * hidden + column..][..width];
                for (j, &share) in shares.iter().enumerate() {
                    add(mixed, share, row(j, 2));
                }
            }
        }
        self.output.forward(mixed)
    }

    /// With `p` a row's shares and `dp = dy vᵀ`: `dv = pᵀ dy`, the scores' gradient is `p (dp - <p, dp>)`.
    pub fn backward(&mut self, dy: &[Real]) -> Vec<Real> {
        let (hidden, heads, length) = (self.hidden(), self.heads, self.length);
        let (width, scale) = self.head();
        let d_mixed = self.output.backward(dy);
        let mut d_qkv = vec![0.0; self.qkv.len()];
        let mut d_shares = vec![0.0; length];
        for (index, shares) in self.shares.chunks_exact(length * length).enumerate() {
            let (first, column) = (index / heads * length, index % heads * width);
            let at = |token: usize, part: usize| (first + token) * 3 * hidden + part * hidden + column;
            for (i, shares) in shares.chunks_exact(length).enumerate() {
                let shares = &shares[..=i];
                let d_mixed = &d_mixed[(first + i) * hidden + column..][..width];
                for (j, (d_share, &share)) in d_shares.iter_mut().zip(shares).enumerate() {
                    *d_share = dot(d_mixed, &self.qkv[at(j, 2)..][..width]);
                    add(&mut d_qkv[at(j, 2)..][..width], share, d_mixed);
                }
                let along = dot(shares, &d_shares[..=i]);
                for (j, &share) in shares.iter().enumerate() {
                    let d_score = scale * share * (d_shares[j] - along);
                    add(&mut d_qkv[at(i, 0)..][..width], d_score, &self.qkv[at(j, 1)..][..width]);
                    add(&mut d_qkv[at(j, 1)..][..width], d_score, &self.qkv[at(i, 0)..][..width]);
                }
            }
        }
        self.input.backward(&d_qkv)
    }
}

/// In place, from the largest down so that no exponential overflows.
pub fn softmax(row: &mut [Real]) {
    let largest = row.iter().copied().fold(Real::NEG_INFINITY, Real::max);
    row.iter_mut().for_each(|value| *value = (*value - largest).exp());
    let sum: Real = row.iter().sum();
    row.iter_mut().for_each(|value| *value /= sum);
}

fn dot(a: &[Real], b: &[Real]) -> Real {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(sum: &mut [Real], factor: Real, values: &[Real]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
}
