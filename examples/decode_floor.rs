//! Layers of a few tokens at full size on the modelled GPU: what must come from DRAM, and what the launches need.
//!
//! Runs on the software device, whose counters are exact and whose times are lower bounds by unit: no GPU took them. Weights of experts are never
//! written, as no count depends on their values; memory is that of the experts that have rows all the same, so that large models take a while.

#[allow(dead_code)] // the other benches use the rest
#[path = "../benches/common/shapes.rs"]
mod shapes;

use clap::Parser;
use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights};
use moe_kernels::{Dtype, Kernels, Workspace, device};
use shapes::{SHAPES, Shape};
use softcuda::profile::{Caches, LaunchProfile, Profile};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What a launch costs beside its work, in seconds, by the goal that this table is measured by.
const LAUNCH_SECONDS: f64 = 2e-6;

/// Latency of DRAM under load, in seconds: about that of an H100.
const LATENCY_SECONDS: f64 = 1e-6;

/// Counts what layers of few tokens read, and models how long it takes at least.
#[derive(Parser)]
struct Options {
    /// Which, as MODEL/TOKENS; `*` stands for anything. Without a slash all of 1, 8 and 64 tokens.
    #[arg(default_value = "qwen3-30b-a3b")]
    names: Vec<String>,
    /// The kernels that give bits which do not depend on the batch: one set for every number of tokens.
    #[arg(long)]
    invariant: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let choice = softcuda::install_if_no_gpu()?;
    let control = choice.control().ok_or("only the software device counts: MOE_DEVICE=soft")?;
    let context = device::open(0)?;
    let (stream, kernels) = (context.default_stream(), Kernels::new(&context)?);
    println!("{}; in flight: KiB a multiprocessor; us: modelled, no GPU's", context.name()?);
    println!(
        "{:<20} {:>3} {:>7} {:>8} {:>9} {:>9} {:>9} {:>7} {:>7} {:>6} {:>6}",
        "model", "T", "experts", "MB", "floor us", "model us", "+2/launch", "ratio", "blocks", "flight", "launch"
    );
    for shape in SHAPES {
        for tokens in [1, 2, 4, 8, 16, 32, 64] {
            let name = format!("{}/{tokens}", shape.model);
            let wanted = |pattern: &String| match pattern.contains('/') {
                true => wildmatch::WildMatch::new(pattern).matches(&name),
                false => wildmatch::WildMatch::new(pattern).matches(shape.model) && [1, 8, 64].contains(&tokens),
            };
            if options.names.iter().any(wanted) {
                let row = measure(control, &stream, &kernels, shape, tokens, options.invariant)?;
                row.print(shape.model, tokens);
            }
        }
    }
    Ok(())
}

/// A layer's forward pass.
struct Row {
    live_experts: usize,
    /// Bytes that must come from DRAM or go there.
    bytes: f64,
    profile: Profile,
}

fn measure(
    control: &softcuda::Control,
    stream: &std::sync::Arc<CudaStream>,
    kernels: &Kernels,
    shape: &Shape,
    tokens: usize,
    invariant: bool,
) -> Result<Row> {
    let &Shape { model, experts, top_k, hidden, intermediate, .. } = shape;
    let gpt_oss = model.starts_with("gpt-oss");
    let mlp = if gpt_oss { Mlp::gpt_oss(Dtype::Bf16) } else { Mlp::swiglu(Dtype::Bf16) };
    let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k).mlp(mlp).batch_invariant(invariant);
    let plan = desc.plan(tokens, kernels.device())?;
    let mut rng = fastrand::Rng::with_seed(7);
    let mut random = |len: usize| -> Result<CudaSlice<bf16>> {
        let values: Vec<bf16> = (0..len).map(|_| bf16::from_f32(rng.f32() - 0.5)).collect();
        Ok(stream.clone_htod(&values)?)
    };
    let (x, router) = (random(tokens * hidden)?, random(experts * hidden)?);
    // SAFETY: what these hold does not matter; kernels compute with any bits.
    let unwritten = |len: usize| unsafe { stream.alloc::<bf16>(len) };
    let (gate_up, down) =
        (unwritten(experts * 2 * intermediate * hidden)?, unwritten(experts * hidden * intermediate)?);
    let bias =
        if gpt_oss { Some((unwritten(experts * 2 * intermediate)?, unwritten(experts * hidden)?)) } else { None };
    let (mut y, mut counts) = (stream.alloc_zeros::<bf16>(tokens * hidden)?, stream.alloc_zeros::<i32>(experts)?);
    let weight = |matrix, bias: Option<_>| bias.map_or(Weight::new(matrix), |bias| Weight::new(matrix).bias(bias));
    let of_experts = ExpertWeights::new(
        weight(&gate_up, bias.as_ref().map(|(first, _)| first)),
        weight(&down, bias.as_ref().map(|(_, second)| second)),
    );
    let weights = LayerWeights::new(RouterWeights::new(&router), of_experts);
    let mut workspace = Workspace::new(stream, plan.workspace_bytes())?;
    kernels.preload(plan.kernels())?;
    stream.synchronize()?;
    // What a launch leaves in L2 is there for the next, and nothing else.
    control.set_profile_caches(Caches::Carried);
    let (done, profile) = control.profiled(|| -> Result<()> {
        let args = LayerArgs::new(&x, &mut y).route(RouteArgs::new().counts(&mut counts));
        plan.forward(kernels, stream, &weights, args, &mut workspace)?;
        Ok(stream.synchronize()?)
    });
    done?;
    let live_experts = stream.clone_dtoh(&counts)?.iter().filter(|&&count| count > 0).count();
    let elements = live_experts * 3 * intermediate * hidden + experts * hidden + 2 * tokens * hidden;
    Ok(Row { live_experts, bytes: 2.0 * elements as f64, profile })
}

/// The products' launches.
fn is_product(launch: &&LaunchProfile) -> bool {
    launch.kernel.starts_with("gemm_")
}

impl Row {
    fn print(&self, model: &str, tokens: usize) {
        let rate = softcuda::device::MODELS
            .iter()
            .find(|device| device.model == self.profile.devices[0].model)
            .map_or(f64::NAN, |device| device.rates.dram_bytes_per_second as f64);
        let launches = &self.profile.launches;
        let (floor, least) = (self.bytes / rate, launches.iter().map(|launch| launch.modelled_seconds).sum::<f64>());
        let with_launches = least + LAUNCH_SECONDS * launches.len() as f64;
        let sms = f64::from(self.profile.devices[0].sm_count);
        // Blocks that work, of the product that has fewer, and what they have on its way: stages but the one that is multiplied.
        let products = launches.iter().filter(is_product);
        let blocks = products.clone().map(|launch| launch.work.working_blocks).min().unwrap_or(0);
        let flight = |launch: &LaunchProfile| {
            let resident = f64::from(launch.occupancy.blocks_per_sm).min(launch.work.working_blocks as f64 / sms);
            resident * f64::from(launch.dynamic_shared_bytes) * 7.0 / 8.0 / 1024.0
        };
        let flight = products.map(flight).fold(f64::INFINITY, f64::min);
        println!(
            "{model:<20} {tokens:>3} {:>7} {:>8.1} {:>9.2} {:>9.2} {:>9.2} {:>7.3} {blocks:>7} {flight:>6.0} {:>6}",
            self.live_experts,
            self.bytes / 1e6,
            floor * 1e6,
            least * 1e6,
            with_launches * 1e6,
            least / floor,
            launches.len(),
        );
        for launch in launches {
            let dram = launch.work.traffic.dram_bytes() as f64;
            println!(
                "    {:<44} {:>6} of {:>6} blocks {:>8.2} us by {:<13} {:>8.2} MB of DRAM, {:>8.2} through L2",
                launch.kernel,
                launch.work.working_blocks,
                launch.grid.iter().product::<u32>(),
                launch.modelled_seconds * 1e6,
                launch.limited_by,
                dram / 1e6,
                launch.work.traffic.l2_bytes() as f64 / 1e6,
            );
        }
        let needed = rate * LATENCY_SECONDS / sms / 1024.0;
        println!("    DRAM's rate times {:.0} us of latency: {needed:.0} KiB a multiprocessor", LATENCY_SECONDS * 1e6);
    }
}
