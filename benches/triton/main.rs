//! Experts of MoE layers side by side: Triton's fused kernels and what this library selects, on the same software device.
//!
//! Triton compiles for GPUs that are not there (`moe_triton.py`, `compile.py`), in the tiles that were tuned on them (`tiles`); `softcuda` runs both sides'
//! PTX as an H100 and as an A100, on the same weights, tokens and choices. Each side must come to the other's result. Printed is what each did: passes
//! through shared memory, bytes through L2 and of DRAM, rows multiplied for a live one, tensor-core instructions, and the time that the device's
//! model needs at least, which is no GPU's. L2 is empty when a side begins and carries from launch to launch.

mod cases;
mod counters;
#[allow(dead_code)] // each bench uses its own part
#[path = "../common/fill.rs"]
mod fill;
mod inputs;
mod ours;
mod rows;
#[allow(dead_code)] // each bench uses its own part
#[path = "../common/shapes.rs"]
mod shapes;
mod theirs;
mod tiles;
mod toolchain;
#[path = "../../examples/support/whole_file.rs"]
mod whole_file;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use cases::{Budget, Case};
use clap::Parser;
use counters::Counted;
use cudarc::driver::CudaStream;
use half::bf16;
use inputs::{Batch, Weights};
use moe_kernels::layer::TokenSums;
use moe_kernels::{Kernels, device};
use ours::Part;
use rows::Row;
use serde_json::{Value, json};
use softcuda::profile::{Caches, LaunchProfile};
use toolchain::Toolchain;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Devices with the architecture that Triton compiles for.
const DEVICES: [(&str, u32); 2] = [("h100", 90), ("a100", 80)];
const VARIABLE: &str = "SOFTCUDA_DEVICES";

/// What two sides may differ by in the norm of a token's output. Triton rounds gate and up to bf16, and both round the hidden rows, the experts'
/// outputs and their sum: in quadrature less than three roundings of at most 2^-9 each.
const CLOSE: f64 = 1.0 / 128.0;

/// Compares experts in Triton with this library's, on the software device.
#[derive(Parser)]
struct Options {
    /// Which, as MODEL/TOKENS; `*` stands for anything. All of them by default.
    names: Vec<String>,
    /// The device that is modelled; both by default.
    #[arg(long, value_parser = ["h100", "a100"])]
    device: Option<String>,
    /// Makes the virtual environment in target/triton where there is none: Triton from PyPI.
    #[arg(long)]
    install: bool,
    /// Where everything counted goes as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where the table goes as Markdown.
    #[arg(long)]
    markdown: Option<PathBuf>,
    /// Fails where a figure of ours is more than Triton's.
    #[arg(long)]
    require_ahead: bool,
    /// Our second product adds each token's experts up itself (`TokenSums::Atomic`).
    #[arg(long)]
    atomic: bool,
    /// Thousand millions of multiply-adds of live rows that a side may cost: what needs more is cut.
    #[arg(long, default_value_t = 6.0)]
    most_gmac: f64,
    /// GB of experts' weights that there may be: what needs more is cut.
    #[arg(long, default_value_t = 2.0)]
    most_gb: f64,
    /// Cargo's, of no effect.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(ahead) if ahead => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("triton: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether no figure of ours is more than Triton's, if that is required.
fn run(options: &Options) -> Result<bool> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/triton");
    let Some(toolchain) = Toolchain::open(&folder, options.install)? else {
        println!("no Triton in {}: --install fetches it from PyPI", folder.display());
        return Ok(true);
    };
    let names = DEVICES.map(|(name, _)| name).join(",");
    if std::env::var(VARIABLE).as_deref() != Ok(&names) {
        // The driver reads the variable when it is loaded.
        let again = Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(VARIABLE, names)
            .env("MOE_DEVICE", "soft")
            .status()?;
        // It has said what went wrong.
        return Ok(again.success());
    }
    let choice = softcuda::install_if_no_gpu()?;
    let control = choice.control().ok_or("only the software device counts")?;
    let budget = Budget { multiply_adds: options.most_gmac * 1e9, bytes: options.most_gb * 1e9 };
    let wanted = |case: &Case| {
        let name = case.name();
        options.names.is_empty()
            || options.names.iter().any(|pattern| wildmatch::WildMatch::new(pattern).matches(&name))
    };
    let cases: Vec<Case> = Case::all(budget).filter(wanted).collect();
    if cases.is_empty() {
        return Err(format!("no shape is called {}", options.names.join(" or ")).into());
    }
    println!(
        "Triton {} and moe-kernels {} on the software device; a modelled time is no GPU's; ours / Triton's, and their ratio",
        toolchain.version,
        env!("CARGO_PKG_VERSION"),
    );
    let mut rows = Vec::new();
    for (ordinal, (name, arch)) in DEVICES.into_iter().enumerate() {
        if options.device.as_deref().is_some_and(|device| device != name) {
            continue;
        }
        let context = device::open(ordinal)?;
        let stream = context.default_stream();
        let needed: HashSet<_> = cases.iter().flat_map(|case| theirs::kernels(case, case.tile(arch))).collect();
        let needed: Vec<_> = needed.into_iter().collect();
        let side = Side {
            control,
            toolchain: &toolchain,
            stream,
            kernels: Kernels::new(&context)?,
            triton: theirs::Kernels::load(&context.default_stream(), toolchain.compile(&needed, arch)?)?,
            device: name,
            arch,
            token_sums: if options.atomic { TokenSums::Atomic } else { TokenSums::Ordered },
        };
        side.record_triton();
        let mut weights = None;
        for case in &cases {
            let pair = side.compare(case, &mut weights).map_err(|error| format!("{name} {}: {error}", case.name()))?;
            for row in &pair {
                row.print();
            }
            rows.extend(pair);
            write(options, &rows, &toolchain)?;
        }
    }
    let behind: Vec<String> = rows.iter().filter_map(Row::behind).collect();
    println!("{} of {} rows ahead of Triton or level in every figure", rows.len() - behind.len(), rows.len());
    for line in &behind {
        println!("behind: {line}");
    }
    Ok(behind.is_empty() || !options.require_ahead)
}

/// A device with both sides on it.
struct Side<'a> {
    control: &'a softcuda::Control,
    toolchain: &'a Toolchain,
    stream: Arc<CudaStream>,
    kernels: Kernels,
    triton: theirs::Kernels,
    device: &'static str,
    arch: u32,
    /// Of our layer.
    token_sums: TokenSums,
}

impl Side<'_> {
    /// Registers decide how many blocks share a multiprocessor's caches.
    fn record_triton(&self) {
        for binary in self.triton.binaries() {
            self.control.record_registers(&format!("{} {}", binary.name, binary.registers));
            if binary.stages < binary.stages_asked {
                println!(
                    "{}: {} stages fit into this device's shared memory, not {}",
                    binary.name, binary.stages, binary.stages_asked
                );
            }
            if binary.spill_bytes > 0 {
                println!("{}: {} bytes spilled", binary.name, binary.spill_bytes);
            }
        }
    }

    fn record_ours(&self, launches: &[(String, Part)]) -> Result<()> {
        for (name, _) in launches {
            let embedded = moe_kernels::kernels::embedded().iter().find(|kernel| kernel.name == name);
            let text =
                embedded.ok_or_else(|| format!("{name} is not embedded"))?.ptx_for((self.arch / 10, self.arch % 10));
            let count = self.toolchain.registers(name, &text, self.arch)?;
            self.control.record_registers(&format!("{name} {count}"));
        }
        Ok(())
    }

    /// Both products of a case. `weights`: those of the last one, kept where they fit.
    fn compare(&self, case: &Case, weights: &mut Option<Weights>) -> Result<[Row; 2]> {
        let stream = &self.stream;
        if weights.as_ref().is_none_or(|kept| kept.extents != Weights::extents_of(case)) {
            *weights = None;
            *weights = Some(Weights::new(stream, case)?);
        }
        let weights = weights.as_ref().expect("made above");
        let batch = Batch::new(stream, case)?;
        let tile = case.tile(self.arch);

        let mut ours = ours::Prepared::new(stream, &self.kernels, case, self.token_sums)?;
        let launches = ours.launches();
        self.record_ours(&launches)?;
        let our_profile = self.profiled(|| ours.run(stream, &self.kernels, weights, &batch))?;
        let theirs = theirs::Prepared::new(stream, case, &batch, tile)?;
        let their_profile = self.profiled(|| theirs.run(stream, &self.triton, weights, &batch))?;
        close(case, &ours.y(stream)?, &theirs.y(stream)?)?;
        self.right(case, weights, &batch, &ours.y(stream)?)?;

        let names = |profile: &[LaunchProfile]| profile.iter().map(|launch| launch.kernel.clone()).collect::<Vec<_>>();
        if names(&our_profile) != launches.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>()
            || their_profile.len() != 4
        {
            return Err(format!("launched {:?} and {:?}", names(&our_profile), names(&their_profile)).into());
        }
        let shape = &case.shape;
        let live = (case.slots() * shape.hidden * shape.intermediate) as f64;
        let of = |part: Part| {
            our_profile
                .iter()
                .zip(&launches)
                .filter(|(_, (_, of))| *of == part)
                .map(|(launch, _)| launch)
                .collect::<Vec<_>>()
        };
        let row = |product, ours: Vec<&LaunchProfile>, theirs: &[LaunchProfile], live| Row {
            device: self.device,
            case: *case,
            product,
            tile: tile.to_string(),
            ours: Counted::new(&ours, live),
            theirs: Counted::new(&theirs.iter().collect::<Vec<_>>(), live),
        };
        Ok([
            row("gate_up", of(Part::First), &their_profile[..2], 2.0 * live),
            row("down", of(Part::Second), &their_profile[2..], live),
        ])
    }

    /// The launches of `section`, L2 empty at first.
    fn profiled(&self, section: impl FnOnce() -> Result<()>) -> Result<Vec<LaunchProfile>> {
        self.control.set_profile_caches(Caches::Carried);
        let (done, profile) = self.control.profiled(|| -> Result<()> {
            section()?;
            Ok(self.stream.synchronize()?)
        });
        done?;
        Ok(profile.launches)
    }

    /// The last token against the formula.
    fn right(&self, case: &Case, weights: &Weights, batch: &Batch, y: &[bf16]) -> Result<()> {
        let (last, hidden, top_k) = (case.tokens - 1, case.shape.hidden, case.shape.top_k);
        let choices = last * top_k..(last + 1) * top_k;
        let x = &batch.host_x[last * hidden..];
        let want = weights.token(&self.stream, x, &batch.ids[choices.clone()], &batch.weights[choices])?;
        let got = y[last * hidden..].iter().map(|value| value.to_f64());
        check("ours and the formula", last, got.zip(want))
    }
}

/// Every token of both sides.
fn close(case: &Case, ours: &[bf16], theirs: &[bf16]) -> Result<()> {
    let hidden = case.shape.hidden;
    for (token, (ours, theirs)) in ours.chunks_exact(hidden).zip(theirs.chunks_exact(hidden)).enumerate() {
        check(
            "ours and Triton's",
            token,
            ours.iter().zip(theirs).map(|(ours, theirs)| (ours.to_f64(), theirs.to_f64())),
        )?;
    }
    Ok(())
}

/// The distance of two rows over the norm of the second.
fn check(what: &str, token: usize, pairs: impl Iterator<Item = (f64, f64)>) -> Result<()> {
    let (mut off, mut norm) = (0.0, 0.0);
    for (got, want) in pairs {
        off += (got - want).powi(2);
        norm += want.powi(2);
    }
    let distance = (off / norm).sqrt();
    // NaN is not close either.
    if distance <= CLOSE { Ok(()) } else { Err(format!("{what} differ by {distance} in token {token}").into()) }
}

fn write(options: &Options, rows: &[Row], toolchain: &Toolchain) -> Result<()> {
    if let Some(path) = &options.json {
        let all: Vec<Value> = rows.iter().map(Row::json).collect();
        let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        let text = json!({ "triton": toolchain.version, "unix_seconds": seconds, "modelled": true, "rows": all });
        whole_file::write(path, serde_json::to_string_pretty(&text)?.as_bytes())?;
    }
    if let Some(path) = &options.markdown {
        whole_file::write(path, rows::table(rows).as_bytes())?;
    }
    Ok(())
}
