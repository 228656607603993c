//! Checks of `load_importance_backward` against the reference, whose own tests are finite differences.

use moe_kernels::reference::load_importance as reference;
use moe_kernels::routers::load_importance::LoadImportanceDesc;
use moe_kernels::routers::load_importance_backward::{self, LoadImportanceBackwardArgs, LoadImportanceBackwardDesc};

use crate::gradients::Results;
use crate::load_importance::{Kind, inputs};
use crate::support::buffer::Guarded;
use crate::support::compare::to_f64;
use crate::support::device;
use crate::tokens::Padding;

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, top_k) in
        [(0, 2, 1), (1, 2, 2), (257, 3, 1), (60, 33, 2), (40, 64, 33), (7, 300, 64), (3, 4096, 4)]
    {
        for kind in [Kind::Near, Kind::Ties, Kind::NotFinite] {
            let deviation = [0.01, 0.3, 1.0 / experts as f32][rng.usize(..3)];
            case(rng, LoadImportanceDesc::new(tokens, experts, top_k, deviation), kind);
        }
    }
}

fn case(rng: &mut fastrand::Rng, forward: LoadImportanceDesc, kind: Kind) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let LoadImportanceDesc { tokens, experts, deviation, .. } = forward;
    let (scores, logits, ids) = inputs(rng, &forward, kind);
    let padding = Padding::draw(&stream, rng, tokens);
    let desc = LoadImportanceBackwardDesc::new(forward, 1.5);
    let name = format!("{desc:?} {kind:?} {}", padding.name());
    // Not those of the batch: sums that differ, so that slopes are no differences of nothing.
    let importance: Vec<f32> = (0..experts).map(|_| 0.5 + rng.f32()).collect();
    let load: Vec<f32> = (0..experts).map(|_| 0.5 + rng.f32()).collect();
    let on_device = [("scores", &scores), ("logits", &logits), ("importance", &importance), ("load", &load)]
        .map(|(what, values)| Guarded::input(&stream, what, values));
    let ids_on = Guarded::input(&stream, "ids", &ids);
    let results = Results::draw(rng, &[tokens * experts, tokens * experts]);
    let desc = desc.accumulate(results.accumulate);
    let got = results.run(&name, |out| {
        let ([scores, logits, importance, load], ids) = (on_device.each_ref().map(Guarded::view), ids_on.view());
        let mut to: Vec<_> = out.iter_mut().map(Guarded::view_mut).collect();
        let [d_scores, d_logits] = to.as_mut_slice() else { unreachable!() };
        padding.with(|mask| {
            let args =
                LoadImportanceBackwardArgs::new([&scores, &logits], &ids, [&importance, &load], [d_scores, d_logits])
                    .mask(mask);
            load_importance_backward::forward(kernels, &stream, &desc, args).unwrap();
        });
    });
    if tokens == 0 {
        return;
    }
    let (wide, deviation) = ([to_f64(&importance), to_f64(&load)], f64::from(deviation));
    let want = reference::load_importance_backward(
        &scores,
        &logits,
        &ids,
        experts,
        deviation,
        &padding.valid,
        [&wide[0], &wide[1]],
        1.5,
    )
    .unwrap();
    // Slopes of losses are differences of sums of about 1; a squared distance carries its rounding.
    let scale = |_: usize| 16.0 / experts as f64 / deviation.min(1.0);
    results.compare(&name, 0, &got[0], &want[0], experts, scale);
    results.compare(&name, 1, &got[1], &want[1], experts, scale);
    on_device.iter().for_each(|buffer| buffer.assert_unchanged(&stream));
    padding.assert_unchanged(&stream);
}
