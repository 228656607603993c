//! Every instruction belongs to a target and a PTX version (the manual's "Target ISA Notes" and "PTX ISA Notes"): modules for
//! older ones do not have it. Where the variable `PTXAS` names an assembler, it says the same of each sample.

use std::collections::{BTreeMap, BTreeSet};

use softcuda::lower::{Environment, LowerErrorKind, lower_module};

/// Instruction, least target, least version for that target.
const SAMPLES: &[(&str, &str, (u32, u32))] = &[
    ("elect.sync %r0|%p0, -1;", "sm_90", (8, 0)),
    ("ld.relaxed.cluster.u32 %r0, [%d9];", "sm_90", (7, 8)),
    ("atom.acq_rel.cluster.global.add.u32 %r0, [%d9], %r1;", "sm_90", (7, 8)),
    ("isspacep.shared::cluster %p0, %d0;", "sm_90", (7, 8)),
    ("cvta.shared::cta.u64 %d0, %d1;", "sm_80", (7, 8)),
    ("mapa.u64 %d0, %d1, %r0;", "sm_90", (7, 8)),
    ("mov.u32 %r0, %cluster_ctarank;", "sm_90", (7, 8)),
    ("mov.u32 %r0, %nclusterid.y;", "sm_90", (7, 8)),
    ("mov.u32 %r0, %aggr_smem_size;", "sm_90", (8, 1)),
    ("barrier.cluster.arrive.aligned;", "sm_90", (7, 8)),
    ("barrier.cta.sync 0;", "sm_80", (7, 8)),
    ("cvta.param.u64 %d0, %d1;", "sm_80", (7, 7)),
    ("ld.global.L1::no_allocate.u32 %r0, [%d9];", "sm_80", (7, 4)),
    ("ld.global.L2::128B.u32 %r0, [%d9];", "sm_80", (7, 4)),
    ("ld.global.L2::cache_hint.u32 %r0, [%d9], %d1;", "sm_80", (7, 4)),
    ("st.global.L2::cache_hint.u32 [%d9], %r0, %d1;", "sm_80", (7, 4)),
    ("ld.mmio.relaxed.sys.global.u32 %r0, [%d9];", "sm_80", (8, 2)),
    ("createpolicy.fractional.L2::evict_last.b64 %d0;", "sm_80", (7, 4)),
    ("applypriority.global.L2::evict_normal [%d9], 128;", "sm_80", (7, 4)),
    ("discard.global.L2 [%d9], 128;", "sm_80", (7, 4)),
    ("prefetch.global.L2::evict_last [%d9];", "sm_80", (7, 4)),
    ("mov.b128 %q0, {%d0, %d1};", "sm_80", (8, 3)),
    ("ld.global.b128 %q0, [%d9];", "sm_80", (8, 3)),
    ("st.relaxed.sys.global.b128 [%d9], %q0;", "sm_80", (8, 4)),
    ("atom.global.exch.b128 %q0, [%d9], %q1;", "sm_90", (8, 3)),
    ("atom.relaxed.sys.global.cas.b128 %q0, [%d9], %q1, %q2;", "sm_90", (8, 4)),
    ("atom.global.add.v2.f32 {%r0, %r1}, [%d9], {%r2, %r3};", "sm_90", (8, 1)),
    ("red.global.max.noftz.v4.bf16x2 [%d9], {%r0, %r1, %r2, %r3};", "sm_90", (8, 1)),
    ("atom.global.add.noftz.bf16 %h0, [%d9], %h1;", "sm_90", (7, 8)),
    ("add.bf16 %h0, %h1, %h2;", "sm_90", (7, 8)),
    ("mul.bf16x2 %r0, %r1, %r2;", "sm_90", (7, 8)),
    ("add.s16x2 %r0, %r1, %r2;", "sm_90", (8, 0)),
    ("min.u16x2 %r0, %r1, %r2;", "sm_90", (8, 0)),
    ("max.relu.s32 %r0, %r1, %r2;", "sm_90", (8, 0)),
    ("min.xorsign.abs.f32 %r0, %r1, %r2;", "sm_86", (7, 2)),
    ("max.xorsign.abs.bf16x2 %r0, %r1, %r2;", "sm_86", (7, 2)),
    ("max.NaN.f32 %r0, %r1, %r2;", "sm_80", (7, 0)),
    ("min.f16x2 %r0, %r1, %r2;", "sm_80", (7, 0)),
    ("abs.bf16 %h0, %h1;", "sm_80", (7, 0)),
    ("fma.rn.bf16 %h0, %h1, %h2, %h3;", "sm_80", (7, 0)),
    ("fma.rn.relu.f16 %h0, %h1, %h2, %h3;", "sm_80", (7, 0)),
    ("fma.rn.oob.f16x2 %r0, %r1, %r2, %r3;", "sm_90", (8, 1)),
    ("ex2.approx.ftz.bf16 %h0, %h1;", "sm_90", (7, 8)),
    ("tanh.approx.bf16x2 %r0, %r1;", "sm_90", (7, 8)),
    ("setp.eq.bf16 %p0, %h1, %h2;", "sm_90", (7, 8)),
    ("set.eq.bf16.f32 %h0, %r1, %r2;", "sm_90", (7, 8)),
    ("set.lt.u32.bf16x2 %r0, %r1, %r2;", "sm_90", (7, 8)),
    ("lop3.or.b32 %r0|%p0, %r1, %r2, %r3, 63, %p1;", "sm_80", (8, 2)),
    ("szext.clamp.u32 %r0, %r1, %r2;", "sm_80", (7, 6)),
    ("bmsk.wrap.b32 %r0, %r1, %r2;", "sm_80", (7, 6)),
    ("cvt.rn.satfinite.e4m3x2.f32 %h0, %r1, %r2;", "sm_89", (8, 1)),
    ("cvt.rn.f16x2.e5m2x2 %r0, %h1;", "sm_89", (8, 1)),
    ("cvt.rn.bf16.f32 %h0, %r1;", "sm_80", (7, 0)),
    ("cvt.ftz.f32.bf16 %r0, %h1;", "sm_90", (7, 8)),
    ("mbarrier.init.shared.b64 [%r9], 1;", "sm_80", (7, 0)),
    ("mbarrier.try_wait.shared.b64 %p0, [%r9], %d0;", "sm_90", (7, 8)),
    ("mbarrier.arrive.expect_tx.shared.b64 %d0, [%r9], %r0;", "sm_90", (8, 0)),
    ("fence.proxy.async;", "sm_90", (8, 0)),
    ("cp.async.bulk.commit_group;", "sm_90", (8, 0)),
    ("cp.async.bulk.global.shared::cta.bulk_group [%d9], [%r9], %r0;", "sm_90", (8, 0)),
    ("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r9], [%d9], %r0, [%r8];", "sm_90", (8, 6)),
    ("cvt.f32.bf16 %r0, %h1;", "sm_80", (7, 1)),
    ("cvt.rn.bf16.s32 %h0, %r1;", "sm_90", (7, 8)),
    ("cvt.rzi.u32.bf16 %r0, %h1;", "sm_90", (7, 8)),
    ("cvt.rn.bf16.f64 %h0, %d1;", "sm_90", (7, 8)),
    ("cvt.rn.relu.bf16x2.f32 %r0, %r1, %r2;", "sm_80", (7, 0)),
    ("cvt.rn.satfinite.f16.f32 %h0, %r1;", "sm_80", (8, 1)),
    ("cvt.rn.satfinite.bf16x2.f32 %r0, %r1, %r2;", "sm_80", (8, 1)),
    ("cvt.rna.tf32.f32 %r0, %r1;", "sm_80", (7, 0)),
    ("cvt.rna.satfinite.tf32.f32 %r0, %r1;", "sm_80", (8, 1)),
    ("cvt.rn.tf32.f32 %r0, %r1;", "sm_90", (7, 8)),
    ("redux.sync.add.u32 %r0, %r1, -1;", "sm_80", (7, 0)),
    ("fence.acquire.gpu;", "sm_90", (8, 6)),
    ("cp.async.ca.shared.global [%r9], [%d9], 16;", "sm_80", (7, 0)),
    ("cp.async.cg.shared.global.L2::256B [%r9], [%d9], 16;", "sm_80", (7, 4)),
    ("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r9], {%r0, %r1};", "sm_90", (7, 8)),
    ("wgmma.fence.sync.aligned;", "sm_90a", (8, 0)),
];

/// Versions in order, as far as a sample's refusal needs them.
const VERSIONS: &[(u32, u32)] = &[
    (6, 3),
    (6, 5),
    (7, 0),
    (7, 1),
    (7, 2),
    (7, 3),
    (7, 4),
    (7, 5),
    (7, 6),
    (7, 7),
    (7, 8),
    (8, 0),
    (8, 1),
    (8, 2),
    (8, 3),
    (8, 4),
    (8, 5),
    (8, 6),
    (8, 7),
    (8, 8),
];
const NEWEST: (u32, u32) = (8, 8);

/// The target before, and the first version that knows a target.
fn before(target: &str) -> &str {
    match target {
        "sm_90a" => "sm_90",
        "sm_90" => "sm_89",
        "sm_89" => "sm_86",
        "sm_86" => "sm_80",
        _ => "sm_75",
    }
}

fn first_version(target: &str) -> (u32, u32) {
    match target {
        "sm_90a" => (8, 0),
        "sm_90" | "sm_89" => (7, 8),
        "sm_86" => (7, 1),
        "sm_80" => (7, 0),
        _ => (6, 3),
    }
}

fn module(target: &str, (major, minor): (u32, u32), body: &str) -> String {
    let wide = if (major, minor) >= (8, 3) { ".reg .b128 %q<4>;" } else { "" };
    format!(
        ".version {major}.{minor}\n.target {target}\n.address_size 64\n.visible .entry k() {{
.reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<10>; .reg .b64 %d<10>; {wide}
{body}
ret; }}\n"
    )
}

fn lowered(target: &str, version: (u32, u32), instruction: &str) -> Result<(), LowerErrorKind> {
    let parsed = softcuda::ptx::parse(&module(target, version, instruction)).unwrap();
    let environment = Environment { compute_capability: (9, 0), ..Environment::default() };
    lower_module(&parsed, &environment).map(|_| ()).map_err(|e| e.kind)
}

/// Instruction, target, version.
type Refused = (&'static str, &'static str, (u32, u32));

/// What each sample is refused as: for the target before, and in the version before.
fn refusals() -> (Vec<Refused>, Vec<Refused>) {
    let mut versions = Vec::new();
    for &(instruction, target, since) in SAMPLES {
        let at = VERSIONS.iter().position(|&v| v == since).unwrap();
        // Where no older version knows the target, or has the registers, there is nothing to refuse.
        if at > 0 && VERSIONS[at - 1] >= first_version(target) && !(instruction.contains("%q") && since == (8, 3)) {
            versions.push((instruction, target, VERSIONS[at - 1]));
        }
    }
    (SAMPLES.iter().map(|&(instruction, target, _)| (instruction, before(target), NEWEST)).collect(), versions)
}

/// What is older than sm_80 in the target but not in the hint: these samples only have a version.
fn has_target(instruction: &str) -> bool {
    const ANY: &[&str] = &[
        "cvta.",
        "barrier.cta",
        "ld.global.L1",
        "ld.global.L2::128B",
        "ld.mmio",
        "mov.b128",
        "ld.global.b128",
        "st.relaxed",
        "lop3",
        "szext",
        "bmsk",
        "cvt.rn.satfinite.f16.f32",
    ];
    !ANY.iter().any(|start| instruction.starts_with(start))
}

#[test]
fn modules_have_what_their_target_and_version_have() {
    for &(instruction, target, since) in SAMPLES {
        let accepted = lowered(target, since, instruction);
        assert!(accepted.is_ok(), "{instruction} for {target} in {since:?}: {accepted:?}");
    }
    let (targets, versions) = refusals();
    for (instruction, target, version) in targets.into_iter().filter(|(i, ..)| has_target(i)) {
        let refused = lowered(target, version, instruction);
        assert!(matches!(refused, Err(LowerErrorKind::Target { .. })), "{instruction} for {target}: {refused:?}");
    }
    for (instruction, target, version) in versions {
        let refused = lowered(target, version, instruction);
        assert!(matches!(refused, Err(LowerErrorKind::Version { .. })), "{instruction} in {version:?}: {refused:?}");
    }
    let error = lowered("sm_80", (8, 0), "elect.sync %r0|%p0, -1;").unwrap_err().to_string();
    assert_eq!(error, "`elect.sync` requires target sm_90 or higher; the module is for sm_80");
    let error = lowered("sm_90", (7, 8), "elect.sync %r0|%p0, -1;").unwrap_err().to_string();
    assert_eq!(error, "`elect.sync` requires PTX 8.0 or later; the module is PTX 7.8");
    // A target that the version does not know yet.
    let error = lowered("sm_90", (7, 0), "ret;").unwrap_err().to_string();
    assert_eq!(error, "target `sm_90` requires PTX 7.8 or later; the module is PTX 7.0");
}

#[test]
fn ptxas_says_the_same() {
    let Some(ptxas) = std::env::var_os("PTXAS").filter(|path| !path.is_empty() && path != "none") else {
        eprintln!("PTXAS is not set: not checked");
        return;
    };
    let file = std::env::temp_dir().join(format!("softcuda-targets-{}.ptx", std::process::id()));
    // Lines that it finds fault with, of one module.
    let faults = |target: &str, version, lines: &BTreeSet<&str>| -> BTreeSet<usize> {
        let text = module(target, version, &lines.iter().copied().collect::<Vec<_>>().join("\n"));
        std::fs::write(&file, text).unwrap();
        let arch = format!("-arch={target}");
        let run =
            std::process::Command::new(&ptxas).args([&arch, "-O1", "-o", "/dev/null"]).arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        let numbers = said
            .lines()
            .filter(|l| l.contains("; error"))
            .filter_map(|l| l.split("line ").nth(1)?.split(';').next()?.parse().ok());
        let found: BTreeSet<usize> = numbers.collect();
        assert_eq!(run.status.success(), found.is_empty(), "{target} {version:?}: {said}");
        // The body begins on line 6.
        found.into_iter().map(|line| line - 6).collect()
    };
    let mut accepted: BTreeMap<_, BTreeSet<&str>> = BTreeMap::new();
    let mut refused: BTreeMap<_, BTreeSet<&str>> = BTreeMap::new();
    for &(instruction, target, since) in SAMPLES {
        accepted.entry((target, since)).or_default().insert(instruction);
    }
    let (targets, versions) = refusals();
    for (instruction, target, version) in targets.into_iter().filter(|(i, ..)| has_target(i)) {
        refused.entry((target, version)).or_default().insert(instruction);
    }
    for (instruction, target, version) in versions {
        refused.entry((target, version)).or_default().insert(instruction);
    }
    for ((target, version), lines) in accepted {
        let found = faults(target, version, &lines);
        let wrong: Vec<_> = lines.iter().enumerate().filter(|(i, _)| found.contains(i)).collect();
        assert!(wrong.is_empty(), "{target} {version:?} refuses {wrong:?}");
    }
    for ((target, version), lines) in refused {
        let found = faults(target, version, &lines);
        let wrong: Vec<_> = lines.iter().enumerate().filter(|(i, _)| !found.contains(i)).collect();
        assert!(wrong.is_empty(), "{target} {version:?} accepts {wrong:?}");
    }
    std::fs::remove_file(&file).unwrap();
}

/// Target, and the first PTX version that knows it (PTX ISA 12).
const TARGETS: &[(&str, (u32, u32))] = &[
    ("sm_10", (1, 0)),
    ("sm_13", (1, 2)),
    ("sm_20", (2, 0)),
    ("sm_30", (3, 0)),
    ("sm_32", (4, 0)),
    ("sm_35", (3, 1)),
    ("sm_37", (4, 1)),
    ("sm_50", (4, 0)),
    ("sm_52", (4, 1)),
    ("sm_53", (4, 2)),
    ("sm_60", (5, 0)),
    ("sm_61", (5, 0)),
    ("sm_62", (5, 0)),
    ("sm_70", (6, 0)),
    ("sm_72", (6, 1)),
    ("sm_75", (6, 3)),
    ("sm_80", (7, 0)),
    ("sm_86", (7, 1)),
    ("sm_87", (7, 4)),
    ("sm_88", (9, 0)),
    ("sm_89", (7, 8)),
    ("sm_90", (7, 8)),
    ("sm_90a", (8, 0)),
    ("sm_100", (8, 6)),
    ("sm_103", (8, 8)),
    ("sm_110", (9, 0)),
    ("sm_120", (8, 7)),
    ("sm_121", (8, 8)),
];

#[test]
fn every_target_has_its_first_version() {
    let lowered = |target: &str, (major, minor): (u32, u32)| {
        let text = format!(".version {major}.{minor}\n.target {target}\n.entry k() {{ exit; }}\n");
        let digits: u32 = target.trim_end_matches('a')[3..].parse().unwrap();
        let environment = Environment { compute_capability: (digits / 10, digits % 10), ..Environment::default() };
        lower_module(&softcuda::ptx::parse(&text).unwrap(), &environment).map(|_| ()).map_err(|e| e.to_string())
    };
    // Every version there was.
    let minors = [5, 3, 2, 3, 1, 5, 8, 8, 5];
    let versions = (1..).zip(minors).flat_map(|(major, most)| (0..=most).map(move |minor| (major, minor)));
    for version in versions.filter(|v| *v != (5, 2)) {
        for &(target, since) in TARGETS {
            let found = lowered(target, version);
            assert_eq!(found.is_ok(), version >= since, "{target} in {version:?}: {found:?}");
            if let Err(text) = found {
                assert!(text.contains(&format!("requires PTX {}.{} or later", since.0, since.1)), "{text}");
            }
        }
    }
}

/// Instruction, least target, least version for that target: what is older than sm_75.
const OLD: &[(&str, &str, (u32, u32))] = &[
    ("shfl.sync.idx.b32 %r0, %r1, 0, 31, -1;", "sm_30", (6, 0)),
    ("vote.sync.all.pred %p0, %p1, -1;", "sm_30", (6, 0)),
    ("match.any.sync.b32 %r0, %r1, -1;", "sm_70", (6, 0)),
    ("activemask.b32 %r0;", "sm_30", (6, 2)),
    ("barrier.sync 0;", "sm_30", (6, 0)),
    ("bar.warp.sync -1;", "sm_30", (6, 0)),
    ("bar.sync 0;", "sm_20", (2, 3)),
    ("fence.acq_rel.gpu;", "sm_70", (6, 0)),
    ("ld.relaxed.gpu.global.u32 %r0, [%d9];", "sm_70", (6, 0)),
    ("st.release.sys.global.u32 [%d9], %r0;", "sm_70", (6, 0)),
    ("ld.weak.global.u32 %r0, [%d9];", "sm_70", (6, 0)),
    ("atom.global.add.f64 %f0, [%d9], %f1;", "sm_60", (5, 0)),
    ("atom.global.add.f32 %r0, [%d9], %r1;", "sm_20", (2, 3)),
    ("atom.global.min.s64 %d0, [%d9], %d1;", "sm_32", (4, 0)),
    ("atom.global.add.noftz.f16x2 %r0, [%d9], %r1;", "sm_60", (6, 2)),
    ("atom.global.add.noftz.f16 %h0, [%d9], %h1;", "sm_70", (6, 3)),
    ("atom.global.cas.b16 %h0, [%d9], %h1, %h2;", "sm_70", (6, 3)),
    ("atom.cta.global.add.u32 %r0, [%d9], %r1;", "sm_60", (5, 0)),
    ("dp4a.u32.u32 %r0, %r1, %r2, %r3;", "sm_61", (5, 0)),
    ("lop3.b32 %r0, %r1, %r2, %r3, 63;", "sm_50", (4, 3)),
    ("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", "sm_32", (4, 0)),
    ("nanosleep.u32 100;", "sm_70", (6, 2)),
    ("fma.rn.f16 %h0, %h1, %h2, %h3;", "sm_53", (4, 2)),
    ("neg.f16 %h0, %h1;", "sm_53", (6, 0)),
    ("abs.f16x2 %r0, %r1;", "sm_53", (6, 5)),
    ("ld.global.nc.u32 %r0, [%d9];", "sm_32", (4, 0)),
    ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r9];", "sm_75", (6, 5)),
    ("movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r1;", "sm_75", (7, 8)),
    ("mad.lo.cc.u32 %r0, %r1, %r2, %r3;", "sm_20", (3, 0)),
    ("add.cc.u64 %d0, %d1, %d2;", "sm_20", (4, 3)),
    ("isspacep.const %p0, %d0;", "sm_20", (3, 1)),
    ("mov.u64 %d0, %globaltimer;", "sm_30", (3, 1)),
    ("mov.u32 %r0, %dynamic_smem_size;", "sm_20", (4, 1)),
    ("mov.u32 %r0, %clock_hi;", "sm_20", (5, 0)),
    ("mov.u32 %r0, %laneid;", "sm_20", (2, 3)),
    ("popc.b32 %r0, %r1;", "sm_20", (2, 3)),
];

#[test]
fn instructions_of_old_targets() {
    let environment = Environment { compute_capability: (8, 0), ..Environment::default() };
    let lowered = |instruction: &str, target: &str, (major, minor): (u32, u32)| {
        let text = format!(
            ".version {major}.{minor}\n.target {target}\n.address_size 64\n.entry k() {{ .reg .pred %p<4>; .reg .b16 %h<8>;
             .reg .b32 %r<10>; .reg .b64 %d<10>; .reg .f64 %f<4>;\n{instruction}\n ret; }}\n"
        );
        lower_module(&softcuda::ptx::parse(&text).unwrap(), &environment).map(|_| ())
    };
    let old = [
        (2, 3),
        (3, 0),
        (3, 1),
        (4, 0),
        (4, 1),
        (4, 2),
        (4, 3),
        (5, 0),
        (6, 0),
        (6, 1),
        (6, 2),
        (6, 3),
        (6, 5),
        (7, 8),
    ];
    for &(instruction, least, since) in OLD {
        for version in old {
            for (target, _) in TARGETS.iter().filter(|(t, v)| *v <= version && *t >= "sm_20" && *t <= "sm_80") {
                // Some came earlier to later targets of their time.
                if *target > least && version < since {
                    continue;
                }
                let found = lowered(instruction, target, version);
                let there = *target >= least && version >= since;
                assert_eq!(found.is_ok(), there, "{instruction} on {target} in {version:?}: {found:?}");
            }
        }
    }
    // Votes and shuffles without a mask: of old targets, and of later ones until PTX 6.4.
    for instruction in [
        "vote.all.pred %p0, %p1;",
        "vote.ballot.b32 %r0, !%p1;",
        "shfl.idx.b32 %r0, %r1, 0, 31;",
        "shfl.up.b32 %r0|%p0, %r1, 1, 0;",
    ] {
        for (target, version, there) in [
            ("sm_60", (5, 0), true),
            ("sm_60", (7, 8), true),
            ("sm_70", (6, 3), true),
            ("sm_70", (6, 5), false),
            ("sm_80", (7, 0), false),
        ] {
            let found = lowered(instruction, target, version);
            assert_eq!(found.is_ok(), there, "{instruction} on {target} in {version:?}: {found:?}");
        }
    }
}
