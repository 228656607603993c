//! Density of the main loops: what `ptxas` makes of every product.
//!
//! ```sh
//! cargo run --release --example sass_table -- [--only GLOB] [--arch sm_80,sm_90] [--min-share PERCENT]
//! ```
//!
//! For each variant it assembles the embedded PTX, disassembles the result, and prints registers, spilled bytes, shared
//! memory, and of the innermost loop that holds the tensor core instructions its length, their number, instructions for one of them, and
//! their share; and what ptxas says of code slower than written (C7508, `setmaxnreg` ignored; C7510, wgmma in series). With
//! `--min-share`, exit code 1 if a share lies below, or it said so.
//!
//! `ptxas`: the variable `PTXAS`, `$CUDA_HOME/bin`, or `PATH`. `nvdisasm`: the variable `NVDISASM`, beside `ptxas`, or
//! `PATH`. No GPU is needed.

mod flow;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Parser;
use flow::{Loop, main_loop};
use moe_kernels::kernels::embedded;
use moe_kernels::registry::{self, Arch, Kernel};
use tempfile::TempDir;
use wildmatch::WildMatch;

/// What ptxas makes of the main loop of every product: registers, spills, and the share of tensor core instructions.
///
/// Needs ptxas (variable PTXAS, $CUDA_HOME/bin, or PATH) and nvdisasm (variable NVDISASM, beside ptxas, or PATH), and no GPU.
#[derive(Debug, Parser)]
#[command(name = "sass_table")]
struct Options {
    /// Variants whose name fits
    #[arg(long, value_name = "GLOB", default_value = "*")]
    only: String,
    /// Architectures to assemble for
    #[arg(long = "arch", value_name = "LIST", default_value = "sm_80", value_delimiter = ',', value_parser = arch)]
    archs: Vec<String>,
    /// Exit code 1 if a share lies below, or ptxas has ignored setmaxnreg (C7508) or put wgmma one after the other (C7510)
    #[arg(long, value_name = "PERCENT")]
    min_share: Option<f64>,
}

fn arch(name: &str) -> Result<String, String> {
    match name.trim() {
        "" => Err("expected architectures, such as sm_80,sm_90".into()),
        name => Ok(name.into()),
    }
}

fn main() -> ExitCode {
    run(&Options::parse()).unwrap_or_else(|message| {
        eprintln!("error: {message}");
        ExitCode::from(2)
    })
}

/// Whether its main loop is made of tensor core products.
fn has_products(kernel: &Kernel) -> bool {
    matches!(
        kernel,
        Kernel::Gemm(_)
            | Kernel::GemmHopper(_)
            | Kernel::GemmAny(_)
            | Kernel::GemmBackward(_)
            | Kernel::GemmBackwardHopper(_)
            | Kernel::GemmBackwardAny(_)
            | Kernel::KGrouped(_)
            | Kernel::KGroupedHopper(_)
    )
}

/// What one variant became on one architecture.
struct Row {
    registers: u32,
    spilled: u32,
    /// Dynamic and static, in bytes.
    shared: u32,
    main_loop: Loop,
    /// Those of [`SLOWER`] that it was told.
    slower: Vec<&'static str>,
}

impl Loop {
    fn share(&self) -> f64 {
        100.0 * self.products as f64 / self.instructions as f64
    }

    fn per_product(&self) -> f64 {
        self.instructions as f64 / self.products as f64
    }
}

/// What ptxas says of code that is slower than it was written: `setmaxnreg` ignored, wgmma one after the other.
const SLOWER: [&str; 2] = ["C7508", "C7510"];

fn run(options: &Options) -> Result<ExitCode, String> {
    let ptxas = find("PTXAS", "ptxas", std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin")))?;
    let nvdisasm = find("NVDISASM", "nvdisasm", ptxas.parent().map(Path::to_path_buf))?;

    let glob = WildMatch::new(&options.only);
    let variants: Vec<Kernel> =
        registry::all().into_iter().filter(|kernel| has_products(kernel) && glob.matches(&kernel.name())).collect();
    if variants.is_empty() {
        return Err(format!("--only: no product's variant matches `{}`", options.only));
    }
    // Kernels of one architecture alone are assembled for that one.
    let suits = |kernel: &Kernel, arch: &str| kernel.arch() == Arch::Sm80 || kernel.arch().target() == arch;
    let jobs: Vec<(Kernel, &str)> = (options.archs.iter())
        .flat_map(|arch| variants.iter().filter(|kernel| suits(kernel, arch)).map(|kernel| (*kernel, arch.as_str())))
        .collect();
    if jobs.is_empty() {
        return Err(format!("--arch: no variant that matches `{}` is for {}", options.only, options.archs.join(", ")));
    }

    let folder = TempDir::with_prefix("sass_table-").map_err(|error| format!("a temporary folder: {error}"))?;
    let results: Vec<Mutex<Option<Result<Row, String>>>> = jobs.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |count| count.get()) {
            scope.spawn(|| {
                while let Some((index, (kernel, arch))) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|index| Some((index, jobs.get(index)?)))
                {
                    let row = measure(&ptxas, &nvdisasm, folder.path(), kernel, arch);
                    *results[index].lock().expect("no thread panics") = Some(row);
                }
            });
        }
    });

    println!(
        "{:<40} {:>7} {:>9} {:>7} {:>7} {:>5} {:>5} {:>7} {:>7}",
        "variant", "arch", "registers", "spilled", "shared", "loop", "MMA", "per MMA", "share"
    );
    let (mut below, mut slower) = (0, 0);
    for ((kernel, arch), result) in jobs.iter().zip(results) {
        let row = result.into_inner().expect("no thread panics").expect("every job was done")?;
        let share = row.main_loop.share();
        let low = options.min_share.is_some_and(|least| share < least);
        below += usize::from(low);
        slower += usize::from(!row.slower.is_empty());
        println!(
            "{:<40} {:>7} {:>9} {:>7} {:>7} {:>5} {:>5} {:>7.2} {:>6.1}%{}{}",
            kernel.name(),
            arch,
            row.registers,
            row.spilled,
            row.shared,
            row.main_loop.instructions,
            row.main_loop.products,
            row.main_loop.per_product(),
            share,
            if low { "  below" } else { "" },
            row.slower.iter().map(|code| format!("  {code}")).collect::<String>()
        );
    }
    if let Some(least) = options.min_share.filter(|_| below + slower > 0) {
        eprintln!(
            "sass_table: of {} loops {below} have a share below {least} %, {slower} are slower than written",
            jobs.len()
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// A tool named by a variable, else in `folder`, else on `PATH`.
fn find(variable: &str, tool: &str, folder: Option<PathBuf>) -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty() && path != "none") {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(format!("{variable}: expected the path of {tool}, got {}, which is no file", path.display()))
        };
    }
    let on_path = std::env::var_os("PATH");
    folder
        .into_iter()
        .chain(on_path.iter().flat_map(std::env::split_paths))
        .map(|folder| folder.join(tool))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            format!(
                "{tool} not found: set {variable} to its path, or put it on PATH \
                 (it is in the CUDA toolkit, and in the PyPI wheels nvidia-cuda-nvcc and nvidia-cuda-nvdisasm)"
            )
        })
}

fn measure(ptxas: &Path, nvdisasm: &Path, folder: &Path, kernel: &Kernel, arch: &str) -> Result<Row, String> {
    let name = kernel.name();
    let entry = embedded().iter().find(|entry| entry.name == name).ok_or_else(|| format!("{name}: not embedded"))?;
    let source = folder.join(format!("{name}.{arch}.ptx"));
    let cubin = folder.join(format!("{name}.{arch}.cubin"));
    std::fs::write(&source, entry.ptx()).map_err(|error| format!("{}: {error}", source.display()))?;
    let report = output(Command::new(ptxas).args(["-v", "-arch", arch, "-o"]).arg(&cubin).arg(&source))?;
    let number = |suffix| number_before(&report, suffix);
    let sass = output(Command::new(nvdisasm).arg("-c").arg(&cubin))?;
    Ok(Row {
        registers: number(" registers").ok_or_else(|| format!("{name} for {arch}: no register count in:\n{report}"))?,
        spilled: number(" bytes spill stores").unwrap_or(0),
        shared: number(" bytes smem").unwrap_or(0) + kernel.shared_bytes(),
        main_loop: main_loop(&sass)
            .ok_or_else(|| format!("{name} for {arch}: no loop with HMMA or HGMMA in the disassembly"))?,
        slower: SLOWER.into_iter().filter(|code| report.contains(code)).collect(),
    })
}

/// Standard output and error of a command that must succeed.
fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let result = command.output().map_err(|error| format!("{program}: cannot be started: {error}"))?;
    let text = String::from_utf8_lossy(&result.stdout).into_owned() + &String::from_utf8_lossy(&result.stderr);
    if result.status.success() { Ok(text) } else { Err(format!("{program} failed ({}):\n{text}", result.status)) }
}

/// The number that stands just before `suffix`.
fn number_before(text: &str, suffix: &str) -> Option<u32> {
    let before = &text[..text.find(suffix)?];
    let start = before.rfind(|c: char| !c.is_ascii_digit()).map_or(0, |at| at + 1);
    before[start..].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let parse = |words: &[&str]| Options::try_parse_from([&["sass_table"], words].concat());
        let options = parse(&["--arch", "sm_80, sm_90", "--min-share", "40"]).unwrap();
        assert_eq!((options.archs, options.min_share), (vec!["sm_80".into(), "sm_90".to_owned()], Some(40.0)));
        assert_eq!(parse(&[]).unwrap().archs, ["sm_80"]);
        assert!(parse(&["--min-share", "much"]).is_err_and(|error| error.to_string().contains("'much'")));
        assert!(parse(&["--only"]).is_err() && parse(&["--onyl", "x"]).is_err() && parse(&["--arch", ","]).is_err());
    }
}
