//! The command line.

use std::ffi::OsString;

use crate::run::Run;

pub enum Command {
    Run(Run),
    Library,
    Help,
    Version,
}

/// What is wrong with a command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    #[error("a command is missing")]
    NoCommand,
    #[error("`{0}` is not a command")]
    UnknownCommand(String),
    #[error("`{0}` is not an option of `softcuda run`")]
    UnknownOption(String),
    #[error("`{0}` takes a value")]
    NoValue(&'static str),
    #[error("`{0}` is given twice")]
    Twice(&'static str),
    #[error("`{option}` must be {expected}, not `{found}`")]
    Value { option: &'static str, expected: &'static str, found: String },
    #[error("the program to run is missing")]
    NoProgram,
}

/// Options of `run` and the environment variable that each becomes.
const OPTIONS: [(&str, &str); 8] = [
    ("--device", "SOFTCUDA_DEVICE"),
    ("--devices", "SOFTCUDA_DEVICES"),
    ("--memory", "SOFTCUDA_MEMORY_MIB"),
    ("--streams", "SOFTCUDA_STREAMS"),
    ("--seed", "SOFTCUDA_SEED"),
    ("--checks", "SOFTCUDA_CHECKS"),
    ("--profile", "SOFTCUDA_PROFILE"),
    ("--profile-caches", "SOFTCUDA_PROFILE_CACHES"),
];

pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, ArgumentError> {
    let mut arguments = arguments.into_iter();
    let command = arguments.next().ok_or(ArgumentError::NoCommand)?;
    match command.to_str() {
        Some("run") => run(arguments),
        Some("library") => Ok(Command::Library),
        Some("help" | "--help" | "-h") => Ok(Command::Help),
        Some("--version" | "-V") => Ok(Command::Version),
        _ => Err(ArgumentError::UnknownCommand(command.to_string_lossy().into_owned())),
    }
}

fn run(mut arguments: impl Iterator<Item = OsString>) -> Result<Command, ArgumentError> {
    let mut settings: Vec<(&'static str, OsString)> = Vec::new();
    let program = loop {
        let argument = arguments.next().ok_or(ArgumentError::NoProgram)?;
        let text = argument.to_string_lossy().into_owned();
        if text == "--" {
            break arguments.next().ok_or(ArgumentError::NoProgram)?;
        }
        if matches!(&*text, "--help" | "-h") {
            return Ok(Command::Help);
        }
        if !text.starts_with('-') {
            break argument;
        }
        let (name, inline) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (&*text, None),
        };
        let known = OPTIONS.iter().find(|(option, _)| *option == name);
        let &(option, variable) = known.ok_or_else(|| ArgumentError::UnknownOption(name.to_owned()))?;
        if settings.iter().any(|(set, _)| *set == variable) {
            return Err(ArgumentError::Twice(option));
        }
        let value = inline.or_else(|| arguments.next()).ok_or(ArgumentError::NoValue(option))?;
        settings.push((variable, check(option, value)?));
    };
    Ok(Command::Run(Run { program, arguments: arguments.collect(), settings }))
}

/// The value in the form that the driver takes. What the driver checks itself is left to it.
fn check(option: &'static str, value: OsString) -> Result<OsString, ArgumentError> {
    let text = value.to_string_lossy();
    let wrong = |expected| Err(ArgumentError::Value { option, expected, found: text.clone().into_owned() });
    match option {
        "--streams" if !matches!(&*text, "inline" | "concurrent") => wrong("`inline` or `concurrent`"),
        "--profile-caches" if !matches!(&*text, "cold" | "warm" | "carried") => wrong("`cold`, `warm` or `carried`"),
        "--seed" if text.parse::<u64>().is_err() => wrong("a whole number"),
        "--memory" if !text.parse::<u64>().is_ok_and(|number| number > 0) => wrong("a whole number above 0"),
        // The program may change its working folder before the driver opens the file.
        "--profile" => match std::path::absolute(&value) {
            Ok(path) => Ok(path.into_os_string()),
            Err(_) => wrong("the path of a file"),
        },
        _ => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, ArgumentError> {
        parse(line.split(' ').map(OsString::from))
    }

    fn run_of(line: &str) -> Run {
        match parsed(line) {
            Ok(Command::Run(run)) => run,
            _ => panic!("{line}"),
        }
    }

    #[test]
    fn options_end_at_the_program() {
        let run = run_of("run --device a100 --seed=7 -- prog --seed 9");
        assert_eq!(run.program, "prog");
        assert_eq!(run.arguments, ["--seed", "9"]);
        assert_eq!(run.settings, [("SOFTCUDA_DEVICE", "a100".into()), ("SOFTCUDA_SEED", OsString::from("7"))]);
        let run = run_of("run prog -- x");
        assert_eq!(run.arguments, ["--", "x"]);
        let run = run_of("run --profile out.json prog");
        assert!(std::path::Path::new(&run.settings[0].1).is_absolute());
    }

    #[test]
    fn mistakes_are_named() {
        assert!(parsed("run --streams sideways x").is_err());
        let error = |line| parsed(line).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(error("fly"), "`fly` is not a command");
        assert_eq!(error("run --wings 2 -- x"), "`--wings` is not an option of `softcuda run`");
        assert_eq!(error("run --seed soon -- x"), "`--seed` must be a whole number, not `soon`");
        let caches = "`--profile-caches` must be `cold`, `warm` or `carried`, not `hot`";
        assert_eq!(error("run --profile-caches hot -- x"), caches);
        assert_eq!(error("run --memory 0 -- x"), "`--memory` must be a whole number above 0, not `0`");
        assert_eq!(error("run --seed 1 --seed 2 -- x"), "`--seed` is given twice");
        assert_eq!(error("run --seed"), "`--seed` takes a value");
        assert_eq!(error("run --seed 1 --"), "the program to run is missing");
        assert!(matches!(parsed("run --help"), Ok(Command::Help)));
    }
}
