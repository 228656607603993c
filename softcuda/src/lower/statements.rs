//! A kernel's body, statement by statement.

use std::collections::HashSet;

use super::LowerErrorKind;
use super::builder::{Builder, Result, Symbol};
use super::calls::Signature;
use super::ir::Op;
use super::isa::Code;
use crate::ptx::ast::{Function, Instruction, Linkage, Space, Statement, Variable};

impl Builder<'_> {
    /// Names of the module, the kernel's parameters and its body.
    pub fn kernel(&mut self, kernel: &Function) -> Result<()> {
        self.line = kernel.line;
        self.module_names()?;
        self.scopes.push(Default::default());
        for (p, place) in kernel.params.iter().zip(self.layout.params.clone()) {
            self.declare(&p.name, Symbol::Variable { space: Space::Param, address: place.offset.into() })?;
        }
        self.statements(kernel.body.as_deref().unwrap_or_default())?;
        self.emit_end();
        Ok(())
    }

    /// What follows the last statement: a body that is run off the end is an error at run time.
    fn emit_end(&mut self) {
        self.guard = None;
        self.class = None;
        self.push(Op { code: Code::InvalidPc, guard: 0, d: 0, a: 0, b: 0, c: 0, x: 0 });
    }

    fn module_names(&mut self) -> Result<()> {
        let module = self.module;
        for v in &module.variables {
            self.line = v.line;
            let symbol = match v.space {
                Space::Shared => match self.layout.shared_offset(v) {
                    Some(address) => Symbol::Variable { space: Space::Shared, address },
                    None => continue,
                },
                Space::Global | Space::Const => match self.env.symbols.get(&v.name) {
                    Some(&address) => Symbol::Variable { space: v.space, address },
                    None => continue,
                },
                _ => {
                    return Err(LowerErrorKind::Unsupported(format!(
                        "module-scope `{}` in {}",
                        v.name,
                        super::operands::dotted(v.space)
                    )));
                }
            };
            // A tentative definition may be repeated.
            match self.declare(&v.name, symbol) {
                Err(_) if matches!(v.linkage, Linkage::Extern | Linkage::Weak | Linkage::Common) => {}
                other => other?,
            }
        }
        for (name, address) in self.functions.addresses() {
            self.declare(name, Symbol::Function(address))?;
        }
        Ok(())
    }

    /// A list of statements in the current scope, whose labels may be used before they stand.
    pub fn statements(&mut self, body: &[Statement]) -> Result<()> {
        let mut labels = HashSet::new();
        for s in body {
            match s {
                Statement::Label { name, line } => {
                    self.line = *line;
                    if !labels.insert(name) {
                        return Err(LowerErrorKind::Duplicate(name.clone()));
                    }
                    let label = self.new_label();
                    self.declare(name, Symbol::Label(label))?;
                }
                Statement::Targets { name, targets, line } => {
                    self.line = *line;
                    self.declare(name, Symbol::Targets(targets.clone()))?;
                }
                Statement::Prototype { name, returns, params, line } => {
                    self.line = *line;
                    let signature = Signature::new(params, returns)?;
                    self.declare(name, Symbol::Prototype(signature))?;
                }
                _ => {}
            }
        }
        for s in body {
            match s {
                Statement::Label { name, .. } => {
                    if let Some(Symbol::Label(label)) = self.lookup(name) {
                        let label = *label;
                        self.place(label);
                    }
                }
                Statement::Variable(v) => self.variable(v)?,
                Statement::Instruction(i) => self.guarded(i)?,
                Statement::Block(inner) => {
                    self.scopes.push(Default::default());
                    self.statements(inner)?;
                    self.scopes.pop();
                }
                Statement::Targets { .. } | Statement::Prototype { .. } => {}
            }
        }
        Ok(())
    }

    fn variable(&mut self, v: &Variable) -> Result<()> {
        self.line = v.line;
        match v.space {
            Space::Reg => self.declare_registers(v),
            Space::Shared => match self.layout.shared_offset(v) {
                Some(address) => self.declare(&v.name, Symbol::Variable { space: Space::Shared, address }),
                None => Err(LowerErrorKind::Invalid(format!("shared variable `{}` has no place", v.name))),
            },
            // Parameters of calls live in the caller's local memory.
            Space::Local | Space::Param => {
                let names = match v.count {
                    None => vec![v.name.clone()],
                    Some(n) if n <= 4096 => (0..n).map(|i| format!("{}{i}", v.name)).collect(),
                    Some(n) => return Err(LowerErrorKind::Unsupported(format!("{n} variables `{}`", v.name))),
                };
                for name in names {
                    let offset = self.layout.place_local(v)?;
                    let symbol = self.local_symbol(offset);
                    self.declare(&name, symbol)?;
                }
                Ok(())
            }
            Space::Global | Space::Const if v.count.is_none() => {
                let address = v.symbol.as_ref().and_then(|s| self.env.symbols.get(s)).copied();
                let address = address.ok_or_else(|| LowerErrorKind::Invalid(format!("`{}` has no place", v.name)))?;
                self.declare(&v.name, Symbol::Variable { space: v.space, address })
            }
            Space::Global | Space::Const | Space::SharedCluster => {
                Err(LowerErrorKind::Unsupported(format!("`{}` declared in a function", v.name)))
            }
        }
    }

    fn guarded(&mut self, i: &Instruction) -> Result<()> {
        self.line = i.line;
        self.section = super::manual::section(&i.opcode);
        self.guard = match &i.guard {
            None => None,
            Some(g) => {
                let slot = self.source(&crate::ptx::ast::Operand::Name(g.name.clone()), crate::ptx::ast::Type::Pred)?;
                Some((slot, g.negated))
            }
        };
        self.instruction(i)?;
        (self.guard, self.class, self.section) = (None, None, None);
        Ok(())
    }
}
