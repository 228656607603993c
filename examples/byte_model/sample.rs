//! What a model writes.

use super::Outcome;
use super::plain::attention::softmax;
use super::plain::model::Model;

/// Below 1: likely bytes are drawn more often than the model says.
const TEMPERATURE: f32 = 0.8;

/// `count` bytes, drawn one after the other, the first behind a line break. Bytes that are no text become `.`.
pub fn sample(model: &mut Model, context: usize, count: usize, rng: &mut fastrand::Rng) -> Outcome<String> {
    let mut bytes = vec![b'\n'];
    for _ in 0..count {
        let seen = &bytes[bytes.len().saturating_sub(context)..];
        let logits = model.forward(seen, seen.len())?;
        let mut shares: Vec<f32> = logits[logits.len() - 256..].iter().map(|logit| logit / TEMPERATURE).collect();
        softmax(&mut shares);
        let mut left = rng.f32();
        let drawn = shares.iter().position(|share| {
            left -= share;
            left < 0.0
        });
        bytes.push(drawn.unwrap_or(255) as u8);
    }
    let shown = |byte: &u8| if byte.is_ascii_graphic() || b" \n".contains(byte) { char::from(*byte) } else { '.' };
    Ok(bytes[1..].iter().map(shown).collect())
}
