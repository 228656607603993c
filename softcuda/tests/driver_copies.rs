//! Copies and sets of rows and planes, and values in memory that streams wait for.

mod common;

use std::ptr::null_mut;

use common::{device, says, status};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUDA_MEMCPY2D, CUDA_MEMCPY3D, CUmemorytype, CUresult};

fn fetch(addr: u64, bytes: usize) -> Vec<u8> {
    let mut host = vec![0; bytes];
    unsafe { result::memcpy_dtoh_sync(&mut host, addr) }.unwrap();
    host
}

/// 8 rows of 32 bytes, each byte its place.
fn picture() -> Vec<u8> {
    (0..=255).collect()
}

#[test]
fn rows_are_copied_between_pitches() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let host = picture();
    let mut pitch = 0;
    let mut addr = 0;
    unsafe { sys::cuMemAllocPitch_v2(&mut addr, &mut pitch, 20, 3, 4) }.result().unwrap();
    assert!(pitch >= 20 && pitch % 512 == 0);
    let mut copy: CUDA_MEMCPY2D = unsafe {
        // No member of the enumeration is zero.
        let mut copy = std::mem::MaybeUninit::<CUDA_MEMCPY2D>::zeroed();
        (*copy.as_mut_ptr()).srcMemoryType = CUmemorytype::CU_MEMORYTYPE_HOST;
        (*copy.as_mut_ptr()).dstMemoryType = CUmemorytype::CU_MEMORYTYPE_DEVICE;
        copy.assume_init()
    };
    copy.srcHost = host.as_ptr().cast();
    (copy.srcPitch, copy.srcXInBytes, copy.srcY) = (32, 5, 2);
    (copy.dstDevice, copy.dstPitch, copy.dstXInBytes) = (addr, pitch, 1);
    (copy.WidthInBytes, copy.Height) = (7, 3);
    unsafe {
        result::memset_d8_sync(addr, 0xee, 3 * pitch).unwrap();
        sys::cuMemcpy2D_v2(&copy).result().unwrap();
    }
    let got = fetch(addr, 3 * pitch);
    for row in 0..3 {
        let row_bytes = &got[row * pitch..][..pitch];
        assert_eq!(row_bytes[0], 0xee);
        assert_eq!(row_bytes[1..8], host[(row + 2) * 32 + 5..][..7], "row {row}");
        assert!(row_bytes[8..].iter().all(|&byte| byte == 0xee));
    }
    // One row more does not fit: the last one would begin behind the allocation.
    copy.Height = 4;
    let (code, text) = status(unsafe { sys::cuMemcpy2DUnaligned_v2(&copy) });
    assert_eq!(code, CUresult::CUDA_ERROR_INVALID_VALUE);
    says(&text, &["past the end of allocation"]);
    copy.srcPitch = 11;
    says(&status(unsafe { sys::cuMemcpy2D_v2(&copy) }).1, &["the source: a pitch of 11 bytes"]);
    copy.srcMemoryType = CUmemorytype::CU_MEMORYTYPE_ARRAY;
    assert_eq!(unsafe { sys::cuMemcpy2D_v2(&copy) }, CUresult::CUDA_ERROR_NOT_SUPPORTED);
    unsafe { result::free_sync(addr) }.unwrap();
}

#[test]
fn planes_are_copied() {
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let source = stream.clone_htod(&picture()).unwrap();
    use cudarc::driver::DevicePtr;
    let from = source.device_ptr(&stream).0;
    let mut host = vec![0u8; 12];
    // 2 planes of 4 rows of 32 bytes; of each 2 rows from the second, 3 bytes from the fourth.
    let mut copy: CUDA_MEMCPY3D = unsafe {
        let mut copy = std::mem::MaybeUninit::<CUDA_MEMCPY3D>::zeroed();
        (*copy.as_mut_ptr()).srcMemoryType = CUmemorytype::CU_MEMORYTYPE_UNIFIED;
        (*copy.as_mut_ptr()).dstMemoryType = CUmemorytype::CU_MEMORYTYPE_HOST;
        copy.assume_init()
    };
    (copy.srcDevice, copy.srcPitch, copy.srcHeight) = (from, 32, 4);
    (copy.srcXInBytes, copy.srcY) = (3, 1);
    copy.dstHost = host.as_mut_ptr().cast();
    (copy.WidthInBytes, copy.Height, copy.Depth) = (3, 2, 2);
    unsafe { sys::cuMemcpy3DAsync_v2(&copy, stream.cu_stream()) }.result().unwrap();
    stream.synchronize().unwrap();
    assert_eq!(host, [35, 36, 37, 67, 68, 69, 163, 164, 165, 195, 196, 197]);
    copy.srcZ = 1;
    let (_, text) = status(unsafe { sys::cuMemcpy3DAsync_v2(&copy, stream.cu_stream()) });
    says(&text, &["past the end of allocation"]);
}

#[test]
fn rows_are_set() {
    let (_, context, _turn) = device();
    let stream = context.new_stream().unwrap();
    let addr = unsafe { result::malloc_sync(64) }.unwrap();
    unsafe {
        result::memset_d8_sync(addr, 0, 64).unwrap();
        sys::cuMemsetD2D8_v2(addr, 16, 0x11, 3, 4).result().unwrap();
        sys::cuMemsetD2D16Async(addr + 4, 16, 0x2233, 2, 3, stream.cu_stream()).result().unwrap();
        sys::cuMemsetD2D32_v2(addr + 8, 32, 0x4455_6677, 2, 2).result().unwrap();
    }
    stream.synchronize().unwrap();
    let got = fetch(addr, 64);
    for row in 0..4 {
        let mut expected = [0u8; 16];
        expected[..3].fill(0x11);
        if row < 3 {
            expected[4..8].copy_from_slice(&[0x33, 0x22, 0x33, 0x22]);
        }
        if row % 2 == 0 {
            expected[8..].copy_from_slice(&[0x77, 0x66, 0x55, 0x44, 0x77, 0x66, 0x55, 0x44]);
        }
        assert_eq!(got[row * 16..][..16], expected, "row {row}");
    }
    let past = unsafe { sys::cuMemsetD2D8_v2(addr, 16, 0, 17, 4) };
    says(&status(past).1, &["a pitch of 16 bytes for rows of 17"]);
    let past = unsafe { sys::cuMemsetD2D8_v2(addr, 16, 0, 3, 5) };
    says(&status(past).1, &["past the end of allocation"]);
    unsafe { result::free_sync(addr) }.unwrap();
}

#[test]
fn streams_wait_for_values() {
    let (_, context, _turn) = device();
    let (a, b) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let addr = unsafe { result::malloc_sync(16) }.unwrap();
    unsafe {
        result::memset_d8_sync(addr, 0, 16).unwrap();
        // A waits for what B writes later, then goes on.
        sys::cuStreamWaitValue32_v2(a.cu_stream(), addr, 5, 0).result().unwrap();
        sys::cuStreamWriteValue64_v2(a.cu_stream(), addr + 8, u64::MAX - 1, 0).result().unwrap();
        assert_eq!(sys::cuStreamQuery(a.cu_stream()), CUresult::CUDA_ERROR_NOT_READY);
        sys::cuStreamWriteValue32_v2(b.cu_stream(), addr, 4, 0).result().unwrap();
        b.synchronize().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(sys::cuStreamQuery(a.cu_stream()), CUresult::CUDA_ERROR_NOT_READY, "4 is not at least 5");
        sys::cuStreamWriteValue32_v2(b.cu_stream(), addr, 6, 0).result().unwrap();
        a.synchronize().unwrap();
        assert_eq!(fetch(addr + 8, 8), (u64::MAX - 1).to_le_bytes());
        // EQ, AND and NOR of what is there already.
        let (eq, and, nor) = (1, 2, 3);
        for (value, flags) in [(6, eq), (2, and), (1, nor)] {
            sys::cuStreamWaitValue32_v2(a.cu_stream(), addr, value, flags).result().unwrap();
        }
        a.synchronize().unwrap();
        let misaligned = sys::cuStreamWaitValue64_v2(a.cu_stream(), addr + 4, 0, 0);
        says(&status(misaligned).1, &["not aligned to 8"]);
        let unknown = sys::cuStreamWaitValue32_v2(a.cu_stream(), addr, 0, 1 << 30);
        assert_eq!(unknown, CUresult::CUDA_ERROR_NOT_SUPPORTED);
        assert_ne!(sys::cuStreamWaitValue32_v2(null_mut(), 64, 0, 0), CUresult::CUDA_SUCCESS);
        result::free_sync(addr).unwrap();
    }
}
