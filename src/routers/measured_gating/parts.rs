//! How a measured gating cuts its tokens: the kernel's sums are made piece by piece and part by part, in this order.

use super::MeasuredGatingDesc;
use crate::DeviceInfo;

/// Tokens that a warp gets at least, where there is but one sequence or few.
const TOKENS_A_WARP: usize = 2;

/// A part is `pieces_each` whole sequences, or one of `per_sequence` runs of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    /// Tokens of a sequence, at most all.
    pub(super) sequence: usize,
    /// Tokens of a piece, at most.
    pub(super) tokens: usize,
    /// Pieces of a sequence; 1 if `pieces_each` is more.
    pub(super) per_sequence: usize,
    /// Pieces of a part.
    pub(super) pieces_each: usize,
    /// Parts in all.
    pub(super) parts: usize,
    /// Pieces in all.
    pub(super) pieces: usize,
}

impl Parts {
    /// About as many parts as blocks run at once.
    pub(super) fn new(desc: &MeasuredGatingDesc, device: &DeviceInfo) -> Parts {
        let tokens = desc.gating.tokens.max(1);
        let warps = desc.kernel().gate().warps() as usize;
        let sequence = desc.rule.tokens_per_sequence.min(tokens);
        let sequences = tokens.div_ceil(sequence);
        let wanted = tokens.div_ceil(TOKENS_A_WARP * warps).min(resident_blocks(desc, device) as usize);
        if sequences >= wanted {
            let pieces_each = sequences.div_ceil(wanted);
            let parts = sequences.div_ceil(pieces_each);
            return Parts { sequence, tokens: sequence, per_sequence: 1, pieces_each, parts, pieces: sequences };
        }
        let of_piece = sequence.div_ceil(wanted / sequences);
        let per_sequence = sequence.div_ceil(of_piece);
        let pieces = sequences * per_sequence;
        Parts { sequence, tokens: of_piece, per_sequence, pieces_each: 1, parts: pieces, pieces }
    }

    /// Sequences of several pieces.
    pub(super) fn cut_sequences(&self) -> usize {
        if self.per_sequence > 1 { self.pieces / self.per_sequence } else { 0 }
    }
}

/// Blocks that are resident together, as they meet at a barrier.
pub(super) fn resident_blocks(desc: &MeasuredGatingDesc, device: &DeviceInfo) -> u32 {
    if !device.cooperative_launch {
        return 1;
    }
    let gate = desc.kernel();
    // Shared memory of a multiprocessor is at least what one block may opt into.
    let by_memory = (device.shared_bytes_per_block / gate.shared_bytes()).max(1);
    gate.blocks_resident().min(by_memory) * device.multiprocessors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routers::gating::GatingDesc;
    use crate::rules::{Gating, Score};
    use crate::runtime::device::A100;

    fn parts(tokens: usize, sequence: usize) -> Parts {
        let gating = GatingDesc { tokens, experts: 64, top_k: 1, gating: Gating::new(Score::Softmax) };
        let mut desc = MeasuredGatingDesc::new(gating);
        desc.rule.tokens_per_sequence = sequence;
        Parts::new(&desc, &A100)
    }

    #[test]
    fn every_token_is_in_one_piece() {
        for tokens in [1, 2, 15, 16, 17, 1000, 4096, 100_000, 1 << 20] {
            for sequence in [1, 7, 64, 1000, 4096, 1 << 20, usize::MAX >> 1] {
                let p = parts(tokens, sequence);
                let what = format!("{tokens} {sequence}: {p:?}");
                assert!(p.per_sequence == 1 || p.pieces_each == 1, "{what}");
                assert!(p.parts <= 216, "{what}");
                assert_eq!(p.parts, p.pieces.div_ceil(p.pieces_each), "{what}");
                let covered: usize = (0..p.pieces)
                    .map(|piece| {
                        let (s, q) = (piece / p.per_sequence, piece % p.per_sequence);
                        let end = ((s + 1) * p.sequence).min(tokens);
                        let from = (s * p.sequence + q * p.tokens).min(end);
                        (from + p.tokens).min(end) - from
                    })
                    .sum();
                assert_eq!(covered, tokens, "{what}");
            }
        }
    }

    #[test]
    fn a_long_sequence_is_cut_and_short_ones_are_not() {
        assert_eq!(parts(1 << 20, 1 << 20).parts, 216);
        assert_eq!(parts(8192, 4096).per_sequence, 108);
        assert_eq!(parts(8192, 8).per_sequence, 1);
        assert_eq!(parts(3, 3).parts, 1);
    }
}
