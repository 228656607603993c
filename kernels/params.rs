//! One Rust struct for each parameter list of an entry, from the `.param` names and types of the rendered PTX. Compiled into
//! `build.rs` alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::registry::Kernel;

/// A parameter: its name without the prefix `param_`, and its Rust type.
type Parameter = (String, String);

/// The structs of all entries. Variants of one entry must declare the same list.
pub fn structs(rendered: &Path, kernels: &[Kernel]) -> String {
    let mut entries: BTreeMap<&str, (String, Vec<Parameter>)> = BTreeMap::new();
    for kernel in kernels {
        let name = kernel.name();
        let path = rendered.join(format!("{name}.ptx"));
        let text = std::fs::read_to_string(&path).expect("the build's own folder can be read");
        let list = parameters(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (first, known) = entries.entry(kernel.entry()).or_insert_with(|| (name.clone(), list.clone()));
        assert!(
            *known == list,
            "{name} and {first} are both entries `{}`, with {list:?} and {known:?}",
            kernel.entry()
        );
    }
    let mut text: String = entries.iter().map(|(entry, (_, list))| structure(entry, list)).collect();
    // An entry that takes what another takes, and more after it, is made from that one's: where these are tensor maps, or it is listed.
    for (entry, (_, list)) in &entries {
        for (shorter, (_, first)) in &entries {
            let Some(more) = list.strip_prefix(first.as_slice()).filter(|more| !more.is_empty()) else { continue };
            if more.iter().all(|(_, rust)| rust == "TensorMap") || LONGER.contains(&(entry, shorter)) {
                text.push_str(&longer(entry, shorter, first, more));
            }
        }
    }
    text
}

/// Entries that take what another takes and then other things than tensor maps.
const LONGER: [(&str, &str); 3] = [("GemmHopper", "Gemm"), ("GemmSwapped", "Gemm"), ("KGroupedHopper", "KGrouped")];

/// `entry`'s parameters from those of `shorter`, which its list begins with, and `more` as a struct of its own.
fn longer(entry: &str, shorter: &str, first: &[Parameter], more: &[Parameter]) -> String {
    let life = if more.iter().any(|(_, rust)| rust.contains("'a")) { "<'a>" } else { "" };
    let mut text = format!("/// What `{entry}` takes behind the parameters of `{shorter}`.\n#[derive(Clone, Copy)]\n");
    writeln!(text, "pub(crate) struct {entry}More{life} {{").unwrap();
    for (name, rust) in more {
        writeln!(text, "    pub(crate) {name}: {rust},").unwrap();
    }
    writeln!(text, "}}\n\nimpl<'a> {entry}Params<'a> {{\n    /// What `{shorter}` takes, and more.").unwrap();
    writeln!(text, "    pub(crate) fn with(first: {shorter}Params<'a>, more: {entry}More{life}) -> Self {{").unwrap();
    writeln!(text, "        {entry}Params {{").unwrap();
    for (from, list) in [("first", first), ("more", more)] {
        for (name, _) in list {
            writeln!(text, "            {name}: {from}.{name},").unwrap();
        }
    }
    text.push_str("        }\n    }\n}\n\n");
    text
}

/// The `.param` list of the one entry of a module.
fn parameters(text: &str) -> Result<Vec<Parameter>, String> {
    let head = text.split(".entry").nth(1).ok_or("no .entry")?;
    let list = head.split_once('(').and_then(|(_, rest)| rest.split_once(')')).ok_or("no parameter list")?.0;
    list.split(',').map(parameter).collect()
}

/// `.param .u64 param_x`, `.param .u64 .ptr .global .align 16 param_x`, `.param .align 64 .b8 param_map[128]`.
fn parameter(text: &str) -> Result<Parameter, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let (last, words) = words.split_last().ok_or("an empty parameter")?;
    let (name, bytes) = match last.split_once('[') {
        Some((name, bytes)) => (name, Some(bytes.trim_end_matches(']'))),
        None => (*last, None),
    };
    let of = |word: &str| words.contains(&word);
    let rust = match bytes {
        Some("128") if of(".b8") && of("64") => "TensorMap",
        Some(_) => return Err(format!("`{text}` is no tensor map")),
        None if of(".u64") => "Pointer<'a>",
        None if of(".u32") => "u32",
        None if of(".f32") => "f32",
        None => return Err(format!("`{text}` has a type without a Rust counterpart")),
    };
    Ok((name.strip_prefix("param_").unwrap_or(name).to_owned(), rust.to_owned()))
}

fn structure(entry: &str, list: &[Parameter]) -> String {
    let life = if list.iter().any(|(_, rust)| rust.contains("'a")) { ["<'a>", "<'_>"] } else { ["", ""] };
    let mut text = format!("/// Parameters of the entry `{entry}`.\n#[derive(Clone, Copy)]\n");
    writeln!(text, "pub(crate) struct {entry}Params{} {{", life[0]).unwrap();
    for (name, rust) in list {
        writeln!(text, "    pub(crate) {name}: {rust},").unwrap();
    }
    writeln!(text, "}}\n\nimpl Params for {entry}Params{} {{", life[1]).unwrap();
    writeln!(text, "    const ENTRY: &'static str = {entry:?};").unwrap();
    writeln!(text, "    type Pointers = [*mut c_void; {}];\n", list.len()).unwrap();
    text.push_str("    fn pointers(&mut self) -> Self::Pointers {\n        [");
    for (name, _) in list {
        write!(text, "(&raw mut self.{name}).cast(), ").unwrap();
    }
    text.push_str("]\n    }\n}\n\n");
    text
}
