//! Gating: from logits to the ids and weights of the chosen experts.

use super::activation::sigmoid;
use super::parallel::map_rows;
use super::{Real, ReferenceError, require, require_shape};
use crate::rules::{Garbage, Gating, GroupScore, Groups, Masked, Renormalise, Score};

/// The chosen experts of every token.
#[derive(Clone, Debug, PartialEq)]
pub struct Gated {
    /// `[T,k]`, by descending choice value.
    pub ids: Vec<i32>,
    /// `[T,k]`.
    pub weights: Vec<f64>,
}

impl Gated {
    /// Padding, where `valid [T]` does not hold, goes to no expert: ids -1, weights 0.
    #[must_use]
    pub fn without_padding(mut self, valid: &[bool]) -> Gated {
        let top_k = if valid.is_empty() { 1 } else { self.ids.len() / valid.len() };
        for (t, _) in valid.iter().enumerate().filter(|(_, valid)| !**valid) {
            self.ids[t * top_k..][..top_k].fill(-1);
            self.weights[t * top_k..][..top_k].fill(0.0);
        }
        self
    }
}

/// Chooses `k` of `E` experts for each row of `logits [T,E]`.
///
/// The score p of an expert is `softmax(logits)` over all experts (Shazeer et al. 2017; Switch, Mixtral, Qwen3-MoE, OLMoE), or
/// `sigmoid(logit)` (DeepSeek-V3, GLM-4.5, MiniMax-M2, Llama 4), or the softmax over the chosen logits alone (gpt-oss, GraniteMoE).
/// Experts are compared by the choice value: `p + bias` where there is a correction `bias [E]` (DeepSeek-V3: Wang et al. 2024,
/// "Auxiliary-Loss-Free Load Balancing"; `logit + bias` for the softmax over the chosen, which has no p before the choice), p where groups
/// add choice values up or are masked with 0, else the logit itself, of which p is a monotone function. Larger comes first, of equal
/// values the lower id, and NaN comes after -Inf, so that ids are distinct and in range whatever the logits. With groups,
/// only experts of the best groups can be chosen (DeepSeek-V3, section 2.1.2 of its report), or the choice value of others is 0
/// ([`Masked`]).
///
/// The weight is p without the bias, divided as [`Renormalise`] says, times `scale`; 0 where that is NaN, unless the rule lets it
/// through ([`Garbage`]). NaN and infinite logits never reach ids.
///
/// Choice values and group scores are rounded to `L`: with f32 logits they are what f32 arithmetic gives, up to the
/// rounding of p itself.
///
/// # Errors
/// Lengths that do not fit `experts`, groups that do not divide it, `top_k` of 0 or beyond the eligible experts.
pub fn gate<L: Real, B: Real>(
    logits: &[L],
    bias: Option<&[B]>,
    experts: usize,
    top_k: usize,
    rule: &Gating,
) -> Result<Gated, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("logits", logits.len().is_multiple_of(experts), || format!("rows of {experts}"), logits.len())?;
    let Groups { count, kept, masked, .. } = groups(rule);
    require("groups.count", count > 0 && experts.is_multiple_of(count), || format!("a divisor of {experts}"), count)?;
    require("groups.kept", (1..=count).contains(&kept), || format!("1 to {count}"), kept)?;
    let eligible = if masked == Masked::Zero { experts } else { experts / count * kept };
    require("top_k", (1..=eligible).contains(&top_k), || format!("1 to {eligible}"), top_k)?;
    if let Some(bias) = bias {
        require_shape("correction_bias", bias, &[experts])?;
    }
    let bias: Option<Vec<f64>> = bias.map(|bias| bias.iter().map(|&b| b.into()).collect());

    let rows: Vec<Vec<(usize, f64)>> = map_rows(logits, experts, |row| gate_token(row, bias.as_deref(), top_k, rule));
    Ok(Gated {
        ids: rows.iter().flatten().map(|&(id, _)| id as i32).collect(),
        weights: rows.iter().flatten().map(|&(_, weight)| weight).collect(),
    })
}

fn gate_token<L: Real>(logits: &[L], bias: Option<&[f64]>, top_k: usize, rule: &Gating) -> Vec<(usize, f64)> {
    let logits: Vec<f64> = logits.iter().map(|&logit| logit.into()).collect();
    let scores = match rule.score {
        Score::Softmax => softmax(&logits),
        Score::Sigmoid => logits.iter().map(|&logit| sigmoid(logit)).collect(),
        Score::TopkSoftmax => logits.clone(),
    };
    let choice: Vec<f64> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(&p, &b)| L::round(L::round(p) + L::round(b))).collect(),
        None if rule.compares_scores() => scores.iter().map(|&p| L::round(p)).collect(),
        None => logits.clone(),
    };
    let kept = kept::<L>(&choice, groups(rule));
    let mut candidates: Vec<usize> = (0..choice.len()).collect();
    let mut choice = choice;
    match groups(rule).masked {
        Masked::Zero => candidates.iter().filter(|&&e| !kept[e]).for_each(|&e| choice[e] = 0.0),
        Masked::Out => candidates.retain(|&e| kept[e]),
    }
    candidates.sort_by(|&a, &b| descending(choice[a], choice[b]).then(a.cmp(&b)));
    candidates.truncate(top_k);

    let mut weights: Vec<f64> = candidates.iter().map(|&id| scores[id]).collect();
    if rule.score == Score::TopkSoftmax {
        weights = softmax(&weights);
    }
    if let Some(renormalise) = rule.renormalise {
        let sum = weights.iter().sum::<f64>();
        let divisor = match renormalise {
            Renormalise::Plus(epsilon) => sum + f64::from(epsilon),
            // NaN stays NaN, which f64::max would drop.
            Renormalise::AtLeast(epsilon) if sum < f64::from(epsilon) => epsilon.into(),
            Renormalise::AtLeast(_) => sum,
        };
        weights.iter_mut().for_each(|weight| *weight /= divisor);
    }
    if rule.garbage == Garbage::Zero {
        weights.iter_mut().filter(|weight| weight.is_nan()).for_each(|weight| *weight = 0.0);
    }
    candidates.into_iter().zip(weights).map(|(id, weight)| (id, weight * f64::from(rule.scale))).collect()
}

/// One group of all experts where there are none.
fn groups(rule: &Gating) -> Groups {
    rule.groups.unwrap_or(Groups::new(1, 1).score(GroupScore::Max))
}

/// Which experts are in groups that are kept.
fn kept<L: Real>(choice: &[f64], groups: Groups) -> Vec<bool> {
    let size = choice.len() / groups.count;
    let worth: Vec<f64> = choice
        .chunks(size)
        .map(|group| {
            let mut values = group.to_vec();
            values.sort_by(|&a, &b| descending(a, b));
            values[1..].iter().take(groups.score.terms() - 1).fold(values[0], |sum, &value| L::round(sum + value))
        })
        .collect();
    let mut best: Vec<usize> = (0..groups.count).collect();
    best.sort_by(|&a, &b| descending(worth[a], worth[b]).then(a.cmp(&b)));
    best.truncate(groups.kept);
    (0..choice.len()).map(|e| best.contains(&(e / size))).collect()
}

/// Larger first, NaN last; zeros of both signs are equal.
pub(super) fn descending(a: f64, b: f64) -> std::cmp::Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

/// The first `k` of the numbers of `values`, by descending value: equal ones by rising number, NaN last.
pub(super) fn top(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| descending(values[a], values[b]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

/// `exp(v - max) / sum exp(v - max)`.
pub fn softmax(values: &[f64]) -> Vec<f64> {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = values.iter().map(|&value| (value - max).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.into_iter().map(|exponential| exponential / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
            for row in [[nan; 3], [0.0, nan, inf], [-inf; 3]] {
                for rule in [Gating::new(score), Gating::new(score).renormalised()] {
                    let gated = gate_f32(&row, None, 3, 3, rule);
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
}
