//! Tensor maps: what the copy engine knows of a tensor in memory, and of the boxes that it fetches.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys::{
    self, CUtensorMapDataType as Type, CUtensorMapFloatOOBfill as Fill, CUtensorMapInterleave as Interleave,
    CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle,
};

use super::{Address, Scope};
use crate::Error;
use crate::rules::Dtype;
use crate::runtime::params::TensorMap;

/// A stack of matrices, fetched in boxes of one matrix; innermost dimension first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boxes {
    pub(crate) dtype: Dtype,
    /// Elements of a row, rows, matrices; each at least 1.
    pub(crate) sizes: [usize; 3],
    /// Elements from a row to the next, from a matrix to the next; multiples of 16 bytes.
    pub(crate) strides: [usize; 2],
    /// Elements and rows of a box: 128 bytes, whose 16-byte chunks the engine permutes over 8 rows.
    pub(crate) extent: [u32; 2],
}

impl Scope<'_> {
    /// The map of a tensor at `first`. Elements outside it are fetched as zeros: what a kernel reads by the map is within the extents given here,
    /// which the caller has opened.
    pub(crate) fn tensor_map(&self, first: Address<'_>, boxes: &Boxes) -> Result<TensorMap, Error> {
        let Boxes { dtype, sizes, strides, extent: [columns, rows] } = *boxes;
        let ty = match dtype {
            Dtype::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Dtype::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Dtype::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let sizes = sizes.map(|size| size as u64);
        let strides = strides.map(|stride| stride as u64 * u64::from(dtype.bytes()));
        let (extent, steps) = ([columns, rows, 1], [1u32; 3]);
        let mut map = MaybeUninit::<sys::CUtensorMap>::zeroed();
        // SAFETY: the arrays have the lengths of rank 3; a map has 128 bytes at a multiple of 64, and is plain data.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                ty,
                3,
                first.value() as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                extent.as_ptr(),
                steps.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .map_err(Error::driver(self.operation))?;
            Ok(TensorMap(std::mem::transmute_copy(&map)))
        }
    }
}
