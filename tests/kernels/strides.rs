//! Products of matrices that are views: rows apart from each other, columns before rows, experts with gaps; and results in f32, on their own or
//! onto what is there. NaN lies between the elements of inputs, junk between those of outputs, which must stay.

use moe_kernels::Dtype;
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Output, Rows, Strides};
use moe_kernels::experts::tiles::max_tiles;
use moe_kernels::experts::{SlotShape, Weight};
use moe_kernels::reference;
use moe_kernels::reference::dispatch::dispatch;
use moe_kernels::registry::Kernel;
use moe_kernels::rules::{Glu, Layout};

use crate::dispatch::rule;
use crate::gemm::{Case, Products, Values, Variant, activations, apart, arithmetic, forms, products};
use crate::rows::Rows as Lists;
use crate::support::buffer::Guarded;
use crate::support::compare::{Bounded, Storage, UNIT, assert_sums, to_f64};
use crate::support::device;
use crate::support::inputs::normals;

/// Every output form of the variant, each with other strides.
pub fn check<T: Storage>(variant: Variant, rng: &mut fastrand::Rng) {
    let any = matches!(variant.kernel, Kernel::GemmAny(_));
    let outputs = [Output::Rounded, Output::F32, Output::AddedF32, Output::Added];
    for (index, output) in outputs.into_iter().enumerate() {
        let activations = activations(variant.fold);
        let forms = forms(variant.fold);
        let [k, n] = if any {
            [[40, 24], [27, 70], [70, 5], [33, 9]][index]
        } else {
            [[72, 40], [40, 136], [136, 8], [24, 40]][index]
        };
        let case = Case {
            k,
            n,
            glu: forms[index % forms.len()],
            activation: activations[index % activations.len()],
            by_expert: false,
            gather: index != 1,
            bias: index != 0,
            scale: index == 2,
            out_scale: index == 1,
            once: false,
        };
        for more in 0..if any { 3 } else { 1 } {
            grouped::<T>(variant, rng, &case, output, index + more, any);
        }
    }
}

/// Where elements lie: packed rows with gaps, or for kernels of any rows also columns before rows and every second element.
fn strides(case: &Case, variant: Variant, [rows, a_rows]: [usize; 2], which: usize, any: bool) -> Strides {
    let outputs = if case.glu.is_gated() && case.glu != Glu::Apart { 2 * case.n } else { case.n };
    let Case { k, n, .. } = *case;
    let packed = Strides::packed(&case.desc(variant, Rows::Dense(1)));
    if !any {
        let weight = match variant.layout {
            Layout::Nk => [outputs * (k + 8) + 16, k + 8, 1],
            _ => [k * (outputs + 16) + 8, 1, outputs + 16],
        };
        return packed.a(k + 24, 1).weight(weight[0], weight[1], weight[2]).out(n + 8, 1);
    }
    match which % 3 {
        0 => packed.a(1, a_rows + 2).weight(outputs * (k + 1) + 3, k + 1, 1).out(n + 3, 1),
        1 => packed.a(k + 3, 1).weight(k * (outputs + 5), 1, outputs + 5).out(1, rows + 1),
        _ => packed.a(2 * k + 1, 2).weight(2 * outputs * k + 1, 2, 2 * outputs).out(3 * n + 1, 3),
    }
}

/// `values` of packed dimensions at `strides`, `gap` between them.
pub fn spread<T: Copy>(values: &[T], dimensions: [usize; 3], strides: [usize; 3], gap: T) -> Vec<T> {
    let at = places(dimensions, strides);
    let mut all = vec![gap; at.iter().max().map_or(0, |last| last + 1)];
    at.iter().zip(values).for_each(|(&at, &value)| all[at] = value);
    all
}

/// Where the elements of a packed tensor are.
pub fn places([d0, d1, d2]: [usize; 3], [s0, s1, s2]: [usize; 3]) -> Vec<usize> {
    let inner = |i: usize, j: usize| (0..d2).map(move |l| i * s0 + j * s1 + l * s2);
    (0..d0).flat_map(|i| (0..d1).flat_map(move |j| inner(i, j))).collect()
}

fn grouped<T: Storage>(
    variant: Variant,
    rng: &mut fastrand::Rng,
    case: &Case,
    output: Output,
    which: usize,
    any: bool,
) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let Case { k, n, glu, .. } = *case;
    let loads = [3, 0, variant.tile_m + 1, 2];
    let mut ids: Vec<i32> = (0..loads.len()).flat_map(|e| std::iter::repeat_n(e as i32, loads[e])).collect();
    ids.push(-1);
    rng.shuffle(&mut ids);
    let (tokens, experts) = (ids.len(), loads.len());
    let plan = dispatch(&ids, &rule(experts, 1, variant.tile_m)).unwrap();
    let tiles = max_tiles(tokens, experts, variant.tile_m);
    let shape = SlotShape::new(tokens, experts, Some(1), tokens, variant.tile_m, tiles);
    let live = plan.slot_token.len();
    let name = format!("{output:?} {which} {case:?}");

    let a: Vec<T> = normals(rng, tokens * k, 1.0);
    let values = Values::draw(rng, case, experts);
    let scale: Option<Vec<f32>> = case.scale.then(|| normals(rng, tokens, 1.0));
    let out_scale: Option<Vec<f32>> = case.out_scale.then(|| normals(rng, tokens, 1.0));
    let matrix = values.matrix(variant, case);
    let scale64 = scale.as_deref().map(to_f64);
    let scale_live = scale64.as_ref().map(|scale| &scale[..live]);
    let a_live = if case.gather { &a[..] } else { &a[..live * k] };
    let product =
        reference::gemm::grouped_gemm(a_live, &matrix, &plan, case.gather, scale_live, case.activation).unwrap();
    let Products { after, .. } = products(
        a_live,
        &matrix,
        &plan,
        case.gather,
        scale_live,
        &vec![case.activation; experts],
        arithmetic(variant.dtype),
    );
    let (old, old_wide): (Vec<T>, Vec<f32>) = (normals(rng, live * n, 1.0), normals(rng, live * n, 1.0));
    let old64 = match output {
        Output::Added => to_f64(&old),
        Output::AddedF32 => to_f64(&old_wide),
        _ => vec![0.0; live * n],
    };
    let adds = matches!(output, Output::Added | Output::AddedF32);
    let (mut want, mut bounds) = (vec![], vec![]);
    for (i, (value, error)) in product.into_iter().zip(after).enumerate() {
        let factor = out_scale.as_ref().map_or(1.0, |scale| f64::from(scale[i / n]));
        let scaled = Bounded { value: value * factor, error }.scaled(factor);
        want.push(scaled.value + old64[i]);
        bounds.push(scaled.error + if adds { UNIT * (scaled.value + old64[i]).abs() } else { 0.0 });
    }

    let strides = strides(case, variant, [tokens, tokens], which, any);
    let desc: GemmDesc = case
        .desc(variant, Rows::Grouped(shape))
        .strides(Some(strides))
        .output(output)
        // Of one set the strides alone would let the other kernels do.
        .unaligned(any);
    assert_eq!(gemm::select(&desc, kernels.device()).unwrap().kernel.variant(), variant.kernel, "{name}");
    let nan = T::from_f64(f64::NAN);
    let [row, column] = strides.a;
    let a = spread(&a, [1, tokens, k], [0, row, column], nan);
    let a = Guarded::shifted_input(&stream, "a", &a, variant.shift);
    let parts = match glu {
        Glu::Apart => apart(&values.b, variant.layout, n, k).to_vec(),
        _ => vec![values.b.clone()],
    };
    let outputs = parts[0].len() / (experts * k);
    let weights: Vec<Guarded<T>> = parts
        .iter()
        .map(|part| {
            let [expert, output, depth] = strides.weight;
            let spread = match variant.layout {
                Layout::Nk => spread(part, [experts, outputs, k], [expert, output, depth], nan),
                _ => spread(part, [experts, k, outputs], [expert, depth, output], nan),
            };
            Guarded::shifted_input(&stream, "weight", &spread, variant.shift)
        })
        .collect();
    let biases: Vec<Guarded<T>> = values
        .bias
        .iter()
        .flat_map(|bias| match glu {
            Glu::Apart => apart(bias, Layout::Nk, n, 1).to_vec(),
            _ => vec![bias.clone()],
        })
        .map(|bias| Guarded::shifted_input(&stream, "bias", &bias, 1))
        .collect();
    let scale = scale.map(|values| Guarded::input(&stream, "row_scale", &values));
    let out_scale = out_scale.map(|values| Guarded::input(&stream, "out_scale", &values));
    let dispatched = Lists::of(&plan).dispatched(&stream, &shape);
    let at = places([1, live, n], [0, strides.out[0], strides.out[1]]);
    let all = places([1, tokens, n], [0, strides.out[0], strides.out[1]]).into_iter().max().unwrap() + 1;

    let (mut rounded, mut wide) = (vec![Guarded::<T>::junk(); all], vec![Guarded::<f32>::junk(); all]);
    if adds {
        at.iter().zip(&old).for_each(|(&at, &old)| rounded[at] = old);
        at.iter().zip(&old_wide).for_each(|(&at, &old)| wide[at] = old);
    }
    let mut rounded = Guarded::filled_output(&stream, "out", &rounded, variant.shift);
    let mut wide = Guarded::filled_output(&stream, "out", &wide, variant.shift);
    let before = (rounded.read(&stream), wide.read(&stream));
    let launch = |rounded: &mut Guarded<T>, wide: &mut Guarded<f32>| {
        let (a, mut rounded, mut wide) = (a.view(), rounded.view_mut(), wide.view_mut());
        let views: Vec<_> = weights.iter().map(Guarded::view).collect();
        let bias_views: Vec<_> = biases.iter().map(Guarded::view).collect();
        let mut weight = match views.as_slice() {
            [gate, up] => Weight::apart(gate, up),
            all => Weight::new(&all[0]),
        };
        for (index, bias) in bias_views.iter().enumerate() {
            weight = if index == 0 { weight.bias(bias) } else { weight.up_bias(bias) };
        }
        let mut args = match output {
            Output::Rounded | Output::Added => GemmArgs::new(&a, weight, &mut rounded),
            _ => GemmArgs::to_f32(&a, weight, &mut wide),
        };
        let [scale, out_scale] = [&scale, &out_scale].map(|scale| scale.as_ref().map(Guarded::view));
        args.row_scale = scale.as_ref().map(Into::into);
        args.out_scale = out_scale.as_ref().map(Into::into);
        gemm::forward(kernels, &stream, &desc, args.dispatched(&dispatched)).unwrap();
    };
    let mut first = None;
    for _ in 0..2 {
        rounded.reset(&stream);
        wide.reset(&stream);
        launch(&mut rounded, &mut wide);
        let got = (rounded.read(&stream), wide.read(&stream));
        let (values, dtype) = match output {
            Output::Rounded | Output::Added => (to_f64(&got.0), variant.dtype),
            _ => (to_f64(&got.1), Dtype::F32),
        };
        let values: Vec<f64> = at.iter().map(|&at| values[at]).collect();
        assert_sums(&name, &values, &want, &bounds, dtype);
        let untouched = |index: usize| !at.contains(&index);
        let bits = |got: &(Vec<T>, Vec<f32>)| {
            let rounded = bytemuck::cast_slice::<T, u8>(&got.0).to_vec();
            (rounded, got.1.iter().map(|value| value.to_bits()).collect::<Vec<_>>())
        };
        let (now, before) = (bits(&got), bits(&before));
        let size = size_of::<T>();
        for index in (0..all).filter(|&index| untouched(index)) {
            let part = index * size..(index + 1) * size;
            assert_eq!(now.0[part.clone()], before.0[part], "{name}: element {index} of out is no output");
            assert_eq!(now.1[index], before.1[index], "{name}: element {index} of out is no output");
        }
        assert!(first.is_none_or(|first| first == now), "{name}: another run gave other bits");
        first = Some(now);
    }
    a.assert_unchanged(&stream);
    weights.iter().for_each(|weight| weight.assert_unchanged(&stream));
}
