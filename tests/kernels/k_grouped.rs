//! Checks of `k_grouped_*`.

use cudarc::driver::{CudaView, CudaViewMut};
use half::{bf16, f16};
use moe_kernels::experts::gemm::{KernelSet, ProductOut};
use moe_kernels::experts::k_grouped::{
    self, ColumnSums, Gathered, KGroupedArgs, KGroupedDesc, KGroupedStrides, Second, SecondOut, SharedGroup,
    SharedSizes,
};
use moe_kernels::experts::{SlotShape, TileEntry};
use moe_kernels::reference::k_grouped::{RowMatrix, column_sums, k_grouped as reference};
use moe_kernels::registry::{KGrouped, KGroupedHopper, Kernel, Tile};
use moe_kernels::{Dtype, In, Kernels};

use crate::rows::Rows;
use crate::strides::{places, spread};
use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Storage, UNIT, assert_bounded, assert_sums, to_f64};
use crate::support::device;
use crate::support::inputs::normals;
use crate::timing::time;

/// A kernel of products of groups along K.
#[derive(Clone, Copy)]
pub struct Variant {
    kernel: Kernel,
    kernels: KernelSet,
    dtype: Dtype,
    tile: Tile,
    /// Whether matrices have any width, address and stride.
    any: bool,
    /// What may be gathered.
    gathers: &'static [Gathered],
    /// Whether it is launched for few multiprocessors, whose blocks walk many tiles.
    few: bool,
}

impl Variant {
    fn loaded(&self) -> &'static Kernels {
        if self.few { device::few() } else { device::kernels() }
    }
}

impl From<KGrouped> for Variant {
    fn from(kernel: KGrouped) -> Variant {
        let all = &[Gathered::A, Gathered::B, Gathered::Neither, Gathered::Both];
        let KGrouped { dtype, any } = kernel;
        let gathers = if any { &all[..] } else { &all[..3] };
        let (kernel, tile) = (Kernel::KGrouped(kernel), kernel.tile());
        Variant { kernel, kernels: KernelSet::Sm80, dtype, tile, any, gathers, few: false }
    }
}

impl From<KGroupedHopper> for Variant {
    fn from(kernel: KGroupedHopper) -> Variant {
        let gathers: &[Gathered] = if kernel.gathers_b { &[Gathered::B] } else { &[Gathered::A, Gathered::Neither] };
        let (tile, dtype) = (kernel.tile(), kernel.dtype);
        let kernels = KernelSet::Sm90a;
        Variant { kernel: Kernel::KGroupedHopper(kernel), kernels, dtype, tile, any: false, gathers, few: false }
    }
}

pub fn check(variant: impl Into<Variant>, rng: &mut fastrand::Rng) {
    let variant = variant.into();
    match variant.dtype {
        Dtype::Bf16 => check_as::<bf16>(variant, rng),
        Dtype::F16 => check_as::<f16>(variant, rng),
        Dtype::F32 => check_as::<f32>(variant, rng),
        other => unreachable!("no kernel has {other}"),
    }
}

/// What a case has, and where its matrices lie.
#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    n: usize,
    gathered: Gathered,
    f32_out: bool,
    accumulate: bool,
    keep_empty: bool,
    /// Strides: packed, or one of three sets.
    places: usize,
    /// A second matrix for each group.
    second: Option<Second>,
}

impl Case {
    /// Columns that lie in a row, of those of `m` and `n` that a matrix is made of.
    fn columns(&self, [m, n]: [usize; 2]) -> [usize; 2] {
        match self.second {
            None => [m, n],
            Some(Second::OfA) => [2 * m, n],
            Some(_) => [m, 2 * n],
        }
    }
}

/// Rows as they lie.
fn ungathered<'a, T>(a: &'a [T], b: &'a [T], [m, n]: [usize; 2]) -> [RowMatrix<'a, T>; 2] {
    [RowMatrix { values: a, columns: m, slot_token: None }, RowMatrix { values: b, columns: n, slot_token: None }]
}

/// Columns `first ..` of each row.
fn columns_of<T: Copy>(values: &[T], all: usize, first: usize, columns: usize) -> Vec<T> {
    values.chunks(all).flat_map(|row| row[first..first + columns].to_vec()).collect()
}

/// The operands of a group's first matrix, and of its second.
fn halves<T: Copy>(values: [&[T]; 2], [m, n]: [usize; 2], second: Option<Second>) -> Vec<[Vec<T>; 2]> {
    let [a, b] = values;
    match second {
        None => vec![[a.to_vec(), b.to_vec()]],
        Some(Second::OfA) => [0, m].map(|first| [columns_of(a, 2 * m, first, m), b.to_vec()]).to_vec(),
        Some(_) => [0, n].map(|first| [a.to_vec(), columns_of(b, 2 * n, first, n)]).to_vec(),
    }
}

fn check_as<T: Storage>(variant: Variant, rng: &mut fastrand::Rng) {
    let tile = variant.tile;
    let (bm, bk) = (tile.bm as usize, tile.bk as usize);
    // M and N: less than a tile, a part of a chunk's row, a tile and more.
    // Then as many column tiles as share the sums of columns in units of 4, 2 and 1.
    let widths = if variant.any {
        [
            [5, bm + 3],
            [bm + 1, 1],
            [33, 70],
            [1, 12],
            [bm, 40],
            [7, 7],
            [bm - 1, 4 * bm + 1],
            [50, 8 * bm],
            // B's chunks by 16 bytes.
            [16 * bm + 3, bm / 8 + 16],
            [4 * bm, bm + 2],
        ]
        .to_vec()
    } else if variant.kernels == KernelSet::Sm90a {
        // Of the operand that may be gathered one tile of 128 of a pair, both, and more; of the other one of 256 and more. Then bands of tiles.
        let sides = [[8, 264], [136, 256], [272, 24], [120, 520], [392, 80], [264, 248], [264, 2056]];
        sides.map(|sides| of_sides(variant, sides)).to_vec()
    } else {
        [
            [8, bm + 8],
            [bm + 16, 40],
            [24, bm],
            [8, 8],
            [2 * bm + 8, 16],
            [40, 72],
            [bm + 8, 16 * bm + 8],
            [56, 9 * bm],
            [17 * bm, 24],
            [bm + 8, 5 * bm],
        ]
        .to_vec()
    };
    // Rows: none, one, a stage less one, a stage, one more, several stages with a remainder and without.
    let loads =
        [[0, 1, bk - 1], [bk, 0, bk + 1], [3 * bk + 5, 2, 0], [4 * bk, 7, 1], [0, 0, 0], [2 * bk, 6 * bk + 1, 9]];
    for (index, [m, n]) in widths.into_iter().enumerate() {
        for more in 0..2 {
            let gathered = variant.gathers[(index + more) % variant.gathers.len()];
            let (f32_out, accumulate, keep_empty) =
                ((index + more) % 2 == 0, (index / 2 + more) % 2 == 0, index % 3 == 0);
            let second = [None, Some(Second::OfA), Some(Second::OfB)][(index + more + rng.usize(..2)) % 3];
            let second = second.filter(|_| variant.kernels == KernelSet::Sm80);
            let places = (index + 2 * more) % 4;
            let case = Case { m, n, gathered, f32_out, accumulate, keep_empty, places, second };
            // Bands of tiles are much to compare: once, of few rows, onto what is there.
            let wide = variant.kernels == KernelSet::Sm90a && m.max(n) > 2000;
            if wide && !accumulate {
                continue;
            }
            let loads = if wide { &[0, 70] } else { &loads[(index + 3 * more) % loads.len()][..] };
            run::<T>(variant, rng, loads, &case);
        }
    }
    if variant.kernels == KernelSet::Sm90a {
        // Deep: each slot is filled again while products read the one behind it.
        let [m, n] = of_sides(variant, [136, 40]);
        let case = Case {
            m,
            n,
            gathered: variant.gathers[0],
            f32_out: true,
            accumulate: false,
            keep_empty: false,
            places: 0,
            second: None,
        };
        run::<T>(variant, rng, &[13 * bk + 5], &case);
        // More pairs of tiles than clusters: of several experts, with rows of fewer stages than slots, of more, and none.
        let variant = Variant { few: true, ..variant };
        for places in 0..2 {
            let [m, n] = of_sides(variant, [136, 40]);
            let loads: Vec<usize> =
                (0..24).map(|_| [0, rng.usize(..64), rng.usize(..200), 320][rng.usize(..4)]).collect();
            let (gathered, f32_out) = (variant.gathers[0], places == 0);
            let case = Case { m, n, gathered, f32_out, accumulate: false, keep_empty: false, places, second: None };
            run::<T>(variant, rng, &loads, &case);
        }
    }
}

/// M and N, of the columns of the operand that may be gathered on Hopper and of the other.
fn of_sides(variant: Variant, [g, p]: [usize; 2]) -> [usize; 2] {
    if variant.tile.bm == 128 { [g, p] } else { [p, g] }
}

fn strides(variant: Variant, case: &Case, [a_rows, b_rows]: [usize; 2]) -> Option<KGroupedStrides> {
    let Case { m, n, .. } = *case;
    let packed = KGroupedStrides::packed(m, n);
    // Rows have all columns.
    let [m, n] = case.columns([m, n]);
    match (case.places, variant.any) {
        (0, _) => case.second.map(|_| packed.a([m, 1]).b([n, 1])),
        (which, false) => {
            Some(packed.a([m + 8 * which, 1]).b([n + 16, 1]).out([case.m * (case.n + 8) + 16, case.n + 8, 1]))
        }
        (1, true) => Some(packed.a([1, a_rows + 3]).b([n + 1, 1]).out([case.m * case.n + 1, 1, case.m])),
        (2, true) => Some(packed.a([m + 3, 1]).b([1, b_rows]).out([case.m * (case.n + 1), case.n + 1, 1])),
        (_, true) => Some(packed.a([2 * m + 1, 2]).b([3 * n, 3]).out([2 * case.m * case.n + 5, 2 * case.n, 2])),
    }
}

/// `loads[e]` rows for expert `e`, a few rows of nobody before, between and behind, which hold NaN and no token.
fn run<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, loads: &[usize], case: &Case) {
    let (kernels, stream) = (variant.loaded(), device::stream());
    let name = format!("{loads:?} {case:?}");
    let Case { m, n, .. } = *case;
    let experts = loads.len();
    let mut slots = 2;
    let mut spans = vec![];
    for &load in loads {
        spans.push((slots, slots + load));
        slots += load + rng.usize(..3);
    }
    slots += 1;
    let tokens = slots / 2 + 1;
    let (mut slot_token, mut covered) = (vec![i32::MAX; slots], vec![false; slots]);
    for row in spans.iter().flat_map(|&(first, end)| first..end) {
        // The last token is nobody's.
        slot_token[row] = rng.usize(..tokens - 1) as i32;
        covered[row] = true;
    }
    let by_token =
        [matches!(case.gathered, Gathered::A | Gathered::Both), matches!(case.gathered, Gathered::B | Gathered::Both)];
    let nan = T::from_f64(f64::NAN);
    let mut matrix = |columns: usize, by_token: bool| -> Vec<T> {
        let rows = if by_token { tokens } else { slots };
        let mut values: Vec<T> = normals(rng, rows * columns, 1.0);
        for (row, values) in values.chunks_mut(columns).enumerate() {
            if if by_token { row == tokens - 1 } else { !covered[row] } {
                values.fill(nan);
            }
        }
        values
    };
    let all_columns = case.columns([m, n]);
    let [whole_a, whole_b] = [0, 1].map(|side| matrix(all_columns[side], by_token[side]));
    let mut halves = halves([&whole_a[..], &whole_b[..]], [m, n], case.second).into_iter();
    let [a, b] = halves.next().unwrap();
    let tokens_of = |by_token: bool| by_token.then_some(&slot_token[..]);
    let of = |f: fn(f64) -> f64| {
        let [a, b] = [&a, &b].map(|values| to_f64(values).into_iter().map(f).collect::<Vec<f64>>());
        let a = RowMatrix { values: &a[..], columns: m, slot_token: tokens_of(by_token[0]) };
        let b = RowMatrix { values: &b[..], columns: n, slot_token: tokens_of(by_token[1]) };
        reference(a, b, &spans).unwrap()
    };
    let (sums, magnitudes, squares) = (of(|v| v), of(f64::abs), of(|v| v * v));
    let arithmetic = if variant.dtype == Dtype::F32 { Arithmetic::Tf32x3 } else { Arithmetic::Mma16 };
    // What is there before: of the type of out, so rounded to it.
    let old: Vec<T> = normals(rng, experts * m * n, 1.0);
    let old32: Vec<f32> = normals(rng, experts * m * n, 1.0);
    let old64 = if case.f32_out { to_f64(&old32) } else { to_f64(&old) };
    // Of several experts some frozen, all, or none; and sums of columns of a or b, of rows with factors or without.
    let frozen: Option<Vec<i32>> =
        (experts > 2 && rng.u8(..3) == 0).then(|| (0..experts).map(|_| [0, 1, 0, -5][rng.usize(..4)]).collect());
    let is_frozen = |expert: usize| frozen.as_ref().is_some_and(|frozen| frozen[expert] != 0);
    let (mut want, mut bounds) = (vec![], vec![]);
    for i in 0..sums.len() {
        let (first, end) = spans[i / (m * n)];
        if is_frozen(i / (m * n)) {
            want.push(old64[i]);
            bounds.push(0.0);
            continue;
        }
        let kept = first == end && (case.keep_empty || case.accumulate);
        let value = if kept || case.accumulate { sums[i] + old64[i] } else { sums[i] };
        let own = arithmetic.sum_bound(end - first, sums[i], magnitudes[i], squares[i].sqrt());
        want.push(value);
        bounds.push(if kept || first == end {
            0.0
        } else {
            own + if case.accumulate { UNIT * value.abs() } else { 0.0 }
        });
    }

    let wide = m.max(n) > 300;
    let mut columns = (rng.u8(..4) > 0 || wide).then(|| {
        // Added to what is there where more column tiles share a sum than it has units for, and where they have all.
        let of_b = if wide { case.accumulate == (m > n) } else { rng.bool() };
        let (values, columns) = if of_b { (&b, n) } else { (&a, m) };
        let matrix = RowMatrix { values: &values[..], columns, slot_token: tokens_of(by_token[usize::from(of_b)]) };
        Columns::draw(rng, case, of_b, matrix, &spans, slots, &is_frozen)
    });
    let mut second = halves.next().map(|[a, b]| {
        let a = RowMatrix { values: &a[..], columns: m, slot_token: tokens_of(by_token[0]) };
        let b = RowMatrix { values: &b[..], columns: n, slot_token: tokens_of(by_token[1]) };
        Target::draw(rng, variant, case, [a, b], (&spans, &is_frozen), columns.as_ref())
    });
    // A shared expert's rows as one group more: none, one, a stage with a remainder, several.
    let shared_rows = [0, 1, 77, 150][rng.usize(..4)];
    // Of the same width, or another; where columns of the matrix are as far apart as it has rows, no more of these.
    let unit = if variant.any { 1 } else { 8 };
    let column_major = variant.any && case.places == 1;
    let shared_sizes = [m, n].map(|size| match rng.usize(..3) {
        0 => size,
        1 => unit * (1 + rng.usize(..size.div_ceil(unit))).min(size / unit),
        _ if column_major => size,
        _ => size + unit * (1 + rng.usize(..150 / unit)),
    });
    let mut shared = (shared_rows > 0).then(|| Shared::<T>::draw(rng, variant, case, shared_rows, shared_sizes));
    let frozen_in = frozen.as_ref().map(|frozen| Guarded::input(&stream, "frozen", frozen));
    let shape = SlotShape::new(tokens, experts, Some(1), slots, 16, slots);
    let [a_rows, b_rows] = by_token.map(|by_token| if by_token { tokens } else { slots });
    let strides = strides(variant, case, [a_rows, b_rows].map(|rows| rows.max(shared_rows)));
    let at = strides.unwrap_or(KGroupedStrides::packed(m, n));
    if let Some(shared) = &mut shared {
        shared.lay(rng, at, [m, n], unit);
    }
    let desc = KGroupedDesc::new(variant.dtype, shape, m, n)
        .gathered(case.gathered)
        .strides(strides)
        .f32_out(case.f32_out)
        .accumulate(case.accumulate)
        .keep_empty(case.keep_empty)
        .shared_rows(shared_rows)
        .shared_f32_out(shared.as_ref().is_some_and(|shared| shared.first.f32_out))
        .shared_sizes(shared.as_ref().and_then(|shared| shared.asked))
        .second(case.second)
        .second_f32_out(second.as_ref().is_some_and(|second| second.f32_out))
        .shared_second_f32_out(
            shared.as_ref().and_then(|shared| shared.second.as_ref()).is_some_and(|second| second.f32_out),
        )
        .unaligned(variant.any)
        .kernels(variant.kernels);
    let selected = k_grouped::select(&desc, kernels.device()).unwrap().kernel.variant();
    assert_eq!(selected, variant.kernel, "{name}");
    // Chunks are read by elements, or by 16 or 4 bytes at once.
    let shift = if variant.any { [1, 0, 2][(m + n) % 3] } else { 0 };
    let [a, b] = [("a", &whole_a, a_rows, 0, at.a), ("b", &whole_b, b_rows, 1, at.b)].map(
        |(name, values, rows, side, [row, column])| {
            let spread = spread(values, [1, rows, all_columns[side]], [0, row, column], nan);
            Guarded::shifted_input(&stream, name, &spread, shift)
        },
    );
    let outs = places([experts, m, n], at.out);
    let all = outs.iter().max().unwrap() + 1;
    let mut before = (vec![Guarded::<T>::junk(); all], vec![Guarded::<f32>::junk(); all]);
    if case.accumulate || case.keep_empty || frozen.is_some() {
        outs.iter().zip(&old).for_each(|(&at, &old)| before.0[at] = old);
        outs.iter().zip(&old32).for_each(|(&at, &old)| before.1[at] = old);
    }
    let mut rounded = Guarded::filled_output(&stream, "out", &before.0, shift);
    let mut wide = Guarded::filled_output(&stream, "out", &before.1, shift);
    let tiles: Vec<TileEntry> = (spans.iter().enumerate())
        .flat_map(|(e, &(first, end))| {
            let tile = move |at: usize| [e as i32, at as i32, (at + 16).min(end) as i32, 0];
            (first..end).step_by(16).map(tile)
        })
        .collect();
    let lists = Rows {
        counts: spans.iter().map(|&(first, end)| (end - first) as i32).collect(),
        offsets: spans.iter().map(|&(first, _)| first as i32).collect(),
        num_tiles: tiles.len() as i32,
        slot_token,
        tiles,
        ..Rows::default()
    };
    let dispatched = lists.dispatched(&stream, &shape);
    if let Some(shared) = &mut shared {
        shared.put(shift, nan);
    }
    if let Some(second) = &mut second {
        second.put("second.out", [experts, m, n], at.out, shift);
    }
    let launch = |rounded: &mut Guarded<T>,
                  wide: &mut Guarded<f32>,
                  columns: &mut Option<Columns<T>>,
                  shared: &mut Option<Shared<T>>,
                  second: &mut Option<Target<T>>| {
        let (a, b, mut rounded, mut wide) = (a.view(), b.view(), rounded.view_mut(), wide.view_mut());
        let out =
            if case.f32_out { ProductOut::F32((&mut wide).into()) } else { ProductOut::Rounded((&mut rounded).into()) };
        let mut args = KGroupedArgs::new(&a, &b, &dispatched, out);
        let frozen = frozen_in.as_ref().map(Guarded::view);
        args.frozen = frozen.as_ref().map(In::from);
        let mut sums = columns.as_mut().map(Columns::views);
        args.sums = sums.as_mut().map(asked);
        let mut views = shared.as_mut().map(Shared::views);
        args.shared = views.as_mut().map(|([a, b], first, second)| {
            let TargetViews { rounded, wide, f32_out, columns } = first;
            let out = if *f32_out { ProductOut::F32(wide.into()) } else { ProductOut::Rounded(rounded.into()) };
            let mut group = SharedGroup::new(&*a, &*b, out);
            group.sums = columns.as_mut().map(asked);
            group.second = second.as_mut().map(TargetViews::second);
            group
        });
        let mut second = second.as_mut().map(Target::views);
        args.second = second.as_mut().map(TargetViews::second);
        k_grouped::forward(kernels, &stream, &desc, args).unwrap();
    };
    let mut first = None;
    for _ in 0..2 {
        rounded.reset(&stream);
        wide.reset(&stream);
        columns.iter_mut().for_each(Columns::reset);
        shared.iter_mut().for_each(Shared::reset);
        second.iter_mut().for_each(Target::reset);
        launch(&mut rounded, &mut wide, &mut columns, &mut shared, &mut second);
        second.iter().for_each(|second| second.check(&format!("{name} second")));
        shared.iter().for_each(|shared| shared.check(&format!("{name} shared {shared_rows}")));
        columns.iter().for_each(|columns| columns.check(&name));
        let got = (rounded.read(&stream), wide.read(&stream));
        let (values, dtype) = if case.f32_out { (to_f64(&got.1), Dtype::F32) } else { (to_f64(&got.0), variant.dtype) };
        let values: Vec<f64> = outs.iter().map(|&at| values[at]).collect();
        assert_sums(&name, &values, &want, &bounds, dtype);
        let bits = |(rounded, wide): &(Vec<T>, Vec<f32>)| {
            (bytemuck::cast_slice::<T, u8>(rounded).to_vec(), bytemuck::cast_slice::<f32, u8>(wide).to_vec())
        };
        let (now, mut expected) = (bits(&got), bits(&before));
        // All but the outputs is as it was.
        for (_, &at) in outs.iter().enumerate().filter(|(i, _)| !is_frozen(i / (m * n))) {
            let (narrow, wide) = (at * size_of::<T>()..(at + 1) * size_of::<T>(), at * 4..(at + 1) * 4);
            if case.f32_out {
                expected.1[wide.clone()].copy_from_slice(&now.1[wide]);
            } else {
                expected.0[narrow.clone()].copy_from_slice(&now.0[narrow]);
            }
        }
        assert!(now == expected, "{name}: written where no output is");
        let now = (now, columns.as_ref().map(Columns::bytes), shared.as_ref().map(Shared::bytes));
        let now = (now, second.as_ref().map(Target::bytes));
        assert!(first.is_none_or(|first| first == now), "{name}: another run gave other bits");
        first = Some(now);
    }
    a.assert_unchanged(&stream);
    b.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut rounded, &mut wide, &mut columns, &mut shared, &mut second));
}

/// Where sums of columns go, rounded or f32, the rows' factors, which of the two and whose columns, and a factor of all.
type ColumnViews<'a, T> = (CudaViewMut<'a, T>, CudaViewMut<'a, f32>, Option<CudaView<'a, f32>>, [bool; 2], f32);

fn asked<'a, T>((rounded, wide, weights, [f32_out, of_b], scale): &'a mut ColumnViews<'_, T>) -> ColumnSums<'a, T> {
    let out = if *f32_out { ProductOut::F32(wide.into()) } else { ProductOut::Rounded(rounded.into()) };
    let mut sums = ColumnSums::new(out).scale(*scale).of_b(*of_b);
    sums.weights = weights.as_ref().map(In::from);
    sums
}

/// Rows of each group, and whose matrix is left alone.
type Groups<'a> = (&'a [(usize, usize)], &'a dyn Fn(usize) -> bool);

/// Where matrices go beside the first ones, and what they should be.
struct Target<T: Storage> {
    f32_out: bool,
    old: (Vec<T>, Vec<f32>),
    want: Vec<f64>,
    bounds: Vec<f64>,
    columns: Option<Columns<T>>,
    outs: Vec<usize>,
    laid: Option<(Guarded<T>, Guarded<f32>)>,
}

/// A target's buffers for a launch.
struct TargetViews<'a, T> {
    rounded: CudaViewMut<'a, T>,
    wide: CudaViewMut<'a, f32>,
    f32_out: bool,
    columns: Option<ColumnViews<'a, T>>,
}

impl<T> TargetViews<'_, T> {
    fn second(&mut self) -> SecondOut<'_, T> {
        let TargetViews { rounded, wide, f32_out, columns } = self;
        let out = if *f32_out { ProductOut::F32(wide.into()) } else { ProductOut::Rounded(rounded.into()) };
        let second = SecondOut::new(out);
        match columns.as_mut() {
            Some((_, wide, _, [true, _], _)) => second.sums(ProductOut::F32(wide.into())),
            Some((rounded, ..)) => second.sums(ProductOut::Rounded(rounded.into())),
            None => second,
        }
    }
}

impl<T: Storage> Target<T> {
    /// Matrices of these operands. Second ones have sums with the factors of the `first` ones', of the side that has two.
    fn draw(
        rng: &mut fastrand::Rng,
        variant: Variant,
        case: &Case,
        [a, b]: [RowMatrix<'_, T>; 2],
        (spans, is_frozen): Groups<'_>,
        first: Option<&Columns<T>>,
    ) -> Target<T> {
        let (m, n) = (a.columns, b.columns);
        let of = |f: fn(f64) -> f64| {
            let [a64, b64] = [a, b].map(|side| to_f64(side.values).into_iter().map(f).collect::<Vec<f64>>());
            let a = RowMatrix { values: &a64[..], columns: m, slot_token: a.slot_token };
            let b = RowMatrix { values: &b64[..], columns: n, slot_token: b.slot_token };
            reference(a, b, spans).unwrap()
        };
        let (sums, magnitudes, squares) = (of(|v| v), of(f64::abs), of(|v| v * v));
        let arithmetic = if variant.dtype == Dtype::F32 { Arithmetic::Tf32x3 } else { Arithmetic::Mma16 };
        let f32_out = rng.bool();
        let old: (Vec<T>, Vec<f32>) = (normals(rng, sums.len(), 1.0), normals(rng, sums.len(), 1.0));
        let old64 = if f32_out { to_f64(&old.1) } else { to_f64(&old.0) };
        let (mut want, mut bounds, mut keeps) = (sums.clone(), vec![], case.accumulate);
        for i in 0..sums.len() {
            let (begin, end) = spans[i / (m * n)];
            let untouched = is_frozen(i / (m * n)) || begin == end && (case.keep_empty || case.accumulate);
            keeps |= untouched;
            let own = arithmetic.sum_bound(end - begin, sums[i], magnitudes[i], squares[i].sqrt());
            match (untouched, case.accumulate) {
                (true, _) => want[i] = old64[i],
                (false, true) => want[i] += old64[i],
                _ => {}
            }
            let added = if case.accumulate { UNIT * want[i].abs() } else { 0.0 };
            bounds.push(if untouched || begin == end { 0.0 } else { own + added });
        }
        let columns = (rng.u8(..4) > 0).then(|| {
            let of_b = case.second == Some(Second::OfB);
            let matrix = if of_b { b } else { a };
            let mut columns = Columns::draw_by(
                rng,
                case,
                of_b,
                matrix,
                spans,
                is_frozen,
                match first {
                    Some(first) => (first.factors.clone(), first.scale),
                    None => (None, 1.0),
                },
            );
            columns.weights = None;
            columns
        });
        let junk = (vec![Guarded::<T>::junk(); sums.len()], vec![Guarded::<f32>::junk(); sums.len()]);
        Target { f32_out, old: if keeps { old } else { junk }, want, bounds, columns, outs: vec![], laid: None }
    }

    /// Puts the matrices where strides say.
    fn put(&mut self, name: &'static str, sizes: [usize; 3], out: [usize; 3], shift: usize) {
        let stream = device::stream();
        self.outs = places(sizes, out);
        let all = self.outs.iter().max().unwrap() + 1;
        let mut before = (vec![Guarded::<T>::junk(); all], vec![Guarded::<f32>::junk(); all]);
        for (i, &at) in self.outs.iter().enumerate() {
            (before.0[at], before.1[at]) = (self.old.0[i], self.old.1[i]);
        }
        let rounded = Guarded::filled_output(&stream, name, &before.0, shift);
        self.laid = Some((rounded, Guarded::filled_output(&stream, name, &before.1, shift)));
    }

    fn views(&mut self) -> TargetViews<'_, T> {
        let (rounded, wide) = self.laid.as_mut().unwrap();
        let columns = self.columns.as_mut().map(Columns::views);
        TargetViews { rounded: rounded.view_mut(), wide: wide.view_mut(), f32_out: self.f32_out, columns }
    }

    fn reset(&mut self) {
        let (rounded, wide) = self.laid.as_mut().unwrap();
        rounded.reset(&device::stream());
        wide.reset(&device::stream());
        self.columns.iter_mut().for_each(Columns::reset);
    }

    fn bytes(&self) -> Vec<u8> {
        let stream = device::stream();
        let (rounded, wide) = self.laid.as_ref().unwrap();
        let (rounded, wide) = (rounded.read(&stream), wide.read(&stream));
        let mut all = [bytemuck::cast_slice::<T, u8>(&rounded), bytemuck::cast_slice(&wide)].concat();
        all.extend(self.columns.iter().flat_map(Columns::bytes));
        all
    }

    fn check(&self, name: &str) {
        let stream = device::stream();
        let (rounded, wide) = self.laid.as_ref().unwrap();
        let (got, dtype) = if self.f32_out {
            rounded.assert_unchanged(&stream);
            (to_f64(&wide.read(&stream)), Dtype::F32)
        } else {
            wide.assert_unchanged(&stream);
            (to_f64(&rounded.read(&stream)), T::DTYPE)
        };
        // Junk is NaN, and stays between the outputs.
        let mut between = vec![true; got.len()];
        self.outs.iter().for_each(|&at| between[at] = false);
        let untouched = got.iter().zip(&between).all(|(value, between)| !between || value.is_nan());
        assert!(untouched, "{name}: written where no output is");
        let got: Vec<f64> = self.outs.iter().map(|&at| got[at]).collect();
        assert_sums(name, &got, &self.want, &self.bounds, dtype);
        self.columns.iter().for_each(|columns| columns.check(name));
    }
}

/// A shared expert's rows: one group more, with everything of its own.
struct Shared<T: Storage> {
    rows: usize,
    sizes: [usize; 2],
    /// Both operands, of all columns that they have.
    values: [Vec<T>; 2],
    all_columns: [usize; 2],
    /// Sizes, where they are not the others'.
    asked: Option<SharedSizes>,
    /// From row to row and from column to column of operands, and of the matrix.
    at: [[usize; 2]; 3],
    first: Target<T>,
    second: Option<Target<T>>,
    laid: Option<[Guarded<T>; 2]>,
}

/// Operands, and where both matrices go.
type SharedViews<'a, T> = ([CudaView<'a, T>; 2], TargetViews<'a, T>, Option<TargetViews<'a, T>>);

impl<T: Storage> Shared<T> {
    fn draw(rng: &mut fastrand::Rng, variant: Variant, case: &Case, rows: usize, [m, n]: [usize; 2]) -> Shared<T> {
        let all_columns = case.columns([m, n]);
        let values: [Vec<T>; 2] = all_columns.map(|columns| normals(rng, rows * columns, 1.0));
        let spans = [(0, rows)];
        let mut halves = halves(values.each_ref().map(|values| &values[..]), [m, n], case.second).into_iter();
        let [a, b] = halves.next().unwrap();
        let nobody = |_| false;
        let mut first = Target::draw(rng, variant, case, ungathered(&a, &b, [m, n]), (&spans, &nobody), None);
        first.columns = (rng.u8(..4) > 0).then(|| {
            let of_b = rng.bool();
            let matrix = ungathered(&a, &b, [m, n])[usize::from(of_b)];
            Columns::draw(rng, case, of_b, matrix, &spans, rows, &nobody)
        });
        let second = halves.next().map(|[a, b]| {
            let of_first = first.columns.as_ref();
            Target::draw(rng, variant, case, ungathered(&a, &b, [m, n]), (&spans, &nobody), of_first)
        });
        Shared { rows, sizes: [m, n], values, all_columns, asked: None, at: [[0; 2]; 3], first, second, laid: None }
    }

    /// Finds places: those of the others' strides, or rows as far apart as its own width asks for, in whole units.
    fn lay(&mut self, rng: &mut fastrand::Rng, others: KGroupedStrides, [m, n]: [usize; 2], unit: usize) {
        let KGroupedStrides { a, b, out, .. } = others;
        self.at = [a, b, [out[1], out[2]]];
        if self.sizes == [m, n] {
            return;
        }
        let columns = [self.all_columns[0], self.all_columns[1], self.sizes[1]];
        for (at, columns) in self.at.iter_mut().zip(columns) {
            // Columns that lie further apart than rows stay where they are.
            if at[0] >= at[1] {
                at[0] = columns * at[1] + unit * rng.usize(..3);
            }
        }
        let [m, n] = self.sizes;
        self.asked = Some(SharedSizes::new(m, n).rows(self.at.map(|[row, _]| row)));
    }

    fn put(&mut self, shift: usize, nan: T) {
        let stream = device::stream();
        let [m, n] = self.sizes;
        self.laid = Some([("shared.a", 0), ("shared.b", 1)].map(|(name, side)| {
            let [row, column] = self.at[side];
            let spread = spread(&self.values[side], [1, self.rows, self.all_columns[side]], [0, row, column], nan);
            Guarded::shifted_input(&stream, name, &spread, shift)
        }));
        let [row, column] = self.at[2];
        self.first.put("shared.out", [1, m, n], [0, row, column], shift);
        if let Some(second) = &mut self.second {
            second.put("shared.second.out", [1, m, n], [0, row, column], shift);
        }
    }

    fn views(&mut self) -> SharedViews<'_, T> {
        let operands = self.laid.as_ref().unwrap().each_ref().map(Guarded::view);
        (operands, self.first.views(), self.second.as_mut().map(Target::views))
    }

    fn reset(&mut self) {
        self.first.reset();
        self.second.iter_mut().for_each(Target::reset);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut all = self.first.bytes();
        all.extend(self.second.iter().flat_map(Target::bytes));
        all
    }

    fn check(&self, name: &str) {
        self.first.check(name);
        self.second.iter().for_each(|second| second.check(&format!("{name} second")));
        self.laid.iter().flatten().for_each(|operand| operand.assert_unchanged(&device::stream()));
    }
}

/// Sums of columns, beside what they should be.
struct Columns<T> {
    rounded: Guarded<T>,
    wide: Guarded<f32>,
    weights: Option<Guarded<f32>>,
    /// The factors of the rows.
    factors: Option<Vec<f32>>,
    f32_out: bool,
    of_b: bool,
    scale: f32,
    want: Vec<f64>,
    bounds: Vec<f64>,
}

impl<T: Storage> Columns<T> {
    fn draw(
        rng: &mut fastrand::Rng,
        case: &Case,
        of_b: bool,
        matrix: RowMatrix<'_, T>,
        spans: &[(usize, usize)],
        slots: usize,
        is_frozen: &dyn Fn(usize) -> bool,
    ) -> Columns<T> {
        let weights: Option<Vec<f32>> = rng.bool().then(|| normals(rng, slots, 1.0));
        let scale = [1.0, -1.5][rng.usize(..2)];
        Columns::draw_by(rng, case, of_b, matrix, spans, is_frozen, (weights, scale))
    }

    /// By these factors.
    fn draw_by(
        rng: &mut fastrand::Rng,
        case: &Case,
        of_b: bool,
        matrix: RowMatrix<'_, T>,
        spans: &[(usize, usize)],
        is_frozen: &dyn Fn(usize) -> bool,
        (weights, scale): (Option<Vec<f32>>, f32),
    ) -> Columns<T> {
        let stream = device::stream();
        let RowMatrix { values, columns, slot_token } = matrix;
        let elements = spans.len() * columns;
        let f32_out = rng.bool();
        let of = |f: fn(f64) -> f64| {
            let a: Vec<f64> = to_f64(values).into_iter().map(f).collect();
            let weights: Option<Vec<f32>> =
                weights.as_ref().map(|weights| weights.iter().map(|&w| f(w.into()) as f32).collect());
            let a = RowMatrix { values: &a[..], columns, slot_token };
            column_sums(a, weights.as_deref(), f(scale.into()), spans).unwrap()
        };
        let (sums, magnitudes, squares) = (of(|v| v), of(f64::abs), of(|v| v * v));
        let (old, old32): (Vec<T>, Vec<f32>) = (normals(rng, elements, 1.0), normals(rng, elements, 1.0));
        let old64 = if f32_out { to_f64(&old32) } else { to_f64(&old) };
        let (mut want, mut bounds) = (vec![], vec![]);
        for i in 0..elements {
            let (first, end) = spans[i / columns];
            let untouched = is_frozen(i / columns) || first == end && (case.accumulate || case.keep_empty);
            let old = if untouched || case.accumulate { old64[i] } else { 0.0 };
            want.push(if untouched { old } else { sums[i] + old });
            let own = Arithmetic::Fma.sum_bound(end - first, sums[i], magnitudes[i], squares[i].sqrt());
            bounds.push(if untouched || first == end { 0.0 } else { own + UNIT * (sums[i].abs() + want[i].abs()) });
        }
        let keeps = case.accumulate || case.keep_empty || (0..spans.len()).any(is_frozen);
        let junk = (vec![Guarded::<T>::junk(); elements], vec![Guarded::<f32>::junk(); elements]);
        let (old, old32) = if keeps { (old, old32) } else { junk };
        Columns {
            rounded: Guarded::filled_output(&stream, "sums", &old, 1),
            wide: Guarded::filled_output(&stream, "sums", &old32, 1),
            weights: weights.as_ref().map(|weights| Guarded::input(&stream, "sums.weights", weights)),
            factors: weights,
            f32_out,
            of_b,
            scale,
            want,
            bounds,
        }
    }

    fn views(&mut self) -> ColumnViews<'_, T> {
        let weights = self.weights.as_ref().map(Guarded::view);
        (self.rounded.view_mut(), self.wide.view_mut(), weights, [self.f32_out, self.of_b], self.scale)
    }

    fn reset(&mut self) {
        self.rounded.reset(&device::stream());
        self.wide.reset(&device::stream());
    }

    fn bytes(&self) -> Vec<u8> {
        let stream = device::stream();
        let (rounded, wide) = (self.rounded.read(&stream), self.wide.read(&stream));
        [bytemuck::cast_slice::<T, u8>(&rounded), bytemuck::cast_slice(&wide)].concat()
    }

    fn check(&self, name: &str) {
        let stream = device::stream();
        let (got, dtype) = if self.f32_out {
            self.rounded.assert_unchanged(&stream);
            (to_f64(&self.wide.read(&stream)), Dtype::F32)
        } else {
            self.wide.assert_unchanged(&stream);
            (to_f64(&self.rounded.read(&stream)), T::DTYPE)
        };
        assert_bounded(&format!("{name}: column sums"), &got, &self.want, &self.bounds, dtype);
    }
}
