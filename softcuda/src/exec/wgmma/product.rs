//! The sums: 16 rows of a warp's accumulators, N columns, K steps, one fused multiply-add in f32 for each product, in order
//! of K. Every instruction set computes the same bits.

use super::tiles::WARP_ROWS;
use crate::exec::interpreter::Isa;
use crate::exec::numeric::truncated::Adder;

/// Adds `a [16][k] * b [k][stride]` to `sums [16][stride]`.
///
/// # Safety
/// The arrays must have these extents, the stride be a multiple of 16, and `isa` be one that the host has.
pub unsafe fn accumulate(isa: Isa, sums: *mut f32, a: *const f32, b: *const f32, k: usize, stride: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        match isa {
            Isa::Baseline => plain(sums, a, b, k, stride),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(sums, a, b, k, stride),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512(sums, a, b, k, stride),
        }
    }
}

/// As [`accumulate`], with the sums of an adder.
///
/// # Safety
/// The arrays must have the extents given there.
pub unsafe fn truncated(adder: &Adder, sums: *mut f32, a: *const f32, b: *const f32, k: usize, stride: usize) {
    let mut factors = Vec::with_capacity(k);
    for row in 0..WARP_ROWS {
        for column in 0..stride {
            // SAFETY: passed on to the caller.
            unsafe {
                factors.clear();
                factors.extend((0..k).map(|step| (*a.add(row * k + step), *b.add(step * stride + column))));
                let sum = sums.add(row * stride + column);
                *sum = adder.dot(&factors, *sum);
            }
        }
    }
}

unsafe fn plain(sums: *mut f32, a: *const f32, b: *const f32, k: usize, stride: usize) {
    for row in 0..WARP_ROWS {
        for step in 0..k {
            for column in 0..stride {
                // SAFETY: passed on to the caller.
                unsafe {
                    let sum = sums.add(row * stride + column);
                    *sum = (*a.add(row * k + step)).mul_add(*b.add(step * stride + column), *sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(sums: *mut f32, a: *const f32, b: *const f32, k: usize, stride: usize) {
    use std::arch::x86_64::*;
    for column in (0..stride).step_by(8) {
        for upper in (0..WARP_ROWS).step_by(8) {
            // SAFETY: passed on to the caller.
            unsafe {
                let at = |row: usize| sums.add((upper + row) * stride + column);
                let mut s: [__m256; 8] = std::array::from_fn(|row| _mm256_loadu_ps(at(row)));
                for step in 0..k {
                    let b = _mm256_loadu_ps(b.add(step * stride + column));
                    for row in 0..8 {
                        s[row] = _mm256_fmadd_ps(_mm256_broadcast_ss(&*a.add((upper + row) * k + step)), b, s[row]);
                    }
                }
                for row in 0..8 {
                    _mm256_storeu_ps(at(row), s[row]);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(sums: *mut f32, a: *const f32, b: *const f32, k: usize, stride: usize) {
    // SAFETY: passed on to the caller.
    unsafe {
        match k {
            8 => avx512_of::<8>(sums, a, b, stride),
            16 => avx512_of::<16>(sums, a, b, stride),
            _ => avx512_of::<32>(sums, a, b, stride),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn avx512_of<const K: usize>(sums: *mut f32, a: *const f32, b: *const f32, stride: usize) {
    use std::arch::x86_64::*;
    for column in (0..stride).step_by(16) {
        // SAFETY: passed on to the caller.
        unsafe {
            let at = |row: usize| sums.add(row * stride + column);
            let mut s: [__m512; WARP_ROWS] = std::array::from_fn(|row| _mm512_loadu_ps(at(row)));
            for step in 0..K {
                let b = _mm512_loadu_ps(b.add(step * stride + column));
                for row in 0..WARP_ROWS {
                    s[row] = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(row * K + step)), b, s[row]);
                }
            }
            for row in 0..WARP_ROWS {
                _mm512_storeu_ps(at(row), s[row]);
            }
        }
    }
}
