//! Balancing losses and router statistics, from the router's logits and the experts it chose.

use super::activation::sigmoid;
use super::gating::{softmax, top};
use super::sampled::{entropy, log_sum_exp};
use super::{Real, ReferenceError, require, require_shape};
use crate::rules::{BalanceRule, Garbage, LossCounts, LossScore, Sequences};

/// `CV(v)^2 = variance(v) / mean(v)^2`, the squared coefficient of variation (Shazeer et al. 2017, section 4), with 1e-10 added to
/// the divisor as in the authors' published code (tensor2tensor; which adds it to the number of experts too, 1e-10 of it). The variance
/// is the population's, as there.
pub fn cv_squared(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count;
    variance / (mean * mean + 1e-10)
}

/// The gradient of [`cv_squared`] by its elements: with `V = S / n` and `D = m^2 + 1e-10`,
/// `dV/dv_e = 2 (v_e - m) / n` and `dD/dv_e = 2 m / n`. No root is taken, so it is 0 where all are equal.
pub fn cv_squared_gradient(values: &[f64]) -> Vec<f64> {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count;
    let divisor = mean * mean + 1e-10;
    values.iter().map(|v| 2.0 / count / divisor * (v - mean - variance * mean / divisor)).collect()
}

/// Sums over tokens; those of many layers or batches may be added up before the loss is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Totals {
    /// Tokens.
    pub tokens: usize,
    /// `[E]`, slots that count for the loss.
    pub counts: Vec<u64>,
    /// `[E]`, sums of probabilities.
    pub probability: Vec<f64>,
}

impl Totals {
    /// `E sum_e f_e P_e`, with f_e slots a token of expert e and P_e its mean probability.
    ///
    /// Fedus et al. 2021, "Switch Transformers", eq. 4 to 6, without alpha. With k > 1, f sums to k, and over all layers' totals it is
    /// the loss of Mixtral's published code (`load_balancing_loss_func`). GShard's (Lepikhin et al. 2020, algorithm 1, `mean_e(c_e/S m_e)`) is that of first
    /// choices divided by `E^2`.
    pub fn loss(&self) -> f64 {
        let tokens = self.tokens.max(1) as f64;
        let dot: f64 = self.counts.iter().zip(&self.probability).map(|(&c, p)| c as f64 / tokens * (p / tokens)).sum();
        self.counts.len() as f64 * dot
    }

    /// Adds another layer's or batch's sums.
    pub fn add(&mut self, other: &Totals) {
        self.tokens += other.tokens;
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| *sum += count);
        self.probability.iter_mut().zip(&other.probability).for_each(|(sum, p)| *sum += p);
    }
}

/// Losses and statistics of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// Sums for [`Totals::loss`].
    pub totals: Totals,
    /// `[E]`, slots that chose the expert.
    pub counts: Vec<i32>,
    /// `[E]`, sums of weights (Shazeer et al. 2017, eq. 6).
    pub importance: Vec<f64>,
    /// Mean over sequences of `sum_e f_e P_e`, where f_e is `E / (k T)` times the expert's slots in the sequence of T tokens and P_e its
    /// mean probability there (DeepSeek-V3, eq. 17 to 20, without alpha). Eq. 18 counts the k largest scores, without the bias that the
    /// choice is made by: that is [`LossCounts::Scores`]; else the slots are those chosen. The report has one sequence; the mean over
    /// several, each of equal weight, is ours. T are the tokens that count, and the mean is over sequences that have any.
    pub sequence_loss: f64,
    /// Mean of `(ln sum exp l)^2` (Zoph et al. 2022, "ST-MoE", eq. 5, without its factor).
    pub z_loss: f64,
    /// Mean entropy of the loss's probabilities, in nats.
    pub entropy: f64,
    /// Slots beyond the capacity.
    pub dropped: u64,
}

impl Balance {
    /// Slots of the fullest expert over the mean; 0 without slots.
    pub fn max_over_mean(&self) -> f64 {
        let slots: i64 = self.counts.iter().map(|&count| i64::from(count)).sum();
        if slots == 0 {
            return 0.0;
        }
        f64::from(self.counts.iter().copied().max().unwrap_or(0)) * self.counts.len() as f64 / slots as f64
    }
}

/// Measures the choice `ids [T,k]`, `weights [T,k]` made from `logits [T,E]`. Ids outside `0..E` count nowhere.
///
/// Every loss is of the router's own choice, before experts turn tokens away: Switch counts the argmax of p (eq. 5), and GShard's c_e grows
/// also where the expert is full (algorithm 1, lines 7 to 11). So `ids` are those of gating, not of admission.
///
/// # Errors
/// Lengths that do not fit, no tokens, sequences of no tokens.
pub fn balance<L: Real>(
    logits: &[L],
    ids: &[i32],
    weights: &[f64],
    experts: usize,
    top_k: usize,
    rule: &BalanceRule,
) -> Result<Balance, ReferenceError> {
    let tokens = logits.len().checked_div(experts).unwrap_or(0);
    balance_of(logits, ids, weights, experts, top_k, rule, &vec![true; tokens])
}

/// Which of the tokens of `logits [T,E]` count: those that `valid` says are no padding (all of them without), and of these those whose
/// log-sum-exp and probabilities are finite, unless garbage propagates ([`Garbage`]).
pub fn counted<L: Real>(
    logits: &[L],
    experts: usize,
    rule: &BalanceRule,
    garbage: Garbage,
    valid: Option<&[bool]>,
) -> Vec<bool> {
    let finite = |row: &[L]| {
        let row: Vec<f64> = row.iter().map(|&l| l.into()).collect();
        // Sigmoids that are all 0 in the precision of the logits have no sum to be divided by.
        let sigmoids = || row.iter().map(|&l| L::round(sigmoid(l))).sum::<f64>() > 0.0;
        log_sum_exp(row.iter().copied()).is_finite() && (rule.score == LossScore::Softmax || sigmoids())
    };
    let rows = logits.chunks(experts).enumerate();
    rows.map(|(t, row)| valid.is_none_or(|valid| valid[t]) && (garbage == Garbage::Propagate || finite(row))).collect()
}

/// [`balance`] of those tokens for which `counts [T]` holds. The others add nothing, and no mean is over them.
///
/// # Errors
/// Those of [`balance`], and a length of `counts` that does not fit.
pub fn balance_of<L: Real>(
    logits: &[L],
    ids: &[i32],
    weights: &[f64],
    experts: usize,
    top_k: usize,
    rule: &BalanceRule,
    counts: &[bool],
) -> Result<Balance, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    let tokens = logits.len() / experts;
    require_shape("counts", counts, &[tokens])?;
    require("logits", tokens > 0 && logits.len() == tokens * experts, || format!("rows of {experts}"), logits.len())?;
    require("tokens_per_sequence", rule.tokens_per_sequence > 0, || "at least 1".into(), 0)?;
    require_shape("ids", ids, &[tokens, top_k])?;
    require_shape("weights", weights, &[tokens, top_k])?;

    let sequences = tokens.div_ceil(rule.tokens_per_sequence);
    require(
        "tokens_per_sequence",
        rule.sequences == Sequences::Following || tokens.is_multiple_of(rule.tokens_per_sequence),
        || format!("a divisor of {tokens}"),
        rule.tokens_per_sequence,
    )?;
    let of_sequence = |t: usize| match rule.sequences {
        Sequences::Following => t / rule.tokens_per_sequence,
        Sequences::Alternating => t % sequences,
    };
    let all = counts.iter().filter(|&&counts| counts).count();
    let mut result = Balance {
        totals: Totals { tokens: all, counts: vec![0; experts], probability: vec![0.0; experts] },
        counts: vec![0; experts],
        importance: vec![0.0; experts],
        sequence_loss: 0.0,
        z_loss: 0.0,
        entropy: 0.0,
        dropped: 0,
    };
    let mut with_tokens = 0;
    for sequence in 0..sequences {
        let [mut chosen, mut counted] = [(); 2].map(|()| vec![0u64; experts]);
        let mut probability = vec![0.0; experts];
        let mut length = 0;
        for t in (0..tokens).filter(|&t| of_sequence(t) == sequence && counts[t]) {
            length += 1;
            let row: Vec<f64> = logits[t * experts..][..experts].iter().map(|&l| l.into()).collect();
            let p = probabilities(&row, rule.score);
            probability.iter_mut().zip(&p).for_each(|(sum, p)| *sum += p);
            result.z_loss += log_sum_exp(row.iter().copied()).powi(2) / all as f64;
            result.entropy += match rule.score {
                LossScore::PlainSigmoid => entropy(&probabilities(&row, LossScore::Sigmoid)),
                _ => entropy(&p),
            } / all as f64;
            let of_choice: Vec<usize> = ids[t * top_k..][..top_k]
                .iter()
                .zip(&weights[t * top_k..])
                .filter_map(|(&id, weight)| Some((usize::try_from(id).ok().filter(|&e| e < experts)?, weight)))
                .map(|(e, weight)| {
                    chosen[e] += 1;
                    result.importance[e] += weight;
                    e
                })
                .collect();
            let of_loss = match rule.counts {
                LossCounts::Choice => of_choice,
                // A first choice of nothing is none.
                LossCounts::FirstChoice => {
                    usize::try_from(ids[t * top_k]).into_iter().filter(|&e| e < experts).collect()
                }
                // Every score rises with its logit.
                LossCounts::Scores => top(&row, top_k),
            };
            for e in of_loss {
                counted[e] += 1;
                result.totals.counts[e] += 1;
            }
            // The sequence-wise loss is of all choices.
            if rule.counts == LossCounts::FirstChoice {
                for &id in &ids[t * top_k + 1..][..top_k - 1] {
                    if let Some(e) = usize::try_from(id).ok().filter(|&e| e < experts) {
                        counted[e] += 1;
                    }
                }
            }
        }
        if length == 0 {
            continue;
        }
        with_tokens += 1;
        let f = experts as f64 / (top_k * length) as f64;
        let dot: f64 = counted.iter().zip(&probability).map(|(&c, p)| f * c as f64 * (p / length as f64)).sum();
        result.sequence_loss += dot;
        for e in 0..experts {
            result.counts[e] += chosen[e] as i32;
            result.totals.probability[e] += probability[e];
            result.dropped += rule.capacity.map_or(0, |capacity| chosen[e].saturating_sub(capacity as u64));
        }
    }
    result.sequence_loss /= f64::from(with_tokens.max(1));
    Ok(result)
}

/// `[B,E]` slots of each expert in each sequence of `tokens_per_sequence` tokens, and `[B]` tokens of each that count: what the loss by sequence counts of
/// `ids [T,k]`, where `counts [T]` holds ([`counted`]).
///
/// # Errors
/// Lengths that do not fit.
pub fn sequence_counts(
    ids: &[i32],
    counts: &[bool],
    experts: usize,
    top_k: usize,
    tokens_per_sequence: usize,
    sequences: Sequences,
) -> Result<(Vec<i32>, Vec<usize>), ReferenceError> {
    require("tokens_per_sequence", tokens_per_sequence > 0, || "at least 1".into(), 0)?;
    require_shape("ids", ids, &[counts.len(), top_k])?;
    let count = counts.len().div_ceil(tokens_per_sequence);
    let (mut slots, mut lengths) = (vec![0; count * experts], vec![0; count]);
    for t in (0..counts.len()).filter(|&t| counts[t]) {
        let sequence = match sequences {
            Sequences::Following => t / tokens_per_sequence,
            Sequences::Alternating => t % count,
        };
        lengths[sequence] += 1;
        for &id in &ids[t * top_k..][..top_k] {
            if let Some(e) = usize::try_from(id).ok().filter(|&e| e < experts) {
                slots[sequence * experts + e] += 1;
            }
        }
    }
    Ok((slots, lengths))
}

/// A token's distribution over experts.
pub fn probabilities(logits: &[f64], score: LossScore) -> Vec<f64> {
    match score {
        LossScore::Softmax => softmax(logits),
        LossScore::Sigmoid => {
            let scores: Vec<f64> = logits.iter().map(|&l| sigmoid(l)).collect();
            let sum: f64 = scores.iter().sum();
            scores.into_iter().map(|s| s / sum).collect()
        }
        LossScore::PlainSigmoid => logits.iter().map(|&l| sigmoid(l)).collect(),
    }
}

/// `b_e + rate * sign(mean(counts) - counts_e)`: the correction bias after a step.
///
/// Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1; DeepSeek-V3, section 2.1.2. Whether a
/// count is above the mean is decided in integers.
pub fn update_bias(bias: &[f32], counts: &[i32], rate: f32) -> Result<Vec<f32>, ReferenceError> {
    require_shape("counts", counts, &[bias.len()])?;
    let sum: i64 = counts.iter().map(|&count| i64::from(count)).sum();
    let updated = bias.iter().zip(counts).map(|(&b, &count)| match sum.cmp(&(i64::from(count) * bias.len() as i64)) {
        std::cmp::Ordering::Greater => b + rate,
        std::cmp::Ordering::Equal => b,
        std::cmp::Ordering::Less => b - rate,
    });
    Ok(updated.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: BalanceRule = BalanceRule {
        score: LossScore::Softmax,
        tokens_per_sequence: 2,
        sequences: Sequences::Following,
        counts: LossCounts::Choice,
        capacity: None,
    };

    fn near(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-12, "{got} is not {want}");
    }

    #[test]
    fn balanced_is_the_minimum() {
        let got = balance(&[0f32; 16], &[0, 1, 2, 3], &[0.25; 4], 4, 1, &RULE).unwrap();
        near(got.totals.loss(), 1.0);
        near(got.sequence_loss, 1.0);
        near(got.z_loss, 4f64.ln().powi(2));
        near(got.entropy, 4f64.ln());
        near(cv_squared(&got.importance), 0.0);
        near(got.max_over_mean(), 1.0);
        let two = balance(&[0f32; 16], &[0, 1, 2, 3, 0, 1, 2, 3], &[0.25; 8], 4, 2, &RULE).unwrap();
        near(two.totals.loss(), 2.0);
        near(two.sequence_loss, 1.0);
    }

    #[test]
    fn all_on_one_expert_is_the_maximum() {
        let logits = [100f32, 0.0, 0.0, 0.0].repeat(3);
        let rule = BalanceRule { capacity: Some(1), ..RULE };
        let got = balance(&logits, &[0, 0, 0], &[1.0; 3], 4, 1, &rule).unwrap();
        near(got.totals.loss(), 4.0);
        near(got.sequence_loss, 4.0);
        near(got.max_over_mean(), 4.0);
        near(cv_squared(&[3.0, 0.0, 0.0, 0.0]), 3.0 / (1.0 + 1e-10 * 16.0 / 9.0));
        // Two sequences of 2 and 1 tokens, one slot each.
        assert_eq!(got.dropped, 1);
    }

    #[test]
    fn layers_add_up_and_first_choices_count_alone() {
        let logits = [1f32, 2.0, 3.0, 4.0, 3.0, -1.0, 0.5, 0.0];
        let ids = [3, 2, 0, 2];
        let rule = BalanceRule { counts: LossCounts::FirstChoice, ..RULE };
        let first = balance(&logits, &ids, &[0.5; 4], 4, 2, &rule).unwrap();
        assert_eq!((first.totals.counts.clone(), first.counts), (vec![1, 0, 0, 1], vec![1, 0, 2, 1]));
        let all = balance(&logits, &ids, &[0.5; 4], 4, 2, &RULE).unwrap();
        let mut both = first.totals.clone();
        both.add(&all.totals);
        // Two layers of concatenated tokens.
        let want: f64 = (0..4).map(|e| both.counts[e] as f64 / 4.0 * both.probability[e] / 4.0).sum();
        near(both.loss(), 4.0 * want);
    }

    #[test]
    fn bias_moves_against_the_load() {
        assert_eq!(update_bias(&[0.0, 1.0, -1.0], &[4, 2, 0], 0.5).unwrap(), [-0.5, 1.0, -0.5]);
        // The mean of 1, 2 and 2 is no integer.
        assert_eq!(update_bias(&[0.0; 3], &[1, 2, 2], 1.0).unwrap(), [1.0, -1.0, -1.0]);
    }

    #[test]
    fn sigmoid_probabilities_sum_to_one() {
        let p = probabilities(&[0.0, 3.0, -2.0], LossScore::Sigmoid);
        near(p.iter().sum(), 1.0);
        near(p[0] / p[1], 0.5 * (1.0 + (-3f64).exp()));
    }
}
