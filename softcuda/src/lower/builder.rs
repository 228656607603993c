//! The function being lowered: its names, virtual registers, constants and operations so far.

use std::collections::HashMap;

use super::calls::{Frame, Functions, Signature};
use super::ir::{Body, CONSTANT, Extra, Op, Reg, TRUE};
use super::isa::{Code, Width};
use super::layout::Layout;
use super::requirements::Target;
use super::{Environment, LowerErrorKind};
use crate::lower::InstructionClass;
use crate::ptx::ast::{Function, Module, Space, Type, Variable};

pub type Result<T> = std::result::Result<T, LowerErrorKind>;

/// A jump target before blocks are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Label(pub u32);

/// What a name stands for.
#[derive(Debug, Clone)]
pub enum Symbol {
    Register {
        slot: u32,
        ty: Type,
    },
    /// `.reg .v4 ...`: its components.
    Vector(Vec<u32>, Type),
    /// `.reg .b128`: its low and high half.
    Wide([u32; 2]),
    /// A variable with its address within the space: an offset for shared, local and param, an address otherwise.
    Variable {
        space: Space,
        address: u64,
    },
    /// A variable in the local memory of a called function: an offset from a register.
    Stack {
        base: u32,
        offset: u64,
    },
    /// The address of a device function.
    Function(u64),
    Label(Label),
    /// `.branchtargets` or `.calltargets`.
    Targets(Vec<String>),
    /// `.callprototype`.
    Prototype(Signature),
}

/// An operation over virtual registers.
#[derive(Debug, Clone)]
pub struct Micro {
    pub op: Op,
    /// Predicate and whether it is negated.
    pub guard: Option<(u32, bool)>,
    pub line: u32,
    /// Set on the first operation of a PTX instruction.
    pub class: Option<InstructionClass>,
    /// The instruction's spelling, in [`Body::names`].
    pub name: u32,
    /// Jump target of `Bra`.
    pub target: Option<Label>,
    /// Jump targets of `BrxIdx`.
    pub targets: Vec<Label>,
}

/// A statement of the function in lowered form.
#[derive(Debug, Clone)]
pub enum Item {
    Label(Label),
    Micro(Box<Micro>),
}

pub struct Builder<'a> {
    pub module: &'a Module,
    /// The module's target.
    pub target: Target,
    pub env: &'a Environment,
    pub functions: &'a Functions,
    pub layout: Layout,
    pub scopes: Vec<HashMap<String, Symbol>>,
    pub items: Vec<Item>,
    pub extras: Vec<Extra>,
    /// Width of each virtual register.
    pub registers: Vec<Width>,
    /// Virtual registers that the lowering made up: written before every read, under the same guard.
    pub temporaries: Vec<bool>,
    constants: Vec<u32>,
    constants32: HashMap<u32, u32>,
    constants64: HashMap<u64, u32>,
    labels: u32,
    /// State of the instruction being lowered.
    pub line: u32,
    /// Where the manual defines it.
    pub section: Option<&'static str>,
    pub guard: Option<(u32, bool)>,
    pub class: Option<InstructionClass>,
    name: u32,
    names: Vec<String>,
    name_index: HashMap<String, u32>,
    /// The predicate that stands for the condition code register.
    carry: Option<u32>,
    /// Where `ret` goes in a function expanded in place, innermost last.
    pub returns: Vec<Label>,
    /// The function being expanded in place, innermost.
    pub expanded: Option<&'a Function>,
    /// Set in a function with a body of its own.
    pub frame: Option<Frame>,
    /// Functions with a body of their own that this body calls.
    pub callees: Vec<u32>,
}

impl<'a> Builder<'a> {
    pub fn new(module: &'a Module, env: &'a Environment, functions: &'a Functions, layout: Layout) -> Self {
        Self {
            module,
            target: Target::parse(&module.target).unwrap_or(Target { number: 0, specific: false }),
            env,
            functions,
            layout,
            scopes: vec![HashMap::new()],
            items: Vec::new(),
            extras: Vec::new(),
            registers: Vec::new(),
            temporaries: Vec::new(),
            constants: Vec::new(),
            constants32: HashMap::new(),
            constants64: HashMap::new(),
            labels: 0,
            line: 0,
            section: None,
            guard: None,
            class: None,
            name: 0,
            names: Vec::new(),
            name_index: HashMap::new(),
            carry: None,
            returns: Vec::new(),
            expanded: None,
            frame: None,
            callees: Vec::new(),
        }
    }

    /// Widths of the virtual registers, which of them are temporaries, and the constants' bank.
    pub fn into_body(self) -> (Vec<Width>, Vec<bool>, Body) {
        let (extras, constants, names) = (self.extras, self.constants, self.names);
        let body = Body { extras, constants, names, predicates: 2, ..Body::default() };
        (self.registers, self.temporaries, body)
    }

    /// Names the instruction being lowered, for counting.
    pub fn set_name(&mut self, spelling: String) {
        let names = &mut self.names;
        self.name = *self.name_index.entry(spelling).or_insert_with_key(|spelling| {
            names.push(spelling.clone());
            names.len() as u32 - 1
        });
    }

    pub fn new_label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels - 1)
    }

    pub fn register(&mut self, width: Width, temporary: bool) -> u32 {
        self.registers.push(width);
        self.temporaries.push(temporary);
        self.registers.len() as u32 - 1
    }

    pub fn temp(&mut self, width: Width) -> u32 {
        self.register(width, true)
    }

    /// The slot of a 32-bit constant.
    pub fn constant32(&mut self, value: u32) -> u32 {
        let bank = &mut self.constants;
        *self.constants32.entry(value).or_insert_with(|| {
            let slot = bank.len() as u32 * 4;
            bank.extend([value; 32]);
            slot | CONSTANT
        })
    }

    /// The slot of a 64-bit constant.
    pub fn constant64(&mut self, value: u64) -> u32 {
        let bank = &mut self.constants;
        *self.constants64.entry(value).or_insert_with(|| {
            let slot = bank.len() as u32 * 4;
            for _ in 0..32 {
                bank.extend([value as u32, (value >> 32) as u32]);
            }
            slot | CONSTANT
        })
    }

    pub fn carry(&mut self) -> u32 {
        match self.carry {
            Some(c) => c,
            None => {
                let c = self.register(Width::Pred, false);
                self.carry = Some(c);
                c
            }
        }
    }

    /// Declares a name in the innermost scope.
    pub fn declare(&mut self, name: &str, symbol: Symbol) -> Result<()> {
        let scope = self.scopes.last_mut().expect("there is always a scope");
        match scope.insert(name.to_string(), symbol) {
            None => Ok(()),
            Some(_) => Err(LowerErrorKind::Duplicate(name.to_string())),
        }
    }

    pub fn declare_registers(&mut self, v: &Variable) -> Result<()> {
        let names: Vec<String> = match v.count {
            None => vec![v.name.clone()],
            Some(n) if n > 1 << 20 => return Err(LowerErrorKind::Unsupported(format!("{n} registers `{}`", v.name))),
            Some(n) => (0..n).map(|i| format!("{}{i}", v.name)).collect(),
        };
        for name in names {
            let symbol = self.register_symbol(v)?;
            self.declare(&name, symbol)?;
        }
        Ok(())
    }

    /// Fresh registers of a declaration's type.
    pub fn register_symbol(&mut self, v: &Variable) -> Result<Symbol> {
        let wide = v.ty == Type::B128;
        let width = if wide { Some(Width::W64) } else { Width::of(v.ty) };
        let Some(width) = width.filter(|_| !wide || v.vector == 1) else {
            return Err(LowerErrorKind::Unsupported(format!("registers of type {}", super::operands::dotted(v.ty))));
        };
        if !v.dims.is_empty() {
            return Err(LowerErrorKind::Invalid(format!("register `{}` cannot be an array", v.name)));
        }
        Ok(if wide {
            Symbol::Wide([self.register(width, false), self.register(width, false)])
        } else if v.vector == 1 {
            Symbol::Register { slot: self.register(width, false), ty: v.ty }
        } else {
            Symbol::Vector((0..v.vector).map(|_| self.register(width, false)).collect(), v.ty)
        })
    }

    /// Whether a name is an input parameter of the function whose statements are being lowered; kernels' are not meant.
    pub fn is_input(&self, name: &str) -> bool {
        // Names of the module, then a function's parameters, then its body's.
        let innermost = self.scopes.iter().rposition(|s| s.contains_key(name));
        let function = match (self.expanded, &self.frame) {
            (Some(f), _) => Some(f),
            (None, Some(frame)) => Some(&self.module.functions[frame.function as usize]),
            _ => None,
        };
        innermost == Some(1) && function.is_some_and(|f| f.params.iter().any(|p| p.name == name))
    }

    pub fn lookup(&self, name: &str) -> Option<&Symbol> {
        self.scopes.iter().rev().find_map(|s| s.get(name))
    }

    /// Appends an operation under the current guard.
    pub fn push(&mut self, op: Op) {
        let guard = self.guard;
        self.push_guarded(op, guard);
    }

    pub fn push_guarded(&mut self, op: Op, guard: Option<(u32, bool)>) {
        let (line, class, name) = (self.line, self.class.take(), self.name);
        let micro = Micro { op, guard, line, class, name, target: None, targets: Vec::new() };
        self.items.push(Item::Micro(Box::new(micro)));
    }

    /// Appends a lane-wise operation.
    pub fn emit(&mut self, code: Code, d: u32, sources: &[u32]) {
        let at = |i: usize| sources.get(i).copied().unwrap_or(0);
        self.push(Op { code, guard: 0, d, a: at(0), b: at(1), c: at(2), x: 0 });
    }

    /// As [`Builder::emit`] into a new temporary.
    pub fn compute(&mut self, code: Code, sources: &[u32]) -> u32 {
        let result = match code.row() {
            Some(row) => Width::of(row.result).expect("rows use register types"),
            None => Width::Pred,
        };
        let d = self.temp(result);
        self.emit(code, d, sources);
        d
    }

    pub fn emit_extra(&mut self, code: Code, extra: Extra) {
        let a = self.extras.len() as u32;
        self.extras.push(extra);
        self.push(Op { code, guard: 0, d: 0, a, b: 0, c: 0, x: 0 });
    }

    /// Marks the operation emitted last, an access to global memory, as one that passes the L1 cache by.
    pub fn mark_uncached(&mut self, uncached: bool) {
        if let Some(Item::Micro(micro)) = self.items.last_mut() {
            micro.op.x = uncached.into();
        }
    }

    pub fn emit_plain(&mut self, code: Code, x: u32) {
        self.push(Op { code, guard: 0, d: 0, a: 0, b: 0, c: 0, x });
    }

    /// A jump, under the current guard.
    pub fn jump(&mut self, target: Label) {
        self.emit_plain(Code::Bra, 0);
        if let Some(Item::Micro(m)) = self.items.last_mut() {
            m.target = Some(target);
        }
    }

    pub fn place(&mut self, label: Label) {
        self.items.push(Item::Label(label));
    }

    pub fn reg(&self, slot: u32, width: Width) -> Reg {
        Reg { slot, width }
    }

    /// `p` or its complement as a predicate slot.
    pub fn predicate(&mut self, slot: u32, negated: bool) -> u32 {
        match (slot, negated) {
            (s, false) => s,
            (TRUE, true) => super::ir::FALSE,
            (s, true) => self.compute(Code::PredNot, &[s]),
        }
    }
}
