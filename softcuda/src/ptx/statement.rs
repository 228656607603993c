//! Function bodies: statements, instructions and operands (PTX ISA 4.3.2, 6.4, 9.1).

use super::ParseError;
use super::ast::{Guard, Instruction, Linkage, Operand, Statement, Variable};
use super::constant::Constant;
use super::lexer::Kind;
use super::parser::Parser;

/// Special registers with components: `%tid.x` is one name rather than a vector's element.
const VECTOR_SPECIALS: [&str; 8] =
    ["%tid", "%ntid", "%ctaid", "%nctaid", "%clusterid", "%nclusterid", "%cluster_ctaid", "%cluster_nctaid"];

impl<'a> Parser<'_, 'a> {
    /// `{ ... }`, opening brace included.
    pub fn block(&mut self) -> Result<Vec<Statement>, ParseError> {
        self.expect("{")?;
        self.enter()?;
        self.element_bytes.push(Default::default());
        let mut statements = Vec::new();
        while !self.accept("}") {
            self.statement(&mut statements)?;
        }
        self.element_bytes.pop();
        self.leave();
        Ok(statements)
    }

    fn statement(&mut self, into: &mut Vec<Statement>) -> Result<(), ParseError> {
        match self.peek() {
            Kind::Mark("{") => into.push(Statement::Block(self.block()?)),
            Kind::Dotted("loc" | "file") | Kind::Mark("@@") => self.skip_line(),
            Kind::Dotted("pragma") => self.pragma()?,
            Kind::Dotted("section") => {
                self.next();
                self.next();
                self.skip_group("{", "}")?;
            }
            Kind::Dotted(_) => {
                let mut variables = Vec::new();
                self.variables(Linkage::None, &mut variables)?;
                into.extend(variables.into_iter().map(|v| Statement::Variable(self.body_variable(v))));
            }
            Kind::Name(name) if self.peek_at(1) == Kind::Mark(":") => {
                let line = self.line();
                self.next();
                self.next();
                into.push(self.labelled(name.to_owned(), line)?);
            }
            Kind::Name(_) | Kind::Mark("@") => into.push(Statement::Instruction(self.instruction()?)),
            _ => return Err(self.unexpected("a statement or `}`")),
        }
        Ok(())
    }

    /// What `name:` stands before: a label, a list of targets or a prototype.
    fn labelled(&mut self, name: String, line: u32) -> Result<Statement, ParseError> {
        match self.peek() {
            Kind::Dotted("branchtargets" | "calltargets") => {
                self.next();
                let targets = self.list(";", |parser| Ok(parser.name("a label or function")?.to_owned()))?;
                Ok(Statement::Targets { name, targets, line })
            }
            Kind::Dotted("callprototype") => {
                self.next();
                let returns = if self.accept("(") { self.parameters()? } else { Vec::new() };
                self.name("`_`")?;
                let params = if self.accept("(") { self.parameters()? } else { Vec::new() };
                while let Kind::Dotted(word) = self.peek() {
                    self.function_directive(word)?;
                }
                self.expect(";")?;
                Ok(Statement::Prototype { name, returns, params, line })
            }
            _ => Ok(Statement::Label { name, line }),
        }
    }

    fn parameters(&mut self) -> Result<Vec<Variable>, ParseError> {
        self.list(")", Self::parameter)
    }

    fn instruction(&mut self) -> Result<Instruction, ParseError> {
        let line = self.line();
        let guard = if self.accept("@") {
            let negated = self.accept("!");
            Some(Guard { negated, name: self.name("a predicate")?.to_owned() })
        } else {
            None
        };
        let opcode = self.name("an instruction")?.to_owned();
        let mut modifiers = Vec::new();
        while let Kind::Dotted(word) = self.peek() {
            self.next();
            modifiers.push(word.to_owned());
        }
        let operands = if opcode == "call" {
            self.list(";", |parser| if parser.accept("(") { parser.call_list() } else { parser.operand() })?
        } else {
            self.list(";", Self::operand)?
        };
        Ok(Instruction { guard, opcode, modifiers, operands, line })
    }

    fn call_list(&mut self) -> Result<Operand, ParseError> {
        Ok(Operand::List(self.list(")", Self::operand)?))
    }

    fn operand(&mut self) -> Result<Operand, ParseError> {
        self.enter()?;
        let operand = self.single_operand()?;
        let operand =
            if self.accept("|") { Operand::Pair(Box::new(operand), Box::new(self.single_operand()?)) } else { operand };
        self.leave();
        Ok(operand)
    }

    fn single_operand(&mut self) -> Result<Operand, ParseError> {
        if self.at_constant() {
            return Ok(match self.constant()? {
                Constant::Signed(value) => Operand::Int(value.into()),
                Constant::Unsigned(value) => Operand::Int(value.into()),
                Constant::F32(bits) => Operand::F32(bits),
                Constant::F64(value) => Operand::F64(value.to_bits()),
            });
        }
        match self.peek() {
            Kind::Mark("!") => {
                self.next();
                Ok(Operand::NotName(self.name("a predicate")?.to_owned()))
            }
            Kind::Mark("{") => {
                self.next();
                Ok(Operand::Vector(self.list("}", Self::operand)?))
            }
            Kind::Mark("[") => {
                self.next();
                self.address()
            }
            Kind::Name("_") => {
                self.next();
                Ok(Operand::Sink)
            }
            Kind::Name(name) => {
                self.next();
                self.named(name)
            }
            _ => Err(self.unexpected("an operand")),
        }
    }

    /// What follows a name used as a value: a component, an index, an offset or nothing.
    fn named(&mut self, name: &str) -> Result<Operand, ParseError> {
        if let Kind::Dotted(component) = self.peek()
            && self.token_at(0).joined
        {
            let index = ["xr", "yg", "zb", "wa"].iter().position(|c| component.len() == 1 && c.contains(component));
            let Some(index) = index else {
                return Err(self.error(format!("`.{component}` is not a component of a vector")));
            };
            self.next();
            return Ok(if VECTOR_SPECIALS.contains(&name) {
                Operand::Name(format!("{name}.{component}"))
            } else {
                Operand::Element { name: name.to_owned(), index: index as u32 }
            });
        }
        if self.accept("[") {
            let index = self.natural("an array index", 1 << 48)?;
            self.expect("]")?;
            let scale = self.element_bytes.iter().rev().find_map(|scope| scope.get(name)).copied();
            let scale =
                scale.ok_or_else(|| self.error(format!("`{name}` is indexed but not declared as a variable")))?;
            let offset = index.checked_mul(scale).and_then(|offset| i64::try_from(offset).ok());
            let offset = offset.ok_or_else(|| self.error("the array index overflows"))?;
            return Ok(Operand::SymbolOffset { name: name.to_owned(), offset });
        }
        if self.peek() == Kind::Mark("+") {
            return Ok(Operand::SymbolOffset { name: name.to_owned(), offset: self.offset()? });
        }
        Ok(Operand::Name(name.to_owned()))
    }

    /// `[...]`, its opening bracket already read.
    fn address(&mut self) -> Result<Operand, ParseError> {
        let plain = self.plain_address()?;
        if self.accept("]") {
            return Ok(plain);
        }
        if !self.accept(",") {
            return Err(self.unexpected("`,` or `]`"));
        }
        // Texture forms have a sampler between the texture and the coordinates.
        let mut coordinates = None;
        let mut rest = Vec::new();
        for part in self.list("]", Self::operand)? {
            match part {
                Operand::Vector(vector) if coordinates.is_none() => coordinates = Some(vector),
                other => rest.push(other),
            }
        }
        let missing = || self.error("`{...}` coordinates are missing in the tensor address");
        Ok(Operand::TensorAddress { base: Box::new(plain), coordinates: coordinates.ok_or_else(missing)?, rest })
    }

    fn plain_address(&mut self) -> Result<Operand, ParseError> {
        if self.at_constant() {
            let error = self.error_here();
            let value = self.constant()?.int().ok_or_else(|| error("an address must be an integer".into()))?;
            // The upper half of the address space is its two's complement.
            let offset = i64::try_from(value).unwrap_or(value as u64 as i64);
            return Ok(Operand::Address { base: None, offset });
        }
        let name = self.name("a register, a variable or a number")?;
        let base = match self.peek() {
            Kind::Mark("[") => match self.named(name)? {
                Operand::SymbolOffset { name, offset } => return Ok(Operand::Address { base: Some(name), offset }),
                _ => return Err(self.unexpected("an index")),
            },
            _ => name.to_owned(),
        };
        Ok(Operand::Address { base: Some(base), offset: self.offset()? })
    }
}
