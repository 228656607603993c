//! Grouped products without a dispatch: rows that lie by expert, of which how many stands on the device, in one graph for all numbers. Whole
//! numbers, so that every sum is exact.

mod support;

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::bf16;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::capacity::row_groups::{self, RowGroupsArgs, RowGroupsDesc, RowLayout};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Output, ProductOut, Rows, Strides};
use moe_kernels::experts::k_grouped::{self, Gathered, KGroupedArgs, KGroupedDesc};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::reference::row_groups::{by_counts, by_ends, masked};
use moe_kernels::{Dtype, Kernels, Workspace};
use support::device;

const EXPERTS: usize = 4;
const JUNK: f32 = -12345.0;

/// One test captures at a time: another thread's new stream waits for the context, which a capture does not allow.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whole numbers from -4 to 4.
fn whole(rng: &mut fastrand::Rng, len: usize) -> Vec<bf16> {
    (0..len).map(|_| bf16::from_f32(rng.i32(-4..=4) as f32)).collect()
}

/// Replays one graph with each of `numbers` and compares with plain sums. A row of nobody is NaN and stays unread, its output unwritten.
fn grouped(layout: RowLayout, numbers: &[[i32; EXPERTS]], [n, k]: [usize; 2]) {
    let _turn = turn();
    let context = device::context();
    // SAFETY: every buffer of this test is used on one stream only.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let kernels = Kernels::new(&context).unwrap();
    let mut rng = fastrand::Rng::with_seed((n * 1000 + k) as u64);
    let groups = RowGroupsDesc::new(layout, EXPERTS, 16);
    let shape = groups.shape();
    let rows = shape.slots;
    let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(shape), n, k).output(Output::F32);
    let weight = whole(&mut rng, EXPERTS * n * k);
    let weight_on_device = stream.clone_htod(&weight).unwrap();
    let mut a = stream.alloc_zeros::<bf16>((rows * k).max(1)).unwrap();
    let mut ends = stream.alloc_zeros::<i32>(EXPERTS).unwrap();
    let mut out = stream.clone_htod(&vec![JUNK; (rows * n).max(1)]).unwrap();
    let mut dispatched = Dispatched::new(&stream, &shape).unwrap();
    let selections = [
        row_groups::select(&groups, kernels.device()).unwrap().kernel,
        gemm::select(&desc, kernels.device()).unwrap().kernel,
    ];
    kernels.preload(selections).unwrap();
    stream.synchronize().unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let args = match layout {
        RowLayout::Batched { .. } => RowGroupsArgs::batched(&mut dispatched),
        _ => RowGroupsArgs::new(&ends, &mut dispatched),
    };
    row_groups::forward(&kernels, &stream, &groups, args).unwrap();
    let args = GemmArgs::to_f32(&a, Weight::new(&weight_on_device), &mut out).dispatched(&dispatched);
    gemm::forward(&kernels, &stream, &desc, args).unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();

    for numbers in numbers {
        let spans = match layout {
            RowLayout::Ends { rows } => by_ends(numbers, rows),
            RowLayout::Counts { rows } => by_counts(numbers, rows),
            RowLayout::Masked { height } => masked(numbers, height),
            RowLayout::Batched { height } => masked(&[i32::MAX; EXPERTS], height),
            other => unreachable!("no case has {other:?}"),
        };
        let mut values = vec![bf16::NAN; rows * k];
        let mut want = vec![JUNK; rows * n];
        for (expert, &(first, end)) in spans.iter().enumerate() {
            for row in first..end {
                values[row * k..][..k].copy_from_slice(&whole(&mut rng, k));
                for column in 0..n {
                    let weights = &weight[(expert * n + column) * k..][..k];
                    let terms = values[row * k..][..k].iter().zip(weights);
                    want[row * n + column] = terms.map(|(a, b)| a.to_f32() * b.to_f32()).sum();
                }
            }
        }
        if rows > 0 {
            stream.memcpy_htod(&values, &mut a).unwrap();
        }
        stream.memcpy_htod(numbers, &mut ends).unwrap();
        stream.memcpy_htod(&vec![JUNK; out.len()], &mut out).unwrap();
        graph.launch().unwrap();
        let got = stream.clone_dtoh(&out).unwrap();
        assert_eq!(got[..rows * n], want, "{layout:?} {numbers:?} N={n} K={k}");
    }
}

#[test]
fn ends_of_each_expert() {
    let numbers = [[0, 20, 20, 53], [60; 4], [0; 4], [70, 3, -5, i32::MAX], [1, 2, 3, 4]];
    grouped(RowLayout::Ends { rows: 60 }, &numbers, [40, 24]);
    grouped(RowLayout::Ends { rows: 60 }, &numbers, [13, 37]);
    grouped(RowLayout::Ends { rows: 0 }, &numbers, [8, 8]);
}

#[test]
fn counts_of_each_expert() {
    let numbers = [[0, 20, 0, 33], [60, 1, 1, 1], [0; 4], [i32::MAX; 4], [17, 17, -17, 17]];
    grouped(RowLayout::Counts { rows: 60 }, &numbers, [40, 24]);
    grouped(RowLayout::Counts { rows: 60 }, &numbers, [5, 9]);
}

#[test]
fn masked_rows_of_each_expert() {
    let numbers = [[0, 20, 1, 33], [33; 4], [0; 4], [i32::MAX, -1, 16, 17]];
    grouped(RowLayout::Masked { height: 33 }, &numbers, [40, 24]);
    grouped(RowLayout::Masked { height: 33 }, &numbers, [9, 8]);
}

#[test]
fn batched() {
    grouped(RowLayout::Batched { height: 21 }, &[[0; 4]], [16, 40]);
    grouped(RowLayout::Batched { height: 1 }, &[[0; 4]], [3, 5]);
}

/// Groups along N, `a [E, M, K]` times the columns of `b [K, N]` between ends (`torch._grouped_mm` of three and two dimensions): the product of
/// the transposed matrices, whose result is written by columns.
#[test]
fn groups_along_columns() {
    let _turn = turn();
    let (kernels, stream) = (device::kernels(), device::stream());
    let mut rng = fastrand::Rng::with_seed(7);
    let (m, n, k) = (10, 33, 18);
    let (a, b) = (whole(&mut rng, EXPERTS * m * k), whole(&mut rng, k * n));
    let ends = [5, 5, 21, 30];
    let mut want = vec![JUNK; m * n];
    for (expert, (first, end)) in by_ends(&ends, n).into_iter().enumerate() {
        for (row, column) in (0..m).flat_map(|row| (first..end).map(move |column| (row, column))) {
            let terms = (0..k).map(|i| a[(expert * m + row) * k + i].to_f32() * b[i * n + column].to_f32());
            want[row * n + column] = terms.sum();
        }
    }
    let groups = RowGroupsDesc::new(RowLayout::Ends { rows: n }, EXPERTS, 64);
    let mut dispatched = Dispatched::new(&stream, &groups.shape()).unwrap();
    let ends = stream.clone_htod(&ends).unwrap();
    row_groups::forward(kernels, &stream, &groups, RowGroupsArgs::new(&ends, &mut dispatched)).unwrap();
    let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(groups.shape()), m, k).output(Output::F32);
    let desc = desc.strides(Some(Strides::packed(&desc).a(1, n).out(1, n)));
    let (a, b) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
    let mut out = stream.clone_htod(&vec![JUNK; m * n]).unwrap();
    let args = GemmArgs::to_f32(&b, Weight::new(&a), &mut out).dispatched(&dispatched);
    gemm::forward(kernels, &stream, &desc, args).unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), want);
}

/// Groups along K (`torch._grouped_mm` of two matrices): one graph for all ends. Rows from the last end on are NaN, and an expert without rows
/// gives zeros.
#[test]
fn groups_along_k() {
    let _turn = turn();
    let context = device::context();
    // SAFETY: every buffer of this test is used on one stream only.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let kernels = Kernels::new(&context).unwrap();
    let mut rng = fastrand::Rng::with_seed(11);
    for (m, n) in [(24, 40), (13, 5)] {
        let rows = 150;
        let groups = RowGroupsDesc::new(RowLayout::Ends { rows }, EXPERTS, 64);
        let desc = KGroupedDesc::new(Dtype::Bf16, groups.shape(), m, n).f32_out(true);
        let mut dispatched = Dispatched::new(&stream, &groups.shape()).unwrap();
        let mut ends = stream.alloc_zeros::<i32>(EXPERTS).unwrap();
        let mut a = stream.alloc_zeros::<bf16>(rows * m).unwrap();
        let mut b = stream.alloc_zeros::<bf16>(rows * n).unwrap();
        let mut out = stream.alloc_zeros::<f32>(EXPERTS * m * n).unwrap();
        let selections = [
            row_groups::select(&groups, kernels.device()).unwrap().kernel,
            k_grouped::select(&desc, kernels.device()).unwrap().kernel,
        ];
        kernels.preload(selections).unwrap();
        stream.synchronize().unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        row_groups::forward(&kernels, &stream, &groups, RowGroupsArgs::new(&ends, &mut dispatched)).unwrap();
        let args = KGroupedArgs::new(&a, &b, &dispatched, ProductOut::F32((&mut out).into()));
        k_grouped::forward(&kernels, &stream, &desc, args).unwrap();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
        for numbers in [[3, 3, 100, 149], [0; 4], [150, 0, -1, i32::MAX], [64, 128, 129, 130]] {
            let spans = by_ends(&numbers, rows);
            let last = spans[EXPERTS - 1].1;
            let mut values = |columns: usize| {
                let mut values = whole(&mut rng, last * columns);
                values.resize(rows * columns, bf16::NAN);
                values
            };
            let (left, right) = (values(m), values(n));
            let mut want = vec![0.0; EXPERTS * m * n];
            for (expert, &(first, end)) in spans.iter().enumerate() {
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let terms = (first..end).map(|row| left[row * m + i].to_f32() * right[row * n + j].to_f32());
                    want[(expert * m + i) * n + j] = terms.sum::<f32>();
                }
            }
            stream.memcpy_htod(&left, &mut a).unwrap();
            stream.memcpy_htod(&right, &mut b).unwrap();
            stream.memcpy_htod(&numbers, &mut ends).unwrap();
            stream.memcpy_htod(&vec![JUNK; out.len()], &mut out).unwrap();
            graph.launch().unwrap();
            assert_eq!(stream.clone_dtoh(&out).unwrap(), want, "{numbers:?} M={m} N={n}");
        }
    }
}

/// The gradient of a layer's second weight, `dW[e] = sum over the expert's slots of dy[token] h[slot]^T`, by the lists of a dispatch that drops some.
#[test]
fn gradient_of_a_weight() {
    let _turn = turn();
    let (kernels, stream) = (device::kernels(), device::stream());
    let mut rng = fastrand::Rng::with_seed(12);
    let (tokens, top_k, hidden, intermediate) = (70, 2, 16, 24);
    let desc = DispatchDesc::new(tokens, EXPERTS, top_k, 16);
    let ids: Vec<i32> = (0..tokens * top_k).map(|_| rng.i32(-1..EXPERTS as i32 - 1)).collect();
    let (dy, h) = (whole(&mut rng, tokens * hidden), whole(&mut rng, tokens * top_k * intermediate));
    let on_device = stream.clone_htod(&ids).unwrap();
    let mut dispatched = Dispatched::new(&stream, &desc.shape()).unwrap();
    let mut workspace = Workspace::new(&stream, dispatch::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
    let args = DispatchArgs::new(&on_device, &mut dispatched, &mut workspace);
    dispatch::forward(kernels, &stream, &desc, args).unwrap();
    let slots = stream.clone_dtoh(dispatched.token_slot()).unwrap();
    let mut want = vec![1.0; EXPERTS * hidden * intermediate];
    for (choice, (&expert, &slot)) in ids.iter().zip(&slots).enumerate().filter(|(_, (id, _))| **id >= 0) {
        for (i, j) in (0..hidden).flat_map(|i| (0..intermediate).map(move |j| (i, j))) {
            let product = dy[choice / top_k * hidden + i].to_f32() * h[slot as usize * intermediate + j].to_f32();
            want[(expert as usize * hidden + i) * intermediate + j] += product;
        }
    }
    // Onto ones, as where gradients of micro-batches add up.
    let product = KGroupedDesc::new(Dtype::Bf16, desc.shape(), hidden, intermediate)
        .gathered(Gathered::A)
        .f32_out(true)
        .accumulate(true);
    let (dy, h) = (stream.clone_htod(&dy).unwrap(), stream.clone_htod(&h).unwrap());
    let mut out = stream.clone_htod(&vec![1f32; want.len()]).unwrap();
    let args = KGroupedArgs::new(&dy, &h, &dispatched, ProductOut::F32((&mut out).into()));
    k_grouped::forward(kernels, &stream, &product, args).unwrap();
    assert_eq!(stream.clone_dtoh(&out).unwrap(), want);
}
