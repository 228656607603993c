//! The experts' products, and the sum of their outputs.
//!
//! What other libraries' grouped products are here, their lists made by [`crate::capacity::row_groups`] on the device:
//!
//! | elsewhere | here |
//! |---|---|
//! | `torch._grouped_mm(a [S,K], b [E,K,N], offs)` | [`gemm`] with [`Layout::Kn`](crate::rules::Layout::Kn), rows by [`Ends`](crate::capacity::row_groups::RowLayout::Ends); a transposed view of `[E,N,K]` is `Nk` |
//! | `(a [E,M,K], b [E,K,N])` | the same by [`Batched`](crate::capacity::row_groups::RowLayout::Batched) |
//! | `(a [M,S], b [S,N], offs)`, gradients of weights | [`k_grouped`]: `a` as `[S,M]`, or with strides |
//! | `(a [E,M,K], b [K,N], offs)`, groups of columns | [`gemm`] of the transposed: `b` as rows with strides `[1, N]`, `a` as weight, `out` with strides `[1, N]` |
//! | DeepGEMM's masked layout | [`gemm`], rows by [`Masked`](crate::capacity::row_groups::RowLayout::Masked) |
//! | `grouped_gemm`'s `batch_sizes`; its `trans_a` | [`gemm`], rows by [`Counts`](crate::capacity::row_groups::RowLayout::Counts); [`k_grouped`] |
//! | an f32 result; `accumulate`, `beta = 1` | [`gemm::Output`]; [`k_grouped::KGroupedDesc::accumulate`] |

pub mod activation_backward;
pub mod choice_backward;
pub mod column_products;
pub mod combine;
pub mod combine_backward;
pub mod cost;
pub(crate) mod dispatched;
pub mod gemm;
pub mod gemm_backward;
pub mod gemm_combine;
pub mod gradient_norm;
pub mod k_grouped;
pub mod overrides;
pub mod permute;
pub mod rms_norm;
pub mod rms_norm_backward;
pub mod sigmoid_gate;
pub mod tiles;
pub mod unit_experts;
pub mod unit_experts_backward;
pub(crate) mod weight;

pub use dispatched::{Dispatched, Lists, SlotShape, TileEntry};
pub use weight::Weight;
