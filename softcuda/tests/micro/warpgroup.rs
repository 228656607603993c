//! Runs `wgmma` programs: one or more warpgroups, an image of shared memory, accumulators in and out.

use std::sync::Arc;

use softcuda::exec::observe::Watch;
use softcuda::exec::{Config, Fault, Isa, Launch, launch};
use softcuda::lower::{Environment, LowerError, Program, lower_module};

use crate::device::{Buffer, memory};

/// A program over `%d<i>` (accumulators), `%a<i>` (words of A in registers), `%da` and `%db` (descriptors), `%scale`.
#[derive(Clone)]
pub struct Program64 {
    pub threads: u32,
    /// Bytes of shared memory at the start, from address 0.
    pub image: Vec<u8>,
    /// Registers of accumulators per thread; their content is `accumulators[thread][register]`.
    pub registers: usize,
    pub accumulators: Vec<u32>,
    /// `[thread][4]`
    pub a_words: Vec<u32>,
    pub a: u64,
    pub b: u64,
    pub scale: bool,
    pub seed: u64,
    pub isa: Option<Isa>,
    pub body: String,
}

impl Program64 {
    pub fn text(&self) -> String {
        let n = self.registers;
        let lines = |f: &dyn Fn(usize) -> String, count: usize| (0..count).map(f).collect::<String>();
        let load = lines(&|i| format!("ld.global.b32 %d{i}, [%c+{}];\n", 4 * i), n);
        let words = lines(&|i| format!("ld.global.b32 %a{i}, [%w+{}];\n", 4 * i), 4);
        let store = lines(&|i| format!("st.global.b32 [%o+{}], %d{i};\n", 4 * i), n);
        format!(
            ".version 8.4\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];
.visible .entry k(.param .u64 image, .param .u64 accumulators, .param .u64 out, .param .u64 words, .param .u64 da, .param .u64 db,
  .param .u32 bytes, .param .u32 scale)
{{
.reg .pred %p, %q, %scale; .reg .b32 %d<{n}>, %a<4>, %t, %i, %bytes, %s, %v, %warp, %r<8>; .reg .b64 %m, %c, %o, %w, %da, %db, %x;
ld.param.u64 %m, [image]; ld.param.u64 %c, [accumulators]; ld.param.u64 %o, [out]; ld.param.u64 %w, [words];
ld.param.u64 %da, [da]; ld.param.u64 %db, [db]; ld.param.u32 %bytes, [bytes]; ld.param.u32 %s, [scale]; setp.ne.u32 %scale, %s, 0;
mov.u32 %t, %tid.x; shr.u32 %warp, %t, 5; mul.lo.u32 %i, %t, 4; mov.u32 %s, smem;
FILL: setp.ge.u32 %p, %i, %bytes; @%p bra FILLED; cvt.u64.u32 %x, %i; add.s64 %x, %m, %x; ld.global.b32 %v, [%x];
add.u32 %r0, %s, %i; st.shared.b32 [%r0], %v; add.u32 %i, %i, {step}; bra FILL;
FILLED: bar.sync 0;
mad.wide.u32 %c, %t, {row}, %c; mad.wide.u32 %o, %t, {row}, %o; mad.wide.u32 %w, %t, 16, %w;
{load}{words}
{body}
{store}
ret;
}}
",
            step = 4 * self.threads,
            row = 4 * n,
            body = self.body,
        )
    }

    /// The accumulators at the end, `[thread][register]`.
    pub fn run(&self) -> Result<Vec<u32>, Fault> {
        self.run_text(&self.text())
    }

    /// As [`Program64::run`], with other text of the same parameters.
    pub fn run_text(&self, text: &str) -> Result<Vec<u32>, Fault> {
        self.watched(text, Vec::new())
    }

    pub fn watched(&self, text: &str, watches: Vec<Arc<dyn Watch>>) -> Result<Vec<u32>, Fault> {
        self.configured(text, |config| config.watches = watches)
    }

    /// As [`Program64::run_text`], with another configuration.
    pub fn configured(&self, text: &str, change: impl FnOnce(&mut Config)) -> Result<Vec<u32>, Fault> {
        let program = lower(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let mut image = self.image.clone();
        image.resize(image.len().next_multiple_of(4).max(16), 0);
        let threads = self.threads as usize;
        let pad = |words: &[u32], n: usize| {
            let mut words = words.to_vec();
            words.resize(n, 0);
            words
        };
        let (m, c) = (Buffer::new(&image), Buffer::new(&pad(&self.accumulators, threads * self.registers)));
        let o = Buffer::new(&vec![0xdead_beefu32; threads * self.registers]);
        let w = Buffer::new(&pad(&self.a_words, threads * 4));
        let mut params = Vec::new();
        for p in [m.address, c.address, o.address, w.address, self.a, self.b] {
            params.extend(p.to_le_bytes());
        }
        params.extend((image.len() as u32).to_le_bytes());
        params.extend(u32::from(self.scale).to_le_bytes());
        let mut config = Config {
            threads: 1,
            seed: self.seed,
            isa: self.isa,
            compute_capability: (9, 0),
            timeout: Some(std::time::Duration::from_secs(20)),
            ..Config::default()
        };
        change(&mut config);
        launch(&Launch {
            kernel: &program.kernels[0],
            grid: [1; 3],
            block: [self.threads, 1, 1],
            cluster: [1; 3],
            dynamic_shared_bytes: image.len() as u32,
            params: &params,
            cooperative: false,
            memory: memory(),
            config: &config,
        })?;
        Ok(o.read())
    }
}

pub fn lower(text: &str) -> Result<Program, LowerError> {
    let module = softcuda::ptx::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    lower_module(&module, &Environment { compute_capability: (9, 0), ..Environment::default() })
}

/// `{%d0, %d1, ...}`
pub fn list(name: &str, n: usize) -> String {
    format!("{{{}}}", (0..n).map(|i| format!("%{name}{i}")).collect::<Vec<_>>().join(", "))
}

/// A descriptor from its fields, in bytes; `mode` 0 to 3 for none, 128, 64 and 32 bytes.
pub fn descriptor(start: usize, leading: usize, stride: usize, base_offset: u64, mode: u64) -> u64 {
    let field = |x: usize| (x as u64 & 0x3ffff) >> 4;
    field(start) | field(leading) << 16 | field(stride) << 32 | base_offset << 49 | mode << 62
}
