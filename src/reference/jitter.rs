//! Jitter: multiplicative noise on the router's input.
//!
//! Fedus et al. 2021, "Switch Transformers", appendix C and table 11 (input jitter): the router sees `x U(1 - epsilon, 1 + epsilon)`, the
//! experts see x. (The pseudo code of appendix F adds such a number to the logits instead; models and text multiply.) transformers' Mixtral
//! multiplies in place, so that its experts see the noise too: give them y for that.

use super::{Real, ReferenceError, require};
use crate::rules::NoiseSource;
use crate::rules::noise::uniform;

/// `x_i (1 - epsilon + 2 epsilon u_i)`, the factor in f32 with one fused rounding, the product rounded to `O`.
///
/// # Errors
/// `epsilon` outside 0 to 1.
pub fn jitter<X: Real, O: Real>(x: &[X], epsilon: f32, noise: NoiseSource) -> Result<Vec<f64>, ReferenceError> {
    require("epsilon", (0.0..=1.0).contains(&epsilon), || "0 to 1".into(), epsilon)?;
    let (width, low) = (2.0 * epsilon, 1.0 - epsilon);
    Ok(x.iter()
        .enumerate()
        .map(|(i, &x)| {
            let factor = uniform(noise.jitter_word(i as u64)).mul_add(width, low);
            O::round(x.into() * f64::from(factor))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_fill_the_interval() {
        let x = vec![1f32; 4096];
        let y = jitter::<f32, f32>(&x, 0.25, NoiseSource { seed: 9, offset: 1 }).unwrap();
        assert!(y.iter().all(|y| (0.75..=1.25).contains(y)));
        // The mean of 4096 uniform numbers of width 0.5 has the standard error 0.5 / sqrt(12 * 4096) = 0.00226.
        assert!((y.iter().sum::<f64>() / 4096.0 - 1.0).abs() < 5.0 * 0.00226);
        assert!(y.iter().any(|&y| y < 0.752) && y.iter().any(|&y| y > 1.248));
    }

    /// A product with a number: the same of the gradient.
    #[test]
    fn it_is_its_own_way_back() {
        let (x, dy) = ([0.5, -2.0, 3.0], [1.0, 0.25, -4.0]);
        let noise = NoiseSource { seed: 9, offset: 1 };
        let of = |x: &[f64]| jitter::<f64, f64>(x, 0.25, noise).unwrap();
        let got = of(&dy);
        for i in 0..3 {
            let at = |by: f64| {
                let mut moved = x;
                moved[i] += by;
                of(&moved)[i]
            };
            let want = dy[i] * (at(1e-4) - at(-1e-4)) / 2e-4;
            assert!((got[i] - want).abs() < 1e-9, "{i}: {}, want {want}", got[i]);
        }
    }

    #[test]
    fn no_width_no_noise() {
        let x = [1.5f32, -2.0, f32::NAN, f32::INFINITY];
        let y = jitter::<f32, f32>(&x, 0.0, NoiseSource::default()).unwrap();
        assert_eq!((y[0], y[1], y[3]), (1.5, -2.0, f64::INFINITY));
        assert!(y[2].is_nan());
        assert_eq!(jitter::<f32, f32>(&x, 1.5, NoiseSource::default()).unwrap_err().argument, "epsilon");
    }
}
