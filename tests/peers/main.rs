//! The parameter grids of other MoE libraries' test suites, run on this one.
//!
//! A peer is a module, a test of its suite a section, a combination of parameters a point. Parameters and what is expected are facts that the
//! suites document; words and code are ours, and what is compared with is written from the peer's formula in f64 ([`formulas`]), not from
//! this library's reference. Large sizes are scaled down where only the size differs ([`suite::scaled`] and each module's own words): ratios,
//! odd widths, experts, choices, types and masks stay. The table in `README.md` is compared with what is here.
//!
//! `MOE_POINT` (globs, separated by commas) selects points by name; `PEERS_TABLE=1` prints the table.

#[path = "../support/mod.rs"]
mod support;

mod calls;
mod close;
mod data;
mod deepgemm;
mod fastmoe;
mod flashinfer;
mod formulas;
mod gradients;
mod grouped_gemm;
mod megablocks;
mod megatron;
mod products;
mod pytorch;
mod scattermoe;
mod sglang;
mod suite;
mod transformer_engine;
mod transformers;
mod tutel;
mod vllm;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use suite::{Peer, Section};
use wildmatch::WildMatch;

fn peers() -> Vec<Peer> {
    vec![
        vllm::peer(),
        sglang::peer(),
        flashinfer::peer(),
        deepgemm::peer(),
        transformer_engine::peer(),
        megatron::peer(),
        megablocks::peer(),
        pytorch::peer(),
        scattermoe::peer(),
        fastmoe::peer(),
        tutel::peer(),
        grouped_gemm::peer(),
        transformers::peer(),
        gradients::layers::sonic(),
        gradients::complaints::peer(),
    ]
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let peers = peers();
    let table: Vec<String> = peers.iter().map(Peer::row).collect();
    if std::env::var_os("PEERS_TABLE").is_some() {
        println!("{}", table.join("\n"));
    }
    // Points tell their failures together.
    std::panic::set_hook(Box::new(|_| ()));
    let mut trials = vec![Trial::test("readme_table", move || compare_with_readme(&table))];
    for peer in peers {
        for section in peer.sections {
            let name = format!("{}::{}", peer.name, section.name);
            trials.push(Trial::test(name, move || run(&section)));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// How many failures of a section are told in full.
const TOLD: usize = 5;

fn run(section: &Section) -> Result<(), Failed> {
    let globs = std::env::var("MOE_POINT").unwrap_or_else(|_| "*".into());
    let globs: Vec<WildMatch> = globs.split(',').map(WildMatch::new).collect();
    let points = section.points.iter().filter(|point| globs.iter().any(|glob| glob.matches(&point.name)));
    let mut failures = vec![];
    for point in points {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(&point.run)) {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| text.to_string()));
            failures.push(format!("{}: {}", point.name, text.unwrap_or_else(|| "panicked".into())));
        }
    }
    if failures.is_empty() {
        return Ok(());
    }
    let count = failures.len();
    failures.truncate(TOLD);
    Err(format!("{count} of {} points:\n{}", section.points.len(), failures.join("\n")).into())
}

/// Every peer's row stands in the table.
fn compare_with_readme(table: &[String]) -> Result<(), Failed> {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"))?;
    for row in table {
        if !readme.lines().any(|line| line == row) {
            return Err(format!("README.md has not this row, which PEERS_TABLE=1 prints:\n{row}").into());
        }
    }
    Ok(())
}
