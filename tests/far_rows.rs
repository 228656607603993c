//! Rows whose first element lies past 2^31 elements: 32-bit offsets would wrap. The software device commits memory when
//! it is touched, so that the buffers cost little; on a GPU each test takes about 4.5 GB.

mod support;

use cudarc::driver::{CudaSlice, DeviceRepr};
use half::bf16;
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Schedule, Tiles};
use moe_kernels::rules::Dtype;
use moe_kernels::rules::{Activation, Glu, Layout};
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

/// One row of a grouped product, with `a`'s row, the expert's matrix and the row of the output wherever `desc` puts them.
fn product(d: &Device, desc: &GemmDesc, expert: usize, a_row: usize, out_row: usize) {
    let row = Random::tensor::<bf16>(1, K, 1.0);
    let matrix = Random::tensor::<bf16>(2, N * K, 0.05);
    let a = sparse(d, desc.a_rows * K, a_row * K, &row);
    let b = sparse(d, desc.experts * N * K, expert * N * K, &matrix);
    let slot_token = sparse(d, desc.rows, out_row, &[a_row as i32]);
    let entry = [expert as i32, out_row as i32, out_row as i32 + 1, 0];
    let (tiles, num_tiles) = (sparse(d, 1, 0, &[entry]), sparse(d, 1, 0, &[1]));
    let mut out = sparse(d, desc.rows * N, out_row * N, &[bf16::ZERO; N]);
    let args = GemmArgs {
        a: &a,
        b: &b,
        bias: None,
        slot_token: Some(&slot_token),
        row_scale: None,
        tiles: Some(Tiles { tiles: &tiles, num_tiles: &num_tiles }),
        out: &mut out,
    };
    gemm::forward(d.kernels, &d.stream, desc, args).expect("enqueued");
    let got = d.stream.clone_dtoh(&out.slice(out_row * N..(out_row + 1) * N)).expect("the kernel ran");
    for (n, got) in got.into_iter().enumerate() {
        assert_near(got, dot(&row, &matrix[n * K..][..K]));
    }
}

fn desc(a_rows: usize, rows: usize, experts: usize) -> GemmDesc {
    GemmDesc {
        dtype: Dtype::Bf16,
        rows,
        a_rows,
        experts,
        n: N,
        k: K,
        glu: Glu::None,
        activation: Activation::Identity,
        layout: Layout::Nk,
        schedule: Schedule::Grouped { tile_m: 16, max_tiles: 1 },
    }
}

#[test]
fn gathered_row() {
    product(open(), &desc(ROWS, 16, 1), 0, ROWS - 1, 3);
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
    let (tiles, num_tiles) = (sparse(d, 1, 0, &[[expert as i32, 0, 1, 0]]), sparse(d, 1, 0, &[1]));
    let mut out = d.stream.alloc_zeros::<bf16>(n).expect("device memory");
    let desc = GemmDesc { n, experts, ..desc(1, 1, experts) };
    let args = GemmArgs {
        a: &a,
        b: &b,
        bias: None,
        slot_token: None,
        row_scale: None,
        tiles: Some(Tiles { tiles: &tiles, num_tiles: &num_tiles }),
        out: &mut out,
    };
    gemm::forward(d.kernels, &d.stream, &desc, args).expect("enqueued");
    let got = d.stream.clone_dtoh(&out).expect("the kernel ran");
    for n in [0, 1, n / 2, n - 1] {
        assert_near(got[n], dot(&row, &matrix[n * k..][..k]));
    }
}

#[test]
fn output_row() {
    let rows = (1 << 31) / N + 3;
    product(open(), &desc(4, rows, 1), 0, 2, rows - 1);
}

#[test]
fn combined_slot() {
    let d = open();
    let row = Random::tensor::<bf16>(3, K, 1.0);
    let y_slots = sparse(d, ROWS * K, (ROWS - 1) * K, &row);
    let token_slot = sparse(d, 1, 0, &[ROWS as i32 - 1]);
    let mut y = d.stream.alloc_zeros::<bf16>(K).expect("device memory");
    let desc = CombineDesc { dtype: Dtype::Bf16, tokens: 1, top_k: 1, hidden: K, slots: ROWS };
    let args = CombineArgs {
        y_slots: &y_slots,
        token_slot: &token_slot,
        weights: None,
        residual: None,
        addend: None,
        y: &mut y,
    };
    combine::forward(d.kernels, &d.stream, &desc, args).expect("enqueued");
    assert_eq!(d.stream.clone_dtoh(&y).expect("the kernel ran"), row);
}
