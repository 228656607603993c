//! Checks of `affinity`, `expert_choice`, `token_slots` and `combine_ragged_*`.

use half::{bf16, f16};
use moe_kernels::capacity::token_slots::{self, TokenSlotsArgs, TokenSlotsDesc};
use moe_kernels::experts::SlotShape;
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::reference::combine::{add_around, gate_addend};
use moe_kernels::reference::expert_choice as reference;
use moe_kernels::reference::expert_choice::{Chosen, TokenSlots};
use moe_kernels::registry::{CombineRagged, Kernel};
use moe_kernels::routers::affinity::{self, AffinityArgs, AffinityDesc};
use moe_kernels::routers::expert_choice::{self, ExpertChoiceArgs, ExpertChoiceDesc};
use moe_kernels::rules::Affinity;
use moe_kernels::{Dtype, In, Workspace};

use crate::noisy::assert_same_bits;
use crate::rows::{self, Rows};
use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, FEW_ROUNDINGS, Shares, Storage, assert_sums, assert_weights, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

#[derive(Clone, Copy, Debug)]
enum Values {
    Normal,
    /// Few distinct values: lower tokens win.
    Ties,
    /// With NaN and infinities.
    NotFinite,
}

const VALUES: [Values; 3] = [Values::Normal, Values::Ties, Values::NotFinite];

fn values(rng: &mut fastrand::Rng, kind: Values, len: usize) -> Vec<f32> {
    (0..len)
        .map(|_| match kind {
            Values::Normal => normal(rng) as f32,
            Values::Ties => [-1.0, -0.0, 0.0, 0.5][rng.usize(..4)],
            Values::NotFinite => match rng.u32(..12) {
                0 => f32::NAN,
                1 => f32::NEG_INFINITY,
                2 if rng.bool() => f32::INFINITY,
                _ => normal(rng) as f32,
            },
        })
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub fn check_affinity(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for (tokens, experts) in [(1, 1), (31, 5), (33, 64), (100, 33), (7, 4096)] {
        for kind_of in [Affinity::Softmax, Affinity::Sigmoid, Affinity::Logit] {
            for kind in VALUES {
                let name = format!("{tokens} tokens, {experts} experts, {kind_of:?}, {kind:?}");
                let desc = AffinityDesc::new(tokens, experts, kind_of);
                let logits = values(rng, kind, tokens * experts);
                let input = Guarded::input(&stream, "logits", &logits);
                let mut output = Guarded::output(&stream, "affinities", logits.len());
                {
                    let (logits, mut to) = (input.view(), output.view_mut());
                    affinity::forward(kernels, &stream, &desc, AffinityArgs::new(&logits, &mut to)).unwrap();
                }
                let want = reference::affinities(&logits, experts, kind_of).unwrap();
                let got = output.read(&stream);
                match kind_of {
                    Affinity::Softmax => assert_weights(&name, &got, &want, Shares::Softmax(experts), 0),
                    Affinity::Sigmoid => assert_weights(&name, &got, &want, Shares::Sigmoid, 0),
                    _ => {
                        let want: Vec<f32> = want.iter().map(|&w| w as f32).collect();
                        assert_same_bits(&name, &got, &want);
                    }
                }
                input.assert_unchanged(&stream);
            }
        }
    }
}

pub fn check_choice(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for (tokens, experts, capacity) in
        [(1, 3, 1), (40, 5, 7), (300, 4, 299), (257, 3, 257), (1000, 2, 1), (2049, 1, 1024)]
    {
        for kind in VALUES {
            let desc = ExpertChoiceDesc::new(tokens, experts, capacity);
            let name = format!("{desc:?} {kind:?}");
            let affinities = values(rng, kind, tokens * experts);
            let input = Guarded::input(&stream, "affinities", &affinities);
            let mut slot_token = Guarded::<i32>::output(&stream, "slot_token", desc.slots());
            let mut slot_weight = Guarded::<f32>::output(&stream, "slot_weight", desc.slots());
            let mut run = || {
                slot_token.reset(&stream);
                slot_weight.reset(&stream);
                let (affinities, mut to, mut weights_to) =
                    (input.view(), slot_token.view_mut(), slot_weight.view_mut());
                let args = ExpertChoiceArgs::new(&affinities, &mut to).slot_weight(&mut weights_to);
                expert_choice::forward(kernels, &stream, &desc, args).unwrap();
                (slot_token.read(&stream), slot_weight.read(&stream))
            };
            let want = reference::choose(&affinities, experts, capacity).unwrap();
            let (tokens_of, weights) = run();
            assert_eq!(tokens_of, want.slot_token, "{name}: slot_token");
            assert_eq!(bits(&weights), bits(&want.slot_weight), "{name}: slot_weight");
            // Exactly c distinct tokens for each expert, of the device's own output.
            for row in tokens_of.chunks(capacity) {
                assert!(row.windows(2).all(|pair| pair[0] < pair[1]), "{name}: not {capacity} distinct tokens");
                assert!(row.iter().all(|&t| (0..tokens as i32).contains(&t)), "{name}: token out of range");
            }
            let again = run();
            assert_eq!(tokens_of, again.0, "{name}: another run chose otherwise");
            assert_eq!(bits(&weights), bits(&again.1), "{name}: another run gave other bits");
            time(&stream, &name, || drop(run()));
            lists(&name, &desc, &input, &want, [16, 64, 128][rng.usize(..3)]);
            input.assert_unchanged(&stream);
        }
    }
}

/// The same choice as a dispatch of `capacity` rows an expert.
fn lists(name: &str, desc: &ExpertChoiceDesc, affinities: &Guarded<f32>, want: &Chosen<f32>, tile_m: usize) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let ExpertChoiceDesc { tokens, experts, capacity, .. } = *desc;
    let shape = expert_choice::rows(desc, tile_m);
    let mut dispatched = rows::junk(&stream, &shape);
    let bytes = expert_choice::workspace_bytes(desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let affinities = affinities.view();
    let (to, workspace) = (&mut dispatched, &mut workspace);
    expert_choice::dispatch(kernels, &stream, desc, tile_m, (&affinities).into(), to, workspace).unwrap();
    let name = format!("{name} in tiles of {tile_m}");
    let read = |what: &str, list, len| rows::read::<i32>(&stream, &format!("{name}: {what}"), list, len);
    let slots = desc.slots();
    assert_eq!(read("counts", dispatched.counts(), experts), vec![capacity as i32; experts], "{name}: counts");
    let offsets: Vec<i32> = (0..=experts).map(|e| (e * capacity) as i32).collect();
    assert_eq!(read("offsets", dispatched.offsets(), experts + 1), offsets, "{name}: offsets");
    assert_eq!(read("slot_token", dispatched.slot_token(), slots), want.slot_token, "{name}: slot_token");
    let slot_weight = rows::read(&stream, &format!("{name}: slot_weight"), dispatched.slot_weight(), slots);
    assert_eq!(bits(&slot_weight), bits(&want.slot_weight), "{name}: slot_weight");
    let of_tokens = reference::token_slots(&want.slot_token, tokens).unwrap();
    let token_offsets = read("token_offsets", dispatched.token_offsets(), tokens + 1);
    assert_eq!(token_offsets, of_tokens.offsets, "{name}: token_offsets");
    assert_eq!(read("token_slot", dispatched.token_slot(), slots), of_tokens.slots, "{name}: token_slot");
    let tiles: Vec<[i32; 4]> = (0..experts)
        .flat_map(|e| (0..capacity).step_by(tile_m).map(move |row| (e, row)))
        .map(|(e, row)| [e, e * capacity + row, e * capacity + capacity.min(row + tile_m), 0].map(|value| value as i32))
        .collect();
    assert_eq!(read("num_tiles", dispatched.num_tiles(), 1), [tiles.len() as i32], "{name}: num_tiles");
    assert_eq!(rows::read(&stream, &name, dispatched.tiles(), tiles.len()), tiles, "{name}: tiles");
}

pub fn check_token_slots(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for (tokens, slots) in [(1, 0), (1, 70), (5, 3), (33, 500), (700, 64), (600, 5000)] {
        for skew in [1, 4] {
            let desc = TokenSlotsDesc::new(tokens, slots);
            let name = format!("{desc:?} skew {skew}");
            // Some slots are nobody's; with skew few tokens have most.
            let slot_token: Vec<i32> = (0..slots)
                .map(|_| match rng.u32(..12) {
                    0 => -1,
                    1 => tokens as i32,
                    _ => (tokens as f64 * rng.f64().powi(skew)) as i32,
                })
                .collect();
            let listed: Vec<i32> =
                slot_token.iter().map(|&t| if (0..tokens as i32).contains(&t) { t } else { -1 }).collect();
            let want = reference::token_slots(&listed, tokens).unwrap();
            let input = Guarded::input(&stream, "slot_token", &slot_token);
            let mut offsets = Guarded::<i32>::output(&stream, "offsets", tokens + 1);
            let mut output = Guarded::<i32>::output(&stream, "slots", slots);
            let bytes = token_slots::workspace_bytes(&desc, kernels.device()).unwrap();
            let mut workspace = Workspace::new(&stream, bytes).unwrap();
            for run in 0..2 {
                offsets.reset(&stream);
                output.reset(&stream);
                {
                    let (tokens_of, mut offsets_to, mut to) = (input.view(), offsets.view_mut(), output.view_mut());
                    let args = TokenSlotsArgs::new(&tokens_of, &mut offsets_to, &mut to, &mut workspace);
                    token_slots::forward(kernels, &stream, &desc, args).unwrap();
                }
                assert_eq!(offsets.read(&stream), want.offsets, "{name}, run {run}: offsets");
                let got = output.read(&stream);
                assert_eq!(got[..want.slots.len()], want.slots, "{name}, run {run}: slots");
                assert!(got[want.slots.len()..].iter().all(|&junk| junk == -1), "{name}: written past the last slot");
            }
            input.assert_unchanged(&stream);
        }
    }
}

pub fn check_combine(variant: CombineRagged, rng: &mut fastrand::Rng) {
    match variant.dtype {
        Dtype::Bf16 => combine_ragged::<bf16>(variant, rng),
        Dtype::F16 => combine_ragged::<f16>(variant, rng),
        Dtype::F32 => combine_ragged::<f32>(variant, rng),
        other => unreachable!("no kernel has {other}"),
    }
}

fn combine_ragged<T: Storage>(variant: CombineRagged, rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let dtype = T::DTYPE;
    let shapes = if variant.any {
        [(1, 1, 3), (9, 40, 71), (50, 30, 260), (3, 100, 2049), (4, 0, 1)]
    } else {
        [(1, 1, 8), (9, 40, 72), (50, 30, 256), (3, 100, 2056), (4, 0, 8)]
    };
    let shift = |elements: usize| if variant.any { elements } else { 0 };
    for ((tokens, slots, hidden), options) in shapes.into_iter().flat_map(|shape| (0..16).map(move |o| (shape, o))) {
        let [weighted, with_residual, with_addend, with_factors] = [1, 2, 4, 8].map(|bit| options & bit != 0);
        let name = format!(
            "{dtype}, {tokens} tokens, {slots} slots, hidden {hidden}, weights {weighted}, residual {with_residual}, addend {with_addend}, factors and bias {with_factors}"
        );
        let slot_token: Vec<i32> = (0..slots).map(|_| rng.usize(..tokens) as i32).collect();
        let of: TokenSlots = reference::token_slots(&slot_token, tokens).unwrap();
        let y_slots = normals::<T>(rng, slots * hidden, 1.0);
        let (residual, addend) = (normals::<T>(rng, tokens * hidden, 1.0), normals::<T>(rng, tokens * hidden, 1.0));
        let weights: Vec<f32> = (0..slots).map(|_| rng.f32()).collect();
        let bias: Option<Vec<T>> = with_factors.then(|| normals(rng, hidden, 1.0));
        let [scale, addend_scale] = [(); 2].map(|()| if with_factors { normal(rng) as f32 } else { 1.0 });
        // A shared expert's gate, of either sign.
        let (gated, gate) = (with_addend && rng.bool(), normals::<f32>(rng, tokens, 2.0));
        let sum = |f: fn(f64) -> f64| {
            let of_f64 = |values: &[T]| to_f64(values).into_iter().map(f).collect::<Vec<_>>();
            let weights: Vec<f32> = weights.iter().map(|&w| f(w.into()) as f32).collect();
            let (residual, mut addend) = (of_f64(&residual), of_f64(&addend));
            if gated {
                gate_addend(&mut addend, &to_f64(&gate)).unwrap();
            }
            let weights = weighted.then_some(weights.as_slice());
            let mut sum =
                reference::combine_ragged::<f64, f64>(&of_f64(&y_slots), &of, weights, None, None, hidden).unwrap();
            let residual = with_residual.then_some(residual.as_slice());
            let addend = with_addend.then_some(addend.as_slice());
            let (bias, factors) = (bias.as_deref().map(of_f64), [scale, addend_scale].map(|v| f(v.into())));
            add_around(&mut sum, factors, bias.as_deref(), residual, addend).unwrap();
            sum
        };
        let (want, magnitudes) = (sum(|v| v), sum(f64::abs));
        let sigmoid = if gated { FEW_ROUNDINGS } else { 0.0 };
        let terms = of.offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize * 2 + 5);
        let bounds: Vec<f64> = terms
            .zip(magnitudes.chunks(hidden))
            .flat_map(|(terms, row)| row.iter().map(move |&m| Arithmetic::Fma.sum_bound(terms, m, m, m) + sigmoid * m))
            .collect();

        let rows = Guarded::shifted_input(&stream, "y_slots", &y_slots, shift(1));
        let shape = SlotShape::new(tokens, 1, None, slots, 16, 0);
        let lists = Rows { token_offsets: of.offsets.clone(), token_slot: of.slots.clone(), ..Rows::default() };
        let dispatched = lists.dispatched(&stream, &shape);
        let weights = Guarded::input(&stream, "slot_weight", &weights);
        let (residual, addend) = (
            Guarded::shifted_input(&stream, "residual", &residual, shift(3)),
            Guarded::shifted_input(&stream, "addend", &addend, shift(5)),
        );
        let gate = Guarded::input(&stream, "addend_gate", &gate);
        let junk = vec![Guarded::<T>::junk(); tokens * hidden];
        let mut y = Guarded::filled_output(&stream, "y", &junk, shift(7));
        let desc = CombineDesc::new(dtype, shape, hidden).scale(scale).addend_scale(addend_scale);
        let bias = bias.map(|values| Guarded::shifted_input(&stream, "bias", &values, shift(1)));
        let selected = combine::select(&desc, kernels.device()).unwrap().kernel.variant();
        assert_eq!(selected, Kernel::CombineRagged(variant));
        let mut run = || {
            y.reset(&stream);
            {
                let (rows, weights, residual, addend) = (rows.view(), weights.view(), residual.view(), addend.view());
                let (gate, mut to) = (gate.view(), y.view_mut());
                let bias = bias.as_ref().map(Guarded::view);
                let mut args = CombineArgs::new(&rows, &dispatched, &mut to);
                args.weights = weighted.then_some((&weights).into());
                args.residual = with_residual.then_some((&residual).into());
                args.addend = with_addend.then_some((&addend).into());
                args.addend_gate = gated.then_some((&gate).into());
                args.bias = bias.as_ref().map(In::from);
                combine::forward(kernels, &stream, &desc, args).unwrap();
            }
            y.read(&stream)
        };
        let got = run();
        assert_sums(&name, &to_f64(&got), &want, &bounds, dtype);
        let bytes = |values: &[T]| bytemuck::cast_slice::<T, u8>(values).to_vec();
        assert_eq!(bytes(&got), bytes(&run()), "{name}: another run gave other bits");
        time(&stream, &name, || drop(run()));
        rows.assert_unchanged(&stream);
    }
}
