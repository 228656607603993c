//! Checks of `product_keys_backward` against the reference.

use moe_kernels::reference::product_keys::{product_keys, product_keys_backward as reference};
use moe_kernels::routers::product_keys::ProductKeysDesc;
use moe_kernels::routers::product_keys_backward::{self, ProductKeysBackwardArgs, ProductKeysBackwardDesc};
use moe_kernels::rules::KeySplit;

use crate::gradients::{Results, row_norm, upstream};
use crate::support::buffer::Guarded;
use crate::support::device;
use crate::support::inputs::normal;

pub fn check(rng: &mut fastrand::Rng) {
    let sizes = [
        (0, 8, 4),
        (1, 1, 1),
        (8, 2, 4),
        (13, 8, 4),
        (9, 8, 64),
        (17, 33, 32),
        (5, 128, 64),
        (6, 100, 33),
        (2, 128, 1),
    ];
    for (tokens, keys, top_k) in sizes {
        for split in [KeySplit::Row, KeySplit::Batch] {
            for spread in [0.0, 1.0, 20.0] {
                case(rng, ProductKeysDesc::new(tokens, keys, top_k).split(split), spread);
            }
        }
    }
    nothing_of_garbage(rng);
    what_nobody_chose(rng);
}

fn launch(desc: ProductKeysDesc, results: &Results, name: &str, scores: &[f32], ids: &[i32], d: &[f32]) -> Vec<f32> {
    let (kernels, stream) = (device::kernels(), device::stream());
    let on_device = [Guarded::input(&stream, "scores", scores), Guarded::input(&stream, "d_weights", d)];
    let ids = Guarded::input(&stream, "ids", ids);
    let desc = ProductKeysBackwardDesc::new(desc).accumulate(results.accumulate);
    let got = results.run(name, |out| {
        let ([scores, d], ids, mut to) = (on_device.each_ref().map(Guarded::view), ids.view(), out[0].view_mut());
        let args = ProductKeysBackwardArgs::new(&scores, &ids, &d, &mut to);
        product_keys_backward::forward(kernels, &stream, &desc, args).unwrap();
    });
    on_device.iter().for_each(|buffer| buffer.assert_unchanged(&stream));
    got.into_iter().next().unwrap()
}

fn case(rng: &mut fastrand::Rng, desc: ProductKeysDesc, spread: f64) {
    let ProductKeysDesc { tokens, keys, top_k, split, .. } = desc;
    let scores: Vec<f32> = (0..tokens * 2 * keys).map(|_| (spread * normal(rng)) as f32).collect();
    let gated = product_keys(&scores, keys, top_k, split).unwrap();
    let (d, d_wide) = upstream(rng, tokens * top_k);
    let results = Results::draw(rng, &[tokens * 2 * keys]);
    let name = format!("{desc:?} spread {spread}");
    let got = launch(desc, &results, &name, &scores, &gated.ids, &d);
    if tokens == 0 {
        return;
    }
    let want = reference(&gated.ids, &gated.weights, &d_wide, keys, top_k, split).unwrap();
    // A sum of two scores is rounded once, and is the exponent.
    let rounding = 1.0 + spread / 4.0;
    let scale = |t: usize| match split {
        KeySplit::Row => rounding * row_norm(&d_wide, top_k, t),
        _ => rounding * row_norm(&d_wide, tokens * top_k, 0),
    };
    results.compare(&name, 0, &got, &want, 2 * keys, scale);
    if top_k == 1 && !results.accumulate {
        assert!(got.iter().all(|&d| d == 0.0), "{name}: one choice");
    }
}

/// Choices of nothing, and sums that are no numbers.
fn nothing_of_garbage(rng: &mut fastrand::Rng) {
    let desc = ProductKeysDesc::new(3, 2, 2);
    let scores = [0.5, f32::NAN, 0.0, 0.0, f32::INFINITY, 0.0, 1.0, 0.0, 0.5, 0.25, 0.0, 0.125];
    let (d, _) = upstream(rng, 6);
    let results = Results { accumulate: false, before: vec![vec![0.0; 12]] };
    let got = launch(desc, &results, "garbage", &scores, &[0, 2, 0, 2, -1, 4], &d);
    assert_eq!(got, [0.0; 12]);
}

/// An infinite score that is of no choice, and choices of nothing beside it: as if neither were there.
fn what_nobody_chose(rng: &mut fastrand::Rng) {
    const KEYS: usize = 8;
    for top_k in [7, 40] {
        let mut scores: Vec<f32> = (0..2 * KEYS).map(|_| normal(rng) as f32).collect();
        // The second half of what is no expert, -1 among all keys squared.
        scores[KEYS + u32::MAX as usize % KEYS] = f32::INFINITY;
        let chosen = (0..KEYS * KEYS).filter(|id| id % KEYS != u32::MAX as usize % KEYS);
        let mut ids: Vec<i32> = chosen.take(top_k).map(|id| id as i32).collect();
        [2, top_k - 2].into_iter().for_each(|nothing| ids[nothing] = -1);
        let score = |id: i32| f64::from(scores[id as usize / KEYS]) + f64::from(scores[KEYS + id as usize % KEYS]);
        let exponentials: Vec<f64> = ids.iter().map(|&id| if id < 0 { 0.0 } else { score(id).exp() }).collect();
        let total: f64 = exponentials.iter().sum();
        let weights: Vec<f64> = exponentials.iter().map(|e| e / total).collect();
        let (d, d_wide) = upstream(rng, top_k);
        let results = Results { accumulate: false, before: vec![vec![0.0; 2 * KEYS]] };
        let name = format!("{top_k} choices, two of nothing");
        let got = launch(ProductKeysDesc::new(1, KEYS, top_k), &results, &name, &scores, &ids, &d);
        // With a weight of 0 it is of no matter which pair stands where there is none.
        let pairs: Vec<i32> = ids.iter().map(|&id| id.max(0)).collect();
        let want = reference(&pairs, &weights, &d_wide, KEYS, top_k, KeySplit::Row).unwrap();
        results.compare(&name, 0, &got, &want, 2 * KEYS, |t| row_norm(&d_wide, top_k, t));
    }
}
