//! A route's places in the workspace.

use crate::experts::dispatched::ListAddresses;
use crate::runtime::launch::Held;
use crate::runtime::workspace::Region;

/// Places in the workspace.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::layer) struct Regions {
    /// First, at 0: the grid barrier, and what kernels that meet at it or work alone keep behind it.
    pub(super) scratch: Region,
    /// What the router sees, after a norm.
    pub(super) router_x: Region,
    pub(super) logits: Region,
    /// Candidates and their weights, where admission has a say.
    pub(super) candidates: Region,
    pub(super) candidate_weights: Region,
    pub(super) ids: Region,
    pub(super) weights: Region,
    /// Ids as this device knows them, where there is a map.
    pub(super) local_ids: Region,
    pub(super) identity_weight: Region,
    pub(super) counts: Region,
    pub(super) offsets: Region,
    pub(super) slot_token: Region,
    pub(super) token_slot: Region,
    pub(super) slot_weight: Region,
    pub(super) tiles: Region,
    pub(super) num_tiles: Region,
}

impl Regions {
    /// A dispatch's lists inside the workspace.
    pub(in crate::layer) fn lists<'a>(&self, workspace: &'a Held<'_>) -> ListAddresses<'a> {
        ListAddresses {
            counts: workspace.at(self.counts),
            offsets: workspace.at(self.offsets),
            slot_token: workspace.at(self.slot_token),
            token_slot: workspace.at(self.token_slot),
            token_offsets: workspace.at(self.offsets),
            slot_weight: workspace.at(self.slot_weight),
            tiles: workspace.at(self.tiles),
            num_tiles: workspace.at(self.num_tiles),
        }
    }
}
