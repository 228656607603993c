//! What library and reference share: kinds, rules, noise. Plain data and arithmetic, nothing of a device.

mod activation;
mod balance;
mod capacity;
mod dropout;
mod expert_map;
mod gating;
pub(crate) mod kinds;
pub mod noise;
mod norm;
mod null_experts;
mod product_keys;
mod routing;
pub(crate) mod settings;
mod weight;
mod weighting;

pub use activation::{Activation, Bound, Swiglu};
pub use balance::{BalanceRule, LossCounts, LossGradient, LossScore, Sequences};
pub use capacity::{AdmissionRule, Capacity, Order, SecondExpert, capacity};

pub use dropout::{Dropout, drop_below, keep_scale};
pub use expert_map::{IDENTITY, NONE};
pub use gating::{
    Appended, AppendedWeight, ChoiceBy, Garbage, Gating, GroupScore, Groups, LogitRule, Masked, Renormalise,
};
pub use kinds::{Dtype, Glu, IdFormat, Layout, Score};
pub use noise::NoiseSource;
pub use norm::{Gain, RmsNorm};
pub use null_experts::{NullExperts, NullOutput};
pub use product_keys::KeySplit;
pub(crate) use routing::units;
pub use routing::{Affinity, AuctionRule, MixerRule, NoisyRule, SamplingRule, round_robin};
pub use weight::{WeightDesc, WeightFormat};
pub use weighting::Weighting;
