//! Where rows go, and how many there are.

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::experts::permute::Unfilled;
use moe_kernels::rules::{Gating, Score};

use crate::calls;
use crate::close::assert_rounded;
use crate::data::{random_ids, rng, scores, values, wide};
use crate::formulas::{bincount, cumulative, sorted_slots};
use crate::suite::{Section, product, scaled};
use crate::support::inputs::normals;

pub fn permute_unpermute() -> Section {
    let mut section = Section::new("permute_unpermute");
    for (tokens, hidden) in product(&[1, 33, 1024, 5000], &[2048, 7168]) {
        for (experts, top_k) in product(&[16, 64, 256], &[2, 6, 8]) {
            for (ep_size, scratch) in product(&[1, 4, 16], &[false, true]) {
                let name =
                    format!("n={tokens} hidden={hidden} e={experts} topk={top_k} ep={ep_size} scratch={scratch}");
                let point = name.clone();
                let sizes = [scaled(tokens, 96), hidden / 32, experts, top_k, ep_size];
                section.point(name, move || permute_point(&point, sizes));
            }
        }
    }
    section
}

/// Rows by local expert and token; offsets; where each slot went; then 0.5 times the rows and noise, back by softmax weights.
fn permute_point(name: &str, [tokens, hidden, experts, top_k, ep_size]: [usize; 5]) {
    let rng = &mut rng(name);
    let x: Vec<bf16> = values(rng, tokens * hidden);
    let logits = scores(rng, tokens * experts, Dtype::Bf16);
    let rule = Gating::new(Score::Softmax);
    let chosen = calls::gate_as(Dtype::Bf16, &logits, experts, top_k, rule, None, None);
    let local = experts / ep_size;
    let first = rng.usize(..ep_size) * local;
    let map: Vec<i32> =
        (0..experts).map(|e| if (first..first + local).contains(&e) { (e - first) as i32 } else { -1 }).collect();
    let ids: Vec<i64> = chosen.ids.iter().map(|&id| id.into()).collect();
    let ids = if ep_size > 1 { calls::map_ids(&ids, top_k, &map) } else { chosen.ids.clone() };
    let want_ids: Vec<i32> = chosen.ids.iter().map(|&id| if ep_size > 1 { map[id as usize] } else { id }).collect();
    assert_eq!(ids, want_ids, "local ids");

    let sorted = calls::sort(&ids, Some(&chosen.weights), &DispatchDesc::new(tokens, local, top_k, 16));
    let slots = sorted_slots(&want_ids, local);
    assert_eq!(sorted.offsets(), cumulative(&bincount(&want_ids, local)), "offsets");
    let mut row_of = vec![-1; ids.len()];
    slots.iter().enumerate().for_each(|(row, &slot)| row_of[slot] = row as i32);
    assert_eq!(sorted.token_slot(), row_of, "rows of slots");
    let want: Vec<bf16> = slots.iter().flat_map(|&s| x[s / top_k * hidden..][..hidden].to_vec()).collect();
    let rows = sorted.permute(&x, hidden, Unfilled::Keep);
    assert!(rows == want, "permuted rows");
    assert!(sorted.permute(&x, hidden, Unfilled::Keep) == want, "permuted rows again");

    let noise: Vec<bf16> = normals(rng, rows.len(), 1.0);
    let rows: Vec<bf16> =
        rows.iter().zip(noise).map(|(row, noise)| bf16::from_f32(0.5 * row.to_f32() + noise.to_f32())).collect();
    let got = wide(&sorted.unpermute(&rows, Some(&chosen.weights), hidden));
    let mut want = vec![0.0; tokens * hidden];
    for (row, &slot) in slots.iter().enumerate() {
        let weight = f64::from(chosen.weights[slot]);
        let t = slot / top_k;
        let of = &rows[row * hidden..][..hidden];
        want[t * hidden..][..hidden].iter_mut().zip(of).for_each(|(y, v)| *y += weight * v.to_f64());
    }
    assert_rounded(&got, &want, Dtype::Bf16);
}

/// Ids that are no expert's, and experts that are elsewhere: their tokens' output is zero.
pub fn permute_invalid_ids() -> Section {
    let mut section = Section::new("permute_invalid_ids");
    section.point("five tokens", || {
        let x: Vec<bf16> = (0..80).map(|v| bf16::from_f32(v as f32)).collect();
        let ids = calls::map_ids(&[0, -1, 1, 4, 2], 1, &[0, 1, -1, -1]);
        let sorted = calls::sort(&ids, None, &DispatchDesc::new(5, 2, 1, 16));
        assert_eq!(sorted.offsets(), [0, 1, 2]);
        let rows = sorted.permute(&x, 16, Unfilled::Keep);
        assert!(rows == [&x[..16], &x[32..48]].concat());
        let back = sorted.unpermute(&rows, None, 16);
        let mut want = vec![bf16::ZERO; 80];
        want[..16].copy_from_slice(&x[..16]);
        want[32..48].copy_from_slice(&x[32..48]);
        assert!(back == want);
    });
    section
}

/// `sorted_ids`, `expert_ids` of blocks and the number of padded rows, from ids; the order within an expert is free there, ours is stable.
pub fn align_block_size() -> Section {
    let mut section = Section::new("align_block_size");
    for (tokens, top_k) in product(&[1, 3, 256, 2256, 4096], &[1, 2, 16, 32]) {
        for (experts, block) in product(&[32, 160, 256, 257], &[32, 128]) {
            for pad_sorted in [false, true] {
                let name = format!("m={tokens} topk={top_k} e={experts} block={block} pad={pad_sorted}");
                let point = name.clone();
                let tokens = scaled(tokens, 96);
                section.point(name, move || align_point(&point, tokens, top_k, experts, block));
            }
        }
    }
    section.point("deterministic", || {
        let ids: Vec<i32> = {
            let rng = &mut rng("deterministic");
            (0..256).map(|_| rng.i32(0..32)).collect()
        };
        let run = || {
            let sorted = calls::sort(&ids, None, &DispatchDesc::new(128, 32, 2, 64).row_multiple(64));
            (sorted.token_slot(), sorted.slot_token(), sorted.offsets())
        };
        let first = run();
        (0..4).for_each(|_| assert_eq!(run(), first));
    });
    section
}

fn align_point(name: &str, tokens: usize, top_k: usize, experts: usize, block: usize) {
    let ids = random_ids(&mut rng(name), tokens, experts, top_k);
    check_aligned(&ids, top_k, experts, block);
}

/// Each expert's rows begin on a block; its slots are in them, in order; tiles name the block's expert.
fn check_aligned(ids: &[i32], top_k: usize, experts: usize, block: usize) {
    let tokens = ids.len() / top_k;
    let desc = DispatchDesc::new(tokens, experts, top_k, block).row_multiple(block);
    let sorted = calls::sort(ids, None, &desc);
    let counts = bincount(ids, experts);
    let padded: Vec<i32> = counts.iter().map(|&c| (c as usize).next_multiple_of(block) as i32).collect();
    let offsets = cumulative(&padded);
    assert_eq!(sorted.offsets(), offsets, "offsets");
    assert_eq!(sorted.counts(), counts, "counts");
    assert_eq!(calls::count(ids, experts, block), (counts.clone(), offsets.clone()), "counts alone");
    let mut slot_token = vec![-1; offsets[experts] as usize];
    let mut token_slot = vec![-1; ids.len()];
    let mut at = offsets.clone();
    for slot in sorted_slots(ids, experts) {
        let row = &mut at[ids[slot] as usize];
        slot_token[*row as usize] = (slot / top_k) as i32;
        token_slot[slot] = *row;
        *row += 1;
    }
    assert_eq!(sorted.slot_token(), slot_token, "tokens of rows");
    assert_eq!(sorted.token_slot(), token_slot, "rows of slots");
    // One tile a block, so that tile b's expert is the suite's expert_ids[b].
    let num_tiles = calls::down(&sorted.stream, sorted.dispatched.num_tiles(), 1)[0] as usize;
    let tiles = sorted.stream.clone_dtoh(sorted.dispatched.tiles()).unwrap();
    let blocks: Vec<[i32; 2]> = tiles[..num_tiles].iter().map(|tile| [tile[0], tile[1]]).collect();
    let want: Vec<[i32; 2]> = (0..experts)
        .flat_map(|e| (offsets[e]..offsets[e + 1]).step_by(block).map(move |row| [e as i32, row]))
        .collect();
    assert_eq!(blocks, want, "blocks");
}

/// The same after an expert map that leaves every second expert out.
pub fn align_block_size_with_map() -> Section {
    let mut section = Section::new("align_block_size_with_map");
    for (tokens, top_k) in product(&[16, 32], &[2, 4]) {
        let name = format!("m={tokens} topk={top_k}");
        let point = name.clone();
        section.point(name, move || {
            let ids = random_ids(&mut rng(&point), tokens, 8, top_k);
            let map: Vec<i32> = (0..8).map(|e| if e % 2 == 0 { e / 2 } else { -1 }).collect();
            let wide: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
            let local = calls::map_ids(&wide, top_k, &map);
            assert_eq!(local, ids.iter().map(|&id| map[id as usize]).collect::<Vec<_>>());
            check_aligned(&local, top_k, 4, 64);
        });
    }
    section
}

/// Slots of the experts of each rank, from ids of 64 bits.
pub fn count_tokens() -> Section {
    let mut section = Section::new("count_tokens");
    let sizes = [1, 4, 8, 11, 19, 128, 127, 405, 1024, 3333, 6666, 7317];
    for (tokens, top_k) in product(&sizes, &[2, 6, 8]) {
        for ep_size in [1, 2, 4] {
            let name = format!("n={tokens} topk={top_k} ep={ep_size}");
            let point = name.clone();
            section.point(name, move || count_point(&point, tokens, top_k, ep_size));
        }
    }
    section
}

pub fn count_tokens_by_size() -> Section {
    let mut section = Section::new("count_tokens_by_size");
    for tokens in (1..8192).step_by(11) {
        let name = format!("numel={tokens}");
        let point = name.clone();
        section.point(name, move || count_point(&point, tokens, 1, 2));
    }
    section
}

fn count_point(name: &str, tokens: usize, top_k: usize, ep_size: usize) {
    let experts = 32;
    let ids: Vec<i64> = random_ids(&mut rng(name), tokens, experts, top_k).into_iter().map(i64::from).collect();
    let local = experts / ep_size;
    for rank in 0..ep_size {
        let first = rank * local;
        let map: Vec<i32> =
            (0..experts).map(|e| if (first..first + local).contains(&e) { (e - first) as i32 } else { -1 }).collect();
        let want: Vec<i32> =
            (first..first + local).map(|e| ids.iter().filter(|&&id| id == e as i64).count() as i32).collect();
        let here = calls::map_ids(&ids, top_k, &map);
        assert_eq!(calls::count(&here, local, 1).0, want, "rank {rank}");
    }
    if ep_size == 1 {
        let want: Vec<i32> = (0..experts as i64).map(|e| ids.iter().filter(|&&id| id == e).count() as i32).collect();
        assert_eq!(calls::count_wide(&ids, experts), want);
    }
}

/// Ids far past the experts, as stale memory holds them, index nothing.
pub fn stale_ids() -> Section {
    let mut section = Section::new("stale_ids");
    let map: Vec<i32> = (0..16).map(|e| if e < 8 { e } else { -1 }).collect();
    let of = map.clone();
    section.point("counts", move || {
        let local = calls::map_ids(&[0, 1, 7, 3, 123_456_789, 2, 98_765, 2_071_690_107], 2, &of);
        assert_eq!(calls::count(&local, 8, 1).0, [1, 1, 1, 1, 0, 0, 0, 1]);
    });
    section.point("weighted sum", move || {
        let local = calls::map_ids(&[0, 1, 2, 3, 123_456_789, 4, 98_765, 2_071_690_107], 2, &map);
        let sorted = calls::sort(&local, None, &DispatchDesc::new(4, 8, 2, 16));
        let rows = vec![1.0f32; sorted.rows() * 32];
        let y = sorted.unpermute(&rows, Some(&[1.0; 8]), 32);
        assert_eq!(y.chunks(32).map(|row| row[0]).collect::<Vec<_>>(), [2.0, 2.0, 1.0, 0.0]);
    });
    section
}
