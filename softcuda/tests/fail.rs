//! Every program of `tests/fail` has the mistake that its comments name, and no other finding, under every seed; every program
//! of `tests/pass` has none. Those of `tests/some_seeds` need an order of blocks that some seeds make.

mod programs;

use std::collections::BTreeSet;

use programs::{Program, all};

const SEEDS: u64 = 8;
const PASS_SEEDS: u64 = 20;
const SOME_SEEDS: u64 = 6;

#[test]
fn mistakes_are_found() {
    let mut wrong = Vec::new();
    let only = std::env::var("SOFTCUDA_PROGRAM").unwrap_or_default();
    for path in all("fail").iter().filter(|p| p.to_string_lossy().contains(&only)) {
        let program = Program::read(path);
        assert!(!program.expected.is_empty(), "{} says what it expects", program.name);
        let found: Vec<BTreeSet<String>> = (0..SEEDS).map(|seed| program.run(seed)).collect();
        for (seed, _) in found.iter().enumerate().filter(|(_, f)| f.is_empty()) {
            wrong.push(format!("{}, seed {seed}: nothing is found", program.name));
        }
        let seen: BTreeSet<String> = found.into_iter().flatten().collect();
        wrong.extend(
            (&seen - &program.expected).iter().map(|f| format!("{}: unexpected\n// expect: {f}", program.name)),
        );
        wrong.extend(
            (&program.expected - &seen).iter().map(|f| format!("{}: no seed shows\n// expect: {f}", program.name)),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a mistake needs may be an order of blocks that few schedules have; on one host thread too, which every third seed is run on.
#[test]
fn some_seed_shows_what_needs_an_order_of_blocks() {
    for path in all("some_seeds") {
        let program = Program::read(&path);
        let seen: BTreeSet<String> = (0..SOME_SEEDS).flat_map(|seed| program.run(3 * seed)).collect();
        assert_eq!(seen, program.expected, "{}", program.name);
    }
}

#[test]
fn correct_programs_are_silent() {
    let only = std::env::var("SOFTCUDA_PROGRAM").unwrap_or_default();
    let mut wrong = Vec::new();
    for path in all("pass").iter().filter(|p| p.to_string_lossy().contains(&only)) {
        let program = Program::read(path);
        for seed in 0..PASS_SEEDS {
            wrong.extend(program.run(seed).into_iter().map(|f| format!("{}, seed {seed}: {f}", program.name)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Each kind of mistake has its programs.
#[test]
fn classes_are_covered() {
    for class in ["race", "sync", "async", "memory", "init"] {
        let n = all(&format!("fail/{class}")).len();
        assert!(n >= 6, "{n} programs of class {class}");
    }
}
