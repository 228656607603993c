//! Runs the cases of `tests/data/ptx`: kernels as an outside compiler emitted them, with inputs and expected outputs; on a real driver too,
//! where there is one.

#[path = "compiled_kernels/driver.rs"]
mod driver;
#[path = "common/nvidia.rs"]
mod nvidia;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use softcuda::check::{Checks, Selection};
use softcuda::exec::{Config, Launch, launch};
use softcuda::lower::{Environment, lower_module};
use softcuda::memory::Memory;
use softcuda::tensormap::{Element, Swizzle, TensorMap};

/// The cases of a target; `MOE_DATA` names another place for `tests/data`, for programs that run where their sources are not.
fn cases(target: &str) -> Vec<PathBuf> {
    let data = std::env::var_os("MOE_DATA").filter(|folder| !folder.is_empty());
    let data = data.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data"), PathBuf::from);
    let root = data.join("ptx");
    let mut dirs: Vec<_> = std::fs::read_dir(&root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .map(|d| d.unwrap().path())
        .filter(|d| d.extension().is_some_and(|e| e == target))
        .collect();
    dirs.sort();
    dirs
}

fn numbers(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    macro_rules! each {
        ($t:ty, $n:literal, $f:expr) => {
            bytes.chunks_exact($n).map(|b| ($f)(<$t>::from_le_bytes(b.try_into().unwrap()))).collect()
        };
    }
    match dtype {
        Dtype::F32 => each!(f32, 4, f64::from),
        Dtype::F16 => each!(f16, 2, f16::to_f64),
        Dtype::BF16 => each!(bf16, 2, bf16::to_f64),
        Dtype::I32 => each!(i32, 4, f64::from),
        Dtype::I64 => each!(i64, 8, |x| x as f64),
        other => panic!("dtype {other:?}"),
    }
}

struct Device {
    memory: &'static Memory,
    checks: Checks,
}

impl Device {
    fn upload(&self, bytes: &[u8]) -> u64 {
        let address = self.memory.alloc(bytes.len().max(1) as u64).unwrap();
        self.checks.allocated(address, bytes.len().max(1) as u64, true);
        // SAFETY: the allocation has this many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
        address
    }

    fn download(&self, address: u64, n: usize) -> Vec<u8> {
        // SAFETY: the allocation has this many bytes.
        unsafe { std::slice::from_raw_parts(address as *const u8, n).to_vec() }
    }
}

/// One device for the whole run: its address space is most of the host's.
fn memory() -> &'static Memory {
    static MEMORY: LazyLock<Memory> = LazyLock::new(|| Memory::new(8 << 30).unwrap());
    &MEMORY
}

/// A case's description of a tensor map.
fn tensor_map(v: &Value, address: u64) -> TensorMap {
    let numbers =
        |name: &str| -> Vec<u64> { v[name].as_array().unwrap().iter().map(|x| x.as_u64().unwrap()).collect() };
    let (dims, strides) = (numbers("dims"), numbers("strides_bytes"));
    let (tile, steps) = (numbers("box"), numbers("element_strides"));
    assert_eq!((v["interleave"].as_u64(), v["fill"].as_str()), (Some(0), Some("zero")));
    TensorMap {
        address,
        element: match v["dtype"].as_str().unwrap() {
            "BF16" => Element::BF16,
            "F16" => Element::F16,
            "F32" => Element::F32,
            other => panic!("dtype {other}"),
        },
        rank: dims.len(),
        dims: std::array::from_fn(|i| dims.get(i).copied().unwrap_or(0)),
        strides: std::array::from_fn(|i| strides.get(i).copied().unwrap_or(0)),
        tile: std::array::from_fn(|i| tile.get(i).map_or(0, |&x| x as u32)),
        steps: std::array::from_fn(|i| steps.get(i).map_or(0, |&x| x as u32)),
        swizzle: match v["swizzle_bytes"].as_u64().unwrap() {
            0 => Swizzle::None,
            32 => Swizzle::B32,
            64 => Swizzle::B64,
            _ => Swizzle::B128,
        },
        fill_nan: false,
        interleave: 0,
        promotion: 0,
    }
}

fn three(v: &Value) -> [u32; 3] {
    std::array::from_fn(|i| v[i].as_u64().unwrap() as u32)
}

/// A case as it lies in its folder.
struct Case {
    name: String,
    case: Value,
    data: Vec<u8>,
    text: String,
}

impl Case {
    fn open(dir: &Path) -> Case {
        Case {
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            case: serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap(),
            data: std::fs::read(dir.join("data.safetensors")).unwrap(),
            text: std::fs::read_to_string(dir.join("kernel.ptx")).unwrap(),
        }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.data).unwrap()
    }

    /// The tensors that have an expected value.
    fn outputs(&self) -> impl Iterator<Item = &str> {
        self.case["expect"].as_array().unwrap().iter().map(|e| e["tensor"].as_str().unwrap())
    }

    /// Compares results with what is expected of them: the first value that is out of bounds.
    fn check(&self, result: &HashMap<String, Vec<u8>>) -> Result<(), String> {
        let tensors = self.tensors();
        for e in self.case["expect"].as_array().unwrap() {
            let tensor = e["tensor"].as_str().unwrap();
            let want = tensors.tensor(e["equals"].as_str().unwrap()).unwrap();
            let got = numbers(tensors.tensor(tensor).unwrap().dtype(), &result[tensor]);
            let want = numbers(want.dtype(), want.data());
            assert_eq!(got.len(), want.len(), "{}: {tensor}", self.name);
            let (rtol, atol) = (e["rtol"].as_f64().unwrap(), e["atol"].as_f64().unwrap());
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                let close = (g - w).abs() <= atol + rtol * w.abs() || g == w;
                if !close {
                    return Err(format!("{tensor}[{i}] is {g}, expected {w}"));
                }
            }
        }
        Ok(())
    }
}

/// Runs a case with some checkers, which must find nothing: what its outputs hold afterwards.
fn run(
    whole: &Case,
    capability: (u32, u32),
    seed: u64,
    threads: usize,
    selection: Selection,
) -> HashMap<String, Vec<u8>> {
    let (Case { name, case, text, .. }, tensors) = (whole, whole.tensors());
    let module = softcuda::ptx::parse(text).unwrap_or_else(|e| panic!("{name}: {e}"));

    let device = Device { memory: memory(), checks: Checks::new(selection, memory().range()).unwrap() };
    let symbols =
        module.variables.iter().map(|v| (v.name.clone(), device.upload(&vec![0; v.bytes().unwrap() as usize])));
    let env = Environment { symbols: symbols.collect(), compute_capability: capability };
    let program = lower_module(&module, &env).unwrap_or_else(|e| panic!("{name}: {e}"));
    let kernel = program.kernel(case["entry"].as_str().unwrap()).expect("the entry is there");

    let mut buffers = HashMap::new();
    let mut params = Vec::new();
    for p in case["params"].as_array().unwrap() {
        if let Some(tensor) = p["tensormap"]["tensor"].as_str() {
            buffers.insert(tensor, device.upload(tensors.tensor(tensor).unwrap().data()));
        }
    }
    for (p, place) in case["params"].as_array().unwrap().iter().zip(&kernel.params) {
        params.resize(place.offset as usize, 0);
        if let Some(tensor) = p["tensor"].as_str() {
            let address = device.upload(tensors.tensor(tensor).unwrap().data());
            buffers.insert(tensor, address);
            params.extend(address.to_le_bytes());
        } else if let Some(x) = p["i32"].as_i64() {
            params.extend((x as i32).to_le_bytes());
        } else if let Some(x) = p["i64"].as_i64() {
            params.extend(x.to_le_bytes());
        } else if let Some(x) = p["f32"].as_f64() {
            params.extend((x as f32).to_le_bytes());
        } else if p["tensormap"].is_object() {
            let map = &p["tensormap"];
            let address = buffers[map["tensor"].as_str().unwrap()];
            params.extend(tensor_map(map, address).encode());
        } else if let Some(bytes) = p["scratch_bytes"].as_u64() {
            params.extend(if bytes == 0 { 0 } else { device.upload(&vec![0; bytes as usize]) }.to_le_bytes());
        } else {
            panic!("{name}: parameter {p}");
        }
    }
    params.resize(kernel.param_bytes as usize, 0);
    let watches = device.checks.watches();
    let config = Config { seed, threads, compute_capability: capability, watches, ..Config::default() };
    let result = launch(&Launch {
        kernel,
        grid: three(&case["grid"]),
        block: three(&case["block"]),
        cluster: three(&case["cluster"]),
        dynamic_shared_bytes: case["dynamic_shared_bytes"].as_u64().unwrap() as u32,
        params: &params,
        cooperative: false,
        memory: device.memory,
        config: &config,
    });
    if let Err(fault) = result {
        panic!("{name}, seed {seed}: {fault}");
    }
    let findings = device.checks.findings().all();
    assert!(findings.is_empty(), "{name}, seed {seed}: {}", findings[0]);
    let bytes = |tensor: &str| device.download(buffers[tensor], tensors.tensor(tensor).unwrap().data().len());
    let result = whole.outputs().map(|tensor| (tensor.to_owned(), bytes(tensor))).collect();
    if let Err(off) = whole.check(&result) {
        panic!("{name}, seed {seed}: {off}");
    }
    result
}

/// Every case with the device it is for.
fn all_cases() -> impl Iterator<Item = (Case, (u32, u32))> {
    let only = std::env::var("SOFTCUDA_CASE").unwrap_or_default();
    let targets = [("sm_80", (8, 0), 15), ("sm_90a", (9, 0), 18)];
    let of = |(target, capability, count)| {
        let found = cases(target);
        assert_eq!(found.len(), count, "all cases of {target} are there");
        found.into_iter().map(move |dir| (dir, capability))
    };
    let chosen = targets.into_iter().flat_map(of).filter(move |(dir, _)| dir.to_string_lossy().contains(&only));
    chosen.map(|(dir, capability)| (Case::open(&dir), capability))
}

#[test]
fn every_case_under_several_seeds() {
    for (case, capability) in all_cases() {
        for seed in 0..8 {
            run(&case, capability, seed, 1 + seed as usize % 3, Selection::NONE);
        }
    }
}

#[test]
fn every_case_under_twenty_seeds_with_all_checkers() {
    for (case, capability) in all_cases() {
        for seed in 0..20 {
            run(&case, capability, seed, 1 + seed as usize % 3, Selection::ALL);
        }
    }
}

/// The driver's results are within the same bounds; where they are not the executor's bits is listed ([`nvidia::differs`]) or, without a
/// list, allowed: the order of sums within an instruction is the device's own.
#[test]
fn every_case_on_a_real_driver() {
    let Some(context) = nvidia::context() else { return println!("no driver") };
    let (major, minor) = context.compute_capability().expect("a compute capability");
    let device = (major as u32, minor as u32);
    let mut wrong = Vec::new();
    for (case, capability) in all_cases() {
        // Code for sm_90a is for that architecture alone.
        if device < capability || (case.name.ends_with('a') && device != capability) {
            println!("{}: not for sm_{major}{minor}", case.name);
            continue;
        }
        let soft = run(&case, capability, 0, 1, Selection::NONE);
        let hard = match driver::run(context, &case.case, &case.tensors(), &case.text) {
            Ok(result) => result,
            Err(refusal) => {
                wrong.push(format!("{}: {refusal}", case.name));
                continue;
            }
        };
        wrong.extend(case.check(&hard).err().map(|off| format!("{}: {off}", case.name)));
        for tensor in case.outputs() {
            match nvidia::difference(&hard[tensor], &soft[tensor]) {
                None => println!("{}: {tensor}: the same bits", case.name),
                Some(words) if listed() => nvidia::differs(&format!("{}: {tensor}: {words}", case.name), ""),
                Some(words) => println!("{}: {tensor}: {words}", case.name),
            }
        }
    }
    assert!(wrong.is_empty(), "on the driver:\n{}", wrong.join("\n"));
}

fn listed() -> bool {
    std::env::var_os("SOFTCUDA_DIFFERENCES").is_some_and(|file| !file.is_empty())
}
