//! What each rule means, by hand.

use super::*;
use crate::reference::activation::sigmoid;
use crate::rules::Garbage;
use crate::rules::{Appended, Renormalise};

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
    let seen = |score| Gating::new(score).garbage(Garbage::Propagate);
    let gated = gate_f32(&[nan, -inf, 1.0, nan], None, 4, 4, seen(Score::Sigmoid));
    assert_eq!(gated.ids, [2, 1, 0, 3]);
    near(&gated.weights, &[sigmoid(1.0), 0.0, f64::NAN, f64::NAN]);
    let gated = gate_f32(&[nan; 4], None, 4, 2, Gating::new(Score::TopkSoftmax));
    assert_eq!(gated.ids, [0, 1]);
    let gated = gate_f32(&[0.0, nan, 1.0, inf], None, 4, 2, seen(Score::TopkSoftmax));
    assert_eq!(gated.ids, [3, 2]);
    near(&gated.weights, &[f64::NAN, f64::NAN]);
    // A number's weight is lost only through the sum over all experts.
    let gated = gate_f32(&[0.0, nan, 1.0, 0.0], None, 4, 2, seen(Score::Softmax));
    assert_eq!(gated.ids, [2, 0]);
    near(&gated.weights, &[f64::NAN, f64::NAN]);
}

#[test]
fn garbage_weighs_nothing() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for score in Score::ALL {
        let top_k = if score == Score::SparseMixer { 2 } else { 3 };
        for row in [[nan; 3], [0.0, nan, inf], [-inf; 3], [inf; 3]] {
            for rule in [Gating::new(score), Gating::new(score).renormalised()] {
                let gated = gate_f32(&row, None, 3, top_k, rule);
                assert!(gated.weights.iter().all(|weight| weight.is_finite()), "{score:?} {row:?}: {gated:?}");
            }
        }
    }
    let gated = gate_f32(&[nan, -inf, 1.0, nan], None, 4, 4, Gating::new(Score::Sigmoid));
    near(&gated.weights, &[sigmoid(1.0), 0.0, 0.0, 0.0]);
}

#[test]
fn padding_goes_nowhere() {
    let gated = gate_f32(&[1.0, 2.0, 2.0, 1.0], None, 2, 1, Gating::new(Score::Softmax).renormalised());
    let gated = gated.without_padding(&[false, true]);
    assert_eq!((gated.ids, gated.weights), (vec![-1, 0], vec![0.0, 1.0]));
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

/// sigmoid(logit(a)) = a
fn logit(a: f64) -> f64 {
    (a / (1.0 - a)).ln()
}

fn gate_with(logits: &[f64], experts: usize, top_k: usize, rule: Gating, inputs: Inputs<'_>) -> Gated {
    gate_by(logits, experts, top_k, &rule, inputs).unwrap()
}

#[test]
fn roots_of_softplus() {
    let rule = Gating::new(Score::SqrtSoftplus);
    // ln(1 + e^0) = ln 2; ln(1 + e^l) = l + ln(1 + e^-l); and e^l where that is tiny.
    let gated = gate_with(&[0.0, 1.0, -60.0, 900.0], 4, 4, rule, Inputs::default());
    assert_eq!(gated.ids, [3, 1, 0, 2]);
    let want = [30.0, 1.3132616875182228f64.sqrt(), 2f64.ln().sqrt(), (-30f64).exp()];
    near(&gated.weights, &want);
    assert!((gated.weights[3] / want[3] - 1.0).abs() < 1e-12, "relative");
}

#[test]
fn a_bias_on_logits_chooses_and_sigmoids_weigh() {
    let rule = Gating::new(Score::Sigmoid);
    let close = [0.0, 0.5, 1.0];
    let inputs = Inputs { correction_bias: Some(&close), ..Inputs::default() };
    // Sigmoids 0.88, 0.80, 0.71 have smaller distances than the logits.
    let by_logit = gate_with(&[2.0, 1.4, 0.9], 3, 1, rule.choice(ChoiceBy::Logit), inputs);
    assert_eq!(by_logit.ids, [0]);
    near(&by_logit.weights, &[sigmoid(2.0)]);
    assert_eq!(gate_with(&[2.0, 1.4, 0.9], 3, 1, rule, inputs).ids, [2]);
}

#[test]
fn norms_of_weights() {
    let logits = [logit(0.6), logit(0.8), logit(0.1)];
    let weights = |renormalise| {
        let rule = Gating::new(Score::Sigmoid).renormalise(Some(renormalise));
        gate_with(&logits, 3, 2, rule, Inputs::default()).weights
    };
    near(&weights(Renormalise::PNorm(2.0)), &[0.8, 0.6]);
    near(&weights(Renormalise::PNorm(1.0)), &[0.8 / 1.4, 0.6 / 1.4]);
    near(&weights(Renormalise::PNorm(f32::INFINITY)), &[1.0, 0.75]);
    let root = (0.8f64.sqrt() + 0.6f64.sqrt()).powi(2);
    near(&weights(Renormalise::PNorm(0.5)), &[0.8 / root, 0.6 / root]);
}

#[test]
fn learned_factors() {
    let rule = Gating::new(Score::Sigmoid).renormalised().scale(2.0).expert_scale(true).global_scale(true);
    let inputs = Inputs { expert_scale: Some(&[10.0, 0.5, 1.0]), global_scale: Some(3.0), ..Inputs::default() };
    let gated = gate_with(&[logit(0.2), logit(0.6), logit(0.1)], 3, 2, rule, inputs);
    assert_eq!(gated.ids, [1, 0]);
    near(&gated.weights, &[0.75 * 6.0 * 0.5, 0.25 * 6.0 * 10.0]);
    let error = gate_by(&[0.0; 3], 3, 2, &rule, Inputs::default()).unwrap_err();
    assert_eq!(error.argument, "expert_scale");
}

#[test]
fn given_ids_are_weighed_and_none_is_chosen() {
    let rule = Gating::new(Score::Sigmoid).renormalised().choice(ChoiceBy::Given);
    let logits = [logit(0.2), logit(0.6), logit(0.9), logit(0.2), logit(0.6), logit(0.9)];
    let inputs = Inputs { given: Some(&[0, 1, -7, 0]), ..Inputs::default() };
    let gated = gate_with(&logits, 3, 2, rule, inputs);
    assert_eq!(gated.ids, [0, 1, -1, 0]);
    near(&gated.weights, &[0.25, 0.75, 0.0, 1.0]);
    // Softmax is over all experts, whoever is given; twice the same expert counts twice.
    let rule = Gating::new(Score::Softmax).choice(ChoiceBy::Given);
    let gated = gate_with(&ln(&[1.0, 3.0]), 2, 2, rule, Inputs { given: Some(&[0, 0]), ..Inputs::default() });
    assert_eq!(gated.ids, [0, 0]);
    near(&gated.weights, &[0.25, 0.25]);
}

#[test]
fn appended_experts_are_weighed_with_the_chosen() {
    let column = Some(Appended::new(1, AppendedWeight::Column));
    let rule = Gating::new(Score::Sigmoid).renormalised().scale(2.0).appended(column);
    let logits = [logit(0.1), logit(0.3), logit(0.2), logit(0.5)];
    let gated = gate_with(&logits, 3, 2, rule, Inputs::default());
    assert_eq!(gated.ids, [1, 2, 3]);
    near(&gated.weights, &[0.6, 0.4, 1.0]);
    // Far below where sigmoids are numbers the shares stay.
    let gated = gate_with(&[-2000.0, -1000.0, -1500.0, -1000.0], 3, 1, rule, Inputs::default());
    assert_eq!(gated.ids, [1, 3]);
    near(&gated.weights, &[1.0, 1.0]);
    let fixed = Gating { appended: Some(Appended::new(2, AppendedWeight::Fixed(0.25))), ..rule };
    let gated = gate_with(&[logit(0.1), logit(0.3), logit(0.2)], 3, 1, fixed, Inputs::default());
    assert_eq!(gated.ids, [1, 3, 4]);
    near(&gated.weights, &[2.0, 0.25, 0.25]);
}

#[test]
fn sparse_mixer() {
    let rule = Gating::new(Score::SparseMixer).jitter(0.125);
    // First: (4 - 3) / 4 is not above 0.25, (4 - 2.9) / 4 is. Second, without the first: (3 - 2.9) / 3 and (3 - 1) / 3.
    let gated = gate_with(&[2.9, 4.0, 1.0, 3.0], 4, 2, rule, Inputs::default());
    assert_eq!(gated.ids, [1, 3]);
    near(&gated.weights, &[sigmoid(1.0), sigmoid(0.1f64)]);
    // Below zero the factor is |l|: (-1 + 1.25) / 1.25 is 0.2, (-1 + 2) / 2 is 0.5.
    let gated = gate_with(&[-2.0, -1.25, -1.0], 3, 2, rule, Inputs::default());
    assert_eq!(gated.ids, [2, 1]);
    near(&gated.weights, &[sigmoid(0.25), 1.0]);
    // Given experts that are not near have no weight.
    let inputs = Inputs { given: Some(&[0, 2]), ..Inputs::default() };
    near(&gate_with(&[2.9, 4.0, 1.0, 3.0], 4, 2, rule.choice(ChoiceBy::Given), inputs).weights, &[0.0, 0.0]);
    assert_eq!(gate_by(&[0.0; 4], 4, 3, &rule, Inputs::default()).unwrap_err().argument, "top_k");
}
