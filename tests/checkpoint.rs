//! The library's own part of reading checkpoints: the table of families, all blocks of a model, what is said of an unknown one, progress.

#[path = "support/data.rs"]
mod data;

use half::{bf16, f16};
use moe_kernels::checkpoint::{BlockInputs, BlockRun, CheckpointError, HostBlock, Model, families, table};
use moe_kernels::rules::Layout;
use moe_kernels::{Dtype, Error, Kernels};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as SafeDtype, TensorView, serialize_to_file};
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
    let (found, table) = (&readme[start..end], table());
    for (found, line) in found.lines().zip(table.lines()) {
        assert_eq!(found, line, "write what `cargo run --example hf_layer -- --families` prints");
    }
    assert_eq!(found.lines().count(), table.lines().count(), "as many families");
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
    let folder = changed("mixtral", |config| config["model_type"] = "mix9".into());
    std::fs::write(folder.path().join("model.safetensors"), [&2u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
    let text = said(&folder);
    assert!(text.contains("is \"mix9\"; known are"), "{text}");
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

/// A tensor by name, type, extents and bytes.
type Raw = (String, SafeDtype, Vec<usize>, Vec<u8>);

/// The tensors of a recorded checkpoint, changed, in a new folder with the same configuration.
fn rewritten(family: &str, change: impl Fn(Raw) -> Raw) -> TempDir {
    let folder = changed(family, |_| ());
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors: Vec<Raw> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| change((name, view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("bytes fit the shape"))
    });
    serialize_to_file(views, None, &path).unwrap();
    folder
}

fn block_in(folder: &std::path::Path, dtype: Dtype) -> Result<HostBlock, CheckpointError> {
    Model::open(folder)?.block(None)?.load_host(dtype)
}

fn numbers(block: &HostBlock) -> [Vec<f32>; 3] {
    let weights = &block.weights;
    [weights.router.as_ref().unwrap(), &weights.gate_up.matrix, &weights.down.matrix].map(|buffer| buffer.to_f32())
}

/// A file in another type has the same numbers, where that type can hold them.
#[test]
fn types_of_files() {
    let own = numbers(&block_in(&data::path("families/mixtral"), Dtype::Bf16).unwrap());
    for to in [SafeDtype::F32, SafeDtype::F16] {
        let folder = rewritten("mixtral", |(name, _, shape, bytes)| {
            let values = bytes.as_chunks::<2>().0.iter().map(|&word| bf16::from_le_bytes(word).to_f32());
            let bytes: Vec<u8> = match to {
                SafeDtype::F32 => values.flat_map(|value| value.to_le_bytes()).collect(),
                _ => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
            };
            (name, to, shape, bytes)
        });
        for dtype in Dtype::ALL {
            let got = numbers(&block_in(folder.path(), dtype).unwrap());
            let round = |values: &Vec<f32>| -> Vec<f32> {
                let halved = |v: f32| if to == SafeDtype::F16 { f16::from_f32(v).to_f32() } else { v };
                values
                    .iter()
                    .map(|&v| match dtype {
                        Dtype::Bf16 => bf16::from_f32(halved(v)).to_f32(),
                        Dtype::F16 => f16::from_f32(halved(v)).to_f32(),
                        _ => halved(v),
                    })
                    .collect()
            };
            assert_eq!(&got[1..], own[1..].iter().map(round).collect::<Vec<_>>(), "{to:?} as {dtype}");
        }
    }
}

/// A router that the type cannot hold exactly stays in f32; so do an expert's values not, which are rounded.
#[test]
fn routers_keep_their_precision() {
    let folder = rewritten("mixtral", |(name, dtype, shape, bytes)| {
        if !name.contains("gate.weight") {
            return (name, dtype, shape, bytes);
        }
        let thirds = |&word: &[u8; 2]| (bf16::from_le_bytes(word).to_f32() / 3.0).to_le_bytes();
        (name, SafeDtype::F32, shape, bytes.as_chunks::<2>().0.iter().flat_map(thirds).collect())
    });
    for dtype in Dtype::ALL {
        assert_eq!(block_in(folder.path(), dtype).unwrap().desc.router_dtype, Dtype::F32);
    }
    let own = block_in(&data::path("families/mixtral"), Dtype::Bf16).unwrap();
    assert_eq!(own.desc.router_dtype, Dtype::Bf16);
}

#[test]
fn values_beyond_a_type() {
    let folder = rewritten("mixtral", |(name, dtype, shape, mut bytes)| {
        if name.ends_with("experts.3.w2.weight") {
            bytes[6..8].copy_from_slice(&bf16::from_f32(1e6).to_le_bytes());
        }
        (name, dtype, shape, bytes)
    });
    block_in(folder.path(), Dtype::F32).unwrap();
    let error = block_in(folder.path(), Dtype::F16).err().unwrap();
    assert!(matches!(&error, CheckpointError::Range { name, .. } if name.ends_with("experts.3.w2.weight")), "{error}");
    // What is no number in the file is none on the device.
    let folder = rewritten("mixtral", |(name, dtype, shape, mut bytes)| {
        bytes[..2].copy_from_slice(&bf16::INFINITY.to_le_bytes());
        (name, dtype, shape, bytes)
    });
    let [_, first, _] = numbers(&block_in(folder.path(), Dtype::F16).unwrap());
    assert_eq!(first[0], f32::INFINITY);
}

/// The format does not align data: a header of an odd length moves all of it.
#[test]
fn data_at_odd_places() {
    let source = data::path("families/mixtral");
    let folder = changed("mixtral", |_| ());
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap());
    let (header, data) = rest.split_at(length as usize);
    let moved = [&(length + 1).to_le_bytes()[..], header, b" ", data].concat();
    std::fs::write(folder.path().join("model.safetensors"), moved).unwrap();
    for dtype in Dtype::ALL {
        assert_eq!(numbers(&block_in(folder.path(), dtype).unwrap()), numbers(&block_in(&source, dtype).unwrap()));
    }
}

/// Qwen3-VL's released files hold the transposes of what transformers saves.
#[test]
fn layouts_by_shape() {
    let turned = rewritten("qwen3_vl_moe", |(name, dtype, shape, bytes)| {
        let [experts, rows, columns] = shape[..] else { return (name, dtype, shape, bytes) };
        if !name.contains("experts.") {
            return (name, dtype, shape, bytes);
        }
        let words = bytes.as_chunks::<2>().0;
        let places = (0..experts).flat_map(|e| (0..columns).flat_map(move |c| (0..rows).map(move |r| (e, r, c))));
        let bytes = places.flat_map(|(e, r, c)| words[(e * rows + r) * columns + c]).collect();
        (name, dtype, vec![experts, columns, rows], bytes)
    });
    let source = data::path("families/qwen3_vl_moe");
    let (own, other) = (block_in(&source, Dtype::Bf16).unwrap(), block_in(turned.path(), Dtype::Bf16).unwrap());
    assert_eq!((own.desc.mlp.gate_up.layout, own.desc.mlp.down.layout), (Layout::Nk, Layout::Nk));
    assert_eq!((other.desc.mlp.gate_up.layout, other.desc.mlp.down.layout), (Layout::Kn, Layout::Kn));
    let ([_, first, _], [_, second, _]) = (numbers(&own), numbers(&other));
    let (rows, columns) = (2 * own.desc.intermediate, own.desc.hidden);
    assert!((0..rows * columns).all(|i| first[i] == second[i % columns * rows + i / columns]));
}

/// What a block takes beside rows is asked for, and refused where there is no use for it.
#[test]
fn inputs_beside_rows() {
    softcuda::install_if_no_gpu().unwrap();
    let stream = moe_kernels::device::open(0).unwrap().default_stream();
    let kernels = Kernels::new(stream.context()).unwrap();
    let words = stream.clone_htod(&[0i32; 4]).unwrap();
    for (family, needed, given) in [
        ("deepseek_v4_hash", Some("words"), "index"),
        ("ernie4_5_vl_moe", Some("types"), "previous"),
        ("vitpose_backbone", Some("index"), "types"),
        ("mixtral", None, "words"),
    ] {
        let model = Model::open(&data::path("families").join(family)).unwrap();
        let block = model.block(None).unwrap().load(&stream, Dtype::F32, &mut |_| ()).unwrap();
        let mut run = BlockRun::<f32>::new(&block, 4, &kernels, &stream).unwrap();
        let x = stream.alloc_zeros::<f32>(4 * block.desc.hidden).unwrap();
        let mut y = stream.alloc_zeros::<f32>(4 * block.desc.hidden).unwrap();
        let mut pass =
            |inputs| run.forward(&kernels, &stream, &block, ((&x).into(), (&mut y).into()), inputs, &mut |_| ());
        match (pass(BlockInputs::default()), needed) {
            (Err(Error::Missing { argument, .. }), Some(needed)) => assert_eq!(argument, needed, "{family}"),
            (Ok(()), None) => {}
            (other, _) => panic!("{family}: {other:?}"),
        }
        let mut inputs = BlockInputs::default();
        let previous = stream.clone_htod(&[0f32; 4]).unwrap();
        match given {
            "words" => inputs.words = Some((&words).into()),
            "types" => inputs.types = Some((&words).into()),
            "index" => inputs.index = Some((&words).into()),
            _ => inputs.previous = Some((&previous).into()),
        }
        let error = pass(inputs).unwrap_err();
        assert!(matches!(error, Error::Unexpected { argument, .. } if argument == given), "{family}: {error}");
    }
}
