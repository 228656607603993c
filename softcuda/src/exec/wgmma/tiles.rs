//! Factors of a product as f32, in the order in which they are multiplied.
//!
//! A is 64 rows of K. B is K rows of N columns, padded with zeros to a multiple of 16; within each 8 columns the even ones
//! come first, which is how the accumulators' registers hold them.

use crate::exec::lanes::{Buffer, LANES};
use crate::exec::numeric::{F16, eight_bit};
use crate::lower::ir::MmaType;

/// Rows of D that one warp computes.
pub const WARP_ROWS: usize = 16;

/// Columns as they are kept, padding included.
#[inline(always)]
pub fn padded(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Place of a column.
#[inline(always)]
pub fn place(column: usize) -> usize {
    column / 8 * 8 + column % 8 / 2 + 4 * (column % 2)
}

#[derive(Debug, Default)]
pub struct Tiles {
    /// `[64][k]`; empty where A comes from registers.
    pub a: Buffer,
    /// `[k][padded(n)]`
    pub b: Buffer,
    /// `[16][padded(n)]`, for sums of integers.
    pub sums: Buffer,
}

impl Tiles {
    pub fn reserve(&mut self, k: usize, n: usize) {
        self.a.grow(4 * WARP_ROWS * k * 4);
        self.b.grow(k * padded(n) * 4);
        self.sums.grow(WARP_ROWS * padded(n) * 4);
    }
}

/// An element type: how 16 bytes become f32, and how many.
pub trait Element {
    const COUNT: usize;
    /// # Safety
    /// `from` must be valid for 16 aligned bytes.
    unsafe fn widen(from: *const u8) -> [f32; 16];
}

macro_rules! element {
    ($name:ident, $storage:ty, $count:literal, $f:expr) => {
        pub struct $name;

        impl Element for $name {
            const COUNT: usize = $count;

            #[inline(always)]
            unsafe fn widen(from: *const u8) -> [f32; 16] {
                // SAFETY: passed on to the caller.
                let bits: [$storage; $count] = unsafe { *from.cast() };
                let mut values = [0.0; 16];
                for i in 0..$count {
                    values[i] = ($f)(bits[i]);
                }
                values
            }
        }
    };
}

element!(Half, u16, 8, |x: u16| F16(x).to_f32());
element!(Brain, u16, 8, |x: u16| f32::from_bits(u32::from(x) << 16));
element!(Tensor32, u32, 4, |x: u32| f32::from_bits(x & 0xffff_e000));
element!(E4m3, u8, 16, eight_bit::e4m3);
element!(E5m2, u8, 16, eight_bit::e5m2);
element!(Signed, u8, 16, |x: u8| f32::from(x as i8));
element!(Unsigned, u8, 16, |x: u8| f32::from(x));

/// Calls `$body` with `$T` standing for the element type.
macro_rules! with_element {
    ($ty:expr, $T:ident, $body:expr) => {
        match $ty {
            MmaType::F16 => {
                type $T = Half;
                $body
            }
            MmaType::BF16 => {
                type $T = Brain;
                $body
            }
            MmaType::TF32 => {
                type $T = Tensor32;
                $body
            }
            MmaType::E4M3 => {
                type $T = E4m3;
                $body
            }
            MmaType::E5M2 => {
                type $T = E5m2;
                $body
            }
            MmaType::S8 => {
                type $T = Signed;
                $body
            }
            MmaType::U8 => {
                type $T = Unsigned;
                $body
            }
            MmaType::F64 => unreachable!("no warpgroup product is in f64"),
        }
    };
}

/// A from the chunks of [`super::descriptor::Descriptor::chunks`].
///
/// # Safety
/// Every chunk must be within the memory at `base`, and `to` hold 64 rows.
#[inline(always)]
pub unsafe fn fill_a(ty: MmaType, base: *const u8, chunks: &[u32], mn_major: bool, to: *mut f32) {
    with_element!(ty, T, {
        // SAFETY: passed on to the caller.
        unsafe {
            let k = 2 * T::COUNT;
            if mn_major {
                for (i, &chunk) in chunks.iter().enumerate() {
                    let (step, first) = (i / 8, i % 8 * 8);
                    let values = T::widen(base.add(chunk as usize));
                    for e in 0..8 {
                        *to.add((first + e) * k + step) = values[e];
                    }
                }
            } else {
                for (i, &chunk) in chunks.iter().enumerate() {
                    let values = T::widen(base.add(chunk as usize));
                    std::ptr::copy_nonoverlapping(values.as_ptr(), to.add(i * T::COUNT), T::COUNT);
                }
            }
        }
    });
}

/// B likewise, `n` columns.
///
/// # Safety
/// As for [`fill_a`].
#[inline(always)]
pub unsafe fn fill_b(ty: MmaType, base: *const u8, chunks: &[u32], mn_major: bool, n: usize, to: *mut f32) {
    let stride = padded(n);
    with_element!(ty, T, {
        // SAFETY: passed on to the caller.
        unsafe {
            if mn_major {
                let across = n / 8;
                for step in 0..2 * T::COUNT {
                    for c in 0..across {
                        let v = T::widen(base.add(chunks[step * across + c] as usize));
                        let ordered = [v[0], v[2], v[4], v[6], v[1], v[3], v[5], v[7]];
                        to.add(step * stride + 8 * c).cast::<[f32; 8]>().write_unaligned(ordered);
                    }
                }
            } else {
                for column in 0..n {
                    let at = to.add(place(column));
                    for half in 0..2 {
                        let values = T::widen(base.add(chunks[2 * column + half] as usize));
                        for e in 0..T::COUNT {
                            *at.add((half * T::COUNT + e) * stride) = values[e];
                        }
                    }
                }
            }
            if stride != n {
                for step in 0..2 * T::COUNT {
                    to.add(step * stride + n).cast::<[f32; 8]>().write_unaligned([0.0; 8]);
                }
            }
        }
    });
}

/// A warp's 16 rows of A from its registers: register r holds rows g + 8 (r % 2) and, of each 4 in a row, the elements of
/// one 32-bit word at word 4 (r / 2) + t of the row (PTX ISA 9.7.15.5.1.1).
#[inline(always)]
pub fn a_from_registers(ty: MmaType, registers: &[[u32; LANES]; 4]) -> [f32; WARP_ROWS * 32] {
    let mut a = [0.0; WARP_ROWS * 32];
    with_element!(ty, T, {
        let k = 2 * T::COUNT;
        for upper in 0..2 {
            for half in 0..2 {
                for g in 0..8 {
                    let words: &[u32] = &registers[2 * half + upper][4 * g..4 * g + 4];
                    let chunk = Chunk([words[0], words[1], words[2], words[3]]);
                    // SAFETY: a chunk is 16 aligned bytes.
                    let values = unsafe { T::widen(chunk.0.as_ptr().cast()) };
                    let at = (8 * upper + g) * k + half * T::COUNT;
                    a[at..at + T::COUNT].copy_from_slice(&values[..T::COUNT]);
                }
            }
        }
    });
    a
}

#[repr(align(16))]
struct Chunk([u32; 4]);
