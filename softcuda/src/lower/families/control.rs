//! Control flow and calls (PTX ISA 9.7.12, 9.7.19). Device functions are expanded where they are called.

use super::{Class, unknown};
use crate::lower::LowerErrorKind;
use crate::lower::builder::{Builder, Item, Result, Symbol};
use crate::lower::ir::{Access, Address, Extra, Order, Scope};
use crate::lower::isa::{Code, Width};
use crate::lower::modifiers::Modifiers;
use crate::lower::operands::{count, describe};
use crate::ptx::ast::{Function, Instruction, Operand, Space, Type, Variable};

impl Builder<'_> {
    pub(super) fn control(&mut self, i: &Instruction) -> Result<()> {
        let mut m = Modifiers::new(i);
        self.class = Some(Class::Control);
        let indexed = i.opcode == "brx" && m.take("idx");
        m.take("uni");
        m.finish()?;
        match i.opcode.as_str() {
            "bra" => {
                count(&i.operands, 1..=1)?;
                let target = self.label(&i.operands[0])?;
                self.jump(target);
            }
            "brx" if indexed => self.indexed_branch(i)?,
            "ret" => {
                count(&i.operands, 0..=0)?;
                match self.returns.last() {
                    Some((_, label)) => self.jump(*label),
                    None => self.emit_plain(Code::Exit, 0),
                }
            }
            "exit" => {
                count(&i.operands, 0..=0)?;
                self.emit_plain(Code::Exit, 0);
            }
            // Without a debugger a breakpoint ends the kernel like a trap.
            "trap" | "brkpt" => {
                count(&i.operands, 0..=0)?;
                self.emit_plain(Code::Trap, 0);
            }
            "pmevent" => self.emit_plain(Code::Nop, 0),
            "call" => self.call(i)?,
            _ => return Err(unknown(i)),
        }
        Ok(())
    }

    fn label(&self, o: &Operand) -> Result<crate::lower::builder::Label> {
        match o {
            Operand::Name(n) => match self.lookup(n) {
                Some(Symbol::Label(l)) => Ok(*l),
                Some(_) => Err(LowerErrorKind::Operand { expected: "expected a label".into(), got: describe(o) }),
                None => Err(LowerErrorKind::Undeclared { what: "label", name: n.clone() }),
            },
            _ => Err(LowerErrorKind::Operand { expected: "expected a label".into(), got: describe(o) }),
        }
    }

    fn indexed_branch(&mut self, i: &Instruction) -> Result<()> {
        count(&i.operands, 2..=2)?;
        let index = self.source_reg(&i.operands[0], Type::U32)?;
        let names = match &i.operands[1] {
            Operand::Name(n) => match self.lookup(n) {
                Some(Symbol::Targets(t)) => t.clone(),
                _ => return Err(LowerErrorKind::Undeclared { what: "branch target list", name: n.clone() }),
            },
            o => {
                return Err(LowerErrorKind::Operand {
                    expected: "expected a branch target list".into(),
                    got: describe(o),
                });
            }
        };
        let mut targets = Vec::with_capacity(names.len());
        for n in names {
            targets.push(self.label(&Operand::Name(n))?);
        }
        self.emit_extra(Code::BrxIdx, Extra::Brx(index, Vec::new()));
        if let Some(Item::Micro(m)) = self.items.last_mut() {
            m.targets = targets;
        }
        Ok(())
    }

    fn call(&mut self, i: &Instruction) -> Result<()> {
        let (returns, name, args): (&[Operand], &Operand, &[Operand]) = match i.operands.as_slice() {
            [Operand::List(r), name, Operand::List(a)] => (r, name, a),
            [Operand::List(r), name] => (r, name, &[]),
            [name, Operand::List(a)] => (&[], name, a),
            [name] => (&[], name, &[]),
            _ => return Err(LowerErrorKind::Unsupported("indirect calls".into())),
        };
        let Operand::Name(name) = name else {
            return Err(LowerErrorKind::Operand { expected: "expected a function".into(), got: describe(name) });
        };
        if name == "__assertfail" {
            return self.assert_fail(args);
        }
        let module = self.module;
        let target = module.aliases.iter().find(|(alias, _)| alias == name).map_or(name, |(_, aliasee)| aliasee);
        let mut found = module.functions.iter().filter(|f| !f.is_entry && f.name == *target);
        let Some(function) = found.clone().find(|f| f.body.is_some()).or_else(|| found.next()) else {
            return Err(LowerErrorKind::Undeclared { what: "function", name: name.clone() });
        };
        let Some(body) = &function.body else {
            return Err(LowerErrorKind::Unsupported(format!("calls of the external function `{name}`")));
        };
        if self.returns.iter().any(|(n, _)| n == target) {
            return Err(LowerErrorKind::Unsupported(format!("recursive calls of `{name}`")));
        }
        if args.len() != function.params.len() || returns.len() != function.returns.len() {
            return Err(LowerErrorKind::Operand {
                expected: format!(
                    "`{name}` takes {} arguments and returns {}",
                    function.params.len(),
                    function.returns.len()
                ),
                got: format!("{} and {}", args.len(), returns.len()),
            });
        }
        let after = self.new_label();
        if let Some((slot, negated)) = self.guard.take() {
            self.guard = Some((slot, !negated));
            self.jump(after);
            self.guard = None;
        }
        let scope = self.bind(function, args, returns)?;
        let outer = self.scopes.split_off(1);
        let line = self.line;
        self.scopes.push(scope);
        self.returns.push((target.clone(), after));
        // The body's own names must not clash with its parameters' scope.
        self.scopes.push(Default::default());
        self.statements(body)?;
        self.returns.pop();
        let inner = self.scopes.split_off(1).swap_remove(0);
        self.scopes.extend(outer);
        self.line = line;
        self.guard = None;
        self.place(after);
        for (formal, actual) in function.returns.iter().zip(returns) {
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
        for (formal, actual, input) in function
            .params
            .iter()
            .zip(args)
            .map(|(f, a)| (f, a, true))
            .chain(function.returns.iter().zip(returns).map(|(f, a)| (f, a, false)))
        {
            if formal.space == Space::Reg {
                self.declare_registers(formal)?;
                if input {
                    let value = self.source(actual, formal.ty)?;
                    let d = self.dest(&Operand::Name(formal.name.clone()), formal.ty)?;
                    self.emit(move_code(formal.ty), d, &[value]);
                }
                continue;
            }
            let place = match actual {
                Operand::Name(n) => match self.lookup(n) {
                    Some(s @ Symbol::Variable { space: Space::Local, .. }) => Some(s.clone()),
                    _ => None,
                },
                _ => None,
            };
            let symbol = match place {
                Some(s) => s,
                None if input => self.spill(formal, actual)?,
                None => {
                    return Err(LowerErrorKind::Operand {
                        expected: format!("expected a `.param` variable for `{}`", formal.name),
                        got: describe(actual),
                    });
                }
            };
            self.declare(&formal.name, symbol)?;
        }
        Ok(self.scopes.pop().expect("pushed above"))
    }

    /// Puts a value passed for a `.param` parameter into memory.
    fn spill(&mut self, formal: &Variable, actual: &Operand) -> Result<Symbol> {
        let address = self.layout.place_local(formal)?;
        let value = self.wide_source(actual, formal.ty)?;
        let base = self.constant64(address);
        let access = Access {
            space: Some(Space::Local),
            address: Address { base: self.reg(base, Width::W64), offset: 0 },
            bytes: formal.ty.bytes(),
            signed: false,
            regs: vec![Some(value)],
            order: Order::Weak,
            scope: Scope::Cta,
        };
        self.emit_extra(Code::Store, Extra::Access(access));
        Ok(Symbol::Variable { space: Space::Local, address })
    }

    /// `__assertfail(message, file, line, function, char_size)`
    fn assert_fail(&mut self, args: &[Operand]) -> Result<()> {
        let mut regs = Vec::new();
        for o in args {
            let base = Operand::Address {
                base: match o {
                    Operand::Name(n) => Some(n.clone()),
                    _ => None,
                },
                offset: 0,
            };
            let (address, space) = self.address(&base)?;
            if space != Some(Space::Local) {
                return Err(LowerErrorKind::Operand {
                    expected: "expected `.param` variables".into(),
                    got: describe(o),
                });
            }
            regs.push(address.base);
        }
        self.emit_extra(Code::Assert, Extra::Assert(regs));
        Ok(())
    }
}

fn move_code(ty: Type) -> Code {
    match Width::of(ty) {
        Some(Width::Pred) => Code::PredMov,
        Some(Width::W64) => Code::Mov64,
        _ => Code::Mov32,
    }
}
