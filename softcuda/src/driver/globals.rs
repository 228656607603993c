//! Module-scope variables: their place in device memory and their first values.

use std::collections::HashMap;

use super::module::Placed;
use super::status::{CUresult, Failure, Outcome};
use crate::lower::initial_bytes;
use crate::memory::ALIGNMENT;
use crate::ptx::ast::{Linkage, Module, Space, Variable};

/// All `.const` variables of a module together, in bytes (PTX ISA 5.1.3).
const CONST_BYTES: u64 = 64 << 10;

fn invalid(variable: &Variable, why: impl std::fmt::Display) -> Failure {
    CUresult::ERROR_INVALID_PTX.with(format!("line {}: variable `{}`: {why}", variable.line, variable.name))
}

/// Allocates and initialises every `.global` and `.const` variable: address and size by name.
pub(super) fn place(ast: &Module, placed: &mut Placed) -> Outcome<HashMap<String, (u64, u64)>> {
    let variables = ast.variables.iter().filter(|v| matches!(v.space, Space::Global | Space::Const));
    let mut found: HashMap<String, (u64, u64)> = HashMap::new();
    let mut constants = 0;
    for variable in variables.clone() {
        if variable.linkage == Linkage::Extern {
            return Err(invalid(variable, "unresolved extern: modules are not linked"));
        }
        let bytes = variable.bytes().filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or_else(|| invalid(variable, "has no size"))?;
        if variable.space == Space::Const {
            constants += bytes;
            if constants > CONST_BYTES {
                return Err(invalid(variable, format!("constants exceed {CONST_BYTES} bytes")));
            }
        }
        let align = variable.alignment();
        let slack = if align > ALIGNMENT { align } else { 0 };
        let start = placed.add((bytes + slack) as usize)?.next_multiple_of(align);
        // SAFETY: inside the allocation just made, which no kernel knows yet.
        let memory = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, bytes as usize) };
        memory.fill(0);
        if found.insert(variable.name.clone(), (start, bytes)).is_some() {
            return Err(invalid(variable, "is declared twice"));
        }
    }
    let addresses = found.iter().map(|(name, (start, _))| (name.clone(), *start)).collect();
    for variable in variables {
        let (start, bytes) = found[&variable.name];
        let initial = initial_bytes(ast, variable, &addresses).map_err(|why| invalid(variable, why))?;
        // SAFETY: as above.
        let memory = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, bytes as usize) };
        memory.copy_from_slice(&initial);
    }
    Ok(found)
}
