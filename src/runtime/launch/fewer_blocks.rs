//! Kernels whose blocks meet, where fewer blocks are resident than were planned for: the same results, in the same workspace.

use cudarc::driver::{CudaSlice, DeviceRepr};

use super::*;
use crate::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use crate::capacity::token_slots::{self, TokenSlotsArgs, TokenSlotsDesc};
use crate::experts::Dispatched;
use crate::routers::base::{self, BaseArgs, BaseDesc};
use crate::routers::gating::GatingDesc;
use crate::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use crate::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use crate::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use crate::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use crate::rules::{AuctionRule, Gating, NoiseSource, NoisyRule, Score};
use crate::{Workspace, device};

/// Runs `results` where 1, 2 and 3 blocks are resident: bytes that do not depend on that. `planned` is the grid that was chosen.
fn same_for_fewer_blocks(
    planned: impl Fn(&DeviceInfo) -> Selection,
    results: impl Fn(&Kernels, &Arc<CudaStream>) -> Vec<u32>,
) {
    softcuda::install_if_no_gpu().expect("a real or a software device can be had");
    let context = device::open(0).unwrap();
    let stream = context.default_stream();
    let all = Kernels::new(&context).unwrap();
    let planned = planned(all.device());
    assert!(planned.cooperative && planned.grid[0] > 3, "{planned:?}");
    let expected = results(&all, &stream);
    assert!(expected.iter().any(|&word| word != 0));
    for limit in [1, 2, 3] {
        let fewer = Kernels::new(&context).unwrap().with_resident_limit(limit);
        assert_eq!(results(&fewer, &stream), expected, "{limit} blocks resident");
    }
}

fn random(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as u32).wrapping_mul(2_654_435_761) as f32 / 1e9).collect()
}

fn workspace(stream: &Arc<CudaStream>, bytes: usize) -> Workspace {
    Workspace::new(stream, bytes).unwrap()
}

/// Words of a list of 4-byte elements.
fn words<T: bytemuck::Pod + DeviceRepr + Default>(stream: &Arc<CudaStream>, list: &CudaSlice<T>) -> Vec<u32> {
    bytemuck::cast_slice(&stream.clone_dtoh(list).unwrap()).to_vec()
}

#[test]
fn dispatch_sorts() {
    let desc = DispatchDesc::new(2000, 16, 2, 16);
    let ids: Vec<i32> = random(4000).iter().map(|&x| (x * 1000.0) as i32 % 16).collect();
    same_for_fewer_blocks(
        |device| dispatch::select(&desc, device).unwrap(),
        |kernels, stream| {
            let ids = stream.clone_htod(&ids).unwrap();
            let mut lists = Dispatched::new(stream, &desc.shape()).unwrap();
            let mut workspace = workspace(stream, dispatch::workspace_bytes(&desc, kernels.device()).unwrap());
            dispatch::forward(kernels, stream, &desc, DispatchArgs::new(&ids, &mut lists, &mut workspace)).unwrap();
            [lists.counts(), lists.offsets(), lists.slot_token(), lists.token_slot(), lists.num_tiles()]
                .map(|list| words(stream, list))
                .concat()
        },
    );
}

#[test]
fn gating_sorts_what_it_chose() {
    let gating = Gating::new(Score::Softmax);
    let desc = GatingDispatchDesc::new(gating, DispatchDesc::new(2000, 16, 2, 16));
    same_for_fewer_blocks(
        |device| gating_dispatch::select(&desc, device).unwrap(),
        |kernels, stream| {
            let logits = stream.clone_htod(&random(2000 * 16)).unwrap();
            let (mut ids, mut weights) =
                (stream.alloc_zeros::<i32>(4000).unwrap(), stream.alloc_zeros::<f32>(4000).unwrap());
            let mut lists = Dispatched::new(stream, &desc.dispatch.shape()).unwrap();
            let mut workspace = workspace(stream, gating_dispatch::workspace_bytes(&desc, kernels.device()).unwrap());
            let args = GatingDispatchArgs::new(&logits, &mut ids, &mut weights, &mut lists, &mut workspace);
            gating_dispatch::forward(kernels, stream, &desc, args).unwrap();
            let made = [lists.counts(), lists.offsets(), lists.slot_token(), lists.token_slot(), lists.num_tiles()];
            [made.map(|list| words(stream, list)).concat(), words(stream, &ids), words(stream, &weights)].concat()
        },
    );
}

#[test]
fn measured_gating_measures() {
    let desc = MeasuredGatingDesc::new(GatingDesc::new(500, 24, 2, Gating::new(Score::Softmax)));
    same_for_fewer_blocks(
        |device| measured_gating::select(&desc, device).unwrap(),
        |kernels, stream| {
            let logits = stream.clone_htod(&random(500 * 24)).unwrap();
            let [mut ids, mut counts, mut loss_counts] = [1000, 24, 24].map(|n| stream.alloc_zeros::<i32>(n).unwrap());
            let [mut weights, mut probability, mut importance] =
                [1000, 24, 24].map(|n| stream.alloc_zeros::<f32>(n).unwrap());
            let mut stats = stream.alloc_zeros::<RouterStats>(1).unwrap();
            let mut workspace = workspace(stream, measured_gating::workspace_bytes(&desc, kernels.device()).unwrap());
            let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
            let args = MeasuredGatingArgs::new(&logits, &mut ids, &mut weights, totals, &mut stats, &mut workspace);
            measured_gating::forward(kernels, stream, &desc, args).unwrap();
            let floats = [&weights, &probability, &importance].map(|list| words(stream, list)).concat();
            let whole = [&ids, &counts, &loss_counts].map(|list| words(stream, list)).concat();
            let balance = stream.clone_dtoh(&stats).unwrap()[0].balance_loss.to_bits();
            [whole, floats, vec![balance]].concat()
        },
    );
}

#[test]
fn token_slots_invert() {
    let desc = TokenSlotsDesc::new(300, 4096);
    let slot_token: Vec<i32> = random(4096).iter().map(|&x| (x * 1000.0) as i32 % 310).collect();
    same_for_fewer_blocks(
        |device| token_slots::select(&desc, device).unwrap(),
        |kernels, stream| {
            let slot_token = stream.clone_htod(&slot_token).unwrap();
            let (mut offsets, mut slots) =
                (stream.alloc_zeros::<i32>(301).unwrap(), stream.alloc_zeros::<i32>(4096).unwrap());
            let mut workspace = workspace(stream, token_slots::workspace_bytes(&desc, kernels.device()).unwrap());
            let args = TokenSlotsArgs::new(&slot_token, &mut offsets, &mut slots, &mut workspace);
            token_slots::forward(kernels, stream, &desc, args).unwrap();
            [words(stream, &offsets), words(stream, &slots)].concat()
        },
    );
}

#[test]
fn base_assigns() {
    let desc = BaseDesc::new(512, AuctionRule::new(8, 1e-2, 2000));
    same_for_fewer_blocks(
        |device| base::select(&desc, device).unwrap(),
        |kernels, stream| {
            let scores = stream.clone_htod(&random(512 * 8)).unwrap();
            let (mut ids, mut status) =
                (stream.alloc_zeros::<i32>(512).unwrap(), stream.alloc_zeros::<u32>(2).unwrap());
            let mut workspace = workspace(stream, base::workspace_bytes(&desc).unwrap());
            let args = BaseArgs::new(&scores, &mut ids, &mut status, &mut workspace);
            base::forward(kernels, stream, &desc, args).unwrap();
            [words(stream, &ids), words(stream, &status)].concat()
        },
    );
}

#[test]
fn noisy_sums_up() {
    let desc = NoisyDesc::new(500, 24, NoisyRule::new(2, NoiseSource::new(7, 0)));
    same_for_fewer_blocks(
        |device| noisy::select(&desc, device, true).unwrap(),
        |kernels, stream| {
            let logits = stream.clone_htod(&random(500 * 48)).unwrap();
            let (mut ids, mut weights) =
                (stream.alloc_zeros::<i32>(1000).unwrap(), stream.alloc_zeros::<f32>(1000).unwrap());
            let mut counts = stream.alloc_zeros::<i32>(24).unwrap();
            let [mut importance, mut load, mut losses] = [24, 24, 2].map(|n| stream.alloc_zeros::<f32>(n).unwrap());
            let mut workspace = workspace(stream, noisy::workspace_bytes(&desc, kernels.device()).unwrap());
            let sums = NoisySums::new(&mut counts, &mut importance, &mut load, &mut losses);
            let args =
                NoisyArgs::new(NoisyLogits::together(&logits), &mut ids, &mut weights).sums(sums, &mut workspace);
            noisy::forward(kernels, stream, &desc, args).unwrap();
            let floats = [&weights, &importance, &load, &losses].map(|list| words(stream, list)).concat();
            [words(stream, &ids), words(stream, &counts), floats].concat()
        },
    );
}

/// Sums over tokens are grouped by blocks, so that potentials differ in their last bits: iterations and well-separated ids do not.
#[test]
fn sinkhorn_balances() {
    let desc = SinkhornDesc::new(640, 8, 1, 8, 0.0);
    same_for_fewer_blocks(
        |device| sinkhorn::select(&desc, device).unwrap(),
        |kernels, stream| {
            let logits = stream.clone_htod(&random(640 * 8)).unwrap();
            let (mut ids, mut potentials, mut status) = (
                stream.alloc_zeros::<i32>(640).unwrap(),
                stream.alloc_zeros::<f32>(8).unwrap(),
                stream.alloc_zeros::<u32>(2).unwrap(),
            );
            let mut workspace = workspace(stream, sinkhorn::workspace_bytes(&desc, kernels.device()).unwrap());
            let args = SinkhornArgs::new(&logits, &mut ids, &mut potentials, &mut status, &mut workspace);
            sinkhorn::forward(kernels, stream, &desc, args).unwrap();
            let potentials = stream.clone_dtoh(&potentials).unwrap();
            let rounded = potentials.iter().map(|v| (v * 1e4).round() as i32 as u32).collect();
            [words(stream, &ids), vec![words(stream, &status)[0]], rounded].concat()
        },
    );
}
