//! One product: every weight form, with all that goes into its epilogue.
//!
//! An element's tolerance is what f32 sums may be off by, carried through the activation: the reference is evaluated again where each
//! sum is moved by a share of its terms' magnitudes. Cancellation is allowed for so, and nothing else.

use half::{bf16, f16};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::reference;
use moe_kernels::reference::activation::{activate, activate_glu};
use moe_kernels::reference::dispatch::DispatchRule;
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::registry::{Gemm, Kernel};
use moe_kernels::rules::{Activation, Dropout, Glu, Layout, NoiseSource, WeightDesc, drop_below, keep_scale};
use moe_kernels::{Dtype, Workspace};

use crate::buffer::Guarded;
use crate::device;
use crate::values::{Storage, generator, normals, wide};

/// What a sum of products may be off by, of the sum of its terms' magnitudes: f32 additions of a few hundred terms in any order, and 3xTF32.
const SUM: f64 = 5e-7;

const GLUS: [Glu; 5] = [Glu::None, Glu::Split, Glu::UpFirst, Glu::Interleaved, Glu::Apart];

/// Everything about one product.
#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: Dtype,
    weight: WeightDesc,
    activation: Activation,
    /// Height of the tiles of grouped rows; none for a dense product.
    tile_m: Option<usize>,
    /// Rows of a dense product.
    rows: usize,
    n: usize,
    k: usize,
    gather: bool,
    bias: bool,
    row_scale: bool,
    out_scale: bool,
    dropout: bool,
}

fn activations(glu: Glu) -> Vec<Activation> {
    let all = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];
    match glu {
        Glu::None => [&all[..], &[Activation::Identity]].concat(),
        // The limit is low enough that values of unit scale are clamped.
        _ => [&all[..], &[Activation::ClampedSwiglu { alpha: 1.702, limit: 0.75 }]].concat(),
    }
}

/// Every tile, weight form and layout of a type; what else there is, is drawn.
fn products<T: Storage>() {
    let mut rng = generator("products", T::DTYPE);
    for tile in Gemm::tiles(T::DTYPE) {
        for glu in GLUS {
            for layout in Layout::ALL {
                let activations = activations(glu);
                for grouped in [true, false] {
                    let case = Case {
                        dtype: T::DTYPE,
                        weight: WeightDesc::new(T::DTYPE).glu(glu).layout(layout),
                        activation: activations[rng.usize(..activations.len())],
                        tile_m: grouped.then_some(tile.bm as usize),
                        rows: [tile.bm as usize, 2 * tile.bm as usize + rng.usize(1..9)][rng.usize(..2)],
                        n: 8 * rng.usize(1..18),
                        k: 8 * [rng.usize(1..8), rng.usize(8..42)][rng.usize(..2)],
                        gather: grouped && rng.bool(),
                        bias: rng.bool(),
                        row_scale: rng.bool(),
                        out_scale: rng.bool(),
                        dropout: rng.u8(..4) == 0,
                    };
                    check::<T>(&case, &mut rng);
                }
            }
        }
    }
}

#[test]
fn products_bf16() {
    products::<bf16>();
}

#[test]
fn products_f16() {
    products::<f16>();
}

#[test]
fn products_f32() {
    products::<f32>();
}

/// Expert of each token: none, one, a tile less one, a whole tile, a tile and one more, and tokens without an expert.
fn ids(case: &Case, rng: &mut fastrand::Rng) -> (Vec<i32>, usize) {
    let Some(bm) = case.tile_m else { return (vec![0; case.rows], 1) };
    let loads = [bm, 0, 1, bm + 1, 0, bm - 1];
    let mut ids: Vec<i32> = (0..).zip(loads).flat_map(|(expert, load)| std::iter::repeat_n(expert, load)).collect();
    // Rows that no tile covers, whose junk must survive.
    ids.extend([-1; 5]);
    rng.shuffle(&mut ids);
    (ids, loads.len())
}

/// Gates and ups of one expert apart, from rows (`Nk`) or columns (`Kn`) of a weight that holds one after the other.
fn halves<T: Copy>(weight: &[T], layout: Layout, [experts, n, k]: [usize; 3]) -> [Vec<T>; 2] {
    let chunk = if layout == Layout::Nk { n * k } else { n };
    let pairs = experts * 2 * n * k / (2 * chunk);
    [0, 1].map(|half| (0..pairs).flat_map(|i| weight[(2 * i + half) * chunk..][..chunk].iter().copied()).collect())
}

fn check<T: Storage>(case: &Case, rng: &mut fastrand::Rng) {
    let Case { n, k, weight, activation, .. } = *case;
    let name = format!("{case:?}");
    let (kernels, stream) = (device::kernels(), device::stream());
    let (ids, experts) = ids(case, rng);
    let tokens = ids.len();
    let outputs = if weight.glu == Glu::None { n } else { 2 * n };
    let rule = DispatchRule { experts, top_k: 1, capacity: None, tile_m: case.tile_m.unwrap_or(16) };
    let plan = reference::dispatch::dispatch(&ids, &rule).unwrap();
    let live = plan.slot_token.len();

    let a: Vec<T> = normals(rng, tokens * k, 1.0);
    // Products of unit scale.
    let b: Vec<T> = normals(rng, experts * outputs * k, (k as f64).powf(-0.5));
    let bias: Option<Vec<T>> = case.bias.then(|| normals(rng, experts * outputs, 1.0));
    let row_scale: Option<Vec<f32>> = case.row_scale.then(|| normals(rng, tokens, 1.0));
    let out_scale: Option<Vec<f32>> = case.out_scale.then(|| normals(rng, tokens, 1.0));
    let dropout = case.dropout.then(|| Dropout::new(0.4, NoiseSource::new(rng.u64(..), rng.u64(..))));

    // What stands before the activation, and the magnitudes of its terms.
    let a_live = if case.gather { &a[..] } else { &a[..live * k] };
    let sums = |a: &[f64], b: &[f64], bias: Option<&[f64]>, scale: Option<&[f64]>| {
        let matrix = ExpertMatrix { weight: b, bias, n, k, glu: weight.glu, layout: weight.layout };
        reference::gemm::grouped_pre_activation(a, &matrix, &plan, case.gather, scale.map(|s| &s[..live])).unwrap()
    };
    let magnitudes = |values: &[f64]| values.iter().map(|v| v.abs()).collect::<Vec<f64>>();
    let (wide_a, wide_b) = (wide(a_live), wide(&b));
    let (wide_bias, wide_scale) = (bias.as_deref().map(wide), row_scale.as_deref().map(wide));
    let before = sums(&wide_a, &wide_b, wide_bias.as_deref(), wide_scale.as_deref());
    let size = sums(
        &magnitudes(&wide_a),
        &magnitudes(&wide_b),
        wide_bias.as_deref().map(magnitudes).as_deref(),
        wide_scale.as_deref().map(magnitudes).as_deref(),
    );
    let gated = weight.glu != Glu::None;
    let output =
        |gate: f64, up: f64| if gated { activate_glu(activation, gate, up) } else { activate(activation, gate) };

    let a = Guarded::input(&stream, "a", &a);
    let whole = Guarded::input(&stream, "b", &b);
    let parts = (weight.glu == Glu::Apart).then(|| halves(&b, weight.layout, [experts, n, k]));
    let parts = parts.map(|parts| parts.map(|part| Guarded::input(&stream, "b", &part)));
    let bias_parts = match (&bias, weight.glu) {
        (Some(bias), Glu::Apart) => halves(bias, Layout::Kn, [experts, n, 1]).to_vec(),
        (Some(bias), _) => vec![bias.clone()],
        (None, _) => vec![],
    };
    let bias_parts: Vec<_> = bias_parts.iter().map(|part| Guarded::input(&stream, "bias", part)).collect();
    let row_scale = row_scale.map(|scale| Guarded::input(&stream, "row_scale", &scale));
    let out_scale_on_device = out_scale.as_ref().map(|scale| Guarded::input(&stream, "out_scale", scale));
    let mut out = Guarded::<T>::output(&stream, "out", tokens * n);
    let junk = out.read(&stream);

    let mut dispatched = None;
    let rows = match case.tile_m {
        None => Rows::Dense(tokens),
        Some(tile_m) => {
            let desc = DispatchDesc::new(tokens, experts, 1, tile_m);
            let ids = stream.clone_htod(&ids).unwrap();
            let bytes = dispatch::workspace_bytes(&desc, kernels.device()).unwrap();
            let mut workspace = Workspace::new(&stream, bytes).unwrap();
            let mut lists = Dispatched::new(&stream, &desc.shape()).unwrap();
            let args = DispatchArgs::new(&ids, &mut lists, &mut workspace);
            dispatch::forward(kernels, &stream, &desc, args).unwrap();
            dispatched = Some(lists);
            Rows::Grouped(desc.shape())
        }
    };
    let desc = GemmDesc::new(case.dtype, rows, n, k).gather(case.gather).weight(weight).activation(activation);
    let Kernel::Gemm(kernel) = gemm::select(&desc, kernels.device()).unwrap().kernel.variant() else { unreachable!() };
    assert!(case.tile_m.is_none_or(|tile_m| kernel.tile.bm as usize == tile_m), "{name}: {kernel:?}");
    {
        let views: Vec<_> = parts.iter().flatten().map(Guarded::view).collect();
        let (whole, a) = (whole.view(), a.view());
        let mut tensors = if views.is_empty() { Weight::new(&whole) } else { Weight::apart(&views[0], &views[1]) };
        let biases: Vec<_> = bias_parts.iter().map(Guarded::view).collect();
        if let Some(bias) = biases.first() {
            tensors = tensors.bias(bias);
        }
        if let Some(bias) = biases.get(1) {
            tensors = tensors.up_bias(bias);
        }
        let (row_scale, out_scale) =
            (row_scale.as_ref().map(Guarded::view), out_scale_on_device.as_ref().map(Guarded::view));
        let mut view = out.view_mut();
        let mut args = GemmArgs::new(&a, tensors, &mut view);
        args.dispatched = dispatched.as_ref();
        args.row_scale = row_scale.as_ref().map(Into::into);
        args.out_scale = out_scale.as_ref().map(Into::into);
        args.dropout = dropout;
        gemm::forward(kernels, &stream, &desc, args).unwrap();
    }
    let got = out.read(&stream);

    let width = before.len() / live;
    for row in 0..live {
        for column in 0..n {
            let at = |values: &[f64], half: usize| values.get(row * width + half * n + column).copied().unwrap_or(0.0);
            let up = if gated { 1 } else { 0 };
            let (gate, up) = ([at(&before, 0), SUM * at(&size, 0)], [at(&before, up), SUM * at(&size, up)]);
            let mut want = output(gate[0], up[0]);
            let moved =
                [-1.0, 1.0].map(|i| [-1.0, 1.0].map(|j| output(gate[0] + i * gate[1], up[0] + j * up[1]) - want));
            let mut bound = moved.into_iter().flatten().fold(0.0, |most: f64, off| most.max(off.abs()));
            // Of the activation itself: `kernels/common/epilogue/activation`.
            bound += 1e-6 * (want.abs() + 0.1 * if gated { 1.0 + up[0].abs() } else { 1.0 });
            let mut scale = out_scale.as_ref().map_or(1.0, |scale| f64::from(scale[row]));
            if let Some(dropout) = dropout {
                let word = dropout.noise.dropout_word((row * n + column) as u64);
                scale *=
                    if word < drop_below(dropout.probability) { 0.0 } else { keep_scale(dropout.probability).into() };
            }
            (want, bound) = (want * scale, bound * scale.abs());
            let value: f64 = got[row * n + column].into();
            let bound = bound + (T::ROUNDOFF * (want.abs() + bound)).max(T::SMALLEST);
            assert!(
                (value - want).abs() <= bound,
                "{name}: [{row}, {column}] is {value:e}, want {want:e}, bound {bound:.3e}"
            );
        }
    }
    let same = bytemuck::cast_slice::<T, u8>(&got[live * n..]) == bytemuck::cast_slice::<T, u8>(&junk[live * n..]);
    assert!(same, "{name}: a row that no tile covers was written");
    a.assert_unchanged(&stream);
    whole.assert_unchanged(&stream);
}
