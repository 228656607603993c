//! `call` (PTX ISA 9.7.12.5): functions expanded where they are called, functions with a body of their own, functions by
//! address, and those that the system supplies.

use super::Class;
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Result, Symbol};
use crate::lower::calls::{Signature, Target, find};
use crate::lower::ir::{Access, Address, Extra, Order, Reg, Scope};
use crate::lower::isa::{Code, Width};
use crate::lower::operands::describe;
use crate::ptx::ast::{Function, Init, Instruction, Operand, Space, Type};

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

impl Builder<'_> {
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
        match name.as_str() {
            "__assertfail" => return self.assert_fail(parts.args),
            "vprintf" => return self.print(&parts),
            _ => {}
        }
        let module = self.module;
        let Some(found) = find(module, name) else {
            return Err(LowerErrorKind::Undeclared { what: "function", name: name.clone() });
        };
        let function = &module.functions[found as usize];
        if function.body.is_none() {
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
    fn expand(&mut self, function: &Function, parts: &Parts) -> Result<()> {
        let after = self.new_label();
        if let Some((slot, negated)) = self.guard.take() {
            self.guard = Some((slot, !negated));
            self.jump(after);
            self.guard = None;
        }
        let scope = self.bind(function, parts.args, parts.returns)?;
        let outer = self.scopes.split_off(1);
        let line = self.line;
        self.scopes.push(scope);
        self.returns.push(after);
        // The body's own names must not clash with its parameters' scope.
        self.scopes.push(Default::default());
        self.statements(function.body.as_deref().unwrap_or_default())?;
        self.returns.pop();
        let inner = self.scopes.split_off(1).swap_remove(0);
        self.scopes.extend(outer);
        self.line = line;
        self.guard = None;
        self.place(after);
        for (formal, actual) in function.returns.iter().zip(parts.returns) {
            if formal.space == Space::Reg
                && let Some(Symbol::Register { slot, ty }) = inner.get(&formal.name)
            {
                let d = self.dest(actual, *ty)?;
                self.emit(move_code(*ty), d, &[*slot]);
            }
        }
        Ok(())
    }

    /// The scope of a function's parameters: `.param` ones are the caller's variables, `.reg` ones fresh registers.
    fn bind(
        &mut self,
        function: &Function,
        args: &[Operand],
        returns: &[Operand],
    ) -> Result<std::collections::HashMap<String, Symbol>> {
        self.scopes.push(Default::default());
        let inputs = function.params.iter().zip(args).map(|(f, a)| (f, a, true));
        let outputs = function.returns.iter().zip(returns).map(|(f, a)| (f, a, false));
        for (formal, actual, input) in inputs.chain(outputs) {
            if formal.space == Space::Reg {
                self.declare_registers(formal)?;
                if input {
                    let value = self.source(actual, formal.ty)?;
                    let d = self.dest(&Operand::Name(formal.name.clone()), formal.ty)?;
                    self.emit(move_code(formal.ty), d, &[value]);
                }
                continue;
            }
            let symbol = match self.param_variable(actual) {
                Some(symbol) => symbol,
                None if input => {
                    let offset = self.layout.place_local(formal)?;
                    let value = self.wide_source(actual, formal.ty)?;
                    let symbol = self.local_symbol(offset);
                    let to = self.symbol_address(&symbol);
                    self.transfer(Code::Store, to, value, formal.ty.bytes());
                    symbol
                }
                None => return Err(expected(format!("a `.param` variable for `{}`", formal.name), describe(actual))),
            };
            self.declare(&formal.name, symbol)?;
        }
        Ok(self.scopes.pop().expect("pushed above"))
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
        self.transfer(Code::Load, address, value, ty.bytes());
    }

    /// `vprintf(format, arguments)`, which returns the number of arguments.
    fn print(&mut self, parts: &Parts) -> Result<()> {
        if parts.args.len() != 2 || parts.returns.len() != 1 {
            return Err(arity("`vprintf`", 2, 1, parts));
        }
        let mut values = [0; 2];
        for (value, o) in values.iter_mut().zip(parts.args) {
            *value = match self.param_variable(o) {
                Some(symbol) => {
                    let from = self.symbol_address(&symbol);
                    let value = self.temp(Width::W64);
                    let reg = self.reg(value, Width::W64);
                    self.transfer(Code::Load, from, reg, 8);
                    value
                }
                None => self.source(o, Type::U64)?,
            };
        }
        let [format, arguments] = values.map(|v| self.reg(v, Width::W64));
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
