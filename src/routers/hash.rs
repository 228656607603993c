//! Hash layers: the expert follows from the token's id alone (Roller et al., *Hash Layers For Large Sparse Models*, 2021).
//!
//! A table gives the experts of each word of the vocabulary: random, balanced by frequency ([`balanced_table`]), or whatever the
//! caller computes. Without a table, a mixing hash does. With `top_k > 1` a token has several hashes (the paper's MultiHash). Weights
//! are all one: combine without weights, or with `1 / top_k`. Hash layers whose router weighs the experts of a table (DeepSeek-V4) are a rule of
//! [`crate::routers::gating`], [`crate::rules::ChoiceBy::Given`], which looks them up itself.
//!
//! There is no router, so no gradient.
//!
//! ```
//! use moe_kernels::routers::hash::{self, HashArgs, HashBy, HashDesc, balanced_table};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let table = stream.clone_htod(&balanced_table(&[1, 10, 5, 5, 1], 2))?;
//! let words = stream.clone_htod(&[1, 3, 0])?;
//! let mut ids = stream.alloc_zeros(3)?;
//! let desc = HashDesc::new(3, 2, 1, HashBy::Table { vocabulary: 5 });
//! hash::forward(&kernels, &stream, &desc, HashArgs::new(&words, &mut ids).table(&table))?;
//! assert_eq!(stream.clone_dtoh(&ids)?, [0, 1, 0]);
//! # Ok(())
//! # }
//! ```

use std::collections::BinaryHeap;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::HashParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, TokenMask};

const OPERATION: &str = "hash";

/// Where a token's experts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HashBy {
    /// A table of this many rows ([`HashArgs::table`]).
    Table {
        /// Words `V`.
        vocabulary: usize,
    },
    /// The mixing hash of [`crate::reference::hash::hash`]; a token's experts are distinct.
    Mix {
        /// Chooses the functions.
        seed: u64,
    },
}

/// Shapes and rule of a hash routing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HashDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 32 and at most `E`.
    pub top_k: usize,
    /// Where experts come from.
    pub hash: HashBy,
}

impl HashDesc {
    /// `top_k` of `experts` experts for each of `tokens` tokens, by `hash`.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, hash: HashBy) -> HashDesc {
        HashDesc { tokens, experts, top_k, hash }
    }
}

/// Buffers of a hash routing.
#[non_exhaustive]
pub struct HashArgs<'a> {
    /// `[T]`: ids of words.
    pub token_ids: In<'a, i32>,
    /// `[V, k]`, with [`HashBy::Table`]. An entry that is no expert, and a token id outside the table, give -1.
    pub table: Option<In<'a, i32>>,
    /// Which tokens count: the others have ids -1.
    pub mask: TokenMask<'a>,
    /// `[T, k]`, written.
    pub ids: Out<'a, i32>,
}

impl<'a> HashArgs<'a> {
    /// `token_ids` to `ids`, without a table.
    pub fn new(token_ids: impl Into<In<'a, i32>>, ids: impl Into<Out<'a, i32>>) -> HashArgs<'a> {
        HashArgs { token_ids: token_ids.into(), table: None, mask: TokenMask::all(), ids: ids.into() }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> HashArgs<'a> {
        HashArgs { mask, ..self }
    }
}

buffers!(HashArgs<'a> { table: In<i32> });

impl HashDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        shape::top_k(OPERATION, self.top_k, self.experts)?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.top_k])?;
        if let HashBy::Table { vocabulary } = self.hash {
            shape::size(OPERATION, "vocabulary", vocabulary)?;
            shape::product(OPERATION, "table", &[vocabulary, self.top_k])?;
        }
        Ok(())
    }
}

/// Chooses kernel and grid: a thread a token.
///
/// # Errors
/// Those of [`HashDesc::validate`].
pub fn select(desc: &HashDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.tokens as u32).div_ceil(Kernel::Hash.threads()).max(1);
    Ok(Selection::new(Kernel::Hash, [blocks, 1, 1]))
}

/// Routes tokens by their ids.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`HashDesc::validate`]; [`Error::Missing`] and [`Error::Unexpected`] for a table against the descriptor; those of a
/// buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(kernels: &Kernels, stream: &Arc<CudaStream>, desc: &HashDesc, args: HashArgs<'_>) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let (vocabulary, seed) = match (desc.hash, args.table.is_some()) {
        (HashBy::Table { vocabulary }, true) => (vocabulary, 0),
        (HashBy::Mix { seed }, false) => (0, seed),
        (HashBy::Table { .. }, false) => {
            let reason = "the descriptor routes by table";
            return Err(Error::Missing { operation: OPERATION, argument: "table", reason });
        }
        (HashBy::Mix { .. }, true) => {
            let reason = "the descriptor routes by a mixing hash";
            return Err(Error::Unexpected { operation: OPERATION, argument: "table", reason });
        }
    };
    if desc.tokens == 0 {
        return Ok(());
    }
    let token_ids = scope.read("token_ids", args.token_ids, desc.tokens, SCALAR)?;
    let table = scope.read_some("table", args.table, vocabulary * desc.top_k, SCALAR)?;
    let mask = args.mask.open(&scope, desc.tokens)?;
    let ids = scope.write("ids", args.ids, desc.tokens * desc.top_k, SCALAR)?;
    scope.launch(
        &selection,
        HashParams {
            token_ids: token_ids.address().into(),
            table: optional(&table).into(),
            ids: ids.address().into(),
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags(),
            tokens: desc.tokens as u32,
            vocabulary: vocabulary as u32,
            experts: desc.experts as u32,
            top_k: desc.top_k as u32,
            seed_lo: seed as u32,
            seed_hi: (seed >> 32) as u32,
        },
    )
}

/// A table `[V, 1]` that balances the load of a corpus: words by falling frequency, each to the expert with the least load so far
/// (the paper's balanced assignment, section 3.1). Equal frequencies go by word, equal loads by expert.
///
/// With no experts every entry is -1.
pub fn balanced_table(frequencies: &[u64], experts: usize) -> Vec<i32> {
    let mut words: Vec<usize> = (0..frequencies.len()).collect();
    words.sort_by_key(|&word| std::cmp::Reverse(frequencies[word]));
    let mut loads: BinaryHeap<_> = (0..experts).map(|expert| std::cmp::Reverse((0u128, expert))).collect();
    let mut table = vec![-1; frequencies.len()];
    for word in words {
        let Some(std::cmp::Reverse((load, expert))) = loads.pop() else { break };
        table[word] = expert as i32;
        loads.push(std::cmp::Reverse((load + u128::from(frequencies[word]), expert)));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(desc: HashDesc) -> &'static str {
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        let desc = HashDesc { tokens: 10, experts: 8, top_k: 2, hash: HashBy::Mix { seed: 1 } };
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(HashDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(HashDesc { top_k: 9, ..desc }), "top_k");
        assert_eq!(fault(HashDesc { tokens: 1 << 30, ..desc }), "ids");
        assert_eq!(fault(HashDesc { hash: HashBy::Table { vocabulary: usize::MAX }, ..desc }), "vocabulary");
    }

    #[test]
    fn frequent_words_are_spread() {
        assert_eq!(balanced_table(&[1, 10, 5, 5, 1], 2), [0, 0, 1, 1, 1]);
        assert_eq!(balanced_table(&[3], 0), [-1]);
    }
}
