//! Constant expressions (PTX ISA 4.5).

use super::ParseError;
use super::lexer::Kind;
use super::parser::Parser;

/// A constant: PTX evaluates integers in 64 bits, signed unless a literal says otherwise, and floating point in double.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Constant {
    Signed(i64),
    Unsigned(u64),
    /// `0f...`, which may not take part in an expression.
    F32(u32),
    F64(f64),
}

impl Constant {
    fn bits(self) -> Option<u64> {
        match self {
            Constant::Signed(v) => Some(v as u64),
            Constant::Unsigned(v) => Some(v),
            _ => None,
        }
    }

    /// The integer, if it is one.
    pub fn int(self) -> Option<i128> {
        match self {
            Constant::Signed(v) => Some(v.into()),
            Constant::Unsigned(v) => Some(v.into()),
            _ => None,
        }
    }

    fn truth(self) -> Option<bool> {
        self.bits().map(|b| b != 0)
    }
}

/// Binary operators by precedence, loosest first (PTX ISA, table "Operator Precedence").
const LEVELS: [&[&str]; 10] = [
    &["||"],
    &["&&"],
    &["|"],
    &["^"],
    &["&"],
    &["==", "!="],
    &["<", ">", "<=", ">="],
    &["<<", ">>"],
    &["+", "-"],
    &["*", "/", "%"],
];

impl<'a> Parser<'_, 'a> {
    /// Whether a constant expression can start at the next token.
    pub fn at_constant(&self) -> bool {
        match self.peek() {
            Kind::Number(_) | Kind::Name("WARP_SZ") => true,
            Kind::Dotted(word) => word.starts_with(|c: char| c.is_ascii_digit()),
            Kind::Mark("-" | "+" | "~" | "(") => true,
            Kind::Mark("!") => !matches!(self.peek_at(1), Kind::Name(name) if name != "WARP_SZ"),
            _ => false,
        }
    }

    pub fn constant(&mut self) -> Result<Constant, ParseError> {
        // Nearly every constant is a lone literal: no need to go down all the levels of precedence for it.
        if let Kind::Number(text) = self.peek()
            && matches!(self.peek_at(1), Kind::Mark("," | ";" | "]" | "}" | ")"))
        {
            let value = literal(text).ok_or_else(|| self.error(format!("`{text}` is not a number")))?;
            self.next();
            return Ok(value);
        }
        self.enter()?;
        let condition = self.binary(0)?;
        let value = if self.accept("?") {
            let then = self.constant()?;
            self.expect(":")?;
            let otherwise = self.constant()?;
            let truth = condition.truth().ok_or_else(|| self.error("the condition of `?:` must be an integer"))?;
            if truth { then } else { otherwise }
        } else {
            condition
        };
        self.leave();
        Ok(value)
    }

    /// A constant expression that must be an integer in `0 ..= max`; `what` names it in the error.
    pub fn natural(&mut self, what: &str, max: u64) -> Result<u64, ParseError> {
        let error = self.error_here();
        let value = self.constant()?;
        match value.int().map(u64::try_from) {
            Some(Ok(v)) if v <= max => Ok(v),
            _ => Err(error(format!("{what} must be an integer in 0..={max}, not {}", describe(value)))),
        }
    }

    fn binary(&mut self, level: usize) -> Result<Constant, ParseError> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.binary(level + 1)?;
        while let Kind::Mark(mark) = self.peek()
            && operators.contains(&mark)
        {
            self.next();
            let right = self.binary(level + 1)?;
            left = apply(mark, left, right).map_err(|message| self.error(message))?;
        }
        Ok(left)
    }

    fn unary(&mut self) -> Result<Constant, ParseError> {
        self.enter()?;
        let value = self.unary_inner();
        self.leave();
        value
    }

    fn unary_inner(&mut self) -> Result<Constant, ParseError> {
        use Constant::*;
        match self.peek() {
            Kind::Mark(mark @ ("-" | "+" | "~" | "!")) => {
                self.next();
                let value = self.unary()?;
                Ok(match (mark, value) {
                    ("+", value) => value,
                    ("-", Signed(v)) => Signed(v.wrapping_neg()),
                    ("-", Unsigned(v)) => Unsigned(v.wrapping_neg()),
                    ("-", F32(bits)) => F32(bits ^ 0x8000_0000),
                    ("-", F64(v)) => F64(-v),
                    ("~", Signed(v)) => Signed(!v),
                    ("~", Unsigned(v)) => Unsigned(!v),
                    ("!", Signed(v)) => Signed(i64::from(v == 0)),
                    ("!", Unsigned(v)) => Signed(i64::from(v == 0)),
                    _ => return Err(self.error(format!("`{mark}` does not apply to a floating-point constant"))),
                })
            }
            Kind::Mark("(") => {
                self.next();
                if let Kind::Dotted(cast @ ("s64" | "u64")) = self.peek() {
                    self.next();
                    self.expect(")")?;
                    let value = self.unary()?;
                    let bits = match value {
                        F64(v) if cast == "s64" => v as i64 as u64,
                        F64(v) => v as u64,
                        _ => value.bits().ok_or_else(|| self.error("a 0f constant cannot be cast"))?,
                    };
                    return Ok(if cast == "s64" { Signed(bits as i64) } else { Unsigned(bits) });
                }
                let value = self.constant()?;
                self.expect(")")?;
                Ok(value)
            }
            Kind::Number(text) => {
                let value = literal(text).ok_or_else(|| self.error(format!("`{text}` is not a number")))?;
                self.next();
                Ok(value)
            }
            // `.5` reaches the parser as a dotted word.
            Kind::Dotted(word) => {
                let value = format!("0.{word}").parse().ok().map(F64);
                let value = value.ok_or_else(|| self.error(format!("`.{word}` is not a number")))?;
                self.next();
                Ok(value)
            }
            Kind::Name("WARP_SZ") => {
                self.next();
                Ok(Signed(32))
            }
            _ => Err(self.unexpected("a constant")),
        }
    }
}

/// What to call a constant in an error.
pub(super) fn describe(value: Constant) -> String {
    match value {
        Constant::Signed(v) => v.to_string(),
        Constant::Unsigned(v) => v.to_string(),
        Constant::F32(bits) => f32::from_bits(bits).to_string(),
        Constant::F64(v) => v.to_string(),
    }
}

fn literal(text: &str) -> Option<Constant> {
    let lower = text.to_ascii_lowercase();
    if let Some(digits) = lower.strip_prefix("0f") {
        let bits = (digits.len() == 8).then(|| u32::from_str_radix(digits, 16).ok())??;
        return Some(Constant::F32(bits));
    }
    if let Some(digits) = lower.strip_prefix("0d") {
        let bits = (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())??;
        return Some(Constant::F64(f64::from_bits(bits)));
    }
    // The suffix, unlike the prefixes, is only known in upper case.
    let unsigned = text.ends_with('U');
    let digits = if unsigned { &lower[..lower.len() - 1] } else { lower.as_str() };
    let (digits, radix) = if let Some(hex) = digits.strip_prefix("0x") {
        (hex, 16)
    } else if let Some(binary) = digits.strip_prefix("0b") {
        (binary, 2)
    } else if digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit()) {
        (&digits[1..], 8)
    } else {
        (digits, 10)
    };
    let plain = digits.bytes().all(|b| b.is_ascii_alphanumeric());
    match u64::from_str_radix(digits, radix) {
        Ok(value) if plain => {
            // A literal past i64 is unsigned even without `U`.
            Some(i64::try_from(value).ok().filter(|_| !unsigned).map_or(Constant::Unsigned(value), Constant::Signed))
        }
        // Rust would also read "inf" and "nan": those never reach here, a literal starts with a digit.
        _ if radix == 10 && !unsigned && digits.contains(['.', 'e']) => digits.parse().ok().map(Constant::F64),
        _ => None,
    }
}

fn apply(mark: &str, left: Constant, right: Constant) -> Result<Constant, String> {
    use Constant::*;
    let float = |v: Constant| match v {
        F64(v) => Some(v),
        Signed(v) => Some(v as f64),
        Unsigned(v) => Some(v as f64),
        F32(_) => None,
    };
    if matches!(left, F32(_) | F64(_)) || matches!(right, F32(_) | F64(_)) {
        let (Some(a), Some(b)) = (float(left), float(right)) else {
            return Err("a 0f constant cannot be part of an expression".into());
        };
        return Ok(match mark {
            "+" => F64(a + b),
            "-" => F64(a - b),
            "*" => F64(a * b),
            "/" => F64(a / b),
            "<" => Signed((a < b).into()),
            ">" => Signed((a > b).into()),
            "<=" => Signed((a <= b).into()),
            ">=" => Signed((a >= b).into()),
            "==" => Signed((a == b).into()),
            "!=" => Signed((a != b).into()),
            _ => return Err(format!("`{mark}` does not apply to floating-point constants")),
        });
    }
    let (a, b) = (left.bits().unwrap_or(0), right.bits().unwrap_or(0));
    let (sa, sb) = (a as i64, b as i64);
    let unsigned = matches!(left, Unsigned(_)) || matches!(right, Unsigned(_));
    let of = |bits: u64, unsigned: bool| if unsigned { Unsigned(bits) } else { Signed(bits as i64) };
    let truth = |value: bool| Signed(value.into());
    if matches!(mark, "/" | "%") && b == 0 {
        return Err("division by zero in a constant expression".into());
    }
    Ok(match mark {
        "+" => of(a.wrapping_add(b), unsigned),
        "-" => of(a.wrapping_sub(b), unsigned),
        "*" => of(a.wrapping_mul(b), unsigned),
        "/" if unsigned => Unsigned(a / b),
        "/" => Signed(sa.wrapping_div(sb)),
        "%" if unsigned => Unsigned(a % b),
        "%" => Signed(sa.wrapping_rem(sb)),
        "&" => of(a & b, unsigned),
        "|" => of(a | b, unsigned),
        "^" => of(a ^ b, unsigned),
        // A shift has the type of its left operand alone.
        "<<" => of(a.checked_shl(u32::try_from(b).unwrap_or(64)).unwrap_or(0), matches!(left, Unsigned(_))),
        ">>" if matches!(left, Unsigned(_)) => Unsigned(a.checked_shr(u32::try_from(b).unwrap_or(64)).unwrap_or(0)),
        ">>" => Signed(sa >> b.min(63)),
        "&&" => truth(a != 0 && b != 0),
        "||" => truth(a != 0 || b != 0),
        "==" => truth(a == b),
        "!=" => truth(a != b),
        "<" => truth(if unsigned { a < b } else { sa < sb }),
        ">" => truth(if unsigned { a > b } else { sa > sb }),
        "<=" => truth(if unsigned { a <= b } else { sa <= sb }),
        ">=" => truth(if unsigned { a >= b } else { sa >= sb }),
        _ => return Err(format!("`{mark}` is not an operator of constant expressions")),
    })
}
