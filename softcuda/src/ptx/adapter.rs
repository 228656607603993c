//! Functions between a caller and a callee whose modules do not agree on what is returned.
//!
//! The ABI returns values in registers. A linker of machine code sees no types: who declares no result leaves it there, and who
//! declares one that is not returned, or is not as wide, finds there whatever was. In text the call has to name what the function
//! returns, so that a function of the declared form stands between, which calls the defined one.

use std::fmt::Write;

use super::ast::{Function, Space, Variable};

/// A function `name` of the form that `declared` has, which calls `defined`; `None` where they agree, or in more than results do
/// not.
pub fn between(name: &str, declared: &Function, defined: &Function) -> Option<String> {
    let shape = |returns: &[Variable]| returns.iter().map(|v| (v.bytes(), v.alignment())).collect::<Vec<_>>();
    if shape(&declared.returns) == shape(&defined.returns) || declared.params.len() != defined.params.len() {
        return None;
    }
    let parameters = || declared.params.iter().chain(&declared.returns).chain(&defined.returns);
    if parameters().any(|v| v.space != Space::Param || v.bytes().is_none_or(|bytes| bytes == 0)) {
        return None;
    }
    let list = |variables: &[Variable], prefix: &str| {
        let all = variables.iter().enumerate().map(|(at, v)| declaration(v, &format!("{prefix}{at}")));
        all.collect::<Vec<String>>().join(", ")
    };
    let names = |variables: &[Variable], prefix: &str| {
        (0..variables.len()).map(|at| format!("{prefix}{at}")).collect::<Vec<String>>().join(", ")
    };
    let results = |list: String| if list.is_empty() { String::new() } else { format!("({list}) ") };
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        ".func {}{name}({})\n{{",
        results(list(&declared.returns, "result")),
        list(&declared.params, "given")
    );
    let _ = writeln!(text, "    .reg .b8 %b; .reg .b16 %h; .reg .b32 %r; .reg .b64 %d;");
    for (prefix, variables) in [("passed", &declared.params), ("returned", &defined.returns)] {
        for (at, variable) in variables.iter().enumerate() {
            let _ = writeln!(text, "    {};", declaration(variable, &format!("{prefix}{at}")));
        }
    }
    for (at, variable) in declared.params.iter().enumerate() {
        let bytes = variable.bytes().unwrap_or_default();
        copy(&format!("given{at}"), &format!("passed{at}"), bytes, variable.alignment(), &mut text);
    }
    let returned =
        if defined.returns.is_empty() { String::new() } else { format!("({}), ", names(&defined.returns, "returned")) };
    let passed = names(&declared.params, "passed");
    let passed = if passed.is_empty() { String::new() } else { format!(", ({passed})") };
    let _ = writeln!(text, "    call {returned}{}{passed};", defined.name);
    for (at, (to, from)) in declared.returns.iter().zip(&defined.returns).enumerate() {
        let bytes = to.bytes().min(from.bytes()).unwrap_or_default();
        copy(&format!("returned{at}"), &format!("result{at}"), bytes, to.alignment().min(from.alignment()), &mut text);
    }
    text.push_str("    ret;\n}\n");
    Some(text)
}

/// A `.param` of the size and alignment of a variable.
fn declaration(v: &Variable, name: &str) -> String {
    let bytes = v.bytes().unwrap_or_default();
    if v.dims.is_empty() && v.vector == 1 {
        format!(".param .b{} {name}", 8 * bytes)
    } else {
        format!(".param .align {} .b8 {name}[{bytes}]", v.alignment())
    }
}

/// Copies a parameter to another, in pieces that the alignment of both allows.
fn copy(from: &str, to: &str, bytes: u64, alignment: u64, text: &mut String) {
    let mut done = 0;
    while done < bytes {
        let fits = |size: &u64| done + size <= bytes && alignment.is_multiple_of(*size) && done.is_multiple_of(*size);
        let size = [8u64, 4, 2].into_iter().find(fits).unwrap_or(1);
        let register = match size {
            8 => "%d",
            4 => "%r",
            2 => "%h",
            _ => "%b",
        };
        let (bits, at) = (8 * size, done);
        let _ =
            writeln!(text, "    ld.param.b{bits} {register}, [{from}+{at}]; st.param.b{bits} [{to}+{at}], {register};");
        done += size;
    }
}
