//! Tensor maps by the driver API: every requirement of its reference, and a kernel that uses a map.

mod common;

use std::ffi::c_void;

use common::{device, says, status};
use cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg, sys};
use sys::{CUresult, CUtensorMap, CUtensorMapDataType as Type};

/// The arguments of `cuTensorMapEncodeTiled`.
#[derive(Clone)]
struct Request {
    data_type: u32,
    rank: u32,
    address: u64,
    dims: Vec<u64>,
    strides: Vec<u64>,
    tile: Vec<u32>,
    steps: Vec<u32>,
    interleave: u32,
    swizzle: u32,
    promotion: u32,
    fill: u32,
}

/// As cudarc declares it, but with numbers where the tests give those that the enumerations lack.
type Encode = unsafe extern "C" fn(
    *mut CUtensorMap,
    u32,
    u32,
    *mut c_void,
    *const u64,
    *const u64,
    *const u32,
    *const u32,
    u32,
    u32,
    u32,
    u32,
) -> CUresult;

impl Request {
    fn good() -> Self {
        Self {
            data_type: Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as u32,
            rank: 2,
            address: 0x1000,
            dims: vec![100, 20],
            strides: vec![208],
            tile: vec![64, 8],
            steps: vec![1, 1],
            interleave: 0,
            swizzle: 3,
            promotion: 2,
            fill: 0,
        }
    }

    fn encode(&self, map: *mut CUtensorMap) -> CUresult {
        let mut pointer = std::ptr::null_mut();
        let mut found = sys::CUdriverProcAddressQueryResult_enum::CU_GET_PROC_ADDRESS_SUCCESS;
        unsafe {
            sys::cuGetProcAddress_v2(c"cuTensorMapEncodeTiled".as_ptr(), &mut pointer, 12000, 0, &mut found)
                .result()
                .unwrap();
            let encode: Encode = std::mem::transmute(pointer);
            encode(
                map,
                self.data_type,
                self.rank,
                self.address as *mut c_void,
                self.dims.as_ptr(),
                self.strides.as_ptr(),
                self.tile.as_ptr(),
                self.steps.as_ptr(),
                self.interleave,
                self.swizzle,
                self.promotion,
                self.fill,
            )
        }
    }
}

fn zeroed() -> CUtensorMap {
    unsafe { std::mem::zeroed() }
}

#[test]
fn every_requirement_of_the_reference() {
    let (_installed, _context, _turn) = device();
    let mut map = zeroed();
    assert_eq!(Request::good().encode(&mut map), CUresult::CUDA_SUCCESS);
    let change = |f: &dyn Fn(&mut Request)| {
        let mut r = Request::good();
        f(&mut r);
        r
    };
    for good in [
        change(&|r| (r.dims[0], r.tile, r.steps[0]) = (1 << 32, vec![64, 256], 8)),
        change(&|r| (r.rank, r.tile[0]) = (1, 64)),
        change(&|r| (r.data_type, r.fill) = (7, 1)).clone_with(|r| r.tile[0] = 32),
        change(&|r| {
            *r = Request {
                rank: 5,
                dims: vec![8; 5],
                strides: vec![16; 4],
                tile: vec![8; 5],
                steps: vec![1; 5],
                ..r.clone()
            };
        }),
        change(&|r| r.strides[0] = (1 << 40) - 16),
    ] {
        assert_eq!(good.encode(&mut map), CUresult::CUDA_SUCCESS);
    }
    for (bad, part) in [
        (change(&|r| r.data_type = 16), "tensorDataType 16"),
        (change(&|r| r.data_type = 13), "compute capability 10.0"),
        (change(&|r| r.rank = 0), "tensorRank is 0"),
        (change(&|r| r.rank = 6), "tensorRank is 6"),
        (change(&|r| r.address = 0x1008), "globalAddress 0x1008"),
        (change(&|r| r.dims[1] = 0), "globalDim[1] is 0"),
        (change(&|r| r.dims[0] = (1 << 32) + 1), "globalDim[0] is 4294967297"),
        (change(&|r| r.strides[0] = 200), "globalStrides[0] is 200"),
        (change(&|r| r.strides[0] = 1 << 40), "globalStrides[0]"),
        (change(&|r| r.tile[1] = 0), "boxDim[1] is 0"),
        (change(&|r| r.tile[1] = 257), "boxDim[1] is 257"),
        (change(&|r| r.tile[0] = 60), "boxDim[0] of 60 elements is 120 bytes"),
        (change(&|r| r.tile[0] = 72), "more than the 128 of the swizzle"),
        (change(&|r| (r.tile[0], r.swizzle) = (40, 2)), "more than the 64"),
        (change(&|r| (r.tile[0], r.swizzle) = (24, 1)), "more than the 32"),
        (change(&|r| r.steps[1] = 9), "elementStrides"),
        (change(&|r| r.steps[0] = 0), "elementStrides"),
        (change(&|r| r.interleave = 3), "interleave 3"),
        (change(&|r| r.swizzle = 7), "swizzle 7"),
        (change(&|r| r.swizzle = 5), "compute capability 10.0"),
        (change(&|r| r.promotion = 4), "l2Promotion 4"),
        (change(&|r| r.fill = 2), "oobFill 2"),
        (change(&|r| (r.data_type, r.fill) = (2, 1)).clone_with(|r| r.tile[0] = 32), "oobFill asks for NaN"),
    ] {
        let (code, text) = status(bad.encode(&mut map));
        assert_eq!(code, CUresult::CUDA_ERROR_INVALID_VALUE, "{text}");
        says(&text, &[part]);
    }
    let (code, text) = status(change(&|r| r.interleave = 1).encode(&mut map));
    assert_eq!(code, CUresult::CUDA_ERROR_NOT_SUPPORTED);
    says(&text, &["interleaved layout"]);
    assert_eq!(Request::good().encode(std::ptr::null_mut()), CUresult::CUDA_ERROR_INVALID_VALUE);
    let inside = (&raw mut map).wrapping_byte_add(32);
    says(&status(Request::good().encode(inside)).1, &["not a multiple of 64"]);
}

impl Request {
    fn clone_with(mut self, f: impl Fn(&mut Self)) -> Self {
        f(&mut self);
        self
    }
}

const KERNEL: &str = ".version 8.6
.target sm_90a
.address_size 64
.visible .entry twice(.param .align 64 .b8 from[128], .param .align 64 .b8 to[128])
{
    .reg .pred %p, %q; .reg .b32 %r<4>; .reg .b64 %rd<4>; .shared .align 1024 .b8 s[1024]; .shared .align 8 .b64 b;
    mov.u32 %r0, %tid.x; setp.eq.u32 %p, %r0, 0; @!%p ret;
    mov.b64 %rd0, from; cvta.param.u64 %rd0, %rd0; mov.b64 %rd1, to; cvta.param.u64 %rd1, %rd1;
    mbarrier.init.shared::cta.b64 [b], 1; fence.proxy.async; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 1024;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [s], [%rd0, {64, 16}], [b];
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %q, [b], 0; @!%q bra WAIT;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {0, 0}], [s]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    ret;
}
";

#[test]
fn a_kernel_takes_maps_as_parameters() {
    let (_installed, context, _turn) = device();
    let stream = context.default_stream();
    let source: Vec<u16> = (0..104 * 20).collect();
    let (from, to) = (stream.clone_htod(&source).unwrap(), stream.alloc_zeros::<u16>(64 * 8).unwrap());
    let module = context.load_module(cudarc::nvrtc::Ptx::from_src(KERNEL)).unwrap();
    let function = module.load_function("twice").unwrap();
    let (mut a, mut b) = (zeroed(), zeroed());
    {
        let (at, _guard) = from.device_ptr(&stream);
        // The address is replaced afterwards.
        assert_eq!(Request { address: at + 16, ..Request::good() }.encode(&mut a), CUresult::CUDA_SUCCESS);
        assert_eq!(unsafe { sys::cuTensorMapReplaceAddress(&mut a, at as *mut c_void) }, CUresult::CUDA_SUCCESS);
        says(&status(unsafe { sys::cuTensorMapReplaceAddress(&mut a, (at + 4) as *mut c_void) }).1, &["globalAddress"]);
        let (at, _guard) = to.device_ptr(&stream);
        let target = Request { address: at, dims: vec![64, 8], strides: vec![128], ..Request::good() };
        assert_eq!(target.encode(&mut b), CUresult::CUDA_SUCCESS);
    }
    let bytes = |map: &CUtensorMap| unsafe { std::mem::transmute_copy::<CUtensorMap, [u64; 16]>(map) };
    let (a, b) = (Map(bytes(&a)), Map(bytes(&b)));
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
    unsafe { stream.launch_builder(&function).arg(&a).arg(&b).launch(config).unwrap() };
    let got = stream.clone_dtoh(&to).unwrap();
    let want: Vec<u16> = (0..8)
        .flat_map(|y| (0..64).map(move |x| (x, y)))
        .map(|(x, y)| if 64 + x < 100 && 16 + y < 20 { source[(16 + y) * 104 + 64 + x] } else { 0 })
        .collect();
    assert_eq!(got, want);
    // Bytes that nobody has made a map of.
    let mut junk = CUtensorMap { opaque: [7; 16] };
    says(
        &status(unsafe { sys::cuTensorMapReplaceAddress(&mut junk, std::ptr::null_mut()) }).1,
        &["not those of a tensor map"],
    );
}

/// A map as a kernel's parameter.
#[repr(C, align(64))]
struct Map([u64; 16]);

unsafe impl cudarc::driver::DeviceRepr for Map {}
