//! Module-scope variables: their place in device memory and their first values.

use std::collections::HashMap;

use super::module::Placed;
use super::status::{CUresult, Failure, Outcome};
use crate::memory::ALIGNMENT;
use crate::ptx::ast::{Init, Linkage, Module, Space, Type, Variable};

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
    for variable in variables {
        let (start, bytes) = found[&variable.name];
        let element = variable.ty.bytes() as usize;
        if variable.init.len() * element > bytes as usize {
            return Err(invalid(variable, "has more initial values than elements"));
        }
        // SAFETY: as above.
        let memory = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, bytes as usize) };
        for (place, init) in memory.chunks_exact_mut(element).zip(&variable.init) {
            let bits = bits(init, variable.ty, &found).map_err(|why| invalid(variable, why))?;
            place.copy_from_slice(&bits.to_le_bytes()[..element]);
        }
    }
    Ok(found)
}

/// One initial value as the bits of an element.
fn bits(init: &Init, ty: Type, addresses: &HashMap<String, (u64, u64)>) -> Result<u128, String> {
    use Type::*;
    Ok(match (init, ty) {
        // Padding of an inner list that ends early.
        (Init::Int(0), _) => 0,
        (Init::F32(bits), F32) => (*bits).into(),
        (Init::F32(bits), F64) => f64::from(f32::from_bits(*bits)).to_bits().into(),
        (Init::F64(bits), F32) => (f64::from_bits(*bits) as f32).to_bits().into(),
        (Init::F64(bits), F64) => (*bits).into(),
        (Init::Int(value), B8 | B16 | B32 | B64 | B128 | U8 | U16 | U32 | U64 | S8 | S16 | S32 | S64) => *value as u128,
        (Init::Symbol { name, offset, .. }, B64 | U64 | S64) => {
            // The driver's addresses are generic already, so `generic()` changes nothing.
            let (addr, _) = addresses.get(name).ok_or_else(|| format!("`{name}` is not a variable of the module"))?;
            addr.wrapping_add_signed(*offset).into()
        }
        (Init::Symbol { name, .. }, _) => return Err(format!("the address of `{name}` does not fit the type")),
        _ => return Err(format!("an initial value does not suit the type {ty:?}")),
    })
}
