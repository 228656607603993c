//! The table of families, in words made of their facts.

use std::fmt::Write;

use super::facts::{Act, Experts, Matrices, Renorm, Scored, Width};
use super::families::families;
use super::family::Family;
use crate::rules::{ChoiceBy, Glu, GroupScore, Layout, Masked, Renormalise, Score};

/// Titles of [`Family::row`]'s columns.
pub const COLUMNS: [&str; 6] = ["`model_type`", "chosen by", "weights", "experts", "shared expert", "tensors"];

/// All families and what each computes, as a table in Markdown. A key of `config.json` stands with the value that counts where it is absent.
pub fn table() -> String {
    let mut text = String::new();
    let mut line = |cells: &[String]| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    line(&COLUMNS.map(str::to_owned));
    line(&COLUMNS.map(|_| "---".to_owned()));
    families().for_each(|family| line(&family.row()));
    text
}

impl Family {
    /// What the family computes and how its tensors are called, in the columns of [`COLUMNS`].
    pub fn row(&self) -> [String; 6] {
        [
            self.names.join(", "),
            self.choice(),
            self.weights(),
            self.experts_in_words(),
            self.shared_in_words(),
            self.tensors(),
        ]
    }

    fn choice(&self) -> String {
        let score = |score: Score| match score {
            Score::Softmax => "softmax",
            Score::TopkSoftmax => "logits",
            Score::Sigmoid => "sigmoid",
            Score::SqrtSoftplus => "sqrt(softplus)",
            Score::SparseMixer => "sparsemixer",
        };
        let mut text = match self.score {
            Scored::Always(rule) => score(rule).to_owned(),
            Scored::Nothing => "an index of the caller's by image".to_owned(),
            Scored::Named(key, names) => format!("{} (`{key}`)", score(names[0].1)),
        };
        if self.choice == ChoiceBy::Logit {
            text = "logit".into();
        }
        if let Some((key, _)) = self.logits.factor {
            text += &format!(", logits x `{key}`");
        }
        if let Some(key) = self.logits.softcap {
            text += &format!(", logits softly bounded by `{key}`");
        }
        if self.router_bias.is_some() {
            text += ", router with a bias";
        }
        if let Some(correction) = self.correction {
            text += &match correction.flag {
                None => " + bias".to_owned(),
                Some((key, _)) => format!(" + bias if `{key}`"),
            };
        }
        if self.second_router.is_some() {
            text += "; by token type, among one or another bank of experts";
        }
        if let Some(groups) = self.groups {
            let (count, kept) = groups.default;
            let rank = match groups.score {
                GroupScore::Max => "largest".to_owned(),
                GroupScore::TopSum(terms) => format!("{terms} largest"),
            };
            let others = if groups.masked == Masked::Zero { ", others at 0" } else { "" };
            let of = if count > 1 { format!("{kept} of {count} groups") } else { "groups if any".into() };
            text += &format!("; {of} by their {rank}{others}");
        }
        text
    }

    fn weights(&self) -> String {
        let divided = |rule: Renormalise| match rule {
            Renormalise::Plus(0.0) => "/ sum".to_owned(),
            Renormalise::Plus(epsilon) => format!("/ (sum + {epsilon:e})"),
            Renormalise::PNorm(p) => format!("/ {p}-norm"),
            Renormalise::AtLeast(epsilon) => format!("/ max(sum, {epsilon:e})"),
        };
        let mut parts = Vec::new();
        if let Scored::Always(Score::TopkSoftmax) = self.score {
            parts.push("softmax of the chosen".to_owned());
        }
        if self.choice == ChoiceBy::Logit {
            parts.push("the sigmoid".to_owned());
        }
        match self.renormalise {
            Renorm::Never => {}
            Renorm::Always(rule) => parts.push(divided(rule)),
            Renorm::Flag(keys, default, rule) => parts.push(format!("{} if `{}` ({default})", divided(rule), keys[0])),
        }
        if let Some(scale) = self.scale {
            let whose = if scale.of_sum { "their sum " } else { "" };
            parts.push(format!("{whose}x `{}` ({})", scale.keys[0], scale.default));
        }
        if let Some(name) = self.expert_scale {
            parts.push(format!("x `{name}` by expert"));
        }
        if let Some(name) = self.global_scale {
            parts.push(format!("x `{name}`"));
        }
        if let Some(name) = self.output_bias {
            parts.push(format!("their sum + `{name}`"));
        }
        if let Some(refine) = self.refine.filter(|refine| !refine.words.is_empty()) {
            parts.push(refine.words.to_owned());
        }
        if parts.is_empty() { "the score".into() } else { parts.join(", ") }
    }

    fn experts_in_words(&self) -> String {
        let gated = match self.experts {
            Experts::Together { glu, .. } => glu.is_gated(),
            Experts::Each(names) | Experts::Stacked(names) | Experts::Rows(names) => names.gate.is_some(),
        };
        let unit = if gated { "gated" } else { "ungated" };
        format!("{}, {unit}", act(&self.activation))
    }

    fn shared_in_words(&self) -> String {
        let Some(shared) = &self.shared else { return "-".into() };
        let width = match shared.width {
            Width::Count([], count) => format!("{count} wide"),
            Width::Count(keys, default) => format!("`{}` ({default}) wide", keys[0]),
            Width::Own(keys) => format!("of `{}`", keys[0]),
        };
        let activation = shared.activation.map_or(String::new(), |activation| format!(", {}", act(&activation)));
        let gate = if shared.gate.is_some() { ", gated by a sigmoid" } else { "" };
        format!("{width}{activation}{gate}")
    }

    fn tensors(&self) -> String {
        let matrices = |names: &Matrices| names.names().map(short).collect::<Vec<_>>().join(", ");
        let experts = match &self.experts {
            Experts::Each(names) => format!("{} for each expert", matrices(names)),
            Experts::Stacked(names) => format!("{} of all", matrices(names)),
            Experts::Rows(names) => format!("{} of all [E I,H]", matrices(names)),
            Experts::Together { gate_up, down, glu, layout, .. } => {
                let order = match glu {
                    Glu::Interleaved => "gate and up alternate",
                    Glu::UpFirst => "up first",
                    _ => "gate first",
                };
                let transposed = match layout {
                    Some(Layout::Nk) => "",
                    Some(Layout::Kn) => ", transposed",
                    None => ", transposed or not",
                };
                format!("{}, {} of all: {order}{transposed}", short(gate_up), short(down))
            }
        };
        format!("`{}`: {}, {experts}", self.blocks.join("`, `"), short(self.router))
    }
}

/// What is between an expert's products.
fn act(activation: &Act) -> String {
    match activation {
        Act::Named(keys, default) => format!("{default} (`{}`)", keys[0]),
        Act::Oai => "(u + 1) g sigmoid(`swiglu_alpha` g), clamped at `swiglu_limit`".into(),
        Act::Clamped(key, default) => format!("silu, clamped before at `{key}` ({default})"),
        Act::ClampedAfter(key) => format!("silu, clamped after at `{key}`"),
        Act::Softcapped => "silu, softly bounded by `mlp_gate_softcap` (4), `mlp_up_softcap` (25)".into(),
    }
}

/// A tensor's name without what all have.
fn short(name: &str) -> &str {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    name.strip_prefix("experts.#.").unwrap_or(name)
}
