//! The register file of a warp and loops over its 32 lanes.
//!
//! Every loop computes all lanes into a local array and then stores it, whole where all lanes are active and blended
//! otherwise: both halves vectorise, and a result may share its place with an operand.

use super::numeric::{BF16, BF16x2, F16, F16x2};
use crate::lower::ir::CONSTANT;

pub const LANES: usize = 32;
pub const FULL: u32 = u32::MAX;

/// Where a warp's operands are. Slots are checked by the lowering: see [`crate::lower::ir`].
#[derive(Clone, Copy)]
pub struct File {
    /// Registers, then constants.
    pub bases: [*mut u8; 2],
    pub predicates: *mut u32,
}

impl File {
    /// Address of a slot.
    ///
    /// # Safety
    /// The slot must come from the kernel that this file was made for.
    #[inline(always)]
    pub unsafe fn at(self, slot: u32) -> *mut u8 {
        // SAFETY: the lowering sizes the file and the constants after the slots it hands out.
        unsafe { self.bases[(slot >> 31) as usize].add((slot & !CONSTANT) as usize) }
    }

    /// # Safety
    /// As [`File::at`].
    #[inline(always)]
    pub unsafe fn predicate(self, slot: u32) -> u32 {
        // SAFETY: as for `at`.
        unsafe { *self.predicates.add(slot as usize) }
    }

    /// Sets the active lanes of a predicate.
    ///
    /// # Safety
    /// As [`File::at`].
    #[inline(always)]
    pub unsafe fn set_predicate(self, slot: u32, mask: u32, value: u32) {
        // SAFETY: as for `at`.
        unsafe {
            let p = self.predicates.add(slot as usize);
            *p = *p & !mask | value & mask;
        }
    }

    /// # Safety
    /// As [`File::at`], for a 32-bit slot.
    #[inline(always)]
    pub unsafe fn lanes32(self, slot: u32) -> [u32; LANES] {
        // SAFETY: as for `at`; slots are aligned to 128 bytes.
        unsafe { *self.at(slot).cast() }
    }

    /// # Safety
    /// As [`File::at`], for a 64-bit slot.
    #[inline(always)]
    pub unsafe fn lanes64(self, slot: u32) -> [u64; LANES] {
        // SAFETY: as for `at`.
        unsafe { *self.at(slot).cast() }
    }

    /// # Safety
    /// As [`File::lanes32`].
    #[inline(always)]
    pub unsafe fn store32(self, slot: u32, mask: u32, values: &[u32; LANES]) {
        // SAFETY: as for `lanes32`.
        unsafe { blend(self.at(slot).cast(), mask, values) }
    }

    /// # Safety
    /// As [`File::lanes64`].
    #[inline(always)]
    pub unsafe fn store64(self, slot: u32, mask: u32, values: &[u64; LANES]) {
        // SAFETY: as for `lanes64`.
        unsafe { blend(self.at(slot).cast(), mask, values) }
    }
}

#[inline(always)]
unsafe fn blend<T: Copy>(to: *mut [T; LANES], mask: u32, values: &[T; LANES]) {
    // SAFETY: the caller passes a slot of this type.
    let to = unsafe { &mut *to };
    if mask == FULL {
        *to = *values;
    } else {
        for i in 0..LANES {
            to[i] = if mask >> i & 1 != 0 { values[i] } else { to[i] };
        }
    }
}

/// A type that a row's operands and results can have.
pub trait Lane: Copy {
    const ZERO: Self;
    type Source: Copy;
    /// # Safety
    /// As [`File::at`], for a slot of this type.
    unsafe fn source(file: File, slot: u32) -> Self::Source;
    /// # Safety
    /// `source` must be from [`Lane::source`] and `lane` below 32.
    unsafe fn get(source: Self::Source, lane: usize) -> Self;
    /// # Safety
    /// As [`File::at`], for a slot of this type.
    unsafe fn put(file: File, slot: u32, mask: u32, values: &[Self; LANES]);
}

macro_rules! lane {
    ($($t:ty, $storage:ty, $store:ident, $load:expr, $keep:expr;)*) => {$(
        impl Lane for $t {
            #[allow(clippy::cast_possible_truncation)]
            const ZERO: Self = {
                let zero: $storage = 0;
                let load: fn($storage) -> $t = $load;
                let _ = load;
                // SAFETY: all of these are plain bits, for which zero is a value.
                unsafe { std::mem::transmute_copy::<$storage, $t>(&zero) }
            };
            type Source = *const $storage;

            #[inline(always)]
            unsafe fn source(file: File, slot: u32) -> Self::Source {
                // SAFETY: passed on to the caller.
                unsafe { file.at(slot).cast() }
            }

            #[inline(always)]
            unsafe fn get(source: Self::Source, lane: usize) -> Self {
                // SAFETY: a slot holds 32 lanes.
                ($load)(unsafe { *source.add(lane) })
            }

            #[inline(always)]
            unsafe fn put(file: File, slot: u32, mask: u32, values: &[Self; LANES]) {
                let mut bits: [$storage; LANES] = [0; LANES];
                for i in 0..LANES {
                    bits[i] = ($keep)(values[i]);
                }
                // SAFETY: passed on to the caller.
                unsafe { file.$store(slot, mask, &bits) }
            }
        }
    )*};
}

lane! {
    u16, u32, store32, |x: u32| x as u16, |x: u16| u32::from(x);
    i16, u32, store32, |x: u32| x as i16, |x: i16| u32::from(x as u16);
    F16, u32, store32, |x: u32| F16(x as u16), |x: F16| u32::from(x.0);
    BF16, u32, store32, |x: u32| BF16(x as u16), |x: BF16| u32::from(x.0);
    u32, u32, store32, |x: u32| x, |x: u32| x;
    i32, u32, store32, |x: u32| x as i32, |x: i32| x as u32;
    f32, u32, store32, f32::from_bits, f32::to_bits;
    F16x2, u32, store32, F16x2, |x: F16x2| x.0;
    BF16x2, u32, store32, BF16x2, |x: BF16x2| x.0;
    u64, u64, store64, |x: u64| x, |x: u64| x;
    i64, u64, store64, |x: u64| x as i64, |x: i64| x as u64;
    f64, u64, store64, f64::from_bits, f64::to_bits;
}

impl Lane for bool {
    const ZERO: Self = false;
    type Source = u32;

    #[inline(always)]
    unsafe fn source(file: File, slot: u32) -> u32 {
        // SAFETY: passed on to the caller.
        unsafe { file.predicate(slot) }
    }

    #[inline(always)]
    unsafe fn get(source: u32, lane: usize) -> bool {
        source >> lane & 1 != 0
    }

    #[inline(always)]
    unsafe fn put(file: File, slot: u32, mask: u32, values: &[bool; LANES]) {
        #[repr(align(32))]
        struct Bytes([bool; LANES]);
        let bytes = Bytes(*values);
        let mut bits = 0;
        for i in 0..LANES / 8 {
            // The multiplication brings bit 0 of byte j to bit 56 + j. Read as it lies in memory: left to itself the compiler
            // gathers the bits of a comparison one by one.
            // SAFETY: these are eight of the 32 bytes, aligned.
            let eight = unsafe { bytes.0.as_ptr().cast::<u64>().add(i).read_volatile() };
            bits |= (eight.wrapping_mul(0x0102_0408_1020_4080) >> 56 << (8 * i)) as u32;
        }
        // SAFETY: passed on to the caller.
        unsafe { file.set_predicate(slot, mask, bits) }
    }
}

macro_rules! lane_loops {
    ($($name:ident, $active:ident, $($t:ident $slot:ident $source:ident),*;)*) => {$(
        /// Applies `f` to every lane.
        ///
        /// # Safety
        /// As [`File::at`], for slots of these types.
        #[inline(always)]
        #[allow(clippy::too_many_arguments)]
        pub unsafe fn $name<R: Lane, $($t: Lane),*>(file: File, mask: u32, d: u32, $($slot: u32,)* f: impl Fn($($t),*) -> R) {
            // SAFETY: passed on to the caller.
            unsafe {
                $(let $source = $t::source(file, $slot);)*
                let mut values = [R::ZERO; LANES];
                for i in 0..LANES {
                    values[i] = f($($t::get($source, i)),*);
                }
                R::put(file, d, mask, &values);
            }
        }

        /// Applies `f` to the active lanes only.
        ///
        /// # Safety
        /// As [`File::at`], for slots of these types.
        #[inline(always)]
        #[allow(clippy::too_many_arguments)]
        pub unsafe fn $active<R: Lane, $($t: Lane),*>(file: File, mask: u32, d: u32, $($slot: u32,)* f: impl Fn($($t),*) -> R) {
            // SAFETY: passed on to the caller.
            unsafe {
                $(let $source = $t::source(file, $slot);)*
                let mut values = [R::ZERO; LANES];
                for i in active(mask) {
                    values[i] = f($($t::get($source, i)),*);
                }
                R::put(file, d, mask, &values);
            }
        }
    )*};
}

lane_loops! {
    each1, active1, A a pa;
    each2, active2, A a pa, B b pb;
    each3, active3, A a pa, B b pb, C c pc;
}

/// The lanes of a mask, in order.
#[inline(always)]
pub fn active(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        Some(lane)
    })
}

/// Memory aligned to cache lines, filled with zeros.
#[derive(Debug, Default)]
pub struct Buffer {
    lines: Vec<Line>,
}

#[derive(Debug, Clone, Copy)]
#[repr(C, align(128))]
struct Line([u8; 128]);

impl Buffer {
    pub fn new(bytes: usize) -> Self {
        Self { lines: vec![Line([0; 128]); bytes.div_ceil(128)] }
    }

    /// Makes room for this many bytes; what is there stays.
    pub fn grow(&mut self, bytes: usize) {
        if self.lines.len() * 128 < bytes {
            self.lines.resize(bytes.div_ceil(128), Line([0; 128]));
        }
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }

    /// The first `n` bytes.
    pub fn bytes(&self, n: usize) -> &[u8] {
        assert!(n <= self.lines.len() * 128, "a buffer of {} lines has no {n} bytes", self.lines.len());
        // SAFETY: lines are plain bytes, and there are enough.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), n) }
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.lines.as_mut_ptr().cast()
    }

    pub fn fill(&mut self, pattern: [u8; 2]) {
        let mut line = Line([0; 128]);
        for (i, b) in line.0.iter_mut().enumerate() {
            *b = pattern[i % 2];
        }
        self.lines.fill(line);
    }
}
