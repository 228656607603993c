//! Experts in another layout than the family's own on the hub: read where it is that of transformers' modules, else named.

use moe_kernels::Dtype;
use moe_kernels::checkpoint::HostBlock;
use safetensors::tensor::Dtype as TensorDtype;

use crate::errors::{refused, says};
use crate::hf::Job;
use crate::synth::{EXPERTS, Folder, HIDDEN, INTERMEDIATE, Synthetic, TOP_K, Tensor, checkpoint};

/// Families that have a tensor for each expert, with the names of its gate, up and down.
const SEPARATE: [(&str, [&str; 3]); 8] = [
    ("mixtral", W123),
    ("minimax_m2", W123),
    ("qwen3_moe", PROJECTIONS),
    ("olmoe", PROJECTIONS),
    ("deepseek_v3", PROJECTIONS),
    ("glm4_moe", PROJECTIONS),
    ("ernie4_5_moe", PROJECTIONS),
    ("hunyuan_v1_moe", PROJECTIONS),
];
const W123: [&str; 3] = ["w1", "w3", "w2"];
const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Loads the block of a checkpoint in bf16, its own type.
fn prepare(synthetic: &Synthetic) -> Result<HostBlock, String> {
    let folder = Folder::new();
    synthetic.write(&folder);
    let job = Job::prepare(&crate::options(&folder, Dtype::Bf16)).map_err(|error| error.to_string())?;
    Ok(job.first().unwrap().load_host(Dtype::Bf16).unwrap())
}

/// Puts all experts into two tensors, `[E,2I,H]` with the gate's rows first and `[E,H,I]`.
fn pack(synthetic: &mut Synthetic, [gate, up, down]: [&str; 3]) {
    let block = synthetic.block.clone();
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for expert in 0..EXPERTS {
        let mut take = |matrix: &str| {
            let name = format!("{block}.experts.{expert}.{matrix}.weight");
            synthetic.tensors.0.remove(&name).unwrap_or_else(|| panic!("no {name}")).values
        };
        first.extend(take(gate));
        first.extend(take(up));
        second.extend(take(down));
    }
    add(synthetic, "experts.gate_up_proj", &[EXPERTS, 2 * INTERMEDIATE, HIDDEN], first);
    add(synthetic, "experts.down_proj", &[EXPERTS, HIDDEN, INTERMEDIATE], second);
}

fn add(synthetic: &mut Synthetic, name: &str, shape: &[usize], values: Vec<f32>) {
    let tensor = Tensor { dtype: TensorDtype::BF16, shape: shape.to_vec(), values };
    synthetic.tensors.0.insert(format!("{}.{name}", synthetic.block), tensor);
}

/// Gives every tensor of the block another beginning of its name.
fn rename(synthetic: &mut Synthetic, block: &str) {
    let tensors = std::mem::take(&mut synthetic.tensors.0);
    let renamed = tensors.into_iter().map(|(name, tensor)| (name.replacen(&synthetic.block, block, 1), tensor));
    synthetic.tensors.0 = renamed.collect();
    synthetic.block = block.to_owned();
}

#[test]
fn packed_experts_are_read() {
    for (family, names) in SEPARATE {
        let mut synthetic = checkpoint(family);
        let separate = prepare(&synthetic).unwrap();
        pack(&mut synthetic, names);
        let packed = prepare(&synthetic).unwrap_or_else(|error| panic!("{family}: {error}"));
        assert_eq!(packed.weights.gate_up.matrix.to_f32(), separate.weights.gate_up.matrix.to_f32(), "{family}");
        assert_eq!(packed.weights.down.matrix.to_f32(), separate.weights.down.matrix.to_f32(), "{family}");
        assert_eq!(packed.desc, separate.desc, "{family}");
    }
}

/// A module's own names where the hub's files have others for the block.
#[test]
fn the_block_under_its_modules_name() {
    for family in ["mixtral", "minimax_m2"] {
        let mut synthetic = checkpoint(family);
        pack(&mut synthetic, W123);
        rename(&mut synthetic, "model.layers.0.mlp");
        let folder = Folder::new();
        synthetic.write(&folder);
        let job =
            Job::prepare(&crate::options(&folder, Dtype::F32)).unwrap_or_else(|error| panic!("{family}: {error}"));
        assert_eq!(job.blocks, ["model.layers.0.mlp"]);
    }
}

#[test]
fn packed_experts_of_another_shape() {
    let mut synthetic = checkpoint("mixtral");
    pack(&mut synthetic, W123);
    let name = format!("{}.experts.gate_up_proj", synthetic.block);
    synthetic.tensors.0.get_mut(&name).unwrap().shape = vec![EXPERTS, HIDDEN, 2 * INTERMEDIATE];
    says(&prepare(&synthetic).err().unwrap(), &[&name, "[6, 32, 48]", "expected [6, 48, 32]"]);
}

#[test]
fn another_familys_names() {
    let swapped = |family: &str, from: [&str; 3], to: [&str; 3]| {
        let mut synthetic = checkpoint(family);
        let mut tensors = std::mem::take(&mut synthetic.tensors.0);
        for (from, to) in from.iter().zip(to) {
            let renamed = tensors
                .into_iter()
                .map(|(name, tensor)| (name.replace(&format!(".{from}."), &format!(".{to}.")), tensor));
            tensors = renamed.collect();
        }
        synthetic.tensors.0 = tensors;
        prepare(&synthetic).err().unwrap()
    };
    says(
        &swapped("mixtral", W123, PROJECTIONS),
        &[
            "model.layers.0.block_sparse_moe`",
            "expected `experts.#.w1.weight`",
            "found `experts.0.down_proj.weight` [32, 24]",
            "more",
        ],
    );
    says(
        &swapped("olmoe", PROJECTIONS, W123),
        &["expected `experts.#.gate_proj.weight`", "found `experts.0.w1.weight` [24, 32]"],
    );
}

#[test]
fn separate_experts_where_one_tensor_is_expected() {
    for (family, expected) in
        [("llama4", "experts.gate_up_proj"), ("gpt_oss", "experts.gate_up_proj"), ("granitemoe", "input_linear.weight")]
    {
        let mut synthetic = checkpoint(family);
        let own = synthetic.tensors.0.keys().filter(|name| name.contains("experts.") || name.contains("_linear"));
        for name in own.cloned().collect::<Vec<_>>() {
            synthetic.tensors.0.remove(&name);
        }
        add(&mut synthetic, "experts.0.up_proj.weight", &[INTERMEDIATE, HIDDEN], vec![0.0; INTERMEDIATE * HIDDEN]);
        let line = prepare(&synthetic).err().unwrap();
        says(&line, &[&format!("expected `{expected}`"), "`experts.0.up_proj.weight` [24, 32]"]);
    }
}

#[test]
fn no_experts_at_all() {
    let mut synthetic = checkpoint("mixtral");
    synthetic.tensors.0.retain(|name, _| name.ends_with(".gate.weight"));
    says(&prepare(&synthetic).err().unwrap(), &["experts of `model.layers.0.block_sparse_moe`", "found nothing"]);
}

/// What the block has and nobody reads would change what it computes.
#[test]
fn tensors_beyond_the_families_own() {
    for (family, name) in [
        ("mixtral", "experts.0.w1.bias".to_owned()),
        ("mixtral", format!("experts.{EXPERTS}.w1.weight")),
        ("qwen3_moe", "shared_expert_gate.weight".into()),
        ("olmoe", "gate.e_score_correction_bias".into()),
        ("switch_transformers", "experts.expert_0.wi_1.weight".into()),
        ("llama4", "experts.gate_up_proj_bias".into()),
        ("hunyuan_v1_moe", "gate.wg.bias".into()),
    ] {
        let mut synthetic = checkpoint(family);
        add(&mut synthetic, &name, &[TOP_K], vec![0.0; TOP_K]);
        let line = prepare(&synthetic).err().unwrap_or_else(|| panic!("{family} takes {name}"));
        says(&line, &[&format!("`{}.{name}`", synthetic.block), "no such tensor"]);
    }
    // In a shard that is not there, too.
    let (folder, mut synthetic) = (Folder::new(), checkpoint("mixtral"));
    add(&mut synthetic, "experts.0.w1.bias", &[TOP_K], vec![0.0; TOP_K]);
    synthetic.write_sharded(&folder);
    says(&refused(&folder), &["experts.0.w1.bias", "no such tensor"]);
}

/// Tensors of other blocks and of other parts of the layer are nobody's business.
#[test]
fn tensors_of_other_blocks() {
    let mut synthetic = checkpoint("mixtral");
    let block = std::mem::replace(&mut synthetic.block, "model.layers.0".into());
    add(&mut synthetic, "self_attn.q_proj.weight", &[TOP_K], vec![0.0; TOP_K]);
    add(&mut synthetic, "block_sparse_moe2.gate.weight", &[TOP_K], vec![0.0; TOP_K]);
    synthetic.block = block;
    prepare(&synthetic).unwrap();
}
