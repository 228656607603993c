//! The command line.

use std::path::PathBuf;

use clap::Parser;

use crate::byte_model::program::{self, Common};

/// Distils a sparse model that train_switch saved into a dense one.
#[derive(Debug, Parser)]
#[command(name = "distill_switch")]
pub struct Options {
    /// What train_switch --out wrote
    #[arg(value_name = "MODEL")]
    pub teacher: PathBuf,
    #[command(flatten)]
    pub common: Common,
    /// Share of the target that the teacher gives; the text gives the rest
    #[arg(long, value_name = "S", default_value_t = 0.25, value_parser = share, allow_negative_numbers = true)]
    pub share: f32,
    /// Where to write the distilled model, as safetensors
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Where to draw both losses
    #[arg(long, value_name = "FILE.svg", default_value = "distill_switch.svg")]
    pub svg: PathBuf,
}

fn share(text: &str) -> Result<f32, String> {
    program::number(text).ok().filter(|&share| share <= 1.0).ok_or_else(|| "expected a number from 0 to 1".into())
}
