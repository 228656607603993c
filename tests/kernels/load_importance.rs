//! Checks of `load_importance`.

use moe_kernels::Workspace;
use moe_kernels::reference::load_importance::{self as reference, cv_squared};
use moe_kernels::routers::load_importance::{self, LoadImportanceArgs, LoadImportanceDesc};

use crate::noisy::assert_sums;
use crate::support::buffer::Guarded;
use crate::support::compare::{LOSS_OF_SUMS, to_f64};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;
use crate::tokens::Padding;

/// What logits and scores are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Logits are scores with noise, so that thresholds lie among the scores.
    Near,
    /// Few distinct values: scores level with thresholds.
    Ties,
    /// With NaN and infinities in both.
    NotFinite,
}

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, top_k) in
        [(0, 2, 1), (1, 2, 2), (257, 3, 1), (300, 33, 2), (40, 64, 33), (2600, 5, 2), (7, 300, 64), (20, 4096, 4)]
    {
        for kind in [Kind::Near, Kind::Ties, Kind::NotFinite] {
            let deviation = [0.01, 0.3, 1.0 / experts as f32][rng.usize(..3)];
            case(rng, &LoadImportanceDesc::new(tokens, experts, top_k, deviation), kind);
        }
    }
}

pub fn inputs(rng: &mut fastrand::Rng, desc: &LoadImportanceDesc, kind: Kind) -> (Vec<f32>, Vec<f32>, Vec<i32>) {
    const ODD: [f32; 4] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e10];
    let len = desc.tokens * desc.experts;
    let mut scores: Vec<f32> =
        (0..len).map(|_| if kind == Kind::Ties { rng.u32(..4) as f32 / 4.0 } else { rng.f32() }).collect();
    let noise = if kind == Kind::Ties { 0.0 } else { desc.deviation };
    let mut logits: Vec<f32> = scores.iter().map(|score| score + noise * normal(rng) as f32).collect();
    if kind == Kind::NotFinite {
        for t in 0..desc.tokens {
            let of = t * desc.experts..(t + 1) * desc.experts;
            let at = rng.usize(of.clone());
            match rng.u32(..8) {
                0 => scores[at] = ODD[rng.usize(..4)],
                1 => logits[at] = ODD[rng.usize(..4)],
                2 => logits[of].fill(f32::NEG_INFINITY),
                3 => logits[of].fill(f32::NAN),
                _ => {}
            }
        }
    }
    let experts = desc.experts as i32;
    let id = |_| match rng.u32(..6) {
        0 => [-1, experts, i32::MIN, i32::MAX][rng.usize(..4)],
        _ => rng.i32(0..experts),
    };
    let ids = (0..desc.tokens * desc.top_k).map(id).collect();
    (scores, logits, ids)
}

fn case(rng: &mut fastrand::Rng, desc: &LoadImportanceDesc, kind: Kind) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let LoadImportanceDesc { tokens, experts, deviation, .. } = *desc;
    let (scores, logits, ids) = inputs(rng, desc, kind);
    let padding = Padding::draw(&stream, rng, tokens);
    let name = format!("{desc:?} {kind:?} {}", padding.name());
    let want = reference::load_importance(&scores, &logits, &ids, experts, deviation.into(), &padding.valid).unwrap();
    let on_device = [Guarded::input(&stream, "scores", &scores), Guarded::input(&stream, "logits", &logits)];
    let ids = Guarded::input(&stream, "ids", &ids);
    let mut outputs = [("importance", experts), ("load", experts), ("losses", 3)]
        .map(|(name, len)| Guarded::<f32>::output(&stream, name, len));
    let bytes = load_importance::workspace_bytes(desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let mut run = || {
        outputs.iter_mut().for_each(|output| output.reset(&stream));
        let [scores, logits] = on_device.each_ref().map(Guarded::view);
        let ids = ids.view();
        let [mut importance, mut load, mut losses] = outputs.each_mut().map(Guarded::view_mut);
        padding.with(|mask| {
            let sums = [&mut importance, &mut load];
            let args = LoadImportanceArgs::new([&scores, &logits], &ids, sums, &mut losses, &mut workspace).mask(mask);
            load_importance::forward(kernels, &stream, desc, args).unwrap();
        });
        outputs.each_ref().map(|output| output.read(&stream))
    };
    let got = run();
    let bits = |values: &[Vec<f32>; 3]| values.concat().iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&run()), "{name}: another run gave other bits");
    time(&stream, &name, || drop(run()));
    on_device.iter().for_each(|input| input.assert_unchanged(&stream));
    ids.assert_unchanged(&stream);
    padding.assert_unchanged(&stream);
    let [importance, load, losses] = got;
    assert_sums(&format!("{name}: importance"), &importance, &want.importance);
    assert_sums(&format!("{name}: load"), &load, &want.load);
    // A loss follows from the vector that the device itself wrote.
    let [of_importance, of_load] = [&importance, &load].map(|values| cv_squared(&to_f64(values)));
    for (loss, want) in losses.iter().zip([(of_importance + of_load) / 2.0, of_importance, of_load]) {
        let near = (f64::from(*loss) - want).abs() <= LOSS_OF_SUMS * want + LOSS_OF_SUMS * LOSS_OF_SUMS;
        assert!(near, "{name}: loss {loss:e}, want {want:e}");
    }
}
