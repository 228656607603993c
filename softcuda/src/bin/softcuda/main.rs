//! `softcuda run`: starts any CUDA program on the software device.

#[cfg(target_os = "linux")]
mod arguments;
#[cfg(target_os = "linux")]
mod folder;
#[cfg(target_os = "linux")]
mod run;

use std::process::ExitCode;

const USAGE: &str = "\
Runs CUDA programs on a software CUDA device.

Usage: softcuda run [OPTIONS] [--] PROGRAM [ARGUMENTS]...
       softcuda library

run      starts PROGRAM with the software device as its CUDA driver and exits as it does
library  prints the path of the driver's file

Options of run:
  --device NAME    the GPU to be: h100 (the default), h200, a100 or l4
  --devices LIST   how many of them, or a list of names separated by commas; 1 is the default
  --memory MIB     device memory of each, in MiB, instead of the GPU's
  --streams MODE   inline (the default): work is done in the call that submits it wherever that is possible, which repeats
                   from run to run; concurrent: work of streams overlaps the program's and each other's
  --seed N         seed of every order that the device is free to choose; 0, the default, is the plain order
  --checks LIST    checkers to switch on, separated by commas, or `all`
  --profile FILE   write a profile of every launch to FILE
  --profile-caches MODE
                   what the modelled L2 cache holds when a launch begins: cold (the default): nothing; warm: what the same launch,
                   run once before, has left; carried: what earlier launches have left

Exit codes: the program's own; 97 if it ends well but a checker found something, 98 if it ends well but its profile could not
be written; 128 plus the number of the signal that ended it; 125 if the software device cannot be set up, 126 if the program
cannot be run, 127 if there is no such program. A program whose `softcuda run` is killed is killed with it.
";

/// For mistakes in the command line, and where the software device cannot be set up.
const NOT_SET_UP: u8 = 125;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use arguments::Command;
    let fail = |text: String, code: u8| {
        eprintln!("softcuda: {text}");
        ExitCode::from(code)
    };
    match arguments::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print!("{USAGE}"),
        Ok(Command::Version) => println!("softcuda {}", env!("CARGO_PKG_VERSION")),
        Ok(Command::Library) => match softcuda::library() {
            Ok(path) => println!("{}", path.display()),
            Err(error) => return fail(error.to_string(), NOT_SET_UP),
        },
        Ok(Command::Run(run)) => match run.execute() {
            Ok(code) => return ExitCode::from(code),
            Err(error) => return fail(error.to_string(), error.exit_code()),
        },
        Err(error) => return fail(format!("{error}\n\n{USAGE}"), NOT_SET_UP),
    }
    ExitCode::SUCCESS
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("softcuda: the software device works on Linux only\n\n{USAGE}");
    ExitCode::from(NOT_SET_UP)
}
