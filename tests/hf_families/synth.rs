//! Tiny checkpoints with the names and shapes that the hub's files have.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::hf::random::Random;

/// Sizes that differ from each other, so that a swapped pair is an error.
pub const HIDDEN: usize = 32;
pub const INTERMEDIATE: usize = 24;
pub const EXPERTS: usize = 6;
pub const TOP_K: usize = 2;

/// A tensor whose values are exact in its type.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Tensors by name.
#[derive(Default)]
pub struct Tensors(pub BTreeMap<String, Tensor>);

impl Tensors {
    /// Random values of a size that keeps activations near 1.
    pub fn add(&mut self, random: &mut Random, name: impl Into<String>, dtype: Dtype, shape: &[usize]) {
        let columns = *shape.last().unwrap();
        let values = random.normals(shape.iter().product(), (columns as f32).sqrt().recip());
        let values = match dtype {
            Dtype::BF16 => values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect(),
            _ => values,
        };
        self.0.insert(name.into(), Tensor { dtype, shape: shape.to_vec(), values });
    }

    fn bytes(tensor: &Tensor) -> Vec<u8> {
        match tensor.dtype {
            Dtype::BF16 => tensor.values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
            Dtype::U8 => tensor.values.iter().map(|&value| value as u8).collect(),
            _ => tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }
    }

    /// Writes the tensors whose name passes.
    pub fn write(&self, path: &Path, keep: impl Fn(&str) -> bool) {
        let kept: Vec<(&String, &Tensor, Vec<u8>)> =
            self.0.iter().filter(|(name, _)| keep(name)).map(|(name, t)| (name, t, Self::bytes(t))).collect();
        let views = kept.iter().map(|(name, t, bytes)| {
            (name.as_str(), TensorView::new(t.dtype, t.shape.clone(), bytes).expect("bytes fit the shape"))
        });
        serialize_to_file(views, None, path).expect("a temporary file can be written");
    }
}

/// A folder that is removed with the value.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Folder {
        Folder(TempDir::with_prefix("moe-kernels-").expect("a temporary folder can be made"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// A checkpoint of one family.
pub struct Synthetic {
    pub config: Value,
    pub tensors: Tensors,
    /// What the names of the block's tensors begin with.
    pub block: String,
}

impl Synthetic {
    pub fn write(&self, folder: &Folder) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        self.tensors.write(&folder.join("model.safetensors"), |_| true);
    }

    /// The same in two shards.
    pub fn write_sharded(&self, folder: &Folder) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let names: Vec<&String> = self.tensors.0.keys().collect();
        let shard = |name: &str| {
            let second = names.iter().position(|other| other.as_str() == name).unwrap() % 2;
            format!("model-{:05}-of-00002.safetensors", second + 1)
        };
        for number in 1..=2 {
            let file = format!("model-{number:05}-of-00002.safetensors");
            self.tensors.write(&folder.join(&file), |name| shard(name) == file);
        }
        let map: BTreeMap<&String, String> = names.iter().map(|&name| (name, shard(name))).collect();
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// Builds the checkpoint of a family, by the layouts of the hub's own files.
pub fn checkpoint(family: &str) -> Synthetic {
    let mut builder = Builder { random: Random::new(7), tensors: Tensors::default(), block: String::new() };
    let config = match family {
        "mixtral" => builder.mixtral(),
        "qwen3_moe" => builder.qwen3_moe(),
        "olmoe" => builder.olmoe(),
        "deepseek_v3" => builder.deepseek_v3(),
        "glm4_moe" => builder.glm4_moe(),
        "gpt_oss" => builder.gpt_oss(),
        "switch_transformers" => builder.switch_transformers(),
        "llama4" => builder.llama4(),
        "granitemoe" => builder.granitemoe(),
        "minimax_m2" => builder.minimax_m2(),
        "ernie4_5_moe" => builder.ernie4_5_moe(),
        "hunyuan_v1_moe" => builder.hunyuan_v1_moe(),
        "axk1" => builder.axk1(),
        "beam" => builder.beam(),
        "bailing_hybrid" => builder.bailing_hybrid(),
        "glm4_moe_lite" | "glm_moe_dsa" | "exaone_moe" => builder.glm_like(family),
        "dots3_note" => builder.dots3_note(),
        "kimi_linear" => builder.kimi_linear(),
        "hy_v3" => builder.hy_v3(),
        "flint" | "lara_mini" => builder.qwen_like(family),
        "qwen3_omni_moe" => builder.qwen3_omni_moe(),
        "mistral_large4" => builder.mistral_large4(),
        "granitemoe_swa" => builder.granitemoe_swa(),
        "openai_privacy_filter" => builder.openai_privacy_filter(),
        other => panic!("no such family: {other}"),
    };
    Synthetic { config, tensors: builder.tensors, block: builder.block }
}

struct Builder {
    random: Random,
    tensors: Tensors,
    block: String,
}

impl Builder {
    fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        let name = format!("{}.{name}", self.block);
        self.tensors.add(&mut self.random, name, dtype, shape);
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize) {
        self.add(name, Dtype::BF16, &[rows, columns]);
    }

    /// Three matrices of a gated MLP by their names.
    fn gated(&mut self, gate: &str, up: &str, down: &str, intermediate: usize) {
        self.linear(gate, intermediate, HIDDEN);
        self.linear(up, intermediate, HIDDEN);
        self.linear(down, HIDDEN, intermediate);
    }

    fn projections(&mut self, prefix: &str, intermediate: usize) {
        let name = |matrix: &str| format!("{prefix}.{matrix}_proj.weight");
        self.gated(&name("gate"), &name("up"), &name("down"), intermediate);
    }

    fn w123(&mut self) {
        for expert in 0..EXPERTS {
            let name = |matrix: &str| format!("experts.{expert}.{matrix}.weight");
            self.gated(&name("w1"), &name("w3"), &name("w2"), INTERMEDIATE);
        }
    }

    fn mixtral(&mut self) -> Value {
        self.block = "model.layers.0.block_sparse_moe".into();
        self.linear("gate.weight", EXPERTS, HIDDEN);
        self.w123();
        json!({"model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "hidden_act": "silu",
            "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "num_hidden_layers": 1})
    }

    fn qwen3_moe(&mut self) -> Value {
        // Every second layer is sparse, and of those 1 is excluded.
        self.block = "model.layers.3.mlp".into();
        self.linear("gate.weight", EXPERTS, HIDDEN);
        (0..EXPERTS).for_each(|expert| self.projections(&format!("experts.{expert}"), INTERMEDIATE));
        json!({"model_type": "qwen3_moe", "hidden_size": HIDDEN, "intermediate_size": 999, "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "num_hidden_layers": 4, "norm_topk_prob": true,
            "decoder_sparse_step": 2, "mlp_only_layers": [1], "hidden_act": "silu"})
    }

    fn olmoe(&mut self) -> Value {
        self.block = "model.layers.0.mlp".into();
        self.linear("gate.weight", EXPERTS, HIDDEN);
        (0..EXPERTS).for_each(|expert| self.projections(&format!("experts.{expert}"), INTERMEDIATE));
        json!({"model_type": "olmoe", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K, "num_hidden_layers": 1, "norm_topk_prob": false, "hidden_act": "silu"})
    }

    fn deepseek_block(&mut self, shared: usize) {
        self.block = "model.layers.1.mlp".into();
        self.linear("gate.weight", EXPERTS, HIDDEN);
        self.add("gate.e_score_correction_bias", Dtype::F32, &[EXPERTS]);
        (0..EXPERTS).for_each(|expert| self.projections(&format!("experts.{expert}"), INTERMEDIATE));
        self.projections("shared_experts", INTERMEDIATE * shared);
    }

    fn deepseek_v3(&mut self) -> Value {
        self.deepseek_block(2);
        json!({"model_type": "deepseek_v3", "hidden_size": HIDDEN, "intermediate_size": 999, "hidden_act": "silu",
            "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "n_shared_experts": 2, "num_experts_per_tok": TOP_K,
            "n_group": 3, "topk_group": 2, "norm_topk_prob": true, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc", "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_hidden_layers": 2})
    }

    fn glm4_moe(&mut self) -> Value {
        self.deepseek_block(1);
        json!({"model_type": "glm4_moe", "hidden_size": HIDDEN, "intermediate_size": 999, "hidden_act": "silu",
            "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": TOP_K,
            "n_group": 1, "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1,
            "num_hidden_layers": 2})
    }

    fn gpt_oss(&mut self) -> Value {
        self.block = "model.layers.0.mlp".into();
        self.linear("router.weight", EXPERTS, HIDDEN);
        self.add("router.bias", Dtype::BF16, &[EXPERTS]);
        self.add("experts.gate_up_proj", Dtype::BF16, &[EXPERTS, HIDDEN, 2 * INTERMEDIATE]);
        self.add("experts.gate_up_proj_bias", Dtype::BF16, &[EXPERTS, 2 * INTERMEDIATE]);
        self.add("experts.down_proj", Dtype::BF16, &[EXPERTS, INTERMEDIATE, HIDDEN]);
        self.add("experts.down_proj_bias", Dtype::BF16, &[EXPERTS, HIDDEN]);
        // Half of the hub's limit, so that the clamp is reached.
        json!({"model_type": "gpt_oss", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K, "num_hidden_layers": 1, "swiglu_limit": 0.5, "hidden_act": "silu"})
    }

    fn switch_transformers(&mut self) -> Value {
        self.block = "encoder.block.1.layer.1.mlp".into();
        self.linear("router.classifier.weight", EXPERTS, HIDDEN);
        for expert in 0..EXPERTS {
            self.linear(&format!("experts.expert_{expert}.wi.weight"), INTERMEDIATE, HIDDEN);
            self.linear(&format!("experts.expert_{expert}.wo.weight"), HIDDEN, INTERMEDIATE);
        }
        json!({"model_type": "switch_transformers", "d_model": HIDDEN, "d_ff": INTERMEDIATE, "num_experts": EXPERTS,
            "expert_capacity": 64, "num_layers": 2, "num_decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
            "dense_act_fn": "relu", "router_bias": false})
    }

    fn llama4(&mut self) -> Value {
        self.block = "language_model.model.layers.1.feed_forward".into();
        self.linear("router.weight", EXPERTS, HIDDEN);
        self.add("experts.gate_up_proj", Dtype::BF16, &[EXPERTS, HIDDEN, 2 * INTERMEDIATE]);
        self.add("experts.down_proj", Dtype::BF16, &[EXPERTS, INTERMEDIATE, HIDDEN]);
        self.projections("shared_expert", INTERMEDIATE);
        json!({"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE, "intermediate_size_mlp": 999, "num_local_experts": EXPERTS, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "num_hidden_layers": 2, "hidden_act": "silu"}})
    }

    fn granitemoe(&mut self) -> Value {
        self.block = "model.layers.0.block_sparse_moe".into();
        self.linear("router.layer.weight", EXPERTS, HIDDEN);
        self.add("input_linear.weight", Dtype::BF16, &[EXPERTS, 2 * INTERMEDIATE, HIDDEN]);
        self.add("output_linear.weight", Dtype::BF16, &[EXPERTS, HIDDEN, INTERMEDIATE]);
        json!({"model_type": "granitemoe", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K, "num_hidden_layers": 1, "hidden_act": "silu", "residual_multiplier": 0.22})
    }

    fn minimax_m2(&mut self) -> Value {
        self.block = "model.layers.0.block_sparse_moe".into();
        self.linear("gate.weight", EXPERTS, HIDDEN);
        self.add("e_score_correction_bias", Dtype::F32, &[EXPERTS]);
        self.w123();
        json!({"model_type": "minimax_m2", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "hidden_act": "silu",
            "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "num_hidden_layers": 1, "scoring_func": "sigmoid",
            "use_routing_bias": true, "shared_intermediate_size": 0})
    }

    fn ernie4_5_moe(&mut self) -> Value {
        self.block = "model.layers.1.mlp".into();
        self.add("gate.weight", Dtype::F32, &[EXPERTS, HIDDEN]);
        self.add("moe_statics.e_score_correction_bias", Dtype::F32, &[1, EXPERTS]);
        (0..EXPERTS).for_each(|expert| self.projections(&format!("experts.{expert}"), INTERMEDIATE));
        self.projections("shared_experts", 2 * INTERMEDIATE);
        json!({"model_type": "ernie4_5_moe", "hidden_size": HIDDEN, "intermediate_size": 999, "hidden_act": "silu",
            "moe_intermediate_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1, "num_hidden_layers": 2,
            // Far above the hub's 1e-12, so that it is reached.
            "moe_norm_min": 0.75, "use_bias": false})
    }

    fn hunyuan_v1_moe(&mut self) -> Value {
        self.block = "model.layers.0.mlp".into();
        self.add("gate.wg.weight", Dtype::F32, &[EXPERTS, HIDDEN]);
        (0..EXPERTS).for_each(|expert| self.projections(&format!("experts.{expert}"), INTERMEDIATE));
        self.projections("shared_mlp", INTERMEDIATE);
        json!({"model_type": "hunyuan_v1_moe", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "hidden_act": "silu",
            "moe_intermediate_size": [INTERMEDIATE, INTERMEDIATE], "num_experts": EXPERTS, "moe_topk": [TOP_K, TOP_K],
            "num_shared_expert": [1, 1], "use_mixed_mlp_moe": true, "norm_topk_prob": true, "moe_layer_num_skipped": 0,
            "num_hidden_layers": 2})
    }

    /// Experts as transformers' modules hold them.
    fn packed(&mut self) {
        self.add("experts.gate_up_proj", Dtype::BF16, &[EXPERTS, 2 * INTERMEDIATE, HIDDEN]);
        self.add("experts.down_proj", Dtype::BF16, &[EXPERTS, HIDDEN, INTERMEDIATE]);
    }

    fn experts(&mut self) {
        (0..EXPERTS).for_each(|expert| self.projections(&format!("experts.{expert}"), INTERMEDIATE));
    }

    fn bailing_hybrid(&mut self) -> Value {
        self.deepseek_block(1);
        let bias = self.tensors.0.remove("model.layers.1.mlp.gate.e_score_correction_bias").unwrap();
        self.tensors.0.insert("model.layers.1.mlp.gate.expert_bias".into(), bias);
        json!({"model_type": "bailing_hybrid", "hidden_size": HIDDEN, "intermediate_size": 999, "hidden_act": "silu",
            "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_shared_experts": 1, "num_experts_per_token": TOP_K,
            "num_expert_group": 3, "topk_group": 2, "moe_renormalize": true})
    }

    fn axk1(&mut self) -> Value {
        let mut config = self.deepseek_v3();
        self.block = "model.layers.1".into();
        self.linear("post_mlp_layernorm.weight", 1, HIDDEN);
        self.block = "model.layers.1.mlp".into();
        config["model_type"] = "axk1".into();
        config["rms_norm_eps"] = 0.25.into();
        config
    }

    fn beam(&mut self) -> Value {
        self.deepseek_block(1);
        self.tensors.0.retain(|name, _| !name.contains("shared"));
        json!({"model_type": "beam", "hidden_size": HIDDEN, "intermediate_size": 999, "hidden_act": "silu",
            "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "n_group": 3, "topk_group": 2,
            "norm_topk_prob": true, "routed_scaling_factor": 1.5})
    }

    /// GLM-4.5's keys, without a scale.
    fn glm_like(&mut self, family: &str) -> Value {
        self.deepseek_block(1);
        if family == "exaone_moe" {
            let bias = self.tensors.0.remove("model.layers.1.mlp.gate.e_score_correction_bias").unwrap();
            self.tensors.0.insert("model.layers.1.mlp.e_score_correction_bias".into(), bias);
        }
        json!({"model_type": family, "hidden_size": HIDDEN, "intermediate_size": 999, "hidden_act": "silu",
            "moe_intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": TOP_K,
            "n_group": 1, "topk_group": 1, "norm_topk_prob": true})
    }

    fn dots3_note(&mut self) -> Value {
        self.deepseek_block(1);
        self.block = "model.language_model.layers.1.mlp".into();
        let tensors = std::mem::take(&mut self.tensors.0);
        let renamed =
            tensors.into_iter().map(|(name, t)| (name.replace("model.layers", "model.language_model.layers"), t));
        self.tensors.0 = renamed.filter(|(name, _)| !name.contains("shared")).collect();
        self.projections("shared_experts", 2 * INTERMEDIATE);
        json!({"model_type": "dots3_note", "text_config": {"model_type": "dots3_note_text", "hidden_size": HIDDEN,
            "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": TOP_K,
            "shared_experts_intermediate_size": 2 * INTERMEDIATE, "n_group": 1, "topk_group": 1, "norm_topk_prob": true}})
    }

    fn kimi_linear(&mut self) -> Value {
        self.block = "model.layers.1.block_sparse_moe".into();
        self.linear("gate.weight", EXPERTS, HIDDEN);
        self.add("gate.e_score_correction_bias", Dtype::F32, &[EXPERTS]);
        self.w123();
        self.projections("shared_experts", INTERMEDIATE);
        json!({"model_type": "kimi_linear", "hidden_size": HIDDEN, "intermediate_size": 999, "hidden_act": "silu",
            "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_shared_experts": 1, "num_experts_per_token": TOP_K,
            "num_expert_group": 1, "topk_group": 1, "moe_renormalize": true})
    }

    fn hy_v3(&mut self) -> Value {
        self.block = "model.layers.1.mlp".into();
        self.linear("router.gate.weight", EXPERTS, HIDDEN);
        self.add("expert_bias", Dtype::F32, &[EXPERTS]);
        self.experts();
        self.projections("shared_mlp", INTERMEDIATE);
        json!({"model_type": "hy_v3", "hidden_size": HIDDEN, "intermediate_size": 999, "hidden_act": "silu",
            "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_shared_experts": 1, "num_experts_per_tok": TOP_K,
            "enable_moe_fp32_combine": true})
    }

    fn qwen_like(&mut self, family: &str) -> Value {
        self.block = "model.layers.0.mlp".into();
        self.linear("gate.weight", EXPERTS, HIDDEN);
        if family == "flint" {
            self.experts()
        } else {
            self.packed()
        }
        self.projections("shared_expert", 2 * INTERMEDIATE);
        json!({"model_type": family, "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "hidden_act": "silu",
            "shared_expert_intermediate_size": 2 * INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
            "norm_topk_prob": true})
    }

    fn qwen3_omni_moe(&mut self) -> Value {
        self.block = "thinker.model.layers.0.mlp".into();
        self.linear("gate.weight", EXPERTS, HIDDEN);
        self.experts();
        let text = json!({"model_type": "qwen3_omni_moe_text", "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "norm_topk_prob": true, "hidden_act": "silu"});
        json!({"model_type": "qwen3_omni_moe", "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": text}})
    }

    fn mistral_large4(&mut self) -> Value {
        self.block = "model.language_model.layers.0".into();
        for expert in 0..EXPERTS {
            let name = |matrix: &str| format!("experts.{expert}.{matrix}.weight");
            self.gated(&name("w1"), &name("w3"), &name("w2"), INTERMEDIATE);
        }
        let name = |matrix: &str| format!("shared_experts.{matrix}.weight");
        self.gated(&name("w1"), &name("w3"), &name("w2"), INTERMEDIATE);
        self.linear("attention_norm.weight", 1, HIDDEN);
        self.block += ".gate";
        self.linear("weight", EXPERTS, HIDDEN);
        json!({"model_type": "mistral_large4", "text_config": {"model_type": "mistral_large4_text", "hidden_size": HIDDEN,
            "intermediate_size": 999, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
            "num_experts_per_tok": TOP_K, "n_group": 3, "topk_group": 2, "hidden_act": "silu"}})
    }

    fn granitemoe_swa(&mut self) -> Value {
        self.block = "model.layers.0.block_sparse_moe".into();
        self.linear("router.weight", EXPERTS, HIDDEN);
        self.packed();
        json!({"model_type": "granitemoe_swa", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "hidden_act": "silu",
            "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "shared_intermediate_size": 64})
    }

    fn openai_privacy_filter(&mut self) -> Value {
        let mut config = self.gpt_oss();
        config["model_type"] = "openai_privacy_filter".into();
        config["swiglu_limit"] = 7.0.into();
        config
    }
}
