//! Checks that the device accepts PTX files: `cargo run -p softcuda --example lower -- FILE.ptx ...` prints each kernel with
//! its registers and shared memory, or the first construct that is wrong or not implemented. `--cc 9.0` chooses the device.

use std::collections::HashMap;
use std::process::ExitCode;

use softcuda::lower::{Environment, lower_module};

fn main() -> ExitCode {
    let mut files: Vec<String> = std::env::args().skip(1).collect();
    let mut capability = (8, 0);
    if let Some(i) = files.iter().position(|a| a == "--cc") {
        let value = files.drain(i..(i + 2).min(files.len())).nth(1).unwrap_or_default();
        match value.split_once('.').map(|(a, b)| (a.parse(), b.parse())) {
            Some((Ok(major), Ok(minor))) => capability = (major, minor),
            _ => {
                eprintln!("--cc takes a compute capability such as 8.0");
                return ExitCode::FAILURE;
            }
        }
    }
    let mut failed = 0;
    for file in &files {
        match check(file, capability) {
            Ok(report) => println!("{file}: {report}"),
            Err(e) => {
                println!("{file}: {e}");
                failed += 1;
            }
        }
    }
    println!("{} passed, {failed} failed", files.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn check(file: &str, capability: (u32, u32)) -> Result<String, String> {
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
