//! Recorded outputs of five model families, computed on the device in every storage type, by the example's own code.

#[path = "support/data.rs"]
mod data;
#[path = "../examples/hf_layer/hf/mod.rs"]
mod hf;

use half::{bf16, f16};
use hf::checkpoint::{Tensor, TensorFile};
use hf::cli::Options;
use hf::device::Device;
use hf::report::{Line, relative_error};
use hf::{Job, Source};
use moe_kernels::reference::Real;
use moe_kernels::{Dtype, Element};

fn check<T: Element + Real>(device: &Device, family: &str) {
    let folder = data::path("golden").join(family);
    let options = Options { folder: Some(folder), ..Options::own(T::DTYPE) };
    let job = Job::<T>::prepare(&options).unwrap();
    assert!(matches!(job.expected, Source::Golden(_)));
    let (outputs, lines) = job.check(device).unwrap();
    let tensors: Vec<&str> = lines.iter().map(|line| line.tensor).collect();
    let all: &[&str] =
        if family == "switch_transformers" { &["logits", "weights", "y"] } else { &["logits", "ids", "weights", "y"] };
    assert_eq!(tensors, all, "{family}: tensors of the golden file");
    for line in &lines {
        println!("{family} {}: {line}", T::DTYPE);
    }
    assert!(lines.iter().all(Line::passes), "{family} {}", T::DTYPE);
    let slots: i32 = outputs.counts.iter().sum();
    let all_slots = (outputs.ids.len()) as i32;
    if job.layer.capacity.is_none() {
        assert_eq!(slots, all_slots, "{family}: every slot reaches an expert");
    } else {
        assert!(slots < all_slots, "{family}: the recorded batch overflows its capacity");
    }
}

fn family(name: &str) {
    let device = Device::open().unwrap();
    println!("device: {}", device.name());
    check::<bf16>(&device, name);
    check::<f16>(&device, name);
    check::<f32>(&device, name);
    assert_eq!(Dtype::ALL.len(), 3, "every storage type is covered above");
}

#[test]
fn mixtral() {
    family("mixtral");
}

#[test]
fn qwen3_moe() {
    family("qwen3_moe");
}

#[test]
fn deepseek_v3() {
    family("deepseek_v3");
}

#[test]
fn gpt_oss() {
    family("gpt_oss");
}

#[test]
fn switch_transformers() {
    family("switch_transformers");
}

fn run(arguments: &[&std::ffi::OsStr]) -> (bool, String) {
    let mut report = Vec::new();
    let passes = hf::run(arguments.iter().map(Into::into), &mut report).unwrap();
    (passes, String::from_utf8(report).unwrap())
}

#[test]
fn the_report_and_the_file() {
    let folder = data::path("golden/mixtral");
    let out = std::env::temp_dir().join(format!("moe-kernels-out-{}.safetensors", std::process::id()));
    let (passes, report) = run(&[folder.as_ref(), "--dtype".as_ref(), "f32".as_ref(), "--out".as_ref(), out.as_ref()]);
    assert!(passes, "{report}");
    for part in [
        "device ",
        "compute capability ",
        "block_sparse_moe",
        "T 37 H 128 I 128 E 8 k 2",
        "tokens per expert [",
        "router ",
        "combine ",
        "logits ",
        "ids ",
        "weights ",
        "y ",
        "ok",
    ] {
        assert!(report.contains(part), "{part:?} is not in\n{report}");
    }
    let (written, golden) =
        (TensorFile::open(&out).unwrap(), TensorFile::open(&folder.join("golden.safetensors")).unwrap());
    for (name, shape) in
        [("x", [37, 128]), ("logits", [37, 8]), ("ids", [37, 2]), ("weights", [37, 2]), ("y", [37, 128])]
    {
        let (got, want) = (written.read(name).unwrap(), golden.read(name).unwrap());
        assert_eq!(got.shape(), shape, "{name}");
        if name == "ids" {
            assert_eq!(got.to_i32().unwrap(), want.to_i32().unwrap());
        } else {
            let widened =
                |tensor: &Tensor| tensor.to_vec::<f32>().unwrap().into_iter().map(f64::from).collect::<Vec<f64>>();
            let error = relative_error(&widened(&got), &widened(&want));
            assert!(error <= hf::report::tolerance(Dtype::F32), "{name}: {error:e}");
        }
    }
    std::fs::remove_file(out).ok();
}

#[test]
fn a_wrong_result_fails() {
    let source = data::path("golden/mixtral");
    let folder = std::env::temp_dir().join(format!("moe-kernels-wrong-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), folder.join(name)).unwrap();
    }
    let mut bytes = std::fs::read(source.join("golden.safetensors")).unwrap();
    // The file ends within y or x: either makes y wrong.
    for word in bytes.iter_mut().rev().skip(3).step_by(4).take(64) {
        *word ^= 0x40;
    }
    std::fs::write(folder.join("golden.safetensors"), bytes).unwrap();
    let (passes, report) = run(&[folder.as_ref()]);
    assert!(!passes && report.contains("FAILED"), "{report}");
    std::fs::remove_dir_all(folder).ok();
}

#[test]
fn no_rows() {
    let folder = data::path("golden/deepseek_v3");
    let (passes, report) = run(&[folder.as_ref(), "--tokens".as_ref(), "0".as_ref()]);
    assert!(passes && report.contains("T 0 "), "{report}");
}

#[test]
fn a_layer_of_our_own() {
    let (passes, report) = run(&["--tokens".as_ref(), "4".as_ref()]);
    assert!(passes, "{report}");
    assert!(report.contains("Mixtral") && report.contains("against the reference"), "{report}");
}

#[test]
fn an_output_that_cannot_be_written() {
    let arguments = ["--tokens", "1", "--out", "/no/such/folder/out.safetensors"];
    let error = hf::run(arguments.iter().map(Into::into), &mut std::io::sink()).unwrap_err();
    assert!(error.to_string().starts_with("/no/such/folder/out.safetensors: "), "{error}");
}
