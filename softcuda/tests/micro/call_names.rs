//! Names across a call (PTX ISA 7.1, 9.7.12.5): arguments belong to the caller's scope, the body's names to the function's, and
//! parameters are passed by value.

use crate::device::{Run, lower, module};

fn run(outside: &str, body: &str) -> Vec<u32> {
    Run { outside: outside.into(), ..Run::default() }.per_thread(body)
}

/// Makes a function that keeps a body of its own of one that is expanded in place: its address is a value.
fn by_address(name: &str) -> String {
    format!("\n.global .align 8 .u64 table[1] = {{{name}}};")
}

#[test]
fn register_arguments_with_the_names_of_formals() {
    let subtract = ".func (.reg .b32 r) subtract(.reg .b32 a, .reg .b32 b) { sub.u32 r, a, b; ret; }";
    for outside in [subtract.to_owned(), subtract.to_owned() + &by_address("subtract")] {
        let got = run(
            &outside,
            ".reg .b32 a, b, r; mov.u32 a, %lane; mov.u32 b, 100; call (r), subtract, (b, a);
             call (a), subtract, (r, a); mad.lo.u32 a, a, 1000, b; st.global.u32 [%out], a;",
        );
        assert_eq!(got, (0..32).map(|l| (100 - l - l) * 1000 + 100).map(|x: i32| x as u32).collect::<Vec<_>>());
    }
}

#[test]
fn variables_as_arguments_with_the_names_of_formals() {
    let subtract = "
        .func (.param .b32 r) subtract(.param .b32 a, .param .b32 b) {
            .reg .b32 %a, %b; ld.param.b32 %a, [a]; ld.param.b32 %b, [b]; sub.u32 %a, %a, %b; st.param.b32 [r], %a; ret;
        }";
    for outside in [subtract.to_owned(), subtract.to_owned() + &by_address("subtract")] {
        let got = run(
            &outside,
            "{ .param .b32 a; .param .b32 b; .param .b32 r; st.param.b32 [a], %lane; st.param.b32 [b], 100;
               call (r), subtract, (b, a); ld.param.b32 %r2, [r]; }
             st.global.u32 [%out], %r2;",
        );
        assert_eq!(got, (0..32).map(|l| 100 - l).collect::<Vec<u32>>());
    }
}

#[test]
fn one_variable_for_an_argument_and_a_result() {
    // The result is written before the argument is read.
    let next = "
        .func (.param .b32 r, .param .b32 s) next(.param .b32 a, .param .b32 b) {
            .reg .b32 %a, %b; st.param.b32 [r], 7; st.param.b32 [s], 9; ld.param.b32 %a, [a]; ld.param.b32 %b, [b];
            add.u32 %a, %a, %b; st.param.b32 [r], %a; ret;
        }";
    for outside in [next.to_owned(), next.to_owned() + &by_address("next")] {
        let got = run(
            &outside,
            "{ .param .b32 x; .param .b32 y; st.param.b32 [x], %lane; call (x, y), next, (x, x);
               ld.param.b32 %r2, [x]; ld.param.b32 %r3, [y]; }
             mad.lo.u32 %r2, %r2, 10, %r3; st.global.u32 [%out], %r2;",
        );
        assert_eq!(got, (0..32).map(|l| 20 * l + 9).collect::<Vec<u32>>());
    }
}

#[test]
fn a_function_called_through_another_with_the_same_names() {
    // x, y and the label mean other things in each function, and in each of the two expansions of the inner one.
    let outside = "
        .func (.reg .b32 x) inner(.reg .b32 y) {
            .reg .pred p; setp.lt.u32 p, y, 10; @p bra DONE; sub.u32 y, y, 10; DONE: add.u32 x, y, 1; ret;
        }
        .func (.reg .b32 x) outer(.reg .b32 y) {
            .reg .pred p; .reg .b32 z; setp.lt.u32 p, y, 5; @p bra DONE; { .reg .b32 y2; call (y2), inner, (y); mov.u32 y, y2; }
            DONE: call (z), inner, (y); mad.lo.u32 x, y, 100, z; ret;
        }";
    let got = run(
        outside,
        ".reg .b32 x, y, z; mov.u32 y, %lane; call (x), outer, (y); call (z), inner, (x); xor.b32 x, z, y; st.global.u32 [%out], x;",
    );
    let inner = |y: u32| if y < 10 { y + 1 } else { y - 10 + 1 };
    let outer = |y: u32| {
        let y = if y < 5 { y } else { inner(y) };
        y * 100 + inner(y)
    };
    assert_eq!(got, (0..32).map(|l| inner(outer(l)) ^ l).collect::<Vec<_>>());
}

#[test]
fn shared_variables_of_one_name_in_two_functions() {
    // On one line, too: each function has its own variable, which all its calls share.
    let outside = ".func (.reg .b32 x) f(.reg .b32 y) { .shared .b32 s; ld.shared.b32 x, [s]; st.shared.b32 [s], y; ret; } \
                   .func (.reg .b32 x) g(.reg .b32 y) { .shared .b32 s; ld.shared.b32 x, [s]; st.shared.b32 [s], y; ret; }";
    let got = run(
        outside,
        "call (%r2), f, (3); call (%r2), g, (4); call (%r2), f, (5); call (%r3), g, (6); mad.lo.u32 %r2, %r2, 10, %r3;
         st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, [34; 32]);
}

#[test]
fn vector_and_wide_registers_as_parameters() {
    let outside = "
        .func (.reg .v2 .b32 r) swap(.reg .v2 .b32 r2) { mov.b32 r.x, r2.y; mov.b32 r.y, r2.x; ret; }
        .func (.reg .b128 r) turn(.reg .b128 a) { .reg .b64 l, h; mov.b128 {l, h}, a; mov.b128 r, {h, l}; ret; }";
    let got = run(
        outside,
        ".reg .v2 .b32 r, r2; .reg .b128 w; mov.b32 r.x, %lane; mov.b32 r.y, 5; call (r2), swap, (r);
         cvt.u64.u32 %rd1, r2.x; cvt.u64.u32 %rd2, r2.y; mov.b128 w, {%rd1, %rd2}; call (w), turn, (w); mov.b128 {%rd1, %rd2}, w;
         shl.b64 %rd1, %rd1, 4; add.u64 %rd1, %rd1, %rd2; cvt.u32.u64 %r2, %rd1; st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, (0..32).map(|l| l * 16 + 5).collect::<Vec<u32>>());
}

#[test]
fn a_function_of_the_module_with_a_name_of_the_system() {
    let outside = ".func (.param .b32 r) vprintf(.param .b64 f, .param .b64 a) { st.param.b32 [r], 42; ret; }";
    let got = run(
        outside,
        "{ .param .b64 f; .param .b64 a; .param .b32 n; st.param.b64 [f], 0; st.param.b64 [a], 0;
           call (n), vprintf, (f, a); ld.param.b32 %r2, [n]; }
         st.global.u32 [%out], %r2;",
    );
    assert_eq!(got, [42; 32]);
}

#[test]
fn what_a_call_cannot_be_given() {
    let wide = ".func (.param .b32 r) wide(.param .b64 a) { st.param.b32 [r], 1; ret; }";
    let writes = ".func (.param .b32 r) writes(.param .b32 a) { st.param.b32 [a], 1; st.param.b32 [r], 1; ret; }";
    let own = |f: &str, name: &str| f.to_owned() + &by_address(name);
    for (outside, name, says) in [
        (wide.to_owned(), "wide", "a variable of 8 bytes, got `x` of 4 bytes"),
        (own(wide, "wide"), "wide", "a variable of 8 bytes, got `x` of 4 bytes"),
        (writes.to_owned(), "writes", "a store to the input parameter `a` of a function"),
        (own(writes, "writes"), "writes", "a store to the input parameter `a` of a function"),
    ] {
        let body = format!("{{ .param .b32 x; .param .b32 y; st.param.b32 [x], 1; call (y), {name}, (x); }} ret;");
        let error = lower(&module(1, &outside, &body)).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
