//! A training as a drawing.

use super::evaluate::variation;
use super::svg::{self, BAR, Bars, Curve, Curves};
use super::train::{History, LayerHistory};

const TOP: usize = 60;
const PANEL: usize = 150;
/// Of a panel of curves.
const SIZE: [f64; 2] = [420.0, 240.0];
const COLOURS: [&str; 4] = ["#4878a8", "#c04030", "#408048", "#806090"];

/// Losses of one or more trainings over their steps, with the entropy of the text's bytes as a line.
fn losses(trainings: &[(&str, &History)], entropy: f64) -> Vec<Curve> {
    let most = trainings.iter().map(|(_, history)| history.losses.len()).max().unwrap_or(0) as f64;
    let mut curves = vec![Curve {
        name: "entropy of single bytes".into(),
        points: vec![[0.0, entropy], [most, entropy]],
        colour: "#808080",
        dashed: true,
    }];
    for (index, (name, history)) in trainings.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let trained = history.losses.iter().enumerate().map(|(step, &loss)| [step as f64, loss]).collect();
        let held_out = history.evaluations.iter().map(|(step, found)| [*step as f64, found.loss]).collect();
        curves.push(Curve { name: format!("{name}, trained on"), points: trained, colour, dashed: false });
        curves.push(Curve { name: format!("{name}, held out"), points: held_out, colour, dashed: true });
    }
    curves
}

/// The losses alone.
pub fn compared(trainings: &[(&str, &History)], entropy: f64) -> String {
    let mut drawing = svg::open(SIZE[0] as usize + 80, SIZE[1] as usize + TOP + 50, "Nats a byte over steps");
    let curves = losses(trainings, entropy);
    Curves { title: "Loss", across: "steps", curves: &curves, size: SIZE }.draw(&mut drawing, 50.0, TOP as f64);
    svg::close(drawing)
}

/// Loss and spread of the loads over the steps, and the loads of the held-out text at the end.
pub fn training(name: &str, history: &History, entropy: f64) -> String {
    let loads = &history.end().loads;
    let experts = loads.first().map_or(0, Vec::len);
    let left = [50.0, 110.0 + SIZE[0], 180.0 + 2.0 * SIZE[0]];
    let height = TOP + (SIZE[1] as usize).max(BAR * experts) + 50;
    let mut drawing = svg::open(left[2] as usize + PANEL * loads.len(), height, name);
    let curves = losses(&[(name, history)], entropy);
    Curves { title: "Loss, nats a byte", across: "steps", curves: &curves, size: SIZE }.draw(
        &mut drawing,
        left[0],
        TOP as f64,
    );
    let spread = |(index, layer): (usize, &LayerHistory)| Curve {
        name: format!("MoE layer {index}"),
        points: layer.variations.iter().enumerate().map(|(step, &value)| [step as f64, value]).collect(),
        colour: COLOURS[index % COLOURS.len()],
        dashed: false,
    };
    let curves: Vec<Curve> = history.layers.iter().enumerate().map(spread).collect();
    let title = "Load of the experts: coefficient of variation";
    Curves { title, across: "steps", curves: &curves, size: SIZE }.draw(&mut drawing, left[1], TOP as f64);
    let largest = loads.iter().flatten().copied().max().unwrap_or(0).max(1);
    svg::row_numbers(&mut drawing, left[2] as usize - 8, TOP, experts);
    for (index, load) in loads.iter().enumerate() {
        let values: Vec<usize> = load.iter().map(|&tokens| tokens as usize).collect();
        let title = format!("MoE layer {index}, held out");
        let notes = [format!("variation {:.2}", variation(load.iter().map(|&tokens| tokens as f64)))];
        let bars = Bars { title: &title, values: &values, notes: &notes, unit: (PANEL - 50) as f64 / largest as f64 };
        bars.draw(&mut drawing, left[2] as usize + PANEL * index, TOP);
    }
    svg::close(drawing)
}
