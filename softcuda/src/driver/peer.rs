//! What kernels of a context can reach, and access to other devices' memory (CUDA programming guide, "Peer-to-Peer Memory
//! Access").

use std::collections::HashSet;

use super::context::{CONTEXTS, Context, current};
use super::handles::Handle;
use super::init::check_device;
use super::status::CUresult;
use super::{api, driver, lock, out, registered};
use crate::exec::GlobalMemory;
use crate::memory::{Allocation, Kind, Memory};

/// Global memory as kernels of one context see it.
pub(super) struct View<'a> {
    memory: &'a Memory,
    device: u32,
    peers: HashSet<u32>,
}

impl View<'_> {
    pub fn new<'a>(memory: &'a Memory, context: &Context) -> View<'a> {
        View { memory, device: context.device, peers: lock(&context.peers).clone() }
    }

    /// Page-locked and managed memory is every device's.
    fn reaches(&self, allocation: &Allocation) -> bool {
        allocation.device == self.device
            || matches!(allocation.kind, Kind::Host | Kind::Managed)
            || self.peers.contains(&allocation.device)
    }
}

impl GlobalMemory for View<'_> {
    fn find(&self, addr: u64) -> Option<(u64, u64)> {
        match self.memory.find(addr) {
            Some(allocation) => self.reaches(&allocation).then_some((allocation.start, allocation.end)),
            None => registered::containing(addr).map(|range| (range.start, range.end)),
        }
    }

    fn describe(&self, addr: u64) -> String {
        let text = self.memory.describe(addr);
        match self.memory.find(addr) {
            Some(other) if !self.reaches(&other) => {
                let (mine, its) = (self.device, other.device);
                format!("{text}, on device {its}, to which the context on device {mine} has no peer access")
            }
            _ => text,
        }
    }

    fn heap_block(&self, device: u32, bytes: u64) -> Option<u64> {
        self.memory.heap_block(device, bytes)
    }

    fn release_heap_block(&self, addr: u64) {
        self.memory.release_heap_block(addr);
    }
}

/// Any two devices reach each other.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) -> CUresult {
    api("cuDeviceCanAccessPeer", || {
        let differ = check_device(device)? != check_device(peer)?;
        unsafe { out(can, "canAccessPeer", differ.into()) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetP2PAttribute(value: *mut i32, attribute: u32, from: i32, to: i32) -> CUresult {
    api("cuDeviceGetP2PAttribute", || {
        if check_device(from)? == check_device(to)? {
            return Err(CUresult::ERROR_INVALID_DEVICE.with("a device is no peer of itself"));
        }
        let found = match attribute {
            // PERFORMANCE_RANK, ACCESS_SUPPORTED, NATIVE_ATOMIC_SUPPORTED, CUDA_ARRAY_ACCESS_SUPPORTED,
            // ONLY_PARTIAL_NATIVE_ATOMIC_SUPPORTED
            1 | 4 | 5 => 0,
            2 | 3 => 1,
            _ => return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{attribute} is no CUdevice_P2PAttribute"))),
        };
        unsafe { out(value, "value", found) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxEnablePeerAccess(peer: Handle, flags: u32) -> CUresult {
    api("cuCtxEnablePeerAccess", || {
        let context = current()?;
        let peer = CONTEXTS.get(peer)?;
        if flags != 0 {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`Flags` must be 0"));
        }
        if peer.device == context.device {
            return Err(CUresult::ERROR_INVALID_DEVICE.with("a device is no peer of itself"));
        }
        if !lock(&context.peers).insert(peer.device) {
            return Err(CUresult::ERROR_PEER_ACCESS_ALREADY_ENABLED.into());
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxDisablePeerAccess(peer: Handle) -> CUresult {
    api("cuCtxDisablePeerAccess", || {
        let context = current()?;
        let peer = CONTEXTS.get(peer)?;
        context.drain()?;
        if !lock(&context.peers).remove(&peer.device) {
            return Err(CUresult::ERROR_PEER_ACCESS_NOT_ENABLED.into());
        }
        driver().map(drop)
    })
}
