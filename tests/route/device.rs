//! Launches of one kernel on softcuda's executor.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use bytemuck::Pod;
use moe_kernels::kernels::embedded;
use moe_kernels::registry;
use softcuda::exec::{self, Config, Counters, Fault, Launch};
use softcuda::lower::{self, Environment};
use softcuda::memory::{Memory, POISON};

/// Bytes after each output that must stay untouched.
const GUARD: usize = 64;

static MEMORY: LazyLock<Memory> = LazyLock::new(|| Memory::new(1 << 40).expect("address space"));

/// An input in device memory. It ends where its elements do, so that a read past them faults.
pub struct Input {
    address: u64,
    copy: Vec<u8>,
}

impl Input {
    pub fn new<T: Pod>(values: &[T]) -> Input {
        let copy = bytemuck::cast_slice(values).to_vec();
        let address = MEMORY.alloc(copy.len().max(1) as u64).expect("memory");
        write(address, &copy);
        Input { address, copy }
    }

    fn assert_unchanged(&self) {
        assert!(read(self.address, self.copy.len()) == self.copy, "an input was written to");
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        MEMORY.free(self.address).expect("a live allocation");
    }
}

/// An output in device memory, poison until a kernel writes it, and poison after its end.
pub struct Output {
    address: u64,
    offset: usize,
    bytes: usize,
}

impl Output {
    pub fn new<T: Pod>(len: usize) -> Output {
        Output::at_offset::<T>(len, 0)
    }

    /// Begins `offset` bytes after an aligned address.
    pub fn at_offset<T: Pod>(len: usize, offset: usize) -> Output {
        let bytes = len * size_of::<T>();
        Output { address: MEMORY.alloc((offset + bytes + GUARD) as u64).expect("memory"), offset, bytes }
    }

    /// The elements, once the guards are seen to be whole.
    pub fn read<T: Pod>(&self) -> Vec<T> {
        let all = read(self.address, self.offset + self.bytes + GUARD);
        let (before, rest) = all.split_at(self.offset);
        let (values, after) = rest.split_at(self.bytes);
        // All bounds are even, so that each part begins with a whole poison.
        let untouched = |part: &[u8]| part.chunks(2).all(|pair| pair == POISON.to_ne_bytes());
        assert!(untouched(before), "written before the start");
        assert!(untouched(after), "written past the end");
        collect(values)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        MEMORY.free(self.address).expect("a live allocation");
    }
}

/// Zero-initialised or sparse memory that a kernel may read and write.
pub struct Scratch {
    pub address: u64,
}

impl Scratch {
    pub fn new(bytes: u64) -> Scratch {
        Scratch { address: MEMORY.alloc(bytes).expect("memory") }
    }

    pub fn write<T: Pod>(&self, byte_offset: u64, values: &[T]) {
        write(self.address + byte_offset, bytemuck::cast_slice(values));
    }

    pub fn read<T: Pod>(&self, byte_offset: u64, len: usize) -> Vec<T> {
        collect(&read(self.address + byte_offset, len * size_of::<T>()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        MEMORY.free(self.address).expect("a live allocation");
    }
}

fn write(address: u64, bytes: &[u8]) {
    MEMORY.check(address, bytes.len() as u64).expect("a live allocation");
    // SAFETY: the range was just checked to be allocated, and a device address is the host address of the same byte.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
}

fn read(address: u64, len: usize) -> Vec<u8> {
    MEMORY.check(address, len as u64).expect("a live allocation");
    // SAFETY: as in `write`; no launch is running on this allocation.
    unsafe { std::slice::from_raw_parts(address as *const u8, len) }.to_vec()
}

fn collect<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// One kernel parameter.
pub enum Arg<'a> {
    In(&'a Input),
    Out(&'a Output),
    Scratch(&'a Scratch),
    Null,
    U32(u32),
    F32(f32),
}

/// An optional input.
pub fn optional(input: &Option<Input>) -> Arg<'_> {
    input.as_ref().map_or(Arg::Null, Arg::In)
}

fn lowered(kernel: &registry::Kernel) -> Arc<lower::Kernel> {
    static KERNELS: LazyLock<Mutex<HashMap<String, Arc<lower::Kernel>>>> = LazyLock::new(Mutex::default);
    let name = kernel.name();
    if let Some(found) = KERNELS.lock().unwrap().get(&name) {
        return found.clone();
    }
    let kernel = lower(&name, text(&name));
    KERNELS.lock().unwrap().insert(name, kernel.clone());
    kernel
}

/// A kernel's PTX, inflated once.
pub fn text(name: &str) -> &'static str {
    static TEXTS: LazyLock<Mutex<HashMap<String, &'static str>>> = LazyLock::new(Mutex::default);
    TEXTS.lock().unwrap().entry(name.into()).or_insert_with(|| {
        let entry = embedded().iter().find(|entry| entry.name == name).expect("a registered kernel");
        entry.ptx().leak()
    })
}

fn lower(name: &str, text: &str) -> Arc<lower::Kernel> {
    let module = softcuda::ptx::parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    let environment = Environment { symbols: HashMap::new(), compute_capability: (8, 0) };
    let program = lower::lower_module(&module, &environment).unwrap_or_else(|error| panic!("{name}: {error}"));
    program.kernel(name).expect("the entry is named as the variant").clone()
}

/// Launches and waits; cooperative where there are several blocks. The seed orders warps.
pub fn launch(kernel: registry::Kernel, grid: [u32; 3], seed: u64, args: &[Arg]) -> Counters {
    launch_as(kernel, grid, Config { seed, ..Config::default() }, args)
}

/// The same on a device as `config` says.
pub fn launch_as(kernel: registry::Kernel, grid: [u32; 3], config: Config, args: &[Arg]) -> Counters {
    let config = Config { count: true, ..config };
    let counters =
        run(&lowered(&kernel), kernel, grid, grid[0] > 1, &config, args).unwrap_or_else(|fault| panic!("{fault}"));
    for arg in args {
        if let Arg::In(input) = arg {
            input.assert_unchanged();
        }
    }
    counters
}

/// Launches the kernel with `from` in its text replaced by `to`, so that a block has to end before the next one begins.
pub fn launch_one_by_one(
    kernel: registry::Kernel,
    [from, to]: [&str; 2],
    grid: [u32; 3],
    args: &[Arg],
) -> Result<Counters, Box<Fault>> {
    let name = kernel.name();
    let text = text(&name);
    assert!(text.contains(from), "{name} has no {from:?}");
    let config = Config { threads: 1, max_resident_blocks: 1, ..Config::default() };
    run(&lower(&name, &text.replace(from, to)), kernel, grid, false, &config, args)
}

fn run(
    lowered: &lower::Kernel,
    kernel: registry::Kernel,
    grid: [u32; 3],
    cooperative: bool,
    config: &Config,
    args: &[Arg],
) -> Result<Counters, Box<Fault>> {
    assert_eq!(lowered.params.len(), args.len(), "{}: parameters", kernel.name());
    let mut params = vec![0; lowered.param_bytes as usize];
    for (layout, arg) in lowered.params.iter().zip(args) {
        let bytes = match arg {
            Arg::In(input) => input.address.to_le_bytes().to_vec(),
            Arg::Out(output) => (output.address + output.offset as u64).to_le_bytes().to_vec(),
            Arg::Scratch(scratch) => scratch.address.to_le_bytes().to_vec(),
            Arg::Null => 0u64.to_le_bytes().to_vec(),
            Arg::U32(value) => value.to_le_bytes().to_vec(),
            Arg::F32(value) => value.to_le_bytes().to_vec(),
        };
        assert_eq!(bytes.len(), layout.size as usize, "{}: size of a parameter", kernel.name());
        params[layout.offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    exec::launch(&Launch {
        kernel: lowered,
        grid,
        block: [kernel.threads(), 1, 1],
        cluster: [1, 1, 1],
        dynamic_shared_bytes: kernel.shared_bytes(),
        params: &params,
        cooperative,
        memory: &*MEMORY,
        config,
    })
    .map_err(Box::new)
}
