//! What the checks of gradients have in common.

use moe_kernels::Element;

use crate::support::buffer::Guarded;
use crate::support::compare::GATING_GRADIENT;
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

/// Results that are written, or added to what they hold.
pub struct Results {
    pub accumulate: bool,
    pub before: Vec<Vec<f32>>,
}

impl Results {
    pub fn draw(rng: &mut fastrand::Rng, lengths: &[usize]) -> Results {
        let before = lengths.iter().map(|&len| (0..len).map(|_| normal(rng) as f32).collect()).collect();
        Results { accumulate: rng.bool(), before }
    }

    /// Twice over junk: the same bits.
    pub fn run(&self, name: &str, launch: impl Fn(&mut [Guarded<f32>])) -> Vec<Vec<f32>> {
        let stream = device::stream();
        let once = || {
            let mut out: Vec<Guarded<f32>> = self
                .before
                .iter()
                .map(|before| match self.accumulate {
                    true => Guarded::filled_output(&stream, "gradient", before, 0),
                    false => Guarded::output(&stream, "gradient", before.len()),
                })
                .collect();
            launch(&mut out);
            out.iter().map(|out| out.read(&stream)).collect::<Vec<_>>()
        };
        let got = once();
        let bits = |of: &[Vec<f32>]| of.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got), bits(&once()), "{name}: another run gave other bits");
        time(&stream, name, || drop(once()));
        got
    }

    /// Rows of `width`, each relative to its own norm and to `scale(row)`: what cancels in it.
    pub fn compare(
        &self,
        name: &str,
        which: usize,
        got: &[f32],
        want: &[f64],
        width: usize,
        scale: impl Fn(usize) -> f64,
    ) {
        assert_eq!(got.len(), want.len(), "{name}");
        for (t, (row, wants)) in got.chunks(width).zip(want.chunks(width)).enumerate() {
            let norm = wants.iter().map(|v| v * v).sum::<f64>().sqrt() + scale(t);
            for (e, (&got, &want)) in row.iter().zip(wants).enumerate() {
                let before = if self.accumulate { f64::from(self.before[which][t * width + e]) } else { 0.0 };
                let bound = GATING_GRADIENT * (norm + before.abs()) + f64::from(f32::MIN_POSITIVE);
                let error = (f64::from(got) - want - before).abs();
                assert!(
                    error <= bound,
                    "{name}: gradient {which}, row {t}, {e} is {got:e}, want {:e}, off by {error:e} > {bound:e}",
                    want + before
                );
            }
        }
    }
}

/// `len` normal numbers as the device holds them, and in f64.
pub fn upstream(rng: &mut fastrand::Rng, len: usize) -> (Vec<f32>, Vec<f64>) {
    let values: Vec<f32> = (0..len).map(|_| normal(rng) as f32).collect();
    let wide = values.iter().map(|&v| v.to_f32().into()).collect();
    (values, wide)
}

/// The root of the sum of squares of row `t`, each of `width`.
pub fn row_norm(values: &[f64], width: usize, t: usize) -> f64 {
    values[t * width..][..width].iter().filter(|v| v.is_finite()).map(|v| v * v).sum::<f64>().sqrt()
}
