//! The driver at the ends of a process: exit handlers, ends of threads, forks. Each client runs in a process of its own.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, fs};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use CUresult::*;

/// Runs one of the clients below.
fn client(name: &str, environment: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--ignored", "--exact", name, "--nocapture"]).envs(environment.iter().copied());
    command.output().unwrap()
}

#[track_caller]
fn ends_well(output: &Output) -> String {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {text}", output.status);
    text
}

static LEFT: AtomicU64 = AtomicU64::new(0);

/// What calls answer after the thread's own state is gone; `None` if one answers something that it may not.
fn late_calls() -> Option<Vec<CUresult>> {
    let mut addr = 0;
    let mut text = std::ptr::null();
    // SAFETY: plain calls of the driver API.
    let codes = unsafe {
        vec![
            sys::cuCtxSynchronize(),
            sys::cuMemAlloc_v2(&mut addr, 16),
            sys::cuStreamQuery(std::ptr::null_mut()),
            sys::cuMemcpyDtoH_v2((&raw mut addr).cast(), LEFT.load(Ordering::Relaxed), 8),
            sys::cuMemFree_v2(LEFT.load(Ordering::Relaxed)),
            sys::cuInit(0),
        ]
    };
    // A failure that has a text of its own.
    unsafe { sys::cuMemFree_v2(3) };
    let told = unsafe { sys::cuGetErrorString(CUDA_ERROR_INVALID_VALUE, &mut text) };
    let fine = told == CUDA_SUCCESS && !text.is_null();
    (fine && codes.iter().all(|code| matches!(code, CUDA_SUCCESS | CUDA_ERROR_DEINITIALIZED))).then_some(codes)
}

fn leave_something() {
    softcuda::install().unwrap();
    let context = CudaContext::new(0).unwrap();
    context.bind_to_thread().unwrap();
    let mut addr = 0;
    unsafe { sys::cuMemAlloc_v2(&mut addr, 64) }.result().unwrap();
    LEFT.store(addr, Ordering::Relaxed);
    std::mem::forget(context);
}

#[test]
#[ignore = "run by exit_handlers_may_call_the_driver"]
fn exit_client() {
    extern "C" fn at_exit() {
        let code = if late_calls().is_some() { 0 } else { 3 };
        // SAFETY: ends the process.
        unsafe { libc::_exit(code) };
    }
    // Before the driver has any handler of its own.
    unsafe { libc::atexit(at_exit) };
    leave_something();
    std::process::exit(4);
}

#[test]
fn exit_handlers_may_call_the_driver() {
    ends_well(&client("exit_client", &[]));
}

struct Late;

impl Drop for Late {
    fn drop(&mut self) {
        if late_calls().is_none() {
            // SAFETY: ends the process.
            unsafe { libc::_exit(3) };
        }
        println!("late calls were answered");
    }
}

thread_local! {
    static LATE: Late = const { Late };
}

#[test]
#[ignore = "run by destructors_of_thread_locals_may_call_the_driver"]
fn thread_client() {
    softcuda::install().unwrap();
    std::thread::spawn(|| {
        // Made before the driver's own, and so dropped after them.
        LATE.with(|_| ());
        leave_something();
    })
    .join()
    .unwrap();
}

#[test]
fn destructors_of_thread_locals_may_call_the_driver() {
    assert!(ends_well(&client("thread_client", &[])).contains("late calls were answered"));
}

const COUNT: &str = ".version 7.0\n.target sm_80\n.address_size 64
    .visible .entry count(.param .u64 to) {
        .reg .b32 %r1; .reg .b64 %d1;
        ld.param.u64 %d1, [to]; atom.global.add.u32 %r1, [%d1], 1; ret; }";

#[test]
#[ignore = "run by the_child_of_a_fork_is_refused_and_writes_nothing"]
fn fork_client() {
    softcuda::install().unwrap();
    let context = CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let kernel = context.load_module(Ptx::from_src(COUNT)).unwrap().load_function("count").unwrap();
    let mut counter = stream.alloc_zeros::<u32>(1).unwrap();
    let config = LaunchConfig { grid_dim: (64, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
    let mut count = || unsafe { stream.launch_builder(&kernel).arg(&mut counter).launch(config) };
    count().unwrap();
    stream.synchronize().unwrap();
    // SAFETY: the child calls the driver and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // A child that hangs is ended.
        unsafe { libc::alarm(20) };
        let launched = count().map(drop).unwrap_err().0;
        let (mut addr, mut version) = (0, 0);
        let codes = unsafe { [sys::cuInit(0), launched, sys::cuMemAlloc_v2(&mut addr, 4), sys::cuCtxSynchronize()] };
        let version = unsafe { sys::cuDriverGetVersion(&mut version) };
        let fine = codes == [CUDA_ERROR_NOT_INITIALIZED; 4] && version == CUDA_SUCCESS;
        // With exit handlers, those of the driver too.
        unsafe { libc::exit(if fine { 0 } else { 3 }) };
    }
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child ended with {status:#x}");
    let profile = PathBuf::from(env::var_os("SOFTCUDA_PROFILE").unwrap());
    assert_eq!(fs::read_dir(profile.parent().unwrap()).unwrap().count(), 0, "the child wrote the parent's profile");
    // The parent goes on.
    count().unwrap();
    assert_eq!(stream.clone_dtoh(&counter).unwrap(), [2 * 64 * 32]);
}

#[test]
fn the_child_of_a_fork_is_refused_and_writes_nothing() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fork");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    ends_well(&client("fork_client", &[("SOFTCUDA_PROFILE", &folder.join("profile"))]));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 3, "the parent's profile");
}
