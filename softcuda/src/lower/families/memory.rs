//! Loads, stores, atomics, cache hints and asynchronous copies (PTX ISA 9.7.9, 9.7.13).

use super::{Class, unknown};
use crate::exec::policy::{Policy, Priority};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result};
use crate::lower::ir::{Access, Address, Atom, AtomOp, AtomWide, CopyAsync, Extra, Order, Reg, Scope};
use crate::lower::isa::{Code, Width};
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe, dotted};
use crate::ptx::ast::{Instruction, Operand, Space, Type};

const SPACES: &[(&str, Space)] = &[
    ("global", Space::Global),
    ("shared", Space::Shared),
    ("shared::cta", Space::Shared),
    ("shared::cluster", Space::SharedCluster),
    ("local", Space::Local),
    ("const", Space::Const),
    ("param", Space::Param),
    ("param::entry", Space::Param),
    ("param::func", Space::Param),
];

pub(super) const SCOPES: &[(&str, Scope)] =
    &[("cta", Scope::Cta), ("cluster", Scope::Cluster), ("gpu", Scope::Gpu), ("sys", Scope::Sys)];

/// Where a load may keep what it loads; the first three also with `.nc`. They change no result.
const CACHE_OPERATIONS: &[(&str, ())] = &[("ca", ()), ("cg", ()), ("cs", ()), ("lu", ()), ("cv", ())];
const STORE_OPERATIONS: &[(&str, ())] = &[("wb", ()), ("cg", ()), ("cs", ()), ("wt", ())];
const EVICTIONS: &[(&str, ())] = &[
    ("L1::evict_normal", ()),
    ("L1::evict_unchanged", ()),
    ("L1::evict_first", ()),
    ("L1::evict_last", ()),
    ("L1::no_allocate", ()),
];

/// Whether a cache operator keeps an access out of the L1 cache (PTX ISA 9.7.9.1).
fn passes_l1(i: &Instruction) -> bool {
    i.modifiers.iter().any(|m| matches!(m.as_str(), "cg" | "cv" | "L1::no_allocate"))
}

impl Builder<'_> {
    /// The operands without the cache policy that `.L2::cache_hint` puts at the end, and the policy.
    pub(super) fn without_policy<'i>(
        &mut self,
        i: &'i Instruction,
        m: &mut Modifiers,
    ) -> Result<(&'i [Operand], Option<Reg>)> {
        if !m.take("L2::cache_hint") {
            return Ok((&i.operands, None));
        }
        let Some((policy, rest)) = i.operands.split_last() else { return Err(unknown(i)) };
        let policy = self.source_reg(policy, Type::B64)?;
        Ok((rest, Some(policy)))
    }

    pub(super) fn load_store(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let load = i.opcode != "st";
        let order = m.one_of(&[
            ("weak", Order::Weak),
            ("volatile", Order::Relaxed),
            ("relaxed", Order::Relaxed),
            ("acquire", Order::Acquire),
            ("release", Order::Release),
        ]);
        if order == Some(if load { Order::Release } else { Order::Acquire }) {
            return Err(unknown(i));
        }
        let volatile = i.modifiers.iter().any(|m| m == "volatile");
        let mmio = m.take("mmio");
        let scope = m.one_of(SCOPES);
        let order = order.unwrap_or(Order::Weak);
        if scope.is_some() != (order != Order::Weak && !volatile) {
            return Err(unknown(i));
        }
        let space = m.one_of(SPACES);
        // What lies in global memory, or may.
        let cached = matches!(space, None | Some(Space::Global));
        if mmio && !(cached && scope == Some(Scope::Sys)) {
            return Err(unknown(i));
        }
        let nc = load && matches!(space, Some(Space::Global)) && order == Order::Weak && m.take("nc");
        let operation = match (load, nc) {
            (true, true) => m.one_of(&CACHE_OPERATIONS[..3]),
            (true, false) => m.one_of(CACHE_OPERATIONS),
            _ => m.one_of(STORE_OPERATIONS),
        };
        // `.volatile` and the stronger orders say themselves where data may be kept.
        if operation.is_some() && order != Order::Weak
            || nc && i.modifiers.iter().any(|m| m == "weak")
            || volatile && matches!(space, Some(Space::Const | Space::Param))
        {
            return Err(unknown(i));
        }
        if cached {
            m.one_of(EVICTIONS);
        }
        let hinted = i.modifiers.iter().any(|m| m == "L2::cache_hint");
        if hinted && !cached {
            return Err(unknown(i));
        }
        let (operands, _) = self.without_policy(i, &mut m)?;
        if cached && load {
            m.one_of(&[("L2::64B", ()), ("L2::128B", ()), ("L2::256B", ())]);
        }
        let n = m.one_of(&[("v2", 2), ("v4", 4)]).unwrap_or(1);
        let ty = m.last_type()?;
        m.finish()?;
        use Type::*;
        if !matches!(ty, B8 | B16 | B32 | B64 | B128 | U8 | U16 | U32 | U64 | S8 | S16 | S32 | S64 | F32 | F64) {
            return Err(unknown(i));
        }
        if n as u32 * ty.bytes() > 16 || mmio && n > 1 {
            return Err(unknown(i));
        }
        count(operands, 2..=2)?;
        let (data, place) = if load { (&operands[0], &operands[1]) } else { (&operands[1], &operands[0]) };
        let (address, of_symbol) = self.address(place)?;
        let space = match (space, of_symbol) {
            // Parameters of device functions are kept in local memory.
            (Some(Space::Param) | None, Some(s)) => Some(s),
            (Some(a), Some(b)) if a != b && (a, b) != (Space::SharedCluster, Space::Shared) => {
                return Err(LowerErrorKind::Operand {
                    expected: format!("expected an address in {}", dotted(a)),
                    got: format!("{} in {}", describe(place), dotted(b)),
                });
            }
            (s, _) => s,
        };
        if let Some(s @ (Space::Const | Space::Param)) = space
            && !load
        {
            return Err(LowerErrorKind::Invalid(format!("a store to {}", dotted(s))));
        }
        if let Operand::Address { base: Some(name), .. } | Operand::SymbolOffset { name, .. } | Operand::Name(name) =
            place
            && !load
            && self.is_input(name)
        {
            return Err(LowerErrorKind::Invalid(format!("a store to the input parameter `{name}` of a function")));
        }
        let shared_by_threads = matches!(space, None | Some(Space::Global | Space::Shared | Space::SharedCluster));
        if !shared_by_threads && order != Order::Weak && !i.modifiers.iter().any(|m| m == "volatile") {
            return Err(unknown(i));
        }
        let mut regs = Vec::with_capacity(n);
        if ty == B128 {
            regs.extend(self.halves(data)?.map(Some));
        }
        for o in if ty == B128 { Vec::new() } else { self.vector(data, n)? } {
            regs.push(if load { self.wide_dest(&o, ty)? } else { Some(self.wide_source(&o, ty)?) });
        }
        self.class = Some(match (space, load) {
            (Some(Space::Shared | Space::SharedCluster), true) => Class::SharedLoad,
            (Some(Space::Shared | Space::SharedCluster), false) => Class::SharedStore,
            (Some(Space::Global) | None, true) => Class::GlobalLoad,
            (Some(Space::Global) | None, false) => Class::GlobalStore,
            _ => Class::OtherMemory,
        });
        let access = Access {
            space,
            address,
            bytes: ty.bytes().min(8),
            signed: matches!(ty, S8 | S16 | S32 | S64),
            regs,
            order,
            // `.volatile` is `.relaxed.sys` (PTX ISA 8.4).
            scope: scope.unwrap_or(Scope::Sys),
        };
        self.emit_extra(if load { Code::Load } else { Code::Store }, Extra::Access(access));
        self.mark_uncached(order != Order::Weak || passes_l1(i));
        if load && ty == S8 {
            for o in self.vector(data, n)? {
                self.narrow(&o, ty)?;
            }
        }
        Ok(())
    }

    pub(super) fn atomic(&mut self, i: &Instruction) -> Result<()> {
        use AtomOp::*;
        use Type::*;
        let mut m = Modifiers::new(i);
        let atom = i.opcode == "atom";
        // `red` returns nothing that could be acquired.
        let order = m.one_of(&[
            ("relaxed", Order::Relaxed),
            ("release", Order::Release),
            ("acquire", Order::Acquire),
            ("acq_rel", Order::AcqRel),
        ]);
        if !atom && matches!(order, Some(Order::Acquire | Order::AcqRel)) {
            return Err(unknown(i));
        }
        // Without them, `.relaxed` and `.gpu` (PTX ISA 9.7.13.5).
        let order = order.unwrap_or(Order::Relaxed);
        let scope = m.one_of(SCOPES).unwrap_or(Scope::Gpu);
        let space = m.one_of(&[
            ("global", Space::Global),
            ("shared", Space::Shared),
            ("shared::cta", Space::Shared),
            ("shared::cluster", Space::SharedCluster),
        ]);
        let op = m.required(
            "an operation",
            &[
                ("add", Add),
                ("min", Min),
                ("max", Max),
                ("inc", Inc),
                ("dec", Dec),
                ("exch", Exch),
                ("cas", Cas),
                ("and", And),
                ("or", Or),
                ("xor", Xor),
            ],
        )?;
        let noftz = m.take("noftz");
        let hinted = i.modifiers.iter().any(|m| m == "L2::cache_hint");
        if hinted && matches!(space, Some(Space::Shared | Space::SharedCluster)) {
            return Err(unknown(i));
        }
        let (operands, _) = self.without_policy(i, &mut m)?;
        let vector = m.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]);
        let ty = m.last_type()?;
        m.finish()?;
        let halves = matches!(ty, F16 | F16x2 | BF16 | BF16x2);
        if ty == B128 && matches!(op, Exch | Cas) && atom && vector.is_none() && !noftz {
            return self.atomic_wide(i, operands, op == Cas, (space, order, scope));
        }
        // Vectors hold 16 bytes at most, of f32 or of halves, and lie in global memory (9.7.13.5).
        if let Some(n) = vector
            && (n * ty.bytes() > 16
                || matches!(space, Some(Space::Shared | Space::SharedCluster))
                || !(ty == F32 && op == Add || halves && matches!(op, Add | Min | Max)))
        {
            return Err(unknown(i));
        }
        let allowed = match op {
            Min | Max if vector.is_some() => true,
            Add => matches!(ty, U32 | S32 | U64 | F32 | F64) || halves,
            Min | Max => matches!(ty, U32 | S32 | U64 | S64),
            Inc | Dec => ty == U32,
            Exch => atom && matches!(ty, B32 | B64),
            Cas => atom && matches!(ty, B16 | B32 | B64),
            And | Or | Xor => matches!(ty, B32 | B64),
        };
        if !allowed || noftz != halves {
            return Err(unknown(i));
        }
        let arity = 1 + usize::from(atom) + 1 + usize::from(op == Cas);
        count(operands, arity..=arity)?;
        let at = usize::from(atom);
        let (address, of_symbol) = self.address(&operands[at])?;
        let space = space.or(of_symbol);
        if let Some(s) = space
            && !matches!(s, Space::Global | Space::Shared | Space::SharedCluster)
        {
            return Err(LowerErrorKind::Invalid(format!("an atomic operation in {}", dotted(s))));
        }
        self.class = Some(Class::Atomic);
        if let Some(n) = vector {
            return self.atomic_vector(
                operands,
                n,
                Atom { op, ty, space, address, d: None, b: address.base, c: None, order, scope, align: n * ty.bytes() },
            );
        }
        let d = match operands.first() {
            Some(o) if atom && !matches!(o, Operand::Sink) => Some(self.dest_reg(o, ty)?),
            _ => None,
        };
        let b = self.source_reg(&operands[at + 1], ty)?;
        let c = if op == Cas { Some(self.source_reg(&operands[at + 2], ty)?) } else { None };
        let align = ty.bytes();
        self.emit_extra(Code::Atom, Extra::Atom(Atom { op, ty, space, address, d, b, c, order, scope, align }));
        Ok(())
    }

    /// A vector is as many operations, each atomic by itself; results come last, for they may be operands.
    fn atomic_vector(&mut self, operands: &[Operand], n: u32, like: Atom) -> Result<()> {
        let returns = operands.len() == 3;
        let values = self.vector(&operands[operands.len() - 1], n as usize)?;
        let mut old = Vec::new();
        for (at, value) in values.iter().enumerate() {
            let b = self.source_reg(value, like.ty)?;
            let d = returns.then(|| self.temp(Width::W32)).map(|slot| self.reg(slot, Width::W32));
            old.extend(d);
            let offset = like.address.offset + (at as u32 * like.ty.bytes()) as i64;
            let align = if at == 0 { like.align } else { like.ty.bytes() };
            let address = Address { offset, ..like.address };
            self.emit_extra(Code::Atom, Extra::Atom(Atom { address, d, b, align, ..like.clone() }));
        }
        if returns && !matches!(operands[0], Operand::Sink) {
            for (o, value) in self.vector(&operands[0], n as usize)?.iter().zip(old) {
                let d = self.dest(o, like.ty)?;
                self.emit(Code::Mov32, d, &[value.slot]);
            }
        }
        Ok(())
    }

    /// `atom.exch.b128` and `atom.cas.b128`.
    fn atomic_wide(
        &mut self,
        i: &Instruction,
        operands: &[Operand],
        cas: bool,
        (space, order, scope): (Option<Space>, Order, Scope),
    ) -> Result<()> {
        let arity = if cas { 4 } else { 3 };
        count(operands, arity..=arity)?;
        let (address, of_symbol) = self.address(&operands[1])?;
        let space = space.or(of_symbol);
        if !matches!(space, None | Some(Space::Global | Space::Shared | Space::SharedCluster)) {
            return Err(unknown(i));
        }
        let d = if matches!(operands[0], Operand::Sink) { None } else { Some(self.halves(&operands[0])?) };
        let compare = if cas { Some(self.halves(&operands[2])?) } else { None };
        let value = self.halves(&operands[arity - 1])?;
        self.class = Some(Class::Atomic);
        self.emit_extra(Code::AtomWide, Extra::AtomWide(AtomWide { space, address, d, compare, value, order, scope }));
        Ok(())
    }

    /// Instructions that only advise the caches: their addresses are checked for form, then dropped.
    pub(super) fn cache_hint(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        let tensormap = i.opcode == "prefetch" && m.take("tensormap");
        let space = match i.opcode.as_str() {
            "prefetch" if tensormap => m.one_of(&[("const", Space::Const), ("param", Space::Param)]),
            "prefetch" => m.one_of(&[("global", Space::Global), ("local", Space::Local)]),
            "prefetchu" => None,
            _ => m.one_of(&[("global", Space::Global)]),
        };
        match i.opcode.as_str() {
            "prefetch" if tensormap => count(&i.operands, 1..=1)?,
            "prefetch" if space != Some(Space::Local) => {
                m.required(
                    "a cache level",
                    &[("L1", ()), ("L2", ()), ("L2::evict_last", ()), ("L2::evict_normal", ())],
                )?;
                count(&i.operands, 1..=1)?;
            }
            "prefetch" => {
                m.required("a cache level", &[("L1", ()), ("L2", ())])?;
                count(&i.operands, 1..=1)?;
            }
            "prefetchu" => {
                m.required("a cache level", &[("L1", ())])?;
                count(&i.operands, 1..=1)?;
            }
            "applypriority" => {
                m.required("a priority", &[("L2::evict_normal", ())])?;
                count(&i.operands, 2..=2)?;
            }
            // `discard` leaves the destination undefined; nothing is the least it may do.
            _ => {
                m.required("a cache level", &[("L2", ())])?;
                count(&i.operands, 2..=2)?;
            }
        }
        m.finish()?;
        self.address(&i.operands[0])?;
        self.class = Some(Class::OtherMemory);
        self.emit_plain(Code::Nop, 0);
        Ok(())
    }

    /// A policy is an opaque number that only changes eviction. Those of address ranges and access properties are `evict_normal`.
    pub(super) fn createpolicy(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        const PRIORITIES: &[(&str, Priority)] = &[
            ("L2::evict_last", Priority::Last),
            ("L2::evict_normal", Priority::Normal),
            ("L2::evict_first", Priority::First),
            ("L2::evict_unchanged", Priority::Unchanged),
        ];
        let kind = m.required("a kind", &[("fractional", 0), ("range", 1), ("cvt", 2)])?;
        let mut high = Policy::high(Priority::Normal, Priority::Normal);
        if kind == 2 {
            m.required("`.L2`", &[("L2", ())])?;
        } else {
            let primary = m.required("a priority", PRIORITIES)?;
            let secondary = m.one_of(PRIORITIES).unwrap_or(Priority::Unchanged);
            if kind == 0 {
                high = Policy::high(primary, secondary);
            }
        }
        m.take("global");
        if m.last_type()? != Type::B64 {
            return Err(unknown(i));
        }
        m.finish()?;
        let arity = match kind {
            0 => 1..=2,
            1 => 4..=4,
            _ => 2..=2,
        };
        count(&i.operands, arity)?;
        let d = self.dest(&i.operands[0], Type::B64)?;
        let fraction = match &i.operands[..] {
            [_, fraction] if kind == 0 => self.source(fraction, Type::F32)?,
            _ => self.constant32(0),
        };
        let high = self.constant32(high);
        self.emit(Code::Pack64, d, &[fraction, high]);
        Ok(())
    }

    /// `cp.async` and its groups.
    pub(super) fn copy_async(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        self.class = Some(Class::AsyncCopy);
        let reduces = m.take("reduce");
        if !m.take("async") {
            return Err(unknown(i));
        }
        if m.take("bulk") {
            return self.bulk(i, m, reduces);
        }
        if reduces {
            return Err(unknown(i));
        }
        if m.take("mbarrier") {
            return self.copy_arrive(i, m);
        }
        if m.take("commit_group") {
            m.finish()?;
            count(&i.operands, 0..=0)?;
            self.emit_plain(Code::CopyCommit, 0);
            return Ok(());
        }
        if m.take("wait_all") {
            m.finish()?;
            count(&i.operands, 0..=0)?;
            self.emit_plain(Code::CopyCommit, 0);
            self.emit_plain(Code::CopyWait, 0);
            return Ok(());
        }
        if m.take("wait_group") {
            m.finish()?;
            count(&i.operands, 1..=1)?;
            let Operand::Int(n @ 0..=0x7fff_ffff) = i.operands[0] else {
                return Err(LowerErrorKind::Operand {
                    expected: "expected a number of groups".into(),
                    got: describe(&i.operands[0]),
                });
            };
            self.emit_plain(Code::CopyWait, n as u32);
            return Ok(());
        }
        let Some(sixteen_only) = m.one_of(&[("cg", true), ("ca", false)]) else { return Err(unknown(i)) };
        if m.one_of(&[("shared", ()), ("shared::cta", ())]).is_none() || !m.take("global") {
            return Err(unknown(i));
        }
        m.one_of(&[("L2::64B", ()), ("L2::128B", ()), ("L2::256B", ())]);
        let (operands, policy) = self.without_policy(i, &mut m)?;
        m.finish()?;
        count(operands, 3..=4)?;
        let (to, to_space) = self.address(&operands[0])?;
        let (from, from_space) = self.address(&operands[1])?;
        if !matches!(to_space, None | Some(Space::Shared)) || !matches!(from_space, None | Some(Space::Global)) {
            return Err(LowerErrorKind::Invalid("`cp.async` copies from global to shared memory".into()));
        }
        let bytes = match operands[2] {
            Operand::Int(16) => 16,
            Operand::Int(n @ (4 | 8)) if !sixteen_only => n as u32,
            _ => {
                let sizes = if sixteen_only { "16" } else { "4, 8 or 16" };
                return Err(LowerErrorKind::Operand {
                    expected: format!("expected a copy size of {sizes}"),
                    got: describe(&operands[2]),
                });
            }
        };
        let (mut source_bytes, mut ignore) = (None, None);
        if let Some(o) = operands.get(3) {
            let predicate = matches!(o, Operand::NotName(_)) || matches!(self.register_of(o)?, Some((_, Type::Pred)));
            if predicate {
                let (p, negated) = self.predicate_source(o)?;
                ignore = Some((self.reg(p, Width::Pred), negated));
            } else {
                if let Operand::Int(n) = o
                    && !(0..=i128::from(bytes)).contains(n)
                {
                    return Err(LowerErrorKind::Operand {
                        expected: format!("expected a source size from 0 to {bytes}"),
                        got: describe(o),
                    });
                }
                source_bytes = Some(self.source_reg(o, Type::U32)?);
            }
        }
        self.emit_extra(Code::CopyAsync, Extra::CopyAsync(CopyAsync { to, from, bytes, source_bytes, ignore, policy }));
        self.mark_uncached(passes_l1(i));
        Ok(())
    }
}
