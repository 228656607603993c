//! PTX text to a syntax tree. Nothing here knows what an instruction means: that is the lowering's business.

pub mod ast;
