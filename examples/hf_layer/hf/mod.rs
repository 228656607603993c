//! Reads a Mixture-of-Experts block of a Hugging Face checkpoint, runs it on a device, and checks what comes out.
//!
//! Code to learn from or to copy: `family` and `families` say what each model's block is and where its tensors are, `load`
//! packs them into the shapes of `moe_kernels::layer`, `device` runs them.

// Tests include this module and use parts of it.
#![allow(dead_code)]

pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod device;
pub mod error;
pub mod families;
pub mod family;
pub mod files;
pub mod golden;
pub mod load;
pub mod out;
pub mod own;
pub mod random;
pub mod report;
#[path = "../../support/whole_file.rs"]
pub mod whole_file;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use half::{bf16, f16};
use moe_kernels::layer::LayerDesc;
use moe_kernels::reference::Real;
use moe_kernels::{Dtype, Element, Error};

use checkpoint::Checkpoint;
use cli::Options;
use config::Config;
use device::{Device, Outputs};
use error::HfError;
use golden::{Expected, Golden};
use load::Weights;
use random::Random;
use report::Line;

/// Seed of random rows and weights.
const SEED: u64 = 2;

/// The whole program: exit code 0 if every tensor is within its tolerance, 1 if one is not, 2 if the layer could not be run.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match run(arguments, &mut std::io::stdout().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(HfError::CommandLine(answer)) => {
            // Help goes to the standard output with exit code 0, a complaint to standard error with 2.
            let printed = answer.print();
            ExitCode::from(if printed.is_ok() { answer.exit_code() as u8 } else { 2 })
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// [`main`] with its report going elsewhere: whether all tensors are within their tolerances.
pub fn run(arguments: impl IntoIterator<Item = OsString>, report: &mut dyn Write) -> Result<bool, HfError> {
    execute(&cli::parse(arguments)?, report)
}

/// Runs what the options ask for, writes the report, and says whether all tensors are within their tolerances.
pub fn execute(options: &Options, report: &mut dyn Write) -> Result<bool, HfError> {
    match options.dtype {
        Dtype::Bf16 => execute_in::<bf16>(options, report),
        Dtype::F16 => execute_in::<f16>(options, report),
        Dtype::F32 => execute_in::<f32>(options, report),
        other => {
            let (supported, got) = ("bf16, f16 or f32".into(), other.to_string());
            Err(Error::Unsupported { operation: "hf_layer", argument: "--dtype", supported, got }.into())
        }
    }
}

/// Where the expected outputs come from.
pub enum Source {
    /// A file that records the model's own.
    Golden(Expected),
    /// The reference, once the device's routing is known.
    Reference,
}

/// A layer with its weights, its rows and what should come out.
pub struct Job<T> {
    /// What is being run, in words.
    pub title: String,
    pub layer: LayerDesc,
    pub weights: Weights<T>,
    /// `[T,H]`.
    pub x: Vec<T>,
    pub expected: Source,
    /// The order of a token's experts is open.
    pub unordered: bool,
}

impl<T: Element + Real> Job<T> {
    /// Loads what the options name, or makes a layer where they name no folder.
    pub fn prepare(options: &Options) -> Result<Job<T>, HfError> {
        match &options.folder {
            Some(folder) => Job::from_folder(folder, options),
            None => {
                let layer = own::desc(T::DTYPE);
                let weights = own::weights(&layer, &mut Random::new(SEED));
                let title = format!("own layer ({})", own::STATED);
                Ok(Job::with_random_rows(title, layer, weights, options.tokens.unwrap_or(own::TOKENS), false))
            }
        }
    }

    fn from_folder(folder: &std::path::Path, options: &Options) -> Result<Job<T>, HfError> {
        let config = Config::open(folder)?;
        let family = families::of(&config)?;
        let checkpoint = Checkpoint::open(folder)?;
        let golden = match options.tokens {
            Some(_) => None,
            None if files::exists(&folder.join(Golden::NAME))? => Some(Golden::open(folder)?),
            None => return Err(HfError::NoRows { folder: folder.to_owned() }),
        };
        let wanted = options.block.as_deref().or(golden.as_ref().and_then(Golden::block));
        let block = family.locate(&config, &checkpoint, wanted)?;
        let weights = load::load(&checkpoint, &block)?;
        let title = format!("{} block {}", config.model_type(), block.prefix);
        match golden {
            None => {
                let tokens = options.tokens.unwrap_or(0);
                Ok(Job::with_random_rows(title, block.spec.desc(tokens), weights, tokens, block.spec.unordered))
            }
            Some(golden) => {
                let x: Vec<T> = golden.x(block.spec.layer.hidden)?.into_iter().map(T::from_f32).collect();
                let tokens = x.len() / block.spec.layer.hidden;
                let layer = block.spec.desc(tokens);
                let expected = Source::Golden(golden.expected(&layer, tokens)?);
                Ok(Job { title, layer, weights, x, expected, unordered: block.spec.unordered })
            }
        }
    }

    fn with_random_rows(
        title: String,
        layer: LayerDesc,
        weights: Weights<T>,
        tokens: usize,
        unordered: bool,
    ) -> Job<T> {
        let values = Random::new(SEED + 1).normals(tokens * layer.hidden, 1.0);
        let x: Vec<T> = values.into_iter().map(T::from_f32).collect();
        Job { title, layer, weights, x, expected: Source::Reference, unordered }
    }

    /// Runs the layer and compares.
    pub fn check(&self, device: &Device) -> Result<(Outputs, Vec<Line>), HfError> {
        let outputs = device::run(device, &self.layer, &self.weights, &self.x)?;
        let from_reference;
        let expected = match &self.expected {
            Source::Golden(expected) => expected,
            Source::Reference => {
                from_reference = golden::from_reference(&self.layer, &self.weights, &self.x, &outputs)?;
                &from_reference
            }
        };
        let lines = report::compare(&outputs, expected, T::DTYPE, self.layer.top_k, self.unordered);
        Ok((outputs, lines))
    }
}

fn execute_in<T: Element + Real>(options: &Options, report: &mut dyn Write) -> Result<bool, HfError> {
    let job = Job::<T>::prepare(options)?;
    let device = Device::open()?;
    let (outputs, lines) = job.check(&device)?;
    print(report, &device, &job, &outputs, &lines).map_err(HfError::Report)?;
    if let Some(path) = &options.out {
        let x: Vec<f32> = job.x.iter().map(|value| value.to_f32()).collect();
        out::write(path, &job.layer, &x, &outputs)?;
    }
    Ok(lines.iter().all(Line::passes))
}

fn print<T: Element>(
    report: &mut dyn Write,
    device: &Device,
    job: &Job<T>,
    outputs: &Outputs,
    lines: &[Line],
) -> std::io::Result<()> {
    let layer = &job.layer;
    let (major, minor) = device.kernels().device().compute_capability;
    writeln!(report, "device   {}, compute capability {major}.{minor}", device.name())?;
    writeln!(report, "layer    {}", job.title)?;
    writeln!(
        report,
        "shapes   T {} H {} I {} E {} k {}{}, {}",
        job.x.len() / layer.hidden,
        layer.hidden,
        layer.intermediate,
        layer.experts,
        layer.top_k,
        layer.shared.map_or(String::new(), |shared| format!(", shared I {}", shared.intermediate)),
        T::DTYPE
    )?;
    writeln!(report, "tokens per expert {:?}", outputs.counts)?;
    let clock = if device.is_software() { "software device, not a GPU's time" } else { "device" };
    writeln!(report, "time by stage ({clock}):")?;
    for (stage, milliseconds) in &outputs.stages {
        writeln!(report, "  {stage:<14} {milliseconds:>10.3} ms")?;
    }
    let source = match job.expected {
        Source::Golden(_) => Golden::NAME,
        Source::Reference => "the reference",
    };
    writeln!(report, "against {source}:")?;
    lines.iter().try_for_each(|line| writeln!(report, "  {line}"))
}
