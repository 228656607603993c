//! The routers that add noise (noisy top-k, its second level, sampling, jitter): what they read and how, and that no order of warps changes
//! what they write.

use moe_kernels::registry::{Kernel, Noisy, Spread};
use moe_kernels::rules::Dtype;
use softcuda::exec::Counters;

use crate::device::{Arg, Input, Output, Scratch, launch, text};
use crate::random::{Logits, Random};

const WIDTHS: [usize; 5] = [8, 64, 128, 256, 512];
const TOKENS: usize = 40;
const SEEDS: [u64; 4] = [0, 1, 77, 0xffff_ffff];

fn spread(experts: usize) -> Spread {
    Spread::ALL.into_iter().find(|spread| spread.max_experts() as usize >= experts).unwrap()
}

/// Every access but those that the kernel marks as "by the data" is free of bank conflicts and needs no sector more than its bytes fill;
/// the lines that `reads` says read the logits read each of them once.
fn assert_traffic(kernel: Kernel, counters: &Counters, reads: impl Fn(&str) -> bool, logits: usize) {
    let name = kernel.name();
    let ptx = text(&name);
    let (mut sectors, mut by_the_data) = (0, 0);
    for (text, line) in ptx.lines().zip(&counters.lines) {
        if text.contains("// by the data") {
            by_the_data += line.shared.requests;
            continue;
        }
        let (shared, global) = (line.shared, line.global);
        assert_eq!(shared.wavefronts, shared.ideal_wavefronts, "{name}: bank conflicts in {text}");
        assert_eq!(global.sectors, global.ideal_sectors, "{name}: sectors of {text}");
        if reads(text) {
            sectors += global.sectors;
        }
    }
    assert_eq!(sectors as usize, (4 * logits).div_ceil(32), "{name}: sectors of logits");
    if !matches!(kernel, Kernel::Noisy(_)) {
        assert_eq!((counters.shared.requests, by_the_data), (0, 0), "{name}: shared memory");
    }
}

/// Loads into the numbered registers %v and %d, which hold the logits.
fn reads_noisy(text: &str) -> bool {
    let loaded = text.split("ld.global.nc.f32 %").nth(1).unwrap_or_default();
    let number = loaded.strip_prefix('v').or(loaded.strip_prefix('d'));
    number.is_some_and(|number| number.starts_with(|c: char| c.is_ascii_digit()))
}

/// `clean`, `raw`.
fn products(count: usize) -> (Vec<f32>, Vec<f32>) {
    let mut random = Random::new(count as u64);
    (Logits::Normal.draw(&mut random, count), Logits::Normal.draw(&mut random, count))
}

fn noisy(experts: usize, tokens: usize, blocks: u32, seed: u64, sums: bool) -> (Counters, Vec<Vec<u32>>) {
    let spread = spread(experts);
    let kernel = Kernel::Noisy(Noisy { spread, grouped: false });
    let (clean, raw) = products(tokens * experts);
    let inputs = [Input::new(&clean), Input::new(&raw)];
    let k = 4;
    let per_token = [Output::new::<u32>(tokens * k), Output::new::<u32>(tokens * k)];
    let rest = [Output::new::<u32>(tokens * experts), Output::new::<u32>(tokens * 2)];
    let vectors = [experts, experts, experts, 2].map(Output::new::<u32>);
    let workspace = Scratch::new(32 + 12 * u64::from(blocks) * experts as u64);
    workspace.write(0, &[0u32; 8]);
    let mut args = vec![Arg::In(&inputs[0]), Arg::In(&inputs[1]), Arg::U32(experts as u32)];
    args.extend(per_token.iter().chain(&rest).map(Arg::Out));
    args.extend([tokens as u32, experts as u32, k as u32, blocks].map(Arg::U32));
    args.push(Arg::F32(0.01));
    args.extend([5, 6, 7, 8].map(Arg::U32));
    args.push(Arg::Null); // noise_state
    args.extend([Arg::Null, Arg::Null, Arg::U32(0)]); // mask
    if sums {
        args.extend(vectors.iter().map(Arg::Out));
        args.push(Arg::Scratch(&workspace));
    } else {
        args.extend((0..5).map(|_| Arg::Null));
    }
    let counters = launch(kernel, [blocks, 1, 1], seed, &args);
    assert!(!sums || workspace.read::<u32>(0, 1)[0] << 1 == 0, "the barrier is left as it was found");
    let outputs = per_token.iter().chain(&rest).chain(if sums { vectors.as_slice() } else { &[] });
    (counters, outputs.map(Output::read).collect())
}

#[test]
fn noisy_gating_reads_its_logits_once_and_has_no_conflicts() {
    for experts in WIDTHS {
        let kernel = Kernel::Noisy(Noisy { spread: spread(experts), grouped: false });
        for sums in [false, true] {
            let (counters, _) = noisy(experts, TOKENS, 2, 0, sums);
            assert_traffic(kernel, &counters, reads_noisy, 2 * TOKENS * experts);
        }
    }
}

#[test]
fn noisy_gating_gives_the_same_bits_in_any_order_of_warps() {
    for experts in [8, 60, 512, 513, 2000] {
        let (_, want) = noisy(experts, TOKENS, 3, SEEDS[0], true);
        for seed in &SEEDS[1..] {
            assert!(noisy(experts, TOKENS, 3, *seed, true).1 == want, "{experts} experts, seed {seed}");
        }
        // What belongs to a token depends on no grid either.
        assert!(noisy(experts, TOKENS, 5, 1, true).1[..4] == want[..4], "{experts} experts, another grid");
    }
}

/// The second level: `GROUPS` groups, each token in one of them.
fn grouped(experts: usize, blocks: u32, parts: u32, seed: u64) -> (Counters, Vec<Vec<u32>>) {
    const GROUPS: usize = 3;
    let kernel = Kernel::Noisy(Noisy { spread: spread(experts), grouped: true });
    let (clean, raw) = products(TOKENS * GROUPS * experts);
    let group_of = |t: usize| t * t % GROUPS;
    let ids: Vec<i32> = (0..TOKENS).map(|t| group_of(t) as i32).collect();
    let slot_token: Vec<i32> =
        (0..GROUPS).flat_map(|g| (0..TOKENS).filter(move |&t| group_of(t) == g)).map(|t| t as i32).collect();
    let mut offsets = vec![0i32];
    for g in 0..GROUPS {
        offsets.push(offsets[g] + (0..TOKENS).filter(|&t| group_of(t) == g).count() as i32);
    }
    let inputs = [Input::new(&clean), Input::new(&raw)];
    let chosen = [Input::new(&ids), Input::new(&[1f32; TOKENS]), Input::new(&[9f32, 8.0, 7.0])];
    let lists = [Input::new(&slot_token), Input::new(&offsets)];
    let k = 4;
    let all = GROUPS * experts;
    let outputs = [TOKENS * k, TOKENS * k, TOKENS * experts, TOKENS * 2].map(Output::new::<u32>);
    let vectors = [all, all, all, 2].map(Output::new::<u32>);
    let workspace = Scratch::new(32 + 12 * u64::from(parts) * all as u64);
    workspace.write(0, &[0u32; 8]);
    let mut args = vec![Arg::In(&inputs[0]), Arg::In(&inputs[1]), Arg::U32(experts as u32)];
    args.extend(outputs.iter().map(Arg::Out));
    args.extend([TOKENS as u32, experts as u32, k as u32, parts].map(Arg::U32));
    args.push(Arg::F32(0.01));
    args.extend([5, 6, 7, 8].map(Arg::U32));
    args.push(Arg::Null); // noise_state
    args.extend(vectors.iter().map(Arg::Out));
    args.extend([GROUPS as u32, 1].map(Arg::U32));
    args.extend(chosen.iter().chain(&lists).map(Arg::In));
    args.push(Arg::Scratch(&workspace));
    let counters = launch(kernel, [blocks, 1, 1], seed, &args);
    (counters, outputs.iter().chain(&vectors).map(Output::read).collect())
}

#[test]
fn the_second_level_reads_the_rows_of_chosen_groups_once() {
    for experts in WIDTHS {
        let kernel = Kernel::Noisy(Noisy { spread: spread(experts), grouped: true });
        let (counters, _) = grouped(experts, 6, 2, 0);
        assert_traffic(kernel, &counters, reads_noisy, 2 * TOKENS * experts);
    }
}

#[test]
fn the_second_level_gives_the_same_bits_in_any_order_of_warps_and_for_any_grid() {
    for experts in [8, 60, 513] {
        let (_, want) = grouped(experts, 6, 2, SEEDS[0]);
        for (seed, blocks) in [(SEEDS[1], 6), (SEEDS[2], 4), (SEEDS[3], 1)] {
            assert!(grouped(experts, blocks, 2, seed).1 == want, "{experts} experts, seed {seed}, {blocks} blocks");
        }
    }
}

fn sampled(experts: usize, tokens: usize, blocks: u32, seed: u64) -> (Counters, Vec<Vec<u32>>) {
    let (logits, _) = products(tokens * experts);
    let logits = Input::new(&logits);
    let k = 4;
    let outputs = [tokens * k, tokens * k, tokens * k, tokens, tokens * experts].map(Output::new::<u32>);
    let mut args = vec![Arg::In(&logits)];
    args.extend(outputs.iter().map(Arg::Out));
    args.extend([Arg::Null, Arg::Null, Arg::U32(0)]); // mask
    args.extend([tokens as u32, experts as u32, k as u32].map(Arg::U32));
    args.push(Arg::F32(0.75));
    args.extend([5, 6, 7, 8].map(Arg::U32));
    args.push(Arg::Null); // noise_state
    let counters = launch(Kernel::Sampled(spread(experts)), [blocks, 1, 1], seed, &args);
    (counters, outputs.iter().map(Output::read).collect())
}

#[test]
fn sampling_reads_its_logits_once_and_uses_no_shared_memory() {
    for experts in WIDTHS {
        let (counters, _) = sampled(experts, TOKENS, 2, 0);
        let reads = |text: &str| text.contains("ld.global.nc.f32 %s");
        assert_traffic(Kernel::Sampled(spread(experts)), &counters, reads, TOKENS * experts);
    }
}

#[test]
fn sampling_gives_the_same_bits_in_any_order_of_warps_and_for_any_grid() {
    for experts in [8, 60, 513, 4096] {
        let (_, want) = sampled(experts, TOKENS, 3, SEEDS[0]);
        for seed in &SEEDS[1..] {
            assert!(sampled(experts, TOKENS, 1 + *seed as u32 % 7, *seed).1 == want, "{experts} experts, seed {seed}");
        }
    }
}

#[test]
fn jitter_reads_and_writes_whole_sectors() {
    for dtype in Dtype::ALL {
        let elements = 5000;
        let bytes = elements * dtype.bytes() as usize;
        let (x, y) = (Input::new(&vec![1u8; bytes]), Output::new::<u8>(bytes));
        let mut args = vec![Arg::In(&x), Arg::Out(&y), Arg::U32(elements as u32), Arg::U32(0)];
        args.extend([Arg::F32(0.02), Arg::F32(0.99)]);
        args.extend([5, 6, 7, 8].map(Arg::U32));
        args.push(Arg::Null); // noise_state
        let counters = launch(Kernel::Jitter(dtype), [5, 1, 1], 0, &args);
        assert_traffic(Kernel::Jitter(dtype), &counters, |text| text.contains("ld.global"), bytes / 4);
    }
}

/// What the kernels' headers state, with k = 4: instructions of a warp for a token, by the difference of two launches.
#[test]
fn instructions_of_a_token() {
    let (mut got, mut most) = (Vec::new(), Vec::new());
    let warps = |experts| u64::from(spread(experts).team);
    let each = |experts: usize, run: &dyn Fn(usize) -> Counters| {
        let all = |tokens| run(tokens).warp_instructions.iter().sum::<u64>();
        (all(80) - all(40)) / 40 / warps(experts)
    };
    for (experts, most_noisy, most_summed, most_sampled) in [
        (8, 430, 500, 710),
        (64, 570, 680, 860),
        (128, 830, 1040, 1160),
        (256, 1480, 1890, 1900),
        (512, 2660, 3470, 3250),
        (4096, 2590, 3400, 3290),
    ] {
        let noisy_alone = each(experts, &|tokens| noisy(experts, tokens, 1, 0, false).0);
        let noisy_summed = each(experts, &|tokens| noisy(experts, tokens, 1, 0, true).0);
        let drawn = each(experts, &|tokens| sampled(experts, tokens, 1, 0).0);
        println!("E = {experts}: noisy {noisy_alone}, with sums {noisy_summed}, sampled {drawn}");
        got.push((noisy_alone, noisy_summed, drawn));
        most.push((most_noisy, most_summed, most_sampled));
    }
    let stays = got.iter().zip(&most).all(|(got, most)| got.0 <= most.0 && got.1 <= most.1 && got.2 <= most.2);
    assert!(stays, "{got:?} are more than {most:?}");
}
