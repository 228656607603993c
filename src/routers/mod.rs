//! Which experts each token goes to, and with what weight.

pub mod affinity;
pub mod balance;
pub mod base;
pub mod expert_choice;
pub mod gating;
pub mod gating_dispatch;
pub mod hash;
pub mod hierarchical;
pub mod jitter;
pub mod noisy;
pub mod router;
pub mod sampled;
pub mod sinkhorn;
