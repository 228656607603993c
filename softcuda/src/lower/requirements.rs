//! What target and PTX version each instruction asks for: the manual's "PTX ISA Notes" and "Target ISA Notes" as a table.
//!
//! Rows name what came after sm_20 and PTX 2.3; what is older is taken for granted. `tests/targets.rs` holds samples of the
//! rows against `ptxas`.

use std::collections::HashMap;
use std::sync::LazyLock;

use super::LowerErrorKind;
use crate::ptx::ast::{Instruction, Operand};

/// The target of a module: its number, and whether it has the suffix `a`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub number: u32,
    pub specific: bool,
}

impl Target {
    /// `sm_90`, `sm_90a`; `None` for what is no target.
    pub fn parse(name: &str) -> Option<Self> {
        let digits = name.strip_prefix("sm_")?.trim_end_matches(['a', 'f']);
        Some(Self { number: digits.parse().ok()?, specific: name.ends_with('a') })
    }

    /// The first PTX version that knows the target (PTX ISA 12, "Supported Features by PTX Version"; `tests/targets.rs` asks
    /// `ptxas`, which knows sm_70 since 5.1, a version that was never released).
    pub fn version(self) -> (u32, u32) {
        match (self.number, self.specific) {
            (..12, _) => (1, 0),
            (..20, _) => (1, 2),
            (..30, _) => (2, 0),
            (30, _) => (3, 0),
            (35, _) => (3, 1),
            (37 | 52, _) => (4, 1),
            (31..=50, _) => (4, 0),
            (..60, _) => (4, 2),
            (..70, _) => (5, 0),
            (70..72, _) => (6, 0),
            (72..75, _) => (6, 1),
            (75..80, _) => (6, 3),
            (80..86, _) => (7, 0),
            (86, _) => (7, 1),
            (87, _) => (7, 4),
            (88, _) => (9, 0),
            (89, _) => (7, 8),
            (90..100, false) => (7, 8),
            (90..100, true) => (8, 0),
            (100..103, _) => (8, 6),
            (103 | 121, _) => (8, 8),
            (110, _) => (9, 0),
            (120, _) => (8, 7),
            _ => (8, 8),
        }
    }
}

/// An instruction with all of some modifiers. Alternatives stand between bars, `*` at an end matches the rest.
struct Row {
    opcodes: &'static str,
    modifiers: &'static [&'static str],
    /// Least target; 901 is sm_90a alone.
    target: u32,
    version: (u32, u32),
}

/// The suffix `a`: the instruction is on that target and no other.
const ONLY_90A: u32 = 901;

const fn row(opcodes: &'static str, modifiers: &'static [&'static str], target: u32, version: (u32, u32)) -> Row {
    Row { opcodes, modifiers, target, version }
}

const HALVES: &str = "f16|f16x2|bf16|bf16x2";
const BF16: &str = "bf16|bf16x2";

static ROWS: &[Row] = &[
    // Before sm_75
    row("shfl", &[], 30, (3, 0)),
    row("shfl|vote", &["sync"], 30, (6, 0)),
    row("bar", &["warp"], 30, (6, 0)),
    row("barrier", &[], 30, (6, 0)),
    row("match", &[], 70, (6, 0)),
    row("activemask", &[], 30, (6, 2)),
    row("nanosleep", &[], 70, (6, 2)),
    row("fence", &[], 70, (6, 0)),
    row("ld|st", &["weak|relaxed|acquire|release"], 70, (6, 0)),
    row("atom|red", &["relaxed|acquire|release|acq_rel"], 70, (6, 0)),
    row("atom|red", &["cta|gpu|sys"], 60, (5, 0)),
    row("atom|red", &["add", "f64"], 60, (5, 0)),
    row("atom|red", &["min|max|and|or|xor", "u64|s64|b64"], 32, (3, 1)),
    row("atom|red", &["f16x2"], 60, (6, 2)),
    row("atom|red", &["f16"], 70, (6, 3)),
    row("atom", &["cas", "b16"], 70, (6, 3)),
    row("ld", &["nc"], 32, (3, 1)),
    row("dp4a|dp2a", &[], 61, (5, 0)),
    row("lop3", &[], 50, (4, 3)),
    row("shf", &[], 32, (3, 1)),
    row("add|sub|mul|fma|set|setp", &["f16|f16x2"], 53, (4, 2)),
    row("neg", &["f16|f16x2"], 53, (6, 0)),
    row("abs", &["f16|f16x2"], 53, (6, 5)),
    row("mad", &["cc"], 20, (3, 0)),
    row("madc", &[], 20, (3, 0)),
    row("add|addc|sub|subc|mad|madc", &["cc", "u64|s64"], 20, (4, 3)),
    row("addc|subc|madc", &["u64|s64"], 20, (4, 3)),
    row("cvta|isspacep", &["const"], 20, (3, 1)),
    row("pmevent", &["mask"], 20, (3, 0)),
    row("mma", &[], 70, (6, 4)),
    row("mma", &["m16n8k8|m8n8k16|m8n8k32|m8n8k128"], 75, (6, 5)),
    row("ldmatrix", &[], 75, (6, 5)),
    row("movmatrix", &[], 75, (7, 8)),
    // Scopes, spaces, hints (9.7.9, 9.7.13)
    row("ld|st|atom|red|fence", &["cluster"], 90, (7, 8)),
    row("*", &["*::cluster"], 90, (7, 8)),
    row("*", &["*::cta"], 0, (7, 8)),
    row("*", &["param::*"], 0, (8, 3)),
    row("ld|st", &["L1::*"], 70, (7, 4)),
    row("ld|cp", &["L2::64B|L2::128B"], 75, (7, 4)),
    row("ld|cp", &["L2::256B"], 80, (7, 4)),
    row("*", &["L2::cache_hint"], 80, (7, 4)),
    row("prefetch", &["L2::evict_last|L2::evict_normal"], 80, (7, 4)),
    row("applypriority|discard|createpolicy", &[], 80, (7, 4)),
    row("ld|st", &["mmio"], 70, (8, 2)),
    row("ld|st", &["volatile", "local"], 0, (9, 1)),
    row("ld|ldu|st|mov", &["b128"], 70, (8, 3)),
    row("ld|st", &["b128", "sys"], 70, (8, 4)),
    row("atom", &["b128"], 90, (8, 3)),
    row("atom", &["b128", "sys"], 90, (8, 4)),
    row("atom|red", &["v2|v4|v8"], 90, (8, 1)),
    row("atom|red", &[BF16], 90, (7, 8)),
    row("cvta|isspacep", &["param|param::entry"], 70, (7, 7)),
    // Arithmetic (9.7.1 to 9.7.4)
    row("add|sub|mul", &[BF16], 90, (7, 8)),
    row("add|min|max", &["u16x2|s16x2"], 90, (8, 0)),
    row("min|max", &["relu"], 90, (8, 0)),
    row("min|max", &[HALVES], 80, (7, 0)),
    row("min|max", &["NaN"], 80, (7, 0)),
    row("min|max", &["xorsign"], 86, (7, 2)),
    row("abs|neg|fma", &[BF16], 80, (7, 0)),
    row("fma", &["relu"], 80, (7, 0)),
    row("fma", &["oob"], 90, (8, 1)),
    row("ex2|tanh", &[BF16], 90, (7, 8)),
    row("ex2|tanh", &["f16|f16x2"], 75, (7, 0)),
    row("tanh", &[], 75, (7, 0)),
    row("set|setp", &[BF16], 90, (7, 8)),
    row("lop3", &["and|or"], 70, (8, 2)),
    row("szext|bmsk", &[], 70, (7, 6)),
    // Conversions (9.7.9.21); those of bf16 are below.
    row("cvt", &["e4m3x2|e5m2x2"], 89, (7, 8)),
    row("cvt", &["tf32"], 80, (7, 0)),
    row("cvt", &["tf32", "rn|rz"], 90, (7, 8)),
    row("cvt", &["satfinite", "tf32|f16|bf16|f16x2|bf16x2", "f32"], 0, (8, 1)),
    row("cvt", &["f16x2|bf16x2", "f32"], 80, (7, 0)),
    row("cvt", &["relu"], 80, (7, 0)),
    // Synchronisation (9.7.13)
    row("redux", &[], 80, (7, 0)),
    row("elect", &[], 90, (8, 0)),
    row("bar|barrier", &["cta"], 0, (7, 8)),
    row("barrier", &["cluster"], 90, (7, 8)),
    row("barrier", &["cluster", "relaxed"], 90, (8, 0)),
    row("mapa|getctarank|griddepcontrol", &[], 90, (7, 8)),
    row("fence|membar", &["proxy"], 70, (7, 5)),
    row("fence|membar", &["proxy", "async|async.*"], 90, (8, 0)),
    row("fence", &["proxy", "tensormap::*"], 90, (8, 3)),
    row("fence", &["mbarrier_init"], 90, (8, 0)),
    row("fence", &["sync_restrict::*"], 90, (8, 6)),
    row("mbarrier", &[], 80, (7, 0)),
    row("mbarrier", &["parity"], 80, (7, 1)),
    row("mbarrier", &["release|acquire"], 80, (8, 0)),
    row("mbarrier", &["relaxed"], 90, (8, 6)),
    row("mbarrier", &["cluster"], 90, (8, 0)),
    row("mbarrier", &["try_wait"], 90, (7, 8)),
    row("mbarrier", &["expect_tx|complete_tx"], 90, (8, 0)),
    // Asynchronous copies and tensor maps (9.7.9.25 to 9.7.9.29)
    row("cp", &["async"], 80, (7, 0)),
    row("cp", &["async", "bulk"], 90, (8, 0)),
    row("cp", &["async", "mbarrier"], 80, (7, 0)),
    row("st", &["async"], 90, (8, 1)),
    row("red", &["async"], 90, (8, 1)),
    row("multimem", &[], 90, (8, 1)),
    row("prefetch", &["tensormap"], 90, (8, 0)),
    row("tensormap", &["cp_fenceproxy"], 90, (8, 3)),
    row("tensormap", &["replace"], ONLY_90A, (8, 3)),
    // Matrix products (9.7.14, 9.7.15)
    row("stmatrix", &[], 90, (7, 8)),
    row("mma", &["bf16|tf32|f64|m16n8k16|m16n8k32|m16n8k64|m16n8k128|m16n8k256"], 80, (7, 0)),
    row("mma", &["m16n8k4|m16n8k8|m16n8k16", "f64"], 90, (7, 8)),
    row("mma", &["e4m3|e5m2"], 89, (8, 4)),
    row("mma", &["e4m3|e5m2", "f16|m16n8k16"], 89, (8, 7)),
    row("wgmma|setmaxnreg", &[], ONLY_90A, (8, 0)),
];

/// Special registers that came with later targets (10).
const REGISTERS: &[(&str, u32, (u32, u32))] = &[
    ("%cluster", 90, (7, 8)),
    ("%ncluster", 90, (7, 8)),
    ("%is_explicit_cluster", 90, (7, 8)),
    ("%aggr_smem_size", 90, (8, 1)),
    ("%current_graph_exec", 50, (8, 0)),
    ("%globaltimer", 30, (3, 1)),
    ("%total_smem_size", 20, (4, 1)),
    ("%dynamic_smem_size", 20, (4, 1)),
    ("%clock_hi", 20, (5, 0)),
    ("%reserved_smem", 80, (7, 6)),
];

fn matches(pattern: &str, word: &str) -> bool {
    pattern.split('|').any(|p| match (p.strip_suffix('*'), p.strip_prefix('*')) {
        (Some(start), _) => word.starts_with(start),
        (_, Some(end)) => word.ends_with(end),
        _ => p == word,
    })
}

/// Rows by opcode; those of every opcode under `*`.
static BY_OPCODE: LazyLock<HashMap<&str, Vec<&Row>>> = LazyLock::new(|| {
    let mut map: HashMap<&str, Vec<&Row>> = HashMap::new();
    for row in ROWS {
        row.opcodes.split('|').for_each(|o| map.entry(o).or_default().push(row));
    }
    map
});

/// What `cvt` between bf16 and other types asks for: f32 came first, the rest with sm_90.
fn bf16_conversion(i: &Instruction) -> Option<(u32, (u32, u32))> {
    let has = |m: &str| i.modifiers.iter().any(|x| x == m);
    let types: Vec<&str> = i.modifiers.iter().rev().take(2).map(String::as_str).collect();
    match types.as_slice() {
        // Source, then destination.
        ["bf16", "f32"] => Some(if has("ftz") { (90, (7, 8)) } else { (80, (7, 1)) }),
        ["f32", "bf16"] => Some((80, (7, 0))),
        ["bf16", _] | [_, "bf16"] => Some((90, (7, 8))),
        _ => None,
    }
}

/// Whether a module of this target and version may have the instruction.
///
/// # Errors
/// [`LowerErrorKind::Target`] or [`LowerErrorKind::Version`].
pub fn check(i: &Instruction, target: Target, version: (u32, u32)) -> Result<(), LowerErrorKind> {
    let (mut least, mut since) = (0, (0, 0));
    let mut need = |target: u32, version: (u32, u32)| {
        least = least.max(target);
        since = since.max(version);
    };
    let opcode = i.opcode.as_str();
    for row in [opcode, "*"].iter().filter_map(|o| BY_OPCODE.get(o)).flatten() {
        if row.modifiers.iter().all(|m| i.modifiers.iter().any(|word| matches(m, word))) {
            need(row.target, row.version);
        }
    }
    let has = |m: &str| i.modifiers.iter().any(|x| x == m);
    match opcode {
        "cvt" => {
            bf16_conversion(i).into_iter().for_each(|(target, version)| need(target, version));
            // Older by two versions on sm_90, where these were first.
            if target.number == 89 && (has("e4m3x2") || has("e5m2x2")) {
                need(89, (8, 1));
            }
        }
        // Without `.sync` these are of targets and versions that knew no independent threads.
        "vote" | "shfl" if !has("sync") && target.number >= 70 && version >= (6, 4) => {
            return Err(LowerErrorKind::Invalid(format!(
                "`{opcode}` without `.sync` is not of PTX 6.4 or later for sm_70 and later (9.7.9.5, 9.7.13.9)"
            )));
        }
        // The orders of a thread fence, as against those of a proxy fence.
        "fence" if (has("acquire") || has("release")) && !has("proxy") && !has("mbarrier_init") => need(90, (8, 6)),
        // Into the block's own shared memory, as against the cluster's.
        "cp" if has("bulk") && i.modifiers.windows(2).any(|w| w == ["shared::cta", "global"]) => need(90, (8, 6)),
        "mov" => {
            for o in &i.operands {
                if let Operand::Name(n) = o {
                    let found = REGISTERS.iter().filter(|(start, ..)| n.starts_with(start));
                    found.for_each(|&(_, target, version)| need(target, version));
                }
            }
        }
        _ => {}
    }
    let instruction =
        || std::iter::once(opcode).chain(i.modifiers.iter().map(String::as_str)).collect::<Vec<_>>().join(".");
    let fits = if least == ONLY_90A { target.number == 90 && target.specific } else { target.number >= least };
    if !fits {
        let needs = if least == ONLY_90A { "sm_90a".into() } else { format!("sm_{least}") };
        return Err(LowerErrorKind::Target { instruction: instruction(), needs, number: target.number });
    }
    if version < since {
        return Err(LowerErrorKind::Version { instruction: instruction(), needs: since, found: version });
    }
    Ok(())
}
