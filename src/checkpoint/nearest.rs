//! What an unknown family looks like: the families whose tensors and keys it has, and where others differ.
//!
//! That everything fits does not say that the rules are the same, so it is only told, never taken for an answer.

use super::config::Config;
use super::error::CheckpointError;
use super::families::families;
use super::family::Family;
use super::folder::Checkpoint;
use super::load::load;
use super::spec::Scene;
use super::store::ToNowhere;
use crate::Dtype;

/// Families that are named.
const SHOWN: usize = 3;

/// The nearest families with their rules, or with what differs, as a part of a sentence; empty where nothing is near.
pub(super) fn describe(config: &Config, files: &Checkpoint) -> String {
    let mut fit: Vec<(usize, &Family)> = Vec::new();
    let mut differ: Vec<(u8, &Family, String)> = Vec::new();
    for family in families() {
        match attempt(family, config, files) {
            None => {}
            Some(Ok(strange)) => fit.push((strange, family)),
            Some(Err(error)) => differ.push((distance(&error), family, error.to_string())),
        }
    }
    let mut parts = Vec::new();
    fit.sort_by_key(|&(strange, _)| strange);
    if !fit.is_empty() {
        let rules = fit.iter().take(SHOWN).map(|(_, family)| {
            let [_, choice, weights, ..] = family.row();
            format!("{} (chosen by {choice}; weights {weights})", family.names()[0])
        });
        let more = if fit.len() > SHOWN { format!(" and {} more", fit.len() - SHOWN) } else { String::new() };
        let rules = rules.collect::<Vec<_>>().join(", ");
        parts.push(format!("tensors and keys would fit {rules}{more}, which says nothing of its own rules"));
    }
    // Of equal distance the first, which others are derived from.
    differ.sort_by_key(|&(distance, ..)| distance);
    let others = differ.iter().take(SHOWN.saturating_sub(fit.len()));
    parts.extend(others.map(|(_, family, error)| format!("not {}, as {error}", family.names()[0])));
    if parts.is_empty() { String::new() } else { format!(": {}", parts.join("; ")) }
}

/// Reads the checkpoint's first block as one of this family's, and counts the keys that only one of them knows; none where it has no router
/// of that name.
fn attempt(family: &Family, config: &Config, files: &Checkpoint) -> Option<Result<usize, CheckpointError>> {
    let found = family.locate(files, None).ok()?;
    let config = config.fresh();
    let result = family.describe(&Scene::new(&config, files, &found)).and_then(|spec| {
        let mut store = ToNowhere::default();
        load(files, &found.prefix, &spec, Dtype::F32, &mut store, 0, &mut |_| ()).map(|_| config.strange())
    });
    Some(result)
}

/// How early it goes wrong: a tensor too many is found last.
fn distance(error: &CheckpointError) -> u8 {
    match error {
        CheckpointError::UnreadTensor { .. } => 0,
        CheckpointError::MissingTensor { .. } => 1,
        CheckpointError::TensorShape { .. } | CheckpointError::ExpertLayout { .. } => 2,
        _ => 3,
    }
}
