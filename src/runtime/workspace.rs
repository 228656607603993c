//! Device memory that operations use between their launches.

use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, CudaStream};

use crate::runtime::launch::{Address, Held, Scope};
use crate::{Error, Out};

/// Boundary that every region of a workspace begins on, in bytes.
pub(crate) const REGION_ALIGNMENT: usize = 256;

/// Bytes of a grid barrier's header (`kernels/common/grid/barrier.ptx.jinja`), a sector; a kernel's data follow it directly.
pub(crate) const BARRIER_HEADER: usize = 32;

/// Counters of arrivals that stand in front of every workspace, 0 between launches: what blocks count that share a tile's sums.
pub(crate) const COUNTERS: usize = 2048;

const COUNTER_BYTES: usize = COUNTERS * size_of::<u32>();

/// Scratch memory on the device.
///
/// Sized by a pure function ([`crate::capacity::dispatch::workspace_bytes`], [`crate::layer::LayerPlan::workspace_bytes`]) and
/// allocated once; a larger one than needed is fine, so one sized for the largest batch serves all. It holds the grid
/// barriers and counters of arrivals, ready for the next launch after each, so two operations in flight at once on different streams need
/// two workspaces; cudarc's tracking orders them if they share one.
#[derive(Debug)]
pub struct Workspace {
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    Owned(CudaSlice<u8>),
    /// A part of another workspace, for an operation that is part of another.
    Part {
        address: CUdeviceptr,
        bytes: usize,
    },
}

impl Workspace {
    /// Allocates `bytes` bytes of zeros in stream order.
    ///
    /// # Errors
    /// [`Error::Driver`], out of memory included.
    pub fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Workspace, Error> {
        let bytes = bytes.max(BARRIER_HEADER).saturating_add(COUNTER_BYTES);
        let memory = stream.alloc_zeros(bytes).map_err(Error::driver("workspace"))?;
        Ok(Workspace { memory: Memory::Owned(memory) })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match &self.memory {
            Memory::Owned(memory) => memory.len() - COUNTER_BYTES,
            Memory::Part { bytes, .. } => *bytes,
        }
    }

    pub(crate) fn open<'b>(&'b mut self, scope: &Scope<'b>, needed: usize) -> Result<Held<'b>, Error> {
        let got = self.bytes();
        if got < needed {
            return Err(Error::WorkspaceTooSmall { operation: scope.operation, needed, got });
        }
        let open = |memory, needed| scope.write("workspace", memory, needed, REGION_ALIGNMENT as u64);
        match &mut self.memory {
            Memory::Owned(memory) => Ok(open(memory.into(), needed + COUNTER_BYTES)?.at_byte(COUNTER_BYTES)),
            Memory::Part { address, bytes } => open(Out::of_part(*address, *bytes), needed),
        }
    }
}

impl Held<'_> {
    /// Where a region of an opened workspace begins.
    pub(crate) fn at(&self, region: Region) -> Address<'_> {
        self.address().offset(region.offset)
    }

    /// The [`COUNTERS`] in front of an opened workspace.
    pub(crate) fn counters(&self) -> Address<'_> {
        self.address().back(COUNTER_BYTES)
    }

    /// A region as the workspace of an operation: the first one, which barrier and counters belong to.
    pub(crate) fn part(&self, region: Region) -> Workspace {
        assert_eq!(region.offset, 0, "an operation's workspace begins where that of the whole does");
        Workspace { memory: Memory::Part { address: self.at(region).value(), bytes: region.bytes } }
    }
}

/// A part of a workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// Lays regions one after the other.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    operation: &'static str,
    end: usize,
}

impl Arena {
    pub(crate) fn new(operation: &'static str) -> Arena {
        Arena { operation, end: 0 }
    }

    /// The next region, of `elements` elements of `size` bytes.
    pub(crate) fn region(&mut self, name: &'static str, elements: usize, size: usize) -> Result<Region, Error> {
        let bytes = crate::runtime::shape::product(self.operation, name, &[elements, size])?;
        let offset = self.end.next_multiple_of(REGION_ALIGNMENT);
        self.end = offset.checked_add(bytes).filter(|&end| end <= isize::MAX as usize).ok_or(Error::Overflow {
            operation: self.operation,
            argument: "workspace",
            value: format!("{offset} + {bytes} bytes"),
            limit: isize::MAX as u64,
        })?;
        Ok(Region { offset, bytes })
    }

    /// Leaves the grid barrier that begins every workspace alone, where nothing has been laid yet.
    pub(crate) fn barrier(&mut self) -> Result<(), Error> {
        if self.end == 0 {
            self.region("workspace", BARRIER_HEADER, 1)?;
        }
        Ok(())
    }

    /// Bytes of all regions.
    pub(crate) fn bytes(&self) -> usize {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_and_apart() {
        let mut arena = Arena::new("test");
        let regions: Vec<_> =
            [(1, 1), (0, 4), (257, 1), (64, 4), (3, 16)].map(|(n, size)| arena.region("r", n, size).unwrap()).into();
        for region in &regions {
            assert_eq!(region.offset % REGION_ALIGNMENT, 0);
            assert!(region.offset + region.bytes <= arena.bytes());
        }
        for pair in regions.windows(2) {
            assert!(pair[0].offset + pair[0].bytes <= pair[1].offset);
        }
        assert!(arena.region("big", usize::MAX / 8, 4).is_err());
    }
}
