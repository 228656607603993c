//! Admission and expert maps over random shapes, ids of any kind and tied or odd weights: the reference's result bit for bit.

use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::rules::{AdmissionRule, IDENTITY, NoiseSource, Order, SecondExpert};

use super::*;
use crate::support::compare::to_f64;

/// Ids of which some are no expert and most are few, and weights of few values, NaN among them.
fn choices(rng: &mut fastrand::Rng, len: usize, experts: usize, skew: usize) -> (Vec<i32>, Vec<f32>) {
    let id = |rng: &mut fastrand::Rng| match rng.u32(..12) {
        0 => [-1, i32::MIN, i32::MAX, experts as i32][rng.usize(..4)],
        _ => rng.usize(..skew.min(experts)) as i32,
    };
    let weight = |rng: &mut fastrand::Rng| [0.0, -0.0, 0.25, 0.5, 1.0, f32::NAN, f32::INFINITY][rng.usize(..7)];
    ((0..len).map(|_| id(rng)).collect(), (0..len).map(|_| weight(rng)).collect())
}

proptest! {
    #![proptest_config(config(128))]

    /// Every order, with overflow dropped or passed on: no expert takes more of a group than its capacity.
    #[test]
    fn admission_of_any_choices(
        (experts, candidates) in experts_and_k(),
        tokens in 0usize..200,
        k in 1usize..=32,
        (capacity, tokens_per_group) in (1usize..=20, 1usize..=210),
        (by_choice, prioritised, random) in any::<(bool, bool, bool)>(),
        skew in 1usize..=100,
        seed in any::<u64>(),
    ) {
        let top_k = k.min(candidates);
        let noise = NoiseSource { seed, offset: 1 };
        let second =
            if random && top_k == 2 { SecondExpert::Random { threshold: 0.5, noise } } else { SecondExpert::Always };
        let rule = AdmissionRule::new(experts, top_k, capacity, tokens_per_group)
            .candidates(candidates)
            .order(if by_choice { Order::ByChoice } else { Order::ByToken })
            .prioritised(prioritised)
            .second(second);
        let desc = AdmissionDesc::new(tokens, rule);
        let (ids, weights) = choices(&mut fastrand::Rng::with_seed(seed), tokens * candidates, experts, skew);
        let want = reference::admission::admit(&ids, &weights, None, &rule).unwrap();
        let (kernels, stream) = (device::kernels(), device::stream());
        let places = tokens * top_k;
        let mut admitted = stream.clone_htod(&vec![-7i32; places.max(1)]).unwrap();
        let mut admitted_weights = stream.clone_htod(&vec![f32::NAN; places.max(1)]).unwrap();
        let mut pad = (ids, weights);
        pad.0.push(0);
        pad.1.push(0.0);
        let (ids, weights) = (stream.clone_htod(&pad.0).unwrap(), stream.clone_htod(&pad.1).unwrap());
        let mut workspace = Workspace::new(&stream, admission::workspace_bytes(&desc).unwrap()).unwrap();
        let args = AdmissionArgs::new(&ids, &weights, &mut admitted, &mut admitted_weights, &mut workspace);
        admission::forward(kernels, &stream, &desc, args).unwrap();
        let got = &stream.clone_dtoh(&admitted).unwrap()[..places];
        prop_assert_eq!(got, &want.ids[..]);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&stream.clone_dtoh(&admitted_weights).unwrap()[..places]), bits(&want.weights));
        for group in got.chunks(tokens_per_group * top_k) {
            let mut taken = vec![0; experts];
            group.iter().filter(|&&id| id >= 0).for_each(|&id| taken[id as usize] += 1);
            prop_assert!(taken.iter().all(|&taken| taken <= capacity));
        }
    }

    #[test]
    fn maps_of_any_ids(
        (experts, top_k) in experts_and_k(),
        tokens in 1usize..200,
        max_replicas in 1usize..=4,
        with_replicas in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (ids, _) = choices(&mut rng, tokens * top_k, experts, experts);
        let map: Vec<i32> = (0..experts * max_replicas).map(|_| rng.i32(IDENTITY..300)).collect();
        let replicas: Vec<i32> = (0..experts).map(|_| rng.i32(1..=max_replicas as i32)).collect();
        let desc = ExpertMapDesc::new(tokens, experts, top_k).max_replicas(max_replicas).seed(seed as u32);
        let given = with_replicas.then_some(replicas.as_slice());
        let want = reference::expert_map::map_experts(&ids, None, top_k, &map, max_replicas, given, desc.seed).unwrap();
        let (kernels, stream) = (device::kernels(), device::stream());
        let mut local_ids = stream.clone_htod(&vec![-7i32; tokens * top_k]).unwrap();
        let mut sums = stream.clone_htod(&vec![f32::NAN; tokens]).unwrap();
        let device_replicas = stream.clone_htod(&replicas).unwrap();
        let (ids, map) = (stream.clone_htod(&ids).unwrap(), stream.clone_htod(&map).unwrap());
        let mut args = ExpertMapArgs::new(&ids, &map, &mut local_ids).identity_weight(&mut sums);
        args.replicas = with_replicas.then(|| (&device_replicas).into());
        expert_map::forward(kernels, &stream, &desc, args).unwrap();
        prop_assert_eq!(stream.clone_dtoh(&local_ids).unwrap(), want.ids);
        // Sums of ones are exact.
        prop_assert_eq!(to_f64(&stream.clone_dtoh(&sums).unwrap()), want.identity_weight);
    }
}
