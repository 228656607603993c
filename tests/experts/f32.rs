//! f32 products, which are three products of TF32.

use moe_kernels::Dtype;
use moe_kernels::experts::Weight;
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};

use crate::device;
use crate::values::{generator, normals};

/// `a b^T` of one row, repeated so that each height of tiles has more than one, and rows of `b`.
fn product(a: &[f32], b: &[f32]) -> Vec<Vec<f32>> {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (n, k) = (b.len() / a.len(), a.len());
    let b = stream.clone_htod(b).unwrap();
    [17, 65]
        .map(|rows| {
            let a = stream.clone_htod(&a.repeat(rows)).unwrap();
            let mut out = stream.alloc_zeros::<f32>(rows * n).unwrap();
            let desc = GemmDesc::new(Dtype::F32, Rows::Dense(rows), n, k);
            gemm::forward(kernels, &stream, &desc, GemmArgs::new(&a, Weight::new(&b), &mut out)).unwrap();
            let out = stream.clone_dtoh(&out).unwrap();
            let same = |row: &[f32]| row.iter().zip(&out[..n]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(out.chunks(n).all(same), "rows of the same input differ");
            out[..n].to_vec()
        })
        .to_vec()
}

/// Numbers whose leading digits round up past the largest: nothing but a sum that is too large may overflow.
#[test]
fn near_the_largest() {
    let column = |value: f32| (0..40).map(|i| if i == 3 { value } else { 0.0 }).collect::<Vec<f32>>();
    let factors = [1.0, -1.0, 0.5, 0.3333333, 1e-3, -2e-30, 0.0, 0.99999];
    let b: Vec<f32> = factors.iter().flat_map(|&factor| column(factor)).collect();
    // The last two: rounded to 11 bits they are infinite.
    for value in [3e38f32, -3.3e38, 3.4025e38, -3.4027e38] {
        for got in product(&column(value), &b) {
            for (got, factor) in got.iter().zip(factors) {
                let want = f64::from(value) * f64::from(factor);
                assert!((f64::from(*got) - want).abs() <= 5e-7 * want.abs(), "{value:e} * {factor}: {got:e}");
            }
        }
        // The other operand.
        for got in product(&column(0.25), &column(value).repeat(8)) {
            let want = f64::from(value) / 4.0;
            assert!(got.iter().all(|&got| (f64::from(got) - want).abs() <= 5e-7 * want.abs()), "{value:e}: {got:?}");
        }
    }
    for value in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        for got in product(&column(value), &b) {
            assert!(got.iter().all(|got| !got.is_finite()), "{value}: {got:?}");
            assert!(!value.is_nan() || got.iter().all(|got| got.is_nan()), "{value}: {got:?}");
        }
    }
}

/// About as good as f32 sums in any order.
#[test]
fn accuracy() {
    let mut rng = generator("accuracy", Dtype::F32);
    let (k, n) = (2048, 256);
    let (mut off, mut norm) = (0.0, 0.0);
    for _ in 0..2 {
        let (a, b): (Vec<f32>, Vec<f32>) = (normals(&mut rng, k, 1.0), normals(&mut rng, n * k, 1.0));
        let dot = |b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let got = &product(&a, &b)[0];
        for (b, &got) in b.chunks(k).zip(got) {
            let want = dot(b);
            off += (f64::from(got) - want).powi(2);
            norm += want * want;
        }
    }
    let error = (off / norm).sqrt();
    assert!(error < 3e-7, "{error:.3e}");
}
