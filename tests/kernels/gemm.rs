//! Checks of `gemm_*`.

use half::{bf16, f16};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::tiles::max_tiles;
use moe_kernels::experts::{SlotShape, Weight};
use moe_kernels::reference::dispatch::{Dispatched as Plan, dispatch};
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::registry::{Fold, Gemm, Kernel};
use moe_kernels::rules::{Activation, Dropout, Glu, Layout, NoiseSource, WeightDesc, drop_below};
use moe_kernels::{Dtype, In, reference};

use crate::dispatch::rule;
use crate::rows::Rows as Lists;
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
        other => unreachable!("no kernel has {other}"),
    }
}

fn activations(fold: Fold) -> Vec<Activation> {
    let gated = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];
    match fold {
        Fold::Plain => [&[Activation::Identity][..], &gated].concat(),
        // The limit is low enough that values of unit scale are clamped.
        Fold::Glu | Fold::Iglu => [&gated[..], &[Activation::ClampedSwiglu { alpha: 1.702, limit: 0.75 }]].concat(),
    }
}

/// The forms of a weight that the variant takes.
fn forms(fold: Fold) -> &'static [Glu] {
    match fold {
        Fold::Plain => &[Glu::None],
        Fold::Glu => &[Glu::Split, Glu::UpFirst, Glu::Apart],
        Fold::Iglu => &[Glu::Interleaved],
    }
}

/// Rows of each expert for the grouped cases: none, one, a tile less one, a whole tile, a tile and one more.
fn loads(bm: usize) -> Vec<usize> {
    vec![bm, 0, 1, bm + 1, 0, bm - 1]
}

fn check_as<T: Storage>(variant: Gemm, rng: &mut fastrand::Rng) {
    let bm = variant.tile.bm as usize;
    let forms = forms(variant.fold);
    let form = |index: usize| forms[index % forms.len()];
    for (index, activation) in activations(variant.fold).into_iter().enumerate() {
        // K: less than a stage, ragged, several stages; N: less than a tile, ragged, two tiles.
        let k = [40, 8, 200, 328, 72][index];
        let n = [24, 72, 8, 136, 40][index];
        let (gather, bias) = (index % 2 == 0, index % 3 != 1);
        let (scale, out_scale) = (index % 2 == 0, index % 2 == 1);
        let case = Case { k, n, glu: form(index), activation, gather, bias, scale, out_scale };
        grouped::<T>(variant, rng, &loads(bm), &case);
        // Every form with a bias and without, every activation with a factor of the result and without.
        dense::<T>(variant, rng, &Case { glu: form(index + 1), out_scale: !out_scale, ..case });
    }
    // The largest depth in use, some hundred stages: few rows and columns, so that it is cheap.
    for (index, loads) in [[2, 0, 3].as_slice(), &[bm + 1]].into_iter().enumerate() {
        let activation = activations(variant.fold)[[0, 2][index]];
        let (glu, first) = (form(index + 1), index == 0);
        let case =
            Case { k: 16384, n: 8, glu, activation, gather: first, bias: !first, scale: first, out_scale: first };
        grouped::<T>(variant, rng, loads, &case);
    }
    // Nothing at all to do: no tile.
    let activation = activations(variant.fold)[0];
    let (gather, bias, scale, out_scale) = (true, false, false, false);
    let case = Case { k: 16, n: 16, glu: form(0), activation, gather, bias, scale, out_scale };
    grouped::<T>(variant, rng, &[0, 0, 0], &case);
}

#[derive(Clone, Copy, Debug)]
struct Case {
    k: usize,
    n: usize,
    glu: Glu,
    activation: Activation,
    gather: bool,
    bias: bool,
    scale: bool,
    out_scale: bool,
}

impl Case {
    fn desc(&self, variant: Gemm, rows: Rows) -> GemmDesc {
        GemmDesc::new(variant.dtype, rows, self.n, self.k)
            .gather(self.gather && matches!(rows, Rows::Grouped(_)))
            .weight(WeightDesc::new(variant.dtype).layout(variant.layout).glu(self.glu))
            .activation(self.activation)
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
    let shape = SlotShape::new(tokens, experts, Some(1), tokens, tile_m, max_tiles(tokens, experts, tile_m));
    run::<T>(variant, rng, &case.desc(variant, Rows::Grouped(shape)), case, &plan);
}

/// One expert for all rows, in a number, not a multiple of the tile's, for which the selection takes the variant.
fn dense<T: Storage>(variant: Gemm, rng: &mut fastrand::Rng, case: &Case) {
    let device = device::kernels().device();
    let bm = variant.tile.bm as usize;
    let desc = |rows| case.desc(variant, Rows::Dense(rows));
    let rows = [1, bm - 1, bm + 5, 2 * bm + 5, 4 * bm + 5]
        .into_iter()
        .find(|&rows| gemm::select(&desc(rows), device).unwrap().kernel.variant() == Kernel::Gemm(variant));
    let rows = rows.expect("some number of rows takes each variant");
    let plan = dispatch(&vec![0; rows], &rule(1, 1, bm)).unwrap();
    run::<T>(variant, rng, &desc(rows), case, &plan);
}

/// Gate and up of each expert, out of a tensor that has gate's outputs first.
fn apart<T: Storage>(both: &[T], layout: Layout, outputs: usize, k: usize) -> [Vec<T>; 2] {
    // What lies together of either: a matrix, or a row of a matrix.
    let run = if layout == Layout::Nk { outputs * k } else { outputs };
    [0, 1].map(|part| both.chunks(run).skip(part).step_by(2).flatten().copied().collect())
}

/// `plan` says which rows go to which expert; dense rows have one of a single expert.
fn run<T: Storage>(variant: Gemm, rng: &mut fastrand::Rng, desc: &GemmDesc, case: &Case, plan: &Plan) {
    let kernels = device::kernels();
    let stream = device::stream();
    let Case { k, n, glu, activation, .. } = *case;
    let (rows, a_rows, experts, gather) = (desc.rows.count(), desc.a_rows(), desc.rows.experts(), desc.gather);
    let form = if matches!(desc.rows, Rows::Grouped(_)) { "grouped" } else { "dense" };
    let name = format!("{form} rows={rows} E={experts} {case:?}");
    let columns = if glu.is_gated() { 2 * n } else { n };
    let a: Vec<T> = normals(rng, a_rows * k, 1.0);
    // Products of unit scale.
    let b: Vec<T> = normals(rng, experts * columns * k, (k as f64).powf(-0.5));
    let bias: Option<Vec<T>> = case.bias.then(|| normals(rng, experts * columns, 1.0));
    let scale: Option<Vec<f32>> = case.scale.then(|| normals(rng, rows, 1.0));
    let out_scale: Option<Vec<f32>> = case.out_scale.then(|| normals(rng, rows, 1.0));

    let matrix = ExpertMatrix { weight: &b, bias: bias.as_deref(), n, k, glu, layout: variant.layout };
    let scale64 = scale.as_deref().map(to_f64);
    let live = plan.slot_token.len();
    let scale_live = scale64.as_ref().map(|scale| &scale[..live]);
    let a_live = if gather { &a[..] } else { &a[..live * k] };
    let mut want = reference::gemm::grouped_gemm(a_live, &matrix, plan, gather, scale_live, activation).unwrap();
    let mut bounds = bounds(a_live, &matrix, plan, gather, scale_live, activation, arithmetic(variant.dtype));
    // The factor of the result, and its own rounding.
    for (i, (want, bound)) in want.iter_mut().zip(&mut bounds).enumerate() {
        let factor = out_scale.as_ref().map_or(1.0, |scale| f64::from(scale[i / n]));
        *want *= factor;
        *bound = *bound * factor.abs() + if case.out_scale { UNIT * want.abs() } else { 0.0 };
    }

    assert_eq!(gemm::select(desc, kernels.device()).unwrap().kernel.variant(), Kernel::Gemm(variant));
    let a = Guarded::input(&stream, "a", &a);
    let (weights, biases) = if glu == Glu::Apart {
        (apart(&b, variant.layout, n, k).to_vec(), bias.map_or(vec![], |bias| apart(&bias, Layout::Nk, n, 1).to_vec()))
    } else {
        (vec![b], bias.into_iter().collect())
    };
    let input = |name| move |values: &Vec<T>| Guarded::input(&device::stream(), name, values);
    let weights: Vec<_> = weights.iter().map(input("weight")).collect();
    let biases: Vec<_> = biases.iter().map(input("bias")).collect();
    let scale = scale.map(|values| Guarded::input(&stream, "row_scale", &values));
    let out_scale = out_scale.map(|values| Guarded::input(&stream, "out_scale", &values));
    let dispatched = match &desc.rows {
        Rows::Grouped(shape) => Some(Lists::of(plan).dispatched(&stream, shape)),
        _ => None,
    };
    let mut out = Guarded::<T>::output(&stream, "out", rows * n);
    let junk = out.read(&stream);
    let launch = |out: &mut Guarded<T>, dropout: Option<Dropout>| {
        let (a, mut out) = (a.view(), out.view_mut());
        let [weights, biases] = [&weights, &biases].map(|all| all.iter().map(Guarded::view).collect::<Vec<_>>());
        let [scale, out_scale] = [&scale, &out_scale].map(|scale| scale.as_ref().map(Guarded::view));
        let mut weight = match weights.as_slice() {
            [gate, up] => Weight::apart(gate, up),
            all => Weight::new(&all[0]),
        };
        for (index, bias) in biases.iter().enumerate() {
            weight = if index == 0 { weight.bias(bias) } else { weight.up_bias(bias) };
        }
        let mut args = GemmArgs::new(&a, weight, &mut out);
        args.dispatched = dispatched.as_ref();
        args.row_scale = scale.as_ref().map(In::from);
        args.out_scale = out_scale.as_ref().map(In::from);
        args.dropout = dropout;
        gemm::forward(kernels, &stream, desc, args).unwrap()
    };
    launch(&mut out, None);
    let first = out.read(&stream);
    assert_sums(&name, &to_f64(&first[..live * n]), &want, &bounds, variant.dtype);
    let same = bytemuck::cast_slice::<T, u8>(&first[live * n..]) == bytemuck::cast_slice::<T, u8>(&junk[live * n..]);
    assert!(same, "{name}: a row that no tile covers was written");
    a.assert_unchanged(&stream);
    weights.iter().chain(&biases).for_each(|input| input.assert_unchanged(&stream));
    time(&stream, &name, || launch(&mut out, None));
    out.reset(&stream);
    launch(&mut out, None);
    let again = out.read(&stream);
    let same = bytemuck::cast_slice::<T, u8>(&again) == bytemuck::cast_slice::<T, u8>(&first);
    assert!(same, "{name}: another run gave other bits");

    // The mask is the host's, exactly; what is kept is scaled before the one rounding.
    let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
    let dropout = Dropout::new([0.1, 0.4, 0.75][rng.usize(..3)], noise);
    reference::gemm::dropout(&mut want, dropout.probability, noise).unwrap();
    reference::gemm::dropout(&mut bounds, dropout.probability, noise).unwrap();
    // The scale is one more f32 product.
    bounds.iter_mut().zip(&want).for_each(|(bound, w)| *bound += UNIT * w.abs());
    out.reset(&stream);
    launch(&mut out, Some(dropout));
    let got = out.read(&stream);
    let name = format!("{name} {dropout:?}");
    assert_sums(&name, &to_f64(&got[..live * n]), &want, &bounds, variant.dtype);
    let below = drop_below(dropout.probability);
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
    plan: &Plan,
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
                Glu::Split | Glu::Apart => (at(row + c), Some(at(row + n + c))),
                Glu::UpFirst => (at(row + n + c), Some(at(row + c))),
                Glu::Interleaved => (at(row + 2 * c), Some(at(row + 2 * c + 1))),
                other => unreachable!("no case has {other:?}"),
            };
            Bounded::activated(activation, gate, up).error
        })
        .collect()
}
