//! Tensor maps made on the host: `cuTensorMapEncodeTiled`, `cuTensorMapReplaceAddress`. Maps for im2col are not implemented.

use std::ffi::c_void;

use super::status::{CUresult, Failure, Outcome};
use super::{api, driver, unsupported};
use crate::tensormap::{BYTES, Element, MAX_RANK, Swizzle, TensorMap};

/// Alignment of a `CUtensorMap`.
const ALIGN: usize = 64;

fn invalid(text: String) -> Failure {
    CUresult::ERROR_INVALID_VALUE.with(text)
}

/// `CUtensorMapDataType` by number.
const ELEMENTS: [Element; 13] = [
    Element::U8,
    Element::U16,
    Element::U32,
    Element::S32,
    Element::U64,
    Element::S64,
    Element::F16,
    Element::F32,
    Element::F64,
    Element::BF16,
    Element::F32Flush,
    Element::TF32,
    Element::TF32Flush,
];

/// The caller's object, which must be there and aligned.
unsafe fn object<'o>(map: *mut [u8; BYTES]) -> Outcome<&'o mut [u8; BYTES]> {
    if !map.addr().is_multiple_of(ALIGN) {
        return Err(invalid(format!("tensorMap {map:p} is not a multiple of {ALIGN}")));
    }
    // SAFETY: null, or an object of the caller's.
    unsafe { map.as_mut() }.ok_or_else(|| invalid("tensorMap is null".into()))
}

/// `n` numbers of the caller's.
unsafe fn array<T: Copy>(from: *const T, n: usize, what: &str) -> Outcome<Vec<T>> {
    if n == 0 {
        return Ok(Vec::new());
    }
    if from.is_null() {
        return Err(invalid(format!("{what} is null")));
    }
    // SAFETY: the array has that many elements, by the API's contract.
    Ok((0..n).map(|i| unsafe { from.add(i).read_unaligned() }).collect())
}

fn first<T: Copy + Default, const N: usize>(values: &[T]) -> [T; N] {
    std::array::from_fn(|i| values.get(i).copied().unwrap_or_default())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: *mut [u8; BYTES],
    data_type: u32,
    rank: u32,
    address: *mut c_void,
    dims: *const u64,
    strides: *const u64,
    tile: *const u32,
    steps: *const u32,
    interleave: u32,
    swizzle: u32,
    promotion: u32,
    fill: u32,
) -> CUresult {
    api("cuTensorMapEncodeTiled", || {
        let (major, minor) = super::context::current()?.description()?.compute_capability;
        if major < 9 {
            let text = format!("tensor maps need compute capability 9.0; this device has {major}.{minor}");
            return Err(CUresult::ERROR_NOT_SUPPORTED.with(text));
        }
        let map = unsafe { object(map)? };
        let element = match data_type {
            n @ 0..=12 => ELEMENTS[n as usize],
            13..=15 => return Err(invalid(format!("tensorDataType {data_type} needs compute capability 10.0"))),
            n => return Err(invalid(format!("tensorDataType {n} is no CUtensorMapDataType"))),
        };
        let dimensions = rank as usize;
        if !(1..=MAX_RANK).contains(&dimensions) {
            return Err(invalid(format!("tensorRank is {rank}; 1 to {MAX_RANK} are possible")));
        }
        let swizzle = match swizzle {
            n @ 0..=3 => Swizzle::ALL[n as usize],
            4..=6 => return Err(invalid(format!("swizzle {swizzle} needs compute capability 10.0"))),
            n => return Err(invalid(format!("swizzle {n} is no CUtensorMapSwizzle"))),
        };
        match interleave {
            0 => {}
            1 | 2 => return Err(unsupported("cuTensorMapEncodeTiled with an interleaved layout")),
            n => return Err(invalid(format!("interleave {n} is no CUtensorMapInterleave"))),
        }
        if promotion > 3 {
            return Err(invalid(format!("l2Promotion {promotion} is no CUtensorMapL2promotion")));
        }
        if fill > 1 {
            return Err(invalid(format!("oobFill {fill} is no CUtensorMapFloatOOBfill")));
        }
        // SAFETY: arrays of the lengths that the API's contract says.
        let (dims, strides, tile, steps) = unsafe {
            (
                array(dims, dimensions, "globalDim")?,
                array(strides, dimensions - 1, "globalStrides")?,
                array(tile, dimensions, "boxDim")?,
                array(steps, dimensions, "elementStrides")?,
            )
        };
        if steps.iter().any(|s| !(1..=8).contains(s)) {
            return Err(invalid(format!("elementStrides are {steps:?}; 1 to 8 are possible")));
        }
        let made = TensorMap {
            address: address.addr() as u64,
            element,
            rank: dimensions,
            dims: first(&dims),
            strides: first(&strides),
            tile: first(&tile),
            steps: first(&steps),
            swizzle,
            fill_nan: fill == 1,
            interleave: 0,
            promotion: promotion as u8,
        };
        made.check().map_err(invalid)?;
        *map = made.encode();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuTensorMapReplaceAddress(map: *mut [u8; BYTES], address: *mut c_void) -> CUresult {
    api("cuTensorMapReplaceAddress", || {
        driver()?;
        let map = unsafe { object(map)? };
        let mut made = TensorMap::decode(map).map_err(invalid)?;
        made.address = address.addr() as u64;
        made.check().map_err(invalid)?;
        *map = made.encode();
        Ok(())
    })
}

macro_rules! im2col {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> CUresult {
            api(stringify!($name), || Err(unsupported(stringify!($name))))
        }
    )*};
}

im2col! { cuTensorMapEncodeIm2col cuTensorMapEncodeIm2colWide }
