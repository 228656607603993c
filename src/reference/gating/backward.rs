//! The gradient of logits, from those of weights and losses, by the chain rule over the formulas of the forward pass.

use super::scores::{ln_sigmoid, mixture, softmax, sqrt_softplus};
use crate::reference::activation::sigmoid;
use crate::reference::balance::cv_squared_gradient;
use crate::reference::sampled::log_sum_exp;
use crate::reference::{Real, ReferenceError, require, require_shape};
use crate::rules::{Gating, LogitRule, LossGradient, LossScore, Renormalise, Score, Sequences};

/// What a gating's way back takes beside logits, ids and gradients of weights.
#[derive(Clone, Copy, Debug)]
pub struct BackwardInputs<'a> {
    /// `[E]`, exactly with [`Gating::expert_scale`].
    pub expert_scale: Option<&'a [f64]>,
    /// Exactly with [`Gating::global_scale`].
    pub global_scale: Option<f64>,
    /// `[T]`: which tokens count. Without, those that have a choice.
    pub valid: Option<&'a [bool]>,
    /// What the router's product went through to become the logits.
    pub logit_rule: LogitRule,
    /// Losses.
    pub losses: Option<LossInputs<'a>>,
}

impl Default for BackwardInputs<'_> {
    fn default() -> Self {
        BackwardInputs {
            expert_scale: None,
            global_scale: None,
            valid: None,
            logit_rule: LogitRule::PLAIN,
            losses: None,
        }
    }
}

/// What losses are made of.
#[derive(Clone, Copy, Debug)]
pub struct LossInputs<'a> {
    /// Which, with their factors.
    pub rule: LossGradient,
    /// `[E]`: slots that the balancing loss counts, where it has a factor.
    pub counts: &'a [i32],
    /// Tokens that balancing loss and z-loss are means of.
    pub counted: usize,
    /// `[E]`: sums of weights, where their loss has a factor.
    pub importance: &'a [f64],
    /// `[B,E]`: slots of each sequence, where their loss has a factor.
    pub sequence_counts: &'a [i32],
    /// `[B]`: tokens of each sequence that count.
    pub sequence_tokens: &'a [usize],
}

/// Gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct GateGradients {
    /// As the logits: of what stood before [`BackwardInputs::logit_rule`].
    pub logits: Vec<f64>,
    /// `[E]`: of factors of experts.
    pub expert_scale: Vec<f64>,
    /// Of the factor of all weights.
    pub global_scale: f64,
}

/// [`gate_backward_by`] of logits alone, with balancing loss and z-loss, counts and the tokens that both are means of.
///
/// # Errors
/// Lengths that do not fit.
pub fn gate_backward<L: Real>(
    logits: &[L],
    ids: &[i32],
    d_weights: &[f64],
    experts: usize,
    top_k: usize,
    rule: &Gating,
    losses: Option<(&LossGradient, &[i32], usize)>,
) -> Result<Vec<f64>, ReferenceError> {
    let losses = losses.map(|(rule, counts, counted)| LossInputs {
        rule: *rule,
        counts,
        counted,
        importance: &[],
        sequence_counts: &[],
        sequence_tokens: &[],
    });
    let inputs = BackwardInputs { losses, ..BackwardInputs::default() };
    Ok(gate_backward_by(logits, ids, d_weights, experts, top_k, rule, inputs)?.logits)
}

/// The gradients of `sum d_weights weights + losses`, where `weights [T, k + appended]` are those that [`super::gate_by`] gives to `ids`.
///
/// The choice is constant: correction bias and groups have no gradient. The counts of balancing losses are constant too
/// (Fedus et al. 2021, section 2.2). Ids outside `0..E` are no choices. A token that has none is padding where nobody says what is, and one with
/// NaN or +Inf or nothing above -Inf among its logits is garbage: their rows are 0.
///
/// [`Score::SparseMixer`] has the gradient of its two softmaxes over what is near the largest logit: `PhimoeMultiplier` of transformers'
/// `modeling_phimoe`, whose backward pass leaves out the third by which its forward pass weighs what was drawn (Liu et al. 2023,
/// arXiv:2310.00811; 2024, arXiv:2409.12136). An infinite p-norm shares its gradient among equal largest weights, as torch's does.
///
/// # Errors
/// Lengths that do not fit.
pub fn gate_backward_by<L: Real>(
    logits: &[L],
    ids: &[i32],
    d_weights: &[f64],
    experts: usize,
    top_k: usize,
    rule: &Gating,
    inputs: BackwardInputs<'_>,
) -> Result<GateGradients, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    let (columns, choices) = (experts + rule.appended_columns(), top_k + rule.appended_experts());
    let tokens = logits.len() / columns;
    require("logits", logits.len() == tokens * columns, || format!("rows of {columns}"), logits.len())?;
    require_shape("ids", ids, &[tokens, choices])?;
    require_shape("d_weights", d_weights, &[tokens, choices])?;
    if let Some(valid) = inputs.valid {
        require_shape("valid", valid, &[tokens])?;
    }
    let mut result = GateGradients { logits: Vec::new(), expert_scale: vec![0.0; experts], global_scale: 0.0 };
    for t in 0..tokens {
        let row: Vec<f64> = logits[t * columns..][..columns].iter().map(|&l| l.into()).collect();
        let chosen: Vec<Choice> = (0..choices)
            .filter_map(|j| {
                let number = usize::try_from(ids[t * choices + j]).ok()?;
                let routed = j < top_k;
                let known = number < if routed { experts } else { columns };
                known.then(|| Choice { place: j, number, routed, d: d_weights[t * choices + j] })
            })
            .collect();
        let counts = inputs.valid.map_or(!chosen.is_empty(), |valid| valid[t]);
        let sound = row.iter().all(|&l| l < f64::INFINITY) && row[..experts].iter().any(|&l| l > f64::NEG_INFINITY);
        if !(counts && sound) {
            result.logits.extend(std::iter::repeat_n(0.0, columns));
            continue;
        }
        let mut own = of_weights(&row, experts, chosen, rule, &inputs, &mut result);
        if let Some(losses) = &inputs.losses {
            let of_losses = of_losses(&row[..experts], top_k, t, tokens, losses);
            own.iter_mut().zip(of_losses).for_each(|(sum, d)| *sum += d);
        }
        let LogitRule { factor, softcap, .. } = inputs.logit_rule;
        // A logit that is rounded to the cap or beyond is flat.
        let bend = |l: f64| softcap.map_or(1.0, |cap| (1.0 - (l / f64::from(cap)).powi(2)).max(0.0));
        let slope = |l: f64| f64::from(factor) * bend(l);
        own.iter_mut().zip(&row).for_each(|(d, &l)| *d *= slope(l));
        result.logits.extend(own);
    }
    Ok(result)
}

/// A choice that is an expert's.
#[derive(Clone, Copy)]
struct Choice {
    place: usize,
    number: usize,
    routed: bool,
    d: f64,
}

/// Of `sum_j d_j weight_j`; factors' gradients join those of earlier tokens.
fn of_weights(
    row: &[f64],
    experts: usize,
    mut chosen: Vec<Choice>,
    rule: &Gating,
    inputs: &BackwardInputs<'_>,
    result: &mut GateGradients,
) -> Vec<f64> {
    if let Some(losses) = inputs.losses.filter(|losses| losses.rule.importance != 0.0) {
        let of_importance = cv_squared_gradient(losses.importance);
        for choice in chosen.iter_mut().filter(|choice| choice.routed) {
            choice.d += f64::from(losses.rule.importance) * of_importance[choice.number];
        }
    }
    let logits: Vec<f64> = chosen.iter().map(|choice| row[choice.number]).collect();
    let all = softmax(&row[..experts]);
    // SparseMixer's distribution of each choice.
    let first = chosen.iter().find(|choice| choice.place == 0).map(|choice| choice.number);
    let mixtures: Vec<Vec<f64>> = match rule.score {
        Score::SparseMixer => {
            let out = |choice: &Choice| if choice.place == 0 { None } else { first };
            chosen.iter().map(|choice| mixture(&row[..experts], out(choice), rule.jitter)).collect()
        }
        _ => Vec::new(),
    };
    let jointly = rule.score == Score::Sigmoid
        && rule.appended_columns() > 0
        && matches!(rule.renormalise, Some(Renormalise::Plus(0.0) | Renormalise::PNorm(1.0)));
    let scores: Vec<f64> = match rule.score {
        Score::Softmax => chosen.iter().map(|choice| all[choice.number]).collect(),
        // What is divided by its sum may be multiplied by anything before.
        Score::Sigmoid if jointly => softmax(&logits.iter().map(|&l| ln_sigmoid(l)).collect::<Vec<_>>()),
        Score::Sigmoid => logits.iter().map(|&l| sigmoid(l)).collect(),
        Score::SqrtSoftplus => logits.iter().map(|&l| sqrt_softplus(l)).collect(),
        Score::TopkSoftmax => softmax(&logits),
        Score::SparseMixer => chosen.iter().zip(&mixtures).map(|(choice, q)| q[choice.number]).collect(),
    };
    let (scale, global) = (f64::from(rule.scale), inputs.global_scale.unwrap_or(1.0));
    let of_expert = |choice: &Choice| match inputs.expert_scale {
        Some(scale) if choice.routed => scale[choice.number],
        _ => 1.0,
    };
    let upstream: Vec<f64> = chosen.iter().map(|choice| choice.d * scale * global * of_expert(choice)).collect();
    let divisor = divisor(&scores, rule.renormalise);
    for (choice, score) in chosen.iter().zip(&scores) {
        // Without either factor.
        let term = choice.d * scale * if divisor == 0.0 { 0.0 } else { score / divisor };
        result.global_scale += term * of_expert(choice);
        if choice.routed {
            result.expert_scale[choice.number] += term * global;
        }
    }
    let d_scores = d_scores(&scores, &upstream, rule.renormalise, divisor);
    let mut gradient = vec![0.0; row.len()];
    let terms = chosen.iter().map(|choice| choice.number).zip(scores.iter().copied().zip(d_scores.iter().copied()));
    match rule.score {
        // dp_i/dl_e = p_i ([i = e] - p_e)
        Score::Softmax => {
            for (e, (p, d)) in terms {
                gradient[e] += p * d;
                gradient.iter_mut().zip(&all).for_each(|(sum, q)| *sum -= p * d * q);
            }
        }
        Score::SparseMixer => {
            for ((e, (p, d)), q) in terms.zip(&mixtures) {
                gradient[e] += p * d;
                gradient.iter_mut().zip(q).for_each(|(sum, q)| *sum -= p * d * q);
            }
        }
        Score::TopkSoftmax => {
            let mean: f64 = scores.iter().zip(&d_scores).map(|(p, d)| p * d).sum();
            for (e, (p, d)) in terms {
                gradient[e] += p * (d - mean);
            }
        }
        // The joint scores are proportional to sigmoids: what is divided does not see the factor.
        Score::Sigmoid => {
            for (e, (p, d)) in terms {
                gradient[e] += p * d * sigmoid(-row[e]);
            }
        }
        // d sqrt(s) / dl = sigmoid(l) / (2 sqrt(s)), s the softplus
        Score::SqrtSoftplus => {
            for (e, (p, d)) in terms {
                gradient[e] += if p == 0.0 { 0.0 } else { d * sigmoid(row[e]) / (2.0 * p) };
            }
        }
    }
    gradient
}

/// What scores are divided by.
fn divisor(a: &[f64], renormalise: Option<Renormalise>) -> f64 {
    let sum: f64 = a.iter().sum();
    match renormalise {
        None => 1.0,
        Some(Renormalise::Plus(epsilon)) => sum + f64::from(epsilon),
        Some(Renormalise::AtLeast(epsilon)) => sum.max(epsilon.into()),
        Some(Renormalise::PNorm(f32::INFINITY)) => a.iter().copied().fold(0.0, f64::max),
        Some(Renormalise::PNorm(p)) => a.iter().map(|a| a.powf(p.into())).sum::<f64>().powf(1.0 / f64::from(p)),
    }
}

/// Of `sum_j d_j a_j / D(a)`, by a.
fn d_scores(a: &[f64], d: &[f64], renormalise: Option<Renormalise>, divisor: f64) -> Vec<f64> {
    if divisor == 0.0 {
        return vec![0.0; a.len()];
    }
    let dot: f64 = a.iter().zip(d).map(|(a, d)| a * d).sum();
    // (d D - dot D') / D^2, D' = dD/da
    let quotient = |slope: &dyn Fn(f64) -> f64| -> Vec<f64> {
        a.iter().zip(d).map(|(&a, d)| (d * divisor - dot * slope(a)) / divisor / divisor).collect()
    };
    match renormalise {
        None => d.to_vec(),
        Some(Renormalise::Plus(_)) => quotient(&|_| 1.0),
        Some(Renormalise::AtLeast(epsilon)) if divisor <= f64::from(epsilon) => quotient(&|_| 0.0),
        Some(Renormalise::AtLeast(_)) => quotient(&|_| 1.0),
        Some(Renormalise::PNorm(f32::INFINITY)) => {
            let largest = a.iter().filter(|&&a| a == divisor).count() as f64;
            quotient(&|a| if a == divisor { 1.0 / largest } else { 0.0 })
        }
        Some(Renormalise::PNorm(p)) => {
            // At 0 infinite for p < 1, but a score's slope there takes more away: a a^(p-1) is 0.
            quotient(&|a| if a == 0.0 { 0.0 } else { (a / divisor).powf(f64::from(p) - 1.0) })
        }
    }
}

/// Of the losses with a factor each: `E sum_e counts[e]/T sum_t q[t,e]/T`, the mean over sequences of the same with `E/(k T_s)` for `E/T`, and
/// `1/T sum_t lse^2`.
fn of_losses(row: &[f64], top_k: usize, token: usize, tokens: usize, losses: &LossInputs<'_>) -> Vec<f64> {
    let (rule, experts, counted) = (&losses.rule, row.len(), losses.counted as f64);
    let mut h = vec![0.0; experts];
    if rule.balance != 0.0 {
        let factor = f64::from(rule.balance) * experts as f64 / (counted * counted);
        h.iter_mut().zip(losses.counts).for_each(|(h, &count)| *h += factor * f64::from(count));
    }
    if rule.sequence != 0.0 {
        let sequences = tokens.div_ceil(rule.tokens_per_sequence);
        let sequence = match rule.sequences {
            Sequences::Following => token / rule.tokens_per_sequence,
            Sequences::Alternating => token % sequences,
        };
        let with_tokens = losses.sequence_tokens.iter().filter(|&&length| length > 0).count().max(1);
        let length = losses.sequence_tokens[sequence] as f64;
        let factor = f64::from(rule.sequence) * experts as f64 / (top_k * with_tokens) as f64 / (length * length);
        let counts = &losses.sequence_counts[sequence * experts..][..experts];
        if length > 0.0 {
            h.iter_mut().zip(counts).for_each(|(h, &count)| *h += factor * f64::from(count));
        }
    }
    let all = softmax(row);
    let mut gradient: Vec<f64> = match rule.score {
        LossScore::Softmax => {
            let mean: f64 = h.iter().zip(&all).map(|(h, q)| h * q).sum();
            all.iter().zip(&h).map(|(q, h)| q * (h - mean)).collect()
        }
        // q = s / sum s: dq_i/dl_e = s_e (1 - s_e) ([i = e] - q_i) / sum s
        LossScore::Sigmoid => {
            let sum: f64 = row.iter().map(|&l| sigmoid(l)).sum();
            let mean: f64 = h.iter().zip(row).map(|(h, &l)| h * sigmoid(l) / sum).sum();
            row.iter().zip(&h).map(|(&l, h)| sigmoid(l) * sigmoid(-l) * (h - mean) / sum).collect()
        }
        LossScore::PlainSigmoid => row.iter().zip(&h).map(|(&l, h)| sigmoid(l) * sigmoid(-l) * h).collect(),
    };
    if rule.z != 0.0 {
        let z = 2.0 * f64::from(rule.z) / counted * log_sum_exp(row.iter().copied());
        gradient.iter_mut().zip(&all).for_each(|(sum, p)| *sum += z * p);
    }
    gradient
}

#[cfg(test)]
mod tests;
