//! The way back through a router by cosine: both norms, the projection and the temperature.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::{CosineDesc, CosinePlan, CosineWeights};
use crate::experts::rms_norm;
use crate::registry;
use crate::routers::router;
use crate::routers::router_backward::{self, RouterBackwardDesc, WeightArgs};
use crate::rules::Dtype;
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::params::UnitBackwardParams;
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, BARRIER_HEADER, Region};
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Workspace};

const OPERATION: &str = "cosine_backward";

/// Where gradients go; those that are absent are not computed but as far as others need it.
#[non_exhaustive]
pub struct CosineGradients<'a, T> {
    /// `[T, H]`.
    pub x: Option<Out<'a, T>>,
    /// `[D, H]`.
    pub projection: Option<Out<'a, f32>>,
    /// `[D]`; only with `projection`.
    pub bias: Option<Out<'a, f32>>,
    /// `[E, D]`.
    pub similar: Out<'a, f32>,
    /// `[E]`: of the factors `f` of experts, also where they are 1.
    pub expert_scale: Option<Out<'a, f32>>,
    /// `[1]`: 0 where the temperature is at its bound.
    pub temperature: Option<Out<'a, f32>>,
}

impl<'a, T> CosineGradients<'a, T> {
    /// Of the experts' rows alone.
    pub fn new(similar: impl Into<Out<'a, f32>>) -> CosineGradients<'a, T> {
        CosineGradients {
            x: None,
            projection: None,
            bias: None,
            similar: similar.into(),
            expert_scale: None,
            temperature: None,
        }
    }
}

buffers!(CosineGradients<'a, T> {
    x: Out<T>,
    projection: Out<f32>,
    bias: Out<f32>,
    expert_scale: Out<f32>,
    temperature: Out<f32>,
});

/// Every choice for the way back through a router by cosine: nine launches, of which two are for `x` and `projection`.
///
/// Projection and unit rows are computed again, so the forward pass need keep nothing but `x`.
#[derive(Clone, Copy, Debug)]
pub struct CosineBackwardPlan {
    forward: CosinePlan,
    accumulate: bool,
    /// Memory of the operations that add up over tokens, with the barrier.
    shared: Region,
    /// `[T, D]`: projections, unit rows, gradients of these, of those.
    of_tokens: [Region; 4],
    /// `[E, D]`: unit rows, their gradients.
    of_experts: [Region; 2],
    workspace_bytes: usize,
}

impl CosineBackwardPlan {
    /// Of the router `desc`; with `accumulate` gradients are added to what is there.
    ///
    /// # Errors
    /// Those of [`CosineDesc::plan`].
    pub fn new(desc: &CosineDesc, accumulate: bool, device: &DeviceInfo) -> Result<CosineBackwardPlan, Error> {
        let forward = desc.plan(device).map_err(|error| error.within(OPERATION))?;
        let CosineDesc { tokens, width, experts, .. } = *desc;
        let mut plan = CosineBackwardPlan {
            forward,
            accumulate,
            shared: Region::default(),
            of_tokens: [Region::default(); 4],
            of_experts: [Region::default(); 2],
            workspace_bytes: 0,
        };
        let sums = [plan.rows_product(), plan.projection_product()].map(|desc| router_backward::workspace_bytes(&desc));
        let [rows, projection] = sums;
        let shared = rows?.max(projection?).max(BARRIER_HEADER + experts * size_of::<f32>());
        let mut arena = Arena::new(OPERATION);
        plan.shared = arena.region("workspace", shared, 1)?;
        for (regions, rows) in [(&mut plan.of_tokens[..], tokens), (&mut plan.of_experts[..], experts)] {
            for region in regions {
                let elements = shape::product(OPERATION, "width", &[rows, width])?;
                *region = arena.region("width", elements, size_of::<f32>())?;
            }
        }
        plan.workspace_bytes = arena.bytes();
        Ok(plan)
    }

    /// Size of the workspace in bytes.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    fn desc(&self) -> &CosineDesc {
        self.forward.desc()
    }

    /// The product of unit rows, as a router of `D` columns.
    fn rows_product(&self) -> RouterBackwardDesc {
        let CosineDesc { tokens, experts, width, .. } = *self.desc();
        RouterBackwardDesc::new(Dtype::F32, tokens, experts, width)
    }

    /// The projection, as a router of `D` experts.
    fn projection_product(&self) -> RouterBackwardDesc {
        let CosineDesc { tokens, width, hidden, dtype, weight, .. } = *self.desc();
        RouterBackwardDesc::new(dtype, tokens, width, hidden).weight(weight).accumulate(self.accumulate)
    }

    /// Computes the gradients of `sum d_logits logits`, `d_logits` `[T, E]`: [`crate::reference::cosine::cosine_backward`].
    ///
    /// With no tokens nothing is launched, and gradients of weights become 0, or with `accumulate` stay.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for a bias's gradient without the projection's; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`],
    /// [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
    #[allow(clippy::too_many_arguments)]
    pub fn backward<'a, T: Element, W: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: CosineWeights<'_, W>,
        x: impl Into<In<'a, T>>,
        d_logits: impl Into<In<'a, f32>>,
        gradients: CosineGradients<'_, T>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        let CosineDesc { dtype, weight, tokens, hidden, width, experts, temperature, most, .. } = *self.desc();
        scope.check_dtype::<T>("x", dtype)?;
        scope.check_dtype::<W>("weight", weight)?;
        if gradients.bias.is_some() && gradients.projection.is_none() {
            let reason = "it comes with the projection's";
            return Err(Error::Unexpected { operation: OPERATION, argument: "gradients.bias", reason });
        }
        let row = shape::row_alignment;
        let projection = scope.read("projection", weights.projection, width * hidden, row(weight, hidden))?;
        let bias = scope.read_some("bias", weights.bias, width, SCALAR)?;
        let similar = scope.read("similar", weights.similar, experts * width, row(weight, width))?;
        let expert_scale = scope.read_some("expert_scale", weights.expert_scale, experts, SCALAR)?;
        let x = scope.read("x", x.into(), tokens * hidden, row(dtype, hidden))?;
        let d_logits = scope.read("d_logits", d_logits.into(), tokens * experts, SCALAR)?;
        let dx = scope.write_some("gradients.x", gradients.x, tokens * hidden, SCALAR)?;
        let d_projection = scope.write_some("gradients.projection", gradients.projection, width * hidden, SCALAR)?;
        let d_bias = scope.write_some("gradients.bias", gradients.bias, width, SCALAR)?;
        let d_similar = scope.write("gradients.similar", gradients.similar, experts * width, SCALAR)?;
        let d_scale = scope.write_some("gradients.expert_scale", gradients.expert_scale, experts, SCALAR)?;
        let d_temperature = scope.write_some("gradients.temperature", gradients.temperature, 1, SCALAR)?;
        let held = workspace.open(&scope, self.workspace_bytes)?;
        let zero = |to: Option<Address<'_>>, elements: usize| match to {
            Some(to) if !self.accumulate => scope.zero(to, elements * size_of::<f32>()),
            _ => Ok(()),
        };
        if tokens == 0 {
            zero(optional(&d_projection), width * hidden)?;
            zero(optional(&d_bias), width)?;
            zero(Some(d_similar.address()), experts * width)?;
            zero(optional(&d_scale), experts)?;
            return zero(optional(&d_temperature), 1);
        }
        let within = |error: Error| error.within(OPERATION);
        let [projected, unit, d_unit, d_projected] = self.of_tokens.map(|region| held.at(region));
        let [similar_unit, d_similar_unit] = self.of_experts.map(|region| held.at(region));

        // What the forward pass had.
        let (desc, selection) = &self.forward.projection;
        let at = router::Addresses {
            x: x.address(),
            weight: Some(projection.address()),
            bias: optional(&bias),
            logits: Some(projected),
            logits_dtype: Dtype::F32,
            gate: None,
        };
        router::enqueue(&scope, desc, selection, at)?;
        let [of_tokens, of_experts] = &self.forward.norms;
        rms_norm::enqueue(&scope, &of_tokens.0, &of_tokens.1, rms_norm::Addresses::new(projected, unit))?;
        let at = rms_norm::Addresses {
            row_scale: optional(&expert_scale),
            ..rms_norm::Addresses::new(similar.address(), similar_unit)
        };
        rms_norm::enqueue(&scope, &of_experts.0, &of_experts.1, at)?;

        // The experts' rows.
        let d_logits = || d_logits.address().input::<f32>(tokens * experts);
        let mut lent = held.part(self.shared);
        let rows = self.rows_product();
        let args = WeightArgs::new(d_logits(), unit.input::<f32>(tokens * width), d_similar_unit.out(experts * width));
        router_backward::weight::<f32>(kernels, stream, &rows, args.workspace(&mut lent)).map_err(within)?;
        let factor = temperature.min(most).exp();
        let moves = temperature < most;
        if !moves {
            zero(optional(&d_temperature), 1)?;
        }
        let units = |of_experts: bool, [v, g, to]: [Address<'_>; 3]| {
            let (dtype, count) = if of_experts { (weight, experts) } else { (Dtype::F32, tokens) };
            let blocks = count.div_ceil(registry::BLOCK_WARPS as usize) as u32;
            scope.launch(
                &Selection::new(registry::Kernel::UnitBackward(dtype), [blocks, 1, 1]),
                UnitBackwardParams {
                    rows: v.into(),
                    gradients: g.into(),
                    row_scale: optional(&expert_scale).filter(|_| of_experts).into(),
                    factor,
                    count: count as u32,
                    width: width as u32,
                    d_rows: to.into(),
                    d_scale: optional(&d_scale).filter(|_| of_experts).into(),
                    d_log_factor: optional(&d_temperature).filter(|_| of_experts && moves).into(),
                    accumulate: u32::from(of_experts && self.accumulate),
                    workspace: held.at(self.shared).into(),
                },
            )
        };
        units(true, [similar.address(), d_similar_unit, d_similar.address()])?;
        if dx.is_none() && d_projection.is_none() {
            return Ok(());
        }

        // The projection.
        let to = d_unit.out::<f32>(tokens * width);
        router_backward::into_x::<f32, f32>(
            kernels,
            stream,
            &rows,
            d_logits(),
            similar_unit.input::<f32>(experts * width),
            to,
        )
        .map_err(within)?;
        units(false, [projected, d_unit, d_projected])?;
        let d_projected = || d_projected.input::<f32>(tokens * width);
        let desc = self.projection_product();
        if let Some(to) = optional(&d_projection) {
            let mut args =
                WeightArgs::new(d_projected(), x.address().input::<T>(tokens * hidden), to.out(width * hidden));
            args.d_bias = optional(&d_bias).map(|bias| bias.out(width));
            router_backward::weight::<T>(kernels, stream, &desc, args.workspace(&mut lent)).map_err(within)?;
        }
        if let Some(to) = optional(&dx) {
            let matrix = projection.address().input::<W>(width * hidden);
            let to = to.out::<T>(tokens * hidden);
            router_backward::into_x::<T, W>(kernels, stream, &desc, d_projected(), matrix, to).map_err(within)?;
        }
        Ok(())
    }
}
