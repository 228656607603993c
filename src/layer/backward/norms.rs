//! RMS norms on their way back. Of those in front of router and experts the rows behind the norm are made again, one launch and no memory kept.

use super::{BackwardStage, OPERATION};
use crate::experts::column_products::{self, ColumnProductsDesc};
use crate::experts::rms_norm::{self, RmsNormArgs, RmsNormDesc};
use crate::experts::rms_norm_backward::{self, Gradient, RmsNormBackwardArgs, RmsNormBackwardDesc};
use crate::layer::Step;
use crate::rules::RmsNorm;
use crate::runtime::launch::{Address, Held, Scope};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Dtype, Element, Error, In, Selection, Tensor};

/// From the gradient of a norm's rows to that of what was normalised, and to that of its weight.
#[derive(Clone, Copy, Debug)]
pub(super) struct NormBack {
    step: Step<RmsNormBackwardDesc>,
    /// Of the weight's gradient, where the gain has a weight.
    sums: Option<Selection>,
    /// `[rows, 2]`.
    factors: Region,
}

/// The stages of a way back: through the norm, and to its weight.
pub(super) type BackNames = [BackwardStage; 2];

impl NormBack {
    /// Of so many rows and columns, of gradients of `seen`: `dtype`, or f32. `accumulate`: the weight's gradient is added to what lies there.
    pub(super) fn new(
        norm: RmsNorm,
        [dtype, seen]: [Dtype; 2],
        [rows, width]: [usize; 2],
        accumulate: bool,
        device: &DeviceInfo,
    ) -> Result<NormBack, Error> {
        let within = |error: Error| error.within(OPERATION);
        let desc = RmsNormBackwardDesc::new(dtype, rows, width, norm).gradient(seen).accumulate_weight(accumulate);
        let sums = ColumnProductsDesc::new(dtype, rows, width).gradient(seen);
        let sums = norm.gain.has_weight().then(|| column_products::select(&sums, device).map_err(within));
        Ok(NormBack {
            step: Step { desc, selection: rms_norm_backward::select(&desc, device).map_err(within)? },
            sums: sums.transpose()?,
            factors: Region::default(),
        })
    }

    pub(super) fn lay(&mut self, arena: &mut Arena) -> Result<(), Error> {
        self.factors = arena.region("norms", 2 * self.step.desc.rows, 4)?;
        Ok(())
    }

    pub(super) fn stages(&self, names: BackNames) -> impl Iterator<Item = (BackwardStage, Selection)> + use<> {
        let sums = self.sums.map(|sums| (names[1], sums));
        std::iter::once((names[0], self.step.selection)).chain(sums)
    }

    /// The gradient of what was normalised, written or `added`, and that of the weight, where it has a place.
    pub(super) fn enqueue<'a, T: Element>(
        &self,
        scope: &Scope<'_>,
        mut args: RmsNormBackwardArgs<'a, T>,
        (added, d_weight): (bool, Option<Address<'a>>),
        workspace: &'a Held<'_>,
        names: BackNames,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let RmsNormBackwardDesc { rows, width, .. } = self.step.desc;
        if let Some(d_weight) = d_weight {
            args.d_weight = Some(d_weight.out(width));
            args.factors = Some(workspace.at(self.factors).out(2 * rows));
        }
        let desc = self.step.desc.accumulate(added);
        let (kernels, stream) = (scope.kernels, scope.stream);
        rms_norm_backward::backward(kernels, stream, &desc, args).map_err(|error| error.within(OPERATION))?;
        observer(names[0]);
        if d_weight.is_some() {
            observer(names[1]);
        }
        Ok(())
    }
}

/// A norm in front of a part of the layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct NormSteps {
    forward: Step<RmsNormDesc>,
    back: NormBack,
    /// `[T, width]`: what the part saw.
    normed: Region,
    /// `[T, width]`: the gradient of it.
    d_normed: Region,
}

/// The stages of a norm: once more, back, and its weight's gradient.
pub(super) type Names = [BackwardStage; 3];

pub(super) const ROUTER: Names =
    [BackwardStage::RouterNormAgain, BackwardStage::RouterNorm, BackwardStage::RouterNormWeight];
pub(super) const EXPERTS: Names =
    [BackwardStage::ExpertNormAgain, BackwardStage::ExpertNorm, BackwardStage::ExpertNormWeight];
pub(super) const LATENT: Names =
    [BackwardStage::LatentNormAgain, BackwardStage::LatentNorm, BackwardStage::LatentNormWeight];

impl NormSteps {
    /// Of `tokens` rows of `width` elements, to rows of `dtype` or of f32 (`seen`).
    pub(super) fn new(
        norm: RmsNorm,
        [dtype, seen]: [Dtype; 2],
        [tokens, width]: [usize; 2],
        accumulate: bool,
        device: &DeviceInfo,
    ) -> Result<NormSteps, Error> {
        let forward = RmsNormDesc::new(dtype, tokens, width, norm).output(seen);
        let selection = rms_norm::select(&forward, device).map_err(|error| error.within(OPERATION))?;
        Ok(NormSteps {
            forward: Step { desc: forward, selection },
            back: NormBack::new(norm, [dtype, seen], [tokens, width], accumulate, device)?,
            normed: Region::default(),
            d_normed: Region::default(),
        })
    }

    pub(super) fn lay(&mut self, arena: &mut Arena) -> Result<(), Error> {
        let RmsNormDesc { rows, width, output, .. } = self.forward.desc;
        let elements = shape::product(OPERATION, "norms", &[rows, width])?;
        self.normed = arena.region("norms", elements, output.bytes() as usize)?;
        self.d_normed = arena.region("norms", elements, output.bytes() as usize)?;
        self.back.lay(arena)
    }

    /// Type of what the part saw.
    pub(super) fn seen(&self) -> Dtype {
        self.forward.desc.output
    }

    /// Where the gradient of what the part saw goes.
    pub(super) fn d_normed<'a>(&self, workspace: &'a Held<'_>) -> Address<'a> {
        workspace.at(self.d_normed)
    }

    /// The stages with their launches, in front of the part's way back, and behind.
    pub(super) fn stages(&self, names: Names) -> [Vec<(BackwardStage, Selection)>; 2] {
        [vec![(names[0], self.forward.selection)], self.back.stages([names[1], names[2]]).collect()]
    }

    /// Makes what the part saw again, and says where it is.
    pub(super) fn again<'a, T: Element>(
        &self,
        scope: &Scope<'_>,
        (x, weight): (In<'_, T>, Option<Tensor<'_>>),
        workspace: &'a Held<'_>,
        names: Names,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<Address<'a>, Error> {
        let RmsNormDesc { rows, width, .. } = self.forward.desc;
        let to = workspace.at(self.normed);
        let mut args = match self.seen() == T::DTYPE {
            true => RmsNormArgs::<T>::new(x, to.out::<T>(rows * width)),
            false => RmsNormArgs::<T>::to_f32(x, to.out::<f32>(rows * width)),
        };
        args.weight = weight;
        let (kernels, stream) = (scope.kernels, scope.stream);
        rms_norm::forward(kernels, stream, &self.forward.desc, args).map_err(|error| error.within(OPERATION))?;
        observer(names[0]);
        Ok(to)
    }

    /// From [`NormSteps::d_normed`] to the gradient of `x`, written or `added`, and to that of the weight. Without a place for the first it takes the rows'.
    pub(super) fn back<T: Element>(
        &self,
        scope: &Scope<'_>,
        (x, weight): (In<'_, T>, Option<Tensor<'_>>),
        workspace: &Held<'_>,
        (dx, added, d_weight): (Option<Address<'_>>, bool, Option<Address<'_>>),
        names: Names,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let RmsNormDesc { rows, width, .. } = self.forward.desc;
        let (from, nobody) = (workspace.at(self.d_normed), workspace.at(self.normed));
        let dy = match self.seen() == T::DTYPE {
            true => Gradient::Rounded(from.input::<T>(rows * width)),
            false => Gradient::F32(from.input::<f32>(rows * width)),
        };
        let mut args = RmsNormBackwardArgs::new(x, dy, dx.unwrap_or(nobody).out::<T>(rows * width));
        args.weight = weight;
        let to = (added && dx.is_some(), d_weight);
        self.back.enqueue(scope, args, to, workspace, [names[1], names[2]], observer)
    }
}
