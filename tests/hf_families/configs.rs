//! Keys of `config.json`: those that change a block are honoured or refused, those that change nothing are accepted.

use moe_kernels::Dtype;
use serde_json::{Value, json};

use crate::errors::{refusal, refused, says};
use crate::hf::Job;
use crate::synth::{Folder, Synthetic, checkpoint};

/// A family's checkpoint with one key set.
fn with_key(family: &str, key: &str, value: &Value) -> Synthetic {
    let mut synthetic = checkpoint(family);
    let config = &mut synthetic.config;
    let values = if config.get("text_config").is_some() { &mut config["text_config"] } else { config };
    values[key] = value.clone();
    synthetic
}

#[test]
fn what_is_not_computed_is_refused() {
    let cases = [
        // The family's own keys.
        ("switch_transformers", "is_gated_act", json!(true), "no gate"),
        ("switch_transformers", "feed_forward_proj", json!("gated-gelu"), "dense_act_fn"),
        ("switch_transformers", "router_type", json!("experts_masked"), "change the block"),
        ("gpt_oss", "hidden_act", json!("gelu"), "silu"),
        ("gpt_oss", "swiglu_limit", json!(1e300), "f32"),
        ("deepseek_v3", "topk_method", json!("greedy"), "noaux_tc"),
        ("deepseek_v3", "scoring_func", json!("tanh"), "sigmoid"),
        ("deepseek_v3", "n_group", json!(4), "divides 6 experts"),
        ("deepseek_v3", "n_group", json!(6), "2 or more"),
        ("deepseek_v3", "topk_group", json!(0), "0 of 3 groups"),
        ("deepseek_v3", "topk_group", json!(4), "4 of 3 groups"),
        ("deepseek_v3", "num_experts_per_tok", json!(7), "`n_routed_experts`, which is 6"),
        ("glm4_moe", "topk_method", json!("group_limited_greedy"), "noaux_tc"),
        ("ernie4_5_moe", "moe_gate", json!("top2_fused"), "topk"),
        ("ernie4_5_moe", "moe_gate_act", json!("sigmoid"), "change the block"),
        ("ernie4_5_moe", "moe_k", json!(9), "`moe_num_experts`, which is 6"),
        ("ernie4_5_moe", "use_bias", json!(true), "biases"),
        ("hunyuan_v1_moe", "group_limited_greedy", json!(true), "groups"),
        ("hunyuan_v1_moe", "moe_drop_tokens", json!(true), "change the block"),
        ("hunyuan_v1_moe", "moe_topk", json!([9, 9]), "`num_experts`, which is 6"),
        ("olmoe", "num_local_experts", json!(7), "`num_local_experts` is 7"),
        // Of other families.
        ("mixtral", "hidden_activation", json!("gelu"), "change the block"),
        ("mixtral", "scoring_func", json!("sigmoid"), "change the block"),
        ("mixtral", "norm_topk_prob", json!(false), "change the block"),
        ("mixtral", "use_routing_bias", json!(true), "change the block"),
        ("qwen3_moe", "swiglu_limit", json!(7.0), "change the block"),
        ("qwen3_moe", "shared_expert_intermediate_size", json!(24), "change the block"),
        ("olmoe", "routed_scaling_factor", json!(2.5), "change the block"),
        ("llama4", "norm_topk_prob", json!(true), "change the block"),
        ("llama4", "is_gated_act", json!(false), "change the block"),
        ("granitemoe", "router_logit_softcapping", json!(30.0), "change the block"),
        ("granitemoe", "expert_capacity", json!(64), "change the block"),
        ("minimax_m2", "n_group", json!(2), "change the block"),
        ("minimax_m2", "num_shared_experts", json!([0, 1]), "change the block"),
    ];
    for (family, key, value, part) in cases {
        let folder = Folder::new();
        with_key(family, key, &value).write(&folder);
        says(
            &format!("{family}: {}", refused(&folder)),
            &[&format!("`{key}`").replace("num_local_experts", "num_experts"), part],
        );
    }
}

#[test]
fn what_changes_nothing_is_accepted() {
    let cases = [
        ("mixtral", "norm_topk_prob", json!(true)),
        ("mixtral", "router_jitter_noise", json!(0.1)),
        ("mixtral", "swiglu_limit", json!(null)),
        ("mixtral", "some_key_of_ours", json!({"a": 1})),
        ("qwen3_moe", "num_local_experts", json!(6)),
        ("qwen3_moe", "routed_scaling_factor", json!(1.0)),
        ("deepseek_v3", "seq_aux", json!(true)),
        ("gpt_oss", "norm_topk_prob", json!(false)),
        ("switch_transformers", "is_gated_act", json!(false)),
        ("switch_transformers", "feed_forward_proj", json!("relu")),
        ("switch_transformers", "hidden_act", json!("relu")),
        ("switch_transformers", "router_type", json!("tokens_masked")),
        ("ernie4_5_moe", "moe_capacity", json!([64, 64, 64])),
        ("ernie4_5_moe", "moe_gate", json!("topk")),
        ("ernie4_5_moe", "moe_norm_min", json!(1e-12)),
        ("hunyuan_v1_moe", "routed_scaling_factor", json!(2.5)),
        ("hunyuan_v1_moe", "moe_drop_tokens", json!(false)),
        ("minimax_m2", "num_shared_experts", json!([0, 0])),
    ];
    for (family, key, value) in cases {
        let folder = Folder::new();
        with_key(family, key, &value).write(&folder);
        if let Err(error) = Job::prepare(&crate::options(&folder, Dtype::F32)) {
            panic!("{family} with {key} = {value}: {error}");
        }
    }
}

/// Without its bias a router needs no tensor of it, and with the tensor there, something is wrong.
#[test]
fn routers_with_and_without_a_bias() {
    for (family, key, tensor) in [
        ("minimax_m2", "use_routing_bias", "e_score_correction_bias"),
        ("ernie4_5_moe", "moe_use_aux_free", "moe_statics.e_score_correction_bias"),
    ] {
        let prepare = |flag: bool, keep: bool| {
            let folder = Folder::new();
            let mut synthetic = with_key(family, key, &json!(flag));
            let name = format!("{}.{tensor}", synthetic.block);
            if !keep {
                synthetic.tensors.0.remove(&name);
            }
            synthetic.write(&folder);
            let job = Job::prepare(&crate::options(&folder, Dtype::F32)).map_err(|error| error.to_string())?;
            Ok::<_, String>(job.first().unwrap().load_host(Dtype::F32).unwrap().weights.correction_bias.is_some())
        };
        assert!(prepare(true, true).unwrap(), "{family}");
        assert!(!prepare(false, false).unwrap(), "{family}");
        says(&prepare(true, false).err().unwrap(), &[tensor, "is missing"]);
        says(&prepare(false, true).err().unwrap(), &[tensor, "no such tensor"]);
    }
}

/// A count that cannot be is the configuration's fault, not that of the recorded outputs.
#[test]
fn too_many_experts_a_token_beside_recorded_outputs() {
    let source = crate::data::path("families/mixtral");
    let folder = Folder::new();
    for name in ["model.safetensors", "golden.safetensors"] {
        std::fs::copy(source.join(name), folder.join(name)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config["num_experts_per_tok"] = json!(9);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let line = refusal(&[folder.path().to_str().unwrap()]);
    says(&line, &["config.json: `num_experts_per_tok` is 9", "`num_local_experts`, which is 8"]);
    // Possible, but not what was recorded: the file that disagrees is named.
    config["num_experts_per_tok"] = json!(3);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    says(&refusal(&[folder.path().to_str().unwrap()]), &["golden.safetensors: tensor `ids`", "[31, 3]"]);
}
