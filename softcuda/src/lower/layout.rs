//! Places of a kernel's parameters and of its shared and local variables.

use std::collections::{HashMap, HashSet};

use super::builder::Result;
use super::{LowerErrorKind, ParamLayout};
use crate::ptx::ast::{Function, Module, Operand, Space, Statement, Variable};

/// Offsets of everything a kernel declares or refers to outside registers.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    pub params: Vec<ParamLayout>,
    pub param_bytes: u32,
    /// Offsets of shared variables by the address of their declaration: two functions may have one of the same name, even on
    /// the same line.
    shared: HashMap<*const Variable, u64>,
    /// Bytes of statically declared shared memory.
    pub static_shared: u32,
    pub shared_align: u32,
    /// Bytes of local memory handed out so far.
    pub local: u64,
    /// Bytes of each variable in local memory, by its offset.
    sizes: HashMap<u64, u64>,
}

fn align_up(x: u64, align: u64) -> u64 {
    x.next_multiple_of(align.max(1))
}

fn size_of(v: &Variable) -> Result<u64> {
    v.bytes().ok_or_else(|| LowerErrorKind::Invalid(format!("the size of `{}` overflows", v.name)))
}

fn aligned(v: &Variable) -> Result<u64> {
    let a = v.alignment();
    if a.is_power_of_two() { Ok(a) } else { Err(LowerErrorKind::Invalid(format!("alignment {a} of `{}`", v.name))) }
}

impl Layout {
    pub fn new(module: &Module, kernel: &Function) -> Result<Self> {
        let mut layout = Self { shared_align: 16, ..Self::default() };
        let mut end = 0u64;
        for p in &kernel.params {
            if p.space != Space::Param {
                return Err(LowerErrorKind::Invalid(format!("kernel parameter `{}` is not in `.param`", p.name)));
            }
            let (size, align) = (size_of(p)?, aligned(p)?);
            let offset = align_up(end, align);
            end = offset + size;
            if end > 32764 {
                return Err(LowerErrorKind::Invalid("parameters exceed 32764 bytes".into()));
            }
            layout.params.push(ParamLayout { offset: offset as u32, size: size as u32, align: align as u32 });
        }
        layout.param_bytes = end as u32;
        layout.place_shared(module, kernel)?;
        Ok(layout)
    }

    /// Module variables that the kernel or a function it may call names, then the ones declared inside; unsized arrays
    /// share the start of dynamic shared memory.
    fn place_shared(&mut self, module: &Module, kernel: &Function) -> Result<()> {
        let mut names = HashSet::new();
        let mut inner = Vec::new();
        for f in module.functions.iter().filter(|f| !f.is_entry || std::ptr::eq(*f, kernel)) {
            collect(f.body.as_deref().unwrap_or_default(), &mut names, &mut inner);
        }
        let outer = module.variables.iter().filter(|v| v.space == Space::Shared && names.contains(v.name.as_str()));
        let all: Vec<&Variable> = outer.chain(inner).collect();
        let mut end = 0u64;
        for v in all.iter().filter(|v| !v.dims.contains(&0)) {
            let offset = align_up(end, aligned(v)?);
            end = offset + size_of(v)?;
            self.shared.insert(std::ptr::from_ref(*v), offset);
        }
        for v in &all {
            self.shared_align = self.shared_align.max(aligned(v)? as u32);
        }
        let dynamic = align_up(end, self.shared_align.into());
        for v in all.iter().filter(|v| v.dims.contains(&0)) {
            self.shared.insert(std::ptr::from_ref(*v), dynamic);
        }
        self.static_shared = u32::try_from(end)
            .ok()
            .filter(|&b| b <= 256 << 10)
            .ok_or_else(|| LowerErrorKind::Invalid(format!("{end} bytes of shared memory")))?;
        Ok(())
    }

    /// Offset of a shared variable in the block's shared memory; `None` for one that nothing names.
    pub fn shared_offset(&self, v: &Variable) -> Option<u64> {
        self.shared.get(&std::ptr::from_ref(v)).copied()
    }

    /// Reserves local memory for a variable.
    pub fn place_local(&mut self, v: &Variable) -> Result<u64> {
        let bytes = size_of(v)?;
        let offset = self.reserve_local(bytes, aligned(v)?)?;
        self.sizes.insert(offset, bytes);
        Ok(offset)
    }

    /// Bytes of the variable at an offset of local memory.
    pub fn local_bytes(&self, offset: u64) -> Option<u64> {
        self.sizes.get(&offset).copied()
    }

    /// Begins the frame of another function.
    pub fn new_frame(&mut self) {
        self.local = 0;
        self.sizes.clear();
    }

    /// Reserves local memory.
    pub fn reserve_local(&mut self, bytes: u64, align: u64) -> Result<u64> {
        let offset = align_up(self.local, align);
        self.local = offset + bytes;
        if self.local > 512 << 10 {
            return Err(LowerErrorKind::Invalid("local memory exceeds 512 KiB per thread".into()));
        }
        Ok(offset)
    }
}

/// Names that operands use, and shared variables declared in bodies.
fn collect<'a>(body: &'a [Statement], names: &mut HashSet<&'a str>, shared: &mut Vec<&'a Variable>) {
    for s in body {
        match s {
            Statement::Block(inner) => collect(inner, names, shared),
            Statement::Variable(v) if v.space == Space::Shared => shared.push(v),
            Statement::Instruction(i) => i.operands.iter().for_each(|o| operand_names(o, names)),
            _ => {}
        }
    }
}

fn operand_names<'a>(o: &'a Operand, names: &mut HashSet<&'a str>) {
    match o {
        Operand::Name(n) | Operand::SymbolOffset { name: n, .. } | Operand::Address { base: Some(n), .. } => {
            names.insert(n);
        }
        Operand::Vector(v) | Operand::List(v) => v.iter().for_each(|o| operand_names(o, names)),
        Operand::TensorAddress { base, coordinates, rest } => {
            operand_names(base, names);
            coordinates.iter().chain(rest).for_each(|o| operand_names(o, names));
        }
        _ => {}
    }
}
