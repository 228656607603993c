//! Combine: each token's sum of its experts' outputs.
//!
//! `y[t] = residual[t] + bias + addend_scale * gate[t] * addend[t] + scale * (identity_scale * identity_weight[t] * identity[t] + sum of w * y_slots[s])` over the
//! token's rows `s`, added in that order in f32 and rounded once: the same input gives the same bits. `gate[t]` is 1, or the sigmoid of a
//! logit. A skipped or dropped slot adds nothing.
//!
//! The rows are those of a dispatch: `k` for each token (rows in the order of its choices), or any number (rows ascending). Their
//! weights are 1 where the second product has put them into its output ([`crate::experts::gemm::GemmArgs::out_scale`]), which keeps large
//! outputs of an expert inside the range of f16; else they are given here.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::dispatched::{Dispatched, RowAddresses, SlotShape};
use super::gemm::swapped::Sum;
use crate::registry::{Combine, CombineRagged, Kernel};
use crate::rules::{Dtype, IdFormat};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::ids::Ids;
use crate::runtime::launch::{Address, SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::{CombineParams, CombineRaggedParams};
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "combine";

/// Shapes and type of a combine.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct CombineDesc {
    /// Type of `y_slots`, `residual`, `addend`, `identity` and `y`.
    pub dtype: Dtype,
    /// The rows of the dispatch.
    pub rows: SlotShape,
    /// Hidden size `H`. Of a multiple of 8 all matrices begin on 16 bytes, else on any element, and it takes longer.
    pub hidden: usize,
    /// Factor of the sum over the experts; 1 in most models.
    pub scale: f32,
    /// Factor of `addend`, beside its gate; 1 in most models. Both 1/2 make a mean of experts and shared expert (Cohere 2).
    pub addend_scale: f32,
    /// Factor of identities beside `scale`, where the rows have been multiplied by theirs: on the way back of a sum with a factor. 1 else.
    pub identity_scale: f32,
    /// Whether the second product has added up each token's rows ([`crate::experts::gemm::Output::TokenSums`]): [`CombineArgs::of_sums`].
    pub sums: bool,
}

impl CombineDesc {
    /// The sums of a dispatch's rows of `hidden` elements of type `dtype`.
    pub const fn new(dtype: Dtype, rows: SlotShape, hidden: usize) -> CombineDesc {
        CombineDesc { dtype, rows, hidden, scale: 1.0, addend_scale: 1.0, identity_scale: 1.0, sums: false }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.check(OPERATION)
    }

    fn check(&self, operation: &'static str) -> Result<(), Error> {
        self.rows.validate(operation)?;
        shape::positive(operation, "hidden", self.hidden)?;
        let factors =
            [("scale", self.scale), ("addend_scale", self.addend_scale), ("identity_scale", self.identity_scale)];
        for (argument, factor) in factors {
            if !factor.is_finite() {
                return Err(Error::invalid(operation, argument, "a finite number", factor));
            }
        }
        shape::product(operation, "y", &[self.rows.tokens, self.hidden])?;
        shape::product(operation, "y_slots", &[self.rows.slots, self.hidden])?;
        Ok(())
    }
}

settings!(CombineDesc { scale: f32, addend_scale: f32, identity_scale: f32, sums: bool });

/// Buffers of a combine.
#[non_exhaustive]
pub struct CombineArgs<'a, T> {
    /// `[slots, H]`, the experts' outputs by row. Rows that no token refers to may hold anything. Exactly without [`CombineDesc::sums`].
    pub y_slots: Option<In<'a, T>>,
    /// `[T, H]`, what each token's rows add up to. Exactly with [`CombineDesc::sums`].
    pub sums: Option<In<'a, f32>>,
    /// The dispatch whose rows these are, of the descriptor's shape.
    pub dispatched: &'a Dispatched,
    /// `[T, k]`, or `[slots]` for ragged tokens; absent, every weight is 1.
    pub weights: Option<In<'a, f32>>,
    /// `[T, H]`, added first.
    pub residual: Option<In<'a, T>>,
    /// Adds to what `y` holds, first: the residual is `y` itself. Not with `residual`.
    pub accumulate: bool,
    /// `[H]`, added second, to every token: a vector that a model has learned (JetMoE).
    pub bias: Option<In<'a, T>>,
    /// `[T, H]`, added third: a shared expert's output.
    pub addend: Option<In<'a, T>>,
    /// `[T]`: `addend` is multiplied by the sigmoid of these (the shared expert of Qwen2-MoE).
    pub addend_gate: Option<In<'a, f32>>,
    /// The part of experts whose output is their input; not for ragged tokens.
    pub identity: Option<Identity<'a, T>>,
    /// `[T, H]`, written.
    pub y: Out<'a, T>,
}

impl<'a, T> CombineArgs<'a, T> {
    /// The sum of each token's rows, all with weight 1, to `y`.
    pub fn new(
        y_slots: impl Into<In<'a, T>>,
        dispatched: &'a Dispatched,
        y: impl Into<Out<'a, T>>,
    ) -> CombineArgs<'a, T> {
        CombineArgs { y_slots: Some(y_slots.into()), ..CombineArgs::to(dispatched, y.into()) }
    }

    /// What stands beside each token's sum, and that sum, to `y`.
    pub fn of_sums(
        sums: impl Into<In<'a, f32>>,
        dispatched: &'a Dispatched,
        y: impl Into<Out<'a, T>>,
    ) -> CombineArgs<'a, T> {
        CombineArgs { sums: Some(sums.into()), ..CombineArgs::to(dispatched, y.into()) }
    }

    fn to(dispatched: &'a Dispatched, y: Out<'a, T>) -> CombineArgs<'a, T> {
        CombineArgs {
            y_slots: None,
            sums: None,
            dispatched,
            weights: None,
            residual: None,
            accumulate: false,
            bias: None,
            addend: None,
            addend_gate: None,
            identity: None,
            y,
        }
    }

    /// Adds to what `y` holds.
    #[must_use]
    pub fn accumulate(self) -> CombineArgs<'a, T> {
        CombineArgs { accumulate: true, ..self }
    }

    /// With experts whose output is their input.
    #[must_use]
    pub fn identity(self, identity: Identity<'a, T>) -> CombineArgs<'a, T> {
        CombineArgs { identity: Some(identity), ..self }
    }
}

buffers!(CombineArgs<'a, T> { weights: In<f32>, residual: In<T>, bias: In<T>, addend: In<T>, addend_gate: In<f32> });

/// The part of experts whose output is their input.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Identity<'a, T> {
    /// `[T, H]`: the experts' input.
    pub x: In<'a, T>,
    /// `[T]`: the sum of their weights ([`crate::capacity::expert_map`]); where it is 0, `x` is not read. With `choices` `[T, k]`.
    pub weight: In<'a, f32>,
    /// Choices by which those of `weight` are added up that are an identity.
    pub choices: Option<IdentityChoices<'a>>,
}

/// A token's choices, some of them of experts whose output is their input.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct IdentityChoices<'a> {
    /// `[T, k]`, in whatever integers.
    pub ids: Ids<'a>,
    /// The numbers of such experts, at most `i32::MAX`.
    pub experts: (u32, u32),
}

impl<'a, T> Identity<'a, T> {
    /// `weight[t] * x[t]`.
    pub fn new(x: impl Into<In<'a, T>>, weight: impl Into<In<'a, f32>>) -> Identity<'a, T> {
        Identity { x: x.into(), weight: weight.into(), choices: None }
    }

    /// The sum of those `weights` `[T, k]` whose expert is one of `experts`, times `x[t]`.
    pub fn of_choices(
        x: impl Into<In<'a, T>>,
        ids: impl Into<Ids<'a>>,
        weights: impl Into<In<'a, f32>>,
        experts: std::ops::Range<u32>,
    ) -> Identity<'a, T> {
        let choices = IdentityChoices { ids: ids.into(), experts: (experts.start, experts.end) };
        Identity { x: x.into(), weight: weights.into(), choices: Some(choices) }
    }
}

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`CombineDesc::validate`]; [`Error::Overflow`] where the grid would exceed the device's limit.
pub fn select(desc: &CombineDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    select_for(OPERATION, desc, device)
}

/// [`select`] on behalf of `operation`.
pub(crate) fn select_for(
    operation: &'static str,
    desc: &CombineDesc,
    _device: &DeviceInfo,
) -> Result<Selection, Error> {
    desc.check(operation)?;
    let any = !desc.hidden.is_multiple_of(8);
    let combine = Combine { dtype: desc.dtype, any };
    let grid = combine.grid(desc.rows.tokens as u32, desc.hidden as u32);
    shape::grid_y(operation, "hidden", grid[1])?;
    let kernel = match desc.rows.top_k {
        _ if desc.sums => Kernel::CombineSums(combine),
        Some(_) => Kernel::Combine(combine),
        None => Kernel::CombineRagged(CombineRagged { dtype: desc.dtype, any }),
    };
    Ok(Selection::new(kernel, grid))
}

/// Computes `y`.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`select`]; [`Error::Invalid`] for a dispatch of another shape; [`Error::Missing`] or [`Error::Unexpected`] for rows or sums against the
/// descriptor; [`Error::Unexpected`] for a residual that `y` is already, a gate without an addend, weights of sums, or an identity for ragged tokens; those of a
/// buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &CombineDesc,
    args: CombineArgs<'_, T>,
) -> Result<(), Error> {
    let (operation, rows) = (OPERATION, &desc.rows);
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(operation, kernels, stream)?;
    scope.check_dtype::<T>("y_slots", desc.dtype)?;
    if args.dispatched.shape() != rows {
        let got = format!("{:?}", args.dispatched.shape());
        return Err(Error::invalid(operation, "dispatched", format!("a dispatch of {rows:?}"), got));
    }
    if args.accumulate && args.residual.is_some() {
        return Err(Error::Unexpected { operation, argument: "residual", reason: "y accumulates" });
    }
    if args.identity.is_some() && rows.top_k.is_none() {
        return Err(Error::Unexpected { operation, argument: "identity", reason: "the tokens are ragged" });
    }
    if args.weights.is_some() && desc.sums {
        return Err(Error::Unexpected { operation, argument: "weights", reason: "the rows have been added up" });
    }
    let given = [("y_slots", !desc.sums, args.y_slots.is_some()), ("sums", desc.sums, args.sums.is_some())];
    for (argument, needed, given) in given {
        match (needed, given) {
            (true, false) => return Err(Error::Missing { operation, argument, reason: "by CombineDesc::sums" }),
            (false, true) => return Err(Error::Unexpected { operation, argument, reason: "by CombineDesc::sums" }),
            _ => {}
        }
    }
    if args.addend_gate.is_some() && args.addend.is_none() {
        return Err(Error::Unexpected { operation, argument: "addend_gate", reason: "there is no addend" });
    }
    if rows.tokens == 0 {
        return Ok(());
    }
    let elements = rows.tokens * desc.hidden;
    let alignment = shape::row_alignment(desc.dtype, desc.hidden);
    let y_slots = scope.read_some("y_slots", args.y_slots, rows.slots * desc.hidden, alignment)?;
    let sums =
        scope.read_some("sums", args.sums, elements, if desc.hidden.is_multiple_of(8) { VECTOR } else { SCALAR })?;
    let dispatched = args.dispatched.read(&scope)?;
    let weights = scope.read_some("weights", args.weights, rows.token_slots(), SCALAR)?;
    let residual = scope.read_some("residual", args.residual, elements, alignment)?;
    let addend = scope.read_some("addend", args.addend, elements, alignment)?;
    let addend_gate = scope.read_some("addend_gate", args.addend_gate, rows.tokens, SCALAR)?;
    let bias = scope.read_some("bias", args.bias, desc.hidden, alignment)?;
    let choices = args.identity.and_then(|identity| identity.choices);
    let (x, weight) = args.identity.map(|identity| (identity.x, identity.weight)).unzip();
    let identity = scope.read_some("identity.x", x, elements, alignment)?;
    let weights_given = if choices.is_some() { rows.token_slots() } else { rows.tokens };
    let identity_weight = scope.read_some("identity.weight", weight, weights_given, SCALAR)?;
    let ids = choices.map(|choices| choices.ids);
    let format = ids.map_or(IdFormat::I32, |ids| ids.format());
    let ids = ids.map(|ids| ids.open(&scope, "identity.choices.ids", format, rows.token_slots())).transpose()?;
    if let Some(IdentityChoices { experts: (first, last), .. }) = choices
        && (first > last || last > i32::MAX as u32)
    {
        let got = format!("{first}..{last}");
        return Err(Error::invalid(operation, "identity.choices.experts", "a range of numbers of experts", got));
    }
    let y = scope.write("y", args.y, elements, alignment)?;
    let at = Addresses {
        y_slots: optional(&y_slots).or(optional(&sums)).expect("one of them is given"),
        rows: dispatched.addresses(),
        weights: optional(&weights),
        residual: if args.accumulate { Some(y.address()) } else { optional(&residual) },
        bias: optional(&bias),
        addend: optional(&addend),
        addend_gate: optional(&addend_gate),
        identity: optional(&identity).zip(optional(&identity_weight)).map(|(x, weight)| IdentityAddresses {
            x,
            weight,
            choices: optional(&ids).zip(choices).map(|(ids, choices)| (ids, format, choices.experts)),
        }),
        y: y.address(),
    };
    enqueue(&scope, desc, &selection, at)
}

/// What a combine reads and writes.
#[derive(Clone, Copy)]
pub(crate) struct Addresses<'a> {
    /// Rows, or sums.
    pub(crate) y_slots: Address<'a>,
    pub(crate) rows: RowAddresses<'a>,
    pub(crate) weights: Option<Address<'a>>,
    /// May be `y`: each thread reads what it then writes.
    pub(crate) residual: Option<Address<'a>>,
    pub(crate) bias: Option<Address<'a>>,
    pub(crate) addend: Option<Address<'a>>,
    pub(crate) addend_gate: Option<Address<'a>>,
    pub(crate) identity: Option<IdentityAddresses<'a>>,
    pub(crate) y: Address<'a>,
}

/// Input and weights of identity experts.
#[derive(Clone, Copy)]
pub(crate) struct IdentityAddresses<'a> {
    pub(crate) x: Address<'a>,
    pub(crate) weight: Address<'a>,
    /// Where `weight` is `[T, k]`: the ids beside it, how they are stored, and which experts are identities.
    pub(crate) choices: Option<(Address<'a>, IdFormat, (u32, u32))>,
}

/// The sums as the end of the launch that writes their rows. Rows have their weights; there is no identity. `early` as in [`Sum`].
pub(crate) fn sum_of<'a>(desc: &CombineDesc, at: &Addresses<'a>, early: bool) -> Sum<'a> {
    Sum {
        y: at.y,
        token_slot: at.rows.token_slot,
        residual: at.residual,
        bias: at.bias,
        addend: at.addend,
        addend_gate: at.addend_gate,
        addend_scale: desc.addend_scale,
        scale: desc.scale,
        tokens: desc.rows.tokens as u32,
        top_k: desc.rows.top_k.unwrap_or(0) as u32,
        early,
    }
}

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &CombineDesc,
    selection: &Selection,
    at: Addresses<'_>,
) -> Result<(), Error> {
    let (tokens, hidden) = (desc.rows.tokens as u32, desc.hidden as u32);
    let top_k = desc.rows.top_k.or(desc.sums.then_some(0));
    let Some(top_k) = top_k else {
        let params = CombineRaggedParams {
            y_slots: at.y_slots.into(),
            token_offsets: at.rows.token_offsets.into(),
            token_slots: at.rows.token_slot.into(),
            slot_weight: at.weights.into(),
            residual: at.residual.into(),
            addend: at.addend.into(),
            addend_gate: at.addend_gate.into(),
            addend_scale: desc.addend_scale,
            scale: desc.scale,
            bias: at.bias.into(),
            y: at.y.into(),
            tokens,
            hidden,
        };
        return scope.launch(selection, params);
    };
    let choices = at.identity.and_then(|identity| identity.choices);
    let (first_identity, last_identity) = choices.map_or((0, 0), |(_, _, identities)| identities);
    scope.launch(
        selection,
        CombineParams {
            y_slots: at.y_slots.into(),
            token_slot: at.rows.token_slot.into(),
            weights: at.weights.into(),
            residual: at.residual.into(),
            addend: at.addend.into(),
            addend_gate: at.addend_gate.into(),
            addend_scale: desc.addend_scale,
            scale: desc.scale,
            bias: at.bias.into(),
            y: at.y.into(),
            identity: at.identity.map(|identity| identity.x).into(),
            identity_weight: at.identity.map(|identity| identity.weight).into(),
            identity_ids: choices.map(|(ids, _, _)| ids).into(),
            identity_id_bytes: choices.map_or(IdFormat::I32, |(_, format, _)| format).bytes(),
            identity_scale: desc.identity_scale,
            first_identity,
            last_identity,
            tokens,
            top_k: top_k as u32,
            hidden,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    fn desc() -> CombineDesc {
        CombineDesc::new(Dtype::Bf16, SlotShape::new(64, 8, Some(2), 128, 64, 10), 2048)
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |change: &dyn Fn(&mut CombineDesc)| {
            let mut desc = desc();
            change(&mut desc);
            select(&desc, &A100).unwrap_err().argument().unwrap()
        };
        assert!(select(&desc(), &A100).is_ok());
        assert_eq!(fault(&|d| d.scale = f32::NAN), "scale");
        assert_eq!(fault(&|d| d.addend_scale = f32::INFINITY), "addend_scale");
        assert_eq!(fault(&|d| d.hidden = 0), "hidden");
        assert_eq!(fault(&|d| d.hidden = 1 << 30), "hidden");
        assert_eq!(fault(&|d| d.rows.top_k = Some(0)), "rows.top_k");
        assert_eq!(fault(&|d| d.rows.tokens = 1 << 30), "rows.top_k");
        assert_eq!(fault(&|d| d.rows.slots = 1 << 31), "rows.slots");
    }

    #[test]
    fn ragged_tokens_have_a_kernel_of_their_own() {
        let mut desc = desc();
        desc.rows.top_k = None;
        let ragged = Kernel::CombineRagged(CombineRagged { dtype: Dtype::Bf16, any: false });
        assert_eq!(select(&desc, &A100).unwrap().kernel, ragged.into());
    }
}
