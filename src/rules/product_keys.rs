//! Experts by pairs of keys.

/// Where the two lists of product keys lie in scores `[T, 2n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeySplit {
    /// A token's first `n` scores and its last `n` (PEER, the Doge paper).
    Row,
    /// As transformers' Doge has it: the scores of the whole batch, seen as `[2, T, n]`. A token's lists then come from other tokens' rows: of an
    /// even number of tokens, the first lists are all of the first half's. It is what released checkpoints give outside token by token
    /// generation, where `T` is 1 and both are the same.
    Batch,
}

impl KeySplit {
    /// Where a token's first and second list begin.
    pub fn places(self, token: usize, tokens: usize, keys: usize) -> [usize; 2] {
        match self {
            KeySplit::Row => [2 * token * keys, (2 * token + 1) * keys],
            KeySplit::Batch => [token * keys, (tokens + token) * keys],
        }
    }
}
