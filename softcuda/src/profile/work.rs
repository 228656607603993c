//! What a launch did, in the form in which it is reported.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::product::Product;
use super::traffic::Traffic;
use crate::exec::{Counters, InstructionClass, MemoryCounters, SharedCounters};

/// Counters of one launch, or of several added up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    pub blocks: u64,
    /// Blocks among which the work is: those that wrote outside themselves; all of them where none did.
    pub working_blocks: u64,
    pub warps: u64,
    /// PTX instructions, each counted once for a warp, or for each group of its lanes that runs it alone.
    pub warp_instructions: u64,
    /// The same times active lanes.
    pub thread_instructions: u64,
    /// Warp instructions by [`InstructionClass::name`].
    pub classes: BTreeMap<String, u64>,
    /// Warp instructions by spelling without operands.
    pub opcodes: BTreeMap<String, u64>,
    /// Matrix products by shape and types, as in [`Counters::matrix`].
    pub matrix: BTreeMap<String, u64>,
    /// Matrix products by type of the factors: `f16`, `bf16`, `tf32`, `f64`, `int8`, `fp8`, or as spelled.
    pub tensor: BTreeMap<String, TensorOps>,
    pub global: MemoryCounters,
    pub shared: SharedCounters,
    pub traffic: Traffic,
    /// Bytes that asynchronous copies wrote to shared memory.
    pub async_bytes: u64,
    /// Of the sectors of `global`, those that asynchronous copies moved.
    pub async_sectors: u64,
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
        for (name, &instructions) in &counters.matrix {
            if let Some(product) = Product::parse(name) {
                let ops = tensor.entry(product.kind).or_default();
                ops.instructions += instructions;
                ops.multiply_adds += instructions * product.multiply_adds;
            }
        }
        let classes = InstructionClass::ALL.into_iter().map(|class| (class.name().to_owned(), counters.class(class)));
        Work {
            blocks: counters.blocks,
            working_blocks: if counters.working_blocks == 0 { counters.blocks } else { counters.working_blocks },
            warps: counters.warps,
            warp_instructions: counters.warp_instructions.iter().sum(),
            thread_instructions: counters.thread_instructions,
            classes: classes.filter(|(_, count)| *count != 0).collect(),
            opcodes: counters.opcodes.clone(),
            matrix: counters.matrix.clone(),
            tensor,
            global: counters.global,
            shared: counters.shared,
            traffic,
            async_bytes: counters.async_bytes,
            async_sectors: counters.async_sectors,
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
        self.working_blocks += other.working_blocks;
        self.warps += other.warps;
        self.warp_instructions += other.warp_instructions;
        self.thread_instructions += other.thread_instructions;
        for (mine, theirs) in [
            (&mut self.classes, &other.classes),
            (&mut self.opcodes, &other.opcodes),
            (&mut self.matrix, &other.matrix),
        ] {
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
        self.async_sectors += other.async_sectors;
        self.barriers += other.barriers;
        self.waits += other.waits;
        self.repeated_polls += other.repeated_polls;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
