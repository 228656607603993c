//! Device buffers beside guards of junk: a kernel that writes past an edge is noticed on any device. Inputs, and on the software
//! device outputs too, end where their allocation ends, so that it refuses any access past the last element.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr};

/// Bytes before and after the buffer; a multiple of every alignment a kernel asks for.
const GUARD_BYTES: usize = 1024;
/// Reads as a NaN in bf16, f16 and f32 and as an index far out of range.
const JUNK: u8 = 0xff;

/// `len` elements of `T` with a guard before, and for outputs on a GPU one behind.
pub struct Guarded<T> {
    bytes: CudaSlice<T>,
    before: Vec<T>,
    len: usize,
    guard: usize,
    name: &'static str,
}

impl<T: DeviceRepr + bytemuck::Pod + PartialEq> Guarded<T> {
    fn guard_elements() -> usize {
        GUARD_BYTES / size_of::<T>()
    }

    /// What an output holds before a launch writes it.
    pub fn junk() -> T {
        bytemuck::pod_read_unaligned(&vec![JUNK; size_of::<T>()])
    }

    /// An input: its contents must be the same after the launch ([`Guarded::assert_unchanged`]).
    pub fn input(stream: &Arc<CudaStream>, name: &'static str, values: &[T]) -> Guarded<T> {
        Self::new(stream, name, values, 0, 0)
    }

    /// An input that begins `shift` elements behind a boundary of every alignment.
    pub fn shifted_input(stream: &Arc<CudaStream>, name: &'static str, values: &[T], shift: usize) -> Guarded<T> {
        Self::new(stream, name, values, 0, shift)
    }

    fn new(stream: &Arc<CudaStream>, name: &'static str, values: &[T], behind: usize, shift: usize) -> Guarded<T> {
        let guard = Self::guard_elements() + shift;
        let mut all = vec![Self::junk(); guard];
        all.extend_from_slice(values);
        all.extend(std::iter::repeat_n(Self::junk(), behind));
        let bytes = stream.clone_htod(&all).expect("the device takes a test's input");
        Guarded { bytes, before: all, len: values.len(), guard, name }
    }

    /// An output of `len` elements, filled with junk.
    pub fn output(stream: &Arc<CudaStream>, name: &'static str, len: usize) -> Guarded<T> {
        Self::filled_output(stream, name, &vec![Self::junk(); len], 0)
    }

    /// An output that holds `values`, and begins `shift` elements behind a boundary of every alignment.
    pub fn filled_output(stream: &Arc<CudaStream>, name: &'static str, values: &[T], shift: usize) -> Guarded<T> {
        let behind = if super::device::control().is_some() { 0 } else { Self::guard_elements() };
        Self::new(stream, name, values, behind, shift)
    }

    /// Puts back what the buffer held when it was made, an output's junk: what a later launch does not write cannot pass for
    /// what it wrote.
    pub fn reset(&mut self, stream: &Arc<CudaStream>) {
        stream.memcpy_htod(&self.before, &mut self.bytes).expect("the device takes a test's junk");
    }

    pub fn view(&self) -> CudaView<'_, T> {
        self.bytes.slice(self.guard..self.guard + self.len)
    }

    pub fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.bytes.slice_mut(self.guard..self.guard + self.len)
    }

    /// The contents, after checking both guards.
    pub fn read(&self, stream: &Arc<CudaStream>) -> Vec<T> {
        let mut all = stream.clone_dtoh(&self.bytes).expect("the device gives back a test's output");
        let same = |a: &[T], b: &[T]| bytemuck::cast_slice::<T, u8>(a) == bytemuck::cast_slice::<T, u8>(b);
        let (end, guard) = (self.guard + self.len, self.guard);
        assert!(same(&all[..guard], &self.before[..guard]), "{}: written before its first element", self.name);
        assert!(same(&all[end..], &self.before[end..]), "{}: written past its last element", self.name);
        all.truncate(end);
        all.drain(..guard);
        all
    }

    /// For inputs and for outputs that a refused call must leave alone.
    pub fn assert_unchanged(&self, stream: &Arc<CudaStream>) {
        let now = self.read(stream);
        let same = bytemuck::cast_slice::<T, u8>(&now)
            == bytemuck::cast_slice::<T, u8>(&self.before[self.guard..self.guard + self.len]);
        assert!(same, "{}: changed, and must not be", self.name);
    }
}
