//! Syntax tree to executable program: resolves names, checks types and operand counts, orders the basic blocks so that
//! divergent lanes meet again, and packs registers into a dense file.
//!
//! Whatever is not implemented exactly as the PTX ISA defines it is a [`LowerError`] that names it; no modifier is ignored
//! unless the manual makes it a hint.

mod error;

use std::collections::HashMap;
use std::sync::Arc;

pub use error::{LowerError, LowerErrorKind};

use crate::ptx::ast;

/// What the lowering needs to know about the module's surroundings.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// Addresses of the module's `.global` and `.const` variables, already placed in device memory, by name.
    pub symbols: HashMap<String, u64>,
    /// Compute capability of the device, e.g. `(8, 0)`: a module for a newer target is rejected.
    pub compute_capability: (u32, u32),
}

/// The kernels of a module, in order.
#[derive(Debug, Clone)]
pub struct Program {
    pub kernels: Vec<Arc<Kernel>>,
}

impl Program {
    /// The kernel of this name.
    pub fn kernel(&self, name: &str) -> Option<&Arc<Kernel>> {
        self.kernels.iter().find(|k| k.name == name)
    }
}

/// One kernel parameter's place in the parameter buffer, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamLayout {
    pub offset: u32,
    pub size: u32,
    pub align: u32,
}

/// An executable kernel.
#[derive(Debug)]
pub struct Kernel {
    pub name: String,
    pub params: Vec<ParamLayout>,
    /// Size of the whole parameter buffer in bytes.
    pub param_bytes: u32,
    /// Bytes of shared memory that the kernel declares; dynamic shared memory follows it at `shared_align`.
    pub static_shared_bytes: u32,
    /// Greatest alignment of any shared variable the kernel uses, at least 16.
    pub shared_align: u32,
    /// Bytes of local memory per thread.
    pub local_bytes: u32,
    /// Most threads per block, from `.maxntid` or `.reqntid`.
    pub max_threads: Option<u32>,
    /// The only block shape the kernel may be launched with.
    pub reqntid: Option<[u32; 3]>,
    /// `.minnctapersm`.
    pub min_ctas_per_sm: Option<u32>,
    /// `.maxnreg`.
    pub max_registers: Option<u32>,
    /// Registers of 32 bits per thread that the packed file needs: an estimate of what `ptxas` would use.
    pub registers: u32,
    /// `.version` of the module.
    pub version: (u32, u32),
    /// Source text by line, `lines[0]` is line 1.
    pub lines: Arc<Vec<String>>,
}

/// Lowers every `.entry` of a module.
///
/// # Errors
/// The first construct that is wrong PTX or not implemented, with its line.
pub fn lower_module(ast: &ast::Module, env: &Environment) -> Result<Program, LowerError> {
    let _ = env;
    match ast.functions.iter().find(|f| f.is_entry && f.body.is_some()) {
        None => Ok(Program { kernels: Vec::new() }),
        Some(f) => Err(LowerError::new(ast, f.line, LowerErrorKind::Unsupported(format!("kernel `{}`", f.name)))),
    }
}
