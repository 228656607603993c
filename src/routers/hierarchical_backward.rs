//! The way back through the hierarchical mixture of experts ([`crate::routers::hierarchical`]), in two launches: the experts of each chosen
//! group, then the groups ([`crate::routers::noisy_backward`]).
//!
//! A weight is a product of gates, and a load one of loads (Shazeer et al. 2017, appendix B, eq. 12 and 14): each level's gradient is the other's
//! value times what comes from above. How many tokens a group has is a count, and constant.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::hierarchical::HierarchicalDesc;
use super::noisy::{HeldLogits, NoisyLogits};
use super::noisy_backward::{
    Addresses, NoisyBackwardDesc, NoisyGradients, check_factors, check_sums, enqueue, open_gradients, select_rows,
};
use crate::experts::Dispatched;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::NoisyBackwardGroupedParams;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Error, In, Kernels, Selection, Workspace};

const OPERATION: &str = "hierarchical_backward";

/// Shapes, rules and losses of a hierarchical gating's backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct HierarchicalBackwardDesc {
    /// The forward pass.
    pub forward: HierarchicalDesc,
    /// Factor of `CV(importance)^2` over groups, 0 for none.
    pub primary_importance: f32,
    /// Factor of `CV(load)^2` over groups, 0 for none.
    pub primary_load: f32,
    /// Factor of `CV(Importance_H)^2`, 0 for none.
    pub importance: f32,
    /// Factor of `CV(Load_H)^2`, 0 for none.
    pub load: f32,
    /// Adds to the gradients instead of writing them.
    pub accumulate: bool,
}

impl HierarchicalBackwardDesc {
    /// Of `forward`, without losses.
    pub const fn new(forward: HierarchicalDesc) -> HierarchicalBackwardDesc {
        HierarchicalBackwardDesc {
            forward,
            primary_importance: 0.0,
            primary_load: 0.0,
            importance: 0.0,
            load: 0.0,
            accumulate: false,
        }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// Those of [`HierarchicalDesc::validate`], and [`Error::Invalid`] for a factor.
    pub fn validate(&self) -> Result<(), Error> {
        self.forward.validate()?;
        check_factors(OPERATION, [self.primary_importance, self.primary_load])?;
        check_factors(OPERATION, [self.importance, self.load])
    }

    fn primary(&self) -> NoisyBackwardDesc {
        let HierarchicalDesc { tokens, groups, primary, .. } = self.forward;
        let desc = NoisyBackwardDesc::new(tokens, groups, primary);
        desc.importance(self.primary_importance).load(self.primary_load).accumulate(self.accumulate)
    }

    /// Gradients of groups' weights and loads.
    fn regions(&self) -> Result<([Region; 2], usize), Error> {
        let mut arena = Arena::new(OPERATION);
        arena.barrier()?;
        let weights = arena.region("workspace", self.forward.tokens * self.forward.primary.top_k, size_of::<f32>())?;
        let load = arena.region("workspace", self.forward.groups, size_of::<f32>())?;
        Ok(([weights, load], arena.bytes()))
    }
}

settings!(HierarchicalBackwardDesc {
    primary_importance: f32,
    primary_load: f32,
    importance: f32,
    load: f32,
    accumulate: bool,
});

/// What the first level of the forward pass wrote.
#[non_exhaustive]
pub struct PrimaryInputs<'a> {
    /// `[T, K]`.
    pub ids: In<'a, i32>,
    /// `[T, K]`.
    pub weights: In<'a, f32>,
    /// `[G]`: tokens.
    pub counts: In<'a, i32>,
    /// `[G]`.
    pub importance: In<'a, f32>,
    /// `[G]`.
    pub load: In<'a, f32>,
}

impl<'a> PrimaryInputs<'a> {
    /// Groups, their weights and sums.
    pub fn new(
        ids: impl Into<In<'a, i32>>,
        weights: impl Into<In<'a, f32>>,
        counts: impl Into<In<'a, i32>>,
        [importance, load]: [impl Into<In<'a, f32>>; 2],
    ) -> PrimaryInputs<'a> {
        PrimaryInputs {
            ids: ids.into(),
            weights: weights.into(),
            counts: counts.into(),
            importance: importance.into(),
            load: load.into(),
        }
    }
}

/// Buffers of a hierarchical gating's backward pass.
#[non_exhaustive]
pub struct HierarchicalBackwardArgs<'a> {
    /// `[T, G]` twice, or `[T, 2G]`: the forward pass's.
    pub primary_logits: NoisyLogits<'a>,
    /// `[T, G, E]` twice, or `[T, G, 2E]`: the forward pass's.
    pub logits: NoisyLogits<'a>,
    /// What the first level wrote.
    pub primary: PrimaryInputs<'a>,
    /// `[T, K, k]`, as the forward pass wrote them.
    pub ids: In<'a, i32>,
    /// `[T, K, k]`: gradients of the weights; with `dispatched` `[slots]`, by slot.
    pub d_weights: In<'a, f32>,
    /// The dispatch that `ids` went through. A choice without a slot has no gradient of its own.
    pub dispatched: Option<&'a Dispatched>,
    /// `[2]`: that of the forward pass, if it had one, with the same content.
    pub noise_state: Option<In<'a, u64>>,
    /// `[G, E]`, of the forward pass: exactly where its loss has a factor.
    pub importance: Option<In<'a, f32>>,
    /// `[G, E]`, of the forward pass: exactly where its loss has a factor.
    pub load: Option<In<'a, f32>>,
    /// As `primary_logits`, written, or added to.
    pub d_primary_logits: NoisyGradients<'a>,
    /// As `logits`, written, or added to: 0 in rows of groups that a token did not choose.
    pub d_logits: NoisyGradients<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a> HierarchicalBackwardArgs<'a> {
    /// `d_weights` of `ids` to `d_primary_logits` and `d_logits`.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        primary_logits: NoisyLogits<'a>,
        logits: NoisyLogits<'a>,
        primary: PrimaryInputs<'a>,
        ids: impl Into<In<'a, i32>>,
        d_weights: impl Into<In<'a, f32>>,
        d_primary_logits: NoisyGradients<'a>,
        d_logits: NoisyGradients<'a>,
        workspace: &'a mut Workspace,
    ) -> HierarchicalBackwardArgs<'a> {
        HierarchicalBackwardArgs {
            primary_logits,
            logits,
            primary,
            ids: ids.into(),
            d_weights: d_weights.into(),
            dispatched: None,
            noise_state: None,
            importance: None,
            load: None,
            d_primary_logits,
            d_logits,
            workspace,
        }
    }

    /// With `d_weights` by the slots of `dispatched`.
    #[must_use]
    pub fn dispatched(self, dispatched: &'a Dispatched) -> HierarchicalBackwardArgs<'a> {
        HierarchicalBackwardArgs { dispatched: Some(dispatched), ..self }
    }
}

buffers!(HierarchicalBackwardArgs<'a> { noise_state: In<u64>, importance: In<f32>, load: In<f32> });

/// Chooses kernels and grids: a warp for each token and group, then one for each token.
///
/// # Errors
/// Those of [`HierarchicalBackwardDesc::validate`].
pub fn select(desc: &HierarchicalBackwardDesc, device: &DeviceInfo) -> Result<[Selection; 2], Error> {
    desc.validate()?;
    let HierarchicalDesc { tokens, groups, .. } = desc.forward;
    Ok([select_rows(tokens * groups, true, device), select_rows(tokens, false, device)])
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`HierarchicalBackwardDesc::validate`].
pub fn workspace_bytes(desc: &HierarchicalBackwardDesc) -> Result<usize, Error> {
    desc.validate()?;
    Ok(desc.regions()?.1)
}

/// Computes the gradients of all four products.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`HierarchicalBackwardDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for sums against the descriptor; those of a
/// buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &HierarchicalBackwardDesc,
    args: HierarchicalBackwardArgs<'_>,
) -> Result<(), Error> {
    let [secondary, primary] = select(desc, kernels.device())?;
    let ([d_weights_at, d_load_at], bytes) = desc.regions()?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let sums = [("importance", desc.importance, args.importance.is_some()), ("load", desc.load, args.load.is_some())];
    check_sums(OPERATION, sums)?;
    let HierarchicalDesc { tokens, groups, experts, primary: first, secondary: second, .. } = desc.forward;
    let each = first.top_k * second.top_k;
    if let Some(shape) = args.dispatched.map(Dispatched::shape)
        && (shape.tokens, shape.top_k) != (tokens, Some(each))
    {
        let expected = format!("a dispatch of {tokens} tokens with {each} choices each");
        return Err(Error::invalid(OPERATION, "dispatched", expected, format!("{shape:?}")));
    }
    if tokens == 0 {
        return Ok(());
    }
    let (slots, all) = (tokens * first.top_k, groups * experts);
    let primary_names = ["primary_logits.clean", "primary_logits.raw", "primary_logits"];
    let primary_logits = HeldLogits::open(&scope, args.primary_logits, primary_names, tokens, groups)?;
    let logits = HeldLogits::open(&scope, args.logits, ["clean", "raw", "logits"], tokens * groups, experts)?;
    let primary_ids = scope.read("primary.ids", args.primary.ids, slots, SCALAR)?;
    let primary_weights = scope.read("primary.weights", args.primary.weights, slots, SCALAR)?;
    let primary_counts = scope.read("primary.counts", args.primary.counts, groups, SCALAR)?;
    let primary_importance = scope.read("primary.importance", args.primary.importance, groups, SCALAR)?;
    let primary_load = scope.read("primary.load", args.primary.load, groups, SCALAR)?;
    let ids = scope.read("ids", args.ids, tokens * each, SCALAR)?;
    let gradients = args.dispatched.map_or(tokens * each, |dispatched| dispatched.shape().slots);
    let d_weights = scope.read("d_weights", args.d_weights, gradients, SCALAR)?;
    let lists = args.dispatched.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let importance = scope.read_some("importance", args.importance, all, SCALAR)?;
    let load = scope.read_some("load", args.load, all, SCALAR)?;
    let d_primary_names = ["d_primary_logits.clean", "d_primary_logits.raw", "d_primary_logits"];
    let d_primary_logits = open_gradients(&scope, args.d_primary_logits, d_primary_names, tokens, groups)?;
    let d_names = ["d_clean", "d_raw", "d_logits"];
    let d_logits = open_gradients(&scope, args.d_logits, d_names, tokens * groups, experts)?;
    let workspace = args.workspace.open(&scope, bytes)?;

    let (clean, raw, row_stride) = logits.addresses();
    let (d_clean, d_raw, d_row_stride) = d_logits.addresses();
    let [seed_lo, seed_hi, offset_lo, offset_hi] = second.noise.words_of_source();
    scope.launch(
        &secondary,
        NoisyBackwardGroupedParams {
            clean_logits: clean.into(),
            noise_logits: raw.into(),
            row_stride,
            ids: ids.address().into(),
            d_weights: d_weights.address().into(),
            token_slot: lists.as_ref().map(|lists| lists.addresses().token_slot).into(),
            tokens: tokens as u32,
            experts: experts as u32,
            top_k: second.top_k as u32,
            epsilon: second.noise_epsilon,
            seed_lo,
            seed_hi,
            offset_lo,
            offset_hi,
            noise_state: optional(&noise_state).into(),
            importance: optional(&importance).into(),
            importance_factor: desc.importance,
            load: optional(&load).into(),
            load_factor: desc.load,
            groups: groups as u32,
            primary_k: first.top_k as u32,
            primary_ids: primary_ids.address().into(),
            primary_weights: primary_weights.address().into(),
            primary_load: primary_load.address().into(),
            primary_counts: primary_counts.address().into(),
            d_primary_weights: workspace.at(d_weights_at).into(),
            d_primary_load: workspace.at(d_load_at).into(),
            d_clean: d_clean.into(),
            d_raw: d_raw.into(),
            d_row_stride,
            accumulate: u32::from(desc.accumulate),
        },
    )?;
    let at = Addresses {
        logits: primary_logits.addresses(),
        ids: primary_ids.address(),
        d_weights: workspace.at(d_weights_at),
        token_slot: None,
        noise_state: optional(&noise_state),
        importance: Some(primary_importance.address()).filter(|_| desc.primary_importance != 0.0),
        load: Some(primary_load.address()).filter(|_| desc.primary_load != 0.0),
        d_load: Some(workspace.at(d_load_at)).filter(|_| desc.load != 0.0),
        d_logits: d_primary_logits.addresses(),
    };
    enqueue(&scope, &desc.primary(), &primary, at)
}
