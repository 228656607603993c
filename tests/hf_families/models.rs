//! Each model's block for one token, written from the model's own code and from its tensors' names, independently of the
//! example's descriptions.

use crate::synth::{EXPERTS, Synthetic, TOP_K, Tensor};

/// A checkpoint's block, and what the names of its tensors begin with.
pub struct Block<'a>(pub &'a Synthetic, pub String);

impl Block<'_> {
    fn tensor(&self, name: &str) -> &Tensor {
        &self.0.tensors.0[&format!("{}.{name}", self.1)]
    }

    /// `W x` for a matrix `[rows, columns]`.
    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let tensor = self.tensor(name);
        rows(&tensor.values, x)
    }

    /// `W[e] x` for `[E, rows, columns]`.
    fn linear_of(&self, name: &str, expert: usize, x: &[f64]) -> Vec<f64> {
        let tensor = self.tensor(name);
        let size = tensor.values.len() / EXPERTS;
        rows(&tensor.values[expert * size..][..size], x)
    }

    /// `x W[e]` for `[E, columns, rows]`.
    fn times(&self, name: &str, expert: usize, x: &[f64]) -> Vec<f64> {
        let tensor = self.tensor(name);
        let (from, to) = (tensor.shape[1], tensor.shape[2]);
        let weight = &tensor.values[expert * from * to..][..from * to];
        (0..to).map(|column| (0..from).map(|row| x[row] * f64::from(weight[row * to + column])).sum()).collect()
    }

    fn bias(&self, name: &str) -> Vec<f64> {
        self.tensor(name).values.iter().map(|&value| value.into()).collect()
    }

    fn swiglu(&self, gate: &str, up: &str, down: &str, x: &[f64]) -> Vec<f64> {
        let hidden: Vec<f64> =
            self.linear(gate, x).iter().zip(self.linear(up, x)).map(|(gate, up)| silu(*gate) * up).collect();
        self.linear(down, &hidden)
    }

    fn projections(&self, prefix: &str, x: &[f64]) -> Vec<f64> {
        let name = |matrix: &str| format!("{prefix}.{matrix}_proj.weight");
        self.swiglu(&name("gate"), &name("up"), &name("down"), x)
    }

    /// One expert of `experts.gate_up_proj [E,2I,H]` and `experts.down_proj [E,H,I]`.
    fn packed(&self, expert: usize, x: &[f64]) -> Vec<f64> {
        let first = self.linear_of("experts.gate_up_proj", expert, x);
        let (gate, up) = first.split_at(first.len() / 2);
        let hidden: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up).collect();
        self.linear_of("experts.down_proj", expert, &hidden)
    }

    /// Sigmoid scores chosen with a bias from the best `kept` of three groups of two, divided by their sum.
    fn sigmoid_biased(&self, x: &[f64], router: &str, bias: &str, kept: usize, scale: f64) -> Vec<(usize, f64)> {
        let s: Vec<f64> = self.linear(router, x).into_iter().map(sigmoid).collect();
        let mut choice = add(&s, &self.bias(bias));
        // A group's two best are its two.
        let groups: Vec<f64> = choice.chunks(2).map(|group| group[0] + group[1]).collect();
        let kept = top(&groups, kept);
        for (expert, value) in choice.iter_mut().enumerate() {
            if !kept.contains(&(expert / 2)) {
                *value = f64::NEG_INFINITY;
            }
        }
        normalised(&s, &top(&choice, TOP_K), scale)
    }

    /// DeepSeek-V3's block.
    fn deepseek(&self, x: &[f64], bias: &str, kept: usize, scale: f64) -> Vec<f64> {
        let chosen = self.sigmoid_biased(x, "gate.weight", bias, kept, scale);
        let routed = mixture(chosen, |expert| self.projections(&format!("experts.{expert}"), x));
        add(&routed, &self.projections("shared_experts", x))
    }

    fn w123(&self, expert: usize, x: &[f64]) -> Vec<f64> {
        let name = |matrix: &str| format!("experts.{expert}.{matrix}.weight");
        self.swiglu(&name("w1"), &name("w3"), &name("w2"), x)
    }
}

/// What the block of a family makes of one token.
pub fn token(family: &str, block: &Block, x: &[f64]) -> Vec<f64> {
    match family {
        "mixtral" => {
            let p = softmax(&block.linear("gate.weight", x));
            mixture(normalised(&p, &top(&p, TOP_K), 1.0), |expert| block.w123(expert, x))
        }
        "qwen3_moe" => {
            let p = softmax(&block.linear("gate.weight", x));
            mixture(normalised(&p, &top(&p, TOP_K), 1.0), |expert| block.projections(&format!("experts.{expert}"), x))
        }
        "olmoe" => {
            let p = softmax(&block.linear("gate.weight", x));
            let chosen = top(&p, TOP_K).into_iter().map(|expert| (expert, p[expert])).collect();
            mixture(chosen, |expert| block.projections(&format!("experts.{expert}"), x))
        }
        "deepseek_v3" => block.deepseek(x, "gate.e_score_correction_bias", 2, 2.5),
        "axk1" => {
            let sum = block.deepseek(x, "gate.e_score_correction_bias", 2, 2.5);
            let layer = Block(block.0, block.0.block.trim_end_matches(".mlp").to_owned());
            let mean = sum.iter().map(|v| v * v).sum::<f64>() / sum.len() as f64;
            let norm = (mean + 0.25).sqrt();
            sum.iter().zip(layer.bias("post_mlp_layernorm.weight")).map(|(v, w)| v / norm * w).collect()
        }
        "beam" => {
            let chosen = block.sigmoid_biased(x, "gate.weight", "gate.e_score_correction_bias", 2, 1.5);
            mixture(chosen, |expert| block.projections(&format!("experts.{expert}"), x))
        }
        // The scale is that of the class where the configuration has none.
        "bailing_hybrid" => block.deepseek(x, "gate.expert_bias", 2, 2.5),
        "glm4_moe" => block.deepseek(x, "gate.e_score_correction_bias", 3, 1.5),
        "glm4_moe_lite" => block.deepseek(x, "gate.e_score_correction_bias", 3, 1.8),
        "glm_moe_dsa" => block.deepseek(x, "gate.e_score_correction_bias", 3, 2.5),
        "dots3_note" => block.deepseek(x, "gate.e_score_correction_bias", 3, 1.0),
        "exaone_moe" => block.deepseek(x, "e_score_correction_bias", 3, 2.5),
        "kimi_linear" => {
            let chosen = block.sigmoid_biased(x, "gate.weight", "gate.e_score_correction_bias", 3, 2.446);
            let routed = mixture(chosen, |expert| block.w123(expert, x));
            add(&routed, &block.projections("shared_experts", x))
        }
        "hy_v3" => {
            let chosen = block.sigmoid_biased(x, "router.gate.weight", "expert_bias", 3, 2.826);
            let routed = mixture(chosen, |expert| block.projections(&format!("experts.{expert}"), x));
            add(&routed, &block.projections("shared_mlp", x))
        }
        "flint" => {
            let s: Vec<f64> = block.linear("gate.weight", x).into_iter().map(sigmoid).collect();
            let routed = mixture(normalised(&s, &top(&s, TOP_K), 1.0), |expert| {
                block.projections(&format!("experts.{expert}"), x)
            });
            add(&routed, &block.projections("shared_expert", x))
        }
        "lara_mini" => {
            let p = softmax(&block.linear("gate.weight", x));
            let routed = mixture(normalised(&p, &top(&p, TOP_K), 1.0), |expert| block.packed(expert, x));
            add(&routed, &block.projections("shared_expert", x))
        }
        "qwen3_omni_moe" => {
            let p = softmax(&block.linear("gate.weight", x));
            mixture(normalised(&p, &top(&p, TOP_K), 1.0), |expert| block.projections(&format!("experts.{expert}"), x))
        }
        "mistral_large4" => {
            // The two best of three groups of two by their sum; experts of the third have a choice value of 0.
            let p = softmax(&block.linear("weight", x));
            let groups: Vec<f64> = p.chunks(2).map(|group| group[0] + group[1]).collect();
            let kept = top(&groups, 2);
            let choice: Vec<f64> =
                p.iter().enumerate().map(|(e, &p)| if kept.contains(&(e / 2)) { p } else { 0.0 }).collect();
            let layer = Block(block.0, block.0.block.trim_end_matches(".gate").to_owned());
            let mlp = |prefix: &str| {
                let name = |matrix: &str| format!("{prefix}.{matrix}.weight");
                layer.swiglu(&name("w1"), &name("w3"), &name("w2"), x)
            };
            let routed = mixture(normalised(&p, &top(&choice, TOP_K), 1.0), |expert| mlp(&format!("experts.{expert}")));
            add(&routed, &mlp("shared_experts"))
        }
        "granitemoe_swa" => {
            let logits = block.linear("router.weight", x);
            mixture(softmax_of_chosen(&logits), |expert| block.packed(expert, x))
        }
        "openai_privacy_filter" => {
            let logits = add(&block.linear("router.weight", x), &block.bias("router.bias"));
            mixture(softmax_of_chosen(&logits), |expert| {
                let row = |name: &str, length: usize| block.bias(name)[expert * length..][..length].to_vec();
                let first = block.times("experts.gate_up_proj", expert, x);
                let first = add(&first, &row("experts.gate_up_proj_bias", first.len()));
                let (gates, ups) = first.split_at(first.len() / 2);
                let hidden: Vec<f64> = gates
                    .iter()
                    .zip(ups)
                    .map(|(gate, up)| {
                        let (gate, up) = (gate.min(7.0), up.clamp(-7.0, 7.0));
                        (up + 1.0) * gate * sigmoid(gate * 1.702)
                    })
                    .collect();
                let second = block.times("experts.down_proj", expert, &hidden);
                add(&second, &row("experts.down_proj_bias", second.len()))
            })
        }
        "gpt_oss" => {
            let logits = add(&block.linear("router.weight", x), &block.bias("router.bias"));
            mixture(softmax_of_chosen(&logits), |expert| {
                let row = |name: &str, length: usize| block.bias(name)[expert * length..][..length].to_vec();
                let first = block.times("experts.gate_up_proj", expert, x);
                let first = add(&first, &row("experts.gate_up_proj_bias", first.len()));
                let hidden: Vec<f64> = first
                    .chunks(2)
                    .map(|pair| {
                        let (gate, up) = (pair[0].min(0.5), pair[1].clamp(-0.5, 0.5));
                        (up + 1.0) * gate * sigmoid(gate * 1.702)
                    })
                    .collect();
                let second = block.times("experts.down_proj", expert, &hidden);
                add(&second, &row("experts.down_proj_bias", second.len()))
            })
        }
        "switch_transformers" => {
            let p = softmax(&block.linear("router.classifier.weight", x));
            let chosen = top(&p, 1).into_iter().map(|expert| (expert, p[expert])).collect();
            mixture(chosen, |expert| {
                let hidden = block.linear(&format!("experts.expert_{expert}.wi.weight"), x);
                let hidden: Vec<f64> = hidden.into_iter().map(|value| value.max(0.0)).collect();
                block.linear(&format!("experts.expert_{expert}.wo.weight"), &hidden)
            })
        }
        "llama4" => {
            let logits = block.linear("router.weight", x);
            let expert = top(&logits, 1)[0];
            let scaled: Vec<f64> = x.iter().map(|value| value * sigmoid(logits[expert])).collect();
            let first = block.times("experts.gate_up_proj", expert, &scaled);
            let (gate, up) = first.split_at(first.len() / 2);
            let hidden: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up).collect();
            add(&block.times("experts.down_proj", expert, &hidden), &block.projections("shared_expert", x))
        }
        "granitemoe" => {
            let logits = block.linear("router.layer.weight", x);
            mixture(softmax_of_chosen(&logits), |expert| {
                let first = block.linear_of("input_linear.weight", expert, x);
                let (gate, up) = first.split_at(first.len() / 2);
                let hidden: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up).collect();
                block.linear_of("output_linear.weight", expert, &hidden)
            })
        }
        "minimax_m2" => {
            let s: Vec<f64> = block.linear("gate.weight", x).into_iter().map(sigmoid).collect();
            let choice = add(&s, &block.bias("e_score_correction_bias"));
            mixture(normalised(&s, &top(&choice, TOP_K), 1.0), |expert| block.w123(expert, x))
        }
        "ernie4_5_moe" => {
            let p = softmax(&block.linear("gate.weight", x));
            let chosen = top(&add(&p, &block.bias("moe_statics.e_score_correction_bias")), TOP_K);
            let sum: f64 = chosen.iter().map(|&expert| p[expert]).sum();
            let least = block.0.config["moe_norm_min"].as_f64().unwrap();
            let routed = mixture(normalised(&p, &chosen, sum / sum.max(least)), |expert| {
                block.projections(&format!("experts.{expert}"), x)
            });
            add(&routed, &block.projections("shared_experts", x))
        }
        "hunyuan_v1_moe" => {
            let p = softmax(&block.linear("gate.wg.weight", x));
            let routed = mixture(normalised(&p, &top(&p, TOP_K), 1.0), |expert| {
                block.projections(&format!("experts.{expert}"), x)
            });
            add(&routed, &block.projections("shared_mlp", x))
        }
        other => panic!("no such family: {other}"),
    }
}

fn rows(weight: &[f32], x: &[f64]) -> Vec<f64> {
    weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
}

fn sigmoid(value: f64) -> f64 {
    1.0 / (1.0 + (-value).exp())
}

fn silu(value: f64) -> f64 {
    value * sigmoid(value)
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
    logits.iter().map(|logit| logit.exp() / sum).collect()
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Places of the `k` largest values.
fn top(values: &[f64], k: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    places[..k].to_vec()
}

/// The chosen with their scores divided by the sum, times `scale`.
fn normalised(scores: &[f64], chosen: &[usize], scale: f64) -> Vec<(usize, f64)> {
    let sum: f64 = chosen.iter().map(|&expert| scores[expert]).sum();
    chosen.iter().map(|&expert| (expert, scores[expert] / sum * scale)).collect()
}

fn softmax_of_chosen(logits: &[f64]) -> Vec<(usize, f64)> {
    let chosen = top(logits, TOP_K);
    let weights = softmax(&chosen.iter().map(|&expert| logits[expert]).collect::<Vec<f64>>());
    chosen.into_iter().zip(weights).collect()
}

fn mixture(chosen: Vec<(usize, f64)>, expert: impl Fn(usize) -> Vec<f64>) -> Vec<f64> {
    let parts = chosen.into_iter().map(|(id, weight)| expert(id).into_iter().map(|y| y * weight).collect::<Vec<f64>>());
    parts.reduce(|a, b| add(&a, &b)).unwrap()
}
