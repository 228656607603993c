//! Where state spaces lie in the generic address space.

/// Base of the shared window in the generic address space; the offset into the block's shared memory is added.
pub const SHARED_WINDOW: u64 = 0x0100_0000_0000_0000;
/// Base of the local window in the generic address space; the offset into the thread's local memory is added.
pub const LOCAL_WINDOW: u64 = 0x0200_0000_0000_0000;

/// Base of the kernel parameters' window in the generic address space.
pub const PARAM_WINDOW: u64 = 0x0300_0000_0000_0000;
