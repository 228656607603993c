//! What each rule means, by hand.

use super::*;
use crate::reference::activation::sigmoid;

fn gate_f32(logits: &[f32], bias: Option<&[f32]>, experts: usize, top_k: usize, rule: Gating) -> Gated {
    gate(logits, bias, experts, top_k, &rule).unwrap()
}

fn near(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < 1e-12 || (got.is_nan() && want.is_nan()), "{got} is not {want}");
    }
}

// exp(ln 4), exp(ln 3), ... make scores that can be computed by hand.
fn ln(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| value.ln()).collect()
}

#[test]
fn softmax_with_and_without_renormalisation() {
    let logits = ln(&[1.0, 4.0, 2.0, 3.0]);
    let mut rule = Gating::new(Score::Softmax);
    let gated = gate::<f64, f64>(&logits, None, 4, 2, &rule).unwrap();
    assert_eq!(gated.ids, [1, 3]);
    near(&gated.weights, &[0.4, 0.3]);
    rule = rule.renormalised();
    rule.scale = 7.0;
    near(&gate::<f64, f64>(&logits, None, 4, 2, &rule).unwrap().weights, &[4.0, 3.0]);
}

#[test]
fn softmax_over_the_chosen_only() {
    let rule = Gating::new(Score::TopkSoftmax);
    let gated = gate::<f64, f64>(&ln(&[1.0, 4.0, 2.0, 3.0]), None, 4, 3, &rule).unwrap();
    assert_eq!(gated.ids, [1, 3, 2]);
    near(&gated.weights, &[4.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0]);
}

#[test]
fn the_bias_chooses_but_does_not_weigh() {
    // sigmoid(ln(a / (1 - a))) = a
    let logit = |a: f64| (a / (1.0 - a)).ln();
    let logits = [logit(0.8), logit(0.5), logit(0.25), logit(0.2)];
    let rule = Gating { scale: 3.0, ..Gating::new(Score::Sigmoid).renormalised() };
    let gated = gate(&logits, Some(&[0.0, 0.0, 0.0, 0.7]), 4, 2, &rule).unwrap();
    assert_eq!(gated.ids, [3, 0]);
    near(&gated.weights, &[0.6, 2.4]);
}

fn grouped(count: usize, kept: usize, score: GroupScore) -> Gating {
    Gating::new(Score::Sigmoid).groups(Some(Groups::new(count, kept).score(score)))
}

#[test]
fn groups_by_their_two_best() {
    // Sums of the two best scores: 1.98, 1.50, 1.99; the largest single one is in the group that loses.
    let logits = [4.0f32, 6.0, 0.0, 9.0, 0.0, 0.0, 5.0, 6.0, 1.0];
    assert_eq!(gate_f32(&logits, None, 9, 3, grouped(3, 2, GroupScore::TOP_TWO)).ids, [1, 7, 6]);
    assert_eq!(gate_f32(&logits, None, 9, 3, grouped(3, 1, GroupScore::Max)).ids, [3, 4, 5]);
}

#[test]
fn equal_values_prefer_the_lower_id_and_group() {
    assert_eq!(gate_f32(&[0.0, -0.0, 0.0, -0.0], None, 4, 3, Gating::new(Score::Softmax)).ids, [0, 1, 2]);
    assert_eq!(gate_f32(&[1.0; 4], None, 4, 1, grouped(2, 1, GroupScore::TOP_TWO)).ids, [0]);
}

#[test]
fn nan_comes_last_and_ids_stay_distinct() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let gated = gate_f32(&[nan, -inf, 1.0, nan], None, 4, 4, Gating::new(Score::Sigmoid));
    assert_eq!(gated.ids, [2, 1, 0, 3]);
    near(&gated.weights, &[sigmoid(1.0), 0.0, f64::NAN, f64::NAN]);
    let gated = gate_f32(&[nan; 4], None, 4, 2, Gating::new(Score::TopkSoftmax));
    assert_eq!(gated.ids, [0, 1]);
    let gated = gate_f32(&[0.0, nan, 1.0, inf], None, 4, 2, Gating::new(Score::TopkSoftmax));
    assert_eq!(gated.ids, [3, 2]);
    near(&gated.weights, &[f64::NAN, f64::NAN]);
    // A number's weight is lost only through the sum over all experts.
    let gated = gate_f32(&[0.0, nan, 1.0, 0.0], None, 4, 2, Gating::new(Score::Softmax));
    assert_eq!(gated.ids, [2, 0]);
    near(&gated.weights, &[f64::NAN, f64::NAN]);
}

#[test]
fn choice_values_are_f32_sums() {
    // 0.5 + 2^-25 is 0.5 in f32, so that the lower id wins; in f64 the second is larger.
    let bias = [0.0, 2f64.powi(-26)];
    let rule = Gating::new(Score::Sigmoid);
    assert_eq!(gate(&[0.0f32, 0.0], Some(&bias), 2, 1, &rule).unwrap().ids, [0]);
    assert_eq!(gate(&[0.0f64, 0.0], Some(&bias), 2, 1, &rule).unwrap().ids, [1]);
}

#[test]
fn more_experts_than_eligible_is_an_error() {
    let error = gate::<f32, f32>(&[0.0; 4], None, 4, 3, &grouped(2, 1, GroupScore::Max)).unwrap_err();
    assert_eq!((error.argument, error.expected.as_str()), ("top_k", "1 to 2"));
}

#[test]
fn a_bias_on_chosen_logits_moves_the_choice_only() {
    let rule = Gating::new(Score::TopkSoftmax);
    let gated = gate(&[3.0f32, 2.0, 1.0], Some(&[0.0f32, 0.0, 2.5]), 3, 2, &rule).unwrap();
    assert_eq!(gated.ids, [2, 0]);
    near(&gated.weights, &[sigmoid(-2.0), sigmoid(2.0)]);
}
