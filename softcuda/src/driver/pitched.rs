//! Copies and sets of rows: `cuMemcpy2D`, `cuMemcpy3D`, `cuMemsetD2D*` and `cuMemAllocPitch`. Arrays, which textures and
//! surfaces are read from, are not implemented.

use super::context::current;
use super::copy::now;
use super::handles::Handle;
use super::memory::allocate;
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::work::{Op, Pitched, Rows, Side};
use super::{api, capture, out};
use crate::memory::Kind;

/// Rows of one side of a `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
struct End2D {
    x: usize,
    y: usize,
    memory_type: u32,
    host: u64,
    device: u64,
    array: usize,
    pitch: usize,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2D {
    src: End2D,
    dst: End2D,
    width: usize,
    height: usize,
}

/// Planes of one side of a `CUDA_MEMCPY3D` or `CUDA_MEMCPY3D_PEER`.
#[repr(C)]
#[derive(Clone, Copy)]
struct End3D {
    x: usize,
    y: usize,
    z: usize,
    lod: usize,
    memory_type: u32,
    host: u64,
    device: u64,
    array: usize,
    /// Reserved, or a context.
    context: usize,
    pitch: usize,
    height: usize,
}

/// `CUDA_MEMCPY3D` and `CUDA_MEMCPY3D_PEER`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy3D {
    src: End3D,
    dst: End3D,
    width: usize,
    height: usize,
    depth: usize,
}

impl From<End2D> for End3D {
    fn from(end: End2D) -> End3D {
        let End2D { x, y, memory_type, host, device, array, pitch } = end;
        End3D { x, y, z: 0, lod: 0, memory_type, host, device, array, context: 0, pitch, height: 0 }
    }
}

impl End3D {
    /// Where the copy begins on this side, and the strides from there.
    fn side(&self, what: &str, copy: &Copy3D) -> Outcome<Side> {
        let invalid = |text: String| CUresult::ERROR_INVALID_VALUE.with(format!("{what}: {text}"));
        if self.lod != 0 {
            return Err(invalid("a level of detail".into()));
        }
        // CU_MEMORYTYPE_HOST, DEVICE, ARRAY, UNIFIED
        let (start, on_device) = match self.memory_type {
            1 => (self.host, false),
            2 => (self.device, true),
            3 => return Err(super::unsupported("a copy of a CUDA array")),
            4 => (self.device, false),
            other => return Err(invalid(format!("{other} is not a CUmemorytype"))),
        };
        let pitch = if self.pitch == 0 { copy.width } else { self.pitch };
        if pitch < copy.width + self.x && (copy.height > 1 || copy.depth > 1) {
            return Err(invalid(format!("a pitch of {pitch} bytes; rows are {} bytes from {}", copy.width, self.x)));
        }
        let rows = if self.height == 0 { copy.height } else { self.height };
        if rows < copy.height + self.y && copy.depth > 1 {
            return Err(invalid(format!("planes of {rows} rows; the copy takes {} from {}", copy.height, self.y)));
        }
        let slice = pitch.checked_mul(rows).ok_or_else(|| invalid("too large".into()))?;
        let offset = self.z.checked_mul(slice).and_then(|z| z.checked_add(self.y.checked_mul(pitch)? + self.x));
        let start = offset.and_then(|offset| start.checked_add(offset as u64));
        let start = start.ok_or_else(|| invalid("too large".into()))?;
        Ok(Side { start, pitch: pitch as u64, slice: slice as u64, on_device })
    }
}

impl Copy3D {
    /// The operation.
    pub(super) fn op(&self) -> Outcome<Op> {
        let (width, height, depth) = (self.width as u64, self.height as u64, self.depth as u64);
        Ok(Op::Pitched(Pitched {
            src: self.src.side("the source", self)?,
            dst: self.dst.side("the destination", self)?,
            width,
            height,
            depth,
        }))
    }
}

/// # Safety
/// Null or a `CUDA_MEMCPY2D`.
unsafe fn op_2d(copy: *const Copy2D) -> Outcome<Op> {
    if copy.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("`pCopy` is null"));
    }
    let Copy2D { src, dst, width, height } = unsafe { copy.read_unaligned() };
    Copy3D { src: src.into(), dst: dst.into(), width, height, depth: 1 }.op()
}

/// # Safety
/// Null or a `CUDA_MEMCPY3D`.
pub(super) unsafe fn op_3d(copy: *const Copy3D) -> Outcome<Op> {
    if copy.is_null() {
        return Err(CUresult::ERROR_INVALID_VALUE.with("`pCopy` is null"));
    }
    unsafe { copy.read_unaligned() }.op()
}

macro_rules! copies {
    ($($name:ident ($ty:ty) $op:ident;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(copy: *const $ty) -> CUresult {
                api(stringify!($name), || now(stringify!($name), unsafe { $op(copy)? }))
            }
        )*
    };
}

copies! {
    cuMemcpy2D_v2(Copy2D) op_2d;
    cuMemcpy2DUnaligned_v2(Copy2D) op_2d;
    cuMemcpy3D_v2(Copy3D) op_3d;
    cuMemcpy3DPeer(Copy3D) op_3d;
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DAsync_v2(copy: *const Copy2D, handle: Handle) -> CUresult {
    api("cuMemcpy2DAsync_v2", || stream(handle)?.submit(unsafe { op_2d(copy)? }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy3DAsync_v2(copy: *const Copy3D, handle: Handle) -> CUresult {
    api("cuMemcpy3DAsync_v2", || stream(handle)?.submit(unsafe { op_3d(copy)? }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy3DPeerAsync(copy: *const Copy3D, handle: Handle) -> CUresult {
    api("cuMemcpy3DPeerAsync", || stream(handle)?.submit(unsafe { op_3d(copy)? }))
}

/// Sets `rows` rows of `width` elements of `element` bytes.
pub(super) fn set(dst: u64, pitch: usize, value: u32, element: u32, width: usize, rows: usize) -> Outcome<Op> {
    let bytes = width.checked_mul(element as usize).ok_or(CUresult::ERROR_INVALID_VALUE)?;
    if rows > 1 && (pitch < bytes || !pitch.is_multiple_of(element as usize)) {
        return Err(CUresult::ERROR_INVALID_VALUE.with(format!("a pitch of {pitch} bytes for rows of {bytes}")));
    }
    let rows = Rows { pitch: pitch as u64, count: rows as u64 };
    Ok(Op::Set { dst, value, width: element, count: width as u64, rows })
}

macro_rules! sets {
    ($($sync:ident $asynchronous:ident ($ty:ty) $element:literal;)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $sync(dst: u64, pitch: usize, value: $ty, width: usize, height: usize) -> CUresult {
                let name = stringify!($sync);
                api(name, || now(name, set(dst, pitch, value.into(), $element, width, height)?))
            }

            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $asynchronous(
                dst: u64,
                pitch: usize,
                value: $ty,
                width: usize,
                height: usize,
                handle: Handle,
            ) -> CUresult {
                let op = || set(dst, pitch, value.into(), $element, width, height);
                api(stringify!($asynchronous), || stream(handle)?.submit(op()?))
            }
        )*
    };
}

sets! {
    cuMemsetD2D8_v2 cuMemsetD2D8Async(u8) 1;
    cuMemsetD2D16_v2 cuMemsetD2D16Async(u16) 2;
    cuMemsetD2D32_v2 cuMemsetD2D32Async(u32) 4;
}

/// Rows begin at multiples of this many bytes, the alignment of textures.
const PITCH: usize = 512;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocPitch_v2(
    to: *mut u64,
    pitch: *mut usize,
    width: usize,
    height: usize,
    element: u32,
) -> CUresult {
    api("cuMemAllocPitch_v2", || {
        let context = current()?;
        capture::forbid_unsafe("cuMemAllocPitch_v2")?;
        if !matches!(element, 4 | 8 | 16) {
            return Err(CUresult::ERROR_INVALID_VALUE.with(format!("elements of {element} bytes; 4, 8 or 16")));
        }
        let stride = width.checked_next_multiple_of(PITCH).ok_or(CUresult::ERROR_OUT_OF_MEMORY)?;
        let bytes = stride.checked_mul(height).ok_or(CUresult::ERROR_OUT_OF_MEMORY)?;
        unsafe {
            out(pitch, "pPitch", stride)?;
            out(to, "dptr", allocate(&context, bytes, Kind::Device)?)
        }
    })
}
