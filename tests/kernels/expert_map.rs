//! Checks of `expert_map` and `expert_map_i64`: expert parallelism, replicas, null experts.

use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::registry::Kernel;
use moe_kernels::rules::{IDENTITY, NONE};
use moe_kernels::{Out, reference};

use crate::ids::{Stored, format};
use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, to_f64};
use crate::support::device;
use crate::timing::time;

pub fn check(ids_bytes: u32, rng: &mut fastrand::Rng) {
    for experts in [1, 8, 60, 512, 4096] {
        for (tokens, top_k) in [(1, 1), (37, 2), (100, 8), (13, 3), (9, 32), (2000, 10)] {
            for max_replicas in [1, 3] {
                for options in 0..4 {
                    let desc = ExpertMapDesc::new(tokens, experts, top_k)
                        .ids(format(rng, ids_bytes))
                        .max_replicas(max_replicas)
                        .seed(rng.u32(..));
                    case(rng, &desc, options);
                }
            }
        }
    }
    if ids_bytes == 4 {
        replicas_take_turns();
    }
}

/// Bits of `options`: replicas, weights and their sums.
fn case(rng: &mut fastrand::Rng, desc: &ExpertMapDesc, options: u32) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let ExpertMapDesc { tokens, experts, top_k, max_replicas, seed, .. } = *desc;
    let name = format!("{desc:?} options={options:02b}");
    assert_eq!(
        expert_map::select(desc, kernels.device()).unwrap().kernel.variant(),
        Kernel::ExpertMap { ids_bytes: desc.ids.bytes() }
    );
    let ids: Vec<i32> = (0..tokens * top_k)
        .map(|_| match rng.u32(..12) {
            0 => -1,
            _ => rng.usize(..experts) as i32,
        })
        .collect();
    let map: Vec<i32> = (0..experts * max_replicas)
        .map(|_| match rng.u32(..4) {
            0 => NONE,
            1 => IDENTITY,
            _ => rng.i32(0..5000),
        })
        .collect();
    let replicas: Vec<i32> = (0..experts).map(|_| rng.i32(1..=max_replicas as i32)).collect();
    let weights: Vec<f32> = (0..tokens * top_k).map(|_| rng.f32()).collect();
    let (with_replicas, weighted) = (options & 1 != 0, options & 2 != 0);
    let want = reference::expert_map::map_experts(
        &ids,
        weighted.then(|| to_f64(&weights)).as_deref(),
        top_k,
        &map,
        max_replicas,
        with_replicas.then_some(replicas.as_slice()),
        seed,
    )
    .unwrap();

    let device_ids = Stored::new(&stream, rng, desc.ids, &ids, experts);
    let device_map = Guarded::input(&stream, "map", &map);
    let device_replicas = Guarded::input(&stream, "replicas", &replicas);
    let device_weights = Guarded::input(&stream, "weights", &weights);
    let mut local_ids = Guarded::<i32>::output(&stream, "local_ids", ids.len());
    let mut sums = Guarded::<f32>::output(&stream, "identity_weight", tokens);
    let mut launch = || {
        let (map, replicas, weights) = (device_map.view(), device_replicas.view(), device_weights.view());
        let (mut local_ids, mut sums) = (local_ids.view_mut(), sums.view_mut());
        device_ids.with(|ids| {
            let mut args = ExpertMapArgs::new(ids, &map, &mut local_ids);
            args.weights = weighted.then_some((&weights).into());
            args.replicas = with_replicas.then_some((&replicas).into());
            args.identity_weight = (options != 1).then(|| Out::from(&mut sums));
            expert_map::forward(kernels, &stream, desc, args).unwrap();
        });
    };
    launch();
    time(&stream, &name, &mut launch);
    assert_eq!(local_ids.read(&stream), want.ids, "{name}");
    device_ids.assert_unchanged(&stream);
    if options == 1 {
        return sums.assert_unchanged(&stream);
    }
    // Sums of up to 32 numbers below 1, rounded at each addition.
    for (t, (got, want)) in sums.read(&stream).into_iter().zip(want.identity_weight).enumerate() {
        assert!(
            (f64::from(got) - want).abs() <= Arithmetic::Fma.sum_bound(top_k, want, want, want),
            "{name}: token {t}: {got} is not {want}"
        );
    }
}

/// Of 30000 slots of an expert with three copies each gets a third, within 5 standard deviations (false alarm below 1 in 500 000).
fn replicas_take_turns() {
    let (kernels, stream) = (device::kernels(), device::stream());
    let desc = ExpertMapDesc::new(30_000, 1, 1).max_replicas(3).seed(9);
    let ids = Guarded::input(&stream, "ids", &vec![0i32; desc.tokens]);
    let map = Guarded::input(&stream, "map", &[7i32, 8, 9]);
    let replicas = Guarded::input(&stream, "replicas", &[3i32]);
    let mut local_ids = Guarded::<i32>::output(&stream, "local_ids", desc.tokens);
    let (ids, map, replicas, mut to) = (ids.view(), map.view(), replicas.view(), local_ids.view_mut());
    let args = ExpertMapArgs::new(&ids, &map, &mut to).replicas(&replicas);
    expert_map::forward(kernels, &stream, &desc, args).unwrap();
    let got = local_ids.read(&stream);
    let deviation = (30_000.0f64 / 3.0 * 2.0 / 3.0).sqrt();
    for copy in 7..10 {
        let count = got.iter().filter(|&&id| id == copy).count() as f64;
        assert!((count - 10_000.0).abs() <= 5.0 * deviation, "copy {copy}: {count}");
    }
}
