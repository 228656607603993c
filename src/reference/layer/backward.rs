//! The way back through the whole layer, each stage as its own module defines it.

use super::{Forward, Layer};
use crate::reference::combine::{add_identity_backward, combine_backward, gate_addend_backward};
use crate::reference::gating::gate_backward;
use crate::reference::gemm::{
    ExpertMatrix, MatrixGradient, dense_backward, dense_gemm, grouped_backward, grouped_gemm_by_expert,
};
use crate::reference::{Real, ReferenceError, require_shape};
use crate::rules::{Activation, Glu, Layout, LossGradient, NullOutput, Weighting};

/// Gradients of everything that goes into a [`Layer`], and of what stands between.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[T,H]`.
    pub x: Vec<f64>,
    /// `[E,H]`.
    pub router_weight: Vec<f64>,
    /// `[E]`.
    pub router_bias: Option<Vec<f64>>,
    /// Of the first matrices.
    pub up: MatrixGradient,
    /// Of the second.
    pub down: MatrixGradient,
    /// Of both matrices of the shared expert.
    pub shared: Option<(MatrixGradient, MatrixGradient)>,
    /// `[1,H]`, of the shared expert's gate.
    pub shared_gate: Option<Vec<f64>>,
    /// `[H]`, of the vector that is added to every token's sum.
    pub bias: Option<Vec<f64>>,
    /// `[T,k]`, of the choices' weights; zero for a choice that has no row.
    pub weights: Vec<f64>,
    /// `[T,E]`, losses included.
    pub logits: Vec<f64>,
}

/// Losses that the router's logits take part in: their factors, the counts `[E]` of the balancing loss, which are constant, and the number of
/// tokens over which they are means.
pub type Losses<'a> = (&'a LossGradient, &'a [i32], usize);

/// The gradients of `sum dy y + losses` where `y [T,H]` is [`super::forward`]'s, by the chain rule. The choice of experts is constant: a correction bias
/// has no gradient.
///
/// With `v = down(h)` of a row, `h = act(z)`, `z = up(x)`, the token's `d = scales[0] dy` and the weight `w` of its choice:
///
/// - [`Weighting::Output`], `y += w v`: `dv = w d`, `dw = d . v`.
/// - [`Weighting::Activation`], `v = down(w h)`: `dv = d`, `dw = d(w h) . h`, `dh = w d(w h)`.
/// - [`Weighting::Input`], `z = w (x W^T) + b`: `dv = d`, `dw = dz . (x W^T)`.
///
/// An identity expert adds `w d` to `dx`, and `dw = d . x`. `dx` is the sum over a token's rows, the shared expert, its gate and the router.
///
/// # Errors
/// Those of [`super::forward`], and a `dy` of another length.
pub fn backward<X: Real, R: Real, W: Real>(
    x: &[X],
    layer: &Layer<R, W>,
    forward: &Forward,
    dy: &[f64],
    losses: Option<Losses<'_>>,
) -> Result<Gradients, ReferenceError> {
    let (hidden, top_k) = (layer.hidden, layer.top_k);
    require_shape("dy", dy, &[x.len()])?;
    let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    let mut d_x = vec![0.0; x.len()];
    let scaled = |scale: f64| dy.iter().map(|d| scale * d).collect::<Vec<f64>>();

    // y = bias + scales[1] s shared(x) + scales[0] sum
    let bias = layer.bias.map(|_| column_sums(dy, hidden));
    let (shared, shared_gate) = shared_backward(&x, layer, forward, &scaled(layer.scales[1]), &mut d_x)?;
    let d_sum = scaled(layer.scales[0]);

    // sum = sum_j w_j v_j, the weights here or further in
    let plan = &forward.plan;
    let weights = (layer.weighting == Weighting::Output).then_some(forward.weights.as_slice());
    let through = combine_backward(&forward.y_slots, &plan.token_slot, weights, &d_sum, top_k, hidden)?;

    // v = down(h)
    let linear = vec![Activation::Identity; plan.counts.len()];
    let down = grouped_backward(&forward.hidden, &layer.down, plan, false, None, &linear, &through.y_slots)?;

    // h = act(up(x))
    let slot_weight = plan.slot_weight(&forward.weights);
    let row_scale = (layer.weighting == Weighting::Input).then_some(&slot_weight[..]);
    let activations = layer.activations_of(plan.counts.len());
    let (mut d_hidden, mut d_slot_weight) = (down.a, Vec::new());
    if layer.weighting == Weighting::Activation {
        let bare = grouped_gemm_by_expert(&x, &layer.up, plan, true, None, &activations)?;
        for ((d, h), w) in d_hidden.chunks_mut(layer.up.n).zip(bare.chunks(layer.up.n)).zip(&slot_weight) {
            d_slot_weight.push(d.iter().zip(h).map(|(d, h)| d * h).sum());
            d.iter_mut().for_each(|d| *d *= w);
        }
    }
    let up = grouped_backward(&x, &layer.up, plan, true, row_scale, &activations, &d_hidden)?;
    for (row, &token) in plan.slot_token.iter().enumerate().filter(|(_, token)| **token >= 0) {
        add(&mut d_x[token as usize * hidden..][..hidden], &up.a[row * hidden..][..hidden]);
    }

    // The choices' weights, from the rows where they have acted
    let by_row = match layer.weighting {
        Weighting::Output => None,
        Weighting::Input => Some(&up.row_scale),
        Weighting::Activation => Some(&d_slot_weight),
    };
    let mut d_weights = match by_row {
        None => through.weights,
        Some(rows) => plan.token_slot.iter().map(|&row| usize::try_from(row).map_or(0.0, |row| rows[row])).collect(),
    };
    let all = layer.router_weight.len() / hidden;
    if layer.null.is_some_and(|null| null.output == NullOutput::Input) {
        let identities = plan.counts.len() as i32..all as i32;
        let given = (&x[..], &forward.ids[..], &forward.weights[..]);
        add_identity_backward(given, top_k, identities, &d_sum, (&mut d_x, &mut d_weights))?;
    }

    // weights = gate(logits), logits = x W^T + b
    let d_logits = gate_backward(&forward.logits, &forward.ids, &d_weights, all, top_k, &layer.gating, losses)?;
    let matrix = router_matrix(layer.router_weight, layer.router_bias, hidden);
    let router = dense_backward(&x, &matrix, Activation::Identity, &d_logits)?;
    add(&mut d_x, &router.a);

    Ok(Gradients {
        x: d_x,
        router_weight: router.matrix.weight,
        router_bias: router.matrix.bias,
        up: up.matrix,
        down: down.matrix,
        shared,
        shared_gate,
        bias,
        weights: d_weights,
        logits: d_logits,
    })
}

type Shared = (Option<(MatrixGradient, MatrixGradient)>, Option<Vec<f64>>);

/// Of `sum d s shared(x)`, `s` 1 or the sigmoid of `x . gate`; adds to the gradient of x.
fn shared_backward<R: Real, W: Real>(
    x: &[f64],
    layer: &Layer<R, W>,
    forward: &Forward,
    d: &[f64],
    d_x: &mut [f64],
) -> Result<Shared, ReferenceError> {
    let Some(((up, down), y)) = layer.shared.as_ref().zip(forward.shared.as_ref()) else { return Ok((None, None)) };
    let (mut d, mut d_gate) = (d.to_vec(), None);
    if let Some((gate, logits)) = layer.shared_gate.zip(forward.shared_gate.as_ref()) {
        let (gated, d_logits) = gate_addend_backward(y, logits, &d)?;
        let product = dense_backward(x, &router_matrix(gate, None, layer.hidden), Activation::Identity, &d_logits)?;
        add(d_x, &product.a);
        (d, d_gate) = (gated, Some(product.matrix.weight));
    }
    let activation = layer.shared_activation.unwrap_or(layer.activation);
    let between = dense_gemm(x, up, activation)?;
    let second = dense_backward(&between, down, Activation::Identity, &d)?;
    let first = dense_backward(x, up, activation, &second.a)?;
    add(d_x, &first.a);
    Ok((Some((first.matrix, second.matrix)), d_gate))
}

/// A router's weight `[E,H]` as a matrix.
fn router_matrix<'a, R>(weight: &'a [R], bias: Option<&'a [R]>, hidden: usize) -> ExpertMatrix<'a, R> {
    let n = weight.len() / hidden.max(1);
    ExpertMatrix { weight, bias, n, k: hidden, glu: Glu::None, layout: Layout::Nk }
}

fn add(sums: &mut [f64], values: &[f64]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

fn column_sums(rows: &[f64], columns: usize) -> Vec<f64> {
    let mut sums = vec![0.0; columns];
    rows.chunks(columns).for_each(|row| add(&mut sums, row));
    sums
}
