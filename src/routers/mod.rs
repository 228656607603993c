//! Which experts each token goes to, and with what weight.

pub mod affinity;
pub mod balance_loss;
pub mod base;
pub mod by_sequence;
pub mod cosine;
pub mod expert_choice;
pub mod gating;
pub mod gating_backward;
pub mod gating_dispatch;
pub mod hash;
pub mod hierarchical;
pub mod jitter;
pub mod load_importance;
pub mod measured_gating;
pub mod network;
pub mod noise_state;
pub mod noisy;
pub mod product_keys;
pub mod quantile_bias;
pub mod route;
pub mod router;
pub mod router_backward;
pub mod sampled;
pub mod sinkhorn;
pub mod token_banks;
pub mod update_bias;
