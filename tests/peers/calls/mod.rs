//! The library as a framework calls it: from host slices to host slices, through the device.

mod backward;
mod layer;
mod routers;
mod rows;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use moe_kernels::Kernels;

pub use self::backward::{ExpertsGradients, Losses, gate_backward, router_backward};
pub use self::layer::{Experts, weight};
pub use self::routers::{
    balance_loss, cosine, draw, gate, gate_as, load_importance, measure, measure_padded, quantile_bias, router,
    sinkhorn, update_bias,
};
pub use self::rows::{
    Sorted, admit, admit_by, count, count_wide, ids_to_map, keep_largest, map_ids, map_to_ids, sort, sort_chunks,
};
use crate::support::device;

/// Values on the device; a buffer has at least one element.
pub fn up<T: DeviceRepr + Clone + Default>(stream: &Arc<CudaStream>, values: &[T]) -> CudaSlice<T> {
    if values.is_empty() { stream.clone_htod(&[T::default()]) } else { stream.clone_htod(values) }
        .expect("device memory")
}

/// A buffer of bits that are all one, NaN or -1: what an operation leaves out does not pass for a result.
pub fn junk<T: DeviceRepr + bytemuck::Pod>(stream: &Arc<CudaStream>, len: usize) -> CudaSlice<T> {
    let ones: T = bytemuck::pod_read_unaligned(&vec![0xff; size_of::<T>()]);
    stream.clone_htod(&vec![ones; len.max(1)]).expect("device memory")
}

/// The first `len` elements.
pub fn down<T: DeviceRepr + Clone + Default>(stream: &Arc<CudaStream>, buffer: &CudaSlice<T>, len: usize) -> Vec<T> {
    let mut values = stream.clone_dtoh(buffer).expect("a result");
    values.truncate(len);
    values
}

fn gpu() -> (&'static Kernels, Arc<CudaStream>) {
    (device::kernels(), device::stream())
}

/// Experts and weights of each token.
#[derive(Clone, Debug)]
pub struct Chosen {
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
}
