//! The parameters of every kernel, as structs that the build generates from the `.param` names of the PTX: a forgotten one does
//! not compile, and each is given by name.

use std::ffi::c_void;

/// The parameters of one entry.
pub(crate) trait Params {
    /// The entry, as [`crate::registry::Kernel::entry`] calls it.
    const ENTRY: &'static str;
    /// One pointer a parameter.
    type Pointers: AsMut<[*mut c_void]>;

    /// Where the driver finds each value, in the order of the entry.
    fn pointers(&mut self) -> Self::Pointers;
}

/// A device address as a kernel's parameter, `.u64`; 0 where a buffer is absent.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(transparent)]
pub(crate) struct Pointer<'a> {
    address: u64,
    _held: std::marker::PhantomData<&'a ()>,
}

impl Pointer<'_> {
    /// `address`, in a buffer that is held for as long as the value lives.
    pub(super) fn new(address: u64) -> Self {
        Pointer { address, _held: std::marker::PhantomData }
    }

    /// No buffer.
    pub(crate) const NULL: Pointer<'static> = Pointer { address: 0, _held: std::marker::PhantomData };
}

/// A tensor map as a kernel's parameter, by value: `.param .align 64 .b8 name[128]`. What `cuTensorMapEncodeTiled` makes.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct TensorMap(pub(crate) [u64; 16]);

include!(concat!(env!("OUT_DIR"), "/params.rs"));
