//! Pieces of memory to registers and back with AVX-512: two or four words of every lane, which lie one lane after another.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::lanes::{File, LANES};

/// Two words a lane.
///
/// # Safety
/// The piece must be readable and the slots 32-bit ones of this file's kernel; the host must have the instructions.
#[target_feature(enable = "avx512f")]
pub unsafe fn load2(file: File, slots: [u32; 2], place: *const __m512i) {
    let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for half in 0..LANES / 16 {
        // SAFETY: passed on to the caller.
        unsafe {
            let (a, b) = (_mm512_loadu_si512(place.add(2 * half)), _mm512_loadu_si512(place.add(2 * half + 1)));
            for (slot, pick) in slots.into_iter().zip([even, odd]) {
                _mm512_storeu_si512(file.at(slot).cast::<__m512i>().add(half), _mm512_permutex2var_epi32(a, pick, b));
            }
        }
    }
}

/// Four words a lane.
///
/// # Safety
/// As for [`load2`].
#[target_feature(enable = "avx512f")]
pub unsafe fn load4(file: File, slots: [u32; 4], place: *const __m512i) {
    // Of eight lanes, one word of each, then another.
    let first = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    for half in 0..LANES / 16 {
        // SAFETY: passed on to the caller.
        unsafe {
            let z: [__m512i; 4] = std::array::from_fn(|i| _mm512_loadu_si512(place.add(4 * half + i)));
            for (pair, pick) in [first, second].into_iter().enumerate() {
                let low = _mm512_permutex2var_epi32(z[0], pick, z[1]);
                let high = _mm512_permutex2var_epi32(z[2], pick, z[3]);
                let at = |r: usize| file.at(slots[2 * pair + r]).cast::<__m512i>().add(half);
                _mm512_storeu_si512(at(0), _mm512_shuffle_i64x2::<0x44>(low, high));
                _mm512_storeu_si512(at(1), _mm512_shuffle_i64x2::<0xee>(low, high));
            }
        }
    }
}

/// Two words a lane.
///
/// # Safety
/// As for [`load2`], for a piece that is writable.
#[target_feature(enable = "avx512f")]
pub unsafe fn store2(file: File, slots: [u32; 2], place: *mut __m512i) {
    let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for half in 0..LANES / 16 {
        // SAFETY: passed on to the caller.
        unsafe {
            let [a, b] = slots.map(|s| _mm512_loadu_si512(file.at(s).cast::<__m512i>().add(half)));
            _mm512_storeu_si512(place.add(2 * half), _mm512_permutex2var_epi32(a, low, b));
            _mm512_storeu_si512(place.add(2 * half + 1), _mm512_permutex2var_epi32(a, high, b));
        }
    }
}

/// Four words a lane.
///
/// # Safety
/// As for [`store2`].
#[target_feature(enable = "avx512f")]
pub unsafe fn store4(file: File, slots: [u32; 4], place: *mut __m512i) {
    let low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    // Pairs of words of four lanes each.
    let front = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
    let back = _mm512_add_epi64(front, _mm512_set1_epi64(4));
    for half in 0..LANES / 16 {
        // SAFETY: passed on to the caller.
        unsafe {
            let [a, b, c, d] = slots.map(|s| _mm512_loadu_si512(file.at(s).cast::<__m512i>().add(half)));
            for (i, pick) in [low, high].into_iter().enumerate() {
                let (ab, cd) = (_mm512_permutex2var_epi32(a, pick, b), _mm512_permutex2var_epi32(c, pick, d));
                let at = |j: usize| place.add(4 * half + 2 * i + j);
                _mm512_storeu_si512(at(0), _mm512_permutex2var_epi64(ab, front, cd));
                _mm512_storeu_si512(at(1), _mm512_permutex2var_epi64(ab, back, cd));
            }
        }
    }
}
