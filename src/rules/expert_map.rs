//! Entries of an expert map that are no expert, and the hash that deals slots to replicas.

/// Entry of a map: no expert here; the slot is skipped. Also an expert whose output is zero.
pub const NONE: i32 = -1;

/// Entry of a map: an expert whose output is its input.
pub const IDENTITY: i32 = -2;
