//! Products whose rows go onto their tokens' sums: [`Output::TokenSums`], of every plain variant of the `sm_80` set.

use moe_kernels::experts::gemm::{self, GemmArgs, Output, Rows, SharedRows, Strides};
use moe_kernels::experts::tiles::max_tiles;
use moe_kernels::experts::{SlotShape, Weight};
use moe_kernels::reference;
use moe_kernels::reference::dispatch::dispatch;
use moe_kernels::registry::Kernel;
use moe_kernels::rules::{Activation, Glu};
use moe_kernels::{Dtype, In};

use crate::dispatch::rule;
use crate::gemm::{Case, Products, Values, Variant, arithmetic, products};
use crate::rows::Rows as Lists;
use crate::strides::spread;
use crate::support::buffer::Guarded;
use crate::support::compare::{Storage, UNIT, assert_sums, to_f64};
use crate::support::device;
use crate::support::inputs::normals;

/// Choices of a token, of which some are skipped.
const TOP_K: usize = 3;

/// Columns that are less than a tile, a ragged one, several; with what stands around a product and without.
pub fn check<T: Storage>(variant: Variant, rng: &mut fastrand::Rng) {
    let any = matches!(variant.kernel, Kernel::GemmAny(_));
    for index in 0..4 {
        let [k, n] = if any {
            [[27, 70], [40, 5], [33, 130], [9, 24]][index]
        } else {
            [[72, 40], [40, 264], [24, 8], [200, 136]][index]
        };
        let case = Case {
            k,
            n,
            glu: Glu::None,
            activation: Activation::Identity,
            by_expert: false,
            gather: index == 1,
            bias: index != 0,
            scale: index % 2 == 1,
            out_scale: index >= 2,
            once: false,
        };
        sums::<T>(variant, rng, &case, index, any);
    }
}

fn sums<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, case: &Case, index: usize, any: bool) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let Case { k, n, .. } = *case;
    // More rows than a tile, one and a few; an expert that nobody has chosen.
    let bm = variant.tile_m;
    let tokens = bm + bm / 4 + 5;
    let experts = 5;
    // All choices count once: then the last expert's rows, no multiple of those at once, end where the lists do.
    let all = index == 0;
    let ids: Vec<i32> = (0..tokens)
        .flat_map(|token| {
            if all {
                return [2, 0, 4];
            }
            // Expert 0 has nearly all tokens, 2 the second half, 3 one of them; some choices are skipped, and some tokens have none.
            let own = if token % 7 == 3 { -1 } else { 0 };
            let second = if token == 5 {
                3
            } else if token >= tokens / 2 {
                2
            } else {
                -1
            };
            let third = if token % 5 == 1 || own < 0 { -1 } else { 4 };
            [second, own, if token == 3 { -1 } else { third }]
        })
        .collect();
    let slots = ids.len();
    let plan = dispatch(&ids, &rule(experts, TOP_K, bm)).unwrap();
    let shape = SlotShape::new(tokens, experts, Some(TOP_K), slots, bm, max_tiles(slots, experts, bm));
    let live = plan.slot_token.len();
    let name = format!("sums of {tokens} tokens {index} {case:?}");

    let a_rows = if case.gather { tokens } else { slots };
    let a: Vec<T> = normals(rng, a_rows * k, 1.0);
    let values = Values::draw(rng, case, experts);
    let scale: Option<Vec<f32>> = case.scale.then(|| normals(rng, slots, 1.0));
    let factors: Option<Vec<f32>> = case.out_scale.then(|| normals(rng, slots, 1.0));
    // What is there before: the sums begin with it.
    let before: Vec<f32> = normals(rng, tokens * n, 1.0);

    let matrix = values.matrix(variant, case);
    let scale64 = scale.as_deref().map(to_f64);
    let scale_live = scale64.as_ref().map(|scale| &scale[..live]);
    let a_live = if case.gather { &a[..] } else { &a[..live * k] };
    let activations = vec![case.activation; experts];
    let rows = reference::gemm::grouped_gemm(a_live, &matrix, &plan, case.gather, scale_live, case.activation).unwrap();
    let Products { after, .. } =
        products(a_live, &matrix, &plan, case.gather, scale_live, &activations, arithmetic(variant.dtype));
    let mut want = to_f64(&before);
    // Each addition is rounded: at most by a unit of all magnitudes together, whatever its order; and so is the factor's product.
    let mut magnitudes: Vec<f64> = want.iter().map(|value| value.abs()).collect();
    let mut bounds = vec![0.0; want.len()];
    let mut added = vec![0; tokens];
    for (slot, &token) in plan.slot_token.iter().enumerate() {
        let factor = factors.as_ref().map_or(1.0, |factors| f64::from(factors[slot]));
        added[token as usize] += 1;
        for c in 0..n {
            let (at, from) = (token as usize * n + c, slot * n + c);
            want[at] += factor * rows[from];
            magnitudes[at] += (factor * rows[from]).abs();
            bounds[at] += factor.abs() * after[from] + UNIT * (factor * rows[from]).abs();
        }
    }
    for (at, bound) in bounds.iter_mut().enumerate() {
        *bound += UNIT * f64::from(added[at / n]) * magnitudes[at];
    }

    let mut desc = case.desc(variant, Rows::Grouped(shape)).output(Output::TokenSums);
    // Gaps between rows, and where they may, between columns.
    let place = match (any, index % 3) {
        (false, _) => [n + 8, 1],
        (true, 0) => [n + 3, 1],
        (true, 1) => [1, tokens + 1],
        (true, _) => [3 * n + 1, 3],
    };
    desc = desc.strides(Some(Strides::packed(&desc).out(place[0], place[1])));
    assert_eq!(variant.kernel, gemm::select(&desc, kernels.device()).unwrap().kernel.variant());
    let junk = f32::from_bits(0x4b3c_5a69);
    let places = |values: &[f32]| spread(values, [1, tokens, n], [0, place[0], place[1]], junk);
    let filled = places(&before);
    let a = Guarded::shifted_input(&stream, "a", &a, variant.shift);
    let weight = Guarded::shifted_input(&stream, "weight", &values.b, variant.shift);
    let bias = values.bias.as_ref().map(|bias| Guarded::shifted_input(&stream, "bias", bias, variant.shift));
    let scale = scale.map(|values| Guarded::input(&stream, "row_scale", &values));
    let factors = factors.map(|values| Guarded::input(&stream, "out_scale", &values));
    let dispatched = Lists::of(&plan).dispatched(&stream, &shape);
    let mut out = Guarded::filled_output(&stream, "out", &filled, 0);
    // Rows of a shared expert, which are stored beside the sums.
    let with_shared = index == 3;
    let shared_rows = if with_shared { bm + 1 } else { 0 };
    let shared_a: Vec<T> = normals(rng, shared_rows.max(1) * k, 1.0);
    let one = dispatch(&vec![0; shared_rows], &rule(1, 1, 16)).unwrap();
    let shared_values = Values::draw(rng, &Case { bias: false, ..*case }, 1);
    let on_device = |name, values: &[T]| Guarded::shifted_input(&stream, name, values, variant.shift);
    let (shared_b, shared_in) = (on_device("shared.weight", &shared_values.b), on_device("shared.a", &shared_a));
    let mut shared_out = Guarded::<T>::filled_output(
        &stream,
        "shared.out",
        &vec![Guarded::<T>::junk(); (shared_rows + 1) * (n + 8)],
        variant.shift,
    );
    desc = desc.shared_rows(shared_rows);

    let (a_view, weight_view, bias_view) = (a.view(), weight.view(), bias.as_ref().map(Guarded::view));
    let [scale_view, factor_view] = [&scale, &factors].map(|values| values.as_ref().map(Guarded::view));
    let (in_view, b_view) = (shared_in.view(), shared_b.view());
    let (mut out_view, mut shared_view) = (out.view_mut(), shared_out.view_mut());
    let mut of = Weight::new(&weight_view);
    if let Some(bias) = &bias_view {
        of = of.bias(bias);
    }
    let mut args = GemmArgs::to_f32(&a_view, of, &mut out_view).dispatched(&dispatched);
    args.row_scale = scale_view.as_ref().map(In::from);
    args.out_scale = factor_view.as_ref().map(In::from);
    if with_shared {
        args = args.shared(SharedRows::new(&in_view, Weight::new(&b_view), &mut shared_view));
    }
    gemm::forward(kernels, &stream, &desc, args).unwrap();
    let got = out.read(&stream);
    let at = crate::strides::places([1, tokens, n], [0, place[0], place[1]]);
    let sums: Vec<f32> = at.iter().map(|&at| got[at]).collect();
    assert_sums(&name, &to_f64(&sums), &want, &bounds, Dtype::F32);
    let mut rest = got.clone();
    at.iter().zip(&before).for_each(|(&at, &value)| rest[at] = value);
    assert!(rest == filled, "{name}: something between the sums was written");
    let mut alone = 0;
    for token in (0..tokens).filter(|&token| added[token] == 0) {
        assert_eq!(sums[token * n..][..n], before[token * n..][..n], "{name}: a token without experts");
        alone += 1;
    }
    assert_eq!(alone > 0, !all, "{name}: tokens without experts");
    [&a, &weight].into_iter().for_each(|input| input.assert_unchanged(&stream));
    if with_shared {
        let matrix = shared_values.matrix(variant, &Case { bias: false, ..*case });
        let want = reference::gemm::grouped_gemm(&shared_a, &matrix, &one, false, None, case.activation).unwrap();
        let Products { after, .. } =
            products(&shared_a, &matrix, &one, false, None, &[case.activation], arithmetic(variant.dtype));
        let got = shared_out.read(&stream);
        let at = crate::strides::places([1, shared_rows, n], [0, place[0], place[1]]);
        let got: Vec<T> = at.iter().map(|&at| got[at]).collect();
        assert_sums(&format!("{name}: shared expert"), &to_f64(&got), &want, &after, variant.dtype);
    }
}
