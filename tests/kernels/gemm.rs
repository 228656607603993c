//! Checks of `gemm_*`.

use half::{bf16, f16};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Schedule, Tiles};
use moe_kernels::experts::tiles::max_tiles;
use moe_kernels::reference;
use moe_kernels::reference::dispatch::{Dispatched, dispatch};
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::registry::{Gemm, Kernel};
use moe_kernels::rules::{Activation, Dropout, NoiseSource};
use moe_kernels::rules::{Dtype, Glu};

use crate::dispatch::rule;
use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Bounded, Storage, UNIT, assert_sums, rounding, to_f64};
use crate::support::device;
use crate::support::inputs::normals;
use crate::timing::time;

pub fn check(variant: Gemm, rng: &mut fastrand::Rng) {
    match variant.dtype {
        Dtype::Bf16 => check_as::<bf16>(variant, rng),
        Dtype::F16 => check_as::<f16>(variant, rng),
        Dtype::F32 => check_as::<f32>(variant, rng),
    }
}

fn activations(glu: Glu) -> Vec<Activation> {
    let gated = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];
    match glu {
        Glu::None => [&[Activation::Identity][..], &gated].concat(),
        // The limit is low enough that values of unit scale are clamped.
        Glu::Split | Glu::Interleaved => {
            [&gated[..], &[Activation::ClampedSwiglu { alpha: 1.702, limit: 0.75 }]].concat()
        }
    }
}

/// Rows of each expert for the grouped cases: none, one, a tile less one, a whole tile, a tile and one more.
fn loads(bm: usize) -> Vec<usize> {
    vec![bm, 0, 1, bm + 1, 0, bm - 1]
}

fn check_as<T: Storage>(variant: Gemm, rng: &mut fastrand::Rng) {
    let bm = variant.tile.bm as usize;
    for (index, activation) in activations(variant.glu).into_iter().enumerate() {
        // K: less than a stage, ragged, several stages; N: less than a tile, ragged, two tiles.
        let k = [40, 8, 200, 328, 72][index];
        let n = [24, 72, 8, 136, 40][index];
        let case = Case { k, n, activation, gather: index % 2 == 0, bias: index % 3 != 1, scale: index % 2 == 0 };
        grouped::<T>(variant, rng, &loads(bm), &case);
        dense::<T>(variant, rng, &case);
    }
    // The largest depth in use, some hundred stages: few rows and columns, so that it is cheap.
    for (index, loads) in [[2, 0, 3].as_slice(), &[bm + 1]].into_iter().enumerate() {
        let activation = activations(variant.glu)[[0, 2][index]];
        let case = Case { k: 16384, n: 8, activation, gather: index == 0, bias: index == 1, scale: index == 0 };
        grouped::<T>(variant, rng, loads, &case);
    }
    // Nothing at all to do: no tile.
    let case = Case { k: 16, n: 16, activation: activations(variant.glu)[0], gather: true, bias: false, scale: false };
    grouped::<T>(variant, rng, &[0, 0, 0], &case);
}

struct Case {
    k: usize,
    n: usize,
    activation: Activation,
    gather: bool,
    bias: bool,
    scale: bool,
}

impl Case {
    fn desc(&self, variant: Gemm, rows: usize, a_rows: usize, experts: usize, schedule: Schedule) -> GemmDesc {
        GemmDesc {
            dtype: variant.dtype,
            rows,
            a_rows,
            experts,
            n: self.n,
            k: self.k,
            glu: variant.glu,
            activation: self.activation,
            layout: variant.layout,
            schedule,
        }
    }
}

/// `loads[e]` rows for expert `e`, spread over the tokens at random.
fn grouped<T: Storage>(variant: Gemm, rng: &mut fastrand::Rng, loads: &[usize], case: &Case) {
    let experts = loads.len();
    let tile_m = variant.tile.bm as usize;
    let mut ids: Vec<i32> =
        loads.iter().enumerate().flat_map(|(expert, &load)| std::iter::repeat_n(expert as i32, load)).collect();
    // Skipped slots leave rows that no tile covers, whose junk must survive.
    ids.extend([-1; 5]);
    rng.shuffle(&mut ids);
    let tokens = ids.len();
    let plan = dispatch(&ids, &rule(experts, 1, tile_m)).unwrap();
    let rows = tokens;
    let max_tiles = max_tiles(rows, experts, tile_m);
    let a_rows = if case.gather { tokens } else { rows };
    let desc = case.desc(variant, rows, a_rows, experts, Schedule::Grouped { tile_m, max_tiles });
    run::<T>(variant, rng, &desc, case, Some(&plan));
}

/// One expert for all rows, in a number, not a multiple of the tile's, for which the selection takes the variant.
fn dense<T: Storage>(variant: Gemm, rng: &mut fastrand::Rng, case: &Case) {
    let device = device::kernels().device();
    let bm = variant.tile.bm as usize;
    let desc = |rows| case.desc(variant, rows, rows, 1, Schedule::Dense);
    let rows = [1, bm - 1, bm + 5, 2 * bm + 5, 4 * bm + 5]
        .into_iter()
        .find(|&rows| gemm::select(&desc(rows), device).unwrap().kernel == Kernel::Gemm(variant));
    let rows = rows.expect("some number of rows takes each variant");
    run::<T>(variant, rng, &desc(rows), case, None);
}

fn run<T: Storage>(variant: Gemm, rng: &mut fastrand::Rng, desc: &GemmDesc, case: &Case, plan: Option<&Dispatched>) {
    let kernels = device::kernels();
    let stream = device::stream();
    let GemmDesc { rows, a_rows, experts, n, k, activation, .. } = *desc;
    let name = format!(
        "{} rows={rows} E={experts} N={n} K={k} {activation:?} gather={} bias={} scale={}",
        if plan.is_some() { "grouped" } else { "dense" },
        case.gather,
        case.bias,
        case.scale
    );
    let columns = desc.b_columns();
    let a: Vec<T> = normals(rng, a_rows * k, 1.0);
    // Products of unit scale.
    let b: Vec<T> = normals(rng, experts * columns * k, (k as f64).powf(-0.5));
    let bias: Option<Vec<T>> = case.bias.then(|| normals(rng, experts * columns, 1.0));
    let scale: Option<Vec<f32>> = case.scale.then(|| normals(rng, rows, 1.0));

    let matrix = ExpertMatrix { weight: &b, bias: bias.as_deref(), n, k, glu: variant.glu, layout: variant.layout };
    let scale64 = scale.as_deref().map(to_f64);
    let whole;
    let (plan, gather) = match plan {
        Some(plan) => (plan, case.gather),
        None => {
            whole = dispatch(&vec![0; rows], &rule(1, 1, variant.tile.bm as usize)).unwrap();
            (&whole, false)
        }
    };
    let live = plan.slot_token.len();
    let scale_live = scale64.as_ref().map(|scale| &scale[..live]);
    let a_live = if gather { &a[..] } else { &a[..live * k] };
    let want = reference::gemm::grouped_gemm(a_live, &matrix, plan, gather, scale_live, activation).unwrap();
    let bounds = bounds(a_live, &matrix, plan, gather, scale_live, activation, arithmetic(variant.dtype));

    assert_eq!(gemm::select(desc, kernels.device()).unwrap().kernel, Kernel::Gemm(variant));
    let a = Guarded::input(&stream, "a", &a);
    let b = Guarded::input(&stream, "b", &b);
    let bias = bias.map(|values| Guarded::input(&stream, "bias", &values));
    let scale = scale.map(|values| Guarded::input(&stream, "row_scale", &values));
    let grouped = matches!(desc.schedule, Schedule::Grouped { .. });
    let slot_token = gather.then(|| {
        let mut padded = plan.slot_token.clone();
        padded.resize(rows, i32::MAX);
        Guarded::input(&stream, "slot_token", &padded)
    });
    let tiles = grouped.then(|| {
        let mut list = plan.tiles.clone();
        // Entries past the count must not be looked at.
        list.resize(max_tiles(rows, experts, variant.tile.bm as usize), [i32::MAX; 4]);
        let count = Guarded::input(&stream, "num_tiles", &[plan.tiles.len() as i32]);
        (Guarded::input(&stream, "tiles", &list), count)
    });
    let mut out = Guarded::<T>::output(&stream, "out", rows * n);
    let junk = out.read(&stream);
    let launch = |out: &mut Guarded<T>, dropout: Option<Dropout>| {
        let (bias, scale) = (bias.as_ref().map(Guarded::view), scale.as_ref().map(Guarded::view));
        let slot_token = slot_token.as_ref().map(Guarded::view);
        let tiles = tiles.as_ref().map(|(tiles, count)| (tiles.view(), count.view()));
        let args = GemmArgs {
            a: &a.view(),
            b: &b.view(),
            bias: bias.as_ref().map(|view| view as _),
            slot_token: slot_token.as_ref().map(|view| view as _),
            row_scale: scale.as_ref().map(|view| view as _),
            tiles: tiles.as_ref().map(|(tiles, num_tiles)| Tiles { tiles, num_tiles }),
            out: &mut out.view_mut(),
        };
        match dropout {
            None => gemm::forward(kernels, &stream, desc, args).unwrap(),
            Some(dropout) => gemm::forward_with_dropout(kernels, &stream, desc, args, dropout).unwrap(),
        }
    };
    launch(&mut out, None);
    let first = out.read(&stream);
    assert_sums(&name, &to_f64(&first[..live * n]), &want, &bounds, variant.dtype);
    let same = bytemuck::cast_slice::<T, u8>(&first[live * n..]) == bytemuck::cast_slice::<T, u8>(&junk[live * n..]);
    assert!(same, "{name}: a row that no tile covers was written");
    a.assert_unchanged(&stream);
    b.assert_unchanged(&stream);
    time(&stream, &name, || launch(&mut out, None));
    out.reset(&stream);
    launch(&mut out, None);
    let again = out.read(&stream);
    let same = bytemuck::cast_slice::<T, u8>(&again) == bytemuck::cast_slice::<T, u8>(&first);
    assert!(same, "{name}: another run gave other bits");

    // The mask is the host's, exactly; what is kept is scaled before the one rounding.
    let noise = NoiseSource { seed: rng.u64(..), offset: rng.u64(..) };
    let dropout = Dropout { probability: [0.1, 0.4, 0.75][rng.usize(..3)], noise };
    let (mut want, mut bounds) = (want, bounds);
    reference::gemm::dropout(&mut want, dropout.probability, noise).unwrap();
    reference::gemm::dropout(&mut bounds, dropout.probability, noise).unwrap();
    // The scale is one more f32 product.
    bounds.iter_mut().zip(&want).for_each(|(bound, w)| *bound += UNIT * w.abs());
    out.reset(&stream);
    launch(&mut out, Some(dropout));
    let got = out.read(&stream);
    let name = format!("{name} {dropout:?}");
    assert_sums(&name, &to_f64(&got[..live * n]), &want, &bounds, variant.dtype);
    let below = reference::gemm::drop_below(dropout.probability);
    for (i, value) in to_f64(&got[..live * n]).into_iter().enumerate() {
        let kept = noise.dropout_word(i as u64) >= below;
        assert!(kept || value == 0.0, "{name}: output {i} is {value}, dropped");
        // ReLU makes zeros of its own, and so does the type of what is smaller than its numbers.
        assert!(
            !kept || value != 0.0 || want[i].abs() <= bounds[i] + rounding(variant.dtype, 0.0),
            "{name}: output {i} is 0, not dropped"
        );
    }
    let same = bytemuck::cast_slice::<T, u8>(&got[live * n..]) == bytemuck::cast_slice::<T, u8>(&junk[live * n..]);
    assert!(same, "{name}: a row that no tile covers was written");
}

fn arithmetic(dtype: Dtype) -> Arithmetic {
    if dtype == Dtype::F32 { Arithmetic::Tf32x3 } else { Arithmetic::Mma16 }
}

/// By how much each output `[rows, N]` may be off before it is rounded: each product's bound, carried through scale, bias and activation.
fn bounds<T: Storage>(
    a: &[T],
    matrix: &ExpertMatrix<T>,
    plan: &Dispatched,
    gather: bool,
    scale: Option<&[f64]>,
    activation: Activation,
    arithmetic: Arithmetic,
) -> Vec<f64> {
    let (columns, n) = (matrix.weight_rows(), matrix.n);
    let plain = |a: &[f64], weight: &[f64], bias: Option<&[f64]>, scale: Option<&[f64]>| {
        let plain = ExpertMatrix { weight, bias, n: columns, k: matrix.k, glu: Glu::None, layout: matrix.layout };
        reference::gemm::grouped_gemm(a, &plain, plan, gather, scale, Activation::Identity).unwrap()
    };
    let (a, weight, bias) = (to_f64(a), to_f64(matrix.weight), matrix.bias.map(to_f64));
    let of = |values: &[f64], f: fn(f64) -> f64| values.iter().map(|&value| f(value)).collect::<Vec<_>>();
    let sums = plain(&a, &weight, bias.as_deref(), scale);
    let products = plain(&a, &weight, None, None);
    let magnitudes = plain(&of(&a, f64::abs), &of(&weight, f64::abs), None, None);
    let squares = plain(&of(&a, |v| v * v), &of(&weight, |v| v * v), None, None);
    let at = |i: usize| {
        let error = arithmetic.sum_bound(matrix.k, products[i], magnitudes[i], squares[i].sqrt());
        Bounded { value: sums[i], error }.scaled(scale.map_or(1.0, |scale| scale[i / columns]))
    };
    (0..plan.slot_token.len() * n)
        .map(|i| {
            let (row, c) = (i / n * columns, i % n);
            let (gate, up) = match matrix.glu {
                Glu::None => (at(row + c), None),
                Glu::Split => (at(row + c), Some(at(row + n + c))),
                Glu::Interleaved => (at(row + 2 * c), Some(at(row + 2 * c + 1))),
            };
            Bounded::activated(activation, gate, up).error
        })
        .collect()
}
