//! Checks of `sequence_counts`: whole numbers.

use moe_kernels::reference::balance::{counted, sequence_counts as reference};
use moe_kernels::routers::sequence_counts::{self, SequenceCountsArgs, SequenceCountsDesc};
use moe_kernels::rules::{BalanceRule, Garbage, LossScore, Sequences};

use crate::support::buffer::Guarded;
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;
use crate::tokens::{LogitsOn, Padding};

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, top_k, each) in
        [(1, 1, 1, 1), (37, 8, 2, 10), (60, 33, 40, 20), (200, 5, 1, 200), (30, 300, 3, 7), (12, 4096, 2, 500)]
    {
        for sequences in [Sequences::Following, Sequences::Alternating] {
            let each = if sequences == Sequences::Alternating && tokens % each != 0 { 1 } else { each };
            case(rng, SequenceCountsDesc::new(tokens, experts, top_k, each).sequences(sequences));
        }
    }
}

fn case(rng: &mut fastrand::Rng, desc: SequenceCountsDesc) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let SequenceCountsDesc { tokens, experts, top_k, tokens_per_sequence, sequences, .. } = desc;
    let mut logits: Vec<f32> = (0..tokens * experts).map(|_| normal(rng) as f32).collect();
    for t in 0..tokens {
        let row = &mut logits[t * experts..][..experts];
        match rng.u32(..8) {
            0 => row[rng.usize(..experts)] = f32::NAN,
            1 => row[rng.usize(..experts)] = f32::INFINITY,
            2 => row.fill(f32::NEG_INFINITY),
            3 => row[0] = f32::NEG_INFINITY,
            _ => {}
        }
    }
    let on_device = LogitsOn::draw(&stream, rng, &mut logits);
    let padding = Padding::draw(&stream, rng, tokens);
    let last = experts as i32;
    let ids: Vec<i32> = (0..tokens * top_k)
        .map(|_| if rng.u32(..6) == 0 { [-1, last, i32::MIN][rng.usize(..3)] } else { rng.i32(0..last) })
        .collect();
    let name = format!("{desc:?} {} {}", on_device.name(), padding.name());
    let rule = BalanceRule::new(LossScore::Softmax, 1);
    let counts = counted(&logits, experts, &rule, Garbage::Zero, Some(&padding.valid));
    let (slots, lengths) = reference(&ids, &counts, experts, top_k, tokens_per_sequence, sequences).unwrap();
    let ids_on = Guarded::input(&stream, "ids", &ids);
    for with_lengths in [true, false] {
        let launch = || {
            let mut to = Guarded::<i32>::output(&stream, "counts", slots.len());
            let mut lengths_to = Guarded::<u32>::output(&stream, "lengths", lengths.len());
            {
                let (ids, mut to, mut lengths_to) = (ids_on.view(), to.view_mut(), lengths_to.view_mut());
                on_device.with(|logits| {
                    padding.with(|mask| {
                        let args = SequenceCountsArgs::new(logits, &ids, &mut to).mask(mask);
                        let args = if with_lengths { args.lengths(&mut lengths_to) } else { args };
                        sequence_counts::forward(kernels, &stream, &desc, args).unwrap();
                    });
                });
            }
            if !with_lengths {
                lengths_to.assert_unchanged(&stream);
            }
            (to.read(&stream), lengths_to.read(&stream))
        };
        let (got, got_lengths) = launch();
        assert_eq!(got, slots, "{name}");
        if with_lengths {
            assert!(got_lengths.iter().zip(&lengths).all(|(&got, &want)| got as usize == want), "{name}: lengths");
        }
        time(&stream, &name, || drop(launch()));
    }
    on_device.assert_unchanged(&stream);
    padding.assert_unchanged(&stream);
}
