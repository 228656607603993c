//! What pages are made of: escaped text, colours, bars, rows.

use std::fmt::{Display, Write};

/// Text for HTML, also inside attributes.
pub struct Safe<T>(pub T);

impl<T: Display> Display for Safe<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.to_string().chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The colour of a unit or an instruction class, the same everywhere.
pub fn colour(name: &str) -> &'static str {
    match name {
        "tensor" | "matrix" => "#d1495b",
        "DRAM" => "#2a7f9e",
        "L2" => "#58b0a8",
        "shared and L1" | "shared load" => "#f2a541",
        "shared store" => "#f6c177",
        "load/store" | "matrix move" => "#c98b2b",
        "async copy" => "#8f6a1f",
        "issue" | "control" => "#8a92a6",
        "f32" => "#4c78a8",
        "f16" => "#7ba3cf",
        "f64" => "#2f4f7f",
        "integer" => "#5a9e5a",
        "special" => "#a56eb5",
        "convert" => "#c9a2d4",
        "exchange" => "#9d755d",
        "global load" => "#2a7f9e",
        "global store" => "#79b8cf",
        "atomic" => "#0f5c73",
        "synchronise" => "#6b5b95",
        "move" => "#b8bec9",
        _ => "#a0a0a0",
    }
}

/// A bar that is `fraction` full.
pub fn track(fraction: f64, colour: &str) -> String {
    // What is not nothing shows.
    let width = if fraction > 0.0 { (100.0 * fraction).clamp(0.4, 100.0) } else { 0.0 };
    format!("<span class=\"track\"><i style=\"width:{width:.2}%;background:{colour}\"></i></span>")
}

/// A bar with a name before and a value after it; `title` shows on pointing.
pub fn row(class: &str, name: &str, bar: &str, value: &str, title: &str) -> String {
    format!(
        "<div class=\"{class}\" title=\"{}\"><span>{}</span>{bar}<span>{}</span></div>\n",
        Safe(title),
        Safe(name),
        Safe(value)
    )
}

pub fn card(value: impl Display, name: &str) -> String {
    format!("<div class=\"card\"><b>{}</b><span>{}</span></div>\n", Safe(value), Safe(name))
}

pub fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
