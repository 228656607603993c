//! Reductions that the bulk copies make of single elements (PTX ISA 9.7.9.25.4.2): each is atomic by itself.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

use super::atomic::combine;
use super::numeric::{BF16, F16};
use crate::lower::ir::AtomOp;
use crate::ptx::ast::Type;

/// Combines the element at `place` with `value`.
///
/// # Safety
/// The place must be valid for atomic access of the type's size.
pub unsafe fn element(op: AtomOp, ty: Type, place: u64, value: u64) {
    // SAFETY: passed on to the caller.
    unsafe {
        match ty.bytes() {
            2 => {
                let update = |old: u16| Some(combined(op, ty, old.into(), value) as u16);
                let _ = AtomicU16::from_ptr(place as *mut u16).fetch_update(Relaxed, Relaxed, update);
            }
            4 => {
                let update = |old: u32| Some(combined(op, ty, old.into(), value) as u32);
                let _ = AtomicU32::from_ptr(place as *mut u32).fetch_update(Relaxed, Relaxed, update);
            }
            _ => {
                let update = |old: u64| Some(combined(op, ty, old, value));
                let _ = AtomicU64::from_ptr(place as *mut u64).fetch_update(Relaxed, Relaxed, update);
            }
        }
    }
}

fn combined(op: AtomOp, ty: Type, old: u64, value: u64) -> u64 {
    let half = |bits: u64| match ty {
        Type::BF16 => BF16(bits as u16).to_f32(),
        _ => F16(bits as u16).to_f32(),
    };
    match (op, ty) {
        // As `min` and `max` without `.NaN` (PTX ISA 9.7.4.7): a number is preferred to NaN, and -0 is less than +0.
        (AtomOp::Min | AtomOp::Max, Type::F16 | Type::BF16) => {
            let (a, b) = (half(old), half(value));
            let smaller = if a == b { a.is_sign_negative() } else { a < b };
            match (a.is_nan(), b.is_nan()) {
                (true, true) => 0x7fff,
                (true, false) => value,
                (false, true) => old,
                _ if smaller == (op == AtomOp::Min) => old,
                _ => value,
            }
        }
        _ => combine(op, ty, old, value, 0, true),
    }
}
