//! PTX text to a syntax tree. Nothing here knows what an instruction means: that is the lowering's business.

mod adapter;
pub mod ast;
mod constant;
mod declaration;
mod lexer;
pub mod link;
mod parser;
mod statement;

/// Why a text is not PTX, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct ParseError {
    /// One-based.
    pub line: u32,
    /// One-based, in bytes.
    pub column: u32,
    pub message: String,
}

/// Parses a PTX module (PTX ISA, chapters 4 to 7 and 11).
///
/// Debugging directives (`.file`, `.loc`, `.section`) and `.pragma` leave no trace in the tree.
///
/// # Errors
/// The first place where the text departs from the grammar, and every construct of the grammar that the tree has no form
/// for: textures and samplers, masked initialisers, video-instruction selectors.
pub fn parse(text: &str) -> Result<ast::Module, ParseError> {
    let tokens = lexer::tokenize(text)?;
    parser::Parser::new(&tokens).module(text)
}
