//! Files that are not there, lead nowhere, never end or hold more than they should.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use safetensors::tensor::Dtype as TensorDtype;
use serde_json::{Value, json};

use crate::errors::{refusal, refused, says};
use crate::synth::{EXPERTS, Folder, Synthetic, checkpoint};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// A checkpoint in shards.
fn sharded() -> (Folder, Synthetic) {
    let (folder, synthetic) = (Folder::new(), checkpoint("mixtral"));
    synthetic.write_sharded(&folder);
    (folder, synthetic)
}

/// Changes the map from tensors to shards.
fn edit_index(folder: &Folder, edit: impl FnOnce(&mut Value)) {
    let path = folder.join(INDEX);
    let mut index: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut index["weight_map"]);
    std::fs::write(path, index.to_string()).unwrap();
}

/// As [`refused`], for what could wait for ever.
fn refused_in_time(folder: &Folder, arguments: &[&str]) -> String {
    let mut all = vec![folder.path().to_str().unwrap().to_owned()];
    all.extend(arguments.iter().map(|argument| argument.to_string()));
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let arguments: Vec<&str> = all.iter().map(String::as_str).collect();
        sender.send(refusal(&arguments)).ok();
    });
    receiver.recv_timeout(Duration::from_secs(60)).expect("an answer, rather than waiting for ever")
}

#[test]
fn a_lost_shard_is_named() {
    for shard in SHARDS {
        let (folder, synthetic) = sharded();
        std::fs::remove_file(folder.join(shard)).unwrap();
        says(&refused(&folder), &[shard, "the file is missing", INDEX, &synthetic.block]);
    }
}

#[test]
fn all_shards_are_lost() {
    let (folder, synthetic) = sharded();
    SHARDS.iter().for_each(|shard| std::fs::remove_file(folder.join(shard)).unwrap());
    let router = format!("`{}.gate.weight`", synthetic.block);
    says(&refused(&folder), &["-of-00002.safetensors", "the file is missing", &router]);
    // Asked for by its module's path, too.
    let path = folder.path().to_str().unwrap();
    says(&refusal(&[path, "--tokens", "1", "--block", "model.layers.0.mlp"]), &["the file is missing", &router]);
}

#[test]
fn a_block_whose_shards_are_there_is_found() {
    let (folder, _) = sharded();
    // Layer 0 is in a shard that nobody downloaded, layer 1 is here.
    let mut synthetic = checkpoint("mixtral");
    synthetic.config["num_hidden_layers"] = json!(2);
    let tensors = std::mem::take(&mut synthetic.tensors.0);
    synthetic.tensors.0 =
        tensors.into_iter().map(|(name, tensor)| (name.replace("layers.0", "layers.1"), tensor)).collect();
    synthetic.write_sharded(&folder);
    edit_index(&folder, |map| map["model.layers.0.block_sparse_moe.gate.weight"] = json!("lost.safetensors"));
    says(
        &refusal(&[folder.path().to_str().unwrap(), "--tokens", "1", "--block", "model.layers.0.mlp"]),
        &["lost.safetensors: the file is missing", "layers.0.block_sparse_moe.gate.weight"],
    );
    let options = crate::options(&folder, moe_kernels::Dtype::F32);
    let job = crate::hf::Job::prepare(&options).unwrap();
    assert_eq!(job.blocks, ["model.layers.1.block_sparse_moe"]);
}

#[test]
fn a_shard_without_its_tensor() {
    let (folder, synthetic) = sharded();
    let name = format!("{}.experts.3.w2.weight", synthetic.block);
    let other = |shard: &Value| json!(SHARDS[(shard == SHARDS[0]) as usize]);
    edit_index(&folder, |map| map[&name] = other(&map[&name]));
    says(&refused(&folder), &["-of-00002.safetensors: does not hold what it should", &name]);
}

#[test]
fn shards_that_are_no_file_names() {
    for shard in [json!(3), json!(""), json!("../model.safetensors"), json!("a\\b")] {
        let (folder, synthetic) = sharded();
        let name = format!("{}.gate.weight", synthetic.block);
        edit_index(&folder, |map| map[&name] = shard);
        says(&refused(&folder), &[INDEX, "no file name", &name]);
    }
}

#[test]
#[cfg(unix)]
fn links() {
    // To nothing: as if it were not there, and the error says why it is not.
    let (folder, _) = sharded();
    std::fs::remove_file(folder.join(SHARDS[1])).unwrap();
    std::os::unix::fs::symlink("nowhere", folder.join(SHARDS[1])).unwrap();
    says(&refused(&folder), &[SHARDS[1], "is a link to a file that is missing"]);

    // In a circle: an error wherever it is.
    for name in [CONFIG, INDEX, SHARDS[0], SHARDS[1], SINGLE] {
        let (folder, _) = sharded();
        circle(&folder.join(name));
        let line = refused(&folder);
        says(&line, &[&format!("{name}: "), "links"]);
        assert!(!line.contains("missing"), "{line}");
    }
    let folder = Folder::new();
    checkpoint("mixtral").write(&folder);
    circle(&folder.join("golden.safetensors"));
    says(&refusal(&[folder.path().to_str().unwrap()]), &["golden.safetensors: ", "links"]);

    // To a file: read.
    let (folder, linked) = sharded();
    std::fs::rename(folder.join(SHARDS[0]), folder.join("blob")).unwrap();
    std::os::unix::fs::symlink("blob", folder.join(SHARDS[0])).unwrap();
    let job = crate::hf::Job::prepare(&crate::options(&folder, moe_kernels::Dtype::F32)).unwrap();
    assert_eq!(job.blocks, [linked.block]);
}

#[cfg(unix)]
fn circle(path: &Path) {
    std::fs::remove_file(path).ok();
    std::os::unix::fs::symlink(path.file_name().unwrap(), path).unwrap();
}

#[test]
#[cfg(unix)]
fn pipes_and_folders() {
    for name in [CONFIG, INDEX, SHARDS[0], SHARDS[1], SINGLE] {
        let (folder, _) = sharded();
        let path = folder.join(name);
        std::fs::remove_file(&path).ok();
        assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo starts").success());
        says(&refused_in_time(&folder, &["--tokens", "1"]), &[&format!("{name}: is a pipe or a device")]);

        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        says(&refused_in_time(&folder, &["--tokens", "1"]), &[&format!("{name}: is a folder")]);
    }
    let folder = Folder::new();
    checkpoint("mixtral").write(&folder);
    assert!(Command::new("mkfifo").arg(folder.join("golden.safetensors")).status().unwrap().success());
    says(&refused_in_time(&folder, &[]), &["golden.safetensors: is a pipe or a device"]);
}

#[test]
fn a_header_beyond_the_formats_limit() {
    let folder = Folder::new();
    checkpoint("mixtral").write(&folder);
    for header in [100_000_001u64, 8 << 30, u64::MAX] {
        let mut file = File::create(folder.join(SINGLE)).unwrap();
        file.write_all(&header.to_le_bytes()).unwrap();
        // As long as it says, but with nothing on the disk.
        file.set_len(9 << 30).unwrap();
        says(&refused(&folder), &[SINGLE, &format!("a header of {header} bytes"), "at most 100000000"]);
    }
}

#[test]
fn json_beyond_the_limit() {
    let (folder, _) = sharded();
    for name in [INDEX, CONFIG] {
        File::create(folder.join(name)).unwrap().set_len(8 << 30).unwrap();
        says(&refused(&folder), &[&format!("{name}: has 8589934592 bytes"), "at most 100000000"]);
    }
}

#[test]
fn more_than_the_header_describes() {
    let folder = Folder::new();
    checkpoint("mixtral").write(&folder);
    let path = folder.join(SINGLE);
    File::options().append(true).open(&path).unwrap().write_all(&[0]).unwrap();
    says(&refused(&folder), &[SINGLE, "its header describes only"]);
}

/// The data of a tensor whose shape is wrong is not read, however much there is.
#[test]
fn a_tensor_larger_than_memory() {
    let folder = Folder::new();
    let mut synthetic = checkpoint("mixtral");
    let name = format!("{}.gate.weight", synthetic.block);
    synthetic.tensors.0.retain(|other, _| *other == name);
    synthetic.write(&folder);
    let columns = 1u64 << 40;
    let bytes = EXPERTS as u64 * columns * TensorDtype::BF16.bitsize() as u64 / 8;
    let header = json!({name: {"dtype": "BF16", "shape": [EXPERTS, columns], "data_offsets": [0, bytes]}}).to_string();
    let mut file = File::create(folder.join(SINGLE)).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
    says(&refused(&folder), &["gate.weight", &format!("[6, {columns}]"), "expected [6, 32]"]);
}
