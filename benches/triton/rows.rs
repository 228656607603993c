//! A product of a case on a device, as text, JSON and a line of a table.

use serde_json::{Value, json};

use crate::cases::Case;
use crate::counters::{Counted, LEVEL, ratios};
use crate::shapes::Shape;

/// One product of one case on one device.
pub struct Row {
    pub device: &'static str,
    pub case: Case,
    pub product: &'static str,
    pub tile: String,
    pub ours: Counted,
    pub theirs: Counted,
}

impl Row {
    /// What is behind, in words; none where nothing is.
    pub fn behind(&self) -> Option<String> {
        let figures = ratios(&self.ours, &self.theirs);
        let behind = figures.iter().filter(|(_, ratio)| ratio.is_nan() || *ratio > 1.0 + LEVEL);
        let behind: Vec<String> = behind.map(|(name, ratio)| format!("{name} {ratio:.3}")).collect();
        let Row { device, product, .. } = self;
        (!behind.is_empty()).then(|| format!("{device} {} {product}: {}", self.case.name(), behind.join(", ")))
    }

    pub fn print(&self) {
        let (ours, theirs) = (&self.ours, &self.theirs);
        let cut = self.case.cut();
        let cut = if cut.is_empty() { cut } else { format!(" (cut to {cut})") };
        println!("{} {} {}{cut}", self.device, self.case.name(), self.product);
        let pair = |name: &str, ours: f64, theirs: f64, digits: usize| {
            println!("    {name:<28} {ours:>12.digits$} / {theirs:>12.digits$}   {:.3}", ours / theirs);
        };
        pair("wavefronts, million", ours.wavefronts / 1e6, theirs.wavefronts / 1e6, 3);
        pair("MB through L2", ours.l2_bytes / 1e6, theirs.l2_bytes / 1e6, 1);
        pair("MB of DRAM", ours.dram_bytes / 1e6, theirs.dram_bytes / 1e6, 1);
        pair("rows for a live one", ours.rows, theirs.rows, 3);
        pair("modelled us", ours.seconds * 1e6, theirs.seconds * 1e6, 2);
        println!(
            "    by {} / {}; {} / {}",
            ours.limited_by,
            theirs.limited_by,
            ours.instructions(),
            theirs.instructions()
        );
        println!("    {} / {}", ours.kernels.join(" + "), theirs.kernels.join(" + "));
    }

    pub fn json(&self) -> Value {
        let Shape { experts, top_k, hidden, intermediate, .. } = self.case.shape;
        json!({
            "device": self.device, "name": self.case.name(), "product": self.product, "cut": self.case.cut(), "experts": experts, "top_k": top_k,
            "hidden": hidden, "intermediate": intermediate, "tokens": self.case.tokens, "tile": self.tile, "ours": self.ours.json(),
            "triton": self.theirs.json(), "ratios": ratios(&self.ours, &self.theirs).into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        })
    }
}

/// A table in Markdown: a line for each case on a device, ours over Triton's in every figure, of the first product and of the second.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| device | model/tokens | cut to | wavefronts | L2 | DRAM | rows | time |\n|---|---|---|---|---|---|---|---|\n",
    );
    for pair in rows.chunks_exact(2) {
        let [first, second] = [0, 1].map(|i| ratios(&pair[i].ours, &pair[i].theirs));
        let both = first.iter().zip(&second).map(|((_, a), (_, b))| format!(" {a:.2}, {b:.2} |"));
        let Row { device, case, .. } = &pair[0];
        text += &format!("| {device} | {} | {} |{}\n", case.name(), case.cut(), both.collect::<String>());
    }
    text
}
