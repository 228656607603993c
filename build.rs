//! Renders every kernel variant of `kernels/registry.rs` to PTX, assembles it where `ptxas` is found, and writes the table
//! that `src/runtime/embedded.rs` includes, and the structs of `src/runtime/params.rs`.
//!
//! Variables: `PTXAS` (path of ptxas; `none` to do without), `CUDA_HOME`, `PATH`; `MOE_PTXAS_ARCHS` (comma-separated, e.g.
//! `sm_80,sm_90`; default `sm_80`) names the architectures whose machine code is embedded.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::{Environment, UndefinedBehavior, Value, syntax::SyntaxConfig};

#[path = "src/rules"]
#[allow(dead_code)]
mod rules {
    pub mod kinds;
}
#[path = "kernels/registry.rs"]
#[allow(dead_code, unused_imports)]
mod registry;

use registry::{Constant, Kernel};

#[path = "kernels/later.rs"]
mod later;
#[path = "kernels/params.rs"]
mod params;

fn main() {
    let kernels_dir = Path::new("kernels");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/rules/kinds.rs");
    for variable in ["PTXAS", "CUDA_HOME", "MOE_PTXAS_ARCHS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("ptx");
    std::fs::create_dir_all(&out).expect("the build's own folder can be made");

    let environment = template_environment(kernels_dir);
    let kernels = registry::all();
    in_parallel(kernels.len(), |index| {
        let kernel = &kernels[index];
        let text = render(&environment, kernel).unwrap_or_else(|error| panic!("{}: {error:#}", kernel.name()));
        // An unchanged file keeps its time stamp and so its machine code.
        let path = out.join(format!("{}.ptx", kernel.name()));
        if std::fs::read_to_string(&path).ok().as_deref() != Some(&text) {
            std::fs::write(&path, text).expect("the build's own folder can be written");
        }
        deflated(&path);
    });

    std::fs::write(out.parent().unwrap().join("params.rs"), params::structs(&out, &kernels))
        .expect("the build's own folder can be written");

    let images = match find_ptxas() {
        Some(ptxas) => assemble_all(&ptxas, &out, &kernels),
        None => BTreeMap::new(),
    };
    let table = embedded_table(&out, &kernels, &images);
    std::fs::write(out.parent().unwrap().join("embedded_table.rs"), table)
        .expect("the build's own folder can be written");
}

/// Calls `work` with each number below `count`, on all cores, and returns what it gives in order.
fn in_parallel<R: Send>(count: usize, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    let result = work(index);
                    results.lock().unwrap().insert(index, result);
                }
            });
        }
    });
    results.into_inner().unwrap().into_values().collect()
}

/// Templates use `<% %>`, `<< >>`, `<# #>` and lines that begin with `##`: braces and percent signs are PTX.
fn template_environment(dir: &Path) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .block_delimiters("<%", "%>")
            .variable_delimiters("<<", ">>")
            .comment_delimiters("<#", "#>")
            .line_statement_prefix("##")
            .trim_blocks(true)
            .lstrip_blocks(true)
            // What follows an included template begins on a line of its own.
            .keep_trailing_newline(true)
            .build()
            .expect("the delimiters are valid"),
    );
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let mut stack = vec![dir.to_path_buf()];
    while let Some(folder) = stack.pop() {
        for entry in std::fs::read_dir(&folder).expect("kernels/ can be read") {
            let path = entry.expect("kernels/ can be read").path();
            if path.is_dir() {
                stack.push(path);
            } else if path.extension().is_some_and(|extension| extension == "jinja") {
                let name = path.strip_prefix(dir).unwrap().to_str().expect("template names are UTF-8").to_owned();
                let text = std::fs::read_to_string(&path).expect("kernels/ can be read");
                environment
                    .add_template_owned(name, text)
                    .unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
            }
        }
    }
    environment
}

fn render(environment: &Environment, kernel: &Kernel) -> Result<String, minijinja::Error> {
    let mut context: BTreeMap<&str, Value> = kernel
        .constants()
        .into_iter()
        .map(|(key, constant)| {
            let value = match constant {
                Constant::Int(number) => Value::from(number),
                Constant::Text(text) => Value::from(text),
            };
            (key, value)
        })
        .collect();
    context.insert("name", Value::from(kernel.name()));
    context.insert("target", Value::from(kernel.arch().target()));
    context.insert("threads", Value::from(kernel.threads()));
    environment.get_template(kernel.template())?.render(context)
}

fn find_ptxas() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("PTXAS") {
        return (path != "none" && !path.is_empty()).then(|| PathBuf::from(path));
    }
    let mut candidates: Vec<PathBuf> = Vec::new();
    if let Some(home) = std::env::var_os("CUDA_HOME") {
        candidates.push(PathBuf::from(home).join("bin"));
    }
    candidates.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
    candidates.into_iter().map(|folder| folder.join("ptxas")).find(|path| path.is_file())
}

/// What ptxas says of one variant for one architecture.
struct Image {
    arch: String,
    path: PathBuf,
    registers: u32,
    shared_bytes: u32,
}

/// Architectures to assemble a kernel for: those wanted, or the one that it is specific to.
fn targets(kernel: &Kernel, wanted: &[String]) -> impl Iterator<Item = String> {
    let own = kernel.arch().target();
    let archs = if own.ends_with('a') { vec![own.to_owned()] } else { wanted.to_vec() };
    archs.into_iter()
}

/// Assembles every variant for every wanted architecture; an error, a spill, or an instruction that ptxas warns it slowed down or dropped ends
/// the build.
fn assemble_all(ptxas: &Path, out: &Path, kernels: &[Kernel]) -> BTreeMap<(usize, String), Image> {
    let archs = std::env::var("MOE_PTXAS_ARCHS").unwrap_or_else(|_| "sm_80".into());
    let archs: Vec<String> =
        archs.split(',').map(|arch| arch.trim().to_owned()).filter(|arch| !arch.is_empty()).collect();
    let jobs: Vec<(usize, String)> = (kernels.iter().enumerate())
        .flat_map(|(index, kernel)| targets(kernel, &archs).map(move |arch| (index, arch)))
        .collect();
    let results = in_parallel(jobs.len(), |job| {
        let (index, arch) = &jobs[job];
        assemble(ptxas, out, &kernels[*index].name(), arch)
    });
    let images = results.into_iter().map(|result| result.unwrap_or_else(|error| panic!("{error}")));
    jobs.into_iter().zip(images).collect()
}

fn assemble(ptxas: &Path, out: &Path, name: &str, arch: &str) -> Result<Image, String> {
    let mut source = out.join(format!("{name}.ptx"));
    let number = arch.trim_start_matches("sm_").trim_end_matches(|c: char| c.is_ascii_lowercase()).parse::<u32>();
    if number.is_ok_and(|number| number >= 90) {
        let text = std::fs::read_to_string(&source).map_err(|error| error.to_string())?;
        if let Some(text) = later::for_sm_90(&text) {
            source = out.join(format!("{name}.sm_90.ptx"));
            if std::fs::read_to_string(&source).ok().as_deref() != Some(&text) {
                std::fs::write(&source, text).map_err(|error| error.to_string())?;
            }
        }
    }
    let path = out.join(format!("{name}.{arch}.cubin"));
    let report_path = out.join(format!("{name}.{arch}.txt"));
    let modified = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    let fresh = matches!((modified(&source), modified(&report_path)), (Some(s), Some(r)) if path.is_file() && s <= r);
    if !fresh {
        let output = Command::new(ptxas)
            .args(["-v", "--warn-on-spills", "--warn-on-local-memory-usage", "-arch", arch, "-o"])
            .arg(&path)
            .arg(&source)
            .output()
            .map_err(|error| format!("{}: cannot be started: {error}", ptxas.display()))?;
        let report = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            return Err(format!("ptxas rejects {name} for {arch} ({}):\n{report}", source.display()));
        }
        std::fs::write(&report_path, report).map_err(|error| error.to_string())?;
    }
    let report = std::fs::read_to_string(&report_path).map_err(|error| error.to_string())?;
    let spilled = number_before(&report, " bytes spill stores").unwrap_or(0);
    let stack = number_before(&report, " bytes stack frame").unwrap_or(0);
    if spilled != 0 || stack != 0 {
        std::fs::remove_file(&report_path).ok();
        return Err(format!("{name} for {arch}: {spilled} bytes spilled, {stack} bytes of stack:\n{report}"));
    }
    // Products of a warpgroup one after another; `setmaxnreg` without effect.
    if let Some(code) = ["C7510", "C7508"].into_iter().find(|code| report.contains(code)) {
        std::fs::remove_file(&report_path).ok();
        return Err(format!("{name} for {arch}: {code}:\n{report}"));
    }
    let registers = number_before(&report, " registers")
        .ok_or_else(|| format!("{name} for {arch}: no register count in:\n{report}"))?;
    Ok(Image { arch: arch.into(), path, registers, shared_bytes: number_before(&report, " bytes smem").unwrap_or(0) })
}

/// The number that stands just before `suffix`.
fn number_before(text: &str, suffix: &str) -> Option<u32> {
    let before = &text[..text.find(suffix)?];
    let start = before.rfind(|c: char| !c.is_ascii_digit()).map_or(0, |at| at + 1);
    before[start..].parse().ok()
}

/// A file beside `path` that holds its bytes deflated, for the embedded table; of PTX without lines that are comments, which stay as empty lines so that a
/// line has the same number in both.
fn deflated(path: &Path) -> PathBuf {
    let extension = path.extension().unwrap().to_str().unwrap();
    let packed = path.with_extension(format!("{extension}.deflated"));
    let modified = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    if matches!((modified(path), modified(&packed)), (Some(source), Some(packed)) if source < packed) {
        return packed;
    }
    let mut bytes = std::fs::read(path).expect("the build's own folder can be read");
    if extension == "ptx" {
        let text = String::from_utf8(bytes).expect("the build renders UTF-8");
        let comment = |line: &str| line.starts_with("//") && !later::is_for_later(line);
        let lines = text.lines().map(str::trim).map(|line| if comment(line) { "" } else { line });
        bytes = lines.collect::<Vec<_>>().join("\n").into_bytes();
    }
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut encoder, &bytes).expect("a vector takes everything");
    std::fs::write(&packed, encoder.finish().expect("a vector takes everything"))
        .expect("the build's own folder can be written");
    packed
}

/// `&[Embedded { .. }]` in the order of `registry::all()`.
fn embedded_table(out: &Path, kernels: &[Kernel], images: &BTreeMap<(usize, String), Image>) -> String {
    let mut table = String::from("&[\n");
    for (index, kernel) in kernels.iter().enumerate() {
        let ptx = out.join(format!("{}.ptx", kernel.name()));
        let ptx = deflated(&ptx);
        write!(table, "    Embedded {{ name: {:?}, ptx: include_bytes!({ptx:?}), images: &[", kernel.name()).unwrap();
        for image in images.iter().filter(|((of, _), _)| *of == index).map(|(_, image)| image) {
            write!(
                table,
                "Image {{ arch: {:?}, cubin: include_bytes!({:?}), registers: {}, shared_bytes: {} }}, ",
                image.arch,
                deflated(&image.path),
                image.registers,
                image.shared_bytes
            )
            .unwrap();
        }
        table.push_str("] },\n");
    }
    table.push_str("]\n");
    table
}
