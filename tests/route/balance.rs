//! Measured gating on the executor: logits are read once, shared memory without conflicts but where ids decide, and the same bits
//! for any grid and any order of warps.

use moe_kernels::registry::{Gate, Kernel, MeasuredGate};
use moe_kernels::rules::Score;
use softcuda::exec::{Counters, LineCounters};

use crate::device::{Arg, Input, Output, Scratch, launch, optional, text};
use crate::random::{Logits, Random};

const NO_LIMIT: u32 = u32::MAX;
const SIGMOID: u32 = 8;

#[derive(Clone, Copy)]
struct Case {
    score: Score,
    experts: usize,
    top_k: usize,
    tokens: usize,
    sequence: usize,
    bias: bool,
}

impl Case {
    fn kernel(&self) -> Kernel {
        let values = *Gate::VALUES.iter().find(|&&values| 32 * values as usize >= self.experts).unwrap();
        Kernel::MeasuredGating(MeasuredGate { score: Some(self.score), values })
    }

    /// All outputs in words, and the counters.
    fn run(&self, blocks: u32, seed: u64) -> (Vec<u32>, Counters) {
        let Case { score, experts, top_k, tokens, sequence, bias } = *self;
        let logits = Input::new(&Logits::Normal.draw(&mut Random::new(experts as u64), tokens * experts));
        // A sequence in runs of ten tokens, or five sequences a part.
        let cut = sequence > 20;
        let (run, per_sequence) = if cut { (10, sequence.div_ceil(10)) } else { (sequence, 1) };
        let sequences = tokens.div_ceil(sequence);
        let pieces = sequences * per_sequence;
        let each = if cut { 1 } else { 5 };
        let parts = pieces.div_ceil(each);
        let scratch = Scratch::new((32 + 16 * parts + 8 * sequences + 16 * parts * experts) as u64);
        scratch.write(0, &[0u32; 4]);
        let lengths =
            [tokens * top_k, tokens * top_k, tokens, tokens * experts, experts, experts, experts, experts, 12];
        let outputs = lengths.map(Output::new::<u32>);
        let [ids, weights, lse, shares, counts, loss_counts, probability, importance, stats] = &outputs;
        let bias = bias.then(|| Input::new(&vec![0.5f32; experts]));
        let mut args = vec![Arg::In(&logits), optional(&bias), Arg::Out(ids), Arg::Out(weights)];
        let flags = if score == Score::Sigmoid { SIGMOID } else { 0 };
        args.extend([tokens as u32, experts as u32, top_k as u32, 1, 1, flags].map(Arg::U32));
        args.extend([Arg::F32(1.0), Arg::F32(0.0), Arg::Out(lse), Arg::Out(shares)]);
        let numbers = [sequence, run, per_sequence, each, parts, pieces].map(|number| number as u32);
        args.extend(numbers.map(Arg::U32));
        args.extend([Arg::U32(NO_LIMIT), Arg::U32(tokens as u32)]);
        args.extend([counts, loss_counts, probability, importance, stats].map(Arg::Out));
        args.push(Arg::Scratch(&scratch));
        let counters = launch(self.kernel(), [blocks, 1, 1], seed, &args);
        assert_eq!(scratch.read::<u32>(0, 1)[0] << 1, 0, "the barrier is left as it was found");
        (outputs.iter().flat_map(Output::read::<u32>).collect(), counters)
    }
}

/// Lines of the kernel's text with what was counted for each.
fn lines(kernel: Kernel, counters: &Counters) -> impl Iterator<Item = (&'static str, &LineCounters)> {
    text(&kernel.name()).lines().zip(&counters.lines)
}

/// The loads of rows of logits, and no others.
fn is_logits(line: &str) -> bool {
    line.contains("ld.global.nc.f32 %v")
}

#[test]
fn same_bits_for_any_grid_and_order_of_warps() {
    for (score, experts, top_k) in
        [(Score::Softmax, 8, 2), (Score::Sigmoid, 60, 4), (Score::TopkSoftmax, 512, 10), (Score::Softmax, 3000, 3)]
    {
        for sequence in [120, 60, 6] {
            let case = Case { score, experts, top_k, tokens: 120, sequence, bias: false };
            let (want, _) = case.run(1, 0);
            for (blocks, seed) in [(1, 1), (1, 2), (3, 3), (4, 4), (4, 5)] {
                let (got, _) = case.run(blocks, seed);
                assert!(got == want, "E={experts} sequence={sequence} P={blocks} seed={seed}: other bits");
            }
        }
    }
}

#[test]
fn logits_are_read_once_and_banks_are_apart() {
    for score in Score::COMMON {
        for (experts, top_k) in [(8, 2), (64, 8), (128, 8), (256, 8), (512, 10)] {
            let case = Case { score, experts, top_k, tokens: 96, sequence: 96, bias: false };
            let (_, counters) = case.run(3, 7);
            let what = format!("{} E={experts}", case.kernel().name());
            let rows = |of: fn(&LineCounters) -> u64| -> u64 {
                lines(case.kernel(), &counters).filter(|(line, _)| is_logits(line)).map(|(_, line)| of(line)).sum()
            };
            let ideal = (case.tokens * experts * 4 / 32) as u64;
            assert_eq!(rows(|line| line.global.sectors), ideal, "{what}: sectors of logits");
            assert_eq!(rows(|line| line.global.ideal_sectors), ideal, "{what}: ideal sectors of logits");

            // A token's k experts lie on as many banks as their numbers say; everything else is conflict-free.
            let worst = top_k.min(experts.div_ceil(32)) as u64;
            let mut by_data = 0;
            for (text, line) in lines(case.kernel(), &counters).filter(|(_, line)| line.shared.requests > 0) {
                if text.contains("[%m_at]") {
                    by_data += line.shared.requests;
                    assert!(line.shared.wavefronts <= worst * line.shared.requests, "{what}: {text}: {line:?}");
                } else {
                    assert_eq!(line.shared.wavefronts, line.shared.ideal_wavefronts, "{what}: {text}");
                }
            }
            assert_eq!(by_data, 4 * case.tokens as u64, "{what}: two counters, a sum read and written a token");

            // A correction bias fetches the chosen logits again, from L1: k sectors a token at most.
            if score == Score::TopkSoftmax {
                continue;
            }
            let case = Case { bias: true, ..case };
            let (_, counters) = case.run(3, 7);
            let of = |wanted: fn(&str) -> bool| -> u64 {
                lines(case.kernel(), &counters).filter(|(line, _)| wanted(line)).map(|(_, l)| l.global.sectors).sum()
            };
            assert_eq!(of(is_logits), ideal, "{what}: sectors of logits, with a bias");
            let again = of(|line| line.contains("ld.global.nc.f32 %logit"));
            assert!((1..=(case.tokens * top_k) as u64).contains(&again), "{what}: {again} sectors of chosen logits");
        }
    }
}

/// The gating that measures nothing, alone and with dispatch, reads them once too.
#[test]
fn plain_gating_reads_logits_once() {
    for score in Score::COMMON {
        for (experts, top_k, values) in [(8, 2, 1), (64, 8, 2), (128, 8, 4), (256, 8, 8), (512, 10, 16)] {
            let tokens = 64;
            let kernel = Kernel::Gating(Gate { score: Some(score), values, dispatch: false });
            let logits = Input::new(&Logits::Normal.draw(&mut Random::new(5), tokens * experts));
            let (ids, weights) = (Output::new::<i32>(tokens * top_k), Output::new::<f32>(tokens * top_k));
            let mut args = vec![Arg::In(&logits), Arg::Null, Arg::Out(&ids), Arg::Out(&weights)];
            args.extend([tokens as u32, experts as u32, top_k as u32, 1, 1, 0].map(Arg::U32));
            args.extend([1.0, 0.0].map(Arg::F32));
            let counters = launch(kernel, [2, 1, 1], 1, &args);
            let ideal = (tokens * experts * 4 / 32) as u64;
            let rows: u64 =
                lines(kernel, &counters).filter(|(line, _)| is_logits(line)).map(|(_, line)| line.global.sectors).sum();
            assert_eq!(rows, ideal, "{}: sectors of logits", kernel.name());
            // Beyond the rows: ids and weights, k words each, a store a token.
            let stores = 2 * tokens as u64 * (1 + (4 * top_k as u64).div_ceil(32));
            assert!(counters.global.sectors <= ideal + stores, "{}: {:?}", kernel.name(), counters.global);
            assert_eq!(counters.shared.requests, 0, "{}", kernel.name());
        }
    }
}
