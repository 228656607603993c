//! `ldmatrix`, `stmatrix` and `movmatrix` (PTX ISA 9.7.14.5): matrices of 8 rows of 8 16-bit elements. Lane 8i + r holds the address of
//! row r of matrix i; lane l holds elements (l / 4, 2 (l % 4)) and the next one, rows and columns exchanged for `.trans`.

use super::access::addresses;
use super::lanes::{FULL, File, LANES};
use super::observe::{AccessKind, Touch};
use super::state::{Machine, Outcome};
use crate::lower::ir::MatrixMove;
use crate::ptx::ast::Space;

/// Bytes of a matrix row.
const ROW: u32 = 16;

pub fn run(m: &mut Machine, file: File, x: &MatrixMove, store: bool, pc: u32) -> Outcome<()> {
    let at = addresses(file, &x.address);
    let count = x.regs.len();
    // Only the first 8 lanes for each matrix give addresses.
    let mask = if count == 4 { FULL } else { (1 << (8 * count)) - 1 };
    let space = if x.generic { None } else { Some(Space::Shared) };
    let places = m.resolve(space, &at, mask, ROW)?;
    let kind = if store { AccessKind::Write } else { AccessKind::Read };
    m.observe(&Touch::weak(kind, space, &at, mask, ROW), pc);
    // SAFETY: `resolve` has checked all rows; slots are those of this kernel.
    unsafe {
        for (i, reg) in x.regs.iter().enumerate() {
            let rows = &places[8 * i..8 * i + 8];
            if store {
                store_one(rows, &file.lanes32(reg.slot), x.transposed);
            } else {
                file.store32(reg.slot, FULL, &load_one(rows, x.transposed));
            }
        }
    }
    Ok(())
}

/// `movmatrix` (PTX ISA 9.7.14.5.17): the matrix in a register, transposed.
///
/// # Safety
/// The slots must be 32-bit ones of this file's kernel.
pub unsafe fn transpose(file: File, d: u32, a: u32) {
    // SAFETY: passed on to the caller.
    unsafe {
        let pairs = file.lanes32(a);
        let element = |row: usize, column: usize| pairs[4 * row + column / 2] >> (16 * (column % 2)) & 0xffff;
        let turned = std::array::from_fn(|lane| {
            let (row, column) = (lane / 4, lane % 4 * 2);
            element(column, row) | element(column + 1, row) << 16
        });
        file.store32(d, FULL, &turned);
    }
}

/// # Safety
/// Every row must be valid for 16 aligned bytes.
unsafe fn load_one(rows: &[u64], transposed: bool) -> [u32; LANES] {
    let mut d = [0; LANES];
    if transposed {
        for (row, &place) in rows.iter().enumerate() {
            // SAFETY: passed on to the caller.
            let elements: [u16; 8] = unsafe { *(place as *const [u16; 8]) };
            for (column, &e) in elements.iter().enumerate() {
                d[4 * column + row / 2] |= u32::from(e) << (16 * (row % 2));
            }
        }
    } else {
        for (row, &place) in rows.iter().enumerate() {
            // SAFETY: passed on to the caller.
            let pairs: [u32; 4] = unsafe { *(place as *const [u32; 4]) };
            d[4 * row..4 * row + 4].copy_from_slice(&pairs);
        }
    }
    d
}

/// # Safety
/// Every row must be valid for 16 aligned bytes.
unsafe fn store_one(rows: &[u64], values: &[u32; LANES], transposed: bool) {
    for (row, &place) in rows.iter().enumerate() {
        let elements: [u16; 8] = std::array::from_fn(|column| {
            let (r, c) = if transposed { (column, row) } else { (row, column) };
            (values[4 * r + c / 2] >> (16 * (c % 2))) as u16
        });
        // SAFETY: passed on to the caller.
        unsafe { *(place as *mut [u16; 8]) = elements };
    }
}
