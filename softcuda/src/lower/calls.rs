//! Calls of device functions that keep a body of their own (PTX ISA 7.1, 9.7.12.5), as against those expanded in place.
//!
//! Recursive functions, functions whose address is taken and large ones called from several places are lowered once for each
//! kernel that reaches them. Every body has its own registers in the warp's file, so that a call saves nothing unless the
//! function is already active in that lane; the executor keeps a stack of return places for each lane. Bodies stand before
//! their callers: the executor runs the lanes at the lowest operation, so that all lanes of a call are back before any goes on.
//!
//! Arguments and results lie in a block of the caller's local memory, laid out as the signature says. A function finds its
//! own variables from a frame pointer and that block from an argument pointer, both registers set on entry.

use std::collections::HashMap;

use super::LowerErrorKind;
use super::builder::{Builder, Item, Result, Symbol};
use super::ir::{Extra, Reg};
use super::isa::{Code, Width};
use crate::ptx::ast::{Function, Init, Module, Operand, Space, Statement, Type, Variable};

/// Function addresses: this plus the function's position in the module times [`FUNCTION_STEP`]. No memory lies there.
const FUNCTION_WINDOW: u64 = 0x0400_0000_0000_0000;
const FUNCTION_STEP: u64 = 16;

/// Instructions beyond which a function called from several places is not expanded in each.
const EXPANDED: usize = 2000;

/// The function a name stands for, through aliases; definitions before declarations.
pub fn find(module: &Module, name: &str) -> Option<u32> {
    let name = module.aliases.iter().find(|(alias, _)| alias == name).map_or(name, |(_, aliasee)| aliasee);
    let named = |f: &&(usize, &Function)| !f.1.is_entry && f.1.name == name;
    let mut all = module.functions.iter().enumerate().filter(|f| named(&f));
    all.clone().find(|(_, f)| f.body.is_some()).or_else(|| all.next()).map(|(i, _)| i as u32)
}

/// The address of a device function as a value: what `mov` of its name and initialisers with it yield.
pub fn function_address(module: &Module, name: &str) -> Option<u64> {
    find(module, name).map(address_of)
}

fn address_of(function: u32) -> u64 {
    FUNCTION_WINDOW + u64::from(function) * FUNCTION_STEP
}

/// A call whose target has a body of its own.
#[derive(Debug, Clone)]
pub struct Call {
    pub target: Target,
    /// The caller's frame pointer.
    pub fp: Reg,
    /// Offset of the argument block in the caller's frame.
    pub block: u64,
    /// Bytes of the caller's frame: where the callee's begins.
    pub frame: u64,
}

#[derive(Debug, Clone)]
pub enum Target {
    /// Position in the module.
    Direct(u32),
    /// An address, and the functions it may name.
    Indirect(Reg, Vec<(u64, u32)>),
}

/// Where a function's body is.
#[derive(Debug, Clone)]
pub struct Entry {
    pub name: String,
    pub pc: u32,
    /// 32-bit registers of the body in the warp's file, then its 64-bit ones, as byte offsets.
    pub narrow: std::ops::Range<u32>,
    pub wide: std::ops::Range<u32>,
    pub predicates: std::ops::Range<u32>,
    pub frame: u64,
}

/// What the module's functions do, found once.
#[derive(Debug, Default)]
pub struct Functions {
    /// Whether the function keeps a body of its own, by position.
    own: Vec<bool>,
    /// Functions whose address is a value somewhere.
    taken: Vec<u32>,
    /// Every name of a function, aliases included, with its position.
    names: HashMap<String, u32>,
}

/// What one function's body refers to.
#[derive(Default)]
struct References {
    instructions: usize,
    calls: Vec<u32>,
    taken: Vec<u32>,
}

impl Functions {
    pub fn new(module: &Module) -> Self {
        let names: HashMap<&str, u32> = module
            .functions
            .iter()
            .map(|f| f.name.as_str())
            .chain(module.aliases.iter().map(|(alias, _)| alias.as_str()))
            .filter_map(|n| find(module, n).map(|f| (n, f)))
            .collect();
        let mut all: Vec<References> = Vec::new();
        for f in &module.functions {
            let mut r = References::default();
            references(f.body.as_deref().unwrap_or_default(), &names, &mut r);
            all.push(r);
        }
        let mut taken: Vec<u32> = all.iter().flat_map(|r| r.taken.iter().copied()).collect();
        for v in &module.variables {
            taken.extend(v.init.iter().filter_map(|i| match i {
                Init::Symbol { name, .. } => names.get(name.as_str()).copied(),
                _ => None,
            }));
        }
        taken.sort_unstable();
        taken.dedup();
        let mut own = vec![false; all.len()];
        for (i, own) in own.iter_mut().enumerate() {
            *own = taken.contains(&(i as u32)) || recursive(i as u32, &all);
        }
        // Callers are counted in source order; sizes as expanded so far.
        let mut sites = vec![0; all.len()];
        all.iter().flat_map(|r| &r.calls).for_each(|&c| sites[c as usize] += 1);
        let mut sizes = vec![None; all.len()];
        for i in 0..all.len() {
            let size = expanded(i as u32, &all, &own, &mut sizes);
            own[i] |= sites[i] > 1 && size > EXPANDED;
        }
        taken.retain(|&f| module.functions[f as usize].body.is_some());
        let names = names.into_iter().map(|(n, f)| (n.to_string(), f)).collect();
        Self { own, taken, names }
    }

    /// Every name of a function with its address.
    pub fn addresses(&self) -> impl Iterator<Item = (&String, u64)> {
        self.names.iter().map(|(name, &f)| (name, address_of(f)))
    }
}

fn references(body: &[Statement], names: &HashMap<&str, u32>, r: &mut References) {
    let function = |o: &Operand| match o {
        Operand::Name(n) => names.get(n.as_str()).copied(),
        _ => None,
    };
    for s in body {
        match s {
            Statement::Block(inner) => references(inner, names, r),
            Statement::Targets { targets, .. } => {
                r.taken.extend(targets.iter().filter_map(|t| names.get(t.as_str()).copied()));
            }
            Statement::Instruction(i) => {
                r.instructions += 1;
                let target =
                    (i.opcode == "call").then(|| i.operands.iter().position(|o| !matches!(o, Operand::List(_))));
                for (at, o) in i.operands.iter().enumerate() {
                    match (o, target.flatten() == Some(at)) {
                        (o, true) => r.calls.extend(function(o)),
                        (Operand::List(list), _) => r.taken.extend(list.iter().filter_map(function)),
                        (o, _) => r.taken.extend(function(o)),
                    }
                }
            }
            _ => {}
        }
    }
}

/// Whether direct calls lead from a function back to it.
fn recursive(function: u32, all: &[References]) -> bool {
    let mut seen = vec![false; all.len()];
    let mut work = all[function as usize].calls.clone();
    while let Some(f) = work.pop() {
        if f == function {
            return true;
        }
        if !std::mem::replace(&mut seen[f as usize], true) {
            work.extend(&all[f as usize].calls);
        }
    }
    false
}

/// Instructions of a function with everything that is expanded in it.
fn expanded(function: u32, all: &[References], own: &[bool], sizes: &mut [Option<usize>]) -> usize {
    if let Some(size) = sizes[function as usize] {
        return size;
    }
    sizes[function as usize] = Some(0);
    let r = &all[function as usize];
    let inner = r.calls.iter().filter(|&&c| !own[c as usize]);
    let size = inner.fold(r.instructions, |sum, &c| sum.saturating_add(expanded(c, all, own, sizes)));
    sizes[function as usize] = Some(size);
    size
}

/// Places of a call's parameters and results in its block, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub params: Vec<(u64, u64)>,
    pub returns: Vec<(u64, u64)>,
    pub bytes: u64,
}

impl Signature {
    pub fn new(params: &[Variable], returns: &[Variable]) -> Result<Self> {
        let mut bytes = 0u64;
        let mut place = |v: &Variable| {
            let size = v.bytes().filter(|&b| b <= 1 << 16).ok_or_else(|| {
                LowerErrorKind::Unsupported(format!("parameter `{}` of no or more than 65536 bytes", v.name))
            })?;
            // What the ABI does not pass, as `ptxas` says; predicates in registers belong to the language all the same.
            let in_register = v.ty == Type::Pred && v.space == Space::Reg;
            if !in_register
                && matches!(v.ty, Type::Pred | Type::U8 | Type::S8 | Type::U16 | Type::S16)
                && v.dims.is_empty()
            {
                let ty = super::operands::dotted(v.ty);
                return Err(LowerErrorKind::Invalid(format!("parameter `{}` of a function cannot be {ty}", v.name)));
            }
            let at = bytes.next_multiple_of(v.alignment());
            bytes = at + size;
            Ok::<_, LowerErrorKind>((at, size))
        };
        let params = params.iter().map(&mut place).collect::<Result<_>>()?;
        let returns = returns.iter().map(&mut place).collect::<Result<_>>()?;
        Ok(Self { params, returns, bytes })
    }
}

/// The function whose body is being lowered, where it is not a kernel.
#[derive(Debug, Clone)]
pub struct Frame {
    pub fp: u32,
    pub ap: u32,
    pub function: u32,
    pub signature: Signature,
}

/// One lowered body, kernel or function.
pub struct Lowered {
    /// Position in the module; `None` for the kernel.
    pub function: Option<u32>,
    pub items: Vec<Item>,
    pub frame: u64,
    pub line: u32,
    /// Bodies it may call.
    callees: Vec<u32>,
}

impl Builder<'_> {
    /// Whether calls of this function are calls, not expansions.
    pub fn has_own_body(&self, function: u32) -> bool {
        self.functions.own[function as usize]
    }

    /// Functions that an indirect call may reach: those named, or all whose address is taken, with this signature.
    pub fn candidates(&self, named: Option<&[u32]>, signature: &Signature) -> Vec<(u64, u32)> {
        let fits = |f: u32| {
            let function = &self.module.functions[f as usize];
            Signature::new(&function.params, &function.returns).is_ok_and(|s| s == *signature)
        };
        let all = named.unwrap_or(&self.functions.taken);
        all.iter().filter(|&&f| fits(f)).map(|&f| (address_of(f), f)).collect()
    }

    /// The kernel's body and those of all functions it may call, callees before callers.
    pub fn bodies(&mut self, kernel: &Function) -> Result<Vec<Lowered>> {
        self.kernel(kernel)?;
        let mut done = vec![self.finish_body(None, kernel.line, 0)];
        let mut next = 0;
        while next < done.len() {
            for f in done[next].callees.clone() {
                if !done.iter().any(|d| d.function == Some(f)) {
                    let first = self.extras.len();
                    self.device_function(f)?;
                    let line = self.module.functions[f as usize].line;
                    done.push(self.finish_body(Some(f), line, first));
                }
            }
            next += 1;
        }
        Ok(callees_first(done))
    }

    fn finish_body(&mut self, function: Option<u32>, line: u32, first: usize) -> Lowered {
        let frame = self.layout.local.next_multiple_of(16);
        for extra in &mut self.extras[first..] {
            if let Extra::Call(c) = extra {
                c.frame = frame;
            }
        }
        let callees = std::mem::take(&mut self.callees);
        Lowered { function, items: std::mem::take(&mut self.items), frame, line, callees }
    }

    fn device_function(&mut self, f: u32) -> Result<()> {
        let function = &self.module.functions[f as usize];
        let body = function.body.as_deref().expect("only functions with a body are called");
        self.line = function.line;
        self.layout.new_frame();
        self.scopes.truncate(1);
        self.scopes.push(Default::default());
        let signature = Signature::new(&function.params, &function.returns)?;
        let (fp, ap) = (self.register(Width::W64, false), self.register(Width::W64, false));
        self.emit_extra(Code::Frame, Extra::Frame(self.reg(fp, Width::W64), self.reg(ap, Width::W64)));
        let places: Vec<u64> = signature.params.iter().chain(&signature.returns).map(|p| p.0).collect();
        let inputs = function.params.len();
        self.frame = Some(Frame { fp, ap, function: f, signature });
        for (n, (v, offset)) in function.params.iter().chain(&function.returns).zip(places).enumerate() {
            if v.space != Space::Reg {
                self.declare(&v.name, Symbol::Stack { base: ap, offset })?;
                continue;
            }
            self.declare_registers(v)?;
            if n < inputs {
                let value = self.dest_reg(&Operand::Name(v.name.clone()), v.ty)?;
                self.load_word(ap, offset, value, v.ty);
            }
        }
        // The body's own names must not clash with its parameters'.
        self.scopes.push(Default::default());
        self.statements(body)?;
        self.guard = None;
        self.return_from_body()?;
        self.scopes.truncate(1);
        self.frame = None;
        Ok(())
    }

    /// `ret` in a body of its own, under the current guard.
    pub fn return_from_body(&mut self) -> Result<()> {
        let frame = self.frame.clone().expect("only functions return");
        let function = &self.module.functions[frame.function as usize];
        for (v, (offset, _)) in function.returns.iter().zip(&frame.signature.returns) {
            if v.space == Space::Reg {
                let value = self.source_reg(&Operand::Name(v.name.clone()), v.ty)?;
                self.store_word(frame.ap, *offset, value, v.ty);
            }
        }
        self.emit_plain(Code::Return, 0);
        Ok(())
    }

    /// A place in the frame being lowered, as a symbol.
    pub fn local_symbol(&self, offset: u64) -> Symbol {
        match &self.frame {
            Some(frame) => Symbol::Stack { base: frame.fp, offset },
            None => Symbol::Variable { space: Space::Local, address: offset },
        }
    }

    /// A call, once its arguments are in the block at `block` of this frame.
    pub fn emit_call(&mut self, target: Target, block: u64) {
        match &target {
            Target::Direct(f) => self.callees.push(*f),
            Target::Indirect(_, all) => self.callees.extend(all.iter().map(|(_, f)| *f)),
        }
        let fp = match &self.frame {
            Some(frame) => frame.fp,
            None => self.constant64(0),
        };
        let fp = self.reg(fp, Width::W64);
        self.emit_extra(Code::Call, Extra::Call(Call { target, fp, block, frame: 0 }));
    }
}

fn callees_first(mut bodies: Vec<Lowered>) -> Vec<Lowered> {
    let at: HashMap<Option<u32>, usize> = bodies.iter().enumerate().map(|(i, b)| (b.function, i)).collect();
    let mut seen = vec![false; bodies.len()];
    let mut order = Vec::new();
    let mut stack = vec![(0, 0)];
    seen[0] = true;
    while let Some((body, next)) = stack.last_mut() {
        match bodies[*body].callees.get(*next) {
            Some(callee) => {
                *next += 1;
                let callee = at[&Some(*callee)];
                if !std::mem::replace(&mut seen[callee], true) {
                    stack.push((callee, 0));
                }
            }
            None => {
                order.push(*body);
                stack.pop();
            }
        }
    }
    let mut slots: Vec<Option<Lowered>> = bodies.drain(..).map(Some).collect();
    order.into_iter().map(|i| slots[i].take().expect("each body once")).collect()
}

/// Bytes of stack that calls need beyond the kernel's own frame; `None` if they may nest without a bound known here.
pub fn stack_bytes(bodies: &[Lowered]) -> Option<u64> {
    // Callees stand first, so one that has no size yet is part of a cycle.
    let mut needed: HashMap<u32, u64> = HashMap::new();
    for body in bodies {
        let mut deepest = 0;
        for callee in &body.callees {
            deepest = deepest.max(*needed.get(callee)?);
        }
        match body.function {
            Some(f) => needed.insert(f, body.frame + deepest),
            None => return Some(deepest),
        };
    }
    None
}
