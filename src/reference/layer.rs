//! The whole layer: router, gating, dispatch, two expert matrices, combine.

mod backward;
#[cfg(test)]
mod differences;

use super::combine::{add_around, add_identity, combine, gate_addend, identity_weight};
use super::dispatch::{DispatchRule, Dispatched, dispatch};
use super::gating::{Gated, gate};
use super::gemm::{ExpertMatrix, dense_gemm, grouped_gemm, grouped_gemm_by_expert};
use super::router::router;
use super::{Real, ReferenceError, require};
use crate::rules::{Activation, Capacity, Gating, NullExperts, NullOutput, Weighting};

pub use backward::{Gradients, Losses, backward};

/// A Mixture-of-Experts layer and its parameters, of type `W` (router and its biases: `R`).
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a, R, W> {
    /// Hidden size, `H`.
    pub hidden: usize,
    /// `[E,H]`.
    pub router_weight: &'a [R],
    /// `[E]`, added to the logits (gpt-oss).
    pub router_bias: Option<&'a [R]>,
    /// `[E]`, added to the scores when experts are chosen (DeepSeek-V3).
    pub correction_bias: Option<&'a [R]>,
    /// Experts of a token, `k`.
    pub top_k: usize,
    /// How experts are chosen and weighed.
    pub gating: Gating,
    /// What the weights multiply: an expert's output, its input (Llama 4), or what its activation yields.
    pub weighting: Weighting,
    /// Limit of slots per expert (Switch).
    pub capacity: Option<Capacity>,
    /// First matrix, `K = H`, `N = I`.
    pub up: ExpertMatrix<'a, W>,
    /// Between the two.
    pub activation: Activation,
    /// In its place, one for each expert that has matrices: limits, steepness and offsets of a SwiGLU by expert.
    pub activations: Option<&'a [Activation]>,
    /// Second matrix, `K = I`, `N = H`.
    pub down: ExpertMatrix<'a, W>,
    /// The two matrices of the expert that every token passes, with their own intermediate size.
    pub shared: Option<(ExpertMatrix<'a, W>, ExpertMatrix<'a, W>)>,
    /// The shared expert's activation, where it is not that of the others (Hunyuan 4: without their clamps).
    pub shared_activation: Option<Activation>,
    /// `[1,H]`: the shared expert's output times `sigmoid(x . gate)` (Qwen2-MoE).
    pub shared_gate: Option<&'a [R]>,
    /// Factors of the sum over the routed experts and of the shared expert (Step 3; Cohere 2: 1/2 and 1/2).
    pub scales: [f64; 2],
    /// `[H]`, added to every token's sum (JetMoE).
    pub bias: Option<&'a [W]>,
    /// The last of the experts have no matrices and compute nothing.
    pub null: Option<NullExperts>,
}

impl<R, W> Layer<'_, R, W> {
    /// The activation of each of so many experts.
    fn activations_of(&self, experts: usize) -> Vec<Activation> {
        self.activations.map_or_else(|| vec![self.activation; experts], <[Activation]>::to_vec)
    }
}

/// Everything that the layer computes on its way.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `[T,E]`.
    pub logits: Vec<f64>,
    /// `[T,k]`.
    pub ids: Vec<i32>,
    /// `[T,k]`.
    pub weights: Vec<f64>,
    /// Slots by expert, with tiles of 16 rows.
    pub plan: Dispatched,
    /// `[rows,I]`, after the activation.
    pub hidden: Vec<f64>,
    /// `[rows,H]`.
    pub y_slots: Vec<f64>,
    /// `[T,H]`, output of the shared expert, before its gate.
    pub shared: Option<Vec<f64>>,
    /// `[T]`, logits of the shared expert's gate.
    pub shared_gate: Option<Vec<f64>>,
    /// `[T,H]`.
    pub y: Vec<f64>,
}

/// `y = bias + scales[1] s shared(x) + scales[0] sum_j weights[j] down(act(up(x)))` over the chosen experts, each stage as its own module
/// defines it; `s` is 1, or the sigmoid of the shared expert's gate. An identity expert is `x` in place of `down(act(up(x)))`.
///
/// `x` is `[T,H]`.
///
/// # Errors
/// Parameters whose lengths or extents do not fit together.
pub fn forward<X: Real, R: Real, W: Real>(x: &[X], layer: &Layer<R, W>) -> Result<Forward, ReferenceError> {
    let experts = layer.router_weight.len() / layer.hidden.max(1);
    let logits = router(x, layer.router_weight, layer.router_bias, layer.hidden)?;
    let gated = gate(&logits, layer.correction_bias, experts, layer.top_k, &layer.gating)?;
    forward_gated(x, layer, logits, gated)
}

/// The rest of [`forward`] for experts that are already chosen: to compare an implementation whose choice between two nearly
/// equal experts differs. `logits` are passed on.
///
/// # Errors
/// Those of [`forward`].
pub fn forward_gated<X: Real, R: Real, W: Real>(
    x: &[X],
    layer: &Layer<R, W>,
    logits: Vec<f64>,
    gated: Gated,
) -> Result<Forward, ReferenceError> {
    let all = layer.router_weight.len() / layer.hidden.max(1);
    let null = layer.null.map_or(0, |null| null.count);
    require("null", null < all, || format!("less than {all} experts"), null)?;
    let experts = all - null;
    let rule = DispatchRule { experts, top_k: layer.top_k, capacity: layer.capacity, tile_m: 16 };
    let plan = dispatch(&gated.ids, &rule)?;
    chain("up", "down", &layer.up, &layer.down, layer.hidden)?;

    let slot_weight = plan.slot_weight(&gated.weights);
    let row_scale = (layer.weighting == Weighting::Input).then_some(&slot_weight[..]);
    let activations = layer.activations_of(experts);
    let mut hidden = grouped_gemm_by_expert(x, &layer.up, &plan, true, row_scale, &activations)?;
    if layer.weighting == Weighting::Activation {
        let rows = hidden.chunks_mut(layer.up.n).zip(&slot_weight);
        rows.for_each(|(row, weight)| row.iter_mut().for_each(|value| *value *= weight));
    }
    let y_slots = grouped_gemm(&hidden, &layer.down, &plan, false, None, Activation::Identity)?;
    let shared = match &layer.shared {
        Some((up, down)) => {
            chain("shared.up", "shared.down", up, down, layer.hidden)?;
            let activation = layer.shared_activation.unwrap_or(layer.activation);
            Some(dense_gemm(&dense_gemm(x, up, activation)?, down, Activation::Identity)?)
        }
        None => None,
    };
    let shared_gate = layer.shared_gate.map(|gate| router(x, gate, None::<&[R]>, layer.hidden)).transpose()?;
    let mut addend = shared.clone();
    if let Some((addend, logits)) = addend.as_mut().zip(shared_gate.as_ref()) {
        gate_addend(addend, logits)?;
    }
    let weights = (layer.weighting == Weighting::Output).then_some(gated.weights.as_slice());
    let mut y = combine::<f64, f64>(&y_slots, &plan.token_slot, weights, None, None, layer.top_k, layer.hidden)?;
    if layer.null.is_some_and(|null| null.output == NullOutput::Input) {
        let identities = experts as i32..all as i32;
        add_identity(&mut y, x, &identity_weight(&gated.ids, &gated.weights, layer.top_k, identities)?)?;
    }
    let bias: Option<Vec<f64>> = layer.bias.map(|bias| bias.iter().map(|&value| value.into()).collect());
    add_around(&mut y, layer.scales, bias.as_deref(), None, addend.as_deref())?;
    Ok(Forward { logits, ids: gated.ids, weights: gated.weights, plan, hidden, y_slots, shared, shared_gate, y })
}

fn chain<W>(
    up_name: &'static str,
    down_name: &'static str,
    up: &ExpertMatrix<W>,
    down: &ExpertMatrix<W>,
    hidden: usize,
) -> Result<(), ReferenceError> {
    require(up_name, up.k == hidden, || format!("k = {hidden}"), up.k)?;
    require(down_name, down.k == up.n, || format!("k = {}", up.n), down.k)?;
    require(down_name, down.n == hidden, || format!("n = {hidden}"), down.n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Score;
    use crate::rules::{Glu, Layout};

    fn plain(weight: &[f64]) -> ExpertMatrix<'_, f64> {
        ExpertMatrix { weight, bias: None, n: 1, k: 1, glu: Glu::None, layout: Layout::Nk }
    }

    /// H = I = 1, two experts that multiply by 2 and by 3 (then 10), one that every token passes.
    fn layer<'a>(shared: bool) -> Layer<'a, f64, f64> {
        Layer {
            hidden: 1,
            router_weight: &[1.0, -1.0],
            router_bias: None,
            correction_bias: None,
            top_k: 1,
            gating: Gating::new(Score::Sigmoid),
            weighting: Weighting::Output,
            capacity: None,
            up: plain(&[2.0, 3.0]),
            activation: Activation::Relu,
            activations: None,
            down: plain(&[10.0, 10.0]),
            shared: shared.then_some((plain(&[1.0]), plain(&[7.0]))),
            shared_activation: None,
            shared_gate: None,
            scales: [1.0; 2],
            bias: None,
            null: None,
        }
    }

    fn sigmoid(v: f64) -> f64 {
        super::super::activation::sigmoid(v)
    }

    #[test]
    fn routed_and_shared() {
        let got = forward(&[4.0, -5.0], &layer(true)).unwrap();
        assert_eq!(got.ids, [0, 1]);
        assert_eq!(got.hidden, [8.0, 0.0]);
        assert_eq!(got.y, [28.0 + 80.0 * sigmoid(4.0), 0.0]);
    }

    #[test]
    fn a_gate_scales_the_shared_expert() {
        let got = forward(&[4.0], &Layer { shared_gate: Some(&[-0.5]), ..layer(true) }).unwrap();
        assert_eq!((&got.shared, &got.shared_gate), (&Some(vec![28.0]), &Some(vec![-2.0])));
        assert_eq!(got.y, [28.0 * sigmoid(-2.0) + 80.0 * sigmoid(4.0)]);
    }

    #[test]
    fn weighing_the_input_passes_through_the_activation() {
        let squared = Layer {
            weighting: Weighting::Input,
            up: ExpertMatrix { glu: Glu::Split, ..plain(&[2.0, 2.0, 3.0, 3.0]) },
            ..layer(false)
        };
        let got = forward(&[4.0], &squared).unwrap();
        let input = 4.0 * sigmoid(4.0);
        assert!((got.y[0] - 10.0 * (2.0 * input) * (2.0 * input)).abs() < 1e-9);
    }

    #[test]
    fn what_stands_around_the_sum() {
        let other = Layer { shared_activation: Some(Activation::Identity), scales: [0.5, 3.0], ..layer(true) };
        let got = forward(&[-5.0], &Layer { bias: Some(&[0.25]), ..other }).unwrap();
        assert_eq!(got.y, [0.25 - 3.0 * 35.0]);
        let got = forward(&[4.0], &other).unwrap();
        assert_eq!(got.y, [3.0 * 28.0 + 0.5 * 80.0 * sigmoid(4.0)]);
        let weighed = Layer { weighting: Weighting::Activation, ..layer(false) };
        assert_eq!(forward(&[4.0], &weighed).unwrap().hidden, [8.0 * sigmoid(4.0)]);
    }

    #[test]
    fn null_experts_have_no_rows() {
        // The second of three experts is out of reach; the last computes nothing.
        let all = Layer { router_weight: &[1.0, -9.0, 2.0], top_k: 2, ..layer(false) };
        let skips = Layer { null: Some(NullExperts::zero(1)), ..all };
        let got = forward(&[1.0], &skips).unwrap();
        assert_eq!((&got.ids, &got.plan.counts), (&vec![2, 0], &vec![1, 0]));
        assert_eq!(got.y, [20.0 * sigmoid(1.0)]);
        let passes = Layer { null: Some(NullExperts::identity(1)), ..all };
        assert_eq!(forward(&[1.0], &passes).unwrap().y, [20.0 * sigmoid(1.0) + sigmoid(2.0)]);
        let none = Layer { null: Some(NullExperts::zero(3)), ..all };
        assert_eq!(forward(&[1.0], &none).unwrap_err().argument, "null");
    }

    #[test]
    fn dropped_tokens_are_zero() {
        let capacity = Some(Capacity { per_expert: 1, tokens_per_sequence: 2, padded: false });
        let got = forward(&[1.0, 1.0, 1.0], &Layer { capacity, ..layer(false) }).unwrap();
        assert!(got.y[0] > 0.0 && got.y[1] == 0.0 && got.y[2] == got.y[0]);
    }

    #[test]
    fn matrices_that_do_not_chain_are_an_error() {
        let wrong = Layer { down: ExpertMatrix { k: 2, ..plain(&[1.0; 4]) }, ..layer(false) };
        assert_eq!(forward(&[1.0], &wrong).unwrap_err().argument, "down");
    }
}
