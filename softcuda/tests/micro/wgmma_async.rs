//! When products of `wgmma` land (PTX ISA 9.7.15.4 to 9.7.15.7), what must not be touched before that, and what the warps of
//! a warpgroup owe one another. All factors are ones or small numbers in bf16; shapes are 64 x 8 x 16 without swizzle.

use half::bf16;
use softcuda::exec::{Fault, FaultKind};

use crate::warpgroup::{Program64, descriptor, list, lower};

/// A and B, both filled with `x` and `y`: A in the first 2048 bytes, B in the next 256.
fn image(x: f32, y: f32) -> Vec<u8> {
    let fill = |x: f32, n: usize| bf16::from_f32(x).to_le_bytes().repeat(n);
    [fill(x, 1024), fill(y, 128)].concat()
}

fn program(body: &str) -> Program64 {
    Program64 {
        threads: 128,
        image: image(1.0, 2.0),
        registers: 4,
        accumulators: vec![5f32.to_bits(); 512],
        a_words: vec![0x3f80_3f80; 512],
        a: descriptor(0, 128, 256, 0, 0),
        b: descriptor(2048, 128, 256, 0, 0),
        scale: true,
        seed: 0,
        isa: None,
        body: body.to_string(),
    }
}

const MMA: &str =
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, %scale, 1, 1, 0, 0;";
const MMA_FROM_REGISTERS: &str = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, %db, %scale, 1, 1, 0;";
const FENCE: &str = "wgmma.fence.sync.aligned;";
const COMMIT: &str = "wgmma.commit_group.sync.aligned;";
const WAIT: &str = "wgmma.wait_group.sync.aligned 0;";
/// 5 + 16 * 1 * 2.
const SUM: f32 = 37.0;

fn values(body: &str, seed: u64) -> Vec<f32> {
    let got = Program64 { seed, ..program(body) }.run().unwrap_or_else(|e| panic!("{e}\n{body}"));
    got.into_iter().map(f32::from_bits).collect()
}

fn fault(program: Program64) -> Fault {
    program.run().unwrap_err()
}

#[track_caller]
fn all(values: &[f32], want: f32) {
    assert!(values.iter().all(|v| *v == want), "expected {want}: {values:?}");
}

#[test]
fn accumulators_are_there_after_the_wait_and_poison_before() {
    for seed in 0..20 {
        all(&values(&format!("{FENCE} {MMA} {COMMIT} {WAIT}"), seed), SUM);
    }
    let early = values(&format!("{FENCE} {MMA} {COMMIT}"), 0);
    assert!(early.iter().all(|v| v.is_nan()), "{early:?}");
    // Without a commit the wait does not cover it.
    let loose = values(&format!("{FENCE} {MMA} {WAIT}"), 0);
    assert!(loose.iter().all(|v| v.is_nan()), "{loose:?}");
    let one_in_flight = values(&format!("{FENCE} {MMA} {COMMIT} wgmma.wait_group.sync.aligned 1;"), 0);
    assert!(one_in_flight.iter().all(|v| v.is_nan()), "{one_in_flight:?}");
    // An empty group counts as one.
    all(&values(&format!("{FENCE} {MMA} {COMMIT} {COMMIT} wgmma.wait_group.sync.aligned 1;"), 0), SUM);
}

#[test]
fn products_on_the_same_accumulators_follow_one_another_without_a_wait() {
    for seed in 0..20 {
        let two = format!("{FENCE} {MMA} {COMMIT} {FENCE} {MMA} {COMMIT}");
        all(&values(&format!("{two} {WAIT}"), seed), SUM + 32.0);
        let first_only = values(&format!("{two} wgmma.wait_group.sync.aligned 1;"), 0);
        assert!(first_only.iter().all(|v| v.is_nan()), "the second product still has them: {first_only:?}");
    }
}

#[test]
fn what_is_written_to_accumulators_in_flight_is_lost() {
    all(&values(&format!("{FENCE} {MMA} {COMMIT} mov.b32 %d0, 0; mov.b32 %d1, 0; {WAIT}"), 0), SUM);
    // A product that reads them takes up what the one before leaves, not what was put there.
    let between = format!("{FENCE} {MMA} mov.b32 %d2, 0; mov.b32 %d3, 0; {MMA} {COMMIT} {WAIT}");
    all(&values(&between, 0), SUM + 32.0);
}

#[test]
fn registers_of_a_are_read_at_the_wait() {
    for seed in 0..20 {
        all(&values(&format!("{FENCE} {MMA_FROM_REGISTERS} {COMMIT} {WAIT}"), seed), SUM);
    }
    let zeroed: String = (0..4).map(|i| format!("mov.b32 %a{i}, 0;")).collect();
    all(&values(&format!("{FENCE} {MMA_FROM_REGISTERS} {COMMIT} {zeroed} {WAIT}"), 0), 5.0);
    // Registers that the program is done with keep their place until the product is.
    // All eight values live at once, so that the registers of A would be taken were they free.
    let made: String = (0..8).map(|i| format!("add.u32 %r{i}, %t, {i};")).collect();
    let fresh = (0..8).fold(made, |text, i| text + &format!("st.shared.b32 [%s+{}], %r{i};", 1024 * i + 4096));
    let reuse = format!("{FENCE} {MMA_FROM_REGISTERS} {COMMIT} {fresh} {WAIT}");
    let mut p = program(&reuse);
    p.image.resize(16384, 0);
    all(&p.run().unwrap().into_iter().map(f32::from_bits).collect::<Vec<_>>(), SUM);
}

#[test]
fn shared_memory_is_read_when_the_first_warp_waits() {
    // Overwritten between issue and wait: B becomes zero.
    let zero_b = "bar.sync 0; mul.lo.u32 %i, %t, 4; and.b32 %i, %i, 255; add.u32 %i, %i, %s; st.shared.b32 [%i+2048], 0; bar.sync 0;";
    all(&values(&format!("{FENCE} {MMA} {COMMIT} {zero_b} {WAIT}"), 0), 5.0);
    // Some seeds read before that.
    let seeds: Vec<f32> =
        (1..20).map(|seed| values(&format!("{FENCE} {MMA} {COMMIT} {zero_b} {WAIT}"), seed)[0]).collect();
    assert!(seeds.contains(&5.0) && seeds.contains(&SUM), "{seeds:?}");
    // One warp's wait is enough for the factors of all four: warp 0 waits and gives the buffer away, the others wait after
    // it has been overwritten.
    let hand_over = format!(
        "{FENCE} {MMA} {COMMIT} setp.eq.u32 %p, %warp, 0; @!%p bra OTHERS; {WAIT} bar.sync 1, 128; bra DONE;
         OTHERS: bar.sync 1, 128; mul.lo.u32 %i, %t, 4; and.b32 %i, %i, 255; add.u32 %i, %i, %s; st.shared.b32 [%i+2048], 0; {WAIT}
         DONE: bar.sync 0;"
    );
    for seed in 0..20 {
        all(&values(&hand_over, seed), SUM);
    }
}

#[test]
fn warpgroups_are_independent() {
    // Two warpgroups; the second waits twice as often.
    let body = format!(
        "setp.lt.u32 %p, %warp, 4; @!%p bra SECOND; {FENCE} {MMA} {COMMIT} {WAIT} bra DONE;
         SECOND: {FENCE} {MMA} {COMMIT} {WAIT} {FENCE} {MMA} {COMMIT} {WAIT} DONE:"
    );
    for seed in 0..20 {
        let got =
            Program64 { threads: 256, accumulators: vec![5f32.to_bits(); 1024], seed, ..program(&body) }.run().unwrap();
        let got: Vec<f32> = got.into_iter().map(f32::from_bits).collect();
        all(&got[..512], SUM);
        all(&got[512..], SUM + 32.0);
    }
}

#[test]
fn the_warps_of_a_warpgroup_must_agree() {
    let differ = "setp.eq.u32 %p, %warp, 2; @%p add.s64 %db, %db, 1;";
    let f = fault(program(&format!("{differ} {FENCE} {MMA} {COMMIT} {WAIT}")));
    assert!(f.kind == FaultKind::IllegalInstruction && f.message.contains("descriptors"), "{f}");
    let f = fault(program(&format!("setp.eq.u32 %p, %t, 70; @%p add.s64 %db, %db, 1; {FENCE} {MMA}")));
    assert!(f.message.contains("different descriptors of B"), "{f}");
    let f = fault(program(&format!("setp.lt.u32 %scale, %t, 70; {FENCE} {MMA}")));
    assert!(f.message.contains("scale of D"), "{f}");
    let f = fault(program(&format!("setp.eq.u32 %p, %warp, 1; @%p bra B; {FENCE} {MMA} bra C; B: {FENCE} {MMA} C:")));
    assert!(f.message.contains("another instruction"), "{f}");
    let f = fault(program(&format!("setp.lt.u32 %p, %t, 70; @%p bra B; {FENCE} {MMA} {COMMIT} {WAIT} B:")));
    assert!(f.kind == FaultKind::IllegalInstruction && f.message.contains("all 32 lanes"), "{f}");
    let f = fault(Program64 { threads: 96, ..program(&format!("{FENCE} {MMA}")) });
    assert!(f.message.contains("four whole warps"), "{f}");
    let f = fault(program(&format!("setp.eq.u32 %p, %warp, 1; @%p bra B; {FENCE} {MMA} {COMMIT} {WAIT} B:")));
    assert!(f.kind == FaultKind::Deadlock && f.message.contains("wait_group"), "{f}");
}

#[test]
fn descriptors_are_checked() {
    let body = format!("{FENCE} {MMA} {COMMIT} {WAIT}");
    let f = fault(Program64 { b: descriptor(2304, 128, 256, 0, 0), ..program(&body) });
    assert!(f.kind == FaultKind::IllegalAddress && f.message.contains("descriptor of B"), "{f}");
    let f = fault(Program64 { a: descriptor(0, 128, 512, 0, 0), ..program(&body) });
    assert!(f.kind == FaultKind::IllegalAddress && f.message.contains("descriptor of A"), "{f}");
    let f = fault(Program64 { b: descriptor(2048, 128, 256, 1, 0), ..program(&body) });
    assert!(f.message.contains("base offset"), "{f}");
    let f = fault(Program64 { b: descriptor(2048, 128, 256, 0, 0) | 1 << 46, ..program(&body) });
    assert!(f.message.contains("no meaning"), "{f}");
}

fn refused(instruction: &str) -> String {
    lower(&program(instruction).text()).err().unwrap_or_else(|| panic!("{instruction} is accepted")).to_string()
}

#[test]
fn refusals() {
    let four = list("d", 4);
    for (instruction, says) in [
        ("wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 D, %da, %db, %a0, 0, %scale, 1, 1, 0, 0;", "sparse"),
        ("wgmma.mma_async.sync.aligned.m64n8k256.s32.b1.b1.and.popc D, %da, %db, %scale;", "single bits"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f16.bf16.bf16 {%d0, %d1}, %da, %db, %scale, 1, 1, 0, 0;", "unknown"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.bf16 D, %da, %db, %scale, 1, 1, 0, 0;", "unknown"),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.bf16.bf16 D, %da, %db, %scale, 1, 1, 0, 0;", "unknown"),
        ("wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 D, %da, %db, %scale, 1, 1, 0, 0;", "unknown"),
        ("wgmma.mma_async.sync.aligned.m64n40k32.s32.s8.s8 D, %da, %db, %scale;", "unknown"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.satfinite.f32.f16.f16 D, %da, %db, %scale, 1, 1, 0, 0;", "unknown"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 D, %da, %db, %scale, 1, 0, 0, 0;", "scale of B"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 D, %da, %db, %scale, 1, 1, 2, 0;", "order of A"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 D, %da, %db, %scale;", "8 operands"),
        ("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 D, %da, %db, %scale, 1, 1, 0, 0;", "6 operands"),
        ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 D, %da, %db, %scale, 1, 1, 0, 0;", "vector of 8"),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, _}, %da, %db, %scale, 1, 1, 0, 0;",
            "`_`",
        ),
        ("wgmma.mma_async.aligned.m64n8k16.f32.bf16.bf16 D, %da, %db, %scale, 1, 1, 0, 0;", "unknown"),
        ("wgmma.wait_group.sync.aligned %r0;", "number of groups"),
        ("wgmma.fence.aligned;", "unknown"),
        ("setmaxnreg.inc.sync.aligned.u32 20;", "multiple of 8"),
        ("setmaxnreg.inc.sync.aligned.u32 36;", "multiple of 8"),
        ("setmaxnreg.dec.sync.aligned.u32 264;", "multiple of 8"),
    ] {
        let error = refused(&instruction.replace('D', &four));
        assert!(error.contains(says), "{instruction}: {error}");
    }
    let plain = program(WAIT).text().replace("sm_90a", "sm_90");
    assert!(lower(&plain).unwrap_err().to_string().contains("sm_90a"));
}

/// A block of three warpgroups of 168 registers: the most for 384 threads.
fn registers(body: &str) -> Result<Vec<u32>, Fault> {
    let p = Program64 { threads: 384, ..program(body) };
    let text = p.text().replace(".param .u32 scale)", ".param .u32 scale) .maxntid 384 .minnctapersm 1");
    p.run_text(&text)
}

#[test]
fn registers_move_between_warpgroups() {
    let roles = |producer: &str, consumer: &str| {
        format!("setp.lt.u32 %p, %warp, 4; @%p bra P; {consumer} bra DONE; P: {producer} DONE:")
    };
    // 128 given up by one warpgroup, 64 taken by each of the other two.
    let balanced = roles("setmaxnreg.dec.sync.aligned.u32 40;", "setmaxnreg.inc.sync.aligned.u32 232;");
    registers(&balanced).unwrap();
    let f =
        registers(&roles("setmaxnreg.dec.sync.aligned.u32 48;", "setmaxnreg.inc.sync.aligned.u32 232;")).unwrap_err();
    assert!(f.kind == FaultKind::Deadlock && f.message.contains("setmaxnreg.inc"), "{f}");
    let f = registers("setmaxnreg.dec.sync.aligned.u32 176;").unwrap_err();
    assert!(f.kind == FaultKind::IllegalInstruction && f.message.contains("168 registers"), "{f}");
    let f = registers("setmaxnreg.inc.sync.aligned.u32 160; setmaxnreg.inc.sync.aligned.u32 168;").unwrap_err();
    assert!(f.kind == FaultKind::IllegalInstruction && f.message.contains("168 registers"), "{f}");
    let apart = "setp.eq.u32 %p, %warp, 1; @%p bra B; setmaxnreg.dec.sync.aligned.u32 64; bra C; B: setmaxnreg.dec.sync.aligned.u32 72; C:";
    let f = registers(apart).unwrap_err();
    assert!(f.message.contains("another warp of its warpgroup"), "{f}");
    // Back and forth, with a barrier between.
    registers(&format!(
        "{balanced} bar.sync 0; {}",
        roles(
            "bar.sync 1, 384; setmaxnreg.inc.sync.aligned.u32 168;",
            "setmaxnreg.dec.sync.aligned.u32 168; bar.arrive 1, 384;"
        )
        .replace("P:", "Q:")
        .replace("bra P", "bra Q")
        .replace("DONE", "END")
    ))
    .unwrap();
    // Without a bound at launch it has no effect.
    Program64 { threads: 384, ..program("setmaxnreg.inc.sync.aligned.u32 256;") }.run().unwrap();
}

/// Whether threads of a block may increase their registers to `count`, which needs no more than the block was launched with.
fn increases(threads: u32, directives: &str, count: u32) -> bool {
    let p = Program64 { threads, ..program(&format!("setmaxnreg.inc.sync.aligned.u32 {count};")) };
    let text = p.text().replace(".param .u32 scale)", &format!(".param .u32 scale) {directives}"));
    match p.run_text(&text) {
        Ok(_) => true,
        Err(f) => {
            assert_eq!(f.kind, FaultKind::Deadlock, "{f}");
            false
        }
    }
}

#[test]
fn registers_at_entry_are_those_that_ptxas_gives() {
    // What `ptxas -v` says for `.maxntid T .minnctapersm B` with an increase to 248, and for `.maxnreg`.
    for (threads, blocks, registers) in [
        (128, 1, 248),
        (256, 1, 248),
        (384, 1, 168),
        (512, 1, 128),
        (640, 1, 96),
        (768, 1, 80),
        (1024, 1, 64),
        (128, 2, 248),
        (256, 2, 128),
        (384, 2, 80),
        (512, 2, 64),
        (128, 3, 168),
        (256, 3, 80),
        (384, 3, 56),
        (512, 3, 40),
        (128, 5, 96),
        (256, 5, 48),
    ] {
        let directives = format!(".maxntid {threads} .minnctapersm {blocks}");
        assert!(increases(threads, &directives, registers), "{directives} to {registers}");
        assert_eq!(increases(threads, &directives, 248), registers == 248, "{directives} to 248");
        assert!(
            registers == 248 || !increases(threads, &directives, registers + 8),
            "{directives} to {}",
            registers + 8
        );
    }
    for (directives, registers) in [
        (".maxnreg 100", 104),
        (".maxnreg 128", 128),
        (".maxnreg 20", 24),
        (".maxnreg 100 .maxntid 128 .minnctapersm 1", 104),
    ] {
        assert!(increases(128, directives, registers), "{directives}");
        assert!(!increases(128, directives, registers + 8), "{directives}");
    }
    // Warps are spread over four partitions: five are as many as eight, nine as twelve.
    for (directives, registers) in [
        (".maxntid 160 .minnctapersm 2", 168),
        (".maxntid 257 .minnctapersm 3", 72),
        (".maxntid 544 .minnctapersm 1", 96),
    ] {
        assert!(increases(128, directives, registers), "{directives}");
        assert!(!increases(128, directives, registers + 8), "{directives}");
    }
    // The count at entry is not known: the instruction has no effect.
    for directives in [".maxntid 128", ".maxntid 1024 .minnctapersm 3", ".maxnreg 256"] {
        assert!(increases(128, directives, 256), "{directives}");
    }
    assert!(increases(128, ".maxnreg 255", 256));
}
