//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use moe_kernels::Dtype;

/// Most random rows: beyond them a reference on the CPU is no use.
const MAX_TOKENS: usize = 1 << 20;

/// Runs one Mixture-of-Experts block of a Hugging Face checkpoint and checks it.
///
/// Exit code 0 if every tensor is within its tolerance, 1 if one is not, 2 if the layer could not be run.
#[derive(Debug, PartialEq, Parser)]
#[command(name = "hf_layer")]
pub struct Options {
    /// Checkpoint folder: config.json, and model.safetensors or shards with their index; without one a layer of our own is run
    #[arg(value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Module path of the block, or what its tensors' names begin with; `all` for every block [default: the recorded one, else the
    /// first that is there]
    #[arg(long, value_name = "NAME", requires = "folder")]
    pub block: Option<String>,
    /// Type of x and of the weights: bf16, f16 or f32
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = dtype)]
    pub dtype: Dtype,
    /// Random rows, checked against the reference, instead of those that golden.safetensors records
    #[arg(long, value_name = "N", value_parser = tokens, allow_negative_numbers = true)]
    pub tokens: Option<usize>,
    /// Goes back as well, from the dy that golden_grads.safetensors records, and checks every gradient
    #[arg(long, requires = "folder", conflicts_with = "tokens")]
    pub grads: bool,
    /// Where to write x and the outputs, as safetensors
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Print the table of all families and what each computes, and do nothing else
    #[arg(long, conflicts_with_all = ["folder", "tokens", "out"])]
    pub families: bool,
}

impl Options {
    /// The layer of our own.
    pub fn own(dtype: Dtype) -> Options {
        Options { folder: None, block: None, dtype, tokens: None, grads: false, out: None, families: false }
    }
}

/// Reads the arguments after the program's name; a request for help is an error too, whose text is the help.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    Options::try_parse_from(std::iter::once("hf_layer".into()).chain(arguments))
}

fn dtype(name: &str) -> Result<Dtype, String> {
    let found = Dtype::ALL.into_iter().find(|dtype| dtype.name() == name);
    found.ok_or_else(|| "expected bf16, f16 or f32".into())
}

fn tokens(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|&number| number <= MAX_TOKENS);
    number.ok_or_else(|| format!("expected 0 to {MAX_TOKENS}"))
}
