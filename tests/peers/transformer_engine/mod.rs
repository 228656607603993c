//! TransformerEngine, `tests/pytorch/test_permutation.py` and `test_fused_router.py`, forth and back.
//!
//! Scaled down: 4096 tokens to 96, hidden 4096 to 64 and others in proportion, 2039 output rows to 47; tokens of the router above 96. Runs under
//! `torch.compile` are the same computations and not counted again.

mod permutation;
pub mod router;

use crate::gradients::{routers, rows};
use crate::suite::Peer;

pub fn peer() -> Peer {
    let suite = "`tests/pytorch`: test_permutation, test_fused_router, gradients";
    let sections = vec![
        permutation::index_map(),
        permutation::mask_map(),
        permutation::capacity_drop(),
        permutation::padding(),
        permutation::alongside_probs(),
        permutation::chunk_sort(),
        router::topk_sigmoid(),
        router::topk_softmax(),
        router::scores_for_aux_loss(),
        router::aux_loss(),
        rows::permutation(),
        routers::te_weights(true),
        routers::te_weights(false),
        routers::te_aux_loss(),
    ];
    Peer { name: "TransformerEngine", suite, sections }
}
