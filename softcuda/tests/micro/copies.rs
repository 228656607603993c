//! `cp.async` (PTX ISA 9.7.9.25): late landing, groups, zero fill.

use crate::device::{Buffer, Run};

/// Copies 16 bytes per lane with `copy`, then `before`, a read of the last word of each lane's 16 bytes, and the same after
/// `wait`.
fn two_reads(copy: &str, wait: &str) -> (Vec<u32>, Vec<u32>) {
    let input: Vec<u32> = (0..128).map(|i| 1000 + i).collect();
    let source = Buffer::new(&input);
    let out = Buffer::new(&[0u32; 64]);
    Run::default()
        .run(
            &format!(
                ".reg .pred %p; .reg .b64 %i, %o; .reg .b32 %t, %s, %v, %n; .shared .align 16 .b8 s[512];
                 ld.param.u64 %i, [p0]; ld.param.u64 %o, [p1]; mov.u32 %t, %tid.x; mov.u32 %s, s; mad.lo.u32 %s, %t, 16, %s;
                 mad.wide.u32 %i, %t, 16, %i; mad.wide.u32 %o, %t, 8, %o; st.shared.u32 [%s+12], 5; setp.lt.u32 %p, %t, 16;
                 {copy}
                 ld.shared.u32 %v, [%s+12]; st.global.u32 [%o], %v;
                 {wait}
                 ld.shared.u32 %v, [%s+12]; st.global.u32 [%o+4], %v; ret;"
            ),
            &[source.address, out.address],
        )
        .unwrap();
    let got: Vec<u32> = out.read();
    (got.iter().step_by(2).copied().collect(), got.iter().skip(1).step_by(2).copied().collect())
}

const POISON: u32 = u32::MAX;

fn landed() -> Vec<u32> {
    (0..32).map(|t| 1003 + 4 * t).collect()
}

#[test]
fn data_is_there_after_the_wait_and_not_before() {
    let copy = "cp.async.cg.shared.global [%s], [%i], 16; cp.async.commit_group;";
    assert_eq!(two_reads(copy, "cp.async.wait_group 0;"), (vec![POISON; 32], landed()));
    assert_eq!(two_reads(copy, "cp.async.wait_all;"), (vec![POISON; 32], landed()));
    // One group may stay in flight.
    assert_eq!(two_reads(copy, "cp.async.wait_group 1;"), (vec![POISON; 32], vec![POISON; 32]));
    // Never committed: a wait for groups does not cover it, a wait for all does.
    let loose = "cp.async.cg.shared.global [%s], [%i], 16;";
    assert_eq!(two_reads(loose, "cp.async.wait_group 0;").1, vec![POISON; 32]);
    assert_eq!(two_reads(loose, "cp.async.wait_all;").1, landed());
    // An empty group counts as one.
    let two = "cp.async.cg.shared.global [%s], [%i], 16; cp.async.commit_group; cp.async.commit_group;";
    assert_eq!(two_reads(two, "cp.async.wait_group 1;").1, landed());
}

#[test]
fn small_copies_and_predicates() {
    let ca = "cp.async.ca.shared.global.L2::128B [%s+12], [%i+12], 4; cp.async.ca.shared.global [%s], [%i], 8;";
    assert_eq!(two_reads(ca, "cp.async.wait_all;"), (vec![POISON; 32], landed()));
    let half = "@%p cp.async.cg.shared.global [%s], [%i], 16;";
    let want: Vec<u32> = landed().into_iter().enumerate().map(|(t, v)| if t < 16 { v } else { 5 }).collect();
    assert_eq!(two_reads(half, "cp.async.wait_all;").1, want);
}

#[test]
fn zero_fill() {
    // 12 of 16 bytes are read: the last word is zero.
    assert_eq!(two_reads("cp.async.cg.shared.global [%s], [%i], 16, 12;", "cp.async.wait_all;").1, vec![0; 32]);
    let sized = "selp.u32 %n, 16, 0, %p; cp.async.cg.shared.global [%s], [%i], 16, %n;";
    let want: Vec<u32> = landed().into_iter().enumerate().map(|(t, v)| if t < 16 { v } else { 0 }).collect();
    assert_eq!(two_reads(sized, "cp.async.wait_all;").1, want);
    let ignored = "cp.async.cg.shared.global [%s], [%i], 16, !%p;";
    assert_eq!(two_reads(ignored, "cp.async.wait_all;").1, want);
    // A source of which nothing is read may be anywhere.
    let nowhere = "selp.u32 %n, 16, 0, %p; selp.b64 %i, %i, 0, %p; cp.async.cg.shared.global [%s], [%i], 16, %n;";
    assert_eq!(two_reads(nowhere, "cp.async.wait_all;").1, want);
}

#[test]
fn the_source_is_read_when_the_copy_lands() {
    let changed = "cp.async.cg.shared.global [%s], [%i], 16; st.global.u32 [%i+12], %t;";
    assert_eq!(two_reads(changed, "cp.async.wait_all;").1, (0..32).collect::<Vec<_>>());
}
