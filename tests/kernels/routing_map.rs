//! Checks of `map_to_ids`, `ids_to_map` and `ids_to_map_i64`.

use moe_kernels::capacity::routing_map::{self, FromIdsArgs, RoutingMapDesc, ToIdsArgs};
use moe_kernels::registry::Kernel;
use moe_kernels::{In, Out, reference};

use crate::ids::{Stored, format};
use crate::support::buffer::Guarded;
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

/// Tokens, experts, ids of a token.
const SHAPES: [[usize; 3]; 9] = [
    [1, 1, 1],
    [7, 3, 2],
    [33, 8, 8],
    [130, 60, 4],
    [65, 128, 8],
    [20, 129, 32],
    [9, 256, 64],
    [17, 511, 40],
    [3, 8192, 100],
];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub fn check_to_ids(rng: &mut fastrand::Rng) {
    for shape in SHAPES {
        for options in 0..4 {
            // Rows without an expert, with about as many as there are ids, and with all.
            for fill in [0, 1, 2] {
                to_ids_case(rng, shape, options, fill);
            }
        }
    }
}

/// Bits of `options`: probabilities, a count of what is left out.
fn to_ids_case(rng: &mut fastrand::Rng, [tokens, experts, top_k]: [usize; 3], options: u32, fill: u32) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let name = format!("T={tokens} E={experts} k={top_k} options={options:02b} fill={fill}");
    let (weighted, counted) = (options & 1 != 0, options & 2 != 0);
    let mut map = vec![0u8; tokens * experts];
    for row in map.chunks_mut(experts) {
        let share = match fill {
            0 => 0.0,
            1 => rng.f64() * 2.0 * top_k as f64 / experts as f64,
            _ => 1.0,
        };
        // Any byte but 0 is a choice.
        row.iter_mut().for_each(|cell| *cell = if rng.f64() < share { rng.u8(1..) } else { 0 });
    }
    let probs: Vec<f32> = map.iter().map(|_| normal(rng) as f32).collect();
    let want = reference::routing_map::to_ids(&map, weighted.then_some(&probs[..]), experts, top_k).unwrap();
    let desc = RoutingMapDesc::new(tokens, experts, top_k);
    assert_eq!(routing_map::select_to_ids(&desc, kernels.device()).unwrap().kernel.variant(), Kernel::MapToIds);
    let map = Guarded::input(&stream, "map", &map);
    let probs = Guarded::input(&stream, "probs", &probs);
    let mut ids = Guarded::<i32>::output(&stream, "ids", tokens * top_k);
    let mut weights = Guarded::<f32>::output(&stream, "weights", tokens * top_k);
    let mut over = Guarded::<i32>::output(&stream, "over", 1);
    let mut launch = || {
        let (map, probs) = (map.view(), probs.view());
        let (mut ids, mut weights, mut over) = (ids.view_mut(), weights.view_mut(), over.view_mut());
        let mut args = ToIdsArgs::new(&map, &mut ids);
        args.probs = weighted.then_some(In::from(&probs));
        args.weights = weighted.then_some(Out::from(&mut weights));
        args.over = counted.then_some(Out::from(&mut over));
        routing_map::to_ids(kernels, &stream, &desc, args).unwrap();
    };
    launch();
    time(&stream, &name, &mut launch);
    assert_eq!(ids.read(&stream), want.ids, "{name}: ids");
    if weighted {
        assert_eq!(bits(&weights.read(&stream)), bits(&want.weights), "{name}: weights");
    } else {
        weights.assert_unchanged(&stream);
    }
    if counted {
        assert_eq!(over.read(&stream), [want.over as i32], "{name}: over");
    } else {
        over.assert_unchanged(&stream);
    }
    map.assert_unchanged(&stream);
}

pub fn check_from_ids(ids_bytes: u32, rng: &mut fastrand::Rng) {
    for shape in SHAPES {
        for weighted in [false, true] {
            for repeats in [false, true] {
                from_ids_case(rng, shape, ids_bytes, weighted, repeats);
            }
        }
    }
}

fn from_ids_case(
    rng: &mut fastrand::Rng,
    [tokens, experts, top_k]: [usize; 3],
    ids_bytes: u32,
    weighted: bool,
    repeats: bool,
) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let name = format!("T={tokens} E={experts} k={top_k} weighted={weighted} repeats={repeats}");
    // Repeats: ids among a few experts, so that sums have several terms.
    let among = if repeats { experts.min(3) } else { experts };
    let id = |rng: &mut fastrand::Rng| if rng.u32(..5) == 0 { -1 } else { rng.usize(..among) as i32 };
    let ids: Vec<i32> = (0..tokens * top_k).map(|_| id(rng)).collect();
    let weights: Vec<f32> = ids.iter().map(|_| normal(rng) as f32).collect();
    let (want_map, want_probs) =
        reference::routing_map::from_ids(&ids, weighted.then_some(&weights[..]), top_k, experts).unwrap();
    let desc = RoutingMapDesc::new(tokens, experts, top_k).ids(format(rng, ids_bytes));
    let kernel = Kernel::IdsToMap { ids_bytes };
    assert_eq!(routing_map::select_from_ids(&desc, kernels.device()).unwrap().kernel.variant(), kernel);
    let ids = Stored::new(&stream, rng, desc.ids, &ids, experts);
    let weights = Guarded::input(&stream, "weights", &weights);
    let mut map = Guarded::<u8>::output(&stream, "map", tokens * experts);
    let mut probs = Guarded::<f32>::output(&stream, "probs", tokens * experts);
    let mut launch = || {
        let weights = weights.view();
        let (mut map, mut probs) = (map.view_mut(), probs.view_mut());
        ids.with(|ids| {
            let mut args = FromIdsArgs::new(ids, &mut map);
            args.weights = weighted.then_some(In::from(&weights));
            args.probs = weighted.then_some(Out::from(&mut probs));
            routing_map::from_ids(kernels, &stream, &desc, args).unwrap();
        });
    };
    launch();
    time(&stream, &name, &mut launch);
    assert_eq!(map.read(&stream), want_map, "{name}: map");
    if weighted {
        assert_eq!(bits(&probs.read(&stream)), bits(&want_probs), "{name}: probs");
    } else {
        probs.assert_unchanged(&stream);
    }
    ids.assert_unchanged(&stream);
    weights.assert_unchanged(&stream);
}
