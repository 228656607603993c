//! An instruction's modifiers, taken one by one; what is left over at the end is an error.

use super::LowerErrorKind;
use super::builder::Result;
use crate::ptx::ast::{Instruction, Type};

pub struct Modifiers<'a> {
    opcode: &'a str,
    rest: Vec<&'a str>,
}

impl<'a> Modifiers<'a> {
    pub fn new(i: &'a Instruction) -> Self {
        Self { opcode: &i.opcode, rest: i.modifiers.iter().map(String::as_str).collect() }
    }

    /// Takes a modifier if it is there.
    pub fn take(&mut self, name: &str) -> bool {
        let found = self.rest.iter().position(|m| *m == name);
        found.map(|i| self.rest.remove(i)).is_some()
    }

    /// Takes the first modifier that the table lists.
    pub fn one_of<T: Copy>(&mut self, table: &[(&str, T)]) -> Option<T> {
        let (i, value) = self
            .rest
            .iter()
            .enumerate()
            .find_map(|(i, m)| table.iter().find(|(name, _)| name == m).map(|(_, value)| (i, *value)))?;
        self.rest.remove(i);
        Some(value)
    }

    /// As [`Modifiers::one_of`], where one is required.
    pub fn required<T: Copy>(&mut self, what: &str, table: &[(&str, T)]) -> Result<T> {
        self.one_of(table).ok_or_else(|| LowerErrorKind::Operand {
            expected: format!("`{}` needs {what}", self.opcode),
            got: format!("`.{}`", self.rest.join(".")),
        })
    }

    /// Takes the last modifier that is a type.
    pub fn last_type(&mut self) -> Result<Type> {
        self.try_last_type().ok_or_else(|| LowerErrorKind::Operand {
            expected: format!("`{}` ends in a type", self.opcode),
            got: format!("`.{}`", self.rest.join(".")),
        })
    }

    pub fn try_last_type(&mut self) -> Option<Type> {
        let i = self.rest.iter().rposition(|m| Type::from_name(m).is_some())?;
        Type::from_name(self.rest.remove(i))
    }

    /// Every modifier must have been taken.
    pub fn finish(self) -> Result<()> {
        match self.rest.first() {
            None => Ok(()),
            Some(m) => {
                Err(LowerErrorKind::UnknownModifier { instruction: self.opcode.to_string(), modifier: m.to_string() })
            }
        }
    }
}
