//! Operations in a CUDA graph: the README's recipe, and the error of each step left out.

mod async_support;

use std::sync::Arc;

use async_support::{E, K, Problem, T, choices, context, turn};
use cudarc::driver::CudaStream;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    BanksArgs, BanksPlan, ExpertWeights, LatentDesc, LatentWeights, LayerDesc, LayerWeights, Norms, RouterWeights,
};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::{Gain, Gating, IdFormat, RmsNorm, Score};
use moe_kernels::{Dtype, Error, Kernels, Workspace};

const H: usize = 16;
const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

/// Small whole numbers: sums are exact.
fn values(n: usize, step: usize) -> Vec<f32> {
    (0..n).map(|i| (i * step % 11) as f32 - 5.0).collect()
}

fn logits_of(x: &[f32], weight: &[f32]) -> Vec<f32> {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    x.chunks(H).flat_map(|row| weight.chunks(H).map(move |expert| dot(row, expert))).collect()
}

/// Ends a capture that an operation was refused in, and throws it away.
fn abandon(stream: &Arc<CudaStream>) {
    let _ = stream.end_capture(CUgraphInstantiate_flags(0));
}

#[test]
fn the_recipe() {
    let _turn = turn();
    let context = context();
    // 1. Order by the graph, not by events; before the graph's buffers are made.
    // SAFETY: everything in this test is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let kernels = Kernels::new(&context).unwrap();
    let routing = RouterDesc::new(Dtype::F32, T, E, H);
    let choice = GatingDesc::new(T, E, K, Gating::new(Score::Softmax));
    let weight = values(E * H, 7);
    let mut x = stream.clone_htod(&values(T * H, 3)).unwrap();
    let weight_on_device = stream.clone_htod(&weight).unwrap();
    let mut logits = stream.alloc_zeros::<f32>(T * E).unwrap();
    let (mut ids, mut weights) = (stream.alloc_zeros::<i32>(T * K).unwrap(), stream.alloc_zeros::<f32>(T * K).unwrap());
    // 2. Load the kernels.
    let device = kernels.device();
    let selections = [router::select(&routing, device).unwrap(), gating::select(&choice, device).unwrap()];
    kernels.preload(selections.map(|selection| selection.kernel)).unwrap();
    stream.synchronize().unwrap();
    // 3. Capture.
    stream.begin_capture(MODE).unwrap();
    router::forward(&kernels, &stream, &routing, RouterArgs::new(&x, &weight_on_device, &mut logits)).unwrap();
    gating::forward(&kernels, &stream, &choice, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
    assert_eq!(stream.clone_dtoh(&ids).unwrap(), [0; T * K], "nothing has run yet");
    // 4. Replay while kernels and buffers live.
    for step in [3, 5, 8] {
        let values = values(T * H, step);
        stream.memcpy_htod(&values, &mut x).unwrap();
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&ids).unwrap(), choices(&logits_of(&values, &weight)), "step {step}");
    }
    stream.synchronize().unwrap();
    drop(graph);
}

#[test]
fn events_that_order_streams_do_not_go_into_a_graph() {
    let _turn = turn();
    let p = Problem::new(&context());
    let (logits, mut ids, mut weights) = p.buffers();
    let stream = p.context.new_stream().unwrap();
    stream.begin_capture(MODE).unwrap();
    let args = GatingArgs::new(&logits, &mut ids, &mut weights);
    let error = gating::forward(&p.kernels, &stream, &p.desc, args).unwrap_err();
    abandon(&stream);
    assert!(matches!(error, Error::Capture { operation: "gating", .. }), "{error}");
    assert!(error.to_string().contains("disable_event_tracking"), "{error}");
}

#[test]
fn kernels_are_loaded_before() {
    let _turn = turn();
    let context = context();
    // SAFETY: everything in this test is on one stream.
    unsafe { context.disable_event_tracking() };
    let p = Problem::new(&context);
    let (logits, mut ids, mut weights) = p.buffers();
    let stream = context.new_stream().unwrap();
    let empty = Kernels::new(&context).unwrap();
    stream.begin_capture(MODE).unwrap();
    let args = GatingArgs::new(&logits, &mut ids, &mut weights);
    let error = gating::forward(&empty, &stream, &p.desc, args).unwrap_err();
    assert!(matches!(error, Error::Capture { operation: "gating", .. }), "{error}");
    assert!(error.to_string().contains("preload"), "{error}");
    // The capture is not spoilt: the same with loaded kernels goes into it.
    let args = GatingArgs::new(&logits, &mut ids, &mut weights);
    gating::forward(&p.kernels, &stream, &p.desc, args).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
    graph.launch().unwrap();
    assert_eq!(stream.clone_dtoh(&ids).unwrap(), p.expected());
}

/// Banks of experts with norms and projections round them: the types of tokens are read at each replay.
#[test]
fn banks_of_experts() {
    let _turn = turn();
    let context = context();
    // SAFETY: everything in this test is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let kernels = Kernels::new(&context).unwrap();
    let norm = |gain| Some(RmsNorm::new(1e-3).gain(gain));
    let latent = LatentDesc::new(Dtype::F32, 8).norm(norm(Gain::One));
    let wide = LayerDesc::new(Dtype::F32, H, 24, E, K).latent(Some(latent));
    let narrow = LayerDesc::new(Dtype::F32, H, 8, E, K).norms(Norms::new().slots(norm(Gain::One)));
    let plan = BanksPlan::new(&[wide, narrow], T, IdFormat::I32, kernels.device()).unwrap();
    let put = |n: usize, step: usize| stream.clone_htod(&values(n, step)).unwrap();
    let x = put(T * H, 3);
    let (router, other_router) = (put(E * H, 7), put(E * H, 4));
    let (gate_up, down) = (put(E * 48 * 8, 5), put(E * 8 * 24, 9));
    let (other_gate_up, other_down) = (put(E * 16 * H, 2), put(E * H * 8, 8));
    let (before, after) = (put(8 * H, 6), put(H * 8, 10));
    let weights = LayerWeights::new(
        RouterWeights::new(&router),
        ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down))
            .latent(LatentWeights::new(Weight::new(&before), Weight::new(&after))),
    );
    let other = LayerWeights::new(
        RouterWeights::new(&other_router),
        ExpertWeights::new(Weight::new(&other_gate_up), Weight::new(&other_down)),
    );
    let mut types = stream.alloc_zeros::<i32>(T).unwrap();
    let mut y = stream.alloc_zeros::<f32>(T * H).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let batches: Vec<Vec<i32>> =
        (0..3).map(|batch| (0..T as i32).map(|t| (t + batch) % (batch + 1)).collect()).collect();
    // The first pass loads the kernels.
    let pass = |y: &mut _, types: &_, workspace: &mut _| {
        plan.forward(&kernels, &stream, [&weights, &other], BanksArgs::<f32, 2>::new(&x, types, y), workspace).unwrap()
    };
    let mut want = Vec::new();
    for batch in &batches {
        stream.memcpy_htod(batch, &mut types).unwrap();
        pass(&mut y, &types, &mut workspace);
        want.push(stream.clone_dtoh(&y).unwrap());
    }
    assert!(want[0] != want[1] && want[1] != want[2], "types matter");
    stream.synchronize().unwrap();
    stream.begin_capture(MODE).unwrap();
    pass(&mut y, &types, &mut workspace);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
    for (batch, want) in batches.iter().zip(&want).rev() {
        stream.memcpy_htod(batch, &mut types).unwrap();
        stream.memset_zeros(&mut y).unwrap();
        graph.launch().unwrap();
        assert!(stream.clone_dtoh(&y).unwrap() == *want, "another result in the graph");
    }
    stream.synchronize().unwrap();
    drop(graph);
}
