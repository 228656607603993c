//! Router, gating and dispatch of a few tokens in one launch: what [`crate::routers::router`] followed by [`crate::routers::gating_dispatch`] writes,
//! with the same bits; of more than 512 experts a softmax's sum is added up in another order.
//!
//! Every block computes logits; the one that comes last chooses experts and sorts the slots for all tokens.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::capacity::dispatch;
use crate::experts::Dispatched;
use crate::registry::{Kernel, Route};
use crate::routers::gating::{self, HeldInputs, Routing, RuleInputs};
use crate::routers::gating_dispatch::{GatingDispatchDesc, launch_dispatching};
use crate::routers::router::{self, RouterDesc, SharedGate};
use crate::rules::Dtype;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::{RouteAnyParams, RouteParams};
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, TokenMask, Workspace};

const OPERATION: &str = "route";

/// A router, and what follows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RouteDesc {
    /// Shapes and types of the router: of 1 to 8 tokens, without [`RouterDesc::batch_invariant`]; a hidden size of a multiple of 8. 1 to 16 tokens of
    /// more than 512 experts.
    pub router: RouterDesc,
    /// The rule and the dispatch, of as many tokens and of the router's experts: at most 512, or 4096 with a common score and without groups, capacity
    /// and null experts, in tiles of at least as many rows as there are tokens.
    pub choice: GatingDispatchDesc,
}

impl RouteDesc {
    /// `choice` of the logits of `router`.
    pub const fn new(router: RouterDesc, choice: GatingDispatchDesc) -> RouteDesc {
        RouteDesc { router, choice }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// Those of [`RouterDesc::validate`] and [`GatingDispatchDesc::validate`]; [`Error::Invalid`] for sizes of one that are not the other's;
    /// [`Error::Unsupported`] for what no kernel does in one launch.
    pub fn validate(&self) -> Result<(), Error> {
        self.kernel().map(drop)
    }

    fn kernel(&self) -> Result<Route, Error> {
        let RouteDesc { router, choice } = self;
        router.validate().map_err(|error| error.within(OPERATION))?;
        choice.validate().map_err(|error| error.within(OPERATION))?;
        let (columns, tokens) = (choice.choice().columns(), choice.dispatch.tokens);
        if (router.experts, router.tokens) != (columns, tokens) {
            let expected = format!("a router of {columns} experts for {tokens} tokens");
            let got = format!("one of {} for {}", router.experts, router.tokens);
            return Err(Error::invalid(OPERATION, "router", expected, got));
        }
        candidate(router, choice).ok_or_else(|| {
            let expected = "at most 8 tokens and 512 experts, not batch-invariant, hidden of a multiple of 8; to 16 tokens and 4096 experts a common \
                            rule without groups, capacity and null experts, in tiles as high as tokens";
            Error::unsupported(OPERATION, "router", expected, format!("{router:?}"))
        })
    }
}

settings!(RouteDesc {});

/// The kernel that does both, which have been checked and fit each other, in one launch.
pub(crate) fn candidate(router: &RouterDesc, choice: &GatingDispatchDesc) -> Option<Route> {
    let experts = choice.choice().experts;
    let gate = gating::kernel(&choice.gating, experts, true);
    let values = Route::VALUES.into_iter().chain([Route::MANY]).find(|values| *values as usize * 32 >= experts)?;
    let kernel = Route { score: gate.score, values };
    let few = (1..=kernel.max_tokens()).contains(&router.tokens)
        && router.hidden.is_multiple_of(8)
        && !router.batch_invariant;
    (few && (!kernel.is_many() || suits_many(choice))).then_some(kernel)
}

/// Whether the kernels for very many experts know the rule: a common one without groups, each chosen expert a tile, all of them with rows.
fn suits_many(choice: &GatingDispatchDesc) -> bool {
    choice.gating.is_common()
        && choice.gating.groups.is_none_or(|groups| groups.count == 1)
        && choice.dispatch.capacity.is_none()
        && choice.dispatch.tile_m >= choice.dispatch.tokens
        && choice.null_experts == 0
}

/// Bytes of workspace that a route of such a choice takes: what is best of each block and token, where there are very many experts, for as many tokens as a
/// route has at most.
pub(crate) fn scratch_bytes(choice: &GatingDispatchDesc) -> usize {
    let many = Route { score: None, values: Route::MANY };
    let (experts, tokens) = (choice.choice().experts, choice.dispatch.tokens.min(many.max_tokens()));
    let blocks = if experts > 32 * Route::VALUES[1] as usize { experts.div_ceil(Route::BLOCK_EXPERTS) } else { 0 };
    // One block chooses.
    dispatch::barrier_bytes(&choice.dispatch, 1).max(BARRIER_HEADER + tokens * blocks * 2 * size_of::<u32>())
}

/// The launch of `kernel`: a warp for each row of the router's weight.
pub(crate) fn selection(kernel: Route, router: &RouterDesc, device: &DeviceInfo) -> Selection {
    let rows = router.experts as u32 + u32::from(router.shared_gate);
    let selection = Selection::new(Kernel::Route(kernel), [rows.div_ceil(kernel.warps()), 1, 1]);
    // From 9.0 on the kernel waits itself for the launch in front of it.
    Selection { programmatic: device.compute_capability >= (9, 0), ..selection }
}

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`RouteDesc::validate`].
pub fn select(desc: &RouteDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    Ok(selection(desc.kernel()?, &desc.router, device))
}

/// Workspace of [`forward`] in bytes.
///
/// # Errors
/// Those of [`RouteDesc::validate`].
pub fn workspace_bytes(desc: &RouteDesc, _device: &DeviceInfo) -> Result<usize, Error> {
    desc.validate()?;
    Ok(scratch_bytes(&desc.choice))
}

/// Computes logits, chooses experts and sorts the slots.
///
/// # Errors
/// Those of [`RouteDesc::validate`], of [`router::forward`] and of [`crate::routers::gating_dispatch::forward`].
pub fn forward<X: Element, W: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &RouteDesc,
    args: RouteArgs<'_, X, W>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let RouteDesc { router, choice } = desc;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<X>("x", router.x)?;
    scope.check_dtype::<W>("weight", router.weight)?;
    router::check_gate(OPERATION, "shared_gate", router.shared_gate, args.shared_gate.is_some())?;
    let lists = args.dispatched.fill(&scope, &choice.dispatch.shape())?;
    let rule = choice.choice();
    gating::check_correction_bias(OPERATION, &choice.gating, args.correction_bias.is_some())?;
    let x = scope.read("x", args.x, router.tokens * router.hidden, VECTOR)?;
    let weight = scope.read("weight", args.weight, router.experts * router.hidden, VECTOR)?;
    let bias = scope.read_some("bias", args.bias, router.experts, SCALAR)?;
    let logits = scope.write("logits", args.logits, router.tokens * router.experts, SCALAR)?;
    let (gate_weight, gate_logits) = args.shared_gate.map(|gate| (gate.weight, gate.logits)).unzip();
    let gate_weight = scope.read_some("shared_gate.weight", gate_weight, router.hidden, VECTOR)?;
    let gate_logits = scope.write_some("shared_gate.logits", gate_logits, router.tokens, SCALAR)?;
    let correction_bias = scope.read_some("correction_bias", args.correction_bias, rule.experts, SCALAR)?;
    let mask = args.mask.open(&scope, router.tokens)?;
    let inputs = HeldInputs::open(&scope, &choice.gating, [router.tokens, rule.experts, rule.top_k], args.rule)?;
    let choices = choice.dispatch.tokens * choice.dispatch.top_k;
    let ids = scope.write("ids", args.ids, choices, SCALAR)?;
    let weights = scope.write("weights", args.weights, choices, SCALAR)?;
    let workspace = args.workspace.open(&scope, workspace_bytes(desc, kernels.device())?)?;
    let product = router::Addresses {
        x: x.address(),
        weight: Some(weight.address()),
        bias: optional(&bias),
        logits: Some(logits.address()),
        logits_dtype: Dtype::F32,
        gate: optional(&gate_weight).zip(optional(&gate_logits)),
    };
    let routing = Routing {
        logits: logits.address(),
        dtype: Dtype::F32,
        correction_bias: optional(&correction_bias),
        mask: mask.addresses(),
        inputs: inputs.addresses(),
        ids: ids.address(),
        weights: weights.address(),
    };
    let to = dispatch::Outputs::of(lists.addresses(), true);
    enqueue(&scope, desc, &selection, product, routing, to, workspace.address())?;
    lists.filled();
    Ok(())
}

/// Enqueues both: `product` writes the logits that `routing` reads, of f32.
pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &RouteDesc,
    selection: &Selection,
    product: router::Addresses<'_>,
    routing: Routing<'_>,
    outputs: dispatch::Outputs<'_>,
    workspace: Address<'_>,
) -> Result<(), Error> {
    let RouteDesc { router, choice } = desc;
    let (gate_weight, gate_logits) = product.gate.unzip();
    launch_dispatching!(
        scope,
        selection,
        choice,
        routing,
        outputs,
        workspace,
        RouteParams or RouteAnyParams {
            x: product.x.into(),
            weight: product.weight.into(),
            bias: product.bias.into(),
            gate_weight: gate_weight.into(),
            gate_logits: gate_logits.into(),
            hidden: router.hidden as u32,
            columns: router.experts as u32,
            kind: match (router.x, router.weight) {
                (Dtype::Bf16, Dtype::Bf16) => 0,
                (Dtype::Bf16, _) => 1,
                (Dtype::F16, Dtype::F16) => 2,
                (Dtype::F16, _) => 3,
                (Dtype::F32, _) => 4,
            },
            factor: router.logits.factor,
            softcap: router.logits.softcap.unwrap_or(0.0),
        }
    )
}

/// Buffers of a route.
#[non_exhaustive]
pub struct RouteArgs<'a, X, W> {
    /// `[T, H]`.
    pub x: In<'a, X>,
    /// `[E, H]`.
    pub weight: In<'a, W>,
    /// `[E]`, added to the logits.
    pub bias: Option<In<'a, f32>>,
    /// Exactly with [`RouterDesc::shared_gate`].
    pub shared_gate: Option<SharedGate<'a, W>>,
    /// `[T, E]`, written.
    pub logits: Out<'a, f32>,
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
    /// Filled, with `weights` as the weights of rows.
    pub dispatched: &'a mut Dispatched,
    /// At least [`workspace_bytes`].
    pub workspace: &'a mut Workspace,
}

impl<'a, X, W> RouteArgs<'a, X, W> {
    /// `x` to `logits`, these to `ids` and `weights`, and to `dispatched`.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        x: impl Into<In<'a, X>>,
        weight: impl Into<In<'a, W>>,
        logits: impl Into<Out<'a, f32>>,
        ids: impl Into<Out<'a, i32>>,
        weights: impl Into<Out<'a, f32>>,
        dispatched: &'a mut Dispatched,
        workspace: &'a mut Workspace,
    ) -> RouteArgs<'a, X, W> {
        RouteArgs {
            x: x.into(),
            weight: weight.into(),
            bias: None,
            shared_gate: None,
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

    /// With a shared expert's gate.
    #[must_use]
    pub fn shared_gate(self, gate: SharedGate<'a, W>) -> RouteArgs<'a, X, W> {
        RouteArgs { shared_gate: Some(gate), ..self }
    }

    /// With padding among the tokens.
    #[must_use]
    pub fn mask(self, mask: TokenMask<'a>) -> RouteArgs<'a, X, W> {
        RouteArgs { mask, ..self }
    }

    /// With what else the rule asks for.
    #[must_use]
    pub fn rule(self, rule: RuleInputs<'a>) -> RouteArgs<'a, X, W> {
        RouteArgs { rule, ..self }
    }
}

buffers!(RouteArgs<'a, X, W> { bias: In<f32>, correction_bias: In<f32> });

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capacity::dispatch::DispatchDesc;
    use crate::rules::{Capacity, Gating, Groups, Score};
    use crate::runtime::device::A100;

    fn desc(tokens: usize, experts: usize) -> RouteDesc {
        let choice = GatingDispatchDesc::new(Gating::new(Score::Softmax), DispatchDesc::new(tokens, experts, 2, 16));
        RouteDesc::new(RouterDesc::new(Dtype::Bf16, tokens, experts, 64), choice)
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: RouteDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        assert_eq!(desc(8, 128).validate(), Ok(()));
        assert_eq!(fault(desc(9, 128)), "router");
        assert_eq!(fault(desc(0, 128)), "router");
        assert_eq!(fault(desc(17, 513)), "router");
        assert_eq!(fault(desc(16, 4097)), "experts");
        assert_eq!(fault(RouteDesc { router: desc(7, 128).router, ..desc(8, 128) }), "router");
        assert_eq!(fault(RouteDesc { router: desc(8, 128).router.batch_invariant(true), ..desc(8, 128) }), "router");
        assert_eq!(fault(RouteDesc { choice: desc(8, 1).choice, ..desc(8, 1) }), "top_k");
    }

    #[test]
    fn very_many_experts_have_a_kernel_for_common_rules() {
        assert_eq!(select(&desc(16, 4096), &A100).unwrap().grid[0], 512);
        let many = desc(16, 1000);
        let fault = |change: &dyn Fn(&mut GatingDispatchDesc)| {
            let mut desc = many;
            change(&mut desc.choice);
            select(&desc, &A100).unwrap_err().argument().unwrap()
        };
        assert_eq!(fault(&|choice| choice.gating.expert_scale = true), "router");
        assert_eq!(fault(&|choice| choice.gating.groups = Some(Groups::new(8, 2))), "router");
        assert_eq!(fault(&|choice| choice.dispatch.capacity = Some(Capacity::new(2, 16))), "router");
        assert_eq!(fault(&|choice| choice.dispatch.tile_m = 15), "router");
        assert_eq!(fault(&|choice| (choice.dispatch.experts, choice.null_experts) = (999, 1)), "router");
        // A workspace for any number of tokens serves fewer.
        let bytes = |tokens| scratch_bytes(&desc(tokens, 4096).choice);
        assert_eq!([bytes(1), bytes(3), bytes(16), bytes(5000)], [16416, 16416, 65568, 65568]);
    }

    #[test]
    fn a_warp_has_a_row() {
        let grid = |desc: RouteDesc| select(&desc, &A100).unwrap().grid[0];
        assert_eq!([grid(desc(1, 8)), grid(desc(8, 9)), grid(desc(8, 512))], [1, 2, 64]);
        assert_eq!(grid(RouteDesc { router: desc(8, 8).router.shared_gate(true), ..desc(8, 8) }), 2);
    }
}
