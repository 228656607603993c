//! Triton, from PyPI in a virtual environment below `target/`: kernels compiled for GPUs that are not there.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::Result;
use crate::tiles::Tile;

/// The release that the numbers in the documentation are of.
const TRITON: &str = "triton==3.9.0";

/// A kernel of `moe_triton.py` for one architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// A product in this tile; slots that share a row of its input; whether rows are scaled.
    Product {
        tile: Tile,
        slots_a_row: usize,
        weighted: bool,
    },
    Silu,
    Sum {
        top_k: usize,
    },
}

/// Columns of a program of the kernels that are no products.
pub const BLOCK: usize = 1024;

impl Kernel {
    /// The entry's name.
    pub fn name(&self, arch: u32) -> String {
        match self {
            Kernel::Product { tile, slots_a_row, weighted } => {
                let Tile { group, warps, stages, .. } = tile;
                let scaled = if *weighted { "_weighted" } else { "" };
                format!("triton_{tile}_g{group}_w{warps}_s{stages}_k{slots_a_row}{scaled}_sm{arch}")
            }
            Kernel::Silu => format!("triton_silu_sm{arch}"),
            Kernel::Sum { top_k } => format!("triton_sum_k{top_k}_sm{arch}"),
        }
    }

    fn request(&self, arch: u32) -> Value {
        let (kernel, constants, warps, stages) = match self {
            Kernel::Product { tile, slots_a_row, weighted } => {
                let Tile { rows, columns, depth, group, .. } = tile;
                let constants = json!({
                    "SLOTS_A_ROW": slots_a_row, "WEIGHTED": weighted, "BM": rows, "BN": columns, "BK": depth, "GROUP": group,
                });
                ("product", constants, tile.warps, tile.stages)
            }
            Kernel::Silu => ("silu", json!({ "BLOCK": BLOCK }), 4, 1),
            Kernel::Sum { top_k } => ("sum", json!({ "TOP_K": top_k, "BLOCK": BLOCK }), 4, 1),
        };
        json!({
            "name": self.name(arch), "kernel": kernel, "arch": arch, "constants": constants, "warps": warps, "stages": stages,
        })
    }
}

/// What Triton made of a kernel.
#[derive(Clone, Debug)]
pub struct Binary {
    pub name: String,
    pub ptx: String,
    pub shared_bytes: u32,
    pub threads: u32,
    /// Fewer than asked for where those need more shared memory than there is.
    pub stages: u32,
    pub stages_asked: u32,
    /// Parameters behind ours, null.
    pub scratch_params: usize,
    pub registers: u32,
    pub spill_bytes: u32,
}

/// A virtual environment with Triton in it.
pub struct Toolchain {
    folder: PathBuf,
    ptxas: PathBuf,
    pub version: String,
}

impl Toolchain {
    /// What lies in `folder`; with `install` it is made where there is none, from PyPI. None without it.
    ///
    /// # Errors
    /// `python3` or `pip` fail.
    pub fn open(folder: &Path, install: bool) -> Result<Option<Toolchain>> {
        let python = folder.join("venv/bin/python");
        let ask = "import triton, triton.backends.nvidia.compiler as c; print(triton.__version__); print(c.get_ptxas(90).path)";
        let told = || {
            Command::new(&python)
                .args(["-c", ask])
                .stderr(Stdio::null())
                .output()
                .ok()
                .filter(|told| told.status.success())
        };
        let told = match (told(), install) {
            (Some(told), _) => told,
            (None, false) => return Ok(None),
            (None, true) => {
                std::fs::create_dir_all(folder)?;
                done(Command::new("python3").args(["-m", "venv"]).arg(folder.join("venv")))?;
                done(Command::new(&python).args([
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                    TRITON,
                ]))?;
                told().ok_or("Triton was installed and cannot be imported")?
            }
        };
        let told = String::from_utf8(told.stdout)?;
        let mut lines = told.lines().map(str::to_owned);
        let (Some(version), Some(ptxas)) = (lines.next(), lines.next()) else {
            return Err("Triton has no ptxas".into());
        };
        Ok(Some(Toolchain { folder: folder.to_owned(), ptxas: ptxas.into(), version }))
    }

    /// Compiles for `arch`; what was compiled before from the same source is read again.
    ///
    /// # Errors
    /// Triton refuses one.
    pub fn compile(&self, kernels: &[Kernel], arch: u32) -> Result<HashMap<Kernel, Binary>> {
        let out = self.folder.join("ptx");
        let requests: Vec<Value> = kernels.iter().map(|kernel| kernel.request(arch)).collect();
        let mut child = Command::new(self.folder.join("venv/bin/python"))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/triton/compile.py"))
            .arg(&out)
            .env("TRITON_CACHE_DIR", self.folder.join("cache"))
            .env("TRITON_DEFAULT_FP_FUSION", "1")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .spawn()?;
        child.stdin.take().expect("it is piped").write_all(json!(requests).to_string().as_bytes())?;
        if !child.wait()?.success() {
            return Err("compile.py failed".into());
        }
        kernels.iter().map(|kernel| Ok((*kernel, read(&out, &kernel.name(arch))?))).collect()
    }

    /// Registers that Triton's own `ptxas` gives a kernel.
    ///
    /// # Errors
    /// It refuses the text.
    pub fn registers(&self, name: &str, ptx: &str, arch: u32) -> Result<u32> {
        // A file of its own: two runs may go on side by side.
        let mut file = tempfile::Builder::new().suffix(".ptx").tempfile_in(&self.folder)?;
        file.write_all(ptx.as_bytes())?;
        let named = ptx.lines().find_map(|line| line.strip_prefix(".target ")).unwrap_or_default();
        let gpu = if named.contains("sm_90a") { "sm_90a".to_owned() } else { format!("sm_{arch}") };
        let told =
            Command::new(&self.ptxas).args(["-v", "-o", "/dev/null", "--gpu-name", &gpu]).arg(file.path()).output()?;
        let text = String::from_utf8_lossy(&told.stderr);
        let count = text.split_once("Used ").and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
        count.filter(|_| told.status.success()).ok_or_else(|| format!("{name}: {text}").into())
    }
}

fn read(folder: &Path, name: &str) -> Result<Binary> {
    let ptx = std::fs::read_to_string(folder.join(format!("{name}.ptx")))?;
    let about: Value = serde_json::from_slice(&std::fs::read(folder.join(format!("{name}.json")))?)?;
    let number = |key: &str| about[key].as_u64().ok_or_else(|| format!("{name}.json: no {key}"));
    Ok(Binary {
        name: name.to_owned(),
        ptx,
        shared_bytes: number("shared_bytes")? as u32,
        threads: number("threads")? as u32,
        stages: number("stages")? as u32,
        stages_asked: about["request"]["stages"].as_u64().ok_or_else(|| format!("{name}.json: no request"))? as u32,
        scratch_params: number("scratch_params")? as usize,
        registers: number("registers")? as u32,
        spill_bytes: number("spill_bytes")? as u32,
    })
}

fn done(command: &mut Command) -> Result<()> {
    match command.status()? {
        status if status.success() => Ok(()),
        status => Err(format!("{command:?}: {status}").into()),
    }
}
