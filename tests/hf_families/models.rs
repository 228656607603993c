//! Each model's block for one token, written from the model's own code and from its tensors' names, independently of the
//! example's descriptions.

use crate::synth::{EXPERTS, Synthetic, TOP_K, Tensor};

/// A checkpoint's block.
pub struct Block<'a>(pub &'a Synthetic);

impl Block<'_> {
    fn tensor(&self, name: &str) -> &Tensor {
        &self.0.tensors.0[&format!("{}.{name}", self.0.block)]
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
        "deepseek_v3" => {
            let s: Vec<f64> = block.linear("gate.weight", x).into_iter().map(sigmoid).collect();
            let mut choice = add(&s, &block.bias("gate.e_score_correction_bias"));
            // Three groups of two experts: a group's two best are its two.
            let groups: Vec<f64> = choice.chunks(2).map(|group| group[0] + group[1]).collect();
            let kept = top(&groups, 2);
            for (expert, value) in choice.iter_mut().enumerate() {
                if !kept.contains(&(expert / 2)) {
                    *value = f64::NEG_INFINITY;
                }
            }
            let routed = mixture(normalised(&s, &top(&choice, TOP_K), 2.5), |expert| {
                block.projections(&format!("experts.{expert}"), x)
            });
            add(&routed, &block.projections("shared_experts", x))
        }
        "glm4_moe" => {
            let s: Vec<f64> = block.linear("gate.weight", x).into_iter().map(sigmoid).collect();
            let choice = add(&s, &block.bias("gate.e_score_correction_bias"));
            let routed = mixture(normalised(&s, &top(&choice, TOP_K), 1.5), |expert| {
                block.projections(&format!("experts.{expert}"), x)
            });
            add(&routed, &block.projections("shared_experts", x))
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
