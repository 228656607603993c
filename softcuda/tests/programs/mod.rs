//! Programs of `tests/fail` and `tests/pass`: a module of one kernel, whose comments say how to launch it and what it should be
//! found to do.
//!
//! ```text
//! // launch: grid 2, block 64, shared 256     (what is left out is 1, 32, 0; cluster 2; sm 90)
//! // buffer: 1024                              (a parameter, in order: bytes, written; `fresh` for not written)
//! // expect: race: read ... ADDR ...; at A; against B
//! st.shared.u32 [%r1], %r2; // <B>
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use softcuda::check::{Checks, Finding, Selection};
use softcuda::exec::{Config, Launch, launch};
use softcuda::lower::{Environment, lower_module};
use softcuda::memory::Memory;

pub fn memory() -> &'static Memory {
    static MEMORY: LazyLock<Memory> = LazyLock::new(|| Memory::new(1 << 30).unwrap());
    &MEMORY
}

/// All programs below a folder of the tests.
pub fn all(folder: &str) -> Vec<PathBuf> {
    fn collect(dir: &Path, to: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, to);
            } else if path.extension().is_some_and(|e| e == "ptx") {
                to.push(path);
            }
        }
    }
    let mut list = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder), &mut list);
    list.sort();
    list
}

/// How to launch a program, and what to expect.
pub struct Program {
    pub name: String,
    text: String,
    grid: u32,
    block: u32,
    shared: u32,
    cluster: u32,
    capability: (u32, u32),
    cooperative: bool,
    /// Bytes of each parameter's buffer, and whether it counts as written.
    buffers: Vec<(u64, bool)>,
    pub expected: BTreeSet<String>,
}

impl Program {
    pub fn read(path: &Path) -> Program {
        let text = std::fs::read_to_string(path).unwrap();
        let name = path.components().rev().take(2).map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>();
        let mut p = Program {
            name: format!("{}/{}", name[1], name[0]),
            text: String::new(),
            grid: 1,
            block: 32,
            shared: 0,
            cluster: 1,
            capability: (8, 0),
            cooperative: false,
            buffers: Vec::new(),
            expected: BTreeSet::new(),
        };
        for line in text.lines() {
            if let Some(list) = line.strip_prefix("// launch: ") {
                for item in list.split(", ") {
                    let (key, value) = item.split_once(' ').unwrap_or((item, "1"));
                    let n: u32 = value.parse().unwrap_or_else(|_| panic!("{}: {item}", p.name));
                    match key {
                        "grid" => p.grid = n,
                        "block" => p.block = n,
                        "shared" => p.shared = n,
                        "cluster" => p.cluster = n,
                        "sm" => p.capability = (n / 10, n % 10),
                        "cooperative" => p.cooperative = true,
                        _ => panic!("{}: {item}", p.name),
                    }
                }
            } else if let Some(what) = line.strip_prefix("// buffer: ") {
                let (bytes, kind) = what.split_once(' ').unwrap_or((what, "written"));
                p.buffers.push((bytes.parse().unwrap(), kind != "fresh"));
            } else if let Some(what) = line.strip_prefix("// expect: ") {
                p.expected.insert(what.to_owned());
            }
        }
        p.text = text;
        p
    }

    /// The mark on a line, or its number.
    fn mark(&self, line: u32) -> String {
        let text = self.text.lines().nth((line as usize).wrapping_sub(1)).unwrap_or("");
        match text.rsplit_once("// <").and_then(|(_, mark)| mark.split_once('>')) {
            Some((mark, _)) => mark.to_owned(),
            None => format!("line {line}"),
        }
    }

    /// A finding as `expect` spells it.
    fn spell(&self, f: &Finding) -> String {
        let mut message = f.message.clone();
        // Addresses, and numbers of allocations, differ from run to run.
        let mut from = 0;
        while let Some(at) = message[from..].find("0x").map(|i| from + i) {
            let digits = message[at + 2..].chars().take_while(char::is_ascii_hexdigit).count();
            if digits > 8 || message[..at].ends_with("at ") {
                message.replace_range(at..at + 2 + digits, "ADDR");
            }
            from = at + 2;
        }
        if let Some((before, after)) = message.split_once("allocation #") {
            message = format!("{before}allocation{}", after.trim_start_matches(|c: char| c.is_ascii_digit()));
        }
        // Lines are named by their marks.
        while let Some(at) = message.find("line ") {
            let digits = message[at + 5..].chars().take_while(char::is_ascii_digit).count();
            let mark = self.mark(message[at + 5..at + 5 + digits].parse().unwrap_or(0));
            let text = message[at + 5 + digits..].strip_prefix(" `").and_then(|t| t.find('`'));
            let end = at + 5 + digits + text.map_or(0, |n| n + 3);
            message.replace_range(at..end, &mark.replace("line ", "#"));
        }
        let place = |p: &Option<softcuda::check::Place>, word: &str| {
            p.as_ref().map_or(String::new(), |p| format!("; {word} {}", self.mark(p.line)))
        };
        format!("{}: {message}{}{}", f.checker, place(&f.place, "at"), place(&f.other, "against"))
    }

    /// What all checkers find.
    pub fn run(&self, seed: u64) -> BTreeSet<String> {
        let module = softcuda::ptx::parse(&self.text).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let range = memory().range();
        let checks = Checks::new(Selection::ALL, range).unwrap();
        let upload = |bytes: u64, written: bool| {
            let address = memory().alloc(bytes.max(1)).unwrap();
            // SAFETY: the allocation has this many bytes.
            unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes as usize) };
            checks.allocated(address, bytes.max(1), written);
            address
        };
        let symbols: Vec<_> =
            module.variables.iter().map(|v| (v.name.clone(), upload(v.bytes().unwrap(), true))).collect();
        let buffers: Vec<u64> = self.buffers.iter().map(|&(bytes, written)| upload(bytes, written)).collect();
        let environment =
            Environment { symbols: symbols.iter().cloned().collect(), compute_capability: self.capability };
        let program = lower_module(&module, &environment).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        let params: Vec<u8> = buffers.iter().flat_map(|b| b.to_le_bytes()).collect();
        let config = Config {
            seed,
            threads: 1 + seed as usize % 3,
            compute_capability: self.capability,
            watches: checks.watches(),
            timeout: Some(Duration::from_secs(20)),
            ..Config::default()
        };
        let result = launch(&Launch {
            kernel: &program.kernels[0],
            grid: [self.grid, 1, 1],
            block: [self.block, 1, 1],
            cluster: [self.cluster, 1, 1],
            dynamic_shared_bytes: self.shared,
            params: &params,
            cooperative: self.cooperative,
            memory: memory(),
            config: &config,
        });
        let found: BTreeSet<String> = checks.findings().all().iter().map(|f| self.spell(f)).collect();
        if let Err(fault) = result {
            assert!(!found.is_empty(), "{}, seed {seed}: a fault and no finding: {fault}", self.name);
        }
        for address in buffers.iter().chain(symbols.iter().map(|(_, a)| a)) {
            memory().free(*address).unwrap();
        }
        found
    }
}
