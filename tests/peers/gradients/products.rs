//! grouped_gemm, `ops_test.py`: the gradients of both operands of grouped products, by fixed and by variable sizes of groups.
//!
//! Scaled down: 128 rows a group to 24, widths 128, 256, 512 to 32, 64, 128.

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::capacity::row_groups::RowLayout;
use moe_kernels::experts::gemm::{GemmDesc, Rows};
use moe_kernels::experts::k_grouped::KGroupedDesc;
use moe_kernels::rules::{Layout, WeightDesc};

use crate::close::assert_rounded;
use crate::data::{rng, wide};
use crate::products::{Product, groups};
use crate::suite::{Section, product};
use crate::support::inputs::normals;

const SHAPES: [[usize; 4]; 6] = [
    [1, 128, 128, 128],
    [8, 128, 128, 128],
    [16, 128, 128, 128],
    [1, 128, 256, 512],
    [8, 128, 256, 512],
    [16, 128, 256, 512],
];

pub fn grouped_gemm() -> Section {
    let mut section = Section::new("grouped_gemm_backward");
    for (shape, (fixed, transposed)) in product(&SHAPES, &product(&[true, false], &[false, true])) {
        let [z, m, k, n] = shape;
        let name = format!("z={z} m={m} k={k} n={n} fixed={fixed} trans_b={transposed}");
        let point = name.clone();
        section.point(name, move || {
            let rng = &mut rng(&point);
            let sizes = if fixed { vec![24; z] } else { variable(rng, z, 24 * z) };
            check(&point, &sizes, k / 4, n / 4, transposed);
        });
    }
    section
}

/// Sizes of random shares; the last has what rounding leaves.
fn variable(rng: &mut fastrand::Rng, z: usize, rows: usize) -> Vec<i32> {
    let shares: Vec<f64> = (0..z).map(|_| rng.f64()).collect();
    let sum: f64 = shares.iter().sum();
    let mut sizes: Vec<i32> = shares.iter().map(|share| (share / sum * (rows / z) as f64) as i32).collect();
    sizes[z - 1] += rows as i32 - sizes.iter().sum::<i32>();
    sizes
}

/// Of `out = a b[e]`, `da = d_out b[e]^T` and `db[e] = a^T d_out` over the rows of e. `b` is `[E, k, n]`, or `[E, n, k]` if transposed.
pub fn check(name: &str, sizes: &[i32], k: usize, n: usize, transposed: bool) {
    let rng = &mut rng(name);
    let (experts, rows) = (sizes.len(), sizes.iter().sum::<i32>() as usize);
    let a: Vec<bf16> = normals(rng, rows * k, 1.0);
    let b: Vec<bf16> = normals(rng, experts * k * n, 0.1);
    let d: Vec<bf16> = normals(rng, rows * n, 0.02);
    let lists = groups(RowLayout::Counts { rows }, experts, 16, sizes);
    let shape = lists.desc.shape();
    // The same weight read in the other order.
    let layout = if transposed { Layout::Kn } else { Layout::Nk };
    let back = Product {
        desc: GemmDesc::new(Dtype::Bf16, Rows::Grouped(shape), k, n)
            .weight(WeightDesc::new(Dtype::Bf16).layout(layout)),
        a: &d,
        weight: &b,
        bias: None,
        lists: Some((&lists.stream, &lists.dispatched)),
        len: rows * k,
    };
    let d_a = back.run();
    let (first, second, of) = if transposed { (&d, &a, [n, k]) } else { (&a, &d, [k, n]) };
    let d_b =
        lists.k_grouped_f32(&KGroupedDesc::new(Dtype::Bf16, shape, of[0], of[1]).f32_out(true), first, second, None);

    let (a, b, d) = (wide(&a), wide(&b), wide(&d));
    let at =
        |e: usize, k_at: usize, n_at: usize| e * k * n + if transposed { n_at * k + k_at } else { k_at * n + n_at };
    let (mut want_a, mut want_b) = (vec![0.0; rows * k], vec![0.0; experts * k * n]);
    let owners = sizes.iter().enumerate().flat_map(|(e, &size)| std::iter::repeat_n(e, size as usize));
    for (r, e) in owners.enumerate() {
        for (i, j) in product(&(0..k).collect::<Vec<_>>(), &(0..n).collect::<Vec<_>>()) {
            want_a[r * k + i] += d[r * n + j] * b[at(e, i, j)];
            want_b[at(e, i, j)] += a[r * k + i] * d[r * n + j];
        }
    }
    assert_rounded(&wide(&d_a), &want_a, Dtype::Bf16);
    for (e, (got, want)) in d_b.chunks(k * n).zip(want_b.chunks(k * n)).enumerate() {
        // An expert without rows has zeros.
        assert!(sizes[e] > 0 || got.iter().all(|&v| v == 0.0), "expert {e} without rows");
        assert_rounded(&crate::data::wide32(got), want, Dtype::F32);
    }
}
