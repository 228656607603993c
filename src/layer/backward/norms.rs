//! RMS norms of what router and experts see, on their way back: the rows behind the norm are made again, one launch and no memory kept.

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

/// A norm in front of a part of the layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct NormSteps {
    forward: Step<RmsNormDesc>,
    back: Step<RmsNormBackwardDesc>,
    /// Of the weight's gradient, where the gain has a weight.
    sums: Option<Selection>,
    /// `[T, H]`: what the part saw.
    normed: Region,
    /// `[T, H]`: the gradient of it.
    d_normed: Region,
    /// `[T, 2]`.
    factors: Region,
}

/// The stages of a norm: once more, back, and its weight's gradient.
pub(super) type Names = [BackwardStage; 3];

pub(super) const ROUTER: Names =
    [BackwardStage::RouterNormAgain, BackwardStage::RouterNorm, BackwardStage::RouterNormWeight];
pub(super) const EXPERTS: Names =
    [BackwardStage::ExpertNormAgain, BackwardStage::ExpertNorm, BackwardStage::ExpertNormWeight];

impl NormSteps {
    /// Of `tokens` rows of `width` elements, to rows of `dtype` or of f32 (`seen`).
    pub(super) fn new(
        norm: RmsNorm,
        [dtype, seen]: [Dtype; 2],
        [tokens, width]: [usize; 2],
        device: &DeviceInfo,
    ) -> Result<NormSteps, Error> {
        let within = |error: Error| error.within(OPERATION);
        let forward = RmsNormDesc::new(dtype, tokens, width, norm).output(seen);
        let back = RmsNormBackwardDesc::new(dtype, tokens, width, norm).gradient(seen);
        let sums = ColumnProductsDesc::new(dtype, tokens, width).gradient(seen);
        let weighs = norm.gain.has_weight();
        Ok(NormSteps {
            forward: Step { desc: forward, selection: rms_norm::select(&forward, device).map_err(within)? },
            back: Step { desc: back, selection: rms_norm_backward::select(&back, device).map_err(within)? },
            sums: weighs.then(|| column_products::select(&sums, device)).transpose().map_err(within)?,
            normed: Region::default(),
            d_normed: Region::default(),
            factors: Region::default(),
        })
    }

    pub(super) fn lay(&mut self, arena: &mut Arena) -> Result<(), Error> {
        let RmsNormDesc { rows, width, output, .. } = self.forward.desc;
        let elements = shape::product(OPERATION, "norms", &[rows, width])?;
        self.normed = arena.region("norms", elements, output.bytes() as usize)?;
        self.d_normed = arena.region("norms", elements, output.bytes() as usize)?;
        self.factors = arena.region("norms", 2 * rows, 4)?;
        Ok(())
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
        let behind = [Some((names[1], self.back.selection)), self.sums.map(|sums| (names[2], sums))];
        [vec![(names[0], self.forward.selection)], behind.into_iter().flatten().collect()]
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
        if let Some(d_weight) = d_weight {
            args.d_weight = Some(d_weight.out(width));
            args.factors = Some(workspace.at(self.factors).out(2 * rows));
        }
        let desc = self.back.desc.accumulate(added && dx.is_some());
        let (kernels, stream) = (scope.kernels, scope.stream);
        rms_norm_backward::backward(kernels, stream, &desc, args).map_err(|error| error.within(OPERATION))?;
        observer(names[1]);
        if d_weight.is_some() {
            observer(names[2]);
        }
        Ok(())
    }
}
