//! `malloc` and `free` of device code (CUDA programming guide, "Dynamic Global Memory Allocation and Operations").

use std::sync::Arc;

use softcuda::exec::{Config, FaultKind, Heap};

use crate::device::{Run, lower, module};

const OUTSIDE: &str = "
    .extern .func (.param .b64 r) malloc(.param .b64 bytes);
    .extern .func free(.param .b64 block);";

const MALLOC: &str =
    "{ .param .b64 n; .param .b64 b; st.param.b64 [n], %rd1; call.uni (b), malloc, (n); ld.param.b64 %rd2, [b]; }";
const FREE: &str = "{ .param .b64 b; st.param.b64 [b], %rd2; call.uni free, (b); }";

/// A launch whose kernels allocate in this heap.
fn run(heap: &Arc<Heap>) -> Run {
    let config = Config { heap: Arc::clone(heap), ..Run::default().config };
    Run { outside: OUTSIDE.into(), own: true, config, ..Run::default() }
}

fn heap(bytes: u64) -> Arc<Heap> {
    Arc::new(Heap::new(0, bytes))
}

#[test]
fn every_lane_has_a_block_of_its_own() {
    let got = run(&heap(1 << 20)).per_thread(&format!(
        "mov.b64 %rd1, 64; {MALLOC} st.u32 [%rd2+60], %lane; bar.warp.sync -1; ld.u32 %r2, [%rd2+60]; and.b64 %rd3, %rd2, 15;
         cvt.u32.u64 %r3, %rd3; mad.lo.u32 %r2, %r3, 1000, %r2; {FREE} st.global.u32 [%out], %r2;"
    ));
    assert_eq!(got, (0..32).collect::<Vec<u32>>());
}

#[test]
fn blocks_outlive_their_launch() {
    let heap = heap(1 << 20);
    // Lanes that are apart allocate too.
    let first = "setp.lt.u32 %p, %lane, 20; mov.b64 %rd1, 8; mov.b64 %rd2, 0; @!%p bra DONE;";
    run(&heap).per_thread(&format!("{first} {MALLOC} st.u32 [%rd2], %lane; DONE: st.global.u32 [%out], 1;"));
    assert_eq!(heap.take_live().len(), 20);
}

#[test]
fn the_heap_has_an_end() {
    let heap = heap(1000);
    assert!(heap.set_limit(1024));
    // 32 lanes ask for 100 bytes each: nine have room, 112 bytes each. What is freed is room again; null may be freed.
    let body = format!(
        "mov.b64 %rd1, 100; {MALLOC} setp.ne.u64 %p, %rd2, 0; bar.warp.sync -1; vote.sync.ballot.b32 %r2, %p, -1; popc.b32 %r2, %r2;
         {FREE} st.global.u32 [%out], %r2;"
    );
    assert_eq!(run(&heap).per_thread(&body), [9; 32]);
    assert_eq!(run(&heap).per_thread(&body), [9; 32]);
    assert!(!heap.set_limit(4096), "the size is fixed once a kernel has used the heap");
    let nothing = format!("mov.b64 %rd1, 0; {MALLOC} cvt.u32.u64 %r2, %rd2; st.global.u32 [%out], %r2;");
    assert_eq!(run(&heap).per_thread(&nothing), [0; 32]);
    assert_eq!(heap.take_live(), [0u64; 0]);
}

#[test]
fn what_free_is_not_given() {
    let only = "setp.ne.u32 %p, %lane, 7; @%p bra DONE; mov.b64 %rd1, 64;";
    for (body, says) in [
        (format!("{only} {MALLOC} {FREE} {FREE} DONE:"), "no block that `malloc` returned"),
        (format!("{only} {MALLOC} add.u64 %rd2, %rd2, 16; {FREE} DONE:"), "16 bytes into"),
        (format!("{only} mov.b64 %rd2, %out; {FREE} DONE:"), "bytes into"),
        (format!("{only} {MALLOC} {FREE} ld.u32 %r2, [%rd2]; DONE:"), "freed"),
        (format!("{only} {MALLOC} ld.u32 %r2, [%rd2+64]; DONE:"), "past the end"),
    ] {
        let fault = run(&heap(1 << 20)).try_per_thread(&body).unwrap_err();
        assert_eq!(fault.kind, FaultKind::IllegalAddress, "{body}: {fault}");
        assert!(fault.message.contains(says), "{body}: {fault}");
        assert_eq!(fault.thread[0], 7, "{fault}");
    }
    for (body, says) in [
        ("call (%rd1), malloc, (%rd1, %rd2);", "`malloc` takes 1 arguments and returns 1"),
        ("call free;", "`free` takes 1 arguments and returns 0"),
        ("call (%rd1), free, (%rd2);", "`free` takes 1 arguments and returns 0"),
    ] {
        let text = module(1, OUTSIDE, &format!(".reg .b64 %rd<4>; {body} ret;"));
        let error = lower(&text).unwrap_err().to_string();
        assert!(error.contains(says), "{body}: {error}");
    }
}
