//! The norm of all gradients, and what clips them.

use super::Real;

/// The root of the sum of squares over everything, as torch's `clip_grad_norm_` has it for the norm of order 2; times `scale`.
pub fn norm<T: Real>(gradients: &[&[T]], scale: f64) -> f64 {
    let squares = |values: &&[T]| values.iter().map(|&value| value.into() * value.into()).sum::<f64>();
    scale * gradients.iter().map(squares).sum::<f64>().sqrt()
}

/// What gradients are multiplied by so that their norm is at most `max_norm`: `min(1, max_norm / (norm + 1e-6))` (Pascanu et al. 2013, arXiv:1211.5063, with
/// torch's epsilon). NaN for a norm that is none, 0 for an infinite one.
pub fn clip(norm: f64, max_norm: Option<f64>) -> f64 {
    match max_norm {
        Some(most) if most / (norm + 1e-6) > 1.0 => 1.0,
        Some(most) if most.is_finite() => most / (norm + 1e-6),
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        assert_eq!(norm(&[&[3.0, 0.0][..], &[], &[-4.0]], 0.5), 2.5);
        assert_eq!(norm::<f64>(&[], 1.0), 0.0);
        assert_eq!(clip(2.5, None), 1.0);
        assert_eq!(clip(0.5, Some(1.0)), 1.0);
        assert_eq!(clip(4.0 - 1e-6, Some(1.0)), 0.25);
        assert_eq!(clip(f64::INFINITY, Some(1.0)), 0.0);
        assert!(clip(f64::NAN, Some(1.0)).is_nan());
        assert_eq!(clip(f64::NAN, None), 1.0);
    }
}
