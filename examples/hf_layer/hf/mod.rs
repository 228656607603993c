//! Reads Mixture-of-Experts blocks of a Hugging Face checkpoint by `moe_kernels::checkpoint`, runs them on a device, and checks what comes
//! out.

// Tests include this module and use parts of it.
#![allow(dead_code)]

pub mod backward;
pub mod cli;
pub mod device;
pub mod error;
pub mod golden;
pub mod grads;
pub mod matrix;
pub mod out;
pub mod own;
pub mod progress;
pub mod random;
pub mod reference;
pub mod report;
#[path = "../../support/whole_file.rs"]
pub mod whole_file;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use moe_kernels::Dtype;
use moe_kernels::checkpoint::{Block, Model};
use tempfile::TempDir;

use backward::Gradient;
use cli::Options;
use device::{Device, Inputs, Outputs};
use error::HfError;
use golden::{Expected, Golden};
use grads::GoldenGradients;
use random::Random;
use report::Line;

/// Seed of random rows and weights.
const SEED: u64 = 2;

/// What `--block` says for every block.
const ALL: &str = "all";

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
    if options.families {
        write!(report, "{}", moe_kernels::checkpoint::table()).map_err(HfError::Report)?;
        return Ok(true);
    }
    let job = Job::prepare(options)?;
    let device = Device::open()?;
    let (major, minor) = device.kernels().device().compute_capability;
    writeln!(report, "device   {}, compute capability {major}.{minor}", device.name()).map_err(HfError::Report)?;
    let mut passes = true;
    for name in &job.blocks {
        let block = job.block(name)?;
        let (outputs, mut lines) = job.check(&device, &block)?;
        let (gradients, of_gradients) = job.check_gradients(&device, &block)?;
        lines.extend(of_gradients);
        print(report, &device, &job, &block, &outputs, &lines).map_err(HfError::Report)?;
        passes &= lines.iter().all(Line::passes);
        if let Some(path) = &options.out {
            out::write(
                &out_path(path, name, job.blocks.len()),
                block.desc().hidden,
                &job.x(&block)?,
                &outputs,
                &gradients,
            )?;
        }
    }
    Ok(passes)
}

/// Where a block's tensors go: `FILE`, or with several blocks `FILE` with the block's name before its extension.
fn out_path(path: &Path, block: &str, blocks: usize) -> PathBuf {
    if blocks == 1 {
        return path.to_owned();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or(String::new(), |extension| format!(".{}", extension.to_string_lossy()));
    path.with_file_name(format!("{stem}-{block}{extension}"))
}

/// A checkpoint, the blocks that are asked for, their rows and what should come out.
pub struct Job {
    pub model: Model,
    /// Names of the blocks.
    pub blocks: Vec<String>,
    pub dtype: Dtype,
    rows: Rows,
    /// Where `dy` and the gradients are recorded, if they are asked for.
    gradients: Option<GoldenGradients>,
    /// What the report calls the model.
    title: String,
    /// The folder of a checkpoint of our own.
    _own: Option<TempDir>,
}

/// Where rows and expected outputs come from.
enum Rows {
    /// A file that records the model's own, of the block of this name.
    Golden(Golden, String),
    /// Random rows, so many, and the reference.
    Random(usize),
}

impl Job {
    /// Opens what the options name, or a checkpoint of our own where they name no folder, and finds the blocks and all their tensors.
    pub fn prepare(options: &Options) -> Result<Job, HfError> {
        let job = match &options.folder {
            Some(folder) => Job::from_folder(folder, options)?,
            None => Job::own(options)?,
        };
        for name in &job.blocks {
            let block = job.block(name)?;
            block.check()?;
            job.expected(&block)?;
        }
        Ok(job)
    }

    fn own(options: &Options) -> Result<Job, HfError> {
        let folder = TempDir::with_prefix("hf_layer-").map_err(HfError::io(&std::env::temp_dir()))?;
        own::write(folder.path(), &mut Random::new(SEED))?;
        let model = Model::open(folder.path())?;
        let blocks = vec![model.block(None)?.name().to_owned()];
        let rows = Rows::Random(options.tokens.unwrap_or(own::TOKENS));
        let title = format!("own layer ({})", own::STATED);
        Ok(Job { model, blocks, dtype: options.dtype, rows, gradients: None, title, _own: Some(folder) })
    }

    fn from_folder(folder: &Path, options: &Options) -> Result<Job, HfError> {
        let model = Model::open(folder)?;
        let recorded = folder.join(Golden::NAME);
        let golden = match options.tokens {
            Some(_) => None,
            None if recorded.try_exists().map_err(HfError::io(&recorded))? => Some(Golden::open(folder)?),
            None => return Err(HfError::NoRows { folder: folder.to_owned() }),
        };
        let recorded = match golden.as_ref().map(|golden| model.block(golden.block())) {
            Some(block) => Some(block?.name().to_owned()),
            None => None,
        };
        let blocks = match options.block.as_deref() {
            Some(ALL) => model.blocks()?.iter().map(|block| block.name().to_owned()).collect(),
            Some(name) => vec![model.block(Some(name))?.name().to_owned()],
            None => match &recorded {
                Some(name) => vec![name.clone()],
                None => vec![model.block(None)?.name().to_owned()],
            },
        };
        let rows = match golden.zip(recorded) {
            Some((golden, block)) => Rows::Golden(golden, block),
            None => Rows::Random(options.tokens.unwrap_or(0)),
        };
        let title = model.config().model_type().to_owned();
        let gradients = options.grads.then(|| GoldenGradients::open(folder)).transpose()?;
        Ok(Job { model, blocks, dtype: options.dtype, rows, gradients, title, _own: None })
    }

    /// A block by its name.
    pub fn block(&self, name: &str) -> Result<Block<'_>, HfError> {
        Ok(self.model.block(Some(name))?)
    }

    /// The first block.
    pub fn first(&self) -> Result<Block<'_>, HfError> {
        let first = self.blocks.first().map(String::as_str);
        Ok(self.model.block(first)?)
    }

    /// Its rows `[T,H]`, rounded to the type that it runs in.
    pub fn x(&self, block: &Block<'_>) -> Result<Vec<f32>, HfError> {
        let hidden = block.desc().hidden;
        let values = match &self.rows {
            Rows::Golden(golden, _) => golden.x(hidden)?,
            Rows::Random(tokens) => Random::new(SEED + 1).normals(tokens * hidden, 1.0),
        };
        Ok(device::rounded(&values, self.dtype))
    }

    /// What is recorded of a block; none where the reference is to say it.
    pub fn expected(&self, block: &Block<'_>) -> Result<Option<Expected>, HfError> {
        match &self.rows {
            Rows::Golden(golden, recorded) if recorded == block.name() => {
                let tokens = golden.x(block.desc().hidden)?.len() / block.desc().hidden;
                golden.expected(block, tokens).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// What the block takes beside rows.
    pub fn inputs(&self, block: &Block<'_>, tokens: usize) -> Result<Inputs, HfError> {
        match &self.rows {
            Rows::Golden(golden, _) => golden.inputs(),
            Rows::Random(_) => {
                let mut random = Random::new(SEED + 2);
                let needs = block.needs();
                let mut below = |end: usize| (0..tokens).map(|_| random.below(end) as i32).collect::<Vec<i32>>();
                Ok(Inputs {
                    words: needs.vocabulary.map(&mut below),
                    // Each row a sequence.
                    index: needs.index.then(|| below(block.desc().experts)),
                    types: needs.types.then(|| below(2)),
                    previous: needs.previous.map(|width| random.normals(tokens * width, 1.0)),
                })
            }
        }
    }

    /// Runs a block and compares.
    pub fn check(&self, device: &Device, block: &Block<'_>) -> Result<(Outputs, Vec<Line>), HfError> {
        let x = self.x(block)?;
        let bar = progress::Bar::new(block.name());
        let inputs = self.inputs(block, x.len() / block.desc().hidden)?;
        let outputs = device::run(device, block, self.dtype, &x, &inputs, &mut |progress| bar.show(&progress))?;
        bar.finish();
        let expected = match self.expected(block)? {
            Some(expected) => expected,
            None => golden::from_reference(&block.load_host(self.dtype)?, &x, &inputs, &outputs)?,
        };
        let lines = report::compare(&outputs, &expected, self.dtype, block.desc().top_k, block.unordered());
        Ok((outputs, lines))
    }

    /// Goes a block's way back and compares, where its gradients are asked for and recorded.
    pub fn check_gradients(&self, device: &Device, block: &Block<'_>) -> Result<(Vec<Gradient>, Vec<Line>), HfError> {
        let Some(golden) = self.gradients.as_ref().filter(|_| self.source(block) == Golden::NAME) else {
            return Ok((Vec::new(), Vec::new()));
        };
        let x = self.x(block)?;
        let (hidden, tokens) = (block.desc().hidden, x.len() / block.desc().hidden);
        let (inputs, dy) = (self.inputs(block, tokens)?, golden.dy(tokens, hidden)?);
        let got = backward::run(device, block, self.dtype, (&x, &dy), &inputs)?;
        let expected = match &self.rows {
            Rows::Golden(rows, _) if rows.is_of_another_function() => {
                let dy = device::rounded(&dy, self.dtype);
                backward::by_reference(block, self.dtype, (&x, &dy), &inputs)?
            }
            _ => golden.recorded()?,
        };
        backward::compare(&got, &expected, block.name(), self.dtype)
    }

    /// Where the expected outputs of a block are from, in words.
    fn source(&self, block: &Block<'_>) -> &'static str {
        match &self.rows {
            Rows::Golden(_, recorded) if recorded == block.name() => Golden::NAME,
            _ => "the reference",
        }
    }
}

fn print(
    report: &mut dyn Write,
    device: &Device,
    job: &Job,
    block: &Block<'_>,
    outputs: &Outputs,
    lines: &[Line],
) -> std::io::Result<()> {
    let layer = block.desc();
    writeln!(report, "layer    {} block {}", job.title, block.name())?;
    writeln!(
        report,
        "shapes   T {} H {} I {} E {} k {}{}, {}",
        outputs.y.len() / layer.hidden,
        layer.hidden,
        layer.intermediate,
        layer.experts,
        layer.top_k,
        layer.shared.map_or(String::new(), |shared| format!(", shared I {}", shared.intermediate)),
        job.dtype
    )?;
    writeln!(report, "tokens per expert {:?}", outputs.counts)?;
    let clock = if device.is_software() { "software device, not a GPU's time" } else { "device" };
    writeln!(report, "time by stage ({clock}):")?;
    for (stage, milliseconds) in &outputs.stages {
        writeln!(report, "  {stage:<14} {milliseconds:>10.3} ms")?;
    }
    writeln!(report, "against {}:", job.source(block))?;
    lines.iter().try_for_each(|line| writeln!(report, "  {line}"))
}
