//! Values of the special registers (PTX ISA 10).

use super::cluster::position;
use super::lanes::{File, LANES};
use super::state::Machine;
use crate::lower::ir::Op;
use crate::lower::special::Special;

impl Machine<'_, '_> {
    pub fn special(&mut self, file: File, op: &Op, mask: u32) {
        use Special::*;
        let which = Special::ALL[op.x as usize];
        let w = &self.worker;
        let nanoseconds = || w.started.elapsed().as_nanos() as u64;
        let uniform: u64 = match which {
            TidX | TidY | TidZ | LaneId | LanemaskEq | LanemaskLe | LanemaskLt | LanemaskGe | LanemaskGt => {
                let values: [u32; LANES] = std::array::from_fn(|lane| {
                    let bit = 1u32 << lane;
                    match which {
                        TidX => self.thread(lane)[0],
                        TidY => self.thread(lane)[1],
                        TidZ => self.thread(lane)[2],
                        LanemaskEq => bit,
                        LanemaskLe => bit | (bit - 1),
                        LanemaskLt => bit - 1,
                        LanemaskGe => !(bit - 1),
                        LanemaskGt => !(bit | (bit - 1)),
                        _ => lane as u32,
                    }
                });
                // SAFETY: the slot is a 32-bit one of this kernel.
                unsafe { file.store32(op.d, mask, &values) };
                return;
            }
            TidW | NtidW | CtaidW | NctaidW | ClusterIdW | NclusterIdW | ClusterCtaidW | ClusterNctaidW => 0,
            NtidX => w.block[0].into(),
            NtidY => w.block[1].into(),
            NtidZ => w.block[2].into(),
            CtaidX => self.shared.block[0].into(),
            CtaidY => self.shared.block[1].into(),
            CtaidZ => self.shared.block[2].into(),
            NctaidX => w.grid[0].into(),
            NctaidY => w.grid[1].into(),
            NctaidZ => w.grid[2].into(),
            ClusterIdX => self.cluster.id[0].into(),
            ClusterIdY => self.cluster.id[1].into(),
            ClusterIdZ => self.cluster.id[2].into(),
            NclusterIdX => (w.grid[0] / w.cluster[0]).into(),
            NclusterIdY => (w.grid[1] / w.cluster[1]).into(),
            NclusterIdZ => (w.grid[2] / w.cluster[2]).into(),
            WarpId => self.warp.index.into(),
            NwarpId => u64::from(w.block.iter().product::<u32>().div_ceil(32)),
            SmId => self.shared.linear % u64::from(w.config.sm_count.max(1)),
            NsmId => w.config.sm_count.into(),
            GridId => w.grid_id,
            Clock | Clock64 => nanoseconds(),
            ClockHi => nanoseconds() >> 32,
            GlobalTimer | GlobalTimerLo => epoch_nanoseconds(),
            GlobalTimerHi => epoch_nanoseconds() >> 32,
            TotalSmem | AggrSmem => self.shared.bytes.into(),
            DynamicSmem => w.dynamic_shared.into(),
            ClusterCtaidX => position(self.shared.rank, w.cluster)[0].into(),
            ClusterCtaidY => position(self.shared.rank, w.cluster)[1].into(),
            ClusterCtaidZ => position(self.shared.rank, w.cluster)[2].into(),
            ClusterNctaidX => w.cluster[0].into(),
            ClusterNctaidY => w.cluster[1].into(),
            ClusterNctaidZ => w.cluster[2].into(),
            ClusterCtarank => self.shared.rank.into(),
            ClusterNctarank => w.cluster.iter().product::<u32>().into(),
            // Launches of clusters of one block are not told from launches without clusters.
            IsExplicitCluster => (w.cluster != [1, 1, 1] || w.kernel.required_cluster.is_some()).into(),
            // `%pm`, `%envreg` and `%current_graph_exec`: nothing sets them.
            _ => 0,
        };
        // SAFETY: the slot is of the width that `b` says.
        unsafe {
            match op.b {
                0 => file.store32(op.d, mask, &[uniform as u32; LANES]),
                1 => file.store64(op.d, mask, &[uniform; LANES]),
                _ => file.set_predicate(op.d, mask, (uniform as u32).wrapping_neg()),
            }
        }
    }
}

fn epoch_nanoseconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}
