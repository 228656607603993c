//! vLLM, `tests/kernels/moe`.
//!
//! Scaled down: token counts above 96 and sizes of products (each module's lists say to what), hidden sizes of permutations by 32. The suite runs
//! permutations with scratch buffers of its own or of the caller's: here a workspace always is the caller's, and the second launch on one is
//! compared too.

mod batched;
mod choices;
mod layers;
mod rows;

use crate::suite::Peer;

pub fn peer() -> Peer {
    let suite = "`tests/kernels/moe`: moe, permute, align, fused and grouped top-k, counts, expert maps, sums, batched products";
    let sections = vec![
        layers::fused_moe(),
        rows::permute_unpermute(),
        rows::permute_invalid_ids(),
        rows::align_block_size(),
        rows::align_block_size_with_map(),
        batched::align(),
        batched::products(),
        batched::moe_sum(),
        choices::fused_topk(),
        choices::grouped_topk(),
        rows::count_tokens(),
        rows::count_tokens_by_size(),
        rows::stale_ids(),
    ];
    Peer { name: "vLLM", suite, sections }
}
