//! Sampled routing: experts drawn from the router's distribution, with what policy gradients need.
//!
//! Rosenbaum et al. 2018, "Routing Networks" (one expert from a policy trained by its reward); Kool et al. 2019, "Stochastic Beams
//! and Where to Find Them" (Gumbel top-k: k experts without replacement).

mod backward;

use super::gating::{softmax, top};
use super::{ReferenceError, require};
use crate::rules::SamplingRule;
use crate::rules::noise::gumbel;

pub use backward::{SampledUpstream, sampled_backward};

/// What sampling yields.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// `[T,k]`, in the order in which they are drawn.
    pub ids: Vec<i32>,
    /// `[T,k]`, the policy's probability of each drawn expert.
    pub weights: Vec<f64>,
    /// `[T,k]`, logarithm of the chance of each draw, given the token's earlier ones; their sum is that of the ordered sample.
    pub log_probabilities: Vec<f64>,
    /// `[T]`, entropy of the policy in nats.
    pub entropy: Vec<f64>,
    /// `[T,E]`, exactly the f32 numbers that experts are chosen by.
    pub perturbed: Vec<f32>,
}

/// Draws `k` of the experts of each row of `logits [T,E]` without replacement from the policy `softmax(beta l)`.
///
/// `perturbed_i = beta l_i + Gumbel()`, in f32 with one fused rounding; the k largest in falling order are distributed as k draws
/// without replacement: `P(i_1, .., i_k) = prod_j p_ij / (1 - p_i1 - .. - p_i(j-1))` (Kool et al., section 2.4).
///
/// The policy's own logits are the products `beta l` rounded to f32, as a framework has them that scales its f32 logits: that moves a
/// probability by some `2^-24 beta |l|` of itself. The weight is the policy's probability; Routing Networks apply the chosen module
/// unweighted.
///
/// # Errors
/// Lengths that do not fit `experts`, `top_k` of 0 or above `experts`.
pub fn gumbel_top_k(logits: &[f32], experts: usize, rule: &SamplingRule) -> Result<Sampled, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("logits", logits.len().is_multiple_of(experts), || format!("rows of {experts}"), logits.len())?;
    require("top_k", (1..=experts).contains(&rule.top_k), || format!("1 to {experts}"), rule.top_k)?;
    let mut result = Sampled {
        ids: Vec::new(),
        weights: Vec::new(),
        log_probabilities: Vec::new(),
        entropy: Vec::new(),
        perturbed: Vec::new(),
    };
    for (t, row) in logits.chunks(experts).enumerate() {
        let scaled: Vec<f64> = row.iter().map(|&l| f64::from(l * rule.inverse_temperature)).collect();
        let policy = softmax(&scaled);
        let perturbed: Vec<f32> = (0..experts)
            .map(|e| {
                let noise = gumbel(rule.noise.gate_word(0, t as u32, e as u32));
                row[e].mul_add(rule.inverse_temperature, noise)
            })
            .collect();
        let drawn = top(&perturbed.iter().map(|&p| p.into()).collect::<Vec<_>>(), rule.top_k);
        let mut left: Vec<usize> = (0..experts).collect();
        for &e in &drawn {
            result.ids.push(e as i32);
            result.weights.push(policy[e]);
            // Relative to the largest, so that a logit of any size leaves the logarithm its digits.
            let max = left.iter().map(|&other| scaled[other]).fold(f64::NEG_INFINITY, f64::max);
            let log_sum = left.iter().map(|&other| (scaled[other] - max).exp()).sum::<f64>().ln();
            result.log_probabilities.push(scaled[e] - max - log_sum);
            left.retain(|&other| other != e);
        }
        result.entropy.push(entropy(&policy));
        result.perturbed.extend(perturbed);
    }
    Ok(result)
}

/// `ln sum exp v`.
pub fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = values.clone().fold(f64::NEG_INFINITY, f64::max);
    max + values.map(|value| (value - max).exp()).sum::<f64>().ln()
}

/// `- sum p ln p`, in nats; an expert of probability 0 adds nothing.
pub fn entropy(probabilities: &[f64]) -> f64 {
    -probabilities.iter().map(|&p| if p == 0.0 { 0.0 } else { p * p.ln() }).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::NoiseSource;

    #[test]
    fn pairs_come_as_often_as_the_formula_says() {
        let p = [0.5f64, 0.3, 0.2];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        let tokens = 20_000;
        let rule = SamplingRule { top_k: 2, inverse_temperature: 1.0, noise: NoiseSource { seed: 5, offset: 11 } };
        let got = gumbel_top_k(&logits.repeat(tokens), 3, &rule).unwrap();
        let mut chi_squared = 0.0;
        for a in 0..3 {
            for b in (0..3).filter(|&b| b != a) {
                let chance = p[a] * p[b] / (1.0 - p[a]);
                let pairs = got.ids.chunks(2).zip(got.log_probabilities.chunks(2));
                let of_this = pairs.filter(|(ids, _)| **ids == [a as i32, b as i32]);
                let mut count = 0.0;
                for (_, log) in of_this {
                    count += 1.0;
                    assert!(((log[0] + log[1]).exp() - chance).abs() < 1e-6);
                }
                let expected = chance * tokens as f64;
                chi_squared += (count - expected) * (count - expected) / expected;
            }
        }
        // 5 degrees of freedom: 25.7 is exceeded with probability 1e-4.
        assert!(chi_squared < 25.7, "{chi_squared}");
    }

    #[test]
    fn a_certain_policy_has_no_entropy() {
        let rule = SamplingRule { top_k: 1, inverse_temperature: 1e3, noise: NoiseSource::default() };
        let got = gumbel_top_k(&[0.0, 5.0, 1.0, f32::NEG_INFINITY], 4, &rule).unwrap();
        assert_eq!((got.ids[0], got.weights[0], got.log_probabilities[0], got.entropy[0]), (1, 1.0, 0.0, 0.0));
        let even = SamplingRule { top_k: 3, inverse_temperature: 0.0, ..rule };
        let got = gumbel_top_k(&[0.0, 5.0, 1.0, 2.0], 4, &even).unwrap();
        assert!((got.entropy[0] - 4f64.ln()).abs() < 1e-12);
        for (got, left) in got.log_probabilities.iter().zip([4f64, 3.0, 2.0]) {
            assert!((got + left.ln()).abs() < 1e-12);
        }
    }
}
