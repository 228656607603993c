//! The gradients of both products of a noisy gating, and of the four of a hierarchical one.

use super::{Hierarchical, NoisyGated, check, noise_deviation};
use crate::reference::activation::sigmoid;
use crate::reference::balance::cv_squared_gradient;
use crate::reference::gating::{softmax, top};
use crate::reference::{ReferenceError, require_shape};
use crate::rules::NoisyRule;
use crate::rules::noise::standard_normal;

/// Gradients of the router's two products, each as wide as they are.
#[derive(Clone, Debug, PartialEq)]
pub struct NoisyGradients {
    /// Of `x Wg`.
    pub clean: Vec<f64>,
    /// Of `x Wnoise`.
    pub raw: Vec<f64>,
}

impl NoisyGradients {
    fn zeros(len: usize) -> NoisyGradients {
        NoisyGradients { clean: vec![0.0; len], raw: vec![0.0; len] }
    }
}

/// The gradients of `sum d_weights weights + importance CV(Importance)^2 + load CV(Load)^2 + sum d_load Load`, where `ids [T,k]` are those that
/// [`super::noisy_top_k`] chooses and `sums` what it adds up; `factors` are importance and load. A token of which an id is no expert's is padding.
///
/// `H = clean + n (softplus(raw) + epsilon)`: `dclean = dH`, `draw = dH n sigmoid(raw)`, 0 where the deviation is the least that it may be.
/// `P = Phi((clean - H') / d)` goes to clean, to the deviation, and to the noisy logit `H'` of the expert that it is compared with (eq. 9). Choices and
/// counts are constant. A row with NaN or +Inf in either product, or whose largest chosen H is not finite, has no gradient.
///
/// # Errors
/// Lengths that do not fit.
#[allow(clippy::too_many_arguments)]
pub fn noisy_backward(
    clean: &[f32],
    raw: &[f32],
    experts: usize,
    rule: &NoisyRule,
    ids: &[i32],
    d_weights: &[f64],
    [importance, load]: [&[f64]; 2],
    factors: [f64; 2],
    d_load: Option<&[f64]>,
) -> Result<NoisyGradients, ReferenceError> {
    let tokens = check(clean, raw, experts, rule)?;
    require_shape("ids", ids, &[tokens, rule.top_k])?;
    require_shape("d_weights", d_weights, &[tokens, rule.top_k])?;
    let of_importance = slopes(importance, factors[0], experts);
    let mut of_load = slopes(load, factors[1], experts);
    of_load.iter_mut().zip(d_load.unwrap_or(&[])).for_each(|(sum, d)| *sum += d);
    let mut result = NoisyGradients::zeros(tokens * experts);
    for t in 0..tokens {
        let row = t * experts..(t + 1) * experts;
        let slots = t * rule.top_k..(t + 1) * rule.top_k;
        let chosen: Option<Vec<usize>> = ids[slots.clone()].iter().map(|&id| expert(id, experts)).collect();
        let Some(chosen) = chosen else { continue };
        let d_gates: Vec<f64> = chosen.iter().zip(&d_weights[slots]).map(|(&e, d)| d + of_importance[e]).collect();
        let level = Level::new(&clean[row.clone()], &raw[row.clone()], rule, 0, t, &chosen);
        let (d_clean, d_raw) = level.backward(&d_gates, &of_load);
        result.clean[row.clone()].copy_from_slice(&d_clean);
        result.raw[row].copy_from_slice(&d_raw);
    }
    Ok(result)
}

/// The gradients of the first level's products and of the second's, of `sum d_weights weights` and of the four losses: `factors` are importance
/// and load of groups, then of experts. `gated` is what [`super::hierarchical`] gives.
///
/// Weights and loads are products of both levels' (eq. 12 and 14): `G_primary[g] G_g[e]`, `Load_primary[g] Load_g[e] / |X_g|`. The number of a
/// group's tokens is constant.
///
/// # Errors
/// Lengths that do not fit.
#[allow(clippy::too_many_arguments)]
pub fn hierarchical_backward(
    [primary_clean, primary_raw]: [&[f32]; 2],
    groups: usize,
    primary_rule: &NoisyRule,
    [clean, raw]: [&[f32]; 2],
    experts: usize,
    rule: &NoisyRule,
    gated: &Hierarchical,
    d_weights: &[f64],
    factors: [f64; 4],
) -> Result<[NoisyGradients; 2], ReferenceError> {
    let tokens = check(primary_clean, primary_raw, groups, primary_rule)?;
    check(clean, raw, experts, rule)?;
    let (k1, k2) = (primary_rule.top_k, rule.top_k);
    require_shape("d_weights", d_weights, &[tokens, k1, k2])?;
    let all = groups * experts;
    let (of_importance, of_load) = (slopes(&gated.importance, factors[2], all), slopes(&gated.load, factors[3], all));
    let first: &NoisyGated = &gated.primary;
    let mut second = NoisyGradients::zeros(tokens * all);
    let mut d_primary_weights = vec![0.0; tokens * k1];
    for t in 0..tokens {
        for j in 0..k1 {
            // A token of padding has no group.
            let Some(group) = expert(first.ids[t * k1 + j], groups) else { continue };
            let slots = (t * k1 + j) * k2..(t * k1 + j + 1) * k2;
            let chosen: Vec<usize> = gated.ids[slots.clone()].iter().map(|&id| id as usize - group * experts).collect();
            let row = (t * groups + group) * experts..(t * groups + group + 1) * experts;
            let level = Level::new(&clean[row.clone()], &raw[row.clone()], rule, 16 + group as u32, t, &chosen);
            if !level.sound {
                continue;
            }
            let outer = first.weights[t * k1 + j];
            let share = first.load[group] / f64::from(first.counts[group].max(1));
            let d: Vec<f64> =
                chosen.iter().zip(&d_weights[slots]).map(|(&e, d)| d + of_importance[group * experts + e]).collect();
            d_primary_weights[t * k1 + j] = d.iter().zip(&level.gates).map(|(d, gate)| d * gate).sum();
            let d_gates: Vec<f64> = d.iter().map(|d| d * outer).collect();
            let d_load: Vec<f64> = of_load[group * experts..][..experts].iter().map(|d| d * share).collect();
            let (d_clean, d_raw) = level.backward(&d_gates, &d_load);
            second.clean[row.clone()].copy_from_slice(&d_clean);
            second.raw[row].copy_from_slice(&d_raw);
        }
    }
    let d_primary_load: Vec<f64> = (0..groups)
        .map(|group| {
            let of_group = group * experts..(group + 1) * experts;
            let sum: f64 = of_load[of_group.clone()].iter().zip(&gated.load[of_group]).map(|(d, load)| d * load).sum();
            if first.load[group] > 0.0 { sum / first.load[group] } else { 0.0 }
        })
        .collect();
    let first = noisy_backward(
        primary_clean,
        primary_raw,
        groups,
        primary_rule,
        &first.ids,
        &d_primary_weights,
        [&first.importance, &first.load],
        [factors[0], factors[1]],
        Some(&d_primary_load),
    )?;
    Ok([first, second])
}

fn expert(id: i32, experts: usize) -> Option<usize> {
    usize::try_from(id).ok().filter(|&id| id < experts)
}

/// What each element of a vector is worth of a factor times its squared coefficient of variation.
fn slopes(values: &[f64], factor: f64, count: usize) -> Vec<f64> {
    if factor == 0.0 {
        return vec![0.0; count];
    }
    cv_squared_gradient(values).into_iter().map(|slope| factor * slope).collect()
}

/// A token's row of one gating network.
struct Level<'a> {
    clean: &'a [f32],
    /// Of each expert: the noise, the deviation and its slope by the raw logit, H.
    normal: Vec<f64>,
    deviation: Vec<f64>,
    slope: Vec<f64>,
    noisy: Vec<f64>,
    chosen: &'a [usize],
    gates: Vec<f64>,
    /// Whether all that is compared are numbers.
    sound: bool,
}

impl<'a> Level<'a> {
    fn new(
        clean: &'a [f32],
        raw: &[f32],
        rule: &NoisyRule,
        stream: u32,
        token: usize,
        chosen: &'a [usize],
    ) -> Level<'a> {
        let experts = 0..clean.len();
        let normal: Vec<f32> =
            experts.clone().map(|e| standard_normal(rule.noise.gate_word(stream, token as u32, e as u32))).collect();
        let deviation: Vec<f32> = raw.iter().map(|&raw| noise_deviation(raw, rule.noise_epsilon)).collect();
        let slope = |e: usize| if deviation[e] > f32::MIN_POSITIVE { sigmoid(raw[e].into()) } else { 0.0 };
        // As they are compared: in f32.
        let noisy: Vec<f64> = experts.clone().map(|e| f64::from(normal[e].mul_add(deviation[e], clean[e]))).collect();
        let kept: Vec<f64> = chosen.iter().map(|&e| noisy[e]).collect();
        let numbers = clean.iter().chain(raw).all(|&l| l < f32::INFINITY);
        let largest = kept.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sound = numbers && largest.is_finite();
        Level {
            clean,
            slope: experts.map(slope).collect(),
            normal: normal.iter().map(|&n| n.into()).collect(),
            deviation: deviation.iter().map(|&d| d.into()).collect(),
            gates: softmax(&kept),
            noisy,
            chosen,
            sound,
        }
    }

    /// Of clean and raw logits, from those of gates and of each expert's chance of being kept.
    fn backward(&self, d_gates: &[f64], d_load: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let experts = self.clean.len();
        let (mut d_clean, mut d_raw, mut d_noisy) = (vec![0.0; experts], vec![0.0; experts], vec![0.0; experts]);
        if !self.sound {
            return (d_clean, d_raw);
        }
        let mean: f64 = self.gates.iter().zip(d_gates).map(|(p, d)| p * d).sum();
        for (&e, (p, d)) in self.chosen.iter().zip(self.gates.iter().zip(d_gates)) {
            d_noisy[e] += p * (d - mean);
        }
        let order = top(&self.noisy, self.chosen.len() + 1);
        for e in 0..experts {
            let excluding = if self.chosen.contains(&e) { order.get(self.chosen.len()) } else { self.chosen.last() };
            // With no other expert left, e is always kept.
            let Some(&other) = excluding else { continue };
            let u = (f64::from(self.clean[e]) - self.noisy[other]) / self.deviation[e];
            let density = (-u * u / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
            if density == 0.0 || d_load[e] == 0.0 {
                continue;
            }
            let a = d_load[e] * density / self.deviation[e];
            d_clean[e] += a;
            d_raw[e] -= a * u * self.slope[e];
            d_noisy[other] -= a;
        }
        for e in 0..experts {
            d_clean[e] += d_noisy[e];
            d_raw[e] += d_noisy[e] * self.normal[e] * self.slope[e];
        }
        (d_clean, d_raw)
    }
}

#[cfg(test)]
mod tests;
