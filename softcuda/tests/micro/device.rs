//! Runs small PTX programs.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex};

use softcuda::exec::{Config, Counters, Fault, Launch, launch};
use softcuda::lower::{Environment, LowerError, Program, initial_bytes, lower_module};
use softcuda::memory::Memory;
use softcuda::ptx::ast::Space;

use crate::real;

pub fn memory() -> &'static Memory {
    static MEMORY: LazyLock<Memory> = LazyLock::new(|| Memory::new(8 << 30).unwrap());
    &MEMORY
}

/// Bytes of every live buffer by its address.
static BUFFERS: Mutex<BTreeMap<u64, usize>> = Mutex::new(BTreeMap::new());

/// The buffers that parameters name, by the parameter's index, and what they hold.
fn contents(params: &[u64]) -> Vec<(usize, Vec<u8>)> {
    let buffers = BUFFERS.lock().unwrap();
    let named = params.iter().enumerate().filter_map(|(i, p)| buffers.get(p).map(|&bytes| (i, *p, bytes)));
    // SAFETY: live buffers of this many bytes.
    named.map(|(i, p, bytes)| (i, unsafe { std::slice::from_raw_parts(p as *const u8, bytes) }.to_vec())).collect()
}

/// A device buffer, freed at the end.
pub struct Buffer {
    pub address: u64,
    bytes: usize,
}

impl Buffer {
    pub fn new<T: Copy>(values: &[T]) -> Self {
        let bytes = std::mem::size_of_val(values);
        let address = memory().alloc(bytes as u64).unwrap();
        // SAFETY: the allocation has this many bytes.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), address as *mut u8, bytes) };
        BUFFERS.lock().unwrap().insert(address, bytes);
        Self { address, bytes }
    }

    pub fn read<T: Copy>(&self) -> Vec<T> {
        // SAFETY: allocations are aligned, live until `self` is dropped, and hold plain numbers.
        unsafe { std::slice::from_raw_parts(self.address as *const T, self.bytes / size_of::<T>()).to_vec() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        BUFFERS.lock().unwrap().remove(&self.address);
        memory().free(self.address).unwrap();
    }
}

/// Assembles a program with `ptxas`, where the variable `PTXAS` names one: what a test runs must be PTX.
fn assemble(text: &str) {
    static PTXAS: LazyLock<Option<OsString>> =
        LazyLock::new(|| std::env::var_os("PTXAS").filter(|path| !path.is_empty() && path != "none"));
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let Some(ptxas) = &*PTXAS else { return };
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let file = std::env::temp_dir().join(format!("softcuda-micro-{}-{number}.ptx", std::process::id()));
    std::fs::write(&file, text).unwrap();
    let target = text.split_once(".target ").and_then(|(_, rest)| rest.split_whitespace().next()).unwrap();
    let mut command = std::process::Command::new(ptxas);
    let run = command.args([&format!("-arch={target}"), "-O0", "-o", "/dev/null"]).arg(&file).output().unwrap();
    assert!(run.status.success(), "{}\n{text}", String::from_utf8_lossy(&run.stderr));
    std::fs::remove_file(&file).unwrap();
}

pub fn lower(text: &str) -> Result<Program, LowerError> {
    let module = softcuda::ptx::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let symbols: HashMap<String, u64> =
        module.variables.iter().map(|v| (v.name.clone(), memory().alloc(v.bytes().unwrap().max(1)).unwrap())).collect();
    for v in module.variables.iter().filter(|v| v.space != Space::Shared) {
        let bytes = initial_bytes(&module, v, &symbols).unwrap_or_else(|e| panic!("`{}` {e}\n{text}", v.name));
        // SAFETY: the allocation has this many bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), symbols[&v.name] as *mut u8, bytes.len()) };
    }
    lower_module(&module, &Environment { symbols, compute_capability: (9, 0) })
}

/// The module of one kernel `k` with 64-bit parameters `p0`, `p1`, ...; `outside` stands before it.
pub fn module(params: usize, outside: &str, body: &str) -> String {
    let params: Vec<_> = (0..params).map(|i| format!(".param .u64 p{i}")).collect();
    format!(
        ".version 8.6\n.target sm_90\n.address_size 64\n{outside}\n.visible .entry k({})\n{{\n{body}\n}}\n",
        params.join(", ")
    )
}

/// A launch of [`module`].
#[derive(Clone)]
pub struct Run {
    pub grid: u32,
    pub block: u32,
    pub shared: u32,
    pub outside: String,
    pub cooperative: bool,
    /// What the program reads is the software device's own choice: other devices are not asked.
    pub own: bool,
    pub config: Config,
}

impl Default for Run {
    fn default() -> Self {
        let config = Config { threads: 1, timeout: Some(std::time::Duration::from_secs(20)), ..Config::default() };
        Self { grid: 1, block: 32, shared: 0, outside: String::new(), cooperative: false, own: false, config }
    }
}

impl Run {
    pub fn run(&self, body: &str, params: &[u64]) -> Result<Counters, Fault> {
        let text = module(params.len(), &self.outside, body);
        assemble(&text);
        let program = lower(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let bytes: Vec<u8> = params.iter().flat_map(|p| p.to_le_bytes()).collect();
        let before = if real::present() { contents(params) } else { Vec::new() };
        let counters = launch(&Launch {
            kernel: &program.kernels[0],
            grid: [self.grid, 1, 1],
            block: [self.block, 1, 1],
            cluster: [1, 1, 1],
            dynamic_shared_bytes: self.shared,
            params: &bytes,
            cooperative: self.cooperative,
            memory: memory(),
            config: &self.config,
        })?;
        if real::present() {
            let after: Vec<_> = contents(params).into_iter().map(|(_, bytes)| bytes).collect();
            real::compare(&text, self, params, &before, &after);
        }
        Ok(counters)
    }

    /// Runs a body that stores one u32 per thread at `[%out]`; `%t` is the thread's index in the grid, `%lane` its lane.
    pub fn per_thread(&self, body: &str) -> Vec<u32> {
        self.try_per_thread(body).unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn try_per_thread(&self, body: &str) -> Result<Vec<u32>, Fault> {
        let out = Buffer::new(&vec![0xdead_beefu32; (self.grid * self.block) as usize]);
        self.run(&format!("{PROLOGUE}{body}\nret;"), &[out.address])?;
        Ok(out.read())
    }
}

/// Declares registers and computes `%out`, `%t`, `%thread` and `%lane`.
pub const PROLOGUE: &str = "
.reg .pred %p, %q, %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<16>, %t, %thread, %lane;
.reg .f32 %f<8>;
.reg .b64 %rd<16>, %out;
ld.param.u64 %out, [p0];
mov.u32 %thread, %tid.x;
mov.u32 %r0, %ctaid.x;
mov.u32 %r1, %ntid.x;
mad.lo.u32 %t, %r0, %r1, %thread;
mad.wide.u32 %out, %t, 4, %out;
mov.u32 %lane, %laneid;
";

/// The register type letter and load type of a value: `b16`, `b32`, `f32`, `b64`, `f64` or `pred`.
fn storage(ty: &str) -> &str {
    match ty {
        "pred" => "b32",
        other => other,
    }
}

/// Runs `instruction` (on registers `%a`, `%b`, `%c`, `%e` of the given types, into `%d`) once for each row of inputs and
/// returns the results, zero-extended.
pub fn evaluate(instruction: &str, d: &str, sources: &[&str], rows: &[Vec<u64>]) -> Vec<u64> {
    let names = ["%a", "%b", "%c", "%e"];
    let threads = rows.len().div_ceil(32) * 32;
    let mut inputs = vec![0u64; threads * sources.len().max(1)];
    for (i, row) in rows.iter().enumerate() {
        inputs[i * sources.len()..][..sources.len()].copy_from_slice(row);
    }
    let mut body = String::from(
        ".reg .b64 %in, %o, %z; .reg .b32 %t, %x, %y; .reg .b64 %dd;
         ld.param.u64 %in, [p0]; ld.param.u64 %o, [p1];
         mov.u32 %t, %tid.x; mov.u32 %x, %ctaid.x; mad.lo.u32 %t, %x, 32, %t;",
    );
    body.push_str(&format!(
        "mul.wide.u32 %z, %t, {}; add.s64 %in, %in, %z; mul.wide.u32 %z, %t, 8; add.s64 %o, %o, %z;\n",
        8 * sources.len()
    ));
    for (i, (name, ty)) in names.iter().zip(sources).enumerate() {
        body.push_str(&format!(".reg .{ty} {name};\n"));
        if *ty == "pred" {
            body.push_str(&format!("ld.global.u32 %y, [%in+{}]; setp.ne.u32 {name}, %y, 0;\n", 8 * i));
        } else {
            body.push_str(&format!("ld.global.{} {name}, [%in+{}];\n", storage(ty), 8 * i));
        }
    }
    body.push_str(&format!(".reg .{d} %d;\nmov.b64 %dd, 0; st.global.b64 [%o], %dd;\n{instruction}\n"));
    if d == "pred" {
        body.push_str("selp.u32 %y, 1, 0, %d; st.global.u32 [%o], %y;\n");
    } else {
        body.push_str(&format!("st.global.{} [%o], %d;\n", storage(d)));
    }
    body.push_str("ret;");
    let (input, output) = (Buffer::new(&inputs), Buffer::new(&vec![0u64; threads]));
    let run = Run { grid: (threads / 32) as u32, ..Run::default() };
    run.run(&body, &[input.address, output.address]).unwrap_or_else(|e| panic!("{instruction}: {e}"));
    let mut results: Vec<u64> = output.read();
    results.truncate(rows.len());
    results
}

/// Compares with explicit rows of inputs and result.
pub fn table(instruction: &str, d: &str, sources: &[&str], rows: &[(&[u64], u64)]) {
    let inputs: Vec<Vec<u64>> = rows.iter().map(|(i, _)| i.to_vec()).collect();
    let got = evaluate(instruction, d, sources, &inputs);
    for ((row, want), got) in rows.iter().zip(got) {
        assert_eq!(got, *want, "{instruction} of {row:#x?}: got {got:#x}, expected {want:#x}");
    }
}

/// Compares with a definition over all combinations of the values given for each operand.
pub fn sweep(instruction: &str, d: &str, sources: &[&str], values: &[&[u64]], want: impl Fn(&[u64]) -> u64) {
    let mut rows: Vec<Vec<u64>> = vec![vec![]];
    for column in values {
        rows = rows.iter().flat_map(|r| column.iter().map(move |v| [r.as_slice(), &[*v]].concat())).collect();
    }
    let got = evaluate(instruction, d, sources, &rows);
    for (row, got) in rows.iter().zip(got) {
        let want = want(row);
        assert_eq!(got, want, "{instruction} of {row:#x?}: got {got:#x}, expected {want:#x}");
    }
}

pub fn f(x: f32) -> u64 {
    x.to_bits().into()
}

pub fn d(x: f64) -> u64 {
    x.to_bits()
}
