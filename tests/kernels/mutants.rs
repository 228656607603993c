//! Would a broken kernel be noticed? Takes barriers, fences, waits, predicates and bounds out of the kernels' PTX, one at a
//! time, and runs each broken kernel's case in a process of its own, with all of the software device's checkers on.
//!
//! A mutant is caught by the case (a wrong result, a fault, no end) or by a checker (a finding). One that survives is either a
//! gap in the tests or no mistake at all: `harmless.txt` lists those with the reason, by kernel and text.
//!
//! `MOE_MUTANTS=8` breaks up to 8 places of each kind in each kernel, `MOE_MUTANTS=all` every place; `MOE_CASES` selects
//! kernels. Places are the same for the same text but for numbers: of an unrolled loop, the first and last copies come first.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use moe_kernels::kernels::embedded;
use moe_kernels::registry::Kernel;
use wildmatch::WildMatch;

use super::ALONE;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Barrier,
    Fence,
    Wait,
    /// A guard that is always true.
    Predicate,
    /// A branch that is never taken.
    Branch,
    /// A comparison for order whose outcome is always the same.
    Bound,
}

struct Mutant {
    kernel: String,
    kind: Kind,
    /// From 1.
    line: usize,
    old: String,
    new: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Case(String),
    Checker(String),
    Survived,
}

/// Every way to break a kernel.
fn mutants(kernel: &str, ptx: &str, limit: usize) -> Vec<Mutant> {
    let mut places: BTreeMap<(Kind, String), Vec<Mutant>> = BTreeMap::new();
    let mut add = |kind, line: usize, old: &str, new: String| {
        let old = old.split("//").next().unwrap_or_default().trim().to_owned();
        let key = (kind, old.replace(|c: char| c.is_ascii_digit(), ""));
        places.entry(key).or_default().push(Mutant { kernel: kernel.to_owned(), kind, line, old, new });
    };
    let body = ptx.lines().enumerate().skip_while(|(_, line)| !line.starts_with('{'));
    for (i, text) in body.map(|(i, text)| (i + 1, text.trim())) {
        let (guard, instruction) = match text.strip_prefix('@').and_then(|t| t.split_once(' ')) {
            Some((guard, rest)) => (Some(guard), rest.trim()),
            None => (None, text),
        };
        let starts = |words: &[&str]| words.iter().any(|word| instruction.starts_with(word));
        // What stands behind the instruction on its line stays.
        let without = || text.split_once(';').map_or(String::new(), |(_, rest)| rest.to_owned());
        if starts(&["bar.", "barrier."]) {
            add(Kind::Barrier, i, text, without());
        } else if starts(&["fence", "membar"]) {
            add(Kind::Fence, i, text, without());
        } else if starts(&["cp.async.wait"]) {
            add(Kind::Wait, i, text, without());
        }
        if guard.is_some() {
            add(Kind::Predicate, i, text, instruction.to_owned());
            if starts(&["bra"]) {
                add(Kind::Branch, i, text, without());
            }
        }
        let compares = [".lt.", ".le.", ".gt.", ".ge."].iter().any(|c| instruction.starts_with(&format!("setp{c}")));
        let target = instruction.split_whitespace().nth(1).map(|target| target.trim_end_matches(','));
        if let Some(target) = target.filter(|target| compares && !target.contains('|')) {
            for test in ["eq", "ne"] {
                let guard = guard.map_or(String::new(), |guard| format!("@{guard} "));
                add(Kind::Bound, i, text, format!("{guard}setp.{test}.u32 {target}, 0, 0;"));
            }
        }
    }
    let mut by_kind: BTreeMap<Kind, Vec<Mutant>> = BTreeMap::new();
    for ((kind, _), copies) in places {
        let last = copies.len() - 1;
        let chosen = |i: usize| limit == usize::MAX || i == 0 || i == last;
        let copies = copies.into_iter().enumerate().filter(|&(i, _)| chosen(i));
        by_kind.entry(kind).or_default().extend(copies.map(|(_, mutant)| mutant));
    }
    // Spread over the kernel where there are more than asked for.
    let spread = |all: Vec<Mutant>| {
        let step = all.len().div_ceil(limit).max(1);
        all.into_iter().step_by(step).collect::<Vec<_>>()
    };
    by_kind.into_values().flat_map(spread).collect()
}

/// Runs a kernel's case in a process of its own, with the patch if there is one.
fn run(kernel: &str, patch: Option<&Mutant>, id: usize, limit: Duration) -> Verdict {
    let folder = std::env::temp_dir().join(format!("moe-mutants-{}", std::process::id()));
    let _ = std::fs::create_dir_all(&folder);
    let path = |what: &str| -> PathBuf { folder.join(format!("{id}.{what}")) };
    let (patch_file, findings_file, log) = (path("patch"), path("findings"), path("log"));
    let text = patch.map_or(String::new(), |m| format!("{}\t{}\t{}\n", m.kernel, m.line, m.new));
    std::fs::write(&patch_file, text).expect("a temporary file");
    let this = std::env::current_exe().expect("this program");
    let output = std::fs::File::create(&log).expect("a temporary file");
    let mut child = Command::new(this)
        .env(ALONE, kernel)
        .env("MOE_DEVICE", "soft")
        .env("SOFTCUDA_CHECKS", "all")
        .env("SOFTCUDA_THREADS", "1")
        .env("SOFTCUDA_TIMEOUT_MS", limit.as_millis().to_string())
        .env("SOFTCUDA_PATCH", &patch_file)
        .env("SOFTCUDA_FINDINGS", &findings_file)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .spawn()
        .expect("this program starts again");
    let started = Instant::now();
    let status = loop {
        match child.try_wait().expect("a child of this process") {
            Some(status) => break Some(status),
            None if started.elapsed() > 4 * limit => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let finding = std::fs::read_to_string(&findings_file).unwrap_or_default().lines().next().map(str::to_owned);
    let last = std::fs::read_to_string(&log).unwrap_or_default();
    let last = last.lines().rfind(|line| !line.is_empty() && !line.starts_with("note:")).unwrap_or_default().to_owned();
    for file in [patch_file, findings_file, log] {
        let _ = std::fs::remove_file(file);
    }
    assert!(!last.contains("CUDA_ERROR_INVALID_PTX"), "no mutant but a spelling mistake: {last}");
    match (status, finding) {
        (None, _) => Verdict::Case("no end".into()),
        (Some(status), _) if !status.success() => Verdict::Case(last),
        (_, Some(finding)) => Verdict::Checker(finding),
        _ => Verdict::Survived,
    }
}

/// Why a survivor is harmless, if `harmless.txt` knows: rows of kernel glob, kind, line glob and reason, separated by ` | `.
fn harmless(m: &Mutant) -> Option<&'static str> {
    include_str!("harmless.txt").lines().filter(|row| !row.is_empty() && !row.starts_with('#')).find_map(|row| {
        let mut fields = row.splitn(4, " | ").map(str::trim);
        let (kernel, kind, text, reason) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let kind = kind == "*" || kind.eq_ignore_ascii_case(&format!("{:?}", m.kind));
        (WildMatch::new(kernel).matches(&m.kernel) && kind && WildMatch::new(text).matches(&m.old)).then_some(reason)
    })
}

/// Breaks the kernels, `limit` places of each kind, and prints what became of it.
pub fn report(kernels: &[Kernel], limit: &str) -> ExitCode {
    let limit = match limit {
        "all" => usize::MAX,
        number => number.parse().unwrap_or_else(|_| panic!("MOE_MUTANTS: expected `all` or a number, got {number:?}")),
    };
    let mut jobs = Vec::new();
    for kernel in kernels {
        let name = kernel.name();
        let started = Instant::now();
        let healthy = run(&name, None, usize::MAX, Duration::from_secs(600));
        assert_eq!(healthy, Verdict::Survived, "{name} fails unbroken");
        let patience = started.elapsed() * 3 + Duration::from_secs(2);
        let ptx = embedded().iter().find(|e| e.name == name).expect("every kernel is embedded").ptx;
        jobs.extend(mutants(&name, ptx, limit).into_iter().map(|mutant| (mutant, patience)));
    }
    println!("{} mutants of {} kernels", jobs.len(), kernels.len());
    let next = Mutex::new(jobs.iter().enumerate());
    let verdicts = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let Some((id, (mutant, patience))) = next.lock().expect("no panic").next() else { return };
                    let verdict = run(&mutant.kernel, Some(mutant), id, *patience);
                    if std::env::var_os("MOE_MUTANTS_VERBOSE").is_some() {
                        println!("{} {:?} {}: `{}` {verdict:?}", mutant.kernel, mutant.kind, mutant.line, mutant.old);
                    }
                    verdicts.lock().expect("no panic").insert(id, verdict);
                }
            });
        }
    });
    let verdicts = verdicts.into_inner().expect("no panic");
    let _ = std::fs::remove_dir_all(std::env::temp_dir().join(format!("moe-mutants-{}", std::process::id())));

    let mut table: BTreeMap<Kind, [usize; 5]> = BTreeMap::new();
    let mut gaps = 0;
    for (id, (m, _)) in jobs.iter().enumerate() {
        let row = table.entry(m.kind).or_default();
        row[0] += 1;
        match &verdicts[&id] {
            Verdict::Case(_) => row[1] += 1,
            Verdict::Checker(_) => row[2] += 1,
            Verdict::Survived => match harmless(m) {
                Some(_) => row[3] += 1,
                None => row[4] += 1,
            },
        }
    }
    println!("\n{:<12}{:>9}{:>9}{:>9}{:>10}{:>9}", "", "mutants", "by case", "checker", "harmless", "missed");
    let mut total = [0; 5];
    for (kind, row) in &table {
        print_row(&format!("{kind:?}").to_lowercase(), row);
        total.iter_mut().zip(row).for_each(|(t, n)| *t += n);
        gaps += row[4];
    }
    print_row("all", &total);
    let caught = total[1] + total[2];
    let share = |of: usize| 100.0 * caught as f64 / of.max(1) as f64;
    println!("caught: {:.1} % of all, {:.1} % of those that are not harmless", share(total[0]), share(caught + gaps));
    for (survivor, title) in [(true, "harmless"), (false, "missed")] {
        println!("\n{title}:");
        for (id, (m, _)) in jobs.iter().enumerate() {
            let reason = harmless(m);
            if verdicts[&id] == Verdict::Survived && reason.is_some() == survivor {
                let kind = format!("{:?}", m.kind).to_lowercase();
                println!("  {} {kind}, line {}: `{}` {}", m.kernel, m.line, m.old, reason.unwrap_or_default());
            }
        }
    }
    let _ = std::io::stdout().flush();
    if share(caught + gaps) >= 95.0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_row(name: &str, row: &[usize; 5]) {
    let [all, case, checker, harmless, missed] = row;
    println!("{name:<12}{all:>9}{case:>9}{checker:>9}{harmless:>10}{missed:>9}");
}
