//! The histograms as a drawing.

use crate::Load;
use crate::drawing::{self, BAR, Bars};

const PANEL: usize = 150;
const TOP: usize = 60;
const LEFT: usize = 40;

/// One panel a router, one bar an expert; bars share one scale, and a line marks the mean.
pub fn drawing(loads: &[Load], tokens: usize) -> String {
    let largest = loads.iter().flat_map(|load| &load.tokens).copied().max().unwrap_or(0).max(1);
    let experts = loads.first().map_or(0, |load| load.tokens.len());
    let (width, height) = (LEFT + PANEL * loads.len(), TOP + BAR * experts + 50);
    let heading = format!("{tokens} tokens, {experts} experts, most popular first");
    let mut svg = drawing::open(width, height, &heading);
    drawing::row_numbers(&mut svg, LEFT - 8, TOP, experts);
    for (index, load) in loads.iter().enumerate() {
        let notes = [format!("max/mean {:.2}", load.imbalance()), format!("left out {}", load.left_out)];
        let unit = (PANEL - 50) as f64 / largest as f64;
        let bars = Bars { title: load.name, values: &load.tokens, notes: &notes, unit };
        bars.draw(&mut svg, LEFT + PANEL * index, TOP);
    }
    drawing::close(svg)
}
