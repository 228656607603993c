//! Measured gating through the library: random batches, degenerate ones, many layers, CUDA graphs, very many tokens.

#[path = "balance/others.rs"]
mod others;
mod support;

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream};
use moe_kernels::Workspace;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::reference;
use moe_kernels::routers::balance_loss::{self, BalanceLossArgs, BalanceLossDesc};
use moe_kernels::routers::gating::GatingDesc;
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::routers::update_bias::{self, UpdateBiasArgs, UpdateBiasDesc};
use moe_kernels::rules::{BalanceRule, Gating, LossScore, Score};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use support::compare::{BATCH_SUMS, LOSSES, to_f64};
use support::device;
use support::inputs::run_seed;
use support::lists;

/// Buffers of one measured gating, all full of junk.
struct Buffers {
    stream: Arc<CudaStream>,
    logits: CudaSlice<f32>,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    counts: CudaSlice<i32>,
    loss_counts: CudaSlice<i32>,
    probability: CudaSlice<f32>,
    importance: CudaSlice<f32>,
    stats: CudaSlice<RouterStats>,
    workspace: Workspace,
}

impl Buffers {
    fn new(stream: &Arc<CudaStream>, desc: &MeasuredGatingDesc, logits: &[f32]) -> Buffers {
        let GatingDesc { tokens, experts, top_k, .. } = desc.gating;
        let ints = |len: usize| stream.clone_htod(&vec![-7i32; len.max(1)]).unwrap();
        let floats = |len: usize| stream.clone_htod(&vec![f32::NAN; len.max(1)]).unwrap();
        let mut device_logits = floats(tokens * experts);
        if !logits.is_empty() {
            stream.memcpy_htod(logits, &mut device_logits).unwrap();
        }
        let bytes = measured_gating::workspace_bytes(desc, device::kernels().device()).unwrap();
        let mut junk = RouterStats::default();
        (junk.tokens, junk.z_loss) = (77, f32::NAN);
        Buffers {
            stream: stream.clone(),
            logits: device_logits,
            ids: ints(tokens * top_k),
            weights: floats(tokens * top_k),
            counts: ints(experts),
            loss_counts: ints(experts),
            probability: floats(experts),
            importance: floats(experts),
            stats: stream.clone_htod(&[junk]).unwrap(),
            workspace: Workspace::new(stream, bytes).unwrap(),
        }
    }

    fn enqueue(&mut self, desc: &MeasuredGatingDesc) {
        let totals = Totals::new(&mut self.counts, &mut self.loss_counts, &mut self.probability, &mut self.importance);
        let (ids, weights) = (&mut self.ids, &mut self.weights);
        let args = MeasuredGatingArgs::new(&self.logits, ids, weights, totals, &mut self.stats, &mut self.workspace);
        measured_gating::forward(device::kernels(), &self.stream, desc, args).unwrap();
    }

    fn stats(&self) -> RouterStats {
        self.stream.clone_dtoh(&self.stats).unwrap()[0]
    }

    fn ints(&self, buffer: &CudaSlice<i32>) -> Vec<i32> {
        self.stream.clone_dtoh(buffer).unwrap()
    }
}

fn desc(tokens: usize, experts: usize, top_k: usize, score: Score) -> MeasuredGatingDesc {
    MeasuredGatingDesc::new(GatingDesc::new(tokens, experts, top_k, Gating::new(score)))
}

fn near(what: &str, got: f32, want: f64, tolerance: f64) {
    let close = (f64::from(got) - want).abs() <= tolerance * (1.0 + want.abs());
    assert!(close || (got.is_nan() && want.is_nan()), "{what}: got {got:e}, want {want:e}");
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(run_seed()),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(96))]

    /// Any shape, sequences of any length, logits skewed, tied or not numbers: as the reference, and the invariants of each loss.
    #[test]
    fn any_batch(
        experts in prop_oneof![1usize..=8, 9usize..=70, 71usize..=300, Just(1025usize)],
        k in 1usize..=32,
        tokens in prop_oneof![1usize..=4, 5usize..=120],
        sequence in 1usize..=130,
        score in prop::sample::select(Score::COMMON.to_vec()),
        (first_choice_only, by_sigmoid) in any::<(bool, bool)>(),
        capacity in prop::option::of(1usize..=5),
        skew in 0.0f32..4.0,
        odd in 0u32..4,
        seed in any::<u64>(),
    ) {
        let mut desc = desc(tokens, experts, k.min(experts), score);
        let by_sigmoid = by_sigmoid && score == Score::Sigmoid;
        let loss = if by_sigmoid { LossScore::Sigmoid } else { LossScore::Softmax };
        desc.rule = BalanceRule::new(loss, sequence).first_choice_only(first_choice_only).capacity(capacity);
        let mut rng = fastrand::Rng::with_seed(seed);
        let logits: Vec<f32> = (0..tokens * experts)
            .map(|i| match (odd, rng.u32(..64)) {
                (1, _) => rng.i32(-1..2) as f32,
                (2, 0) => f32::NAN,
                (2, 1) => f32::NEG_INFINITY,
                (3, 0) => f32::INFINITY,
                _ => 4.0 * rng.f32() - 2.0 - skew * ((i % experts + 1) as f32).ln(),
            })
            .collect();
        let mut buffers = Buffers::new(&device::stream(), &desc, &logits);
        buffers.enqueue(&desc);
        let got = buffers.stats();
        let ids = buffers.ints(&buffers.ids);
        let weights = to_f64(&buffers.stream.clone_dtoh(&buffers.weights).unwrap());
        let top_k = desc.gating.top_k;
        let gated = reference::gating::gate::<f32, f32>(&logits, None, experts, top_k, &desc.gating.gating).unwrap();
        prop_assert_eq!(&ids, &gated.ids);
        let want = reference::balance::balance(&logits, &ids, &weights, experts, top_k, &desc.rule).unwrap();
        prop_assert_eq!(buffers.ints(&buffers.counts), want.counts.clone());
        prop_assert_eq!(u64::from(got.dropped), want.dropped);
        for (what, got, want) in [
            ("balance_loss", got.balance_loss, want.totals.loss()),
            ("sequence_loss", got.sequence_loss, want.sequence_loss),
            ("z_loss", got.z_loss, want.z_loss),
            ("entropy", got.entropy, want.entropy),
            ("importance_cv2", got.importance_cv2, reference::balance::cv_squared(&want.importance)),
            ("max_over_mean", got.max_over_mean, want.max_over_mean()),
        ] {
            near(what, got, want, BATCH_SUMS);
        }
        // Entropy between none and an even choice; a fraction is one; no expert has less than the mean of the fullest.
        prop_assert!(got.entropy.is_nan() || (-BATCH_SUMS..=f64::from(experts as f32).ln() * (1.0 + BATCH_SUMS) + BATCH_SUMS).contains(&got.entropy.into()));
        prop_assert!((0.0..=1.0).contains(&got.dropped_fraction));
        prop_assert!(got.max_over_mean >= 1.0 && got.load_cv2 >= 0.0);
    }
}

/// Token t prefers expert t mod E by the same margin: every measure of skew is exactly at its minimum.
#[test]
fn balanced_is_exactly_balanced() {
    for (experts, rounds) in [(4usize, 1usize), (8, 16), (64, 5), (100, 3), (512, 2)] {
        let tokens = experts * rounds;
        let logits: Vec<f32> =
            (0..tokens * experts).map(|i| if i / experts % experts == i % experts { 1.0 } else { 0.0 }).collect();
        let desc = desc(tokens, experts, 1, Score::Softmax);
        let mut buffers = Buffers::new(&device::stream(), &desc, &logits);
        buffers.enqueue(&desc);
        let got = buffers.stats();
        assert_eq!((got.load_cv2, got.max_over_mean), (0.0, 1.0), "E={experts}");
        assert_eq!(got.max_load as usize, rounds, "E={experts}");
        // Sums of equal weights, in orders that differ by expert.
        assert!(f64::from(got.importance_cv2) <= LOSSES * LOSSES * 10.0, "E={experts}: {}", got.importance_cv2);
        near("balance_loss", got.balance_loss, 1.0, LOSSES);
        near("sequence_loss", got.sequence_loss, 1.0, LOSSES);
    }
}

#[test]
fn no_tokens() {
    let empty = desc(0, 8, 2, Score::Softmax);
    let mut buffers = Buffers::new(&device::stream(), &empty, &[]);
    buffers.enqueue(&empty.earlier_tokens(5));
    assert_eq!(buffers.stats(), RouterStats::default());
    assert_eq!(buffers.ints(&buffers.counts), [0; 8]);
    assert_eq!(buffers.ints(&buffers.loss_counts), [-7; 8], "earlier totals stay");
    buffers.enqueue(&empty);
    assert_eq!(buffers.ints(&buffers.loss_counts), [0; 8]);
    assert_eq!(buffers.stream.clone_dtoh(&buffers.probability).unwrap(), [0.0; 8]);
}

/// Mixtral's loss of several layers: that of the layers' tokens in one heap, which is not the mean of the layers' losses.
#[test]
fn layers_add_up() {
    let (tokens, experts, top_k, layers) = (50, 8, 2, 3);
    let desc = desc(tokens, experts, top_k, Score::Softmax);
    let mut rng = fastrand::Rng::with_seed(3);
    let all: Vec<f32> = (0..layers * tokens * experts)
        .map(|i| 2.0 * rng.f32() + if i % experts == i / (tokens * experts) { 2.0 } else { 0.0 })
        .collect();
    let stream = device::stream();
    let mut buffers = Buffers::new(&stream, &desc, &all[..tokens * experts]);
    let mut separate = 0.0;
    for (layer, logits) in all.chunks(tokens * experts).enumerate() {
        let mut alone = Buffers::new(&stream, &desc, logits);
        alone.enqueue(&desc);
        separate += f64::from(alone.stats().balance_loss) / layers as f64;
        stream.memcpy_htod(logits, &mut buffers.logits).unwrap();
        buffers.enqueue(&desc.earlier_tokens(layer * tokens));
    }
    let gating = &desc.gating.gating;
    let gated = reference::gating::gate::<f32, f32>(&all, None, experts, top_k, gating).unwrap();
    let want = reference::balance::balance(&all, &gated.ids, &gated.weights, experts, top_k, &desc.rule).unwrap();
    near("the loss of all layers", buffers.stats().balance_loss, want.totals.loss(), LOSSES);
    assert!((separate - want.totals.loss()).abs() > 0.01, "{separate} must differ from {}", want.totals.loss());

    // The same from the totals alone.
    let mut stats = stream.clone_htod(&[RouterStats::default()]).unwrap();
    let Buffers { counts, loss_counts, probability, importance, .. } = &buffers;
    let args = BalanceLossArgs::new(counts, loss_counts, probability, importance, &mut stats);
    let whole = BalanceLossDesc::new(layers * tokens, experts);
    balance_loss::forward(device::kernels(), &stream, &whole, args).unwrap();
    let again = stream.clone_dtoh(&stats).unwrap()[0];
    assert_eq!(again.balance_loss.to_bits(), buffers.stats().balance_loss.to_bits());
}

/// Gating, losses, statistics and sorted slots in two launches, then the bias of the next step: captured, replayed, the same bits.
#[test]
fn captured_in_a_graph() {
    let context = device::context();
    let stream = context.new_stream().unwrap();
    // SAFETY: every buffer of this test is used on this stream only.
    unsafe { context.disable_event_tracking() };
    let kernels = device::kernels();
    let (tokens, experts, top_k) = (200, 64, 6);
    let measured = desc(tokens, experts, top_k, Score::Softmax);
    let draw = |seed: u64| -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(seed);
        (0..tokens * experts).map(|_| 4.0 * rng.f32()).collect()
    };
    let mut buffers = Buffers::new(&stream, &measured, &draw(1));
    let order = DispatchDesc::new(tokens, experts, top_k, 16);
    let mut dispatched = lists::junk(&stream, &order.shape());
    let mut bias = stream.alloc_zeros::<f32>(experts).unwrap();
    let mut sort_space = Workspace::new(&stream, dispatch::workspace_bytes(&order, kernels.device()).unwrap()).unwrap();
    let mut enqueue = |buffers: &mut Buffers, bias: &mut CudaSlice<f32>| {
        buffers.enqueue(&measured);
        let args = DispatchArgs::new(&buffers.ids, &mut dispatched, &mut sort_space);
        dispatch::forward(kernels, &buffers.stream, &order, args).unwrap();
        let step = UpdateBiasDesc::new(experts, 0.001);
        update_bias::forward(kernels, &buffers.stream, &step, UpdateBiasArgs::new(&buffers.counts, bias)).unwrap();
    };
    enqueue(&mut buffers, &mut bias);
    stream.synchronize().unwrap();

    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    enqueue(&mut buffers, &mut bias);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().expect("a graph");
    for seed in [2, 3] {
        stream.memcpy_htod(&draw(seed), &mut buffers.logits).unwrap();
        let before = stream.clone_dtoh(&bias).unwrap();
        graph.launch().unwrap();
        let replayed = (buffers.stats(), stream.clone_dtoh(&bias).unwrap());
        stream.memcpy_htod(&before, &mut bias).unwrap();
        enqueue(&mut buffers, &mut bias);
        assert_eq!(replayed, (buffers.stats(), stream.clone_dtoh(&bias).unwrap()));
        assert_ne!(replayed.1, before, "the bias moved");
    }
}

/// 2^20 tokens: 64-bit rows, and sums that stay good. Expert 1 is as likely as expert 0 times e for odd tokens, and less for even.
#[test]
fn a_million_tokens() {
    const TOKENS: usize = 1 << 20;
    let desc = desc(TOKENS, 2, 2, Score::Softmax);
    let logits: Vec<f32> = (0..TOKENS).flat_map(|t| [0.0, if t % 2 == 1 { 1.0 } else { -3.0 }]).collect();
    let mut buffers = Buffers::new(&device::stream(), &desc, &logits);
    buffers.enqueue(&desc);
    assert_eq!(buffers.ints(&buffers.counts), [TOKENS as i32; 2]);
    let p = |l: f64| l.exp() / (1.0 + l.exp());
    let half = TOKENS as f64 / 2.0;
    let probability = buffers.stream.clone_dtoh(&buffers.probability).unwrap();
    near("probability", probability[1], half * (p(1.0) + p(-3.0)), BATCH_SUMS);
    let got = buffers.stats();
    assert_eq!((got.slots as usize, got.max_load as usize), (2 * TOKENS, TOKENS));
    let lse = |l: f64| (1.0 + l.exp()).ln().powi(2);
    near("z_loss", got.z_loss, (lse(1.0) + lse(-3.0)) / 2.0, BATCH_SUMS);
    near("balance_loss", got.balance_loss, 2.0, BATCH_SUMS);
}
