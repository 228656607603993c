//! Runs Mixture-of-Experts blocks of a Hugging Face checkpoint and checks them.
//!
//! `cargo run --release --example hf_layer -- DIR [--block NAME|all] [--dtype bf16|f16|f32] [--tokens N] [--grads] [--out FILE]`
//!
//! DIR holds `config.json` and `model.safetensors` (or shards with an index). Rows come from its `golden.safetensors`, and
//! results are compared with what it records; with `--tokens` rows are random and results compared with
//! `moe_kernels::reference`. With `--grads` it goes back too, from the `dy` of `golden_grads.safetensors` to every gradient that is recorded there.
//! Without DIR a small Mixtral-shaped checkpoint is made and checked. `--families` prints the table of all
//! families and what each computes.

mod hf;

fn main() -> std::process::ExitCode {
    hf::main(std::env::args_os().skip(1))
}
