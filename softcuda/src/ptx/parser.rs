//! The token cursor that the grammar's parts share.

use std::collections::HashMap;

use super::ParseError;
use super::ast::{Space, Variable};
use super::lexer::{Kind, Token};

/// Nesting of braces and parentheses beyond which a text is rejected rather than the stack overflowed.
const MAX_DEPTH: u32 = 100;

pub(super) struct Parser<'t, 'a> {
    tokens: &'t [Token<'a>],
    at: usize,
    depth: u32,
    /// Bytes of one element of each variable in scope, innermost scope last; what `name[index]` scales by.
    pub element_bytes: Vec<HashMap<&'a str, u64>>,
    /// Variables of module-wide spaces declared in the function being read, under names that no text can have.
    pub inner: Vec<Variable>,
    inner_count: u32,
}

impl<'t, 'a> Parser<'t, 'a> {
    /// `tokens` must end in [`Kind::End`], as the lexer's do.
    pub fn new(tokens: &'t [Token<'a>]) -> Self {
        Parser { tokens, at: 0, depth: 0, element_bytes: vec![HashMap::new()], inner: Vec::new(), inner_count: 0 }
    }

    pub fn token_at(&self, ahead: usize) -> Token<'a> {
        self.tokens[(self.at + ahead).min(self.tokens.len() - 1)]
    }

    pub fn peek(&self) -> Kind<'a> {
        self.token_at(0).kind
    }

    pub fn peek_at(&self, ahead: usize) -> Kind<'a> {
        self.token_at(ahead).kind
    }

    pub fn line(&self) -> u32 {
        self.token_at(0).line
    }

    pub fn next(&mut self) -> Kind<'a> {
        let kind = self.peek();
        self.at += 1;
        kind
    }

    pub fn accept(&mut self, mark: &str) -> bool {
        let found = matches!(self.peek(), Kind::Mark(found) if found == mark);
        self.at += usize::from(found);
        found
    }

    pub fn accept_dotted(&mut self, word: &str) -> bool {
        let found = self.peek() == Kind::Dotted(word);
        self.at += usize::from(found);
        found
    }

    pub fn expect(&mut self, mark: &str) -> Result<(), ParseError> {
        if self.accept(mark) { Ok(()) } else { Err(self.unexpected(&format!("`{mark}`"))) }
    }

    pub fn name(&mut self, what: &str) -> Result<&'a str, ParseError> {
        match self.peek() {
            Kind::Name(name) => {
                self.next();
                Ok(name)
            }
            _ => Err(self.unexpected(what)),
        }
    }

    /// A variable of a function's body; one in `.global` or `.const` becomes a variable of the module.
    pub fn body_variable(&mut self, mut v: Variable) -> Variable {
        if matches!(v.space, Space::Global | Space::Const) {
            self.inner_count += 1;
            let symbol = format!("{}::{}", v.name, self.inner_count);
            self.inner.push(Variable { name: symbol.clone(), ..v.clone() });
            v.symbol = Some(symbol);
            v.init.clear();
        }
        v
    }

    /// An error at the next token.
    pub fn error(&self, message: impl Into<String>) -> ParseError {
        self.error_here()(message.into())
    }

    /// Like [`Parser::error`] at where the cursor is now, for use after it has moved on.
    pub fn error_here(&self) -> impl Fn(String) -> ParseError + use<> {
        let Token { line, column, .. } = self.token_at(0);
        move |message| ParseError { line, column, message }
    }

    pub fn unexpected(&self, wanted: &str) -> ParseError {
        let found = match self.peek() {
            Kind::Name(name) => format!("`{name}`"),
            Kind::Dotted(word) => format!("`.{word}`"),
            Kind::Number(text) => format!("`{text}`"),
            Kind::Text(_) => "a string".into(),
            Kind::Mark(mark) => format!("`{mark}`"),
            Kind::End => "the end of the text".into(),
        };
        self.error(format!("expected {wanted}, found {found}"))
    }

    /// Counts one level of nesting; [`Parser::leave`] undoes it.
    pub fn enter(&mut self) -> Result<(), ParseError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(self.error(format!("nested deeper than {MAX_DEPTH} levels"))) } else { Ok(()) }
    }

    pub fn leave(&mut self) {
        self.depth -= 1;
    }

    /// Skips the rest of the current line: `.loc` and `.file` have no terminator of their own.
    pub fn skip_line(&mut self) {
        let line = self.line();
        while self.line() == line && self.peek() != Kind::End {
            self.next();
        }
    }

    /// Skips a bracketed group, `open` being the next token.
    pub fn skip_group(&mut self, open: &str, close: &str) -> Result<(), ParseError> {
        self.expect(open)?;
        let mut depth = 1;
        while depth > 0 {
            match self.next() {
                Kind::Mark(mark) if mark == open => depth += 1,
                Kind::Mark(mark) if mark == close => depth -= 1,
                Kind::End => return Err(self.unexpected(&format!("`{close}`"))),
                _ => {}
            }
        }
        Ok(())
    }

    /// A `,`-separated list up to `close`, its opening mark already read.
    pub fn list<T>(
        &mut self,
        close: &str,
        mut item: impl FnMut(&mut Self) -> Result<T, ParseError>,
    ) -> Result<Vec<T>, ParseError> {
        let mut items = Vec::new();
        if self.accept(close) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if self.accept(close) {
                return Ok(items);
            }
            if !self.accept(",") {
                return Err(self.unexpected(&format!("`,` or `{close}`")));
            }
        }
    }
}
