//! Checks that the device accepts PTX files: `cargo run -p softcuda --example lower -- FILE.ptx ...` prints each kernel with
//! its registers and shared memory, or the first construct that is wrong or not implemented. `--cc 9.0` chooses the device.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use softcuda::lower::{Environment, lower_module};

/// Checks that the software device accepts PTX files: prints each kernel with its registers and shared memory, or the first
/// construct that is wrong or not implemented.
#[derive(Debug, Parser)]
#[command(name = "lower")]
struct Options {
    /// Compute capability of the device
    #[arg(long = "cc", value_name = "MAJOR.MINOR", default_value = "8.0", value_parser = capability)]
    capability: (u32, u32),
    /// PTX files
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

fn capability(text: &str) -> Result<(u32, u32), String> {
    let numbers = text.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    numbers.ok_or_else(|| "expected a compute capability, such as 8.0".into())
}

fn main() -> ExitCode {
    let Options { files, capability } = Options::parse();
    let mut failed = 0;
    for file in &files {
        let report = check(file, capability);
        failed += usize::from(report.is_err());
        println!("{}: {}", file.display(), report.unwrap_or_else(|error| error));
    }
    println!("{} passed, {failed} failed", files.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn check(file: &Path, capability: (u32, u32)) -> Result<String, String> {
    let text = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    let module = softcuda::ptx::parse(&text).map_err(|e| e.to_string())?;
    // Any addresses will do: nothing is run.
    let symbols: HashMap<_, _> = module.variables.iter().zip(1u64..).map(|(v, i)| (v.name.clone(), i << 32)).collect();
    let program =
        lower_module(&module, &Environment { symbols, compute_capability: capability }).map_err(|e| e.to_string())?;
    let kernels = program.kernels.iter().map(|k| {
        format!("{} ({} registers, {} bytes of static shared memory)", k.name, k.registers, k.static_shared_bytes)
    });
    Ok(kernels.collect::<Vec<_>>().join(", "))
}
