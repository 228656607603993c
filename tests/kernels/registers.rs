//! Batches that reach every register of a lane. Where tokens are drawn at random, a mistake in one of a lane's 128 registers changes a choice
//! too seldom to be noticed.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use moe_kernels::registry::Kernel;
use moe_kernels::routers::gating::GatingDesc;
use moe_kernels::rules::{Gating, GroupScore, Groups, Masked, Score};

use crate::gating::{Batch, case_of, coarse};
use crate::support::device;
use crate::support::inputs::normal;

/// For a kernel of `least` to `most` experts and up to `top_k` choices.
pub fn check(kernel: Kernel, score: Score, sizes: [usize; 2], top_k: usize, rng: &mut fastrand::Rng) {
    for (name, desc, logits) in batches(score, sizes, top_k, rng) {
        case_of(kernel, rng, &desc, Batch::new(name, logits).behind_padding(0));
    }
}

/// What each is about, and its logits.
pub fn batches(
    score: Score,
    [least, most]: [usize; 2],
    top_k: usize,
    rng: &mut fastrand::Rng,
) -> Vec<(&'static str, GatingDesc, Vec<f32>)> {
    let desc = |tokens: usize, experts: usize, groups: Option<Groups>| {
        let eligible = groups.map_or(experts, |groups| experts / groups.count * groups.kept);
        GatingDesc::new(tokens, experts, top_k.min(eligible), Gating::new(score).groups(groups))
    };
    let mut all = Vec::new();
    let mut add = |name, desc: GatingDesc, logits| all.push((name, desc, logits));
    let plain = desc(8, most, None);
    add("one lane", plain, one_lane(rng, &plain));
    for (experts, count) in ends(least, most) {
        for (tokens, by) in [(8, GroupScore::TOP_TWO), (2, GroupScore::Max)] {
            let grouped = desc(tokens, experts, Some(Groups::new(count, count / 2).score(by)));
            add("edges", grouped, edges(rng, &grouped, count));
        }
    }
    let count = (most / 32).clamp(4, 32);
    let grouped = desc(16, most, Some(Groups::new(count, count / 2).score(GroupScore::TopSum(3))));
    add("ties", grouped, ties(rng, &grouped, count));
    if score != Score::TopkSoftmax {
        // All groups are kept, and all experts come behind 0: what is no expert must not become that.
        let grouped = desc(2, least + 1, Some(Groups::new(2, 2).masked(Masked::Zero)));
        add("NaN", grouped, vec![f32::NAN; 2 * (least + 1)]);
    }
    all
}

/// Two tokens a warp, of which the last warps' alone count: the second one's logits are fetched while the first one's are searched, those of the
/// very last row too.
pub fn check_ahead(kernel: Kernel, score: Score, sizes: [usize; 2], top_k: usize, rng: &mut fastrand::Rng) {
    let warps = 8 * device::kernels().device().multiprocessors as usize * kernel.threads() as usize / 32;
    let (tokens, counting) = (2 * warps, 16);
    for experts in sizes {
        let desc = GatingDesc::new(tokens, experts, top_k, Gating::new(score));
        let mut logits = vec![0.0; tokens * experts];
        logits[(tokens - counting) * experts..].fill_with(|| 2.0 * normal(rng) as f32);
        case_of(kernel, rng, &desc, Batch::new("two a warp", logits).behind_padding(tokens - counting));
    }
}

fn background(rng: &mut fastrand::Rng, desc: &GatingDesc) -> Vec<f32> {
    let mut logits: Vec<f32> = (0..desc.tokens * desc.experts).map(|_| 0.25 * normal(rng) as f32 - 1.0).collect();
    coarse(&mut logits);
    logits
}

/// The best experts of a token are all those of one lane, in any order.
fn one_lane(rng: &mut fastrand::Rng, desc: &GatingDesc) -> Vec<f32> {
    let mut logits = background(rng, desc);
    for row in logits.chunks_mut(desc.experts) {
        let lane = rng.usize(..32);
        let mut ranks: Vec<usize> = (0..desc.experts / 32).collect();
        rng.shuffle(&mut ranks);
        for (i, rank) in ranks.into_iter().enumerate() {
            row[32 * i + lane] = 4.0 + rank as f32 / 64.0;
        }
    }
    logits
}

/// `(experts, groups)`: groups of several sizes, so that in nearly every register one ends within a warp's 32 experts and the next one begins.
fn ends(least: usize, most: usize) -> Vec<(usize, usize)> {
    let within = |size: usize, count: usize| {
        (1..count).map(move |group| group * size).filter(|expert| expert % 32 != 0).map(|expert| expert / 32)
    };
    let sizes: Vec<_> = (3..=most / 2).map(|size| (size, 32.min(most / size))).collect();
    let mut left: BTreeSet<usize> = (0..most / 32).collect();
    let mut chosen = Vec::new();
    loop {
        let gain = |&(size, count): &(usize, usize)| within(size, count).filter(|part| left.contains(part)).count();
        let fitting = sizes.iter().copied().filter(|(size, count)| size * count >= least);
        let Some((size, count)) = fitting.max_by_key(|of| (gain(of), Reverse(of.0 * of.1))) else { return chosen };
        if gain(&(size, count)) < left.len().div_ceil(8).max(1) {
            return chosen;
        }
        left.retain(|part| !within(size, count).any(|ended| ended == *part));
        chosen.push((size * count, count));
    }
}

/// What a group is worth: of neighbours one is kept, in the next token the other one.
fn worths(rng: &mut fastrand::Rng, token: usize, count: usize) -> Vec<f32> {
    let mut ranks: [Vec<usize>; 2] = [(0..16).collect(), (16..32).collect()];
    ranks.iter_mut().for_each(|ranks| rng.shuffle(ranks));
    (0..count).map(|group| ranks[(group + token) % 2].pop().expect("at most 32 groups") as f32).collect()
}

/// The first and the last expert of a group decide its score: with one of them alone no group is kept.
fn edges(rng: &mut fastrand::Rng, desc: &GatingDesc, count: usize) -> Vec<f32> {
    let mut logits = background(rng, desc);
    for (token, row) in logits.chunks_mut(desc.experts).enumerate() {
        let worths = worths(rng, token, count);
        for (group, worth) in row.chunks_mut(desc.experts / count).zip(worths) {
            let last = group.len() - 1;
            [0, last].into_iter().for_each(|e| group[e] = 3.0 + worth / 64.0);
        }
    }
    logits
}

/// Three experts of a group decide its score, and are as good as one another: with two of them no group is kept.
fn ties(rng: &mut fastrand::Rng, desc: &GatingDesc, count: usize) -> Vec<f32> {
    let mut logits = background(rng, desc);
    for (token, row) in logits.chunks_mut(desc.experts).enumerate() {
        let worths = worths(rng, token, count);
        for (group, worth) in row.chunks_mut(desc.experts / count).zip(worths) {
            let mut all: Vec<usize> = (0..group.len()).collect();
            rng.shuffle(&mut all);
            all[..3].iter().for_each(|&e| group[e] = 3.0 + worth / 128.0);
        }
    }
    logits
}
