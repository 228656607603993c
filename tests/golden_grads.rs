//! Gradients of recorded checkpoints of every family on the device, in every storage type, by the example's own code.

#[path = "support/data.rs"]
mod data;
#[path = "../examples/hf_layer/hf/mod.rs"]
mod hf;

use hf::Job;
use hf::cli::Options;
use hf::device::Device;
use hf::report::{Line, gradient_tolerance, relative_error};
use moe_kernels::Dtype;
use moe_kernels::checkpoint::{FileTensor, TensorFile};

fn check(dtype: Dtype) {
    let device = Device::open().unwrap();
    let (mut wrong, mut passed) = (Vec::new(), 0);
    let mut folders: Vec<_> =
        std::fs::read_dir(data::path("families")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    for folder in folders {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let options = Options { folder: Some(folder), grads: true, ..Options::own(dtype) };
        let job = Job::prepare(&options).unwrap();
        let lines = match job.check_gradients(&device, &job.first().unwrap()) {
            Ok((_, lines)) => lines,
            Err(error) => panic!("{name} {dtype}: {error}"),
        };
        assert!(lines.iter().any(|line| line.tensor == "dx") && lines.len() > 1, "{name}");
        lines.iter().for_each(|line| println!("{name} {dtype}: {line}"));
        wrong.extend(lines.iter().filter(|line| !Line::passes(line)).map(|line| format!("\n{name} {dtype}: {line}")));
        passed += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
    assert!(passed >= 56, "{passed} folders have gradients");
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

fn run(arguments: &[&std::ffi::OsStr]) -> (bool, String) {
    let mut report = Vec::new();
    let passes = hf::run(arguments.iter().map(Into::into), &mut report).unwrap();
    (passes, String::from_utf8(report).unwrap())
}

#[test]
fn the_report_and_the_file() {
    let folder = data::path("families/gpt_oss");
    let out = std::env::temp_dir().join(format!("moe-kernels-grads-{}.safetensors", std::process::id()));
    let (passes, report) =
        run(&[folder.as_ref(), "--grads".as_ref(), "--dtype".as_ref(), "f32".as_ref(), "--out".as_ref(), out.as_ref()]);
    assert!(passes, "{report}");
    let written = TensorFile::open(&out).unwrap();
    let golden = TensorFile::open(&folder.join("golden_grads.safetensors")).unwrap();
    for name in golden.names().iter().filter(|name| *name != "dy") {
        let line = report.lines().find(|line| line.split_whitespace().next() == Some(name)).expect(name);
        assert!(line.contains("relative error") && line.ends_with("ok"), "{line}");
        let (got, want) = (written.read(name).unwrap(), golden.read(name).unwrap());
        assert_eq!(got.shape(), want.shape(), "{name}");
        let wide = |of: &FileTensor| of.values::<f32>().unwrap().iter().map(|&v| v.into()).collect::<Vec<f64>>();
        let error = relative_error(&wide(&got), &wide(&want));
        assert!(error <= gradient_tolerance(name, Dtype::F32), "{name}: {error:e}");
    }
    assert!(written.contains("y") && written.contains("x"));
    std::fs::remove_file(out).ok();
}

#[test]
fn a_wrong_gradient_fails() {
    let source = data::path("families/mixtral");
    let folder = std::env::temp_dir().join(format!("moe-kernels-wrong-grads-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["config.json", "model.safetensors", "golden.safetensors"] {
        std::fs::copy(source.join(name), folder.join(name)).unwrap();
    }
    let mut bytes = std::fs::read(source.join("golden_grads.safetensors")).unwrap();
    // The file ends within dy: numbers whose mantissa begins otherwise make all gradients wrong.
    for word in bytes.iter_mut().rev().skip(1).step_by(4).take(640) {
        *word ^= 0x40;
    }
    std::fs::write(folder.join("golden_grads.safetensors"), bytes).unwrap();
    let (passes, report) = run(&[folder.as_ref(), "--grads".as_ref()]);
    assert!(!passes && report.contains("FAILED"), "{report}");
    // Without them they do not count.
    let (passes, report) = run(&[folder.as_ref()]);
    assert!(passes && !report.contains("dx"), "{report}");
    std::fs::remove_file(folder.join("golden_grads.safetensors")).unwrap();
    let error = hf::run([folder.as_os_str(), "--grads".as_ref()].into_iter().map(Into::into), &mut std::io::sink());
    assert!(error.unwrap_err().to_string().contains("golden_grads.safetensors"));
    std::fs::remove_dir_all(folder).ok();
}
