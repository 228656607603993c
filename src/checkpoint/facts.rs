//! What a family may say of its blocks: kinds of facts, and names of tensors that many have.

use super::error::CheckpointError;
use super::spec::{BlockSpec, Scene};
use crate::rules::{Glu, GroupScore, Layout, Masked, Renormalise, Score};

/// What the other facts cannot say, with its words for the table of families.
#[derive(Clone, Copy)]
pub(super) struct Refine {
    pub(super) by: fn(&Scene<'_>, &mut BlockSpec) -> Result<(), CheckpointError>,
    pub(super) words: &'static str,
}

/// Keys of the sizes, several where a key has several spellings. Each may be a list with a number for each layer.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) hidden: &'static [&'static str],
    pub(super) intermediate: &'static [&'static str],
    pub(super) experts: &'static [&'static str],
    pub(super) top_k: &'static [&'static str],
}

/// What is added to the scores for the choice.
#[derive(Clone, Copy)]
pub(super) struct Correction {
    /// Tensor `[E]`.
    pub(super) name: &'static str,
    /// The key that says whether there is one, and what it is where the key is absent.
    pub(super) flag: Option<(&'static str, bool)>,
}

/// Where the score comes from.
#[derive(Clone, Copy)]
pub(super) enum Scored {
    /// It is always this one.
    Always(Score),
    /// Nothing is chosen by scores.
    Nothing,
    /// A key names it, where it is absent the first of these.
    Named(&'static str, &'static [(&'static str, Score)]),
}

/// What `scoring_func` may say in DeepSeek-V3 and its kin.
pub(super) const SCORING: &[(&str, Score)] = &[("sigmoid", Score::Sigmoid), ("softmax", Score::Softmax)];

/// Whether a token's weights are divided by their sum.
#[derive(Clone, Copy)]
pub(super) enum Renorm {
    Never,
    Always(Renormalise),
    /// A key says it; with what it is where the key is absent.
    Flag(&'static [&'static str], bool, Renormalise),
}

/// A factor of every weight, or of the sum of the routed experts.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    pub(super) keys: &'static [&'static str],
    pub(super) default: f64,
    pub(super) of_sum: bool,
}

/// Choice among the experts of the best groups, as `n_group` and `topk_group` say.
#[derive(Clone, Copy)]
pub(super) struct GroupFacts {
    /// Where the keys are absent: groups, and how many are kept.
    pub(super) default: (usize, usize),
    pub(super) score: GroupScore,
    pub(super) masked: Masked,
    /// A key and the value with which alone there are groups.
    pub(super) only_if: Option<(&'static str, &'static str)>,
}

/// Keys of what is done to the router's product.
#[derive(Clone, Copy)]
pub(super) struct LogitFacts {
    /// Of a factor, and what it is where the key is absent.
    pub(super) factor: Option<(&'static str, f64)>,
    /// Of a soft bound, none where it is absent or 0.
    pub(super) softcap: Option<&'static str>,
}

/// What is between an expert's products.
#[derive(Clone, Copy)]
pub(super) enum Act {
    /// A key names it; with what it names where it is absent.
    Named(&'static [&'static str], &'static str),
    /// gpt-oss's unit: `swiglu_alpha`, `swiglu_limit`.
    Oai,
    /// SwiGLU, gate and up clamped first at what a key says; with what it is where the key is absent.
    Clamped(&'static str, f64),
    /// SwiGLU, up clamped, and the gate after its SiLU, at what a list says for the layer; 0 or nothing is no bound.
    ClampedAfter(&'static str),
    /// SwiGLU with softly bounded gate and up: `mlp_gate_softcap`, `mlp_up_softcap`.
    Softcapped,
}

/// How a checkpoint holds the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Experts {
    /// Tensors for each expert.
    Each(Matrices),
    /// One tensor for gate and up of all experts, one for down.
    Together {
        /// `[E,2I,H]`, or `[E,H,2I]` by the layout.
        gate_up: &'static str,
        /// `[E,2I]`.
        gate_up_bias: Option<&'static str>,
        /// `[E,H,I]`, or `[E,I,H]` by the layout.
        down: &'static str,
        /// `[E,H]`.
        down_bias: Option<&'static str>,
        /// Order of gate and up.
        glu: Glu,
        /// Order of a matrix; none where the tensors' shapes say it.
        layout: Option<Layout>,
    },
    /// One tensor for gate of all experts, one for up, one for down: `[E,I,H]`, `[E,I,H]` and `[E,H,I]`.
    Stacked(Matrices),
    /// The same with all experts' rows in one matrix, and down transposed: `[E I,H]` each.
    Rows(Matrices),
}

/// Tensors of one gated or plain expert, each as `nn.Linear` holds it.
/// With biases where it says so, named as the matrices but for their last part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Matrices {
    /// `[I,H]`, none for an expert without a gate.
    pub gate: Option<&'static str>,
    /// `[I,H]`.
    pub up: &'static str,
    /// `[H,I]`.
    pub down: &'static str,
    /// Whether there are biases, `.bias` beside `.weight`.
    pub biases: bool,
}

impl Matrices {
    pub(super) const fn gated(gate: &'static str, up: &'static str, down: &'static str) -> Matrices {
        Matrices { gate: Some(gate), up, down, biases: false }
    }

    pub(super) const fn plain(up: &'static str, down: &'static str) -> Matrices {
        Matrices { gate: None, up, down, biases: false }
    }

    /// With biases.
    pub(super) const fn biased(self) -> Matrices {
        Matrices { biases: true, ..self }
    }

    /// Their names, gate's first.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.gate.into_iter().chain([self.up, self.down])
    }
}

impl Experts {
    /// Gate's rows before up's, each matrix as `nn.Linear` holds it.
    pub(super) const fn packed(gate_up: &'static str, down: &'static str) -> Experts {
        let (glu, layout) = (Glu::Split, Some(Layout::Nk));
        Experts::Together { gate_up, gate_up_bias: None, down, down_bias: None, glu, layout }
    }

    /// The same transposed, gate's columns before up's.
    pub(super) const fn transposed(gate_up: &'static str, down: &'static str) -> Experts {
        let (glu, layout) = (Glu::Split, Some(Layout::Kn));
        Experts::Together { gate_up, gate_up_bias: None, down, down_bias: None, glu, layout }
    }

    /// The names of the tensors of their matrices.
    pub(super) fn names(&self) -> Vec<&'static str> {
        match self {
            Experts::Each(matrices) | Experts::Stacked(matrices) | Experts::Rows(matrices) => {
                matrices.names().collect()
            }
            Experts::Together { gate_up, down, .. } => vec![gate_up, down],
        }
    }
}

/// An expert that every token goes to.
#[derive(Clone, Copy)]
pub(super) struct Shared {
    pub(super) names: Matrices,
    pub(super) width: Width,
    /// Tensor `[1,H]`: its output is multiplied by the sigmoid of the product with x.
    pub(super) gate: Option<&'static str>,
    /// What is between its products, where that is not the others' own.
    pub(super) activation: Option<Act>,
}

/// The width of a shared expert.
#[derive(Clone, Copy)]
pub(super) enum Width {
    /// So many times the experts' own as a key says; with what it is where the key is absent.
    Count(&'static [&'static str], usize),
    /// What a key says; none where it is absent or 0.
    Own(&'static [&'static str]),
}

/// Llama's names of an MLP's three matrices, by expert.
pub(super) const PROJECTIONS: Matrices =
    Matrices::gated("experts.#.gate_proj.weight", "experts.#.up_proj.weight", "experts.#.down_proj.weight");

/// Mixtral's names: `w1` gate, `w3` up, `w2` down.
pub(super) const W123: Matrices = Matrices::gated("experts.#.w1.weight", "experts.#.w3.weight", "experts.#.w2.weight");

pub(super) const SHARED_EXPERTS: Matrices = Matrices::gated(
    "shared_experts.gate_proj.weight",
    "shared_experts.up_proj.weight",
    "shared_experts.down_proj.weight",
);

pub(super) const SHARED_EXPERT: Matrices =
    Matrices::gated("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight", "shared_expert.down_proj.weight");

pub(super) const SHARED_MLP: Matrices =
    Matrices::gated("shared_mlp.gate_proj.weight", "shared_mlp.up_proj.weight", "shared_mlp.down_proj.weight");

/// How transformers' modules hold the experts of nearly all families: one tensor for all, `[E,2I,H]` with the gate's rows first, and
/// `[E,H,I]`. Some programs write checkpoints in this form, whatever the hub's own is.
pub(super) const MODULE: Experts = Experts::packed("experts.gate_up_proj", "experts.down_proj");
