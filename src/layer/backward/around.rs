//! What stands behind the experts and round them, on its way back: norms of each expert's output and of the sum, projections to a width of the experts' own.
//!
//! ```text
//! dy --norms.output--> d sum --latent.output--> d experts' sum --norms.slots--> experts --latent.norm--> --latent.input--> d of what stands in front
//! ```
//!
//! The forward pass keeps what was normalised and what was projected back ([`super::Saved`]); the rows that the experts saw are made again.

use super::held::HeldWeightGradients;
use super::mlp::turned;
use super::norms::{self, NormBack, NormSteps};
use super::run::Opened;
use super::{BackwardDesc, BackwardStage, OPERATION, Saved};
use crate::experts::Weight;
use crate::experts::dispatched::Dispatched;
use crate::experts::gemm::{self, GemmArgs, GemmDesc, Output, Rows};
use crate::experts::k_grouped::{self, ColumnSums, KGroupedArgs, KGroupedDesc};
use crate::experts::rms_norm_backward::{Gradient, RmsNormBackwardArgs};
use crate::layer::weights::LayerWeights;
use crate::layer::{LayerDesc, LayerPlan, Step};
use crate::rules::{Layout, WeightDesc, Weighting};
use crate::runtime::launch::{Address, Held, Scope, optional};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Selection};

/// A norm behind something: its way back, and a place for the gradient of what was normalised.
#[derive(Clone, Copy, Debug)]
struct NormBehind {
    back: NormBack,
    elements: usize,
    d: Region,
}

/// Launches and places.
#[derive(Clone, Copy, Debug)]
pub(super) struct AroundBack {
    output: Option<NormBehind>,
    slots: Option<NormBehind>,
    latent: Option<LatentBack>,
    weighting: Weighting,
}

/// Both projections.
#[derive(Clone, Copy, Debug)]
struct LatentBack {
    tokens: usize,
    hidden: usize,
    width: usize,
    layouts: [Layout; 2],
    /// The projection before the experts once more, and the norm behind it.
    again: Step<GemmDesc>,
    norm: Option<NormSteps>,
    /// From the sum's projection to the experts' sum, and from what the experts saw to what was projected.
    to_sum: Step<GemmDesc>,
    to_input: Step<GemmDesc>,
    /// Gradients of both weights.
    sums: [Step<KGroupedDesc>; 2],
    /// `[T, L]`: what was projected, its gradient, that of the experts' sum.
    projected: Region,
    d_projected: Region,
    d_sum: Region,
}

const OUTPUT_NORM: norms::BackNames = [BackwardStage::OutputNorm, BackwardStage::OutputNormWeight];
const SLOT_NORM: norms::BackNames = [BackwardStage::SlotNorm, BackwardStage::SlotNormWeight];

impl AroundBack {
    pub(super) fn new(layer: &LayerPlan, desc: &BackwardDesc, device: &DeviceInfo) -> Result<AroundBack, Error> {
        let (of, tokens) = (layer.desc(), layer.tokens());
        let slots = layer.experts().rows().slots;
        let behind = |norm, rows: usize, width: usize| {
            Ok::<_, Error>(NormBehind {
                back: NormBack::new(norm, [of.dtype; 2], [rows, width], desc.accumulate, device)?,
                elements: shape::product(OPERATION, "norms", &[rows, width])?,
                d: Region::default(),
            })
        };
        Ok(AroundBack {
            output: of.norms.output.map(|norm| behind(norm, tokens, of.hidden)).transpose()?,
            // The factor of the sum over the experts stands behind this norm.
            slots: of
                .norms
                .slots
                .map(|norm| behind(norm.factor(norm.factor * of.routed_scale), slots, of.expert_width()))
                .transpose()?,
            latent: of.latent.map(|_| LatentBack::new(of, tokens, desc, device)).transpose()?,
            weighting: of.weighting,
        })
    }

    pub(super) fn lay(&mut self, arena: &mut Arena, of: &LayerDesc) -> Result<(), Error> {
        let element = of.dtype.bytes() as usize;
        for norm in [&mut self.output, &mut self.slots].into_iter().flatten() {
            norm.d = arena.region("norms", norm.elements, element)?;
            norm.back.lay(arena)?;
        }
        if let Some(latent) = &mut self.latent {
            let elements = shape::product(OPERATION, "latent", &[latent.tokens, latent.width])?;
            for region in [&mut latent.projected, &mut latent.d_projected, &mut latent.d_sum] {
                *region = arena.region("latent", elements, element)?;
            }
            latent.norm.iter_mut().try_for_each(|norm| norm.lay(arena))?;
        }
        Ok(())
    }

    /// The stages in front of what the experts saw being made again; then behind that, in front of the experts; then behind them.
    pub(super) fn stages(&self) -> [Vec<(BackwardStage, Selection)>; 3] {
        let mut all = [vec![], vec![], vec![]];
        all[0].extend(self.output.iter().flat_map(|norm| norm.back.stages(OUTPUT_NORM)));
        if let Some(latent) = &self.latent {
            let [input, output] = &latent.sums;
            all[0].push((BackwardStage::LatentOutputWeight, output.selection));
            all[0].push((BackwardStage::LatentOutput, latent.to_sum.selection));
            all[1].push((BackwardStage::LatentInputAgain, latent.again.selection));
            let [again, back] = latent.norm.map_or([vec![], vec![]], |norm| norm.stages(norms::LATENT));
            all[1].extend(again);
            all[2].extend(back);
            all[2].push((BackwardStage::LatentInputWeight, input.selection));
            all[2].push((BackwardStage::LatentInput, latent.to_input.selection));
        }
        all[1].extend(self.slots.iter().flat_map(|norm| norm.back.stages(SLOT_NORM)));
        all
    }

    /// Whether a norm of experts' outputs has put their weights in, and so has the gradients of these.
    pub(super) fn weighs_slots(&self) -> bool {
        self.slots.is_some() && self.weighting == Weighting::Output
    }

    /// Through the norm of the sum: the gradient of the sum, which is `dy` where there is none.
    pub(super) fn sum_gradient<'a, T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        (at, dy): (&Opened<'_>, In<'a, T>),
        workspace: &'a Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<In<'a, T>, Error> {
        let Some((norm, sum)) = self.output.as_ref().zip(saved.sum.as_ref()) else { return Ok(dy) };
        let d = workspace.at(norm.d);
        let mut args = RmsNormBackwardArgs::new(sum, Gradient::Rounded(dy), d.out::<T>(norm.elements));
        args.weight = weights.experts.norms.output;
        let d_weight = optional(&at.gradients.output_norm);
        norm.back.enqueue(scope, args, (false, d_weight), workspace, OUTPUT_NORM, observer)?;
        Ok(d.input(norm.elements))
    }

    /// Through the projection of the experts' sum, and to its weight: the gradient of that sum, which is `dy` without a latent width.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn experts_sum_gradient<'a, T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        (at, dy): (&Opened<'_>, In<'a, T>),
        further: bool,
        workspace: &'a Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<In<'a, T>, Error> {
        let held = self.latent.as_ref().zip(weights.experts.latent).zip(saved.latent_sum.as_ref());
        let Some(((latent, projections), sum)) = held else { return Ok(dy) };
        let [_, of_output] = &at.gradients.latent;
        if latent.weight(scope, 1, saved, [dy, sum.into()], of_output)? {
            observer(BackwardStage::LatentOutputWeight);
        }
        let d = workspace.at(latent.d_sum);
        let elements = latent.tokens * latent.width;
        if further {
            let args = GemmArgs::new(dy, Weight::new(projections.output.matrix), d.out::<T>(elements));
            gemm::forward(scope.kernels, scope.stream, &latent.to_sum.desc, args).map_err(within)?;
            observer(BackwardStage::LatentOutput);
        }
        Ok(d.input(elements))
    }

    /// What the experts saw of `x`, once more; `x` itself without a latent width.
    pub(super) fn again<'a, T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        x: In<'a, T>,
        workspace: &'a Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<In<'a, T>, Error> {
        let Some((latent, projections)) = self.latent.as_ref().zip(weights.experts.latent) else { return Ok(x) };
        let (projected, elements) = (workspace.at(latent.projected), latent.tokens * latent.width);
        let args = GemmArgs::new(x, projections.input, projected.out::<T>(elements));
        gemm::forward(scope.kernels, scope.stream, &latent.again.desc, args).map_err(within)?;
        observer(BackwardStage::LatentInputAgain);
        let projected = projected.input::<T>(elements);
        match &latent.norm {
            Some(norm) => {
                let of = (projected, projections.norm);
                Ok(norm.again(scope, of, workspace, norms::LATENT, observer)?.input(elements))
            }
            None => Ok(projected),
        }
    }

    /// Through the norm of experts' outputs: each row's gradient, where there is such a norm, and where they are wanted those of the rows' weights.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn outputs_gradient<'a, T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        (at, d_sum): (&Opened<'_>, In<'_, T>),
        d_row_weight: Option<Address<'_>>,
        workspace: &'a Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<Option<In<'a, T>>, Error> {
        let Some((norm, outputs)) = self.slots.as_ref().zip(saved.slot_outputs.as_ref()) else { return Ok(None) };
        let (d, rows) = (workspace.at(norm.d), saved.dispatched.shape().slots);
        let args = RmsNormBackwardArgs::new(outputs, Gradient::Rounded(d_sum), d.out::<T>(norm.elements));
        let mut args = args.gathered(&saved.dispatched);
        args.weight = weights.experts.norms.slots;
        if self.weighs_slots() {
            args.row_scale = Some(saved.dispatched.slot_weight().into());
            args.d_row_scale = d_row_weight.map(|to| to.out(rows));
        }
        let d_weight = optional(&at.gradients.slot_norm);
        norm.back.enqueue(scope, args, (false, d_weight), workspace, SLOT_NORM, observer)?;
        Ok(Some(d.input(norm.elements)))
    }

    /// Where the gradient of what the experts saw goes, with a latent width.
    pub(super) fn d_seen<'a>(&self, workspace: &'a Held<'_>) -> Option<Address<'a>> {
        let latent = self.latent.as_ref()?;
        Some(latent.norm.map_or_else(|| workspace.at(latent.d_projected), |norm| norm.d_normed(workspace)))
    }

    /// From [`AroundBack::d_seen`] through norm and projection, and to their weights: the gradient of `x`, what was projected, written or `added`, where it has a
    /// place.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn input_gradient<T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        (at, x): (&Opened<'_>, In<'_, T>),
        to: Option<(Address<'_>, bool)>,
        workspace: &Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let Some((latent, projections)) = self.latent.as_ref().zip(weights.experts.latent) else { return Ok(()) };
        let elements = latent.tokens * latent.width;
        let d = workspace.at(latent.d_projected);
        if let Some(norm) = &latent.norm {
            let of = (workspace.at(latent.projected).input::<T>(elements), projections.norm);
            let back = (Some(d), false, optional(&at.gradients.latent_norm));
            norm.back(scope, of, workspace, back, norms::LATENT, observer)?;
        }
        let d = d.input::<T>(elements);
        let [of_input, _] = &at.gradients.latent;
        if latent.weight(scope, 0, saved, [d, x], of_input)? {
            observer(BackwardStage::LatentInputWeight);
        }
        let Some((to, added)) = to else { return Ok(()) };
        let args = GemmArgs::new(d, Weight::new(projections.input.matrix), to.out::<T>(latent.tokens * latent.hidden));
        let desc = latent.to_input.desc.output(if added { Output::Added } else { Output::Rounded });
        gemm::forward(scope.kernels, scope.stream, &desc, args).map_err(within)?;
        observer(BackwardStage::LatentInput);
        Ok(())
    }
}

impl LatentBack {
    fn new(of: &LayerDesc, tokens: usize, desc: &BackwardDesc, device: &DeviceInfo) -> Result<LatentBack, Error> {
        let latent = of.latent.unwrap_or(crate::layer::LatentDesc::new(of.dtype, of.hidden));
        let (hidden, width) = (of.hidden, latent.width);
        let product = |weight: WeightDesc, n, k| {
            let desc = GemmDesc::new(of.dtype, Rows::Dense(tokens), n, k).kernels(of.kernels()).weight(weight);
            Ok::<_, Error>(Step { desc, selection: gemm::select_for(OPERATION, &desc, device)? })
        };
        let sums = |weight: WeightDesc, n, k| {
            let [m, n] = if weight.layout == Layout::Nk { [n, k] } else { [k, n] };
            let rows = Dispatched::shape_of_one_expert(tokens);
            let desc = KGroupedDesc::new(of.dtype, rows, m, n).accumulate(desc.accumulate);
            Ok::<_, Error>(Step { desc, selection: k_grouped::select(&desc, device).map_err(within)? })
        };
        let norm =
            latent.norm.map(|norm| NormSteps::new(norm, [of.dtype; 2], [tokens, width], desc.accumulate, device));
        Ok(LatentBack {
            tokens,
            hidden,
            width,
            layouts: [latent.input.layout, latent.output.layout],
            again: product(latent.input, width, hidden)?,
            norm: norm.transpose()?,
            to_sum: product(turned(&latent.output), width, hidden)?,
            to_input: product(turned(&latent.input), hidden, width)?,
            sums: [sums(latent.input, width, hidden)?, sums(latent.output, hidden, width)?],
            projected: Region::default(),
            d_projected: Region::default(),
            d_sum: Region::default(),
        })
    }

    /// The gradient of the projection before the experts (0) or behind them (1), of its outputs' gradients and its inputs; whether it was asked for.
    fn weight<'a, T: Element>(
        &self,
        scope: &Scope<'_>,
        number: usize,
        saved: &Saved<T>,
        [outputs, inputs]: [In<'a, T>; 2],
        of: &HeldWeightGradients<'_>,
    ) -> Result<bool, Error> {
        let Some((matrix, rows)) = of.matrix.as_ref().zip(saved.all_tokens.as_ref()) else { return Ok(false) };
        let of_b = self.layouts[number] == Layout::Kn;
        let [a, b] = if of_b { [inputs, outputs] } else { [outputs, inputs] };
        let (out, f32_out) = matrix.product::<T>();
        let mut args = KGroupedArgs::new(a, b, rows, out);
        args.sums = of.bias.as_ref().map(|bias| ColumnSums::new(bias.product::<T>().0).of_b(of_b));
        let desc = self.sums[number].desc.f32_out(f32_out);
        k_grouped::forward(scope.kernels, scope.stream, &desc, args).map_err(within)?;
        Ok(true)
    }
}

fn within(error: Error) -> Error {
    error.within(OPERATION)
}
