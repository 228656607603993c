//! What launches did, and how two sides stand to one another.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use softcuda::profile::LaunchProfile;

/// Two numbers that differ by less than this share are level: sides that read the same weights and little else.
pub const LEVEL: f64 = 0.005;

/// One side's launches for one product, added up.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    pub kernels: Vec<String>,
    pub wavefronts: f64,
    /// Bytes that L2 moved.
    pub l2_bytes: f64,
    pub dram_bytes: f64,
    /// Those of them that were written back.
    pub dram_written: f64,
    /// Multiply-adds of tensor cores over those of live rows.
    pub rows: f64,
    /// Products by shape and types.
    pub tensor: BTreeMap<String, u64>,
    /// Modelled: no GPU's.
    pub seconds: f64,
    /// The busiest unit of the launch that takes longest.
    pub limited_by: String,
}

impl Counted {
    /// `live`: multiply-adds of the rows that there are.
    pub fn new(launches: &[&LaunchProfile], live: f64) -> Counted {
        let mut sum = Counted::default();
        let mut longest = 0.0;
        for launch in launches {
            let work = &launch.work;
            sum.kernels.push(launch.kernel.clone());
            sum.wavefronts += work.shared.wavefronts as f64;
            sum.l2_bytes += work.traffic.l2_bytes() as f64;
            sum.dram_bytes += work.traffic.dram_bytes() as f64;
            sum.dram_written += work.traffic.dram_write_bytes as f64;
            sum.rows += work.tensor.values().map(|ops| ops.multiply_adds as f64).sum::<f64>() / live;
            for (name, count) in &work.matrix {
                *sum.tensor.entry(name.clone()).or_default() += count;
            }
            sum.seconds += launch.modelled_seconds;
            if launch.modelled_seconds > longest {
                longest = launch.modelled_seconds;
                sum.limited_by.clone_from(&launch.limited_by);
            }
        }
        sum
    }

    /// What is compared, by name; less is better in each.
    fn figures(&self) -> [(&'static str, f64); 5] {
        [
            ("wavefronts", self.wavefronts),
            ("L2", self.l2_bytes),
            ("DRAM", self.dram_bytes),
            ("rows", self.rows),
            ("time", self.seconds),
        ]
    }

    /// Tensor-core instructions in a few words: the shape that most are of, and how many there are of all.
    pub fn instructions(&self) -> String {
        let all: u64 = self.tensor.values().sum();
        let most = self.tensor.iter().max_by_key(|(_, count)| **count);
        most.map_or("none".into(), |(name, _)| {
            let shape = name.strip_prefix("wgmma.").unwrap_or(name).split('.').next().unwrap_or(name);
            let kind = if name.starts_with("wgmma.") { "wgmma" } else { "mma" };
            format!("{all} {kind} {shape}")
        })
    }

    pub fn json(&self) -> Value {
        json!({
            "kernels": self.kernels, "wavefronts": self.wavefronts, "l2_bytes": self.l2_bytes, "dram_bytes": self.dram_bytes,
            "dram_written_bytes": self.dram_written,
            "rows_for_a_live_one": self.rows, "tensor_instructions": self.tensor, "modelled_us": self.seconds * 1e6,
            "limited_by": self.limited_by,
        })
    }
}

/// Ours over theirs, of each figure.
pub fn ratios(ours: &Counted, theirs: &Counted) -> [(&'static str, f64); 5] {
    let (ours, theirs) = (ours.figures(), theirs.figures());
    std::array::from_fn(|i| (ours[i].0, ours[i].1 / theirs[i].1))
}
