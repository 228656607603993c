//! One device for all tests, and comparisons with what was recorded.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use moe_kernels::{Dtype, Kernels};

use crate::folder::stored;
use crate::support::compare::{Storage, layer, relative_error, to_f64};
use crate::support::device;

pub struct Run {
    pub kernels: &'static Kernels,
    pub stream: Arc<CudaStream>,
}

impl Run {
    pub fn new() -> Run {
        Run { kernels: device::kernels(), stream: device::stream() }
    }

    /// Values on the device, rounded to the type.
    pub fn put<T: Storage>(&self, values: &[f32]) -> CudaSlice<T> {
        self.stream.clone_htod(&stored::<T>(values)).expect("device memory")
    }

    pub fn ints(&self, values: &[i32]) -> CudaSlice<i32> {
        self.stream.clone_htod(values).expect("device memory")
    }

    /// An output, of NaN.
    pub fn out<T: Storage>(&self, len: usize) -> CudaSlice<T> {
        self.stream.clone_htod(&vec![T::from_f64(f64::NAN); len]).expect("device memory")
    }

    pub fn out_ints(&self, len: usize) -> CudaSlice<i32> {
        self.stream.clone_htod(&vec![-7; len]).expect("device memory")
    }

    pub fn get<T: Storage>(&self, buffer: &CudaSlice<T>) -> Vec<f64> {
        to_f64(&self.stream.clone_dtoh(buffer).expect("the kernels ran"))
    }

    pub fn get_ints(&self, buffer: &CudaSlice<i32>) -> Vec<i32> {
        self.stream.clone_dtoh(buffer).expect("the kernels ran")
    }
}

/// In the norm, to what a layer in this type is good for.
pub fn close(name: &str, got: &[f64], want: &[f32], dtype: Dtype) {
    let error = relative_error(name, got, &to_f64(want));
    assert!(error <= layer(dtype), "{name} in {dtype}: off by {error:e}, bound {:e}", layer(dtype));
}

/// Rows of `k` choices, whatever their order.
pub fn same_sets(name: &str, got: &[i32], want: &[i32], k: usize) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (token, (got, want)) in got.chunks(k).zip(want.chunks(k)).enumerate() {
        let sorted = |ids: &[i32]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        assert_eq!(sorted(got), sorted(want), "{name}: token {token}");
    }
}

/// Weights of choices that may stand in another order than the recorded ones.
pub fn same_weights(name: &str, got: (&[i32], &[f64]), want: (&[i32], &[f32]), k: usize, dtype: Dtype) {
    same_sets(name, got.0, want.0, k);
    let in_order = |ids: &[i32], weights: &[f64]| -> Vec<f64> {
        let rows = ids.chunks(k).zip(weights.chunks(k));
        rows.flat_map(|(ids, weights)| {
            let mut order: Vec<usize> = (0..k).collect();
            order.sort_by_key(|&j| ids[j]);
            order.into_iter().map(|j| weights[j]).collect::<Vec<_>>()
        })
        .collect()
    };
    let (got, want) = (in_order(got.0, got.1), in_order(want.0, &to_f64(want.1)));
    let error = relative_error(name, &got, &want);
    assert!(error <= layer(dtype), "{name} in {dtype}: off by {error:e}");
}
