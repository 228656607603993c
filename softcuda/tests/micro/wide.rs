//! 128-bit registers and accesses, and vectors of atomic operations (PTX ISA 9.7.9.8, 9.7.9.10, 9.7.13.5).

use half::{bf16, f16};
use softcuda::exec::FaultKind;

use crate::device::{Buffer, Run};

#[test]
fn moves_in_two_and_four_parts() {
    let out = Buffer::new(&[0u64; 6]);
    Run { block: 1, ..Run::default() }
        .run(
            ".reg .b128 %q<3>; .reg .b64 %a, %b, %o; .reg .b32 %w<4>; ld.param.u64 %o, [p0];
             mov.b64 %a, 0x0123456789abcdef; mov.b64 %b, 0xfedcba9876543210;
             mov.b128 %q0, {%a, %b}; mov.b128 %q1, %q0; mov.b128 {%w0, %w1, %w2, %w3}, %q1;
             st.global.v4.u32 [%o], {%w0, %w1, %w2, %w3};
             mov.b128 %q2, {%w3, %w2, %w1, %w0}; st.global.b128 [%o+16], %q2;
             ld.global.b128 %q0, [%o]; mov.b128 {%b, %a}, %q0; st.global.v2.u64 [%o+32], {%a, %b}; ret;",
            &[out.address],
        )
        .unwrap();
    let (a, b) = (0x0123_4567_89ab_cdef_u64, 0xfedc_ba98_7654_3210);
    assert_eq!(out.read::<u64>(), [a, b, b.rotate_left(32), a.rotate_left(32), b, a]);
}

#[test]
fn wide_accesses_in_every_space() {
    let got = Run::default().per_thread(
        ".reg .b128 %q<2>; .shared .align 16 .b8 s[512]; .local .align 16 .b8 l[16];
         mad.lo.u32 %r2, %lane, 16, 0; mov.u32 %r3, s; add.u32 %r3, %r3, %r2; mul.wide.u32 %rd1, %lane, 3; cvt.u64.u32 %rd2, %lane;
         mov.b128 %q0, {%rd1, %rd2}; st.shared.b128 [%r3], %q0; ld.volatile.shared.b128 %q1, [%r3];
         st.local.b128 [l], %q1; ld.local.v2.u64 {%rd3, %rd4}, [l]; add.u64 %rd3, %rd3, %rd4;
         cvt.u32.u64 %r4, %rd3; st.global.u32 [%out], %r4;",
    );
    assert_eq!(got, (0..32).map(|l| 4 * l).collect::<Vec<u32>>());
    let fault = Run::default().try_per_thread(".reg .b128 %w; ld.global.b128 %w, [%out]; ret;").unwrap_err();
    assert_eq!(fault.kind, FaultKind::MisalignedAddress, "{fault}");
}

#[test]
fn exchanges_of_128_bits_are_whole() {
    // A cell of two equal halves; every thread of many blocks adds to both at once with a loop of `cas`.
    let cell = Buffer::new(&[0u64; 2]);
    let run = Run { grid: 8, block: 64, ..Run::default() };
    let run = Run { config: softcuda::exec::Config { threads: 4, ..run.config.clone() }, ..run };
    run.run(
        ".reg .b128 %q<3>; .reg .b64 %c, %a, %b, %x, %y; .reg .pred %p; ld.param.u64 %c, [p0];
         mov.b64 %a, 0; mov.b64 %b, 0; mov.b128 %q0, {%a, %b};
         TRY: add.u64 %x, %a, 1; add.u64 %y, %b, 1; mov.b128 %q1, {%x, %y};
         atom.global.cas.b128 %q2, [%c], %q0, %q1; mov.b128 {%x, %y}, %q2;
         setp.eq.u64 %p, %x, %a; mov.b64 %a, %x; mov.b64 %b, %y; mov.b128 %q0, %q2; @!%p bra TRY; ret;",
        &[cell.address],
    )
    .unwrap();
    assert_eq!(cell.read::<u64>(), [512, 512]);
    let out = Buffer::new(&[0u64; 2]);
    Run { block: 1, ..Run::default() }
        .run(
            ".reg .b128 %q<2>; .reg .b64 %c, %o, %a; ld.param.u64 %c, [p0]; ld.param.u64 %o, [p1]; mov.b64 %a, 7;
             mov.b128 %q0, {%a, %a}; atom.acq_rel.gpu.global.exch.b128 %q1, [%c], %q0; st.global.b128 [%o], %q1; ret;",
            &[cell.address, out.address],
        )
        .unwrap();
    assert_eq!((cell.read::<u64>(), out.read::<u64>()), (vec![7, 7], vec![512, 512]));
}

#[test]
fn vectors_of_atomic_additions() {
    let cells = Buffer::new(&[1f32, 2.0, 3.0, 4.0]);
    let old = Buffer::new(&[0f32; 4]);
    Run { block: 1, ..Run::default() }
        .run(
            ".reg .f32 %f<4>; .reg .b64 %c, %o; ld.param.u64 %c, [p0]; ld.param.u64 %o, [p1];
             mov.f32 %f0, 0f3F000000; mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f40000000; mov.f32 %f3, 0f40800000;
             atom.global.add.v4.f32 {%f1, %f2, %f3, %f0}, [%c], {%f0, %f1, %f2, %f3};
             st.global.v4.f32 [%o], {%f1, %f2, %f3, %f0}; red.global.add.v2.f32 [%c+8], {%f1, %f1}; ret;",
            &[cells.address, old.address],
        )
        .unwrap();
    assert_eq!(old.read::<f32>(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(cells.read::<f32>(), [1.5, 3.0, 6.0, 9.0]);
    let body = ".reg .f32 %f; .reg .b64 %c; ld.param.u64 %c, [p0]; mov.f32 %f, 0f3F800000; red.global.add.v2.f32 [%c+4], {%f, %f}; ret;";
    let fault = Run { block: 1, ..Run::default() }.run(body, &[cells.address]).unwrap_err();
    assert_eq!(fault.kind, FaultKind::MisalignedAddress, "{fault}");
}

#[test]
fn vectors_of_halves() {
    let start: Vec<f16> = [1.0, -2.0, 3.5, 0.25, 8.0, 9.0, -1.0, 0.0].map(f16::from_f32).to_vec();
    let with: Vec<f16> = [0.5, -1.0, 4.0, -0.25, 7.0, 10.0, -1.0, 2.0].map(f16::from_f32).to_vec();
    let operations: [(&str, fn(f32, f32) -> f32); 3] = [("add", |a, b| a + b), ("min", f32::min), ("max", f32::max)];
    for (op, host) in operations {
        let (cells, values) = (Buffer::new(&start), Buffer::new(&with));
        Run { block: 1, ..Run::default() }
            .run(
                &format!(
                    ".reg .b16 %h<8>; .reg .b64 %c, %v; ld.param.u64 %c, [p0]; ld.param.u64 %v, [p1];
                     ld.global.v4.b16 {{%h0, %h1, %h2, %h3}}, [%v]; ld.global.v4.b16 {{%h4, %h5, %h6, %h7}}, [%v+8];
                     red.global.{op}.noftz.v8.f16 [%c], {{%h0, %h1, %h2, %h3, %h4, %h5, %h6, %h7}}; ret;"
                ),
                &[cells.address, values.address],
            )
            .unwrap();
        let want: Vec<f16> =
            start.iter().zip(&with).map(|(a, b)| f16::from_f32(host(a.to_f32(), b.to_f32()))).collect();
        assert_eq!(cells.read::<f16>(), want, "{op}");
    }
    let pairs: Vec<bf16> = [1.0, 2.0, 3.0, 4.0].map(bf16::from_f32).to_vec();
    let cells = Buffer::new(&pairs);
    Run { block: 1, ..Run::default() }
        .run(
            ".reg .b32 %r<2>; .reg .b64 %c; ld.param.u64 %c, [p0]; ld.global.v2.b32 {%r0, %r1}, [%c];
             atom.global.max.noftz.v2.bf16x2 {%r0, %r1}, [%c], {%r1, %r0}; red.global.add.noftz.v2.bf16x2 [%c], {%r0, %r1}; ret;",
            &[cells.address],
        )
        .unwrap();
    assert_eq!(cells.read::<bf16>(), [4.0, 6.0, 6.0, 8.0].map(bf16::from_f32));
}
