//! TransformerEngine's permutations back: of `permute` a sum of each token's rows, of `unpermute` rows of `dy` by their probabilities, and the
//! probabilities' own gradients.

use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::permute::Unfilled;

use crate::calls;
use crate::close::{assert_norm, assert_rounded};
use crate::data::{probabilities, random_ids, rng, values, wide, wide32, with_type};
use crate::formulas::sorted_slots;
use crate::suite::{Section, product};
use crate::support::compare::Storage;

const TOKENS: usize = 96;
const HIDDEN: usize = 64;

/// The grid of the forward half by ids: cut to some rows, with gaps behind every expert, with probabilities or without.
pub fn permutation() -> Section {
    let mut section = Section::new("permutation_backward");
    for dtype in Dtype::ALL {
        let mut shapes = vec![];
        for ((experts, top_k), (rows, multiple)) in
            product(&product(&[7, 16], &[2, 5]), &[(None, 1), (Some(47), 1), (None, 16)])
        {
            shapes.push(([TOKENS, experts, top_k], rows, multiple, true));
        }
        shapes.push(([0, 8, 2], Some(0), 1, true));
        shapes.push(([TOKENS, 7, 1], None, 1, false));
        shapes.push(([TOKENS, 16, 1], None, 1, false));
        for (shape, rows, multiple, weighted) in shapes {
            let [tokens, experts, top_k] = shape;
            let name = format!(
                "{dtype} n={tokens} e={experts} topk={top_k} rows={rows:?} multiple={multiple} probs={weighted}"
            );
            let point = name.clone();
            section.point(name, move || with_type!(dtype, T => check::<T>(&point, shape, rows, multiple, weighted)));
        }
    }
    section
}

fn check<T: Storage>(
    name: &str,
    [tokens, experts, top_k]: [usize; 3],
    rows: Option<usize>,
    multiple: usize,
    weighted: bool,
) {
    let rng = &mut rng(name);
    let ids = random_ids(rng, tokens, experts, top_k);
    let probs = probabilities(rng, tokens, top_k);
    let desc = DispatchDesc::new(tokens, experts, top_k, 16).max_rows(rows).row_multiple(multiple);
    let sorted = calls::sort(&ids, Some(&probs), &desc);
    // The slot of each row; none in a gap.
    let mut slots: Vec<Option<usize>> = vec![];
    let all = sorted_slots(&ids, experts);
    for e in 0..experts as i32 {
        slots.extend(all.iter().copied().filter(|&slot| ids[slot] == e).map(Some));
        slots.resize(slots.len().next_multiple_of(multiple), None);
    }
    slots.truncate(rows.unwrap_or(usize::MAX));
    assert_eq!(sorted.rows(), slots.len());

    // Of `permute`: rows of any gradient; what stands in gaps is no number.
    let mut d_rows: Vec<T> = values(rng, slots.len() * HIDDEN);
    for (row, slot) in d_rows.chunks_mut(HIDDEN).zip(&slots) {
        if slot.is_none() {
            row.fill(T::from_f64(f64::NAN));
        }
    }
    let d_x = sorted.unpermute(&d_rows, None, HIDDEN);
    let mut want = vec![0.0; tokens * HIDDEN];
    for (row, slot) in wide(&d_rows).chunks(HIDDEN).zip(&slots) {
        let Some(slot) = slot else { continue };
        want[slot / top_k * HIDDEN..][..HIDDEN].iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    }
    assert_rounded(&wide(&d_x), &want, T::DTYPE);

    // Of `unpermute`.
    let dy: Vec<T> = values(rng, tokens * HIDDEN);
    let permuted = sorted.permute(&values::<T>(rng, tokens * HIDDEN), HIDDEN, Unfilled::ZeroGaps);
    let (d_permuted, d_probs) = sorted.unpermute_backward(&permuted, &dy, weighted, HIDDEN);
    let (mut want, mut want_probs) = (vec![], vec![]);
    for (row, slot) in wide(&permuted).chunks(HIDDEN).zip(&slots) {
        let Some(slot) = *slot else {
            want.extend([0.0; HIDDEN]);
            want_probs.push(0.0);
            continue;
        };
        let dy = wide(&dy[slot / top_k * HIDDEN..][..HIDDEN]);
        let weight = if weighted { f64::from(probs[slot]) } else { 1.0 };
        want.extend(dy.iter().map(|d| weight * d));
        want_probs.push(dy.iter().zip(row).map(|(d, v)| d * v).sum());
    }
    assert_rounded(&wide(&d_permuted), &want, T::DTYPE);
    if weighted {
        assert_norm(&wide32(&d_probs), &want_probs, 4e-6);
    }
}
