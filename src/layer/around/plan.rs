//! Launches of norms and projections round the experts.

use super::weights::HeldAround;
use crate::experts::combine::{self, CombineDesc};
use crate::experts::dispatched::{RowAddresses, SlotShape};
use crate::experts::gemm::{self, GemmDesc, Rows};
use crate::experts::rms_norm::{self, RmsNormDesc};
use crate::experts::weight::HeldWeight;
use crate::layer::{LayerDesc, OPERATION, Stage, Step, Weighting};
use crate::rules::RmsNorm;
use crate::runtime::launch::{Address, Held, Scope, optional};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Error, Selection};

/// The launches round the experts, and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(in crate::layer) struct AroundPlan {
    experts: Option<Step<RmsNormDesc>>,
    latent: Option<LatentSteps>,
    slots: Option<Step<RmsNormDesc>>,
    output: Option<Step<RmsNormDesc>>,
    weighting: Weighting,
    regions: Regions,
}

#[derive(Clone, Copy, Debug)]
struct LatentSteps {
    input: Step<GemmDesc>,
    norm: Option<Step<RmsNormDesc>>,
    output: Step<GemmDesc>,
    /// A sum of two rows, without any of experts: of `k` 0.
    sum: Step<CombineDesc>,
    /// Whether a shared expert is added.
    shared: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Regions {
    /// `[T, H]`, the experts' input after a norm.
    experts: Region,
    /// `[T, L]`, the same after the projection.
    latent: Region,
    /// `[T, L]`, the experts' sum; behind `latent`, which is done with only when the products are.
    latent_sum: Region,
    /// `[T, H]`, its projection.
    projected: Region,
    /// `[T, H]`, the sum before the last norm.
    sum: Region,
}

impl AroundPlan {
    /// Plans what `desc` has round experts over `rows`, with places behind what `arena` holds.
    pub(in crate::layer) fn new(
        arena: &mut Arena,
        desc: &LayerDesc,
        rows: &SlotShape,
        device: &DeviceInfo,
    ) -> Result<AroundPlan, Error> {
        let &LayerDesc { dtype, hidden, norms, .. } = desc;
        let kernels = desc.kernels();
        let (tokens, width) = (rows.tokens, desc.expert_width());
        let norm = |norm: Option<RmsNorm>, rows: usize, width: usize| {
            let step = |norm| {
                let desc = RmsNormDesc::new(dtype, rows, width, norm);
                Ok::<_, Error>(Step { desc, selection: rms_norm::select_for(OPERATION, &desc, device)? })
            };
            norm.map(step).transpose()
        };
        let latent = desc.latent.map(|latent| {
            let product = |n, k, weight| {
                let desc = GemmDesc::new(dtype, Rows::Dense(tokens), n, k).kernels(kernels).weight(weight);
                Ok::<_, Error>(Step { desc, selection: gemm::select_for(OPERATION, &desc, device)? })
            };
            let sum = CombineDesc::new(dtype, SlotShape::new(tokens, 1, Some(1), tokens, 1, 0), hidden);
            let selection = combine::select_for(OPERATION, &sum, device)?;
            let nobody = SlotShape { top_k: Some(0), ..sum.rows };
            Ok::<_, Error>(LatentSteps {
                input: product(width, hidden, latent.input)?,
                norm: norm(latent.norm, tokens, width)?,
                output: product(hidden, width, latent.output)?,
                sum: Step { desc: CombineDesc { rows: nobody, ..sum }, selection },
                shared: desc.shared.is_some(),
            })
        });
        let latent = latent.transpose()?;
        let element = dtype.bytes() as usize;
        let mut matrix = |name, there: bool, width: usize| {
            let elements = if there { shape::product(OPERATION, name, &[tokens, width])? } else { 0 };
            arena.region(name, elements, element)
        };
        let regions = Regions {
            experts: matrix("norms.experts", norms.experts.is_some(), hidden)?,
            latent: matrix("latent", latent.is_some(), width)?,
            latent_sum: matrix("latent", latent.is_some(), width)?,
            projected: matrix("latent", latent.is_some(), hidden)?,
            sum: matrix("norms.output", norms.output.is_some(), hidden)?,
        };
        Ok(AroundPlan {
            experts: norm(norms.experts, tokens, hidden)?,
            latent,
            slots: norm(norms.slots, rows.slots, width)?,
            output: norm(norms.output, tokens, hidden)?,
            weighting: desc.weighting,
            regions,
        })
    }

    /// What comes before the experts.
    pub(in crate::layer) fn stages_before(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        let experts = self.experts.map(|step| (Stage::ExpertNorm, step.selection));
        let latent = self.latent.into_iter().flat_map(|latent| {
            [
                Some((Stage::LatentInput, latent.input.selection)),
                latent.norm.map(|step| (Stage::LatentNorm, step.selection)),
            ]
        });
        experts.into_iter().chain(latent.flatten())
    }

    /// What comes between the experts and their sum.
    pub(in crate::layer) fn stages_between(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        self.slots.map(|step| (Stage::SlotNorm, step.selection)).into_iter()
    }

    /// What comes after the sum, without a residual.
    pub(in crate::layer) fn stages_after(&self) -> impl Iterator<Item = (Stage, Selection)> + use<> {
        let latent = self.latent.into_iter().flat_map(|latent| {
            [
                Some((Stage::LatentOutput, latent.output.selection)),
                latent.shared.then_some((Stage::Sum, latent.sum.selection)),
            ]
        });
        latent.flatten().chain(self.output.map(|step| (Stage::OutputNorm, step.selection)))
    }

    /// Makes the experts' input of `x`, and says where it is.
    pub(in crate::layer) fn enqueue_before<'a>(
        &self,
        scope: &Scope<'_>,
        weights: &HeldAround<'_>,
        workspace: &'a Held<'_>,
        x: Address<'a>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<Address<'a>, Error> {
        let mut input = x;
        if let Some(step) = &self.experts {
            let to = workspace.at(self.regions.experts);
            let at = rms_norm::Addresses { weight: optional(&weights.experts), ..rms_norm::Addresses::new(input, to) };
            rms_norm::enqueue(scope, &step.desc, &step.selection, at)?;
            observer(Stage::ExpertNorm);
            input = to;
        }
        let Some((steps, weights)) = self.latent.as_ref().zip(weights.latent.as_ref()) else { return Ok(input) };
        let to = workspace.at(self.regions.latent);
        project(scope, &steps.input, &weights.input, input, to)?;
        observer(Stage::LatentInput);
        if let Some(step) = &steps.norm {
            let at = rms_norm::Addresses { weight: optional(&weights.norm), ..rms_norm::Addresses::new(to, to) };
            rms_norm::enqueue(scope, &step.desc, &step.selection, at)?;
            observer(Stage::LatentNorm);
        }
        Ok(to)
    }

    /// Whether the second product puts the weights into the experts' outputs; else the norm of these does.
    pub(in crate::layer) fn product_weighs(&self) -> bool {
        self.slots.is_none()
    }

    /// Normalises the experts' outputs, to `y_slots`, which may be where they are. `live`: the number of rows, and each one's token.
    pub(in crate::layer) fn enqueue_between(
        &self,
        scope: &Scope<'_>,
        weights: &HeldAround<'_>,
        (outputs, y_slots): (Address<'_>, Address<'_>),
        rows: RowAddresses<'_>,
        live: (Address<'_>, Address<'_>),
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let Some(step) = &self.slots else { return Ok(()) };
        let at = rms_norm::Addresses {
            weight: optional(&weights.slots),
            row_scale: (self.weighting == Weighting::Output).then_some(rows.slot_weight),
            live: Some(live),
            ..rms_norm::Addresses::new(outputs, y_slots)
        };
        rms_norm::enqueue(scope, &step.desc, &step.selection, at)?;
        observer(Stage::SlotNorm);
        Ok(())
    }

    /// Where the experts' sum goes if something comes after it, else none.
    pub(in crate::layer) fn sum_place<'a>(&self, workspace: &'a Held<'_>, kept: KeptSums<'a>) -> Option<Address<'a>> {
        match (&self.latent, &self.output) {
            (Some(_), _) => Some(self.latent_sum(workspace, kept)),
            (None, Some(_)) => Some(self.sum(workspace, kept)),
            (None, None) => None,
        }
    }

    fn latent_sum<'a>(&self, workspace: &'a Held<'_>, kept: KeptSums<'a>) -> Address<'a> {
        kept.latent_sum.unwrap_or_else(|| workspace.at(self.regions.latent_sum))
    }

    fn sum<'a>(&self, workspace: &'a Held<'_>, kept: KeptSums<'a>) -> Address<'a> {
        kept.sum.unwrap_or_else(|| workspace.at(self.regions.sum))
    }

    /// Whether the experts' sum takes shared experts in: they have its width.
    pub(in crate::layer) fn sums_shared(&self) -> bool {
        self.latent.is_none()
    }

    /// What comes after the experts' sum.
    pub(in crate::layer) fn enqueue_after(
        &self,
        scope: &Scope<'_>,
        weights: &HeldAround<'_>,
        workspace: &Held<'_>,
        tail: Tail<'_>,
        observer: &mut dyn FnMut(Stage),
    ) -> Result<(), Error> {
        let (to, residual) = match &self.output {
            Some(_) => (self.sum(workspace, tail.kept), None),
            None => (tail.y, tail.residual),
        };
        if let Some((steps, weights)) = self.latent.as_ref().zip(weights.latent.as_ref()) {
            let from = self.latent_sum(workspace, tail.kept);
            let alone = residual.is_none() && tail.shared.is_none();
            let projected = if alone { to } else { workspace.at(self.regions.projected) };
            project(scope, &steps.output, &weights.output, from, projected)?;
            observer(Stage::LatentOutput);
            let mut add = |to, residual, (addend, gate), addend_scale| {
                let at = combine::Addresses {
                    y_slots: from,
                    rows: tail.rows,
                    weights: None,
                    residual: Some(residual),
                    bias: None,
                    addend: Some(addend),
                    addend_gate: gate,
                    identity: None,
                    y: to,
                };
                combine::enqueue(scope, &steps.sum.desc.addend_scale(addend_scale), &steps.sum.selection, at)?;
                observer(Stage::Sum);
                Ok::<_, Error>(())
            };
            match (tail.shared, residual) {
                (None, None) => {}
                (Some(shared), None) => add(to, projected, shared, tail.shared_scale)?,
                (None, Some(residual)) => add(to, residual, (projected, None), 1.0)?,
                (Some(shared), Some(residual)) => {
                    add(projected, projected, shared, tail.shared_scale)?;
                    add(to, residual, (projected, None), 1.0)?;
                }
            }
        }
        let Some(step) = &self.output else { return Ok(()) };
        let at = rms_norm::Addresses {
            weight: optional(&weights.output),
            residual: tail.residual,
            ..rms_norm::Addresses::new(to, tail.y)
        };
        rms_norm::enqueue(scope, &step.desc, &step.selection, at)?;
        observer(Stage::OutputNorm);
        Ok(())
    }
}

/// What is added after the experts' sum, and where all goes.
#[derive(Clone, Copy)]
pub(in crate::layer) struct Tail<'a> {
    pub(in crate::layer) rows: RowAddresses<'a>,
    /// A shared expert's output, and the logits of its gate.
    pub(in crate::layer) shared: Option<(Address<'a>, Option<Address<'a>>)>,
    /// Its factor.
    pub(in crate::layer) shared_scale: f32,
    /// May be `y`.
    pub(in crate::layer) residual: Option<Address<'a>>,
    pub(in crate::layer) kept: KeptSums<'a>,
    pub(in crate::layer) y: Address<'a>,
}

/// Buffers of the caller's for sums, which a backward pass reads; else they are in the workspace.
#[derive(Clone, Copy, Default)]
pub(in crate::layer) struct KeptSums<'a> {
    /// `[T, L]`: the experts', in front of its projection.
    pub(in crate::layer) latent_sum: Option<Address<'a>>,
    /// `[T, H]`: in front of the last norm.
    pub(in crate::layer) sum: Option<Address<'a>>,
}

/// A dense product.
fn project(
    scope: &Scope<'_>,
    step: &Step<GemmDesc>,
    weight: &HeldWeight<'_>,
    a: Address<'_>,
    out: Address<'_>,
) -> Result<(), Error> {
    let at = gemm::Addresses::dense(a, weight.addresses(), out);
    gemm::enqueue(scope, &step.desc, &step.selection, at, None)
}
