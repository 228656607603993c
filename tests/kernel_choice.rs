//! The closed-form cost against the software device's profile: of the kernels that compute a product, and of the heights that a layer's tiles may have, those are taken that keep
//! the device's busiest unit busy shortest. Device memory is left out, as all of them ask it for the same bytes.

use half::bf16;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::tiles::max_tiles;
use moe_kernels::experts::{Dispatched, SlotShape, Weight, overrides};
use moe_kernels::layer::LayerDesc;
use moe_kernels::rules::{Activation, Glu, WeightDesc};
use moe_kernels::{Dtype, Kernels, Workspace, device};
use softcuda::profile::LaunchProfile;

/// What the choice may take over the best: the cost counts tiles by what is expected of random choices, and its units are five.
const WITHIN: f64 = 1.05;

/// Experts, choices of a token, hidden size, intermediate size, tokens.
const LAYERS: [[usize; 5]; 5] = [
    // Few tiles: low ones.
    [4, 2, 512, 512, 160],
    // By wgmma in low tiles, as tall ones leave multiprocessors idle.
    [8, 4, 1024, 256, 256],
    // By mma.sync.
    [8, 4, 736, 256, 96],
    // By wgmma in more than a round of tall tiles.
    [8, 4, 128, 2048, 256],
    // By wgmma in a round of tall tiles, where those of mma.sync take two: their rates decide.
    [1, 1, 256, 1792, 640],
];

fn busiest(launch: &LaunchProfile) -> f64 {
    launch.bounds.iter().filter(|bound| bound.unit != "DRAM").map(|bound| bound.seconds).fold(0.0, f64::max)
}

#[test]
fn the_profile_agrees() {
    let choice = softcuda::install_if_no_gpu().expect("a CUDA driver, real or soft");
    // A real device counts nothing.
    let Some(control) = choice.control() else { return };
    let stream = device::open(0).expect("device 0").default_stream();
    let kernels = Kernels::new(stream.context()).expect("a supported device");
    let zeros = |len: usize| stream.alloc_zeros::<bf16>(len).expect("device memory");
    for [experts, top_k, hidden, intermediate, tokens] in LAYERS {
        let slots = tokens * top_k;
        let plan = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k).plan(tokens, kernels.device());
        let planned = plan.expect("a valid layer").tile_m();
        let mut rng = fastrand::Rng::with_seed(7);
        let ids: Vec<i32> = (0..tokens).flat_map(|_| rng.choose_multiple(0..experts as i32, top_k)).collect();
        let ids = stream.clone_htod(&ids).expect("device memory");
        let (x, mut h, mut y) = (zeros(tokens * hidden), zeros(slots * intermediate), zeros(slots * hidden));
        let (gate_up, down) = (zeros(experts * 2 * intermediate * hidden), zeros(experts * hidden * intermediate));
        let heights = [64, 128].map(|tile_m| {
            let desc = DispatchDesc::new(tokens, experts, top_k, tile_m);
            let bytes = dispatch::workspace_bytes(&desc, kernels.device()).expect("a valid dispatch");
            let mut workspace = Workspace::new(&stream, bytes).expect("device memory");
            let rows = SlotShape::new(tokens, experts, Some(top_k), slots, tile_m, max_tiles(slots, experts, tile_m));
            let mut dispatched = Dispatched::new(&stream, &rows).expect("device memory");
            let args = DispatchArgs::new(&ids, &mut dispatched, &mut workspace);
            dispatch::forward(&kernels, &stream, &desc, args).expect("enqueued");
            stream.synchronize().expect("the kernels ran");
            let weight = WeightDesc::new(Dtype::Bf16);
            let first = GemmDesc::new(Dtype::Bf16, Rows::Grouped(rows), intermediate, hidden).gather(true);
            let first = first.weight(weight.glu(Glu::Split)).activation(Activation::Silu);
            let second = GemmDesc::new(Dtype::Bf16, Rows::Grouped(rows), hidden, intermediate);
            let mut times = |desc: &GemmDesc| -> f64 {
                let name = |desc: &GemmDesc| gemm::select(desc, kernels.device()).expect("a kernel").kernel.name();
                let mut all = Vec::new();
                for candidate in overrides::candidates(desc, kernels.device()).expect("a valid product") {
                    let ((), profile) = control.profiled(|| {
                        let args = if desc.gather {
                            GemmArgs::new(&x, Weight::new(&gate_up), &mut h)
                        } else {
                            GemmArgs::new(&h, Weight::new(&down), &mut y)
                        };
                        let args = args.dispatched(&dispatched);
                        gemm::forward(&kernels, &stream, &candidate, args).expect("enqueued");
                        stream.synchronize().expect("the kernel ran");
                    });
                    all.push((busiest(&profile.launches[0]), name(&candidate)));
                }
                let chosen = all.iter().find(|(_, kernel)| *kernel == name(desc)).expect("it is a candidate").0;
                let least = all.iter().map(|(time, _)| *time).fold(f64::INFINITY, f64::min);
                println!("E {experts} k {top_k} H {hidden} I {intermediate} T {tokens}, tiles of {tile_m}: {all:?}");
                assert!(chosen <= WITHIN * least, "tiles of {tile_m}: {} takes {chosen}, of {all:?}", name(desc));
                chosen
            };
            (tile_m, times(&first) + times(&second))
        });
        let of = |height| heights.iter().find(|(tile_m, _)| *tile_m == height).expect("64 or 128 rows").1;
        let least = heights[0].1.min(heights[1].1);
        assert!(of(planned) <= WITHIN * least, "{planned} of {heights:?}");
    }
}
