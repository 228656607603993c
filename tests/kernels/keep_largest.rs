//! Checks of `keep_largest` and `quantile_bias`.

use moe_kernels::capacity::keep_largest::{self, KeepLargestArgs, KeepLargestDesc};
use moe_kernels::reference;
use moe_kernels::routers::quantile_bias::{self, QuantileBiasArgs, QuantileBiasDesc};

use crate::support::buffer::Guarded;
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;
use crate::tokens::Padding;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Weights with ties, zeros of both signs and what is no number.
fn weight(rng: &mut fastrand::Rng, kind: u32) -> f32 {
    match (kind, rng.u32(..10)) {
        (0, _) => rng.f32(),
        (1, _) => [0.25, 0.5, 0.0, -0.0][rng.usize(..4)],
        (_, 0) => f32::NAN,
        (_, 1) => f32::INFINITY,
        _ => normal(rng) as f32,
    }
}

pub fn check(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for (tokens, experts, top_k) in [(1, 1, 1), (40, 3, 2), (300, 5, 4), (129, 64, 8), (50, 300, 33), (2000, 2, 1)] {
        for kind in 0..3 {
            let slots: usize = tokens * top_k;
            let mean = slots.div_ceil(experts);
            let capacity = [1, mean, mean / 2 + 1, 2 * mean, slots][rng.usize(..5)];
            let desc = KeepLargestDesc::new(tokens, experts, top_k, capacity);
            let skew = rng.i32(1..4);
            let ids: Vec<i32> = (0..slots)
                .map(|_| match rng.u32(..12) {
                    0 => [-1, experts as i32, i32::MIN, i32::MAX][rng.usize(..4)],
                    _ => (experts as f64 * rng.f64().powi(skew)) as i32,
                })
                .collect();
            let weights: Vec<f32> = (0..slots).map(|_| weight(rng, kind)).collect();
            let name = format!("{desc:?} weights {kind}");
            let (want, want_weights) =
                reference::keep_largest::keep_largest(&ids, &weights, experts, capacity).unwrap();
            let (ids, weights) = (Guarded::input(&stream, "ids", &ids), Guarded::input(&stream, "weights", &weights));
            let mut kept = Guarded::<i32>::ids(&stream, "kept_ids", slots);
            let mut kept_weights = Guarded::<f32>::output(&stream, "kept_weights", slots);
            let mut run = |weighted: bool| {
                kept.reset(&stream);
                kept_weights.reset(&stream);
                let (ids, weights) = (ids.view(), weights.view());
                let (mut to, mut weights_to) = (kept.view_mut(), kept_weights.view_mut());
                let mut args = KeepLargestArgs::new(&ids, &weights, &mut to);
                if weighted {
                    args = args.kept_weights(&mut weights_to);
                }
                keep_largest::forward(kernels, &stream, &desc, args).unwrap();
                (kept.read(&stream), kept_weights.read(&stream))
            };
            let (got, got_weights) = run(true);
            assert_eq!(got, want, "{name}: ids");
            assert_eq!(bits(&got_weights), bits(&want_weights), "{name}: weights");
            let (again, untouched) = run(false);
            assert_eq!(again, got, "{name}: another run, without weights");
            assert!(untouched.iter().all(|value| value.to_bits() == u32::MAX), "{name}: wrote weights unasked");
            time(&stream, &name, || drop(run(true)));
            ids.assert_unchanged(&stream);
            weights.assert_unchanged(&stream);
        }
    }
}

pub fn check_bias(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for (tokens, experts, top_k) in
        [(0, 2, 1), (1, 2, 1), (40, 5, 2), (300, 7, 6), (129, 64, 8), (700, 3, 1), (33, 90, 63)]
    {
        for kind in 0..3 {
            let desc = QuantileBiasDesc::new(tokens, experts, top_k);
            let scores: Vec<f32> = (0..tokens * experts).map(|_| weight(rng, kind)).collect();
            let bias: Vec<f32> = (0..experts).map(|_| rng.i32(-4..5) as f32 / 8.0).collect();
            let ids: Vec<i32> = (0..tokens * (top_k + 1))
                .map(|_| if rng.u32(..15) == 0 { -1 } else { rng.i32(0..experts as i32) })
                .collect();
            let padding = Padding::draw(&stream, rng, tokens);
            let name = format!("{desc:?} scores {kind} {}", padding.name());
            let want = reference::quantile_bias::quantile_bias(&scores, &ids, &bias, top_k, &padding.valid).unwrap();
            let inputs = [Guarded::input(&stream, "scores", &scores), Guarded::input(&stream, "bias", &bias)];
            let ids = Guarded::input(&stream, "ids", &ids);
            let mut updated = Guarded::<f32>::output(&stream, "updated", experts);
            let mut run = || {
                updated.reset(&stream);
                let [scores, bias] = inputs.each_ref().map(Guarded::view);
                let (ids, mut to) = (ids.view(), updated.view_mut());
                padding.with(|mask| {
                    let args = QuantileBiasArgs::new(&scores, &ids, &bias, &mut to).mask(mask);
                    quantile_bias::forward(kernels, &stream, &desc, args).unwrap();
                });
                updated.read(&stream)
            };
            let got = run();
            // Keys make zeros positive.
            let zero = |values: &[f32]| values.iter().map(|value| value + 0.0).collect::<Vec<_>>();
            assert_eq!(bits(&zero(&got)), bits(&zero(&want)), "{name}");
            assert_eq!(bits(&run()), bits(&got), "{name}: another run gave other bits");
            time(&stream, &name, || drop(run()));
            inputs.iter().for_each(|input| input.assert_unchanged(&stream));
            ids.assert_unchanged(&stream);
            padding.assert_unchanged(&stream);
        }
    }
}
