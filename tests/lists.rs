//! A dispatch's lists: from ids of every integer type, from experts that choose, and from elsewhere, with every fault named.

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use std::sync::Arc;

use cudarc::driver::CudaStream;
use half::bf16;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::capacity::lists;
use moe_kernels::experts::gemm::ProductOut;
use moe_kernels::experts::k_grouped::{self, KGroupedArgs, KGroupedDesc};
use moe_kernels::experts::{Dispatched, Lists, SlotShape};
use moe_kernels::reference;
use moe_kernels::reference::dispatch::DispatchRule;
use moe_kernels::routers::expert_choice::{self, ExpertChoiceDesc};
use moe_kernels::rules::IdFormat;
use moe_kernels::{Dtype, Error, Workspace};

/// The lists of a filled dispatch, on the host.
struct Host {
    counts: Vec<i32>,
    offsets: Vec<i32>,
    slot_token: Vec<i32>,
    token_slot: Vec<i32>,
    token_offsets: Vec<i32>,
    slot_weight: Vec<f32>,
    tiles: Vec<[i32; 4]>,
    num_tiles: i32,
}

impl Host {
    fn of(stream: &Arc<CudaStream>, dispatched: &Dispatched) -> Host {
        let list = |list| stream.clone_dtoh(list).unwrap();
        Host {
            counts: list(dispatched.counts()),
            offsets: list(dispatched.offsets()),
            slot_token: list(dispatched.slot_token()),
            token_slot: list(dispatched.token_slot()),
            token_offsets: list(dispatched.token_offsets()),
            slot_weight: stream.clone_dtoh(dispatched.slot_weight()).unwrap(),
            tiles: stream.clone_dtoh(dispatched.tiles()).unwrap(),
            num_tiles: stream.clone_dtoh(dispatched.num_tiles()).unwrap()[0],
        }
    }

    fn upload(&self, stream: &Arc<CudaStream>) -> Lists {
        let list = |values: &[i32]| stream.clone_htod(values).unwrap();
        Lists {
            counts: list(&self.counts),
            offsets: list(&self.offsets),
            slot_token: list(&self.slot_token),
            token_slot: list(&self.token_slot),
            token_offsets: list(&self.token_offsets),
            slot_weight: stream.clone_htod(&self.slot_weight).unwrap(),
            tiles: stream.clone_htod(&self.tiles).unwrap(),
            num_tiles: list(&[self.num_tiles]),
        }
    }
}

fn dispatched(stream: &Arc<CudaStream>, desc: &DispatchDesc, ids: &[i32]) -> Dispatched {
    let kernels = device::kernels();
    let mut dispatched = Dispatched::new(stream, &desc.shape()).unwrap();
    let mut workspace = Workspace::new(stream, dispatch::workspace_bytes(desc, kernels.device()).unwrap()).unwrap();
    let ids = stream.clone_htod(ids).unwrap();
    let args = DispatchArgs::new(&ids, &mut dispatched, &mut workspace);
    dispatch::forward(kernels, stream, desc, args).unwrap();
    dispatched
}

#[test]
fn ids_of_every_integer_give_the_same_rows() {
    let stream = device::stream();
    let kernels = device::kernels();
    let mut rng = fastrand::Rng::with_seed(3);
    for (tokens, experts, top_k) in [(1, 1, 1), (70, 9, 3), (900, 1200, 2)] {
        let ids: Vec<i32> = (0..tokens * top_k).map(|_| rng.i32(-1..experts as i32)).collect();
        let desc = DispatchDesc::new(tokens, experts, top_k, 16);
        let want = Host::of(&stream, &dispatched(&stream, &desc, &ids));
        let rule = DispatchRule { experts, top_k, capacity: None, tile_m: 16 };
        let reference = reference::dispatch::dispatch(&ids, &rule).unwrap();
        assert_eq!(want.token_slot, reference.token_slot);

        let mut workspace =
            Workspace::new(&stream, dispatch::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
        // What is no expert has high bits alone, low bits alone, or is negative.
        let odd = [i64::MIN, -1, 1 << 32, (1 << 32) + 1, i64::MAX, experts as i64];
        let wide: Vec<i64> =
            ids.iter().map(|&id| if id < 0 { odd[rng.usize(0..odd.len())] } else { id.into() }).collect();
        let wide = stream.clone_htod(&wide).unwrap();
        let unsigned: Vec<u32> =
            ids.iter().map(|&id| if id < 0 { rng.u32(experts as u32..) } else { id as u32 }).collect();
        let unsigned = stream.clone_htod(&unsigned).unwrap();
        for format in [IdFormat::I64, IdFormat::U32] {
            let desc = desc.ids(format);
            let mut got = Dispatched::new(&stream, &desc.shape()).unwrap();
            let args = match format {
                IdFormat::I64 => DispatchArgs::new(&wide, &mut got, &mut workspace),
                _ => DispatchArgs::new(&unsigned, &mut got, &mut workspace),
            };
            dispatch::forward(kernels, &stream, &desc, args).unwrap();
            let got = Host::of(&stream, &got);
            assert_eq!(
                (got.counts, got.offsets, got.num_tiles),
                (want.counts.clone(), want.offsets.clone(), want.num_tiles)
            );
            assert_eq!(got.token_slot, want.token_slot, "{format:?}");
        }
        let mut other = Dispatched::new(&stream, &desc.shape()).unwrap();
        let refused = dispatch::forward(kernels, &stream, &desc, DispatchArgs::new(&wide, &mut other, &mut workspace));
        assert_eq!(refused.unwrap_err().argument(), Some("ids"), "the descriptor says i32");
    }
}

#[test]
fn experts_that_choose_fill_a_dispatch() {
    let (stream, kernels) = (device::stream(), device::kernels());
    let mut rng = fastrand::Rng::with_seed(5);
    for (tokens, experts, capacity, tile_m) in [(1, 1, 1, 16), (50, 6, 17, 16), (300, 40, 9, 64), (129, 3, 129, 128)] {
        let affinities: Vec<f32> = (0..experts * tokens).map(|_| rng.f32()).collect();
        let want = reference::expert_choice::choose(&affinities, experts, capacity).unwrap();
        let desc = ExpertChoiceDesc::new(tokens, experts, capacity);
        let shape = expert_choice::rows(&desc, tile_m);
        let mut dispatched = Dispatched::new(&stream, &shape).unwrap();
        let bytes = expert_choice::workspace_bytes(&desc, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let on_device = stream.clone_htod(&affinities).unwrap();
        let affinities = (&on_device).into();
        expert_choice::dispatch(kernels, &stream, &desc, tile_m, affinities, &mut dispatched, &mut workspace).unwrap();

        let got = Host::of(&stream, &dispatched);
        assert_eq!(got.slot_token, want.slot_token);
        assert_eq!(got.slot_weight, want.slot_weight);
        assert!(got.counts.iter().all(|&count| count == capacity as i32));
        let offsets: Vec<i32> = (0..=experts).map(|e| (e * capacity) as i32).collect();
        assert_eq!(got.offsets, offsets);
        let each = capacity.div_ceil(tile_m);
        assert_eq!(got.num_tiles as usize, experts * each);
        for (i, tile) in got.tiles.iter().enumerate() {
            let (e, part) = (i / each, i % each);
            let first = e * capacity + part * tile_m;
            let end = (first + tile_m).min((e + 1) * capacity);
            assert_eq!(*tile, [e as i32, first as i32, end as i32, 0]);
        }
        for t in 0..tokens {
            let slots = &got.token_slot[got.token_offsets[t] as usize..got.token_offsets[t + 1] as usize];
            let own: Vec<i32> =
                (0..want.slot_token.len() as i32).filter(|&s| want.slot_token[s as usize] == t as i32).collect();
            assert_eq!(slots, own, "token {t}");
        }
        // What a dispatch leaves passes the look at lists from elsewhere.
        let lists = got.upload(&stream);
        lists::checked(kernels, &stream, &shape, lists).unwrap();
    }
}

#[test]
fn the_first_wrong_entry_is_named() {
    let (stream, kernels) = (device::stream(), device::kernels());
    let (tokens, experts, top_k) = (200, 7, 2);
    let mut rng = fastrand::Rng::with_seed(8);
    let ids: Vec<i32> = (0..tokens * top_k).map(|_| rng.i32(-1..experts as i32)).collect();
    let desc = DispatchDesc::new(tokens, experts, top_k, 16);
    let shape = desc.shape();
    let filled = dispatched(&stream, &desc, &ids);
    let right = || Host::of(&stream, &filled);
    let check =
        |host: &Host, shape: &SlotShape| lists::checked(kernels, &stream, shape, host.upload(&stream)).map(drop);
    assert_eq!(check(&right(), &shape), Ok(()));

    let wrong = |change: &dyn Fn(&mut Host), argument: &str, index: usize| {
        let mut host = right();
        change(&mut host);
        let error = check(&host, &shape).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert_eq!(error.argument(), Some(argument), "{error}");
        assert!(error.to_string().contains(&format!("at {index}")), "{error}");
    };
    wrong(&|host| host.num_tiles = -1, "num_tiles", 0);
    wrong(&|host| host.num_tiles = host.tiles.len() as i32 + 1, "num_tiles", 0);
    // The inputs that were found: rows past the end, an expert that is none, too many rows, none, overlapping ones.
    wrong(&|host| host.tiles[3][2] = shape.slots as i32 + 1, "tiles", 3);
    wrong(&|host| host.tiles[2][0] = experts as i32, "tiles", 2);
    wrong(&|host| host.tiles[2][0] = -1, "tiles", 2);
    wrong(&|host| host.tiles[0][2] = host.tiles[0][1] + 17, "tiles", 0);
    wrong(&|host| host.tiles[1][2] = host.tiles[1][1], "tiles", 1);
    wrong(&|host| host.tiles[1][1] = -4, "tiles", 1);
    wrong(&|host| host.tiles[2][1] -= 1, "tiles", 2);
    wrong(&|host| host.slot_token[5] = 1 << 20, "slot_token", 5);
    wrong(&|host| host.slot_token[7] = -1, "slot_token", 7);
    wrong(&|host| host.token_slot[17] = 1_000_000, "token_slot", 17);
    wrong(&|host| (host.token_slot[399], host.token_slot[30]) = (400, 400), "token_slot", 30);
    // Negative means none, and what no tile covers means nothing.
    let mut host = right();
    host.token_slot[3] = -77;
    let rows = host.offsets[experts] as usize;
    host.slot_token[rows..].fill(i32::MAX);
    assert_eq!(check(&host, &shape), Ok(()));

    // Ragged tokens.
    let ragged = SlotShape::new(tokens, experts, None, shape.slots, 16, shape.max_tiles);
    let mut host = right();
    host.token_offsets = (0..=tokens as i32).map(|t| (t * 2).min(shape.slots as i32)).collect();
    host.token_slot = (0..shape.slots as i32).collect();
    assert_eq!(check(&host, &ragged), Ok(()));
    for (index, value) in [(0, 1), (3, 2), (200, 401)] {
        let was = std::mem::replace(&mut host.token_offsets[index], value);
        let error = check(&host, &ragged).unwrap_err();
        assert_eq!(error.argument(), Some("token_offsets"), "{error}");
        host.token_offsets[index] = was;
    }
    host.token_slot[9] = -1;
    assert_eq!(check(&host, &ragged).unwrap_err().argument(), Some("token_slot"), "a ragged token has no holes");
}

/// Groups along K go by counts and offsets, which are looked at too, and missed only there.
#[test]
fn ranges_that_are_not_the_tiles_are_refused() {
    let (stream, kernels) = (device::stream(), device::kernels());
    let desc = DispatchDesc::new(40, 3, 2, 16);
    let ids: Vec<i32> = (0..80).map(|choice| choice % 4 - 1).collect();
    let filled = dispatched(&stream, &desc, &ids);
    let values = stream.clone_htod(&[bf16::ONE; 80 * 8]).unwrap();
    let mut out = stream.alloc_zeros::<bf16>(3 * 8 * 8).unwrap();
    let mut run = |change: &dyn Fn(&mut Host)| {
        let mut host = Host::of(&stream, &filled);
        change(&mut host);
        let lists = lists::checked(kernels, &stream, &desc.shape(), host.upload(&stream)).unwrap();
        let product = KGroupedDesc::new(Dtype::Bf16, desc.shape(), 8, 8);
        let args = KGroupedArgs::new(&values, &values, &lists, ProductOut::Rounded((&mut out).into()));
        k_grouped::forward(kernels, &stream, &product, args).map_err(|error| error.argument().unwrap())
    };
    assert_eq!(run(&|_| ()), Ok(()));
    assert_eq!(run(&|host| host.counts[1] += 1), Err("dispatched"));
    assert_eq!(run(&|host| host.offsets[2] -= 1), Err("dispatched"));
    assert_eq!(run(&|host| host.counts.fill(i32::MAX)), Err("dispatched"));
    assert_eq!(run(&|host| host.offsets[3] = -1), Ok(()), "the last is nobody's first");
    assert!(stream.clone_dtoh(&out).unwrap().iter().all(|&sum| sum == bf16::from_f32(20.0)));
}

#[test]
fn short_lists_are_refused() {
    let stream = device::stream();
    let desc = DispatchDesc::new(20, 3, 2, 16);
    let filled = dispatched(&stream, &desc, &[1; 40]);
    let mut host = Host::of(&stream, &filled);
    host.slot_token.truncate(39);
    let error = lists::checked(device::kernels(), &stream, &desc.shape(), host.upload(&stream)).unwrap_err();
    assert!(matches!(error, Error::BufferTooShort { argument: "slot_token", needed: 40, got: 39, .. }), "{error}");
}
