//! Drawings: bars and curves as SVG.

// Each program draws with some of it.
#![allow(dead_code)]

use std::fmt::Write as _;

/// Height of a bar with the gap below it.
pub const BAR: usize = 12;

/// The beginning of a white drawing of this size with a heading; [`close`] ends it.
pub fn open(width: usize, height: usize, heading: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"10\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"20\" font-size=\"13\">{heading}</text>\n"
    )
}

pub fn close(mut svg: String) -> String {
    svg.push_str("</svg>\n");
    svg
}

/// Numbers of `count` rows of bars, which end at `x`.
pub fn row_numbers(svg: &mut String, x: usize, top: usize, count: usize) {
    for row in 0..count {
        let y = top + BAR * row + BAR - 3;
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"end\">{row}</text>");
    }
}

/// Bars of one panel, one below the other.
pub struct Bars<'a> {
    pub title: &'a str,
    pub values: &'a [usize],
    /// Lines below the bars.
    pub notes: &'a [String],
    /// Length of a bar of the value 1.
    pub unit: f64,
}

impl Bars<'_> {
    /// The panel, and a line that marks the mean.
    pub fn draw(&self, svg: &mut String, x: usize, top: usize) {
        let length = |value: f64| value * self.unit;
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{}\" font-weight=\"bold\">{}</text>", top - 10, self.title);
        for (row, &value) in self.values.iter().enumerate() {
            let (y, bar) = (top + BAR * row, length(value as f64));
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{bar:.1}\" height=\"{}\" fill=\"#4878a8\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{value}</text>",
                BAR - 2,
                x as f64 + bar + 3.0,
                y + BAR - 3
            );
        }
        let mean = self.values.iter().sum::<usize>() as f64 / self.values.len().max(1) as f64;
        let (at, bottom) = (x as f64 + length(mean), top + BAR * self.values.len());
        let _ = write!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{top}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#c04030\" stroke-dasharray=\"3 2\"/>"
        );
        for (line, note) in self.notes.iter().enumerate() {
            let _ = write!(svg, "<text x=\"{x}\" y=\"{}\">{note}</text>", bottom + 16 + 14 * line);
        }
        svg.push('\n');
    }
}

/// A line through points.
pub struct Curve {
    pub name: String,
    pub points: Vec<[f64; 2]>,
    pub colour: &'static str,
    pub dashed: bool,
}

/// A panel of curves.
pub struct Curves<'a> {
    pub title: &'a str,
    /// What is counted from left to right.
    pub across: &'a str,
    pub curves: &'a [Curve],
    /// Width and height of the frame.
    pub size: [f64; 2],
}

impl Curves<'_> {
    /// The frame begins at `x`, `top`; its scales hold all points, and 0 below.
    pub fn draw(&self, svg: &mut String, x: f64, top: f64) {
        let [width, height] = self.size;
        let most = |axis: usize| {
            let values = self.curves.iter().flat_map(|curve| &curve.points).map(|point| point[axis]);
            values.filter(|value| value.is_finite()).fold(f64::MIN_POSITIVE, f64::max)
        };
        let (right, high) = (most(0), most(1) * 1.05);
        let _ = writeln!(
            svg,
            "<text x=\"{x}\" y=\"{}\" font-weight=\"bold\">{}</text>\
             <rect x=\"{x}\" y=\"{top}\" width=\"{width}\" height=\"{height}\" fill=\"none\" stroke=\"#808080\"/>",
            top - 10.0,
            self.title
        );
        for tick in 0..=4 {
            let part = f64::from(tick) / 4.0;
            let (at, level) = (x + part * width, top + height - part * height);
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.2}</text>\
                 <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.0}</text>",
                x - 4.0,
                level + 3.0,
                part * high,
                top + height + 14.0,
                part * right
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x + width / 2.0,
            top + height + 28.0,
            self.across
        );
        for (index, Curve { name, points, colour, dashed }) in self.curves.iter().enumerate() {
            let place = |&[px, py]: &[f64; 2]| {
                let (px, py) = (x + px / right * width, top + height - py / high * height);
                py.is_finite().then(|| format!("{px:.1},{py:.1}"))
            };
            let places: Vec<String> = points.iter().filter_map(place).collect();
            let dashes = if *dashed { " stroke-dasharray=\"5 3\"" } else { "" };
            let (from, y) = (x + width - 150.0, top + 14.0 * (index + 1) as f64);
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"{dashes}/>\
                 <line x1=\"{from:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"{dashes}/>\
                 <text x=\"{:.1}\" y=\"{y:.1}\">{name}</text>",
                places.join(" "),
                y - 3.0,
                from + 16.0,
                y - 3.0,
                from + 20.0
            );
        }
    }
}
