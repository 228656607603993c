//! Factors of 16 bits that lie along K, turned into rows of K with the vectors of x86-64-v3.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::tiles::padded;
use crate::lower::ir::MmaType;

/// B as [`super::tiles::fill_b`] leaves it, K-major.
///
/// # Safety
/// As for [`super::tiles::fill_b`]; the host must have these instruction sets.
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn fill_b(ty: MmaType, base: *const u8, chunks: &[u32], n: usize, to: *mut f32) {
    // SAFETY: passed on to the caller.
    unsafe {
        if ty == MmaType::F16 {
            fill(base, chunks, n, to, |v| _mm256_cvtph_ps(v));
        } else {
            fill(base, chunks, n, to, |v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v))));
        }
    }
}

/// Sixteen columns at a time, eight in each half of the vectors, the even ones of each eight first.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn fill(base: *const u8, chunks: &[u32], n: usize, to: *mut f32, widen: impl Fn(__m128i) -> __m256) {
    let stride = padded(n);
    for column in (0..stride).step_by(16) {
        for half in 0..2 {
            // SAFETY: passed on to the caller.
            let chunk = |c: usize| unsafe {
                match chunks.get(2 * c + half) {
                    Some(&at) => _mm_load_si128(base.add(at as usize).cast()),
                    None => _mm_setzero_si128(),
                }
            };
            let pair = |c: usize| _mm256_set_m128i(chunk(column + 8 + c), chunk(column + c));
            let v = [0, 2, 4, 6, 1, 3, 5, 7].map(pair);
            // Three rounds of interleaving transpose 8 x 8 in each half.
            let round = |v: [__m256i; 8]| -> [__m256i; 8] {
                std::array::from_fn(|i| {
                    let (a, b) = (v[i / 2], v[i / 2 + 4]);
                    if i % 2 == 0 { _mm256_unpacklo_epi16(a, b) } else { _mm256_unpackhi_epi16(a, b) }
                })
            };
            let rows = round(round(round(v)));
            for (k, row) in rows.into_iter().enumerate() {
                // SAFETY: passed on to the caller.
                unsafe {
                    let at = to.add((8 * half + k) * stride + column);
                    _mm256_storeu_ps(at, widen(_mm256_castsi256_si128(row)));
                    _mm256_storeu_ps(at.add(8), widen(_mm256_extracti128_si256::<1>(row)));
                }
            }
        }
    }
}
