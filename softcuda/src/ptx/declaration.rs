//! Module scope, variables and function headers (PTX ISA 5.3, 5.4, 11).

use super::ParseError;
use super::ast::{Function, Init, Linkage, Module, Space, Type, Variable};
use super::constant::{Constant, describe};
use super::lexer::Kind;
use super::parser::Parser;

/// Registers one range declaration may make; far beyond any compiler's output, and small enough to allocate.
const MAX_RANGE: u64 = 1 << 20;

/// Elements one initialiser may list or pad; bounds what a short text can make the parser allocate.
const MAX_INITIAL: usize = 1 << 22;

/// Directives between a function's parameters and its body, and how many numbers each takes.
const FUNCTION_DIRECTIVES: [(&str, usize, usize); 13] = [
    ("maxntid", 1, 3),
    ("reqntid", 1, 3),
    ("minnctapersm", 1, 1),
    ("maxnctapersm", 1, 1),
    ("maxnreg", 1, 1),
    ("reqnctapercluster", 1, 3),
    ("explicitcluster", 0, 0),
    ("maxclusterrank", 1, 1),
    ("blocksareclusters", 0, 0),
    ("noreturn", 0, 0),
    ("abi_preserve", 1, 1),
    ("abi_preserve_control", 1, 1),
    ("unique", 0, 0),
];

fn space(word: &str) -> Option<Space> {
    Some(match word {
        "reg" => Space::Reg,
        "const" => Space::Const,
        "global" => Space::Global,
        "local" => Space::Local,
        "param" => Space::Param,
        "shared" | "shared::cta" => Space::Shared,
        _ => return None,
    })
}

impl<'a> Parser<'_, 'a> {
    pub fn module(mut self, text: &str) -> Result<Module, ParseError> {
        let mut module = Module { address_size: 64, ..Module::default() };
        module.lines = text.lines().map(str::to_owned).collect();
        self.header(&mut module)?;
        loop {
            let linkage = self.linkage();
            match self.peek() {
                Kind::End if linkage == Linkage::None => return Ok(module),
                Kind::Dotted(word @ ("entry" | "func")) => {
                    self.next();
                    module.functions.push(self.function(word == "entry", linkage)?);
                    module.variables.append(&mut self.inner);
                }
                Kind::Dotted("file" | "loc") => self.skip_line(),
                Kind::Mark("@@") => self.skip_line(),
                Kind::Dotted("section") => {
                    self.next();
                    self.next();
                    self.skip_group("{", "}")?;
                }
                Kind::Dotted("pragma") => self.pragma()?,
                Kind::Dotted("alias") => {
                    self.next();
                    let alias = self.name("the alias's name")?.to_owned();
                    self.expect(",")?;
                    let target = self.name("the name of a function")?.to_owned();
                    self.expect(";")?;
                    module.aliases.push((alias, target));
                }
                Kind::Dotted(word) if matches!(space(word), Some(s) if s != Space::Reg && s != Space::Param) => {
                    self.variables(linkage, &mut module.variables)?;
                }
                Kind::Dotted(word @ ("tex" | "reg" | "param")) => {
                    return Err(self.error(format!("`.{word}` variables at module scope are not supported")));
                }
                _ => return Err(self.unexpected("a variable, `.entry` or `.func`")),
            }
        }
    }

    /// `.version`, `.target` and `.address_size`, which must come first and in this order.
    fn header(&mut self, module: &mut Module) -> Result<(), ParseError> {
        if !self.accept_dotted("version") {
            return Err(self.unexpected("`.version`"));
        }
        let Kind::Number(version) = self.peek() else { return Err(self.unexpected("a version such as 7.8")) };
        module.version = version
            .split_once('.')
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
            .ok_or_else(|| self.unexpected("a version such as 7.8"))?;
        self.next();
        if !self.accept_dotted("target") {
            return Err(self.unexpected("`.target`"));
        }
        module.target = self.name("a target such as sm_80")?.to_owned();
        while self.accept(",") {
            module.target_options.push(self.name("a target option")?.to_owned());
        }
        if self.accept_dotted("address_size") {
            let error = self.error_here();
            module.address_size = self.natural("the address size", 64)? as u32;
            if module.address_size != 64 {
                return Err(error("only `.address_size 64` is supported".into()));
            }
        }
        Ok(())
    }

    fn linkage(&mut self) -> Linkage {
        let linkage = match self.peek() {
            Kind::Dotted("visible") => Linkage::Visible,
            Kind::Dotted("extern") => Linkage::Extern,
            Kind::Dotted("weak") => Linkage::Weak,
            Kind::Dotted("common") => Linkage::Common,
            _ => return Linkage::None,
        };
        self.next();
        linkage
    }

    pub fn pragma(&mut self) -> Result<(), ParseError> {
        self.next();
        loop {
            let Kind::Text(_) = self.peek() else { return Err(self.unexpected("a string")) };
            self.next();
            if !self.accept(",") {
                return self.expect(";");
            }
        }
    }

    /// One declaration statement with all its names: `.reg .b32 %r<4>, %x;`.
    pub fn variables(&mut self, linkage: Linkage, into: &mut Vec<Variable>) -> Result<(), ParseError> {
        let mut template = self.variable_type()?;
        template.linkage = linkage;
        loop {
            let mut variable = template.clone();
            self.variable_name(&mut variable)?;
            into.push(variable);
            if !self.accept(",") {
                return self.expect(";");
            }
        }
    }

    /// One parameter of a function, an entry or a prototype.
    pub fn parameter(&mut self) -> Result<Variable, ParseError> {
        let mut variable = self.variable_type()?;
        if !matches!(variable.space, Space::Param | Space::Reg) {
            return Err(self.error("a parameter must be `.param` or `.reg`"));
        }
        self.variable_name(&mut variable)?;
        Ok(variable)
    }

    /// State space, type and attributes, up to the name.
    fn variable_type(&mut self) -> Result<Variable, ParseError> {
        let line = self.line();
        let mut variable = Variable {
            name: String::new(),
            space: Space::Reg,
            ty: Type::B32,
            vector: 1,
            align: None,
            dims: Vec::new(),
            count: None,
            init: Vec::new(),
            linkage: Linkage::None,
            symbol: None,
            ptr: None,
            line,
        };
        variable.space = match self.peek() {
            Kind::Dotted(word) if space(word).is_some() => space(word).unwrap_or(Space::Reg),
            _ => return Err(self.unexpected("a state space")),
        };
        self.next();
        let mut typed = false;
        while let Kind::Dotted(word) = self.peek() {
            self.next();
            match word {
                "align" => variable.align = Some(self.alignment()?),
                "v2" => variable.vector = 2,
                "v4" => variable.vector = 4,
                "v8" => variable.vector = 8,
                "ptr" => variable.ptr = Some(self.pointer()?),
                "attribute" => self.skip_group("(", ")")?,
                _ => {
                    let Some(ty) = Type::from_name(word).filter(|_| !typed) else {
                        return Err(self.error(format!("`.{word}` is not expected in a declaration")));
                    };
                    variable.ty = ty;
                    typed = true;
                }
            }
        }
        if typed { Ok(variable) } else { Err(self.unexpected("a type")) }
    }

    fn alignment(&mut self) -> Result<u32, ParseError> {
        let error = self.error_here();
        let align = self.natural("an alignment", 1 << 20)? as u32;
        if align.is_power_of_two() { Ok(align) } else { Err(error(format!("alignment {align} is not a power of two"))) }
    }

    /// What may follow `.ptr`: a space and an alignment, 4 where none is given.
    fn pointer(&mut self) -> Result<(Option<Space>, u32), ParseError> {
        let pointee = match self.peek() {
            Kind::Dotted(word @ ("const" | "global" | "local" | "shared")) => {
                self.next();
                space(word)
            }
            _ => None,
        };
        let align = if self.accept_dotted("align") { self.alignment()? } else { 4 };
        Ok((pointee, align))
    }

    fn variable_name(&mut self, variable: &mut Variable) -> Result<(), ParseError> {
        variable.line = self.line();
        let name = self.name("a name")?;
        variable.name = name.to_owned();
        if self.accept("<") {
            // Not a constant expression: the `>` that ends the range would be read as an operator.
            let Kind::Number(text) = self.peek() else { return Err(self.unexpected("a number")) };
            let count = text.parse::<u64>().ok().filter(|count| *count <= MAX_RANGE);
            let count = count.ok_or_else(|| self.error(format!("a range must have at most {MAX_RANGE} names")))?;
            self.next();
            self.expect(">")?;
            variable.count = Some(count as u32);
        }
        while self.accept("[") {
            let dim = if self.peek() == Kind::Mark("]") { 0 } else { self.natural("an array dimension", 1 << 48)? };
            if dim == 0 && !variable.dims.is_empty() {
                return Err(self.error("only the outermost dimension may be left open or zero"));
            }
            self.expect("]")?;
            variable.dims.push(dim);
        }
        if self.accept("=") {
            self.initializer(variable)?;
        }
        if variable.bytes().is_none() {
            return Err(self.error(format!("the size of `{name}` overflows")));
        }
        if let Some(scope) = self.element_bytes.last_mut() {
            scope.insert(name, variable.element_bytes());
        }
        Ok(())
    }

    fn initializer(&mut self, variable: &mut Variable) -> Result<(), ParseError> {
        if !matches!(variable.space, Space::Global | Space::Const) {
            return Err(self.error("only `.global` and `.const` variables take an initialiser"));
        }
        let mut levels = variable.dims.clone();
        if variable.vector > 1 {
            levels.push(variable.vector.into());
        }
        let mut init = Vec::new();
        if levels.is_empty() {
            init.push(self.initial_element(variable)?);
        } else {
            // Elements below one item of the outermost level; the lists may not claim more than they hold.
            let inner = levels[1..].iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
            let inner =
                inner.filter(|n| *n <= MAX_INITIAL as u64).ok_or_else(|| self.error("the initialiser is too large"))?;
            self.initial_list(&levels, inner as usize, variable, &mut init)?;
            if variable.dims.first() == Some(&0) {
                variable.dims[0] = (init.len() as u64).div_ceil(inner.max(1));
            }
        }
        variable.init = init;
        Ok(())
    }

    /// `{a, b}`, or `{{...}, {...}}` above the innermost of the `levels`; `inner` elements make one item of the list.
    fn initial_list(
        &mut self,
        levels: &[u64],
        inner: usize,
        variable: &Variable,
        into: &mut Vec<Init>,
    ) -> Result<(), ParseError> {
        self.expect("{")?;
        self.enter()?;
        let mut items = 0;
        let error = self.error_here();
        self.list("}", |parser| {
            items += 1;
            if levels[0] != 0 && items > levels[0] {
                return Err(parser.error("more initial values than elements"));
            }
            if levels.len() == 1 {
                into.push(parser.initial_element(variable)?);
                return Ok(());
            }
            let end = into.len() + inner;
            if end > MAX_INITIAL {
                return Err(parser.error("the initialiser is too large"));
            }
            let below = levels[2..].iter().product::<u64>() as usize;
            parser.initial_list(&levels[1..], below, variable, into)?;
            into.resize(end, Init::Int(0));
            Ok(())
        })?;
        if levels.len() == 1 && variable.vector > 1 && items != levels[0] {
            return Err(error(format!("a vector of {} elements takes as many initial values, not {items}", levels[0])));
        }
        self.leave();
        Ok(())
    }

    fn initial_element(&mut self, variable: &Variable) -> Result<Init, ParseError> {
        let float = matches!(variable.ty, Type::F16 | Type::F16x2 | Type::F32 | Type::F64);
        if self.at_constant() {
            let error = self.error_here();
            let value = self.constant()?;
            if self.peek() == Kind::Mark("(") {
                return Err(self.error("masked address initialisers are not supported"));
            }
            if float != value.int().is_none() {
                return Err(error("the initial value does not suit the variable's type".into()));
            }
            return Ok(match value {
                Constant::F32(bits) => Init::F32(bits),
                Constant::F64(value) => Init::F64(value.to_bits()),
                Constant::Signed(value) => Init::Int(value.into()),
                Constant::Unsigned(value) => Init::Int(value.into()),
            });
        }
        let name = self.name("a constant or the name of a variable")?;
        let generic = name == "generic" && self.accept("(");
        let name = if generic {
            let name = self.name("the name of a variable")?;
            self.expect(")")?;
            name
        } else {
            name
        };
        let offset = self.offset()?;
        Ok(Init::Symbol { name: name.to_owned(), offset, generic })
    }

    /// `+ constant` or nothing after an address's base; PTX has no `- constant` there.
    pub fn offset(&mut self) -> Result<i64, ParseError> {
        if !self.accept("+") {
            return Ok(0);
        }
        let error = self.error_here();
        let value = self.constant()?;
        match value.int().map(i64::try_from) {
            Some(Ok(offset)) => Ok(offset),
            _ => Err(error(format!("the offset {} is not a 64-bit integer", describe(value)))),
        }
    }

    fn function(&mut self, is_entry: bool, linkage: Linkage) -> Result<Function, ParseError> {
        let line = self.line();
        let mut directives = Vec::new();
        self.element_bytes.push(Default::default());
        if self.accept_dotted("attribute") {
            self.skip_group("(", ")")?;
        }
        let returns = if !is_entry && self.accept("(") { self.list(")", Self::parameter)? } else { Vec::new() };
        let name = self.name("the function's name")?.to_owned();
        let params = if self.accept("(") { self.list(")", Self::parameter)? } else { Vec::new() };
        let body = loop {
            match self.peek() {
                Kind::Dotted("pragma") => self.pragma()?,
                Kind::Dotted("attribute") => {
                    self.next();
                    self.skip_group("(", ")")?;
                }
                Kind::Dotted(word) => directives.push(self.function_directive(word)?),
                Kind::Mark(";") => {
                    self.next();
                    break None;
                }
                Kind::Mark("{") => break Some(self.block()?),
                _ => return Err(self.unexpected("a directive, `;` or `{`")),
            }
        };
        self.element_bytes.pop();
        Ok(Function { name, is_entry, linkage, returns, params, directives, body, line })
    }

    pub fn function_directive(&mut self, word: &str) -> Result<(String, Vec<u64>), ParseError> {
        let Some(&(_, least, most)) = FUNCTION_DIRECTIVES.iter().find(|(known, ..)| *known == word) else {
            return Err(self.error(format!("unknown directive `.{word}`")));
        };
        self.next();
        let mut numbers = Vec::new();
        while numbers.len() < least || (numbers.len() < most && self.accept(",")) {
            numbers.push(self.natural(&format!("a number of `.{word}`"), u32::MAX.into())?);
        }
        Ok((word.to_owned(), numbers))
    }
}
