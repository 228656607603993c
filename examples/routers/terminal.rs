//! The histograms as text.

use std::fmt::Write as _;

use moe_kernels::routers::measured_gating::RouterStats;

use crate::Load;

const BAR: usize = 12;
const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// One column a router, one row an expert; bars share one scale.
pub fn table(loads: &[Load], tokens: usize) -> String {
    let largest = loads.iter().flat_map(|load| &load.tokens).copied().max().unwrap_or(0).max(1);
    let experts = loads.first().map_or(0, |load| load.tokens.len());
    let mut text = format!("{tokens} tokens, {experts} experts, most popular first\n\n       ");
    for load in loads {
        let _ = write!(text, "{:<width$}", load.name, width = BAR + 6);
    }
    for expert in 0..experts {
        let _ = write!(text, "\n  {expert:>3}  ");
        for load in loads {
            let _ = write!(text, "{} {:<4} ", bar(load.tokens[expert], largest), load.tokens[expert]);
        }
    }
    text.push_str("\n\n  max/mean, and tokens left out\n       ");
    for load in loads {
        let summary = format!("{:.2}, {}", load.imbalance(), load.left_out);
        let _ = write!(text, "{summary:<width$}", width = BAR + 6);
    }
    text.push_str("\n\n  norm of what a layer makes of it\n       ");
    for load in loads {
        let _ = write!(text, "{:<width$.3}", load.norm, width = BAR + 6);
    }
    text
}

/// What the device measured, a column a run.
pub fn statistics<const N: usize>(runs: &[RouterStats; N], names: [&str; N]) -> String {
    let mut text = format!("  {:<22}", "top-2 by sigmoid");
    for name in names {
        let _ = write!(text, "{name:>12}");
    }
    let mut row = |name: &str, value: &dyn Fn(&RouterStats) -> f64| {
        let _ = write!(text, "\n  {name:<22}");
        for run in runs {
            let _ = write!(text, "{:>12.4}", value(run));
        }
    };
    row("max load", &|stats| stats.max_load.into());
    row("max over mean", &|stats| stats.max_over_mean.into());
    row("load CV^2", &|stats| stats.load_cv2.into());
    row("importance CV^2", &|stats| stats.importance_cv2.into());
    row("balance loss", &|stats| stats.balance_loss.into());
    row("sequence loss", &|stats| stats.sequence_loss.into());
    row("z-loss", &|stats| stats.z_loss.into());
    row("entropy", &|stats| stats.entropy.into());
    row("dropped", &|stats| stats.dropped.into());
    row("dropped fraction", &|stats| stats.dropped_fraction.into());
    text
}

/// `BAR` characters, filled in eighths.
fn bar(value: usize, largest: usize) -> String {
    let eighths = (8 * BAR * value).div_ceil(largest);
    let mut bar: String = std::iter::repeat_n('█', eighths / 8).collect();
    if !eighths.is_multiple_of(8) {
        bar.push(EIGHTHS[eighths % 8]);
    }
    bar.extend(std::iter::repeat_n(' ', BAR - bar.chars().count()));
    bar
}
