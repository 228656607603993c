//! What a forward pass keeps for the way back.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::{BackwardDesc, BackwardPlan, OPERATION, Origin};
use crate::experts::dispatched::Dispatched;
use crate::layer::desc::{LayerDesc, Mlp};
use crate::layer::forward::{LayerArgs, LayerPlan};
use crate::layer::weights::LayerWeights;
use crate::rules::Dropout;
use crate::runtime::launch::{Scope, WIDE};
use crate::{Dtype, Element, Error, Kernels, Workspace};

/// What a layer's forward pass keeps for its backward pass, beside `x`: logits, choices, rows and pre-activations.
///
/// Made once for a plan, filled by [`LayerPlan::forward_saving`] as often as wanted, read by [`BackwardPlan::backward`]. `x` (and `router_x`) is the
/// caller's and must be given again, unchanged; so are logits that were given.
#[derive(Debug)]
pub struct Saved<T> {
    desc: LayerDesc,
    tokens: usize,
    /// Who chooses in the passes that fill it.
    origin: Origin,
    recompute: bool,
    /// Whether the router saw other rows than `x` in the pass that filled it; none before.
    filled: Option<bool>,
    pub(super) logits: CudaSlice<f32>,
    pub(super) ids: CudaSlice<i32>,
    /// `[T, k]`, where something is read off what was admitted.
    pub(super) admitted: Option<CudaSlice<i32>>,
    /// `[T, candidates]`, where an admission divides by a sum of them.
    pub(super) candidate_weights: Option<CudaSlice<f32>>,
    /// `[T, k]`, where the choices of identities are weighted.
    pub(super) weights: Option<CudaSlice<f32>>,
    /// `[T]`: the sum of identities' weights, where a map says which these are.
    pub(super) identity_weight: Option<CudaSlice<f32>>,
    /// `[T]`, of a shared expert's gate.
    pub(super) shared_gate: Option<CudaSlice<f32>>,
    /// What was drawn by: seed and offset on the device as the pass found them.
    pub(super) dropout: Option<Dropout>,
    pub(super) drew_by_state: bool,
    pub(super) noise_state: CudaSlice<u64>,
    pub(super) dispatched: Dispatched,
    pub(super) pre_activation: Option<CudaSlice<T>>,
    pub(super) shared_pre_activation: Option<CudaSlice<T>>,
    /// `[slots, H]` (`[slots, L]`), of experts whose outputs go through a norm.
    pub(super) slot_outputs: Option<CudaSlice<T>>,
    /// `[T, L]`.
    pub(super) latent_sum: Option<CudaSlice<T>>,
    /// `[T, H]`, in front of a norm of the sum.
    pub(super) sum: Option<CudaSlice<T>>,
    /// All tokens as the rows of one expert, for the gradients of a shared one's weights and of projections.
    pub(super) all_tokens: Option<Dispatched>,
}

/// Elements of the pre-activations of `rows` rows.
fn pre_activations(mlp: &Mlp, rows: usize, intermediate: usize) -> usize {
    let columns = if mlp.gate_up.glu.is_gated() { 2 } else { 1 };
    rows * columns * intermediate
}

/// Elements of each list that a pass of `tokens` tokens keeps, and their sizes: what [`Saved`] allocates.
struct Sizes {
    logits: usize,
    ids: usize,
    admitted: usize,
    candidate_weights: usize,
    weights: usize,
    identity_weight: usize,
    shared_gate: usize,
    pre_activation: usize,
    shared_pre_activation: usize,
    slot_outputs: usize,
    latent_sum: usize,
    sum: usize,
}

impl Sizes {
    fn of(plan: &BackwardPlan) -> Sizes {
        let (desc, tokens) = (plan.layer().desc(), plan.layer().tokens());
        let kept = !plan.desc().recompute;
        let origin = plan.desc().origin;
        let divides = desc.admission.is_some_and(|rule| rule.renormalise.is_some());
        Sizes {
            logits: if origin == Origin::Router { tokens * desc.logit_columns() } else { 0 },
            ids: if origin == Origin::Choices { 0 } else { tokens * desc.candidates() },
            admitted: if plan.asks_admitted() { tokens * desc.all_choices() } else { 0 },
            candidate_weights: if divides && origin != Origin::Choices { tokens * desc.candidates() } else { 0 },
            weights: if plan.identities() && desc.map.is_none() { tokens * desc.all_choices() } else { 0 },
            identity_weight: if desc.map.is_some() { tokens } else { 0 },
            shared_gate: if desc.has_shared_gate() { tokens } else { 0 },
            pre_activation: if kept { pre_activations(&desc.mlp, plan.rows().slots, desc.intermediate) } else { 0 },
            shared_pre_activation: desc
                .shared
                .map_or(0, |shared| pre_activations(&shared.mlp, tokens, shared.intermediate)),
            slot_outputs: if desc.norms.slots.is_some() { plan.rows().slots * desc.expert_width() } else { 0 },
            latent_sum: desc.latent.map_or(0, |latent| tokens * latent.width),
            sum: if desc.norms.output.is_some() { tokens * desc.hidden } else { 0 },
        }
    }

    /// Whether sums over all tokens are taken as those of one expert's rows.
    fn all_tokens(&self) -> bool {
        self.shared_pre_activation > 0 || self.latent_sum > 0
    }
}

/// Bytes that [`Saved`] allocates for `plan`: the sum over its buffers.
pub(super) fn saved_bytes(plan: &BackwardPlan) -> usize {
    let (sizes, element) = (Sizes::of(plan), plan.layer().desc().dtype.bytes() as usize);
    let words = sizes.logits.max(1)
        + sizes.ids.max(1)
        + sizes.admitted
        + sizes.candidate_weights
        + sizes.weights
        + sizes.identity_weight
        + sizes.shared_gate;
    let around = sizes.slot_outputs + sizes.latent_sum + sizes.sum;
    let elements = sizes.pre_activation + sizes.shared_pre_activation + around;
    let all_tokens = if sizes.all_tokens() { Dispatched::bytes_of_one_expert() } else { 0 };
    4 * words + element * elements + Dispatched::bytes_of(plan.rows()) + all_tokens + 2 * size_of::<u64>()
}

impl<T: Element> Saved<T> {
    /// Allocates what `plan` reads, in stream order: [`BackwardPlan::saved_bytes`].
    ///
    /// # Errors
    /// [`Error::WrongDtype`] for a layer of another type than `T`; [`Error::Driver`], out of memory included.
    pub fn new(stream: &Arc<CudaStream>, plan: &BackwardPlan) -> Result<Saved<T>, Error> {
        let (desc, tokens) = (plan.layer().desc(), plan.layer().tokens());
        check_dtype::<T>(desc.dtype)?;
        let failed = || Error::driver(OPERATION);
        let sizes = Sizes::of(plan);
        let some =
            |elements: usize| (elements > 0).then(|| stream.alloc_zeros::<T>(elements).map_err(failed())).transpose();
        let words =
            |elements: usize| (elements > 0).then(|| stream.alloc_zeros::<f32>(elements).map_err(failed())).transpose();
        Ok(Saved {
            desc: *desc,
            tokens,
            origin: plan.desc().origin,
            recompute: plan.desc().recompute,
            filled: None,
            logits: stream.alloc_zeros(sizes.logits.max(1)).map_err(failed())?,
            ids: stream.alloc_zeros(sizes.ids.max(1)).map_err(failed())?,
            admitted: (sizes.admitted > 0).then(|| stream.alloc_zeros(sizes.admitted).map_err(failed())).transpose()?,
            candidate_weights: words(sizes.candidate_weights)?,
            weights: words(sizes.weights)?,
            identity_weight: words(sizes.identity_weight)?,
            shared_gate: words(sizes.shared_gate)?,
            dropout: None,
            drew_by_state: false,
            noise_state: stream.alloc_zeros(2).map_err(failed())?,
            dispatched: Dispatched::new(stream, plan.rows())?,
            pre_activation: some(sizes.pre_activation)?,
            shared_pre_activation: some(sizes.shared_pre_activation)?,
            slot_outputs: some(sizes.slot_outputs)?,
            latent_sum: some(sizes.latent_sum)?,
            sum: some(sizes.sum)?,
            all_tokens: sizes.all_tokens().then(|| Dispatched::of_one_expert(stream, tokens)).transpose()?,
        })
    }

    /// `[T, E]`: the router's logits, with [`Origin::Router`] alone. As all of these, as allocated before a pass has filled them.
    pub fn logits(&self) -> &CudaSlice<f32> {
        &self.logits
    }

    /// `[T, k]`: the chosen experts, with an admission `[T, candidates]` before it; not with [`Origin::Choices`].
    pub fn ids(&self) -> &CudaSlice<i32> {
        &self.ids
    }

    /// `[E]` of the experts that are here: rows of each, the load. Where nothing is dropped and all experts compute, the choices that a balancing loss counts.
    pub fn counts(&self) -> &CudaSlice<i32> {
        self.dispatched.counts()
    }

    /// The rows of every expert.
    pub fn dispatched(&self) -> &Dispatched {
        &self.dispatched
    }

    /// `[slots, 2I]` (`[slots, I]`): what stands before the activation, unless it is computed again.
    pub fn pre_activation(&self) -> Option<&CudaSlice<T>> {
        self.pre_activation.as_ref()
    }

    /// Whether a pass has filled it that `plan` can go back through, and whether its router saw other rows than `x`.
    pub(super) fn check(&self, plan: &BackwardPlan) -> Result<bool, Error> {
        self.check_layer(plan.layer())?;
        let BackwardDesc { origin, recompute, .. } = *plan.desc();
        let wrong = |expected: String, got: String| Err(Error::invalid(OPERATION, "saved", expected, got));
        if (self.origin, self.recompute) != (origin, recompute) {
            let expected = format!("one for Origin::{origin:?} and recompute {recompute}");
            return wrong(expected, format!("one for Origin::{:?} and recompute {}", self.origin, self.recompute));
        }
        match self.filled {
            Some(other_rows) => Ok(other_rows),
            None => wrong("one that a forward pass has filled".to_owned(), "one that none has".to_owned()),
        }
    }

    fn check_layer(&self, plan: &LayerPlan) -> Result<(), Error> {
        if (&self.desc, self.tokens) != (plan.desc(), plan.tokens()) {
            let expected = format!("one of {} tokens of {:?}", plan.tokens(), plan.desc());
            let got = format!("one of {} tokens of {:?}", self.tokens, self.desc);
            return Err(Error::invalid(OPERATION, "saved", expected, got));
        }
        Ok(())
    }
}

fn check_dtype<T: Element>(expected: Dtype) -> Result<(), Error> {
    if T::DTYPE != expected {
        return Err(Error::WrongDtype { operation: OPERATION, argument: "saved", expected, got: T::DTYPE });
    }
    Ok(())
}

impl LayerPlan {
    /// [`LayerPlan::forward`] that keeps in `saved` what [`BackwardPlan::backward`] needs: the same launches, and the same result.
    ///
    /// # Errors
    /// Those of [`LayerPlan::forward`]; [`Error::Invalid`] for a `saved` of another layer or number of tokens; [`Error::Unexpected`] for a
    /// buffer of `args` whose content `saved` holds: logits, ids, counts, pre-activations.
    pub fn forward_saving<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: &LayerWeights<'_>,
        mut args: LayerArgs<'_, T>,
        saved: &mut Saved<T>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        saved.filled = None;
        saved.check_layer(self)?;
        let route = &args.route;
        let held = [
            ("logits", route.logits.is_some()),
            ("ids", route.ids.is_some()),
            ("counts", route.counts.is_some()),
            ("identity_weight", route.identity_weight.is_some()),
            ("weights", route.weights.is_some() && saved.weights.is_some()),
            ("shared_gate", args.shared_gate.is_some()),
            ("pre_activation", args.pre_activation.is_some()),
            ("shared_pre_activation", args.shared_pre_activation.is_some()),
            ("slot_outputs", args.slot_outputs.is_some()),
            ("latent_sum", args.latent_sum.is_some()),
            ("sum", args.sum.is_some()),
        ];
        if let Some((argument, _)) = held.into_iter().find(|(_, given)| *given) {
            return Err(Error::Unexpected { operation: OPERATION, argument, reason: "saved holds it" });
        }
        let origin = match (&args.choices, &route.given_logits) {
            (Some(_), _) => Origin::Choices,
            (None, Some(_)) => Origin::Logits,
            (None, None) => Origin::Router,
        };
        let other_rows = args.router_x.is_some();
        if origin != saved.origin {
            let (expected, got) =
                (format!("one for Origin::{origin:?}"), format!("one for Origin::{:?}", saved.origin));
            return Err(Error::invalid(OPERATION, "saved", expected, got));
        }
        let mut args = args.reborrow();
        if origin == Origin::Router {
            args.route.logits = Some((&mut saved.logits).into());
        }
        if origin != Origin::Choices {
            if self.desc().admission.is_some() {
                args.route.candidates = Some((&mut saved.ids).into());
            } else {
                args.route.ids = Some((&mut saved.ids).into());
            }
            if let Some(weights) = &mut saved.weights {
                args.route.weights = Some(weights.into());
            }
            args.route.candidate_weights = saved.candidate_weights.as_mut().map(Into::into);
        }
        if let Some(admitted) = &mut saved.admitted {
            args.route.ids = Some(admitted.into());
        }
        if let Some(weight) = &mut saved.identity_weight {
            args.route.identity_weight = Some(weight.into());
        }
        if let Some(logits) = &mut saved.shared_gate {
            args.shared_gate = Some(logits.into());
        }
        (saved.dropout, saved.drew_by_state) = (args.dropout, args.dropout.is_some() && args.noise_state.is_some());
        let noise_state = args.noise_state.filter(|_| saved.drew_by_state);
        args.pre_activation = saved.pre_activation.as_mut().map(Into::into);
        args.shared_pre_activation = saved.shared_pre_activation.as_mut().map(Into::into);
        args.slot_outputs = saved.slot_outputs.as_mut().map(Into::into);
        args.latent_sum = saved.latent_sum.as_mut().map(Into::into);
        args.sum = saved.sum.as_mut().map(Into::into);
        self.run(kernels, stream, weights, args, Some(&mut saved.dispatched), workspace, &mut |_| ())?;
        if let Some(state) = noise_state {
            let scope = Scope::begin(OPERATION, kernels, stream)?;
            let from = scope.read("noise_state", state, 2, WIDE)?;
            let to = scope.write("saved", (&mut saved.noise_state).into(), 2, WIDE)?;
            scope.copy(from.address(), to.address(), 2 * size_of::<u64>())?;
        }
        saved.filled = Some(other_rows);
        Ok(())
    }
}
