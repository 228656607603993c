//! `train_switch` and `distill_switch` as programs.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::{example, folder, names};

/// A model and batches small enough for a build without optimisation.
const SMALL: [&str; 14] = [
    "--hidden",
    "32",
    "--intermediate",
    "32",
    "--experts",
    "4",
    "--heads",
    "2",
    "--context",
    "16",
    "--batch",
    "8",
    "--eval-batches",
    "2",
];

fn train<A: AsRef<OsStr>>(folder: &Path, arguments: &[A]) -> Output {
    Command::new(example("train_switch")).args(SMALL).args(arguments).current_dir(folder).output().expect("it starts")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("what they print is text")
}

/// The held-out losses of a table's lines, by step.
fn held_out(printed: &str) -> Vec<(usize, f64)> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        Some((words.first()?.parse().ok()?, words.get(2)?.parse().ok()?))
    };
    printed.lines().filter(|line| line.starts_with(' ')).filter_map(line).collect()
}

/// The loss falls, and all of a run follows from its arguments, bit for bit.
#[test]
fn a_short_training_by_each_rule() {
    for rule in ["switch", "glam", "mixtral"] {
        let folder = folder();
        let run = |arguments: &[&str]| {
            let common = ["--rule", rule, "--steps", "12", "--sample", "8", "--rate", "0.01", "--eval-every", "6"];
            text(&train(folder.path(), &[&common, arguments].concat()))
        };
        let first = run(&["--out", "1.safetensors", "--svg", "1.svg"]);
        let found = held_out(&first);
        assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 6, 12], "{first}");
        assert!(found[0].1 > 5.0 && found[2].1 < found[1].1 && found[2].1 < found[0].1 - 0.8, "{rule}: {found:?}");
        run(&["--out", "2.safetensors", "--svg", "2.svg"]);
        run(&["--out", "3.safetensors", "--svg", "3.svg", "--seed", "2"]);
        let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
        assert!(read("1.safetensors") == read("2.safetensors") && read("1.svg") == read("2.svg"), "{rule}");
        assert!(read("1.safetensors") != read("3.safetensors"), "{rule}: the seed has a say");
        let drawing = String::from_utf8(read("1.svg")).unwrap();
        assert!(drawing.starts_with("<svg ") && drawing.ends_with("</svg>\n") && !drawing.contains("NaN"));
    }
}

/// Frozen experts stay as they were, to the bit, while the router moves; without the flag they move.
#[test]
fn frozen_experts_stay() {
    let folder = folder();
    let run =
        |arguments: &[&str]| text(&train(folder.path(), &[&["--sample", "0", "--svg", "x.svg"], arguments].concat()));
    // No step is worth speaking of: what the model begins with.
    run(&["--steps", "1", "--rate", "0", "--out", "begin.safetensors"]);
    run(&["--steps", "2", "--freeze-experts", "--out", "frozen.safetensors"]);
    run(&["--steps", "2", "--out", "free.safetensors"]);
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    let (begin, frozen, free) = (read("begin.safetensors"), read("frozen.safetensors"), read("free.safetensors"));
    let same = |a: &[u8], b: &[u8], name: &str| {
        let tensor = |bytes: &[u8]| {
            let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
            file.tensor(&format!("blocks.1.feed_forward.{name}")).unwrap().data().to_vec()
        };
        tensor(a) == tensor(b)
    };
    for name in ["experts.gate_up", "experts.down"] {
        assert!(same(&begin, &frozen, name), "{name} is frozen");
        assert!(!same(&begin, &free, name), "{name} is trained");
    }
    assert!(!same(&begin, &frozen, "router"), "the router is trained");
}

/// What was saved is what goes on, and what a dense model learns from.
#[test]
fn a_saved_model_goes_on_and_teaches() {
    let folder = folder();
    let printed = text(&train(
        folder.path(),
        &["--steps", "10", "--rate", "0.01", "--sample", "0", "--out", "teacher.safetensors"],
    ));
    let (_, end) = *held_out(&printed).last().unwrap();
    let program = |name: &str, arguments: &[&str]| {
        let common = ["--batch", "8", "--eval-batches", "2", "--sample", "0"];
        let output = Command::new(example(name)).args(common).args(arguments).current_dir(folder.path()).output();
        text(&output.expect("it starts"))
    };
    let printed = program("train_switch", &["--from", "teacher.safetensors", "--steps", "1", "--svg", "on.svg"]);
    assert_eq!(held_out(&printed)[0], (0, end), "{printed}");
    let printed = program("distill_switch", &["teacher.safetensors", "--steps", "4", "--out", "student.safetensors"]);
    assert!(printed.contains(&format!("held out {end:.3}")) && printed.contains("distilled"), "{printed}");
    let found = held_out(&printed);
    // Alone it begins with random weights, distilled with the teacher's.
    assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 4, 0, 4, 0, 4]);
    assert_eq!(found[2].1, found[1].1, "once more goes on: {printed}");
    assert!(found[4].1 < found[0].1 - 0.3, "{printed}");
    assert!(found[5].1 < found[1].1, "{printed}");
    assert_eq!(
        names(folder.path()),
        ["distill_switch.svg", "on.svg", "student.safetensors", "teacher.safetensors", "train_switch.svg"]
    );
    // A dense model has no experts, and can be gone on with all the same.
    let printed = program("train_switch", &["--from", "student.safetensors", "--steps", "1"]);
    assert_eq!(held_out(&printed)[0].1, found[5].1, "{printed}");
}

#[test]
fn arguments_that_cannot_be() {
    let folder = folder();
    fs::write(folder.path().join("short.txt"), "too short").unwrap();
    fs::write(folder.path().join("no.safetensors"), "no model").unwrap();
    let check = |program: &str, arguments: &[&str], code: i32, said: &str| {
        let output = Command::new(example(program)).args(arguments).current_dir(folder.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{program} {arguments:?}: {text}");
        assert!(text.starts_with("error: ") && text.contains(said), "{program} {arguments:?}: {text}");
    };
    for (arguments, said) in [
        (&["--rule", "other"][..], "switch, glam, mixtral"),
        (&["--steps", "0"], "expected 1 to"),
        (&["--balance", "-1"], "expected a number from 0"),
        (&["--z", "nan"], "expected a number from 0"),
        (&["--minutes", "soon"], "expected a number from 0"),
        (&["--from", "no.safetensors", "--hidden", "8"], "cannot be used with"),
    ] {
        check("train_switch", arguments, 2, said);
    }
    for (arguments, said) in [
        (&["--text", "none.txt"][..], "none.txt: "),
        (&["--text", "short.txt"], "short.txt: expected at least 650 bytes, found 9"),
        (&["--from", "no.safetensors"], "no.safetensors: "),
        (&["--heads", "3"], "heads: expected a divisor of 128"),
        (&["--blocks", "1"], "blocks: expected at least 2"),
        (&["--rule", "mixtral", "--experts", "1"], "top_k"),
        (
            &["--hidden", "8", "--steps", "1", "--sample", "0", "--eval-batches", "1", "--svg", "no/such.svg"],
            "no/such.svg: ",
        ),
    ] {
        check("train_switch", arguments, 1, said);
    }
    check("distill_switch", &[], 2, "MODEL");
    check("distill_switch", &["no.safetensors", "--share", "1.5"], 2, "expected a number from 0 to 1");
    check("distill_switch", &["none.safetensors"], 1, "none.safetensors: ");
    check("distill_switch", &["no.safetensors"], 1, "no.safetensors: ");
    assert_eq!(names(folder.path()), ["no.safetensors", "short.txt"]);
}
