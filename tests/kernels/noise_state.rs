//! Checks of `noise_state`: the offset moves, modulo 2^64, and the seed does not.

use moe_kernels::routers::noise_state;

use crate::support::buffer::Guarded;
use crate::support::device;

pub fn check(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let corners =
        [0, 1, u64::from(u32::MAX), u64::from(u32::MAX) + 1, u64::MAX, u64::MAX - 1, rng.u64(..), rng.u64(..)];
    for offset in corners {
        for draws in corners {
            let seed = rng.u64(..);
            let mut state = Guarded::input(&stream, "noise_state", &[seed, offset]);
            noise_state::advance(kernels, &stream, &mut state.view_mut(), draws).unwrap();
            assert_eq!(state.read(&stream), [seed, offset.wrapping_add(draws)], "{offset} + {draws}");
        }
    }
}
