//! The histograms as a drawing.

use std::fmt::Write as _;

use crate::Load;

const PANEL: usize = 150;
const BAR: usize = 12;
const TOP: usize = 60;
const LEFT: usize = 40;

/// One panel a router, one bar an expert; bars share one scale, and a line marks the mean.
pub fn drawing(loads: &[Load], tokens: usize) -> String {
    let largest = loads.iter().flat_map(|load| &load.tokens).copied().max().unwrap_or(0).max(1);
    let experts = loads.first().map_or(0, |load| load.tokens.len());
    let (width, height) = (LEFT + PANEL * loads.len(), TOP + BAR * experts + 50);
    let length = |value: f64| value * (PANEL - 50) as f64 / largest as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"10\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"20\" font-size=\"13\">{tokens} tokens, {experts} experts, most popular first</text>\n"
    );
    for expert in 0..experts {
        let y = TOP + BAR * expert + BAR - 3;
        let _ = writeln!(svg, "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{expert}</text>", LEFT - 8);
    }
    for (index, load) in loads.iter().enumerate() {
        let x = LEFT + PANEL * index;
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{}\" font-weight=\"bold\">{}</text>", TOP - 10, load.name);
        for (expert, &value) in load.tokens.iter().enumerate() {
            let (y, bar) = (TOP + BAR * expert, length(value as f64));
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{bar:.1}\" height=\"{}\" fill=\"#4878a8\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{value}</text>",
                BAR - 2,
                x as f64 + bar + 3.0,
                y + BAR - 3
            );
        }
        let mean = load.tokens.iter().sum::<usize>() as f64 / experts.max(1) as f64;
        let (at, bottom) = (x as f64 + length(mean), TOP + BAR * experts);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#c04030\" stroke-dasharray=\"3 2\"/>\
             <text x=\"{x}\" y=\"{}\">max/mean {:.2}</text><text x=\"{x}\" y=\"{}\">left out {}</text>",
            bottom + 16,
            load.imbalance(),
            bottom + 30,
            load.left_out
        );
    }
    svg.push_str("</svg>\n");
    svg
}
