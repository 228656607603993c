//! Each operation and the whole layer at full size, on a GPU: medians of graph replays, timed with events, beside the floor that bytes and
//! operations set. Weights and inputs are made on the device; only what the names given ask for is made at all.
//!
//! On the software device the shapes are scaled down and a time is the software's, so no share of a floor stands beside it.

mod clock;
#[path = "../common/fill.rs"]
mod fill;
#[allow(dead_code)] // each bench uses its own part
#[path = "../common/model.rs"]
mod model;
mod peaks;
mod report;
#[path = "../common/shapes.rs"]
mod shapes;
#[path = "../../examples/support/whole_file.rs"]
mod whole_file;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use clock::Clock;
use cudarc::driver::{CudaContext, CudaStream, sys};
use model::{Model, Operation, Passes};
use moe_kernels::experts::gemm::{self, GemmDesc};
use moe_kernels::experts::overrides;
use moe_kernels::{Kernels, device};
use report::Report;
use serde_json::json;
use shapes::{SHAPES, Shape};
use work::{Batch, Work};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Timed first, whatever else is asked for.
const FIRST: [&str; 5] = ["qwen3-30b-a3b", "mixtral-8x7b", "sonic-n1024", "deepseek-v3", "gpt-oss-20b"];

/// Sizes of the second cache that one product of all sets touches, so that what one set leaves there is gone when its turn comes again.
const CACHES_OF_A_ROUND: f64 = 4.0;
const MOST_SETS: usize = 32;

/// Bytes and operations of a batch.
type WorkOf = fn(&Batch) -> Work;

/// What times a batch.
struct Device<'a> {
    stream: &'a Arc<CudaStream>,
    kernels: &'a Kernels,
    clock: Clock,
}

/// Times each operation and the layer over the shapes of models in use.
#[derive(Parser)]
struct Options {
    /// Which, as MODEL/TOKENS; `*` stands for anything. All of them by default.
    names: Vec<String>,
    /// Where the times go as JSON, written anew after each shape.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Shapes that would begin after so many seconds are skipped.
    #[arg(long, default_value_t = 600)]
    budget: u64,
    /// Prints the shapes chosen as JSON and times nothing.
    #[arg(long)]
    list: bool,
    /// Tells device and driver and times nothing.
    #[arg(long)]
    about: bool,
    /// Cargo's, of no effect.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// Shapes with the numbers of tokens that the names ask for.
    fn chosen(&self) -> Vec<(Shape, Vec<usize>)> {
        let wanted = |name: &str| {
            let matches = |pattern: &String| {
                let pattern = if pattern.contains('/') { pattern.clone() } else { format!("{pattern}/*") };
                wildmatch::WildMatch::new(&pattern).matches(name)
            };
            self.names.is_empty() || self.names.iter().any(matches)
        };
        let mut shapes = SHAPES.to_vec();
        shapes.sort_by_key(|shape| FIRST.iter().position(|model| *model == shape.model).unwrap_or(FIRST.len()));
        let tokens = |shape: &Shape| {
            shape.tokens.iter().copied().filter(|tokens| wanted(&format!("{}/{tokens}", shape.model))).collect()
        };
        shapes
            .iter()
            .map(|shape| (*shape, tokens(shape)))
            .filter(|(_, tokens): &(_, Vec<_>)| !tokens.is_empty())
            .collect()
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(skipped) => {
            eprintln!("gpu_times: {skipped} shapes were not timed");
            ExitCode::from(3)
        }
        Err(error) => {
            eprintln!("gpu_times: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Times what was chosen: how many shapes were skipped.
fn run(options: &Options) -> Result<usize> {
    let (start, chosen) = (Instant::now(), options.chosen());
    if chosen.is_empty() {
        return Err(format!("no shape is called {}", options.names.join(" or ")).into());
    }
    if options.list {
        let list = chosen.iter().map(|(shape, tokens)| {
            let Shape { model, experts, top_k, hidden, intermediate, .. } = shape;
            json!({ "model": model, "experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate, "tokens": tokens })
        });
        println!("{}", json!(list.collect::<Vec<_>>()));
        return Ok(0);
    }

    let choice = softcuda::install_if_no_gpu()?;
    let soft = choice.control().is_some();
    let context = device::open(0)?;
    // SAFETY: one stream does everything.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream()?;
    let kernels = Kernels::new(&context)?;
    if options.about {
        return about(&kernels);
    }
    let mut report = begin(&context, soft)?;
    let device = Device { stream: &stream, kernels: &kernels, clock: Clock::new(&stream, soft)? };
    let mut failed = 0;
    for (shape, tokens) in chosen {
        let scaled = if soft { shape.scaled(1).0 } else { shape };
        let mut model = None;
        for tokens in tokens {
            let name = format!("{}/{tokens}", shape.model);
            if start.elapsed() > Duration::from_secs(options.budget) {
                report.skip(&name, "no time left");
                continue;
            }
            let tokens = if soft { shape.scaled(tokens).1 } else { tokens };
            if let Err(reason) = one(&device, &mut model, &name, &scaled, tokens, &mut report) {
                // A device with less memory still times the smaller ones, and one wrong result leaves the others to be told.
                let reason = reason.to_string();
                failed += usize::from(!reason.to_uppercase().replace('_', " ").contains("OUT OF MEMORY"));
                report.skip(&name, &reason);
                stream.synchronize().map_err(|fault| format!("{name}: {reason}; the device is lost: {fault}"))?;
            }
            write(&report, options)?;
        }
    }
    write(&report, options)?;
    if failed > 0 {
        return Err(format!("{failed} shapes failed").into());
    }
    Ok(report.skipped())
}

fn write(report: &Report, options: &Options) -> Result<()> {
    let Some(path) = &options.json else { return Ok(()) };
    Ok(report.write(path).map_err(|error| format!("{}: {error}", path.display()))?)
}

/// Lines for whoever reads the results elsewhere.
fn about(kernels: &Kernels) -> Result<usize> {
    let (context, mut version) = (kernels.context(), 0);
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut version).result()? };
    let device = kernels.device();
    let (major, minor) = device.compute_capability;
    println!("device: {}", context.name()?);
    println!("compute capability: {major}.{minor}, {} multiprocessors", device.multiprocessors);
    println!("memory: {:.1} GiB", context.total_mem()? as f64 / (1u64 << 30) as f64);
    println!("driver: CUDA {}.{}", version / 1000, version % 1000 / 10);
    Ok(0)
}

fn begin(context: &Arc<CudaContext>, soft: bool) -> Result<Report> {
    let name = context.name()?;
    let attribute = |which| -> Result<f64> { Ok(f64::from(context.attribute(which)?)) };
    let l2 = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
    let peaks = if soft { None } else { peaks::of(&name) };
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    println!(
        "{name}{}; {}",
        if soft { ": the software device, shapes scaled down; these are no times of a GPU" } else { "" },
        peaks.map_or("no peaks known, so no shares of a floor".to_owned(), |peaks| {
            format!("floor by {} TFLOP/s and {} GB/s", peaks.tflops, peaks.gbs)
        })
    );
    let head = json!({
        "device": name, "software_device": soft, "l2_bytes": l2, "unix_seconds": seconds,
        "multiprocessors": attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        "clock_khz": attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        "commit": std::env::var("MOE_COMMIT").ok(),
        "peaks": peaks.map(|peaks| json!({ "tflops": peaks.tflops, "gbs": peaks.gbs })),
    });
    Ok(Report::new(head, peaks, l2))
}

/// Times the operations of one batch; makes the model where there is none yet.
fn one<'a>(
    device: &Device<'a>,
    model: &mut Option<Model<'a>>,
    name: &str,
    shape: &Shape,
    tokens: usize,
    report: &mut Report,
) -> Result<()> {
    let &Device { stream, kernels, ref clock } = device;
    let model = match model {
        Some(model) => model,
        None => model.insert(Model::new(stream, kernels, shape)?),
    };
    let l2 = f64::from(stream.context().attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?);
    let most = shape.experts.min(tokens * shape.top_k) as f64;
    let mut batch = Batch { shape: *shape, tokens, gated: model.gated() as f64, live_experts: most };
    // By the lesser of the two products, so that both find a cold cache.
    let touched = batch.down().bytes();
    let sets =
        if report.of_software() { 1 } else { ((CACHES_OF_A_ROUND * l2 / touched).ceil() as usize).clamp(2, MOST_SETS) };
    let mut passes = model.passes(tokens, sets)?;
    passes.sound()?;
    // In this order each finds in its set what the one before has left there.
    let operations: [(&str, Operation<'_>, WorkOf); 8] = [
        ("router", Passes::router, Batch::router),
        ("gating", Passes::gating, Batch::gating),
        ("dispatch", Passes::dispatch, Batch::dispatch),
        ("gating+dispatch", Passes::gating_dispatch, Batch::gating_dispatch),
        ("gate_up", Passes::gate_up, Batch::gate_up),
        ("down", Passes::down, Batch::down),
        ("combine", Passes::combine, Batch::combine),
        ("layer", Passes::layer, Batch::layer),
    ];
    for (operation, pass, work) in operations {
        let time = clock.time(sets, &mut |i| pass(&mut passes, i))?;
        if operation == "dispatch" {
            batch.live_experts = passes.live_experts()?;
        }
        let work = work(&batch);
        let resident = batch.distinct(&work, sets);
        report.add(name, &batch, operation, time, work, resident);
    }
    // The products by every kernel that computes them: what `experts::overrides` reads.
    type By<'a> = fn(&mut Passes<'a>, usize, &GemmDesc) -> Result<()>;
    let products: [(GemmDesc, By<'_>); 2] =
        [(passes.gate_up_desc(), Passes::gate_up_by), (passes.down_desc(), Passes::down_by)];
    for (product, pass) in products {
        for candidate in overrides::candidates(&product, kernels.device())? {
            let kernel = gemm::select(&candidate, kernels.device())?.kernel;
            let time = clock.time(sets, &mut |i| pass(&mut passes, i, &candidate))?;
            report.add_product(name, &product, &kernel.name(), kernels.device().compute_capability, time);
        }
    }
    Ok(())
}
