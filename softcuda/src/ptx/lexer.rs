//! Characters to tokens.

use super::ParseError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind<'a> {
    /// An identifier, `%` and `$` included; `_` alone too.
    Name(&'a str),
    /// `.word` or `.word::word`, without the leading dot.
    Dotted(&'a str),
    /// A numeric literal as written.
    Number(&'a str),
    /// A string literal without its quotes.
    Text(&'a str),
    /// An operator or punctuation mark.
    Mark(&'static str),
    End,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Token<'a> {
    pub kind: Kind<'a>,
    pub line: u32,
    pub column: u32,
    /// No blank or comment between the token before and this one.
    pub joined: bool,
}

/// Longest first, so that `<<` is not read as `<` twice.
const MARKS: [&str; 35] = [
    "<<", ">>", "<=", ">=", "==", "!=", "&&", "||", "@@", "{", "}", "(", ")", "[", "]", "<", ">", ",", ";", ":", "@",
    "!", "+", "-", "*", "/", "%", "&", "|", "^", "~", "?", "=", "#", "\\",
];

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn is_name(byte: u8) -> bool {
    is_word(byte) || byte == b'$'
}

/// Length of the longest prefix whose bytes all satisfy `accept`.
fn run(bytes: &[u8], accept: impl Fn(u8) -> bool) -> usize {
    bytes.iter().position(|&b| !accept(b)).unwrap_or(bytes.len())
}

/// Length of a numeric literal: `0x1FU`, `017`, `0b11`, `0f3F800000`, `12`, `1.5e-3`.
fn number(bytes: &[u8]) -> usize {
    let prefixed = bytes.len() > 1 && bytes[0] == b'0' && matches!(bytes[1] | 0x20, b'x' | b'f' | b'd' | b'b');
    if prefixed {
        return run(bytes, is_word);
    }
    let mut len = run(bytes, |b| b.is_ascii_digit());
    if bytes.get(len) == Some(&b'.') {
        len += 1;
        len += run(&bytes[len..], |b| b.is_ascii_digit());
    }
    if matches!(bytes.get(len), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(len + 1), Some(b'+' | b'-')));
        let digits = run(&bytes[len + 1 + sign..], |b| b.is_ascii_digit());
        if digits > 0 {
            len += 1 + sign + digits;
        }
    }
    // A suffix such as `U`, or garbage that the literal's reader then rejects whole.
    len + run(&bytes[len..], is_word)
}

pub(super) fn tokenize(text: &str) -> Result<Vec<Token<'_>>, ParseError> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::with_capacity(bytes.len() / 4);
    let (mut at, mut line, mut line_start) = (0, 1u32, 0);
    let mut joined = false;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let column = (at - line_start + 1) as u32;
        let error = move |message: String| Err(ParseError { line, column, message });
        if rest[0] == b'\n' {
            line += 1;
            line_start = at + 1;
        }
        if rest[0].is_ascii_whitespace() || rest[0] == 0x0b {
            at += 1;
            joined = false;
            continue;
        }
        if rest.starts_with(b"//") {
            at += run(rest, |b| b != b'\n');
            joined = false;
            continue;
        }
        if rest.starts_with(b"/*") {
            let Some(len) = rest[2..].windows(2).position(|pair| pair == b"*/") else {
                return error("comment `/*` has no end".into());
            };
            for (offset, _) in rest[..len + 2].iter().enumerate().filter(|(_, b)| **b == b'\n') {
                line += 1;
                line_start = at + offset + 1;
            }
            at += len + 4;
            joined = false;
            continue;
        }
        let name_start =
            is_word(rest[0]) || (matches!(rest[0], b'%' | b'$') && rest.get(1).is_some_and(|&b| is_name(b)));
        let (kind, len) = if rest[0].is_ascii_digit() {
            let len = number(rest);
            (Kind::Number(&text[at..at + len]), len)
        } else if name_start {
            let len = 1 + run(&rest[1..], is_name);
            (Kind::Name(&text[at..at + len]), len)
        } else if rest[0] == b'.' {
            let mut len = 1 + run(&rest[1..], is_word);
            while rest[len..].starts_with(b"::") && rest.get(len + 2).is_some_and(|&b| is_word(b)) {
                len += 2 + run(&rest[len + 2..], is_word);
            }
            if len == 1 {
                return error("a word is missing after `.`".into());
            }
            (Kind::Dotted(&text[at + 1..at + len]), len)
        } else if rest[0] == b'"' {
            let mut len = 1;
            loop {
                match rest.get(len) {
                    Some(b'"') => break,
                    Some(b'\\') => len += 2,
                    None | Some(b'\n') => return error("string has no closing quote on its line".into()),
                    Some(_) => len += 1,
                }
            }
            (Kind::Text(text.get(at + 1..at + len).unwrap_or_default()), len + 1)
        } else if let Some(mark) = MARKS.iter().find(|mark| rest.starts_with(mark.as_bytes())) {
            (Kind::Mark(mark), mark.len())
        } else {
            let found = text[at..].chars().next().unwrap_or('\u{fffd}');
            return error(format!("unexpected character {found:?}"));
        };
        tokens.push(Token { kind, line, column, joined });
        at += len;
        joined = true;
    }
    tokens.push(Token { kind: Kind::End, line, column: (at - line_start + 1) as u32, joined: false });
    Ok(tokens)
}
