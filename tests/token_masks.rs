//! Batches that are padded: a captured layer serves every batch up to its size, padding and garbage rows are heard of nowhere, and the numbers of
//! losses that count one choice or another.

mod async_support;

use std::sync::Arc;

use async_support::{context, turn};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream};
use moe_kernels::experts::Weight;
use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Measured, RouteArgs, RouterWeights};
use moe_kernels::routers::gating::GatingDesc;
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::rules::{BalanceRule, Capacity, Gating, LossCounts, LossScore, Score};
use moe_kernels::{Dtype, Kernels, TokenMask, Workspace};

const T: usize = 21;
const H: usize = 16;
const I: usize = 8;
const E: usize = 6;
const K: usize = 2;
const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| 2.0 * rng.f32() - 1.0).collect()
}

struct Weights {
    router: CudaSlice<f32>,
    gate_up: CudaSlice<f32>,
    down: CudaSlice<f32>,
}

impl Weights {
    fn new(stream: &Arc<CudaStream>) -> Weights {
        let at = |len, seed| stream.clone_htod(&values(len, seed)).unwrap();
        Weights { router: at(E * H, 1), gate_up: at(E * 2 * I * H, 2), down: at(E * H * I, 3) }
    }

    fn lent(&self) -> LayerWeights<'_> {
        let experts = ExpertWeights::new(Weight::new(&self.gate_up), Weight::new(&self.down));
        LayerWeights::new(RouterWeights::new(&self.router), experts)
    }
}

/// The layers of this file: dropless, with a capacity by sequence, and measured.
fn layers() -> [LayerDesc; 3] {
    let desc = LayerDesc::new(Dtype::F32, H, I, E, K);
    [desc, desc.capacity(Some(Capacity::new(3, 7))), desc.measure(Some(BalanceRule::new(LossScore::Softmax, 7)))]
}

/// A batch of `tokens` by itself.
fn alone(kernels: &Kernels, stream: &Arc<CudaStream>, desc: &LayerDesc, weights: &Weights, x: &[f32]) -> Vec<f32> {
    let tokens = x.len() / H;
    let plan = desc.measure(None).plan(tokens, kernels.device()).unwrap();
    let x = stream.clone_htod(x).unwrap();
    let mut y = stream.alloc_zeros::<f32>(tokens * H).unwrap();
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
    plan.forward(kernels, stream, &weights.lent(), LayerArgs::new(&x, &mut y), &mut workspace).unwrap();
    stream.clone_dtoh(&y).unwrap()
}

fn near(got: &[f32], want: &[f32], what: &str) {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= 1e-6 * (1.0 + want.abs()), "{what}: y[{i}] is {got}, should be {want}");
    }
}

/// One graph, captured once: the number of valid tokens is read on the device. What stands behind them is NaN.
#[test]
fn one_graph_serves_every_batch() {
    let _turn = turn();
    let context = context();
    // SAFETY: everything in this test is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let kernels = Kernels::new(&context).unwrap();
    let weights = Weights::new(&stream);
    for desc in layers() {
        let plan = desc.plan(T, kernels.device()).unwrap();
        let mut x = stream.alloc_zeros::<f32>(T * H).unwrap();
        let residual = stream.clone_htod(&[0.5f32; T * H]).unwrap();
        let mut y = stream.alloc_zeros::<f32>(T * H).unwrap();
        let mut valid = stream.alloc_zeros::<u32>(1).unwrap();
        let mut counts = stream.alloc_zeros::<i32>(E).unwrap();
        let [mut chosen, mut loss_counts] = [(); 2].map(|()| stream.alloc_zeros::<i32>(E).unwrap());
        let [mut probability, mut importance] = [(); 2].map(|()| stream.alloc_zeros::<f32>(E).unwrap());
        let mut stats = stream.alloc_zeros::<RouterStats>(1).unwrap();
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
        kernels.preload(plan.kernels()).unwrap();
        stream.synchronize().unwrap();
        stream.begin_capture(MODE).unwrap();
        let mut route = RouteArgs::new().counts(&mut counts);
        if desc.measure.is_some() {
            let totals = Totals::new(&mut chosen, &mut loss_counts, &mut probability, &mut importance);
            route = route.measured(Measured::new(totals, &mut stats));
        }
        let args = LayerArgs::new(&x, &mut y).residual(&residual).route(route).mask(TokenMask::first(&valid));
        plan.forward(&kernels, &stream, &weights.lent(), args, &mut workspace).unwrap();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
        for tokens in [T, 1, 0, 13, 7] {
            let batch = values(tokens * H, tokens as u64);
            let mut padded = batch.clone();
            padded.resize(T * H, f32::NAN);
            stream.memcpy_htod(&padded, &mut x).unwrap();
            stream.memcpy_htod(&[tokens as u32], &mut valid).unwrap();
            graph.launch().unwrap();
            let got = stream.clone_dtoh(&y).unwrap();
            let what = format!("{tokens} tokens, {desc:?}");
            assert!(got[tokens * H..].iter().all(|&value| value == 0.5), "{what}: padding has its residual");
            if tokens > 0 {
                let want: Vec<f32> =
                    alone(&kernels, &stream, &desc, &weights, &batch).iter().map(|value| value + 0.5).collect();
                near(&got[..tokens * H], &want, &what);
            }
            let slots: i32 = stream.clone_dtoh(&counts).unwrap().iter().sum();
            assert!(if desc.capacity.is_none() { slots as usize == tokens * K } else { slots as usize <= tokens * K });
            if desc.measure.is_some() {
                let stats = stream.clone_dtoh(&stats).unwrap()[0];
                assert_eq!((stats.tokens, stats.slots), (tokens as u32, (tokens * K) as u32), "{what}");
                assert!(stats.balance_loss.is_finite() && stats.z_loss.is_finite(), "{what}: {stats:?}");
                assert!(if tokens > 0 { stats.balance_loss > 0.9 } else { stats.balance_loss == 0.0 }, "{what}");
            }
        }
        drop(graph);
    }
}

/// Padding anywhere: as the batch without it.
#[test]
fn padding_between_tokens() {
    let _turn = turn();
    let context = context();
    let stream = context.default_stream();
    let kernels = Kernels::new(&context).unwrap();
    let weights = Weights::new(&stream);
    let desc = LayerDesc::new(Dtype::F32, H, I, E, K);
    let mut rng = fastrand::Rng::with_seed(4);
    let padding: Vec<bool> = (0..T).map(|_| rng.bool()).collect();
    let x = values(T * H, 5);
    let rows: Vec<f32> = (0..T).filter(|&t| !padding[t]).flat_map(|t| x[t * H..][..H].to_vec()).collect();
    let want = alone(&kernels, &stream, &desc, &weights, &rows);
    let plan = desc.plan(T, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let x = stream.clone_htod(&x).unwrap();
    for attention in [false, true] {
        let bytes: Vec<u8> = padding.iter().map(|&padding| u8::from(padding != attention)).collect();
        let mask = stream.clone_htod(&bytes).unwrap();
        let mask = if attention { TokenMask::attention(&mask) } else { TokenMask::padding(&mask) };
        let mut y = stream.clone_htod(&[f32::NAN; T * H]).unwrap();
        plan.forward(&kernels, &stream, &weights.lent(), LayerArgs::new(&x, &mut y).mask(mask), &mut workspace)
            .unwrap();
        let y = stream.clone_dtoh(&y).unwrap();
        let (mut got, mut nothing) = (Vec::new(), Vec::new());
        (0..T).for_each(|t| if padding[t] { &mut nothing } else { &mut got }.extend_from_slice(&y[t * H..][..H]));
        near(&got, &want, "tokens");
        assert!(nothing.iter().all(|&value| value == 0.0), "padding is 0 without a residual");
    }
}

/// Megatron-LM and TransformerEngine count the k largest scores, others what was chosen; TransformerEngine does not divide sigmoids for k = 1.
#[test]
fn what_a_loss_counts() {
    let _turn = turn();
    let context = context();
    let stream = context.default_stream();
    let kernels = Kernels::new(&context).unwrap();
    let loss = |counts, score| {
        let mut desc = MeasuredGatingDesc::new(GatingDesc::new(1, 2, 1, Gating::new(Score::Sigmoid)));
        desc.rule = desc.rule.counts(counts);
        desc.rule.score = score;
        let logits = stream.clone_htod(&[1.0f32, 0.0]).unwrap();
        let bias = stream.clone_htod(&[0.0f32, 5.0]).unwrap();
        let mut ids = stream.alloc_zeros::<i32>(1).unwrap();
        let mut weights = stream.alloc_zeros::<f32>(1).unwrap();
        let [mut chosen, mut counted] = [(); 2].map(|()| stream.alloc_zeros::<i32>(2).unwrap());
        let [mut probability, mut importance] = [(); 2].map(|()| stream.alloc_zeros::<f32>(2).unwrap());
        let mut stats = stream.alloc_zeros::<RouterStats>(1).unwrap();
        let bytes = measured_gating::workspace_bytes(&desc, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let totals = Totals::new(&mut chosen, &mut counted, &mut probability, &mut importance);
        let args = MeasuredGatingArgs::new(&logits, &mut ids, &mut weights, totals, &mut stats, &mut workspace);
        measured_gating::forward(&kernels, &stream, &desc, args.correction_bias(&bias)).unwrap();
        assert_eq!(stream.clone_dtoh(&ids).unwrap(), [1], "the bias chooses");
        let stats = stream.clone_dtoh(&stats).unwrap()[0];
        [stats.balance_loss, stats.sequence_loss]
    };
    let sigmoid = 1.0 / (1.0 + (-1f32).exp());
    for (counts, score, want) in [
        (LossCounts::Choice, LossScore::Sigmoid, 0.812),
        (LossCounts::FirstChoice, LossScore::Sigmoid, 0.812),
        (LossCounts::Scores, LossScore::Sigmoid, 1.188),
        (LossCounts::Scores, LossScore::PlainSigmoid, 2.0 * sigmoid),
        (LossCounts::Choice, LossScore::PlainSigmoid, 1.0),
    ] {
        for got in loss(counts, score) {
            assert!((got - want).abs() < 5e-4, "{counts:?} {score:?}: {got}, should be {want}");
        }
    }
}
