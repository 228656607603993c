//! What both programs have of their command lines, and what they print.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::Outcome;
use super::evaluate::variation;
use super::train::{History, Training};

/// Most of anything that is counted.
const MOST: usize = 1 << 20;

/// How a model is trained.
#[derive(Args, Debug)]
pub struct Common {
    /// Text to learn, any bytes; its last tenth is held out [default: Shakespeare's Coriolanus]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Steps
    #[arg(long, value_name = "N", default_value_t = 600, value_parser = count)]
    pub steps: usize,
    /// Ends the training after so many minutes, whatever --steps says
    #[arg(long, value_name = "M", value_parser = number::<f64>, allow_negative_numbers = true)]
    pub minutes: Option<f64>,
    /// Seed of weights and batches
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Sequences of a batch
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = count)]
    pub batch: usize,
    /// Largest learning rate
    #[arg(long, value_name = "R", default_value_t = 3e-3, value_parser = number::<f64>, allow_negative_numbers = true)]
    pub rate: f64,
    /// Steps from one look at the held-out text to the next
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = count)]
    pub eval_every: usize,
    /// Most batches of held-out text at each look
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = count)]
    pub eval_batches: usize,
    /// Bytes that the trained model writes at the end
    #[arg(long, value_name = "N", default_value_t = 120, value_parser = count_or_none)]
    pub sample: usize,
}

impl Common {
    pub fn training(&self, context: usize) -> Training {
        Training {
            steps: self.steps,
            limit: self.minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes)),
            seed: self.seed,
            sequences: self.batch,
            context,
            rate: self.rate,
            eval_every: self.eval_every,
            eval_batches: self.eval_batches,
        }
    }
}

/// Exit code 0, or 1 with a line on standard error.
pub fn exit(outcome: Outcome<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints a line of a table for each look at the held-out text, and a heading before the first.
pub fn tell(history: &History) {
    if history.evaluations.len() == 1 {
        let loads = history.end().loads.first().map_or("", |_| "  variation of the load, held out");
        println!("{:>6} {:>9} {:>9}{loads}", "step", "loss", "held out");
    }
    let Some((step, found)) = history.evaluations.last() else { return };
    let recent = match history.losses.len() {
        0 => "-".to_owned(),
        _ => format!("{:.3}", History::recent(&history.losses, 20)),
    };
    let of = |load: &Vec<i64>| format!("  {:.2}", variation(load.iter().map(|&tokens| tokens as f64)));
    let variations: String = found.loads.iter().map(of).collect();
    println!("{step:>6} {recent:>9} {:>9.3}{variations}", found.loss);
}

/// A number from 1 on.
pub fn count(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("expected 1 to {MOST}"))
}

fn count_or_none(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|&number| number <= MOST);
    number.ok_or_else(|| format!("expected 0 to {MOST}"))
}

/// A finite number of at least 0.
pub fn number<T: std::str::FromStr + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    let number = text.parse().ok().filter(|&number: &T| (0.0..=1e9).contains(&number.into()));
    number.ok_or_else(|| "expected a number from 0 to 1e9".into())
}
