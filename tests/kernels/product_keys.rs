//! Checks of `product_keys`.

use moe_kernels::reference::product_keys::product_keys as reference;
use moe_kernels::routers::product_keys::{self, ProductKeysArgs, ProductKeysDesc};
use moe_kernels::rules::KeySplit;

use crate::support::buffer::Guarded;
use crate::support::compare::{Shares, assert_weights};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

pub fn check(rng: &mut fastrand::Rng) {
    let sizes = [
        (1, 1, 1),
        (3, 1, 1),
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
            for kind in [Scores::Normal, Scores::Few, Scores::Odd, Scores::Equal] {
                case(rng, &ProductKeysDesc::new(tokens, keys, top_k).split(split), kind);
            }
        }
    }
    case(rng, &ProductKeysDesc::new(0, 8, 4), Scores::Normal);
}

#[derive(Clone, Copy, Debug)]
enum Scores {
    Normal,
    /// Few different ones, so that many sums are equal.
    Few,
    /// Infinite ones and ones that are no number among them.
    Odd,
    /// All the same.
    Equal,
}

fn case(rng: &mut fastrand::Rng, desc: &ProductKeysDesc, kind: Scores) {
    let name = format!("{desc:?} {kind:?}");
    let (kernels, stream) = (device::kernels(), device::stream());
    let mut score = || match kind {
        Scores::Normal => 3.0 * normal(rng) as f32,
        Scores::Few => rng.i32(-2..=2) as f32 * 0.5,
        Scores::Equal => -1.25,
        Scores::Odd => match rng.u32(..6) {
            0 => f32::NAN,
            1 => f32::INFINITY,
            2 | 3 => f32::NEG_INFINITY,
            4 => -0.0,
            _ => rng.i32(0..2) as f32,
        },
    };
    let scores: Vec<f32> = (0..desc.tokens * 2 * desc.keys).map(|_| score()).collect();
    let want = reference(&scores, desc.keys, desc.top_k, desc.split).unwrap();

    let input = Guarded::input(&stream, "scores", &scores);
    let mut ids = Guarded::<i32>::output(&stream, "ids", desc.tokens * desc.top_k);
    let mut weights = Guarded::<f32>::output(&stream, "weights", desc.tokens * desc.top_k);
    let mut launch = || {
        ids.reset(&stream);
        weights.reset(&stream);
        let (scores, mut to, mut shares) = (input.view(), ids.view_mut(), weights.view_mut());
        let args = ProductKeysArgs::new(&scores, &mut to, &mut shares);
        product_keys::forward(kernels, &stream, desc, args).unwrap();
        (ids.read(&stream), weights.read(&stream))
    };
    let (got, shares) = launch();
    input.assert_unchanged(&stream);
    assert_eq!(got, want.ids, "{name}");
    assert_weights(&name, &shares, &want.weights, Shares::Softmax(desc.top_k), 0);
    let (again, shares_again) = launch();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert!(again == got && bits(&shares) == bits(&shares_again), "{name}: another run gave other bits");
    time(&stream, &name, || drop(launch()));
}
