//! From a layer's plan to that of its way back.

use super::around::AroundBack;
use super::mlp::{self, Joined, MlpPlan, Sizes};
use super::norms::{self, NormSteps};
use super::router::{GATE, ROUTER};
use super::saved::saved_bytes;
use super::{BackwardDesc, BackwardStage, OPERATION, Origin};
use crate::experts::choice_backward::{self, ChoiceBackwardDesc};
use crate::experts::combine::{self, CombineDesc};
use crate::experts::dispatched::SlotShape;
use crate::experts::gemm::Rows;
use crate::layer::desc::LayerDesc;
use crate::layer::forward::LayerPlan;
use crate::layer::{Stage, Step};
use crate::routers::gating_backward::{self, GatingBackwardDesc};
use crate::routers::router_backward::{self, RouterBackwardDesc};
use crate::rules::{AdmissionRule, Dtype, LogitRule, NullOutput, RmsNorm, Weighting};
use crate::runtime::workspace::{Arena, BARRIER_HEADER, Region};
use crate::{DeviceInfo, Error, Kernel, Selection};

/// Most launches, but for those of norms, projections and a shared expert of another form, and of sums of learned factors where these have one.
const MOST_LAUNCHES: usize = 9;

/// Every choice for a layer's backward pass and a number of tokens: kernels, grids, and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct BackwardPlan {
    layer: LayerPlan,
    desc: BackwardDesc,
    pub(super) routed: MlpPlan,
    /// The shared expert's own launches; the routed experts' have its rows where it [joins](BackwardPlan::joins), whatever its width.
    pub(super) shared: Option<MlpPlan>,
    /// The product of a shared expert's gate.
    pub(super) gate: Option<RouterSteps>,
    /// The first product again.
    pub(super) again: Option<Selection>,
    /// Gradients by choice, for who asks for them without those of logits.
    pub(super) choices: Step<ChoiceBackwardDesc>,
    /// Where candidates' weights are not those of what was admitted, or an identity may have been dropped.
    pub(super) admission: Option<AdmissionRule>,
    pub(super) gating: Option<Step<GatingBackwardDesc>>,
    /// Sums of learned factors' gradients, where the gating's launch does not have them.
    pub(super) factors: Option<Selection>,
    pub(super) router: Option<RouterSteps>,
    pub(super) sum: Step<CombineDesc>,
    /// Of what the router sees, where the layer's is asked, and of what the routed experts see.
    pub(super) router_norm: Option<NormSteps>,
    pub(super) expert_norm: Option<NormSteps>,
    /// Norms behind the experts, and projections.
    pub(super) around: AroundBack,
    /// A shared expert's part of the gradient of `x` beside a norm or a projection of what the others see.
    pub(super) shared_sum: Option<Step<CombineDesc>>,
    pub(super) regions: Regions,
    workspace_bytes: usize,
}

/// Both gradients of the router's product.
#[derive(Clone, Copy, Debug)]
pub(super) struct RouterSteps {
    pub(super) desc: RouterBackwardDesc,
    weight: Selection,
    input: Selection,
    /// Both in one launch, where there would be more than nine.
    both: Selection,
    pub(super) merges: bool,
    /// For sums of parts, a gate's among them.
    scratch_bytes: usize,
}

/// Places in the workspace, beside those of the products.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regions {
    pub(super) d_logits: Region,
    pub(super) pre_activation: Region,
    /// `[T]` of 1.
    pub(super) ones: Region,
    /// What operations keep at the begin.
    pub(super) scratch: Region,
    /// `[T]`: the values of a shared expert's gate, beside the gradient of its second product's bias.
    pub(super) shared_gate: Region,
}

impl LayerPlan {
    /// Plans the way back.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what has no backward pass here, naming the field; [`Error::Invalid`] or [`Error::Overflow`] for losses out of range or sizes past a limit.
    pub fn backward_plan(&self, desc: &BackwardDesc) -> Result<BackwardPlan, Error> {
        BackwardPlan::new(self, desc)
    }
}

impl BackwardPlan {
    fn new(layer: &LayerPlan, desc: &BackwardDesc) -> Result<BackwardPlan, Error> {
        let within = |error: Error| error.within(OPERATION);
        let (of, tokens, device) = (layer.desc(), layer.tokens(), layer.experts().device());
        check(of, desc)?;
        let rows = *layer.experts().rows();
        let all = Rows::Dense(tokens);
        let joined = of.shared.filter(|shared| shared.joins_back(of) && tokens > 0).map(|shared| Joined {
            rows: tokens,
            intermediate: shared.intermediate,
            activation: shared.mlp.activation,
            scale: shared.scale,
            gate: shared.gated,
        });
        let routed = Sizes {
            dtype: of.dtype,
            rows: Rows::Grouped(rows),
            width: of.expert_width(),
            intermediate: of.intermediate,
            kernels: of.kernels(),
            weighting: of.weighting,
            // A norm of each row behind the experts has the factor.
            scale: if of.norms.slots.is_some() { 1.0 } else { of.routed_scale },
            gate: false,
            own_outputs: of.norms.slots.is_some(),
            shared: joined,
        };
        let shared = of.shared.map(|shared| {
            let sizes = Sizes {
                rows: all,
                width: of.hidden,
                own_outputs: false,
                intermediate: shared.intermediate,
                weighting: Weighting::Output,
                scale: shared.scale,
                gate: shared.gated,
                shared: None,
                ..routed
            };
            MlpPlan::new(&shared.mlp, sizes, desc, device)
        });
        let (mut routed, mut shared) = (MlpPlan::new(&of.mlp, routed, desc, device)?, shared.transpose()?);
        let gate = of.has_shared_gate().then(|| RouterSteps::new(of, tokens, 1, device)).transpose()?;
        let width = of.expert_width();
        let choices = ChoiceBackwardDesc::new(of.dtype, rows, width).identity_scale(of.routed_scale);
        let choices = Step { desc: choices, selection: choice_backward::select(&choices, device).map_err(within)? };

        let admission = of.admission.filter(|rule| rule.regrades() || has_identities(of));
        let gating = (desc.origin != Origin::Choices).then(|| {
            let top_k = of.admission.map_or(of.top_k, |rule| rule.candidates);
            let desc = GatingBackwardDesc::new(tokens, of.experts, top_k, of.gating)
                .losses(desc.losses)
                .logit_rule(if desc.origin == Origin::Router { of.logits } else { LogitRule::PLAIN });
            let by_place = admission.is_some() || has_identities(of);
            let learned = of.gating.expert_scale || of.gating.global_scale;
            let selection = gating_backward::select_for(&desc, device, by_place, learned);
            Ok::<_, Error>(Step { desc, selection: selection.map_err(within)? })
        });
        let router = (desc.origin == Origin::Router).then(|| RouterSteps::new(of, tokens, of.logit_columns(), device));
        let router = router.transpose()?;
        let norm =
            |norm: RmsNorm, seen| NormSteps::new(norm, [of.dtype, seen], [tokens, of.hidden], desc.accumulate, device);
        let asked = of.norms.router.filter(|_| desc.origin == Origin::Router);
        let mut router_norm = asked.map(|rule| norm(rule, seen_by_router(of))).transpose()?;
        let mut expert_norm = of.norms.experts.map(|rule| norm(rule, of.dtype)).transpose()?;
        let mut around = AroundBack::new(layer, desc, device)?;
        let seen_apart = expert_norm.is_some() || of.latent.is_some();
        let shared_sum = (seen_apart && of.shared.is_some()).then(|| {
            let sum = CombineDesc::new(of.dtype, SlotShape::new(tokens, 1, Some(1), tokens, 1, 0), of.hidden);
            let selection = combine::select_for(OPERATION, &sum, device)?;
            // Nobody's rows.
            let rows = SlotShape { top_k: Some(0), ..sum.rows };
            Ok::<_, Error>(Step { desc: CombineDesc { rows, ..sum }, selection })
        });
        let again = layer.experts().stages().find(|(stage, _)| desc.recompute && *stage == Stage::GateUp);
        let sum = CombineDesc::new(of.dtype, rows, width).identity_scale(of.routed_scale);
        let sum = Step { desc: sum, selection: combine::select_for(OPERATION, &sum, device)? };
        let logits = if desc.origin == Origin::Choices { 0 } else { tokens * of.logit_columns() };
        let kept = if desc.recompute { rows.slots * routed.columns() } else { 0 };
        let gating = gating.transpose()?;
        let learned = of.gating.expert_scale || of.gating.global_scale;
        let factors = gating.filter(|_| learned);
        let factors = factors.and_then(|step| gating_backward::select_sums(&step.desc, &step.selection));
        let gating_bytes = match &gating {
            Some(step) if learned => gating_backward::workspace_bytes(&step.desc).map_err(within)?,
            _ => 0,
        };
        // First what operations keep at the begin of a workspace, one behind the other.
        let scratch = routed.scratch_bytes.max(shared.as_ref().map_or(0, |shared| shared.scratch_bytes));
        let routers = [&router, &gate].into_iter().flatten().map(|steps| steps.scratch_bytes).max();
        let sums = [[of.logit_columns(), 1], [1, of.hidden]].map(|[columns, hidden]| {
            let desc = RouterBackwardDesc::new(of.dtype, tokens, columns, hidden);
            router_backward::workspace_bytes(&desc).map_err(within)
        });
        let [of_logits, of_rows] = sums;
        let scratch = scratch.max(routers.unwrap_or(0)).max(of_logits?).max(of_rows?);
        let mut arena = Arena::new(OPERATION);
        let scratch = arena.region("workspace", scratch.max(gating_bytes).max(BARRIER_HEADER), 1)?;
        routed.lay(&mut arena)?;
        shared.as_mut().map(|shared| shared.lay(&mut arena)).transpose()?;
        for norm in [&mut router_norm, &mut expert_norm].into_iter().flatten() {
            norm.lay(&mut arena)?;
        }
        around.lay(&mut arena, of)?;
        let gated = if gate.is_some() { tokens } else { 0 };
        let regions = Regions {
            d_logits: arena.region("d_logits", logits, 4)?,
            pre_activation: arena.region("pre_activation", kept, of.dtype.bytes() as usize)?,
            ones: arena.region("ones", tokens, 4)?,
            scratch,
            shared_gate: arena.region("shared_gate", gated, 4)?,
        };
        let mut plan = BackwardPlan {
            layer: *layer,
            desc: *desc,
            routed,
            shared,
            gate,
            choices,
            admission,
            again: again.map(|(_, selection)| selection),
            gating,
            factors,
            router,
            sum,
            router_norm,
            expert_norm,
            around,
            shared_sum: shared_sum.transpose()?,
            regions,
            workspace_bytes: arena.bytes(),
        };
        // A router's two products, or a gate's, share a launch where it is one too many.
        if plan.launches_of_experts() > MOST_LAUNCHES {
            [&mut plan.router, &mut plan.gate].into_iter().flatten().for_each(|steps| steps.merges = true);
        }
        Ok(plan)
    }

    /// The plan of the forward pass.
    pub fn layer(&self) -> &LayerPlan {
        &self.layer
    }

    /// What was asked for.
    pub fn desc(&self) -> &BackwardDesc {
        &self.desc
    }

    /// Whether there are experts whose output is their input, or a map that may say so.
    pub(super) fn identities(&self) -> bool {
        has_identities(self.layer.desc())
    }

    /// Whether the way back asks which choices were admitted: for their gradients, or to know an identity that was dropped.
    pub(super) fn asks_admitted(&self) -> bool {
        self.admission.is_some()
    }

    /// Whether a pass by choices from elsewhere reads these again.
    pub(super) fn asks_choices(&self) -> bool {
        self.desc.origin == Origin::Choices && (self.identities() || self.admission.is_some())
    }

    /// Whether the routed experts' launches have a shared expert's rows.
    pub(super) fn joins(&self) -> bool {
        self.routed.sizes.shared.is_some()
    }

    pub(super) fn rows(&self) -> &SlotShape {
        self.layer.experts().rows()
    }

    /// Size of the workspace in bytes; it may be the forward pass's.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Bytes of [`super::Saved`]. With `S = k T` slots (more with a padded capacity) and elements of `b` bytes
    ///
    /// `4 E T + 4 k T + (4 k T + 8 S + lists of E and of tiles) + b S c I + b T c_s I_s`
    ///
    /// of logits, ids, rows and pre-activations, and 16; `c` is 2 with a gate, else 1, `s` the shared expert's. With a norm of each expert's output `b S H` more of
    /// these, with a norm of the sum `b T H`, with a latent width `L` `b T L` of the experts' sum (and `L` in place of `H`). Without the logits, or logits and ids, where these
    /// came from elsewhere, and without `b S c I` where they are computed again; with `4 k T` more where identities are weighted (`4 T` by a map), and `4 T` with a
    /// shared expert's gate. With an admission the ids are of its `K` candidates, `4 K T`; one that passes choices on or divides by their weights, or a map beside
    /// it, keeps what was admitted, `4 k T`, and where it divides the candidates' weights, `4 K T`.
    pub fn saved_bytes(&self) -> usize {
        saved_bytes(self)
    }

    /// The stages with their launches, in order, where all gradients are asked for. One that no buffer is given for leaves its launches out.
    pub fn stages(&self) -> impl Iterator<Item = (BackwardStage, Selection)> + use<> {
        let tokens = self.layer.tokens();
        let (shared, beside) = match self.joins() {
            true => (None, self.shared.filter(|_| !self.routed.input_joins())),
            false => (self.shared.map(|shared| shared.stages(mlp::SHARED)), None),
        };
        // A gating's own way back has them.
        let asks = self.gating.is_none();
        let choices = asks.then_some((BackwardStage::Choices, self.choices.selection));
        let gating = self.gating.map(|step| (BackwardStage::Gating, step.selection));
        let factors = self.factors.map(|selection| (BackwardStage::Factors, selection));
        let router = self.router.map(|steps| steps.stages(ROUTER));
        let again = self.again.map(|selection| (BackwardStage::GateUp, selection));
        // Beside a router the gate is part of its launches.
        let gate = self.gate.filter(|_| self.router.is_none()).map(|gate| gate.stages(GATE));
        let stages = |norm: Option<NormSteps>, names| norm.map_or([vec![], vec![]], |norm| norm.stages(names));
        let [expert_norm_again, expert_norm] = stages(self.expert_norm, norms::EXPERTS);
        let [router_norm_again, router_norm] = stages(self.router_norm, norms::ROUTER);
        let shared_sum = self.shared_sum.map(|step| (BackwardStage::SharedSum, step.selection));
        let [behind_experts, before_experts, to_input] = self.around.stages();
        behind_experts
            .into_iter()
            .chain(expert_norm_again)
            .chain(before_experts)
            .chain(again)
            .chain(self.routed.stages(mlp::ROUTED))
            .chain(beside.map(|shared| (mlp::SHARED.input, shared.input_selection())))
            .chain(shared.into_iter().flatten())
            .chain(choices)
            .chain(gating)
            .chain(factors)
            .chain(router_norm_again)
            .chain(router.into_iter().flatten())
            .chain(router_norm)
            .chain(gate.into_iter().flatten())
            .chain([(BackwardStage::Sum, self.sum.selection)])
            .chain(to_input)
            .chain(expert_norm)
            .chain(shared_sum)
            .filter(move |_| tokens > 0)
    }

    /// Launches without those of norms and of projections to a latent width, which have their own.
    fn launches_of_experts(&self) -> usize {
        self.stages().filter(|(stage, _)| !stage.is_around()).count()
    }

    /// Kernel launches where all gradients are asked for: at most nine, and those of norms and projections; three more where a shared expert's weights have
    /// another form than the others'; on a device without cooperative launches one more where factors are learned.
    pub fn launches(&self) -> usize {
        self.stages().count()
    }

    /// The kernels, for [`crate::Kernels::preload`].
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> + use<> {
        self.stages().map(|(_, selection)| selection.kernel)
    }
}

impl RouterSteps {
    fn new(of: &LayerDesc, tokens: usize, columns: usize, device: &DeviceInfo) -> Result<RouterSteps, Error> {
        let within = |error: Error| error.within(OPERATION);
        let desc = RouterBackwardDesc::new(seen_by_router(of), tokens, columns, of.hidden).weight(of.router_dtype);
        let with_gate = desc.gate(of.has_shared_gate());
        Ok(RouterSteps {
            desc,
            weight: router_backward::select_weight(&with_gate, device).map_err(within)?.0,
            scratch_bytes: router_backward::workspace_bytes(&with_gate).map_err(within)?,
            input: router_backward::select_into_x(&desc, device).map_err(within)?,
            both: router_backward::select_both(&with_gate, device).map_err(within)?.0,
            merges: false,
        })
    }
}

impl RouterSteps {
    fn stages(&self, [weight, input, both]: [BackwardStage; 3]) -> Vec<(BackwardStage, Selection)> {
        match self.merges {
            true => vec![(both, self.both)],
            false => vec![(weight, self.weight), (input, self.input)],
        }
    }

    /// Memory for sums of parts, at a workspace's begin.
    pub(super) fn scratch(&self) -> Region {
        Region { offset: 0, bytes: self.scratch_bytes }
    }
}

/// Type of what the router sees: rows of a norm are not rounded in front of a router of f32.
fn seen_by_router(of: &LayerDesc) -> Dtype {
    if of.norms.router.is_some() && of.router_dtype == Dtype::F32 { Dtype::F32 } else { of.dtype }
}

/// Whether there are experts whose output is their input, or a map that may say so.
fn has_identities(of: &LayerDesc) -> bool {
    of.map.is_some() || of.null.is_some_and(|null| null.output == NullOutput::Input)
}

/// What has no way back here.
fn check(of: &LayerDesc, desc: &BackwardDesc) -> Result<(), Error> {
    // A norm of each expert's output has the factor of the sum on the way back.
    if let Some(norm) = of.norms.slots.filter(|norm| !(norm.factor * of.routed_scale).is_finite()) {
        let expected = format!("one whose product with the factor of norms.slots, {}, is finite", norm.factor);
        return Err(Error::invalid(OPERATION, "routed_scale", expected, of.routed_scale));
    }
    if desc.origin == Origin::Choices && desc.losses.is_some() {
        let reason = "the choices come from elsewhere, with their losses";
        return Err(Error::Unexpected { operation: OPERATION, argument: "losses", reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{MapDesc, Mlp, SharedDesc};
    use crate::rules::{Gating, Glu, LossGradient, LossScore, NullExperts, Renormalise, Score, WeightDesc};
    use crate::runtime::device::{A100, H100};

    const TOKENS: usize = 4096;

    /// Forms of the experts: weights, what their rows' weights scale, a shared expert.
    fn forms(dtype: Dtype, router: Dtype) -> Vec<LayerDesc> {
        let mut all = Vec::new();
        for glu in [Glu::Split, Glu::Apart, Glu::None] {
            let mlp = Mlp::swiglu(dtype).gate_up(WeightDesc::new(dtype).glu(glu));
            let mlp = if glu == Glu::None { Mlp::relu(dtype) } else { mlp };
            for weighting in [Weighting::Output, Weighting::Input, Weighting::Activation] {
                for shared in [None, Some((768, false)), Some((768, true)), Some((1024, false)), Some((1024, true))] {
                    let shared = shared.map(|(size, gated)| SharedDesc::new(size, mlp).gated(gated));
                    let desc = LayerDesc::new(dtype, 512, 768, 8, 2).router_dtype(router).mlp(mlp);
                    all.push(desc.weighting(weighting).shared(shared));
                }
            }
        }
        all
    }

    /// What may stand between choices and rows.
    fn admitted(desc: LayerDesc) -> Vec<LayerDesc> {
        let rule = AdmissionRule::new(8, 2, TOKENS, TOKENS);
        let divided = rule.renormalise(Some(Renormalise::Plus(0.0)));
        let rules = [None, Some(rule), Some(rule.candidates(4)), Some(divided.candidates(3))];
        let mut all: Vec<LayerDesc> = rules
            .into_iter()
            .flat_map(|rule| [None, Some(MapDesc::new(4))].map(|map| desc.admission(rule).map(map)))
            .collect();
        all.extend([NullExperts::zero(2), NullExperts::identity(2)].map(|null| desc.null(Some(null))));
        all
    }

    /// All combinations, on devices with kernels of each set, but for norms and projections, whose launches are their own.
    #[test]
    fn never_more_than_nine_launches() {
        let (mut most, mut plans) = (0, 0);
        let losses = LossGradient::new(LossScore::Softmax).balance(0.01).importance(0.1).sequence(0.1);
        // On one without cooperative launches sums of learned factors are a launch more.
        let plain = DeviceInfo { cooperative_launch: false, ..A100 };
        for (device, dtype, router) in [
            (A100, Dtype::Bf16, Dtype::Bf16),
            (H100, Dtype::Bf16, Dtype::F32),
            (A100, Dtype::F32, Dtype::F32),
            (plain, Dtype::Bf16, Dtype::Bf16),
        ] {
            for desc in forms(dtype, router).into_iter().flat_map(admitted) {
                for learned in [false, true] {
                    let gating = Gating::new(Score::Softmax).expert_scale(learned).global_scale(learned);
                    let Ok(plan) = desc.gating(gating).plan(TOKENS, &device) else { continue };
                    for recompute in [false, true] {
                        for origin in [Origin::Router, Origin::Logits, Origin::Choices] {
                            let asked = BackwardDesc::new().recompute(recompute).origin(origin);
                            let asked = asked.losses((learned && origin != Origin::Choices).then_some(losses));
                            let back = plan.backward_plan(&asked).unwrap();
                            let launches = back.launches();
                            let apart = learned && origin != Origin::Choices && !device.cooperative_launch;
                            assert_eq!(back.stages().any(|(stage, _)| stage == BackwardStage::Factors), apart);
                            let launches = launches - usize::from(apart);
                            assert!(launches <= MOST_LAUNCHES, "{launches} of {asked:?} {:?}", plan.desc());
                            (most, plans) = (most.max(launches), plans + 1);
                        }
                    }
                }
            }
        }
        assert_eq!(most, MOST_LAUNCHES);
        assert!(plans > 10_000, "{plans}");
    }
}
