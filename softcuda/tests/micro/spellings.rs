//! Spellings that assemblers take beside the usual ones: whole vector registers (PTX ISA 5.4.2, 6.4.3), sums of a register and a
//! constant (6.4), predicates as parameters (7.1), `.global` within a function (5.1.4), and votes and shuffles of old targets
//! (9.7.9.5, 9.7.13.9).

use crate::device::{Run, lower, module, table};

fn run(outside: &str, body: &str) -> Vec<u32> {
    Run { outside: outside.into(), ..Run::default() }.per_thread(body)
}

#[test]
fn whole_vector_registers() {
    let got = run(
        "",
        ".reg .v2 .b32 v, w; .reg .v4 .b16 q; .reg .v2 .b16 h; mov.b32 v.x, %lane; mov.b32 v.y, 1000;
         mov.v2.b32 w, v; mov.v2.b32 {v.y, v.x}, v; mov.v2.b32 v, {v.x, w.x};
         mov.b64 %rd1, w; shl.b64 %rd1, %rd1, 1; mov.b64 w, %rd1; mov.b32 %r2, 0x00050007; mov.b32 h, %r2; mov.b32 %r3, h;
         mov.b64 %rd2, 0x0004000300020001; mov.b64 q, %rd2; mov.b64 %rd3, q; cvt.u32.u16 %r4, q.z; cvt.u32.u64 %r5, %rd3;
         add.u32 %r6, v.x, w.x; add.u32 %r6, %r6, w.y; add.u32 %r6, %r6, %r3; add.u32 %r6, %r6, %r4; add.u32 %r6, %r6, %r5;
         add.u32 %r6, %r6, v.y; st.global.u32 [%out], %r6;",
    );
    // v = (1000, lane) after the exchange, then (1000, w.x = lane); w = (2 lane, 2000).
    let want = |l: u32| 1000 + 2 * l + 2000 + 0x0005_0007 + 3 + 0x0002_0001 + l;
    assert_eq!(got, (0..32).map(want).collect::<Vec<_>>());
    for (instruction, says) in [
        ("mov.b32 v, v;", "a register of type .b16"),
        ("mov.v2.b32 v, q;", "a vector of 2"),
        ("mov.v2.u32 v, 5;", "a vector of 2"),
        ("mov.v4.b64 q, q;", "unknown instruction"),
        ("add.u32 v, v, v;", "a source operand"),
    ] {
        let body = format!(".reg .v2 .b32 v; .reg .v4 .b32 q; {instruction} ret;");
        let error = lower(&module(1, "", &body)).expect_err(instruction).to_string();
        assert!(error.contains(says), "{instruction}: {error}");
    }
}

#[test]
fn a_register_and_a_constant() {
    table("add.u32 %d, %a+1, 3;", "b32", &["b32"], &[(&[5], 9), (&[0xffff_ffff], 3)]);
    table("mov.u32 %d, %a + 0x10;", "b32", &["b32"], &[(&[5], 21)]);
    table("mul.lo.u32 %d, %a+1, %b+-2;", "b32", &["b32", "b32"], &[(&[5, 9], 42)]);
    table("add.u64 %d, %a+-4, 1;", "b64", &["b64"], &[(&[1], u64::MAX - 1)]);
    table("add.u16 %d, %a+1, 2;", "b16", &["b16"], &[(&[0xfffe], 1)]);
    table("setp.eq.u32 %d, %a+1, %b;", "pred", &["b32", "b32"], &[(&[4, 5], 1), (&[5, 5], 0)]);
    table("cvt.u64.u32 %d, %a+1;", "b64", &["b32"], &[(&[0xffff_ffff], 0)]);
    table("st.global.u32 [%o], %a+7; ld.global.u32 %d, [%o];", "b32", &["b32"], &[(&[1], 8)]);
    for (instruction, says) in [
        ("add.u32 %r0+1, %r1, 2;", "a destination register"),
        ("add.f32 %f0, %f1+1, %f2;", "an integer register before `+`"),
        ("add.u64 %rd0, %r1+1, 2;", "a register of type .u64"),
    ] {
        let body = format!(".reg .b32 %r<4>; .reg .f32 %f<4>; .reg .b64 %rd<4>; {instruction} ret;");
        let error = lower(&module(1, "", &body)).expect_err(instruction).to_string();
        assert!(error.contains(says), "{instruction}: {error}");
    }
}

#[test]
fn predicates_by_register() {
    let odd = ".func (.reg .pred r) odd(.reg .b32 n, .reg .pred flip) {
        .reg .b32 m; .reg .pred p; and.b32 m, n, 1; setp.ne.u32 p, m, 0; xor.pred r, p, flip; ret; }";
    let address = "\n.global .align 8 .u64 table[1] = {odd};";
    for outside in [odd.to_owned(), odd.to_owned() + address] {
        let got = run(
            &outside,
            "setp.ge.u32 %p, %lane, 16; call (%q), odd, (%lane, %p); selp.u32 %r2, 7, 3, %q; st.global.u32 [%out], %r2;",
        );
        assert_eq!(got, (0..32).map(|l| if (l % 2 == 1) ^ (l >= 16) { 7 } else { 3 }).collect::<Vec<u32>>());
    }
}

#[test]
fn variables_of_the_module_within_a_function() {
    let outside = "
        .global .align 4 .b32 g = 100;
        .func (.reg .b32 r) next() { .global .align 4 .b32 g = 5; .const .align 4 .b32 step[2] = {2, 3}; .reg .b32 s;
            ld.const.u32 s, [step+4]; atom.global.add.u32 r, [g], s; ret; }";
    let got = run(
        outside,
        ".reg .b32 a, b; { .global .align 4 .b32 g = 7; ld.global.u32 a, [g]; } ld.global.u32 b, [g]; setp.eq.u32 %p, %lane, 0;
         mov.u32 %r2, 0; @%p call (%r2), next; @%p call (%r2), next; mad.lo.u32 a, a, 1000, b; add.u32 a, a, %r2;
         st.global.u32 [%out], a;",
    );
    // 5, then 8: the variable is one for all calls.
    assert_eq!(got, (0..32).map(|l| 7100 + if l == 0 { 8 } else { 0 }).collect::<Vec<u32>>());
}

/// A module for a target before sm_70, whose warps have no mask for votes and shuffles.
fn old(body: &str) -> Vec<u32> {
    use crate::device::{Buffer, PROLOGUE, memory};
    let out = Buffer::new(&[0u32; 32]);
    let text = module(1, "", &format!("{PROLOGUE}{body}\nret;"))
        .replace(".version 8.6", ".version 6.0")
        .replace(".target sm_90", ".target sm_60");
    let program = lower(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let config = Run::default().config;
    softcuda::exec::launch(&softcuda::exec::Launch {
        kernel: &program.kernels[0],
        grid: [1; 3],
        block: [32, 1, 1],
        cluster: [1; 3],
        dynamic_shared_bytes: 0,
        params: &out.address.to_le_bytes(),
        cooperative: false,
        memory: memory(),
        config: &config,
    })
    .unwrap_or_else(|e| panic!("{e}\n{text}"));
    out.read()
}

#[test]
fn votes_and_shuffles_of_the_lanes_that_are_there() {
    // Lanes 4 and above are there.
    let there = "setp.lt.u32 %p, %lane, 4; @%p bra DONE; setp.eq.u32 %q, %lane, 9;";
    let got = old(&format!("mov.u32 %r2, 0; {there} vote.ballot.b32 %r2, !%q; DONE: st.global.u32 [%out], %r2;"));
    assert_eq!(got, (0..32).map(|l| if l < 4 { 0 } else { 0xffff_fdf0 }).collect::<Vec<u32>>());
    let got = old(&format!(
        "mov.u32 %r2, 0; {there} vote.any.pred %p0, %q; vote.all.pred %p1, %q; vote.uni.pred %p2, %p0; selp.u32 %r2, 1, 0, %p0;
         @%p1 add.u32 %r2, %r2, 2; @%p2 add.u32 %r2, %r2, 4; DONE: st.global.u32 [%out], %r2;"
    ));
    assert_eq!(got, (0..32).map(|l| if l < 4 { 0 } else { 5 }).collect::<Vec<u32>>());
    let got = old(&format!(
        "mov.u32 %r2, 0; {there} shfl.idx.b32 %r2|%p0, %lane, 6, 31; @%p0 add.u32 %r2, %r2, 100; DONE: st.global.u32 [%out], %r2;"
    ));
    assert_eq!(got, (0..32).map(|l| if l < 4 { 0 } else { 106 }).collect::<Vec<u32>>());
    let got = old("shfl.up.b32 %r2, %lane, 1, 0; st.global.u32 [%out], %r2;");
    assert_eq!(got, (0..32u32).map(|l| l.saturating_sub(1)).collect::<Vec<_>>());
}

#[test]
fn bytes_and_bf16() {
    // 1.5, -2.75, 300, -300, NaN: towards zero, clamped (9.7.9.21).
    let v = [0x3fc0u64, 0xc030, 0x4396, 0xc396, 0x7fc0];
    let want = [1u64, 0xfffe, 127, 0xff80, 0];
    for (x, y) in v.into_iter().zip(want) {
        table("cvt.rzi.s8.bf16 %d, %a;", "b16", &["b16"], &[(&[x], y)]);
    }
    table("cvt.rzi.u8.bf16 %d, %a;", "b16", &["b16"], &[(&[0x4396], 255), (&[0xc030], 0)]);
    table("cvt.rn.bf16.s8 %d, %a;", "b16", &["b16"], &[(&[0xff], 0xbf80), (&[0x7f], 0x42fe)]);
    table("cvt.rn.bf16.u8 %d, %a;", "b16", &["b16"], &[(&[0xff], 0x437f)]);
}
