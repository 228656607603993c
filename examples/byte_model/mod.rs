//! A small byte-level language model whose feed-forward is an MoE layer on the device; everything else is plain Rust, forward and back by
//! hand. `train_switch` trains it, `distill_switch` trains a dense one with its help.

// Two programs include this module, and tests; each uses parts of it.
#![allow(dead_code)]

pub mod adamw;
pub mod assemble;
pub mod chart;
pub mod config;
pub mod device;
pub mod evaluate;
pub mod file;
pub mod moe;
pub mod plain;
pub mod program;
pub mod sample;
pub mod step;
#[path = "../support/svg.rs"]
pub mod svg;
pub mod text;
pub mod train;
#[path = "../support/whole_file.rs"]
pub mod whole_file;

pub use plain::Outcome;

/// What the plain parts compute in.
pub type Real = f32;
