//! Checks of `check_lists`: the first entry that is wrong, of lists with none, one and several.

use moe_kernels::Error;
use moe_kernels::capacity::lists;
use moe_kernels::experts::SlotShape;

use crate::rows::Rows;
use crate::support::device;
use crate::timing::time;

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, slots, tile_m) in [(1, 1, 1), (4, 9, 16), (60, 150, 16), (300, 700, 64), (513, 900, 3)] {
        for top_k in [Some(1), Some(3), None] {
            let (rows, shape) = draw(rng, tokens, slots, tile_m, top_k);
            assert_eq!(found(&rows, &shape), None, "{shape:?}: {rows:?}");
            for kind in 0..FAULTS {
                let (mut rows, shape) = draw(rng, tokens, slots, tile_m, top_k);
                spoil(rng, &mut rows, &shape, kind);
                check_found(&rows, &shape);
            }
            // Several at once: the first is named.
            let (mut rows, shape) = draw(rng, tokens, slots, tile_m, top_k);
            for _ in 0..4 {
                let kind = 2 + rng.usize(..FAULTS - 2);
                spoil(rng, &mut rows, &shape, kind);
            }
            check_found(&rows, &shape);
        }
    }
    nothing();
    large(rng);
}

/// Kinds of faults that [`spoil`] makes.
const FAULTS: usize = 17;

/// Lists without a fault that reach every limit, and are followed by what is no row, token or expert.
fn draw(
    rng: &mut fastrand::Rng,
    tokens: usize,
    slots: usize,
    tile_m: usize,
    top_k: Option<usize>,
) -> (Rows, SlotShape) {
    let experts = 1 + rng.usize(..9);
    let mut rows = Rows { slot_token: vec![i32::MAX; slots], ..Rows::default() };
    let mut at = rng.usize(..slots.min(5));
    while at < slots {
        // Gaps between tiles, whole tiles, and single rows.
        let end = (at + [1, tile_m, 1 + rng.usize(..tile_m)][rng.usize(..3)]).min(slots);
        let expert = [0, experts - 1, rng.usize(..experts)][rng.usize(..3)];
        rows.tiles.push([expert as i32, at as i32, end as i32, rng.i32(..)]);
        let token = |rng: &mut fastrand::Rng| [0, tokens - 1, rng.usize(..tokens)][rng.usize(..3)] as i32;
        rows.slot_token[at..end].fill_with(|| token(rng));
        at = end + [0, 0, 2][rng.usize(..3)];
    }
    rows.num_tiles = rows.tiles.len() as i32;
    // As many entries as there may be, or more.
    let max_tiles = rows.tiles.len() + if rng.bool() { 0 } else { 3 };
    let shape = SlotShape::new(tokens, experts, top_k, slots, tile_m, max_tiles);
    let slot = |rng: &mut fastrand::Rng| [0, slots - 1, rng.usize(..slots)][rng.usize(..3)] as i32;
    if let Some(top_k) = top_k {
        let none = [-1, i32::MIN, -2];
        rows.token_slot =
            (0..tokens * top_k).map(|_| if rng.bool() { slot(rng) } else { none[rng.usize(..3)] }).collect();
    } else {
        // The last token's end is below `slots` half of the time: what follows it means nothing.
        let last = if rng.bool() { slots } else { rng.usize(..=slots) };
        let mut offsets: Vec<i32> = (0..tokens - 1).map(|_| rng.usize(..=last) as i32).collect();
        offsets.sort_unstable();
        rows.token_offsets = [vec![0], offsets, vec![last as i32]].concat();
        rows.token_slot = (0..last).map(|_| slot(rng)).collect();
    }
    (rows, shape)
}

/// One value that is next to the limit, or far from it.
fn spoil(rng: &mut fastrand::Rng, rows: &mut Rows, shape: &SlotShape, kind: usize) {
    let (slots, tokens, experts) = (shape.slots as i32, shape.tokens as i32, shape.experts as i32);
    let tile = rng.usize(..rows.tiles.len());
    let [_, first, end, _] = rows.tiles[tile];
    let row = [first, end.saturating_sub(1)][rng.usize(..2)];
    let far = [i32::MAX, i32::MIN, -1][rng.usize(..3)];
    let entry = &mut rows.tiles[tile];
    match kind {
        0 => rows.num_tiles = shape.max_tiles as i32 + 1,
        1 => rows.num_tiles = far,
        2 => entry[0] = experts,
        3 => entry[0] = far,
        4 => entry[1] = entry[2],
        5 => entry[1] = far,
        6 => entry[2] = entry[1].saturating_add(shape.tile_m as i32 + 1),
        7 => entry[2] = slots + 1,
        8 => entry[2] = far,
        9 => (entry[1], entry[2]) = (entry[2], entry[1]),
        // Into the tile before.
        10 => entry[1] = entry[1].saturating_sub(1).max(0),
        11 => {
            if let Some(token) = rows.slot_token.get_mut(row.max(0) as usize) {
                *token = tokens;
            }
        }
        12 => {
            if let Some(token) = rows.slot_token.get_mut(row.max(0) as usize) {
                *token = far;
            }
        }
        13 | 14 => {
            let len = rows.token_slot.len();
            if len > 0 {
                // The last and the first too.
                let index = [0, len - 1, rng.usize(..len)][rng.usize(..3)];
                rows.token_slot[index] = if kind == 13 { slots } else { far };
            }
        }
        _ => {
            let len = rows.token_offsets.len();
            if len > 0 {
                let index = [0, len - 1, rng.usize(..len)][rng.usize(..3)];
                let before = index.checked_sub(1).map_or(0, |before| rows.token_offsets[before]);
                rows.token_offsets[index] =
                    if kind == 15 { before.saturating_sub(1) } else { [slots + 1, 1][rng.usize(..2)] };
            }
        }
    }
}

/// The first entry that is wrong, by the list's name: what products and sums ask of the lists.
fn first_fault(rows: &Rows, shape: &SlotShape) -> Option<(&'static str, usize)> {
    let below = |value: i32, limit: usize| usize::try_from(value).is_ok_and(|value| value < limit);
    let tiles = match usize::try_from(rows.num_tiles) {
        Ok(count) if count <= shape.max_tiles => {
            let mut tiles = rows.tiles.clone();
            tiles.resize(count, [i32::MAX; 4]);
            tiles
        }
        _ => return Some(("num_tiles", 0)),
    };
    let mut before = 0;
    let mut right = vec![];
    let mut wrong = None;
    for (index, &[expert, first, end, _]) in tiles.iter().enumerate() {
        // Unsigned, as the kernel holds them: a negative end of the tile before lies past every row.
        let ok = below(expert, shape.experts)
            && first >= 0
            && first < end
            && below(end, shape.slots + 1)
            && first as u32 >= before
            && (end - first) as usize <= shape.tile_m;
        if ok {
            right.push(first as usize..end as usize);
        } else {
            wrong = wrong.or(Some(("tiles", index)));
        }
        before = end as u32;
    }
    let covered = right.into_iter().flatten();
    let token = covered.filter(|&row| !below(rows.slot_token[row], shape.tokens)).min();
    wrong = wrong.or(token.map(|row| ("slot_token", row)));
    let offsets = &rows.token_offsets;
    let used = match shape.top_k {
        Some(_) => rows.token_slot.len(),
        None => (offsets[shape.tokens] as u32 as usize).min(shape.slots),
    };
    let entry = |index: usize| rows.token_slot.get(index).copied().unwrap_or(i32::MAX);
    let none = |value: i32| shape.top_k.is_some() && value < 0;
    let slot = (0..used).find(|&index| !below(entry(index), shape.slots) && !none(entry(index)));
    wrong = wrong.or(slot.map(|index| ("token_slot", index)));
    if shape.top_k.is_none() {
        let falls = |index: usize| {
            offsets[index] as u32 > shape.slots as u32
                || if index == 0 { offsets[0] != 0 } else { (offsets[index] as u32) < offsets[index - 1] as u32 }
        };
        wrong = wrong.or((0..=shape.tokens).find(|&index| falls(index)).map(|index| ("token_offsets", index)));
    }
    wrong
}

/// The list and entry that the device names.
fn found(rows: &Rows, shape: &SlotShape) -> Option<(&'static str, usize)> {
    let stream = device::stream();
    match lists::checked(device::kernels(), &stream, shape, rows.lists(&stream, shape)) {
        Ok(_) => None,
        Err(Error::Invalid { argument, got, .. }) => {
            let (_, index) = got.rsplit_once(" at ").unwrap_or_else(|| panic!("no entry in {got:?}"));
            Some((argument, index.parse().unwrap()))
        }
        Err(other) => panic!("{shape:?}: {other}"),
    }
}

fn check_found(rows: &Rows, shape: &SlotShape) {
    let want = first_fault(rows, shape);
    assert_eq!(found(rows, shape), want, "{shape:?}: {rows:?}");
}

/// No tile and no token.
fn nothing() {
    let shape = SlotShape::new(0, 1, Some(2), 5, 16, 2);
    assert_eq!(found(&Rows::default(), &shape), None);
    let shape = SlotShape::new(0, 1, None, 5, 16, 2);
    let rows = Rows { token_offsets: vec![0], ..Rows::default() };
    assert_eq!(found(&rows, &shape), None);
    check_found(&Rows { token_offsets: vec![3], token_slot: vec![4, 0, 1], ..rows }, &shape);
}

/// More entries than threads: the last are looked at too.
fn large(rng: &mut fastrand::Rng) {
    let threads = 8 * device::kernels().device().multiprocessors as usize * 256;
    let (tokens, slots) = (threads + 300, 2 * threads);
    let token_offsets: Vec<i32> = (0..=tokens).map(|t| (2 * t).min(slots) as i32).collect();
    let token_slot: Vec<i32> = (0..slots).map(|_| rng.usize(..slots) as i32).collect();
    let rows = Rows { token_offsets, token_slot, ..Rows::default() };
    let shape = SlotShape::new(tokens, 1, None, slots, 16, 0);
    assert_eq!(found(&rows, &shape), None);
    time(&device::stream(), &format!("{shape:?}"), || assert_eq!(found(&rows, &shape), None));
    let mut wrong = rows.clone();
    wrong.token_slot[slots - 1] = slots as i32;
    check_found(&wrong, &shape);
    let mut wrong = rows;
    wrong.token_offsets[tokens - 1] = 0;
    check_found(&wrong, &shape);
}
