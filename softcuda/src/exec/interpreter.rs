//! The loop that runs a warp. Lane-wise operations are called through a table of functions compiled for the host's
//! instruction set.

use super::fault::FaultKind;
use super::lanes::{File, LANES};
use super::observe::SyncEvent;
use super::rows;
use super::state::{Group, GroupState, Machine, Outcome, Raw};
use crate::lower::ir::{Extra, Op};
use crate::lower::isa::Code;

/// Why a warp stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Its slice is used up.
    Expired,
    /// Every group waits.
    Blocked,
    Finished,
    /// A poll found nothing: others should run before the next one.
    Polled,
}

/// Instruction sets of the host that the device is compiled for; every one computes the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    Baseline,
    /// x86-64-v3.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Those that this host has, the plainest first.
    pub fn available() -> Vec<Self> {
        let best = Self::detect();
        let all = [
            Self::Baseline,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512,
        ];
        all.into_iter().filter(|isa| *isa as u8 <= best as u8).collect()
    }

    /// The best that this host has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx512 {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }
}

/// Instructions in a slice: long enough to be worth bringing a warp's registers into cache, short enough that spinning
/// warps do not hold up the ones they wait for.
const SLICE: i64 = 4000;

/// What the loop does after an operation that is not lane-wise.
pub enum Next {
    /// On to the next operation.
    Step,
    /// The group to run has changed: its place and lanes are in the warp.
    Reload,
    Stop(Stop),
}

/// Runs a warp until it stops; the error says at which operation.
pub fn run(m: &mut Machine) -> Result<Stop, (Box<Raw>, u32)> {
    // SAFETY: operations and slots are those the lowering made for this kernel; see `Machine::file`.
    unsafe {
        let file = m.file();
        let ops = m.worker.body.ops.as_ptr();
        let table = rows::table(m.worker.isa);
        let counting = m.worker.tally.is_some();
        let mut budget = SLICE;
        if !m.begin_slice() {
            return Ok(if m.warp.finished() { Stop::Finished } else { Stop::Blocked });
        }
        'group: loop {
            let Group { mut pc, mask: mut lanes, .. } = m.warp.groups[m.warp.current];
            let mut apart = m.warp.groups.len() > 1;
            loop {
                let op = &*ops.add(pc as usize);
                let guard = file.predicate(u32::from(op.guard >> 1)) ^ u32::from(op.guard & 1).wrapping_neg();
                let mask = lanes & guard;
                if mask == 0 {
                    pc += 1;
                    continue;
                }
                if let Some(function) = table.get(op.code as usize) {
                    function(&file, op, mask);
                    pc += 1;
                    continue;
                }
                match op.code {
                    Code::Enter => {
                        if budget < 0 {
                            m.save(pc, lanes);
                            m.worker.clock += SLICE as u64;
                            m.warp.rotate = apart;
                            return Ok(Stop::Expired);
                        }
                        budget -= i64::from(op.x);
                        if apart {
                            m.save(pc, lanes);
                            m.choose();
                            let g = m.warp.groups[m.warp.current];
                            (pc, lanes) = (g.pc, g.mask);
                            apart = m.warp.groups.len() > 1;
                            if (*ops.add(pc as usize)).code != Code::Enter {
                                continue;
                            }
                        }
                        if counting {
                            m.count_block((*ops.add(pc as usize)).a, lanes);
                        }
                        pc += 1;
                    }
                    Code::Bra => {
                        if mask == lanes {
                            pc = op.x;
                        } else {
                            m.warp.groups.push(Group { pc: op.x, mask, state: GroupState::Ready });
                            lanes &= !mask;
                            m.save(pc + 1, lanes);
                            apart = true;
                            pc += 1;
                        }
                    }
                    Code::Lop3 => {
                        let (a, b, c) = (file.lanes32(op.a), file.lanes32(op.b), file.lanes32(op.c));
                        file.store32(op.d, mask, &rows::lop3(&a, &b, &c, op.x));
                        pc += 1;
                    }
                    Code::PredAnd => {
                        file.set_predicate(op.d, mask, file.predicate(op.a) & file.predicate(op.b));
                        pc += 1;
                    }
                    Code::PredOr => {
                        file.set_predicate(op.d, mask, file.predicate(op.a) | file.predicate(op.b));
                        pc += 1;
                    }
                    Code::PredXor => {
                        file.set_predicate(op.d, mask, file.predicate(op.a) ^ file.predicate(op.b));
                        pc += 1;
                    }
                    Code::PredNot => {
                        file.set_predicate(op.d, mask, !file.predicate(op.a));
                        pc += 1;
                    }
                    Code::PredMov => {
                        file.set_predicate(op.d, mask, file.predicate(op.a));
                        pc += 1;
                    }
                    Code::Mma => {
                        let Extra::Mma(x) = m.worker.body.extras.get_unchecked(op.a as usize) else { unreachable!() };
                        if lanes == u32::MAX && mask == u32::MAX {
                            super::mma::run(m.worker.isa, m.worker.config, file, x);
                            if counting {
                                m.count_matrix(&x.name);
                            }
                            pc += 1;
                        } else {
                            m.save(pc, lanes);
                            match m.whole_warp(pc, mask) {
                                Ok(true) => {
                                    super::mma::run(m.worker.isa, m.worker.config, file, x);
                                    if counting {
                                        m.count_matrix(&x.name);
                                    }
                                    m.step();
                                }
                                Ok(false) => {}
                                Err(raw) => return Err((raw, pc)),
                            }
                            match m.next_group() {
                                None => continue 'group,
                                Some(stop) => return Ok(stop),
                            }
                        }
                    }
                    Code::Load => {
                        let Extra::Access(x) = m.worker.body.extras.get_unchecked(op.a as usize) else {
                            unreachable!()
                        };
                        if let Err(raw) = super::access::load(m, file, x, mask, pc) {
                            return Err((raw, pc));
                        }
                        pc += 1;
                    }
                    Code::Store => {
                        let Extra::Access(x) = m.worker.body.extras.get_unchecked(op.a as usize) else {
                            unreachable!()
                        };
                        if let Err(raw) = super::access::store(m, file, x, mask, pc) {
                            return Err((raw, pc));
                        }
                        pc += 1;
                    }
                    _ => {
                        m.save(pc, lanes);
                        match rare(m, file, op, pc, mask) {
                            Ok(Next::Step) => pc += 1,
                            Ok(Next::Reload) => match m.next_group() {
                                None => continue 'group,
                                Some(stop) => return Ok(stop),
                            },
                            Ok(Next::Stop(stop)) => return Ok(stop),
                            Err(raw) => return Err((raw, pc)),
                        }
                    }
                }
            }
        }
    }
}

/// Operations that are rare or long enough not to be inlined. The group has been saved.
#[inline(never)]
fn rare(m: &mut Machine, file: File, op: &Op, pc: u32, mask: u32) -> Outcome<Next> {
    let body = m.worker.body;
    let extra = || &body.extras[op.a as usize];
    // SAFETY: operations and slots are those the lowering made for this kernel.
    unsafe {
        match op.code {
            Code::Exit => {
                m.exit(mask);
                return Ok(Next::Reload);
            }
            Code::Call => {
                let Extra::Call(x) = extra() else { unreachable!() };
                m.call(file, x, pc, mask)?;
                return Ok(Next::Reload);
            }
            Code::Return => {
                m.return_from_function(file, pc, mask)?;
                return Ok(Next::Reload);
            }
            Code::Frame => {
                let Extra::Frame(frame, arguments) = *extra() else { unreachable!() };
                m.enter_function(file, frame, arguments, mask);
            }
            Code::Print => {
                let Extra::Print(format, arguments, d) = *extra() else { unreachable!() };
                m.print(file, format, arguments, d, mask)?;
            }
            Code::Heap => {
                let Extra::Heap(x) = extra() else { unreachable!() };
                m.heap(file, x, mask)?;
            }
            Code::BrxIdx => {
                let Extra::Brx(index, targets) = extra() else { unreachable!() };
                m.indexed_branch(file.lanes32(index.slot), targets, mask, pc)?;
                return Ok(Next::Reload);
            }
            Code::Exchange => {
                let Extra::Exchange(x) = extra() else { unreachable!() };
                return m.exchange(file, x, pc, mask).map(|step| if step { Next::Step } else { Next::Reload });
            }
            Code::Barrier => {
                let Extra::Barrier(x) = extra() else { unreachable!() };
                return m.barrier(file, x, pc, mask).map(|step| if step { Next::Step } else { Next::Reload });
            }
            Code::Cluster => {
                let Extra::Cluster(x) = extra() else { unreachable!() };
                return m.cluster_op(file, x, pc, mask).map(|step| if step { Next::Step } else { Next::Reload });
            }
            Code::Mbarrier => {
                let Extra::Mbarrier(x) = extra() else { unreachable!() };
                return m.mbarrier_op(file, x, pc, mask);
            }
            Code::Bulk => {
                let Extra::Bulk(x) = extra() else { unreachable!() };
                m.bulk_op(file, x, pc, mask)?;
            }
            Code::Tensormap => {
                let Extra::Tensormap(x) = extra() else { unreachable!() };
                return m.tensormap_op(file, x, pc, mask).map(|step| if step { Next::Step } else { Next::Reload });
            }
            Code::ProxyFence => {
                // An address is not looked at: a fence touches no memory.
                let Extra::ProxyFence(kind, _) = extra() else { unreachable!() };
                m.proxy_fence(*kind, pc, mask);
            }
            Code::LoadMatrix | Code::StoreMatrix => {
                let Extra::MatrixMove { store, inner } = extra() else { unreachable!() };
                if !m.whole_warp(pc, mask)? {
                    return Ok(Next::Reload);
                }
                super::matrix::run(m, file, inner, *store, pc)?;
                m.step();
                return Ok(Next::Reload);
            }
            Code::MoveMatrix => {
                if m.whole_warp(pc, mask)? {
                    super::matrix::transpose(file, op.d, op.a);
                    m.step();
                }
                return Ok(Next::Reload);
            }
            Code::Wgmma => {
                let Extra::Wgmma(x) = extra() else { unreachable!() };
                if m.whole_warp(pc, mask)? {
                    super::wgmma::issue(m, file, x, pc, op.a)?;
                    if m.warp.index.is_multiple_of(4) {
                        m.count_matrix(&x.name);
                    }
                    m.step();
                }
                return Ok(Next::Reload);
            }
            Code::WgmmaSync => {
                let Extra::WgmmaSync(x) = extra() else { unreachable!() };
                if m.whole_warp(pc, mask)? && super::wgmma::sync(m, file, x, pc)? {
                    m.step();
                }
                return Ok(Next::Reload);
            }
            Code::WgmmaTouch => {
                let Extra::WgmmaTouch(regs) = extra() else { unreachable!() };
                super::wgmma::touch(m, regs, pc);
            }
            Code::SetMaxRegisters => {
                if m.whole_warp(pc, mask)? && super::wgmma::adjust(m, op.x & 0xffff, op.x >> 31 == 1)? {
                    m.step();
                }
                return Ok(Next::Reload);
            }
            Code::Sleep => {
                // Sleeping ends the slice, so that whoever is waited for can run.
                m.step();
                m.warp.rotate = m.warp.groups.len() > 1;
                return Ok(Next::Stop(Stop::Expired));
            }
            Code::Special => m.special(file, op, mask),
            Code::Atom => {
                let Extra::Atom(x) = extra() else { unreachable!() };
                super::atomic::run(m, file, x, mask, pc)?;
            }
            Code::AtomWide => {
                let Extra::AtomWide(x) = extra() else { unreachable!() };
                super::atomic::run_wide(m, file, x, mask, pc)?;
            }
            Code::CopyAsync => {
                let Extra::CopyAsync(x) = extra() else { unreachable!() };
                super::copies::issue(m, file, x, mask, pc)?;
            }
            Code::CopyCommit => {
                m.warp.copies.commit(mask);
                m.observe_sync(SyncEvent::CopyCommit { mask }, pc);
            }
            Code::CopyWait => {
                super::copies::wait(m, op.x, mask);
                m.observe_sync(SyncEvent::CopyWait { keep: op.x, mask }, pc);
            }
            Code::Arith => {
                let Extra::Arith(x) = extra() else { unreachable!() };
                super::scalar::arith(file, x, mask);
            }
            Code::Cvt => {
                let Extra::Cvt(x) = extra() else { unreachable!() };
                super::scalar::cvt(file, x, mask);
            }
            Code::TestSpace => {
                let Extra::TestSpace(p, a, space) = extra() else { unreachable!() };
                let addresses = file.lanes64(a.slot);
                let mut bits = 0;
                for (i, &address) in addresses.iter().enumerate() {
                    bits |= u32::from(m.is_in(address, *space)) << i;
                }
                file.set_predicate(p.slot, mask, bits);
            }
            Code::Activemask => {
                file.store32(op.d, mask, &[mask; LANES]);
            }
            Code::Fence => {
                let Extra::Fence(order, scope) = *extra() else { unreachable!() };
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                m.observe_sync(SyncEvent::Fence { order, scope, mask }, pc);
            }
            Code::Nop => {}
            Code::GridWait => m.observe_sync(SyncEvent::GridWait, pc),
            Code::Trap => return Err(Raw::new(FaultKind::Trap, mask, "the kernel executed `trap`")),
            Code::Assert => {
                let Extra::Assert(args) = extra() else { unreachable!() };
                return Err(super::access::assertion(m, args, mask));
            }
            Code::InvalidPc => {
                return Err(Raw::new(FaultKind::InvalidPc, mask, "control ran off the end of the kernel"));
            }
            _ => return Err(Raw::new(FaultKind::IllegalInstruction, mask, format!("{:?}", op.code))),
        }
    }
    Ok(Next::Step)
}
