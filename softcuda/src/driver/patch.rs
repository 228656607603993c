//! Lines of PTX replaced as a module is loaded, for tests that ask whether a broken kernel would be noticed.
//!
//! `SOFTCUDA_PATCH` names a file with a line for each replacement: the entry's name, the line's number in the module, from 1,
//! and the new text, separated by tabs. A module that defines the entry is changed, others are not.

use std::borrow::Cow;

use super::status::{CUresult, Outcome};

/// The text with the replacements that the environment asks for.
pub(super) fn apply(text: &str) -> Outcome<Cow<'_, str>> {
    match std::env::var("SOFTCUDA_PATCH").ok().filter(|path| !path.is_empty()) {
        None => Ok(text.into()),
        Some(path) => {
            let failed = |e| CUresult::ERROR_INVALID_VALUE.with(format!("SOFTCUDA_PATCH: {path}: {e}"));
            let patch = std::fs::read_to_string(&path).map_err(failed)?;
            patched(text, &patch).map_err(|why| CUresult::ERROR_INVALID_VALUE.with(format!("SOFTCUDA_PATCH: {why}")))
        }
    }
}

fn patched<'t>(text: &'t str, patch: &str) -> Result<Cow<'t, str>, String> {
    let mut lines: Vec<&str> = text.lines().collect();
    let mut changed = false;
    for (i, row) in patch.lines().enumerate().filter(|(_, row)| !row.is_empty()) {
        let expected = || format!("row {}: expected an entry, a line number and a text, got `{row}`", i + 1);
        let mut fields = row.splitn(3, '\t');
        let (Some(entry), Some(number), Some(new)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(expected());
        };
        let number: usize = number.parse().map_err(|_| expected())?;
        let defines = |line: &&str| line.split(".entry").nth(1).is_some_and(|rest| name(rest) == entry);
        if !text.lines().any(|line| defines(&line)) {
            continue;
        }
        let line = number.checked_sub(1).and_then(|n| lines.get_mut(n));
        *line.ok_or_else(|| format!("`{entry}` has no line {number}"))? = new;
        changed = true;
    }
    Ok(if changed { lines.join("\n").into() } else { text.into() })
}

/// The identifier that a text begins with.
fn name(text: &str) -> &str {
    let text = text.trim_start();
    text.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$')).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = ".version 7.0\n.visible .entry a(\n)\n{\n    bar.sync 0;\n    ret;\n}";

    #[test]
    fn lines_of_the_named_entry_are_replaced() {
        let new = patched(MODULE, "a\t5\t// gone\n").unwrap();
        assert_eq!(new.lines().nth(4), Some("// gone"));
        assert_eq!(new.lines().count(), MODULE.lines().count());
        assert_eq!(patched(MODULE, "b\t5\t// gone\n").unwrap(), MODULE);
        assert_eq!(patched(MODULE, "").unwrap(), MODULE);
    }

    #[test]
    fn rows_that_make_no_sense_are_refused() {
        assert!(patched(MODULE, "a\tfive\t\n").is_err());
        assert!(patched(MODULE, "a\t99\tret;\n").unwrap_err().contains("no line 99"));
        assert!(patched(MODULE, "a 5").is_err());
    }
}
