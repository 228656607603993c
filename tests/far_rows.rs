//! Rows whose first element lies past 2^31 elements: 32-bit offsets would wrap. The software device commits memory when
//! it is touched, so that the buffers cost little; on a GPU each test takes about 4.5 GB.

mod support;

use cudarc::driver::{CudaSlice, DeviceRepr};
use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::{Dispatched, Lists, SlotShape, TileEntry, Weight};
use support::layer_case::{Device, Random, open};

const K: usize = 2048;
const N: usize = 8;
/// Rows of `K` elements that reach past 2^31.
const ROWS: usize = (1 << 31) / K + 5;

/// Memory of which only the elements from `at` on are set.
fn sparse<T: DeviceRepr>(d: &Device, len: usize, at: usize, values: &[T]) -> CudaSlice<T> {
    // SAFETY: the kernels under test read nothing but what is written here.
    let mut memory = unsafe { d.stream.alloc::<T>(len) }.expect("device memory");
    d.stream.memcpy_htod(values, &mut memory.slice_mut(at..at + values.len())).expect("a copy");
    memory
}

fn dot(a: &[bf16], b: &[bf16]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum()
}

fn assert_near(got: bf16, want: f64) {
    assert!((f64::from(got.to_f32()) - want).abs() <= 8e-3 * want.abs().max(0.5), "{got} is not {want}");
}

/// The lists of one row: `row` is token `token`'s, and `tile` covers it.
fn one_row(d: &Device, shape: &SlotShape, token: usize, row: usize, tile: TileEntry) -> Dispatched {
    let ints = |len: usize| d.stream.alloc_zeros::<i32>(len).expect("device memory");
    let choices = shape.tokens * shape.top_k.expect("choices");
    let lists = Lists {
        counts: ints(shape.experts),
        offsets: ints(shape.experts + 1),
        slot_token: sparse(d, shape.slots, row, &[token as i32]),
        token_slot: sparse(d, choices, token, &[row as i32]),
        token_offsets: ints(1),
        slot_weight: sparse(d, shape.slots, row, &[1.0]),
        tiles: sparse(d, 1, 0, &[tile]),
        num_tiles: sparse(d, 1, 0, &[1]),
    };
    // SAFETY: the one tile covers one row, whose token is set; combine is only asked for the one token there is.
    unsafe { Dispatched::from_lists(shape, lists) }.expect("lists of that shape")
}

/// One row of a grouped product, with `a`'s row, the expert's matrix and the row of the output wherever `shape` puts them.
fn product(d: &Device, shape: &SlotShape, expert: usize, a_row: usize, out_row: usize) {
    let row = Random::tensor::<bf16>(1, K, 1.0);
    let matrix = Random::tensor::<bf16>(2, N * K, 0.05);
    let a = sparse(d, shape.tokens * K, a_row * K, &row);
    let b = sparse(d, shape.experts * N * K, expert * N * K, &matrix);
    let tile = [expert as i32, out_row as i32, out_row as i32 + 1, 0];
    let lists = one_row(d, shape, a_row, out_row, tile);
    let mut out = sparse(d, shape.slots * N, out_row * N, &[bf16::ZERO; N]);
    let args = GemmArgs::new(&a, Weight::new(&b), &mut out).dispatched(&lists);
    let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(*shape), N, K).gather(true);
    gemm::forward(d.kernels, &d.stream, &desc, args).expect("enqueued");
    let got = d.stream.clone_dtoh(&out.slice(out_row * N..(out_row + 1) * N)).expect("the kernel ran");
    for (n, got) in got.into_iter().enumerate() {
        assert_near(got, dot(&row, &matrix[n * K..][..K]));
    }
}

fn shape(tokens: usize, slots: usize, experts: usize) -> SlotShape {
    SlotShape::new(tokens, experts, Some(1), slots, 16, 1)
}

#[test]
fn gathered_row() {
    product(open(), &shape(ROWS, 16, 1), 0, ROWS - 1, 3);
}

#[test]
fn expert_matrix() {
    let d = open();
    let (experts, k) = (1100, K);
    let n = ((1_usize << 31) / (k * 1000)).next_multiple_of(8);
    let expert = experts - 1;
    assert!(expert * n * k > 1 << 31);
    let row = Random::tensor::<bf16>(1, k, 1.0);
    let matrix = Random::tensor::<bf16>(2, n * k, 0.05);
    let a = sparse(d, k, 0, &row);
    let b = sparse(d, experts * n * k, expert * n * k, &matrix);
    let shape = shape(1, 1, experts);
    let lists = one_row(d, &shape, 0, 0, [expert as i32, 0, 1, 0]);
    let mut out = d.stream.alloc_zeros::<bf16>(n).expect("device memory");
    let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(shape), n, k);
    let args = GemmArgs::new(&a, Weight::new(&b), &mut out).dispatched(&lists);
    gemm::forward(d.kernels, &d.stream, &desc, args).expect("enqueued");
    let got = d.stream.clone_dtoh(&out).expect("the kernel ran");
    for n in [0, 1, n / 2, n - 1] {
        assert_near(got[n], dot(&row, &matrix[n * k..][..k]));
    }
}

#[test]
fn output_row() {
    let rows = (1 << 31) / N + 3;
    product(open(), &shape(4, rows, 1), 0, 2, rows - 1);
}

#[test]
fn combined_slot() {
    let d = open();
    let row = Random::tensor::<bf16>(3, K, 1.0);
    let y_slots = sparse(d, ROWS * K, (ROWS - 1) * K, &row);
    let last = ROWS as i32 - 1;
    let shape = shape(1, ROWS, 1);
    let lists = one_row(d, &shape, 0, ROWS - 1, [0, last, last + 1, 0]);
    let mut y = d.stream.alloc_zeros::<bf16>(K).expect("device memory");
    let desc = CombineDesc::new(Dtype::Bf16, shape, K);
    let args = CombineArgs::new(&y_slots, &lists, &mut y);
    combine::forward(d.kernels, &d.stream, &desc, args).expect("enqueued");
    assert_eq!(d.stream.clone_dtoh(&y).expect("the kernel ran"), row);
}
