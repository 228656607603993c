//! From choices to rows: who is admitted, which experts are here, and the order of slots.

pub mod admission;
pub mod admission_backward;
pub mod chunks;
pub mod dispatch;
pub mod expert_counts;
pub mod expert_map;
pub mod keep_largest;
pub mod lists;
pub mod routing_map;
pub mod row_groups;
pub mod token_slots;

pub use crate::runtime::ids::Ids;
