//! What the products of a layer do on the software device as an H100: shared-memory wavefronts, bytes through L2 and device memory, rows computed. One
//! test a shape: the profile belongs to the process.
//!
//! `cargo test --release --test hopper_counters -- --ignored --nocapture --test-threads 1` prints the numbers that README has, of whole models too.

use std::sync::{Mutex, PoisonError};

use half::bf16;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerWeights, RouterWeights};
use moe_kernels::{Dtype, Kernels, Workspace, device};
use softcuda::profile::LaunchProfile;

/// A layer of `experts` experts and k 8 over so many tokens, routed as random logits say.
#[derive(Clone, Copy)]
struct Shape {
    experts: usize,
    hidden: usize,
    intermediate: usize,
    tokens: usize,
}

const K: usize = 8;

/// What a product did.
struct Product {
    kernel: String,
    wavefronts: f64,
    l2_bytes: f64,
    /// Of device memory, over what must be read and written.
    dram: f64,
    /// Rows multiplied for a live one.
    rows: f64,
    /// The modelled time.
    seconds: f64,
    /// Operations a second of it.
    rate: f64,
}

/// What a layer did.
struct Layer {
    products: [Product; 2],
    /// Modelled time of its other launches: router, gating, dispatch, combine.
    others: f64,
}

/// A layer of this shape; none on a real device.
fn layer(shape: Shape) -> Option<Layer> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let choice = softcuda::install_if_no_gpu().expect("a CUDA driver, real or soft");
    let control = choice.control()?;
    let stream = device::open(0).expect("device 0").default_stream();
    let kernels = Kernels::new(stream.context()).expect("a supported device");
    if kernels.device().compute_capability != (9, 0) {
        return None;
    }
    let Shape { experts, hidden, intermediate, tokens } = shape;
    let mut rng = fastrand::Rng::with_seed(7);
    let mut random = |len: usize| -> Vec<bf16> { (0..len).map(|_| bf16::from_f32(rng.f32() - 0.5)).collect() };
    let (router, x) = (random(experts * hidden), random(tokens * hidden));
    let put = |values: &[bf16]| stream.clone_htod(values).expect("device memory");
    let (router, x) = (put(&router), put(&x));
    let zeros = |len: usize| stream.alloc_zeros::<bf16>(len).expect("device memory");
    let mut y = zeros(tokens * hidden);
    let (gate_up, down) = (zeros(experts * 2 * intermediate * hidden), zeros(experts * hidden * intermediate));
    let plan = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, K)
        .plan(tokens, kernels.device())
        .expect("a valid layer");
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).expect("device memory");
    let weights =
        LayerWeights::new(RouterWeights::new(&router), ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down)));
    let ((), profile) = control.profiled(|| {
        plan.forward(&kernels, &stream, &weights, LayerArgs::new(&x, &mut y), &mut workspace).expect("enqueued");
        stream.synchronize().expect("the kernels ran");
    });
    let (gemms, others): (Vec<&LaunchProfile>, Vec<_>) =
        profile.launches.iter().partition(|launch| launch.kernel.starts_with("gemm_"));
    let others = others.iter().map(|launch| launch.modelled_seconds).sum();
    let [first, second] = gemms[..] else { panic!("two products, not {}", gemms.len()) };
    let rows = tokens * K;
    // Elements that a product must read and write: its inputs, all weights, its outputs.
    let first = product(first, [rows, 2 * intermediate, hidden], tokens * hidden + rows * intermediate, experts);
    let second = product(second, [rows, hidden, intermediate], rows * (intermediate + hidden), experts);
    for product in [&first, &second] {
        println!(
            "E {experts} k {K} H {hidden} I {intermediate} T {tokens}, {}: {:.2} M wavefronts, {:.0} MB through L2, DRAM {:.3} of compulsory, \
             {:.3} rows for a live one, modelled {:.0} TFLOP/s",
            product.kernel,
            product.wavefronts / 1e6,
            product.l2_bytes / 1e6,
            product.dram,
            product.rows,
            product.rate / 1e12
        );
    }
    Some(Layer { products: [first, second], others })
}

fn product(launch: &LaunchProfile, [rows, outputs, depth]: [usize; 3], elements: usize, experts: usize) -> Product {
    let work = &launch.work;
    let live = (rows * outputs * depth) as f64;
    let compulsory = 2.0 * (elements + experts * outputs * depth) as f64;
    let computed: u64 = work.tensor.values().map(|ops| ops.multiply_adds).sum();
    Product {
        kernel: launch.kernel.clone(),
        wavefronts: work.shared.wavefronts as f64,
        l2_bytes: work.traffic.l2_bytes() as f64,
        dram: work.traffic.dram_bytes() as f64 / compulsory,
        rows: computed as f64 / live,
        seconds: launch.modelled_seconds,
        rate: 2.0 * live / launch.modelled_seconds,
    }
}

/// Triton's fused MoE kernel in tiles of 128x256x64, in the same profile: 15.1 and 8.3 million wavefronts, 680 and 363 MB.
#[test]
fn less_than_triton_on_sixteen_experts() {
    let shape = Shape { experts: 16, hidden: 2048, intermediate: 768, tokens: 1024 };
    let Some(Layer { products, .. }) = layer(shape) else { return };
    for (product, (wavefronts, bytes)) in products.iter().zip([(15.1e6, 680e6), (8.3e6, 363e6)]) {
        assert!(product.kernel.ends_with("_sm90a"), "{}", product.kernel);
        assert!(product.wavefronts <= wavefronts, "{}: {} wavefronts", product.kernel, product.wavefronts);
        assert!(product.l2_bytes <= bytes, "{}: {} bytes", product.kernel, product.l2_bytes);
        assert!(product.rows <= 1.13, "{}: {} rows", product.kernel, product.rows);
    }
}

#[test]
#[ignore = "a minute and a half in release, and 2 GB of memory"]
fn many_experts() {
    let qwen3 = Shape { experts: 128, hidden: 2048, intermediate: 768, tokens: 4096 };
    let few = Shape { tokens: 1024, ..qwen3 };
    let [Some(few), Some(whole)] = [few, qwen3].map(layer) else { return };
    for (layer, most_rows, most_dram) in [(&few, 1.5, 1.1), (&whole, 1.13, 1.05)] {
        for product in &layer.products {
            assert!(product.rows <= most_rows, "{}: {} rows", product.kernel, product.rows);
            assert!(product.dram <= most_dram, "{}: {} of compulsory", product.kernel, product.dram);
        }
    }
    // Qwen3-30B at T 32768 by eighths: the products of an eighth of its experts, each with as many rows as there; the rest of an eighth of its tokens.
    let Some(Layer { products, .. }) = layer(Shape { experts: 16, ..qwen3 }) else { return };
    let seconds = products.iter().map(|product| product.seconds).sum::<f64>() + whole.others;
    let operations = products.iter().map(|product| product.rate * product.seconds).sum::<f64>();
    println!("T 32768 by eighths: modelled {:.0} TFLOP/s for the layer", operations / seconds / 1e12);
    for product in &products {
        assert!(product.rate >= 600e12, "{}: {} operations a second", product.kernel, product.rate);
    }
    assert!(operations / seconds >= 540e12, "{} operations a second", operations / seconds);
}
