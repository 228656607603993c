//! One batch of tokens with skewed popularity, through every router and then through a layer: who gets how much.
//!
//! `cargo run --release --example routers [-- FILE.svg]` prints each router's load histogram side by side with the norm of what a layer
//! makes of its choices, and writes the histograms as an SVG (default `routers.svg`); below stands what measured gating says of the
//! batch, and of the same batch once a bias without loss has balanced it.

mod batch;
mod cli;
#[path = "../support/svg.rs"]
mod drawing;
mod layer;
mod svg;
mod terminal;
#[path = "../support/whole_file.rs"]
mod whole_file;

use std::path::Path;
use std::process::ExitCode;

use batch::Batch;
use clap::Parser;
use moe_kernels::rules::{Order, SecondExpert};
use moe_kernels::{Kernels, device};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const TOKENS: usize = 512;
const EXPERTS: usize = 16;

/// Steps of the bias update.
const BIAS_STEPS: usize = 60;

/// What became of the batch.
pub struct Load {
    /// The router.
    pub name: &'static str,
    /// Tokens of each expert, most popular expert first.
    pub tokens: Vec<usize>,
    /// Tokens that got no expert at all.
    pub left_out: usize,
    /// Norm of what the layer computed.
    pub norm: f64,
}

impl Load {
    /// From the ids of all slots, by token.
    fn new(name: &'static str, ids: &[i32], per_token: usize, norm: f64) -> Load {
        let mut tokens = vec![0; EXPERTS];
        ids.iter().filter_map(|&id| usize::try_from(id).ok()).for_each(|id| tokens[id] += 1);
        let left_out = ids.chunks(per_token).filter(|ids| ids.iter().all(|&id| id < 0)).count();
        Load { name, tokens, left_out, norm }
    }

    /// Largest load over mean load: 1 when balanced.
    pub fn imbalance(&self) -> f64 {
        let total: usize = self.tokens.iter().sum();
        let largest = self.tokens.iter().max().copied().unwrap_or(0);
        if total == 0 { 0.0 } else { largest as f64 * self.tokens.len() as f64 / total as f64 }
    }
}

/// Nearly a standard normal number.
fn normal(rng: &mut fastrand::Rng) -> f32 {
    (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0
}

fn main() -> ExitCode {
    match run(&cli::Options::parse().file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(file: &Path) -> Outcome<()> {
    softcuda::install_if_no_gpu()?;
    let context = device::open(0)?;
    println!("device: {}", context.name()?);
    let stream = context.new_stream()?;
    let kernels = Kernels::new(&context)?;
    let batch = Batch::new(&kernels, &stream)?;
    let unbiased = batch.measured("top-2, no bias", 0)?;
    let balanced = batch.measured("top-2, bias", BIAS_STEPS)?;
    let statistics = terminal::statistics(&[unbiased.stats, balanced.stats], ["no bias", "bias"]);
    let loads = [
        batch.top_k("top-1", 1)?,
        batch.top_k("top-2", 2)?,
        balanced.load,
        batch.jittered()?,
        batch.noisy()?,
        batch.hierarchical()?,
        batch.sampled()?,
        batch.admitted("Switch, cf 1.25", 1, 1, Order::ByToken, false, SecondExpert::Always)?,
        batch.admitted("passed on", 4, 1, Order::ByChoice, false, SecondExpert::Always)?,
        batch.admitted("GShard top-2", 2, 2, Order::ByChoice, false, batch.random_second())?,
        batch.admitted("V-MoE top-2", 2, 2, Order::ByChoice, true, SecondExpert::Always)?,
        batch.expert_choice()?,
        batch.base()?,
        batch.sinkhorn()?,
        batch.hashed()?,
        batch.hashed_by_frequency()?,
    ];
    println!("{}", terminal::table(&loads, TOKENS));
    println!("\n{statistics}");
    let drawing = svg::drawing(&loads, TOKENS);
    whole_file::write(file, drawing.as_bytes()).map_err(|error| format!("{}: {error}", file.display()))?;
    println!("{} written", file.display());
    Ok(())
}
