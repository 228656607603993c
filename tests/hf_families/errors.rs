//! What is wrong with a checkpoint or a command line is said in one line, with a non-zero exit code and no panic.

use std::path::{Path, PathBuf};
use std::process::Command;

use moe_kernels::Dtype;
use safetensors::tensor::Dtype as TensorDtype;
use serde_json::json;

use crate::hf;
use crate::hf::cli::Options;
use crate::hf::random::Random;
use crate::synth::{EXPERTS, Folder, HIDDEN, INTERMEDIATE, Tensor, checkpoint};

/// Runs the example's main function and expects a refusal; gives back its one line.
pub fn refusal(arguments: &[&str]) -> String {
    let error = hf::run(arguments.iter().map(Into::into), &mut std::io::sink()).expect_err("must be refused");
    let line = error.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "one line: {line}");
    line
}

/// The example as cargo built it beside this test.
fn example() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let folder = test.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps");
    let path = folder.join("examples").join(format!("hf_layer{}", std::env::consts::EXE_SUFFIX));
    assert!(
        path.exists(),
        "{} is missing: `cargo test` builds it, or `cargo build --example hf_layer`",
        path.display()
    );
    path
}

#[test]
fn the_program_exits_with_2_and_one_line() {
    let folder = Folder::new();
    std::fs::write(folder.join("config.json"), "nonsense").unwrap();
    let output = Command::new(example()).arg(folder.path()).output().expect("the example starts");
    let stderr = String::from_utf8(output.stderr).expect("messages are UTF-8");
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{stderr}");
}

/// What the example says of a folder that it refuses.
pub fn refused(folder: &Folder) -> String {
    refusal(&[folder.path().to_str().unwrap(), "--tokens", "4"])
}

pub fn says(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
}

#[test]
fn no_such_folder() {
    says(&refusal(&["/no/such/folder"]), &["/no/such/folder/config.json"]);
}

#[test]
fn config_is_not_json() {
    let folder = Folder::new();
    std::fs::write(folder.join("config.json"), "{\"model_type\": ").unwrap();
    says(&refused(&folder), &["config.json", "not valid JSON"]);
}

#[test]
fn config_is_no_object_or_has_no_type() {
    let folder = Folder::new();
    for (text, part) in [("[1, 2]", "no JSON object"), ("{}", "missing"), ("{\"model_type\": 3}", "expected a string")]
    {
        std::fs::write(folder.join("config.json"), text).unwrap();
        says(&refused(&folder), &["model_type", part]);
    }
}

#[test]
fn unknown_family() {
    let folder = Folder::new();
    std::fs::write(folder.join("config.json"), json!({"model_type": "gpt2"}).to_string()).unwrap();
    says(&refused(&folder), &["unknown family", "gpt2", "mixtral", "hunyuan_v1_moe"]);
}

#[test]
fn a_key_is_missing_or_of_another_kind() {
    let folder = Folder::new();
    let mut synthetic = checkpoint("mixtral");
    synthetic.config["num_experts_per_tok"] = json!("two");
    synthetic.write(&folder);
    says(&refused(&folder), &["num_experts_per_tok", "expected a count"]);
    synthetic.config.as_object_mut().unwrap().remove("num_experts_per_tok");
    synthetic.write(&folder);
    says(&refused(&folder), &["num_experts_per_tok", "is missing"]);
    synthetic.config["num_experts_per_tok"] = json!(EXPERTS + 1);
    synthetic.write(&folder);
    says(&refused(&folder), &["`num_experts_per_tok` is 7", "`num_local_experts`, which is 6"]);
}

#[test]
fn sizes_beyond_reason() {
    let folder = Folder::new();
    let mut synthetic = checkpoint("mixtral");
    synthetic.config["intermediate_size"] = json!(u32::MAX);
    synthetic.write(&folder);
    says(&refused(&folder), &["has shape"]);
    synthetic.config["num_local_experts"] = json!(1u64 << 40);
    synthetic.write(&folder);
    says(&refused(&folder), &["num_local_experts"]);
}

#[test]
fn no_tensors() {
    let folder = Folder::new();
    std::fs::write(folder.join("config.json"), checkpoint("mixtral").config.to_string()).unwrap();
    says(&refused(&folder), &["neither model.safetensors nor model.safetensors.index.json"]);
}

#[test]
fn truncated_file() {
    let folder = Folder::new();
    checkpoint("mixtral").write(&folder);
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for length in [0, 5, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        says(&refused(&folder), &["model.safetensors", "truncated"]);
    }
}

#[test]
fn not_a_safetensors_file() {
    let folder = Folder::new();
    checkpoint("mixtral").write(&folder);
    std::fs::write(folder.join("model.safetensors"), vec![0x20; 4096]).unwrap();
    says(&refused(&folder), &["model.safetensors"]);
    let mut bytes = 16u64.to_le_bytes().to_vec();
    bytes.extend(b"{\"a\": {\"dtype\": ");
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    says(&refused(&folder), &["model.safetensors", "not a usable safetensors file"]);
}

#[test]
fn missing_tensor() {
    let folder = Folder::new();
    let mut synthetic = checkpoint("mixtral");
    synthetic.tensors.0.remove("model.layers.0.block_sparse_moe.experts.3.w3.weight");
    synthetic.write(&folder);
    says(&refused(&folder), &["`model.layers.0.block_sparse_moe.experts.3.w3.weight` is missing"]);
    synthetic.tensors.0.remove("model.layers.0.block_sparse_moe.gate.weight");
    synthetic.write(&folder);
    says(&refused(&folder), &["no block", "no tensor `*.#.block_sparse_moe.gate.weight`"]);
}

#[test]
fn wrong_shape() {
    let folder = Folder::new();
    let mut synthetic = checkpoint("mixtral");
    let name = "model.layers.0.block_sparse_moe.experts.0.w2.weight";
    synthetic.tensors.0.get_mut(name).unwrap().shape = vec![INTERMEDIATE, HIDDEN];
    synthetic.write(&folder);
    says(&refused(&folder), &[name, "[24, 32]", "expected [32, 24]"]);
}

#[test]
fn quantised_checkpoints_are_named_as_such() {
    let folder = Folder::new();
    let mut synthetic = checkpoint("gpt_oss");
    let quantised = |values: usize| Tensor { dtype: TensorDtype::U8, shape: vec![values], values: vec![0.0; values] };
    synthetic.tensors.0.remove("model.layers.0.mlp.experts.gate_up_proj");
    synthetic.tensors.0.insert("model.layers.0.mlp.experts.gate_up_proj_blocks".into(), quantised(64));
    synthetic.write(&folder);
    says(&refused(&folder), &["`model.layers.0.mlp.experts.gate_up_proj_blocks`", "U8", "quantised"]);
}

#[test]
fn blocks_that_are_not_there() {
    let folder = Folder::new();
    checkpoint("qwen3_moe").write(&folder);
    let path = folder.path().to_str().unwrap();
    let with_block = |block: &str| refusal(&[path, "--tokens", "4", "--block", block]);
    for name in ["model.layers.0.mlp", "model.layers.5.mlp", "nonsense", "nonsense.3.mlp"] {
        says(&with_block(name), &[name, "there are model.layers.3.mlp"]);
    }
}

#[test]
fn no_rows() {
    let folder = Folder::new();
    checkpoint("mixtral").write(&folder);
    says(&refusal(&[folder.path().to_str().unwrap()]), &["--tokens"]);
}

#[test]
fn command_lines() {
    let complaint = |arguments: &[&str]| {
        let error = hf::cli::parse(arguments.iter().map(Into::into)).expect_err("must be refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    says(&complaint(&["--dtype", "f64"]), &["--dtype", "f64", "bf16"]);
    says(&complaint(&["--tokens", "-1"]), &["--tokens", "-1", "1048576"]);
    says(&complaint(&["--tokens", "1048577"]), &["--tokens", "1048577", "1048576"]);
    says(&complaint(&["--frob"]), &["--frob", "Usage: hf_layer"]);
    says(&complaint(&["--out"]), &["--out", "value is required"]);
    says(&complaint(&["a", "b"]), &["unexpected argument 'b'"]);
    says(&complaint(&["--block", "model.layers.0.mlp"]), &["required", "DIR"]);
}

#[test]
fn help_is_no_complaint() {
    let output = Command::new(example()).arg("--help").output().expect("the example starts");
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
    says(
        &String::from_utf8(output.stdout).unwrap(),
        &["Usage: hf_layer", "--block <NAME>", "--tokens <N>", "--out <FILE>"],
    );
}

/// Damaged files are refused or, where the damage changes nothing that is read, accepted; nothing panics.
#[test]
fn damaged_files() {
    let seed = 11;
    let mut random = Random::new(seed);
    let mut below = |end: usize| (random.normal().abs() * 1e6) as usize % end;
    let mut refused = 0;
    for round in 0..400 {
        let family = ["mixtral", "deepseek_v3", "gpt_oss", "hunyuan_v1_moe"][round % 4];
        let folder = Folder::new();
        checkpoint(family).write(&folder);
        let path = folder.join(if round % 2 == 0 { "config.json" } else { "model.safetensors" });
        let mut bytes = std::fs::read(&path).unwrap();
        // Of the tensors' file only the header can be invalid.
        let end = bytes.len().min(2000);
        for _ in 0..1 + below(3) {
            bytes[below(end)] = *b"0192{}[]:,\"-e \xff\0".get(below(17)).unwrap_or(&b'9');
        }
        std::fs::write(&path, bytes).unwrap();
        let options = Options { folder: Some(folder.path().to_owned()), tokens: Some(3), ..Options::own(Dtype::F32) };
        if let Err(error) = hf::Job::prepare(&options) {
            refused += 1;
            assert!(!error.to_string().contains('\n'), "seed {seed}, round {round}: {error}");
        }
    }
    assert!(refused > 100, "seed {seed}: only {refused} of 400 were refused");
}
