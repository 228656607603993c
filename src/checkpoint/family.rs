//! What a model family has to say about its MoE blocks, as data: where they are, what they compute, and which tensors hold them.
//!
//! A family is a constant, made from another one of its kin by the few calls in which it differs ([`super::families`]). In names of
//! tensors `#` stands for the number of an expert, and a name that begins with `^` is beside the block rather than in it.

use super::error::CheckpointError;
use super::facts::{
    Act, Correction, Experts, GroupFacts, LogitFacts, Matrices, PROJECTIONS, Refine, Renorm, Scale, Scored, Shared,
    Sizes, Width,
};
use super::spec::{BlockSpec, Scene};
use crate::rules::{ChoiceBy, GroupScore, Masked, Renormalise, Score};

/// A model family.
#[derive(Clone, Copy)]
pub struct Family {
    pub(super) names: &'static [&'static str],
    pub(super) blocks: &'static [&'static str],
    pub(super) sizes: Sizes,
    pub(super) router: &'static str,
    pub(super) router_bias: Option<&'static str>,
    pub(super) correction: Option<Correction>,
    pub(super) score: Scored,
    pub(super) renormalise: Renorm,
    pub(super) scale: Option<Scale>,
    pub(super) groups: Option<GroupFacts>,
    pub(super) requires: &'static [(&'static str, &'static str)],
    pub(super) disregards: &'static [&'static str],
    pub(super) unordered: bool,
    pub(super) choice: ChoiceBy,
    pub(super) logits: LogitFacts,
    pub(super) expert_scale: Option<&'static str>,
    pub(super) global_scale: Option<&'static str>,
    pub(super) output_bias: Option<&'static str>,
    pub(super) second_router: Option<&'static str>,
    pub(super) experts: Experts,
    pub(super) activation: Act,
    pub(super) shared: Option<Shared>,
    pub(super) refine: Option<Refine>,
}

impl Family {
    /// The family's `model_type` in `config.json`, then others that are the same.
    pub fn names(&self) -> &'static [&'static str] {
        self.names
    }

    /// Whether a `model_type` is the family's, or that of its language model (`NAME_text`).
    pub(super) fn is_named(&self, name: &str) -> bool {
        let plain = name.strip_suffix("_text").unwrap_or(name);
        self.names.iter().any(|&known| known == name || known == plain)
    }

    /// What most families have: blocks `mlp`, a router `gate.weight`, a tensor for each expert, SiLU-gated.
    pub(super) const fn new(names: &'static [&'static str], score: Score) -> Family {
        Family {
            names,
            blocks: &["*.#.mlp"],
            sizes: Sizes {
                hidden: &["hidden_size"],
                intermediate: &["moe_intermediate_size"],
                experts: &["n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"],
                top_k: &["num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_topk"],
            },
            router: "gate.weight",
            router_bias: None,
            correction: None,
            score: Scored::Always(score),
            renormalise: Renorm::Never,
            scale: None,
            groups: None,
            requires: &[],
            disregards: &[],
            unordered: false,
            choice: ChoiceBy::Score,
            logits: LogitFacts { factor: None, softcap: None },
            expert_scale: None,
            global_scale: None,
            output_bias: None,
            second_router: None,
            experts: Experts::Each(PROJECTIONS),
            activation: Act::Named(&["hidden_act"], "silu"),
            shared: None,
            refine: None,
        }
    }

    /// Another family that is the same but for what is said next.
    pub(super) const fn kin(self, names: &'static [&'static str]) -> Family {
        Family { names, ..self }
    }

    /// Where blocks are: what the names of a block's tensors begin with, `#` for the number of the layer. `*` stands for any way to
    /// the layers of a language model.
    pub(super) const fn at(self, blocks: &'static [&'static str]) -> Family {
        Family { blocks, ..self }
    }

    /// Keys of an expert's width.
    pub(super) const fn width(mut self, keys: &'static [&'static str]) -> Family {
        self.sizes.intermediate = keys;
        self
    }

    /// Keys of the hidden size.
    pub(super) const fn hidden(mut self, keys: &'static [&'static str]) -> Family {
        self.sizes.hidden = keys;
        self
    }

    /// Keys of the number of experts and of those of a token.
    pub(super) const fn counts(mut self, experts: &'static [&'static str], top_k: &'static [&'static str]) -> Family {
        self.sizes.experts = experts;
        self.sizes.top_k = top_k;
        self
    }

    /// The router's tensor `[E,H]`, or another one that only its blocks have.
    pub(super) const fn router(self, router: &'static str) -> Family {
        Family { router, ..self }
    }

    /// A tensor `[E]` that is added to the logits.
    pub(super) const fn router_bias(self, name: &'static str) -> Family {
        Family { router_bias: Some(name), ..self }
    }

    /// A tensor `[E]` that is added to the scores for the choice.
    pub(super) const fn correction(self, name: &'static str) -> Family {
        Family { correction: Some(Correction { name, flag: None }), ..self }
    }

    /// The same where a key says so.
    pub(super) const fn correction_if(self, name: &'static str, key: &'static str, default: bool) -> Family {
        Family { correction: Some(Correction { name, flag: Some((key, default)) }), ..self }
    }

    /// The score as a key names it, where it is absent the first.
    pub(super) const fn score_named(self, key: &'static str, names: &'static [(&'static str, Score)]) -> Family {
        Family { score: Scored::Named(key, names), ..self }
    }

    /// SparseMixer in place of the score, which divides nothing.
    pub(super) const fn sparse_mixer(self) -> Family {
        Family { score: Scored::Always(Score::SparseMixer), renormalise: Renorm::Never, ..self }
    }

    /// Nothing is chosen by scores.
    pub(super) const fn without_scores(self) -> Family {
        Family { score: Scored::Nothing, ..self }
    }

    /// Keys that may be absent or have this one value.
    pub(super) const fn requires(self, requires: &'static [(&'static str, &'static str)]) -> Family {
        Family { requires, ..self }
    }

    /// Always divides by the sum of a token's weights, as `rule` says.
    pub(super) const fn renormalised(self, rule: Renormalise) -> Family {
        Family { renormalise: Renorm::Always(rule), ..self }
    }

    /// Divides where a key says so.
    pub(super) const fn renormalised_if(
        self,
        keys: &'static [&'static str],
        default: bool,
        rule: Renormalise,
    ) -> Family {
        Family { renormalise: Renorm::Flag(keys, default, rule), ..self }
    }

    /// A factor of every weight.
    pub(super) const fn scale(self, keys: &'static [&'static str], default: f64) -> Family {
        Family { scale: Some(Scale { keys, default, of_sum: false }), ..self }
    }

    /// A factor of the sum of the routed experts, which the weights do not show.
    pub(super) const fn sum_scale(self, keys: &'static [&'static str], default: f64) -> Family {
        Family { scale: Some(Scale { keys, default, of_sum: true }), ..self }
    }

    /// A tensor `[H]` that is added to every token's sum.
    pub(super) const fn output_bias(self, name: &'static str) -> Family {
        Family { output_bias: Some(name), ..self }
    }

    /// The same keys of the factor, with another value where they are absent.
    pub(super) const fn scaled_by(mut self, default: f64) -> Family {
        if let Some(scale) = &mut self.scale {
            scale.default = default;
        }
        self
    }

    /// Choice by groups only where a key has this value.
    pub(super) const fn groups_if(mut self, key: &'static str, value: &'static str) -> Family {
        if let Some(groups) = &mut self.groups {
            groups.only_if = Some((key, value));
        }
        self
    }

    /// Choice by groups, with these numbers where the keys are absent.
    pub(super) const fn groups(self, count: usize, kept: usize, score: GroupScore, masked: Masked) -> Family {
        Family { groups: Some(GroupFacts { default: (count, kept), score, masked, only_if: None }), ..self }
    }

    /// A token's experts are in the order of their choice values.
    pub(super) const fn ordered(self) -> Family {
        Family { unordered: false, ..self }
    }

    /// Keys that change a block in other families, and nothing in this one.
    pub(super) const fn disregards(self, disregards: &'static [&'static str]) -> Family {
        Family { disregards, ..self }
    }

    /// The model's own code leaves the order of a token's experts open (`topk(sorted=False)`).
    pub(super) const fn unordered(self) -> Family {
        Family { unordered: true, ..self }
    }

    /// The choice compares logits, with the correction bias, and scores only weigh.
    pub(super) const fn chosen_by_logit(self) -> Family {
        Family { choice: ChoiceBy::Logit, ..self }
    }

    /// A key of a factor of the logits, and what it is where the key is absent.
    pub(super) const fn logit_factor(mut self, key: &'static str, default: f64) -> Family {
        self.logits.factor = Some((key, default));
        self
    }

    /// A key of a soft bound on the logits.
    pub(super) const fn logit_softcap(mut self, key: &'static str) -> Family {
        self.logits.softcap = Some(key);
        self
    }

    /// A tensor `[E]`: a factor of each expert's weight.
    pub(super) const fn expert_scale(self, name: &'static str) -> Family {
        Family { expert_scale: Some(name), ..self }
    }

    /// A tensor `[1]`: a factor of all weights.
    pub(super) const fn global_scale(self, name: &'static str) -> Family {
        Family { global_scale: Some(name), ..self }
    }

    /// A second bank of experts behind the first, with a router of its own `[H,E]`, for tokens of other types. Sizes may be lists with one for
    /// each bank, routers are transposed, and the correction biases are rows of one tensor.
    pub(super) const fn second_bank(self, router: &'static str) -> Family {
        Family { second_router: Some(router), ..self }
    }

    /// How the experts are stored.
    pub(super) const fn experts(self, experts: Experts) -> Family {
        Family { experts, ..self }
    }

    /// What is between an expert's products.
    pub(super) const fn activation(self, activation: Act) -> Family {
        Family { activation, ..self }
    }

    /// A shared expert of so many widths as a key says.
    pub(super) const fn shared(self, names: Matrices, keys: &'static [&'static str], default: usize) -> Family {
        Family {
            shared: Some(Shared { names, width: Width::Count(keys, default), gate: None, activation: None }),
            ..self
        }
    }

    /// A shared expert of a width of its own.
    pub(super) const fn shared_wide(self, names: Matrices, keys: &'static [&'static str]) -> Family {
        Family { shared: Some(Shared { names, width: Width::Own(keys), gate: None, activation: None }), ..self }
    }

    /// No shared expert.
    pub(super) const fn without_shared(self) -> Family {
        Family { shared: None, ..self }
    }

    /// The shared expert's output is multiplied by the sigmoid of x times this tensor `[1,H]`.
    pub(super) const fn shared_gate(mut self, name: &'static str) -> Family {
        if let Some(shared) = &mut self.shared {
            shared.gate = Some(name);
        }
        self
    }

    /// The shared expert has another activation than the others.
    pub(super) const fn shared_activation(mut self, activation: Act) -> Family {
        if let Some(shared) = &mut self.shared {
            shared.activation = Some(activation);
        }
        self
    }

    /// What the other facts cannot say, with its words for the table of families.
    pub(super) const fn refine(
        self,
        words: &'static str,
        by: fn(&Scene<'_>, &mut BlockSpec) -> Result<(), CheckpointError>,
    ) -> Family {
        Family { refine: Some(Refine { by, words }), ..self }
    }
}
