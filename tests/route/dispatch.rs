use moe_kernels::reference::dispatch::{DispatchRule, Dispatched, dispatch};
use moe_kernels::registry::{Dispatch, Kernel};
use moe_kernels::rules::Capacity;

use crate::device::{Arg, Input, Output, Scratch, launch};
use crate::random::Random;

/// Outputs and workspace of a dispatch, with the values they should have.
pub struct Results {
    rule: DispatchRule,
    tokens: usize,
    want: Dispatched,
    counts: Output,
    offsets: Output,
    slot_token: Output,
    token_slot: Output,
    slot_weight: Output,
    tiles: Output,
    num_tiles: Output,
    workspace: Scratch,
}

impl Results {
    pub fn new(ids: &[i32], rule: DispatchRule, blocks: u32) -> Results {
        let want = dispatch(ids, &rule).unwrap();
        let slots = want.slot_token.len();
        let workspace = Scratch::new(32 + 4 * (blocks as u64) * rule.experts as u64);
        workspace.write(0, &[0u32]);
        Results {
            tokens: ids.len() / rule.top_k,
            counts: Output::new::<i32>(rule.experts),
            offsets: Output::new::<i32>(rule.experts + 1),
            slot_token: Output::new::<i32>(slots),
            token_slot: Output::new::<i32>(ids.len()),
            slot_weight: Output::new::<f32>(slots),
            tiles: Output::new::<[i32; 4]>(want.tiles.len()),
            num_tiles: Output::new::<i32>(1),
            workspace,
            rule,
            want,
        }
    }

    /// The parameters from `capacity` on.
    pub fn args(&self) -> Vec<Arg<'_>> {
        let capacity = self.rule.capacity;
        let padded =
            capacity.filter(|c| c.padded).map_or(0, |c| c.per_expert * self.tokens.div_ceil(c.tokens_per_sequence));
        vec![
            Arg::U32(capacity.map_or(0, |c| c.per_expert as u32)),
            Arg::U32(capacity.map_or(0, |c| c.tokens_per_sequence as u32)),
            Arg::U32(padded as u32),
            Arg::U32(self.rule.tile_m as u32),
            Arg::Out(&self.counts),
            Arg::Out(&self.offsets),
            Arg::Out(&self.slot_token),
            Arg::Out(&self.token_slot),
            Arg::Out(&self.slot_weight),
            Arg::Out(&self.tiles),
            Arg::Out(&self.num_tiles),
            Arg::Scratch(&self.workspace),
        ]
    }

    /// Bit for bit; `weights` are those that the slots carry.
    pub fn check(&self, what: &str, weights: &[f32]) {
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(self.counts.read::<i32>(), self.want.counts, "{what}: counts");
        assert_eq!(self.offsets.read::<i32>(), self.want.offsets, "{what}: offsets");
        assert!(self.slot_token.read::<i32>() == self.want.slot_token, "{what}: slot_token");
        assert!(self.token_slot.read::<i32>() == self.want.token_slot, "{what}: token_slot");
        assert!(bits(&self.slot_weight.read::<f32>()) == bits(&self.want.slot_weight(weights)), "{what}: slot_weight");
        assert_eq!(self.num_tiles.read::<i32>(), [self.want.tiles.len() as i32], "{what}: num_tiles");
        assert!(self.tiles.read::<[i32; 4]>() == self.want.tiles, "{what}: tiles");
        assert_eq!(self.workspace.read::<u32>(0, 1)[0] << 1, 0, "{what}: the barrier is not ready for another launch");
    }
}

#[derive(Clone, Copy, Debug)]
enum Ids {
    Uniform,
    /// Half of the slots on the first experts, some experts empty.
    Skewed,
    One,
    /// Every tenth slot is -1, E or beyond.
    WithSkipped,
    AllSkipped,
}

impl Ids {
    const ALL: [Ids; 5] = [Ids::Uniform, Ids::Skewed, Ids::One, Ids::WithSkipped, Ids::AllSkipped];

    fn draw(self, random: &mut Random, count: usize, experts: usize) -> Vec<i32> {
        let outside = [-1, experts as i32, i32::MAX, i32::MIN];
        (0..count)
            .map(|_| match self {
                Ids::Uniform => random.below(experts) as i32,
                Ids::Skewed => random.below(experts).min(random.below(experts)).min(random.below(experts)) as i32,
                Ids::One => experts as i32 / 2,
                Ids::WithSkipped if random.below(10) > 0 => random.below(experts) as i32,
                Ids::WithSkipped => random.pick(&outside),
                Ids::AllSkipped => -1,
            })
            .collect()
    }
}

fn case(ids: Ids, tokens: usize, blocks: u32, rule: DispatchRule) {
    let max_experts = *Dispatch::MAX_EXPERTS.iter().find(|&&max| max as usize >= rule.experts).unwrap();
    case_with(Dispatch { max_experts, ids_bytes: 4 }, ids, tokens, blocks, rule);
}

fn case_with(kernel: Dispatch, ids: Ids, tokens: usize, blocks: u32, rule: DispatchRule) {
    let kernel = Kernel::Dispatch(kernel);
    let what = format!("{} {ids:?} T={tokens} P={blocks} {rule:?}", kernel.name());
    let mut random = Random::new((tokens * rule.experts) as u64);
    let ids = ids.draw(&mut random, tokens * rule.top_k, rule.experts);
    let weights: Vec<f32> = random.normals(ids.len());
    let results = Results::new(&ids, rule, blocks);
    let (ids, on_device) = (Input::new(&ids), Input::new(&weights));
    let mut args = vec![
        Arg::In(&ids),
        Arg::In(&on_device),
        Arg::U32(tokens as u32),
        Arg::U32(rule.experts as u32),
        Arg::U32(rule.top_k as u32),
        Arg::Null,
        Arg::Null,
        Arg::U32(0),
    ];
    args.extend(results.args());
    // Twice, as the barrier must be ready for the next launch.
    for seed in 0..2 {
        launch(kernel, [blocks, 1, 1], seed, &args);
        results.check(&what, &weights);
    }
}

fn dropless(experts: usize, top_k: usize, tile_m: usize) -> DispatchRule {
    DispatchRule { experts, top_k, capacity: None, tile_m }
}

fn capped(rule: DispatchRule, per_expert: usize, tokens_per_sequence: usize, padded: bool) -> DispatchRule {
    DispatchRule { capacity: Some(Capacity::new(per_expert, tokens_per_sequence).padded(padded)), ..rule }
}

#[test]
fn numbers_of_experts() {
    for experts in [1, 2, 5, 8, 31, 32, 33, 60, 64, 160, 255, 256, 257, 512, 1024, 1025, 4095, 4096] {
        for blocks in [1, 3] {
            case(Ids::WithSkipped, 50, blocks, dropless(experts, 5, 4));
        }
    }
}

#[test]
fn kinds_of_ids() {
    for ids in Ids::ALL {
        for blocks in [1, 2, 5] {
            case(ids, 333, blocks, dropless(40, 3, 16));
            case(ids, 333, blocks, capped(dropless(40, 3, 16), 4, 32, false));
            case(ids, 333, blocks, capped(dropless(40, 3, 16), 4, 32, true));
        }
    }
}

#[test]
fn numbers_of_tokens() {
    for tokens in [1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 257] {
        for blocks in [1, 4] {
            case(Ids::Skewed, tokens, blocks, dropless(8, 2, 64));
        }
    }
}

#[test]
fn choices_of_a_token() {
    for top_k in [1, 2, 3, 7, 8, 10, 31, 32, 33, 70] {
        case(Ids::WithSkipped, 45, 2, dropless(100, top_k, 8));
        case(Ids::Skewed, 45, 2, capped(dropless(100, top_k, 8), 3, 10, false));
    }
}

#[test]
fn capacity_at_the_edges() {
    for padded in [false, true] {
        // Sequences of one token, of all tokens, a short last one; a capacity that drops nearly all, and one that drops none.
        case(Ids::Skewed, 30, 2, capped(dropless(6, 2, 4), 1, 1, padded));
        case(Ids::Skewed, 300, 2, capped(dropless(6, 2, 4), 20, 300, padded));
        case(Ids::Skewed, 103, 3, capped(dropless(33, 4, 4), 2, 10, padded));
        case(Ids::One, 103, 3, capped(dropless(33, 1, 4), 1, 50, padded));
        case(Ids::Uniform, 64, 1, capped(dropless(8, 1, 4), 1000, 16, padded));
        // More than 512 experts: half of the warps rest.
        case(Ids::Skewed, 200, 2, capped(dropless(1000, 4, 4), 2, 9, padded));
        case(Ids::Skewed, 60, 2, capped(dropless(3000, 4, 4), 1, 9, padded));
    }
}

#[test]
fn several_thousand_tokens() {
    case(Ids::Skewed, 5000, 16, dropless(64, 8, 128));
    case(Ids::One, 4096, 7, dropless(8, 2, 16));
    case(Ids::Uniform, 4096, 9, capped(dropless(16, 1, 64), 40, 512, true));
}

#[test]
fn few_experts_in_the_large_kernel() {
    case_with(Dispatch { max_experts: 4096, ids_bytes: 4 }, Ids::WithSkipped, 77, 2, dropless(9, 3, 8));
}

#[test]
fn without_weights_or_tiles() {
    let rule = dropless(12, 2, 8);
    let ids = Ids::WithSkipped.draw(&mut Random::new(5), 80, rule.experts);
    let want = dispatch(&ids, &rule).unwrap();
    let counts = Output::new::<i32>(12);
    let offsets = Output::new::<i32>(13);
    let (slot_token, token_slot) = (Output::new::<i32>(want.slot_token.len()), Output::new::<i32>(80));
    let workspace = Scratch::new(32 + 4 * 12);
    workspace.write(0, &[0u32]);
    launch(
        Kernel::Dispatch(Dispatch { max_experts: 1024, ids_bytes: 4 }),
        [1, 1, 1],
        3,
        &[
            Arg::In(&Input::new(&ids)),
            Arg::Null,
            Arg::U32(40),
            Arg::U32(12),
            Arg::U32(2),
            Arg::Null,
            Arg::Null,
            Arg::U32(0),
            Arg::U32(0),
            Arg::U32(0),
            Arg::U32(0),
            Arg::U32(0),
            Arg::Out(&counts),
            Arg::Out(&offsets),
            Arg::Out(&slot_token),
            Arg::Out(&token_slot),
            Arg::Null,
            Arg::Null,
            Arg::Null,
            Arg::Scratch(&workspace),
        ],
    );
    assert_eq!(counts.read::<i32>(), want.counts);
    assert_eq!(offsets.read::<i32>(), want.offsets);
    assert_eq!(slot_token.read::<i32>(), want.slot_token);
    assert_eq!(token_slot.read::<i32>(), want.token_slot);
}
