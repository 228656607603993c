//! BASE layers: a balanced assignment of tokens to experts.
//!
//! Lewis et al. 2021, "BASE Layers: Simplifying Training of Large, Sparse Models" (arXiv:2103.16716), "Assignment During
//! Training":
//!
//! maximise `sum_t s[t, a_t]` over assignments `a` in which each of the E experts gets exactly `T/E` tokens.
//!
//! The assignment is found by an auction (Bertsekas 1992, "Auction algorithms for network flow problems"): experts have a price,
//! tokens bid for the expert they gain most from, and experts keep the T/E highest bids.
//!
//! That is for training. "Assignment During Testing" sends each token to the expert of its largest score, with the same gate: gating with
//! [`crate::rules::Score::Sigmoid`], `top_k` 1.

use super::activation::sigmoid;
use super::{ReferenceError, require};
use crate::rules::AuctionRule;
use crate::rules::units;

/// A balanced assignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// `[T]`.
    pub ids: Vec<i32>,
    /// Rounds of bidding.
    pub rounds: u32,
    /// Whether the auction ended within its limit, so that the bound of `epsilon` holds.
    pub converged: bool,
}

/// Largest magnitude of a score, in units.
const LIMIT: f32 = (1 << 29) as f32;
/// Most that a bid raises a price, in units.
const MOST: i64 = 1 << 31;

/// The score in units, to nearest even; NaN is the least that a score can be.
pub fn quantise(score: f32, units: f32) -> i64 {
    if score.is_nan() {
        return -(LIMIT as i64);
    }
    (score * units).clamp(-LIMIT, LIMIT).round_ties_even() as i64
}

/// The auction over `scores [T,E]`.
///
/// All unassigned tokens bid at once (Jacobi): a token raises the price of its best expert by what it gains there over the
/// next best, and by the step. An expert keeps its `T/E` highest bids, of equal ones the lower token's, and its price is the lowest
/// bid that it keeps once it is full. The step falls from an eighth of the largest score to one unit, by fours; prices are kept from
/// one step to the next, assignments are not (epsilon scaling). All arithmetic is on integers, so that the result does not
/// depend on who computes it.
///
/// Scores beyond `2^29` units count as that.
///
/// # Errors
/// Lengths that do not fit, tokens that the experts do not divide, an epsilon that is not positive and finite.
pub fn auction(scores: &[f32], rule: &AuctionRule) -> Result<Assigned, ReferenceError> {
    let (tokens, places) = shape(scores, rule.experts)?;
    require("epsilon", rule.epsilon > 0.0 && rule.epsilon.is_finite(), || "a positive number".into(), rule.epsilon)?;
    let experts = rule.experts;
    let units = units(rule.epsilon);
    let values: Vec<i64> = scores.iter().map(|&score| quantise(score, units)).collect();
    let largest = values.iter().map(|value| value.abs()).max().unwrap_or(0);

    let mut price = vec![0i64; experts];
    let mut owner = vec![-1i32; tokens];
    let mut bid = vec![0i64; tokens];
    let (mut step, mut rounds) = ((largest / 8).max(1), 0);
    loop {
        // One round: bids at the prices of its beginning.
        let bidders: Vec<usize> = (0..tokens).filter(|&t| owner[t] < 0).collect();
        if bidders.is_empty() {
            if step == 1 {
                return Ok(Assigned { ids: owner, rounds, converged: true });
            }
            if rounds == rule.max_rounds {
                break;
            }
            step = (step / 4).max(1);
            owner.fill(-1);
            continue;
        }
        if rounds == rule.max_rounds {
            break;
        }
        rounds += 1;
        for &t in &bidders {
            let gain = |e: usize| values[t * experts + e] - price[e];
            let best = (0..experts).max_by_key(|&e| (gain(e), std::cmp::Reverse(e))).unwrap_or(0);
            let next = (0..experts).filter(|&e| e != best).map(gain).max();
            let raise = next.map_or(0, |next| gain(best) - next) + step;
            owner[t] = best as i32;
            bid[t] = price[best] + raise.min(MOST);
        }
        for (e, price) in price.iter_mut().enumerate() {
            let mut bids: Vec<usize> = (0..tokens).filter(|&t| owner[t] == e as i32).collect();
            bids.sort_by_key(|&t| std::cmp::Reverse(bid[t]));
            bids.iter().skip(places).for_each(|&t| owner[t] = -1);
            if bids.len() >= places {
                *price = bid[bids[places - 1]];
            }
        }
    }
    let mut room: Vec<usize> =
        (0..experts).map(|e| places - owner.iter().filter(|&&of| of == e as i32).count()).collect();
    let mut expert = 0;
    for owner in owner.iter_mut().filter(|owner| **owner < 0) {
        while room[expert] == 0 {
            expert += 1;
        }
        *owner = expert as i32;
        room[expert] -= 1;
    }
    Ok(Assigned { ids: owner, rounds, converged: false })
}

/// `weights[t] = sigmoid(s[t, ids[t]])`, the gate on the expert's output ("Parameterization"); 0 for an id that is no expert.
///
/// # Errors
/// Lengths that do not fit.
pub fn weights(scores: &[f32], ids: &[i32], experts: usize) -> Result<Vec<f64>, ReferenceError> {
    super::require_shape("scores", scores, &[ids.len(), experts])?;
    let of = |(t, &id): (usize, &i32)| {
        let id = usize::try_from(id).ok().filter(|&id| id < experts);
        id.map_or(0.0, |id| sigmoid(f64::from(scores[t * experts + id])))
    };
    Ok(ids.iter().enumerate().map(of).collect())
}

/// The best sum of scores of any balanced assignment, by the Hungarian method (Kuhn 1955, with potentials) over T/E copies of
/// each expert: `O(T^3)`, for small T. Scores must be finite.
///
/// # Errors
/// Lengths that do not fit, tokens that the experts do not divide.
pub fn optimum(scores: &[f32], experts: usize) -> Result<f64, ReferenceError> {
    let (tokens, places) = shape(scores, experts)?;
    let cost = |row: usize, column: usize| -f64::from(scores[row * experts + column / places]);
    // Rows and columns count from 1; column 0 holds the row that is being placed.
    let (mut row_potential, mut potential) = (vec![0.0; tokens + 1], vec![0.0; tokens + 1]);
    let mut row_of = vec![0; tokens + 1];
    for row in 1..=tokens {
        row_of[0] = row;
        let mut least = vec![f64::INFINITY; tokens + 1];
        let mut from = vec![0; tokens + 1];
        let mut seen = vec![false; tokens + 1];
        let mut column = 0;
        while row_of[column] != 0 {
            seen[column] = true;
            let current = row_of[column];
            let (mut delta, mut nearest) = (f64::INFINITY, 0);
            for c in (1..=tokens).filter(|&c| !seen[c]) {
                let reduced = cost(current - 1, c - 1) - row_potential[current] - potential[c];
                if reduced < least[c] {
                    (least[c], from[c]) = (reduced, column);
                }
                if least[c] < delta {
                    (delta, nearest) = (least[c], c);
                }
            }
            for c in 0..=tokens {
                if seen[c] {
                    row_potential[row_of[c]] += delta;
                    potential[c] -= delta;
                } else {
                    least[c] -= delta;
                }
            }
            column = nearest;
        }
        while column != 0 {
            row_of[column] = row_of[from[column]];
            column = from[column];
        }
    }
    Ok((1..=tokens).map(|column| -cost(row_of[column] - 1, column - 1)).sum())
}

/// Tokens, and places of each expert.
fn shape(scores: &[f32], experts: usize) -> Result<(usize, usize), ReferenceError> {
    require("experts", experts > 0, || "at least 1".into(), experts)?;
    require("scores", scores.len().is_multiple_of(experts), || format!("rows of {experts}"), scores.len())?;
    let tokens = scores.len() / experts;
    require("tokens", tokens.is_multiple_of(experts), || format!("a multiple of {experts}"), tokens)?;
    Ok((tokens, tokens / experts))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(experts: usize, epsilon: f32) -> AuctionRule {
        AuctionRule { experts, epsilon, max_rounds: 1 << 20 }
    }

    fn noise(count: usize, mut state: u64) -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..count).map(|_| 4.0 * next() - 2.0).collect()
    }

    /// Best sum over all assignments, one by one.
    fn brute(scores: &[f32], experts: usize, t: usize, room: &mut [usize]) -> f64 {
        if t * experts == scores.len() {
            return 0.0;
        }
        let mut best = f64::NEG_INFINITY;
        for e in 0..experts {
            if room[e] > 0 {
                room[e] -= 1;
                best = best.max(f64::from(scores[t * experts + e]) + brute(scores, experts, t + 1, room));
                room[e] += 1;
            }
        }
        best
    }

    #[test]
    fn the_optimum_is_that_of_all_assignments() {
        for (seed, (tokens, experts)) in [(8, 2), (6, 3), (9, 3), (4, 4), (3, 1)].into_iter().enumerate() {
            let scores = noise(tokens * experts, seed as u64);
            let best = brute(&scores, experts, 0, &mut vec![tokens / experts; experts]);
            assert!((optimum(&scores, experts).unwrap() - best).abs() < 1e-9);
        }
    }

    #[test]
    fn auctions_are_balanced_and_near_the_optimum() {
        for (seed, (tokens, experts)) in [(64, 8), (60, 5), (12, 12), (5, 1), (48, 3)].into_iter().enumerate() {
            for epsilon in [0.5f32, 1e-2, 1e-5] {
                // Skewed: the first expert is everybody's favourite.
                let mut scores = noise(tokens * experts, seed as u64);
                scores.iter_mut().step_by(experts).for_each(|score| *score += 3.0);
                let got = auction(&scores, &rule(experts, epsilon)).unwrap();
                assert!(got.converged);
                let sum: f64 = (0..tokens).map(|t| f64::from(scores[t * experts + got.ids[t] as usize])).sum();
                let best = optimum(&scores, experts).unwrap();
                assert!(sum >= best - tokens as f64 * f64::from(epsilon), "{sum} of {best}");
                for e in 0..experts {
                    assert_eq!(got.ids.iter().filter(|&&id| id == e as i32).count(), tokens / experts);
                }
            }
        }
    }

    #[test]
    fn equal_and_meaningless_scores_end_too() {
        for score in [0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let got = auction(&[score; 64], &rule(4, 0.01)).unwrap();
            assert!(got.converged);
            assert_eq!((0..4).map(|e| got.ids.iter().filter(|&&id| id == e).count()).collect::<Vec<_>>(), [4; 4]);
        }
    }

    #[test]
    fn a_limit_of_rounds_still_balances() {
        let got = auction(&[1.0, 0.0, 1.0, 0.0], &AuctionRule { max_rounds: 0, ..rule(2, 0.1) }).unwrap();
        assert_eq!((got.ids, got.converged), (vec![0, 1], false));
    }

    #[test]
    fn units_are_fine_enough() {
        for epsilon in [1.0f32, 0.3, 1e-3, 1e-6, 7.0] {
            let unit = 1.0 / f64::from(units(epsilon));
            assert!(unit <= f64::from(epsilon) / 2.0 && unit > f64::from(epsilon) / 4.0 - 1e-30);
        }
    }
}
