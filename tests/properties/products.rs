//! Products of any shape, place and form of result. Whole numbers, so that every sum is exact; NaN wherever nothing may be read.

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::capacity::row_groups::{self, RowGroupsArgs, RowGroupsDesc, RowLayout};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Output, ProductOut, Rows, Strides};
use moe_kernels::experts::k_grouped::{self, KGroupedArgs, KGroupedDesc, KGroupedStrides};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::reference::row_groups::by_ends;
use proptest::prelude::*;

use crate::config;
use crate::support::device;

const JUNK: f32 = -54321.0;

/// A whole number of a few bits.
fn whole(rng: &mut fastrand::Rng) -> f32 {
    rng.i32(-4..=4) as f32
}

/// Strides of a matrix of this size: packed, with gaps, columns first, or every other element; gaps of so many elements.
fn strides([rows, columns]: [usize; 2], which: usize, gap: usize) -> [usize; 2] {
    match which {
        0 => [columns, 1],
        1 => [columns + gap, 1],
        2 => [1, rows.max(1) + gap],
        _ => [2 * columns + gap, 2],
    }
}

/// Elements up to behind the last.
fn reach(dimensions: &[(usize, usize)]) -> usize {
    if dimensions.iter().any(|&(size, _)| size == 0) {
        return 1;
    }
    1 + dimensions.iter().map(|&(size, stride)| (size - 1) * stride).sum::<usize>()
}

/// Lists of `experts` with random ends, and the rows of each.
fn groups(rng: &mut fastrand::Rng, rows: usize, experts: usize, tile_m: usize) -> (Dispatched, Vec<(usize, usize)>) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let mut ends: Vec<i32> = (0..experts).map(|_| rng.i32(0..=rows as i32)).collect();
    ends.sort_unstable();
    let desc = RowGroupsDesc::new(RowLayout::Ends { rows }, experts, tile_m);
    let mut dispatched = Dispatched::new(&stream, &desc.shape()).unwrap();
    let on_device = stream.clone_htod(&ends).unwrap();
    row_groups::forward(kernels, &stream, &desc, RowGroupsArgs::new(&on_device, &mut dispatched)).unwrap();
    (dispatched, by_ends(&ends, rows))
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn products_of_any_shape_and_place(
        (rows, experts) in (0usize..=150, 1usize..=5),
        n in prop_oneof![1usize..=140, (1usize..=20).prop_map(|n| 8 * n)],
        k in prop_oneof![1usize..=140, (1usize..=20).prop_map(|n| 8 * n)],
        tile_m in prop::sample::select(vec![16usize, 64, 128]),
        // Half of them in steps of vectors, which the kernels for packed rows take.
        (places, gap) in (prop::array::uniform3(0usize..4), prop_oneof![Just(8usize), 1usize..=9]),
        (added, dense) in any::<(bool, bool)>(),
        seed in any::<u64>(),
    ) {
        let (kernels, stream) = (device::kernels(), device::stream());
        let rng = &mut fastrand::Rng::with_seed(seed);
        let experts = if dense { 1 } else { experts };
        let (dispatched, mut spans) = groups(rng, rows, experts, tile_m);
        if dense {
            spans = vec![(0, rows)];
        }
        let a_at = strides([rows, k], places[0], gap);
        let b_at = strides([n, k], places[1], gap);
        let out_at = strides([rows, n], places[2], gap);
        let expert = reach(&[(n, b_at[0]), (k, b_at[1])]) + gap;
        let expert = if gap == 8 { expert.next_multiple_of(8) } else { expert };
        let mut a = vec![bf16::NAN; reach(&[(rows, a_at[0]), (k, a_at[1])])];
        let mut b = vec![bf16::NAN; reach(&[(experts, expert), (n, b_at[0]), (k, b_at[1])])];
        let mut before = vec![JUNK; reach(&[(rows, out_at[0]), (n, out_at[1])])];
        for e in 0..experts {
            for (column, depth) in (0..n).flat_map(|column| (0..k).map(move |depth| (column, depth))) {
                b[e * expert + column * b_at[0] + depth * b_at[1]] = bf16::from_f32(whole(rng));
            }
        }
        for &(first, end) in &spans {
            for row in first..end {
                (0..k).for_each(|depth| a[row * a_at[0] + depth * a_at[1]] = bf16::from_f32(whole(rng)));
                if added {
                    (0..n).for_each(|column| before[row * out_at[0] + column * out_at[1]] = whole(rng));
                }
            }
        }
        let mut want = before.clone();
        for (e, &(first, end)) in spans.iter().enumerate() {
            for (row, column) in (first..end).flat_map(|row| (0..n).map(move |column| (row, column))) {
                let terms = (0..k).map(|depth| {
                    let a = a[row * a_at[0] + depth * a_at[1]].to_f32();
                    a * b[e * expert + column * b_at[0] + depth * b_at[1]].to_f32()
                });
                let out = &mut want[row * out_at[0] + column * out_at[1]];
                *out = terms.sum::<f32>() + if added { *out } else { 0.0 };
            }
        }
        let rows = if dense { Rows::Dense(rows) } else { Rows::Grouped(*dispatched.shape()) };
        let desc = GemmDesc::new(Dtype::Bf16, rows, n, k);
        let places = Strides::packed(&desc).a(a_at[0], a_at[1]).weight(expert, b_at[0], b_at[1]).out(out_at[0], out_at[1]);
        let desc = desc.strides(Some(places)).output(if added { Output::AddedF32 } else { Output::F32 });
        let (a, b) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
        let mut out = stream.clone_htod(&before).unwrap();
        let mut args = GemmArgs::to_f32(&a, Weight::new(&b), &mut out);
        args.dispatched = (!dense).then_some(&dispatched);
        gemm::forward(kernels, &stream, &desc, args).unwrap();
        prop_assert_eq!(stream.clone_dtoh(&out).unwrap(), want);
    }

    #[test]
    fn groups_along_k_of_any_shape_and_place(
        (rows, experts) in (0usize..=300, 1usize..=4),
        m in prop_oneof![1usize..=70, (1usize..=20).prop_map(|n| 8 * n)],
        n in prop_oneof![1usize..=70, (1usize..=20).prop_map(|n| 8 * n)],
        (places, gap) in (prop::array::uniform3(0usize..4), prop_oneof![Just(8usize), 1usize..=9]),
        (added, keep_empty) in any::<(bool, bool)>(),
        seed in any::<u64>(),
    ) {
        let (kernels, stream) = (device::kernels(), device::stream());
        let rng = &mut fastrand::Rng::with_seed(seed);
        let (dispatched, spans) = groups(rng, rows, experts, 64);
        let (a_at, b_at) = (strides([rows, m], places[0], gap), strides([rows, n], places[1], gap));
        let out_at = strides([m, n], places[2], gap);
        let expert = reach(&[(m, out_at[0]), (n, out_at[1])]) + gap;
        let expert = if gap == 8 { expert.next_multiple_of(8) } else { expert };
        let mut a = vec![bf16::NAN; reach(&[(rows, a_at[0]), (m, a_at[1])])];
        let mut b = vec![bf16::NAN; reach(&[(rows, b_at[0]), (n, b_at[1])])];
        for row in spans.iter().flat_map(|&(first, end)| first..end) {
            (0..m).for_each(|column| a[row * a_at[0] + column * a_at[1]] = bf16::from_f32(whole(rng)));
            (0..n).for_each(|column| b[row * b_at[0] + column * b_at[1]] = bf16::from_f32(whole(rng)));
        }
        let mut before = vec![JUNK; reach(&[(experts, expert), (m, out_at[0]), (n, out_at[1])])];
        let mut want = before.clone();
        for (e, &(first, end)) in spans.iter().enumerate() {
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let at = e * expert + i * out_at[0] + j * out_at[1];
                before[at] = if added { whole(rng) } else { JUNK };
                let terms = (first..end).map(|row| {
                    a[row * a_at[0] + i * a_at[1]].to_f32() * b[row * b_at[0] + j * b_at[1]].to_f32()
                });
                let sum = terms.sum::<f32>() + if added { before[at] } else { 0.0 };
                want[at] = if first == end && keep_empty { before[at] } else { sum };
            }
        }
        let places = KGroupedStrides::packed(m, n).a(a_at).b(b_at).out([expert, out_at[0], out_at[1]]);
        let desc = KGroupedDesc::new(Dtype::Bf16, *dispatched.shape(), m, n)
            .strides(Some(places))
            .f32_out(true)
            .accumulate(added)
            .keep_empty(keep_empty);
        let (a, b) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
        let mut out = stream.clone_htod(&before).unwrap();
        let args = KGroupedArgs::new(&a, &b, &dispatched, ProductOut::F32((&mut out).into()));
        k_grouped::forward(kernels, &stream, &desc, args).unwrap();
        prop_assert_eq!(stream.clone_dtoh(&out).unwrap(), want);
    }
}
