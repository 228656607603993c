//! What a model makes of the text that it has not seen.

use super::Outcome;
use super::plain::cross_entropy::{Target, cross_entropy};
use super::plain::model::Model;
use super::text::Text;

/// What came of the held-out text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Mean cross entropy of a byte, in nats.
    pub loss: f64,
    /// Tokens of each expert, for each MoE layer.
    pub loads: Vec<Vec<i64>>,
}

/// Runs the held-out text, in batches of `sequences`, of which at most `batches` are taken.
pub fn evaluate(
    model: &mut Model,
    text: &Text,
    [sequences, batches]: [usize; 2],
    context: usize,
) -> Outcome<Evaluation> {
    let (mut sum, mut tokens) = (0.0, 0);
    let mut loads: Vec<Vec<i64>> = Vec::new();
    for batch in text.held_out(sequences, batches) {
        let logits = model.forward(&batch.bytes, context)?;
        let count = batch.next.len();
        sum += cross_entropy(&logits, &Target::Bytes(&batch.next)).bytes * count as f64;
        tokens += count;
        loads.resize_with(model.routed().count(), Vec::new);
        for (sum, routed) in loads.iter_mut().zip(model.routed()) {
            sum.resize(routed.load.len(), 0);
            sum.iter_mut().zip(&routed.load).for_each(|(sum, &tokens)| *sum += i64::from(tokens));
        }
    }
    Ok(Evaluation { loss: sum / tokens as f64, loads })
}

/// Coefficient of variation of a load: standard deviation over mean.
pub fn variation(load: impl IntoIterator<Item = f64>) -> f64 {
    let load: Vec<f64> = load.into_iter().collect();
    let mean = load.iter().sum::<f64>() / load.len() as f64;
    let variance = load.iter().map(|tokens| (tokens - mean).powi(2)).sum::<f64>() / load.len() as f64;
    variance.sqrt() / mean
}
