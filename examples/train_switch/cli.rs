//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use moe_kernels::Dtype;

use crate::byte_model::config::{Config, Rule};
use crate::byte_model::plain::model::Sizes;
use crate::byte_model::program::{self, Common};

/// Trains a small byte-level language model whose feed-forward is an MoE layer on the device.
#[derive(Debug, Parser)]
#[command(name = "train_switch")]
pub struct Options {
    #[command(flatten)]
    pub common: Common,
    /// Whose MoE layer it is
    #[arg(long, value_enum, default_value_t = Rule::Switch)]
    pub rule: Rule,
    /// Type of activations and experts on the device; what the optimiser moves is f32
    #[arg(long, value_enum, default_value_t = Type::Bf16)]
    pub dtype: Type,
    /// Width of a token's row
    #[arg(long, value_name = "H", default_value_t = 128, value_parser = program::count)]
    pub hidden: usize,
    /// Width of an expert
    #[arg(long, value_name = "I", default_value_t = 256, value_parser = program::count)]
    pub intermediate: usize,
    /// Experts of a layer
    #[arg(long, value_name = "E", default_value_t = 8, value_parser = program::count)]
    pub experts: usize,
    /// Blocks of attention and feed-forward
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = program::count)]
    pub blocks: usize,
    /// Heads of the attention
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = program::count)]
    pub heads: usize,
    /// Bytes of a sequence
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = program::count)]
    pub context: usize,
    /// Factor of the load balancing loss (Switch Transformers, eq. 4); 0 for none
    #[arg(long, value_name = "A", default_value_t = 0.01, value_parser = program::number::<f32>, allow_negative_numbers = true)]
    pub balance: f32,
    /// Factor of the router's z-loss (ST-MoE, eq. 5); 0 for none
    #[arg(long, value_name = "C", default_value_t = 0.0, value_parser = program::number::<f32>, allow_negative_numbers = true)]
    pub z: f32,
    /// Leave the experts' weights as they are; router and all else still learn
    #[arg(long)]
    pub freeze_experts: bool,
    /// Go on from a model that --out wrote, whose rule and sizes hold
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rule", "hidden", "intermediate", "experts", "blocks", "heads", "context"])]
    pub from: Option<PathBuf>,
    /// Where to write the trained model, as safetensors
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Where to draw the loss and the loads
    #[arg(long, value_name = "FILE.svg", default_value = "train_switch.svg")]
    pub svg: PathBuf,
}

/// A type on the device.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Type {
    Bf16,
    F32,
}

impl From<Type> for Dtype {
    fn from(dtype: Type) -> Dtype {
        match dtype {
            Type::Bf16 => Dtype::Bf16,
            Type::F32 => Dtype::F32,
        }
    }
}

impl Options {
    /// The model that is asked for, if it is a new one.
    pub fn config(&self) -> Config {
        Config {
            rule: self.rule,
            sparse: true,
            sizes: Sizes { hidden: self.hidden, heads: self.heads, context: self.context },
            blocks: self.blocks,
            intermediate: self.intermediate,
            experts: self.experts,
        }
    }
}
