//! First contents of module variables (PTX ISA 5.4.4).

use std::collections::HashMap;

use super::calls::function_address;
use crate::ptx::ast::{Init, Module, Type, Variable};

/// The bytes that a `.global` or `.const` variable starts with, zero where nothing is said. `addresses` gives the places of
/// the module's variables, all of them generic addresses; names of device functions are known from the module.
///
/// # Errors
/// What is wrong with an initial value, in words.
pub fn initial_bytes(
    module: &Module,
    variable: &Variable,
    addresses: &HashMap<String, u64>,
) -> Result<Vec<u8>, String> {
    let bytes = variable.bytes().ok_or("has no size")?;
    let element = variable.ty.bytes() as usize;
    let mut memory = vec![0; bytes as usize];
    if variable.init.len() * element > memory.len() {
        return Err("has more initial values than elements".into());
    }
    for (place, init) in memory.chunks_exact_mut(element).zip(&variable.init) {
        place.copy_from_slice(&bits(module, init, variable.ty, addresses)?.to_le_bytes()[..element]);
    }
    Ok(memory)
}

/// One initial value as the bits of an element.
fn bits(module: &Module, init: &Init, ty: Type, addresses: &HashMap<String, u64>) -> Result<u128, String> {
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
            // Addresses are generic already, so `generic()` changes nothing.
            let address = addresses.get(name).copied().or_else(|| function_address(module, name));
            let address =
                address.ok_or_else(|| format!("`{name}` is neither a variable nor a function of the module"))?;
            address.wrapping_add_signed(*offset).into()
        }
        (Init::Symbol { name, .. }, _) => return Err(format!("the address of `{name}` does not fit the type")),
        _ => return Err(format!("an initial value does not suit the type {ty:?}")),
    })
}
