//! The command line.

use std::path::PathBuf;

use clap::Parser;

/// One batch of tokens with skewed popularity, through every router: who gets how much.
///
/// Prints each router's load and writes the same as a drawing.
#[derive(Debug, Parser)]
#[command(name = "routers")]
pub struct Options {
    /// Where to write the drawing
    #[arg(value_name = "FILE.svg", default_value = "routers.svg")]
    pub file: PathBuf,
}
