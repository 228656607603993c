//! Trains a small byte-level language model whose feed-forward is an MoE layer on the device: Switch's, GLaM's or Mixtral's.
//!
//! `cargo run --release --example train_switch [-- --rule switch|glam|mixtral] [--text FILE] [--balance A] [--z C] [--out FILE] ...`
//!
//! Forward and backward pass of the layer are this library's (`examples/byte_model/step.rs`); embedding, attention, norms, output and
//! optimiser are plain Rust in `examples/byte_model/`. Prints loss and load as it goes and draws them; `distill_switch` takes what `--out` writes.

#[path = "../byte_model/mod.rs"]
mod byte_model;
mod cli;

use std::process::ExitCode;
use std::rc::Rc;

use byte_model::assemble::{Experts, assemble};
use byte_model::device::Device;
use byte_model::program::{exit, tell};
use byte_model::sample::sample;
use byte_model::text::Text;
use byte_model::train::{History, train};
use byte_model::{Outcome, chart, file, whole_file};
use clap::Parser;
use cli::Options;
use moe_kernels::rules::{LossGradient, LossScore};

fn main() -> ExitCode {
    exit(run(&Options::parse()))
}

fn run(options: &Options) -> Outcome<()> {
    let saved = options.from.as_deref().map(file::open).transpose()?;
    let config = saved.as_ref().map_or(options.config(), |(config, _)| *config);
    config.check()?;
    let (sizes, common) = (config.sizes, &options.common);
    let text = Text::open(common.text.as_deref(), sizes.context)?;
    let device = Rc::new(Device::open()?);
    println!("device: {}", device.name);
    let losses = LossGradient::new(LossScore::Softmax).balance(options.balance).z(options.z);
    let experts = Experts { device, dtype: options.dtype.into(), losses, frozen: options.freeze_experts };
    let mut model = match &saved {
        Some((config, bytes)) => file::load(config, bytes, Some(&experts))?,
        None => assemble(&config, Some(&experts), &mut fastrand::Rng::with_seed(common.seed))?,
    };
    let numbers: usize = model.parameters().iter().map(|parameter| parameter.value.len()).sum();
    let entropy = text.unigram_entropy();
    println!("{numbers} parameters; {} bytes of text, entropy of single bytes {entropy:.3} nats", text.len());

    let history = train("train_switch", &mut model, &text, &common.training(sizes.context), None, &mut tell)?;
    for (index, layer) in history.layers.iter().enumerate() {
        let [variation, balance, z] =
            [&layer.variations, &layer.balance, &layer.z].map(|values| History::recent(values, 50));
        println!(
            "MoE layer {index}, last 50 steps: variation of the load {variation:.2}, balancing loss {balance:.3}, z-loss {z:.2}"
        );
    }
    let loss = history.end().loss;
    println!(
        "held out {loss:.3} nats a byte ({:.2} bits); entropy of single bytes {entropy:.3}",
        loss / std::f64::consts::LN_2
    );

    if let Some(path) = &options.out {
        file::save(path, &config, &mut model)?;
        println!("{} written", path.display());
    }
    let drawing = chart::training("train_switch", &history, entropy);
    whole_file::write(&options.svg, drawing.as_bytes())
        .map_err(|error| format!("{}: {error}", options.svg.display()))?;
    println!("{} written", options.svg.display());
    if common.sample > 0 {
        let written = sample(&mut model, sizes.context, common.sample, &mut fastrand::Rng::with_seed(common.seed))?;
        println!("it writes:\n{written}");
    }
    Ok(())
}
