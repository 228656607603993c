//! What the block should compute: recorded outputs of the model's own code, or the reference.

use std::path::Path;

use moe_kernels::checkpoint::{Block, CheckpointError, HostBlock, Kind, TensorFile};
use moe_kernels::reference::gating::Gated;

use super::device::{Inputs, Outputs, split};
use super::error::HfError;
use super::reference::{Forward, Reference};

/// Outputs to compare with; none where the model's block does not give them.
pub struct Expected {
    /// `[T,E]`.
    pub logits: Option<Vec<f64>>,
    /// `[T,k]`.
    pub ids: Option<Vec<i32>>,
    /// `[T,k]`.
    pub weights: Option<Vec<f64>>,
    /// What some blocks yield beside that, by name.
    pub extras: Vec<(&'static str, Vec<f64>)>,
    /// `[T,H]`.
    pub y: Vec<f64>,
}

/// What the router and the experts make together, where `y` is something else.
const INTENDED: &str = "y_intended";

/// Names of what some blocks yield beside the rest.
const EXTRAS: [&str; 4] = ["shared_weights", "probs", "router_hidden_states", "x_experts"];

/// `golden.safetensors` of a checkpoint folder.
pub struct Golden {
    file: TensorFile,
}

impl Golden {
    pub const NAME: &str = "golden.safetensors";

    pub fn open(folder: &Path) -> Result<Golden, HfError> {
        Ok(Golden { file: TensorFile::open(&folder.join(Self::NAME))? })
    }

    /// Module path of the block that it records.
    pub fn block(&self) -> Option<&str> {
        self.file.note("block")
    }

    /// Whether what the model's own code made is not what the router and the experts make together, but stands beside it (NLLB). Its gradients are
    /// then not the block's either.
    pub fn is_of_another_function(&self) -> bool {
        self.file.contains(INTENDED)
    }

    /// `x [T,H]`.
    pub fn x(&self, hidden: usize) -> Result<Vec<f32>, HfError> {
        match *self.file.shape("x")? {
            [_, columns] if columns == hidden => Ok(self.file.read("x")?.values()?.into_owned()),
            ref found => Err(CheckpointError::TensorShape {
                path: self.file.path().to_owned(),
                name: "x".into(),
                expected: format!("[tokens, {hidden}]"),
                found: found.to_vec(),
            }
            .into()),
        }
    }

    /// What the block takes beside rows.
    pub fn inputs(&self) -> Result<Inputs, HfError> {
        let integers = |name: &str| {
            if self.file.contains(name) { Ok::<_, HfError>(Some(self.file.read(name)?.integers()?)) } else { Ok(None) }
        };
        let previous = "prev_router_hidden_states";
        let previous = if self.file.contains(previous) {
            Some(self.file.read(previous)?.values::<f32>()?.into_owned())
        } else {
            None
        };
        let types = integers("moe_mm_token_type_ids")?;
        Ok(Inputs { words: integers("input_ids")?, index: integers("indices")?, types, previous })
    }

    /// The recorded outputs.
    pub fn expected(&self, block: &Block<'_>, tokens: usize) -> Result<Expected, HfError> {
        let layer = block.desc();
        let columns = block.logit_columns() - layer.gating.appended_columns();
        let floats = |name: &str, columns: usize| -> Result<Vec<f64>, HfError> {
            let tensor = self.file.read_shaped(name, &[tokens, columns])?;
            Ok(tensor.values::<f32>()?.iter().map(|&value| value.into()).collect())
        };
        let some = |name: &str, columns: usize| {
            if self.file.contains(name) { floats(name, columns).map(Some) } else { Ok(None) }
        };
        let ids = if self.file.contains("ids") {
            Some(self.file.read_shaped("ids", &[tokens, layer.top_k])?.integers()?)
        } else {
            None
        };
        Ok(Expected {
            logits: some("logits", columns)?,
            ids,
            weights: some("weights", layer.top_k)?,
            extras: self.extras()?,
            // Where the model's own code takes something else for the choice.
            y: floats(if self.is_of_another_function() { INTENDED } else { "y" }, layer.hidden)?,
        })
    }

    fn extras(&self) -> Result<Vec<(&'static str, Vec<f64>)>, HfError> {
        let recorded = EXTRAS.into_iter().filter(|name| self.file.contains(name));
        let read = recorded.map(|name| {
            let values = self.file.read(name)?.values::<f32>()?.iter().map(|&value| value.into()).collect();
            Ok::<_, HfError>((name, values))
        });
        read.collect()
    }
}

/// What the reference computes from the same rounded inputs, for the experts that the device chose where its choice is right.
///
/// Two experts can be closer than the rounding of f32. So the reference chooses from the device's own logits, which are compared
/// separately, and where there is a correction bias, from what is left of the device's choice after [`settle`].
pub fn from_reference(block: &HostBlock, x: &[f32], inputs: &Inputs, got: &Outputs) -> Result<Expected, HfError> {
    let x: Vec<f64> = x.iter().map(|&value| value.into()).collect();
    let layer = &block.desc;
    let reference = Reference::new(block, x.len() / layer.hidden.max(1), inputs);
    let (logits, state) = reference.logits(&x)?;
    let bias = reference.correction_bias.clone();
    let mut gated = reference.gate(&got.router, bias.as_deref())?;
    let plain = matches!(block.kind, Kind::Layer);
    if let Some(bias) = bias.filter(|_| plain && layer.gating.appended.is_none() && layer.map.is_none()) {
        settle(&mut gated, &bias, layer.top_k, got, |raised| Ok(reference.gate(&got.router, Some(raised))?))?;
    }
    let result = reference.forward_gated(&x, (logits, state), gated)?;
    let appended = layer.gating.appended_columns();
    let columns = if x.is_empty() { 0 } else { result.logits.len() / (x.len() / layer.hidden) - appended };
    let (logits, _) = split(&result.logits, columns, appended);
    let mut extras = Vec::new();
    if let Some(state) = result.state {
        extras.push(("router_hidden_states", state));
    }
    if !result.appended.is_empty() {
        extras.push(("shared_weights", result.appended));
    }
    Ok(Expected { logits: Some(logits), ids: Some(result.ids), weights: Some(result.weights), extras, y: result.y })
}

/// Takes over a row of the device's ids if it is what the formula chooses once these experts' choice values are raised by a few
/// roundings. `gate` is the formula with another bias.
pub fn settle(
    gated: &mut Gated,
    bias: &[f64],
    top_k: usize,
    got: &Outputs,
    gate: impl Fn(&[f64]) -> Result<Gated, HfError>,
) -> Result<(), HfError> {
    const ROUNDINGS: f64 = 1e-6;
    for token in 0..gated.ids.len() / top_k {
        let slots = token * top_k..(token + 1) * top_k;
        let ids = &got.ids[slots.clone()];
        if gated.ids[slots.clone()] == *ids {
            continue;
        }
        let mut raised = bias.to_vec();
        for (place, &id) in ids.iter().enumerate() {
            if let Some(bias) = usize::try_from(id).ok().and_then(|id| raised.get_mut(id)) {
                *bias += ROUNDINGS * (1.0 + (top_k - place) as f64 / top_k as f64);
            }
        }
        let again = gate(&raised)?;
        if again.ids[slots.clone()] == *ids {
            gated.ids[slots.clone()].copy_from_slice(&again.ids[slots.clone()]);
            gated.weights[slots.clone()].copy_from_slice(&again.weights[slots]);
        }
    }
    Ok(())
}

/// The reference alone.
pub fn run_reference(block: &HostBlock, x: &[f32], inputs: &Inputs) -> Result<Forward, HfError> {
    let x: Vec<f64> = x.iter().map(|&value| value.into()).collect();
    Reference::new(block, x.len() / block.desc.hidden.max(1), inputs).forward(&x)
}
