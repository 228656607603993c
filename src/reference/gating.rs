//! Gating: from logits to the ids and weights of the chosen experts.

mod backward;
mod scores;
#[cfg(test)]
mod tests;
mod weights;

use super::parallel::map_rows;
use super::{Real, ReferenceError, require, require_shape};
use crate::rules::{AppendedWeight, ChoiceBy, Gating, GroupScore, Groups, Masked, Score};

pub use backward::{BackwardInputs, GateGradients, LossInputs, gate_backward, gate_backward_by};
pub(super) use scores::near_largest;
pub use scores::{softmax, sqrt_softplus};

/// The chosen experts of every token.
#[derive(Clone, Debug, PartialEq)]
pub struct Gated {
    /// `[T, k + appended]`: the choices by descending choice value, or as they are given; then the appended experts.
    pub ids: Vec<i32>,
    /// `[T, k + appended]`.
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

/// What a rule takes beside the logits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inputs<'a> {
    /// `[E]`, added for the choice.
    pub correction_bias: Option<&'a [f64]>,
    /// `[E]`: a factor of each expert's weight, exactly with [`Gating::expert_scale`].
    pub expert_scale: Option<&'a [f64]>,
    /// A factor of all weights but fixed ones, exactly with [`Gating::global_scale`].
    pub global_scale: Option<f64>,
    /// `[T,k]`: the ids, exactly with [`ChoiceBy::Given`].
    pub given: Option<&'a [i32]>,
}

/// Chooses `k` of `E` experts for each row of `logits [T,E]`.
///
/// The score p of an expert is `softmax(logits)` over all experts (Shazeer et al. 2017; Switch, Mixtral, Qwen3-MoE, OLMoE), or
/// `sigmoid(logit)` (DeepSeek-V3, GLM-4.5, MiniMax-M2, Llama 4), or the softmax over the chosen logits alone (gpt-oss, GraniteMoE).
/// Experts are compared by the choice value: `p + bias` where there is a correction `bias [E]` (DeepSeek-V3: Wang et al. 2024,
/// "Auxiliary-Loss-Free Load Balancing"; `logit + bias` for [`ChoiceBy::Logit`] and for the softmax over the chosen, which has no p before the
/// choice), p where groups add choice values up or are masked with 0, else the logit itself, of which p is a monotone function. Larger comes first, of equal
/// values the lower id, and NaN comes after -Inf, so that ids are distinct and in range whatever the logits. With groups,
/// only experts of the best groups can be chosen (DeepSeek-V3, section 2.1.2 of its report), or the choice value of others is 0
/// ([`Masked`]).
///
/// The weight is p without the bias, divided as [`crate::rules::Renormalise`] says, times `scale`; 0 where that is NaN, unless the rule lets it
/// through ([`crate::rules::Garbage`]). NaN and infinite logits never reach ids.
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
    let bias: Option<Vec<f64>> = bias.map(|bias| bias.iter().map(|&b| b.into()).collect());
    gate_by(logits, experts, top_k, rule, Inputs { correction_bias: bias.as_deref(), ..Inputs::default() })
}

/// [`gate`] for every rule.
///
/// - [`Score::SqrtSoftplus`]: `p = sqrt(ln(1 + exp(logit)))` (transformers, `DeepseekV4TopKRouter`).
/// - [`Score::SparseMixer`]: see [`Gating::jitter`]; `sparsemixer` of transformers' `modeling_phimoe` outside training (Liu et al. 2024,
///   arXiv:2409.12136). The first weight is a softmax over the experts with `(m - l) / max(|l|, m) <= 2 jitter`, `m` the largest logit; the second
///   the same without the first expert.
/// - [`ChoiceBy::Given`]: the ids are `given`, weighed by the same formulas (`DeepseekV4HashRouter`). One that is no expert's is -1 with weight 0,
///   and counts in no sum.
/// - [`Gating::appended`]: the logits have `appended_columns` more columns, which are weighed as choices are (`InklingTopkRouter`).
/// - Weights are multiplied by `scale`, `global_scale` and the expert's `expert_scale` (`Gemma4TextRouter`), in this order.
///
/// # Errors
/// Those of [`gate`]; inputs against the rule; what [`Gating`] says does not go together.
pub fn gate_by<L: Real>(
    logits: &[L],
    experts: usize,
    top_k: usize,
    rule: &Gating,
    inputs: Inputs<'_>,
) -> Result<Gated, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    let columns = experts + rule.appended_columns();
    require("logits", logits.len().is_multiple_of(columns), || format!("rows of {columns}"), logits.len())?;
    let tokens = logits.len() / columns;
    check(experts, top_k, rule)?;
    for (name, wanted, given) in [
        ("expert_scale", rule.expert_scale, inputs.expert_scale.is_some()),
        ("global_scale", rule.global_scale, inputs.global_scale.is_some()),
        ("given", rule.choice == ChoiceBy::Given, inputs.given.is_some()),
    ] {
        require(name, wanted == given, || if wanted { "values" } else { "none" }.into(), given)?;
    }
    for (name, values) in [("correction_bias", inputs.correction_bias), ("expert_scale", inputs.expert_scale)] {
        if let Some(values) = values {
            require_shape(name, values, &[experts])?;
        }
    }
    if let Some(given) = inputs.given {
        require_shape("given", given, &[tokens, top_k])?;
    }

    let tokens: Vec<usize> = (0..tokens).collect();
    let rows: Vec<Vec<(i32, f64)>> = map_rows(&tokens, 1, |token| {
        let row: Vec<f64> = logits[token[0] * columns..][..columns].iter().map(|&logit| logit.into()).collect();
        let (own, appended) = row.split_at(experts);
        let ids = match inputs.given {
            Some(given) => given[token[0] * top_k..][..top_k].iter().map(|&id| expert(id, experts)).collect(),
            None => choose::<L>(own, inputs.correction_bias, top_k, rule),
        };
        let weights = weights::weigh(own, appended, &ids, rule, &inputs);
        let numbers = ids.iter().map(|id| id.map_or(-1, |id| id as i32));
        let mut gated: Vec<(i32, f64)> = numbers.chain(experts as i32..).zip(weights).collect();
        if let Some(AppendedWeight::Fixed(weight)) = rule.appended.map(|appended| appended.weight) {
            let fixed = (experts as i32..).take(rule.appended_experts());
            gated.extend(fixed.map(|id| (id, f64::from(weight))));
        }
        gated
    });
    Ok(Gated {
        ids: rows.iter().flatten().map(|&(id, _)| id).collect(),
        weights: rows.iter().flatten().map(|&(_, weight)| weight).collect(),
    })
}

fn check(experts: usize, top_k: usize, rule: &Gating) -> Result<(), ReferenceError> {
    let Groups { count, kept, masked, .. } = groups(rule);
    require("groups.count", count > 0 && experts.is_multiple_of(count), || format!("a divisor of {experts}"), count)?;
    require("groups.kept", (1..=count).contains(&kept), || format!("1 to {count}"), kept)?;
    let eligible = match rule.choice {
        ChoiceBy::Given => usize::MAX,
        _ if masked == Masked::Zero => experts,
        _ => experts / count * kept,
    };
    require("top_k", (1..=eligible).contains(&top_k), || format!("1 to {eligible}"), top_k)?;
    let mixes = rule.score == Score::SparseMixer;
    require("top_k", !mixes || top_k <= 2, || "1 or 2 for SparseMixer".into(), top_k)?;
    let shares = mixes || rule.score == Score::Softmax;
    require(
        "appended",
        !shares || rule.appended_columns() == 0,
        || "no columns with this score".into(),
        rule.appended_columns(),
    )
}

/// The number of an expert, or of none.
fn expert(id: i32, experts: usize) -> Option<usize> {
    usize::try_from(id).ok().filter(|&id| id < experts)
}

fn choose<L: Real>(logits: &[f64], bias: Option<&[f64]>, top_k: usize, rule: &Gating) -> Vec<Option<usize>> {
    let scores = if rule.chooses_logits() { logits.to_vec() } else { scores::scores(rule.score, logits) };
    let mut choice: Vec<f64> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(&p, &b)| L::round(L::round(p) + L::round(b))).collect(),
        None if rule.compares_scores() => scores.iter().map(|&p| L::round(p)).collect(),
        None => logits.to_vec(),
    };
    let kept = kept::<L>(&choice, groups(rule));
    let mut candidates: Vec<usize> = (0..choice.len()).collect();
    match groups(rule).masked {
        Masked::Zero => candidates.iter().filter(|&&e| !kept[e]).for_each(|&e| choice[e] = 0.0),
        Masked::Out => candidates.retain(|&e| kept[e]),
    }
    candidates.sort_by(|&a, &b| descending(choice[a], choice[b]).then(a.cmp(&b)));
    candidates.truncate(top_k);
    candidates.into_iter().map(Some).collect()
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
