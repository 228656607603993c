//! Several PTX modules into one, text to text (PTX ISA 5.4.1 and 11.6, "Linking Directives").

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;

use super::ast::{Linkage, Module, Space};
use super::{ParseError, adapter, parse};

/// A module to link and what to call it in messages.
#[derive(Debug, Clone)]
pub struct Input {
    pub name: String,
    pub text: String,
}

/// Why modules do not link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error("nothing to link")]
    Nothing,
    #[error("{name}: {error}")]
    Parse { name: String, error: ParseError },
    #[error("`{symbol}` is defined in {first} and in {second}")]
    Twice { symbol: String, first: String, second: String },
    #[error("`{symbol}`, declared in {name}, is defined nowhere")]
    Undefined { symbol: String, name: String },
    #[error("{name}: `{symbol}` is declared otherwise than it is defined in {other}")]
    Kind { symbol: String, name: String, other: String },
    #[error("{name}: a declaration of several variables, of which only some are to be kept")]
    Split { name: String },
    #[error("{name}: {bits}-bit addresses; only 64 are linked")]
    AddressSize { name: String, bits: u32 },
}

/// Functions that the device provides: declared, never defined (CUDA's "PTX Writer's Guide to Interoperability", 6).
const PROVIDED: [&str; 4] = ["vprintf", "malloc", "free", "__assertfail"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Function,
    Variable,
}

/// A module-scope symbol as one input has it.
struct Symbol {
    kind: Kind,
    linkage: Linkage,
    /// Rather than declared.
    defined: bool,
    /// Dynamic shared memory, whose declaration is all there is.
    shared: bool,
}

fn symbols(module: &Module) -> HashMap<&str, Symbol> {
    let mut found: HashMap<&str, Symbol> = HashMap::new();
    for f in &module.functions {
        let symbol = Symbol { kind: Kind::Function, linkage: f.linkage, defined: f.body.is_some(), shared: false };
        // A prototype beside its definition says nothing more.
        let entry = found.entry(&f.name).or_insert(Symbol { defined: false, ..symbol });
        if f.body.is_some() {
            *entry = symbol;
        }
    }
    for (alias, _) in &module.aliases {
        found.insert(alias, Symbol { kind: Kind::Function, linkage: Linkage::Visible, defined: true, shared: false });
    }
    for v in &module.variables {
        let defined = v.linkage != Linkage::Extern;
        let shared = v.space == Space::Shared && !defined;
        found.insert(&v.name, Symbol { kind: Kind::Variable, linkage: v.linkage, defined, shared });
    }
    found
}

/// Links modules: the text of one module that holds all their definitions.
///
/// # Errors
/// An input that is no PTX, a symbol that is defined twice or not at all.
pub fn link(inputs: &[Input]) -> Result<String, LinkError> {
    let parsed = inputs.iter().map(|input| {
        let module = parse(&input.text);
        module.map_err(|error| LinkError::Parse { name: input.name.clone(), error })
    });
    let modules = parsed.collect::<Result<Vec<Module>, _>>()?;
    let tables: Vec<HashMap<&str, Symbol>> = modules.iter().map(symbols).collect();
    let owners = owners(inputs, &tables)?;

    let newest = modules.iter().map(|module| module.version).max().ok_or(LinkError::Nothing)?;
    // Code for an architecture links with code for an older one, and asks for the newer.
    let number = |target: &str| target.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0u32);
    let target = modules.iter().map(|module| module.target.as_str()).max_by_key(|t| (number(t), t.len()));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, ".version {}.{}", newest.0, newest.1);
    let _ = writeln!(text, ".target {}\n.address_size 64", target.ok_or(LinkError::Nothing)?);
    let mut declared: HashSet<String> = HashSet::new();
    for (index, (input, module)) in inputs.iter().zip(&modules).enumerate() {
        if module.address_size != 64 {
            return Err(LinkError::AddressSize { name: input.name.clone(), bits: module.address_size });
        }
        let mut renamed = own_names(index, &tables);
        let _ = writeln!(text, "\n// {}", input.name.replace('\n', " "));
        adapt(index, &modules, &tables, &owners, &mut renamed, &mut text);
        for item in items(&input.text) {
            if keeps(item, index, input, &tables[index], &owners, &mut declared)? {
                rename(item, &renamed, &mut text);
                text.push('\n');
            }
        }
    }
    Ok(text)
}

/// The input that defines each symbol that modules share.
fn owners<'a>(inputs: &[Input], tables: &[HashMap<&'a str, Symbol>]) -> Result<BTreeMap<&'a str, usize>, LinkError> {
    let mut owners: BTreeMap<&str, usize> = BTreeMap::new();
    let strong = |symbol: &Symbol| !matches!(symbol.linkage, Linkage::Weak | Linkage::Common);
    for (index, table) in tables.iter().enumerate() {
        for (&name, symbol) in table.iter().filter(|(_, s)| s.defined && s.linkage != Linkage::None) {
            let Some(&other) = owners.get(name) else {
                owners.insert(name, index);
                continue;
            };
            match (strong(&tables[other][name]), strong(symbol)) {
                (true, true) => {
                    let (first, second) = (inputs[other].name.clone(), inputs[index].name.clone());
                    return Err(LinkError::Twice { symbol: name.to_owned(), first, second });
                }
                (false, true) => {
                    owners.insert(name, index);
                }
                (_, false) => {}
            }
        }
    }
    for (input, table) in inputs.iter().zip(tables) {
        for (&name, symbol) in table.iter().filter(|(_, s)| !s.defined && !s.shared) {
            match owners.get(name) {
                Some(&owner) if tables[owner][name].kind != symbol.kind => {
                    let (symbol, name) = (name.to_owned(), input.name.clone());
                    return Err(LinkError::Kind { symbol, name, other: inputs[owner].name.clone() });
                }
                Some(_) => {}
                None if PROVIDED.contains(&name) || symbol.linkage == Linkage::Weak => {}
                None => return Err(LinkError::Undefined { symbol: name.to_owned(), name: input.name.clone() }),
            }
        }
    }
    Ok(owners)
}

/// New names for what is this input's own and called as something of another's.
fn own_names<'a>(index: usize, tables: &[HashMap<&'a str, Symbol>]) -> HashMap<&'a str, String> {
    let elsewhere = |name: &str| tables.iter().enumerate().any(|(other, t)| other != index && t.contains_key(name));
    let own = tables[index].iter().filter(|(name, s)| s.linkage == Linkage::None && elsewhere(name));
    own.map(|(&name, _)| (name, unused(format!("{name}${index}"), tables))).collect()
}

/// Writes functions that stand between this input's calls and definitions elsewhere that return more or less than it declares, and
/// has its calls name these.
fn adapt<'a>(
    index: usize,
    modules: &'a [Module],
    tables: &[HashMap<&'a str, Symbol>],
    owners: &BTreeMap<&str, usize>,
    renamed: &mut HashMap<&'a str, String>,
    to: &mut String,
) {
    for declared in modules[index].functions.iter().filter(|f| f.body.is_none()) {
        let Some(&owner) = owners.get(declared.name.as_str()).filter(|&&owner| owner != index) else { continue };
        let defined = modules[owner].functions.iter().find(|f| f.name == declared.name && f.body.is_some());
        let name = unused(format!("{}$from${index}", declared.name), tables);
        if let Some(text) = defined.and_then(|defined| adapter::between(&name, declared, defined)) {
            to.push_str(&text);
            renamed.insert(&declared.name, name);
        }
    }
}

/// A name that no input has.
fn unused(mut name: String, tables: &[HashMap<&str, Symbol>]) -> String {
    while tables.iter().any(|table| table.contains_key(name.as_str())) {
        name.push('$');
    }
    name
}

/// Whether an item is of the linked module.
fn keeps(
    item: &str,
    index: usize,
    input: &Input,
    table: &HashMap<&str, Symbol>,
    owners: &BTreeMap<&str, usize>,
    declared: &mut HashSet<String>,
) -> Result<bool, LinkError> {
    let names = names_of(item, table);
    let mut fates = names.iter().map(|&name| {
        let symbol = &table[name];
        match owners.get(name) {
            // A prototype is kept beside its definition, which may follow what calls it.
            Some(&owner) if symbol.linkage != Linkage::None => owner == index && symbol.defined,
            _ if symbol.defined => true,
            _ => declared.insert(name.to_owned()),
        }
    });
    // What names nothing (a directive of the whole module) is not carried over, but for pragmas.
    let Some(first) = fates.next() else { return Ok(item.starts_with(".pragma")) };
    if fates.any(|fate| fate != first) {
        return Err(LinkError::Split { name: input.name.clone() });
    }
    Ok(first)
}

/// Module-scope symbols that an item introduces: its names before any body or initialiser.
fn names_of<'a>(item: &str, table: &HashMap<&'a str, Symbol>) -> Vec<&'a str> {
    let is_function = is_function(item);
    let head = if is_function { item.split('{').next().unwrap_or(item) } else { item };
    let mut depth = 0;
    let mut found = Vec::new();
    let mut previous = "";
    for word in words(head) {
        match word {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ if depth > 0 => {}
            // Values of an initialiser without braces.
            _ if previous == "=" => {}
            _ => {
                let known = table.get_key_value(word);
                if let Some((&name, _)) = known.filter(|_| !found.contains(&word)) {
                    found.push(name);
                    // The other name of an alias is a reference.
                    if is_function || item.starts_with(".alias") {
                        break;
                    }
                }
            }
        }
        previous = word;
    }
    found
}

fn is_function(item: &str) -> bool {
    let head = item.split(['{', ';']).next().unwrap_or(item);
    words(head).any(|word| word == ".entry" || word == ".func")
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

/// Length of a comment or string that starts here, 0 where none does.
fn opaque(rest: &[u8]) -> usize {
    let until = |from: usize, end: &[u8]| {
        rest[from..].windows(end.len()).position(|window| window == end).map_or(rest.len(), |at| from + at + end.len())
    };
    match rest {
        [b'/', b'/', ..] => until(2, b"\n"),
        [b'/', b'*', ..] => until(2, b"*/"),
        [b'"', ..] => until(1, b"\""),
        _ => 0,
    }
}

/// Pieces of a text: words and single marks; comments and strings whole; blanks whole.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let bytes = text.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
        let run = |accept: fn(u8) -> bool| rest.iter().position(|&byte| !accept(byte)).unwrap_or(rest.len());
        let len = match rest[0] {
            b'/' | b'"' if opaque(rest) > 0 => opaque(rest),
            byte if is_word(byte) => run(is_word),
            byte if byte.is_ascii_whitespace() => run(|byte| byte.is_ascii_whitespace()),
            byte if byte.is_ascii() => 1,
            _ => run(|byte| !byte.is_ascii()),
        };
        at += len;
        Some(&text[at - len..at])
    })
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    pieces(text).filter(|piece| !piece.trim().is_empty() && opaque(piece.as_bytes()) == 0)
}

/// Module-scope statements in order, without the header and without directives for debuggers.
fn items(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let (mut start, mut at, mut depth) = (None, 0, 0u32);
    // Whether the statement is one that its line ends.
    let mut line_only = false;
    for piece in pieces(text) {
        let (from, to) = (at, at + piece.len());
        at = to;
        let blank = piece.trim().is_empty() || opaque(piece.as_bytes()) > 0 && !piece.starts_with('"');
        if line_only && piece.contains('\n') {
            (start, line_only) = (None, false);
            continue;
        }
        if blank {
            continue;
        }
        if start.is_none() {
            start = Some(from);
            line_only = matches!(piece, ".version" | ".target" | ".address_size" | ".file" | ".loc" | "@");
        }
        match piece {
            "{" => depth += 1,
            "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        let Some(begin) = start.filter(|_| depth == 0 && !line_only) else { continue };
        let item = &text[begin..to];
        let ends = piece == ";" || piece == "}" && (is_function(item) || item.starts_with(".section"));
        if ends {
            if !item.starts_with(".section") {
                found.push(item);
            }
            start = None;
        }
    }
    found
}

/// Appends an item with its module's own names replaced.
fn rename(item: &str, renamed: &HashMap<&str, String>, to: &mut String) {
    for piece in pieces(item) {
        to.push_str(renamed.get(piece).map_or(piece, String::as_str));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const HEAD: &str = ".version 7.0\n.target sm_80\n.address_size 64\n";

    fn linked(texts: &[&str]) -> Result<String, String> {
        let named = |(index, text): (usize, &&str)| Input { name: format!("m{index}"), text: format!("{HEAD}{text}") };
        let inputs: Vec<Input> = texts.iter().enumerate().map(named).collect();
        link(&inputs).map_err(|error| error.to_string())
    }

    #[test]
    fn declarations_give_way_to_definitions() {
        let user = ".extern .func (.param .b32 r) twice(.param .b32 x);\n.extern .global .u32 table[4];\n\
                    .visible .entry k() { .reg .b32 %r; ld.global.u32 %r, [table+4]; ret; }";
        let maker = ".visible .global .u32 table[4] = {1, 2, 3, 4};\n\
                     .visible .func (.param .b32 r) twice(.param .b32 x) { ret; }";
        let text = linked(&[user, maker]).unwrap();
        assert_eq!(text.matches(".version").count(), 1);
        assert!(!text.contains(".extern"), "{text}");
        assert!(
            text.contains(".visible .global .u32 table[4] = {1, 2, 3, 4};") && text.contains("[table+4]"),
            "{text}"
        );
        let module = parse(&text).unwrap();
        assert_eq!((module.functions.len(), module.variables.len()), (2, 1));
    }

    #[test]
    fn own_names_stay_apart() {
        let own = |value: u32, name: &str| {
            format!(
                ".global .u32 count = {value}; // count\n.func helper() {{ .reg .b64 %d; mov.u64 %d, count; ret; }}\n\
                 .visible .entry {name}() {{ call helper, (); ret; }}"
            )
        };
        let text = linked(&[&own(1, "a"), &own(2, "b")]).unwrap();
        let module = parse(&text).unwrap();
        let names: BTreeSet<&str> = module.variables.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(names, ["count$0", "count$1"].into());
        assert!(text.contains("call helper$1, ()") && text.contains("mov.u64 %d, count$1"), "{text}");
    }

    #[test]
    fn weak_definitions_give_way_and_strong_ones_clash() {
        let weak = ".weak .func f() { .reg .b32 %weak; ret; }";
        let strong = ".visible .func f() { .reg .b32 %strong; ret; }";
        for order in [[weak, strong], [strong, weak]] {
            let text = linked(&order).unwrap();
            assert!(text.contains("%strong") && !text.contains("%weak"), "{text}");
        }
        assert_eq!(linked(&[weak, weak]).unwrap().matches("%weak").count(), 1);
        assert_eq!(linked(&[strong, strong]).unwrap_err(), "`f` is defined in m0 and in m1");
    }

    #[test]
    fn what_is_missing_is_named() {
        let user = ".extern .func gone();\n.visible .entry k() { call gone, (); ret; }";
        assert_eq!(linked(&[user]).unwrap_err(), "`gone`, declared in m0, is defined nowhere");
        let clash = linked(&[".extern .func f();", ".visible .global .u32 f;"]).unwrap_err();
        assert_eq!(clash, "m0: `f` is declared otherwise than it is defined in m1");
        assert!(linked(&["hello"]).unwrap_err().starts_with("m0: line 4"));
        assert_eq!(link(&[]).unwrap_err(), LinkError::Nothing);
    }

    #[test]
    fn dynamic_shared_memory_and_provided_functions_stay_declared_once() {
        let part = |name: &str| {
            format!(
                ".extern .shared .align 16 .b8 pool[];\n.extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);\n\
                 .visible .entry {name}() {{ ret; }}"
            )
        };
        let text = linked(&[&part("a"), &part("b")]).unwrap();
        assert_eq!((text.matches("pool[]").count(), text.matches("vprintf").count()), (1, 1));
        parse(&text).unwrap();
    }
}
