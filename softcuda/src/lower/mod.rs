//! Syntax tree to executable program: resolves names, checks types and operand counts, orders the basic blocks so that
//! divergent lanes meet again, and packs registers into a dense file.
//!
//! Whatever is not implemented exactly as the PTX ISA defines it is a [`LowerError`] that names it; no modifier is ignored
//! unless the manual makes it a hint.

mod builder;
pub(crate) mod calls;
mod class;
mod entry_registers;
mod error;
mod families;
mod flow;
mod in_flight;
mod initial;
pub(crate) mod ir;
pub(crate) mod ir_bulk;
pub(crate) mod ir_cluster;
pub(crate) mod ir_mbarrier;
pub(crate) mod isa;
mod layout;
mod manual;
mod modifiers;
mod operands;
mod polls;
mod registers;
mod requirements;
mod round;
pub(crate) mod special;
mod statements;
mod windows;

use std::collections::HashMap;
use std::sync::Arc;

pub use calls::function_address;
pub use class::InstructionClass;
pub use error::{LowerError, LowerErrorKind};
pub use initial::initial_bytes;
pub(crate) use round::Round;
pub use windows::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};

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
    /// Bytes of local memory per thread, without the stack of its calls.
    pub local_bytes: u32,
    /// Bytes of stack that calls of device functions need, where they cannot nest without bound.
    pub stack_bytes: Option<u32>,
    /// Most threads per block, from `.maxntid` or `.reqntid`.
    pub max_threads: Option<u32>,
    /// The only block shape the kernel may be launched with.
    pub reqntid: Option<[u32; 3]>,
    /// `.minnctapersm`.
    pub min_ctas_per_sm: Option<u32>,
    /// `.reqnctapercluster`: the only cluster shape the kernel may be launched with.
    pub required_cluster: Option<[u32; 3]>,
    /// `.explicitcluster`: the launch must say the cluster's shape.
    pub explicit_cluster: bool,
    /// `.maxclusterrank`: most blocks of a cluster.
    pub max_cluster_rank: Option<u32>,
    /// `.blocksareclusters`: the grid of a launch counts clusters.
    pub blocks_are_clusters: bool,
    /// `.maxnreg`.
    pub max_registers: Option<u32>,
    /// Registers of 32 bits per thread that the packed file needs: an estimate of what `ptxas` would use.
    pub registers: u32,
    /// Registers of 32 bits that each thread has at entry, where `setmaxnreg` moves them about.
    pub(crate) entry_registers: Option<u32>,
    /// `.version` of the module.
    pub version: (u32, u32),
    /// Source text by line, `lines[0]` is line 1.
    pub lines: Arc<Vec<String>>,
    pub(crate) body: ir::Body,
}

/// Lowers every `.entry` of a module.
///
/// # Errors
/// The first construct that is wrong PTX or not implemented, with its line.
pub fn lower_module(ast: &ast::Module, env: &Environment) -> Result<Program, LowerError> {
    check_target(ast, env)?;
    let lines = Arc::new(ast.lines.clone());
    let functions = calls::Functions::new(ast);
    let kernels = ast.functions.iter().filter(|f| f.is_entry && f.body.is_some());
    let kernels =
        kernels.map(|f| lower_kernel(ast, f, env, &functions, &lines).map(Arc::new)).collect::<Result<_, _>>()?;
    Ok(Program { kernels })
}

/// A module runs on its own target or a newer one; `sm_90a` and the like only on their own.
fn check_target(ast: &ast::Module, env: &Environment) -> Result<(), LowerError> {
    let error = |text: String| {
        Err(LowerError::new(ast, ast.target_line(), Some(manual::MODULE), LowerErrorKind::Invalid(text)))
    };
    let Some(target) = requirements::Target::parse(&ast.target) else {
        return error(format!("unknown target `{}`", ast.target));
    };
    let (major, minor) = env.compute_capability;
    let device = major * 10 + minor;
    if target.number > device || target.specific && target.number != device {
        return error(format!(
            "target `{}` does not run on a device of compute capability {major}.{minor}",
            ast.target
        ));
    }
    let (since, found) = (target.version(), ast.version);
    if found < since {
        return error(format!(
            "target `{}` requires PTX {}.{} or later; the module is PTX {}.{}",
            ast.target, since.0, since.1, found.0, found.1
        ));
    }
    if ast.address_size != 64 {
        return error(format!("address size {} is not implemented, only 64", ast.address_size));
    }
    Ok(())
}

fn lower_kernel(
    ast: &ast::Module,
    function: &ast::Function,
    env: &Environment,
    functions: &calls::Functions,
    lines: &Arc<Vec<String>>,
) -> Result<Kernel, LowerError> {
    let at = |line: u32| move |kind| LowerError::new(ast, line, None, kind);
    let layout = layout::Layout::new(ast, function).map_err(at(function.line))?;
    let mut builder = builder::Builder::new(ast, env, functions, layout);
    let bodies = builder.bodies(function).map_err(|kind| LowerError::new(ast, builder.line, builder.section, kind))?;
    let layout = std::mem::take(&mut builder.layout);
    let (widths, temporaries, mut body) = builder.into_body();
    let stack_bytes = calls::stack_bytes(&bodies).map(|b| b as u32);
    let (mut registers, mut deepest, mut local_bytes) = (0, 0, 0);
    for part in bodies {
        let (mut nodes, labels) = flow::split(part.items).map_err(at(part.line))?;
        let order = flow::order(&nodes);
        in_flight::note(&mut nodes, &order, &mut body);
        let pc = body.ops.len() as u32;
        let placed = registers::assign(&mut nodes, &order, &widths, &temporaries, &mut body);
        flow::emit(&nodes, &order, &labels, &mut body);
        match part.function {
            None => {
                registers = placed.count + deepest;
                local_bytes = part.frame as u32;
                body.entry = pc;
            }
            Some(f) => {
                deepest = deepest.max(placed.count);
                let name = ast.functions[f as usize].name.clone();
                let registers::Placed { narrow, wide, predicates, .. } = placed;
                let entry = calls::Entry { name, pc, narrow, wide, predicates, frame: part.frame };
                body.functions.insert(f, entry);
            }
        }
    }
    let mut kernel = Kernel {
        name: function.name.clone(),
        params: layout.params,
        param_bytes: layout.param_bytes,
        static_shared_bytes: layout.static_shared,
        shared_align: layout.shared_align,
        local_bytes,
        stack_bytes,
        max_threads: None,
        reqntid: None,
        min_ctas_per_sm: None,
        required_cluster: None,
        explicit_cluster: false,
        max_cluster_rank: None,
        blocks_are_clusters: false,
        max_registers: None,
        registers,
        entry_registers: None,
        version: ast.version,
        lines: Arc::clone(lines),
        body,
    };
    for (name, numbers) in &function.directives {
        let refused = |kind| LowerError::new(ast, function.line, Some(manual::PERFORMANCE), kind);
        directive(&mut kernel, name, numbers).map_err(refused)?;
    }
    kernel.entry_registers = entry_registers::entry_registers(&kernel);
    Ok(kernel)
}

fn directive(kernel: &mut Kernel, name: &str, numbers: &[u64]) -> Result<(), LowerErrorKind> {
    let first = || numbers.first().map(|&n| n as u32);
    match name {
        "maxntid" | "reqntid" => {
            let shape = [0, 1, 2].map(|i| numbers.get(i).map_or(1, |&n| n as u32));
            let threads: u64 = shape.iter().map(|&n| u64::from(n)).product();
            if !(1..=1024).contains(&threads) {
                return Err(LowerErrorKind::Invalid(format!("`.{name}` of {threads} threads")));
            }
            kernel.max_threads = Some(kernel.max_threads.unwrap_or(u32::MAX).min(threads as u32));
            if name == "reqntid" {
                kernel.reqntid = Some(shape);
            }
        }
        "reqnctapercluster" => {
            let shape = [0, 1, 2].map(|i| numbers.get(i).map_or(1, |&n| n as u32));
            if shape.contains(&0) {
                return Err(LowerErrorKind::Invalid(format!("`.{name}` of {shape:?} blocks")));
            }
            kernel.required_cluster = Some(shape);
        }
        "explicitcluster" => kernel.explicit_cluster = true,
        "maxclusterrank" => kernel.max_cluster_rank = first(),
        "blocksareclusters" => kernel.blocks_are_clusters = true,
        "minnctapersm" => kernel.min_ctas_per_sm = first(),
        "maxnreg" => kernel.max_registers = first(),
        "noreturn" => {}
        _ => return Err(LowerErrorKind::Unsupported(format!("`.{name}`"))),
    }
    Ok(())
}
