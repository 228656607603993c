//! Permutations by ids and by maps, with padding, and chunks.

use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::permute::Unfilled;

use crate::calls::{self, Sorted};
use crate::close::assert_rounded;
use crate::data::{probabilities, random_ids, rng, values, wide, wide32, with_type};
use crate::formulas::sorted_slots;
use crate::suite::{Section, product};
use crate::support::compare::Storage;

const TOKENS: usize = 96;
const HIDDEN: usize = 64;
const ROWS: usize = 47;

/// Sum of each token's rows, weighted, in f64.
fn unpermuted(rows: &[f64], slots: &[usize], weights: &[f64], top_k: usize, tokens: usize, width: usize) -> Vec<f64> {
    let mut y = vec![0.0; tokens * width];
    for (row, &slot) in slots.iter().enumerate() {
        let to = &mut y[slot / top_k * width..][..width];
        to.iter_mut().zip(&rows[row * width..]).for_each(|(y, v)| *y += weights[slot] * v);
    }
    y
}

/// `argsort` of ids, cut to the output rows; back with probabilities or without.
pub fn index_map() -> Section {
    let mut section = Section::new("index_map");
    let mut add = |dtype: Dtype, tokens: usize, experts: usize, top_k: usize, rows: Option<usize>, weighted: bool| {
        let name = format!("{dtype} n={tokens} e={experts} topk={top_k} rows={rows:?} probs={weighted}");
        let point = name.clone();
        section.point(
            name,
            move || with_type!(dtype, T => index_map_point::<T>(&point, [tokens, experts, top_k], rows, weighted)),
        );
    };
    for dtype in Dtype::ALL {
        for (experts, top_k) in product(&[7, 16], &[2, 5]) {
            add(dtype, TOKENS, experts, top_k, None, true);
            add(dtype, TOKENS, experts, top_k, Some(ROWS), true);
        }
        add(dtype, 0, 8, 2, Some(0), true);
        add(dtype, TOKENS, 7, 1, None, false);
        add(dtype, TOKENS, 16, 1, None, false);
    }
    section
}

fn index_map_point<T: Storage>(name: &str, [tokens, experts, top_k]: [usize; 3], rows: Option<usize>, weighted: bool) {
    let rng = &mut rng(name);
    let x: Vec<T> = values(rng, tokens * HIDDEN);
    let ids = random_ids(rng, tokens, experts, top_k);
    let probs = probabilities(rng, tokens, top_k);
    let desc = DispatchDesc::new(tokens, experts, top_k, 16).max_rows(rows);
    let sorted = calls::sort(&ids, Some(&probs), &desc);
    let mut slots = sorted_slots(&ids, experts);
    let all = slots.len();
    slots.truncate(rows.unwrap_or(all));
    assert_eq!(sorted.dropped as usize, all - slots.len(), "dropped");
    let got = sorted.permute(&x, HIDDEN, Unfilled::Keep);
    let want: Vec<T> = slots.iter().flat_map(|&s| x[s / top_k * HIDDEN..][..HIDDEN].to_vec()).collect();
    assert!(got == want, "permuted rows");
    let weights = if weighted { wide32(&probs) } else { vec![1.0; ids.len()] };
    let back = sorted.unpermute(&got, weighted.then_some(&probs[..]), HIDDEN);
    assert_rounded(&wide(&back), &unpermuted(&wide(&got), &slots, &weights, top_k, tokens, HIDDEN), T::DTYPE);
}

/// A routing map with `ones` experts in all, wherever they fall: tokens have none, one or many.
fn random_map(rng: &mut fastrand::Rng, tokens: usize, experts: usize, ones: usize) -> Vec<u8> {
    let mut map = vec![0; tokens * experts];
    map[..ones].fill(1);
    rng.shuffle(&mut map);
    map
}

/// The map's experts as ids, and their rows; the map's columns one after the other are the order of the rows.
struct Mapped {
    sorted: Sorted,
    probs: Vec<f32>,
    /// Token and expert of each row.
    rows: Vec<[usize; 2]>,
}

fn sort_map(
    map: &[u8],
    probs: &[f32],
    tokens: usize,
    experts: usize,
    desc: impl Fn(DispatchDesc) -> DispatchDesc,
) -> Mapped {
    // As many ids as the fullest token has, which a framework knows a bound of.
    let top_k = experts.min(32);
    let (chosen, over) = calls::map_to_ids(map, probs, experts, top_k);
    assert_eq!(over, 0, "experts without a place");
    let sorted = calls::sort(&chosen.ids, Some(&chosen.weights), &desc(DispatchDesc::new(tokens, experts, top_k, 16)));
    let rows = (0..experts).flat_map(|e| (0..tokens).filter(move |t| map[t * experts + e] != 0).map(move |t| [t, e]));
    Mapped { sorted, probs: chosen.weights, rows: rows.collect() }
}

fn gathered<T: Storage>(x: &[T], rows: &[[usize; 2]], width: usize) -> Vec<T> {
    rows.iter().flat_map(|&[t, _]| x[t * width..][..width].to_vec()).collect()
}

/// Each token's sum over its rows, weighted by the map's probabilities or not.
fn back<T: Storage>(
    rows: &[T],
    of: &[[usize; 2]],
    weight: impl Fn([usize; 2]) -> f64,
    tokens: usize,
    width: usize,
) -> Vec<f64> {
    let mut y = vec![0.0; tokens * width];
    for (row, &[t, e]) in rows.chunks(width).zip(of) {
        let weight = weight([t, e]);
        y[t * width..][..width].iter_mut().zip(row).for_each(|(y, &v)| *y += weight * v.into());
    }
    y
}

pub fn mask_map() -> Section {
    let mut section = Section::new("mask_map");
    let mut add = |dtype: Dtype, tokens: usize, experts: usize, top_k: usize, rows: Option<usize>, weighted: bool| {
        let name = format!("{dtype} n={tokens} e={experts} topk={top_k} rows={rows:?} probs={weighted}");
        let point = name.clone();
        section.point(
            name,
            move || with_type!(dtype, T => mask_map_point::<T>(&point, [tokens, experts, top_k], rows, weighted)),
        );
    };
    for dtype in Dtype::ALL {
        for (experts, top_k) in product(&[7, 16], &[2, 5]) {
            add(dtype, TOKENS, experts, top_k, None, true);
            add(dtype, TOKENS, experts, top_k, Some(ROWS), true);
        }
        add(dtype, 0, 8, 2, Some(0), true);
        add(dtype, TOKENS, 7, 1, None, false);
        add(dtype, TOKENS, 16, 1, None, false);
    }
    section.refuse(64, "8-bit rows with scales: quantised types come with their products");
    section
}

fn mask_map_point<T: Storage>(name: &str, [tokens, experts, top_k]: [usize; 3], rows: Option<usize>, weighted: bool) {
    let rng = &mut rng(name);
    let x: Vec<T> = values(rng, tokens * HIDDEN);
    let map = random_map(rng, tokens, experts, rows.unwrap_or(tokens * top_k));
    let probs: Vec<f32> = map.iter().map(|&cell| if cell != 0 { rng.f32() } else { 0.0 }).collect();
    let mapped = sort_map(&map, &probs, tokens, experts, |desc| desc);
    let got = mapped.sorted.permute(&x, HIDDEN, Unfilled::Keep);
    assert!(got == gathered(&x, &mapped.rows, HIDDEN), "permuted rows");
    let moved: Vec<f32> = mapped.rows.iter().map(|&[t, e]| probs[t * experts + e]).collect();
    assert_eq!(mapped.sorted.slot_weight(), moved, "permuted probabilities");
    let weight = |[t, e]: [usize; 2]| if weighted { f64::from(probs[t * experts + e]) } else { 1.0 };
    let y = mapped.sorted.unpermute(&got, weighted.then_some(&mapped.probs[..]), HIDDEN);
    assert_rounded(&wide(&y), &back(&got, &mapped.rows, weight, tokens, HIDDEN), T::DTYPE);
}

/// 17 rows fewer than the map has: those past the last are dropped, in the rows and in the sums.
pub fn capacity_drop() -> Section {
    let mut section = Section::new("capacity_drop");
    for dtype in Dtype::ALL {
        section.point(format!("{dtype}"), move || with_type!(dtype, T => capacity_drop_point::<T>()));
    }
    section
}

fn capacity_drop_point<T: Storage>() {
    let (tokens, experts, width) = (64, 8, 128);
    let rng = &mut rng("capacity_drop");
    let map: Vec<u8> = (0..tokens * experts).map(|_| rng.bool().into()).collect();
    let x: Vec<T> = values(rng, tokens * width);
    let all: usize = map.iter().map(|&cell| cell as usize).sum();
    let kept = all - 17;
    let mapped = sort_map(&map, &vec![1.0; map.len()], tokens, experts, |desc| desc.max_rows(Some(kept)));
    assert_eq!((mapped.sorted.dropped, mapped.sorted.rows()), (17, kept));
    assert_eq!(mapped.sorted.counts().iter().sum::<i32>() as usize, kept);
    let rows = &mapped.rows[..kept];
    let got = mapped.sorted.permute(&x, width, Unfilled::Keep);
    assert!(got == gathered(&x, rows, width), "permuted rows");
    let y = mapped.sorted.unpermute(&got, None, width);
    assert_rounded(&wide(&y), &back(&got, rows, |_| 1.0, tokens, width), T::DTYPE);
}

/// Rows of each expert on multiples of 16, gaps zero; sums with probabilities merged and without.
pub fn padding() -> Section {
    let mut section = Section::new("padding");
    const SHAPES: [[usize; 3]; 4] = [[8, 24, 2], [64, 64, 6], [256, 112, 6], [512, 144, 8]];
    for (dtype, [experts, width, top_k]) in product(&Dtype::ALL, &SHAPES) {
        // Without and with merged probabilities, and once more where both gaps and probabilities go back.
        for what in ["plain", "merged", "padded and merged"] {
            let name = format!("{dtype} e={experts} hidden={width} topk={top_k} {what}");
            let point = name.clone();
            section.point(
                name,
                move || with_type!(dtype, T => padding_point::<T>(&point, [experts, width, top_k], what != "plain")),
            );
        }
    }
    section
}

fn padding_point<T: Storage>(name: &str, [experts, width, top_k]: [usize; 3], merged: bool) {
    let (tokens, multiple) = (TOKENS, 16);
    let rng = &mut rng(name);
    let x: Vec<T> = values(rng, tokens * width);
    let map = random_map(rng, tokens, experts, tokens * top_k);
    let probs: Vec<f32> = map.iter().map(|&cell| if cell != 0 { rng.f32() } else { 0.0 }).collect();
    let mapped = sort_map(&map, &probs, tokens, experts, |desc| desc.row_multiple(multiple));
    let got = mapped.sorted.permute(&x, width, Unfilled::ZeroGaps);
    let (mut want, mut want_probs) = (vec![], vec![]);
    for e in 0..experts {
        let rows: Vec<_> = mapped.rows.iter().filter(|row| row[1] == e).copied().collect();
        want.extend(gathered(&x, &rows, width));
        want_probs.extend(rows.iter().map(|&[t, e]| probs[t * experts + e]));
        let end = want_probs.len().next_multiple_of(multiple);
        want_probs.resize(end, 0.0);
        want.resize(end * width, T::from_f64(0.0));
    }
    assert!(got == want, "padded rows");
    assert_eq!(mapped.sorted.slot_weight(), want_probs, "padded probabilities");
    // What stands in gaps never reaches a sum.
    let mut poisoned = mapped.sorted.permute(&x, width, Unfilled::Keep);
    poisoned.iter_mut().zip(&want_probs).for_each(|_| ());
    let weight = |[t, e]: [usize; 2]| if merged { f64::from(probs[t * experts + e]) } else { 1.0 };
    let y = mapped.sorted.unpermute(&poisoned, merged.then_some(&mapped.probs[..]), width);
    let rows = gathered(&x, &mapped.rows, width);
    assert_rounded(&wide(&y), &back(&rows, &mapped.rows, weight, tokens, width), T::DTYPE);
}

/// Rows and probabilities permuted, sorted by chunks of `tp` times the experts, multiplied, and both ways back.
pub fn alongside_probs() -> Section {
    let mut section = Section::new("alongside_probs");
    let mut add = |dtype: Dtype, tokens: usize, experts: usize, top_k: usize, rows: Option<usize>, tp: usize| {
        let name = format!("{dtype} n={tokens} e={experts} topk={top_k} rows={rows:?} tp={tp}");
        let point = name.clone();
        section.point(
            name,
            move || with_type!(dtype, T => alongside_point::<T>(&point, [tokens, experts, top_k], rows, tp)),
        );
    };
    for dtype in Dtype::ALL {
        for (experts, top_k) in product(&[7, 16], &[2, 5]) {
            for (rows, tp) in product(&[None, Some(ROWS)], &[1, 2]) {
                add(dtype, TOKENS, experts, top_k, rows, tp);
            }
        }
        add(dtype, 0, 8, 2, Some(0), 2);
    }
    section
}

/// Sizes of `count` chunks of `rows` rows, some of them 0.
fn cut(rng: &mut fastrand::Rng, rows: usize, count: usize) -> Vec<i32> {
    let mut ends: Vec<usize> = (1..count).map(|_| rng.usize(..=rows)).chain([0, rows]).collect();
    ends.sort_unstable();
    ends.windows(2).map(|pair| (pair[1] - pair[0]) as i32).collect()
}

/// From rank by rank to expert by expert: `arange(experts * tp).reshape(-1, experts).T`.
fn interleaved(experts: usize, tp: usize) -> Vec<i32> {
    (0..experts).flat_map(|e| (0..tp).map(move |r| (r * experts + e) as i32)).collect()
}

fn inverse(order: &[i32]) -> Vec<i32> {
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, &chunk)| back[chunk as usize] = place as i32);
    back
}

fn alongside_point<T: Storage>(name: &str, [tokens, experts, top_k]: [usize; 3], rows: Option<usize>, tp: usize) {
    let rng = &mut rng(name);
    let x: Vec<T> = values(rng, tokens * HIDDEN);
    let map = random_map(rng, tokens, experts, rows.unwrap_or(tokens * top_k));
    let probs: Vec<f32> = map.iter().map(|&cell| if cell != 0 { rng.f32() } else { 0.0 }).collect();
    let mapped = sort_map(&map, &probs, tokens, experts, |desc| desc);
    let permuted = mapped.sorted.permute(&x, HIDDEN, Unfilled::Keep);
    let permuted_probs = mapped.sorted.slot_weight();
    let sizes = cut(rng, mapped.rows.len(), experts * tp);
    let order = interleaved(experts, tp);
    let (sorted_rows, new_sizes) = calls::sort_chunks(&permuted, HIDDEN, &sizes, &order);
    let (sorted_probs, _) = calls::sort_chunks(&permuted_probs, 1, &sizes, &order);
    assert!(sorted_rows == moved_chunks(&permuted, HIDDEN, &sizes, &order), "sorted rows");
    assert_eq!(sorted_probs, moved_chunks(&permuted_probs, 1, &sizes, &order), "sorted probabilities");
    let weighted: Vec<T> = sorted_rows
        .chunks(HIDDEN)
        .zip(&sorted_probs)
        .flat_map(|(row, &p)| row.iter().map(move |&v| T::from_f64(v.into() * f64::from(p))).collect::<Vec<_>>())
        .collect();
    let (restored, old_sizes) = calls::sort_chunks(&weighted, HIDDEN, &new_sizes, &inverse(&order));
    assert_eq!(old_sizes, sizes, "sizes there and back");
    let y = mapped.sorted.unpermute(&restored, None, HIDDEN);
    let own: Vec<T> = permuted
        .chunks(HIDDEN)
        .zip(&permuted_probs)
        .flat_map(|(row, &p)| row.iter().map(move |&v| T::from_f64(v.into() * f64::from(p))).collect::<Vec<_>>())
        .collect();
    assert!(restored == own, "chunks there and back");
    assert_rounded(&wide(&y), &back(&own, &mapped.rows, |_| 1.0, tokens, HIDDEN), T::DTYPE);
}

/// `cat([split(x, sizes)[i] for i in order])`.
fn moved_chunks<T: Copy>(x: &[T], width: usize, sizes: &[i32], order: &[i32]) -> Vec<T> {
    let first = |c: usize| sizes[..c].iter().sum::<i32>() as usize * width;
    order.iter().flat_map(|&c| x[first(c as usize)..][..sizes[c as usize] as usize * width].to_vec()).collect()
}

pub fn chunk_sort() -> Section {
    let mut section = Section::new("chunk_sort");
    let mut add = |dtype: Dtype, tokens: usize, experts: usize, tp: usize| {
        let name = format!("{dtype} n={tokens} e={experts} tp={tp}");
        let point = name.clone();
        section.point(name, move || {
            with_type!(dtype, T => {
                let rng = &mut rng(&point);
                let x: Vec<T> = values(rng, tokens * HIDDEN);
                let sizes = cut(rng, tokens, experts * tp);
                let order = interleaved(experts, tp);
                let (got, _) = calls::sort_chunks(&x, HIDDEN, &sizes, &order);
                assert!(got == moved_chunks(&x, HIDDEN, &sizes, &order));
            })
        });
    };
    for dtype in Dtype::ALL {
        for (experts, tp) in product(&[7, 16], &[2, 8]) {
            add(dtype, TOKENS, experts, tp);
        }
        add(dtype, 0, 8, 2);
    }
    section
}
