//! `call` (PTX ISA 9.7.12.5): functions expanded where they are called, functions with a body of their own, functions by
//! address, and those that the system supplies.

use super::Class;
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result, Symbol};
use crate::lower::calls::{Signature, Target, find};
use crate::lower::ir::{Access, Address, Extra, HeapOp, Order, Reg, Scope, TRUE};
use crate::lower::isa::{Code, Width};
use crate::lower::operands::describe;
use crate::ptx::ast::{Function, Init, Instruction, Operand, Space, Type, Variable};

/// A call's operands by their part.
struct Parts<'i> {
    returns: &'i [Operand],
    callee: &'i Operand,
    args: &'i [Operand],
    /// Prototype or list of targets of an indirect call.
    targets: Option<&'i str>,
}

fn expected(what: impl Into<String>, got: impl Into<String>) -> LowerErrorKind {
    LowerErrorKind::Operand { expected: format!("expected {}", what.into()), got: got.into() }
}

impl<'i> Parts<'i> {
    fn new(i: &'i Instruction) -> Result<Self> {
        let mut rest = i.operands.as_slice();
        let list = |rest: &mut &'i [Operand]| match rest {
            [Operand::List(all), tail @ ..] => {
                *rest = tail;
                all.as_slice()
            }
            _ => &[],
        };
        let returns = list(&mut rest);
        let [callee, tail @ ..] = rest else { return Err(expected("a function", "none")) };
        rest = tail;
        let args = list(&mut rest);
        let targets = match rest {
            [] => None,
            [Operand::Name(n)] => Some(n.as_str()),
            [other, ..] => return Err(expected("a prototype or a list of targets", describe(other))),
        };
        Ok(Self { returns, callee, args, targets })
    }
}

/// What is given for one register of a parameter.
#[derive(Clone)]
enum Actual {
    Operand(Operand),
    /// A half of a `.b128` register.
    Half(u32),
}

fn same_place(a: &Symbol, b: &Symbol) -> bool {
    match (a, b) {
        (Symbol::Variable { space: s, address: a }, Symbol::Variable { space: t, address: b }) => (s, a) == (t, b),
        (Symbol::Stack { base: p, offset: a }, Symbol::Stack { base: q, offset: b }) => (p, a) == (q, b),
        _ => false,
    }
}

fn parameter_bytes(v: &Variable) -> Result<u64> {
    v.bytes().ok_or_else(|| LowerErrorKind::Invalid(format!("the size of `{}` overflows", v.name)))
}

impl<'a> Builder<'a> {
    pub(super) fn call(&mut self, i: &Instruction) -> Result<()> {
        let parts = Parts::new(i)?;
        let Operand::Name(name) = parts.callee else {
            return Err(expected("a function", describe(parts.callee)));
        };
        if self.register_of(parts.callee)?.is_some() {
            return self.call_address(&parts);
        }
        if parts.targets.is_some() {
            return Err(expected("a register with a function's address", describe(parts.callee)));
        }
        let module = self.module;
        let Some(found) = find(module, name) else {
            return Err(LowerErrorKind::Undeclared { what: "function", name: name.clone() });
        };
        let function = &module.functions[found as usize];
        if function.body.is_none() {
            // Those that the system supplies; a module may have functions of these names of its own.
            match name.as_str() {
                "__assertfail" => return self.assert_fail(parts.args),
                "vprintf" => return self.print(&parts),
                "malloc" => return self.heap(&parts, 1),
                "free" => return self.heap(&parts, 0),
                _ => {}
            }
            return Err(LowerErrorKind::Unsupported(format!("calls of the external function `{name}`")));
        }
        if parts.args.len() != function.params.len() || parts.returns.len() != function.returns.len() {
            return Err(arity(&format!("`{name}`"), function.params.len(), function.returns.len(), &parts));
        }
        let signature = Signature::new(&function.params, &function.returns)?;
        if self.has_own_body(found) {
            return self.call_body(Target::Direct(found), &signature, &parts);
        }
        self.expand(function, &parts)
    }

    /// Puts the function's statements in the place of the call.
    fn expand(&mut self, function: &'a Function, parts: &Parts) -> Result<()> {
        let after = self.new_label();
        if let Some((slot, negated)) = self.guard.take() {
            self.guard = Some((slot, !negated));
            self.jump(after);
            self.guard = None;
        }
        let formals = self.bind(function, parts)?;
        let outer = self.scopes.split_off(1);
        let line = self.line;
        let caller = self.expanded.replace(function);
        self.scopes.push(Default::default());
        for (name, symbol) in function.params.iter().chain(&function.returns).map(|f| &f.name).zip(&formals) {
            self.declare(name, symbol.clone())?;
        }
        self.returns.push(after);
        // The body's own names must not clash with its parameters' scope.
        self.scopes.push(Default::default());
        self.statements(function.body.as_deref().unwrap_or_default())?;
        self.returns.pop();
        self.expanded = caller;
        self.scopes.truncate(1);
        self.scopes.extend(outer);
        self.line = line;
        self.guard = None;
        self.place(after);
        let results = function.returns.iter().zip(&formals[function.params.len()..]).zip(parts.returns);
        for ((formal, symbol), actual) in results {
            if formal.space == Space::Reg {
                for ((slot, ty), o) in self.registers_of(symbol).into_iter().zip(self.actuals(actual, formal)?) {
                    let d = match o {
                        Actual::Half(slot) => slot,
                        Actual::Operand(o) => self.dest(&o, ty)?,
                    };
                    self.emit(move_code(ty), d, &[slot]);
                }
            } else if self.param_variable(actual).is_none_or(|s| !same_place(&s, symbol)) {
                let place = self.symbol_address(symbol);
                self.copy_argument(actual, place, parameter_bytes(formal)?, false)?;
            }
        }
        Ok(())
    }

    /// What a function's parameters, then its results, stand for in one expansion: `.param` ones the caller's variables, `.reg`
    /// ones fresh registers. The arguments are read here, in the caller's scope, before any formal has its name.
    fn bind(&mut self, function: &Function, parts: &Parts) -> Result<Vec<Symbol>> {
        let inputs = function.params.iter().zip(parts.args).map(|(f, a)| (f, a, true));
        let outputs = function.returns.iter().zip(parts.returns).map(|(f, a)| (f, a, false));
        let mut formals = Vec::new();
        for (formal, actual, input) in inputs.chain(outputs) {
            if formal.space == Space::Reg {
                let symbol = self.register_symbol(formal)?;
                if input {
                    for ((d, ty), o) in self.registers_of(&symbol).into_iter().zip(self.actuals(actual, formal)?) {
                        let value = match o {
                            Actual::Half(slot) => slot,
                            Actual::Operand(o) => self.source(&o, ty)?,
                        };
                        self.emit(move_code(ty), d, &[value]);
                    }
                }
                formals.push(symbol);
                continue;
            }
            let bytes = parameter_bytes(formal)?;
            // A call is by value: a variable that the call names twice, as argument and result say, is not one place.
            let shared = |symbol: &Symbol| {
                let all = parts.args.iter().chain(parts.returns).filter_map(|o| self.param_variable(o));
                all.filter(|s| same_place(s, symbol)).count() > 1
            };
            match self.param_variable(actual) {
                Some(symbol) if !shared(&symbol) => {
                    self.check_size(&symbol, actual, bytes)?;
                    formals.push(symbol);
                }
                _ => {
                    let offset = self.layout.place_local(formal)?;
                    let symbol = self.local_symbol(offset);
                    let to = self.symbol_address(&symbol);
                    if input
                        && formal.dims.is_empty()
                        && matches!(actual, Operand::Int(_) | Operand::F32(_) | Operand::F64(_))
                    {
                        let value = self.source(actual, formal.ty)?;
                        self.store_word_at(to, value, formal.ty);
                    } else if input {
                        self.copy_argument(actual, to, bytes, true)?;
                    }
                    formals.push(symbol);
                }
            }
        }
        Ok(formals)
    }

    /// The registers behind a symbol, each with the type in which it is moved.
    fn registers_of(&self, symbol: &Symbol) -> Vec<(u32, Type)> {
        match symbol {
            Symbol::Register { slot, ty } => vec![(*slot, *ty)],
            Symbol::Vector(slots, ty) => slots.iter().map(|&s| (s, *ty)).collect(),
            Symbol::Wide(halves) => halves.iter().map(|&s| (s, Type::B64)).collect(),
            _ => unreachable!("a register's symbol"),
        }
    }

    /// What is given for a register parameter, one for each register of it.
    fn actuals(&self, actual: &Operand, formal: &Variable) -> Result<Vec<Actual>> {
        if formal.ty == Type::B128 {
            return Ok(self.halves(actual)?.map(|half| Actual::Half(half.slot)).to_vec());
        }
        if formal.vector == 1 {
            return Ok(vec![Actual::Operand(actual.clone())]);
        }
        Ok(self.vector(actual, formal.vector as usize)?.into_iter().map(Actual::Operand).collect())
    }

    /// The variable given for a parameter must be as large as it is.
    fn check_size(&self, symbol: &Symbol, actual: &Operand, bytes: u64) -> Result<()> {
        let offset = match symbol {
            Symbol::Variable { address, .. } => Some(*address),
            Symbol::Stack { base, offset } if self.frame.as_ref().is_some_and(|f| f.fp == *base) => Some(*offset),
            _ => None,
        };
        match offset.and_then(|o| self.layout.local_bytes(o)) {
            Some(have) if have != bytes => {
                Err(expected(format!("a variable of {bytes} bytes"), format!("{} of {have} bytes", describe(actual))))
            }
            _ => Ok(()),
        }
    }

    /// `call (returns), register, (args), prototype or targets`
    fn call_address(&mut self, parts: &Parts) -> Result<()> {
        let Some(targets) = parts.targets else {
            return Err(expected("a prototype or a list of targets after an indirect call", "none"));
        };
        let module = self.module;
        let table = module.variables.iter().find(|v| v.name == targets);
        let named: Option<Vec<String>> = match (self.lookup(targets), table) {
            (Some(Symbol::Prototype(_)), _) => None,
            (Some(Symbol::Targets(all)), _) => Some(all.clone()),
            // A table in memory, initialised with the functions that may be called.
            (_, Some(v)) => Some(
                v.init
                    .iter()
                    .filter_map(|i| match i {
                        Init::Symbol { name, .. } => Some(name.clone()),
                        _ => None,
                    })
                    .collect(),
            ),
            _ => return Err(LowerErrorKind::Undeclared { what: "prototype", name: targets.into() }),
        };
        let (signature, functions) = match named {
            None => match self.lookup(targets) {
                Some(Symbol::Prototype(signature)) => (signature.clone(), None),
                _ => unreachable!("only a prototype names no targets"),
            },
            Some(names) => {
                let mut all = Vec::with_capacity(names.len());
                for name in names {
                    let found = find(module, &name).filter(|&f| module.functions[f as usize].body.is_some());
                    all.push(found.ok_or(LowerErrorKind::Undeclared { what: "function", name })?);
                }
                let Some(&first) = all.first() else {
                    return Err(expected("functions to call", format!("`{targets}`, which names none")));
                };
                let first = &module.functions[first as usize];
                (Signature::new(&first.params, &first.returns)?, Some(all))
            }
        };
        if parts.args.len() != signature.params.len() || parts.returns.len() != signature.returns.len() {
            return Err(arity(&format!("`{targets}`"), signature.params.len(), signature.returns.len(), parts));
        }
        let address = self.source_reg(parts.callee, Type::U64)?;
        let candidates = self.candidates(functions.as_deref(), &signature);
        self.call_body(Target::Indirect(address, candidates), &signature, parts)
    }

    /// Arguments into a block of this frame, the call, results out of it.
    fn call_body(&mut self, target: Target, signature: &Signature, parts: &Parts) -> Result<()> {
        let block = self.layout.reserve_local(signature.bytes, 16)?;
        for (actual, &(offset, bytes)) in parts.args.iter().zip(&signature.params) {
            let symbol = self.local_symbol(block + offset);
            let to = self.symbol_address(&symbol);
            self.copy_argument(actual, to, bytes, true)?;
        }
        self.emit_call(target, block);
        for (actual, &(offset, bytes)) in parts.returns.iter().zip(&signature.returns) {
            let symbol = self.local_symbol(block + offset);
            let from = self.symbol_address(&symbol);
            self.copy_argument(actual, from, bytes, false)?;
        }
        Ok(())
    }

    /// Between an argument as written, a `.param` variable or a value, and its place in a block.
    fn copy_argument(&mut self, actual: &Operand, place: Address, bytes: u64, into: bool) -> Result<()> {
        if let Some(symbol) = self.param_variable(actual) {
            self.check_size(&symbol, actual, bytes)?;
            let own = self.symbol_address(&symbol);
            let (from, to) = if into { (own, place) } else { (place, own) };
            let mut at = 0;
            while at < bytes {
                let step = [8, 4, 2, 1].into_iter().find(|s| at % s == 0 && at + s <= bytes).expect("1 always fits");
                let width = if step == 8 { Width::W64 } else { Width::W32 };
                let value = self.temp(width);
                let value = self.reg(value, width);
                let past = |a: Address| Address { offset: a.offset + at as i64, ..a };
                self.transfer(Code::Load, past(from), value, step as u32);
                self.transfer(Code::Store, past(to), value, step as u32);
                at += step;
            }
            return Ok(());
        }
        let declared = self.register_of(actual)?.map(|(_, ty)| ty);
        let ty = match (declared, bytes) {
            (Some(ty), _) => ty,
            (None, 8) => Type::B64,
            (None, 4) => Type::B32,
            (None, 2) => Type::B16,
            _ => Type::B8,
        };
        if u64::from(ty.bytes()) > bytes || bytes > 8 {
            return Err(expected(format!("a `.param` variable or value of {bytes} bytes"), describe(actual)));
        }
        if into {
            let value = self.source(actual, ty)?;
            self.store_word_at(place, value, ty);
        } else {
            let value = self.dest_reg(actual, ty)?;
            self.load_word_at(place, value, ty);
        }
        Ok(())
    }

    /// The symbol of a `.param` variable of a call, or of another variable in local memory.
    fn param_variable(&self, o: &Operand) -> Option<Symbol> {
        let Operand::Name(n) = o else { return None };
        match self.lookup(n) {
            Some(s @ (Symbol::Variable { space: Space::Local, .. } | Symbol::Stack { .. })) => Some(s.clone()),
            _ => None,
        }
    }

    fn symbol_address(&mut self, symbol: &Symbol) -> Address {
        match *symbol {
            Symbol::Stack { base, offset } => Address { base: self.reg(base, Width::W64), offset: offset as i64 },
            Symbol::Variable { address, .. } => {
                let base = self.constant64(address);
                Address { base: self.reg(base, Width::W64), offset: 0 }
            }
            _ => unreachable!("only variables have an address"),
        }
    }

    /// A plain access to local memory.
    fn transfer(&mut self, code: Code, address: Address, value: Reg, bytes: u32) {
        let access = Access {
            space: Some(Space::Local),
            address,
            bytes,
            signed: false,
            regs: vec![Some(value)],
            order: Order::Weak,
            scope: Scope::Cta,
        };
        self.emit_extra(code, Extra::Access(access));
    }

    /// Stores a register of type `ty` at an offset from a register.
    pub fn store_word(&mut self, base: u32, offset: u64, value: Reg, ty: Type) {
        let address = Address { base: self.reg(base, Width::W64), offset: offset as i64 };
        self.store_word_at(address, value.slot, ty);
    }

    fn store_word_at(&mut self, address: Address, value: u32, ty: Type) {
        let (one, none) = (self.constant32(1), self.constant32(0));
        let value = if ty == Type::Pred { self.compute(Code::Selp32, &[one, none, value]) } else { value };
        let width = if ty.bytes() == 8 { Width::W64 } else { Width::W32 };
        let value = self.reg(value, width);
        self.transfer(Code::Store, address, value, ty.bytes());
    }

    /// See [`Builder::store_word`].
    pub fn load_word(&mut self, base: u32, offset: u64, value: Reg, ty: Type) {
        let address = Address { base: self.reg(base, Width::W64), offset: offset as i64 };
        self.load_word_at(address, value, ty);
    }

    fn load_word_at(&mut self, address: Address, value: Reg, ty: Type) {
        if ty == Type::Pred {
            let byte = self.temp(Width::W32);
            let loaded = self.reg(byte, Width::W32);
            self.transfer(Code::Load, address, loaded, 1);
            // byte - 1 borrows nothing where the byte is not zero.
            let one = self.constant32(1);
            self.emit(Code::SubCarryOut32, value.slot, &[byte, one, TRUE]);
            return;
        }
        self.transfer(Code::Load, address, value, ty.bytes());
    }

    /// `vprintf(format, arguments)`, which returns the number of arguments.
    fn print(&mut self, parts: &Parts) -> Result<()> {
        if parts.args.len() != 2 || parts.returns.len() != 1 {
            return Err(arity("`vprintf`", 2, 1, parts));
        }
        let [format, arguments] = [self.wide_argument(&parts.args[0])?, self.wide_argument(&parts.args[1])?];
        let count = self.temp(Width::W32);
        let count = self.reg(count, Width::W32);
        self.emit_extra(Code::Print, Extra::Print(format, arguments, count));
        match self.param_variable(&parts.returns[0]) {
            Some(symbol) => {
                let to = self.symbol_address(&symbol);
                self.transfer(Code::Store, to, count, 4);
            }
            None => {
                let d = self.dest(&parts.returns[0], Type::B32)?;
                self.emit(Code::Mov32, d, &[count.slot]);
            }
        }
        Ok(())
    }

    /// `malloc(bytes)`, which returns an address, and `free(address)`.
    fn heap(&mut self, parts: &Parts, returns: usize) -> Result<()> {
        if parts.args.len() != 1 || parts.returns.len() != returns {
            return Err(arity(&describe(parts.callee), 1, returns, parts));
        }
        let value = self.wide_argument(&parts.args[0])?;
        self.class = Some(Class::Control);
        let Some(result) = parts.returns.first() else {
            self.emit_extra(Code::Heap, Extra::Heap(HeapOp { value, d: None }));
            return Ok(());
        };
        let block = self.temp(Width::W64);
        let block = self.reg(block, Width::W64);
        self.emit_extra(Code::Heap, Extra::Heap(HeapOp { value, d: Some(block) }));
        match self.param_variable(result) {
            Some(symbol) => {
                let to = self.symbol_address(&symbol);
                self.transfer(Code::Store, to, block, 8);
            }
            None => {
                let d = self.dest(result, Type::B64)?;
                self.emit(Code::Mov64, d, &[block.slot]);
            }
        }
        Ok(())
    }

    /// A 64-bit argument of a function that the system supplies, as a register.
    fn wide_argument(&mut self, o: &Operand) -> Result<Reg> {
        let Some(symbol) = self.param_variable(o) else { return self.source_reg(o, Type::U64) };
        self.check_size(&symbol, o, 8)?;
        let from = self.symbol_address(&symbol);
        let value = self.temp(Width::W64);
        let value = self.reg(value, Width::W64);
        self.transfer(Code::Load, from, value, 8);
        Ok(value)
    }

    /// `__assertfail(message, file, line, function, char_size)`
    fn assert_fail(&mut self, args: &[Operand]) -> Result<()> {
        let mut regs = Vec::new();
        for o in args {
            let Some(symbol) = self.param_variable(o) else {
                return Err(expected("`.param` variables", describe(o)));
            };
            let address = self.symbol_address(&symbol);
            let offset = self.constant64(address.offset as u64);
            let place = self.compute(Code::Add64, &[address.base.slot, offset]);
            regs.push(self.reg(place, Width::W64));
        }
        self.class = Some(Class::Control);
        self.emit_extra(Code::Assert, Extra::Assert(regs));
        Ok(())
    }
}

fn arity(name: &str, params: usize, returns: usize, parts: &Parts) -> LowerErrorKind {
    LowerErrorKind::Operand {
        expected: format!("{name} takes {params} arguments and returns {returns}"),
        got: format!("{} and {}", parts.args.len(), parts.returns.len()),
    }
}

fn move_code(ty: Type) -> Code {
    match Width::of(ty) {
        Some(Width::Pred) => Code::PredMov,
        Some(Width::W64) => Code::Mov64,
        _ => Code::Mov32,
    }
}
