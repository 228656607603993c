//! The gradient of sampled routing's logits.

use crate::reference::gating::softmax;
use crate::reference::{ReferenceError, require, require_shape};
use crate::rules::SamplingRule;

/// Gradients of what [`super::gumbel_top_k`] yields, each where there is one.
#[derive(Clone, Copy, Debug, Default)]
pub struct SampledUpstream<'a> {
    /// `[T,k]`, of the probabilities of what was drawn: the draw is constant (straight-through).
    pub weights: Option<&'a [f64]>,
    /// `[T,k]`, of the logarithms of the draws (the score function: Williams 1992).
    pub log_probabilities: Option<&'a [f64]>,
    /// `[T]`, of the entropies.
    pub entropy: Option<&'a [f64]>,
}

/// `[T,E]`: with `s = beta l`, `p = softmax(s)` and `L_j` what is left before draw j,
/// `dp_i/ds_e = p_i ([i = e] - p_e)`, `dlog_j/ds_e = [e = i_j] - [e in L_j] p_e / p(L_j)`, `dH/ds_e = -p_e (ln p_e + H)`.
///
/// A token of which an id is no expert's is padding; a row with NaN or +Inf, or nothing above -Inf, has no gradient.
///
/// # Errors
/// Lengths that do not fit.
pub fn sampled_backward(
    logits: &[f32],
    ids: &[i32],
    experts: usize,
    rule: &SamplingRule,
    upstream: SampledUpstream<'_>,
) -> Result<Vec<f64>, ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    let (tokens, top_k) = (logits.len() / experts, rule.top_k);
    require_shape("logits", logits, &[tokens, experts])?;
    require_shape("ids", ids, &[tokens, top_k])?;
    for (name, values, each) in [
        ("weights", upstream.weights, top_k),
        ("log_probabilities", upstream.log_probabilities, top_k),
        ("entropy", upstream.entropy, 1),
    ] {
        if let Some(values) = values {
            require_shape(name, values, &[tokens, each])?;
        }
    }
    let mut gradient = vec![0.0; logits.len()];
    for t in 0..tokens {
        let scaled: Vec<f64> =
            logits[t * experts..][..experts].iter().map(|&l| f64::from(l * rule.inverse_temperature)).collect();
        let number = |&id: &i32| usize::try_from(id).ok().filter(|&id| id < experts);
        let drawn: Option<Vec<usize>> = ids[t * top_k..][..top_k].iter().map(number).collect();
        let sound = scaled.iter().all(|&s| s < f64::INFINITY) && scaled.iter().any(|&s| s > f64::NEG_INFINITY);
        let Some(drawn) = drawn.filter(|_| sound) else { continue };
        let ds = row(&scaled, &drawn, t, top_k, upstream);
        let to = &mut gradient[t * experts..][..experts];
        to.iter_mut().zip(ds).for_each(|(to, d)| *to = f64::from(rule.inverse_temperature) * d);
    }
    Ok(gradient)
}

fn row(scaled: &[f64], drawn: &[usize], token: usize, top_k: usize, upstream: SampledUpstream<'_>) -> Vec<f64> {
    let policy = softmax(scaled);
    let mut ds = vec![0.0; scaled.len()];
    for (j, &chosen) in drawn.iter().enumerate() {
        if let Some(d) = upstream.weights.map(|d| d[token * top_k + j]) {
            ds[chosen] += d * policy[chosen];
            ds.iter_mut().zip(&policy).for_each(|(sum, p)| *sum -= d * policy[chosen] * p);
        }
        if let Some(d) = upstream.log_probabilities.map(|d| d[token * top_k + j]) {
            let left = |e: usize| if drawn[..j].contains(&e) { f64::NEG_INFINITY } else { scaled[e] };
            let rest = softmax(&(0..scaled.len()).map(left).collect::<Vec<_>>());
            ds[chosen] += d;
            ds.iter_mut().zip(&rest).filter(|(_, p)| p.is_finite()).for_each(|(sum, p)| *sum -= d * p);
        }
    }
    if let Some(d) = upstream.entropy.map(|d| d[token]) {
        let entropy = super::entropy(&policy);
        let of = |p: f64| if p == 0.0 { 0.0 } else { p * (p.ln() + entropy) };
        ds.iter_mut().zip(&policy).for_each(|(sum, &p)| *sum -= d * of(p));
    }
    ds
}

#[cfg(test)]
mod tests {
    use super::super::{entropy, gumbel_top_k, log_sum_exp};
    use super::*;
    use crate::rules::NoiseSource;

    /// The policy's logits are rounded to f32 where the temperature is no power of two.
    const RULE: SamplingRule =
        SamplingRule { top_k: 3, inverse_temperature: 0.5, noise: NoiseSource { seed: 4, offset: 1 } };

    #[test]
    fn all_three_by_finite_differences() {
        let mut rng = fastrand::Rng::with_seed(8);
        let (tokens, experts) = (4, 6);
        let logits: Vec<f32> = (0..tokens * experts).map(|_| 4.0 * rng.f32() - 2.0).collect();
        let ids = gumbel_top_k(&logits, experts, &RULE).unwrap().ids;
        let mut random = |len: usize| (0..len).map(|_| rng.f64() - 0.5).collect::<Vec<f64>>();
        let (dw, dlog, dh) = (random(tokens * 3), random(tokens * 3), random(tokens));
        let value = |logits: &[f64]| {
            let mut sum = 0.0;
            for t in 0..tokens {
                let s: Vec<f64> = logits[t * experts..][..experts].iter().map(|l| 0.5 * l).collect();
                let p = softmax(&s);
                let mut left: Vec<usize> = (0..experts).collect();
                for j in 0..3 {
                    let e = ids[t * 3 + j] as usize;
                    sum += dw[t * 3 + j] * p[e];
                    sum += dlog[t * 3 + j] * (s[e] - log_sum_exp(left.iter().map(|&other| s[other])));
                    left.retain(|&other| other != e);
                }
                sum += dh[t] * entropy(&p);
            }
            sum
        };
        let upstream = SampledUpstream { weights: Some(&dw), log_probabilities: Some(&dlog), entropy: Some(&dh) };
        let got = sampled_backward(&logits, &ids, experts, &RULE, upstream).unwrap();
        let at: Vec<f64> = logits.iter().map(|&l| l.into()).collect();
        for (i, &got) in got.iter().enumerate() {
            let moved = |by: f64| {
                let mut moved = at.clone();
                moved[i] += by;
                value(&moved)
            };
            let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((got - want).abs() < 1e-8, "{i}: {got}, want {want}");
        }
    }

    /// Its mean over draws is the gradient of the expected reward: 2 experts, reward 1 for the first.
    #[test]
    fn the_score_function_is_unbiased() {
        let p = 1.0 / (1.0 + (-0.5f64).exp());
        let rule = SamplingRule { top_k: 1, inverse_temperature: 1.0, ..RULE };
        let of = |id: i32| {
            let reward = [if id == 0 { 1.0 } else { 0.0 }];
            let upstream = SampledUpstream { log_probabilities: Some(&reward), ..SampledUpstream::default() };
            sampled_backward(&[0.5, 0.0], &[id], 2, &rule, upstream).unwrap()[0]
        };
        let mean = p * of(0) + (1.0 - p) * of(1);
        assert!((mean - p * (1.0 - p)).abs() < 1e-12, "{mean}");
    }

    #[test]
    fn padding_and_garbage_have_none() {
        let d = [1.0; 3];
        let upstream = SampledUpstream { weights: Some(&d), ..SampledUpstream::default() };
        let at = |logits: &[f32], ids: &[i32]| sampled_backward(logits, ids, 3, &RULE, upstream).unwrap();
        assert_eq!(at(&[0.0, f32::NAN, 1.0], &[0, 1, 2]), [0.0; 3]);
        assert_eq!(at(&[0.0, 2.0, 1.0], &[-1, -1, -1]), [0.0; 3]);
    }
}
