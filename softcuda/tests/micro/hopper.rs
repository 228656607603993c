//! Runs small programs for sm_90a, with clusters.

use softcuda::exec::{Config, Counters, Fault, Launch, launch};
use softcuda::lower::{Environment, LowerError, Program, lower_module};

use crate::device::{Buffer, memory};

/// A launch of a kernel with 64-bit parameters `p0`, `p1`, ...
#[derive(Clone)]
pub struct Hopper {
    pub grid: [u32; 3],
    pub block: u32,
    pub cluster: [u32; 3],
    pub shared: u32,
    /// Parameters of other types, after the 64-bit ones: declaration and bytes.
    pub extra: Vec<(String, Vec<u8>)>,
    /// Directives between parameters and body.
    pub directives: String,
    pub config: Config,
}

impl Default for Hopper {
    fn default() -> Self {
        let config = Config {
            threads: 1,
            compute_capability: (9, 0),
            timeout: Some(std::time::Duration::from_secs(20)),
            ..Config::default()
        };
        let (grid, cluster) = ([1; 3], [1; 3]);
        Self { grid, block: 32, cluster, shared: 0, extra: Vec::new(), directives: String::new(), config }
    }
}

/// Declares registers; `%out` is the thread's word of the first parameter, `%rank` the block's rank in its cluster, `%t` the
/// thread's index in the grid, `%thread` in the block.
const PROLOGUE: &str = "
.reg .pred %p, %q, %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<32>, %t, %thread, %rank, %size;
.reg .f32 %f<8>;
.reg .b64 %rd<32>, %out;
ld.param.u64 %out, [p0];
mov.u32 %thread, %tid.x;
mov.u32 %r0, %ctaid.x;
mov.u32 %r1, %ntid.x;
mad.lo.u32 %t, %r0, %r1, %thread;
mad.wide.u32 %out, %t, 4, %out;
mov.u32 %rank, %cluster_ctarank;
mov.u32 %size, %cluster_nctarank;
";

impl Hopper {
    /// Blocks of `block` threads in one row, `cluster` of them together.
    pub fn row(blocks: u32, block: u32, cluster: u32) -> Self {
        Self { grid: [blocks, 1, 1], block, cluster: [cluster, 1, 1], ..Self::default() }
    }

    pub fn seed(&self, seed: u64) -> Self {
        let mut run = self.clone();
        run.config.seed = seed;
        run
    }

    pub fn text(&self, params: usize, body: &str) -> String {
        let params = (0..params).map(|i| format!(".param .u64 p{i}"));
        let params: Vec<_> = params.chain(self.extra.iter().map(|(p, _)| p.clone())).collect();
        let directives = &self.directives;
        format!(
            ".version 8.8\n.target sm_90a\n.address_size 64\n.visible .entry k({}) {directives}\n{{\n{body}\n}}\n",
            params.join(", ")
        )
    }

    pub fn run(&self, body: &str, params: &[u64]) -> Result<(), Fault> {
        self.counters(body, params).map(drop)
    }

    /// As [`Hopper::run`], with the counters that the configuration asks for.
    pub fn counters(&self, body: &str, params: &[u64]) -> Result<Counters, Fault> {
        let text = self.text(params.len(), body);
        // For `ptxas -arch=sm_90a` over all that the tests run.
        if let Ok(folder) = std::env::var("HOPPER_PTX") {
            let name = text.bytes().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
            std::fs::write(format!("{folder}/{name:x}.ptx"), &text).unwrap();
        }
        let program = lower(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let kernel = &program.kernels[0];
        let mut bytes: Vec<u8> = params.iter().flat_map(|p| p.to_le_bytes()).collect();
        for ((_, value), place) in self.extra.iter().zip(&kernel.params[params.len()..]) {
            bytes.resize(place.offset as usize, 0);
            bytes.extend(value);
        }
        launch(&Launch {
            kernel,
            grid: self.grid,
            block: [self.block, 1, 1],
            cluster: self.cluster,
            dynamic_shared_bytes: self.shared,
            params: &bytes,
            cooperative: false,
            memory: memory(),
            config: &self.config,
        })
    }

    pub fn threads(&self) -> usize {
        (self.grid.iter().product::<u32>() * self.block) as usize
    }

    /// Runs a body that stores one u32 per thread at `[%out]`; further parameters follow the output.
    pub fn per_thread(&self, body: &str, params: &[u64]) -> Result<Vec<u32>, Fault> {
        let out = Buffer::new(&vec![0xdead_beefu32; self.threads()]);
        let params: Vec<u64> = [out.address].into_iter().chain(params.iter().copied()).collect();
        self.run(&format!("{PROLOGUE}{body}\nret;"), &params)?;
        Ok(out.read())
    }

    /// As [`Hopper::per_thread`], under many seeds, all of which must give the same.
    pub fn under_seeds(&self, body: &str, params: &[u64], want: &[u32]) {
        for seed in 0..SEEDS {
            match self.seed(seed).per_thread(body, params) {
                Ok(got) => assert_eq!(got, want, "seed {seed}"),
                Err(fault) => panic!("seed {seed}: {fault}"),
            }
        }
    }

    /// The fault that a body meets under every seed.
    pub fn fault(&self, body: &str, params: &[u64]) -> Fault {
        self.per_thread(body, params).expect_err("a fault")
    }
}

pub const SEEDS: u64 = 20;

pub fn lower(text: &str) -> Result<Program, LowerError> {
    let module = softcuda::ptx::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    lower_module(&module, &Environment { compute_capability: (9, 0), ..Environment::default() })
}

/// The error of a body that must not be lowered.
pub fn refused(body: &str) -> String {
    match lower(&Hopper::default().text(1, &format!("{PROLOGUE}{body}\nret;"))) {
        Ok(_) => panic!("lowered: {body}"),
        Err(error) => error.to_string(),
    }
}
