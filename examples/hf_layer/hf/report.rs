//! How far the device's results are from what they should be.

use std::fmt;

use moe_kernels::Dtype;

use super::device::Outputs;
use super::golden::Expected;

/// Largest relative error of logits and weights, which are f32 whatever the type of x.
pub const ROUTING_TOLERANCE: f64 = 1e-5;

/// Largest relative error of y: a few roundings to the storage type.
pub fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 1e-2,
        Dtype::F16 => 2e-3,
        Dtype::F32 => 1e-5,
        other => unreachable!("no layer runs in {other}"),
    }
}

/// Largest relative error of a gradient. That of a router is a sum of differences, of softmaxes above all.
pub fn gradient_tolerance(name: &str, dtype: Dtype) -> f64 {
    let parameter = name.strip_prefix("d.").unwrap_or("");
    let of_router = ["router", "gate."].iter().any(|of| parameter.starts_with(of)) || parameter.contains(".gate.");
    let loose = if of_router && dtype != Dtype::F32 { 2.0 } else { 1.0 };
    loose * tolerance(dtype)
}

/// One tensor's verdict.
pub struct Line {
    pub tensor: String,
    pub measure: Measure,
}

pub enum Measure {
    /// `|got - want| / |want|` in the Euclidean norm, and the largest that passes.
    Relative { error: f64, tolerance: f64 },
    /// Rows that differ, of how many.
    Rows { wrong: usize, of: usize },
}

impl Line {
    pub fn passes(&self) -> bool {
        match self.measure {
            // NaN does not pass.
            Measure::Relative { error, tolerance } => error <= tolerance,
            Measure::Rows { wrong, .. } => wrong == 0,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.passes() { "ok" } else { "FAILED" };
        match self.measure {
            Measure::Relative { error, tolerance } => {
                write!(f, "{:<36} relative error {error:.2e} (at most {tolerance:.0e})  {verdict}", self.tensor)
            }
            Measure::Rows { wrong, of } => {
                write!(f, "{:<36} {wrong} of {of} rows differ (0 allowed)  {verdict}", self.tensor)
            }
        }
    }
}

/// Compares every tensor that is expected. Where the order of a token's experts is open, rows are compared by ascending id.
pub fn compare(got: &Outputs, want: &Expected, dtype: Dtype, top_k: usize, unordered: bool) -> Vec<Line> {
    let mut lines = Vec::new();
    let relative =
        |got: &[f64], want: &[f64], tolerance| Measure::Relative { error: relative_error(got, want), tolerance };
    if let Some(logits) = &want.logits {
        let measure = relative(&widened(&got.logits), logits, ROUTING_TOLERANCE);
        lines.push(Line { tensor: "logits".into(), measure });
    }
    let mut got_weights = widened(&got.weights);
    let mut want_weights = want.weights.clone();
    if let Some(ids) = &want.ids {
        let (mut got_ids, mut want_ids) = (got.ids.clone(), ids.clone());
        if unordered {
            sort_rows(&mut got_ids, Some(&mut got_weights), top_k);
            sort_rows(&mut want_ids, want_weights.as_mut(), top_k);
        }
        let wrong = got_ids.chunks(top_k).zip(want_ids.chunks(top_k)).filter(|(got, want)| got != want).count();
        lines.push(Line { tensor: "ids".into(), measure: Measure::Rows { wrong, of: want_ids.len() / top_k } });
    }
    if let Some(weights) = &want_weights {
        lines.push(Line { tensor: "weights".into(), measure: relative(&got_weights, weights, ROUTING_TOLERANCE) });
    }
    for (name, values) in &want.extras {
        let found = got.extras.iter().find(|(other, _)| other == name);
        // The experts' input is of the type of x, all else of the router's.
        let tolerance = if *name == "x_experts" { tolerance(dtype) } else { ROUTING_TOLERANCE };
        let measure = relative(&found.map_or(Vec::new(), |(_, got)| widened(got)), values, tolerance);
        lines.push(Line { tensor: (*name).into(), measure });
    }
    lines.push(Line { tensor: "y".into(), measure: relative(&widened(&got.y), &want.y, tolerance(dtype)) });
    lines
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

/// `|got - want| / |want|`; 0 where both are zero or empty.
pub fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let norm = |squares: f64| squares.sqrt();
    let difference = norm(got.iter().zip(want).map(|(got, want)| (got - want) * (got - want)).sum());
    let size = norm(want.iter().map(|want| want * want).sum());
    if difference == 0.0 { 0.0 } else { difference / size }
}

/// Sorts each row by id and its weights along with it.
fn sort_rows(ids: &mut [i32], weights: Option<&mut Vec<f64>>, top_k: usize) {
    let order: Vec<usize> = (0..ids.len() / top_k)
        .flat_map(|row| {
            let mut places: Vec<usize> = (row * top_k..(row + 1) * top_k).collect();
            places.sort_by_key(|&place| ids[place]);
            places
        })
        .collect();
    let sorted: Vec<i32> = order.iter().map(|&place| ids[place]).collect();
    ids.copy_from_slice(&sorted);
    if let Some(weights) = weights {
        *weights = order.iter().map(|&place| weights[place]).collect();
    }
}
