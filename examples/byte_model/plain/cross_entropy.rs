//! What the model is trained to lessen.

use super::Real;
use super::attention::softmax;

/// What a token's distribution is compared with.
pub enum Target<'a> {
    /// The byte that follows.
    Bytes(&'a [u8]),
    /// `1 - share` of it the byte that follows, `share` of it what a teacher gives each byte, by its logits `[T, 256]` (Hinton et al. 2015,
    /// arXiv:1503.02531).
    Mixed { bytes: &'a [u8], teacher: &'a [Real], share: Real },
}

/// A batch's loss.
pub struct Loss {
    /// Mean cross entropy of the bytes that follow, in nats.
    pub bytes: f64,
    /// `[T, 256]`: gradient of the mean cross entropy of the target by each logit, `(p - target) / T`.
    pub gradient: Vec<Real>,
}

/// Of `logits [T, 256]`.
pub fn cross_entropy(logits: &[Real], target: &Target<'_>) -> Loss {
    let (&bytes, share) = match target {
        Target::Bytes(bytes) => (bytes, 0.0),
        Target::Mixed { bytes, share, .. } => (bytes, *share),
    };
    let columns = logits.len() / bytes.len();
    let factor = 1.0 / bytes.len() as Real;
    let mut gradient = logits.to_vec();
    let mut sum = 0.0;
    for (token, (row, &byte)) in gradient.chunks_exact_mut(columns).zip(bytes).enumerate() {
        softmax(row);
        let byte = usize::from(byte);
        sum -= f64::from(row[byte].max(Real::MIN_POSITIVE)).ln();
        row[byte] -= 1.0 - share;
        if let Target::Mixed { teacher, .. } = target {
            let mut soft = teacher[token * columns..][..columns].to_vec();
            softmax(&mut soft);
            row.iter_mut().zip(soft).for_each(|(value, soft)| *value -= share * soft);
        }
        row.iter_mut().for_each(|value| *value *= factor);
    }
    Loss { bytes: sum / bytes.len() as f64, gradient }
}
