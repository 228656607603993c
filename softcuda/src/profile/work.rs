//! What a launch did, in the form in which it is reported.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Traffic;
use crate::exec::{Counters, InstructionClass, MemoryCounters, SharedCounters};

/// Counters of one launch, or of several added up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    pub blocks: u64,
    pub warps: u64,
    /// PTX instructions, each counted once for a warp, or for each group of its lanes that runs it alone.
    pub warp_instructions: u64,
    /// The same times active lanes.
    pub thread_instructions: u64,
    /// Warp instructions by [`InstructionClass::name`].
    pub classes: BTreeMap<String, u64>,
    /// Warp instructions by spelling without operands.
    pub opcodes: BTreeMap<String, u64>,
    /// Matrix products by type of the factors: `f16`, `bf16`, `tf32`, `f64`, `int8`, `fp8`, or as spelled.
    pub tensor: BTreeMap<String, TensorOps>,
    pub global: MemoryCounters,
    pub shared: SharedCounters,
    pub traffic: Traffic,
    /// Bytes that asynchronous copies wrote to shared memory.
    pub async_bytes: u64,
    /// Warp instructions that arrive at barriers of a block or cluster.
    pub barriers: u64,
    /// Warp instructions that wait for asynchronous work.
    pub waits: u64,
    /// Rounds of loops that only wait for others, beyond the first: left out of everything else.
    pub repeated_polls: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorOps {
    /// Products, each of a warp or a warpgroup.
    pub instructions: u64,
    pub multiply_adds: u64,
}

impl Work {
    pub fn new(counters: &Counters, traffic: Traffic) -> Work {
        let sum = |wanted: fn(&str) -> bool| {
            counters.opcodes.iter().filter(|(name, _)| wanted(name)).map(|(_, count)| count).sum()
        };
        let mut tensor: BTreeMap<String, TensorOps> = BTreeMap::new();
        for (name, &executed) in &counters.opcodes {
            if let Some(product) = Product::parse(name) {
                let ops = tensor.entry(product.kind).or_default();
                let instructions = executed / product.warps;
                ops.instructions += instructions;
                ops.multiply_adds += instructions * product.multiply_adds;
            }
        }
        let classes = InstructionClass::ALL.into_iter().map(|class| (class.name().to_owned(), counters.class(class)));
        Work {
            blocks: counters.blocks,
            warps: counters.warps,
            warp_instructions: counters.warp_instructions.iter().sum(),
            thread_instructions: counters.thread_instructions,
            classes: classes.filter(|(_, count)| *count != 0).collect(),
            opcodes: counters.opcodes.clone(),
            tensor,
            global: counters.global,
            shared: counters.shared,
            traffic,
            async_bytes: counters.async_bytes,
            repeated_polls: counters.repeated_polls,
            barriers: sum(|name| name.starts_with("bar.") && name != "bar.warp.sync" || name.starts_with("barrier.")),
            waits: sum(|name| {
                let waits = ["wait_group", "wait_all", "test_wait", "try_wait", "wait"];
                let family = ["cp.", "mbarrier.", "wgmma.", "griddepcontrol."];
                family.iter().any(|f| name.starts_with(f)) && name.split('.').any(|part| waits.contains(&part))
            }),
        }
    }

    /// Warp instructions of one class.
    pub fn class(&self, class: InstructionClass) -> u64 {
        self.classes.get(class.name()).copied().unwrap_or(0)
    }

    /// Active lanes of an average instruction over 32.
    pub fn lane_use(&self) -> f64 {
        self.thread_instructions as f64 / (32 * self.warp_instructions.max(1)) as f64
    }

    pub fn add(&mut self, other: &Work) {
        self.blocks += other.blocks;
        self.warps += other.warps;
        self.warp_instructions += other.warp_instructions;
        self.thread_instructions += other.thread_instructions;
        for (mine, theirs) in [(&mut self.classes, &other.classes), (&mut self.opcodes, &other.opcodes)] {
            for (name, count) in theirs {
                *mine.entry(name.clone()).or_default() += count;
            }
        }
        for (kind, ops) in &other.tensor {
            let mine = self.tensor.entry(kind.clone()).or_default();
            mine.instructions += ops.instructions;
            mine.multiply_adds += ops.multiply_adds;
        }
        self.global.add(&other.global);
        self.shared.add(&other.shared);
        self.traffic.add(&other.traffic);
        self.async_bytes += other.async_bytes;
        self.barriers += other.barriers;
        self.waits += other.waits;
        self.repeated_polls += other.repeated_polls;
    }
}

/// One matrix instruction.
#[derive(Debug, PartialEq, Eq)]
struct Product {
    kind: String,
    multiply_adds: u64,
    /// Warps that execute it together.
    warps: u64,
}

impl Product {
    /// `mma.sync`, `wmma.mma` or `wgmma.mma_async`, by its shape and types.
    fn parse(name: &str) -> Option<Product> {
        let mut parts = name.split('.');
        let family = parts.next()?;
        let warps = match family {
            "mma" | "wmma" => 1,
            "wgmma" => 4,
            _ => return None,
        };
        let (mut volume, mut types, mut sparse) = (None, Vec::new(), false);
        for part in parts {
            match part {
                "f16" | "bf16" | "tf32" | "f32" | "f64" | "e4m3" | "e5m2" | "s8" | "u8" | "s4" | "u4" | "s32"
                | "b1" => {
                    types.push(part);
                }
                "sp" | "sp::ordered_metadata" => sparse = true,
                _ => volume = volume.or_else(|| shape(part)),
            }
        }
        // Types stand in the order d, a, b, c; of `wmma` on f16 only d and c.
        let factor = if family == "wmma" && types.len() == 2 { "f16" } else { types.get(1)? };
        let kind = match factor {
            "s8" | "u8" => "int8",
            "e4m3" | "e5m2" => "fp8",
            other => other,
        };
        // Half of a sparse product's terms are zero by its format and take no time.
        Some(Product { kind: kind.into(), multiply_adds: volume? >> u32::from(sparse), warps })
    }
}

/// m times n times k of `m16n8k16`.
fn shape(text: &str) -> Option<u64> {
    let (m, rest) = text.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    Some(m.parse::<u64>().ok()? * n.parse::<u64>().ok()? * k.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_their_names() {
        let cases = [
            ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "bf16", 2048, 1),
            ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.u8.s8.s32", "int8", 4096, 1),
            ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", "f64", 256, 1),
            ("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32", "f16", 2048, 1),
            ("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "f16", 131_072, 4),
            ("wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e5m2", "fp8", 524_288, 4),
            ("wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32", "f16", 4096, 1),
        ];
        for (name, kind, multiply_adds, warps) in cases {
            assert_eq!(Product::parse(name), Some(Product { kind: kind.into(), multiply_adds, warps }), "{name}");
        }
        for other in ["wgmma.fence.sync.aligned", "wgmma.wait_group.sync.aligned", "fma.rn.f32", "wmma.load.a"] {
            assert_eq!(Product::parse(other), None, "{other}");
        }
    }

    #[test]
    fn barriers_and_waits_by_their_names() {
        let names = [
            "bar.sync",
            "barrier.cluster.wait.aligned",
            "bar.warp.sync",
            "cp.async.wait_group",
            "cp.async.wait_all",
            "mbarrier.try_wait.parity.shared.b64",
            "wgmma.wait_group.sync.aligned",
            "cp.async.bulk.wait_group.read",
            "cp.async.commit_group",
            "mbarrier.arrive.shared.b64",
        ];
        let opcodes = names.iter().enumerate().map(|(i, name)| (name.to_string(), 1 << i)).collect();
        let work = Work::new(&Counters { opcodes, ..Counters::default() }, Traffic::default());
        assert_eq!((work.barriers, work.waits), (0b11, 0b11_1111_1000 & !0b11_0000_0000));
    }
}
