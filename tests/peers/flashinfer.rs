//! FlashInfer, `tests/moe` and `tests/model_optimizations`: DeepSeek-V3's routing, and the fused layer of plain types.
//!
//! Nothing is scaled. Skipped combinations are the suite's own: fewer choices in the kept groups than k, more kept groups than there are, groups
//! of more than 32 experts or with more than 128 kept ones.

use half::f16;
use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, MapDesc, Mlp};
use moe_kernels::rules::{Activation, Bound, Gating, Glu, Groups, Renormalise, Score, Swiglu, WeightDesc};

use crate::calls::{self, Chosen, Experts};
use crate::close::{assert_choice, assert_layer};
use crate::data::{probabilities, random_ids, rng, rounded, scores, values, wide, wide32};
use crate::formulas::{group_limited, linear, sigmoid, silu};
use crate::suite::{Peer, Section, product};
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`tests`: fused_topk_deepseek, cutlass fused MoE of f16 with its activations and expert parallel";
    Peer { name: "FlashInfer", suite, sections: vec![routing(), fused_moe()] }
}

/// Sigmoid scores, groups by their two largest biased scores, weights over their sum + 1e-20; logits and bias of two types.
fn routing() -> Section {
    let mut section = Section::new("fused_topk_deepseek");
    for ((tokens, experts), (top_k, groups)) in
        product(&product(&[1, 8, 16, 64], &[256, 384]), &product(&[1, 2, 4, 8], &[1, 2, 4, 8]))
    {
        for kept in [1, 2, 4, 8] {
            let size = experts / groups;
            let too_large = groups > 1 && (size > 32 || size * kept > 128);
            if kept * groups < top_k || kept > groups || too_large {
                continue;
            }
            for (dtype, bias_dtype) in product(&Dtype::ALL, &Dtype::ALL) {
                let name =
                    format!("n={tokens} e={experts} topk={top_k} groups={kept} of {groups} {dtype} bias {bias_dtype}");
                let point = name.clone();
                section.point(name, move || {
                    let rng = &mut rng(&point);
                    let logits = scores(rng, tokens * experts, dtype);
                    let bias: Vec<f32> =
                        normals::<f32>(rng, experts, 1.0).into_iter().map(|b| rounded(b, bias_dtype)).collect();
                    let rule = Gating::new(Score::Sigmoid)
                        .renormalise(Some(Renormalise::Plus(1e-20)))
                        .groups(Some(Groups::new(groups, kept)));
                    let chosen = calls::gate_as(dtype, &logits, experts, top_k, rule, Some(&bias), None);
                    let (logits, bias) = (wide32(&logits), wide32(&bias));
                    let score = |t: usize, e: usize| sigmoid(logits[t * experts + e]);
                    let value = |t: usize| {
                        let biased: Vec<f64> = (0..experts).map(|e| score(t, e) + bias[e]).collect();
                        group_limited(&biased, groups, kept, 2, f64::NEG_INFINITY)
                    };
                    assert_choice(&chosen, top_k, value, |t, ids| {
                        let sum: f64 = ids.iter().map(|&e| score(t, e)).sum();
                        ids.iter().map(|&e| score(t, e) / (sum + 1e-20)).collect()
                    });
                });
            }
        }
    }
    section
}

/// What stands between the products, of a gate and an up value.
#[derive(Clone, Copy, PartialEq)]
enum Unit {
    Swiglu,
    /// `(u + beta) g sigmoid(alpha g)` of clamped values, the numbers by expert.
    SwigluNumbers,
    /// `min(silu(g), 7)` times the clamped up value.
    SwigluStep,
    /// `b tanh(g/b) sigmoid(g) c tanh(u/c)`: 4 and 25, or numbers by expert.
    Situ(bool),
}

/// alpha, gate, up and beta of an expert.
fn numbers(unit: Unit, e: usize) -> [f64; 4] {
    match unit {
        Unit::SwigluNumbers => [0.5 + 0.25 * e as f64, 1.5 + 0.5 * e as f64, 1.5 + 0.5 * e as f64, e as f64],
        Unit::Situ(true) => [1.0, 5.0, 18.0, 0.0],
        Unit::Situ(false) => [1.0, 4.0, 25.0, 0.0],
        Unit::Swiglu | Unit::SwigluStep => [1.0, 7.0, 7.0, 0.0],
    }
}

impl Unit {
    fn activation(self) -> Activation {
        match self {
            Unit::Swiglu => Activation::Silu,
            // Numbers that those of the experts replace.
            Unit::SwigluNumbers => Swiglu::clamped(1.0).alpha(9.0).offset(9.0).into(),
            Unit::SwigluStep => Swiglu::clamped(7.0).clamp_after(true).into(),
            Unit::Situ(true) => Swiglu::new().gate(Bound::Softcap(1.0)).up(Bound::Softcap(1.0)).into(),
            Unit::Situ(false) => Swiglu::softcapped(4.0, 25.0).into(),
        }
    }

    fn of(self, e: usize, g: f64, u: f64) -> f64 {
        let [alpha, gate, up, beta] = numbers(self, e);
        match self {
            Unit::Swiglu => silu(g) * u,
            Unit::SwigluNumbers => {
                let (g, u) = (g.min(gate), u.clamp(-up, up));
                g * sigmoid(alpha * g) * (u + beta)
            }
            Unit::SwigluStep => silu(g).min(gate) * u.clamp(-up, up),
            Unit::Situ(_) => gate * (g / gate).tanh() * sigmoid(g) * up * (u / up).tanh(),
        }
    }
}

/// One token, 2 experts of 128 x 128, up rows before gate rows; 8 experts of which each of 4 devices has two.
fn fused_moe() -> Section {
    let mut section = Section::new("cutlass_fused_moe");
    let units = [
        ("swiglu", Unit::Swiglu),
        ("swiglu by expert", Unit::SwigluNumbers),
        ("swiglustep", Unit::SwigluStep),
        ("situ", Unit::Situ(false)),
        ("situ by expert", Unit::Situ(true)),
    ];
    for (name, unit) in units {
        section.point(name, move || fused_point(name, unit, 2, 1));
    }
    section.point("expert parallel", || fused_point("expert parallel", Unit::Swiglu, 8, 4));
    section
}

fn fused_point(name: &str, unit: Unit, experts: usize, devices: usize) {
    let (tokens, hidden, inner, top_k) = (1, 128, 128, 2);
    let rng = &mut rng(name);
    let x: Vec<f16> = values(rng, tokens * hidden);
    let gate_up: Vec<f16> = normals(rng, experts * 2 * inner * hidden, 0.2);
    let down: Vec<f16> = normals(rng, experts * hidden * inner, 0.1);
    let ids = random_ids(rng, tokens, experts, top_k);
    let chosen = Chosen { ids, weights: probabilities(rng, tokens, top_k) };
    let local = experts / devices;
    let first = WeightDesc::new(Dtype::F16).glu(Glu::UpFirst);
    let mlp = Mlp::swiglu(Dtype::F16).gate_up(first).activation(unit.activation());
    let mut got = vec![0.0; tokens * hidden];
    for device in 0..devices {
        let here = device * local..(device + 1) * local;
        let map: Vec<i32> =
            (0..experts).map(|e| if here.contains(&e) { (e - here.start) as i32 } else { -1 }).collect();
        let desc = LayerDesc::new(Dtype::F16, hidden, inner, experts, top_k)
            .mlp(mlp)
            .map((devices > 1).then(|| MapDesc::new(local)));
        let layer = Experts {
            desc,
            x: &x,
            chosen: &chosen,
            gate_up: &gate_up[here.start * 2 * inner * hidden..here.end * 2 * inner * hidden],
            gate_up_bias: None,
            down: &down[here.start * hidden * inner..here.end * hidden * inner],
            down_bias: None,
            map: (devices > 1).then_some(&map[..]),
        };
        let of: Vec<[f32; 4]> = here.map(|e| numbers(unit, e).map(|v| v as f32)).collect();
        let by_expert: Vec<Vec<f32>> = (0..4).map(|i| of.iter().map(|of| of[i]).collect()).collect();
        let numbers = match unit {
            Unit::SwigluNumbers => [0, 1, 2, 3].map(|i| Some(&by_expert[i][..])),
            Unit::Situ(true) => [None, Some(&by_expert[1][..]), Some(&by_expert[2][..]), None],
            _ => [None; 4],
        };
        let part = wide(&layer.run_with(numbers));
        got.iter_mut().zip(part).for_each(|(y, part)| *y += part);
    }
    let (x, gate_up, down) = (wide(&x), wide(&gate_up), wide(&down));
    let mut want = vec![0.0; tokens * hidden];
    for (slot, (&id, &w)) in chosen.ids.iter().zip(&chosen.weights).enumerate() {
        let (t, e) = (slot / top_k, id as usize);
        let first = linear(&x[t * hidden..][..hidden], &gate_up[e * 2 * inner * hidden..][..2 * inner * hidden]);
        let (up, gate) = first.split_at(inner);
        let h: Vec<f64> = gate.iter().zip(up).map(|(&g, &u)| unit.of(e, g, u)).collect();
        let out = linear(&h, &down[e * hidden * inner..][..hidden * inner]);
        want[t * hidden..][..hidden].iter_mut().zip(out).for_each(|(y, out)| *y += f64::from(w) * out);
    }
    assert_layer(&got, &want, Dtype::F16);
}
