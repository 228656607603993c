//! Checks of `k_grouped_*`.

use cudarc::driver::{CudaView, CudaViewMut};
use half::{bf16, f16};
use moe_kernels::experts::gemm::{KernelSet, ProductOut};
use moe_kernels::experts::k_grouped::{
    self, ColumnSums, Gathered, KGroupedArgs, KGroupedDesc, KGroupedStrides, SharedGroup,
};
use moe_kernels::experts::{SlotShape, TileEntry};
use moe_kernels::reference::k_grouped::{RowMatrix, column_sums, k_grouped as reference};
use moe_kernels::registry::{KGrouped, KGroupedHopper, Kernel, Tile};
use moe_kernels::{Dtype, In};

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
}

impl From<KGrouped> for Variant {
    fn from(kernel: KGrouped) -> Variant {
        let all = &[Gathered::A, Gathered::B, Gathered::Neither, Gathered::Both];
        let KGrouped { dtype, any } = kernel;
        let gathers = if any { &all[..] } else { &all[..3] };
        Variant { kernel: Kernel::KGrouped(kernel), kernels: KernelSet::Sm80, dtype, tile: kernel.tile(), any, gathers }
    }
}

impl From<KGroupedHopper> for Variant {
    fn from(kernel: KGroupedHopper) -> Variant {
        let gathers: &[Gathered] = if kernel.gathers_b { &[Gathered::B] } else { &[Gathered::A, Gathered::Neither] };
        let (tile, dtype) = (kernel.tile(), kernel.dtype);
        let kernels = KernelSet::Sm90a;
        Variant { kernel: Kernel::KGroupedHopper(kernel), kernels, dtype, tile, any: false, gathers }
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
            [16 * bm + 3, 9],
            [4 * bm, bm + 2],
        ]
        .to_vec()
    } else if variant.kernels == KernelSet::Sm90a {
        // Of the operand that may be gathered one tile of 128 of a pair, both, and more; of the other one of 256 and more. Then bands of tiles.
        let sides = [[8, 264], [136, 256], [272, 24], [120, 520], [392, 80], [264, 248], [264, 2312]];
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
            let case = Case { m, n, gathered, f32_out, accumulate, keep_empty, places: (index + 2 * more) % 4 };
            run::<T>(variant, rng, &loads[(index + 3 * more) % loads.len()], &case);
        }
    }
    if variant.kernels == KernelSet::Sm90a {
        // More pairs of tiles than clusters: of many experts, with rows of fewer stages than slots, of more, and none.
        for places in 0..2 {
            let [m, n] = of_sides(variant, [136, 40]);
            let loads: Vec<usize> =
                (0..90).map(|_| [0, rng.usize(..64), rng.usize(..200), 320][rng.usize(..4)]).collect();
            let (gathered, f32_out) = (variant.gathers[0], places == 0);
            let case = Case { m, n, gathered, f32_out, accumulate: false, keep_empty: false, places };
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
    match (case.places, variant.any) {
        (0, _) => None,
        (which, false) => Some(packed.a([m + 8 * which, 1]).b([n + 16, 1]).out([m * (n + 8) + 16, n + 8, 1])),
        (1, true) => Some(packed.a([1, a_rows + 3]).b([n + 1, 1]).out([m * n + 1, 1, m])),
        (2, true) => Some(packed.a([m + 3, 1]).b([1, b_rows]).out([m * (n + 1), n + 1, 1])),
        (_, true) => Some(packed.a([2 * m + 1, 2]).b([3 * n, 3]).out([2 * m * n + 5, 2 * n, 2])),
    }
}

/// `loads[e]` rows for expert `e`, a few rows of nobody before, between and behind, which hold NaN and no token.
fn run<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, loads: &[usize], case: &Case) {
    let (kernels, stream) = (device::kernels(), device::stream());
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
    let (a, b) = (matrix(m, by_token[0]), matrix(n, by_token[1]));
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
    // Some experts frozen, all, or none; and sums of columns of a or b, of rows with factors or without.
    let frozen: Option<Vec<i32>> =
        (rng.u8(..3) == 0).then(|| (0..experts).map(|_| [0, 1, 0, -5][rng.usize(..4)]).collect());
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

    let mut columns = (rng.u8(..4) > 0 || m.max(n) > 500).then(|| {
        let of_b = rng.bool();
        let (values, columns) = if of_b { (&b, n) } else { (&a, m) };
        let matrix = RowMatrix { values: &values[..], columns, slot_token: tokens_of(by_token[usize::from(of_b)]) };
        Columns::draw(rng, case, of_b, matrix, &spans, slots, &is_frozen)
    });
    // A shared expert's rows as one group more: none, one, a stage with a remainder, several.
    let shared_rows = [0, 1, 77, 150][rng.usize(..4)];
    let mut shared = (shared_rows > 0).then(|| Shared::<T>::draw(rng, variant, case, shared_rows));
    let frozen_in = frozen.as_ref().map(|frozen| Guarded::input(&stream, "frozen", frozen));
    let shape = SlotShape::new(tokens, experts, Some(1), slots, 16, slots);
    let [a_rows, b_rows] = by_token.map(|by_token| if by_token { tokens } else { slots });
    let strides = strides(variant, case, [a_rows, b_rows].map(|rows| rows.max(shared_rows)));
    let desc = KGroupedDesc::new(variant.dtype, shape, m, n)
        .gathered(case.gathered)
        .strides(strides)
        .f32_out(case.f32_out)
        .accumulate(case.accumulate)
        .keep_empty(case.keep_empty)
        .shared_rows(shared_rows)
        .shared_f32_out(shared.as_ref().is_some_and(|shared| shared.f32_out))
        .unaligned(variant.any)
        .kernels(variant.kernels);
    let selected = k_grouped::select(&desc, kernels.device()).unwrap().kernel.variant();
    assert_eq!(selected, variant.kernel, "{name}");
    let at = strides.unwrap_or(KGroupedStrides::packed(m, n));
    // Chunks are read by elements, or by 16 or 4 bytes at once.
    let shift = if variant.any { [1, 0, 2][(m + n) % 3] } else { 0 };
    let [a, b] =
        [("a", &a, a_rows, m, at.a), ("b", &b, b_rows, n, at.b)].map(|(name, values, rows, columns, [row, column])| {
            let spread = spread(values, [1, rows, columns], [0, row, column], nan);
            Guarded::shifted_input(&stream, name, &spread, shift)
        });
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
        shared.lay(at, shift, nan);
    }
    let launch = |rounded: &mut Guarded<T>,
                  wide: &mut Guarded<f32>,
                  columns: &mut Option<Columns<T>>,
                  shared: &mut Option<Shared<T>>| {
        let (a, b, mut rounded, mut wide) = (a.view(), b.view(), rounded.view_mut(), wide.view_mut());
        let out =
            if case.f32_out { ProductOut::F32((&mut wide).into()) } else { ProductOut::Rounded((&mut rounded).into()) };
        let mut args = KGroupedArgs::new(&a, &b, &dispatched, out);
        let frozen = frozen_in.as_ref().map(Guarded::view);
        args.frozen = frozen.as_ref().map(In::from);
        let mut sums = columns.as_mut().map(Columns::views);
        args.sums = sums.as_mut().map(asked);
        let mut views = shared.as_mut().map(Shared::views);
        args.shared = views.as_mut().map(|(a, b, rounded, wide, f32_out, columns)| {
            let out = if *f32_out { ProductOut::F32(wide.into()) } else { ProductOut::Rounded(rounded.into()) };
            let mut group = SharedGroup::new(&*a, &*b, out);
            group.sums = columns.as_mut().map(asked);
            group
        });
        k_grouped::forward(kernels, &stream, &desc, args).unwrap();
    };
    let mut first = None;
    for _ in 0..2 {
        rounded.reset(&stream);
        wide.reset(&stream);
        columns.iter_mut().for_each(Columns::reset);
        shared.iter_mut().for_each(Shared::reset);
        launch(&mut rounded, &mut wide, &mut columns, &mut shared);
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
        assert!(first.is_none_or(|first| first == now), "{name}: another run gave other bits");
        first = Some(now);
    }
    a.assert_unchanged(&stream);
    b.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut rounded, &mut wide, &mut columns, &mut shared));
}

/// Where sums of columns go, rounded or f32, the rows' factors, which of the two and whose columns, and a factor of all.
type ColumnViews<'a, T> = (CudaViewMut<'a, T>, CudaViewMut<'a, f32>, Option<CudaView<'a, f32>>, [bool; 2], f32);

fn asked<'a, T>((rounded, wide, weights, [f32_out, of_b], scale): &'a mut ColumnViews<'_, T>) -> ColumnSums<'a, T> {
    let out = if *f32_out { ProductOut::F32(wide.into()) } else { ProductOut::Rounded(rounded.into()) };
    let mut sums = ColumnSums::new(out).scale(*scale).of_b(*of_b);
    sums.weights = weights.as_ref().map(In::from);
    sums
}

/// A shared expert's rows: one group more, with everything of its own.
struct Shared<T: Storage> {
    rows: usize,
    sizes: [usize; 2],
    values: [Vec<T>; 2],
    f32_out: bool,
    old: (Vec<T>, Vec<f32>),
    want: Vec<f64>,
    bounds: Vec<f64>,
    columns: Option<Columns<T>>,
    outs: Vec<usize>,
    laid: Option<Laid<T>>,
}

/// Both operands, and both forms of the result.
struct Laid<T> {
    a: Guarded<T>,
    b: Guarded<T>,
    rounded: Guarded<T>,
    wide: Guarded<f32>,
}

impl<T: Storage> Shared<T> {
    fn draw(rng: &mut fastrand::Rng, variant: Variant, case: &Case, rows: usize) -> Shared<T> {
        let Case { m, n, .. } = *case;
        let values: [Vec<T>; 2] = [m, n].map(|columns| normals(rng, rows * columns, 1.0));
        let spans = [(0, rows)];
        let of = |f: fn(f64) -> f64| {
            let [a, b] = values.each_ref().map(|values| to_f64(values).into_iter().map(f).collect::<Vec<f64>>());
            let a = RowMatrix { values: &a[..], columns: m, slot_token: None };
            let b = RowMatrix { values: &b[..], columns: n, slot_token: None };
            reference(a, b, &spans).unwrap()
        };
        let (sums, magnitudes, squares) = (of(|v| v), of(f64::abs), of(|v| v * v));
        let arithmetic = if variant.dtype == Dtype::F32 { Arithmetic::Tf32x3 } else { Arithmetic::Mma16 };
        let f32_out = rng.bool();
        let old: (Vec<T>, Vec<f32>) = (normals(rng, m * n, 1.0), normals(rng, m * n, 1.0));
        let old64 = if f32_out { to_f64(&old.1) } else { to_f64(&old.0) };
        let (mut want, mut bounds) = (sums.clone(), vec![]);
        for i in 0..m * n {
            let own = arithmetic.sum_bound(rows, sums[i], magnitudes[i], squares[i].sqrt());
            if case.accumulate {
                want[i] += old64[i];
            }
            bounds.push(own + if case.accumulate { UNIT * want[i].abs() } else { 0.0 });
        }
        let columns = (rng.u8(..4) > 0).then(|| {
            let of_b = rng.bool();
            let (values, columns) = if of_b { (&values[1], n) } else { (&values[0], m) };
            let matrix = RowMatrix { values: &values[..], columns, slot_token: None };
            Columns::draw(rng, case, of_b, matrix, &spans, rows, &|_| false)
        });
        let old = if case.accumulate {
            old
        } else {
            (vec![Guarded::<T>::junk(); m * n], vec![Guarded::<f32>::junk(); m * n])
        };
        Shared { rows, sizes: [m, n], values, f32_out, old, want, bounds, columns, outs: vec![], laid: None }
    }

    /// Puts everything where the others' strides say.
    fn lay(&mut self, at: KGroupedStrides, shift: usize, nan: T) {
        let stream = device::stream();
        let [m, n] = self.sizes;
        let [a, b] =
            [("shared.a", 0, m, at.a), ("shared.b", 1, n, at.b)].map(|(name, side, columns, [row, column])| {
                let spread = spread(&self.values[side], [1, self.rows, columns], [0, row, column], nan);
                Guarded::shifted_input(&stream, name, &spread, shift)
            });
        self.outs = places([1, m, n], at.out);
        let all = self.outs.iter().max().unwrap() + 1;
        let mut before = (vec![Guarded::<T>::junk(); all], vec![Guarded::<f32>::junk(); all]);
        for (i, &at) in self.outs.iter().enumerate() {
            (before.0[at], before.1[at]) = (self.old.0[i], self.old.1[i]);
        }
        let rounded = Guarded::filled_output(&stream, "shared.out", &before.0, shift);
        let wide = Guarded::filled_output(&stream, "shared.out", &before.1, shift);
        self.laid = Some(Laid { a, b, rounded, wide });
    }

    #[allow(clippy::type_complexity)] // both operands, both forms of the result, which of them, sums
    fn views(
        &mut self,
    ) -> (CudaView<'_, T>, CudaView<'_, T>, CudaViewMut<'_, T>, CudaViewMut<'_, f32>, bool, Option<ColumnViews<'_, T>>)
    {
        let Laid { a, b, rounded, wide } = self.laid.as_mut().unwrap();
        let columns = self.columns.as_mut().map(Columns::views);
        (a.view(), b.view(), rounded.view_mut(), wide.view_mut(), self.f32_out, columns)
    }

    fn reset(&mut self) {
        let Laid { rounded, wide, .. } = self.laid.as_mut().unwrap();
        rounded.reset(&device::stream());
        wide.reset(&device::stream());
        self.columns.iter_mut().for_each(Columns::reset);
    }

    fn bytes(&self) -> Vec<u8> {
        let stream = device::stream();
        let Laid { rounded, wide, .. } = self.laid.as_ref().unwrap();
        let (rounded, wide) = (rounded.read(&stream), wide.read(&stream));
        let mut all = [bytemuck::cast_slice::<T, u8>(&rounded), bytemuck::cast_slice(&wide)].concat();
        all.extend(self.columns.iter().flat_map(Columns::bytes));
        all
    }

    fn check(&self, name: &str) {
        let stream = device::stream();
        let Laid { a, b, rounded, wide } = self.laid.as_ref().unwrap();
        let (got, dtype) = if self.f32_out {
            rounded.assert_unchanged(&stream);
            (to_f64(&wide.read(&stream)), Dtype::F32)
        } else {
            wide.assert_unchanged(&stream);
            (to_f64(&rounded.read(&stream)), T::DTYPE)
        };
        let got: Vec<f64> = self.outs.iter().map(|&at| got[at]).collect();
        assert_sums(name, &got, &self.want, &self.bounds, dtype);
        a.assert_unchanged(&stream);
        b.assert_unchanged(&stream);
        self.columns.iter().for_each(|columns| columns.check(name));
    }
}

/// Sums of columns, beside what they should be.
struct Columns<T> {
    rounded: Guarded<T>,
    wide: Guarded<f32>,
    weights: Option<Guarded<f32>>,
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
        let stream = device::stream();
        let RowMatrix { values, columns, slot_token } = matrix;
        let elements = spans.len() * columns;
        let weights: Option<Vec<f32>> = rng.bool().then(|| normals(rng, slots, 1.0));
        let (f32_out, scale) = (rng.bool(), [1.0, -1.5][rng.usize(..2)]);
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
            weights: weights.map(|weights| Guarded::input(&stream, "sums.weights", &weights)),
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
