//! Profiles through the driver: of a section, and of a whole process.

mod common;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaModule, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use softcuda::device::Limiter;
use softcuda::profile::{Caches, NOTICE, Profile, RegisterSource, SCHEMA};

/// `copy` moves 16 bytes a thread. `clash` stores to shared memory with conflicts and reads global memory in strides.
const PTX: &str = r#"
.version 8.0
.target sm_80
.address_size 64
.visible .entry copy(.param .u64 from, .param .u64 to)
{
    .reg .b32 %r<8>;
    .reg .b64 %a, %b, %z;
    ld.param.u64 %a, [from];
    ld.param.u64 %b, [to];
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.u32 %r3, %r0, %r1, %r2;
    mul.wide.u32 %z, %r3, 16;
    add.u64 %a, %a, %z;
    add.u64 %b, %b, %z;
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%a];
    st.global.v4.b32 [%b], {%r4, %r5, %r6, %r7};
    ret;
}
.visible .entry clash(.param .u64 from, .param .u64 to)
{
    .reg .b32 %r<4>;
    .reg .b64 %a, %z;
    .shared .align 16 .b8 s[8192];
    ld.param.u64 %a, [from];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %z, %r0, 128;
    add.u64 %a, %a, %z;
    ld.global.u32 %r1, [%a];
    mov.u32 %r2, s;
    mad.lo.u32 %r2, %r0, 128, %r2;
    st.shared.u32 [%r2], %r1; // <- 32 words of one bank & "quotes"
    bar.sync 0;
    ret;
}
.visible .entry few(.param .u64 from, .param .u64 to)
{
    .reg .pred %p;
    .reg .b32 %r<2>;
    .reg .b64 %b;
    mov.u32 %r0, %ctaid.x;
    setp.ge.u32 %p, %r0, 133;
    @%p ret;
    ld.param.u64 %b, [to];
    st.global.u32 [%b], 7;
    ret;
}
"#;

const THREADS: u32 = 256;
const BLOCKS: u32 = 512;

/// Launches a kernel of [`PTX`] on buffers that are large enough for `BLOCKS` blocks.
struct Program {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    from: cudarc::driver::CudaSlice<u8>,
    to: cudarc::driver::CudaSlice<u8>,
}

/// Bytes of each buffer.
const BYTES: usize = (THREADS * BLOCKS * 16) as usize;

impl Program {
    fn new(context: &Arc<CudaContext>) -> Program {
        let stream = context.default_stream();
        let (from, to) = (stream.alloc_zeros(BYTES).unwrap(), stream.alloc_zeros(BYTES).unwrap());
        Program { module: context.load_module(Ptx::from_src(PTX)).unwrap(), stream, from, to }
    }

    fn launch(&mut self, name: &str, grid: u32, threads: u32) {
        let kernel = self.module.load_function(name).unwrap();
        let config = LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: no launch of these tests touches more than the buffers have.
        unsafe { self.stream.launch_builder(&kernel).arg(&self.from).arg(&mut self.to).launch(config) }.unwrap();
    }
}

#[test]
fn a_section_of_a_program() {
    let (installed, context, _turn) = common::device();
    let control = *installed.control();
    let mut program = Program::new(&context);
    control.record_registers(
        "ptxas info    : Compiling entry function 'clash' for 'sm_90'\nptxas info    : Used 128 registers\n",
    );
    program.launch("copy", 1, THREADS);
    let ((), profile) = control.profiled(|| {
        program.launch("copy", BLOCKS, THREADS);
        program.launch("clash", 1, 64);
        program.launch("copy", BLOCKS, THREADS);
    });
    program.launch("copy", 1, THREADS);

    assert_eq!((profile.schema, profile.notice.as_str(), profile.models().as_str()), (SCHEMA, NOTICE, "h100"));
    assert_eq!((profile.launch_count, profile.launches.len(), profile.kernels.len()), (3, 3, 2));
    let n = BYTES as u64;
    let copy = &profile.launches[0];
    assert_eq!((copy.kernel.as_str(), copy.grid, copy.block), ("copy", [BLOCKS, 1, 1], [THREADS, 1, 1]));
    assert_eq!((copy.work.traffic.dram_read_bytes, copy.work.traffic.dram_write_bytes), (n, n));
    assert_eq!(copy.limited_by, "DRAM");
    assert_eq!(copy.modelled_seconds, 2.0 * n as f64 / 3.352e12);
    // Both copies began with cold caches.
    assert_eq!(profile.launches[2].work, copy.work);
    assert_eq!(copy.registers.source, RegisterSource::Estimate);
    // Eight blocks of eight warps fit; the grid has four for each of 132 multiprocessors.
    assert_eq!((copy.occupancy.blocks_per_sm, copy.occupancy.limiter), (4, Limiter::Grid));
    assert_eq!(copy.occupancy.fraction, 0.5);

    let clash = profile.kernels.iter().find(|kernel| kernel.name == "clash").unwrap();
    assert_eq!((clash.registers.count, clash.registers.source), (128, RegisterSource::Ptxas));
    assert_eq!((clash.work.global.sectors, clash.work.global.ideal_sectors), (64, 8));
    let shared = &clash.work.shared;
    assert_eq!((shared.wavefronts, shared.ideal_wavefronts, clash.work.barriers), (64, 2, 2));
    let worst = clash.hottest(1, |line| line.conflict_wavefronts())[0];
    assert!(worst.text.starts_with("st.shared.u32 [%r2], %r1;"), "{worst:?}");
    assert_eq!(PTX.lines().nth(worst.line as usize - 1).unwrap().trim(), worst.text);
    assert_eq!(worst.conflict_wavefronts(), 62);
    let worst = clash.hottest(1, |line| line.wasted_sectors())[0];
    assert_eq!((worst.text.as_str(), worst.wasted_sectors()), ("ld.global.u32 %r1, [%a];", 56));
    let copies = profile.kernels.iter().find(|kernel| kernel.name == "copy").unwrap();
    assert_eq!((copies.launches, copies.modelled_seconds), (2, 2.0 * copy.modelled_seconds));

    assert_eq!(Profile::from_json(&profile.to_json()).unwrap(), profile);
    let html = profile.to_html();
    let comment = "&lt;- 32 words of one bank &amp; &quot;quotes";
    for text in ["copy", "clash", NOTICE, "device description <code>h100</code>", comment] {
        assert!(html.contains(text), "{text}");
    }
    // Nothing from elsewhere: the only addresses are those of documents, as text.
    for text in ["<script", "<link", "src=", "href=\"http", "url(", "@import"] {
        assert!(!html.contains(text), "{text}");
    }
    let text = profile.to_text();
    for part in ["copy", "clash", NOTICE, "limited by DRAM", "st.shared.u32 [%r2], %r1;"] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn caches_that_are_warm_or_carried() {
    let (installed, context, _turn) = common::device();
    let control = *installed.control();
    let mut program = Program::new(&context);
    let mut copies = |caches| {
        control.set_profile_caches(caches);
        let ((), profile) = control.profiled(|| (0..2).for_each(|_| program.launch("copy", BLOCKS, THREADS)));
        control.set_profile_caches(Caches::Cold);
        assert_eq!(profile.caches, [caches]);
        for text in [profile.to_text(), profile.to_html()] {
            assert!(text.contains(caches.words()), "{text}");
        }
        profile.launches.iter().map(|l| (l.caches, l.work.traffic.dram_read_bytes)).collect::<Vec<_>>()
    };
    let n = BYTES as u64;
    assert_eq!(copies(Caches::Cold), [(Caches::Cold, n), (Caches::Cold, n)]);
    assert_eq!(copies(Caches::Warm), [(Caches::Warm, 0), (Caches::Warm, 0)]);
    // A section begins with nothing, each time.
    assert_eq!(copies(Caches::Carried), [(Caches::Carried, n), (Caches::Carried, 0)]);
    assert_eq!(copies(Caches::Carried), [(Caches::Carried, n), (Caches::Carried, 0)]);
}

#[test]
fn blocks_that_leave_at_once_and_what_times_leave_out() {
    let (installed, context, _turn) = common::device();
    let mut program = Program::new(&context);
    let ((), profile) = installed.control().profiled(|| program.launch("few", 1320, 32));
    let launch = &profile.launches[0];
    assert_eq!((launch.work.blocks, launch.work.working_blocks), (1320, 133));
    // Two of them on one of 132 multiprocessors, though the grid has ten for each.
    assert_eq!((launch.occupancy.blocks_per_sm, launch.occupancy.limiter), (2, Limiter::Grid));
    // 133 warps run 6 instructions, the others 3 and not what follows their `ret`; two shares of 133 at four a clock.
    let instructions = (133 * 6 + 1187 * 3) as f64;
    assert_eq!(launch.work.warp_instructions as f64, instructions);
    let issue = launch.bounds.iter().find(|bound| bound.unit == "issue").unwrap().seconds;
    assert!((issue / (instructions * 2.0 / 133.0 / 4.0 / 1.98e9) - 1.0).abs() < 1e-12, "{issue}");
    for text in [profile.to_text(), profile.to_html()] {
        for part in ["133 of 1320 work", "Not in the modelled times", "Latency", "1 of 1 listed launches"] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
}

/// Names and kinds of the form in which profiles are written: a change of these is a change of [`SCHEMA`].
#[test]
fn the_form_of_json_is_stable() {
    let (installed, context, _turn) = common::device();
    let mut program = Program::new(&context);
    let ((), profile) = installed.control().profiled(|| program.launch("clash", 1, 64));
    let json: serde_json::Value = serde_json::from_str(&profile.to_json()).unwrap();
    let keys = |value: &serde_json::Value| {
        let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys.join(" ")
    };
    assert_eq!(SCHEMA, 2);
    assert_eq!(keys(&json), "caches devices kernels launch_count launches notice schema softcuda");
    assert_eq!(keys(&json["devices"][0]), "figures model sm_count warps_per_sm");
    assert_eq!(keys(&json["devices"][0]["figures"][0]), "document name place value");
    let launch = &json["launches"][0];
    assert_eq!(
        keys(launch),
        "block bounds caches cluster device dynamic_shared_bytes grid index kernel limited_by modelled_seconds occupancy registers \
         static_shared_bytes work"
    );
    assert_eq!(
        keys(&launch["work"]),
        "async_bytes async_sectors barriers blocks classes global matrix opcodes repeated_polls shared tensor thread_instructions \
         traffic waits warp_instructions warps working_blocks"
    );
    assert_eq!(
        keys(&launch["work"]["traffic"]),
        "dirty_at_end_bytes dram_read_bytes dram_write_bytes in_pieces l1_hits l1_sectors l2_atomic_sectors \
         l2_read_hits l2_read_sectors l2_write_sectors"
    );
    assert_eq!(keys(&launch["work"]["global"]), "ideal_sectors requests sectors");
    assert_eq!(keys(&launch["work"]["shared"]), "ideal_wavefronts requests wavefronts");
    assert_eq!(keys(&launch["occupancy"]), "blocks_per_sm fraction limiter warps_per_sm");
    assert_eq!(launch["occupancy"]["limiter"], "grid");
    assert_eq!(keys(&launch["bounds"][0]), "detail seconds unit");
    let kernel = &json["kernels"][0];
    assert_eq!(keys(kernel), "bounds device launches limited_by lines modelled_seconds name occupancy registers work");
    assert_eq!(keys(&kernel["lines"][0]), "global line shared text thread_instructions warp_instructions");
    let bounds = launch["bounds"].as_array().unwrap();
    let units: Vec<&str> = bounds.iter().map(|bound| bound["unit"].as_str().unwrap()).collect();
    assert_eq!(
        units.join(", "),
        "issue, f32, f16, f64, integer, special, convert, exchange, load/store, shared and L1, tensor, L2, DRAM"
    );
}

/// Set in the process that the test below starts.
const CHILD: &str = "SOFTCUDA_TEST_CHILD";

#[test]
fn the_environment_profiles_a_whole_process() {
    if std::env::var_os(CHILD).is_some() {
        let (_installed, context, _turn) = common::device();
        return Program::new(&context).launch("clash", 1, 64);
    }
    let folder = std::env::temp_dir().join(format!("softcuda-profile-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("registers"), "clash 40\n").unwrap();
    let run = |file: &str| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_environment_profiles_a_whole_process", "--nocapture"])
            .env(CHILD, "1")
            .env("SOFTCUDA_DEVICE", "l4")
            .env("SOFTCUDA_REGISTERS", folder.join("registers"))
            .env("SOFTCUDA_PROFILE", folder.join(file))
            .output()
            .unwrap()
    };
    let output = run("out.json");
    assert!(output.status.success(), "{output:?}");
    let read = |ending: &str| std::fs::read_to_string(folder.join(format!("out.{ending}"))).unwrap();
    let profile = Profile::from_json(&read("json")).unwrap();
    assert_eq!((profile.models().as_str(), profile.launch_count), ("l4", 1));
    let registers = profile.kernels[0].registers;
    assert_eq!((registers.count, registers.source), (40, RegisterSource::Ptxas));
    assert_eq!((read("html"), read("txt")), (profile.to_html(), profile.to_text()));
    assert!(String::from_utf8_lossy(&output.stderr).contains(NOTICE));

    let settings = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_environment_profiles_a_whole_process", "--nocapture"])
        .env(CHILD, "1")
        .env("SOFTCUDA_PROFILE_CACHES", "hot")
        .output()
        .unwrap();
    assert!(!settings.status.success());
    let said = String::from_utf8_lossy(&settings.stderr).into_owned();
    assert!(said.contains("SOFTCUDA_PROFILE_CACHES must be `cold`, `warm` or `carried`, not `hot`"), "{said}");

    let output = run("no/such/folder/out");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("SOFTCUDA_PROFILE must be a file that can be written"));
    std::fs::remove_dir_all(&folder).unwrap();
}
