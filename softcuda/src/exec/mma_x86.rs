//! The frequent shapes of `mma.sync` with f32 accumulators on x86-64-v3: the same sums in the same order as in
//! [`super::mma`], in registers.
//!
//! Factors are widened to f32 in groups of 8 steps of k. Eight lanes' worth of a 16-bit register is 8 rows of 8 consecutive
//! k, as they lie; for tf32 two registers of 4 k each make such a row.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::lanes::File;
use crate::lower::ir::{Mma, MmaType, Reg};
use crate::ptx::ast::Type;

/// 8 rows of 8 f32.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Tile([[f32; 8]; 8]);

/// Runs the instruction if it is one of the shapes that are done here.
///
/// # Safety
/// The host must have these instruction sets; the operands must be of this file's kernel.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run(file: File, x: &Mma) -> bool {
    if (x.c_type, x.d_type) != (Type::F32, Type::F32) {
        return false;
    }
    // SAFETY: passed on to the caller.
    unsafe {
        match (x.a_type, x.b.len()) {
            (MmaType::BF16, 2) => product::<2>(file, x, |r, row| bf16_row(file, r, row)),
            (MmaType::BF16, 1) => product::<1>(file, x, |r, row| bf16_row(file, r, row)),
            (MmaType::F16, 2) => product::<2>(file, x, |r, row| f16_row(file, r, row)),
            (MmaType::F16, 1) => product::<1>(file, x, |r, row| f16_row(file, r, row)),
            (MmaType::TF32, 2) => tf32_product(file, x),
            _ => return false,
        }
    }
    true
}

/// Four lanes of a register: a row of 8 16-bit elements or of 4 tf32 ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quad(file: File, r: Reg, row: usize) -> __m128i {
    // SAFETY: a 32-bit register has 32 lanes.
    unsafe { _mm_load_si128(file.at(r.slot).cast::<__m128i>().add(row)) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bf16_row(file: File, r: Reg, row: usize) -> __m256 {
    // SAFETY: passed on to the caller.
    let bits = unsafe { quad(file, r, row) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn f16_row(file: File, r: Reg, row: usize) -> __m256 {
    // SAFETY: passed on to the caller.
    _mm256_cvtph_ps(unsafe { quad(file, r, row) })
}

/// The row of two registers of 4 k each, without the 13 bits that tf32 does not have.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tf32_row(file: File, low: Reg, high: Reg, row: usize) -> __m256 {
    // SAFETY: passed on to the caller.
    let bits = unsafe { _mm256_set_m128i(quad(file, high, row), quad(file, low, row)) };
    _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff_e000u32 as i32)))
}

/// `row(register, g)` widens row g of a register; `G` groups of 8 k.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product<const G: usize>(file: File, x: &Mma, row: impl Fn(Reg, usize) -> __m256) {
    let mut a = [[Tile([[0.0; 8]; 8]); 2]; G];
    let mut b = [Tile([[0.0; 8]; 8]); G];
    for group in 0..G {
        for upper in 0..2 {
            for r in 0..8 {
                store(&mut a[group][upper].0[r], row(x.a[2 * group + upper], r));
            }
        }
        b[group] = turned(|column| row(x.b[group], column));
    }
    // SAFETY: passed on to the caller.
    unsafe { accumulate(file, x, &a, &b) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tf32_product(file: File, x: &Mma) {
    let mut a = [[Tile([[0.0; 8]; 8]); 2]; 1];
    // SAFETY: passed on to the caller.
    unsafe {
        for upper in 0..2 {
            for r in 0..8 {
                store(&mut a[0][upper].0[r], tf32_row(file, x.a[upper], x.a[2 + upper], r));
            }
        }
        let b = [turned(|column| tf32_row(file, x.b[0], x.b[1], column))];
        accumulate(file, x, &a, &b);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut [f32; 8], v: __m256) {
    // SAFETY: eight f32 are 32 bytes; unaligned stores are allowed.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) }
}

/// Columns of B to rows of k, the even columns first: the order in which C's registers hold them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn turned(column: impl Fn(usize) -> __m256) -> Tile {
    let c = [0, 2, 4, 6, 1, 3, 5, 7].map(column);
    let pairs = [0, 2, 4, 6].map(|i| (_mm256_unpacklo_ps(c[i], c[i + 1]), _mm256_unpackhi_ps(c[i], c[i + 1])));
    let quads = [(0, 1), (2, 3)].map(|(i, j)| {
        let (p, q) = (pairs[i], pairs[j]);
        [
            _mm256_shuffle_ps::<0x44>(p.0, q.0),
            _mm256_shuffle_ps::<0xee>(p.0, q.0),
            _mm256_shuffle_ps::<0x44>(p.1, q.1),
            _mm256_shuffle_ps::<0xee>(p.1, q.1),
        ]
    });
    let mut rows = Tile([[0.0; 8]; 8]);
    for k in 0..4 {
        store(&mut rows.0[k], _mm256_permute2f128_ps::<0x20>(quads[0][k], quads[1][k]));
        store(&mut rows.0[k + 4], _mm256_permute2f128_ps::<0x31>(quads[0][k], quads[1][k]));
    }
    rows
}

/// C plus the product, eight rows at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn accumulate<const G: usize>(file: File, x: &Mma, a: &[[Tile; 2]; G], b: &[Tile; G]) {
    let nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff_ffff));
    for upper in 0..2 {
        // SAFETY: the slots are 32-bit ones of this kernel, aligned to 128 bytes.
        unsafe {
            let (even, odd) = (file.at(x.c[2 * upper].slot), file.at(x.c[2 * upper + 1].slot));
            let (even, odd) = (even.cast::<f32>(), odd.cast::<f32>());
            let mut sums: [__m256; 8] =
                [0, 1, 2, 3, 4, 5, 6, 7].map(|g| _mm256_loadu2_m128(odd.add(4 * g), even.add(4 * g)));
            for group in 0..G {
                let values = &a[group][upper].0;
                for k in 0..8 {
                    let column = _mm256_load_ps(b[group].0[k].as_ptr());
                    for g in 0..8 {
                        sums[g] = _mm256_fmadd_ps(_mm256_broadcast_ss(&values[g][k]), column, sums[g]);
                    }
                }
            }
            let (even, odd) = (file.at(x.d[2 * upper].slot), file.at(x.d[2 * upper + 1].slot));
            let (even, odd) = (even.cast::<f32>(), odd.cast::<f32>());
            for g in 0..8 {
                let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(sums[g], sums[g]);
                _mm256_storeu2_m128(odd.add(4 * g), even.add(4 * g), _mm256_blendv_ps(sums[g], nan, is_nan));
            }
        }
    }
}
