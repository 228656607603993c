//! Against central finite differences of the paper's formulas, in f64, with the noise and the choices of the forward pass.

use super::super::{hierarchical, noisy_top_k, normal_cdf};
use super::*;
use crate::reference::balance::cv_squared;
use crate::rules::NoiseSource;

const NOISE: NoiseSource = NoiseSource { seed: 11, offset: 2 };

fn normals(rng: &mut fastrand::Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| 2.0 * rng.f32() - 1.0).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

fn differences(at: &[f64], value: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    (0..at.len())
        .map(|i| {
            let moved = |by: f64| {
                let mut moved = at.to_vec();
                moved[i] += by;
                value(&moved)
            };
            (moved(step) - moved(-step)) / (2.0 * step)
        })
        .collect()
}

/// f32 noise, deviations and thresholds in the analytic gradient: 1e-6 of the largest.
fn near(name: &str, got: &[f64], want: &[f64]) {
    let most = want.iter().map(|v| v.abs()).fold(0.0, f64::max);
    assert!(most > 0.0, "{name}: nothing to compare");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= 3e-6 * most, "{name}: {i} is {got}, want {want}");
    }
}

/// Gates of `ids` and each expert's chance, of a row whose noise is known: eq. 3, 4 and 9 in f64.
fn row(clean: &[f64], raw: &[f64], normal: &[f64], epsilon: f64, ids: &[usize]) -> (Vec<f64>, Vec<f64>) {
    let deviation: Vec<f64> = raw.iter().map(|raw| raw.exp().ln_1p() + epsilon).collect();
    let noisy: Vec<f64> = (0..clean.len()).map(|e| clean[e] + normal[e] * deviation[e]).collect();
    let order = top(&noisy, ids.len() + 1);
    let chance = |e: usize| {
        let other = if ids.contains(&e) { order.get(ids.len()).copied() } else { ids.last().copied() };
        other.map_or(1.0, |other| normal_cdf((clean[e] - noisy[other]) / deviation[e]))
    };
    (softmax(&ids.iter().map(|&e| noisy[e]).collect::<Vec<_>>()), (0..clean.len()).map(chance).collect())
}

#[test]
fn both_products_by_finite_differences() {
    let mut rng = fastrand::Rng::with_seed(5);
    for (tokens, experts, top_k) in [(5, 6, 2), (3, 4, 1), (2, 3, 3)] {
        let rule = NoisyRule { top_k, noise_epsilon: 0.125, noise: NOISE };
        let (clean, raw) = (normals(&mut rng, tokens * experts), normals(&mut rng, tokens * experts));
        let gated = noisy_top_k(&clean, &raw, experts, &rule).unwrap();
        let d: Vec<f64> = (0..tokens * top_k).map(|_| rng.f64() - 0.5).collect();
        let d_load: Vec<f64> = (0..experts).map(|_| rng.f64() - 0.5).collect();
        let noise = |t: usize, e: usize| f64::from(standard_normal(NOISE.gate_word(0, t as u32, e as u32)));
        let value = |clean: &[f64], raw: &[f64]| {
            let (mut sum, mut importance, mut load) = (0.0, vec![0.0; experts], vec![0.0; experts]);
            for t in 0..tokens {
                let at = t * experts..(t + 1) * experts;
                let ids: Vec<usize> = gated.ids[t * top_k..][..top_k].iter().map(|&id| id as usize).collect();
                let normal: Vec<f64> = (0..experts).map(|e| noise(t, e)).collect();
                let (gates, chances) = row(&clean[at.clone()], &raw[at], &normal, 0.125, &ids);
                for (j, &e) in ids.iter().enumerate() {
                    sum += d[t * top_k + j] * gates[j];
                    importance[e] += gates[j];
                }
                load.iter_mut().zip(chances).for_each(|(load, chance)| *load += chance);
            }
            let extra: f64 = load.iter().zip(&d_load).map(|(load, d)| load * d).sum();
            sum + 0.5 * cv_squared(&importance) + 0.25 * cv_squared(&load) + extra
        };
        let sums = [&gated.importance[..], &gated.load[..]];
        let got =
            noisy_backward(&clean, &raw, experts, &rule, &gated.ids, &d, sums, [0.5, 0.25], Some(&d_load)).unwrap();
        let (clean, raw) = (wide(&clean), wide(&raw));
        near("clean", &got.clean, &differences(&clean, |clean| value(clean, &raw)));
        if top_k < experts || top_k > 1 {
            near("raw", &got.raw, &differences(&raw, |raw| value(&clean, raw)));
        }
    }
}

#[test]
fn both_levels_by_finite_differences() {
    let mut rng = fastrand::Rng::with_seed(6);
    let (tokens, groups, experts) = (6, 3, 4);
    let rule = |top_k| NoisyRule { top_k, noise_epsilon: 0.125, noise: NOISE };
    let (first, second) = (rule(2), rule(2));
    let inputs = [tokens * groups, tokens * groups, tokens * groups * experts, tokens * groups * experts]
        .map(|len| normals(&mut rng, len));
    let [primary_clean, primary_raw, clean, raw] = &inputs;
    let gated = hierarchical(primary_clean, primary_raw, groups, &first, clean, raw, experts, &second).unwrap();
    let d: Vec<f64> = (0..tokens * 4).map(|_| rng.f64() - 0.5).collect();
    let factors = [0.5, 0.25, 0.75, 0.3];
    let noise =
        |stream: u32, t: usize, e: usize| f64::from(standard_normal(NOISE.gate_word(stream, t as u32, e as u32)));
    let value = |at: &[Vec<f64>; 4]| {
        let [primary_clean, primary_raw, clean, raw] = at;
        let mut sum = 0.0;
        let [mut importance, mut load] = [vec![0.0; groups], vec![0.0; groups]];
        let [mut importance_all, mut inner] = [vec![0.0; groups * experts], vec![0.0; groups * experts]];
        for t in 0..tokens {
            let of = t * groups..(t + 1) * groups;
            let ids: Vec<usize> = gated.primary.ids[t * 2..][..2].iter().map(|&id| id as usize).collect();
            let normal: Vec<f64> = (0..groups).map(|g| noise(0, t, g)).collect();
            let (outer, chances) = row(&primary_clean[of.clone()], &primary_raw[of], &normal, 0.125, &ids);
            load.iter_mut().zip(chances).for_each(|(load, chance)| *load += chance);
            for (j, &group) in ids.iter().enumerate() {
                importance[group] += outer[j];
                let of = (t * groups + group) * experts..(t * groups + group + 1) * experts;
                let slots = (t * 2 + j) * 2..(t * 2 + j + 1) * 2;
                let ids: Vec<usize> =
                    gated.ids[slots.clone()].iter().map(|&id| id as usize - group * experts).collect();
                let normal: Vec<f64> = (0..experts).map(|e| noise(16 + group as u32, t, e)).collect();
                let (gates, chances) = row(&clean[of.clone()], &raw[of], &normal, 0.125, &ids);
                for ((&e, gate), d) in ids.iter().zip(&gates).zip(&d[slots]) {
                    sum += d * outer[j] * gate;
                    importance_all[group * experts + e] += outer[j] * gate;
                }
                for (e, chance) in chances.into_iter().enumerate() {
                    inner[group * experts + e] += chance / f64::from(gated.primary.counts[group]);
                }
            }
        }
        let load_all: Vec<f64> = inner.iter().enumerate().map(|(at, share)| load[at / experts] * share).collect();
        let losses = [&importance, &load, &importance_all, &load_all].map(|values| cv_squared(values));
        sum + losses.iter().zip(factors).map(|(loss, factor)| loss * factor).sum::<f64>()
    };
    let [got_first, got_second] = hierarchical_backward(
        [primary_clean, primary_raw],
        groups,
        &first,
        [clean, raw],
        experts,
        &second,
        &gated,
        &d,
        factors,
    )
    .unwrap();
    let at = inputs.each_ref().map(|values| wide(values));
    for (i, got) in [got_first.clean, got_first.raw, got_second.clean, got_second.raw].iter().enumerate() {
        let want = differences(&at[i], |moved| {
            let mut all = at.clone();
            all[i] = moved.to_vec();
            value(&all)
        });
        near(&format!("product {i}"), got, &want);
    }
}

#[test]
fn what_is_no_number_has_no_gradient() {
    let rule = NoisyRule { top_k: 1, noise_epsilon: 0.0, noise: NOISE };
    let at = |clean: [f32; 3], id| {
        let sums = [&[1.0, 2.0, 3.0][..]; 2];
        noisy_backward(&clean, &[0.5; 3], 3, &rule, &[id], &[1.0], sums, [1.0, 1.0], None).unwrap()
    };
    assert!(at([1.0, 0.0, 0.5], 0).clean.iter().any(|&d| d != 0.0));
    for got in [at([1.0, f32::NAN, 0.5], 0), at([1.0, f32::INFINITY, 0.5], 1), at([1.0, 0.0, 0.5], -1)] {
        assert_eq!(got, NoisyGradients::zeros(3));
    }
}

/// Nothing is divided by a root of the variance.
#[test]
fn balance_has_no_gradient_of_its_losses() {
    assert_eq!(slopes(&[2.0; 4], 1.0, 4), [0.0; 4]);
    assert_eq!(slopes(&[0.0; 4], 1.0, 4), [0.0; 4]);
}
