//! Noisy top-k gating, and the hierarchical mixture of experts made of it.
//!
//! Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", section 2.1 and
//! appendices A (load) and B (hierarchy).

mod backward;

use super::activation::erf;
use super::balance::cv_squared;
use super::gating::{softmax, top};
use super::{ReferenceError, require, require_shape};
use crate::rules::NoisyRule;
use crate::rules::noise::{softplus, standard_normal};

pub use backward::{NoisyGradients, hierarchical_backward, noisy_backward};

/// What noisy gating yields.
#[derive(Clone, Debug, PartialEq)]
pub struct NoisyGated {
    /// `[T,k]`, by descending noisy logit.
    pub ids: Vec<i32>,
    /// `[T,k]`, softmax of the kept noisy logits.
    pub weights: Vec<f64>,
    /// `[T,E]`, `H(x)`: exactly the f32 numbers that experts are chosen by.
    pub noisy: Vec<f32>,
    /// `[T,2]`, the k-th and the k+1-th largest of a token's noisy logits: what an expert that is left out, and one that is kept, is
    /// compared with (`kth_excluding`, eq. 9). -Inf where there is none.
    pub thresholds: Vec<f32>,
    /// `[E]`, tokens of each expert.
    pub counts: Vec<i32>,
    /// `[E]`, `Importance(X)`: sums of weights (eq. 6).
    pub importance: Vec<f64>,
    /// `[E]`, `Load(X)`: the smooth estimate of `counts` (eq. 10).
    pub load: Vec<f64>,
}

impl NoisyGated {
    /// `CV(Importance)^2` and `CV(Load)^2`: the two losses before their factors (eq. 7 and 11).
    pub fn losses(&self) -> (f64, f64) {
        (cv_squared(&self.importance), cv_squared(&self.load))
    }
}

/// The deviation of the noise: `softplus(raw) + noise_epsilon`, in f32.
///
/// Eq. 4 has no epsilon; the authors' code (tensor2tensor) adds it outside the softplus. At least the smallest normal number, which is ours:
/// eq. 9 divides by it.
pub fn noise_deviation(raw: f32, noise_epsilon: f32) -> f32 {
    let deviation = softplus(raw) + noise_epsilon;
    // A comparison that NaN fails.
    if deviation < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { deviation }
}

/// Gates each token of `clean [T,E]` (`x Wg`) by noisy logits.
///
/// `H(x)_i = clean_i + StandardNormal() * softplus(raw_i)` (eq. 4), `raw [T,E]` being `x Wnoise`; the k largest are kept (eq. 5),
/// and the gate is their softmax (eq. 3). H is computed in f32 with one fused rounding, so that choices are those of a
/// kernel bit for bit. `Load(X)_i` sums over tokens the chance that expert i is kept if its noise alone is drawn again:
/// `P(x,i) = Phi((clean_i - kth_excluding(H,k,i)) / softplus(raw_i))` (eq. 8, 9), with the epsilon where H has it. Where k is the number of
/// experts there is no k-th other one, and P is 1: the authors' code counts tokens then.
///
/// Garbage stays where it is: a gate or a P that is no number, of logits that are NaN or +Inf, is 0, which the paper leaves open.
///
/// # Errors
/// Lengths that do not fit `experts`, `top_k` of 0 or above `experts`.
pub fn noisy_top_k(clean: &[f32], raw: &[f32], experts: usize, rule: &NoisyRule) -> Result<NoisyGated, ReferenceError> {
    let tokens = check(clean, raw, experts, rule)?;
    let all: Vec<usize> = (0..tokens).collect();
    Ok(level(clean, raw, experts, rule, 0, &all, |t| t * experts))
}

/// [`noisy_top_k`] of a batch with padding: of the tokens for which `valid [T]` holds, whose rows alone stand in the result, one below the other.
///
/// # Errors
/// Those of [`noisy_top_k`], and a length of `valid` that does not fit.
pub fn noisy_top_k_of(
    clean: &[f32],
    raw: &[f32],
    experts: usize,
    rule: &NoisyRule,
    valid: &[bool],
) -> Result<NoisyGated, ReferenceError> {
    let tokens = check(clean, raw, experts, rule)?;
    require_shape("valid", valid, &[tokens])?;
    let members: Vec<usize> = (0..tokens).filter(|&t| valid[t]).collect();
    Ok(level(clean, raw, experts, rule, 0, &members, |t| t * experts))
}

/// The two levels of a hierarchical mixture: `groups` groups of `experts` experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Hierarchical {
    /// The first level, over groups.
    pub primary: NoisyGated,
    /// `[T, k1 * k2]`, numbers of experts over all groups; those of a token's first group come first.
    pub ids: Vec<i32>,
    /// `[T, k1 * k2]`, `G_primary(x)_i * G_i(x)_j` (appendix B, eq. 12).
    pub weights: Vec<f64>,
    /// `[groups * experts]`, slots of each expert.
    pub counts: Vec<i32>,
    /// `[groups * experts]`, `Importance_H(X)` (eq. 13): sums of weights.
    pub importance: Vec<f64>,
    /// `[groups * experts]`, `Load_H(X)_{i,j} = Load_primary(X)_i * Load_i(X^(i))_j / |X^(i)|` (eq. 14), where `X^(i)` are the tokens of
    /// group i; 0 for a group without tokens.
    pub load: Vec<f64>,
}

impl Hierarchical {
    /// `CV(Importance_H)^2` and `CV(Load_H)^2`.
    pub fn losses(&self) -> (f64, f64) {
        (cv_squared(&self.importance), cv_squared(&self.load))
    }
}

/// Chooses groups, then experts within each chosen group: appendix B.
///
/// `primary_clean`, `primary_raw` are `[T,groups]`, `clean` and `raw` `[T, groups, experts]`. Both rules use random words of their own
/// also where their sources are the same.
///
/// # Errors
/// Those of [`noisy_top_k`], for either level.
#[allow(clippy::too_many_arguments)]
pub fn hierarchical(
    primary_clean: &[f32],
    primary_raw: &[f32],
    groups: usize,
    primary_rule: &NoisyRule,
    clean: &[f32],
    raw: &[f32],
    experts: usize,
    rule: &NoisyRule,
) -> Result<Hierarchical, ReferenceError> {
    let valid = vec![true; check(primary_clean, primary_raw, groups, primary_rule)?];
    hierarchical_of(primary_clean, primary_raw, groups, primary_rule, clean, raw, experts, rule, &valid)
}

/// [`hierarchical`] of a batch with padding: of the tokens for which `valid [T]` holds, whose rows alone stand in the result.
///
/// # Errors
/// Those of [`hierarchical`], and a length of `valid` that does not fit.
#[allow(clippy::too_many_arguments)]
pub fn hierarchical_of(
    primary_clean: &[f32],
    primary_raw: &[f32],
    groups: usize,
    primary_rule: &NoisyRule,
    clean: &[f32],
    raw: &[f32],
    experts: usize,
    rule: &NoisyRule,
    valid: &[bool],
) -> Result<Hierarchical, ReferenceError> {
    let all = check(primary_clean, primary_raw, groups, primary_rule)?;
    check(clean, raw, experts, rule)?;
    require_shape("clean", clean, &[all, groups, experts])?;
    let primary = noisy_top_k_of(primary_clean, primary_raw, groups, primary_rule, valid)?;
    let valid: Vec<usize> = (0..all).filter(|&t| valid[t]).collect();
    let tokens = valid.len();
    let (k1, k2) = (primary_rule.top_k, rule.top_k);
    let mut result = Hierarchical {
        ids: vec![0; tokens * k1 * k2],
        weights: vec![0.0; tokens * k1 * k2],
        counts: vec![0; groups * experts],
        importance: vec![0.0; groups * experts],
        load: vec![0.0; groups * experts],
        primary,
    };
    for group in 0..groups {
        // X^(i), and where among a token's choices the group stands.
        let places: Vec<usize> = (0..tokens * k1).filter(|&at| result.primary.ids[at] == group as i32).collect();
        let members: Vec<usize> = places.iter().map(|at| valid[at / k1]).collect();
        let row = |t: usize| (t * groups + group) * experts;
        let secondary = level(clean, raw, experts, rule, 16 + group as u32, &members, row);
        for (n, &at) in places.iter().enumerate() {
            for j in 0..k2 {
                let expert = group * experts + secondary.ids[n * k2 + j] as usize;
                let weight = result.primary.weights[at] * secondary.weights[n * k2 + j];
                result.ids[at * k2 + j] = expert as i32;
                result.weights[at * k2 + j] = weight;
                result.counts[expert] += 1;
                result.importance[expert] += weight;
            }
        }
        for e in 0..experts {
            let share = secondary.load[e] / members.len().max(1) as f64;
            result.load[group * experts + e] = result.primary.load[group] * share;
        }
    }
    Ok(result)
}

fn check(clean: &[f32], raw: &[f32], experts: usize, rule: &NoisyRule) -> Result<usize, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("clean", clean.len().is_multiple_of(experts), || format!("rows of {experts}"), clean.len())?;
    require("raw", raw.len() == clean.len(), || format!("{} elements, as `clean` has", clean.len()), raw.len())?;
    require("top_k", (1..=experts).contains(&rule.top_k), || format!("1 to {experts}"), rule.top_k)?;
    Ok(clean.len() / experts)
}

/// One gating network on the tokens `members`, whose logits begin at `row(t)`.
fn level(
    clean: &[f32],
    raw: &[f32],
    experts: usize,
    rule: &NoisyRule,
    stream: u32,
    members: &[usize],
    row: impl Fn(usize) -> usize,
) -> NoisyGated {
    let mut result = NoisyGated {
        ids: Vec::new(),
        weights: Vec::new(),
        noisy: Vec::new(),
        thresholds: Vec::new(),
        counts: vec![0; experts],
        importance: vec![0.0; experts],
        load: vec![0.0; experts],
    };
    for &t in members {
        let clean = &clean[row(t)..row(t) + experts];
        let deviation: Vec<f32> =
            raw[row(t)..row(t) + experts].iter().map(|&raw| noise_deviation(raw, rule.noise_epsilon)).collect();
        let noisy: Vec<f32> = (0..experts)
            .map(|e| {
                let normal = standard_normal(rule.noise.gate_word(stream, t as u32, e as u32));
                normal.mul_add(deviation[e], clean[e])
            })
            .collect();

        let wide: Vec<f64> = noisy.iter().map(|&h| h.into()).collect();
        // One more than are kept: kth_excluding needs it.
        let order = top(&wide, rule.top_k + 1);
        let kept = &order[..rule.top_k];
        let numbers = |values: Vec<f64>| values.into_iter().map(|value| if value.is_nan() { 0.0 } else { value });
        let gates: Vec<f64> = numbers(softmax(&kept.iter().map(|&e| wide[e]).collect::<Vec<_>>())).collect();
        for (&e, &gate) in kept.iter().zip(&gates) {
            result.ids.push(e as i32);
            result.weights.push(gate);
            result.counts[e] += 1;
            result.importance[e] += gate;
        }
        let chances = (0..experts).map(|e| {
            let excluding = if kept.contains(&e) { order.get(rule.top_k) } else { kept.last() };
            // With no other expert left, e is always kept.
            excluding.map_or(1.0, |&other| normal_cdf((f64::from(clean[e]) - wide[other]) / f64::from(deviation[e])))
        });
        for (load, chance) in result.load.iter_mut().zip(numbers(chances.collect())) {
            *load += chance;
        }
        let bound = |at: Option<&usize>| at.map_or(f32::NEG_INFINITY, |&other| noisy[other]);
        result.thresholds.extend([bound(kept.last()), bound(order.get(rule.top_k))]);
        result.noisy.extend(noisy);
    }
    result
}

/// `Phi(z)`.
fn normal_cdf(z: f64) -> f64 {
    0.5 * (1.0 + erf(z * std::f64::consts::FRAC_1_SQRT_2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::NoiseSource;
    use crate::rules::noise::uniform;

    const NOISE: NoiseSource = NoiseSource { seed: 3, offset: 0 };

    #[test]
    fn normal_is_the_inverse_of_its_distribution() {
        // Both ends, where it is steep, and the middle.
        let ends = (0..64).flat_map(|i| [i << 9, u32::MAX - (i << 9), (1 << 31) + (i << 9), (1 << 31) - (i << 9) - 1]);
        for word in ends.chain((0..20_000u32).map(|i| i.wrapping_mul(0x9E37_79B9))) {
            let u = f64::from(uniform(word));
            let z = f64::from(standard_normal(word));
            let density = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
            // erf loses the tails: there only the order of magnitude of the tail is checked.
            let got = 0.5 * (1.0 + erf(z * std::f64::consts::FRAC_1_SQRT_2));
            assert!((got - u).abs() <= 2e-6 * z.abs() * density + 1e-12, "{u}: {z} has {got}");
            assert_eq!(standard_normal(!word), -standard_normal(word));
        }
        assert!(f64::from(standard_normal(0)) < -5.29 && f64::from(standard_normal(0)) > -5.31);
    }

    #[test]
    fn without_noise_it_is_topk_softmax_and_load_counts() {
        // softplus(-200) is 0: noise vanishes against any logit.
        let rule = NoisyRule { top_k: 2, noise_epsilon: 0.0, noise: NOISE };
        let clean = [4f32.ln(), 0.25, 2f32.ln(), -1.0, 0.25, 1.0, -2.0, 3.0];
        let gated = noisy_top_k(&clean, &[-200.0; 8], 4, &rule).unwrap();
        assert_eq!(gated.ids, [0, 2, 3, 1]);
        assert!((gated.weights[0] - 2.0 / 3.0).abs() < 1e-6);
        assert_eq!(gated.noisy, clean);
        assert_eq!(gated.counts, [1, 1, 1, 1]);
        assert_eq!(gated.load, [1.0; 4]);
    }

    #[test]
    fn load_estimates_the_count() {
        // Over many draws, the mean number of tokens of an expert and its mean load agree: P(x,i) is its chance of being
        // kept given the others' noise. 2000 tokens, chance near 0.2 to 0.7: standard error below 0.012.
        let tokens = 2000;
        let clean: Vec<f32> = (0..tokens).flat_map(|_| [0.5, 0.0, -0.3, 0.2, -0.6]).collect();
        let raw = vec![0.3f32; tokens * 5];
        let rule = NoisyRule { top_k: 2, noise_epsilon: 1e-2, noise: NOISE };
        let gated = noisy_top_k(&clean, &raw, 5, &rule).unwrap();
        for e in 0..5 {
            let (count, load) = (f64::from(gated.counts[e]) / tokens as f64, gated.load[e] / tokens as f64);
            assert!((count - load).abs() < 5.0 * 0.012, "expert {e}: {count} tokens, load {load}");
        }
        assert!((gated.load.iter().sum::<f64>() / tokens as f64 - 2.0).abs() < 0.06);
    }

    #[test]
    fn all_experts_kept_means_certain_load() {
        let rule = NoisyRule { top_k: 3, noise_epsilon: 0.0, noise: NOISE };
        let gated = noisy_top_k(&[1.0, 2.0, 3.0], &[0.0; 3], 3, &rule).unwrap();
        assert_eq!(gated.load, [1.0; 3]);
        assert_eq!(gated.losses().1, 0.0);
    }

    #[test]
    fn hierarchy_multiplies_gates_and_loads() {
        let (groups, experts, tokens) = (3, 4, 50);
        let logits = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 500.0 - 1.0).collect()
        };
        let rule = |top_k| NoisyRule { top_k, noise_epsilon: 0.0, noise: NOISE };
        let got = hierarchical(
            &logits(tokens * groups, 1),
            &logits(tokens * groups, 2),
            groups,
            &rule(2),
            &logits(tokens * groups * experts, 3),
            &logits(tokens * groups * experts, 4),
            experts,
            &rule(3),
        )
        .unwrap();
        for t in 0..tokens {
            let (ids, weights) = (&got.ids[t * 6..][..6], &got.weights[t * 6..][..6]);
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            for (j, id) in ids.iter().enumerate() {
                assert_eq!(id / 4, got.primary.ids[t * 2 + j / 3]);
                assert!(!ids[..j].contains(id));
            }
        }
        // Loads of a group's experts sum to k2 times the group's load, but for the estimate's spread.
        assert_eq!(got.counts.iter().sum::<i32>(), 300);
        assert!((got.importance.iter().sum::<f64>() - tokens as f64).abs() < 1e-9);
        for group in 0..groups {
            let sum: f64 = got.load[group * 4..][..4].iter().sum();
            assert!((sum / got.primary.load[group] - 3.0).abs() < 0.5, "{sum}");
        }
    }

    #[test]
    fn raw_of_another_length_is_an_error() {
        let rule = NoisyRule { top_k: 1, noise_epsilon: 0.0, noise: NOISE };
        assert_eq!(noisy_top_k(&[0.0; 4], &[0.0; 3], 2, &rule).unwrap_err().argument, "raw");
    }
}
