//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use moe_kernels::rules::Dtype;

use super::error::HfError;

pub const USAGE: &str = "hf_layer [DIR] [--block NAME] [--dtype bf16|f16|f32] [--tokens N] [--out FILE]";

/// Most random rows: beyond them a reference on the CPU is no use.
const MAX_TOKENS: usize = 1 << 20;

/// What to do.
#[derive(Debug, PartialEq)]
pub struct Options {
    /// Checkpoint folder; without one a layer of our own is run.
    pub folder: Option<PathBuf>,
    /// Module path of the block.
    pub block: Option<String>,
    /// Type of x and of the weights.
    pub dtype: Dtype,
    /// Random rows instead of the recorded ones.
    pub tokens: Option<usize>,
    /// Where to write x and the outputs.
    pub out: Option<PathBuf>,
}

impl Options {
    /// The layer of our own.
    pub fn own(dtype: Dtype) -> Options {
        Options { folder: None, block: None, dtype, tokens: None, out: None }
    }
}

/// Reads the arguments after the program's name; none where help was asked for.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Options>, HfError> {
    let mut options = Options::own(Dtype::Bf16);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = |name: &str| arguments.next().ok_or_else(|| HfError::Usage(format!("{name} needs a value")));
        match argument.to_str() {
            Some("--help" | "-h") => return Ok(None),
            Some("--block") => options.block = Some(text("--block", value("--block")?)?),
            Some("--dtype") => options.dtype = dtype(&text("--dtype", value("--dtype")?)?)?,
            Some("--tokens") => {
                let given = text("--tokens", value("--tokens")?)?;
                let number = given.parse().ok().filter(|&number: &usize| number <= MAX_TOKENS);
                let complaint = || HfError::Usage(format!("--tokens is {given:?}, expected 0 to {MAX_TOKENS}"));
                options.tokens = Some(number.ok_or_else(complaint)?);
            }
            Some("--out") => options.out = Some(PathBuf::from(value("--out")?)),
            Some(flag) if flag.starts_with("--") => return Err(HfError::Usage(format!("unknown option {flag}"))),
            _ if options.folder.is_some() => {
                return Err(HfError::Usage(format!("a second folder: {}", argument.display())));
            }
            _ => options.folder = Some(PathBuf::from(argument)),
        }
    }
    if options.folder.is_none() && options.block.is_some() {
        return Err(HfError::Usage("--block without a folder".into()));
    }
    Ok(Some(options))
}

fn text(name: &str, value: OsString) -> Result<String, HfError> {
    value.into_string().map_err(|value| HfError::Usage(format!("{name} is {value:?}, which is not UTF-8")))
}

fn dtype(name: &str) -> Result<Dtype, HfError> {
    Dtype::ALL
        .into_iter()
        .find(|dtype| dtype.name() == name)
        .ok_or_else(|| HfError::Usage(format!("--dtype is {name:?}, expected bf16, f16 or f32")))
}
