//! Gating and dispatch in one launch: what [`crate::routers::gating`] followed by [`crate::capacity::dispatch`] writes, with a barrier of
//! the grid where the second launch would begin.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::capacity::dispatch::{self, DispatchDesc};
use crate::experts::Dispatched;
use crate::registry::Kernel;
use crate::routers::gating::{self, GatingDesc, HeldInputs, Routing, RuleInputs};
use crate::rules::Gating;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::{GatingAnyDispatchParams, GatingDispatchParams};
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection, Tensor, TokenMask, Workspace};

const OPERATION: &str = "gating_dispatch";

/// Rule of a gating, and shapes of the dispatch that follows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GatingDispatchDesc {
    /// The rule by which experts are chosen.
    pub gating: Gating,
    /// Tokens, experts, choices, and how slots are laid out; `top_k` is at most the number of eligible experts. Appended experts count among
    /// both.
    pub dispatch: DispatchDesc,
    /// Experts behind those of `dispatch` that may be chosen too and have no rows: their slots are -1. Not with appended experts.
    pub null_experts: usize,
}

impl GatingDispatchDesc {
    /// Choices by the rule `gating`, laid out as `dispatch` says.
    pub const fn new(gating: Gating, dispatch: DispatchDesc) -> GatingDispatchDesc {
        GatingDispatchDesc { gating, dispatch, null_experts: 0 }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// Those of [`DispatchDesc::validate`] and [`GatingDesc::validate`].
    pub fn validate(&self) -> Result<(), Error> {
        self.dispatch.validate()?;
        if self.dispatch.lays_rows() {
            let argument = if self.dispatch.row_multiple > 1 { "dispatch.row_multiple" } else { "dispatch.max_rows" };
            let reason = "only a dispatch in a launch of its own lays rows";
            return Err(Error::Unexpected { operation: OPERATION, argument, reason });
        }
        if self.null_experts > 0 && self.gating.appended.is_some() {
            return Err(Error::invalid(OPERATION, "null_experts", "0 with appended experts", self.null_experts));
        }
        self.choice().validate()?;
        self.choice().validate_lanes(OPERATION, "in one launch with the dispatch")
    }

    /// The gating alone: without appended experts.
    pub(crate) fn choice(&self) -> GatingDesc {
        let DispatchDesc { tokens, experts, top_k, .. } = self.dispatch;
        let appended = self.gating.appended_experts();
        let own = experts.saturating_sub(appended).saturating_add(self.null_experts);
        GatingDesc::new(tokens, own, top_k.saturating_sub(appended), self.gating)
    }
}

settings!(GatingDispatchDesc { null_experts: usize });

/// Buffers of gating and dispatch in one launch.
#[non_exhaustive]
pub struct GatingDispatchArgs<'a> {
    /// `[T, E]`, of any [`crate::Element`]; see [`gating::GatingArgs`].
    pub logits: Tensor<'a>,
    /// `[E]`; see [`gating::GatingArgs`].
    pub correction_bias: Option<In<'a, f32>>,
    /// Which tokens count: the others take no slot.
    pub mask: TokenMask<'a>,
    /// What else the rule asks for.
    pub rule: RuleInputs<'a>,
    /// `[T, k]`, written.
    pub ids: Out<'a, i32>,
    /// `[T, k]`, written.
    pub weights: Out<'a, f32>,
    /// Filled, with `weights` as the weights of rows; made for at least [`DispatchDesc::shape`].
    pub dispatched: &'a mut Dispatched,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> GatingDispatchArgs<'a> {
    /// `logits` to `ids`, `weights` and `dispatched`, without a correction bias.
    pub fn new(
        logits: impl Into<Tensor<'a>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
        dispatched: &'a mut Dispatched,
        workspace: &'a mut Workspace,
    ) -> GatingDispatchArgs<'a> {
        GatingDispatchArgs {
            logits: logits.into(),
            correction_bias: None,
            mask: TokenMask::all(),
            rule: RuleInputs::new(),
            ids: ids.into(),
            weights: weights.into(),
            dispatched,
            workspace,
        }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> GatingDispatchArgs<'a> {
        GatingDispatchArgs { mask, ..self }
    }

    /// With what else the rule asks for.
    #[must_use]
    pub fn rule(self, rule: RuleInputs<'a>) -> GatingDispatchArgs<'a> {
        GatingDispatchArgs { rule, ..self }
    }
}

buffers!(GatingDispatchArgs<'a> { correction_bias: In<f32> });

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`GatingDispatchDesc::validate`].
pub fn workspace_bytes(desc: &GatingDispatchDesc, device: &DeviceInfo) -> Result<usize, Error> {
    desc.validate()?;
    Ok(dispatch::barrier_bytes(&desc.dispatch, blocks(desc, device)))
}

/// The instructions of a token are those that the gate kernel's header states.
fn blocks(both: &GatingDispatchDesc, device: &DeviceInfo) -> u32 {
    let desc = &both.dispatch;
    let gate = gating::kernel(&both.gating, both.choice().experts, true);
    let work = 18 * u64::from(gate.values) + 60 + 40 * desc.top_k as u64;
    dispatch::blocks(desc, gate.warps(), work, gate.dispatch_resident(), device)
}

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`GatingDispatchDesc::validate`].
pub fn select(desc: &GatingDispatchDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let gate = gating::kernel(&desc.gating, desc.choice().experts, true);
    Ok(Selection::cooperative(Kernel::Gating(gate), blocks(desc, device)))
}

/// Chooses experts and sorts the slots.
///
/// With no tokens counts, offsets and the number of tiles are set to zero, and nothing is launched.
///
/// # Errors
/// Those of [`GatingDispatchDesc::validate`]; [`Error::Unexpected`] for a correction bias with [`TopkSoftmax`](crate::rules::Score::TopkSoftmax); those of a
/// buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those
/// of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GatingDispatchDesc,
    args: GatingDispatchArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let GatingDispatchDesc { gating, dispatch, .. } = desc;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let lists = args.dispatched.fill(&scope, &dispatch.shape())?;
    if dispatch.tokens == 0 {
        lists.zero(&scope)?;
        lists.filled();
        return Ok(());
    }
    let choices = dispatch.tokens * dispatch.top_k;
    let choice = desc.choice();
    let dtype = args.logits.dtype();
    let logits = scope.read_any("logits", args.logits, dispatch.tokens * choice.columns(), dtype.bytes().into())?;
    gating::check_correction_bias(OPERATION, gating, args.correction_bias.is_some())?;
    let bias = scope.read_some("correction_bias", args.correction_bias, choice.experts, SCALAR)?;
    let mask = args.mask.open(&scope, dispatch.tokens)?;
    let inputs = HeldInputs::open(&scope, gating, [dispatch.tokens, choice.experts, choice.top_k], args.rule)?;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write("weights", args.weights, choices, SCALAR)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc, kernels.device())?)?;
    let routing = Routing {
        logits: logits.address(),
        dtype,
        correction_bias: optional(&bias),
        mask: mask.addresses(),
        inputs: inputs.addresses(),
        ids: ids.address(),
        weights: weights.address(),
    };
    let to = dispatch::Outputs::of(lists.addresses(), true);
    enqueue(&scope, desc, &selection, routing, to, workspace.address())?;
    lists.filled();
    Ok(())
}

/// Launches a kernel that ends with gating and dispatch: the parameters of both, and the fields given.
macro_rules! launch_dispatching {
    ($scope:expr, $selection:expr, $desc:expr, $routing:expr, $outputs:expr, $workspace:expr, $common:ident or $any:ident { $($field:ident: $value:expr),* $(,)? }) => {{
        let (desc, routing, outputs): (&$crate::routers::gating_dispatch::GatingDispatchDesc, _, _) = ($desc, $routing, $outputs);
        let (gating, dispatch) = (&desc.gating, &desc.dispatch);
        let $crate::routers::gating::RuleWords { flags, groups, groups_kept, scale, epsilon } =
            $crate::routers::gating::RuleWords::new(gating);
        let [capacity, tokens_per_sequence, padded_rows] = dispatch.capacity_words();
        $crate::routers::gating::launch_rule!(
            $scope,
            $selection,
            gating,
            routing.inputs,
            $common or $any {
                logits: routing.logits.into(),
                correction_bias: routing.correction_bias.into(),
                ids: routing.ids.into(),
                weights: routing.weights.into(),
                tokens: dispatch.tokens as u32,
                experts: (dispatch.experts + desc.null_experts) as u32,
                top_k: desc.choice().top_k as u32,
                groups: groups,
                groups_kept: groups_kept,
                flags: flags,
                scale: scale,
                epsilon: epsilon,
                mask: routing.mask.mask.into(),
                valid_tokens: routing.mask.valid_tokens.into(),
                token_flags: routing.token_flags(gating.garbage),
                capacity: capacity,
                tokens_per_sequence: tokens_per_sequence,
                padded_rows: padded_rows,
                tile_m: dispatch.tile_m as u32,
                row_experts: dispatch.experts as u32,
                counts: outputs.counts.into(),
                offsets: outputs.offsets.into(),
                slot_token: outputs.slot_token.into(),
                token_slot: outputs.token_slot.into(),
                slot_weight: outputs.slot_weight.into(),
                tiles: outputs.tiles.into(),
                num_tiles: outputs.num_tiles.into(),
                workspace: $workspace.into(),
                $($field: $value,)*
            }
        )
    }};
}
pub(crate) use launch_dispatching;

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &GatingDispatchDesc,
    selection: &Selection,
    routing: Routing<'_>,
    outputs: dispatch::Outputs<'_>,
    workspace: Address<'_>,
) -> Result<(), Error> {
    launch_dispatching!(
        scope,
        selection,
        desc,
        routing,
        outputs,
        workspace,
        GatingDispatchParams or GatingAnyDispatchParams {}
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::Groups;
    use crate::rules::{Appended, AppendedWeight, GroupScore, Score};
    use crate::runtime::device::A100;

    fn desc(tokens: usize, experts: usize, top_k: usize) -> GatingDispatchDesc {
        let dispatch = DispatchDesc::new(tokens, experts, top_k, 64);
        GatingDispatchDesc::new(Gating::new(Score::Softmax), dispatch)
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |change: &dyn Fn(&mut GatingDispatchDesc)| {
            let mut desc = desc(1000, 64, 4);
            change(&mut desc);
            select(&desc, &A100).unwrap_err().argument().unwrap()
        };
        assert_eq!(desc(1000, 64, 4).validate(), Ok(()));
        assert_eq!(fault(&|d| d.dispatch.tile_m = 0), "tile_m");
        let appended = Appended::new(1, AppendedWeight::Fixed(1.0));
        assert_eq!(fault(&|d| (d.gating.appended, d.null_experts) = (Some(appended), 1)), "null_experts");
        assert_eq!(fault(&|d| d.null_experts = 5000), "experts");
        assert_eq!(fault(&|d| d.gating.scale = f32::NAN), "scale");
        // Dispatch alone takes more choices than experts, gating does not.
        assert_eq!(fault(&|d| (d.dispatch.experts, d.dispatch.top_k) = (4, 5)), "top_k");
        let groups = Groups::new(7, 1).score(GroupScore::Max);
        assert_eq!(fault(&|d| d.gating.groups = Some(groups)), "groups.count");
    }

    #[test]
    fn workspace_holds_the_counters_of_all_blocks() {
        for experts in [1, 60, 1024, 1025, 4096] {
            for tokens in [0, 1, 31, 32, 33, 1000, 100_000] {
                let desc = desc(tokens, experts, 1);
                let blocks = select(&desc, &A100).unwrap().grid[0] as usize;
                assert!((1..=4 * 108).contains(&blocks), "all are resident");
                assert_eq!(workspace_bytes(&desc, &A100).unwrap(), 32 + blocks * experts * 4);
            }
        }
    }
}
