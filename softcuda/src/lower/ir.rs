//! The executable form of a kernel: a flat list of small operations over a packed register file.
//!
//! A lane-wise operation names its operands by slot: a byte offset into the warp's register file, or, with [`CONSTANT`]
//! set, into the kernel's bank of constants, each 32 lanes wide. Everything else keeps its operands in an [`Extra`].

use std::collections::HashMap;

use super::calls::{Call, Entry};
use super::ir_bulk::{BulkOp, TensormapOp};
use super::ir_cluster::ClusterOp;
use super::ir_mbarrier::Mbarrier as MbarrierOp;
use super::isa::{Code, Width};
use crate::lower::InstructionClass;
use crate::lower::Round;
use crate::ptx::ast::{Space, Type};

/// Set in slots that name a constant.
pub const CONSTANT: u32 = 1 << 31;
/// Predicate slots that always read as true and as false.
pub const TRUE: u32 = CONSTANT;
pub const FALSE: u32 = CONSTANT | 1;

/// One operation. `x` of accesses to global memory is 1 where they pass the L1 cache by. Predicate operands are indices into the warp's predicate masks.
#[derive(Debug, Clone, Copy)]
pub struct Op {
    pub code: Code,
    /// Predicate index times two, plus one where negated. Predicate 0 is always true.
    pub guard: u16,
    pub d: u32,
    pub a: u32,
    pub b: u32,
    pub c: u32,
    pub x: u32,
}

/// A register operand of an [`Extra`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg {
    pub slot: u32,
    pub width: Width,
}

/// `[base + offset]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    pub base: Reg,
    pub offset: i64,
}

/// Memory ordering of an access or a fence. The executor treats every scope as the whole system; checkers do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    Weak,
    /// Also `.volatile`.
    Relaxed,
    Acquire,
    Release,
    AcqRel,
    /// Sequentially consistent fences.
    SeqCst,
}

/// Threads among which an order holds (PTX ISA 8.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    Cta,
    Cluster,
    Gpu,
    Sys,
}

/// What a proxy fence orders (PTX ISA 9.7.13.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyFence {
    Alias,
    /// Between the generic and the asynchronous proxy, in one state space or in all.
    Async(Option<Space>),
    /// From the generic to the tensor map proxy.
    TensormapRelease(Scope),
    TensormapAcquire(Scope),
    /// From the generic to the asynchronous proxy within the cluster: release for `.shared::cta`, acquire for
    /// `.shared::cluster`.
    AsyncRelease,
    AsyncAcquire,
    /// `fence.mbarrier_init.release.cluster`.
    MbarrierInit,
}

/// `ld` and `st`.
#[derive(Debug, Clone)]
pub struct Access {
    /// `None` for generic addresses.
    pub space: Option<Space>,
    pub address: Address,
    /// Bytes of one element: 1, 2, 4 or 8.
    pub bytes: u32,
    /// Sign-extend elements narrower than their register.
    pub signed: bool,
    /// One register for each element; `None` for `_`.
    pub regs: Vec<Option<Reg>>,
    pub order: Order,
    pub scope: Scope,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtomOp {
    Add,
    Min,
    Max,
    Inc,
    Dec,
    Exch,
    Cas,
    And,
    Or,
    Xor,
}

/// `atom` and, without `d`, `red`; executed sequentially consistent whatever its order and scope.
#[derive(Debug, Clone)]
pub struct Atom {
    pub op: AtomOp,
    pub ty: Type,
    pub space: Option<Space>,
    pub address: Address,
    pub d: Option<Reg>,
    pub b: Reg,
    pub c: Option<Reg>,
    pub order: Order,
    pub scope: Scope,
    /// What the address must be a multiple of: the size of the whole vector, of which this is one element.
    pub align: u32,
}

/// `atom.exch` and, with a value to compare with, `atom.cas` of 128 bits, in halves.
#[derive(Debug, Clone)]
pub struct AtomWide {
    pub space: Option<Space>,
    pub address: Address,
    pub d: Option<[Reg; 2]>,
    pub compare: Option<[Reg; 2]>,
    pub value: [Reg; 2],
    pub order: Order,
    pub scope: Scope,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArithOp {
    Add,
    Sub,
    Mul,
    Fma,
    Div,
    Rcp,
    Sqrt,
    Min,
    Max,
    Abs,
    Neg,
}

/// Floating-point arithmetic with any rounding and saturation.
#[derive(Debug, Clone)]
pub struct Arith {
    pub op: ArithOp,
    pub ty: Type,
    pub round: Round,
    pub ftz: bool,
    pub sat: bool,
    pub relu: bool,
    /// `.NaN` of min and max.
    pub nan: bool,
    /// `.oob`: the result is zero where an operand is the NaN that marks what lies outside a tensor.
    pub oob: bool,
    /// `.xorsign.abs` of min and max.
    pub xorsign: bool,
    pub d: Reg,
    pub sources: Vec<Reg>,
}

/// Any `cvt`.
#[derive(Debug, Clone)]
pub struct Cvt {
    pub to: Type,
    pub from: Type,
    pub round: Round,
    /// The rounding was given as `.rni` to `.rpi`.
    pub integral: bool,
    pub ftz: bool,
    pub sat: bool,
    pub satfinite: bool,
    pub relu: bool,
    pub d: Reg,
    pub a: Reg,
    /// Second source of a packing conversion, which becomes the low half.
    pub b: Option<Reg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShflMode {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VoteMode {
    All,
    Any,
    Uni,
    Ballot,
}

/// `shfl.sync`, `vote.sync`, `match.sync`, `redux.sync`, `elect.sync`, `bar.warp.sync`: what a set of lanes does together.
#[derive(Debug, Clone)]
pub struct Exchange {
    pub kind: ExchangeKind,
    /// 32-bit mask of the lanes that take part.
    pub members: Reg,
    pub d: Option<Reg>,
    pub p: Option<Reg>,
    pub a: Option<Reg>,
    pub b: Option<Reg>,
    pub c: Option<Reg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeKind {
    Shfl(ShflMode),
    /// With the source predicate negated or not.
    Vote(VoteMode, bool),
    MatchAny,
    MatchAll,
    Redux(AtomOp, Type),
    Elect,
    Barrier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarrierKind {
    Sync,
    Arrive,
    /// Count of true predicates.
    RedPopc,
    RedAnd,
    RedOr,
}

/// `bar` and `barrier`.
#[derive(Debug, Clone)]
pub struct Barrier {
    pub kind: BarrierKind,
    pub aligned: bool,
    pub id: Reg,
    pub count: Option<Reg>,
    pub d: Option<Reg>,
    /// Source predicate of a reduction and whether it is negated.
    pub p: Option<(Reg, bool)>,
}

/// `cp.async`.
#[derive(Debug, Clone)]
pub struct CopyAsync {
    pub to: Address,
    pub from: Address,
    pub bytes: u32,
    /// Bytes read; the rest is zero.
    pub source_bytes: Option<Reg>,
    /// Predicate: ignore the source and write zeros.
    pub ignore: Option<(Reg, bool)>,
    /// [`crate::exec::policy::Policy`].
    pub policy: Option<Reg>,
}

/// `ldmatrix` and `stmatrix` of 8x8 matrices of 16-bit elements.
#[derive(Debug, Clone)]
pub struct MatrixMove {
    pub address: Address,
    pub transposed: bool,
    /// Generic address, which must lie in the shared window.
    pub generic: bool,
    pub regs: Vec<Reg>,
}

/// Element types of the factors of an `mma`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MmaType {
    F16,
    BF16,
    TF32,
    F64,
    S8,
    U8,
    E4M3,
    E5M2,
}

/// Where a `wgmma` finds A.
#[derive(Debug, Clone)]
pub enum WgmmaA {
    /// In shared memory, through a 64-bit descriptor; M-major where turned, else K-major.
    Descriptor { reg: Reg, turned: bool },
    /// Each warp's 16 rows, as in `mma.sync`.
    Registers(Vec<Reg>),
}

/// `wgmma.mma_async` of 64 x N x K.
#[derive(Debug, Clone)]
pub struct Wgmma {
    pub n: u32,
    pub k: u32,
    pub a_type: MmaType,
    pub b_type: MmaType,
    pub d_type: Type,
    /// `.satfinite` of integer accumulators.
    pub saturate: bool,
    /// The product is subtracted: one of the scales of A and B is -1.
    pub negated: bool,
    /// The accumulators as they are read, the same registers as `d`.
    pub c: Vec<Reg>,
    pub d: Vec<Reg>,
    pub a: WgmmaA,
    /// Descriptor of B.
    pub b: Reg,
    /// N-major, not K-major.
    pub b_turned: bool,
    /// Predicate, and whether it is negated: D = AB + D where true, else D = AB.
    pub scale_d: (Reg, bool),
    /// Shape and types as counted.
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WgmmaSyncKind {
    Fence,
    Commit,
    /// For all but this many groups.
    Wait(u32),
}

/// `wgmma.fence`, `wgmma.commit_group`, `wgmma.wait_group`.
#[derive(Debug, Clone)]
pub struct WgmmaSync {
    pub kind: WgmmaSyncKind,
    /// Registers that products not waited for so far may still touch.
    pub in_flight: Vec<Reg>,
}

/// `mma.sync` with A row-major and B column-major.
#[derive(Debug, Clone)]
pub struct Mma {
    /// Rows: 8 or 16. The other extents follow from the types and the number of registers.
    pub m: u32,
    pub a_type: MmaType,
    pub b_type: MmaType,
    pub c_type: Type,
    pub d_type: Type,
    /// `.satfinite` of integer accumulators.
    pub saturate: bool,
    pub d: Vec<Reg>,
    pub a: Vec<Reg>,
    pub b: Vec<Reg>,
    pub c: Vec<Reg>,
    /// Shape and types as counted.
    pub name: String,
}

/// `malloc` and `free` of device code.
#[derive(Debug, Clone, Copy)]
pub struct HeapOp {
    /// Bytes to allocate, or the address of the block to free.
    pub value: Reg,
    /// The block's address, of `malloc`.
    pub d: Option<Reg>,
}

/// Operands of the operations that are not lane-wise.
#[derive(Debug, Clone)]
pub enum Extra {
    Access(Access),
    Atom(Atom),
    AtomWide(AtomWide),
    Arith(Arith),
    Cvt(Cvt),
    Exchange(Exchange),
    Barrier(Barrier),
    CopyAsync(CopyAsync),
    MatrixMove {
        store: bool,
        inner: MatrixMove,
    },
    Mma(Mma),
    Wgmma(Box<Wgmma>),
    WgmmaSync(WgmmaSync),
    /// The next operation touches registers that products use: see [`super::in_flight`].
    WgmmaTouch(Vec<Reg>),
    /// Index register and targets as operation indices.
    Brx(Reg, Vec<u32>),
    /// `isspacep`: destination, source, space.
    TestSpace(Reg, Reg, Space),
    /// `nanosleep` and other instructions that only read registers.
    Reads(Vec<Reg>),
    /// `fence` and `membar`.
    Fence(Order, Scope),
    Cluster(ClusterOp),
    Call(Call),
    /// Frame and argument pointer of the function that begins here.
    Frame(Reg, Reg),
    /// `vprintf`: format, arguments, and the count returned.
    Print(Reg, Reg, Reg),
    Heap(HeapOp),
    Mbarrier(MbarrierOp),
    Bulk(BulkOp),
    Tensormap(TensormapOp),
    /// The fence, and the address of the tensor map that `fence.proxy.tensormap::generic.acquire` is for.
    ProxyFence(ProxyFence, Option<Address>),
    /// A failed device-side assertion: message, file, line, function, as addresses.
    Assert(Vec<Reg>),
}

/// Direction in which an operation uses a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    Read,
    Write,
}

impl Extra {
    /// Visits every register operand, writes first.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Reg, Use)) {
        let address = |a: &mut Address, f: &mut dyn FnMut(&mut Reg, Use)| f(&mut a.base, Use::Read);
        match self {
            Self::Access(_) => unreachable!("the direction of an access depends on its code: see visit_access"),
            Self::Atom(x) => {
                x.d.iter_mut().for_each(|r| f(r, Use::Write));
                address(&mut x.address, f);
                f(&mut x.b, Use::Read);
                x.c.iter_mut().for_each(|r| f(r, Use::Read));
            }
            Self::AtomWide(x) => {
                x.d.iter_mut().flatten().for_each(|r| f(r, Use::Write));
                address(&mut x.address, f);
                x.compare.iter_mut().flatten().chain(&mut x.value).for_each(|r| f(r, Use::Read));
            }
            Self::Arith(x) => {
                f(&mut x.d, Use::Write);
                x.sources.iter_mut().for_each(|r| f(r, Use::Read));
            }
            Self::Cvt(x) => {
                f(&mut x.d, Use::Write);
                f(&mut x.a, Use::Read);
                x.b.iter_mut().for_each(|r| f(r, Use::Read));
            }
            Self::Exchange(x) => {
                x.d.iter_mut().chain(&mut x.p).for_each(|r| f(r, Use::Write));
                f(&mut x.members, Use::Read);
                x.a.iter_mut().chain(&mut x.b).chain(&mut x.c).for_each(|r| f(r, Use::Read));
            }
            Self::Barrier(x) => {
                x.d.iter_mut().for_each(|r| f(r, Use::Write));
                f(&mut x.id, Use::Read);
                x.count.iter_mut().for_each(|r| f(r, Use::Read));
                x.p.iter_mut().for_each(|(r, _)| f(r, Use::Read));
            }
            Self::CopyAsync(x) => {
                address(&mut x.to, f);
                address(&mut x.from, f);
                x.source_bytes.iter_mut().chain(&mut x.policy).for_each(|r| f(r, Use::Read));
                x.ignore.iter_mut().for_each(|(r, _)| f(r, Use::Read));
            }
            Self::MatrixMove { store, inner } => {
                let direction = if *store { Use::Read } else { Use::Write };
                inner.regs.iter_mut().for_each(|r| f(r, direction));
                address(&mut inner.address, f);
            }
            Self::Mma(x) => {
                x.d.iter_mut().for_each(|r| f(r, Use::Write));
                x.a.iter_mut().chain(&mut x.b).chain(&mut x.c).for_each(|r| f(r, Use::Read));
            }
            Self::Cluster(x) => x.visit(f),
            Self::Mbarrier(x) => x.visit(f),
            Self::Bulk(x) => x.visit(f),
            Self::Tensormap(x) => x.visit(f),
            Self::ProxyFence(_, x) => x.iter_mut().for_each(|a| address(a, f)),
            Self::Wgmma(x) => {
                x.d.iter_mut().for_each(|r| f(r, Use::Write));
                x.c.iter_mut().for_each(|r| f(r, Use::Read));
                match &mut x.a {
                    WgmmaA::Descriptor { reg, .. } => f(reg, Use::Read),
                    WgmmaA::Registers(regs) => regs.iter_mut().for_each(|r| f(r, Use::Read)),
                }
                f(&mut x.b, Use::Read);
                f(&mut x.scale_d.0, Use::Read);
            }
            Self::WgmmaTouch(regs) => regs.iter_mut().for_each(|r| f(r, Use::Read)),
            Self::WgmmaSync(x) => x.in_flight.iter_mut().for_each(|r| f(r, Use::Read)),
            Self::Brx(r, _) => f(r, Use::Read),
            Self::TestSpace(d, a, _) => {
                f(d, Use::Write);
                f(a, Use::Read);
            }
            Self::Fence(..) => {}
            Self::Call(x) => {
                if let super::calls::Target::Indirect(r, _) = &mut x.target {
                    f(r, Use::Read);
                }
                f(&mut x.fp, Use::Read);
            }
            Self::Frame(fp, ap) => {
                f(fp, Use::Write);
                f(ap, Use::Write);
            }
            Self::Print(format, arguments, d) => {
                f(d, Use::Write);
                f(format, Use::Read);
                f(arguments, Use::Read);
            }
            Self::Heap(x) => {
                x.d.iter_mut().for_each(|r| f(r, Use::Write));
                f(&mut x.value, Use::Read);
            }
            Self::Reads(regs) | Self::Assert(regs) => regs.iter_mut().for_each(|r| f(r, Use::Read)),
        }
    }
}

/// Visits the registers of one operation: of its [`Extra`] where it has one, else of its slots.
pub fn visit_registers(op: &mut Op, extras: &mut [Extra], f: &mut dyn FnMut(&mut Reg, Use)) {
    let mut slot = |s: &mut u32, ty: Type, u: Use| {
        let width = Width::of(ty).expect("rows use register types");
        let mut reg = Reg { slot: *s, width };
        f(&mut reg, u);
        *s = reg.slot;
    };
    if let Some(row) = op.code.row() {
        slot(&mut op.d, row.result, Use::Write);
        for (s, ty) in [&mut op.a, &mut op.b, &mut op.c].into_iter().zip(row.sources) {
            slot(s, *ty, Use::Read);
        }
        return;
    }
    match op.code {
        Code::PredAnd | Code::PredOr | Code::PredXor => {
            slot(&mut op.d, Type::Pred, Use::Write);
            slot(&mut op.a, Type::Pred, Use::Read);
            slot(&mut op.b, Type::Pred, Use::Read);
        }
        Code::PredNot | Code::PredMov => {
            slot(&mut op.d, Type::Pred, Use::Write);
            slot(&mut op.a, Type::Pred, Use::Read);
        }
        Code::Lop3 => {
            slot(&mut op.d, Type::B32, Use::Write);
            for s in [&mut op.a, &mut op.b, &mut op.c] {
                slot(s, Type::B32, Use::Read);
            }
        }
        Code::Special => {
            let ty = [Type::B32, Type::B64, Type::Pred][op.b as usize];
            slot(&mut op.d, ty, Use::Write);
        }
        Code::Activemask => slot(&mut op.d, Type::B32, Use::Write),
        Code::MoveMatrix => {
            slot(&mut op.d, Type::B32, Use::Write);
            slot(&mut op.a, Type::B32, Use::Read);
        }
        Code::Load | Code::Store => {
            let Extra::Access(x) = &mut extras[op.a as usize] else { unreachable!("accesses have their operands") };
            let direction = if op.code == Code::Load { Use::Write } else { Use::Read };
            x.regs.iter_mut().flatten().for_each(|r| f(r, direction));
            f(&mut x.address.base, Use::Read);
        }
        code if code.has_extra() => extras[op.a as usize].visit(f),
        _ => {}
    }
}

impl Code {
    /// Operand `a` is an index into the kernel's extras.
    pub fn has_extra(self) -> bool {
        use Code::*;
        matches!(
            self,
            Load | Store
                | Atom
                | AtomWide
                | CopyAsync
                | Arith
                | Cvt
                | TestSpace
                | Exchange
                | Barrier
                | LoadMatrix
                | StoreMatrix
                | Mma
                | Wgmma
                | WgmmaSync
                | WgmmaTouch
                | BrxIdx
                | Sleep
                | Fence
                | Assert
                | Cluster
                | Call
                | Frame
                | Print
                | Heap
                | Mbarrier
                | Bulk
                | ProxyFence
                | Tensormap
        )
    }
}

/// The program of a kernel.
#[derive(Debug, Clone, Default)]
pub struct Body {
    pub ops: Vec<Op>,
    /// Where the kernel begins; functions that it calls stand before.
    pub entry: u32,
    /// Functions with a body of their own, by position in the module.
    pub functions: HashMap<u32, Entry>,
    /// Source line of each operation.
    pub lines: Vec<u32>,
    pub extras: Vec<Extra>,
    pub blocks: Vec<Block>,
    /// Spellings of the kernel's instructions, without operands.
    pub names: Vec<String>,
    /// Constants, 32 lanes each: 128 bytes, or 256 for 64-bit ones.
    pub constants: Vec<u32>,
    /// Bytes of a warp's register file.
    pub file_bytes: u32,
    /// Predicates per warp, the two constant ones included.
    pub predicates: u32,
}

/// A PTX instruction, for counting.
#[derive(Debug, Clone, Copy)]
pub struct Counted {
    pub line: u32,
    pub class: InstructionClass,
    /// Its spelling, in [`Body::names`].
    pub name: u32,
}

/// A basic block, for counting.
#[derive(Debug, Clone, Default)]
pub struct Block {
    pub instructions: Vec<Counted>,
    /// The poll that it is part of, see `lower::polls`.
    pub poll: Option<u32>,
}
