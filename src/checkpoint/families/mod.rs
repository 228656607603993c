//! The families, by kin.

use super::config::Config;
use super::error::CheckpointError;
use super::family::Family;
use super::folder::Checkpoint;
use super::nearest;
use crate::rules::Renormalise;

mod apart;
mod deepseek_v2;
mod deepseek_v3;
mod sigmoid;
mod softmax;
mod switch_transformers;
mod topk_softmax;

/// Every kin.
const KIN: [&[Family]; 7] = [
    deepseek_v3::KIN,
    sigmoid::KIN,
    softmax::KIN,
    deepseek_v2::KIN,
    topk_softmax::KIN,
    switch_transformers::KIN,
    apart::KIN,
];

/// `w / sum(w)`.
const SUM: Renormalise = Renormalise::Plus(0.0);

/// `w / (sum(w) + 1e-20)`.
const SUM_PLUS: Renormalise = Renormalise::Plus(1e-20);

/// All families.
pub fn families() -> impl Iterator<Item = &'static Family> {
    KIN.into_iter().flatten()
}

/// The family of a configuration: of the language model's own `model_type`, else of the whole model's.
pub(super) fn of(config: &Config, files: Option<&Checkpoint>) -> Result<Family, CheckpointError> {
    let named = |name: &str| families().find(|family| family.is_named(name));
    config.model_types().find_map(named).copied().ok_or_else(|| CheckpointError::UnknownFamily {
        found: config.model_type().to_owned(),
        nearest: files.map_or(String::new(), |files| nearest::describe(config, files)),
        known: families().flat_map(|family| family.names()).copied().collect::<Vec<_>>().join(", "),
    })
}
