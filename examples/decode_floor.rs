//! Layers of a few tokens at full size on the modelled GPU: what must come from DRAM, and what the launches need.
//!
//! Runs on the software device, whose counters are exact and whose times are lower bounds by unit: no GPU took them. Weights of experts are never
//! written, as no count depends on their values, and take no memory; the largest models take some minutes.

#[allow(dead_code)] // the other benches use the rest
#[path = "../benches/common/shapes.rs"]
mod shapes;

use clap::Parser;
use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights, SharedDesc, SharedWeights,
};
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
    /// A row of a table alone for each, in Markdown.
    #[arg(long)]
    table: bool,
}

/// What a model's layer is beside its extents.
struct Form {
    mlp: Mlp,
    /// Matrices of the first product: gate and up, or one.
    sides: usize,
    has_bias: bool,
    shared: Option<SharedDesc>,
}

impl Form {
    fn of(model: &str, intermediate: usize) -> Form {
        let swiglu = Mlp::swiglu(Dtype::Bf16);
        let plain = Form { mlp: swiglu, sides: 2, has_bias: false, shared: None };
        let shared = |width, gated| Some(SharedDesc::new(width, swiglu).gated(gated));
        match model {
            "gpt-oss-20b" | "gpt-oss-120b" => Form { mlp: Mlp::gpt_oss(Dtype::Bf16), has_bias: true, ..plain },
            "switch-base-64" | "sparsely-gated-2017" => Form { mlp: Mlp::relu(Dtype::Bf16), sides: 1, ..plain },
            "qwen2-moe" => Form { shared: shared(5632, true), ..plain },
            "qwen3-next" => Form { shared: shared(intermediate, true), ..plain },
            "deepseek-v3" | "llama4-maverick" => Form { shared: shared(intermediate, false), ..plain },
            _ => plain,
        }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let choice = softcuda::install_if_no_gpu()?;
    let control = choice.control().ok_or("only the software device counts: MOE_DEVICE=soft")?;
    let context = device::open(0)?;
    let (stream, kernels) = (context.default_stream(), Kernels::new(&context)?);
    if options.table {
        println!(
            "| layer | T | experts with rows | bytes that must move | DRAM's floor | modelled, launches apart | ratio | launches | blocks |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
    } else {
        println!("{}; in flight: KiB a multiprocessor; us: modelled, no GPU's", context.name()?);
        println!(
            "{:<20} {:>3} {:>7} {:>8} {:>9} {:>9} {:>9} {:>7} {:>7} {:>6} {:>6}",
            "model", "T", "experts", "MB", "floor us", "model us", "+2/launch", "ratio", "blocks", "flight", "launch"
        );
    }
    for shape in SHAPES {
        for tokens in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] {
            let name = format!("{}/{tokens}", shape.model);
            let wanted = |pattern: &String| match pattern.contains('/') {
                true => wildmatch::WildMatch::new(pattern).matches(&name),
                false => wildmatch::WildMatch::new(pattern).matches(shape.model) && [1, 8, 64].contains(&tokens),
            };
            if options.names.iter().any(wanted) {
                let row = measure(control, &stream, &kernels, shape, tokens, options.invariant)?;
                if options.table { row.print_for_table(shape.model, tokens) } else { row.print(shape.model, tokens) }
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
    let form = Form::of(model, intermediate);
    let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k)
        .mlp(form.mlp)
        .shared(form.shared)
        .batch_invariant(invariant);
    let plan = desc.plan(tokens, kernels.device())?;
    let mut rng = fastrand::Rng::with_seed(7);
    let mut random = |len: usize| -> Result<CudaSlice<bf16>> {
        let values: Vec<bf16> = (0..len).map(|_| bf16::from_f32(rng.f32() - 0.5)).collect();
        Ok(stream.clone_htod(&values)?)
    };
    let (x, router, shared_gate) = (random(tokens * hidden)?, random(experts * hidden)?, random(hidden)?);
    // SAFETY: what these hold does not matter; kernels compute with any bits.
    let unwritten = |len: usize| unsafe { stream.alloc::<bf16>(len) };
    let matrices = |experts: usize, width: usize| -> Result<[CudaSlice<bf16>; 2]> {
        Ok([unwritten(experts * form.sides * width * hidden)?, unwritten(experts * hidden * width)?])
    };
    let [gate_up, down] = matrices(experts, intermediate)?;
    let shared_width = form.shared.map_or(0, |shared| shared.intermediate);
    let [shared_gate_up, shared_down] = matrices(1, shared_width.max(1))?;
    let expert_biases = form.sides * intermediate + hidden;
    let bias = if form.has_bias {
        Some((unwritten(experts * form.sides * intermediate)?, unwritten(experts * hidden)?))
    } else {
        None
    };
    let (mut y, mut counts) = (stream.alloc_zeros::<bf16>(tokens * hidden)?, stream.alloc_zeros::<i32>(experts)?);
    let weight = |matrix, bias: Option<_>| bias.map_or(Weight::new(matrix), |bias| Weight::new(matrix).bias(bias));
    let mut of_experts = ExpertWeights::new(
        weight(&gate_up, bias.as_ref().map(|(first, _)| first)),
        weight(&down, bias.as_ref().map(|(_, second)| second)),
    );
    if let Some(shared) = form.shared {
        let weights = SharedWeights::new(Weight::new(&shared_gate_up), Weight::new(&shared_down));
        of_experts = of_experts.shared(if shared.gated { weights.gate(&shared_gate) } else { weights });
    }
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
    let of_expert = (form.sides + 1) * intermediate * hidden + if form.has_bias { expert_biases } else { 0 };
    let of_shared = form
        .shared
        .map_or(0, |shared| (form.sides + 1) * shared_width * hidden + if shared.gated { hidden } else { 0 });
    let elements = live_experts * of_expert + of_shared + experts * hidden + 2 * tokens * hidden;
    Ok(Row { live_experts, bytes: 2.0 * elements as f64, profile })
}

/// The products' launches.
fn is_product(launch: &&LaunchProfile) -> bool {
    launch.kernel.starts_with("gemm_")
}

impl Row {
    /// Bytes that DRAM moves in a second.
    fn rate(&self) -> f64 {
        let model = softcuda::device::MODELS.iter().find(|device| device.model == self.profile.devices[0].model);
        model.map_or(f64::NAN, |device| device.rates.dram_bytes_per_second as f64)
    }

    /// The floor, and what the launches need at least, in seconds.
    fn seconds(&self) -> [f64; 2] {
        [self.bytes / self.rate(), self.profile.launches.iter().map(|launch| launch.modelled_seconds).sum()]
    }

    /// Blocks that work, of the product that has fewer.
    fn blocks(&self) -> u64 {
        self.profile.launches.iter().filter(is_product).map(|launch| launch.work.working_blocks).min().unwrap_or(0)
    }

    fn print_for_table(&self, model: &str, tokens: usize) {
        let [floor, least] = self.seconds();
        println!(
            "| {model} | {tokens} | {} | {:.1} MB | {:.2} µs | {:.2} µs | {:.3} | {} | {} |",
            self.live_experts,
            self.bytes / 1e6,
            floor * 1e6,
            least * 1e6,
            least / floor,
            self.profile.launches.len(),
            self.blocks(),
        );
    }

    fn print(&self, model: &str, tokens: usize) {
        let ([floor, least], blocks, launches) = (self.seconds(), self.blocks(), &self.profile.launches);
        let with_launches = least + LAUNCH_SECONDS * launches.len() as f64;
        let sms = f64::from(self.profile.devices[0].sm_count);
        // What blocks have on its way: stages but the one that is multiplied.
        let products = launches.iter().filter(is_product);
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
        let needed = self.rate() * LATENCY_SECONDS / sms / 1024.0;
        println!("    DRAM's rate times {:.0} us of latency: {needed:.0} KiB a multiprocessor", LATENCY_SECONDS * 1e6);
    }
}
