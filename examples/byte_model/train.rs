//! The loop.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::adamw::{self, AdamW};
use super::evaluate::{Evaluation, evaluate, variation};
use super::plain::cross_entropy::{Target, cross_entropy};
use super::plain::model::Model;
use super::text::Text;
use super::{Outcome, Real};

/// How long and how a model is trained.
#[derive(Clone, Debug)]
pub struct Training {
    pub steps: usize,
    /// Ends it earlier.
    pub limit: Option<Duration>,
    /// Of the batches.
    pub seed: u64,
    /// Sequences of a batch.
    pub sequences: usize,
    pub context: usize,
    /// Largest learning rate.
    pub rate: f64,
    /// Steps from one look at the held-out text to the next.
    pub eval_every: usize,
    /// Most batches of held-out text at each look.
    pub eval_batches: usize,
}

/// What became of it.
#[derive(Default)]
pub struct History {
    /// Of each step, in nats a byte, before its weights move.
    pub losses: Vec<f64>,
    /// Of each MoE layer.
    pub layers: Vec<LayerHistory>,
    /// After so many steps; the last one after all.
    pub evaluations: Vec<(usize, Evaluation)>,
}

/// An MoE layer at each step.
#[derive(Default)]
pub struct LayerHistory {
    /// Coefficient of variation of the experts' tokens.
    pub variations: Vec<f64>,
    /// Losses of the router, without their factors.
    pub balance: Vec<f64>,
    pub z: Vec<f64>,
}

impl History {
    /// Mean of the last `steps` entries.
    pub fn recent(values: &[f64], steps: usize) -> f64 {
        let recent = &values[values.len().saturating_sub(steps)..];
        recent.iter().sum::<f64>() / recent.len() as f64
    }

    /// The last look.
    pub fn end(&self) -> &Evaluation {
        &self.evaluations.last().expect("training ends with a look at the held-out text").1
    }
}

/// A model whose distributions are learned from, and their share of the target.
pub struct Teacher<'a> {
    pub model: &'a mut Model,
    pub share: Real,
}

/// Trains `model`, calling `told` at each look at the held-out text.
///
/// # Errors
/// Those of the device; and a loss that is no finite number.
pub fn train(
    name: &str,
    model: &mut Model,
    text: &Text,
    training: &Training,
    mut teacher: Option<Teacher<'_>>,
    told: &mut dyn FnMut(&History),
) -> Outcome<History> {
    let &Training { steps, limit, seed, sequences, context, rate, eval_every, eval_batches } = training;
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut optimiser = AdamW::new();
    let mut history = History::default();
    let mut look = |step: usize, model: &mut Model, history: &mut History| -> Outcome<()> {
        history.evaluations.push((step, evaluate(model, text, [sequences, eval_batches], context)?));
        told(history);
        Ok(())
    };
    let bar = bar(name, steps);
    let begin = Instant::now();
    for step in 0..steps {
        if limit.is_some_and(|limit| begin.elapsed() >= limit) {
            break;
        }
        if step % eval_every == 0 {
            bar.suspend(|| look(step, model, &mut history))?;
        }
        let batch = text.batch(sequences, &mut rng);
        let taught = match &mut teacher {
            Some(teacher) => Some((teacher.model.forward(&batch.bytes, context)?, teacher.share)),
            None => None,
        };
        let logits = model.forward(&batch.bytes, context)?;
        let target = match &taught {
            Some((teacher, share)) => Target::Mixed { bytes: &batch.next, teacher, share: *share },
            None => Target::Bytes(&batch.next),
        };
        let loss = cross_entropy(&logits, &target);
        if !loss.bytes.is_finite() {
            return Err(format!("step {step}: the loss is {}", loss.bytes).into());
        }
        history.losses.push(loss.bytes);
        history.layers.resize_with(model.routed().count(), LayerHistory::default);
        for (layer, routed) in history.layers.iter_mut().zip(model.routed()) {
            layer.variations.push(variation(routed.load.iter().map(|&tokens| tokens.into())));
            layer.balance.push(routed.balance.into());
            layer.z.push(routed.z.into());
        }
        model.backward(&loss.gradient)?;
        optimiser.step(model.parameters(), adamw::rate(rate, step, steps, steps / 10));
        bar.set_message(format!("loss {:.3}", History::recent(&history.losses, 20)));
        bar.inc(1);
    }
    bar.finish_and_clear();
    look(history.losses.len(), model, &mut history)?;
    Ok(history)
}

/// On standard error, where that is a terminal.
fn bar(name: &str, steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {msg} {eta}") {
        bar.set_style(style);
    }
    bar.set_prefix(name.to_owned());
    bar
}
