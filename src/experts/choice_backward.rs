//! The gradient of each choice's weight, from those of the rows that the choices became.
//!
//! With `y[t] = sum_j weights[t,j] v_j`, the gradient of a weight is `<dy[t], v_j>`: of a choice with a row its `d_slot_weight`
//! ([`crate::experts::activation_backward::ActivationBackwardArgs::d_slot_weight`]), of an expert whose output is its input `<dy[t], x[t]>`, of any other choice 0.
//! Where an admission passed choices on or divided their weights they go back through that too ([`crate::capacity::admission_backward`]), in the same launch.
//!
//! [`crate::routers::gating_backward`] does all that itself where the choices are a gating's; this is for whoever else made them.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::dispatched::{Dispatched, SlotShape};
use crate::registry::{BLOCK_WARPS, Kernel};
use crate::rules::{AdmissionRule, Dtype, IdFormat};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::ids::Ids;
use crate::runtime::launch::{SCALAR, Scope, optional};
use crate::runtime::params::ChoiceBackwardParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "choice_backward";

/// Shapes of the choices' way back.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ChoiceBackwardDesc {
    /// Type of `x` and `dy`.
    pub dtype: Dtype,
    /// The rows of the dispatch, of `k` choices a token, 1 to 64.
    pub rows: SlotShape,
    /// Hidden size `H`.
    pub hidden: usize,
    /// Factor of what identities yield: that of the sum over the experts.
    pub identity_scale: f32,
}

impl ChoiceBackwardDesc {
    /// Of a dispatch's choices.
    pub const fn new(dtype: Dtype, rows: SlotShape, hidden: usize) -> ChoiceBackwardDesc {
        ChoiceBackwardDesc { dtype, rows, hidden, identity_scale: 1.0 }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.rows.validate(OPERATION)?;
        match self.rows.top_k {
            Some(top_k) if top_k <= crate::MAX_TOP_K => {}
            top_k => {
                let supported = format!("1 to {}", crate::MAX_TOP_K);
                return Err(Error::unsupported(OPERATION, "rows.top_k", supported, format!("{top_k:?}")));
            }
        }
        shape::positive(OPERATION, "hidden", self.hidden)?;
        if !self.identity_scale.is_finite() {
            return Err(Error::invalid(OPERATION, "identity_scale", "a finite number", self.identity_scale));
        }
        shape::product(OPERATION, "x", &[self.rows.tokens, self.hidden]).map(drop)
    }
}

settings!(ChoiceBackwardDesc { identity_scale: f32 });

/// Buffers of the choices' way back.
#[non_exhaustive]
pub struct ChoiceBackwardArgs<'a, T> {
    /// `[slots]`: gradients by row.
    pub d_slot_weight: In<'a, f32>,
    /// The dispatch whose rows these are, of the descriptor's shape.
    pub dispatched: &'a Dispatched,
    /// Experts whose output is their input.
    pub identities: Option<Identities<'a, T>>,
    /// `[T, K]`: the candidates, exactly with `admitted`.
    pub candidates: Option<In<'a, i32>>,
    /// What an admission made of the candidates; it is what the dispatch went by.
    pub admitted: Option<Admitted<'a>>,
    /// `[T, k]`, with an admission `[T, K]`, written.
    pub d_weights: Out<'a, f32>,
}

impl<'a, T> ChoiceBackwardArgs<'a, T> {
    /// Gradients by row to gradients by choice.
    pub fn new(
        d_slot_weight: impl Into<In<'a, f32>>,
        dispatched: &'a Dispatched,
        d_weights: impl Into<Out<'a, f32>>,
    ) -> ChoiceBackwardArgs<'a, T> {
        let (d_slot_weight, d_weights) = (d_slot_weight.into(), d_weights.into());
        ChoiceBackwardArgs { d_slot_weight, dispatched, identities: None, candidates: None, admitted: None, d_weights }
    }

    /// With experts whose output is their input.
    #[must_use]
    pub fn identities(self, identities: Identities<'a, T>) -> ChoiceBackwardArgs<'a, T> {
        ChoiceBackwardArgs { identities: Some(identities), ..self }
    }

    /// Back to the weights of `candidates`, of which an admission made `admitted`.
    #[must_use]
    pub fn admitted(self, candidates: impl Into<In<'a, i32>>, admitted: Admitted<'a>) -> ChoiceBackwardArgs<'a, T> {
        ChoiceBackwardArgs { candidates: Some(candidates.into()), admitted: Some(admitted), ..self }
    }
}

/// What an admission made of a token's candidates.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Admitted<'a> {
    /// `[T, n]`: what the tokens got.
    pub ids: In<'a, i32>,
    /// `[T, K]`: the candidates' weights, exactly where the rule divides by what is left of them.
    pub weights: Option<In<'a, f32>>,
    /// The rule, of `K` candidates.
    pub rule: AdmissionRule,
}

impl<'a> Admitted<'a> {
    /// `ids`, by `rule`.
    pub fn new(ids: impl Into<In<'a, i32>>, rule: AdmissionRule) -> Admitted<'a> {
        Admitted { ids: ids.into(), weights: None, rule }
    }

    /// Checks weights and shape against the rule, of a dispatch of `top_k` choices a token.
    pub(crate) fn check(&self, operation: &'static str, top_k: Option<usize>) -> Result<(), Error> {
        let (argument, rule) = ("admitted.weights", &self.rule);
        match (rule.renormalise.is_some(), self.weights.is_some()) {
            (true, false) => {
                return Err(Error::Missing { operation, argument, reason: "the rule divides by their sum" });
            }
            (false, true) => {
                return Err(Error::Unexpected { operation, argument, reason: "the rule leaves weights as they are" });
            }
            _ => {}
        }
        if !(1..=AdmissionRule::MAX_CANDIDATES).contains(&rule.candidates) {
            let supported = format!("1 to {} candidates", AdmissionRule::MAX_CANDIDATES);
            return Err(Error::unsupported(operation, "admitted.rule", supported, rule.candidates));
        }
        if top_k != Some(rule.top_k) || rule.top_k > rule.candidates {
            let expected = format!("one that gives each token {top_k:?} of its {} candidates", rule.candidates);
            return Err(Error::invalid(operation, "admitted.rule", expected, rule.top_k));
        }
        Ok(())
    }
}

buffers!(Admitted<'a> { weights: In<f32> });

/// Choices of experts whose output is their input; those that have a row are none.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Identities<'a, T> {
    /// `[T, k]`, in whatever integers: ids as the router knows them. Where an admission says what tokens got, those are read in their place.
    pub ids: Ids<'a>,
    /// Which of them are an identity, where there is no map; at most `i32::MAX`.
    pub experts: (u32, u32),
    /// `[E, R]`: an expert map ([`crate::capacity::expert_map`]), in which the row of an identity begins with [`crate::rules::IDENTITY`]; and R.
    pub map: Option<(In<'a, i32>, usize)>,
    /// `[T, H]`: the experts' input.
    pub x: In<'a, T>,
    /// `[T, H]`: the gradient of the sum.
    pub dy: In<'a, T>,
}

impl<'a, T> Identities<'a, T> {
    /// Those of `ids` that are one of `experts`.
    pub fn new(
        ids: impl Into<Ids<'a>>,
        experts: std::ops::Range<u32>,
        x: impl Into<In<'a, T>>,
        dy: impl Into<In<'a, T>>,
    ) -> Identities<'a, T> {
        let experts = (experts.start, experts.end);
        Identities { ids: ids.into(), experts, map: None, x: x.into(), dy: dy.into() }
    }

    /// Those of `ids` whose row of `map [E, columns]` begins with an identity.
    pub fn of_map(
        ids: impl Into<Ids<'a>>,
        map: impl Into<In<'a, i32>>,
        columns: usize,
        x: impl Into<In<'a, T>>,
        dy: impl Into<In<'a, T>>,
    ) -> Identities<'a, T> {
        Identities { map: Some((map.into(), columns)), ..Identities::new(ids, 0..0, x, dy) }
    }
}

/// Chooses kernel and grid: a warp for each token up to eight blocks a multiprocessor.
///
/// # Errors
/// Those of [`ChoiceBackwardDesc::validate`].
pub fn select(desc: &ChoiceBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let blocks = (desc.rows.tokens as u32).div_ceil(BLOCK_WARPS).min(8 * device.multiprocessors).max(1);
    Ok(Selection::new(Kernel::ChoiceBackward(desc.dtype), [blocks, 1, 1]))
}

/// Computes gradients by choice.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`ChoiceBackwardDesc::validate`]; [`Error::Invalid`] for a dispatch of another shape, a range that is none and a map without columns; those of a
/// buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &ChoiceBackwardDesc,
    args: ChoiceBackwardArgs<'_, T>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("identities.x", desc.dtype)?;
    let (rows, choices) = (&desc.rows, desc.rows.token_slots());
    if args.dispatched.shape() != rows {
        let got = format!("{:?}", args.dispatched.shape());
        return Err(Error::invalid(OPERATION, "dispatched", format!("a dispatch of {rows:?}"), got));
    }
    let (first, last) = args.identities.as_ref().map_or((0, 0), |identities| identities.experts);
    if first > last || last > i32::MAX as u32 {
        let got = format!("{first}..{last}");
        return Err(Error::invalid(OPERATION, "identities.experts", "a range of numbers of experts", got));
    }
    match (args.candidates.is_some(), &args.admitted) {
        (true, None) => {
            let reason = "nothing says what an admission made of them";
            return Err(Error::Unexpected { operation: OPERATION, argument: "candidates", reason });
        }
        (false, Some(_)) => {
            let reason = "an admission chose among them";
            return Err(Error::Missing { operation: OPERATION, argument: "candidates", reason });
        }
        (_, Some(admitted)) => admitted.check(OPERATION, rows.top_k)?,
        (false, None) => {}
    }
    let rule = args.admitted.as_ref().map(|admitted| admitted.rule);
    let (map, columns) = args.identities.as_ref().and_then(|identities| identities.map).unzip();
    let columns = columns.map_or(Ok(1), |columns| shape::positive(OPERATION, "identities.map", columns))?;
    if rows.tokens == 0 {
        return Ok(());
    }
    let d_slot_weight = scope.read("d_slot_weight", args.d_slot_weight, rows.slots, SCALAR)?;
    let lists = args.dispatched.read(&scope)?;
    let (elements, element) = (rows.tokens * desc.hidden, desc.dtype.bytes().into());
    let ids = args.identities.as_ref().map(|identities| identities.ids);
    let format = ids.filter(|_| args.admitted.is_none()).map_or(IdFormat::I32, |ids| ids.format());
    let ids = ids.map(|ids| ids.open(&scope, "identities.ids", ids.format(), choices)).transpose()?;
    let admitted = scope.read_some("admitted.ids", args.admitted.map(|admitted| admitted.ids), choices, SCALAR)?;
    let given = rows.tokens * rule.map_or(0, |rule| rule.candidates);
    let candidates = scope.read_some("candidates", args.candidates, given, SCALAR)?;
    let weights = args.admitted.and_then(|admitted| admitted.weights);
    let weights = scope.read_some("admitted.weights", weights, given, SCALAR)?;
    let experts = map.map_or(0, |map| map.len() / columns as usize);
    let map = scope.read_some("identities.map", map, experts * columns as usize, SCALAR)?;
    let (x, dy) = args.identities.as_ref().map(|identities| (identities.x, identities.dy)).unzip();
    let x = scope.read_some("identities.x", x, elements, element)?;
    let dy = scope.read_some("identities.dy", dy, elements, element)?;
    let d_weights = scope.write("d_weights", args.d_weights, rule.map_or(choices, |_| given), SCALAR)?;
    let (renormalise_plus, renormalise_least) = rule.map_or((0.0, 0.0), |rule| rule.divisor());
    scope.launch(
        &selection,
        ChoiceBackwardParams {
            d_slot_weight: d_slot_weight.address().into(),
            token_slot: lists.addresses().token_slot.into(),
            place_ids: optional(&admitted).or(optional(&ids)).into(),
            id_bytes: format.bytes(),
            map: optional(&map).into(),
            x: optional(&x).into(),
            dy: optional(&dy).into(),
            ids: optional(&candidates).into(),
            weights: optional(&weights).into(),
            d_weights: d_weights.address().into(),
            tokens: rows.tokens as u32,
            places: rows.top_k.unwrap_or(1) as u32,
            candidates: rule.map_or(0, |rule| rule.candidates) as u32,
            hidden: desc.hidden as u32,
            map_experts: experts.min(i32::MAX as usize) as u32,
            map_columns: columns,
            first_identity: first,
            last_identity: last,
            identity_scale: desc.identity_scale,
            renormalises: u32::from(rule.is_some_and(|rule| rule.renormalise.is_some())),
            renormalise_plus,
            renormalise_least,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let rows = SlotShape::new(10, 4, Some(2), 20, 16, 8);
        let desc = ChoiceBackwardDesc::new(Dtype::Bf16, rows, 24);
        let fault = |desc: ChoiceBackwardDesc| desc.validate().unwrap_err().argument().unwrap();
        let with = |top_k| ChoiceBackwardDesc { rows: SlotShape { top_k, ..rows }, ..desc };
        assert_eq!(desc.validate(), Ok(()));
        assert_eq!(fault(ChoiceBackwardDesc { hidden: 0, ..desc }), "hidden");
        assert_eq!(fault(with(None)), "rows.top_k");
        assert_eq!(fault(with(Some(65))), "rows.top_k");
    }
}
