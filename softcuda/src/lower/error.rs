//! What the lowering reports.

use crate::ptx::ast::Module;

/// Why a module cannot be lowered, with the line it stands on and where the manual speaks of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {kind} in `{text}`{}", section.map_or(String::new(), |s| format!(" (PTX ISA {s})")))]
pub struct LowerError {
    /// One-based source line.
    pub line: u32,
    /// The line's text, trimmed.
    pub text: String,
    /// Number and title of the manual's section, where the line has an instruction or a directive of the manual.
    pub section: Option<&'static str>,
    pub kind: LowerErrorKind,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LowerErrorKind {
    #[error("unknown instruction `{0}`")]
    UnknownInstruction(String),
    #[error("`{instruction}` does not take the modifier `.{modifier}`")]
    UnknownModifier { instruction: String, modifier: String },
    #[error("`{instruction}` requires target {needs} or higher; the module is for sm_{number}")]
    Target { instruction: String, needs: String, number: u32 },
    #[error("`{instruction}` requires PTX {}.{} or later; the module is PTX {}.{}", needs.0, needs.1, found.0, found.1)]
    Version { instruction: String, needs: (u32, u32), found: (u32, u32) },
    #[error("not implemented: {0}")]
    Unsupported(String),
    #[error("undeclared {what} `{name}`")]
    Undeclared { what: &'static str, name: String },
    #[error("`{0}` is declared twice")]
    Duplicate(String),
    #[error("{expected}, got {got}")]
    Operand { expected: String, got: String },
    #[error("{0}")]
    Invalid(String),
}

impl LowerError {
    pub(crate) fn new(module: &Module, line: u32, section: Option<&'static str>, kind: LowerErrorKind) -> Self {
        let text = module.lines.get((line as usize).wrapping_sub(1)).map_or("", |l| l.trim()).to_string();
        Self { line, text, section, kind }
    }
}
