//! How near a result must be.

use moe_kernels::Dtype;

use crate::calls::Chosen;
use crate::formulas::order;
use crate::support::compare::{layer, relative_error, unit_roundoff};

/// Two values within this are the same to a choice that f32 makes: scores are good to a few 1e-7.
const TIE: f64 = 2e-6;

/// Of a gate weight: its logits' rounding, an exponential, a sum and a quotient in f32.
const WEIGHT: f64 = 2e-5;

/// Every token has as many different experts as it should, of the largest `value`, larger first, and the weights that the peer gives these.
///
/// `value(t)` is what the peer's choice compares, by expert; `weight(t, ids)` what it weighs the experts `ids` with.
pub fn assert_choice(
    chosen: &Chosen,
    top_k: usize,
    value: impl Fn(usize) -> Vec<f64>,
    weight: impl Fn(usize, &[usize]) -> Vec<f64>,
) {
    let rows = chosen.ids.chunks(top_k).zip(chosen.weights.chunks(top_k));
    for (t, (ids, weights)) in rows.enumerate() {
        let values = value(t);
        let ids: Vec<usize> = ids.iter().map(|&id| usize::try_from(id).expect("an expert")).collect();
        for (j, (&id, &best)) in ids.iter().zip(&order(&values)).enumerate() {
            assert!(id < values.len() && !ids[..j].contains(&id), "token {t}: ids {ids:?}");
            let (got, want) = (values[id], values[best]);
            let near = (got - want).abs() <= TIE * (1.0 + want.abs());
            assert!(near || got == want, "token {t}: choice {j} is {id} of {got}, best {best} of {want}");
        }
        for (j, (&got, want)) in weights.iter().zip(weight(t, &ids)).enumerate() {
            let off = (f64::from(got) - want).abs();
            assert!(off <= WEIGHT * want.abs() + 1e-9, "token {t}: weight {j} is {got}, want {want}");
        }
    }
}

/// A layer's output: in the norm, and no element far off.
pub fn assert_layer(got: &[f64], want: &[f64], dtype: Dtype) {
    assert_norm(got, want, layer(dtype));
}

/// A product or a sum, rounded once: in the norm, and no element far off.
pub fn assert_rounded(got: &[f64], want: &[f64], dtype: Dtype) {
    let tolerance = if dtype == Dtype::F32 { 4e-6 } else { unit_roundoff(dtype) };
    assert_norm(got, want, tolerance);
}

/// Within `tolerance` in the norm, and no element off by more than 8 times that of the root of the mean square or of itself.
pub fn assert_norm(got: &[f64], want: &[f64], tolerance: f64) {
    let off = relative_error("result", got, want);
    assert!(off <= tolerance, "off by {off:.3e} in the norm, at most {tolerance:.3e}");
    let mean = (want.iter().map(|w| w * w).sum::<f64>() / want.len().max(1) as f64).sqrt();
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let most = 8.0 * tolerance * w.abs().max(mean) + f64::MIN_POSITIVE;
        assert!((g - w).abs() <= most, "element {i} is {g:e}, want {w:e}");
    }
}
