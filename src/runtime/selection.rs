//! What a descriptor and a device lead to: a kernel, and how it is launched.

use crate::registry;

/// A kernel variant. Which exist is no part of the API; what one is called, and how large its blocks are, is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kernel(registry::Kernel);

impl Kernel {
    pub(crate) const fn new(variant: registry::Kernel) -> Kernel {
        Kernel(variant)
    }

    /// The whole specialisation in one word: the name of the PTX entry.
    pub fn name(&self) -> String {
        self.0.name()
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.0.threads()
    }

    /// Dynamic shared memory in bytes.
    pub const fn shared_bytes(&self) -> u32 {
        self.0.shared_bytes()
    }

    /// The entry of the registry: for this project's own tests.
    #[doc(hidden)]
    pub const fn variant(&self) -> registry::Kernel {
        self.0
    }
}

impl From<registry::Kernel> for Kernel {
    fn from(variant: registry::Kernel) -> Kernel {
        Kernel(variant)
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

/// A kernel and how it is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Selection {
    /// The variant.
    pub kernel: Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Blocks of a cluster in x, y and z.
    pub cluster: [u32; 3],
    /// Whether all blocks must be resident at once, because they meet at a barrier.
    pub cooperative: bool,
    /// Whether the kernel may start before the one in front of it on the stream has ended, and waits for it itself
    /// (programmatic dependent launch).
    pub programmatic: bool,
}

impl Selection {
    /// `grid` blocks, independent of one another and of what else is on the stream.
    pub(crate) const fn new(kernel: registry::Kernel, grid: [u32; 3]) -> Selection {
        Selection { kernel: Kernel::new(kernel), grid, cluster: [1; 3], cooperative: false, programmatic: false }
    }

    /// A row of blocks that meet at a barrier.
    pub(crate) const fn cooperative(kernel: registry::Kernel, blocks: u32) -> Selection {
        Selection { cooperative: blocks > 1, ..Selection::new(kernel, [blocks, 1, 1]) }
    }
}
