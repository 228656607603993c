//! Tutel, `tests/test_tutel.py`: what its layer computes in a step, forward, and its losses.
//!
//! Scaled down: 16 sequences of 512 tokens to 64 tokens, 2048 x 2048 matrices to 64 x 64. The suite compares losses of training step by step; here
//! the layer's output is compared, from which they come.

use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp};
use moe_kernels::routers::cosine::CosineDesc;
use moe_kernels::rules::{
    Activation, AdmissionRule, BalanceRule, Gating, LossCounts, LossScore, Order, Renormalise, Score,
};

use crate::calls::{self, Experts};
use crate::close::{assert_choice, assert_layer, assert_norm};
use crate::data::{rng, scores, values, wide, wide32, with_type};
use crate::formulas::{erf, linear, order, relu, softmax};
use crate::suite::{Peer, Section, product};
use crate::support::compare::Storage;
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`tests/test_tutel.py`, with the capacities, orders, losses and cosine gate of `tutel/impls`";
    Peer { name: "Tutel", suite, sections: vec![helloworld(), capacities(), losses(), cosine_gate()] }
}

fn helloworld() -> Section {
    let mut section = Section::new("helloworld");
    for (top_k, (dtype, experts)) in product(&[1, 2], &product(&[Dtype::F32, Dtype::F16], &[1, 2])) {
        let name = format!("top={top_k} {dtype} experts={experts}");
        let point = name.clone();
        section.point(name, move || with_type!(dtype, T => layer_point::<T>(&point, experts, top_k, 1.0, false)));
    }
    section
}

/// Other capacity factors, none, and tokens by their largest gate first.
fn capacities() -> Section {
    let mut section = Section::new("capacities");
    for (factor, prioritised) in product(&[0.0, 0.5, 1.0, 2.0], &[false, true]) {
        let name = format!("factor={factor} prioritised={prioritised}");
        let point = name.clone();
        section.point(name, move || layer_point::<f32>(&point, 8, 2, factor, prioritised));
    }
    section
}

/// Top-k of the softmax, over their sum if there are several; all first choices are placed before all second ones; what an expert has no place for is
/// dropped.
fn layer_point<T: Storage>(name: &str, experts: usize, top: usize, factor: f64, prioritised: bool) {
    let (tokens, width, inner) = (64, 64, 64);
    let top_k = top.min(experts);
    let rng = &mut rng(name);
    let x: Vec<T> = values(rng, tokens * width);
    let up: Vec<T> = normals(rng, experts * inner * width, 0.1);
    let up_bias: Vec<T> = normals(rng, experts * inner, 0.1);
    let down: Vec<T> = normals(rng, experts * width * inner, 0.1);
    let down_bias: Vec<T> = normals(rng, experts * width, 0.1);
    let logits = scores(rng, tokens * experts, T::DTYPE);
    let rule = Gating::new(Score::Softmax).renormalise((top_k > 1).then_some(Renormalise::AtLeast(f32::EPSILON)));
    let chosen = calls::gate(&logits, experts, top_k, rule, None);
    let gates: Vec<Vec<f64>> = wide32(&logits).chunks(experts).map(softmax).collect();

    let capacity = if factor > 0.0 { top_k * (factor * tokens.div_ceil(experts) as f64) as usize } else { tokens };
    let admission =
        AdmissionRule::new(experts, top_k, capacity, tokens).order(Order::ByChoice).prioritised(prioritised);
    let priority = |t: usize| gates[t].iter().copied().fold(0.0, f64::max);
    // Who is placed, by the suite's own count of places.
    let sequence: Vec<usize> =
        if prioritised { order(&(0..tokens).map(priority).collect::<Vec<_>>()) } else { (0..tokens).collect() };
    let mut taken = vec![0; experts];
    let mut kept = vec![false; tokens * top_k];
    for j in 0..top_k {
        for &t in &sequence {
            let e = chosen.ids[t * top_k + j] as usize;
            kept[t * top_k + j] = taken[e] < capacity;
            taken[e] += 1;
        }
    }
    let top: Vec<f32> = (0..tokens).map(|t| priority(t) as f32).collect();
    let admitted = calls::admit_by(&chosen, admission, prioritised.then_some(&top[..]));
    for (slot, &kept) in kept.iter().enumerate() {
        assert_eq!(admitted.ids[slot], if kept { chosen.ids[slot] } else { -1 }, "slot {slot}");
    }

    let desc =
        LayerDesc::new(T::DTYPE, width, inner, experts, top_k).mlp(Mlp::relu(T::DTYPE).activation(Activation::Relu));
    let layer = Experts {
        desc,
        x: &x,
        chosen: &admitted,
        gate_up: &up,
        gate_up_bias: Some(&up_bias),
        down: &down,
        down_bias: Some(&down_bias),
        map: None,
    };
    let got = wide(&layer.run());
    let [x, up, up_bias, down, down_bias] = [&x, &up, &up_bias, &down, &down_bias].map(|values| wide(values));
    let mut want = vec![0.0; tokens * width];
    for (slot, _) in kept.iter().enumerate().filter(|(_, kept)| **kept) {
        let (t, e) = (slot / top_k, chosen.ids[slot] as usize);
        let of: f64 = chosen.ids[t * top_k..][..top_k].iter().map(|&id| gates[t][id as usize]).sum();
        let weight = if top_k > 1 { gates[t][e] / of.max(f64::from(f32::EPSILON)) } else { gates[t][e] };
        let h = linear(&x[t * width..][..width], &up[e * inner * width..][..inner * width]);
        let h: Vec<f64> = h.iter().zip(&up_bias[e * inner..]).map(|(h, b)| relu(h + b)).collect();
        let out = linear(&h, &down[e * width * inner..][..width * inner]);
        for n in 0..width {
            want[t * width + n] += weight * (out[n] + down_bias[e * width + n]);
        }
    }
    assert_layer(&got, &want, T::DTYPE);
}

/// `E / T^2 sum_e (sum_t gate) (first choices)`: the loss of GShard.
fn losses() -> Section {
    let mut section = Section::new("losses");
    for (experts, top_k) in product(&[2, 8, 64], &[1, 2]) {
        let name = format!("gshard e={experts} top={top_k}");
        let point = name.clone();
        section.point(name, move || {
            let tokens = 64;
            let logits = scores(&mut rng(&point), tokens * experts, Dtype::F32);
            let rule = BalanceRule::new(LossScore::Softmax, tokens).counts(LossCounts::FirstChoice);
            let got = calls::measure(&logits, experts, top_k, Gating::new(Score::Softmax), rule, None);
            let gates: Vec<Vec<f64>> = wide32(&logits).chunks(experts).map(softmax).collect();
            let (mut sums, mut firsts) = (vec![0.0; experts], vec![0.0; experts]);
            for gates in &gates {
                sums.iter_mut().zip(gates).for_each(|(sum, gate)| *sum += gate);
                firsts[order(gates)[0]] += 1.0;
            }
            let sum: f64 = sums.iter().zip(&firsts).map(|(a, b)| a * b).sum();
            let want = sum * experts as f64 / (tokens * tokens) as f64;
            assert!((f64::from(got.stats.balance_loss) - want).abs() <= 1e-5 * want);
        });
    }
    for (experts, top_k) in product(&[2, 8, 64], &[1, 2]) {
        let name = format!("load importance e={experts} top={top_k}");
        let point = name.clone();
        section.point(name, move || load_importance_point(&point, experts, top_k, 1.0));
    }
    section
}

/// Normal noise of `gate_noise / E` joins the logits that choose; the loss is of the softmax without it, and of the chance that noise lifts each
/// share above the last chosen logit.
fn load_importance_point(name: &str, experts: usize, top_k: usize, gate_noise: f32) {
    let tokens = 64;
    let rng = &mut rng(name);
    let clean = scores(rng, tokens * experts, Dtype::F32);
    let deviation = gate_noise / experts as f32;
    let noise: Vec<f32> = normals(rng, tokens * experts, deviation.into());
    let noisy: Vec<f32> = clean.iter().zip(&noise).map(|(l, n)| l + n).collect();
    let chosen = calls::gate(&noisy, experts, top_k, Gating::new(Score::Softmax), None);
    let shares: Vec<f32> = wide32(&clean).chunks(experts).flat_map(softmax).map(|share| share as f32).collect();
    let got = calls::load_importance(&shares, &noisy, &chosen.ids, experts, deviation);

    let (mut importance, mut load) = (vec![0.0; experts], vec![0.0; experts]);
    for (shares, noisy) in wide32(&shares).chunks(experts).zip(wide32(&noisy).chunks(experts)) {
        let last = noisy[order(noisy)[top_k - 1]];
        for (e, share) in shares.iter().enumerate() {
            importance[e] += share;
            let z = (share - last) / f64::from(deviation);
            load[e] += 0.5 * (1.0 + erf(z * std::f64::consts::FRAC_1_SQRT_2));
        }
    }
    let spread = |values: &[f64]| {
        let mean = values.iter().sum::<f64>() / experts as f64;
        let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (experts as f64 - 1.0);
        variance / (mean * mean + 1e-10)
    };
    let want = (spread(&importance) + spread(&load)) / 2.0;
    assert!((f64::from(got) - want).abs() <= 1e-4 * want + 1e-9, "{got:e}, want {want:e}");
}

/// Logits are cosines of a projected token and a column of each expert, times `exp(min(temperature, ln 100))`, at first 2.
fn cosine_gate() -> Section {
    let mut section = Section::new("cosine_gate");
    for top_k in [1, 2] {
        let name = format!("top={top_k}");
        let point = name.clone();
        section.point(name, move || {
            let (tokens, width, projected, experts) = (64, 64, 256, 8);
            let rng = &mut rng(&point);
            let x: Vec<f32> = values(rng, tokens * width);
            let projector: Vec<f32> = normals(rng, projected * width, 0.1);
            let bias: Vec<f32> = normals(rng, projected, 0.1);
            // One row an expert.
            let sim: Vec<f32> = normals(rng, experts * projected, 0.01);
            let scale = 100.0f32.ln().min(2.0f32.ln()).exp();
            let desc = CosineDesc::new(Dtype::F32, tokens, width, projected, experts);
            let logits = calls::cosine(desc, &x, &projector, &bias, &sim);
            let chosen = calls::gate(&logits, experts, top_k, Gating::new(Score::Softmax), None);

            let [x, projector, bias, sim] = [&x, &projector, &bias, &sim].map(|values| wide32(values));
            let unit = |v: &[f64]| -> Vec<f64> {
                let norm = v.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
                v.iter().map(|v| v / norm).collect()
            };
            let sims: Vec<f64> = sim.chunks(projected).flat_map(unit).collect();
            let cosines: Vec<f64> = x
                .chunks(width)
                .flat_map(|x| {
                    let p: Vec<f64> = linear(x, &projector).iter().zip(&bias).map(|(p, b)| p + b).collect();
                    linear(&unit(&p), &sims)
                })
                .collect();
            let want: Vec<f64> = cosines.iter().map(|c| f64::from(scale) * c).collect();
            assert_norm(&wide32(&logits), &want, 1e-5);
            let gates = |t: usize| softmax(&wide32(&logits)[t * experts..][..experts]);
            assert_choice(&chosen, top_k, gates, |t, ids| ids.iter().map(|&e| gates(t)[e]).collect());
        });
    }
    section
}
