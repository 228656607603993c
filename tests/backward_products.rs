//! The five products of the experts' way back, as one chain: what they move, and what a frozen expert costs.

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, KernelSet, ProductOut, Rows};
use moe_kernels::experts::gemm_backward::{self, GemmBackwardArgs, GemmBackwardDesc};
use moe_kernels::experts::k_grouped::{self, ColumnSums, Gathered, KGroupedArgs, KGroupedDesc};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::rules::{Activation, Layout, WeightDesc};
use moe_kernels::{Dtype, Workspace};
use softcuda::profile::Profile;

/// A batch of bf16 rows and the buffers of its way back.
struct Chain {
    stream: Arc<CudaStream>,
    tokens: usize,
    top_k: usize,
    experts: usize,
    hidden: usize,
    width: usize,
    dispatched: Dispatched,
    x: CudaSlice<bf16>,
    d_out: CudaSlice<bf16>,
    z: CudaSlice<bf16>,
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
    d_z: CudaSlice<bf16>,
    weighted: CudaSlice<bf16>,
    d_weight: CudaSlice<f32>,
    d_gate_up: CudaSlice<bf16>,
    d_down: CudaSlice<bf16>,
    d_rows: CudaSlice<bf16>,
    dx: CudaSlice<bf16>,
    workspace: Workspace,
    /// Of the products that go by rows.
    kernels: KernelSet,
}

impl Chain {
    /// Every token at `top_k` different experts, drawn.
    fn new([tokens, top_k, experts, hidden, width]: [usize; 5], set: KernelSet) -> Chain {
        let (kernels, stream) = (device::kernels(), device::stream());
        let mut rng = fastrand::Rng::with_seed(7);
        let ids: Vec<i32> = (0..tokens).flat_map(|_| rng.choose_multiple(0..experts as i32, top_k)).collect();
        let order = DispatchDesc::new(tokens, experts, top_k, 128);
        let shape = order.shape();
        let slots = shape.slots;
        let mut dispatched = Dispatched::new(&stream, &shape).unwrap();
        let bytes = dispatch::workspace_bytes(&order, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let ids = stream.clone_htod(&ids).unwrap();
        let weights = stream.clone_htod(&vec![0.25f32; tokens * top_k]).unwrap();
        let args = DispatchArgs::new(&ids, &mut dispatched, &mut workspace).weights(&weights);
        dispatch::forward(kernels, &stream, &order, args).unwrap();
        let back =
            GemmBackwardDesc::new(Dtype::Bf16, Rows::Grouped(shape), width, hidden, Activation::Silu).kernels(set);
        let bytes = gemm_backward::workspace_bytes(&back, kernels.device()).unwrap();
        let mut values = |len: usize| {
            let values: Vec<bf16> = (0..len).map(|_| bf16::from_f32(rng.f32() - 0.5)).collect();
            stream.clone_htod(&values).unwrap()
        };
        let zeros = |len: usize| stream.alloc_zeros::<bf16>(len).unwrap();
        Chain {
            tokens,
            top_k,
            experts,
            hidden,
            width,
            dispatched,
            x: values(tokens * hidden),
            d_out: values(tokens * hidden),
            z: values(slots * 2 * width),
            gate_up: values(experts * 2 * width * hidden),
            down: values(experts * hidden * width),
            d_z: zeros(slots * 2 * width),
            weighted: zeros(slots * width),
            d_weight: stream.alloc_zeros(slots).unwrap(),
            d_gate_up: zeros(experts * 2 * width * hidden),
            d_down: zeros(experts * hidden * width),
            d_rows: zeros(slots * hidden),
            dx: zeros(tokens * hidden),
            workspace: Workspace::new(&stream, bytes).unwrap(),
            stream,
            kernels: set,
        }
    }

    fn back(&mut self) {
        let shape = *self.dispatched.shape();
        let desc = GemmBackwardDesc::new(Dtype::Bf16, Rows::Grouped(shape), self.width, self.hidden, Activation::Silu)
            .gather(true)
            .kernels(self.kernels);
        let args = GemmBackwardArgs::new(&self.d_out, &self.down, &self.z, &mut self.d_z)
            .dispatched(&self.dispatched)
            .slot_weight(self.dispatched.slot_weight())
            .hidden(&mut self.weighted)
            .d_slot_weight(&mut self.d_weight);
        gemm_backward::forward(device::kernels(), &self.stream, &desc, args, &mut self.workspace).unwrap();
    }

    /// Both weights' gradients, of experts that are not frozen; with sums of the columns of `d_z` on request.
    fn weights(&mut self, frozen: Option<&CudaSlice<i32>>, sums: Option<&mut CudaSlice<f32>>) {
        let kernels = device::kernels();
        let shape = *self.dispatched.shape();
        let desc =
            KGroupedDesc::new(Dtype::Bf16, shape, self.hidden, self.width).gathered(Gathered::A).kernels(self.kernels);
        let out = ProductOut::Rounded((&mut self.d_down).into());
        let mut args = KGroupedArgs::new(&self.d_out, &self.weighted, &self.dispatched, out);
        args.frozen = frozen.map(Into::into);
        k_grouped::forward(kernels, &self.stream, &desc, args).unwrap();
        let desc = KGroupedDesc::new(Dtype::Bf16, shape, 2 * self.width, self.hidden)
            .gathered(Gathered::B)
            .kernels(self.kernels);
        let out = ProductOut::Rounded((&mut self.d_gate_up).into());
        let mut args = KGroupedArgs::new(&self.d_z, &self.x, &self.dispatched, out);
        args.frozen = frozen.map(Into::into);
        args.sums = sums.map(|sums| ColumnSums::new(ProductOut::F32(sums.into())));
        k_grouped::forward(kernels, &self.stream, &desc, args).unwrap();
    }

    fn input(&mut self) {
        let kernels = device::kernels();
        let shape = *self.dispatched.shape();
        let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(shape), self.hidden, 2 * self.width)
            .weight(WeightDesc::new(Dtype::Bf16).layout(Layout::Kn))
            .kernels(self.kernels);
        let args = GemmArgs::new(&self.d_z, Weight::new(&self.gate_up), &mut self.d_rows).dispatched(&self.dispatched);
        gemm::forward(kernels, &self.stream, &desc, args).unwrap();
        let desc = CombineDesc::new(Dtype::Bf16, shape, self.hidden);
        let args = CombineArgs::new(&self.d_rows, &self.dispatched, &mut self.dx);
        combine::forward(kernels, &self.stream, &desc, args).unwrap();
    }

    /// Bytes that each of the five must move, by the order of [`Chain::back`], [`Chain::weights`] and [`Chain::input`]: every matrix once, read or written.
    fn compulsory(&self) -> [u64; 5] {
        let (t, e, h, i) = (self.tokens, self.experts, self.hidden, self.width);
        let s = t * self.top_k;
        let back = t * h + e * h * i + 4 * s * i + s * i;
        let down = t * h + s * i + e * h * i;
        let gate_up = 2 * s * i + t * h + 2 * e * i * h;
        let input = 2 * s * i + 2 * e * i * h + s * h;
        let sum = s * h + t * h;
        [back, down, gate_up, input, sum].map(|elements| 2 * elements as u64)
    }
}

/// What the launches of `section` did; nothing on a real device, which counts nothing. One section at a time: the device counts for the process.
fn profiled(section: impl FnOnce()) -> Option<Profile> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(control) = device::control() else {
        section();
        return None;
    };
    Some(control.profiled(section).1)
}

/// A batch, made while nobody counts.
fn made(sizes: [usize; 5], kernels: KernelSet) -> Chain {
    let mut chain = None;
    profiled(|| chain = Some(Chain::new(sizes, kernels)));
    chain.expect("a section runs")
}

/// Device memory sees each matrix about once: what blocks share they share in L2.
#[test]
fn the_five_move_little_more_than_they_must() {
    let sizes = match std::env::var("MOE_TRAFFIC").as_deref() {
        Ok("large") => [1024, 4, 16, 1024, 512],
        _ => [512, 4, 8, 512, 256],
    };
    let is_hopper = device::kernels().device().compute_capability == (9, 0);
    let sets = if is_hopper { vec![KernelSet::Sm80, KernelSet::Sm90a] } else { vec![KernelSet::Sm80] };
    for set in sets {
        moved_little(made(sizes, set));
    }
}

fn moved_little(mut chain: Chain) {
    let Some(profile) = profiled(|| {
        chain.back();
        chain.weights(None, None);
        chain.input();
    }) else {
        return;
    };
    let compulsory = chain.compulsory();
    assert_eq!(profile.launches.len(), compulsory.len());
    for product in 0..4 {
        let kernel = &profile.launches[product].kernel;
        assert_eq!(kernel.ends_with("_sm90a"), chain.kernels == KernelSet::Sm90a, "{kernel}");
    }
    for (launch, must) in profile.launches.iter().zip(compulsory) {
        let moved = launch.work.traffic.dram_bytes();
        let share = moved as f64 / must as f64;
        println!("{}: {moved} bytes of DRAM, {share:.3} of the {must} that it must move", launch.kernel);
        assert!(share < 1.1, "{} moves {share:.3} of what it must", launch.kernel);
    }
}

/// Their blocks return before they read a row; what others' do is the same, and memory of frozen gradients stays as it is.
#[test]
fn frozen_experts_cost_nothing() {
    let mut chain = made([256, 2, 8, 128, 128], KernelSet::Fastest);
    let stream = chain.stream.clone();
    let mut sums = stream.alloc_zeros::<f32>(8 * 256).unwrap();
    profiled(|| chain.back());
    let read = |chain: &Chain| [&chain.d_down, &chain.d_gate_up].map(|all| stream.clone_dtoh(all).unwrap());
    let whole = profiled(|| chain.weights(None, Some(&mut sums)));
    let want = read(&chain);
    let want_sums = stream.clone_dtoh(&sums).unwrap();
    for mask in [[0, 1, 0, 1, 1, 0, 1, 0], [1; 8]] {
        let junk = |len: usize| vec![bf16::from_bits(0x7fff); len];
        stream.memcpy_htod(&junk(chain.d_down.len()), &mut chain.d_down).unwrap();
        stream.memcpy_htod(&junk(chain.d_gate_up.len()), &mut chain.d_gate_up).unwrap();
        stream.memcpy_htod(&vec![f32::NAN; sums.len()], &mut sums).unwrap();
        let frozen = stream.clone_htod(&mask).unwrap();
        let profile = profiled(|| chain.weights(Some(&frozen), Some(&mut sums)));
        for (got, want) in read(&chain).iter().zip(&want) {
            let parts = got.chunks(got.len() / 8).zip(want.chunks(want.len() / 8));
            for ((got, want), frozen) in parts.zip(mask) {
                let same = |got: &bf16, want: &bf16| got.to_bits() == if frozen == 0 { want.to_bits() } else { 0x7fff };
                assert!(got.iter().zip(want).all(|(got, want)| same(got, want)), "{mask:?}");
            }
        }
        for ((got, want), frozen) in stream.clone_dtoh(&sums).unwrap().chunks(256).zip(want_sums.chunks(256)).zip(mask)
        {
            assert!(if frozen == 0 { got == want } else { got.iter().all(|sum| sum.is_nan()) }, "{mask:?}");
        }
        let (Some(whole), Some(profile)) = (&whole, profile) else { continue };
        let counts = stream.clone_dtoh(chain.dispatched.counts()).unwrap();
        let rows = |frozen: bool| {
            counts
                .iter()
                .zip(mask)
                .filter(|(_, mask)| (*mask != 0) == frozen)
                .map(|(&count, _)| count as u64)
                .sum::<u64>()
        };
        for (launch, all) in profile.launches.iter().zip(&whole.launches) {
            let (bytes, before) = (launch.work.async_bytes, all.work.async_bytes);
            // A stage holds 64 rows of both operands: by whole stages, of experts that are not frozen.
            let stages = |wanted: &dyn Fn(i32) -> bool| {
                let stages = |count: i32| (count as u64).div_ceil(64);
                counts.iter().zip(mask).filter(|(_, mask)| wanted(*mask)).map(|(&count, _)| stages(count)).sum::<u64>()
            };
            assert_eq!(bytes * stages(&|_| true), before * stages(&|mask| mask == 0), "{}: {mask:?}", launch.kernel);
            let stores = |work: &softcuda::profile::Work| work.traffic.l2_write_sectors;
            let kept = mask.iter().filter(|&&mask| mask == 0).count() as u64;
            assert_eq!(stores(&launch.work) * 8, stores(&all.work) * kept, "{}: {mask:?}", launch.kernel);
            if rows(false) == 0 {
                assert_eq!((bytes, stores(&launch.work)), (0, 0), "{}", launch.kernel);
                // Nothing but the mask, a word a block.
                assert_eq!(launch.work.global.sectors, launch.work.warps, "{}", launch.kernel);
            }
        }
    }
}

/// Sums of several column tiles are added by whichever warpgroup comes last to its rows: in one order, whatever the blocks' is.
#[test]
fn the_same_bits_in_any_order() {
    let Some(control) = device::control() else { return };
    if device::kernels().device().compute_capability != (9, 0) {
        return;
    }
    let mut chain = made([300, 2, 5, 72, 520], KernelSet::Sm90a);
    let stream = chain.stream.clone();
    let mut back = |seed, threads| {
        control.set_seed(seed);
        control.set_threads(threads);
        stream.memcpy_htod(&vec![f32::NAN; chain.d_weight.len()], &mut chain.d_weight).unwrap();
        stream.memcpy_htod(&vec![bf16::NAN; chain.d_z.len()], &mut chain.d_z).unwrap();
        profiled(|| chain.back());
        let sums: Vec<u32> = stream.clone_dtoh(&chain.d_weight).unwrap().into_iter().map(f32::to_bits).collect();
        let d_z: Vec<u16> = stream.clone_dtoh(&chain.d_z).unwrap().into_iter().map(bf16::to_bits).collect();
        (sums, d_z)
    };
    let first = back(0, 1);
    assert!(first.0.iter().all(|&sum| f32::from_bits(sum).is_finite()));
    for (seed, threads) in [(1, 1), (2, 4), (3, 3), (4, 1), (5, 2)] {
        assert!(back(seed, threads) == first, "seed {seed}, {threads} threads");
    }
}
