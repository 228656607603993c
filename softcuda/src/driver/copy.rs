//! `cuMemcpy*` and `cuMemset*`.

use super::capture::forbid_unsafe;
use super::handles::Handle;
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::work::{Direction, Op, Rows};
use super::{api, driver};

use Direction::{DeviceToDevice, DeviceToHost, HostToDevice, Unified};

fn copy(dst: u64, src: u64, bytes: usize, direction: Direction) -> Op {
    Op::Copy { dst, src, bytes: bytes as u64, direction }
}

fn set(dst: u64, value: u32, width: u32, count: usize) -> Op {
    Op::Set { dst, value, width, count: count as u64, rows: Rows::ONE }
}

/// The forms without a stream: in the default one, and the host waits.
pub(super) fn now(function: &str, op: Op) -> Outcome {
    let stream = stream(0)?;
    forbid_unsafe(function)?;
    stream.submit(op)?;
    stream.settle()
}

/// Defines a call without a stream and its `Async` form.
macro_rules! pair {
    ($sync:ident, $asynchronous:ident, ($($arg:ident: $ty:ty),*), $op:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $sync($($arg: $ty),*) -> CUresult {
            api(stringify!($sync), || now(stringify!($sync), $op))
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $asynchronous($($arg: $ty,)* handle: Handle) -> CUresult {
            api(stringify!($asynchronous), || stream(handle)?.submit($op))
        }
    };
}

pair!(cuMemcpyHtoD_v2, cuMemcpyHtoDAsync_v2, (dst: u64, src: u64, bytes: usize), copy(dst, src, bytes, HostToDevice));
pair!(cuMemcpyDtoH_v2, cuMemcpyDtoHAsync_v2, (dst: u64, src: u64, bytes: usize), copy(dst, src, bytes, DeviceToHost));
pair!(cuMemcpyDtoD_v2, cuMemcpyDtoDAsync_v2, (dst: u64, src: u64, bytes: usize), copy(dst, src, bytes, DeviceToDevice));
pair!(cuMemcpy, cuMemcpyAsync, (dst: u64, src: u64, bytes: usize), copy(dst, src, bytes, Unified));
pair!(cuMemsetD8_v2, cuMemsetD8Async, (dst: u64, value: u8, count: usize), set(dst, value.into(), 1, count));
pair!(cuMemsetD16_v2, cuMemsetD16Async, (dst: u64, value: u16, count: usize), set(dst, value.into(), 2, count));
pair!(cuMemsetD32_v2, cuMemsetD32Async, (dst: u64, value: u32, count: usize), set(dst, value, 4, count));

/// Copies between contexts: their addresses are all of one range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyPeer(
    dst: u64,
    dst_context: Handle,
    src: u64,
    src_context: Handle,
    bytes: usize,
) -> CUresult {
    api("cuMemcpyPeer", || {
        check_contexts(&[dst_context, src_context])?;
        now("cuMemcpyPeer", copy(dst, src, bytes, DeviceToDevice))
    })
}

fn check_contexts(contexts: &[Handle]) -> Outcome {
    driver()?;
    contexts.iter().try_for_each(|&context| super::context::CONTEXTS.get(context)?.check())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyPeerAsync(
    dst: u64,
    dst_context: Handle,
    src: u64,
    src_context: Handle,
    bytes: usize,
    handle: Handle,
) -> CUresult {
    api("cuMemcpyPeerAsync", || {
        check_contexts(&[dst_context, src_context])?;
        stream(handle)?.submit(copy(dst, src, bytes, DeviceToDevice))
    })
}
