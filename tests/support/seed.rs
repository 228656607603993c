//! The run's seed.

/// The seed of the run: `MOE_SEED`, else a fixed one, so that a plain run is the same everywhere.
pub fn run_seed() -> u64 {
    match std::env::var("MOE_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("MOE_SEED: expected an unsigned number, found {text:?}")),
        Err(_) => 20_261_122,
    }
}

/// The generator of the case `name` (FNV-1a of the name, mixed with the run's seed).
pub fn generator(name: &str) -> fastrand::Rng {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    fastrand::Rng::with_seed(hash ^ run_seed())
}
