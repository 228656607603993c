//! Operands to slots, with the type rules of PTX ISA 6.4 and 9.2.

use super::LowerErrorKind;
use super::builder::{Builder, Result, Symbol};
use super::ir::{Address, Op, Reg};
use super::isa::{Code, Width};
use super::special;
use crate::ptx::ast::{Operand, Space, Type};

/// What kinds of register an instruction type accepts.
#[derive(PartialEq, Eq)]
enum Kind {
    Pred,
    Bits,
    Integer,
    Float,
}

fn kind(ty: Type) -> Kind {
    use Type::*;
    match ty {
        Pred => Kind::Pred,
        U8 | U16 | U32 | U64 | S8 | S16 | S32 | S64 => Kind::Integer,
        F32 | F64 => Kind::Float,
        _ => Kind::Bits,
    }
}

/// Types agree if they have the same size and either is untyped or both are of one kind.
fn agree(instruction: Type, register: Type) -> bool {
    let (a, b) = (kind(instruction), kind(register));
    if a == Kind::Pred || b == Kind::Pred {
        return a == b;
    }
    instruction.bytes() == register.bytes() && (a == b || a == Kind::Bits || b == Kind::Bits)
}

/// Whether a register may stand where `ld`, `st` and `cvt` have a type that may be narrower (PTX ISA 9.4.1, tables of the
/// relaxed rules): integers in integer and untyped registers, floating-point types in their own or in untyped ones, untyped
/// data in any. bf16 and packed types have no relaxed form.
fn holds(register: Type, ty: Type) -> bool {
    use Type::*;
    let untyped = matches!(register, B8 | B16 | B32 | B64);
    match ty {
        Pred => register == Pred,
        BF16 | BF16x2 => agree(ty, register),
        F16 | F16x2 | F32 | F64 => register == ty || untyped && register.bytes() >= ty.bytes(),
        U8 | U16 | U32 | U64 | S8 | S16 | S32 | S64 => {
            !matches!(register, Pred | F16 | BF16 | F32 | F64) && register.bytes() >= ty.bytes()
        }
        _ => register != Pred && register.bytes() >= ty.bytes(),
    }
}

/// A type or state space as PTX writes it.
pub fn dotted(x: impl std::fmt::Debug) -> String {
    format!(".{x:?}").to_lowercase().replace("sharedcluster", "shared::cluster")
}

pub fn describe(o: &Operand) -> String {
    match o {
        Operand::Name(n) => format!("`{n}`"),
        Operand::NotName(n) => format!("`!{n}`"),
        Operand::Int(i) => format!("the integer {i}"),
        Operand::F32(_) | Operand::F64(_) => "a floating-point constant".into(),
        Operand::Vector(v) => format!("a vector of {}", v.len()),
        Operand::Address { .. } => "an address".into(),
        Operand::TensorAddress { .. } => "a tensor address".into(),
        Operand::Pair(..) => "a pair `a|b`".into(),
        Operand::Element { name, .. } => format!("an element of `{name}`"),
        Operand::SymbolOffset { name, .. } => format!("an address in `{name}`"),
        Operand::Sink => "`_`".into(),
        Operand::List(_) => "a list".into(),
    }
}

fn mismatch(expected: impl Into<String>, got: &Operand) -> LowerErrorKind {
    LowerErrorKind::Operand { expected: format!("expected {}", expected.into()), got: describe(got) }
}

impl Builder<'_> {
    /// The register that an operand names, with its declared type.
    pub fn register_of(&self, o: &Operand) -> Result<Option<(u32, Type)>> {
        match o {
            Operand::Name(n) => match self.lookup(n) {
                Some(Symbol::Register { slot, ty }) => Ok(Some((*slot, *ty))),
                _ => Ok(None),
            },
            Operand::Element { name, index } => match self.lookup(name) {
                Some(Symbol::Vector(slots, ty)) => slots
                    .get(*index as usize)
                    .map(|s| Some((*s, *ty)))
                    .ok_or_else(|| mismatch(format!("one of the {} components of `{name}`", slots.len()), o)),
                _ => Err(LowerErrorKind::Undeclared { what: "vector register", name: name.clone() }),
            },
            _ => Ok(None),
        }
    }

    /// `register + constant` as a value, which `ptxas` takes wherever it takes a register to read: the register, its type, and the
    /// place of the sum.
    fn register_sum(&mut self, o: &Operand) -> Result<Option<(u32, Type)>> {
        let Operand::SymbolOffset { name, offset } = o else { return Ok(None) };
        let Some(&Symbol::Register { slot, ty }) = self.lookup(name) else { return Ok(None) };
        let code = match (kind(ty), ty.bytes()) {
            (Kind::Pred | Kind::Float, _) | (_, 1) => {
                return Err(mismatch("an integer register before `+`", &Operand::Name(name.clone())));
            }
            (_, 2) => Code::Add16,
            (_, 4) => Code::Add32,
            _ => Code::Add64,
        };
        let constant = match ty.bytes() {
            8 => self.constant64(*offset as u64),
            4 => self.constant32(*offset as u32),
            _ => self.constant32(*offset as u32 & 0xffff),
        };
        Ok(Some((self.compute(code, &[slot, constant]), ty)))
    }

    /// A source operand of exactly this type.
    pub fn source(&mut self, o: &Operand, ty: Type) -> Result<u32> {
        if let Some((slot, declared)) = self.register_sum(o)? {
            return if agree(ty, declared) {
                Ok(slot)
            } else {
                Err(mismatch(format!("a register of type {}", dotted(ty)), o))
            };
        }
        if let Some((slot, declared)) = self.register_of(o)? {
            if !agree(ty, declared) {
                return Err(mismatch(format!("a register of type {}", dotted(ty)), o));
            }
            return Ok(slot);
        }
        self.source_value(o, ty)
    }

    /// A source operand whose register may be wider than the type (ld, st, cvt: PTX ISA 9.2), and its width.
    pub fn wide_source(&mut self, o: &Operand, ty: Type) -> Result<Reg> {
        let sum = self.register_sum(o)?;
        if let Some((slot, declared)) = sum.or(self.register_of(o)?) {
            if !holds(declared, ty) {
                return Err(mismatch(format!("a register for {}", dotted(ty)), o));
            }
            return Ok(self.reg(slot, Width::of(declared).expect("declared registers have a width")));
        }
        let slot = self.source_value(o, ty)?;
        Ok(self.reg(slot, Width::of(ty).unwrap_or(Width::W32)))
    }

    /// A destination whose register may be wider than the type; `None` for `_`.
    pub fn wide_dest(&mut self, o: &Operand, ty: Type) -> Result<Option<Reg>> {
        match o {
            Operand::Sink => Ok(None),
            _ if self.register_of(o)?.is_some() => self.wide_source(o, ty).map(Some),
            _ => Err(self.unknown(o, "a destination register")),
        }
    }

    /// After a signed result narrower than 16 bits: it is extended to the bits of the register that it goes to, and a 16-bit
    /// register is zero above these.
    pub fn narrow(&mut self, o: &Operand, ty: Type) -> Result<()> {
        if (ty == Type::S8 || ty == Type::S16)
            && let Some((slot, declared)) = self.register_of(o)?
            && declared.bytes() == 2
        {
            self.emit(Code::Trunc16, slot, &[slot]);
        }
        Ok(())
    }

    /// An immediate, a special register or an address.
    fn source_value(&mut self, o: &Operand, ty: Type) -> Result<u32> {
        let width = Width::of(ty).unwrap_or(Width::W32);
        match o {
            Operand::Int(value) => self.integer(*value, ty, o),
            Operand::F32(bits) if ty == Type::F32 || ty == Type::B32 => Ok(self.constant32(*bits)),
            Operand::F64(bits) if ty == Type::F32 => Ok(self.constant32((f64::from_bits(*bits) as f32).to_bits())),
            Operand::F32(bits) if ty == Type::F64 => Ok(self.constant64(f64::from(f32::from_bits(*bits)).to_bits())),
            Operand::F64(bits) if ty == Type::F64 || ty == Type::B64 => Ok(self.constant64(*bits)),
            Operand::Name(n) if n == "WARP_SZ" => self.integer(32, ty, o),
            Operand::Name(n) if special::find(n).is_some() => {
                let (x, have) = special::find(n).expect("just found");
                if (have == Width::Pred) != (ty == Type::Pred) {
                    return Err(mismatch(format!("a source of type {}", dotted(ty)), o));
                }
                let d = self.temp(have);
                let b = match have {
                    Width::W32 => 0,
                    Width::W64 => 1,
                    Width::Pred => 2,
                };
                self.push(Op { code: Code::Special, guard: 0, d, a: 0, b, c: 0, x });
                match (have, width) {
                    _ if ty.bytes() == 2 => Ok(self.compute(Code::Trunc16, &[d])),
                    (Width::W32, Width::W64) => Ok(self.compute(Code::Zext32, &[d])),
                    (Width::W64, Width::W32) => Ok(self.compute(Code::Trunc32, &[d])),
                    _ => Ok(d),
                }
            }
            Operand::Name(n) | Operand::SymbolOffset { name: n, .. } => {
                let offset = if let Operand::SymbolOffset { offset, .. } = o { *offset } else { 0 };
                match self.lookup(n) {
                    Some(Symbol::Variable { address, .. }) => {
                        let address = address.wrapping_add_signed(offset);
                        match (width, u32::try_from(address)) {
                            (Width::W64, _) => Ok(self.constant64(address)),
                            (Width::W32, Ok(a)) if ty.bytes() == 4 => Ok(self.constant32(a)),
                            _ => Err(mismatch(format!("a 64-bit register for the address of `{n}`"), o)),
                        }
                    }
                    Some(&Symbol::Stack { base, offset: at }) => {
                        let at = self.constant64(at.wrapping_add_signed(offset));
                        let address = self.compute(Code::Add64, &[base, at]);
                        match width {
                            Width::W64 => Ok(address),
                            _ if ty.bytes() == 4 => Ok(self.compute(Code::Trunc32, &[address])),
                            _ => Err(mismatch(format!("a register for the address of `{n}`"), o)),
                        }
                    }
                    Some(&Symbol::Function(address)) if width == Width::W64 && offset == 0 => {
                        Ok(self.constant64(address))
                    }
                    _ => Err(self.unknown(o, "a source operand")),
                }
            }
            _ => Err(mismatch(format!("a source of type {}", dotted(ty)), o)),
        }
    }

    fn unknown(&self, o: &Operand, expected: &str) -> LowerErrorKind {
        match o {
            Operand::Name(n) | Operand::SymbolOffset { name: n, .. } if self.lookup(n).is_none() => {
                let what = if n.starts_with('%') { "register" } else { "name" };
                LowerErrorKind::Undeclared { what, name: n.clone() }
            }
            _ => mismatch(expected, o),
        }
    }

    fn integer(&mut self, value: i128, ty: Type, o: &Operand) -> Result<u32> {
        let bits = ty.bytes() * 8;
        if ty == Type::Pred {
            return Ok(if value == 0 { super::ir::FALSE } else { super::ir::TRUE });
        }
        if kind(ty) == Kind::Float {
            return Err(mismatch(format!("a floating-point constant or register of type {}", dotted(ty)), o));
        }
        // Constants have 64 bits and are converted to the size of their use (PTX ISA 4.5.1).
        Ok(match bits {
            64 => self.constant64(value as u64),
            32 => self.constant32(value as u32),
            _ => self.constant32(value as u32 & ((1 << bits) - 1)),
        })
    }

    /// A destination of exactly this type; a new temporary for `_`.
    pub fn dest(&mut self, o: &Operand, ty: Type) -> Result<u32> {
        if matches!(o, Operand::Sink) {
            return Ok(self.temp(Width::of(ty).unwrap_or(Width::W32)));
        }
        match self.register_of(o)? {
            Some((slot, declared)) if agree(ty, declared) => Ok(slot),
            Some(_) => Err(mismatch(format!("a register of type {}", dotted(ty)), o)),
            None => Err(self.unknown(o, "a destination register")),
        }
    }

    pub fn source_reg(&mut self, o: &Operand, ty: Type) -> Result<Reg> {
        let slot = self.source(o, ty)?;
        Ok(self.reg(slot, Width::of(ty).unwrap_or(Width::W32)))
    }

    pub fn dest_reg(&mut self, o: &Operand, ty: Type) -> Result<Reg> {
        let slot = self.dest(o, ty)?;
        Ok(self.reg(slot, Width::of(ty).unwrap_or(Width::W32)))
    }

    /// A predicate source and whether it is negated.
    pub fn predicate_source(&mut self, o: &Operand) -> Result<(u32, bool)> {
        match o {
            Operand::NotName(n) => Ok((self.source(&Operand::Name(n.clone()), Type::Pred)?, true)),
            _ => Ok((self.source(o, Type::Pred)?, false)),
        }
    }

    /// A vector register written whole, as the vector of its components; other operands as they are.
    pub fn spread(&self, o: &Operand) -> Operand {
        if let Operand::Name(name) = o
            && let Some(Symbol::Vector(slots, _)) = self.lookup(name)
        {
            let components = 0..slots.len() as u32;
            return Operand::Vector(components.map(|index| Operand::Element { name: name.clone(), index }).collect());
        }
        o.clone()
    }

    /// The elements of `{...}`, or the operand alone.
    pub fn elements(o: &Operand) -> &[Operand] {
        match o {
            Operand::Vector(v) => v,
            _ => std::slice::from_ref(o),
        }
    }

    /// `n` elements, from `{...}` or, for one, from a bare operand; a vector register stands for its components.
    pub fn vector(&self, o: &Operand, n: usize) -> Result<Vec<Operand>> {
        let spread = self.spread(o);
        let elements = Self::elements(&spread);
        if elements.len() != n {
            return Err(mismatch(format!("a vector of {n}"), o));
        }
        Ok(elements.to_vec())
    }

    /// `[...]`, with the space of the variable it is based on, if it is.
    pub fn address(&mut self, o: &Operand) -> Result<(Address, Option<Space>)> {
        let (base, offset) = match o {
            Operand::Address { base, offset } => (base, *offset),
            Operand::SymbolOffset { name, offset } => (&Some(name.clone()), *offset),
            _ => return Err(mismatch("an address `[...]`", o)),
        };
        let Some(name) = base else {
            let slot = self.constant64(offset as u64);
            return Ok((Address { base: self.reg(slot, Width::W64), offset: 0 }, None));
        };
        let name_operand = Operand::Name(name.clone());
        match self.lookup(name) {
            Some(Symbol::Register { slot, ty }) if matches!(ty.bytes(), 4 | 8) && *ty != Type::Pred => {
                let reg = Reg { slot: *slot, width: Width::of(*ty).expect("declared registers have a width") };
                Ok((Address { base: reg, offset }, None))
            }
            Some(Symbol::Variable { space, address }) => {
                let (space, address) = (*space, address.wrapping_add_signed(offset));
                let slot = self.constant64(address);
                Ok((Address { base: self.reg(slot, Width::W64), offset: 0 }, Some(space)))
            }
            Some(&Symbol::Stack { base, offset: at }) => {
                let offset = offset.wrapping_add_unsigned(at);
                Ok((Address { base: self.reg(base, Width::W64), offset }, Some(Space::Local)))
            }
            Some(_) => Err(mismatch("an address register of 32 or 64 bits or a variable", &name_operand)),
            None => Err(self.unknown(&name_operand, "an address")),
        }
    }
}

/// Checks the number of operands.
pub fn count(operands: &[Operand], n: std::ops::RangeInclusive<usize>) -> Result<()> {
    if n.contains(&operands.len()) {
        return Ok(());
    }
    let expected = if n.start() == n.end() {
        format!("expected {} operands", n.start())
    } else {
        format!("expected {} to {} operands", n.start(), n.end())
    };
    Err(LowerErrorKind::Operand { expected, got: format!("{}", operands.len()) })
}
