//! Admission: which of its chosen experts a token gets, where experts have a capacity.
//!
//! It stands between gating and dispatch, and turns the ids of gating into ids of which dispatch need drop none.

mod backward;

pub use backward::admit_backward;

use super::gating::descending;
use super::{ReferenceError, require, require_shape};
use crate::rules::noise::uniform;
use crate::rules::{AdmissionRule, Order, Renormalise, SecondExpert, Sequences};

/// What every token got.
#[derive(Clone, Debug, PartialEq)]
pub struct Admitted {
    /// `[T,n]`; -1 where nothing was got. With `n = K`, place `j` belongs to choice `j`; else the experts stand in the order in
    /// which they were got.
    pub ids: Vec<i32>,
    /// `[T,n]`, the weight of that choice, 0 where nothing was got.
    pub weights: Vec<f32>,
}

/// Admits the choices `ids [T,K]` with `weights [T,K]`, group by group.
///
/// What is left open between papers and codes, and what stands here:
///
/// - The weights are taken as given: GShard's are normalised over the two choices before anything is dropped (algorithm 1, lines 6 and 16; lingvo
///   normalises over what is left), V-MoE's are not normalised, and its priority is the largest of them: with normalised weights
///   give `priority`.
/// - A second expert that GShard's policy does not draw takes no place, as in the authors' code (Mesh TensorFlow, lingvo), where
///   algorithm 1, line 22, counts it.
/// - V-MoE gives all first choices, by priority, before all second ones: `prioritised` with [`Order::ByChoice`].
/// - Switch passes overflow on in stages, all tokens' first choices first: [`Order::ByChoice`]. With [`Order::ByToken`] a token takes its
///   next choice before the next token has had its first.
///
/// `priority` is `[T]`; absent, the weight of the first choice counts. NaN has the least priority. Ids outside `0..E` ask for
/// nothing.
///
/// # Errors
/// Lengths that do not fit, a zero in the rule, `top_k` above `candidates`, a policy for the second expert where `top_k` is not 2.
pub fn admit(
    ids: &[i32],
    weights: &[f32],
    priority: Option<&[f32]>,
    rule: &AdmissionRule,
) -> Result<Admitted, ReferenceError> {
    let choices = choices(ids, weights, priority, rule)?;
    let mut got = Admitted {
        ids: choices.iter().map(|slot| slot.map_or(-1, |slot| ids[slot])).collect(),
        weights: choices.iter().map(|slot| slot.map_or(0.0, |slot| weights[slot])).collect(),
    };
    if let Some(renormalise) = rule.renormalise {
        got.weights.chunks_mut(rule.top_k).try_for_each(|weights| divide(weights, renormalise))?;
    }
    Ok(got)
}

/// `[T,n]`: which of the `T K` choices stands in each place.
fn choices(
    ids: &[i32],
    weights: &[f32],
    priority: Option<&[f32]>,
    rule: &AdmissionRule,
) -> Result<Vec<Option<usize>>, ReferenceError> {
    let AdmissionRule { experts, candidates, top_k, capacity, tokens_per_group, .. } = *rule;
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("candidates", candidates > 0, || "at least 1".into(), candidates)?;
    require("top_k", (1..=candidates).contains(&top_k), || format!("1 to {candidates}"), top_k)?;
    require("capacity", capacity > 0, || "at least 1".into(), capacity)?;
    require("tokens_per_group", tokens_per_group > 0, || "at least 1".into(), tokens_per_group)?;
    require("top_k", rule.second == SecondExpert::Always || top_k == 2, || "2 with a policy".into(), top_k)?;
    require("ids", ids.len().is_multiple_of(candidates), || format!("rows of {candidates}"), ids.len())?;
    let tokens = ids.len() / candidates;
    require_shape("weights", weights, &[tokens, candidates])?;
    if let Some(priority) = priority {
        require_shape("priority", priority, &[tokens])?;
    }

    let mut got = vec![None; tokens * top_k];
    let (groups, alternate) = (tokens.div_ceil(tokens_per_group), rule.groups == Sequences::Alternating);
    let whole = !alternate || tokens.is_multiple_of(tokens_per_group);
    require("tokens_per_group", whole, || format!("a divisor of {tokens}"), tokens_per_group)?;
    let group_of = |t: usize| if alternate { t % groups } else { t / tokens_per_group };
    for number in 0..groups {
        let mut group: Vec<usize> = (0..tokens).filter(|&t| group_of(t) == number).collect();
        if rule.prioritised {
            let of = |t: usize| f64::from(priority.map_or(weights[t * candidates], |priority| priority[t]));
            group.sort_by(|&a, &b| descending(of(a), of(b)));
        }
        let turns: Vec<(usize, usize)> = match rule.order {
            Order::ByToken => group.iter().flat_map(|&t| (0..candidates).map(move |j| (t, j))).collect(),
            Order::ByChoice => (0..candidates).flat_map(|j| group.iter().map(move |&t| (t, j))).collect(),
        };
        let mut taken = vec![0; experts];
        let mut places = vec![0; tokens];
        for (t, choice) in turns {
            let place = if top_k == candidates { choice } else { places[t] };
            let slot = t * candidates + choice;
            let Some(expert) = usize::try_from(ids[slot]).ok().filter(|&id| id < experts) else { continue };
            if place < wanted(t, weights, rule) && taken[expert] < capacity {
                taken[expert] += 1;
                places[t] += 1;
                got[t * top_k + place] = Some(slot);
            }
        }
    }
    Ok(got)
}

/// Divides what a token got by its sum, in f32; weights of 0 stay 0.
fn divide(weights: &mut [f32], renormalise: Renormalise) -> Result<(), ReferenceError> {
    let sum: f32 = weights.iter().sum();
    let divisor = match renormalise {
        Renormalise::Plus(epsilon) => sum + epsilon,
        Renormalise::AtLeast(epsilon) if sum < epsilon => epsilon,
        Renormalise::AtLeast(_) => sum,
        Renormalise::PNorm(_) => return require("renormalise", false, || "a sum".into(), "a p-norm"),
    };
    weights.iter_mut().filter(|weight| **weight != 0.0).for_each(|weight| *weight /= divisor);
    Ok(())
}

/// Experts that the token asks for: its second one only if the policy has it so.
fn wanted(t: usize, weights: &[f32], rule: &AdmissionRule) -> usize {
    let second = || weights[t * rule.candidates + 1];
    let two = match rule.second {
        SecondExpert::Always => return rule.top_k,
        SecondExpert::Above(threshold) => second() > threshold,
        SecondExpert::Random { threshold, noise } => second() > threshold * uniform(noise.gate_word(2, t as u32, 0)),
    };
    if two { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::NoiseSource;

    fn rule() -> AdmissionRule {
        AdmissionRule {
            experts: 3,
            candidates: 2,
            top_k: 2,
            capacity: 1,
            tokens_per_group: 2,
            groups: Sequences::Following,
            order: Order::ByToken,
            prioritised: false,
            second: SecondExpert::Always,
            renormalise: None,
        }
    }

    const IDS: [i32; 4] = [0, 1, 1, 2];
    const WEIGHTS: [f32; 4] = [0.6, 0.4, 0.9, 0.1];

    fn ids(rule: AdmissionRule) -> Vec<i32> {
        admit(&IDS, &WEIGHTS, None, &rule).unwrap().ids
    }

    #[test]
    fn first_choices_come_before_second_ones() {
        assert_eq!(ids(rule()), [0, 1, -1, 2]);
        let got = admit(&IDS, &WEIGHTS, None, &AdmissionRule { order: Order::ByChoice, ..rule() }).unwrap();
        assert_eq!(got.ids, [0, -1, 1, 2]);
        assert_eq!(got.weights, [0.6, 0.0, 0.9, 0.1]);
    }

    #[test]
    fn capacity_counts_anew_in_each_group() {
        assert_eq!(ids(AdmissionRule { tokens_per_group: 1, ..rule() }), IDS);
    }

    #[test]
    fn groups_may_alternate() {
        // Four tokens want one expert, which takes one of each group: of [0, 1] and [2, 3], or of [0, 2] and [1, 3].
        let rule = AdmissionRule { experts: 1, candidates: 1, top_k: 1, ..rule() };
        let got = |rule| admit(&[0; 4], &[0.5; 4], None, &rule).unwrap().ids;
        assert_eq!(got(rule), [0, -1, 0, -1]);
        let alternate = AdmissionRule { groups: Sequences::Alternating, ..rule };
        assert_eq!(got(alternate), [0, 0, -1, -1]);
        assert!(admit(&[0; 3], &[0.5; 3], None, &alternate).is_err(), "not of whole groups");
    }

    #[test]
    fn the_best_token_is_served_first() {
        assert_eq!(ids(AdmissionRule { prioritised: true, ..rule() }), [0, -1, 1, 2]);
        let priority = [2.0, f32::NAN];
        let got = admit(&IDS, &WEIGHTS, Some(&priority), &AdmissionRule { prioritised: true, ..rule() }).unwrap();
        assert_eq!(got.ids, [0, 1, -1, 2]);
    }

    #[test]
    fn a_full_expert_passes_the_token_on() {
        let rule = AdmissionRule { top_k: 1, order: Order::ByChoice, ..rule() };
        let got = admit(&[0, 1, 0, 2], &WEIGHTS, None, &rule).unwrap();
        assert_eq!((got.ids, got.weights), (vec![0, 2], vec![0.6, 0.1]));
    }

    #[test]
    fn a_second_expert_must_weigh_enough() {
        assert_eq!(
            ids(AdmissionRule { second: SecondExpert::Above(0.3), tokens_per_group: 1, ..rule() }),
            [0, 1, 1, -1]
        );
        let certain = SecondExpert::Random { threshold: 0.0, noise: NoiseSource { seed: 1, offset: 2 } };
        assert_eq!(ids(AdmissionRule { second: certain, tokens_per_group: 1, ..rule() }), IDS);
    }

    #[test]
    fn what_is_left_adds_up_to_one() {
        let rule = AdmissionRule { order: Order::ByChoice, renormalise: Some(Renormalise::AtLeast(0.75)), ..rule() };
        let got = admit(&IDS, &[0.6, 0.4, 1.5, 0.5], None, &rule).unwrap();
        assert_eq!((got.ids, got.weights), (vec![0, -1, 1, 2], vec![0.6 / 0.75, 0.0, 0.75, 0.25]));
        let nothing =
            admit(&[-1, 3, 0, 1], &WEIGHTS, None, &AdmissionRule { renormalise: Some(Renormalise::Plus(0.0)), ..rule });
        assert_eq!(nothing.unwrap().weights, [0.0, 0.0, 0.9, 0.1]);
    }

    #[test]
    fn a_policy_without_a_second_expert_is_an_error() {
        let rule = AdmissionRule { top_k: 1, second: SecondExpert::Above(0.3), ..rule() };
        assert_eq!(admit(&IDS, &WEIGHTS, None, &rule).unwrap_err().argument, "top_k");
    }
}
