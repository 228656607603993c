//! The hierarchical mixture of experts (Shazeer et al., *Outrageously Large Neural Networks*, 2017, appendix B): noisy top-k gating over
//! groups, then noisy top-k gating over the experts of each chosen group.
//!
//! A token's weight for expert `e` of group `g` is `G_primary[g] * G_g[e]` (eq. 12); importance sums those (eq. 13), and
//! `load[g,e] = Load_primary[g] * Load_g[e] / |X_g|` with the tokens `X_g` of the group (eq. 14). Three launches: the groups
//! ([`crate::routers::noisy`]), their tokens side by side ([`crate::capacity::dispatch`]), the experts of each group. Only the rows of chosen groups are read.
//! See [`crate::reference::noisy::hierarchical`]; ids and noise ([`noise()`]) are those of
//! the reference bit for bit.
//!
//! The way back is [`crate::routers::hierarchical_backward`].
//!
//! ```
//! use moe_kernels::Workspace;
//! use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
//! use moe_kernels::routers::noisy::{NoisyLogits, NoisySums};
//! use moe_kernels::rules::{NoiseSource, NoisyRule};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # softcuda::install_if_no_gpu()?;
//! # let stream = moe_kernels::device::open(0)?.default_stream();
//! # let kernels = moe_kernels::Kernels::new(stream.context())?;
//! let (tokens, groups, experts) = (3, 2, 4);
//! let rule = |top_k| NoisyRule::new(top_k, NoiseSource::new(1, 0));
//! let desc = HierarchicalDesc::new(tokens, groups, experts, rule(1), rule(2));
//! let primary_products = stream.clone_htod(&[0.5_f32; 3 * 2 * 2])?;
//! let products = stream.clone_htod(&[0.5_f32; 3 * 2 * 2 * 4])?;
//! let mut primary_ids = stream.alloc_zeros(tokens)?;
//! let mut primary_weights = stream.alloc_zeros(tokens)?;
//! let mut ids = stream.alloc_zeros(tokens * 2)?;
//! let mut weights = stream.alloc_zeros(tokens * 2)?;
//! let mut workspace = Workspace::new(&stream, hierarchical::workspace_bytes(&desc, kernels.device())?)?;
//! let mut counts = [stream.alloc_zeros(groups)?, stream.alloc_zeros(groups * experts)?];
//! let mut importance = [stream.alloc_zeros(groups)?, stream.alloc_zeros(groups * experts)?];
//! let mut load = [stream.alloc_zeros(groups)?, stream.alloc_zeros(groups * experts)?];
//! let mut losses = [stream.alloc_zeros(2)?, stream.alloc_zeros(2)?];
//!
//! let ([counts_g, counts_e], [importance_g, importance_e]) = (&mut counts, &mut importance);
//! let ([load_g, load_e], [losses_g, losses_e]) = (&mut load, &mut losses);
//! let args = HierarchicalArgs::new(
//!     NoisyLogits::together(&primary_products),
//!     NoisyLogits::together(&products),
//!     PrimaryOutputs::new(&mut primary_ids, &mut primary_weights, NoisySums::new(counts_g, importance_g, load_g, losses_g)),
//!     &mut ids,
//!     &mut weights,
//!     NoisySums::new(counts_e, importance_e, load_e, losses_e),
//!     &mut workspace,
//! );
//! hierarchical::forward(&kernels, &stream, &desc, args)?;
//! assert_eq!(stream.clone_dtoh(&counts[0])?.iter().sum::<i32>(), 3);
//! assert_eq!(stream.clone_dtoh(&counts[1])?.iter().sum::<i32>(), 6);
//! # Ok(())
//! # }
//! ```

mod args;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::capacity::dispatch::{self, DispatchDesc};
use crate::registry::{Kernel, Noisy};
use crate::routers::noisy::{self, HeldLogits, NoisyDesc};
use crate::rules::noise::standard_normal;
use crate::rules::{NoiseSource, NoisyRule};
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::params::NoisyGroupedParams;
use crate::runtime::shape;
use crate::runtime::token_mask::MaskAddresses;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Error, Kernels, Selection};

pub use args::{HierarchicalArgs, PrimaryOutputs};

const OPERATION: &str = "hierarchical";

/// Shapes and rules of a hierarchical gating.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct HierarchicalDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Groups `G`.
    pub groups: usize,
    /// Experts `E` of a group; `G * E` is 1 to 4096.
    pub experts: usize,
    /// How groups are chosen; `K` is its `top_k`.
    pub primary: NoisyRule,
    /// How experts are chosen within a group; `k` is its `top_k`, and `K * k` at most 32. Random words differ between levels and groups
    /// also where the two rules have the same source.
    pub secondary: NoisyRule,
}

impl HierarchicalDesc {
    /// Choices for `tokens` tokens among `groups` groups by `primary`, then among the `experts` experts of each by `secondary`.
    pub const fn new(
        tokens: usize,
        groups: usize,
        experts: usize,
        primary: NoisyRule,
        secondary: NoisyRule,
    ) -> HierarchicalDesc {
        HierarchicalDesc { tokens, groups, experts, primary, secondary }
    }
}

impl HierarchicalDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::positive(OPERATION, "groups", self.groups)?;
        shape::positive(OPERATION, "experts", self.experts)?;
        let all = shape::product(OPERATION, "experts", &[self.groups, self.experts])?;
        if all > crate::MAX_EXPERTS {
            let supported = format!("at most {} in all groups", crate::MAX_EXPERTS);
            return Err(Error::unsupported(OPERATION, "experts", supported, all));
        }
        noisy::check_rule(OPERATION, &self.primary, self.groups)?;
        noisy::check_rule(OPERATION, &self.secondary, self.experts)?;
        let choices = self.primary.top_k * self.secondary.top_k;
        if choices > shape::LANES {
            let supported = format!("at most {} of both levels multiplied", shape::LANES);
            return Err(Error::unsupported(OPERATION, "top_k", supported, choices));
        }
        shape::product(OPERATION, "logits", &[self.tokens, 2, all])?;
        shape::product_i32(OPERATION, "ids", &[self.tokens, choices])?;
        Ok(())
    }

    /// Slots of groups: `T K`.
    fn slots(&self) -> usize {
        self.tokens * self.primary.top_k
    }

    fn primary_desc(&self) -> NoisyDesc {
        NoisyDesc { tokens: self.tokens, experts: self.groups, rule: self.primary }
    }

    fn dispatch_desc(&self) -> DispatchDesc {
        DispatchDesc::new(self.tokens, self.groups, self.primary.top_k, 1)
    }
}

/// The three launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HierarchicalSelection {
    /// Groups of tokens.
    pub primary: Selection,
    /// Tokens of groups.
    pub dispatch: Selection,
    /// Experts of groups.
    pub secondary: Selection,
    /// Parts that each group's tokens are cut into.
    parts: u32,
}

/// Chooses kernels and grids.
///
/// # Errors
/// Those of [`HierarchicalDesc::validate`].
pub fn select(desc: &HierarchicalDesc, device: &DeviceInfo) -> Result<HierarchicalSelection, Error> {
    desc.validate()?;
    let spread = noisy::spread(desc.experts);
    let most = noisy::most_blocks(&spread, device);
    let groups = desc.groups as u32;
    let enough_each = (desc.slots() as u32).div_ceil(noisy::TOKENS_OF_SUMS * groups * spread.tokens());
    let parts = enough_each.clamp(1, (most / groups).max(1));
    let blocks = (groups * parts).min(most);
    let kernel = Kernel::Noisy(Noisy { spread, grouped: true });
    Ok(HierarchicalSelection {
        primary: noisy::select(&desc.primary_desc(), device, true)?,
        dispatch: dispatch::select(&desc.dispatch_desc(), device)?,
        secondary: Selection::cooperative(kernel, blocks),
        parts,
    })
}

/// Where things lie in the workspace. All three launches begin theirs at 0, with the barrier.
struct Regions {
    shared: Region,
    counts: Region,
    offsets: Region,
    slot_token: Region,
    token_slot: Region,
    bytes: usize,
}

impl Regions {
    fn new(desc: &HierarchicalDesc, device: &DeviceInfo) -> Result<Regions, Error> {
        let parts = select(desc, device)?.parts as usize;
        let shared = noisy::workspace_bytes(&desc.primary_desc(), device)?
            .max(dispatch::workspace_bytes(&desc.dispatch_desc(), device)?)
            .max(noisy::partial_bytes(desc.groups * parts, desc.experts));
        let mut arena = Arena::new(OPERATION);
        Ok(Regions {
            shared: arena.region("workspace", shared, 1)?,
            counts: arena.region("workspace", desc.groups, size_of::<i32>())?,
            offsets: arena.region("workspace", desc.groups + 1, size_of::<i32>())?,
            slot_token: arena.region("workspace", desc.slots(), size_of::<i32>())?,
            token_slot: arena.region("workspace", desc.slots(), size_of::<i32>())?,
            bytes: arena.bytes(),
        })
    }
}

/// The noise of `token` and `expert` of `group` at the second level, bit for bit; at the first it is [`noisy::noise`].
pub fn noise(source: NoiseSource, token: u32, group: u32, expert: u32) -> f32 {
    standard_normal(source.gate_word(16 + group, token, expert))
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`HierarchicalDesc::validate`].
pub fn workspace_bytes(desc: &HierarchicalDesc, device: &DeviceInfo) -> Result<usize, Error> {
    Ok(Regions::new(desc, device)?.bytes)
}

/// Chooses groups and experts, and sums up who gets how much.
///
/// With no tokens nothing is launched, and sums and losses become zero.
///
/// # Errors
/// Those of [`HierarchicalDesc::validate`]; those of a buffer (named `primary.ids`, ... for the first level's):
/// [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of
/// the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &HierarchicalDesc,
    args: HierarchicalArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let regions = Regions::new(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let HierarchicalDesc { tokens, groups, experts, .. } = *desc;
    let (all, slots) = (groups * experts, desc.slots());
    let primary_sums = [
        scope.write("primary.counts", args.primary.sums.counts, groups, SCALAR)?,
        scope.write("primary.importance", args.primary.sums.importance, groups, SCALAR)?,
        scope.write("primary.load", args.primary.sums.load, groups, SCALAR)?,
        scope.write("primary.losses", args.primary.sums.losses, 2, SCALAR)?,
    ];
    let sums = [
        scope.write("counts", args.sums.counts, all, SCALAR)?,
        scope.write("importance", args.sums.importance, all, SCALAR)?,
        scope.write("load", args.sums.load, all, SCALAR)?,
        scope.write("losses", args.sums.losses, 2, SCALAR)?,
    ];
    if tokens == 0 {
        for (sums, experts) in [(&primary_sums, groups), (&sums, all)] {
            for (held, elements) in sums.iter().zip([experts, experts, experts, 2]) {
                scope.zero(held.address(), elements * size_of::<f32>())?;
            }
        }
        return Ok(());
    }
    let primary_names = ["primary_logits.clean", "primary_logits.raw", "primary_logits"];
    let primary_logits = HeldLogits::open(&scope, args.primary_logits, primary_names, tokens, groups)?;
    let logits = HeldLogits::open(&scope, args.logits, ["clean", "raw", "logits"], tokens * groups, experts)?;
    let primary_ids = scope.write("primary.ids", args.primary.ids, slots, SCALAR)?;
    let primary_weights = scope.write("primary.weights", args.primary.weights, slots, SCALAR)?;
    let primary_noisy = scope.write_some("primary.noisy", args.primary.noisy, tokens * groups, SCALAR)?;
    let primary_thresholds = scope.write_some("primary.thresholds", args.primary.thresholds, tokens * 2, SCALAR)?;
    let choices = slots * desc.secondary.top_k;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write("weights", args.weights, choices, SCALAR)?;
    let noisy = scope.write_some("noisy", args.noisy, slots * experts, SCALAR)?;
    let thresholds = scope.write_some("thresholds", args.thresholds, slots * 2, SCALAR)?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let may_pad = !args.mask.is_all();
    let mask = args.mask.open(&scope, tokens)?;
    let workspace = args.workspace.open(&scope, regions.bytes)?;
    let place = |region: Region| workspace.address().offset(region.offset);
    let at = noisy::Addresses {
        logits: primary_logits.addresses(),
        ids: primary_ids.address(),
        weights: primary_weights.address(),
        noisy: optional(&primary_noisy),
        thresholds: optional(&primary_thresholds),
        noise_state: optional(&noise_state),
        mask: mask.addresses(),
        sums: Some(sum_addresses(&primary_sums, place(regions.shared))),
    };
    noisy::enqueue(&scope, &desc.primary_desc(), &selection.primary, at)?;

    let lists = dispatch::Outputs {
        counts: place(regions.counts),
        offsets: place(regions.offsets),
        slot_token: place(regions.slot_token),
        token_slot: place(regions.token_slot),
        slot_weight: None,
        tiles: None,
        num_tiles: None,
    };
    let order = desc.dispatch_desc();
    let shared = place(regions.shared);
    let from = dispatch::Choices { ids: primary_ids.address(), weights: None, mask: MaskAddresses::default() };
    dispatch::enqueue(&scope, &order, &selection.dispatch, from, lists, shared)?;
    if may_pad {
        // The second level knows the tokens of groups alone.
        scope.fill(ids.address(), u32::MAX, choices)?;
        scope.zero(weights.address(), choices * size_of::<f32>())?;
    }
    let at = noisy::Addresses {
        logits: logits.addresses(),
        ids: ids.address(),
        weights: weights.address(),
        noisy: optional(&noisy),
        thresholds: optional(&thresholds),
        noise_state: optional(&noise_state),
        mask: MaskAddresses::default(),
        sums: None,
    };
    let [_, _, primary_load, _] = &primary_sums;
    let chosen = Chosen {
        ids: primary_ids.address(),
        weights: primary_weights.address(),
        load: primary_load.address(),
        slot_token: place(regions.slot_token),
        offsets: place(regions.offsets),
    };
    scope.launch(
        &selection.secondary,
        params(desc, selection.parts, at, sum_addresses(&sums, place(regions.shared)), chosen),
    )
}

fn sum_addresses<'a>(sums: &'a [Held<'_>; 4], workspace: Address<'a>) -> noisy::SumAddresses<'a> {
    let [counts, importance, load, losses] = sums.each_ref().map(Held::address);
    noisy::SumAddresses { counts, importance, load, losses, workspace }
}

/// What the second level knows of the first.
struct Chosen<'a> {
    ids: Address<'a>,
    weights: Address<'a>,
    load: Address<'a>,
    slot_token: Address<'a>,
    offsets: Address<'a>,
}

fn params<'a>(
    desc: &HierarchicalDesc,
    parts: u32,
    at: noisy::Addresses<'a>,
    sums: noisy::SumAddresses<'a>,
    chosen: Chosen<'a>,
) -> NoisyGroupedParams<'a> {
    let NoisyRule { top_k, noise_epsilon, noise } = desc.secondary;
    let (clean, raw, row_stride) = at.logits;
    let [seed_lo, seed_hi, offset_lo, offset_hi] = noise.words_of_source();
    NoisyGroupedParams {
        clean_logits: clean.into(),
        noise_logits: raw.into(),
        row_stride,
        ids: at.ids.into(),
        weights: at.weights.into(),
        noisy: at.noisy.into(),
        thresholds: at.thresholds.into(),
        tokens: desc.tokens as u32,
        experts: desc.experts as u32,
        top_k: top_k as u32,
        parts,
        epsilon: noise_epsilon,
        seed_lo,
        seed_hi,
        offset_lo,
        offset_hi,
        noise_state: at.noise_state.into(),
        counts: sums.counts.into(),
        importance: sums.importance.into(),
        load: sums.load.into(),
        losses: sums.losses.into(),
        groups: desc.groups as u32,
        primary_k: desc.primary.top_k as u32,
        primary_ids: chosen.ids.into(),
        primary_weights: chosen.weights.into(),
        primary_load: chosen.load.into(),
        slot_token: chosen.slot_token.into(),
        offsets: chosen.offsets.into(),
        workspace: sums.workspace.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::NoiseSource;
    use crate::runtime::device::A100;

    fn desc() -> HierarchicalDesc {
        let rule = |top_k| NoisyRule { top_k, noise_epsilon: 1e-2, noise: NoiseSource::default() };
        HierarchicalDesc { tokens: 1000, groups: 16, experts: 256, primary: rule(2), secondary: rule(4) }
    }

    fn fault(change: impl FnOnce(&mut HierarchicalDesc)) -> &'static str {
        let mut desc = desc();
        change(&mut desc);
        desc.validate().unwrap_err().argument().unwrap()
    }

    #[test]
    fn faults_name_their_field() {
        assert_eq!(desc().validate(), Ok(()));
        assert_eq!(fault(|d| d.experts = 257), "experts");
        assert_eq!(fault(|d| d.experts = 0), "experts");
        assert_eq!(fault(|d| d.experts = usize::MAX), "experts");
        assert_eq!(fault(|d| d.groups = 0), "groups");
        assert_eq!(fault(|d| d.primary.top_k = 17), "top_k");
        assert_eq!(fault(|d| d.secondary.top_k = 17), "top_k");
        assert_eq!(fault(|d| d.secondary.noise_epsilon = -1.0), "noise_epsilon");
        assert_eq!(fault(|d| d.tokens = 1 << 28), "ids");
    }

    #[test]
    fn groups_are_cut_as_far_as_blocks_are_resident() {
        // 2000 slots over 16 groups, 32 a block: 3.9 parts.
        let got = select(&desc(), &A100).unwrap();
        assert_eq!((got.parts, got.secondary.grid, got.secondary.cooperative), (4, [64, 1, 1], true));
        // Ten times as many would be 40; 216 blocks allow 13 each.
        let got = select(&HierarchicalDesc { tokens: 10_000, ..desc() }, &A100).unwrap();
        assert_eq!((got.parts, got.secondary.grid), (13, [208, 1, 1]));
        // More groups than resident blocks: a block takes several.
        let many = HierarchicalDesc { groups: 1024, experts: 4, ..desc() };
        let got = select(&many, &A100).unwrap();
        assert_eq!((got.parts, got.secondary.grid), (1, [216, 1, 1]));
    }
}
