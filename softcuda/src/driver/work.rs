//! Operations that streams run and graphs hold.

use std::ffi::c_void;
use std::sync::Arc;

use super::context::Context;
use super::event::Event;
use super::graph::Executable;
use super::launch::LaunchSpec;
use super::memops::Value;
use super::memory::{check_release, release};
use super::status::{CUresult, Failure, Outcome};
use super::{checks, driver, registered};
use crate::memory::{Kind, MemoryError};

/// Which ends of a copy must be allocations of this device; other ends may be any host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    HostToDevice,
    DeviceToHost,
    DeviceToDevice,
    /// Both ends are unified addresses, of either side.
    Unified,
}

/// Rows of a set, `pitch` bytes from one to the next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub pitch: u64,
    pub count: u64,
}

impl Rows {
    pub const ONE: Rows = Rows { pitch: 0, count: 1 };

    /// Bytes from the first of a row of `bytes` to the end of the last row.
    fn extent(self, bytes: u64) -> Option<u64> {
        self.pitch.checked_mul(self.count.saturating_sub(1))?.checked_add(bytes)
    }
}

/// One side of a copy of rows: where its first row begins, bytes from row to row and from plane to plane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side {
    pub start: u64,
    pub pitch: u64,
    pub slice: u64,
    /// Rather than a unified address.
    pub on_device: bool,
}

/// A copy of `depth` planes of `height` rows of `width` bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pitched {
    pub src: Side,
    pub dst: Side,
    pub width: u64,
    pub height: u64,
    pub depth: u64,
}

impl Pitched {
    fn is_empty(&self) -> bool {
        self.width == 0 || self.height == 0 || self.depth == 0
    }

    fn check_side(&self, side: &Side) -> Outcome {
        if side.start == 0 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("a null pointer"));
        }
        let rows = Rows { pitch: side.pitch, count: self.height };
        let planes = Rows { pitch: side.slice, count: self.depth };
        let bytes = rows.extent(self.width).and_then(|plane| planes.extent(plane));
        let bytes = bytes.ok_or(CUresult::ERROR_INVALID_VALUE)?;
        let memory = &driver()?.memory;
        if side.on_device || memory.contains(side.start) {
            check_device(side.start, bytes)?;
        }
        Ok(())
    }

    fn run(&self) {
        for plane in 0..self.depth {
            for row in 0..self.height {
                let at = |side: &Side| side.start + plane * side.slice + row * side.pitch;
                let (src, dst) = (at(&self.src), at(&self.dst));
                // SAFETY: device ranges were checked, host ranges are the caller's to vouch for.
                unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, self.width as usize) };
                checks::copied(src, dst, self.width);
            }
        }
    }
}

/// Whether a range is allocated, or registered host memory.
fn check_device(addr: u64, bytes: u64) -> Outcome {
    match registered::containing(addr) {
        Some(range) if bytes <= range.end - addr => Ok(()),
        _ => Ok(driver()?.memory.check(addr, bytes).map(drop)?),
    }
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
        rows: Rows,
    },
    Pitched(Pitched),
    WaitValue(Value),
    WriteValue(Value),
    /// Marks an event.
    Record(Arc<Event>),
    /// Waits for what an event marks when the operation runs.
    WaitEvent(Arc<Event>),
    /// Only orders what depends on it.
    Empty,
    Host {
        function: unsafe extern "C" fn(*mut c_void),
        data: usize,
    },
    /// As `Host`, with the stream's handle and how its work has gone.
    Callback {
        function: unsafe extern "C" fn(super::handles::Handle, CUresult, *mut c_void),
        stream: super::handles::Handle,
        data: usize,
    },
    /// Bytes that were the host's pageable memory when they were submitted.
    Upload {
        dst: u64,
        data: Vec<u8>,
    },
    /// Gives stream-ordered memory back.
    Free {
        addr: u64,
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
            Op::Host { .. } | Op::Callback { .. } => 3,
            Op::Upload { .. } | Op::Pitched(_) => 1,
            Op::Empty => 5,
            Op::WaitEvent(_) => 6,
            Op::Record(_) => 7,
            // CU_GRAPH_NODE_TYPE_BATCH_MEM_OP
            Op::WaitValue(_) | Op::WriteValue(_) => 12,
            // CU_GRAPH_NODE_TYPE_GRAPH
            Op::Graph(_) => 4,
            // CU_GRAPH_NODE_TYPE_MEM_FREE
            Op::Free { .. } => 11,
        }
    }

    /// Whether it may begin before what is in front of it in its stream has ended.
    pub fn is_dependent(&self) -> bool {
        matches!(self, Op::Launch(spec) if spec.is_dependent())
    }

    /// Whether the host takes part in the stream's order here, for all that [`super::order`] can tell.
    pub fn meets_host(&self) -> bool {
        match self {
            Op::Launch(_) | Op::Set { .. } | Op::Upload { .. } | Op::Empty | Op::Free { .. } => false,
            Op::Copy { .. } | Op::Pitched(_) => self.returns_when_done(),
            // Graphs may hold any of the others.
            Op::WriteValue(_)
            | Op::WaitValue(_)
            | Op::Record(_)
            | Op::WaitEvent(_)
            | Op::Host { .. }
            | Op::Callback { .. }
            | Op::Graph(_) => true,
        }
    }

    /// Whether the operation may have to wait for something that the host does after submitting it.
    pub fn may_wait(&self) -> bool {
        match self {
            Op::Launch(_) | Op::Copy { .. } | Op::Set { .. } | Op::Upload { .. } | Op::Pitched(_) => false,
            Op::WriteValue(_) | Op::Record(_) | Op::Empty | Op::Free { .. } => false,
            Op::WaitValue(value) => value.check().is_ok() && !value.holds(),
            Op::WaitEvent(event) => event.mark().at.is_some_and(|point| point.reached().is_none()),
            Op::Host { .. } | Op::Callback { .. } => true,
            Op::Graph(graph) => graph.may_wait(),
        }
    }

    /// Whether the call that submits the operation returns only when it is done: copies to pageable memory do (CUDA driver
    /// API, "API synchronization behavior").
    pub fn returns_when_done(&self) -> bool {
        match *self {
            Op::Copy { dst, bytes, .. } => bytes > 0 && is_pageable(dst),
            // Rows are not staged: the call waits for both directions.
            Op::Pitched(ref copy) => !copy.is_empty() && (is_pageable(copy.dst.start) || is_pageable(copy.src.start)),
            _ => false,
        }
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
            Op::Record(_) | Op::WaitEvent(_) | Op::Empty | Op::Callback { .. } => {}
            Op::Free { addr } => check_release(addr, &[Kind::Device])?,
            Op::WaitValue(ref value) | Op::WriteValue(ref value) => value.check()?,
            Op::Pitched(ref copy) if copy.is_empty() => {}
            Op::Pitched(ref copy) => [&copy.src, &copy.dst].iter().try_for_each(|side| copy.check_side(side))?,
            Op::Upload { dst, ref data } => memory.check(dst, data.len() as u64).map(drop)?,
            Op::Copy { bytes: 0, .. } | Op::Set { count: 0, .. } => {}
            Op::Copy { dst, src, bytes, direction } => {
                let device = |addr: u64| check_device(addr, bytes);
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
            Op::Set { rows: Rows { count: 0, .. }, .. } => {}
            Op::Set { dst, width, count, rows, .. } => {
                if dst % u64::from(width) != 0 {
                    return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{dst:#x} is not aligned to {width} bytes")));
                }
                let bytes = count.checked_mul(width.into()).ok_or(CUresult::ERROR_INVALID_VALUE)?;
                check_device(dst, rows.extent(bytes).ok_or(CUresult::ERROR_INVALID_VALUE)?)?;
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
            Op::Set { dst, value, width, count, rows } => {
                for row in 0..rows.count {
                    let dst = dst + row * rows.pitch;
                    checks::set(dst, count * u64::from(width));
                    let count = count as usize;
                    // SAFETY: `check` has seen that the whole range is allocated and aligned.
                    unsafe {
                        match width {
                            1 => std::ptr::write_bytes(dst as *mut u8, value as u8, count),
                            2 => std::slice::from_raw_parts_mut(dst as *mut u16, count).fill(value as u16),
                            _ => std::slice::from_raw_parts_mut(dst as *mut u32, count).fill(value),
                        }
                    }
                }
                Ok(())
            }
            Op::Host { function, data } => {
                // SAFETY: the caller of cuLaunchHostFunc vouches for the function and its argument.
                super::context::without_api(|| unsafe { function(data as *mut c_void) });
                Ok(())
            }
            Op::Callback { function, stream, data } => {
                let status = context.check().err().map_or(CUresult::SUCCESS, |failure| failure.code);
                // SAFETY: the caller of cuStreamAddCallback vouches for the function and its argument.
                super::context::without_api(|| unsafe { function(stream, status, data as *mut c_void) });
                Ok(())
            }
            Op::Upload { dst, ref data } => {
                // SAFETY: the range was checked when the operation was submitted.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), dst as *mut u8, data.len()) };
                checks::copied(0, dst, data.len() as u64);
                Ok(())
            }
            Op::Graph(ref graph) => graph.run(context),
            Op::Pitched(ref copy) => {
                copy.run();
                Ok(())
            }
            Op::WaitValue(ref value) => value.wait(context),
            Op::WriteValue(ref value) => {
                value.write();
                Ok(())
            }
            Op::Record(ref event) => {
                event.mark_now();
                Ok(())
            }
            Op::WaitEvent(ref event) => {
                if let Some(point) = event.mark().at {
                    point.wait();
                }
                Ok(())
            }
            Op::Free { addr } => {
                checks::freed(addr, super::order::current());
                release(addr, &[Kind::Device])
            }
            Op::Empty => Ok(()),
        }
    }
}
