//! transformers, `tests/models`: the MoE layers of its model testers, with their sizes, and their load-balancing loss.
//!
//! Nothing is scaled: 13 sequences of 7 tokens, 32 wide. The suite compares a model with itself; here each layer is compared with its model's
//! formula.

use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouterWeights, SharedDesc, SharedWeights,
};
use moe_kernels::rules::{Activation, BalanceRule, Gating, GroupScore, Groups, LossScore, Masked, Renormalise, Score};
use moe_kernels::{Dtype, In, Workspace};

use crate::calls::{self, down, junk, up, weight};
use crate::close::assert_layer;
use crate::data::{rng, values, wide, wide32, with_type};
use crate::formulas::{gelu, group_limited, linear, order, sigmoid, silu, softmax};
use crate::suite::{Peer, Section, product};
use crate::support::compare::Storage;
use crate::support::device;
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`tests/models`: the layers of 13 model testers, test_load_balancing_loss";
    Peer { name: "transformers", suite, sections: vec![layers(), load_balancing_loss()] }
}

const TOKENS: usize = 13 * 7;
const HIDDEN: usize = 32;

/// How a model scores, chooses and weighs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Router {
    /// Softmax, the k largest as they are.
    Softmax,
    /// Over their sum.
    SoftmaxOverSum,
    /// Softmax with a correction bias for the choice; over at least 1e-12.
    Ernie,
    /// Softmax of the k largest logits.
    OfChosen,
    /// Sigmoid with a correction bias; over the sum + 1e-20, times a scale; groups, of which so many are kept, the others' values 0.
    Sigmoid { groups: usize, kept: usize, scale: f32 },
    /// Each choice by a softmax over what is within a relative distance of the largest logit; the first is out of the second's.
    SparseMixer,
}

/// A model tester's layer.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    router: Router,
    experts: usize,
    top_k: usize,
    inner: usize,
    activation: Unit,
    /// Width of a shared expert, and whether it has a gate.
    shared: Option<(usize, bool)>,
}

/// Between an expert's two products.
#[derive(Clone, Copy, PartialEq)]
enum Unit {
    Gelu,
    Silu,
    /// `(up + 1) g sigmoid(1.702 g)` of clamped values, gate and up rows in turn, biases everywhere.
    GptOss,
}

impl Unit {
    fn of(self, g: f64, u: f64) -> f64 {
        match self {
            Unit::Gelu => gelu(g) * u,
            Unit::Silu => silu(g) * u,
            Unit::GptOss => {
                let (g, u) = (g.min(7.0), u.clamp(-7.0, 7.0));
                (u + 1.0) * g * sigmoid(1.702 * g)
            }
        }
    }
}

const MODELS: [Model; 13] = {
    use Router::{Ernie, OfChosen, Sigmoid, Softmax, SoftmaxOverSum, SparseMixer};
    use Unit::{Gelu, GptOss, Silu};
    const fn model(name: &'static str, router: Router, [experts, top_k, inner]: [usize; 3], activation: Unit) -> Model {
        Model { name, router, experts, top_k, inner, activation, shared: None }
    }
    const fn with(model: Model, width: usize, gated: bool) -> Model {
        Model { shared: Some((width, gated)), ..model }
    }
    let one_group = Sigmoid { groups: 1, kept: 1, scale: 1.0 };
    [
        model("mixtral", SoftmaxOverSum, [2, 2, 37], Gelu),
        model("olmoe", Softmax, [8, 2, 16], Silu),
        with(model("qwen2_moe", Softmax, [8, 2, 12], Gelu), 36, true),
        model("qwen3_moe", Softmax, [8, 2, 12], Gelu),
        with(model("qwen3_next", SoftmaxOverSum, [8, 2, 12], Gelu), 36, true),
        with(model("deepseek_v2", Softmax, [8, 2, 12], Gelu), 24, false),
        with(model("deepseek_v3", Sigmoid { groups: 2, kept: 1, scale: 2.5 }, [8, 8, 16], Silu), 16, false),
        with(model("glm4_moe", one_group, [8, 8, 12], Gelu), 12, false),
        with(model("ernie4_5_moe", Ernie, [64, 6, 12], Gelu), 24, false),
        model("granitemoe", OfChosen, [8, 2, 37], Silu),
        model("jamba", Softmax, [2, 2, 37], Gelu),
        model("phimoe", SparseMixer, [2, 2, 37], Gelu),
        model("gpt_oss", OfChosen, [128, 2, 37], GptOss),
    ]
};

impl Router {
    fn rule(self) -> Gating {
        match self {
            Router::Softmax => Gating::new(Score::Softmax),
            Router::SoftmaxOverSum => Gating::new(Score::Softmax).renormalised(),
            Router::Ernie => Gating::new(Score::Softmax).renormalise(Some(Renormalise::AtLeast(1e-12))),
            Router::OfChosen => Gating::new(Score::TopkSoftmax),
            Router::Sigmoid { groups, kept, scale } => Gating::new(Score::Sigmoid)
                .renormalise(Some(Renormalise::Plus(1e-20)))
                .scale(scale)
                .groups(Some(Groups::new(groups, kept).score(GroupScore::TOP_TWO).masked(Masked::Zero))),
            Router::SparseMixer => Gating::new(Score::SparseMixer).jitter(0.01),
        }
    }

    fn is_biased(self) -> bool {
        matches!(self, Router::Ernie | Router::Sigmoid { .. })
    }

    /// Experts and weights of a token.
    fn choose(self, logits: &[f64], bias: &[f64], top_k: usize) -> Vec<(usize, f64)> {
        let biased = |scores: &[f64]| -> Vec<f64> { scores.iter().zip(bias).map(|(s, b)| s + b).collect() };
        let of = |values: &[f64], scores: &[f64]| -> Vec<(usize, f64)> {
            order(values)[..top_k].iter().map(|&e| (e, scores[e])).collect()
        };
        let over = |chosen: Vec<(usize, f64)>, divide: &dyn Fn(f64) -> f64| -> Vec<(usize, f64)> {
            let by = divide(chosen.iter().map(|(_, w)| w).sum());
            chosen.into_iter().map(|(e, w)| (e, w / by)).collect()
        };
        match self {
            Router::Softmax => of(logits, &softmax(logits)),
            Router::SoftmaxOverSum => over(of(logits, &softmax(logits)), &|sum| sum),
            Router::Ernie => {
                let scores = softmax(logits);
                over(of(&biased(&scores), &scores), &|sum| sum.max(1e-12))
            }
            Router::OfChosen => {
                let chosen: Vec<usize> = order(logits)[..top_k].to_vec();
                let weights = softmax(&chosen.iter().map(|&e| logits[e]).collect::<Vec<_>>());
                chosen.into_iter().zip(weights).collect()
            }
            Router::Sigmoid { groups, kept, scale } => {
                let scores: Vec<f64> = logits.iter().map(|&l| sigmoid(l)).collect();
                let values = group_limited(&biased(&scores), groups, kept, 2, 0.0);
                over(of(&values, &scores), &|sum| (sum + 1e-20) / f64::from(scale))
            }
            Router::SparseMixer => {
                let mut left = logits.to_vec();
                (0..top_k)
                    .map(|_| {
                        let best = order(&left)[0];
                        // What lies further from the largest, of what is left, than twice the jitter relative to its own size.
                        let far = |l: f64| (left[best] - l) / l.abs().max(left[best]) > 0.02;
                        let near: Vec<f64> = left.iter().map(|&l| if far(l) { f64::NEG_INFINITY } else { l }).collect();
                        let share = softmax(&near)[best];
                        left[best] = f64::NEG_INFINITY;
                        (best, share)
                    })
                    .collect()
            }
        }
    }
}

fn layers() -> Section {
    let mut section = Section::new("layers");
    for (model, dtype) in product(&MODELS, &[Dtype::F32, Dtype::F16, Dtype::Bf16]) {
        let name = format!("{} {dtype}", model.name);
        section.point(name, move || with_type!(dtype, T => layer_point::<T>(&model)));
    }
    section
}

/// Weights of one kind of expert: `[E, 2I, H]`, `[E, H, I]`, and their biases.
struct Matrices<T> {
    gate_up: Vec<T>,
    gate_up_bias: Vec<T>,
    down: Vec<T>,
    down_bias: Vec<T>,
    inner: usize,
    unit: Unit,
}

impl<T: Storage> Matrices<T> {
    fn draw(rng: &mut fastrand::Rng, experts: usize, inner: usize, unit: Unit) -> Matrices<T> {
        Matrices {
            gate_up: normals(rng, experts * 2 * inner * HIDDEN, 0.2),
            gate_up_bias: normals(rng, experts * 2 * inner, 0.2),
            down: normals(rng, experts * HIDDEN * inner, 0.2),
            down_bias: normals(rng, experts * HIDDEN, 0.2),
            inner,
            unit,
        }
    }

    /// An expert's output for a token.
    fn output(&self, e: usize, x: &[f64]) -> Vec<f64> {
        let (inner, size) = (self.inner, 2 * self.inner);
        let interleaved = self.unit == Unit::GptOss;
        let at = |row: usize, k: usize| -> f64 {
            // gpt-oss keeps [H, 2I].
            let i = if interleaved { k * size + row } else { row * HIDDEN + k };
            self.gate_up[e * size * HIDDEN + i].into()
        };
        let mut first: Vec<f64> = (0..size).map(|row| (0..HIDDEN).map(|k| at(row, k) * x[k]).sum()).collect();
        if interleaved {
            first.iter_mut().zip(&self.gate_up_bias[e * size..]).for_each(|(v, &b)| *v += b.into());
        }
        let pair = |i: usize| if interleaved { (first[2 * i], first[2 * i + 1]) } else { (first[i], first[inner + i]) };
        let h: Vec<f64> = (0..inner).map(|i| self.unit.of(pair(i).0, pair(i).1)).collect();
        let at = |row: usize, k: usize| -> f64 {
            let i = if interleaved { k * HIDDEN + row } else { row * inner + k };
            self.down[e * HIDDEN * inner + i].into()
        };
        let bias = |row: usize| if interleaved { self.down_bias[e * HIDDEN + row].into() } else { 0.0 };
        (0..HIDDEN).map(|row| (0..inner).map(|k| at(row, k) * h[k]).sum::<f64>() + bias(row)).collect()
    }
}

fn layer_point<T: Storage>(model: &Model) {
    let Model { experts, top_k, inner, activation, shared, router, .. } = *model;
    let dtype = T::DTYPE;
    let rng = &mut rng(model.name);
    let x: Vec<T> = values(rng, TOKENS * HIDDEN);
    let gate: Vec<T> = normals(rng, experts * HIDDEN, 0.3);
    let router_bias: Option<Vec<f32>> = (activation == Unit::GptOss).then(|| normals(rng, experts, 0.3));
    let correction: Option<Vec<f32>> = router.is_biased().then(|| normals(rng, experts, 0.1));
    let routed = Matrices::<T>::draw(rng, experts, inner, activation);
    let common = shared.map(|(width, _)| Matrices::<T>::draw(rng, 1, width, activation));
    let shared_gate: Option<Vec<T>> = shared.filter(|(_, gated)| *gated).map(|_| normals(rng, HIDDEN, 0.3));

    let mlp = match activation {
        Unit::Gelu => Mlp::swiglu(dtype).activation(Activation::Gelu),
        Unit::Silu => Mlp::swiglu(dtype),
        Unit::GptOss => Mlp::gpt_oss(dtype),
    };
    let of_shared = shared.map(|(width, gated)| SharedDesc::new(width, mlp).gated(gated));
    let desc = LayerDesc::new(dtype, HIDDEN, inner, experts, top_k).gating(router.rule()).mlp(mlp).shared(of_shared);
    let (kernels, stream) = (device::kernels(), device::stream());
    let plan = desc.plan(TOKENS, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let lift = |values: &[T]| up(&stream, values);
    let (x_up, gate_up) = (lift(&x), lift(&gate));
    let biases = [&router_bias, &correction].map(|bias| bias.as_ref().map(|bias| up(&stream, bias)));
    let matrices = |of: &Matrices<T>| {
        let biased = of.unit == Unit::GptOss;
        let bias = |values: &[T]| biased.then(|| lift(values));
        (lift(&of.gate_up), bias(&of.gate_up_bias), lift(&of.down), bias(&of.down_bias))
    };
    let (of_routed, of_common) = (matrices(&routed), common.as_ref().map(matrices));
    let shared_gate_up = shared_gate.as_ref().map(|gate| lift(gate));
    let mut router_weights = RouterWeights::new(&gate_up);
    router_weights.bias = biases[0].as_ref().map(In::from);
    router_weights.correction_bias = biases[1].as_ref().map(In::from);
    let mut expert_weights = ExpertWeights::new(weight(&of_routed.0, &of_routed.1), weight(&of_routed.2, &of_routed.3));
    if let Some(of) = &of_common {
        let mut of = SharedWeights::new(weight(&of.0, &of.1), weight(&of.2, &of.3));
        if let Some(gate) = &shared_gate_up {
            of = of.gate(gate);
        }
        expert_weights = expert_weights.shared(of);
    }
    let weights = LayerWeights::new(router_weights, expert_weights);
    let mut y = junk::<T>(&stream, TOKENS * HIDDEN);
    plan.forward(kernels, &stream, &weights, LayerArgs::new(&x_up, &mut y), &mut workspace).unwrap();
    let got = wide(&down(&stream, &y, TOKENS * HIDDEN));

    let (x, gate) = (wide(&x), wide(&gate));
    let [router_bias, correction] =
        [&router_bias, &correction].map(|bias| bias.as_ref().map_or(vec![0.0; experts], |bias| wide32(bias)));
    let mut want = vec![];
    for x in x.chunks(HIDDEN) {
        let logits: Vec<f64> = linear(x, &gate).iter().zip(&router_bias).map(|(l, b)| l + b).collect();
        let mut y = vec![0.0; HIDDEN];
        for (e, w) in router.choose(&logits, &correction, top_k) {
            y.iter_mut().zip(routed.output(e, x)).for_each(|(y, out)| *y += w * out);
        }
        if let Some(common) = &common {
            let share = shared_gate.as_ref().map_or(1.0, |gate| sigmoid(linear(x, &wide(gate))[0]));
            y.iter_mut().zip(common.output(0, x)).for_each(|(y, out)| *y += share * out);
        }
        want.extend(y);
    }
    assert_layer(&got, &want, dtype);
}

/// `E sum_e (share of choices, of k) (mean probability)`: about k for a fresh router; what padding there is changes nothing, unless no mask says so.
fn load_balancing_loss() -> Section {
    let mut section = Section::new("load_balancing_loss");
    for (name, experts, padded) in [
        ("mixtral", 8, 4 * 7),
        ("qwen2_moe", 8, 4 * 7),
        ("qwen3_moe", 8, 4 * 7),
        ("jamba", 16, 1000),
        ("ernie4_5_moe", 3, 4 * 7),
    ] {
        section.point(format!("{name} e={experts}"), move || {
            let (sequences, length, top_k) = (13, 7, 2);
            let rng = &mut rng(name);
            let logits: Vec<f32> = normals(rng, TOKENS * experts, 0.02);
            let loss = |logits: &[f32], padding: Option<&[u8]>| {
                let tokens = logits.len() / experts;
                let rule = BalanceRule::new(LossScore::Softmax, tokens);
                let gating = Gating::new(Score::Softmax);
                f64::from(calls::measure_padded(logits, experts, top_k, gating, rule, None, padding).stats.balance_loss)
            };
            let got = loss(&logits, None);
            assert!((got - 2.0).abs() < 0.02, "loss {got}");
            let (mut counts, mut sums) = (vec![0.0; experts], vec![0.0; experts]);
            for row in wide32(&logits).chunks(experts) {
                order(row)[..top_k].iter().for_each(|&e| counts[e] += 1.0);
                sums.iter_mut().zip(softmax(row)).for_each(|(sum, p)| *sum += p);
            }
            let n = TOKENS as f64;
            let want: f64 = counts.iter().zip(&sums).map(|(c, p)| c / n * p / n).sum::<f64>() * experts as f64;
            assert!((got - want).abs() < 1e-5 * want, "{got}, want {want}");

            // Padding to the left of each sequence, all of one logit row: 1000 tokens of it scaled down to 100.
            let pad = padded.min(100);
            let row: Vec<f32> = normals(rng, experts, 1.0);
            let (mut with, mut padding) = (vec![], vec![]);
            for s in 0..sequences {
                (0..pad).for_each(|_| with.extend_from_slice(&row));
                with.extend_from_slice(&logits[s * length * experts..][..length * experts]);
                padding.extend((0..pad + length).map(|t| u8::from(t < pad)));
            }
            let masked = loss(&with, Some(&padding));
            assert!((masked - got).abs() < 1e-4, "{got}, with masked padding {masked}");
            let unmasked = loss(&with, None);
            assert!((unmasked - got).abs() > 1e-3, "{got}, with padding {unmasked}");
        });
    }
    section
}
