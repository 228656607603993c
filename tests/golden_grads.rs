//! Gradients of recorded checkpoints of every family on the device, in every storage type, by the example's own code.

#[path = "support/data.rs"]
mod data;
#[path = "../examples/hf_layer/hf/mod.rs"]
mod hf;

use hf::Job;
use hf::cli::Options;
use hf::device::Device;
use hf::error::HfError;
use hf::report::Line;
use moe_kernels::{Dtype, Error};

/// Folders whose record is of something else than the block: see `golden_gradients_reference`.
const OF_OTHER_FUNCTIONS: &[&str] = &["nllb_moe"];

/// Folders with a part that has no way back on the device yet.
const NOT_YET: &[&str] = &["doge", "muse_spark"];

fn check(dtype: Dtype) {
    let device = Device::open().unwrap();
    let (mut wrong, mut refused, mut passed) = (Vec::new(), Vec::new(), 0);
    let mut folders: Vec<_> =
        std::fs::read_dir(data::path("families")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    for folder in folders {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if OF_OTHER_FUNCTIONS.contains(&name.as_str()) {
            continue;
        }
        let options = Options { folder: Some(folder), grads: true, ..Options::own(dtype) };
        let job = Job::prepare(&options).unwrap();
        let lines = match job.check_gradients(&device, &job.first().unwrap()) {
            Ok((_, lines)) => lines,
            Err(HfError::Kernels(error @ Error::Unsupported { .. })) => {
                println!("{name}: {error}");
                refused.push(name);
                continue;
            }
            Err(error) => panic!("{name} {dtype}: {error}"),
        };
        assert!(lines.iter().any(|line| line.tensor == "dx") && lines.len() > 1, "{name}");
        lines.iter().for_each(|line| println!("{name} {dtype}: {line}"));
        wrong.extend(lines.iter().filter(|line| !Line::passes(line)).map(|line| format!("\n{name} {dtype}: {line}")));
        passed += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
    let unknown: Vec<_> = refused.iter().filter(|name| !NOT_YET.contains(&name.as_str())).collect();
    assert!(unknown.is_empty(), "{passed} have all gradients; no way back: {unknown:?}");
}

#[test]
fn every_family_in_bf16() {
    check(Dtype::Bf16);
}

#[test]
fn every_family_in_f16() {
    check(Dtype::F16);
}

#[test]
fn every_family_in_f32() {
    check(Dtype::F32);
}
