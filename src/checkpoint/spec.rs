//! From a family's facts and a configuration to what a block is.

use super::config::Config;
use super::error::CheckpointError;
use super::facts::{Act, Experts, GroupFacts, Matrices, Renorm, Scored, Width};
use super::family::Family;
use super::folder::Checkpoint;
use super::foreign;
use super::kind::KindSpec;
use super::locate::{Found, full_name};
use super::weights::SequenceCapacity;
use crate::Dtype;
use crate::layer::{LayerDesc, Mlp, SharedDesc};
use crate::rules::{Activation, Gating, Glu, Groups, LogitRule, Masked, Score, Swiglu};

/// What a block computes and which tensors hold it, by their names below the block's own (`^`: beside the block).
pub(super) struct BlockSpec {
    /// The layer; the type of its data and the length of sequences are filled in when it is loaded.
    pub(super) layer: LayerDesc,
    /// Tensor `[E,H]`.
    pub(super) router: Option<&'static str>,
    /// Tensor `[E]`, added to the logits.
    pub(super) router_bias: Option<&'static str>,
    /// Tensor `[E]`, added to the scores for the choice.
    pub(super) correction_bias: Option<&'static str>,
    /// The router's tensor is `[H,E]`.
    pub(super) router_transposed: bool,
    /// Which of the rows `[.., E]` of the tensor is the correction bias, where it has several.
    pub(super) correction_row: Option<usize>,
    /// The number of the first expert in the names of tensors.
    pub(super) first_expert: usize,
    /// A second bank of experts, for tokens of other types.
    pub(super) bank: Option<Box<BlockSpec>>,
    /// The experts' matrices.
    pub(super) experts: Experts,
    /// The shared expert's matrices, where the layer has one.
    pub(super) shared: Option<Matrices>,
    /// Tensor `[1,H]`, where the shared expert has a gate.
    pub(super) shared_gate: Option<&'static str>,
    /// Tensor `[E]`: a factor of each expert's weight.
    pub(super) expert_scale: Option<&'static str>,
    /// Tensor `[1]`: a factor of all weights.
    pub(super) global_scale: Option<&'static str>,
    /// Tensor `[H]`, added to every token's sum.
    pub(super) output_bias: Option<&'static str>,
    /// Tensor `[V,k]`: experts by word, where they are not chosen.
    pub(super) table: Option<&'static str>,
    /// Experts behind the others, where the gating appends some: gate and up `[A,2I,H]`, and down `[A,H,I]`, in the others' order.
    pub(super) appended: Option<[&'static str; 2]>,
    /// So many experts behind those that have weights yield their input ([`crate::rules::IDENTITY`]) or nothing ([`crate::rules::NONE`]).
    pub(super) weightless: Option<(usize, i32)>,
    /// Norms' tensors, where the layer has norms with weights.
    pub(super) norms: NormNames,
    /// Tensors of the projections round the experts, where the layer has a latent width: `[L,H]`, and `[H,L]`.
    pub(super) latent: Option<[&'static str; 2]>,
    /// The model's own code leaves the order of a token's experts open.
    pub(super) unordered: bool,
    /// What it is beside a layer.
    pub(super) kind: KindSpec,
    /// What an expert takes of a sequence.
    pub(super) capacity: SequenceCapacity,
    /// Tensors that some programs write and nothing uses.
    pub(super) idle: Vec<String>,
}

/// Tensors of the norms' weights.
#[derive(Clone, Copy, Default)]
pub(super) struct NormNames {
    /// `[H]`, of the router's input.
    pub(super) router: Option<&'static str>,
    /// `[H]`, of the experts' input.
    pub(super) experts: Option<&'static str>,
    /// `[H]` or `[L]`, of each expert's output.
    pub(super) slots: Option<&'static str>,
    /// `[H]`, of the whole layer's output.
    pub(super) output: Option<&'static str>,
    /// `[L]`, behind the first latent projection.
    pub(super) latent: Option<&'static str>,
}

impl BlockSpec {
    /// Columns of its logits.
    pub(super) fn logit_columns(&self) -> usize {
        match self.kind {
            KindSpec::UnitExperts { keys } => 2 * keys,
            KindSpec::BySequence { .. } => 0,
            _ => self.layer.logit_columns(),
        }
    }
}

/// What a block is described from.
pub(super) struct Scene<'a> {
    pub(super) config: &'a Config,
    /// The number of its layer.
    pub(super) layer: usize,
    files: &'a Checkpoint,
    /// What the names of its tensors begin with.
    pub(super) prefix: &'a str,
}

impl<'a> Scene<'a> {
    pub(super) fn new(config: &'a Config, files: &'a Checkpoint, found: &'a Found) -> Scene<'a> {
        Scene { config, layer: found.layer, files, prefix: &found.prefix }
    }

    /// Whether the block has a tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.knows(&full_name(self.prefix, name))
    }
}

impl Family {
    /// The block of a layer, once nothing in the configuration is known to change it in a way that is not computed.
    pub(super) fn describe(&self, scene: &Scene<'_>) -> Result<BlockSpec, CheckpointError> {
        let Some(second_router) = self.second_router else { return self.describe_bank(scene, scene.layer) };
        let mut banks = [self.describe_bank(scene, 0)?, self.describe_bank(scene, 1)?];
        for (number, bank) in banks.iter_mut().enumerate() {
            bank.router_transposed = true;
            bank.correction_row = Some(number);
        }
        let [first, mut second] = banks;
        second.router = Some(second_router);
        second.first_expert = first.layer.experts;
        (second.layer.shared, second.shared) = (None, None);
        Ok(BlockSpec { bank: Some(Box::new(second)), ..first })
    }

    /// One bank of experts, whose number, or else that of the layer, `layer` is in lists.
    fn describe_bank(&self, scene: &Scene<'_>, layer: usize) -> Result<BlockSpec, CheckpointError> {
        let config = scene.config;
        let sizes = &self.sizes;
        let size = |keys: &[&str]| config.size_of_layer(keys, layer);
        // The first that is there: an expert's width and a dense block's have like names.
        let hidden = size(sizes.hidden)?;
        let intermediate = match sizes.intermediate {
            [] => hidden,
            keys => size(&[config.spelling(keys)])?,
        };
        let experts = size(sizes.experts)?;
        let top_k = if sizes.top_k.is_empty() { 1 } else { size(sizes.top_k)? };
        if top_k > experts {
            let (experts_key, key) = (config.spelling(sizes.experts), config.spelling(sizes.top_k));
            let reason = format!("is {top_k}, expected at most `{experts_key}`, which is {experts}");
            return Err(CheckpointError::config(key, reason));
        }
        for (key, value) in self.requires {
            config.require_text(key, value)?;
        }
        config.disregard(self.disregards);
        let gating = self.read_gating(config)?;
        require_groups(experts, top_k, &gating)?;
        let mlp = Mlp::swiglu(Dtype::F32).activation(self.activation.read(config, layer)?);
        let mut desc = LayerDesc::new(Dtype::F32, hidden, intermediate, experts, top_k).gating(gating).mlp(mlp);
        desc.logits = self.logit_rule(config)?;
        desc.routed_scale = self.read_scale(config, true)?;
        desc.mlp.gate_up.glu = match self.experts {
            Experts::Together { glu, .. } => glu,
            Experts::Each(names) | Experts::Stacked(names) | Experts::Rows(names) => glu_of(&names),
        };
        let mut spec = BlockSpec {
            layer: desc,
            router: Some(self.router),
            router_bias: self.router_bias,
            correction_bias: self.correction_name(config)?,
            router_transposed: false,
            correction_row: None,
            first_expert: 0,
            bank: None,
            experts: self.experts,
            shared: None,
            shared_gate: None,
            expert_scale: self.expert_scale,
            global_scale: self.global_scale,
            output_bias: self.output_bias,
            table: None,
            appended: None,
            weightless: None,
            kind: KindSpec::Layer,
            capacity: SequenceCapacity::Fixed,
            norms: NormNames::default(),
            latent: None,
            unordered: self.unordered,
            idle: Vec::new(),
        };
        self.describe_shared(config, layer, &mut spec)?;
        if let Some(refine) = &self.refine {
            (refine.by)(scene, &mut spec)?;
        }
        foreign::refuse(config, &spec)?;
        Ok(spec)
    }

    fn read_gating(&self, config: &Config) -> Result<Gating, CheckpointError> {
        let score = match self.score {
            Scored::Always(score) => score,
            Scored::Nothing => Score::Softmax,
            Scored::Named(key, scores) => {
                let name = config.text(key, scores[0].0)?;
                let found = scores.iter().find(|&&(known, _)| known == name);
                let (_, score) = found.ok_or_else(|| {
                    let known = scores.iter().map(|(name, _)| format!("{name:?}")).collect::<Vec<_>>().join(" or ");
                    CheckpointError::config(key, format!("is {name:?}, expected {known}"))
                })?;
                *score
            }
        };
        let renormalise = match self.renormalise {
            Renorm::Never => None,
            Renorm::Always(rule) => Some(rule),
            Renorm::Flag(keys, default, rule) => config.flag(config.spelling(keys), default)?.then_some(rule),
        };
        let scale = self.read_scale(config, false)?;
        let groups = match self.groups {
            None => None,
            Some(facts) => groups(&facts, config)?,
        };
        let gating = Gating::new(score).renormalise(renormalise).scale(scale).groups(groups).choice(self.choice);
        Ok(gating.expert_scale(self.expert_scale.is_some()).global_scale(self.global_scale.is_some()))
    }

    /// The factor of the weights, or of the sum.
    fn read_scale(&self, config: &Config, of_sum: bool) -> Result<f32, CheckpointError> {
        match self.scale.filter(|scale| scale.of_sum == of_sum) {
            None => Ok(1.0),
            Some(scale) => Ok(config.number(config.spelling(scale.keys), scale.default)? as f32),
        }
    }

    fn logit_rule(&self, config: &Config) -> Result<LogitRule, CheckpointError> {
        let factor = match self.logits.factor {
            Some((key, default)) => config.number(key, default)?,
            None => 1.0,
        };
        let softcap = match self.logits.softcap {
            Some(key) => config.number(key, 0.0)?,
            None => 0.0,
        };
        Ok(LogitRule::PLAIN.factor(factor as f32).softcap((softcap > 0.0).then_some(softcap as f32)))
    }

    fn correction_name(&self, config: &Config) -> Result<Option<&'static str>, CheckpointError> {
        let Some(correction) = &self.correction else { return Ok(None) };
        match correction.flag {
            None => Ok(Some(correction.name)),
            Some((key, default)) => Ok(config.flag(key, default)?.then_some(correction.name)),
        }
    }

    fn describe_shared(&self, config: &Config, layer: usize, spec: &mut BlockSpec) -> Result<(), CheckpointError> {
        let Some(shared) = &self.shared else { return Ok(()) };
        let width = match shared.width {
            Width::Count([], count) => count * spec.layer.intermediate,
            Width::Count(keys, default) => {
                config.count_of_layer(config.spelling(keys), layer)?.unwrap_or(default) * spec.layer.intermediate
            }
            Width::Own(keys) => config.count_of_layer(config.spelling(keys), layer)?.unwrap_or(0),
        };
        if width == 0 {
            return Ok(());
        }
        let mut mlp = spec.layer.mlp;
        mlp.gate_up.glu = glu_of(&shared.names);
        if let Some(activation) = &shared.activation {
            mlp.activation = activation.read(config, layer)?;
        }
        spec.layer.shared = Some(SharedDesc::new(width, mlp).gated(shared.gate.is_some()));
        (spec.shared, spec.shared_gate) = (Some(shared.names), shared.gate);
        Ok(())
    }
}

impl Act {
    fn read(&self, config: &Config, layer: usize) -> Result<Activation, CheckpointError> {
        let silu = || config.require_text("hidden_act", "silu");
        let number = |key, default| config.number(key, default).map(|number| number as f32);
        match *self {
            Act::Named(keys, default) => {
                let key = config.spelling(keys);
                let name = config.text(key, default)?;
                let unknown = || CheckpointError::config(key, format!("is {name:?}, an activation that no kernel has"));
                activation_named(name).ok_or_else(unknown)
            }
            Act::Oai => {
                silu()?;
                let unit = Swiglu::clamped(number("swiglu_limit", 7.0)?).alpha(number("swiglu_alpha", 1.702)?);
                Ok(unit.offset(1.0).into())
            }
            Act::Clamped(key, default) => {
                silu()?;
                Ok(Swiglu::clamped(number(key, default)?).into())
            }
            Act::ClampedAfter(key) => {
                silu()?;
                let limit = config.number_of_layer(key, layer)?.unwrap_or(0.0) as f32;
                Ok(if limit == 0.0 { Activation::Silu } else { Swiglu::clamped(limit).clamp_after(true).into() })
            }
            Act::Softcapped => {
                silu()?;
                Ok(Swiglu::softcapped(number("mlp_gate_softcap", 4.0)?, number("mlp_up_softcap", 25.0)?).into())
            }
        }
    }
}

/// Matrices that are there one by one are put together gate first.
fn glu_of(names: &Matrices) -> Glu {
    if names.gate.is_some() { Glu::Split } else { Glu::None }
}

fn groups(facts: &GroupFacts, config: &Config) -> Result<Option<Groups>, CheckpointError> {
    const COUNT: [&str; 2] = ["n_group", "num_expert_group"];
    if let Some((key, value)) = facts.only_if
        && config.text(key, "")? != value
    {
        config.disregard(&COUNT);
        config.disregard(&["topk_group"]);
        return Ok(None);
    }
    let count = config.count(config.spelling(&COUNT))?.unwrap_or(facts.default.0);
    let kept = config.count("topk_group")?.unwrap_or(facts.default.1);
    Ok((count > 1).then(|| Groups::new(count, kept).score(facts.score).masked(facts.masked)))
}

/// Fails where the groups do not divide the experts, or those that are kept have too few.
fn require_groups(experts: usize, top_k: usize, gating: &Gating) -> Result<(), CheckpointError> {
    let Some(Groups { count, kept, score, masked, .. }) = gating.groups else { return Ok(()) };
    let least = score.terms();
    if !experts.is_multiple_of(count) || experts / count < least {
        let reason =
            format!("is {count}, expected a number that divides {experts} experts into groups of {least} or more");
        return Err(CheckpointError::config("n_group", reason));
    }
    let size = experts / count;
    if !(1..=count).contains(&kept) || (masked == Masked::Out && kept * size < top_k) {
        let reason = format!("is {kept} of {count} groups of {size} experts: from them {top_k} are chosen");
        return Err(CheckpointError::config("topk_group", reason));
    }
    Ok(())
}

/// The names of transformers' `ACT2FN`.
pub(super) fn activation_named(name: &str) -> Option<Activation> {
    match name {
        "silu" | "swish" => Some(Activation::Silu),
        "gelu" | "gelu_python" => Some(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Some(Activation::GeluTanh),
        "relu" => Some(Activation::Relu),
        "relu2" => Some(Activation::ReluSquared),
        _ => None,
    }
}
