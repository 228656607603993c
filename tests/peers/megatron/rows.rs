//! Maps of experts to ids and back, and rows under a capacity.

use half::bf16;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::permute::Unfilled;
use moe_kernels::rules::Capacity;

use super::{Form, logits};
use crate::calls;
use crate::data::{rng, values};
use crate::formulas::bincount;
use crate::suite::{Section, product};

/// Ids of which two are experts and the others -1, to a map of the local experts with probabilities.
pub fn multihot() -> Section {
    let mut section = Section::new("multihot");
    for (tokens, top_k) in product(&[3, 5, 8, 128, 512], &[2, 4, 6, 7, 8]) {
        for experts in [4, 7, 8, 12, 20, 30, 31, 32] {
            let name = format!("n={tokens} topk={top_k} e={experts}");
            let point = name.clone();
            section.point(name, move || {
                let rng = &mut rng(&point);
                let (mut ids, mut probs) = (vec![-1; tokens * top_k], vec![0.0; tokens * top_k]);
                let (mut map, mut want) = (vec![0; tokens * experts], vec![0.0; tokens * experts]);
                for t in 0..tokens {
                    let first = rng.usize(..top_k);
                    let places = [first, (first + rng.usize(1..top_k)) % top_k];
                    let expert = rng.usize(..experts);
                    let experts_of = [expert, (expert + rng.usize(1..experts)) % experts];
                    for (j, e) in places.into_iter().zip(experts_of) {
                        let p = rng.f32();
                        (ids[t * top_k + j], probs[t * top_k + j]) = (e as i32, p);
                        (map[t * experts + e], want[t * experts + e]) = (1, p);
                    }
                }
                let (got_map, got) = calls::ids_to_map(&ids, &probs, experts, top_k);
                assert_eq!(got_map, map);
                assert_eq!(got, want);
                // And back: the same experts, by rising number.
                let (back, over) = calls::map_to_ids(&got_map, &got, experts, top_k);
                assert_eq!(over, 0);
                assert_eq!(bincount(&back.ids, experts), bincount(&ids, experts));
                let again = calls::ids_to_map(&back.ids, &back.weights, experts, top_k);
                assert_eq!(again, (map, want));
            });
        }
    }
    section
}

/// Experts that take as many tokens as a factor of an even load, and drop the last or those of the smallest weight; rows padded to that or not.
pub fn token_dropping() -> Section {
    let mut section = Section::new("token_dropping");
    for (by_weight, (factor, padded)) in product(
        &[false, true],
        &[(None, false), (Some(1.0), false), (Some(1.0), true), (Some(2.0), false), (Some(2.0), true)],
    ) {
        let policy = if by_weight { "probs" } else { "position" };
        section
            .point(format!("{policy} factor={factor:?} pad={padded}"), move || drop_point(by_weight, factor, padded));
    }
    section
}

fn drop_point(by_weight: bool, factor: Option<f64>, padded: bool) {
    let (tokens, experts, top_k) = (32, 4, 2);
    let rng = &mut rng("token_dropping");
    let logits = logits(rng, tokens, experts);
    let chosen = calls::gate(&logits, experts, top_k, Form::After.rule(), None);
    let capacity = factor.map(|factor: f64| (factor * (tokens * top_k) as f64 / experts as f64).ceil() as usize);
    let kept = match capacity {
        Some(capacity) if by_weight => calls::keep_largest(&chosen, experts, top_k, capacity),
        _ => chosen.clone(),
    };
    let of = capacity.map(|capacity| Capacity::new(capacity, tokens).padded(padded));
    let desc = DispatchDesc::new(tokens, experts, top_k, 16).capacity(of);
    let sorted = calls::sort(&kept.ids, Some(&kept.weights), &desc);
    let x: Vec<bf16> = values(rng, tokens * 16);
    let moved = sorted.permute(&x, 16, Unfilled::ZeroGaps);
    let (mut expected, mut counts) = (vec![], vec![]);
    for e in 0..experts {
        let of = |t: usize| chosen.ids[t * top_k..][..top_k].iter().position(|&id| id == e as i32);
        let mut slots: Vec<usize> = (0..tokens).filter_map(|t| Some(t * top_k + of(t)?)).collect();
        if by_weight {
            slots.sort_by(|&a, &b| chosen.weights[b].total_cmp(&chosen.weights[a]).then(a.cmp(&b)));
        }
        slots.truncate(capacity.unwrap_or(tokens));
        slots.sort_unstable();
        counts.push(slots.len() as i32);
        let mut rows: Vec<bf16> = slots.iter().flat_map(|&s| x[s / top_k * 16..][..16].to_vec()).collect();
        if padded {
            rows.resize(capacity.unwrap() * 16, bf16::ZERO);
        }
        expected.extend(rows);
    }
    assert_eq!(sorted.counts(), counts);
    assert!(moved == expected, "rows of experts");
}
