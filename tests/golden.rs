//! Recorded checkpoints of every family, computed on the device in every storage type, by the example's own code.

#[path = "support/data.rs"]
mod data;
#[path = "../examples/hf_layer/hf/mod.rs"]
mod hf;

use hf::Job;
use hf::cli::Options;
use hf::device::Device;
use hf::report::{Line, relative_error};
use moe_kernels::Dtype;
use moe_kernels::checkpoint::{FileTensor, TensorFile};

/// Folders that no kernel computes yet.
const NOT_YET: &[&str] = &[];

fn check(dtype: Dtype) {
    let device = Device::open().unwrap();
    println!("device: {}", device.name());
    let mut wrong = Vec::new();
    let mut folders: Vec<_> =
        std::fs::read_dir(data::path("families")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 56, "one folder a rule");
    for folder in folders {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if NOT_YET.contains(&name.as_str()) {
            continue;
        }
        let options = Options { folder: Some(folder), ..Options::own(dtype) };
        let job = Job::prepare(&options).unwrap_or_else(|error| panic!("{name}: {error}"));
        let block = job.first().unwrap();
        let expected = job.expected(&block).unwrap().expect("a recorded block");
        let (outputs, lines) = job.check(&device, &block).unwrap_or_else(|error| panic!("{name} {dtype}: {error}"));
        assert!(lines.iter().any(|line| line.tensor == "y"));
        assert_eq!(lines.iter().any(|line| line.tensor == "ids"), expected.ids.is_some(), "{name}");
        wrong.extend(lines.iter().filter(|line| !Line::passes(line)).map(|line| format!("\n{name} {dtype}: {line}")));
        // Whoever has no expert has no row; experts of one unit have none at all, and those by index are not counted.
        let slots: i32 = outputs.counts.iter().sum();
        let (tokens, layer) = (outputs.y.len() / block.desc().hidden, block.desc());
        if block.desc().map.is_none() && block.logit_columns() == layer.logit_columns() {
            let dropped = outputs.ids.iter().filter(|&&id| id < 0).count();
            assert_eq!(slots as usize, tokens * layer.all_choices() - dropped, "{name}: a row for every choice");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
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
    let folder = data::path("families/mixtral");
    let out = std::env::temp_dir().join(format!("moe-kernels-out-{}.safetensors", std::process::id()));
    let (passes, report) = run(&[folder.as_ref(), "--dtype".as_ref(), "f32".as_ref(), "--out".as_ref(), out.as_ref()]);
    assert!(passes, "{report}");
    for part in [
        "device ",
        "compute capability ",
        "block_sparse_moe",
        "T 31 H 72 I 24 E 8 k 2",
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
    for (name, shape) in [("x", [31, 72]), ("logits", [31, 8]), ("ids", [31, 2]), ("weights", [31, 2]), ("y", [31, 72])]
    {
        let (got, want) = (written.read(name).unwrap(), golden.read(name).unwrap());
        assert_eq!(got.shape(), shape, "{name}");
        if name == "ids" {
            assert_eq!(got.integers().unwrap(), want.integers().unwrap());
        } else {
            let widened = |tensor: &FileTensor| {
                tensor.values::<f32>().unwrap().iter().map(|&v| f64::from(v)).collect::<Vec<f64>>()
            };
            let error = relative_error(&widened(&got), &widened(&want));
            assert!(error <= hf::report::tolerance(Dtype::F32), "{name}: {error:e}");
        }
    }
    std::fs::remove_file(out).ok();
}

#[test]
fn a_wrong_result_fails() {
    let source = data::path("families/mixtral");
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
fn all_blocks() {
    let folder = data::path("families/switch_transformers");
    let out = std::env::temp_dir().join(format!("moe-kernels-all-{}.safetensors", std::process::id()));
    let (passes, report) = run(&[folder.as_ref(), "--block".as_ref(), "all".as_ref(), "--out".as_ref(), out.as_ref()]);
    assert!(passes, "{report}");
    // The recorded block against its record, the other against the reference, both written.
    let (first, second) = report.split_once("decoder.block.0.layer.2.mlp").expect("the second block");
    assert!(first.contains("encoder.block.0.layer.1.mlp") && first.contains("against golden.safetensors"), "{report}");
    assert!(second.contains("against the reference"), "{report}");
    for block in ["encoder.block.0.layer.1.mlp", "decoder.block.0.layer.2.mlp"] {
        let path = out.with_file_name(format!("{}-{block}.safetensors", out.file_stem().unwrap().to_str().unwrap()));
        assert!(TensorFile::open(&path).unwrap().contains("y"));
        std::fs::remove_file(path).ok();
    }
}

/// Rows of our own through every kind of block, against the reference.
#[test]
fn random_rows_of_every_family() {
    for entry in std::fs::read_dir(data::path("families")).unwrap() {
        let folder = entry.unwrap().path();
        if NOT_YET.iter().any(|name| folder.ends_with(name)) {
            continue;
        }
        let (passes, report) =
            run(&[folder.as_ref(), "--tokens".as_ref(), "7".as_ref(), "--dtype".as_ref(), "f32".as_ref()]);
        assert!(passes && report.contains("against the reference"), "{}: {report}", folder.display());
    }
}

#[test]
fn the_table_of_families() {
    let (passes, report) = run(&["--families".as_ref()]);
    assert!(passes && report == moe_kernels::checkpoint::table(), "{report}");
}

#[test]
fn no_rows() {
    let folder = data::path("families/deepseek_v3");
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
