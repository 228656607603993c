//! Runs one Mixture-of-Experts block of a Hugging Face checkpoint and checks it.
//!
//! `cargo run --release --example hf_layer -- DIR [--block NAME] [--dtype bf16|f16|f32] [--tokens N] [--out FILE]`
//!
//! DIR holds `config.json` and `model.safetensors` (or shards with an index). Rows come from its `golden.safetensors`, and
//! results are compared with what it records; with `--tokens` rows are random and results compared with
//! `moe_kernels::reference`. Without DIR a small Mixtral-shaped layer is made and checked.

mod hf;

fn main() -> std::process::ExitCode {
    hf::main(std::env::args_os().skip(1))
}
