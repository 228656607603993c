//! `wgmma` (PTX ISA 9.7.15): matrix products of a warpgroup, four consecutive warps of the block of which the first is a
//! multiple of four, that run beside its instructions.
//!
//! **When.** A product lands as late as the program allows. At issue the accumulators' registers are poisoned and their
//! content is set aside; products that follow on the same accumulators take it up there. A and B in shared memory are read
//! when the first warp of the warpgroup comes to a `wgmma.wait_group` that covers the product, for from then on the program
//! may use their place again; each warp's registers of A are read, and its accumulators written, at its own such wait. With
//! a seed other than 0 a product may also land at any `wgmma.fence`, `commit_group` or `wait_group` before that, in order.
//! Products that nothing waits for never land. A wait that covers a product which not all four warps have issued waits for
//! them.
//!
//! **What.** Factors are exact; each accumulator takes its products one by one in order of K, one fused multiply-add in f32
//! each. f16 accumulators are rounded to nearest after every instruction, s32 ones wrap or, with `.satfinite`, are clamped
//! after every instruction. Hardware adds several products at once with truncation and a few guard bits (fp8 with even fewer
//! than f32 has), so that it agrees to a few units in the last place of the largest term, not bit by bit. tf32 factors are
//! read without their low 13 bits. A NaN accumulator is delivered as the canonical one.

mod descriptor;
mod product;
mod registers;
mod tiles;
mod tiles_x86;

pub use descriptor::Descriptor;
pub use registers::{Pool, Share, adjust};

use std::collections::VecDeque;

use self::descriptor::CHUNK;
use self::tiles::{Tiles, WARP_ROWS, padded};
use super::Products;
use super::fault::FaultKind;
use super::interpreter::Isa;
use super::lanes::{Buffer, FULL, File, LANES};
use super::numeric::truncated::Adder;
use super::numeric::{F16, float};
use super::observe::{AccessKind, Engine, SyncEvent, Touch};
use super::state::{GroupState, Machine, Outcome, Raw, Shared, Warp, mix};
use crate::lower::ir::{Extra, MmaType, Reg, Wgmma, WgmmaA, WgmmaSync, WgmmaSyncKind};
use crate::ptx::ast::{Space, Type};

/// Warps of a warpgroup.
const WARPS: u32 = 4;
/// What accumulators in flight read as: NaN in f32 and in both halves.
const POISON: u32 = 0xffff_ffff;
/// Likewise for integers.
const POISON_INTEGER: u32 = 0x8181_8181;

/// A product that a warpgroup has issued, or is issuing.
#[derive(Debug, Default)]
struct Product {
    pc: u32,
    extra: u32,
    /// Descriptors; that of A is 0 where it comes from registers.
    a: u64,
    b: u64,
    /// D is added to.
    accumulate: bool,
    /// Which warps have issued it.
    issued: u32,
    /// How many have taken their result.
    landed: u32,
    /// Where the chunks of A and B lie in shared memory.
    a_chunks: Vec<u32>,
    b_chunks: Vec<u32>,
    tiles: Tiles,
    filled: bool,
}

/// The products of one warpgroup that not all of its warps are done with.
#[derive(Debug, Default)]
pub struct Warpgroup {
    /// Number of the first product in the list.
    first: u64,
    products: VecDeque<Box<Product>>,
    /// Boxed because they move between the two lists.
    #[allow(clippy::vec_box)]
    spare: Vec<Box<Product>>,
}

impl Warpgroup {
    pub fn clear(&mut self) {
        self.first = 0;
        self.spare.extend(self.products.drain(..));
    }

    fn get(&mut self, number: u64) -> &mut Product {
        &mut self.products[(number - self.first) as usize]
    }

    fn complete(&self, number: u64) -> bool {
        let product = self.products.get((number - self.first) as usize);
        product.is_some_and(|p| p.issued == (1 << WARPS) - 1)
    }
}

/// One warp's accumulators while products on them are in flight.
#[derive(Debug, Default)]
struct Sums {
    /// Slots of the registers; none if unused.
    slots: Vec<u32>,
    ty: Option<Type>,
    /// Products in flight.
    users: u32,
    /// `[16][padded(n)]`, f32, or s32 by their bits.
    values: Buffer,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    number: u64,
    /// Groups that the warp had committed when it issued this.
    group: u64,
    /// Index of its accumulators.
    sums: usize,
}

/// One warp's products in flight.
#[derive(Debug, Default)]
pub struct Queue {
    /// Number of the next product in the warpgroup.
    next: u64,
    committed: u64,
    pending: VecDeque<Pending>,
    sums: Vec<Sums>,
    /// The product that the warp waits for its warpgroup to issue.
    awaited: u64,
    /// Registers marked as touched since the last fence, and on which line; kept where somebody watches.
    touched: Vec<(u32, u32)>,
    /// Makes products land early; 0 for never.
    random: u64,
}

impl Queue {
    pub fn clear(&mut self, seed: u64, warp: u64) {
        self.next = 0;
        self.committed = 0;
        self.pending.clear();
        self.touched.clear();
        self.sums.iter_mut().for_each(|s| s.users = 0);
        self.random = if seed == 0 { 0 } else { mix(seed ^ warp) | 1 };
    }
}

/// Wakes the warps whose warpgroups have issued what they wait for; `true` if there is one.
pub fn release(shared: &Shared, warps: &mut [Warp]) -> bool {
    let mut any = registers::release(shared, warps);
    for warp in warps {
        for g in warp.groups.iter_mut().filter(|g| g.state == GroupState::AtProduct) {
            let group = &shared.warpgroups[warp.index as usize / WARPS as usize];
            if group.complete(warp.wgmma.awaited) {
                g.state = GroupState::Ready;
                any = true;
            }
        }
    }
    any
}

fn illegal(message: impl Into<String>) -> Box<Raw> {
    Raw::new(FaultKind::IllegalInstruction, FULL, message)
}

/// `wgmma.mma_async` of a whole warp.
pub fn issue(m: &mut Machine, file: File, x: &Wgmma, pc: u32, extra: u32) -> Outcome<()> {
    let group = m.warp.index / WARPS;
    if (group + 1) * WARPS * LANES as u32 > m.shared.threads {
        let message =
            format!("`wgmma` needs warpgroups of four whole warps; the block has {} threads", m.shared.threads);
        return Err(illegal(message));
    }
    let uniform = |slot: u32, what: &str| {
        // SAFETY: the slot is a 64-bit one of this kernel.
        let values = unsafe { file.lanes64(slot) };
        match values.iter().position(|v| *v != values[0]) {
            None => Ok(values[0]),
            Some(lane) => Err(illegal(format!("lanes 0 and {lane} name different descriptors of {what}"))),
        }
    };
    let a = match &x.a {
        WgmmaA::Descriptor { reg, .. } => uniform(reg.slot, "A")?,
        WgmmaA::Registers(_) => 0,
    };
    let b = uniform(x.b.slot, "B")?;
    // SAFETY: the slot is a predicate of this kernel.
    let scale = unsafe { file.predicate(x.scale_d.0.slot) } ^ u32::from(x.scale_d.1).wrapping_neg();
    if scale != 0 && scale != FULL {
        return Err(illegal(format!("lanes disagree on the scale of D: {scale:#010x}")));
    }
    let number = m.warp.wgmma.next;
    let bit = 1 << (m.warp.index % WARPS);
    let bytes = m.shared.bytes;
    let warpgroup = &mut m.shared.warpgroups[group as usize];
    let first = number == warpgroup.first + warpgroup.products.len() as u64;
    if first {
        let mut product = warpgroup.spare.pop().unwrap_or_default();
        (product.pc, product.extra, product.a, product.b) = (pc, extra, a, b);
        (product.accumulate, product.issued, product.landed, product.filled) = (scale != 0, bit, 0, false);
        product.a_chunks.clear();
        if let WgmmaA::Descriptor { turned, .. } = x.a {
            Descriptor::new(a).map_err(illegal)?.chunks(64, turned, &mut product.a_chunks);
        }
        Descriptor::new(b).map_err(illegal)?.chunks(x.n, x.b_turned, &mut product.b_chunks);
        for (chunks, name) in [(&product.a_chunks, "A"), (&product.b_chunks, "B")] {
            let last = chunks.iter().copied().max().unwrap_or(0);
            if !chunks.is_empty() && last + CHUNK > bytes {
                return Err(outside(name, last, bytes));
            }
        }
        warpgroup.products.push_back(product);
    } else {
        let product = warpgroup.get(number);
        let differs = if product.pc != pc {
            Some("another instruction".to_string())
        } else if (product.a, product.b) != (a, b) {
            Some(format!("descriptors {:#x} and {:#x}, not {a:#x} and {b:#x}", product.a, product.b))
        } else if product.accumulate != (scale != 0) {
            Some("another scale of D".to_string())
        } else {
            None
        };
        let pc = product.pc;
        product.issued |= bit;
        if let Some(what) = differs {
            let at = m.text(m.line(pc));
            let message =
                format!("the warps of a warpgroup must issue the same `wgmma`; another one has {what}: `{at}`");
            return Err(illegal(message));
        }
    }
    if m.worker.watched
        && let Some(touched) = unfenced(&m.warp.wgmma, x)
    {
        m.observe_sync(SyncEvent::WgmmaUnfenced { touched }, pc);
    }
    m.observe_sync(SyncEvent::WgmmaIssue { number, first }, pc);
    if first && m.worker.watched {
        report_reads(m, group, number, x, pc);
    }
    let sums = set_aside(m, file, x);
    let queue = &mut m.warp.wgmma;
    queue.pending.push_back(Pending { number, group: queue.committed, sums });
    queue.next += 1;
    Ok(())
}

/// Line on which a register of the product was touched with no fence since.
fn unfenced(queue: &Queue, x: &Wgmma) -> Option<u32> {
    let used = |slot: u32| uses(x, slot) || x.d.iter().any(|r| r.slot == slot);
    queue.touched.iter().find(|(slot, _)| used(*slot)).map(|(_, line)| *line)
}

/// A is read from the register.
fn uses(x: &Wgmma, slot: u32) -> bool {
    matches!(&x.a, WgmmaA::Registers(regs) if regs.iter().any(|r| r.slot == slot))
}

/// The next operation touches registers that products use.
pub fn touch(m: &mut Machine, regs: &[Reg], pc: u32) {
    if !m.worker.watched {
        return;
    }
    let line = m.line(pc);
    let queue = &mut m.warp.wgmma;
    queue.touched.extend(regs.iter().map(|r| (r.slot, line)));
    let group = &m.shared.warpgroups[m.warp.index as usize / WARPS as usize];
    let holds = |p: &&Pending| {
        let product = &group.products[(p.number - group.first) as usize];
        let Extra::Wgmma(x) = &m.worker.body.extras[product.extra as usize] else { return false };
        regs.iter().any(|r| uses(x, r.slot) || queue.sums[p.sums].slots.contains(&r.slot))
    };
    if let Some(number) = queue.pending.iter().find(holds).map(|p| p.number) {
        m.observe_sync(SyncEvent::WgmmaTouch { number }, pc);
    }
}

/// Tells whoever watches what a product reads, 32 chunks at a time: four core matrices of 8 chunks, each of which shared memory
/// delivers at once.
fn report_reads(m: &mut Machine, group: u32, number: u64, x: &Wgmma, pc: u32) {
    let product = m.shared.warpgroups[group as usize].get(number);
    let a_turned = matches!(x.a, WgmmaA::Descriptor { turned: true, .. });
    let a = descriptor::by_core_matrix(&product.a_chunks, a_turned);
    let chunks: Vec<u32> = a.chain(descriptor::by_core_matrix(&product.b_chunks, x.b_turned)).collect();
    for part in chunks.chunks(LANES) {
        let mut addresses = [0; LANES];
        part.iter().zip(&mut addresses).for_each(|(c, a)| *a = u64::from(*c));
        let mask = FULL >> (LANES - part.len());
        let weak = Touch::weak(AccessKind::Read, Some(Space::Shared), &addresses, mask, CHUNK);
        m.observe(&Touch { engine: Engine::Wgmma, ..weak }, pc);
    }
}

fn outside(name: &str, last: u32, bytes: u32) -> Box<Raw> {
    Box::new(Raw {
        kind: FaultKind::IllegalAddress,
        lane: 0,
        message: format!("the descriptor of {name} reaches byte {last:#x} of shared memory, which has {bytes} bytes"),
        address: Some(last.into()),
        space: Some("shared"),
        bytes: Some(CHUNK),
    })
}

/// Takes the accumulators out of their registers, unless a product in flight has done so, and poisons these; returns the
/// accumulators' index.
fn set_aside(m: &mut Machine, file: File, x: &Wgmma) -> usize {
    let sums = &mut m.warp.wgmma.sums;
    let same = |s: &Sums| s.users != 0 && s.ty == Some(x.d_type) && s.slots.iter().eq(x.d.iter().map(|r| &r.slot));
    if let Some(i) = sums.iter().position(same) {
        sums[i].users += 1;
        return i;
    }
    let i = sums.iter().position(|s| s.users == 0).unwrap_or_else(|| {
        sums.push(Sums::default());
        sums.len() - 1
    });
    let s = &mut sums[i];
    s.users = 1;
    s.ty = Some(x.d_type);
    s.slots.clear();
    s.slots.extend(x.d.iter().map(|r| r.slot));
    let stride = padded(x.n as usize);
    s.values.grow(WARP_ROWS * stride * 4);
    // SAFETY: the buffer has room for 16 rows; the slots are this kernel's.
    unsafe {
        take(file, &s.slots, x.d_type, stride, s.values.as_mut_ptr().cast());
        let poison = if x.d_type == Type::S32 { POISON_INTEGER } else { POISON };
        for &slot in &s.slots {
            file.store32(slot, FULL, &[poison; LANES]);
        }
    }
    i
}

/// `wgmma.fence`, `commit_group` and `wait_group` of a whole warp; `false` if it has to wait for its warpgroup.
pub fn sync(m: &mut Machine, file: File, x: &WgmmaSync, pc: u32) -> Outcome<bool> {
    let queue = &mut m.warp.wgmma;
    let mut early = 0;
    if queue.random != 0 && !queue.pending.is_empty() {
        queue.random = mix(queue.random) | 1;
        // Half of the time nothing; else some of the oldest.
        if queue.random >> 32 & 1 == 0 {
            early = (queue.random >> 33) as usize % (queue.pending.len() + 1);
        }
    }
    if x.kind == WgmmaSyncKind::Commit {
        queue.committed += 1;
    }
    let due = match x.kind {
        WgmmaSyncKind::Wait(keep) => {
            let covered = |p: &&Pending| p.group + u64::from(keep) < queue.committed;
            queue.pending.iter().take_while(covered).count()
        }
        WgmmaSyncKind::Fence | WgmmaSyncKind::Commit => 0,
    };
    for done in 0..due.max(early) {
        let number = m.warp.wgmma.pending[0].number;
        let group = m.warp.index / WARPS;
        if !m.shared.warpgroups[group as usize].complete(number) {
            if done >= due {
                break;
            }
            m.warp.wgmma.awaited = number;
            m.wait(GroupState::AtProduct);
            return Ok(false);
        }
        land(m, file);
    }
    let event = match x.kind {
        WgmmaSyncKind::Fence => {
            m.warp.wgmma.touched.clear();
            SyncEvent::WgmmaFence
        }
        WgmmaSyncKind::Commit => SyncEvent::WgmmaCommit,
        WgmmaSyncKind::Wait(keep) => {
            let queue = &m.warp.wgmma;
            SyncEvent::WgmmaWait { keep, complete: queue.pending.front().map_or(queue.next, |p| p.number) }
        }
    };
    m.observe_sync(event, pc);
    Ok(true)
}

/// Lands the warp's oldest product, which all of its warpgroup have issued.
fn land(m: &mut Machine, file: File) {
    let Some(pending) = m.warp.wgmma.pending.pop_front() else { return };
    let (isa, products) = (m.worker.isa, m.worker.config.products);
    let warpgroup = &mut m.shared.warpgroups[m.warp.index as usize / WARPS as usize];
    let product = warpgroup.get(pending.number);
    let Extra::Wgmma(x) = &m.worker.body.extras[product.extra as usize] else { unreachable!("it was issued") };
    let base = m.shared.memory.as_ptr();
    if !product.filled {
        product.filled = true;
        product.tiles.reserve(x.k as usize, x.n as usize);
        // SAFETY: `issue` has checked the chunks, and the tiles have room.
        unsafe { fill(isa, product, x, base, isa) };
    }
    let sums = &mut m.warp.wgmma.sums[pending.sums];
    // SAFETY: the tiles and sums have the extents of this product; slots are this kernel's.
    unsafe {
        add((isa, products), file, x, product, m.warp.index % WARPS, sums.values.as_mut_ptr().cast());
        sums.users -= 1;
        if sums.users == 0 {
            deliver(isa, file, &sums.slots, x, sums.values.as_ptr().cast());
        }
    }
    product.landed += 1;
    if product.landed == WARPS
        && let Some(done) = warpgroup.products.pop_front()
    {
        // All warps land in order, so that the first one issued is the first one done.
        warpgroup.first += 1;
        warpgroup.spare.push(done);
    }
}

macro_rules! for_each_isa {
    ($name:ident, $body:ident, ($($arg:ident: $ty:ty),*)) => {
        /// # Safety
        /// As the body that it compiles for each instruction set, of which the host must have `isa`.
        unsafe fn $name(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: passed on to the caller.
                unsafe { $body($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: passed on to the caller.
                unsafe { $body($($arg),*) }
            }
            // SAFETY: passed on to the caller.
            unsafe {
                match isa {
                    Isa::Baseline => $body($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512($($arg),*),
                }
            }
        }
    };
}

for_each_isa!(fill, fill_body, (product: &mut Product, x: &Wgmma, base: *const u8, isa: Isa));
for_each_isa!(deliver, deliver_body, (file: File, slots: &[u32], x: &Wgmma, sums: *const u32));

/// Reads A and B from shared memory.
#[inline(always)]
unsafe fn fill_body(product: &mut Product, x: &Wgmma, base: *const u8, isa: Isa) {
    let tiles = &mut product.tiles;
    // SAFETY: passed on to the caller.
    unsafe {
        if let WgmmaA::Descriptor { turned, .. } = x.a {
            tiles::fill_a(x.a_type, base, &product.a_chunks, turned, tiles.a.as_mut_ptr().cast());
        }
        #[cfg(target_arch = "x86_64")]
        if isa != Isa::Baseline && matches!(x.b_type, MmaType::F16 | MmaType::BF16) && !x.b_turned {
            tiles_x86::fill_b(x.b_type, base, &product.b_chunks, x.n as usize, tiles.b.as_mut_ptr().cast());
            return;
        }
        let _ = isa;
        tiles::fill_b(x.b_type, base, &product.b_chunks, x.b_turned, x.n as usize, tiles.b.as_mut_ptr().cast());
    }
}

/// Adds a warp's rows of the product to its accumulators.
///
/// # Safety
/// `sums` must be of this product's extents and `file` of its kernel.
unsafe fn add(
    (isa, products): (Isa, Products),
    file: File,
    x: &Wgmma,
    product: &mut Product,
    warp: u32,
    sums: *mut u32,
) {
    let (k, stride) = (x.k as usize, padded(x.n as usize));
    let mut own = [0f32; WARP_ROWS * 32];
    let mut a: *const f32 = product.tiles.a.as_ptr().cast();
    // SAFETY: passed on to the caller.
    unsafe {
        match &x.a {
            WgmmaA::Registers(regs) => {
                let words = std::array::from_fn(|i| file.lanes32(regs[i].slot));
                from_registers(isa, x.a_type, &words, &mut own);
                a = own.as_ptr();
            }
            WgmmaA::Descriptor { .. } => a = a.add(warp as usize * WARP_ROWS * k),
        }
        if x.negated {
            let rows: [f32; WARP_ROWS * 32] = std::array::from_fn(|i| if i < WARP_ROWS * k { -*a.add(i) } else { 0.0 });
            own = rows;
            a = own.as_ptr();
        }
        let b = product.tiles.b.as_ptr().cast();
        if !product.accumulate {
            std::ptr::write_bytes(sums, 0, WARP_ROWS * stride);
        }
        if x.d_type == Type::S32 {
            let added: *mut f32 = product.tiles.sums.as_mut_ptr().cast();
            std::ptr::write_bytes(added, 0, WARP_ROWS * stride);
            product::accumulate(isa, added, a, b, k, stride);
            add_integers(isa, sums, added, WARP_ROWS * stride, x.saturate);
        } else if products == Products::Truncated {
            let adder = Adder::wgmma(x.a_type, x.b_type, x.d_type == Type::F16);
            product::truncated(&adder, sums.cast(), a, b, k, stride);
        } else {
            product::accumulate(isa, sums.cast(), a, b, k, stride);
            if x.d_type == Type::F16 {
                to_halves(isa, sums, WARP_ROWS * stride);
            }
        }
    }
}

for_each_isa!(from_registers, from_registers_body, (ty: MmaType, words: &[[u32; LANES]; 4], to: &mut [f32; WARP_ROWS * 32]));
for_each_isa!(add_integers, add_integers_body, (sums: *mut u32, added: *const f32, n: usize, saturate: bool));
for_each_isa!(to_halves, to_halves_body, (sums: *mut u32, n: usize));

#[inline(always)]
unsafe fn from_registers_body(ty: MmaType, words: &[[u32; LANES]; 4], to: &mut [f32; WARP_ROWS * 32]) {
    *to = tiles::a_from_registers(ty, words);
}

/// 32 products of 8-bit numbers are less than 2^24, where f32 counts exactly.
#[inline(always)]
unsafe fn add_integers_body(sums: *mut u32, added: *const f32, n: usize, saturate: bool) {
    // SAFETY: passed on to the caller.
    let (sums, added) = unsafe { (std::slice::from_raw_parts_mut(sums, n), std::slice::from_raw_parts(added, n)) };
    for (v, &p) in sums.iter_mut().zip(added) {
        let (c, p) = (*v as i32, p as i32);
        *v = if saturate { c.saturating_add(p) } else { c.wrapping_add(p) } as u32;
    }
}

/// Rounds to f16.
#[inline(always)]
unsafe fn to_halves_body(sums: *mut u32, n: usize) {
    // SAFETY: passed on to the caller.
    for v in unsafe { std::slice::from_raw_parts_mut(sums, n) } {
        *v = F16::from_f32(f32::from_bits(*v)).to_f32().to_bits();
    }
}

/// Accumulators from their registers (PTX ISA 9.7.15.5.1.1, "Register Fragments", D): with g = lane / 4 and t = lane % 4, of
/// each 8 columns four 32-bit registers hold rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1; two 16-bit pairs
/// rows g and g + 8.
unsafe fn take(file: File, slots: &[u32], ty: Type, stride: usize, sums: *mut u32) {
    for (i, &slot) in slots.iter().enumerate() {
        // SAFETY: passed on to the caller.
        unsafe {
            let lanes = file.lanes32(slot);
            for g in 0..8 {
                let four: [u32; 4] = std::array::from_fn(|t| lanes[4 * g + t]);
                if ty == Type::F16 {
                    let at = sums.add((8 * (i % 2) + g) * stride + i / 2 * 8);
                    let low = four.map(|v| F16(v as u16).to_f32().to_bits());
                    let high = four.map(|v| F16((v >> 16) as u16).to_f32().to_bits());
                    at.cast::<[u32; 4]>().write_unaligned(low);
                    at.add(4).cast::<[u32; 4]>().write_unaligned(high);
                } else {
                    let at = sums.add((8 * (i % 4 / 2) + g) * stride + i / 4 * 8 + 4 * (i % 2));
                    at.cast::<[u32; 4]>().write_unaligned(four);
                }
            }
        }
    }
}

/// Accumulators to their registers.
#[inline(always)]
unsafe fn deliver_body(file: File, slots: &[u32], x: &Wgmma, sums: *const u32) {
    let stride = padded(x.n as usize);
    for (i, &slot) in slots.iter().enumerate() {
        let mut lanes = [0; LANES];
        // SAFETY: passed on to the caller.
        unsafe {
            for g in 0..8 {
                let four = if x.d_type == Type::F16 {
                    let at = sums.add((8 * (i % 2) + g) * stride + i / 2 * 8);
                    let half = |v: u32| u32::from(F16::from_f32(f32::from_bits(v)).0);
                    std::array::from_fn(|t| half(*at.add(t)) | half(*at.add(4 + t)) << 16)
                } else {
                    let at = sums.add((8 * (i % 4 / 2) + g) * stride + i / 4 * 8 + 4 * (i % 2));
                    let four: [u32; 4] = at.cast::<[u32; 4]>().read_unaligned();
                    if x.d_type == Type::S32 { four } else { four.map(|v| float::canon(f32::from_bits(v)).to_bits()) }
                };
                lanes[4 * g..4 * g + 4].copy_from_slice(&four);
            }
            file.store32(slot, FULL, &lanes);
        }
    }
}
