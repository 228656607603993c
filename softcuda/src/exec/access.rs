//! Loads and stores: every lane's address is checked for space, bounds and alignment before anything is touched.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

#[cfg(target_arch = "x86_64")]
use super::access_x86;
use super::fault::FaultKind;
use super::interpreter::Isa;
use super::lanes::{FULL, File, LANES, active};
use super::observe::{AccessKind, Engine, Stored, Touch};
use super::state::{Machine, Outcome, Raw};
use super::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use crate::lower::ir::{Access, Address, Order, Reg};
use crate::lower::isa::Width;
use crate::ptx::ast::Space;

/// The space of a generic address.
pub fn space_of(address: u64) -> Space {
    match address >> 56 {
        1 => Space::Shared,
        2 => Space::Local,
        3 => Space::Param,
        _ => Space::Global,
    }
}

pub fn space_name(space: Space) -> &'static str {
    match space {
        Space::Shared => "shared",
        Space::SharedCluster => "shared::cluster",
        Space::Local => "local",
        Space::Param => "param",
        Space::Const => "const",
        Space::Global => "global",
        Space::Reg => "reg",
    }
}

/// The addresses of all lanes, inactive ones included.
#[inline(always)]
pub fn addresses(file: File, a: &Address) -> [u64; LANES] {
    // SAFETY: the slot is the kernel's, of this width.
    unsafe {
        if a.base.width == Width::W64 {
            each(&file.lanes64(a.base.slot), |x| x.wrapping_add_signed(a.offset))
        } else {
            each(&file.lanes32(a.base.slot), |x| u64::from(x.wrapping_add(a.offset as u32)))
        }
    }
}

/// `map` as a plain loop, which takes the instructions of the function that it stands in.
#[inline(always)]
fn each<A: Copy, B: Copy + Default>(values: &[A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for i in 0..LANES {
        out[i] = f(values[i]);
    }
    out
}

/// Least and greatest active address and all their bits together, as signed numbers, which compare faster.
#[inline(always)]
fn range(addresses: &[u64; LANES], mask: u32) -> (u64, u64, u64) {
    let first = addresses[mask.trailing_zeros() as usize % LANES] as i64;
    let (mut low, mut high, mut bits) = (first, first, first);
    if mask == FULL {
        for &a in addresses {
            low = low.min(a as i64);
            high = high.max(a as i64);
            bits |= a as i64;
        }
    } else {
        for i in 0..LANES {
            let a = if mask >> i & 1 != 0 { addresses[i] as i64 } else { first };
            low = low.min(a);
            high = high.max(a);
            bits |= a;
        }
    }
    (low as u64, high as u64, bits as u64)
}

impl Machine<'_, '_> {
    /// Host pointers, as numbers, to what the active lanes access; `bytes` is a power of two.
    #[inline(always)]
    pub fn resolve(
        &mut self,
        space: Option<Space>,
        addresses: &[u64; LANES],
        mask: u32,
        bytes: u32,
    ) -> Outcome<[u64; LANES]> {
        let (low, high, bits) = range(addresses, mask);
        let aligned = bits & u64::from(bytes - 1) == 0;
        let end = high.wrapping_add(u64::from(bytes));
        match space {
            Some(Space::Shared | Space::SharedCluster)
                if aligned && end <= u64::from(self.shared.bytes) && high < end =>
            {
                let base = self.shared.memory.as_mut_ptr() as u64;
                Ok(each(addresses, |a| base.wrapping_add(a)))
            }
            Some(Space::Global | Space::Const) | None
                if aligned && self.worker.allocations.first().is_some_and(|&(from, to)| low >= from && end <= to) =>
            {
                Ok(*addresses)
            }
            _ => self.resolve_each(space, addresses, mask, bytes),
        }
    }

    #[inline(never)]
    fn resolve_each(
        &mut self,
        space: Option<Space>,
        addresses: &[u64; LANES],
        mask: u32,
        bytes: u32,
    ) -> Outcome<[u64; LANES]> {
        let mut out = [0; LANES];
        for lane in active(mask) {
            out[lane] = self.resolve_lane(space, addresses[lane], lane, bytes)?;
        }
        Ok(out)
    }

    pub fn resolve_lane(&mut self, space: Option<Space>, address: u64, lane: usize, bytes: u32) -> Outcome<u64> {
        // A generic address carries the window of its space.
        let (space, offset) = match space {
            Some(s) => (s, address),
            None => match space_of(address) {
                Space::Shared => (Space::SharedCluster, address - SHARED_WINDOW),
                Space::Local => (Space::Local, address - LOCAL_WINDOW),
                Space::Param => (Space::Param, address - PARAM_WINDOW),
                other => (other, address),
            },
        };
        let fault = |kind, message: String| {
            Box::new(Raw {
                kind,
                lane,
                message: format!("{} access of {bytes} bytes at {address:#x}: {message}", space_name(space)),
                address: Some(address),
                space: Some(space_name(space)),
                bytes: Some(bytes),
            })
        };
        if offset & u64::from(bytes - 1) != 0 {
            return Err(fault(FaultKind::MisalignedAddress, format!("not a multiple of {bytes}")));
        }
        let within = |size: u64| offset.checked_add(u64::from(bytes)).is_some_and(|end| end <= size);
        let outside = |what: &str, size: u64| fault(FaultKind::IllegalAddress, format!("{what} is {size} bytes"));
        match space {
            Space::Shared | Space::SharedCluster => {
                let (rank, offset) = self.locate(space, offset, lane)?;
                let (memory, size) = self.shared_of(rank, address, lane)?;
                if offset + u64::from(bytes) > size.into() {
                    return Err(outside("the block's shared memory", size.into()));
                }
                Ok(memory + offset)
            }
            Space::Local => {
                let size = u64::from(self.worker.local_bytes);
                if !within(size) {
                    return Err(outside("the thread's local memory", size));
                }
                Ok(self.warp.local.as_mut_ptr() as u64 + lane as u64 * size + offset)
            }
            Space::Param => {
                let size = self.worker.params.len() as u64;
                if !within(size) {
                    return Err(outside("the kernel's parameter buffer", size));
                }
                Ok(self.worker.params.as_ptr() as u64 + offset)
            }
            _ => {
                let end = address.checked_add(u64::from(bytes));
                let inside = |&(from, to): &(u64, u64)| address >= from && end.is_some_and(|end| end <= to);
                let seen = &mut self.worker.allocations;
                if let Some(i) = seen.iter().position(inside) {
                    seen.swap(0, i);
                    return Ok(address);
                }
                match self.worker.memory.find(address) {
                    Some(found) if inside(&found) => {
                        seen.insert(0, found);
                        seen.truncate(32);
                        Ok(address)
                    }
                    Some((from, to)) => {
                        let message =
                            format!("crosses the end of an allocation of {} bytes at {from:#x}", to.wrapping_sub(from));
                        Err(fault(FaultKind::IllegalAddress, message))
                    }
                    None => Err(fault(FaultKind::IllegalAddress, self.worker.memory.describe(address))),
                }
            }
        }
    }

    /// Up to eight bytes at a generic address, for the device's own use.
    pub fn read_bytes(&mut self, address: u64, lane: usize, bytes: u32) -> Outcome<u64> {
        let place = self.resolve_lane(None, address, lane, bytes)?;
        // SAFETY: `resolve_lane` has checked the place.
        Ok(unsafe { read(place, bytes, Ordering::Relaxed) })
    }
}

/// `ld` on the lanes of a mask.
pub fn load(m: &mut Machine, file: File, x: &Access, mask: u32, pc: u32) -> Outcome<()> {
    match m.worker.isa {
        Isa::Baseline => load_body::<false>(m, file, x, mask, pc),
        // SAFETY: the host has the instruction set, or it would not have been chosen.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { load_avx2(m, file, x, mask, pc) },
        // SAFETY: likewise.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { load_avx512(m, file, x, mask, pc) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn load_avx2(m: &mut Machine, file: File, x: &Access, mask: u32, pc: u32) -> Outcome<()> {
    load_body::<false>(m, file, x, mask, pc)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi1,bmi2,lzcnt,popcnt")]
fn load_avx512(m: &mut Machine, file: File, x: &Access, mask: u32, pc: u32) -> Outcome<()> {
    load_body::<true>(m, file, x, mask, pc)
}

/// `st` on the lanes of a mask.
pub fn store(m: &mut Machine, file: File, x: &Access, mask: u32, pc: u32) -> Outcome<()> {
    match m.worker.isa {
        Isa::Baseline => store_body::<false>(m, file, x, mask, pc),
        // SAFETY: the host has the instruction set, or it would not have been chosen.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { store_avx2(m, file, x, mask, pc) },
        // SAFETY: likewise.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { store_avx512(m, file, x, mask, pc) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn store_avx2(m: &mut Machine, file: File, x: &Access, mask: u32, pc: u32) -> Outcome<()> {
    store_body::<false>(m, file, x, mask, pc)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi1,bmi2,lzcnt,popcnt")]
fn store_avx512(m: &mut Machine, file: File, x: &Access, mask: u32, pc: u32) -> Outcome<()> {
    store_body::<true>(m, file, x, mask, pc)
}

/// `WIDE` with AVX-512.
#[inline(always)]
fn load_body<const WIDE: bool>(m: &mut Machine, file: File, x: &Access, mask: u32, pc: u32) -> Outcome<()> {
    let addresses = addresses(file, &x.address);
    let bytes = x.bytes * x.regs.len() as u32;
    let places = m.resolve(x.space, &addresses, mask, bytes)?;
    m.observe(&touch(AccessKind::Read, x, &addresses, mask, bytes), pc);
    // SAFETY: `resolve` has checked that every active lane's bytes are live and aligned.
    unsafe {
        if x.order != Order::Weak {
            load_ordered(file, x, &places, mask);
            m.observe_performed(&touch(AccessKind::Read, x, &addresses, mask, bytes), pc);
            return Ok(());
        }
        if x.bytes == 4
            && mask == FULL
            && contiguous(&places, u64::from(bytes))
            && load_block::<WIDE>(file, x, places[0])
        {
            return Ok(());
        }
        for (i, reg) in x.regs.iter().enumerate() {
            let Some(reg) = reg else { continue };
            let offset = i as u64 * u64::from(x.bytes);
            match (x.bytes, reg.width) {
                (4, Width::W32) => {
                    file.store32(reg.slot, mask, &gather(&places, mask, |p| *((p + offset) as *const u32)));
                }
                (8, Width::W64) => {
                    file.store64(reg.slot, mask, &gather(&places, mask, |p| *((p + offset) as *const u64)));
                }
                (2, Width::W32) if !x.signed => {
                    let values = gather(&places, mask, |p| u32::from(*((p + offset) as *const u16)));
                    file.store32(reg.slot, mask, &values);
                }
                _ => {
                    let values = gather(&places, mask, |p| read(p + offset, x.bytes, Ordering::Relaxed));
                    put(file, *reg, mask, &each(&values, |v| extend(v, x.bytes, x.signed)));
                }
            }
        }
    }
    Ok(())
}

/// `WIDE` with AVX-512.
#[inline(always)]
fn store_body<const WIDE: bool>(m: &mut Machine, file: File, x: &Access, mask: u32, pc: u32) -> Outcome<()> {
    let addresses = addresses(file, &x.address);
    let bytes = x.bytes * x.regs.len() as u32;
    if x.space.is_none() && active(mask).any(|i| space_of(addresses[i]) == Space::Param) {
        return Err(Raw::new(FaultKind::InvalidAddressSpace, mask, "a store to the kernel's parameters"));
    }
    let places = m.resolve(x.space, &addresses, mask, bytes)?;
    if m.worker.watched {
        tell_store(m, file, x, &places, &touch(AccessKind::Write, x, &addresses, mask, bytes), pc);
    }
    // SAFETY: `resolve` has checked that every active lane's bytes are live and aligned.
    unsafe {
        if x.order != Order::Weak {
            store_ordered(file, x, &places, mask);
            return Ok(());
        }
        if x.bytes == 4
            && mask == FULL
            && contiguous(&places, u64::from(bytes))
            && store_block::<WIDE>(file, x, places[0])
        {
            return Ok(());
        }
        for (i, reg) in x.regs.iter().enumerate() {
            let Some(reg) = reg else { continue };
            let offset = i as u64 * u64::from(x.bytes);
            match (x.bytes, reg.width) {
                (4, Width::W32) => {
                    let values = file.lanes32(reg.slot);
                    scatter(&places, mask, |i, p| *((p + offset) as *mut u32) = values[i]);
                }
                (8, Width::W64) => {
                    let values = file.lanes64(reg.slot);
                    scatter(&places, mask, |i, p| *((p + offset) as *mut u64) = values[i]);
                }
                (2, Width::W32) => {
                    let values = file.lanes32(reg.slot);
                    scatter(&places, mask, |i, p| *((p + offset) as *mut u16) = values[i] as u16);
                }
                _ => {
                    let values = get(file, *reg);
                    active(mask).for_each(|i| write(places[i] + offset, x.bytes, values[i], Ordering::Relaxed));
                }
            }
        }
    }
    Ok(())
}

#[inline(always)]
fn touch<'t>(kind: AccessKind, x: &Access, addresses: &'t [u64; LANES], mask: u32, bytes: u32) -> Touch<'t> {
    let (engine, order, scope) = (Engine::Thread, x.order, x.scope);
    Touch { kind, engine, space: x.space, addresses, mask, bytes, order, scope }
}

/// Tells of a store, with its values.
#[inline(never)]
fn tell_store(m: &mut Machine, file: File, x: &Access, places: &[u64; LANES], touch: &Touch, pc: u32) {
    let look = |lane: usize| {
        let mut words = [[0; 4]; 2];
        for (i, reg) in x.regs.iter().enumerate().take(4) {
            let place = places[lane] + i as u64 * u64::from(x.bytes);
            // SAFETY: `resolve` has checked the place of every active lane.
            words[1][i] = unsafe { read(place, x.bytes, Ordering::Relaxed) };
            words[0][i] = reg.map_or(words[1][i], |r| extend(get(file, r)[lane], x.bytes, false));
        }
        words
    };
    m.observe_store(touch, Stored { look: &look }, pc);
}

/// Lanes access adjacent elements of `step` bytes in order.
#[inline(always)]
fn contiguous(places: &[u64; LANES], step: u64) -> bool {
    let mut same = true;
    for i in 0..LANES {
        same &= places[i] == places[0].wrapping_add(i as u64 * step);
    }
    same
}

/// Words of all lanes that lie in one piece; `false` if the registers are of another kind.
///
/// # Safety
/// The piece must be readable.
#[inline(always)]
unsafe fn load_block<const WIDE: bool>(file: File, x: &Access, place: u64) -> bool {
    let all = |n: usize| x.regs.len() == n && x.regs.iter().all(|r| matches!(r, Some(Reg { width: Width::W32, .. })));
    let slot = |i: usize| x.regs[i].map_or(0, |r| r.slot);
    // SAFETY: passed on to the caller.
    unsafe {
        if all(1) {
            file.store32(slot(0), FULL, &*(place as *const [u32; LANES]));
            return true;
        }
        #[cfg(target_arch = "x86_64")]
        if WIDE && all(2) {
            access_x86::load2(file, [slot(0), slot(1)], place as *const _);
            return true;
        } else if WIDE && all(4) {
            access_x86::load4(file, [slot(0), slot(1), slot(2), slot(3)], place as *const _);
            return true;
        }
        if all(2) {
            let words = &*(place as *const [[u32; 2]; LANES]);
            for r in 0..2 {
                file.store32(slot(r), FULL, &each(words, |w| w[r]));
            }
        } else if all(4) {
            let words = &*(place as *const [[u32; 4]; LANES]);
            for r in 0..4 {
                file.store32(slot(r), FULL, &each(words, |w| w[r]));
            }
        } else {
            return false;
        }
    }
    true
}

/// See [`load_block`].
///
/// # Safety
/// The piece must be writable.
#[inline(always)]
unsafe fn store_block<const WIDE: bool>(file: File, x: &Access, place: u64) -> bool {
    let all = |n: usize| x.regs.len() == n && x.regs.iter().all(|r| matches!(r, Some(Reg { width: Width::W32, .. })));
    // SAFETY: passed on to the caller.
    unsafe {
        let slot = |i: usize| x.regs[i].map_or(0, |r| r.slot);
        let lanes = |i: usize| file.lanes32(slot(i));
        if all(1) {
            *(place as *mut [u32; LANES]) = lanes(0);
            return true;
        }
        #[cfg(target_arch = "x86_64")]
        if WIDE && all(2) {
            access_x86::store2(file, [slot(0), slot(1)], place as *mut _);
            return true;
        } else if WIDE && all(4) {
            access_x86::store4(file, [slot(0), slot(1), slot(2), slot(3)], place as *mut _);
            return true;
        }
        if all(2) {
            let (a, b) = (lanes(0), lanes(1));
            let to = &mut *(place as *mut [[u32; 2]; LANES]);
            for i in 0..LANES {
                to[i] = [a[i], b[i]];
            }
        } else if all(4) {
            let (a, b, c, d) = (lanes(0), lanes(1), lanes(2), lanes(3));
            let to = &mut *(place as *mut [[u32; 4]; LANES]);
            for i in 0..LANES {
                to[i] = [a[i], b[i], c[i], d[i]];
            }
        } else {
            return false;
        }
    }
    true
}

#[inline(always)]
fn scatter(places: &[u64; LANES], mask: u32, write: impl Fn(usize, u64)) {
    if mask == FULL {
        for i in 0..LANES {
            write(i, places[i]);
        }
    } else {
        for i in active(mask) {
            write(i, places[i]);
        }
    }
}

#[inline(always)]
fn gather<T: Copy + Default>(places: &[u64; LANES], mask: u32, read: impl Fn(u64) -> T) -> [T; LANES] {
    let mut values = [T::default(); LANES];
    if mask == FULL {
        for i in 0..LANES {
            values[i] = read(places[i]);
        }
    } else {
        for i in active(mask) {
            values[i] = read(places[i]);
        }
    }
    values
}

/// # Safety
/// The address must be valid for atomic reads of this size.
unsafe fn load_ordered(file: File, x: &Access, places: &[u64; LANES], mask: u32) {
    let order = if x.order == Order::Acquire { Ordering::Acquire } else { Ordering::Relaxed };
    let _whole = (x.bytes * x.regs.len() as u32 == 16).then(|| super::atomic::WIDE.lock());
    for (i, reg) in x.regs.iter().enumerate() {
        let Some(reg) = reg else { continue };
        let offset = i as u64 * u64::from(x.bytes);
        // SAFETY: passed on to the caller.
        let values = gather(places, mask, |p| unsafe { read(p + offset, x.bytes, order) });
        put(file, *reg, mask, &values.map(|v| extend(v, x.bytes, x.signed)));
    }
}

/// # Safety
/// The address must be valid for atomic writes of this size.
unsafe fn store_ordered(file: File, x: &Access, places: &[u64; LANES], mask: u32) {
    let order = if x.order == Order::Release { Ordering::Release } else { Ordering::Relaxed };
    let _whole = (x.bytes * x.regs.len() as u32 == 16).then(|| super::atomic::WIDE.lock());
    for (i, reg) in x.regs.iter().enumerate() {
        let Some(reg) = reg else { continue };
        let offset = i as u64 * u64::from(x.bytes);
        let values = get(file, *reg);
        // SAFETY: passed on to the caller.
        active(mask).for_each(|i| unsafe { write(places[i] + offset, x.bytes, values[i], order) });
    }
}

/// # Safety
/// The address must be valid for atomic reads of this size.
unsafe fn read(place: u64, bytes: u32, order: Ordering) -> u64 {
    // SAFETY: passed on to the caller.
    unsafe {
        match bytes {
            1 => AtomicU8::from_ptr(place as *mut u8).load(order).into(),
            2 => AtomicU16::from_ptr(place as *mut u16).load(order).into(),
            4 => AtomicU32::from_ptr(place as *mut u32).load(order).into(),
            _ => AtomicU64::from_ptr(place as *mut u64).load(order),
        }
    }
}

/// # Safety
/// The address must be valid for atomic writes of this size.
unsafe fn write(place: u64, bytes: u32, value: u64, order: Ordering) {
    // SAFETY: passed on to the caller.
    unsafe {
        match bytes {
            1 => AtomicU8::from_ptr(place as *mut u8).store(value as u8, order),
            2 => AtomicU16::from_ptr(place as *mut u16).store(value as u16, order),
            4 => AtomicU32::from_ptr(place as *mut u32).store(value as u32, order),
            _ => AtomicU64::from_ptr(place as *mut u64).store(value, order),
        }
    }
}

/// The low `bytes` of `v`, sign-extended if asked.
fn extend(v: u64, bytes: u32, signed: bool) -> u64 {
    let drop = 64 - 8 * bytes;
    if signed { ((v << drop) as i64 >> drop) as u64 } else { v << drop >> drop }
}

/// All lanes of a register, zero-extended.
pub fn get(file: File, reg: Reg) -> [u64; LANES] {
    // SAFETY: the slot is the kernel's, of this width.
    unsafe {
        match reg.width {
            Width::W64 => file.lanes64(reg.slot),
            _ => file.lanes32(reg.slot).map(u64::from),
        }
    }
}

pub fn put(file: File, reg: Reg, mask: u32, values: &[u64; LANES]) {
    // SAFETY: the slot is the kernel's, of this width.
    unsafe {
        match reg.width {
            Width::W64 => file.store64(reg.slot, mask, values),
            _ => file.store32(reg.slot, mask, &values.map(|v| v as u32)),
        }
    }
}

/// A failed `assert`, from the arguments of `__assertfail`.
pub fn assertion(m: &mut Machine, args: &[Reg], mask: u32) -> Box<Raw> {
    let lane = mask.trailing_zeros() as usize;
    let file = m.file();
    let mut value = |i: usize, bytes: u32| {
        let address = args.get(i).map_or(0, |r| get(file, *r)[lane]);
        // SAFETY: `resolve_lane` has checked the place.
        m.resolve_lane(Some(Space::Local), address, lane, bytes)
            .map_or(0, |p| unsafe { read(p, bytes, Ordering::Relaxed) })
    };
    let (message, source, line, function) = (value(0, 8), value(1, 8), value(2, 4), value(3, 8));
    let text = |m: &mut Machine, address: u64| {
        let mut text = Vec::new();
        while text.len() < 1024
            && let Ok(place) = m.resolve_lane(None, address + text.len() as u64, lane, 1)
        {
            // SAFETY: `resolve_lane` has checked the place.
            match unsafe { *(place as *const u8) } {
                0 => break,
                c => text.push(c),
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    };
    let (message, source, function) = (text(m, message), text(m, source), text(m, function));
    Raw::new(FaultKind::Assert, mask, format!("{source}:{line}: {function}: assertion `{message}` failed"))
}
