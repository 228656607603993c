//! FastMoE, `tests/test_numerical.py` and `test_gates.py`: one rank, forward, at the suite's own sizes but for 4096 tokens of the Switch gate, which
//! are 512 here.

use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::gemm::{GemmDesc, Rows};
use moe_kernels::experts::permute::Unfilled;
use moe_kernels::layer::{LayerDesc, Mlp};
use moe_kernels::rules::{Activation, AdmissionRule, Gating, NoiseSource, Order, Score, SecondExpert};

use crate::calls::{self, Chosen, Experts};
use crate::close::{assert_choice, assert_layer};
use crate::data::{rng, values, wide, wide32, with_type};
use crate::formulas::{bincount, gelu, linear, relu, softmax};
use crate::products::Product;
use crate::suite::{Peer, Section, product};
use crate::support::compare::Storage;
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`tests`: test_numerical, test_gates";
    Peer {
        name: "FastMoE",
        suite,
        sections: vec![two_layers(), experts_of_any_form(), one_matrix(), gshard(), switch()],
    }
}

/// The naive gate: top-k of a linear layer with a bias, softmax over the chosen.
fn naive_gate<T: Storage>(rng: &mut fastrand::Rng, x: &[T], width: usize, experts: usize, top_k: usize) -> Chosen {
    let weight: Vec<T> = normals(rng, experts * width, 0.3);
    let bias: Vec<f32> = normals(rng, experts, 0.3);
    let logits = calls::router(x, &weight, Some(&bias), width);
    let chosen = calls::gate(&logits, experts, top_k, Gating::new(Score::TopkSoftmax), None);
    let (weight, bias) = (wide(&weight), wide32(&bias));
    let row = |t: usize| -> Vec<f64> {
        let x: Vec<f64> = wide(&x[t * width..][..width]);
        linear(&x, &weight).iter().zip(&bias).map(|(l, b)| l + b).collect()
    };
    assert_choice(&chosen, top_k, row, |t, ids| softmax(&ids.iter().map(|&e| row(t)[e]).collect::<Vec<_>>()));
    chosen
}

/// Two matrices with biases and an activation between them.
#[allow(clippy::too_many_arguments)]
fn layer_point<T: Storage>(
    name: &str,
    tokens: usize,
    width: usize,
    inner: usize,
    experts: usize,
    top_k: usize,
    activation: Activation,
    act: fn(f64) -> f64,
) {
    let rng = &mut rng(name);
    let x: Vec<T> = (0..tokens * width).map(|_| T::from_f64(rng.f64())).collect();
    let chosen = naive_gate(rng, &x, width, experts, top_k);
    let up: Vec<T> = normals(rng, experts * inner * width, 0.2);
    let up_bias: Vec<T> = normals(rng, experts * inner, 0.2);
    let down: Vec<T> = normals(rng, experts * width * inner, 0.2);
    let down_bias: Vec<T> = normals(rng, experts * width, 0.2);
    let desc = LayerDesc::new(T::DTYPE, width, inner, experts, top_k).mlp(Mlp::relu(T::DTYPE).activation(activation));
    let layer = Experts {
        desc,
        x: &x,
        chosen: &chosen,
        gate_up: &up,
        gate_up_bias: Some(&up_bias),
        down: &down,
        down_bias: Some(&down_bias),
        map: None,
    };
    let got = wide(&layer.run());
    let [x, up, up_bias, down, down_bias] = [&x, &up, &up_bias, &down, &down_bias].map(|values| wide(values));
    let mut want = vec![0.0; tokens * width];
    for (slot, (&id, &weight)) in chosen.ids.iter().zip(&chosen.weights).enumerate() {
        let (t, e) = (slot / top_k, id as usize);
        let h = linear(&x[t * width..][..width], &up[e * inner * width..][..inner * width]);
        let h: Vec<f64> = h.iter().zip(&up_bias[e * inner..]).map(|(h, b)| act(h + b)).collect();
        let out = linear(&h, &down[e * width * inner..][..width * inner]);
        for n in 0..width {
            want[t * width + n] += f64::from(weight) * (out[n] + down_bias[e * width + n]);
        }
    }
    assert_layer(&got, &want, T::DTYPE);
}

fn two_layers() -> Section {
    let mut section = Section::new("fmoe_linear");
    for (dtype, (experts, top_k)) in product(&[Dtype::F32, Dtype::F16], &product(&[4, 8], &[2, 3])) {
        let name = format!("{dtype} e={experts} k={top_k}");
        let point = name.clone();
        section.point(
            name,
            move || with_type!(dtype, T => layer_point::<T>(&point, 4, 16, 32, experts, top_k, Activation::Gelu, gelu)),
        );
    }
    section.refuse(4, "f64");
    section
}

/// A single linear expert's output, weighted: grouped product of gathered rows, then the sum.
fn single_point<T: Storage>(
    name: &str,
    tokens: usize,
    width: usize,
    columns: usize,
    experts: usize,
    chosen: impl Fn(&mut fastrand::Rng, &[T]) -> (Chosen, usize),
    biased: bool,
) {
    let rng = &mut rng(name);
    let x: Vec<T> = values(rng, tokens * width);
    let (chosen, top_k) = chosen(rng, &x);
    let weight: Vec<T> = normals(rng, experts * columns * width, 0.3);
    let bias: Vec<T> = normals(rng, experts * columns, 0.3);
    let sorted = calls::sort(&chosen.ids, Some(&chosen.weights), &DispatchDesc::new(tokens, experts, top_k, 16));
    let desc = GemmDesc::new(T::DTYPE, Rows::Grouped(sorted.shape), columns, width).gather(true);
    let rows = Product {
        desc,
        a: &x,
        weight: &weight,
        bias: biased.then_some(&bias[..]),
        lists: Some((&sorted.stream, &sorted.dispatched)),
        len: sorted.shape.slots * columns,
    };
    let rows = rows.run();
    let got = wide(&sorted.unpermute(&rows, Some(&chosen.weights), columns));
    let [x, weight, bias] = [&x, &weight, &bias].map(|values| wide(values));
    let mut want = vec![0.0; tokens * columns];
    for (slot, (&id, &w)) in chosen.ids.iter().zip(&chosen.weights).enumerate() {
        let (t, e) = (slot / top_k, id as usize);
        let out = linear(&x[t * width..][..width], &weight[e * columns * width..][..columns * width]);
        for n in 0..columns {
            let bias = if biased { bias[e * columns + n] } else { 0.0 };
            want[t * columns + n] += f64::from(w) * (out[n] + bias);
        }
    }
    assert_layer(&got, &want, T::DTYPE);
    // The same rows by a permutation of the tokens first.
    let moved = sorted.permute_all(&wide_to::<T>(&x), width, Unfilled::Keep);
    let [weight, bias] = [&weight, &bias].map(|values| wide_to::<T>(values));
    let again = Product {
        desc: desc.gather(false),
        a: &moved,
        weight: &weight,
        bias: biased.then_some(&bias[..]),
        lists: Some((&sorted.stream, &sorted.dispatched)),
        len: rows.len(),
    };
    assert!(again.run() == rows, "gathered and permuted");
}

fn wide_to<T: Storage>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&v| T::from_f64(v)).collect()
}

/// Experts of one linear layer, and of two with ReLU between them, 16 wide.
fn experts_of_any_form() -> Section {
    let mut section = Section::new("fmoe");
    for (experts, top_k) in product(&[4, 8], &[2, 3]) {
        let name = format!("linear e={experts} k={top_k}");
        let point = name.clone();
        section.point(name, move || {
            let gate = |rng: &mut fastrand::Rng, x: &[f32]| (naive_gate(rng, x, 16, experts, top_k), top_k);
            single_point::<f32>(&point, 4, 16, 16, experts, gate, true);
        });
        let name = format!("two layers e={experts} k={top_k}");
        let point = name.clone();
        section.point(name, move || {
            layer_point::<f32>(&point, 4, 16, 32, experts, top_k, Activation::Relu, relu);
        });
    }
    // A list of four equal experts; a list of eight that take turns.
    for top_k in [2, 3] {
        let name = format!("list of four k={top_k}");
        let point = name.clone();
        section.point(name, move || {
            let gate = |rng: &mut fastrand::Rng, x: &[f32]| (naive_gate(rng, x, 16, 4, top_k), top_k);
            single_point::<f32>(&point, 4, 16, 16, 4, gate, true);
        });
    }
    section.refuse(2, "experts of different forms in one layer");
    section
}

/// 6 to 7 columns by ids that are given.
fn one_matrix() -> Section {
    let mut section = Section::new("moe");
    section.point("6 to 7", || {
        let gate = |rng: &mut fastrand::Rng, _: &[f32]| {
            (Chosen { ids: (0..4).map(|_| rng.i32(0..2)).collect(), weights: vec![1.0; 4] }, 1)
        };
        single_point::<f32>("6 to 7", 4, 6, 7, 2, gate, false);
    });
    section
}

/// At most `ceil(cap * batch)` tokens an expert; whoever is admitted keeps the gate's weight, all others have -1.
fn check_gate(before: &Chosen, after: &Chosen, experts: usize, capacity: usize) {
    let counts = bincount(&after.ids, experts);
    assert!(counts.iter().all(|&count| count as usize <= capacity), "{counts:?} of {capacity}");
    for (slot, &id) in after.ids.iter().enumerate() {
        if id == -1 {
            assert_eq!(after.weights[slot], 0.0);
        } else {
            assert_eq!((id, after.weights[slot]), (before.ids[slot], before.weights[slot]));
        }
    }
}

fn gshard() -> Section {
    let mut section = Section::new("gshard_gate");
    for cap in [0.1, 1.1] {
        section.point(format!("e=4 cap={cap}"), move || {
            let (tokens, width, experts) = (16, 1024, 4);
            let rng = &mut rng("gshard");
            let x: Vec<f32> = (0..tokens * width).map(|_| rng.f32()).collect();
            let weight: Vec<f32> = normals(rng, experts * width, 0.05);
            let logits = calls::router(&x, &weight, None, width);
            let chosen = calls::gate(&logits, experts, 2, Gating::new(Score::TopkSoftmax), None);
            let capacity = (cap * tokens as f64).ceil() as usize;
            let rule = AdmissionRule::gshard(experts, capacity, tokens, NoiseSource::default());
            check_gate(&chosen, &calls::admit(&chosen, rule), experts, capacity);
            // Without the second expert's draw every place is taken that is asked for.
            let all = calls::admit(&chosen, rule.second(SecondExpert::Always));
            let asked = bincount(&chosen.ids, experts);
            let want: Vec<i32> = asked.iter().map(|&n| n.min(capacity as i32)).collect();
            assert_eq!(bincount(&all.ids, experts), want);
        });
    }
    section.refuse(2, "the suite skips a single expert");
    section
}

/// Softmax of noisy scores, one expert.
fn switch() -> Section {
    let mut section = Section::new("switch_gate");
    for (experts, cap) in product(&[1, 16], &[0.1, 0.8]) {
        section.point(format!("e={experts} cap={cap}"), move || {
            let tokens = 512;
            let rng = &mut rng("switch");
            let mut logits: Vec<f32> = normals(rng, tokens * experts, 1.0);
            logits.iter_mut().for_each(|l| *l += 0.9 + 0.2 * rng.f32());
            let chosen = calls::gate(&logits, experts, 1, Gating::new(Score::Softmax), None);
            let wide = wide32(&logits);
            let share = |t: usize| softmax(&wide[t * experts..][..experts]);
            assert_choice(&chosen, 1, share, |t, ids| vec![share(t)[ids[0]]]);
            let capacity = (cap * tokens as f64).ceil() as usize;
            let rule = AdmissionRule::new(experts, 1, capacity, tokens).order(Order::ByToken);
            let after = calls::admit(&chosen, rule);
            check_gate(&chosen, &after, experts, capacity);
            let want: Vec<i32> = bincount(&chosen.ids, experts).iter().map(|&n| n.min(capacity as i32)).collect();
            assert_eq!(bincount(&after.ids, experts), want);
        });
    }
    section
}
