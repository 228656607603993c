//! Runs the cases of `tests/data/ptx`: kernels as an outside compiler emitted them, with inputs and expected outputs.

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

fn cases(target: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/ptx");
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

/// Runs a case with some checkers, which must find nothing.
fn run(dir: &Path, capability: (u32, u32), seed: u64, threads: usize, selection: Selection) {
    let name = dir.file_name().unwrap().to_string_lossy();
    let case: Value = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
    let data = std::fs::read(dir.join("data.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&data).unwrap();
    let text = std::fs::read_to_string(dir.join("kernel.ptx")).unwrap();
    let module = softcuda::ptx::parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));

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
    for e in case["expect"].as_array().unwrap() {
        let tensor = e["tensor"].as_str().unwrap();
        let want = tensors.tensor(e["equals"].as_str().unwrap()).unwrap();
        let view = tensors.tensor(tensor).unwrap();
        let got = numbers(view.dtype(), &device.download(buffers[tensor], view.data().len()));
        let want = numbers(want.dtype(), want.data());
        assert_eq!(got.len(), want.len(), "{name}: {tensor}");
        let (rtol, atol) = (e["rtol"].as_f64().unwrap(), e["atol"].as_f64().unwrap());
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            let close = (g - w).abs() <= atol + rtol * w.abs() || g == w;
            assert!(close, "{name}, seed {seed}: {tensor}[{i}] is {g}, expected {w}");
        }
    }
}

/// Every case with the device it is for.
fn all_cases() -> impl Iterator<Item = (PathBuf, (u32, u32))> {
    let only = std::env::var("SOFTCUDA_CASE").unwrap_or_default();
    let targets = [("sm_80", (8, 0), 15), ("sm_90a", (9, 0), 18)];
    let of = |(target, capability, count)| {
        let found = cases(target);
        assert_eq!(found.len(), count, "all cases of {target} are there");
        found.into_iter().map(move |dir| (dir, capability))
    };
    targets.into_iter().flat_map(of).filter(move |(dir, _)| dir.to_string_lossy().contains(&only))
}

#[test]
fn every_case_under_several_seeds() {
    for (dir, capability) in all_cases() {
        for seed in 0..8 {
            run(&dir, capability, seed, 1 + seed as usize % 3, Selection::NONE);
        }
    }
}

#[test]
fn every_case_under_twenty_seeds_with_all_checkers() {
    for (dir, capability) in all_cases() {
        for seed in 0..20 {
            run(&dir, capability, seed, 1 + seed as usize % 3, Selection::ALL);
        }
    }
}
