//! After a fault of a kernel: what is asked of the context says so, and a context made anew works. A test binary of its own, as the
//! device's primary context is of the whole process.

mod async_support;

use std::ffi::c_void;

use async_support::{Problem, context, is_software_device};
use cudarc::driver::sys::CUresult::{self, CUDA_ERROR_ILLEGAL_ADDRESS};
use cudarc::driver::{CudaStream, DriverError, result};
use moe_kernels::routers::gating::{self, GatingArgs};
use moe_kernels::{Error, Kernels, device};

const FAULT: &std::ffi::CStr = c"
.version 7.0
.target sm_80
.address_size 64
.visible .entry fault()
{
    .reg .u64 %at;
    mov.u64 %at, 4096;
    st.global.u32 [%at], 1;
    ret;
}
";

/// Writes where nothing is.
fn fault(stream: &CudaStream) {
    stream.context().bind_to_thread().unwrap();
    // SAFETY: PTX text; the kernel has no parameters. What it does is what the test is about.
    unsafe {
        let module = result::module::load_data(FAULT.as_ptr().cast()).unwrap();
        let function = result::module::get_function(module, c"fault".to_owned()).unwrap();
        let parameters: &mut [*mut c_void] = &mut [];
        let _ = result::launch_kernel(function, (1, 1, 1), (1, 1, 1), 0, stream.cu_stream(), parameters);
    }
}

fn code<T>(result: Result<T, Error>) -> Option<CUresult> {
    match result {
        Err(Error::Driver { source: DriverError(code), .. }) => Some(code),
        _ => None,
    }
}

#[test]
fn a_broken_context_says_so_and_a_new_one_works() {
    let first = context();
    let p = Problem::new(&first);
    let (logits, mut ids, mut weights) = p.buffers();
    let stream = first.new_stream().unwrap();
    fault(&stream);
    assert_eq!(stream.synchronize(), Err(DriverError(CUDA_ERROR_ILLEGAL_ADDRESS)));

    let broken = Some(CUDA_ERROR_ILLEGAL_ADDRESS);
    assert_eq!(code(Kernels::new(&first)), broken);
    assert_eq!(code(device::open(0)), broken, "the primary context is still the broken one");
    let args = GatingArgs::new(&logits, &mut ids, &mut weights);
    assert_eq!(code(gating::forward(&p.kernels, &stream, &p.desc, args)), broken);

    // Everything that holds the context: kernels, buffers, streams, values of it.
    drop((logits, ids, weights, stream, p));
    assert_eq!(code(device::open(0)), broken, "one value is left");
    drop(first);
    match device::open(0) {
        Ok(second) => {
            let p = Problem::new(&second);
            let (logits, mut ids, mut weights) = p.buffers();
            let stream = second.default_stream();
            gating::forward(&p.kernels, &stream, &p.desc, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
            assert_eq!(stream.clone_dtoh(&ids).unwrap(), p.expected());
        }
        // NVIDIA's manual asks for a new process after this error.
        Err(error) if !is_software_device() => println!("a new process is needed: {error}"),
        Err(error) => panic!("the context was made anew: {error}"),
    }
}
