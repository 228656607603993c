//! Checks of `hash`.

use moe_kernels::In;
use moe_kernels::reference::hash::{Hash, route};
use moe_kernels::routers::hash::{self, HashArgs, HashBy, HashDesc};

use crate::support::buffer::Guarded;
use crate::support::device;
use crate::timing::time;
use crate::tokens::Padding;

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, top_k) in [(1, 1, 1), (300, 7, 3), (257, 64, 1), (100, 32, 32), (1000, 4096, 2)] {
        let seed = rng.u64(..);
        case(rng, &HashDesc::new(tokens, experts, top_k, HashBy::Mix { seed }));
        case(rng, &HashDesc::new(tokens, experts, top_k, HashBy::Table { vocabulary: 50 }));
    }
    balance(rng);
}

fn launch(desc: &HashDesc, token_ids: &[i32], table: Option<&[i32]>, padding: &Padding) -> Vec<i32> {
    let (kernels, stream) = (device::kernels(), device::stream());
    let words = Guarded::input(&stream, "token_ids", token_ids);
    let table = table.map(|table| Guarded::input(&stream, "table", table));
    let mut ids = Guarded::ids(&stream, "ids", desc.tokens * desc.top_k);
    let mut run = || {
        ids.reset(&stream);
        let (words, table, mut to) = (words.view(), table.as_ref().map(Guarded::view), ids.view_mut());
        padding.with(|mask| {
            let mut args = HashArgs::new(&words, &mut to).mask(mask);
            args.table = table.as_ref().map(In::from);
            hash::forward(kernels, &stream, desc, args).unwrap();
        });
        ids.read(&stream)
    };
    let got = run();
    assert_eq!(got, run(), "{desc:?}: another run gave other ids");
    time(&stream, &format!("{desc:?}"), || drop(run()));
    words.assert_unchanged(&stream);
    padding.assert_unchanged(&stream);
    got
}

fn case(rng: &mut fastrand::Rng, desc: &HashDesc) {
    // Some ids are outside the table, some negative.
    let token_ids: Vec<i32> = (0..desc.tokens)
        .map(|_| match rng.u32(..20) {
            0 => i32::MIN,
            1 => i32::MAX,
            2 => -1,
            _ => rng.i32(0..55),
        })
        .collect();
    let experts = desc.experts as i32;
    let table: Vec<i32> = (0..50 * desc.top_k).map(|_| rng.i32(-1..=experts)).collect();
    let (by, table) = match desc.hash {
        HashBy::Mix { seed } => (Hash::Mix { seed }, None),
        HashBy::Table { .. } => (Hash::Table(&table), Some(table.as_slice())),
        other => unreachable!("no case has {other:?}"),
    };
    let padding = Padding::draw(&device::stream(), rng, desc.tokens);
    let mut want = route(&token_ids, by, desc.experts, desc.top_k).unwrap();
    for (row, _) in want.chunks_mut(desc.top_k).zip(&padding.valid).filter(|(_, valid)| !**valid) {
        row.fill(-1);
    }
    assert_eq!(launch(desc, &token_ids, table, &padding), want, "{desc:?} {}", padding.name());
}

/// Different words spread evenly: chi-square of 64 experts over 8192 words, 63 degrees of freedom, stays below 150; a
/// truly random function exceeds it for fewer than 1 of 10^7 seeds (Wilson-Hilferty: 6.3 standard deviations).
fn balance(rng: &mut fastrand::Rng) {
    let desc = HashDesc::new(8192, 64, 1, HashBy::Mix { seed: rng.u64(..) });
    let token_ids: Vec<i32> = (0..8192).collect();
    let mut counts = [0.0f64; 64];
    launch(&desc, &token_ids, None, &Padding::none(8192)).into_iter().for_each(|id| counts[id as usize] += 1.0);
    let chi_square: f64 = counts.iter().map(|count| (count - 128.0) * (count - 128.0) / 128.0).sum();
    assert!(chi_square < 150.0, "chi-square {chi_square}");
}
