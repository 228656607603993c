//! Layers side by side, each for the tokens of its own types.
//!
//! ERNIE 4.5 VL has two banks: a router and experts for text, and narrower ones for vision. Every token goes through the shared expert, and
//! through the router and experts of its bank.
//!
//! Each bank is a [`LayerDesc`], which is run for all tokens with the others' masked: they have no rows, so that the experts' products cost
//! what a bank's tokens cost. No count returns to the host, and all of it can be captured in a graph.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::forward::{LayerArgs, LayerPlan};
use super::route::RouteArgs;
use super::weights::LayerWeights;
use super::{LayerDesc, OPERATION};
use crate::capacity::Ids;
use crate::routers::token_banks::{self, TokenBanksArgs, TokenBanksDesc};
use crate::rules::IdFormat;
use crate::runtime::launch::Scope;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Kernel, Kernels, Out, Selection, TokenMask, Workspace};

/// Every choice for `B` banks of experts and a number of tokens.
#[derive(Clone, Copy, Debug)]
pub struct BanksPlan<const B: usize> {
    plans: [LayerPlan; B],
    split: TokenBanksDesc,
    selection: Selection,
    /// First, as each layer's workspace begins with the grid barrier.
    layers: Region,
    /// `[B, T]`.
    masks: Region,
    workspace_bytes: usize,
}

impl<const B: usize> BanksPlan<B> {
    /// Plans banks for `tokens` tokens: tokens of type `b` belong to bank `b`, and those of types past the last to the last one (ERNIE 4.5 VL: images 1,
    /// videos 2). `types` says how the types are stored.
    ///
    /// A shared expert is the first bank's, and every token's; banks have no norm of the whole sum.
    ///
    /// # Errors
    /// [`Error::Invalid`] for banks of other types or hidden sizes than the first, or none; [`Error::Unsupported`] for a shared expert of another
    /// bank and a norm of the output; and those of [`LayerDesc::plan`].
    pub fn new(
        banks: &[LayerDesc; B],
        tokens: usize,
        types: IdFormat,
        device: &DeviceInfo,
    ) -> Result<BanksPlan<B>, Error> {
        let Some(first) = banks.first() else {
            return Err(Error::invalid(OPERATION, "banks", "at least 1", B));
        };
        for (number, bank) in banks.iter().enumerate() {
            if (bank.dtype, bank.hidden) != (first.dtype, first.hidden) {
                let expected = format!("{} and a hidden size of {}, as the first bank has", first.dtype, first.hidden);
                let got = format!("{} and {} of bank {number}", bank.dtype, bank.hidden);
                return Err(Error::invalid(OPERATION, "banks", expected, got));
            }
            if number > 0 && bank.shared.is_some() {
                let supported = "a shared expert of the first bank, which all tokens go to";
                return Err(Error::unsupported(OPERATION, "banks.shared", supported, format!("one of bank {number}")));
            }
            if bank.norms.output.is_some() {
                return Err(Error::unsupported(OPERATION, "banks.norms.output", "no norm of the sum", "one"));
            }
        }
        let mut plans = [LayerPlan::new(first, tokens, device)?; B];
        for (plan, bank) in plans.iter_mut().zip(banks).skip(1) {
            *plan = LayerPlan::new(bank, tokens, device)?;
        }
        let split = TokenBanksDesc::new(tokens, B).types(types);
        let selection = token_banks::select(&split, device).map_err(|error| error.within(OPERATION))?;
        let mut arena = Arena::new(OPERATION);
        let most = plans.iter().map(LayerPlan::workspace_bytes).max().unwrap_or(0);
        let layers = arena.region("banks", most, 1)?;
        let masks = arena.region("banks", B * tokens, 1)?;
        Ok(BanksPlan { plans, split, selection, layers, masks, workspace_bytes: arena.bytes() })
    }

    /// The plan of each bank.
    pub fn plans(&self) -> &[LayerPlan; B] {
        &self.plans
    }

    /// Size of the workspace in bytes: that of the largest bank, and the masks.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// The kernels, for [`crate::Kernels::preload`].
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> + use<B> {
        let plans = self.plans;
        [self.selection.kernel].into_iter().chain(plans.into_iter().flat_map(|plan| plan.kernels()))
    }

    /// Enqueues all banks on `stream`.
    ///
    /// With no tokens nothing is launched, but what each bank's route sums up is set to zero.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for a residual that `y` is already and for a mask of a bank; those of [`token_banks::forward`]; and those of [`LayerPlan::forward`].
    pub fn forward<T: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: [&LayerWeights<'_>; B],
        args: BanksArgs<'_, T, B>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        let workspace = workspace.open(&scope, self.workspace_bytes)?;
        let BanksArgs { x, types, residual, accumulate, mut y, mut routes } = args;
        if routes.iter().any(|route| !route.mask.is_all()) {
            let reason = "types say which tokens a bank has";
            return Err(Error::Unexpected { operation: OPERATION, argument: "routes.mask", reason });
        }
        let tokens = self.split.tokens;
        let masks = workspace.at(self.masks);
        let split = TokenBanksArgs::new(types, masks.out(B * tokens));
        token_banks::forward(kernels, stream, &self.split, split).map_err(|error| error.within(OPERATION))?;
        let mut part = workspace.part(self.layers);
        let banks = self.plans.iter().zip(weights).zip(&mut routes).enumerate();
        for (number, ((plan, weights), route)) in banks {
            let mut layer = LayerArgs::new(x, y.reborrow()).route(route.reborrow());
            // The first bank begins every token's sum, the others add to it.
            if number > 0 || accumulate {
                layer = layer.accumulate();
            }
            if number == 0 {
                layer.residual = residual;
            }
            let mask = TokenMask::attention(masks.offset(number * tokens).input(tokens));
            plan.forward(kernels, stream, weights, layer.mask(mask), &mut part)?;
        }
        Ok(())
    }
}

/// Inputs and outputs of banks of experts.
#[non_exhaustive]
pub struct BanksArgs<'a, T, const B: usize> {
    /// `[T, H]`.
    pub x: In<'a, T>,
    /// `[T]`, stored as the plan says: each token's type.
    pub types: Ids<'a>,
    /// `[T, H]`, added to `y`.
    pub residual: Option<In<'a, T>>,
    /// Adds to what `y` holds. Not with `residual`.
    pub accumulate: bool,
    /// `[T, H]`, written.
    pub y: Out<'a, T>,
    /// What each bank's choice reads and writes. A token of another bank has ids of -1 and weights of 0; logits are computed of all.
    pub routes: [RouteArgs<'a>; B],
}

impl<'a, T, const B: usize> BanksArgs<'a, T, B> {
    /// `x` to `y` by the banks of `types`.
    pub fn new(x: impl Into<In<'a, T>>, types: impl Into<Ids<'a>>, y: impl Into<Out<'a, T>>) -> BanksArgs<'a, T, B> {
        BanksArgs {
            x: x.into(),
            types: types.into(),
            residual: None,
            accumulate: false,
            y: y.into(),
            routes: std::array::from_fn(|_| RouteArgs::new()),
        }
    }

    /// Adds to what `y` holds.
    #[must_use]
    pub fn accumulate(self) -> BanksArgs<'a, T, B> {
        BanksArgs { accumulate: true, ..self }
    }

    /// With what each bank's choice reads and writes.
    #[must_use]
    pub fn routes(self, routes: [RouteArgs<'a>; B]) -> BanksArgs<'a, T, B> {
        BanksArgs { routes, ..self }
    }

    /// With rows that are added to `y`.
    #[must_use]
    pub fn residual(self, residual: impl Into<In<'a, T>>) -> BanksArgs<'a, T, B> {
        BanksArgs { residual: Some(residual.into()), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{Mlp, Norms, SharedDesc};
    use crate::rules::{Dtype, RmsNorm};
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let text = LayerDesc::new(Dtype::Bf16, 64, 32, 8, 2);
        let vision = LayerDesc::new(Dtype::Bf16, 64, 16, 8, 2);
        let plan = |banks: [LayerDesc; 2]| BanksPlan::new(&banks, 10, IdFormat::I32, &A100);
        let fault = |banks| plan(banks).unwrap_err().argument().unwrap();
        let shared = SharedDesc::new(32, Mlp::swiglu(Dtype::Bf16));
        let both = plan([text.shared(Some(shared)), vision]).unwrap();
        assert!(both.plans().iter().all(|plan| plan.workspace_bytes() + 20 <= both.workspace_bytes()));
        assert_eq!(fault([text, LayerDesc::new(Dtype::Bf16, 72, 16, 8, 2)]), "banks");
        assert_eq!(fault([text, vision.shared(Some(shared))]), "banks.shared");
        assert_eq!(fault([text.norms(Norms::new().output(Some(RmsNorm::new(0.0)))), vision]), "banks.norms.output");
        let none: [LayerDesc; 0] = [];
        assert_eq!(BanksPlan::new(&none, 1, IdFormat::I32, &A100).unwrap_err().argument(), Some("banks"));
    }
}
