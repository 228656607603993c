//! The gradient of logits, from those of the chosen experts' weights and of the losses that the router is trained with.
//!
//! With the weights of [`crate::routers::gating`], `w[t,j] = scale p / D` of the scores p of the chosen, and a loss L:
//!
//! `dL/dl[t,e] = sum_j dL/dw[t,j] dw[t,j]/dl[t,e] + balance d(balance loss)/dl[t,e] + z d(z-loss)/dl[t,e] + ..`
//!
//! What a rule's gradient reaches follows from its formula: a softmax over all experts that is not renormalised every logit; renormalised
//! without an epsilon, and the softmax over the chosen, only the chosen; sigmoid scores the chosen; SparseMixer's those near the largest, by the
//! estimate of its authors, which is that of the two softmaxes. One renormalised choice has exactly none.
//! The choice is constant: correction bias and groups have no gradient, and neither has what an expert turned away (give it -1 and its weight's
//! gradient is not read). So are the counts of balancing losses (Switch Transformers, section 2.2).
//! Learned factors have gradients of their own, in the same launch where the device has cooperative ones, appended experts those of their columns, and a factor and a cap of the logits
//! ([`GatingBackwardDesc::logit_rule`]) are gone back through.
//!
//! The same operation is the way back of every router that weighs by a score of the logit: give it the router's ids. For BASE
//! ([`crate::routers::base`]) [`Score::Sigmoid`] of the assignment, for Sinkhorn ([`crate::routers::sinkhorn`]) [`Score::Softmax`], whose plan is
//! constant in either; for sampled experts as a straight-through estimate ([`crate::routers::sampled`]) [`Score::Softmax`] with the inverse
//! temperature as factor. Experts by hash, by sequence or by type have no weights, so no gradient.
//!
//! A row with NaN or +Inf, or with nothing above -Inf, has no gradient, whatever [`crate::rules::Garbage`] the rule lets through.

mod args;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::experts::Dispatched;
use crate::registry::{BLOCK_WARPS, Kernel};
use crate::routers::gating::{check_scales, logit_flags};
use crate::rules::{
    Appended, AppendedWeight, ChoiceBy, Gating, LogitRule, LossGradient, LossScore, Renormalise, Score, Sequences,
};
use crate::runtime::builder::settings;
use crate::runtime::launch::{Held, SCALAR, Scope, optional};
use crate::runtime::params::{GatingBackwardAnyParams, GatingBackwardParams, Pointer, ScaleSumsParams};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Dtype, Error, Kernels, Selection};

pub use args::{GatingBackwardArgs, IdentityRows};

const OPERATION: &str = "gating_backward";

/// Shapes and rule of a gating's backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GatingBackwardDesc {
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Experts per token `k`, 1 to 64, with those that are appended.
    pub top_k: usize,
    /// The rule of the forward pass. With [`Gating::appended`] ids and gradients of weights are `[T, k + appended]`.
    pub gating: Gating,
    /// What the router's product went through to become the logits, whose gradient is asked for before it.
    pub logit_rule: LogitRule,
    /// Losses of the router.
    pub losses: Option<LossGradient>,
    /// In how many parts the gradients of weights come, 1 to 64.
    pub parts: usize,
    /// Adds to results instead of writing them.
    pub accumulate: bool,
}

impl GatingBackwardDesc {
    /// Of `top_k` of `experts` experts for each of `tokens` tokens, without losses.
    pub const fn new(tokens: usize, experts: usize, top_k: usize, gating: Gating) -> GatingBackwardDesc {
        GatingBackwardDesc {
            tokens,
            experts,
            top_k,
            gating,
            logit_rule: LogitRule::PLAIN,
            losses: None,
            parts: 1,
            accumulate: false,
        }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        let gating = &self.gating;
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::experts(OPERATION, self.experts)?;
        let enough = if gating.choice == ChoiceBy::Given { usize::MAX } else { self.experts };
        shape::top_k_up_to(OPERATION, self.top_k, enough, crate::MAX_TOP_K)?;
        if self.choices() > crate::MAX_TOP_K {
            let supported = format!("at most {} with top_k", crate::MAX_TOP_K);
            return Err(Error::unsupported(OPERATION, "gating.appended", supported, gating.appended_experts()));
        }
        shape::product_i32(OPERATION, "ids", &[self.tokens, self.choices()])?;
        shape::product(OPERATION, "logits", &[self.tokens, self.columns()])?;
        if !(1..=crate::MAX_TOP_K).contains(&self.parts) {
            return Err(Error::invalid(OPERATION, "parts", format!("1 to {}", crate::MAX_TOP_K), self.parts));
        }
        self.validate_rule()?;
        self.validate_losses()
    }

    fn validate_rule(&self) -> Result<(), Error> {
        let gating = &self.gating;
        let invalid =
            |argument, expected: &str, got: f32| Err(Error::invalid(OPERATION, argument, expected.to_owned(), got));
        if gating.score == Score::SparseMixer {
            if self.top_k > 2 {
                return Err(Error::unsupported(OPERATION, "top_k", "1 or 2 with Score::SparseMixer", self.top_k));
            }
            if !(gating.jitter.is_finite() && gating.jitter >= 0.0) {
                return invalid("gating.jitter", "a finite number of at least 0", gating.jitter);
            }
        }
        if let Some(Appended { count, weight }) = gating.appended {
            shape::positive(OPERATION, "gating.appended", count)?;
            if weight == AppendedWeight::Column && matches!(gating.score, Score::Softmax | Score::SparseMixer) {
                let supported = format!("AppendedWeight::Fixed with Score::{:?}", gating.score);
                return Err(Error::unsupported(OPERATION, "gating.appended", supported, "AppendedWeight::Column"));
            }
        }
        if !gating.scale.is_finite() {
            return invalid("gating.scale", "a finite number", gating.scale);
        }
        match gating.renormalise {
            Some(Renormalise::Plus(epsilon) | Renormalise::AtLeast(epsilon))
                if !(epsilon.is_finite() && epsilon >= 0.0) =>
            {
                return invalid("gating.renormalise", "an epsilon of at least 0", epsilon);
            }
            Some(Renormalise::PNorm(p)) if p.is_nan() || p <= 0.0 => {
                return invalid("gating.renormalise", "a p above 0", p);
            }
            _ => {}
        }
        if !self.logit_rule.factor.is_finite() {
            return invalid("logit_rule.factor", "a finite number", self.logit_rule.factor);
        }
        match self.logit_rule.softcap {
            Some(cap) if !(cap.is_normal() && cap > 0.0) => {
                invalid("logit_rule.softcap", "a normal number above 0", cap)
            }
            _ => Ok(()),
        }
    }

    fn validate_losses(&self) -> Result<(), Error> {
        let Some(losses) = &self.losses else { return Ok(()) };
        for (argument, value) in [
            ("losses.balance", losses.balance),
            ("losses.z", losses.z),
            ("losses.importance", losses.importance),
            ("losses.sequence", losses.sequence),
        ] {
            if !value.is_finite() {
                return Err(Error::invalid(OPERATION, argument, "a finite number", value));
            }
        }
        if losses.sequence == 0.0 {
            return Ok(());
        }
        let (argument, each) = ("losses.tokens_per_sequence", losses.tokens_per_sequence);
        shape::positive(OPERATION, argument, each)?;
        shape::size(OPERATION, argument, each)?;
        if losses.sequences == Sequences::Alternating && !self.tokens.is_multiple_of(each) {
            let expected = format!("a divisor of the number of tokens, {}, where sequences alternate", self.tokens);
            return Err(Error::invalid(OPERATION, argument, expected, each));
        }
        shape::product(OPERATION, "sequence_counts", &[self.sequences(), self.experts]).map(drop)
    }

    /// Sequences `B` of the loss by sequence.
    pub fn sequences(&self) -> usize {
        self.losses.map_or(1, |losses| self.tokens.div_ceil(losses.tokens_per_sequence.max(1)))
    }

    /// Ids of a token, with those of appended experts.
    fn choices(&self) -> usize {
        self.top_k.saturating_add(self.gating.appended_experts())
    }

    /// Logits of a token.
    fn columns(&self) -> usize {
        self.experts.saturating_add(self.gating.appended_columns())
    }

    fn balances(&self) -> bool {
        self.losses.is_some_and(|losses| losses.balance != 0.0)
    }

    /// Whether the kernel of the common models does it, of f32 logits without a mask.
    fn is_common(&self) -> bool {
        let Gating { score, renormalise, expert_scale, global_scale, appended, .. } = self.gating;
        let by_largest = renormalise == Some(Renormalise::PNorm(f32::INFINITY));
        let learned = expert_scale || global_scale;
        let rule = score != Score::SparseMixer && !by_largest && !learned && appended.is_none();
        let losses = self.losses.is_none_or(|losses| losses.importance == 0.0 && losses.sequence == 0.0);
        rule && losses && self.logit_rule == LogitRule::PLAIN
    }

    /// Regions of the workspace: sums of terms, behind the barrier, and terms.
    fn regions(&self) -> Result<([Region; 2], usize), Error> {
        let mut arena = Arena::new(OPERATION);
        let sums = arena.region("workspace", SUMS_BEGIN + (self.experts + 1) * size_of::<f32>(), 1)?;
        let terms = arena.region("workspace", self.tokens * self.choices(), size_of::<f32>())?;
        Ok(([sums, terms], arena.bytes()))
    }
}

settings!(GatingBackwardDesc { logit_rule: LogitRule, losses: Option<LossGradient>, parts: usize, accumulate: bool });

/// Where sums begin in the workspace.
const SUMS_BEGIN: usize = crate::runtime::workspace::BARRIER_HEADER;

/// Workspace of [`forward`] in bytes where gradients of learned factors are asked for; else it needs none.
///
/// # Errors
/// Those of [`GatingBackwardDesc::validate`].
pub fn workspace_bytes(desc: &GatingBackwardDesc) -> Result<usize, Error> {
    desc.validate()?;
    Ok(desc.regions()?.1)
}

/// Chooses kernel and grid: a warp for each token up to eight blocks a multiprocessor. Logits of 16 bits and a mask have the kernel that knows
/// every rule ([`GatingBackwardDesc`] says whether the rule does).
///
/// # Errors
/// Those of [`GatingBackwardDesc::validate`].
pub fn select(desc: &GatingBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    select_for(desc, device, false, false)
}

/// The same; `any`: by the kernel that knows every rule, as with [`GatingBackwardArgs::admitted`], [`GatingBackwardArgs::identities`] and
/// [`GatingBackwardArgs::d_choices`]. `sums_up`: with gradients of learned factors, which are sums over tokens behind a grid barrier.
pub(crate) fn select_for(
    desc: &GatingBackwardDesc,
    device: &DeviceInfo,
    any: bool,
    sums_up: bool,
) -> Result<Selection, Error> {
    desc.validate()?;
    let any = any || !desc.is_common();
    let blocks = (desc.tokens as u32).div_ceil(BLOCK_WARPS).min(8 * device.multiprocessors).max(1);
    let kernel = Kernel::GatingBackward { any };
    Ok(match sums_up && device.cooperative_launch {
        true => Selection::cooperative(kernel, blocks.min(RESIDENT_BLOCKS * device.multiprocessors)),
        false => Selection::new(kernel, [blocks, 1, 1]),
    })
}

/// The launch that adds up gradients of learned factors over tokens, where that of the logits, `of_logits`, has no barrier.
pub(crate) fn select_sums(desc: &GatingBackwardDesc, of_logits: &Selection) -> Option<Selection> {
    let sums = Selection::new(Kernel::ScaleSums, [desc.experts as u32 + 1, 1, 1]);
    (!of_logits.cooperative).then_some(sums)
}

/// Blocks of the kernel that knows every rule that a multiprocessor holds at once.
const RESIDENT_BLOCKS: u32 = 2;

const RENORMALISE: u32 = 1;
const AT_LEAST: u32 = 2;
const BY_NORM: u32 = 4;
const ADD: u32 = 8;
const SIGMOIDS: u32 = 16;
const BALANCE: u32 = 32;
const Z: u32 = 64;
const PLAIN: u32 = 128;
const JOINT: u32 = 256;
const BY_LARGEST: u32 = 512;
const ALTERNATE: u32 = 1024;

/// Rows beside: of 16 bits, of f16, and whether what tokens got is an admission's.
const NARROW: u32 = 1;
const HALF: u32 = 2;
const CANDIDATES: u32 = 4;

/// Rule and losses as words: flags, epsilon, power, score.
fn words(desc: &GatingBackwardDesc) -> (u32, f32, f32, u32) {
    let gating = &desc.gating;
    let (mut flags, epsilon, power) = match gating.renormalise {
        None => (0, 0.0, 1.0),
        Some(Renormalise::Plus(epsilon)) => (RENORMALISE, epsilon, 1.0),
        Some(Renormalise::AtLeast(epsilon)) => (RENORMALISE | AT_LEAST, epsilon, 1.0),
        Some(Renormalise::PNorm(1.0)) => (RENORMALISE, 0.0, 1.0),
        Some(Renormalise::PNorm(f32::INFINITY)) => (RENORMALISE | BY_NORM | BY_LARGEST, 0.0, 1.0),
        Some(Renormalise::PNorm(p)) => (RENORMALISE | BY_NORM, 0.0, p),
    };
    let score = match gating.score {
        Score::Softmax => 0,
        Score::TopkSoftmax => 1,
        Score::Sigmoid => 2,
        Score::SqrtSoftplus => 3,
        Score::SparseMixer => 4,
    };
    let sum_alone = flags == RENORMALISE && epsilon == 0.0;
    let mut set = |when: bool, flag: u32| flags |= if when { flag } else { 0 };
    set(gating.score == Score::Sigmoid && gating.appended_columns() > 0 && sum_alone, JOINT);
    set(desc.accumulate, ADD);
    if let Some(losses) = &desc.losses {
        set(losses.score != LossScore::Softmax, SIGMOIDS);
        set(losses.score == LossScore::PlainSigmoid, PLAIN);
        set(losses.balance != 0.0 || losses.sequence != 0.0, BALANCE);
        set(losses.z != 0.0, Z);
        set(losses.sequence != 0.0 && losses.sequences == Sequences::Alternating, ALTERNATE);
    }
    (flags, epsilon, power, score)
}

/// Buffers are there exactly where the descriptor says so.
fn check_args(desc: &GatingBackwardDesc, args: &GatingBackwardArgs<'_>) -> Result<(), Error> {
    let operation = OPERATION;
    let of = |factor: fn(&LossGradient) -> f32| desc.losses.as_ref().is_some_and(|losses| factor(losses) != 0.0);
    for (argument, wanted, given) in [
        ("counts", desc.balances(), args.counts.is_some()),
        ("importance", of(|losses| losses.importance), args.importance.is_some()),
        ("sequence_counts", of(|losses| losses.sequence), args.sequence_counts.is_some()),
    ] {
        match (wanted, given) {
            (true, false) => return Err(Error::Missing { operation, argument, reason: "its loss has a factor" }),
            (false, true) => {
                return Err(Error::Unexpected { operation, argument, reason: "no loss of it has a factor" });
            }
            _ => {}
        }
    }
    check_scales(OPERATION, &desc.gating, args.expert_scale.is_some(), args.global_scale.is_some())?;
    for (argument, given, reason) in [
        ("counted", args.counted.is_some() && desc.losses.is_none(), "there are no losses"),
        (
            "sequence_tokens",
            args.sequence_tokens.is_some() && args.sequence_counts.is_none(),
            "there is no loss by sequence",
        ),
        (
            "d_expert_scale",
            args.d_expert_scale.is_some() && !desc.gating.expert_scale,
            "the rule does not multiply by it",
        ),
        (
            "d_global_scale",
            args.d_global_scale.is_some() && !desc.gating.global_scale,
            "the rule does not multiply by it",
        ),
    ] {
        if given {
            return Err(Error::Unexpected { operation, argument, reason });
        }
    }
    if (args.d_expert_scale.is_some() || args.d_global_scale.is_some()) && args.workspace.is_none() {
        let reason = "gradients of factors are sums over tokens";
        return Err(Error::Missing { operation, argument: "workspace", reason });
    }
    let by_place = [("admitted", args.admitted.is_some()), ("identities", args.identities.is_some())];
    if let Some((argument, _)) = by_place.into_iter().find(|(_, given)| *given) {
        if args.dispatched.is_none() {
            let reason = "gradients of what tokens got are those of its rows";
            return Err(Error::Missing { operation, argument: "dispatched", reason });
        }
        if desc.parts != 1 {
            return Err(Error::unsupported(operation, "parts", format!("1 with {argument}"), desc.parts));
        }
    }
    let mut choices = desc.choices();
    if let Some(admitted) = &args.admitted {
        admitted.check(operation, args.dispatched.and_then(|dispatched| dispatched.shape().top_k))?;
        if admitted.rule.candidates != choices {
            let (expected, got) = (format!("{choices} candidates, as there are choices"), admitted.rule.candidates);
            return Err(Error::invalid(operation, "admitted.rule", expected, got));
        }
        choices = admitted.rule.top_k;
    }
    if let Some(identities) = &args.identities {
        let (first, last) = identities.experts;
        if first > last || last > i32::MAX as u32 {
            let got = format!("{first}..{last}");
            return Err(Error::invalid(operation, "identities.experts", "a range of numbers of experts", got));
        }
        shape::positive(operation, "identities.hidden", identities.hidden)?;
        shape::product(operation, "identities.x", &[desc.tokens, identities.hidden])?;
        let (expected, got) = (identities.x.dtype(), identities.dy.dtype());
        if got != expected {
            return Err(Error::WrongDtype { operation, argument: "identities.dy", expected, got });
        }
        if !identities.scale.is_finite() {
            return Err(Error::invalid(operation, "identities.scale", "a finite number", identities.scale));
        }
    }
    if let Some(shape) = args.dispatched.map(Dispatched::shape)
        && (shape.tokens, shape.top_k) != (desc.tokens, Some(choices))
    {
        let expected = format!("a dispatch of {} tokens with {choices} choices each", desc.tokens);
        return Err(Error::invalid(OPERATION, "dispatched", expected, format!("{shape:?}")));
    }
    Ok(())
}

/// Computes the gradient of the logits, and where they are asked for those of the rule's learned factors: on a device without cooperative launches in a launch
/// more.
///
/// With no tokens nothing is launched, and gradients of factors become 0, or with `accumulate` stay.
///
/// # Errors
/// Those of [`GatingBackwardDesc::validate`]; [`Error::Missing`] or [`Error::Unexpected`] for buffers against the descriptor; those of a
/// buffer: [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GatingBackwardDesc,
    args: GatingBackwardArgs<'_>,
) -> Result<(), Error> {
    let dtype = args.logits.dtype();
    let by_place = args.admitted.is_some() || args.identities.is_some();
    let any = dtype != Dtype::F32 || !args.mask.is_all() || by_place || args.d_choices.is_some();
    let sums_up = args.d_expert_scale.is_some() || args.d_global_scale.is_some();
    let selection = select_for(desc, kernels.device(), any, sums_up)?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    check_args(desc, &args)?;
    let d_expert_scale = scope.write_some("d_expert_scale", args.d_expert_scale, desc.experts, SCALAR)?;
    let d_global_scale = scope.write_some("d_global_scale", args.d_global_scale, 1, SCALAR)?;
    if desc.tokens == 0 {
        let zero = |held: &Option<Held<'_>>, elements: usize| match held {
            Some(held) if !desc.accumulate => scope.zero(held.address(), elements * size_of::<f32>()),
            _ => Ok(()),
        };
        zero(&d_expert_scale, desc.experts)?;
        return zero(&d_global_scale, 1);
    }
    let (elements, choices) = (desc.tokens * desc.columns(), desc.tokens * desc.choices());
    let logits = scope.read_any("logits", args.logits, elements, dtype.bytes().into())?;
    let ids = scope.read("ids", args.ids, choices, SCALAR)?;
    let gradients = args.dispatched.map_or(choices, |dispatched| dispatched.shape().slots);
    let all_parts = shape::product(OPERATION, "d_weights", &[desc.parts, gradients])?;
    let d_weights = scope.read("d_weights", args.d_weights, all_parts, SCALAR)?;
    let lists = args.dispatched.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let counts = scope.read_some("counts", args.counts, desc.experts, SCALAR)?;
    let counted = scope.read_some("counted", args.counted, 1, SCALAR)?;
    let d_logits = scope.write("d_logits", args.d_logits, elements, SCALAR)?;
    let (flags, epsilon, power, score) = words(desc);
    let losses = desc.losses.unwrap_or(LossGradient::new(LossScore::Softmax));
    let common = GatingBackwardParams {
        logits: logits.address().into(),
        ids: ids.address().into(),
        d_weights: d_weights.address().into(),
        parts: desc.parts as u32,
        part_stride: gradients as u32,
        token_slot: lists.as_ref().map(|lists| lists.addresses().token_slot).into(),
        counts: optional(&counts).into(),
        counted: optional(&counted).into(),
        d_logits: d_logits.address().into(),
        tokens: desc.tokens as u32,
        experts: desc.experts as u32,
        top_k: desc.choices() as u32,
        score,
        flags,
        scale: desc.gating.scale,
        epsilon,
        power,
        balance: losses.balance * desc.experts as f32,
        z: losses.z,
    };
    if selection.kernel.variant() == (Kernel::GatingBackward { any: false }) {
        return scope.launch(&selection, common);
    }

    let expert_scale = scope.read_some("expert_scale", args.expert_scale, desc.experts, SCALAR)?;
    let global_scale = scope.read_some("global_scale", args.global_scale, 1, SCALAR)?;
    let importance = scope.read_some("importance", args.importance, desc.experts, SCALAR)?;
    let sequences = desc.sequences();
    let sequence_counts = scope.read_some("sequence_counts", args.sequence_counts, sequences * desc.experts, SCALAR)?;
    let sequence_tokens = scope.read_some("sequence_tokens", args.sequence_tokens, sequences, SCALAR)?;
    let mask = args.mask.open(&scope, desc.tokens)?;
    let d_choices = scope.write_some("d_choices", args.d_choices, choices, SCALAR)?;
    let rule = args.admitted.map(|admitted| admitted.rule);
    let places = rule.map_or(desc.choices(), |rule| rule.top_k);
    let admitted = args.admitted.map(|admitted| admitted.ids);
    let admitted = scope.read_some("admitted.ids", admitted, desc.tokens * places, SCALAR)?;
    let weights = args.admitted.and_then(|admitted| admitted.weights);
    let weights = scope.read_some("admitted.weights", weights, choices, SCALAR)?;
    let (renormalise_plus, renormalise_least) = rule.map_or((0.0, 0.0), |rule| rule.divisor());
    let (map, map_columns) = args.identities.and_then(|identities| identities.map).unzip();
    let map_columns = map_columns.map_or(Ok(1), |columns| shape::positive(OPERATION, "identities.map", columns))?;
    let map_experts = map.map_or(0, |map| map.len() / map_columns as usize);
    let map = scope.read_some("identities.map", map, map_experts * map_columns as usize, SCALAR)?;
    let rows = args.identities.map(|identities| [("identities.x", identities.x), ("identities.dy", identities.dy)]);
    let hidden = args.identities.map_or(0, |identities| identities.hidden);
    let rows = rows.map(|rows| {
        let [x, dy] = rows
            .map(|(argument, rows)| scope.read_any(argument, rows, desc.tokens * hidden, rows.dtype().bytes().into()));
        Ok::<_, Error>([x?, dy?])
    });
    let rows = rows.transpose()?;
    let [x, dy] = [0, 1].map(|row| rows.as_ref().map(|rows| rows[row].address()));
    let identities = args.identities.map_or((0, 0), |identities| identities.experts);
    let mut row_flags = args.identities.map_or(0, |identities| match identities.x.dtype() {
        Dtype::F32 => 0,
        Dtype::F16 => NARROW | HALF,
        _ => NARROW,
    });
    row_flags |= if rule.is_some() { CANDIDATES } else { 0 };
    let ([sums, terms], bytes) = desc.regions()?;
    let workspace = args.workspace.filter(|_| sums_up).map(|workspace| workspace.open(&scope, bytes)).transpose()?;
    let at = |region: Region| workspace.as_ref().map(|workspace| workspace.at(region));
    let GatingBackwardParams { logits, ids, d_weights, token_slot, counts, counted, d_logits, .. } = common;
    let per_choice = losses.sequence * desc.experts as f32 / desc.top_k as f32;
    scope.launch(
        &selection,
        GatingBackwardAnyParams {
            logits,
            ids,
            d_weights,
            parts: common.parts,
            part_stride: common.part_stride,
            token_slot,
            counts,
            counted,
            d_logits,
            tokens: common.tokens,
            experts: common.experts,
            top_k: common.top_k,
            score,
            flags,
            scale: common.scale,
            epsilon,
            power,
            balance: common.balance,
            z: common.z,
            columns: desc.columns() as u32,
            experts_k: desc.top_k as u32,
            mask: mask.addresses().mask.into(),
            valid_tokens: mask.addresses().valid_tokens.into(),
            token_flags: mask.addresses().flags() | logit_flags(dtype),
            expert_scale: optional(&expert_scale).into(),
            global_scale: optional(&global_scale).into(),
            mixer_limit: 2.0 * desc.gating.jitter,
            factor: desc.logit_rule.factor,
            softcap: desc.logit_rule.softcap.unwrap_or(0.0),
            terms: at(terms).map_or(Pointer::NULL, Pointer::from),
            importance: optional(&importance).into(),
            importance_factor: losses.importance,
            sequence_counts: optional(&sequence_counts).into(),
            sequence_tokens: optional(&sequence_tokens).into(),
            sequence: per_choice,
            tokens_per_sequence: losses.tokens_per_sequence as u32,
            sequences: sequences as u32,
            d_choices: optional(&d_choices).into(),
            place_ids: match (&admitted, &rows) {
                (Some(admitted), _) => admitted.address().into(),
                (None, Some(_)) => ids,
                (None, None) => Pointer::NULL,
            },
            map: optional(&map).into(),
            x: x.into(),
            dy: dy.into(),
            weights: optional(&weights).into(),
            places: places as u32,
            hidden: hidden as u32,
            map_experts: map_experts.min(i32::MAX as usize) as u32,
            map_columns,
            first_identity: identities.0,
            last_identity: identities.1,
            row_flags,
            identity_scale: args.identities.map_or(1.0, |identities| identities.scale),
            renormalises: u32::from(rule.is_some_and(|rule| rule.renormalise.is_some())),
            renormalise_plus,
            renormalise_least,
            choices: choices as u32,
            d_expert_scale: optional(&d_expert_scale).into(),
            d_global_scale: optional(&d_global_scale).into(),
            accumulate: u32::from(desc.accumulate),
            workspace: at(sums).filter(|_| selection.cooperative).map_or(Pointer::NULL, Pointer::from),
        },
    )?;
    let Some(apart) = select_sums(desc, &selection) else { return Ok(()) };
    let (Some(sums), Some(terms)) = (at(sums), at(terms)) else { return Ok(()) };
    scope.launch(
        &apart,
        ScaleSumsParams {
            ids,
            terms: terms.into(),
            choices: choices as u32,
            experts: desc.experts as u32,
            columns: desc.columns() as u32,
            expert_scale: optional(&expert_scale).into(),
            global_scale: optional(&global_scale).into(),
            d_expert_scale: optional(&d_expert_scale).into(),
            d_global_scale: optional(&d_global_scale).into(),
            accumulate: u32::from(desc.accumulate),
            workspace: sums.into(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let with = |gating| GatingBackwardDesc::new(16, 64, 8, gating);
        let plain = Gating::new(Score::Softmax);
        let fault = |desc: GatingBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(with(plain).validate(), Ok(()));
        assert_eq!(with(plain.renormalise(Some(Renormalise::PNorm(0.5)))).validate(), Ok(()));
        assert_eq!(with(plain.renormalise(Some(Renormalise::PNorm(f32::INFINITY)))).validate(), Ok(()));
        assert_eq!(with(plain.expert_scale(true).global_scale(true)).validate(), Ok(()));
        assert_eq!(fault(GatingBackwardDesc { experts: 0, ..with(plain) }), "experts");
        assert_eq!(fault(GatingBackwardDesc { top_k: 65, ..with(plain) }), "top_k");
        assert_eq!(fault(GatingBackwardDesc { tokens: 1 << 40, ..with(plain) }), "tokens");
        assert_eq!(fault(with(plain).parts(0)), "parts");
        assert_eq!(fault(with(plain).parts(65)), "parts");
        let mixer = Gating::new(Score::SparseMixer);
        assert_eq!(fault(with(mixer)), "top_k");
        assert_eq!(GatingBackwardDesc { top_k: 2, ..with(mixer) }.validate(), Ok(()));
        assert_eq!(fault(GatingBackwardDesc { top_k: 2, ..with(mixer.jitter(f32::NAN)) }), "gating.jitter");
        let columns = |count| Some(Appended::new(count, AppendedWeight::Column));
        assert_eq!(fault(with(plain.appended(columns(1)))), "gating.appended");
        assert_eq!(fault(with(Gating::new(Score::Sigmoid).appended(columns(0)))), "gating.appended");
        assert_eq!(fault(with(Gating::new(Score::Sigmoid).appended(columns(57)))), "gating.appended");
        assert_eq!(with(plain.appended(Some(Appended::new(1, AppendedWeight::Fixed(1.0))))).validate(), Ok(()));
        assert_eq!(fault(with(plain.renormalise(Some(Renormalise::PNorm(0.0))))), "gating.renormalise");
        assert_eq!(fault(with(plain.renormalise(Some(Renormalise::Plus(-1.0))))), "gating.renormalise");
        assert_eq!(fault(with(plain.scale(f32::NAN))), "gating.scale");
        assert_eq!(fault(with(plain).logit_rule(LogitRule::PLAIN.factor(f32::NAN))), "logit_rule.factor");
        assert_eq!(fault(with(plain).logit_rule(LogitRule::PLAIN.softcap(Some(0.0)))), "logit_rule.softcap");
        let losses = LossGradient::new(LossScore::Softmax);
        assert_eq!(fault(with(plain).losses(Some(losses.balance(f32::NAN)))), "losses.balance");
        assert_eq!(fault(with(plain).losses(Some(losses.z(f32::INFINITY)))), "losses.z");
        assert_eq!(fault(with(plain).losses(Some(losses.importance(f32::NAN)))), "losses.importance");
        assert_eq!(fault(with(plain).losses(Some(losses.sequence(f32::NAN)))), "losses.sequence");
        let by_sequence = |each| losses.sequence(1.0).tokens_per_sequence(each).sequences(Sequences::Alternating);
        assert_eq!(fault(with(plain).losses(Some(by_sequence(0)))), "losses.tokens_per_sequence");
        assert_eq!(fault(with(plain).losses(Some(by_sequence(5)))), "losses.tokens_per_sequence");
        assert_eq!(with(plain).losses(Some(by_sequence(4))).sequences(), 4);
    }

    #[test]
    fn common_rules_have_a_kernel_of_their_own() {
        let any = |desc: GatingBackwardDesc| {
            let selection = select(&desc, &crate::runtime::device::A100).unwrap();
            selection.kernel.variant() == (Kernel::GatingBackward { any: true })
        };
        let desc = GatingBackwardDesc::new(16, 64, 8, Gating::new(Score::SqrtSoftplus)).parts(3);
        assert!(!any(desc));
        let losses = LossGradient::new(LossScore::Sigmoid);
        assert!(!any(desc.losses(Some(losses.balance(1.0).z(1.0)))));
        assert!(any(desc.losses(Some(losses.importance(1.0)))));
        assert!(any(desc.losses(Some(losses.sequence(1.0)))));
        assert!(any(desc.logit_rule(LogitRule::PLAIN.factor(2.0))));
        assert!(any(GatingBackwardDesc { gating: desc.gating.global_scale(true), ..desc }));
    }
}
