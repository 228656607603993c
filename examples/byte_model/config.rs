//! What a model is made of.

use clap::ValueEnum;
use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp};
use moe_kernels::rules::{Activation, BalanceRule, Gating, LossScore, Score};
use serde_json::{Value, json};

use super::plain::dense::Unit;
use super::plain::model::Sizes;

/// Whose MoE layer it is.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Rule {
    /// The best expert by softmax, weighted by its share; ReLU; in every other block (Fedus et al. 2021)
    Switch,
    /// The two best, their shares made to sum to 1; GELU-gated; in every other block (Du et al. 2021)
    Glam,
    /// The two best, likewise; SiLU-gated; in every block (Jiang et al. 2024)
    Mixtral,
}

impl Rule {
    /// What stands between an expert's two matrices, or a dense feed-forward's.
    pub fn unit(self) -> Unit {
        match self {
            Rule::Switch => Unit::Relu,
            Rule::Glam => Unit::GeluGated,
            Rule::Mixtral => Unit::SiluGated,
        }
    }

    fn name(self) -> String {
        self.to_possible_value().expect("no rule is hidden").get_name().to_owned()
    }
}

/// A model's sizes and forms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    pub rule: Rule,
    /// Whether there are experts at all.
    pub sparse: bool,
    pub sizes: Sizes,
    pub blocks: usize,
    /// Width of an expert, and of a dense feed-forward: a token that goes to one expert takes as many operations as in a dense model.
    pub intermediate: usize,
    pub experts: usize,
}

impl Config {
    /// Whether a block's feed-forward is an MoE layer.
    pub fn is_sparse(&self, block: usize) -> bool {
        self.sparse && (self.rule == Rule::Mixtral || block % 2 == 1)
    }

    /// The same without experts.
    pub fn dense(self) -> Config {
        Config { sparse: false, ..self }
    }

    /// The MoE layer. Its router computes in f32 whatever the experts' type (Switch Transformers, section 2.4).
    pub fn layer(&self, dtype: Dtype) -> LayerDesc {
        let layer = |top_k| LayerDesc::new(dtype, self.sizes.hidden, self.intermediate, self.experts, top_k);
        let measure = BalanceRule::new(LossScore::Softmax, self.sizes.context);
        let layer = |top_k| layer(top_k).router_dtype(Dtype::F32).measure(Some(measure));
        match self.rule {
            Rule::Switch => layer(1).gating(Gating::new(Score::Softmax)).mlp(Mlp::relu(dtype)),
            Rule::Glam => layer(2).mlp(Mlp::swiglu(dtype).activation(Activation::GeluTanh)),
            Rule::Mixtral => layer(2),
        }
    }

    /// For a saved model.
    pub fn to_json(self) -> Value {
        let Config { rule, sparse, sizes: Sizes { hidden, heads, context }, blocks, intermediate, experts } = self;
        json!({
            "rule": rule.name(), "sparse": sparse, "hidden": hidden, "heads": heads, "context": context,
            "blocks": blocks, "intermediate": intermediate, "experts": experts,
        })
    }

    /// What [`Config::to_json`] wrote.
    pub fn from_json(value: &Value) -> Result<Config, String> {
        let missing = |key: &str| format!("expected {key}, found {}", value[key]);
        let size = |key: &str| {
            let number = value[key].as_u64().filter(|&number| number > 0 && number < 1 << 16);
            number.map(|number| number as usize).ok_or_else(|| missing(key))
        };
        let config = Config {
            rule: Rule::from_str(value["rule"].as_str().unwrap_or_default(), false).map_err(|_| missing("rule"))?,
            sparse: value["sparse"].as_bool().ok_or_else(|| missing("sparse"))?,
            sizes: Sizes { hidden: size("hidden")?, heads: size("heads")?, context: size("context")? },
            blocks: size("blocks")?,
            intermediate: size("intermediate")?,
            experts: size("experts")?,
        };
        config.check()?;
        Ok(config)
    }

    /// What fits nowhere else; the layer checks its own.
    pub fn check(&self) -> Result<(), String> {
        let Sizes { hidden, heads, .. } = self.sizes;
        if !hidden.is_multiple_of(heads) {
            return Err(format!("heads: expected a divisor of {hidden}, the hidden size, found {heads}"));
        }
        if self.sparse && !(0..self.blocks).any(|block| self.is_sparse(block)) {
            return Err(format!("blocks: expected at least 2, of which the second has experts, found {}", self.blocks));
        }
        Ok(())
    }
}
