//! Counts what a warp does, where its launch is counted: see [`super::tally`].

use super::access::space_of;
use super::cluster::OFFSET_BITS;
use super::lanes::active;
use super::observe::{AccessKind, Engine, Touch};
use super::state::Machine;
use super::tally::{sectors, wavefronts};
use crate::ptx::ast::Space;

impl Machine<'_, '_> {
    #[inline(never)]
    pub fn count_block(&mut self, block: u32, lanes: u32) {
        if let Some(t) = &mut self.worker.tally {
            let warp = (self.shared.linear, self.warp.index);
            if !t.first_round(block, self.worker.body.blocks[block as usize].poll, warp) {
                return;
            }
            let (warps, threads) = &mut t.blocks[block as usize];
            *warps += 1;
            *threads += u64::from(lanes.count_ones());
        }
    }

    #[inline(never)]
    pub fn count_matrix(&mut self, name: &str) {
        if let Some(t) = &mut self.worker.tally {
            match t.matrix.get_mut(name) {
                Some(n) => *n += 1,
                None => {
                    t.matrix.insert(name.to_string(), 1);
                }
            }
        }
    }

    #[inline(never)]
    pub fn count_access(&mut self, touch: &Touch, pc: u32) {
        let line = self.line(pc) as usize;
        let Some(t) = self.worker.tally.as_mut().filter(|t| !t.repeating()) else { return };
        let Some(l) = t.lines.get_mut(line.wrapping_sub(1)) else { return };
        let &Touch { addresses, mask, bytes, .. } = touch;
        let copied = matches!(touch.engine, Engine::CopyAsync | Engine::Bulk);
        let inside = |spaces: &[Space]| match touch.space {
            Some(s) => mask * u32::from(spaces.contains(&s)),
            None => active(mask).filter(|&i| spaces.contains(&space_of(addresses[i]))).fold(0, |m, i| m | 1 << i),
        };
        let (shared, global) = (inside(&[Space::Shared, Space::SharedCluster]), inside(&[Space::Global]));
        if touch.kind != AccessKind::Read {
            // The field above the offset names another block of the cluster.
            let elsewhere = active(shared).any(|i| addresses[i] >> OFFSET_BITS & 0xff != 0);
            self.shared.worked |= global != 0 || elsewhere;
        }
        if shared != 0 {
            l.shared.add(&wavefronts(addresses, shared, bytes));
            if touch.kind == AccessKind::Write && copied {
                t.async_bytes += u64::from(shared.count_ones()) * u64::from(bytes);
            }
        }
        if global != 0 {
            let moved = sectors(addresses, global, bytes);
            l.global.add(&moved);
            t.async_sectors += if copied { moved.sectors } else { 0 };
        }
    }
}
