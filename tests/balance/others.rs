//! The operations around measured gating that are no gating: one stream of them, captured, and under several orders of warps.

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::experts::Weight;
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::rules::{Activation, AdmissionRule, Dropout, IDENTITY, NONE, NoiseSource, SecondExpert};

use super::*;

const TOKENS: usize = 300;
const EXPERTS: usize = 12;
const CANDIDATES: usize = 4;
const WIDTH: usize = 64;

/// Admission that passes overflow on by token, a map, losses of totals, and a product with dropout.
struct Others {
    stream: Arc<CudaStream>,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    map: CudaSlice<i32>,
    replicas: CudaSlice<i32>,
    admitted: CudaSlice<i32>,
    admitted_weights: CudaSlice<f32>,
    local_ids: CudaSlice<i32>,
    identity_weight: CudaSlice<f32>,
    sums: CudaSlice<f32>,
    stats: CudaSlice<RouterStats>,
    matrix: CudaSlice<bf16>,
    out: CudaSlice<bf16>,
    admission: AdmissionDesc,
    workspace: Workspace,
}

fn draw(seed: u64) -> Vec<i32> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let choice = |rng: &mut fastrand::Rng| rng.i32(0..EXPERTS as i32) * rng.i32(0..2);
    (0..TOKENS * CANDIDATES).map(|_| choice(&mut rng)).collect()
}

impl Others {
    fn new(stream: &Arc<CudaStream>) -> Others {
        let rule = AdmissionRule::new(EXPERTS, 2, 50, 130)
            .candidates(CANDIDATES)
            .prioritised(true)
            .second(SecondExpert::Random { threshold: 0.5, noise: NoiseSource { seed: 5, offset: 6 } });
        let admission = AdmissionDesc::new(TOKENS, rule);
        let mut rng = fastrand::Rng::with_seed(1);
        let floats = |rng: &mut fastrand::Rng, len: usize| (0..len).map(|_| rng.f32()).collect::<Vec<f32>>();
        let map: Vec<i32> = (0..2 * EXPERTS as i32).map(|i| [i, IDENTITY, NONE, i + 1][i as usize % 4]).collect();
        let matrix: Vec<bf16> = floats(&mut rng, WIDTH * WIDTH).into_iter().map(bf16::from_f32).collect();
        Others {
            stream: stream.clone(),
            ids: stream.clone_htod(&draw(1)).unwrap(),
            weights: stream.clone_htod(&floats(&mut rng, TOKENS * CANDIDATES)).unwrap(),
            map: stream.clone_htod(&map).unwrap(),
            replicas: stream.clone_htod(&vec![2; EXPERTS]).unwrap(),
            admitted: stream.alloc_zeros(2 * TOKENS).unwrap(),
            admitted_weights: stream.alloc_zeros(2 * TOKENS).unwrap(),
            local_ids: stream.alloc_zeros(2 * TOKENS).unwrap(),
            identity_weight: stream.alloc_zeros(TOKENS).unwrap(),
            sums: stream.clone_htod(&floats(&mut rng, EXPERTS)).unwrap(),
            stats: stream.alloc_zeros(1).unwrap(),
            matrix: stream.clone_htod(&matrix).unwrap(),
            out: stream.alloc_zeros(WIDTH * WIDTH).unwrap(),
            workspace: Workspace::new(stream, admission::workspace_bytes(&admission).unwrap()).unwrap(),
            admission,
        }
    }

    fn enqueue(&mut self, offset: u64) {
        let (kernels, stream) = (device::kernels(), &self.stream);
        let (admitted, admitted_weights) = (&mut self.admitted, &mut self.admitted_weights);
        let args = AdmissionArgs::new(&self.ids, &self.weights, admitted, admitted_weights, &mut self.workspace);
        admission::forward(kernels, stream, &self.admission, args).unwrap();
        let desc = ExpertMapDesc::new(TOKENS, EXPERTS, 2).max_replicas(2).seed(3);
        let args = ExpertMapArgs::new(&self.admitted, &self.map, &mut self.local_ids)
            .weights(&self.admitted_weights)
            .replicas(&self.replicas)
            .identity_weight(&mut self.identity_weight);
        expert_map::forward(kernels, stream, &desc, args).unwrap();
        let args = BalanceLossArgs::new(&self.ids, &self.ids, &self.sums, &self.sums, &mut self.stats);
        balance_loss::forward(kernels, stream, &BalanceLossDesc::new(TOKENS, EXPERTS), args).unwrap();
        let desc = GemmDesc::new(Dtype::Bf16, Rows::Dense(WIDTH), WIDTH, WIDTH).activation(Activation::Silu);
        let args = GemmArgs::new(&self.matrix, Weight::new(&self.matrix), &mut self.out)
            .dropout(Dropout::new(0.4, NoiseSource { seed: 7, offset }));
        gemm::forward(kernels, stream, &desc, args).unwrap();
    }

    fn bits(&self) -> Vec<u32> {
        let ints = [&self.admitted, &self.local_ids].map(|buffer| self.stream.clone_dtoh(buffer).unwrap());
        let floats =
            [&self.admitted_weights, &self.identity_weight].map(|buffer| self.stream.clone_dtoh(buffer).unwrap());
        let stats: [u32; 12] = bytemuck::cast(self.stream.clone_dtoh(&self.stats).unwrap()[0]);
        let out = self.stream.clone_dtoh(&self.out).unwrap();
        let ints = ints.into_iter().flatten().map(|value| value as u32);
        let floats = floats.into_iter().flatten().map(f32::to_bits);
        ints.chain(floats).chain(stats).chain(out.into_iter().map(|value| value.to_bits().into())).collect()
    }
}

#[test]
fn the_others_captured_in_a_graph() {
    let context = device::context();
    let stream = context.new_stream().unwrap();
    // SAFETY: every buffer of this test is used on this stream only.
    unsafe { context.disable_event_tracking() };
    let mut others = Others::new(&stream);
    others.enqueue(1);
    stream.synchronize().unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    others.enqueue(1);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().expect("a graph");
    let mut earlier = others.bits();
    for seed in [2, 3] {
        stream.memcpy_htod(&draw(seed), &mut others.ids).unwrap();
        graph.launch().unwrap();
        let replayed = others.bits();
        assert!(replayed != earlier, "other ids, other results");
        others.enqueue(1);
        assert!(replayed == others.bits(), "a replay gives the bits of the operations");
        earlier = replayed;
    }
}

#[test]
fn the_same_bits_in_any_order_of_warps() {
    let Some(control) = device::control() else { return };
    let stream = device::stream();
    let mut results = [0, 1, 2, 3].map(|seed| {
        control.set_seed(seed);
        let mut others = Others::new(&stream);
        others.enqueue(1);
        others.bits()
    });
    control.set_seed(0);
    let first = std::mem::take(&mut results[0]);
    assert!(results[1..].iter().all(|result| *result == first));
    let mut others = Others::new(&stream);
    others.enqueue(2);
    assert!(others.bits() != first, "another offset, another mask");
}
