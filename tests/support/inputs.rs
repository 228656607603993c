//! Seeded inputs. Every case draws from its own generator, so that one case reproduces alone.

use super::compare::Storage;
#[allow(unused_imports)] // a bench takes neither from here
pub use super::seed::{generator, run_seed};

/// One standard normal value (Box-Muller).
pub fn normal(rng: &mut fastrand::Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
    radius * (std::f64::consts::TAU * rng.f64()).cos()
}

/// `len` normal values times `scale`, rounded to the storage type: the reference sees what the kernel sees.
pub fn normals<T: Storage>(rng: &mut fastrand::Rng, len: usize, scale: f64) -> Vec<T> {
    (0..len).map(|_| T::from_f64(scale * normal(rng))).collect()
}
