//! Device memory as operations take it.
//!
//! A buffer enters as one of cudarc's own types, which know their context, their length and the events that order their
//! uses, or by an `unsafe` constructor whose contract says what nobody can check.

use std::marker::PhantomData;
use std::ptr::NonNull;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

/// A buffer that an operation reads: made with `From` of `&CudaSlice<T>`, `&CudaView<T>` or `&CudaViewMut<T>`, or by
/// [`In::from_raw`].
pub struct In<'a, T>(pub(super) Source<'a, T>);

pub(super) enum Source<'a, T> {
    /// Memory whose uses cudarc orders across streams.
    Tracked(&'a (dyn DevicePtr<T> + 'a)),
    Raw {
        address: CUdeviceptr,
        len: usize,
    },
}

impl<'a, T> In<'a, T> {
    /// `len` elements at `address`, which somebody else manages.
    ///
    /// # Safety
    /// Until the work that operations enqueue with it has ended, the memory must stay allocated, hold `len` elements of `T` and be
    /// reachable from the context of the operation; nothing may write it meanwhile, and what wrote it before must be ordered before that work: neither
    /// is tracked for it.
    pub const unsafe fn from_raw(address: CUdeviceptr, len: usize) -> In<'a, T> {
        In(Source::Raw { address, len })
    }

    /// `len` elements at `address`, a part of memory that is held for the same time.
    pub(super) const fn of_part(address: CUdeviceptr, len: usize) -> In<'a, T> {
        In(Source::Raw { address, len })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        match &self.0 {
            Source::Tracked(buffer) => buffer.len(),
            Source::Raw { len, .. } => *len,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Clone for In<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for In<'_, T> {}

impl<T> Clone for Source<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Source<'_, T> {}

impl<'a, T> From<&'a CudaSlice<T>> for In<'a, T> {
    fn from(buffer: &'a CudaSlice<T>) -> Self {
        In(Source::Tracked(buffer))
    }
}

impl<'a, T> From<&'a CudaView<'_, T>> for In<'a, T> {
    fn from(buffer: &'a CudaView<'_, T>) -> Self {
        In(Source::Tracked(buffer))
    }
}

impl<'a, T> From<&'a CudaViewMut<'_, T>> for In<'a, T> {
    fn from(buffer: &'a CudaViewMut<'_, T>) -> Self {
        In(Source::Tracked(buffer))
    }
}

/// A buffer that an operation writes: made with `From` of `&mut CudaSlice<T>` or `&mut CudaViewMut<T>`, or by
/// [`Out::from_raw`].
pub struct Out<'a, T>(pub(super) Sink<'a, T>);

pub(super) enum Sink<'a, T> {
    /// Memory whose uses cudarc orders across streams.
    Tracked(Exclusive<'a, T>),
    Raw {
        address: CUdeviceptr,
        len: usize,
        _exclusive: PhantomData<&'a mut [T]>,
    },
}

/// `&'a mut (dyn DevicePtrMut<T> + 'a)` as it may be lent for a shorter time: the language takes that type for one that another buffer of a shorter life could be
/// put into, which nobody can do behind a trait object, and so for one that has exactly `'a`. With it every list of arguments would have the time of the
/// shortest-lived of them.
pub(super) struct Exclusive<'a, T> {
    buffer: NonNull<dyn DevicePtrMut<T> + 'a>,
    _exclusive: PhantomData<&'a mut [T]>,
}

impl<'a, T> Exclusive<'a, T> {
    fn new(buffer: &'a mut (dyn DevicePtrMut<T> + 'a)) -> Exclusive<'a, T> {
        Exclusive { buffer: NonNull::from(buffer), _exclusive: PhantomData }
    }

    pub(super) fn into_inner(mut self) -> &'a mut (dyn DevicePtrMut<T> + 'a) {
        // SAFETY: made of an exclusive borrow of at least 'a, which went into it and comes out of it once.
        unsafe { self.buffer.as_mut() }
    }

    fn len(&self) -> usize {
        // SAFETY: as above; shared for as long as this is borrowed.
        unsafe { self.buffer.as_ref() }.len()
    }

    fn reborrow(&mut self) -> Exclusive<'_, T> {
        Exclusive { buffer: self.buffer, _exclusive: PhantomData }
    }
}

impl<'a, T> Out<'a, T> {
    /// `len` elements at `address`, which somebody else manages.
    ///
    /// # Safety
    /// As for [`In::from_raw`], and nothing else may read or write the memory until the work that operations enqueue with it has ended.
    pub const unsafe fn from_raw(address: CUdeviceptr, len: usize) -> Out<'a, T> {
        Out(Sink::Raw { address, len, _exclusive: PhantomData })
    }

    /// `len` elements at `address`, a part of memory that is held for the same time.
    pub(super) const fn of_part(address: CUdeviceptr, len: usize) -> Out<'a, T> {
        Out(Sink::Raw { address, len, _exclusive: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        match &self.0 {
            Sink::Tracked(buffer) => buffer.len(),
            Sink::Raw { len, .. } => *len,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same buffer for a shorter time.
    pub fn reborrow(&mut self) -> Out<'_, T> {
        match &mut self.0 {
            Sink::Tracked(buffer) => Out(Sink::Tracked(buffer.reborrow())),
            Sink::Raw { address, len, .. } => Out(Sink::Raw { address: *address, len: *len, _exclusive: PhantomData }),
        }
    }
}

impl<'a, T> From<&'a mut CudaSlice<T>> for Out<'a, T> {
    fn from(buffer: &'a mut CudaSlice<T>) -> Self {
        Out(Sink::Tracked(Exclusive::new(buffer)))
    }
}

impl<'a, T> From<&'a mut CudaViewMut<'_, T>> for Out<'a, T> {
    fn from(buffer: &'a mut CudaViewMut<'_, T>) -> Self {
        Out(Sink::Tracked(Exclusive::new(buffer)))
    }
}
