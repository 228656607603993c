//! Would a broken kernel be noticed? Takes barriers, fences, waits, predicates, bounds, memory orders and scopes out of the kernels'
//! PTX, one at a time, and runs each broken kernel's case in a process of its own, with all of the software device's checkers on.
//!
//! A mutant is caught by the case (a wrong result, a fault, no end) or by a checker (a finding). It runs on one host thread, block after block,
//! and where nothing is noticed on four, where blocks run side by side. One that survives is either a
//! gap in the tests or no mistake at all: `harmless.txt` lists those with the reason, by kernel, text and place.
//!
//! `MOE_MUTANTS=8` breaks up to 8 places of each kind in each kernel, `MOE_MUTANTS=all` every place, `MOE_MUTANTS=120s` places drawn from
//! all kernels by the run's seed, as many as that time allows; `MOE_CASES` selects kernels. `MOE_MUTANTS_BESIDE` names others, by globs as well: what
//! these have too, the same line between the same lines but for numbers, is left alone, and so is what an earlier kernel of the run has. Places are
//! the same for the same text but for numbers: of an unrolled loop, the first and last copies come first.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use moe_kernels::kernels::embedded;
use moe_kernels::registry::Kernel;
use rustix::process::Signal;
use softcuda::lower::{Environment, lower_module};
use wildmatch::WildMatch;

use super::alone::{ALONE, PROCESSOR_LIMIT, PROCESSOR_TIME};

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
    /// An acquire, release or both that orders less.
    Order,
    /// A scope of a cluster, the device or the system that is only the block's.
    Scope,
}

struct Mutant {
    kernel: String,
    kind: Kind,
    /// From 1.
    line: usize,
    /// Of `.version`.
    version_line: usize,
    old: String,
    new: String,
    place: Place,
}

impl Mutant {
    /// Lines, from 1, and what they become: its own, and the module's version where that has no such instruction. An mbarrier's relaxed
    /// forms are of PTX 8.6.
    fn rows(&self) -> impl Iterator<Item = (usize, &str)> {
        let later = self.new.contains("mbarrier.") && self.new.contains(".relaxed.");
        let version = later.then_some((self.version_line, ".version 8.6"));
        version.into_iter().chain([(self.line, self.new.as_str())])
    }
}

/// What stands around a line.
#[derive(Clone, Default)]
struct Place {
    /// The nearest label above, `ENTRY` before the first.
    label: String,
    /// The instructions before and after it, guards included.
    previous: String,
    next: String,
}

impl Place {
    /// `rule` is `in LABEL, LABEL`, `before GLOB`, `after GLOB` or `as GLOB` (what became of the line), or several with ` & ` between them.
    fn fits(&self, rule: &str, new: &str) -> bool {
        rule.split(" & ").all(|part| {
            let (word, glob) =
                part.trim().split_once(' ').unwrap_or_else(|| panic!("harmless.txt: no place: `{rule}`"));
            let fits = |glob: &str, text: &str| WildMatch::new(glob.trim()).matches(text);
            match word {
                "in" => glob.split(',').any(|glob| fits(glob, &self.label)),
                "before" => fits(glob, &self.next),
                "after" => fits(glob, &self.previous),
                "as" => fits(glob, new.trim()),
                _ => panic!("harmless.txt: a place begins with in, before, after or as, not `{word}`"),
            }
        })
    }
}

/// The place of each line that holds an instruction.
fn places(ptx: &str) -> BTreeMap<usize, Place> {
    let mut found: BTreeMap<usize, Place> = BTreeMap::new();
    let (mut label, mut previous) = ("ENTRY".to_owned(), String::new());
    let mut last = None;
    let body = ptx.lines().enumerate().skip_while(|(_, line)| !line.starts_with('{'));
    for (i, line) in body {
        let text = line.split("//").next().unwrap_or_default().trim();
        if let Some(name) = text.strip_suffix(':') {
            label = name.to_owned();
        } else if text.ends_with(';') && !text.starts_with('.') {
            if let Some(place) = last.and_then(|last| found.get_mut(&last)) {
                place.next = text.to_owned();
            }
            found.insert(i + 1, Place { label: label.clone(), previous: previous.clone(), next: String::new() });
            (last, previous) = (Some(i + 1), text.to_owned());
        }
    }
    found
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Case(String),
    Checker(String),
    Survived,
}

/// A mutant as it is in any kernel that has the same instructions: numbers are left out.
type Form = (Kind, [String; 5]);

fn form(m: &Mutant) -> Form {
    let Place { label, previous, next } = &m.place;
    (m.kind, [&m.old, &m.new, label, previous, next].map(|text| plain(text)))
}

fn plain(text: &str) -> String {
    text.replace(|c: char| c.is_ascii_digit(), "")
}

/// Every way to break a kernel but those of `known` forms.
fn mutants(kernel: &str, ptx: &str, limit: usize, known: &BTreeSet<Form>) -> Vec<Mutant> {
    let around = places(ptx);
    let version_line = 1 + ptx.lines().position(|line| line.starts_with(".version")).expect("a module has a version");
    let mut alike: BTreeMap<(Kind, String), Vec<Mutant>> = BTreeMap::new();
    let mut add = |kind, line: usize, old: &str, new: String| {
        let old = old.split("//").next().unwrap_or_default().trim().to_owned();
        let key = (kind, plain(&old));
        let place = around.get(&line).cloned().unwrap_or_default();
        let mutant = Mutant { kernel: kernel.to_owned(), kind, line, version_line, old, new, place };
        if known.is_empty() || !known.contains(&form(&mutant)) {
            alike.entry(key).or_default().push(mutant);
        }
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
        } else if starts(&["fence", "membar", "wgmma.fence"]) {
            add(Kind::Fence, i, text, without());
        } else if starts(&["cp.async.wait", "cp.async.bulk.wait", "wgmma.wait", "griddepcontrol.wait"]) {
            add(Kind::Wait, i, text, without());
        }
        let fence = starts(&["fence", "membar"]);
        // `barrier.cluster` is a name and not a scope, and its wait only ever acquires; `fence.mbarrier_init` has one scope.
        let whole_cluster = starts(&["barrier.cluster"]);
        let waits = starts(&["barrier.cluster.wait"]);
        let initialises = starts(&["fence.mbarrier_init"]);
        for order in [".acquire", ".release", ".acq_rel"] {
            // A fence that orders nothing is none, which is a mutant already.
            if instruction.contains(&format!("{order}.")) && !fence && !waits {
                add(Kind::Order, i, text, text.replacen(order, ".relaxed", 1));
                if order == ".acq_rel" {
                    add(Kind::Order, i, text, text.replacen(order, ".acquire", 1));
                    add(Kind::Order, i, text, text.replacen(order, ".release", 1));
                }
            }
        }
        let ordered = fence || [".relaxed", ".acquire", ".release", ".acq_rel"].iter().any(|o| instruction.contains(o));
        for scope in [".cluster", ".gpu", ".sys"] {
            let named = instruction.contains(&format!("{scope}.")) || instruction.ends_with(&format!("{scope};"));
            if ordered && named && !whole_cluster && !initialises {
                add(Kind::Scope, i, text, text.replacen(scope, ".cta", 1));
            }
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
    for ((kind, _), copies) in alike {
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

/// Host threads of the software device, and what is added to its seed, which says how often a thread turns from a block to another: what is
/// not ordered between blocks is in order in most runs.
const WAYS: [(u32, u64); 3] = [(1, 0), (4, 0), (1, 1)];

/// A process that takes less processor time than it may ends after this many times as much by the clock: more than a busy machine makes of it.
const BY_THE_CLOCK: u32 = 40;

/// Where processes of this run leave what they found.
fn folder() -> PathBuf {
    std::env::temp_dir().join(format!("moe-mutants-{}", std::process::id()))
}

/// Where one leaves how long it took.
fn time_file(id: usize) -> PathBuf {
    folder().join(format!("{id}.time"))
}

/// What becomes of a mutant.
fn verdict(mutant: &Mutant, id: usize, limit: Duration) -> Verdict {
    let mut verdicts = WAYS.iter().map(|&way| run(&mutant.kernel, Some(mutant), id, limit, way));
    verdicts.find(|verdict| *verdict != Verdict::Survived).unwrap_or(Verdict::Survived)
}

/// Runs a kernel's case in a process of its own, with the patch if there is one.
///
/// `limit` is processor time, which does not depend on what else the machine does; several threads, whose waiting blocks look again and again,
/// have twice of it. One that sleeps for ever takes none, and ends by the clock.
fn run(kernel: &str, patch: Option<&Mutant>, id: usize, limit: Duration, (threads, further): (u32, u64)) -> Verdict {
    let limit = if threads > 1 { 2 * limit } else { limit };
    let _ = std::fs::create_dir_all(folder());
    let path = |what: &str| folder().join(format!("{id}.{what}"));
    let (patch_file, findings_file, log) = (path("patch"), path("findings"), path("log"));
    let rows = |m: &Mutant| m.rows().map(|(line, new)| format!("{}\t{line}\t{new}\n", m.kernel)).collect::<String>();
    let text = patch.map_or(String::new(), rows);
    std::fs::write(&patch_file, text).expect("a temporary file");
    let this = std::env::current_exe().expect("this program");
    let output = std::fs::File::create(&log).expect("a temporary file");
    let mut child = Command::new(this)
        .env(ALONE, kernel)
        .env("MOE_DEVICE", "soft")
        .env("SOFTCUDA_CHECKS", "all")
        .env("SOFTCUDA_THREADS", threads.to_string())
        // The order in which warps and blocks run.
        .env("SOFTCUDA_SEED", super::support::inputs::run_seed().wrapping_add(further).to_string())
        .env(PROCESSOR_LIMIT, limit.as_secs_f64().ceil().to_string())
        .env(PROCESSOR_TIME, time_file(id))
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
            None if started.elapsed() > BY_THE_CLOCK * limit => {
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
    assert!(!last.contains("CUDA_ERROR_INVALID_PTX"), "{kernel}: no mutant but a spelling mistake: {last}");
    match (status, finding) {
        (None, _) => Verdict::Case("no end".into()),
        (Some(status), _) if killed(status) => Verdict::Case("no end".into()),
        (Some(status), _) if !status.success() => Verdict::Case(last),
        (_, Some(finding)) => Verdict::Checker(finding),
        _ => Verdict::Survived,
    }
}

/// Whether a process took more of the processor than it might.
fn killed(status: ExitStatus) -> bool {
    [Signal::XCPU, Signal::KILL].iter().any(|signal| status.signal() == Some(signal.as_raw()))
}

/// A row of `harmless.txt`: kernel globs, kind, line glob, place and reason, separated by ` | `.
struct Harmless {
    row: &'static str,
    kernels: Vec<WildMatch>,
    kind: &'static str,
    text: WildMatch,
    place: &'static str,
    reason: &'static str,
}

fn harmless_rows() -> Vec<Harmless> {
    let rows = include_str!("harmless.txt").lines().filter(|row| !row.is_empty() && !row.starts_with('#'));
    rows.map(|row| {
        let fields: Vec<&str> = row.splitn(5, " | ").map(str::trim).collect();
        let [kernel, kind, text, place, reason] = fields[..] else {
            panic!("harmless.txt: expected kernel | kind | line | place | reason, found `{row}`")
        };
        let kernels = kernel.split(',').map(|glob| WildMatch::new(glob.trim())).collect();
        Harmless { row, kernels, kind, text: WildMatch::new(text), place, reason }
    })
    .collect()
}

impl Harmless {
    fn fits(&self, m: &Mutant) -> bool {
        let kind = self.kind.eq_ignore_ascii_case(&format!("{:?}", m.kind));
        let kernel = self.kernels.iter().any(|glob| glob.matches(&m.kernel));
        kind && kernel && self.text.matches(&m.old) && m.place.fits(self.place, &m.new)
    }
}

/// Why a survivor is harmless, if `harmless.txt` knows.
fn harmless(m: &Mutant) -> Option<&'static str> {
    static ROWS: OnceLock<Vec<Harmless>> = OnceLock::new();
    ROWS.get_or_init(harmless_rows).iter().find(|row| row.fits(m)).map(|row| row.reason)
}

/// What the software device is, unless it is told otherwise.
const CAPABILITY: (u32, u32) = (9, 0);

/// The text that runs there: what begins with `//sm_90 ` are instructions.
fn text_of(kernel: &str) -> String {
    let found = embedded().iter().find(|e| e.name == kernel);
    found.expect("every kernel is embedded").ptx_for(CAPABILITY)
}

/// Mutants that are no PTX: a spelling mistake of this file. Of those that differ in numbers alone one is read.
fn misspelt(all: &[Mutant]) -> Vec<String> {
    let different: BTreeMap<_, &Mutant> = all.iter().map(|m| ((m.kind, plain(&m.old), plain(&m.new)), m)).collect();
    let mut by_kernel: BTreeMap<&str, Vec<&Mutant>> = BTreeMap::new();
    different.into_values().for_each(|m| by_kernel.entry(&m.kernel).or_default().push(m));
    let environment = Environment { compute_capability: CAPABILITY, ..Default::default() };
    let wrong = by_kernel.into_iter().flat_map(|(kernel, mutants)| {
        let ptx = text_of(kernel);
        let lines: Vec<&str> = ptx.lines().collect();
        let refused = |m: &&Mutant| {
            let mut lines = lines.clone();
            m.rows().for_each(|(line, new)| lines[line - 1] = new);
            let module = softcuda::ptx::parse(&lines.join("\n")).map_err(|error| error.to_string());
            let read = module.and_then(|m| lower_module(&m, &environment).map_err(|error| error.to_string()));
            read.err().map(|why| format!("{kernel}, line {}: `{}` as `{}`: {why}", m.line, m.old, m.new))
        };
        mutants.iter().filter_map(refused).collect::<Vec<_>>()
    });
    wrong.collect()
}

/// Rows of `harmless.txt` that fit no place in any kernel.
fn stale_rows(all: &[Mutant]) -> Vec<&'static str> {
    harmless_rows().into_iter().filter(|row| !all.iter().any(|m| row.fits(m))).map(|row| row.row).collect()
}

/// How much of the processor's time a broken kernel may take, by how much the unbroken one did.
fn patience(kernel: &str, id: usize) -> Duration {
    let healthy = run(kernel, None, id, Duration::from_secs(1200), WAYS[0]);
    assert_eq!(healthy, Verdict::Survived, "{kernel} fails unbroken");
    let taken = std::fs::read_to_string(time_file(id)).expect("a case says how long it took");
    let taken = Duration::from_secs_f64(taken.parse().expect("seconds"));
    taken * 3 + Duration::from_secs(1)
}

/// The mutants of `kernel` that are not `known`.
fn of(kernel: &Kernel, limit: usize, known: &BTreeSet<Form>) -> Vec<Mutant> {
    let name = kernel.name();
    mutants(&name, &text_of(&name), limit, known)
}

/// The forms of what is broken in the kernels that `MOE_MUTANTS_BESIDE` names.
fn known() -> BTreeSet<Form> {
    let globs = std::env::var("MOE_MUTANTS_BESIDE").unwrap_or_default();
    let globs: Vec<WildMatch> = globs.split(',').map(WildMatch::new).collect();
    let names = embedded().iter().map(|e| e.name).filter(|name| globs.iter().any(|glob| glob.matches(name)));
    names.flat_map(|name| mutants(name, &text_of(name), usize::MAX, &BTreeSet::new())).map(|m| form(&m)).collect()
}

/// Breaks the kernels and prints what became of it: `limit` places of each kind, `all`, or for a number of seconds (`120s`) places that the
/// run's seed draws.
pub fn report(kernels: &[Kernel], limit: &str) -> ExitCode {
    // Of some kernels it says nothing about rows for others.
    let all: Vec<Mutant> = kernels.iter().flat_map(|kernel| of(kernel, usize::MAX, &BTreeSet::new())).collect();
    let misspelt = misspelt(&all);
    assert!(misspelt.is_empty(), "no mutants but spelling mistakes:\n{}", misspelt.join("\n"));
    let stale = if kernels.len() == embedded().len() { stale_rows(&all) } else { Vec::new() };
    stale.iter().for_each(|row| println!("harmless.txt: fits no place in any kernel: {row}"));
    let seconds = limit.strip_suffix('s').and_then(|number| number.parse().ok()).map(Duration::from_secs);
    let limit = match limit {
        "all" => usize::MAX,
        _ if seconds.is_some() => usize::MAX,
        number => {
            number.parse().unwrap_or_else(|_| panic!("MOE_MUTANTS: expected `all`, a number or `120s`, got {number:?}"))
        }
    };
    let mut known = known();
    let queue: Box<dyn Iterator<Item = (Mutant, Option<Duration>)> + Send> = match seconds {
        None => {
            let all = kernels.iter().flat_map(|kernel| {
                let mutants = of(kernel, limit, &known);
                if !known.is_empty() {
                    known.extend(of(kernel, usize::MAX, &BTreeSet::new()).iter().map(form));
                }
                let patience = (!mutants.is_empty()).then(|| patience(&kernel.name(), usize::MAX));
                mutants.into_iter().map(move |mutant| (mutant, patience))
            });
            let all: Vec<_> = all.collect();
            println!("{} mutants of {} kernels", all.len(), kernels.len());
            Box::new(all.into_iter())
        }
        Some(time) => Box::new(sample(kernels.to_vec(), Instant::now() + time)),
    };
    let queue = Mutex::new(queue.enumerate());
    let done = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let Some((id, (mutant, patience))) = queue.lock().expect("no panic").next() else { return };
                    let patience = patience.unwrap_or_else(|| self::patience(&mutant.kernel, id));
                    let verdict = self::verdict(&mutant, id, patience);
                    if std::env::var_os("MOE_MUTANTS_VERBOSE").is_some() {
                        println!("{} {:?} {}: `{}` {verdict:?}", mutant.kernel, mutant.kind, mutant.line, mutant.old);
                    }
                    done.lock().expect("no panic").insert(id, (mutant, verdict));
                }
            });
        }
    });
    let done: Vec<(Mutant, Verdict)> = done.into_inner().expect("no panic").into_values().collect();
    let _ = std::fs::remove_dir_all(folder());
    let (caught, missed) = print_table(&done);
    let _ = std::io::stdout().flush();
    // A sample of n misses more than its share by chance: three standard deviations are allowed to it.
    let n = (caught + missed) as f64;
    let chance = if seconds.is_some() { 3.0 * (n * MISSED * (1.0 - MISSED)).sqrt() } else { 0.0 };
    let enough = missed as f64 <= n * MISSED + chance;
    if enough && stale.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The share of mistakes that may be missed.
const MISSED: f64 = 0.05;

/// Places of all kernels in the order in which the run's seed draws them, one of each kernel in turn, until `end`.
fn sample(mut kernels: Vec<Kernel>, end: Instant) -> impl Iterator<Item = (Mutant, Option<Duration>)> + Send {
    let mut rng = super::support::inputs::generator("mutants");
    rng.shuffle(&mut kernels);
    println!("mutants drawn by seed {} (MOE_SEED)", super::support::inputs::run_seed());
    kernels.into_iter().cycle().map_while(move |kernel| {
        if Instant::now() >= end {
            return None;
        }
        let mut all = of(&kernel, usize::MAX, &BTreeSet::new());
        let mutant = all.swap_remove(rng.usize(..all.len()));
        Some((mutant, None))
    })
}

/// Prints counts by kind and by kernel, and the survivors; how many were caught, and how many missed without a reason.
fn print_table(done: &[(Mutant, Verdict)]) -> (usize, usize) {
    let mut kinds: BTreeMap<Kind, [usize; 5]> = BTreeMap::new();
    let mut kernels: BTreeMap<&str, [usize; 5]> = BTreeMap::new();
    let mut total = [0; 5];
    for (m, verdict) in done {
        let column = match verdict {
            Verdict::Case(_) => 1,
            Verdict::Checker(_) => 2,
            Verdict::Survived if harmless(m).is_some() => 3,
            Verdict::Survived => 4,
        };
        for row in [kinds.entry(m.kind).or_default(), kernels.entry(&m.kernel).or_default(), &mut total] {
            row[0] += 1;
            row[column] += 1;
        }
    }
    println!("\n{:<28}{:>9}{:>9}{:>9}{:>10}{:>9}", "", "mutants", "by case", "checker", "harmless", "missed");
    kernels.iter().for_each(|(kernel, row)| print_row(kernel, row));
    kinds.iter().for_each(|(kind, row)| print_row(&format!("{kind:?}").to_lowercase(), row));
    print_row("all", &total);
    let (caught, missed) = (total[1] + total[2], total[4]);
    let share = |of: usize| 100.0 * caught as f64 / of.max(1) as f64;
    println!("caught: {:.1} % of all, {:.1} % of those that are not harmless", share(total[0]), share(caught + missed));
    for (survivor, title) in [(true, "harmless"), (false, "missed")] {
        println!("\n{title}:");
        for (m, verdict) in done {
            let reason = harmless(m);
            if *verdict == Verdict::Survived && reason.is_some() == survivor {
                let kind = format!("{:?}", m.kind).to_lowercase();
                let Place { label, previous, next } = &m.place;
                println!(
                    "  {} {kind}, line {}: `{}` as `{}`, in {label}, after `{previous}`, before `{next}` {}",
                    m.kernel,
                    m.line,
                    m.old,
                    m.new.trim(),
                    reason.unwrap_or_default()
                );
            }
        }
    }
    (caught, missed)
}

fn print_row(name: &str, row: &[usize; 5]) {
    let [all, case, checker, harmless, missed] = row;
    println!("{name:<28}{all:>9}{case:>9}{checker:>9}{harmless:>10}{missed:>9}");
}
