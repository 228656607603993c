//! The weights of the chosen.

use super::Inputs;
use super::scores::{ln_sigmoid, mixed, scores, softmax};
use crate::rules::{Gating, Renormalise, Score};

/// Weights of `ids`, then of the appended columns. None is no expert: 0, in no sum.
pub(super) fn weigh(
    logits: &[f64],
    appended: &[f64],
    ids: &[Option<usize>],
    rule: &Gating,
    inputs: &Inputs<'_>,
) -> Vec<f64> {
    let logit_of = |id: &Option<usize>| id.map(|id| logits[id]);
    // What is weighed together: the logits of the experts that there are.
    let chosen: Vec<f64> = ids.iter().filter_map(logit_of).chain(appended.iter().copied()).collect();
    let jointly = !appended.is_empty() && rule.renormalise == Some(Renormalise::Plus(0.0));
    let mut weights = match rule.score {
        Score::Softmax => {
            let scores = scores(rule.score, logits);
            ids.iter().flatten().map(|&id| scores[id]).collect()
        }
        Score::TopkSoftmax => softmax(&chosen),
        // exp(ln sigmoid - ln sum sigmoid), which stays a number where all sigmoids vanish.
        Score::Sigmoid if jointly => softmax(&chosen.iter().map(|&logit| ln_sigmoid(logit)).collect::<Vec<_>>()),
        Score::Sigmoid | Score::SqrtSoftplus => scores(rule.score, &chosen),
        Score::SparseMixer => {
            let out = |j: usize| if j == 0 { None } else { ids[0] };
            let there = ids.iter().enumerate().filter_map(|(j, id)| Some((j, (*id)?)));
            there.map(|(j, id)| mixed(logits, out(j), id, rule.jitter)).collect()
        }
    };
    if let Some(renormalise) = rule.renormalise {
        let divisor = divisor(&weights, renormalise);
        weights.iter_mut().for_each(|weight| *weight /= divisor);
    }
    let factor = f64::from(rule.scale) * inputs.global_scale.unwrap_or(1.0);
    let mut weights = weights.into_iter().map(|weight| weight * factor);
    let scale = |id: usize| inputs.expert_scale.map_or(1.0, |scale| scale[id]);
    let routed = ids.iter().map(|id| id.map_or(0.0, |id| weights.next().unwrap_or(f64::NAN) * scale(id)));
    let mut all: Vec<f64> = routed.collect();
    all.extend(weights);
    all
}

fn divisor(weights: &[f64], renormalise: Renormalise) -> f64 {
    let sum = weights.iter().sum::<f64>();
    match renormalise {
        Renormalise::Plus(epsilon) => sum + f64::from(epsilon),
        // NaN stays NaN, which f64::max would drop.
        Renormalise::AtLeast(epsilon) if sum < f64::from(epsilon) => epsilon.into(),
        Renormalise::AtLeast(_) => sum,
        Renormalise::PNorm(_) if !sum.is_finite() => sum,
        Renormalise::PNorm(f32::INFINITY) => weights.iter().copied().fold(0.0, f64::max),
        Renormalise::PNorm(p) => {
            // Relative to the largest, so that no power of it leaves the range of f64.
            let (p, largest) = (f64::from(p), weights.iter().copied().fold(0.0, f64::max));
            largest * weights.iter().map(|weight| (weight / largest).powf(p)).sum::<f64>().powf(1.0 / p)
        }
    }
}
