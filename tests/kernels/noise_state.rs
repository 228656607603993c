//! Checks of `noise_state`: the offset moves, modulo 2^64, and the seed does not. And states for the checks of all that draws.

use cudarc::driver::CudaView;
use moe_kernels::routers::noise_state;
use moe_kernels::rules::NoiseSource;

use crate::support::buffer::Guarded;
use crate::support::device;

/// Where a case's noise comes from: the source of its rule alone, or a state on the device with the source's offset.
pub struct State(Option<([u64; 2], Guarded<u64>)>);

impl State {
    pub const NONE: State = State(None);

    /// A state in half of the cases. Low halves of all ones carry, and every other sum of offsets passes 2^64.
    pub fn draw(rng: &mut fastrand::Rng) -> State {
        State(rng.bool().then(|| {
            let low = if rng.bool() { u64::from(u32::MAX) } else { 0 };
            let state = [rng.u64(..), rng.u64(..) | low];
            (state, Guarded::input(&device::stream(), "noise_state", &state))
        }))
    }

    /// Whose words a kernel draws that is given `source` and this.
    pub fn of(&self, source: NoiseSource) -> NoiseSource {
        self.0.as_ref().map_or(source, |(state, _)| source.with_state(*state))
    }

    pub fn view(&self) -> Option<CudaView<'_, u64>> {
        self.0.as_ref().map(|(_, buffer)| buffer.view())
    }

    pub fn assert_unchanged(&self) {
        self.0.iter().for_each(|(_, buffer)| buffer.assert_unchanged(&device::stream()));
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some((state, _)) => write!(f, "state={state:x?}"),
            None => write!(f, "no state"),
        }
    }
}

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
