//! What the lowering rejects, and how it says so.

use softcuda::exec::FaultKind;
use softcuda::lower::LowerErrorKind;

use crate::device::{Buffer, Run, lower, module};

const REGISTERS: &str =
    ".reg .pred %p; .reg .b16 %h; .reg .b32 %r<8>; .reg .f32 %f<4>; .reg .s32 %s; .reg .b64 %rd<4>; .shared .b32 s;\n";

fn error(body: &str) -> softcuda::lower::LowerError {
    let text = module(1, "", &format!("{REGISTERS}{body}\nret;"));
    match lower(&text) {
        Err(e) => e,
        Ok(_) => panic!("{body} was accepted"),
    }
}

#[test]
fn unknown_instructions_and_modifiers() {
    for body in [
        "foo.bar.b32 %r0, %r1;",
        "add.u8 %r0, %r1, %r2;",
        "add.rn.s32 %r0, %r1, %r2;",
        "add.sat.u32 %r0, %r1, %r2;",
        "mul.u32 %r0, %r1, %r2;",
        "fma.f32 %f0, %f1, %f2, %f3;",
        "mov.b32.foo %r0, %r1;",
        "ld.global.v3.u32 {%r0, %r1, %r2}, [%rd0];",
        "ld.global.release.gpu.u32 %r0, [%rd0];",
        "ld.global.acquire.u32 %r0, [%rd0];",
        "ld.global.L3::128B.u32 %r0, [%rd0];",
        "atom.global.add.s64 %rd1, [%rd0], %rd2;",
        "atom.global.inc.s32 %r0, [%rd0], %r1;",
        "red.global.exch.b32 [%rd0], %r1;",
        "shfl.idx.b32 %r0, %r1, 0, 31;",
        "vote.ballot.b32 %r0, %p;",
        "mma.sync.aligned.m16n8k16.col.row.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f0, %f1, %f2, %f3};",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r0}, [s];",
        "cvt.s32.f32 %r0, %f0;",
        "cvt.rn.s32.f32 %r0, %f0;",
        "cvt.f16.f32 %h, %f0;",
        "cvt.sat.s64.u32 %rd0, %r0;",
        "cp.async.cg.shared.global [s], [%rd0], 8;",
        "setp.lo.s32 %p, %r0, %r1;",
        "setp.equ.u32 %p, %r0, %r1;",
        "bar.sync 16;",
        "fence.proxy.alias.gpu;",
        "multimem.red.relaxed.gpu.global.add.u32 [%rd0], %r0;",
        "vadd.u32.u32.u32 %r0, %r1, %r2;",
        "istypep.texref %p, %rd0;",
        "alloca.u64 %rd0, %rd1;",
        "shfl.sync.up.b32 _|%p, %r1, 1, 31, -1;",
        "ld.global.wb.u32 %r0, [%rd0];",
        "ld.nc.u32 %r0, [%rd0];",
        "ld.volatile.global.ca.u32 %r0, [%rd0];",
        "ld.volatile.gpu.u32 %r0, [%rd0];",
        "ld.shared.L1::evict_last.u32 %r0, [s];",
        "ld.shared.L2::128B.u32 %r0, [s];",
        "ld.global.L2::evict_last.u32 %r0, [%rd0];",
        "st.global.lu.u32 [%rd0], %r0;",
        "ld.mmio.relaxed.gpu.global.u32 %r0, [%rd0];",
        "prefetch.shared.L1 [s];",
        "cvt.rn.satfinite.tf32.f32 %r0, %f0;",
        "cvt.pack.sat.u8.s32 %r0, %r1, %r2;",
        "atom.global.add.v2.u32 {%r0, %r1}, [%rd0], {%r0, %r1};",
        "add.u32 %r0, %tid.x, 1;",
    ] {
        let e = error(body);
        assert_eq!(e.line, 8, "{body}: {e}");
        assert!(e.to_string().contains(body.trim_end_matches(';').split_whitespace().next().unwrap()), "{body}: {e}");
    }
}

#[test]
fn operands() {
    for (body, says) in [
        ("add.u32 %r0, %r1;", "expected 3 operands, got 2"),
        ("add.u32 %r0, %r1, %r9;", "undeclared register `%r9`"),
        ("add.f32 %f0, %s, %f1;", "a register of type .f32"),
        ("add.s32 %s, %f0, %s;", "a register of type .u32"),
        ("add.u32 %r0, %rd0, %r1;", "a register of type .u32"),
        ("add.f32 %f0, %f1, 1;", "floating-point constant"),
        ("add.u32 5, %r1, %r2;", "destination register"),
        ("bra NOWHERE;", "undeclared label `NOWHERE`"),
        ("ld.global.u32 %r0, [nothing];", "undeclared name `nothing`"),
        ("ld.global.u32 %r0, [s];", "expected an address in .global"),
        ("ld.global.v2.u32 {%r0}, [%rd0];", "a vector of 2"),
        ("ld.global.u32 %h, [%rd0];", "a register for .u32"),
        ("st.param.u32 [p0], %r0;", "a store to .param"),
        ("lop3.b32 %r0, %r1, %r2, %r3, 256;", "from 0 to 255"),
        ("@%r0 mov.u32 %r0, 1;", "a register of type .pred"),
        ("call nothing;", "undeclared function `nothing`"),
        (".reg .b32 %r1;", "`%r1` is declared twice"),
        ("A: A: mov.u32 %r0, 1;", "`A` is declared twice"),
    ] {
        let e = error(body);
        assert!(e.to_string().contains(says), "{body}: {e}");
        assert_eq!(e.line, 8, "{body}");
    }
    assert!(matches!(error("bra X;").kind, LowerErrorKind::Undeclared { .. }));
}

#[test]
fn targets() {
    let text = ".version 8.6\n.target sm_100a\n.address_size 64\n.visible .entry k() { ret; }\n";
    assert!(lower(text).unwrap_err().to_string().contains("sm_100a"));
}

#[test]
fn launches_that_do_not_fit() {
    let b = Buffer::new(&[0u32]);
    let run = Run { block: 64, ..Run::default() };
    let text =
        ".version 8.3\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p0) .reqntid 32 { ret; }\n";
    let program = lower(text).unwrap();
    let config = run.config.clone();
    let mut launch = softcuda::exec::Launch {
        kernel: &program.kernels[0],
        grid: [1, 1, 1],
        block: [64, 1, 1],
        cluster: [1, 1, 1],
        dynamic_shared_bytes: 0,
        params: &b.address.to_le_bytes(),
        cooperative: false,
        memory: crate::device::memory(),
        config: &config,
    };
    let fault = softcuda::exec::launch(&launch).unwrap_err();
    assert_eq!(fault.kind, FaultKind::InvalidLaunch, "{fault}");
    launch.block = [32, 1, 1];
    launch.params = &[];
    let fault = softcuda::exec::launch(&launch).unwrap_err();
    assert!(fault.message.contains("0 bytes of parameters"), "{fault}");
}

#[test]
fn a_refusal_names_line_text_and_section() {
    for (body, section) in [
        ("tex.2d.v4.f32.s32 {%r0, %r1, %r2, %r3}, [s, {%r0, %r1}];", "9.7.10, Texture Instructions"),
        ("suld.b.2d.b32.trap %r0, [s, {%r0, %r1}];", "9.7.11, Surface Instructions"),
        ("vadd.s32.s32.s32 %r0, %r1, %r2;", "9.7.18, Video Instructions"),
        ("wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32 %r0, %r1, %r2, %r3;", "9.7.14, Warp Level Matrix"),
        ("tcgen05.wait::ld.sync.aligned;", "9.7.16, TensorCore 5th Generation"),
        ("cp.async.bulk.tensor.2d.im2col [%rd0], [%rd1];", "9.7.9, Data Movement and Conversion"),
        ("call nothing;", "9.7.12, Control Flow"),
        ("setmaxnreg.inc.sync.aligned.u32 20;", "9.7.19, Miscellaneous"),
        ("add.u32 %r0, %nowhere, 1;", "9.7.1, Integer Arithmetic"),
        ("atom.global.add.s64 %rd0, [%rd1], %rd2;", "9.7.13, Parallel Synchronization"),
    ] {
        let text = error(body).to_string();
        let (start, end) = ("line 8: ", format!("in `{body}` (PTX ISA {section}"));
        assert!(text.starts_with(start) && text.contains(&end), "{text}");
    }
    // What is no instruction has no section, and directives have theirs.
    let text = error("nonsense.u32 %r0, %r1;").to_string();
    assert!(text.ends_with("in `nonsense.u32 %r0, %r1;`"), "{text}");
    let refused = |text: &str| lower(text).unwrap_err().to_string();
    let text = refused(".version 8.6\n.target sm_90\n.visible .entry k()\n.maxntid 2048\n{ ret; }\n");
    assert!(text.contains("(PTX ISA 11.4, Performance-Tuning Directives)"), "{text}");
    let text = refused(".version 7.0\n.target sm_90\n.visible .entry k() { ret; }\n");
    assert!(text.starts_with("line 2: ") && text.contains("in `.target sm_90` (PTX ISA 11.1, "), "{text}");
}
