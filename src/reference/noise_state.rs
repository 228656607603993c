//! Noise states: seed and offset of random words, moved on after a step.

/// `{seed, offset + draws}`, modulo 2^64. What draws from it takes [`crate::rules::NoiseSource::with_state`].
pub fn advance([seed, offset]: [u64; 2], draws: u64) -> [u64; 2] {
    [seed, offset.wrapping_add(draws)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::NoiseSource;

    #[test]
    fn each_draw_of_each_step_has_words_of_its_own() {
        let mut state = [9, u64::MAX - 2];
        let mut offsets = Vec::new();
        for _step in 0..2 {
            offsets.extend([0, 1].map(|draw| NoiseSource::new(123, draw).with_state(state)));
            state = advance(state, 2);
        }
        // The source's own seed counts for nothing.
        assert_eq!(offsets, [u64::MAX - 2, u64::MAX - 1, u64::MAX, 0].map(|offset| NoiseSource::new(9, offset)));
    }
}
