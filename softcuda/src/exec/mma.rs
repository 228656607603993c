//! `mma.sync` (PTX ISA 9.7.14.5). With g = lane / 4 and t = lane % 4, a register of A holds row g (or g + 8), one of B
//! column g, and one of C row g and columns 2t and 2t + 1.
//!
//! Numerics: products are exact, and f32 accumulators take them one by one in order of k, each step rounded to nearest (one
//! fused multiply-add). Hardware sums several products at once with truncation and fewer guard bits, so that results agree
//! with it to a few units in the last place of the largest term, not bit by bit; [`Products::Truncated`] adds as it does
//! (`numeric/truncated.rs`). f16 accumulators are rounded once at the end.
//! tf32 factors are read without their low 13 bits, as the manual says.

use super::interpreter::Isa;
use super::lanes::{FULL, File, LANES};
use super::numeric::truncated::Adder;
use super::numeric::{F16, eight_bit, float};
use super::{Config, Products};
use crate::lower::ir::{Mma, MmaType, Reg};
use crate::ptx::ast::Type;

/// Runs one instruction of a whole warp.
///
/// # Safety
/// `isa` must be one that the host has; the operands must be of this file's kernel.
pub unsafe fn run(isa: Isa, config: &Config, file: File, x: &Mma) {
    // SAFETY: passed on to the caller.
    unsafe {
        if config.products == Products::Truncated {
            let half = x.c_type == Type::F16 || x.d_type == Type::F16;
            return run_body(file, x, Some(&Adder::mma(config.compute_capability, x.a_type, x.b_type, half)));
        }
        match isa {
            Isa::Baseline => run_body(file, x, None),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => {
                if !super::mma_x86::run(file, x) {
                    run_avx2(file, x);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn run_avx2(file: File, x: &Mma) {
    // SAFETY: passed on to the caller.
    unsafe { run_body(file, x, None) }
}

/// With an adder, sums are its own.
#[inline(always)]
unsafe fn run_body(file: File, x: &Mma, adder: Option<&Adder>) {
    // SAFETY: passed on to the caller.
    unsafe {
        match x.a_type {
            MmaType::BF16 => {
                let split = |v| [f32::from_bits(v << 16), f32::from_bits(v & 0xffff_0000)];
                float_mma(file, x, adder, split, split);
            }
            MmaType::F16 => {
                let split = |v| [F16(v as u16).to_f32(), F16((v >> 16) as u16).to_f32()];
                float_mma(file, x, adder, split, split);
            }
            MmaType::TF32 => {
                let split = |v| [f32::from_bits(v & 0xffff_e000)];
                float_mma(file, x, adder, split, split);
            }
            MmaType::E4M3 | MmaType::E5M2 => {
                let table = |ty| if ty == MmaType::E4M3 { &eight_bit::E4M3 } else { &eight_bit::E5M2 };
                let (a, b) = (table(x.a_type), table(x.b_type));
                let split = |table: &'static [f32; 256]| move |v: u32| v.to_le_bytes().map(|i| table[usize::from(i)]);
                float_mma(file, x, adder, split(a), split(b));
            }
            MmaType::F64 => double_mma(file, x),
            MmaType::S8 | MmaType::U8 => integer_mma(file, x),
        }
    }
}

/// Columns of an accumulator row as they are kept: the even ones first, as they lie in the registers.
const COLUMNS: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// `H` elements to a register: 4 of fp8, 2 of 16 bits or one tf32.
#[inline(always)]
unsafe fn float_mma<const H: usize>(
    file: File,
    x: &Mma,
    adder: Option<&Adder>,
    split_a: impl Fn(u32) -> [f32; H],
    split_b: impl Fn(u32) -> [f32; H],
) {
    let groups = x.b.len();
    // a[group][half][4 row + t], b[group][half][t][column]; k = (4 group + t) H + half.
    let mut a = [[[0f32; 64]; H]; 2];
    let mut b = [[[[0f32; 8]; 4]; H]; 2];
    for group in 0..groups {
        for half_rows in 0..2 {
            // SAFETY: passed on to the caller.
            let lanes = unsafe { file.lanes32(x.a[2 * group + half_rows].slot) };
            for lane in 0..LANES {
                let values = split_a(lanes[lane]);
                for h in 0..H {
                    a[group][h][32 * half_rows + lane] = values[h];
                }
            }
        }
        // SAFETY: passed on to the caller.
        let lanes = unsafe { file.lanes32(x.b[group].slot) };
        let mut turned = [[0u32; 8]; 4];
        for t in 0..4 {
            for j in 0..8 {
                turned[t][j] = lanes[4 * COLUMNS[j] + t];
            }
        }
        for t in 0..4 {
            for j in 0..8 {
                let values = split_b(turned[t][j]);
                for h in 0..H {
                    b[group][h][t][j] = values[h];
                }
            }
        }
    }
    // SAFETY: passed on to the caller.
    let mut rows = unsafe { accumulators(file, &x.c, x.c_type) };
    if let Some(adder) = adder {
        let mut factors = Vec::with_capacity(4 * H * groups);
        for (r, row) in rows.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                factors.clear();
                for group in 0..groups {
                    for t in 0..4 {
                        factors.extend((0..H).map(|h| (a[group][h][4 * r + t], b[group][h][t][j])));
                    }
                }
                *sum = adder.dot(&factors, *sum);
            }
        }
        // SAFETY: passed on to the caller.
        unsafe { deliver(file, &x.d, x.d_type, &rows) }
        return;
    }
    for upper in 0..2 {
        let mut sums: [[f32; 8]; 8] = [[0.0; 8]; 8];
        sums.copy_from_slice(&rows[8 * upper..8 * upper + 8]);
        for group in 0..groups {
            for t in 0..4 {
                for h in 0..H {
                    let column = &b[group][h][t];
                    let values = &a[group][h];
                    for r in 0..8 {
                        let value = values[4 * (8 * upper + r) + t];
                        for j in 0..8 {
                            sums[r][j] = value.mul_add(column[j], sums[r][j]);
                        }
                    }
                }
            }
        }
        rows[8 * upper..8 * upper + 8].copy_from_slice(&sums);
    }
    // SAFETY: passed on to the caller.
    unsafe { deliver(file, &x.d, x.d_type, &rows) }
}

/// C as 16 rows with columns in the order of [`COLUMNS`].
#[inline(always)]
unsafe fn accumulators(file: File, regs: &[Reg], ty: Type) -> [[f32; 8]; 16] {
    let mut rows = [[0f32; 8]; 16];
    for upper in 0..2 {
        // SAFETY: passed on to the caller.
        unsafe {
            if ty == Type::F32 {
                let (even, odd) = (file.lanes32(regs[2 * upper].slot), file.lanes32(regs[2 * upper + 1].slot));
                for g in 0..8 {
                    for t in 0..4 {
                        rows[8 * upper + g][t] = f32::from_bits(even[4 * g + t]);
                        rows[8 * upper + g][4 + t] = f32::from_bits(odd[4 * g + t]);
                    }
                }
            } else {
                let pairs = file.lanes32(regs[upper].slot);
                for (lane, &pair) in pairs.iter().enumerate() {
                    rows[8 * upper + lane / 4][lane % 4] = F16(pair as u16).to_f32();
                    rows[8 * upper + lane / 4][4 + lane % 4] = F16((pair >> 16) as u16).to_f32();
                }
            }
        }
    }
    rows
}

#[inline(always)]
unsafe fn deliver(file: File, regs: &[Reg], ty: Type, rows: &[[f32; 8]; 16]) {
    for upper in 0..2 {
        // SAFETY: passed on to the caller.
        unsafe {
            if ty == Type::F32 {
                let (mut even, mut odd) = ([0; LANES], [0; LANES]);
                for g in 0..8 {
                    for t in 0..4 {
                        even[4 * g + t] = float::canon(rows[8 * upper + g][t]).to_bits();
                        odd[4 * g + t] = float::canon(rows[8 * upper + g][4 + t]).to_bits();
                    }
                }
                file.store32(regs[2 * upper].slot, FULL, &even);
                file.store32(regs[2 * upper + 1].slot, FULL, &odd);
            } else {
                let pairs: [u32; LANES] = std::array::from_fn(|lane| {
                    let row = &rows[8 * upper + lane / 4];
                    let half = |j: usize| u32::from(F16::from_f32(row[j]).0);
                    half(lane % 4) | half(4 + lane % 4) << 16
                });
                file.store32(regs[upper].slot, FULL, &pairs);
            }
        }
    }
}

/// Register r of A holds row g (+ 8 for odd r, of 16 rows) and k = 4 (r / 2) + t, of B k = 4r + t and column g. The manual's
/// operations on f64 are those of IEEE 754, each rounded to nearest.
#[inline(always)]
unsafe fn double_mma(file: File, x: &Mma) {
    let halves = x.m as usize / 8;
    // SAFETY: passed on to the caller.
    unsafe {
        let wide = |r: &Reg| file.lanes64(r.slot).map(f64::from_bits);
        let a: Vec<_> = x.a.iter().map(wide).collect();
        let b: Vec<_> = x.b.iter().map(wide).collect();
        let c: Vec<_> = x.c.iter().map(wide).collect();
        for (i, reg) in x.d.iter().enumerate() {
            let (upper, odd) = (i / 2, i % 2);
            let d = std::array::from_fn(|lane| {
                let (row, column) = (lane / 4, 2 * (lane % 4) + odd);
                let step = |sum: f64, k: usize| {
                    let group = k / 4;
                    a[halves * group + upper][4 * row + k % 4].mul_add(b[group][4 * column + k % 4], sum)
                };
                (0..4 * b.len()).fold(c[i][lane], step).to_bits()
            });
            file.store64(reg.slot, FULL, &d);
        }
    }
}

/// Four 8-bit elements to a register, k = 4t + i (+ 16); sums wrap, or clamp with `.satfinite`.
#[inline(always)]
unsafe fn integer_mma(file: File, x: &Mma) {
    let element = |ty: MmaType, v: u32, i: u32| {
        let byte = (v >> (8 * i)) as u8;
        if ty == MmaType::S8 { i64::from(byte as i8) } else { i64::from(byte) }
    };
    let halves = x.m as usize / 8;
    // SAFETY: passed on to the caller.
    unsafe {
        let a: Vec<_> = x.a.iter().map(|r| file.lanes32(r.slot)).collect();
        let b: Vec<_> = x.b.iter().map(|r| file.lanes32(r.slot)).collect();
        let c: Vec<_> = x.c.iter().map(|r| file.lanes32(r.slot)).collect();
        for (i, reg) in x.d.iter().enumerate() {
            let (upper, odd) = (i / 2, i % 2);
            let d: [u32; LANES] = std::array::from_fn(|lane| {
                let (row, column) = (lane / 4, 2 * (lane % 4) + odd);
                let mut sum = i64::from(c[i][lane] as i32);
                for group in 0..b.len() {
                    for t in 0..4 {
                        let (p, q) = (a[group * halves + upper][4 * row + t], b[group][4 * column + t]);
                        sum += (0..4).map(|i| element(x.a_type, p, i) * element(x.b_type, q, i)).sum::<i64>();
                    }
                }
                if x.saturate { sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as u32 } else { sum as u32 }
            });
            file.store32(reg.slot, FULL, &d);
        }
    }
}
