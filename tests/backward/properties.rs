//! What holds of every backward pass: bits, graphs, nobody, everybody, garbage, small numbers, what is not asked for.

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice};
use half::bf16;
use moe_kernels::layer::{
    BackwardDesc, BackwardStage, LatentDesc, LayerDesc, LayerGradients, MapDesc, Mlp, Norms, Origin, RouterGradients,
    SharedDesc, SharedGradients, WeightGradients,
};
use moe_kernels::rules::{
    AdmissionRule, Capacity, Dropout, Glu, IdFormat, Layout, LossGradient, LossScore, NoiseSource, NullExperts,
    Renormalise, RmsNorm, Weighting,
};
use moe_kernels::{Dtype, Element, Kernels};

use crate::case::{Case, Problem, check, keep};
use crate::compare::{Found, HELD, JUNK, norm};
use crate::device;

const TOKENS: usize = 61;

fn layer(dtype: Dtype) -> LayerDesc {
    LayerDesc::new(dtype, 40, 24, 6, 2)
}

/// One of each: a shared expert with a gate, biases, dropout, losses.
fn everything(dtype: Dtype) -> Case {
    let shared = Some(SharedDesc::new(24, Mlp::swiglu(dtype)).gated(true));
    let losses = LossGradient::new(LossScore::Softmax).balance(0.01).z(0.001);
    let dropout = Some(Dropout::new(0.3, NoiseSource::new(3, 4)));
    let case = Case::new(layer(dtype).shared(shared), TOKENS).back(BackwardDesc::new().losses(Some(losses)));
    Case { dropout, biases: true, router_bias: true, bias: true, ..case }
}

fn run<T: Element, W: Element, G: Element>(problem: &Problem<T, W>) -> Found {
    let mut buffers = problem.buffers::<G>();
    let gradients = problem.gradients(&mut buffers);
    problem.backward(gradients).unwrap();
    problem.found(&buffers)
}

fn bits(found: &Found) -> Vec<Vec<u64>> {
    found.iter().map(|(_, values)| values.iter().map(|value| value.to_bits()).collect()).collect()
}

#[test]
fn the_same_bits() {
    fn case<T: Element, G: Element>() {
        let mut problem = Problem::<T, T>::new(everything(T::DTYPE));
        problem.forward();
        let first = run::<T, T, G>(&problem);
        assert!(first.iter().all(|(_, values)| values.iter().all(|value| value.is_finite())));
        let Some(control) = device::control() else { return };
        for (seed, threads) in [(1, 1), (2, 4), (3, 3)] {
            control.set_seed(seed);
            control.set_threads(threads);
            assert!(bits(&run::<T, T, G>(&problem)) == bits(&first), "seed {seed}, {threads} threads");
        }
    }
    case::<f32, f32>();
    case::<bf16, f32>();
}

/// Choices from elsewhere in torch's integers: the same bits as in ours, where identities are read off them, or a map is asked.
#[test]
fn ids_of_64_bits() {
    fn case<T: Element>(desc: LayerDesc) {
        let of = |format| {
            let back = BackwardDesc::new().origin(Origin::Choices);
            let case = Case { odd_ids: true, ..Case::new(desc.choices(format), TOKENS).back(back) };
            let mut problem = Problem::<T, T>::new(case);
            problem.forward();
            let y: Vec<u32> =
                problem.stream.clone_dtoh(&problem.y).unwrap().iter().map(|v| v.to_f32().to_bits()).collect();
            (y, run::<T, T, f32>(&problem))
        };
        let [narrow, wide] = [IdFormat::I32, IdFormat::I64].map(of);
        let weights = &narrow.1.iter().find(|(name, _)| *name == "weights").unwrap().1;
        let none = weights.iter().filter(|d| **d == 0.0).count();
        assert!(none >= TOKENS.div_ceil(5) && none < weights.len(), "{none} choices without a gradient");
        assert!(wide.0 == narrow.0, "{desc:?}: y");
        for ((name, wide), (_, narrow)) in wide.1.iter().zip(&narrow.1) {
            assert!(wide == narrow, "{desc:?}: {name}");
        }
    }
    let identities = |dtype| layer(dtype).null(Some(NullExperts::identity(2)));
    case::<f32>(identities(Dtype::F32));
    case::<bf16>(identities(Dtype::Bf16).routed_scale(0.5));
    case::<f32>(layer(Dtype::F32).null(Some(NullExperts::zero(2))));
    case::<f32>(layer(Dtype::F32).map(Some(MapDesc::new(2))));
    // Rows that begin on any element.
    case::<f32>(LayerDesc::new(Dtype::F32, 37, 21, 6, 3).null(Some(NullExperts::identity(2))));
}

#[test]
fn a_graph() {
    // A value of the context of its own: events are off for it alone.
    device::kernels();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: everything here is on one stream.
    unsafe { context.disable_event_tracking() };
    let kernels: &'static Kernels = Box::leak(Box::new(Kernels::new(&context).unwrap()));
    let stream = context.new_stream().unwrap();
    let mut problem = Problem::<bf16, bf16>::on(everything(Dtype::Bf16), stream.clone(), kernels);
    problem.forward();
    let want = run::<bf16, bf16, f32>(&problem);
    let mut buffers = problem.buffers::<f32>();
    // As long as the graph is launched, all that it reads lives.
    let counts = problem.loss_counts();
    stream.synchronize().unwrap();
    let graph = {
        let gradients = problem.gradients(&mut buffers);
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        problem.backward_by(gradients, &counts).unwrap();
        stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap()
    };
    let nothing = problem.found(&buffers);
    assert!(nothing.iter().all(|(_, values)| values.iter().all(|&value| value == f64::from(JUNK))), "has run already");
    graph.launch().unwrap();
    assert!(bits(&problem.found(&buffers)) == bits(&want));
    // The same again with another gradient of y.
    problem.dy.iter_mut().for_each(|d| *d = bf16::from_f32(2.0 * d.to_f32()));
    let dy = problem.dy.clone();
    stream.memcpy_htod(&dy, &mut problem.dy_on_device).unwrap();
    graph.launch().unwrap();
    let (twice, once) = (problem.found(&buffers), want.iter().find(|(name, _)| *name == "down").unwrap());
    let down = &twice.iter().find(|(name, _)| *name == "down").unwrap().1;
    let error = norm(down.iter().zip(&once.1).map(|(twice, once)| twice - 2.0 * once));
    assert!(error <= 1e-6 * norm(down.iter().copied()), "{error}");
    stream.synchronize().unwrap();
    drop(graph);
}

#[test]
fn nobody() {
    for (accumulate, keep_empty) in [(false, false), (true, false), (false, true)] {
        let back = BackwardDesc::new().accumulate(accumulate).keep_empty(keep_empty);
        let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)).gated(true));
        let case = Case { biases: true, ..Case::new(layer(Dtype::F32).shared(shared), 0).back(back) };
        let mut problem = Problem::<f32, f32>::new(case);
        assert_eq!(problem.back.launches(), 0);
        problem.forward();
        for (name, values) in run::<f32, f32, f32>(&problem) {
            let experts = ["gate_up", "down", "gate_up.bias", "down.bias"].contains(&name);
            let want = match (accumulate, keep_empty && experts) {
                (true, _) => HELD,
                (false, true) => JUNK,
                (false, false) => 0.0,
            };
            assert!(values.iter().all(|&value| value == f64::from(want)), "{name} {accumulate} {keep_empty}");
        }
    }
}

/// Every token to the same experts, the others without rows: their gradients are zero, or left alone.
#[test]
fn one_expert_has_all() {
    for keep_empty in [false, true] {
        let back = BackwardDesc::new().keep_empty(keep_empty);
        let case = Case { biases: true, ..Case::new(layer(Dtype::F32), TOKENS).back(back) };
        let mut problem = Problem::<f32, f32>::new(case);
        problem.x.iter_mut().for_each(|x| *x = x.abs());
        for (e, row) in problem.router.chunks_mut(40).enumerate() {
            row.iter_mut().for_each(|w| *w = if e < 2 { 1.0 - 0.02 * e as f32 } else { -1.0 } + 0.01 * *w);
        }
        problem.upload();
        problem.forward();
        let counts = problem.stream.clone_dtoh(problem.saved.dispatched().counts()).unwrap();
        assert_eq!(counts, [TOKENS as i32, TOKENS as i32, 0, 0, 0, 0]);
        let (got, want) = (run::<f32, f32, f32>(&problem), problem.expected());
        for ((name, got), (_, want)) in got.into_iter().zip(want) {
            let by_expert = ["gate_up", "down", "gate_up.bias", "down.bias"].contains(&name);
            let (of_two, rest) = if by_expert { got.split_at(got.len() / 3) } else { (&got[..], &[][..]) };
            let error = norm(of_two.iter().zip(&want).map(|(got, want)| got - want));
            assert!(error <= 5e-6 * norm(want.iter().copied()), "{name}: {error}");
            let left = if keep_empty { f64::from(JUNK) } else { 0.0 };
            assert!(rest.iter().all(|&value| value == left), "{name}");
        }
    }
}

/// NaN in rows that belong to nobody reaches nothing: the workspace and what is saved were full of it.
#[test]
fn garbage_past_the_last_row() {
    for weighting in [Weighting::Output, Weighting::Input, Weighting::Activation] {
        for capacity in [None, Some(Capacity::new(7, TOKENS)), Some(Capacity::new(30, TOKENS).padded(true))] {
            let desc = layer(Dtype::F32).weighting(weighting).capacity(capacity);
            let case = Case { padding: 40, biases: true, ..Case::new(desc, TOKENS) };
            let mut clean = Problem::<f32, f32>::new(case);
            clean.forward();
            let want = run::<f32, f32, f32>(&clean);
            // The same on memory that a pass over all tokens has left NaN in: rows of x, and with them every row between.
            let mut problem = Problem::<f32, f32>::new(case);
            let (x, dy) = (problem.x.clone(), problem.dy.clone());
            problem.x.fill(f32::NAN);
            problem.dy.fill(f32::NAN);
            problem.case.padding = 0;
            problem.upload();
            problem.forward();
            run::<f32, f32, f32>(&problem);
            (problem.x, problem.dy, problem.case.padding) = (x, dy, 40);
            // Padding may hold anything too.
            problem.x[(TOKENS - 40) * 40..].fill(f32::NAN);
            problem.upload();
            problem.forward_into_what_was_saved();
            let got = run::<f32, f32, f32>(&problem);
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert!(bits(got) == bits(want), "{name} {weighting:?} {capacity:?}");
            }
        }
    }
}

/// Nothing hides behind an absolute tolerance.
#[test]
fn small_gradients() {
    for dy in [1e-5, 1e-9] {
        check::<f32, f32, f32>(Case { dy, biases: true, ..Case::new(layer(Dtype::F32), TOKENS) });
        check::<bf16, bf16, bf16>(Case { dy, biases: true, ..Case::new(layer(Dtype::Bf16), TOKENS) });
    }
}

/// Two halves of a batch, added up, are the batch.
#[test]
fn micro_batches() {
    let case = Case { biases: true, ..Case::new(layer(Dtype::Bf16), 2 * TOKENS) };
    let mut whole = Problem::<bf16, bf16>::new(case);
    whole.forward();
    let want = run::<bf16, bf16, f32>(&whole);
    let half = Case { tokens: TOKENS, ..case.back(BackwardDesc::new().accumulate(true)) };
    let mut problem = Problem::<bf16, bf16>::new(half);
    let mut buffers = problem.buffers::<f32>();
    for half in 0..2 {
        let elements = half * TOKENS * 40..(half + 1) * TOKENS * 40;
        (problem.x, problem.dy) = (whole.x[elements.clone()].to_vec(), whole.dy[elements].to_vec());
        (problem.routed.up, problem.routed.down) = (whole.routed.up.clone(), whole.routed.down.clone());
        problem.routed.biases.clone_from(&whole.routed.biases);
        problem.router.clone_from(&whole.router);
        problem.upload();
        problem.forward();
        let gradients = problem.gradients(&mut buffers);
        problem.backward(gradients).unwrap();
    }
    let got = problem.found(&buffers);
    for (name, want) in want.iter().filter(|(name, _)| !["x", "logits", "weights"].contains(name)) {
        let got = &got.iter().find(|(known, _)| known == name).unwrap().1;
        let error = norm(got.iter().zip(want).map(|(got, want)| got - f64::from(HELD) - want));
        assert!(error <= 2e-6 * norm(want.iter().copied()) + 1e-5, "{name}: {error}");
    }
}

/// Gradients of norms' weights too are added to what there is: once, in f32.
#[test]
fn norms_over_micro_batches() {
    let norm = Some(RmsNorm::new(1e-5));
    let norms = Norms::new().router(norm).experts(norm).slots(norm).output(norm);
    for (desc, of) in [
        (layer(Dtype::F32).norms(norms), &["router.norm", "norms.experts", "norms.slots", "norms.output"][..]),
        (layer(Dtype::F32).latent(Some(LatentDesc::new(Dtype::F32, 16).norm(norm))), &["latent.norm"][..]),
    ] {
        let found = [false, true].map(|accumulate| {
            let back = BackwardDesc::new().accumulate(accumulate);
            let mut problem = Problem::<f32, f32>::new(Case::new(desc, TOKENS).back(back));
            problem.forward();
            run::<f32, f32, f32>(&problem)
        });
        for name in of {
            let [written, added] =
                found.each_ref().map(|found| &found.iter().find(|(known, _)| known == name).unwrap().1);
            let want: Vec<f64> = written.iter().map(|&value| f64::from(value as f32 + HELD)).collect();
            assert!(*added == want, "{name}");
        }
    }
}

/// A frozen expert's memory is left alone; what comes through it is as ever.
#[test]
fn frozen_experts() {
    for layouts in [Mlp::swiglu(Dtype::Bf16), Mlp::gpt_oss(Dtype::Bf16)] {
        let case = Case { biases: true, ..Case::new(layer(Dtype::Bf16).mlp(layouts), TOKENS) };
        let mut problem = Problem::<bf16, bf16>::new(case);
        problem.forward();
        let want = run::<bf16, bf16, f32>(&problem);
        let mask = [0, 1, 0, -7, 1, 0];
        problem.frozen = Some(problem.stream.clone_htod(&mask).unwrap());
        let got = run::<bf16, bf16, f32>(&problem);
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            let by_expert = ["gate_up", "down", "gate_up.bias", "down.bias"].contains(name);
            let each = got.len() / mask.len();
            for (at, (got, want)) in got.iter().zip(want).enumerate() {
                let frozen = by_expert && mask[at / each] != 0;
                assert_eq!(*got, if frozen { f64::from(JUNK) } else { *want }, "{name}[{at}]");
            }
        }
    }
}

/// What nobody asks for has no launch.
#[test]
fn frozen_parts_cost_nothing() {
    use BackwardStage::{DownWeight, GateUpWeight, Gating, Hidden, Input, RouterInput, RouterWeight, Sum};
    let mut problem = Problem::<f32, f32>::new(Case::new(layer(Dtype::F32), TOKENS));
    problem.forward();
    let whole = run::<f32, f32, f32>(&problem);
    let of = |name: &str| whole.iter().find(|(known, _)| *known == name).unwrap().1.clone();
    let lens = ["x", "router", "gate_up", "down"].map(|name| of(name).len());
    let [mut x, mut router, mut gate_up, mut down] = lens.map(|len| problem.stream.alloc_zeros::<f32>(len).unwrap());
    let none = LayerGradients::new;
    for (gradients, want) in [
        (none(), vec![]),
        (none().router(RouterGradients::new().matrix(&mut router)), vec![Hidden, Gating, RouterWeight]),
        (none().x(&mut x), vec![Hidden, Input, Gating, RouterInput, Sum]),
        (none().gate_up(WeightGradients::new(&mut gate_up)), vec![Hidden, GateUpWeight]),
        (none().down(WeightGradients::new(&mut down)), vec![Hidden, DownWeight]),
    ] {
        assert_eq!(problem.backward(gradients).unwrap(), want);
    }
    for (name, got) in ["x", "router", "gate_up", "down"].into_iter().zip([&x, &router, &gate_up, &down]) {
        let got: Vec<f64> = problem.stream.clone_dtoh(got).unwrap().into_iter().map(f64::from).collect();
        assert!(got == of(name), "{name}");
    }
}

/// The load is there without a measure, and the balancing loss goes by it unless it is given others.
#[test]
fn saved_counts() {
    let losses = LossGradient::new(LossScore::Softmax).balance(0.5);
    let case = Case::new(layer(Dtype::F32), TOKENS).back(BackwardDesc::new().losses(Some(losses)));
    let mut problem = Problem::<f32, f32>::new(case);
    problem.forward();
    let read = |counts| problem.stream.clone_dtoh(counts).unwrap();
    let counts = problem.loss_counts();
    assert_eq!(read(problem.saved.counts()), read(&counts));
    let gradient = |counts: Option<&CudaSlice<i32>>| {
        let mut buffers = problem.buffers::<f32>();
        let gradients = problem.gradients(&mut buffers);
        let args = problem.args(gradients);
        problem.enqueue(if let Some(counts) = counts { args.loss_counts(counts) } else { args }).unwrap();
        problem.found(&buffers)
    };
    let (own, given) = (gradient(None), gradient(Some(&counts)));
    assert!(own == given);
    let even = problem.stream.clone_htod(&[1; 6]).unwrap();
    assert!(own != gradient(Some(&even)));
}

/// What is asked of one of both experts alone has launches of its own, with the same bits.
#[test]
fn parts_of_a_joined_shared_expert() {
    for size in [24, 40] {
        parts_of(SharedDesc::new(size, Mlp::swiglu(Dtype::F32)).gated(true));
    }
}

fn parts_of(shared: SharedDesc) {
    let case = Case { biases: true, ..Case::new(layer(Dtype::F32).shared(Some(shared)), TOKENS) };
    let mut problem = Problem::<f32, f32>::new(case);
    problem.forward();
    let whole = run::<f32, f32, f32>(&problem);
    let of = |name: &str| whole.iter().find(|(known, _)| *known == name).unwrap().1.clone();
    let names =
        ["gate_up", "down", "shared.gate_up", "shared.down", "shared.gate_up.bias", "down.bias", "shared.gate", "x"];
    let [mut gate_up, mut down, mut shared_gate_up, mut shared_down, mut up_bias, mut down_bias, mut gate, mut x] =
        names.map(|name| problem.stream.alloc_zeros::<f32>(of(name).len()).unwrap());
    let none = LayerGradients::new;
    let of_shared = SharedGradients::new;
    let both = none().gate_up(WeightGradients::new(&mut gate_up));
    problem.backward(both.shared(of_shared().down(WeightGradients::new(&mut shared_down)))).unwrap();
    let both = none().down(WeightGradients::new(&mut down).bias(&mut down_bias));
    problem.backward(both.shared(of_shared().gate_up(WeightGradients::new(&mut shared_gate_up)))).unwrap();
    let mut bias_alone = WeightGradients::none();
    bias_alone.bias = Some((&mut up_bias).into());
    problem.backward(none().shared(of_shared().gate_up(bias_alone).gate(&mut gate))).unwrap();
    problem.backward(none().x(&mut x)).unwrap();
    let got = [&gate_up, &down, &shared_gate_up, &shared_down, &up_bias, &down_bias, &gate, &x];
    for (name, got) in names.into_iter().zip(got) {
        let got: Vec<f64> = problem.stream.clone_dtoh(got).unwrap().into_iter().map(f64::from).collect();
        assert!(got == of(name), "{name}");
    }
}

/// The same where weights scale the input, gate and up have a tensor each, and the shared expert is narrower: what is asked for is made without the rest.
#[test]
fn parts_where_weights_scale_the_input() {
    let plain = Mlp::swiglu(Dtype::F32);
    for layout in Layout::ALL {
        let mlp = plain.gate_up(plain.gate_up.glu(Glu::Apart).layout(layout));
        let desc = layer(Dtype::F32).mlp(mlp).weighting(Weighting::Input).shared(Some(SharedDesc::new(8, mlp)));
        let mut problem = Problem::<f32, f32>::new(Case { biases: true, ..Case::new(desc, TOKENS) });
        problem.forward();
        let whole = run::<f32, f32, f32>(&problem);
        for asked in [&["router"][..], &["gate_up"], &["gate_up.up"], &["gate_up.up_bias", "shared.gate_up.up"], &["x"]]
        {
            let mut buffers = problem.buffers::<f32>();
            let mut gradients = problem.gradients(&mut buffers);
            keep(&mut gradients, |name| asked.contains(&name));
            // Nothing that another pass has left there.
            problem.renew_workspace();
            problem.backward(gradients).unwrap();
            let found = problem.found(&buffers);
            for ((name, got), (_, want)) in found.iter().zip(&whole).filter(|((name, _), _)| asked.contains(name)) {
                let error = norm(got.iter().zip(want).map(|(got, want)| got - want));
                assert!(error <= 5e-6 * norm(want.iter().copied()), "{layout:?} {name} beside {asked:?}: {error:e}");
            }
        }
    }
}

/// A shared expert of the others' form adds no launch, of whatever width, nor does its gate.
#[test]
fn few_launches() {
    let shared = SharedDesc::new(24, Mlp::swiglu(Dtype::Bf16));
    let with = |shared| layer(Dtype::Bf16).shared(Some(shared));
    let wide = SharedDesc::new(32, Mlp::swiglu(Dtype::Bf16));
    let plain = Mlp::swiglu(Dtype::Bf16);
    let apart = plain.gate_up(plain.gate_up.glu(Glu::Apart));
    let of_two = |shared| layer(Dtype::Bf16).mlp(apart).shared(shared);
    let rule = AdmissionRule::new(6, 2, 200, 600).candidates(4).renormalise(Some(Renormalise::Plus(0.0)));
    let regraded = |desc: LayerDesc| desc.admission(Some(rule)).map(Some(MapDesc::new(2)));
    for (desc, back, want) in [
        (layer(Dtype::Bf16), BackwardDesc::new(), 8),
        (layer(Dtype::Bf16).weighting(Weighting::Input), BackwardDesc::new(), 8),
        (with(shared), BackwardDesc::new(), 8),
        (with(shared).weighting(Weighting::Input), BackwardDesc::new(), 8),
        (with(shared.gated(true)), BackwardDesc::new(), 8),
        (with(shared.gated(true)), BackwardDesc::new().recompute(true), 9),
        (with(shared.gated(true)), BackwardDesc::new().origin(Origin::Choices), 8),
        // Of another width; gate and up in a tensor each.
        (with(wide), BackwardDesc::new(), 8),
        (with(wide.gated(true)), BackwardDesc::new(), 8),
        (with(wide).weighting(Weighting::Input), BackwardDesc::new(), 8),
        (of_two(None), BackwardDesc::new(), 9),
        (of_two(Some(SharedDesc::new(24, apart))), BackwardDesc::new(), 9),
        (of_two(Some(SharedDesc::new(32, apart).gated(true))), BackwardDesc::new(), 9),
        // And pre-activations again, by an admission that passes on, with a map.
        (of_two(Some(SharedDesc::new(32, apart).gated(true))), BackwardDesc::new().recompute(true), 9),
        (regraded(of_two(None)), BackwardDesc::new().recompute(true), 9),
        (regraded(of_two(None)), BackwardDesc::new().recompute(true).origin(Origin::Choices), 8),
        (regraded(of_two(Some(SharedDesc::new(24, apart).gated(true)))), BackwardDesc::new().recompute(true), 9),
        (
            regraded(of_two(Some(SharedDesc::new(24, apart).gated(true)))).weighting(Weighting::Input),
            BackwardDesc::new().recompute(true).origin(Origin::Choices),
            9,
        ),
    ] {
        for biases in [false, true] {
            let case = Case { biases, router_bias: biases, ..Case::new(desc, 600) };
            let mut problem = Problem::<bf16, bf16>::new(case.back(back));
            problem.forward();
            assert_eq!(problem.back.launches(), want, "{desc:?} {back:?}");
            assert!(want <= 9, "{desc:?} {back:?}");
            let mut buffers = problem.buffers::<bf16>();
            let gradients = problem.gradients(&mut buffers);
            let stages = problem.backward(gradients).unwrap();
            // A bias behind a gate takes the gate's values; of choices the gradients are asked for.
            let more = usize::from(biases && desc.shared.is_some_and(|shared| shared.gated));
            assert_eq!(stages.len(), want + more, "{desc:?} {back:?}: {stages:?}");
        }
    }
}
