//! The library's own part of reading checkpoints: the table of families, all blocks of a model, what is said of an unknown one, progress.

#[path = "support/data.rs"]
mod data;

use moe_kernels::Dtype;
use moe_kernels::checkpoint::{CheckpointError, Model, families, table};
use serde_json::Value;
use tempfile::TempDir;

/// A copy of a recorded checkpoint with another `config.json`.
fn changed(family: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let (source, folder) = (data::path("families").join(family), TempDir::new().unwrap());
    std::fs::copy(source.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn the_readme_has_the_table() {
    let readme = include_str!("../README.md");
    let (before, after) = ("<!-- families: cargo run --example hf_layer -- --families -->\n", "<!-- /families -->");
    let start = readme.find(before).expect("a mark before the table") + before.len();
    let end = start + readme[start..].find(after).expect("a mark after the table");
    assert_eq!(&readme[start..end], table(), "write what `cargo run --example hf_layer -- --families` prints");
}

#[test]
fn a_model_type_belongs_to_one_family() {
    let mut names: Vec<&str> = families().flat_map(|family| family.names()).copied().collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all, "{names:?}");
    assert!(families().all(|family| !family.row().iter().any(String::is_empty)));
}

#[test]
fn all_blocks_of_a_model() {
    let model = Model::open(&data::path("families/switch_transformers")).unwrap();
    let blocks = model.blocks().unwrap();
    let names: Vec<&str> = blocks.iter().map(|block| block.name()).collect();
    assert_eq!(names, ["encoder.block.0.layer.1.mlp", "decoder.block.0.layer.2.mlp"]);
    let values =
        |name| model.block(Some(name)).unwrap().load_host(Dtype::Bf16).unwrap().weights.router.unwrap().to_f32();
    assert_ne!(values(names[0]), values(names[1]));
}

#[test]
fn a_load_tells_how_far_it_is() {
    let model = Model::open(&data::path("families/mixtral")).unwrap();
    let block = model.block(None).unwrap();
    softcuda::install_if_no_gpu().unwrap();
    let stream = moe_kernels::device::open(0).unwrap().default_stream();
    let mut seen = Vec::new();
    block.load(&stream, Dtype::F16, &mut |progress| seen.push((progress.bytes, progress.of))).unwrap();
    // The router and three matrices of each of 8 experts.
    assert_eq!(seen.len(), 1 + 8 * 3);
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0));
    let total = block.check().unwrap();
    assert!(seen.iter().all(|&(_, of)| of == total) && seen.last().unwrap().0 == total);
}

#[test]
fn what_an_unknown_family_looks_like() {
    let said = |folder: &TempDir| match Model::open(folder.path()) {
        Err(error @ CheckpointError::UnknownFamily { .. }) => error.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("an unknown family is never guessed"),
    };
    // All of Qwen3's tensors and keys.
    let text = said(&changed("qwen3_moe", |config| config["model_type"] = "qwen9".into()));
    assert!(
        text.contains("\"qwen9\"") && text.contains("would fit") && text.contains("qwen3_moe (chosen by softmax"),
        "{text}"
    );
    assert!(text.contains("says nothing of its own rules"), "{text}");
    // DeepSeek-V3's, but for a key that nobody there knows.
    let text = said(&changed("deepseek_v3", |config| {
        config["model_type"] = "deepseek_v9".into();
        config["router_logit_softcapping"] = 30.0.into();
    }));
    assert!(text.contains("not deepseek_v3, as config.json: `router_logit_softcapping` is 30"), "{text}");
    // Nobody's tensors.
    let text = said(&changed("vitpose_backbone", |config| config["model_type"] = "vit9".into()));
    assert!(text.contains("is \"vit9\"; known are"), "{text}");
}

/// A language model inside another model is read by its own type.
#[test]
fn wrappers() {
    let folder = changed("deepseek_v3", |config| {
        let text = config.take();
        *config = serde_json::json!({"model_type": "kimi_k25", "text_config": text});
    });
    let model = Model::open(folder.path()).unwrap();
    assert_eq!((model.family().names()[0], model.config().model_type()), ("deepseek_v3", "kimi_k25"));
}
