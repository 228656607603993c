//! One product: every weight form, with all that goes into its epilogue.
//!
//! An element's tolerance is what f32 sums may be off by, carried through the activation: the reference is evaluated again where each
//! sum is moved by a share of its terms' magnitudes. Cancellation is allowed for so, and nothing else.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView};
use half::{bf16, f16};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows, SharedRows};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::reference;
use moe_kernels::reference::activation::{activate, activate_glu, sigmoid};
use moe_kernels::reference::dispatch::DispatchRule;
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::registry::{Gemm, GemmSwapped, Kernel};
use moe_kernels::rules::{
    Activation, Bound, Dropout, Glu, Layout, NoiseSource, Swiglu, WeightDesc, drop_below, keep_scale,
};
use moe_kernels::{Dtype, Workspace};

use crate::buffer::Guarded;
use crate::device;
use crate::values::{Storage, generator, normals, wide};

/// What a sum of products may be off by, of the sum of its terms' magnitudes: f32 additions of a few hundred terms in any order. f32 products
/// are three of TF32: what they leave out is below 2^-20, and each operand is good to 2^-22.
fn sum_off(dtype: Dtype) -> f64 {
    let product = if dtype == Dtype::F32 { 24.0 / 16_777_216.0 } else { 0.0 };
    5e-7 + product
}

const GLUS: [Glu; 5] = [Glu::None, Glu::Split, Glu::UpFirst, Glu::Interleaved, Glu::Apart];

/// Everything about one product.
#[derive(Clone, Copy, Debug)]
struct Case {
    weight: WeightDesc,
    activation: Activation,
    /// Height of the tiles of grouped rows; none for a dense product.
    tile_m: Option<usize>,
    /// Rows of a dense product, or of the shared expert beside grouped ones.
    rows: usize,
    n: usize,
    k: usize,
    gather: bool,
    bias: bool,
    row_scale: bool,
    out_scale: bool,
    dropout: bool,
    keeps: bool,
}

/// With every bound, alone and together.
const SWIGLUS: [Swiglu; 6] = [
    Swiglu::clamped(0.75).alpha(1.702).offset(1.0),
    Swiglu::clamped(0.5),
    Swiglu::clamped(0.25).clamp_after(true).factor(-0.5),
    Swiglu::softcapped(0.75, 1.5),
    Swiglu::new().gate(Bound::Softcap(2.0)).up(Bound::Clamp(0.5)).alpha(0.5).offset(-1.0),
    Swiglu::new().up(Bound::Softcap(0.5)).factor(2.0).offset(0.25),
];

fn activations(glu: Glu) -> Vec<Activation> {
    let all = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::ReluSquared];
    match glu {
        Glu::None => [&all[..], &[Activation::Identity]].concat(),
        // The limits are low enough that values of unit scale are clamped.
        _ => [&all[..], &SWIGLUS.map(Activation::Swiglu)].concat(),
    }
}

/// Every tile, weight form and layout of a type; what else there is, is drawn.
fn products<T: Storage>() {
    let mut rng = generator("products", T::DTYPE);
    for tile in Gemm::tiles(T::DTYPE) {
        for glu in GLUS {
            for layout in Layout::ALL {
                let (activations, bm) = (activations(glu), tile.bm as usize);
                for grouped in [true, false] {
                    let rows = [bm, 2 * bm + rng.usize(1..9), rng.usize(1..bm)][rng.usize(..3)];
                    let case = Case {
                        weight: WeightDesc::new(T::DTYPE).glu(glu).layout(layout),
                        activation: activations[rng.usize(..activations.len())],
                        tile_m: grouped.then_some(bm),
                        rows: if grouped && rng.bool() { 0 } else { rows },
                        n: 8 * rng.usize(1..18),
                        k: 8 * [rng.usize(1..8), rng.usize(8..42)][rng.usize(..2)],
                        gather: grouped && rng.bool(),
                        bias: rng.bool(),
                        row_scale: rng.bool(),
                        out_scale: rng.bool(),
                        dropout: rng.u8(..4) == 0,
                        keeps: rng.bool(),
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

fn check<T: Storage>(case: &Case, rng: &mut fastrand::Rng) {
    let Case { n, k, weight, activation, .. } = *case;
    let name = format!("{} {case:?}", T::DTYPE);
    let (kernels, stream) = (device::kernels(), device::stream());
    // Loads: none, one, a tile less one, a whole tile, a tile and one more; and tokens without an expert.
    let loads = case.tile_m.map_or(vec![case.rows], |bm| vec![bm, 0, 1, bm + 1, 0, bm - 1]);
    let (experts, skipped) = (loads.len(), if case.tile_m.is_some() { 5 } else { 0 });
    let mut ids: Vec<i32> = (0..).zip(loads).flat_map(|(expert, load)| std::iter::repeat_n(expert, load)).collect();
    ids.extend(vec![-1; skipped]);
    rng.shuffle(&mut ids);
    let (routed, mut results) = Side::<T>::draw(rng, &stream, case, &ids, experts);
    let shared_rows = if case.tile_m.is_some() { case.rows } else { 0 };
    let plain = Case { gather: false, row_scale: false, out_scale: false, dropout: false, ..*case };
    let shared = (shared_rows > 0).then(|| Side::<T>::draw(rng, &stream, &plain, &vec![0; shared_rows], 1));
    let (shared, mut shared_results) = shared.unzip();

    let mut dispatched = None;
    let rows = match case.tile_m {
        None => Rows::Dense(ids.len()),
        Some(tile_m) => {
            let desc = DispatchDesc::new(ids.len(), experts, 1, tile_m);
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
    let desc = GemmDesc::new(T::DTYPE, rows, n, k).gather(case.gather).weight(weight).activation(activation);
    let desc = desc.shared_rows(shared_rows);
    let height = match gemm::select(&desc, kernels.device()).unwrap().kernel.variant() {
        Kernel::Gemm(kernel) => Some(kernel.tile.bm as usize),
        Kernel::GemmSwapped(_) => Some(GemmSwapped::TILE.bm as usize),
        // Takes lists of tiles of half its height too.
        Kernel::GemmHopper(_) => None,
        other => unreachable!("{name}: {other:?}"),
    };
    assert!(
        case.tile_m.is_none() || height.is_none_or(|height| Some(height) == case.tile_m),
        "{name}: {height:?} rows"
    );
    {
        let views: Vec<_> = routed.matrices.iter().chain(shared.iter().flat_map(|side| &side.matrices)).collect();
        let views: Vec<_> = views.into_iter().map(Guarded::view).collect();
        let biases: Vec<_> = routed.biases.iter().chain(shared.iter().flat_map(|side| &side.biases)).collect();
        let biases: Vec<_> = biases.into_iter().map(|bias| bias.slice(1..)).collect();
        let (first, second) = views.split_at(routed.matrices.len());
        let (first_bias, second_bias) = biases.split_at(routed.biases.len());
        let (row_scale, out_scale) = (routed.row_scale.as_ref(), routed.out_scale.as_ref());
        let (a, mut out) = (routed.a.view(), results.out.view_mut());
        let mut before = results.before.as_mut().map(Guarded::view_mut);
        let mut args = GemmArgs::new(&a, tensors(first, first_bias), &mut out);
        args.dispatched = dispatched.as_ref();
        args.row_scale = row_scale.map(Into::into);
        args.out_scale = out_scale.map(Into::into);
        args.dropout = routed.dropout;
        args.pre_activation = before.as_mut().map(Into::into);
        let mut views = shared.as_ref().zip(shared_results.as_mut()).map(|(side, results)| {
            (side.a.view(), results.out.view_mut(), results.before.as_mut().map(Guarded::view_mut))
        });
        args.shared = views.as_mut().map(|(a, out, before)| {
            let mut rows = SharedRows::new(&*a, tensors(second, second_bias), out);
            rows.pre_activation = before.as_mut().map(Into::into);
            rows
        });
        gemm::forward(kernels, &stream, &desc, args).unwrap();
    }
    routed.check(&name, &results, &stream);
    if let (Some(shared), Some(results)) = (shared, shared_results) {
        shared.check(&format!("shared of {name}"), &results, &stream);
    }
}

fn tensors<'a, T: Storage>(matrices: &'a [CudaView<'_, T>], biases: &'a [CudaView<'_, T>]) -> Weight<'a> {
    let weight = match matrices {
        [gate, up] => Weight::apart(gate, up),
        matrices => Weight::new(&matrices[0]),
    };
    match biases {
        [] => weight,
        [bias] => weight.bias(bias),
        biases => weight.bias(&biases[0]).up_bias(&biases[1]),
    }
}

/// What a launch writes.
struct Results<T> {
    out: Guarded<T>,
    before: Option<Guarded<T>>,
    /// What was in both before, the same everywhere.
    junk: T,
}

/// Rows with their weights, on the device and as they should come out.
struct Side<T> {
    case: Case,
    a: Guarded<T>,
    /// One, or gates and ups.
    matrices: Vec<Guarded<T>>,
    /// The same, each behind one element, so that none begins on more than an element.
    biases: Vec<CudaSlice<T>>,
    row_scale: Option<CudaSlice<f32>>,
    out_scale: Option<CudaSlice<f32>>,
    dropout: Option<Dropout>,
    live: usize,
    /// What should stand before the activation, and the magnitudes of its terms.
    sums: Vec<f64>,
    sizes: Vec<f64>,
    out_scales: Option<Vec<f32>>,
}

impl<T: Storage> Side<T> {
    fn draw(
        rng: &mut fastrand::Rng,
        stream: &Arc<CudaStream>,
        case: &Case,
        ids: &[i32],
        experts: usize,
    ) -> (Side<T>, Results<T>) {
        let Case { n, k, weight, .. } = *case;
        let rows = ids.len();
        let outputs = if weight.glu == Glu::None { n } else { 2 * n };
        let rule = DispatchRule { experts, top_k: 1, capacity: None, tile_m: 16 };
        let plan = reference::dispatch::dispatch(ids, &rule).unwrap();
        let live = plan.slot_token.len();

        let a: Vec<T> = normals(rng, rows * k, 1.0);
        // Products of unit scale.
        let b: Vec<T> = normals(rng, experts * outputs * k, (k as f64).powf(-0.5));
        let bias: Option<Vec<T>> = case.bias.then(|| normals(rng, experts * outputs, 1.0));
        let row_scale: Option<Vec<f32>> = case.row_scale.then(|| normals(rng, rows, 1.0));
        let out_scales: Option<Vec<f32>> = case.out_scale.then(|| normals(rng, rows, 1.0));

        let of = |values: &[T], of: fn(f64) -> f64| wide(values).into_iter().map(of).collect::<Vec<f64>>();
        let sums = |part: fn(f64) -> f64| {
            let (a, b) = (of(if case.gather { &a } else { &a[..live * k] }, part), of(&b, part));
            let bias = bias.as_ref().map(|bias| of(bias, part));
            let scale = row_scale.as_ref().map(|scale| wide(&scale[..live]).into_iter().map(part).collect::<Vec<_>>());
            let matrix =
                ExpertMatrix { weight: &b, bias: bias.as_deref(), n, k, glu: weight.glu, layout: weight.layout };
            reference::gemm::grouped_pre_activation(&a, &matrix, &plan, case.gather, scale.as_deref()).unwrap()
        };
        let (sums, sizes) = (sums(|value| value), sums(f64::abs));

        let apart = weight.glu == Glu::Apart;
        let matrices = if apart { halves(&b, weight.layout, n, k).to_vec() } else { vec![b] };
        let biases = match bias {
            None => vec![],
            Some(bias) if apart => halves(&bias, Layout::Kn, n, 1).to_vec(),
            Some(bias) => vec![bias],
        };
        let behind_one = |bias: &Vec<T>| stream.clone_htod(&[&[T::from_f64(f64::NAN)], &bias[..]].concat()).unwrap();
        let out = Guarded::output(stream, "out", rows * n);
        let results = Results {
            junk: out.read(stream)[0],
            out,
            before: case.keeps.then(|| Guarded::output(stream, "pre_activation", rows * outputs)),
        };
        let side = Side {
            case: *case,
            a: Guarded::input(stream, "a", &a),
            matrices: matrices.iter().map(|matrix| Guarded::input(stream, "b", matrix)).collect(),
            biases: biases.iter().map(behind_one).collect(),
            row_scale: row_scale.map(|scale| stream.clone_htod(&scale).unwrap()),
            out_scale: out_scales.as_ref().map(|scale| stream.clone_htod(scale).unwrap()),
            dropout: case.dropout.then(|| Dropout::new(0.4, NoiseSource::new(rng.u64(..), rng.u64(..)))),
            live,
            sums,
            sizes,
            out_scales,
        };
        (side, results)
    }

    fn check(&self, name: &str, results: &Results<T>, stream: &Arc<CudaStream>) {
        let Case { n, activation, weight, .. } = self.case;
        let gated = weight.glu != Glu::None;
        let width = if gated { 2 * n } else { n };
        let output = |gate: f64, up: f64| match gated {
            true => activate_glu(activation, gate, up),
            false => activate(activation, gate),
        };
        let rounding = |want: f64, bound: f64| (T::ROUNDOFF * (want.abs() + bound)).max(T::SMALLEST);
        let close = |place: [usize; 2], got: T, want: f64, bound: f64| {
            let (got, bound): (f64, f64) = (got.into(), bound + rounding(want, bound));
            assert!((got - want).abs() <= bound, "{name}: {place:?} is {got:e}, want {want:e}, bound {bound:.3e}");
        };

        let got = results.out.read(stream);
        for (i, &got) in got[..self.live * n].iter().enumerate() {
            let (row, column) = (i / n, i % n);
            let at = |half: usize| {
                let at = row * width + half * n + column;
                (self.sums[at], sum_off(T::DTYPE) * self.sizes[at])
            };
            let ((gate, gate_off), (up, up_off)) = (at(0), at(usize::from(gated)));
            let want = output(gate, up);
            let moved = |i: f64, j: f64| (output(gate + i * gate_off, up + j * up_off) - want).abs();
            let moved = moved(-1.0, -1.0).max(moved(-1.0, 1.0)).max(moved(1.0, -1.0)).max(moved(1.0, 1.0));
            // Of the activation itself: `kernels/common/epilogue/activation`.
            let own = 1e-6 * (want.abs() + 0.1 * if gated { 1.0 + up.abs() } else { 1.0 });
            let mut scale = self.out_scales.as_ref().map_or(1.0, |scale| f64::from(scale[row]));
            if let Some(Dropout { probability, noise, .. }) = self.dropout {
                let dropped = noise.dropout_word(i as u64) < drop_below(probability);
                scale *= if dropped { 0.0 } else { keep_scale(probability).into() };
            }
            close([row, column], got, want * scale, (moved + own) * scale.abs());
        }
        let bits = |values: &[T]| bytemuck::cast_slice::<T, u8>(values).to_vec();
        let untouched = |values: &[T]| bits(values) == bits(&vec![results.junk; values.len()]);
        assert!(untouched(&got[self.live * n..]), "{name}: a row that no tile covers was written");

        if let Some(before) = &results.before {
            let got = before.read(stream);
            for (i, &got) in got[..self.live * width].iter().enumerate() {
                let (column, want) = (i % width, self.sums[i]);
                // 16 bits stay on their side of a clamp's limit: the number beside the nearest, where that is across.
                let near = T::DTYPE != Dtype::F32 && is_near_a_limit(activation, column >= n, want, 4.0 * T::ROUNDOFF);
                let beside = if near { 2.0 * T::ROUNDOFF * want.abs() } else { 0.0 };
                close([i / width, column], got, want, sum_off(T::DTYPE) * self.sizes[i] + beside);
            }
            assert!(untouched(&got[self.live * width..]), "{name}: such a row of pre_activation");
        }
        self.a.assert_unchanged(stream);
        self.matrices.iter().for_each(|matrix| matrix.assert_unchanged(stream));
    }
}

/// Whether a value before the activation is at the limit of its clamp, to a share of it.
fn is_near_a_limit(activation: Activation, is_up: bool, value: f64, share: f64) -> bool {
    let Activation::Swiglu(unit) = activation else { return false };
    let Bound::Clamp(limit) = (if is_up { unit.up } else { unit.gate }) else { return false };
    let measured = match (is_up, unit.clamp_after) {
        (true, _) => value.abs(),
        (false, true) => value * sigmoid(f64::from(unit.alpha) * value),
        (false, false) => value,
    };
    (measured - f64::from(limit)).abs() <= share * f64::from(limit)
}

/// Gates and ups apart, from rows (`Nk`) or columns (`Kn`) of a weight that holds one after the other.
fn halves<T: Copy>(weight: &[T], layout: Layout, n: usize, k: usize) -> [Vec<T>; 2] {
    let chunk = if layout == Layout::Nk { n * k } else { n };
    [0, 1].map(|half| weight.chunks(2 * chunk).flat_map(|pair| &pair[half * chunk..][..chunk]).copied().collect())
}
