pub fn check(_: moe_kernels::registry::Noisy, _: &mut fastrand::Rng) {}
