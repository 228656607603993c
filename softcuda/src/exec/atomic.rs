//! `atom` and `red` (PTX ISA 9.7.13.5). Global memory is shared with other host threads, so every operation on it is one of
//! the host's atomic operations; floating-point ones are compare-and-swap loops.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};

use super::access::{addresses, get, put, space_of};
use super::fault::FaultKind;
use super::lanes::{File, LANES, active};
use super::numeric::float;
use super::numeric::rounding::{Format, Round, add_odd, round};
use super::numeric::{BF16, BF16x2, F16, F16x2};
use super::observe::{AccessKind, Engine, Touch};
use super::state::{Machine, Outcome, Raw};
use crate::lower::ir::{Atom, AtomOp, AtomWide, Reg};
use crate::ptx::ast::{Space, Type};

pub fn run(m: &mut Machine, file: File, x: &Atom, mask: u32, pc: u32) -> Outcome<()> {
    let at = addresses(file, &x.address);
    if x.space.is_none()
        && let Some(i) = active(mask).find(|&i| matches!(space_of(at[i]), Space::Local | Space::Param))
    {
        let message = format!("an atomic operation at {:#x}, which is neither global nor shared", at[i]);
        return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << i, message));
    }
    let places = m.resolve(x.space, &at, mask, x.ty.bytes())?;
    if x.align > x.ty.bytes()
        && let Some(i) = active(mask).find(|&i| places[i] % u64::from(x.align) != 0)
    {
        let message = format!("a vector of {} bytes at {:#x}: not a multiple of its size", x.align, at[i]);
        return Err(Raw::new(FaultKind::MisalignedAddress, 1 << i, message));
    }
    let touch = Touch {
        kind: AccessKind::Atomic,
        engine: Engine::Thread,
        space: x.space,
        addresses: &at,
        mask,
        bytes: x.ty.bytes(),
        order: x.order,
        scope: x.scope,
    };
    m.observe(&touch, pc);
    let b = get(file, x.b);
    let c = x.c.map_or([0; LANES], |c| get(file, c));
    let mut old = [0; LANES];
    for i in active(mask) {
        // f32 additions flush subnormals in global memory, not in shared memory.
        let global = x.space.unwrap_or_else(|| space_of(at[i])) == Space::Global;
        // SAFETY: `resolve` has checked that the place is live and aligned.
        old[i] = unsafe { one(x, places[i], b[i], c[i], global) };
    }
    if let Some(d) = x.d {
        put(file, d, mask, &old);
    }
    m.observe_performed(&touch, pc);
    Ok(())
}

/// Held while 16 bytes are exchanged, and while they are read or written in an order.
pub static WIDE: Mutex<()> = Mutex::new(());

/// `atom` of 128 bits.
pub fn run_wide(m: &mut Machine, file: File, x: &AtomWide, mask: u32, pc: u32) -> Outcome<()> {
    let at = addresses(file, &x.address);
    if x.space.is_none()
        && let Some(i) = active(mask).find(|&i| matches!(space_of(at[i]), Space::Local | Space::Param))
    {
        let message = format!("an atomic operation at {:#x}, which is neither global nor shared", at[i]);
        return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << i, message));
    }
    let places = m.resolve(x.space, &at, mask, 16)?;
    let touch = Touch {
        kind: AccessKind::Atomic,
        engine: Engine::Thread,
        space: x.space,
        addresses: &at,
        mask,
        bytes: 16,
        order: x.order,
        scope: x.scope,
    };
    m.observe(&touch, pc);
    let whole = |[low, high]: [Reg; 2]| {
        let (low, high) = (get(file, low), get(file, high));
        std::array::from_fn::<u128, LANES, _>(|i| u128::from(low[i]) | u128::from(high[i]) << 64)
    };
    let (value, compare) = (whole(x.value), x.compare.map(whole));
    let mut old = [[0; LANES]; 2];
    for i in active(mask) {
        let _held = WIDE.lock().unwrap_or_else(|e| e.into_inner());
        let place = places[i] as *mut u128;
        // SAFETY: `resolve` has checked that the place is live and aligned.
        let before = unsafe { place.read_volatile() };
        if compare.is_none_or(|c| c[i] == before) {
            // SAFETY: as above.
            unsafe { place.write_volatile(value[i]) };
        }
        (old[0][i], old[1][i]) = (before as u64, (before >> 64) as u64);
    }
    for (d, old) in x.d.iter().flatten().zip(&old) {
        put(file, *d, mask, old);
    }
    Ok(())
}

/// # Safety
/// The place must be valid for atomic access of the type's size.
unsafe fn one(x: &Atom, place: u64, b: u64, c: u64, global: bool) -> u64 {
    let f = |old: u64| combine(x.op, x.ty, old, b, c, global);
    // SAFETY: passed on to the caller.
    unsafe {
        match x.ty.bytes() {
            2 => {
                let a = AtomicU16::from_ptr(place as *mut u16);
                let update = a.fetch_update(SeqCst, SeqCst, |old| Some(f(old.into()) as u16));
                update.unwrap_or_else(|old| old).into()
            }
            4 => {
                let a = AtomicU32::from_ptr(place as *mut u32);
                match (x.op, x.ty) {
                    (AtomOp::Add, Type::U32 | Type::S32) => a.fetch_add(b as u32, SeqCst),
                    (AtomOp::Exch, _) => a.swap(b as u32, SeqCst),
                    (AtomOp::Cas, _) => a.compare_exchange(b as u32, c as u32, SeqCst, SeqCst).unwrap_or_else(|v| v),
                    _ => a.fetch_update(SeqCst, SeqCst, |old| Some(f(old.into()) as u32)).unwrap_or_else(|old| old),
                }
                .into()
            }
            _ => {
                let a = AtomicU64::from_ptr(place as *mut u64);
                match (x.op, x.ty) {
                    (AtomOp::Add, Type::U64) => a.fetch_add(b, SeqCst),
                    (AtomOp::Exch, _) => a.swap(b, SeqCst),
                    (AtomOp::Cas, _) => a.compare_exchange(b, c, SeqCst, SeqCst).unwrap_or_else(|v| v),
                    _ => a.fetch_update(SeqCst, SeqCst, |old| Some(f(old))).unwrap_or_else(|old| old),
                }
            }
        }
    }
}

/// The new value.
pub fn combine(op: AtomOp, ty: Type, old: u64, b: u64, c: u64, global: bool) -> u64 {
    let (x, y) = (old as u32, b as u32);
    match (op, ty) {
        (AtomOp::Add, Type::F32) => {
            let flush = |v: f32| if global { float::ftz(v) } else { v };
            float::canon(flush(flush(f32::from_bits(x)) + flush(f32::from_bits(y)))).to_bits().into()
        }
        (AtomOp::Add, Type::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (AtomOp::Add, Type::F16) => add_f16(F16(x as u16), F16(y as u16)).0.into(),
        (AtomOp::Add, Type::BF16) => add_bf16(BF16(x as u16), BF16(y as u16)).0.into(),
        (AtomOp::Add, Type::F16x2) => {
            let (x, y) = (F16x2(x), F16x2(y));
            F16x2::new(add_f16(x.low(), y.low()), add_f16(x.high(), y.high())).0.into()
        }
        (AtomOp::Add, Type::BF16x2) => {
            let (x, y) = (BF16x2(x), BF16x2(y));
            BF16x2::new(add_bf16(x.low(), y.low()), add_bf16(x.high(), y.high())).0.into()
        }
        (AtomOp::Min | AtomOp::Max, Type::F16 | Type::F16x2 | Type::BF16 | Type::BF16x2) => {
            let bf16 = matches!(ty, Type::BF16 | Type::BF16x2);
            let low = extremum(op, bf16, x, y);
            let pair = matches!(ty, Type::F16x2 | Type::BF16x2);
            u64::from(if pair { low | extremum(op, bf16, x >> 16, y >> 16) << 16 } else { low })
        }
        (AtomOp::Add, _) => old.wrapping_add(b),
        (AtomOp::Min, Type::S32) => (x as i32).min(y as i32) as u32 as u64,
        (AtomOp::Max, Type::S32) => (x as i32).max(y as i32) as u32 as u64,
        (AtomOp::Min, Type::S64) => (old as i64).min(b as i64) as u64,
        (AtomOp::Max, Type::S64) => (old as i64).max(b as i64) as u64,
        (AtomOp::Min, _) => old.min(b),
        (AtomOp::Max, _) => old.max(b),
        (AtomOp::Inc, _) => {
            if x >= y {
                0
            } else {
                u64::from(x + 1)
            }
        }
        (AtomOp::Dec, _) => {
            if x == 0 || x > y {
                u64::from(y)
            } else {
                u64::from(x - 1)
            }
        }
        (AtomOp::Exch, _) => b,
        (AtomOp::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (AtomOp::And, _) => old & b,
        (AtomOp::Or, _) => old | b,
        (AtomOp::Xor, _) => old ^ b,
    }
}

/// The lesser or greater of two halves; the other one where one is NaN.
fn extremum(op: AtomOp, bf16: bool, x: u32, y: u32) -> u32 {
    let value = |v: u32| if bf16 { BF16(v as u16).to_f32() } else { F16(v as u16).to_f32() };
    let (a, b) = (value(x), value(y));
    let v = if op == AtomOp::Min { float::min(a, b) } else { float::max(a, b) };
    // Both are values of the small format, so nothing is rounded.
    u32::from(if bf16 { BF16::from_f32(v).0 } else { F16::from_f32(v).0 })
}

fn add_f16(a: F16, b: F16) -> F16 {
    let sum = add_odd(a.to_f32().into(), b.to_f32().into());
    F16(round(sum, Format::F16, Round::Nearest) as u16)
}

fn add_bf16(a: BF16, b: BF16) -> BF16 {
    let sum = add_odd(a.to_f32().into(), b.to_f32().into());
    BF16(round(sum, Format::BF16, Round::Nearest) as u16)
}
