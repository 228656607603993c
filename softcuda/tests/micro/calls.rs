//! Device functions (PTX ISA 7.1, 9.7.12.5): recursion, calls by address, parameters in all their forms, `vprintf`.

use std::sync::{Arc, Mutex};

use softcuda::exec::{Config, FaultKind, Output};

use crate::device::{Run, lower, module};

fn run(outside: &str) -> Run {
    Run { outside: outside.into(), ..Run::default() }
}

/// `n!` and Fibonacci: one and two calls of itself, to another depth in every lane.
const RECURSIVE: &str = "
.func (.param .b32 r) factorial(.param .b32 n) {
    .reg .pred %p; .reg .b32 %n, %m, %x;
    ld.param.b32 %n, [n]; setp.le.u32 %p, %n, 1; mov.u32 %x, 1; @%p bra DONE;
    sub.u32 %m, %n, 1;
    { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %m; call.uni (back), factorial, (arg); ld.param.b32 %x, [back]; }
    mul.lo.u32 %x, %x, %n;
    DONE: st.param.b32 [r], %x; ret;
}
.func (.param .b32 r) fibonacci(.param .b32 n) {
    .reg .pred %p; .reg .b32 %n, %m, %x, %y;
    ld.param.b32 %n, [n]; setp.lt.u32 %p, %n, 2; @%p bra SMALL;
    sub.u32 %m, %n, 1;
    { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %m; call (back), fibonacci, (arg); ld.param.b32 %x, [back]; }
    sub.u32 %m, %n, 2;
    { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %m; call (back), fibonacci, (arg); ld.param.b32 %y, [back]; }
    add.u32 %x, %x, %y; st.param.b32 [r], %x; ret;
    SMALL: st.param.b32 [r], %n; ret;
}";

#[test]
fn recursion_to_another_depth_in_every_lane() {
    let got = run(RECURSIVE).per_thread(
        "and.b32 %r2, %lane, 7;
         { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %r2; call.uni (back), factorial, (arg); ld.param.b32 %r3, [back]; }
         { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %r2; call.uni (back), fibonacci, (arg); ld.param.b32 %r4, [back]; }
         mad.lo.u32 %r3, %r4, 10000, %r3; st.global.u32 [%out], %r3;",
    );
    let factorial = |n: u32| (1..=n).product::<u32>();
    let fibonacci = |n: u32| (0..n).fold((0, 1), |(a, b), _| (b, a + b)).0;
    assert_eq!(got, (0..32).map(|l| fibonacci(l % 8) * 10000 + factorial(l % 8)).collect::<Vec<_>>());
}

#[test]
fn lanes_meet_again_after_a_call() {
    // The lanes return from different depths, and from different places of the function; the warp is whole after it.
    let got = run(RECURSIVE).per_thread(
        "and.b32 %r2, %lane, 7;
         { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %r2; call.uni (back), fibonacci, (arg); ld.param.b32 %r4, [back]; }
         activemask.b32 %r3; st.global.u32 [%out], %r3;",
    );
    assert_eq!(got, [u32::MAX; 32]);
}

#[test]
fn guarded_calls_run_for_their_lanes_only() {
    let got = run(RECURSIVE).per_thread(
        "and.b32 %r2, %lane, 3; mov.u32 %r3, 77; setp.ne.u32 %p, %r2, 1;
         { .param .b32 arg; .param .b32 back; st.param.b32 [arg], %r2; @%p call (back), factorial, (arg); ld.param.b32 %r4, [back]; }
         @%p mov.u32 %r3, %r4; st.global.u32 [%out], %r3;",
    );
    assert_eq!(got, (0..32).map(|l| [1, 77, 2, 6][l % 4]).collect::<Vec<_>>());
}

#[test]
fn mutual_recursion_keeps_registers_of_every_activation() {
    // Hofstadter's sequences: F(n) = n - M(F(n-1)), M(n) = n - F(M(n-1)).
    let body = |own: &str, other: &str, zero: u32| {
        format!(
            ".func (.param .b32 r) {own}(.param .b32 n) {{
                .reg .pred %p; .reg .b32 %n, %m, %x; ld.param.b32 %n, [n]; setp.eq.u32 %p, %n, 0; mov.u32 %x, {zero}; @%p bra DONE;
                sub.u32 %m, %n, 1;
                {{ .param .b32 a; .param .b32 b; st.param.b32 [a], %m; call.uni (b), {own}, (a); ld.param.b32 %m, [b]; }}
                {{ .param .b32 a; .param .b32 b; st.param.b32 [a], %m; call.uni (b), {other}, (a); ld.param.b32 %m, [b]; }}
                sub.u32 %x, %n, %m;
                DONE: st.param.b32 [r], %x; ret;
            }}"
        )
    };
    let declared = ".func (.param .b32 r) male(.param .b32 n);";
    let outside = format!("{declared}\n{}\n{}", body("female", "male", 1), body("male", "female", 0));
    let got = run(&outside).per_thread(
        "{ .param .b32 a; .param .b32 b; st.param.b32 [a], %lane; call.uni (b), female, (a); ld.param.b32 %r3, [b]; }
         { .param .b32 a; .param .b32 b; st.param.b32 [a], %lane; call.uni (b), male, (a); ld.param.b32 %r4, [b]; }
         mad.lo.u32 %r3, %r3, 100, %r4; st.global.u32 [%out], %r3;",
    );
    let (mut f, mut m) = (vec![1u32], vec![0u32]);
    for n in 1..32u32 {
        let before = n as usize - 1;
        let male = n - f[m[before] as usize];
        m.push(male);
        f.push(n - m[f[before] as usize]);
    }
    assert_eq!(got, f.iter().zip(&m).map(|(f, m)| f * 100 + m).collect::<Vec<_>>());
}

/// Functions of one signature and a table of their addresses.
const TABLE: &str = "
.func (.param .b32 r) twice(.param .b32 x) { .reg .b32 %x; ld.param.b32 %x, [x]; add.u32 %x, %x, %x; st.param.b32 [r], %x; ret; }
.func (.param .b32 r) square(.param .b32 x) { .reg .b32 %x; ld.param.b32 %x, [x]; mul.lo.u32 %x, %x, %x; st.param.b32 [r], %x; ret; }
.func (.param .b32 r) next(.param .b32 x) { .reg .b32 %x; ld.param.b32 %x, [x]; add.u32 %x, %x, 1; st.param.b32 [r], %x; ret; }
.global .align 8 .u64 table[3] = {twice, square, next};";

#[test]
fn calls_by_address() {
    let pick =
        "rem.u32 %r2, %lane, 3; mov.u64 %rd1, table; mad.wide.u32 %rd1, %r2, 8, %rd1; ld.global.u64 %rd2, [%rd1];";
    let want: Vec<u32> = (0..32).map(|l| [2 * l, l * l, l + 1][l as usize % 3]).collect();
    // Every lane its own function, found through a table in memory.
    let got = run(TABLE).per_thread(&format!(
        "{pick} proto: .callprototype (.param .b32 _) _ (.param .b32 _);
         {{ .param .b32 a; .param .b32 b; st.param.b32 [a], %lane; call (b), %rd2, (a), proto; ld.param.b32 %r3, [b]; }}
         activemask.b32 %r4; setp.eq.u32 %p, %r4, -1; selp.u32 %r3, %r3, 1000, %p; st.global.u32 [%out], %r3;"
    ));
    assert_eq!(got, want);
    // The same with a list of what may be called.
    let got = run(TABLE).per_thread(&format!(
        "{pick} list: .calltargets twice, square, next;
         {{ .param .b32 a; .param .b32 b; st.param.b32 [a], %lane; call (b), %rd2, (a), list; ld.param.b32 %r3, [b]; }}
         st.global.u32 [%out], %r3;"
    ));
    assert_eq!(got, want);
    // The address of a function by its name, also as an argument.
    let apply = "
        .func (.param .b32 r) apply(.param .b64 f, .param .b32 x) {
            .reg .b64 %f; .reg .b32 %x; ld.param.b64 %f, [f]; ld.param.b32 %x, [x];
            proto: .callprototype (.param .b32 _) _ (.param .b32 _);
            { .param .b32 a; .param .b32 b; st.param.b32 [a], %x; call (b), %f, (a), proto; ld.param.b32 %x, [b]; }
            st.param.b32 [r], %x; ret;
        }";
    let got = run(&format!("{TABLE}{apply}")).per_thread(
        "mov.u64 %rd2, square;
         { .param .b64 f; .param .b32 a; .param .b32 b; st.param.b64 [f], %rd2; st.param.b32 [a], %lane; call.uni (b), apply, (f, a); ld.param.b32 %r3, [b]; }
         st.global.u32 [%out], %r3;",
    );
    assert_eq!(got, (0..32).map(|l| l * l).collect::<Vec<u32>>());
}

#[test]
fn what_is_not_callable() {
    let call = "proto: .callprototype (.param .b32 _) _ (.param .b32 _);
        { .param .b32 a; .param .b32 b; st.param.b32 [a], %lane; call (b), %rd2, (a), proto; ld.param.b32 %r3, [b]; } st.global.u32 [%out], %r3;";
    let fault = run(TABLE).try_per_thread(&format!("mov.u64 %rd2, 4096; {call}")).unwrap_err();
    assert_eq!((fault.kind, fault.address), (FaultKind::InvalidPc, Some(4096)), "{fault}");
    assert!(fault.message.contains("none of the 3 functions"), "{fault}");
    // A function of another signature is no target either.
    let other = ".func other(.param .b64 x) { ret; }";
    let fault = run(&format!("{TABLE}{other}")).try_per_thread(&format!("mov.u64 %rd2, other; {call}")).unwrap_err();
    assert_eq!(fault.kind, FaultKind::InvalidPc, "{fault}");
    for (body, says) in [
        ("call (%r2), %rd0, (%r2);", "a prototype or a list of targets"),
        ("call (%r2), twice, (%r2, %r3);", "`twice` takes 1 arguments and returns 1, got 2 and 1"),
        ("{ .param .b32 a; call outer, (a); }", "calls of the external function `outer`"),
        ("call bad, (%r2);", "parameter `x` of a function cannot be .u16"),
        ("call (%r2), twice, (%r2), twice;", "a register with a function's address"),
    ] {
        let outside = format!("{TABLE}\n.extern .func outer(.param .b32 x); .func bad(.reg .u16 x) {{ ret; }}");
        let text = module(1, &outside, &format!(".reg .b32 %r<8>; .reg .b64 %rd<4>; {body} ret;"));
        let error = lower(&text).unwrap_err().to_string();
        assert!(error.contains(says), "{body}: {error}");
    }
}

#[test]
fn structures_and_variables_of_every_activation() {
    // A 12-byte structure by value, changed by the callee; each activation has a local array whose address is passed on.
    let outside = "
        .func (.param .align 4 .b8 r[12]) rotate(.param .align 4 .b8 s[12], .param .b32 n) {
            .local .align 4 .b8 keep[16];
            .reg .pred %p; .reg .b32 %a, %b, %c, %n; .reg .b64 %k;
            ld.param.b32 %n, [n]; ld.param.b32 %a, [s]; ld.param.b32 %b, [s+4]; ld.param.b32 %c, [s+8];
            mov.u64 %k, keep; cvta.local.u64 %k, %k; st.u32 [%k], %n;
            setp.eq.u32 %p, %n, 0; @%p bra DONE;
            { .param .align 4 .b8 t[12]; .param .b32 m; .param .align 4 .b8 u[12];
              st.param.b32 [t], %b; st.param.b32 [t+4], %c; st.param.b32 [t+8], %a; sub.u32 %n, %n, 1; st.param.b32 [m], %n;
              call.uni (u), rotate, (t, m); ld.param.b32 %a, [u]; ld.param.b32 %b, [u+4]; ld.param.b32 %c, [u+8]; }
            ld.u32 %n, [%k]; mad.lo.u32 %a, %n, 1000, %a;
            DONE: st.param.b32 [r], %a; st.param.b32 [r+4], %b; st.param.b32 [r+8], %c; ret;
        }";
    let got = run(outside).per_thread(
        "and.b32 %r2, %lane, 3;
         { .param .align 4 .b8 t[12]; .param .b32 m; .param .align 4 .b8 u[12];
           st.param.b32 [t], 1; st.param.b32 [t+4], 2; st.param.b32 [t+8], 3; st.param.b32 [m], %r2;
           call.uni (u), rotate, (t, m); ld.param.b32 %r3, [u]; ld.param.b32 %r4, [u+4]; }
         mad.lo.u32 %r3, %r4, 100, %r3; st.global.u32 [%out], %r3;",
    );
    let want = |l: u32| {
        let n = l % 4;
        (1..=n).sum::<u32>() * 1000 + n % 3 + 1 + ((n + 1) % 3 + 1) * 100
    };
    assert_eq!(got, (0..32).map(want).collect::<Vec<_>>());
}

#[test]
fn registers_as_parameters() {
    let outside = "
        .func (.reg .u32 r) gauss(.reg .u32 n, .reg .b64 odd) {
            .reg .pred %p, %odd; .reg .b32 %m, %x; .reg .b64 %w, %even;
            setp.ne.u64 %odd, odd, 0; setp.eq.u32 %p, n, 0; mov.u32 r, 0; @%p ret;
            sub.u32 %m, n, 1; cvt.u64.u32 %w, n; selp.u64 %even, 0, 1, %odd;
            call (%x), gauss, (%m, %even);
            cvt.u32.u64 %m, %w; add.u32 r, %x, %m; @%odd add.u32 r, r, 1000; ret;
        }";
    let got = run(outside).per_thread(
        "and.b32 %r2, %lane, 7; setp.ge.u32 %p, %lane, 16; selp.u64 %rd2, 1, 0, %p;
         call (%r3), gauss, (%r2, %rd2); st.global.u32 [%out], %r3;",
    );
    // The predicate, which every activation keeps across its call, alternates from one to the next.
    let want = |l: u32| {
        let n = l % 8;
        n * (n + 1) / 2 + 1000 * if l >= 16 { n.div_ceil(2) } else { n / 2 }
    };
    assert_eq!(got, (0..32).map(want).collect::<Vec<_>>());
}

#[test]
fn barriers_and_exits_inside_functions() {
    let outside = "
        .func down(.param .b32 n) {
            .reg .pred %p; .reg .b32 %n, %l; ld.param.b32 %n, [n]; setp.eq.u32 %p, %n, 0; @%p bra LAST;
            sub.u32 %n, %n, 1; { .param .b32 m; st.param.b32 [m], %n; call.uni down, (m); } ret;
            LAST: bar.sync 0; mov.u32 %l, %laneid; setp.ge.u32 %p, %l, 30; @%p exit; ret;
        }";
    let got = Run { block: 64, ..run(outside) }.per_thread(
        "{ .param .b32 m; st.param.b32 [m], 5; call.uni down, (m); } redux.sync.add.u32 %r2, 1, -1; st.global.u32 [%out], %r2;",
    );
    let want = |t: usize| if t % 32 >= 30 { 0xdead_beef } else { 30 };
    assert_eq!(got, (0..64).map(want).collect::<Vec<u32>>());
}

#[test]
fn the_stack_has_an_end() {
    let deep = "{ .param .b32 arg; .param .b32 back; st.param.b32 [arg], 100000; call.uni (back), factorial, (arg); ld.param.b32 %r3, [back]; }";
    let fault = run(RECURSIVE).try_per_thread(deep).unwrap_err();
    assert_eq!(fault.kind, FaultKind::StackOverflow, "{fault}");
    assert!(fault.message.contains("`factorial`") && fault.text.contains("call.uni"), "{fault}");
    // As deep as asked for, where the stack is given.
    let config = Config { stack_bytes: 1 << 20, ..Run::default().config };
    let got = Run { config, own: true, ..run(RECURSIVE) }.per_thread(
        "{ .param .b32 arg; .param .b32 back; st.param.b32 [arg], 20000; call.uni (back), factorial, (arg); ld.param.b32 %r3, [back]; }
         st.global.u32 [%out], 1;",
    );
    assert_eq!(got, [1; 32]);
}

fn printed(grid: u32, threads: usize, outside: &str, body: &str) -> String {
    let buffer = Arc::new(Mutex::new(Vec::new()));
    let config = Config { output: Output::Buffer(Arc::clone(&buffer)), threads, ..Run::default().config };
    let outside = format!(".extern .func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a);\n{outside}");
    Run { grid, config, outside, ..Run::default() }.per_thread(body);
    let text = buffer.lock().unwrap().clone();
    String::from_utf8(text).unwrap()
}

fn string(name: &str, text: &str) -> String {
    let bytes: Vec<String> = text.bytes().chain([0]).map(|b| b.to_string()).collect();
    format!(".global .align 1 .b8 {name}[{}] = {{{}}};\n", bytes.len(), bytes.join(", "))
}

const CALL_PRINT: &str = "mov.u64 %rd1, format; cvta.global.u64 %rd1, %rd1;
    { .param .b64 f; .param .b64 a; .param .b32 n; st.param.b64 [f], %rd1; st.param.b64 [a], %rd2;
      @%q call.uni (n), vprintf, (f, a); ld.param.b32 %r3, [n]; }";

#[test]
fn printing_in_the_order_of_blocks() {
    let body = format!(
        ".local .align 8 .b8 args[8]; .reg .b32 %turn, %mine; .reg .pred %not; mov.u64 %rd2, args; cvta.local.u64 %rd2, %rd2;
         mov.u32 %r2, %ctaid.x; st.v2.u32 [%rd2], {{%r2, %lane}}; setp.ge.u32 %q, %lane, 30; sub.u32 %mine, 19, %r2;
         WAIT: ld.acquire.gpu.global.u32 %turn, [turns]; setp.ne.u32 %not, %turn, %mine; @%not bra WAIT;
         {CALL_PRINT} bar.warp.sync -1; setp.ne.u32 %not, %lane, 0; @!%not red.release.gpu.global.add.u32 [turns], 1;
         st.global.u32 [%out], %r3;"
    );
    // The last block prints first.
    let outside = string("format", "block %d lane %d\n") + ".global .align 4 .u32 turns;";
    let want: String = (0..20).flat_map(|b| [30, 31].map(|l| format!("block {b} lane {l}\n"))).collect();
    for threads in [1, 4] {
        assert_eq!(printed(20, threads, &outside, &body), want);
    }
}

#[test]
fn printing_in_every_form() {
    let outside = string("format", "%5d|%-6u|%#x|%c|%.3f|%e|%s|%lld|%hhd|%*d|%%|%p|%5q")
        + &string("word", "word")
        + ".global .align 4 .u32 sum;";
    let body = format!(
        ".local .align 8 .b8 args[96]; .reg .b64 %w; mov.u64 %rd2, args; cvta.local.u64 %rd2, %rd2;
         st.u32 [%rd2], -42; st.u32 [%rd2+4], 7; st.u32 [%rd2+8], 255; st.u32 [%rd2+12], 65;
         st.f64 [%rd2+16], 0d400921FB54442D18; st.f64 [%rd2+24], 0d3FF8000000000000;
         mov.u64 %w, word; cvta.global.u64 %w, %w; st.u64 [%rd2+32], %w; st.u64 [%rd2+40], -5000000000; st.u32 [%rd2+48], 511;
         st.u32 [%rd2+52], 4; st.u32 [%rd2+56], 9; st.u64 [%rd2+64], 4096; setp.eq.u32 %q, %lane, 3; {CALL_PRINT}
         @%q st.global.u32 [%out], %r3;"
    );
    let text = printed(1, 1, &outside, &body);
    assert_eq!(text, "  -42|7     |0xff|A|3.142|1.500000e+00|word|-5000000000|-1|   9|%|0x1000|%5q");
}

#[test]
fn aliases_and_weak_functions() {
    let outside = "
        .func (.param .b32 r) one(.param .b32 x) { .reg .b32 %x; ld.param.b32 %x, [x]; add.u32 %x, %x, 1; st.param.b32 [r], %x; ret; }
        .visible .func (.param .b32 r) other(.param .b32 x);
        .alias other, one;
        .weak .func stop() .noreturn { trap; }";
    let got = run(outside).per_thread(
        "{ .param .b32 a; .param .b32 b; st.param.b32 [a], %lane; call.uni (b), other, (a); ld.param.b32 %r3, [b]; }
         setp.gt.u32 %p, %r3, 100; @%p call stop; st.global.u32 [%out], %r3;",
    );
    assert_eq!(got, (1..=32).collect::<Vec<u32>>());
}

#[test]
fn a_large_function_is_called_rather_than_expanded() {
    // 3000 additions of one, called from three places: each call counts them all.
    let many = "add.u32 %x, %x, 1;\n".repeat(3000);
    let outside = format!(
        ".func (.param .b32 r) many(.param .b32 x) {{ .reg .b32 %x; ld.param.b32 %x, [x]; {many} st.param.b32 [r], %x; ret; }}"
    );
    let call =
        "{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r3; call.uni (b), many, (a); ld.param.b32 %r3, [b]; }";
    let got = run(&outside).per_thread(&format!("mov.u32 %r3, %lane; {call} {call} {call} st.global.u32 [%out], %r3;"));
    assert_eq!(got, (0..32).map(|l| l + 9000).collect::<Vec<u32>>());
}
