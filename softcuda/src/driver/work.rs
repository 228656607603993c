//! Operations that streams run and graphs hold.

use std::ffi::c_void;
use std::sync::Arc;

use super::context::Context;
use super::graph::Executable;
use super::launch::LaunchSpec;
use super::status::{CUresult, Failure, Outcome};
use super::{checks, driver, registered};
use crate::memory::MemoryError;

/// Which ends of a copy must be allocations of this device; other ends may be any host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    HostToDevice,
    DeviceToHost,
    DeviceToDevice,
    /// Both ends are unified addresses, of either side.
    Unified,
}

pub(super) enum Op {
    Launch(Box<LaunchSpec>),
    Copy {
        dst: u64,
        src: u64,
        bytes: u64,
        direction: Direction,
    },
    /// `count` elements of `width` bytes, 1, 2 or 4.
    Set {
        dst: u64,
        value: u32,
        width: u32,
        count: u64,
    },
    Host {
        function: unsafe extern "C" fn(*mut c_void),
        data: usize,
    },
    /// Bytes that were the host's pageable memory when they were submitted.
    Upload {
        dst: u64,
        data: Vec<u8>,
    },
    Graph(Arc<Executable>),
}

/// Host memory that the driver knows nothing of.
fn is_pageable(addr: u64) -> bool {
    driver().is_ok_and(|driver| !driver.memory.contains(addr)) && registered::containing(addr).is_none()
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        let code = match error {
            MemoryError::OutOfMemory { .. } | MemoryError::Host(_) => CUresult::ERROR_OUT_OF_MEMORY,
            _ => CUresult::ERROR_INVALID_VALUE,
        };
        code.with(error.to_string())
    }
}

impl Op {
    /// `CUgraphNodeType`.
    pub fn node_type(&self) -> u32 {
        match self {
            Op::Launch(_) => 0,
            Op::Copy { .. } => 1,
            Op::Set { .. } => 2,
            Op::Host { .. } => 3,
            Op::Upload { .. } => 1,
            // CU_GRAPH_NODE_TYPE_GRAPH
            Op::Graph(_) => 4,
        }
    }

    /// Whether the operation may have to wait for something that the host does after submitting it.
    pub fn may_wait(&self) -> bool {
        match self {
            Op::Launch(_) | Op::Copy { .. } | Op::Set { .. } | Op::Upload { .. } => false,
            Op::Host { .. } => true,
            Op::Graph(graph) => graph.may_wait(),
        }
    }

    /// Whether the call that submits the operation returns only when it is done: copies to pageable memory do (CUDA driver
    /// API, "API synchronization behavior").
    pub fn returns_when_done(&self) -> bool {
        matches!(*self, Op::Copy { dst, bytes, .. } if bytes > 0 && is_pageable(dst))
    }

    /// The same operation with its own copy of the pageable memory it reads, if it reads any.
    pub fn staged(&self) -> Option<Op> {
        match *self {
            Op::Copy { dst, src, bytes, .. } if bytes > 0 && is_pageable(src) => {
                // SAFETY: the caller vouches for host memory until its call returns.
                let data = unsafe { std::slice::from_raw_parts(src as *const u8, bytes as usize) }.to_vec();
                Some(Op::Upload { dst, data })
            }
            _ => None,
        }
    }

    /// Whether the device ranges that the operation names are allocated.
    pub fn check(&self) -> Outcome {
        let memory = &driver()?.memory;
        match *self {
            Op::Launch(_) | Op::Host { .. } | Op::Graph(_) => {}
            Op::Upload { dst, ref data } => memory.check(dst, data.len() as u64).map(drop)?,
            Op::Copy { bytes: 0, .. } | Op::Set { count: 0, .. } => {}
            Op::Copy { dst, src, bytes, direction } => {
                let device = |addr: u64| match registered::containing(addr) {
                    Some(range) if bytes <= range.end - addr => Ok(()),
                    _ => memory.check(addr, bytes).map(drop),
                };
                // An address outside the device's range is the host's pageable memory, which nobody can check.
                let unified = |addr: u64| if memory.contains(addr) { device(addr) } else { Ok(()) };
                match direction {
                    Direction::HostToDevice => device(dst).and_then(|()| unified(src))?,
                    Direction::DeviceToHost => device(src).and_then(|()| unified(dst))?,
                    Direction::DeviceToDevice => device(dst).and_then(|()| device(src))?,
                    Direction::Unified => unified(dst).and_then(|()| unified(src))?,
                }
                if dst == 0 || src == 0 {
                    return Err(CUresult::ERROR_INVALID_VALUE.with("a null pointer"));
                }
            }
            Op::Set { dst, width, count, .. } => {
                if dst % u64::from(width) != 0 {
                    return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{dst:#x} is not aligned to {width} bytes")));
                }
                let bytes = count.checked_mul(width.into()).ok_or(CUresult::ERROR_INVALID_VALUE)?;
                memory.check(dst, bytes)?;
            }
        }
        Ok(())
    }

    /// Runs the operation to its end. A kernel's fault does not fail it: it puts the context in error.
    pub fn run(&self, context: &Context) -> Outcome {
        match *self {
            Op::Launch(ref launch) => launch.run(context),
            Op::Copy { dst, src, bytes, .. } => {
                if bytes > 0 {
                    // SAFETY: device ranges were checked, host ranges are the caller's to vouch for. The ranges may
                    // overlap.
                    unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, bytes as usize) };
                    checks::copied(src, dst, bytes);
                }
                Ok(())
            }
            Op::Set { dst, value, width, count } => {
                checks::wrote(dst, count * u64::from(width));
                let count = count as usize;
                // SAFETY: `check` has seen that the whole range is allocated and aligned.
                unsafe {
                    match width {
                        1 => std::ptr::write_bytes(dst as *mut u8, value as u8, count),
                        2 => std::slice::from_raw_parts_mut(dst as *mut u16, count).fill(value as u16),
                        _ => std::slice::from_raw_parts_mut(dst as *mut u32, count).fill(value),
                    }
                }
                Ok(())
            }
            Op::Host { function, data } => {
                // SAFETY: the caller of cuLaunchHostFunc vouches for the function and its argument.
                super::context::without_api(|| unsafe { function(data as *mut c_void) });
                Ok(())
            }
            Op::Upload { dst, ref data } => {
                // SAFETY: the range was checked when the operation was submitted.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), dst as *mut u8, data.len()) };
                checks::wrote(dst, data.len() as u64);
                Ok(())
            }
            Op::Graph(ref graph) => graph.run(context),
        }
    }
}
