//! The router's product on its way back, and sums over all tokens.

use super::plan::RouterSteps;
use super::{BackwardPlan, BackwardStage, OPERATION};
use crate::routers::router_backward::{self, RouterBackwardDesc};
use crate::runtime::launch::{Address, Held, Scope};
use crate::{Dtype, Element, Error, In, Tensor};

/// A router's product on its way back, or that of a shared expert's gate.
pub(super) struct RouterBack<'a> {
    pub(super) steps: &'a RouterSteps,
    pub(super) d_logits: Address<'a>,
    /// What the router saw.
    pub(super) seen: Address<'a>,
    pub(super) matrix: Option<Tensor<'a>>,
    pub(super) d_matrix: Option<Address<'a>>,
    pub(super) d_input: Option<Address<'a>>,
    /// Whether the input's gradient is added to what lies there.
    pub(super) added: bool,
    /// Whether the matrix's is.
    pub(super) accumulate: bool,
}

impl RouterBack<'_> {
    /// Both gradients, each where it is asked for.
    pub(super) fn enqueue<T: Element>(
        self,
        scope: &Scope<'_>,
        [of_matrix, of_input]: [BackwardStage; 2],
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let RouterBackwardDesc { tokens, experts, hidden, .. } = self.steps.desc;
        let d_logits = self.d_logits.input::<f32>(tokens * experts);
        if let Some(gradient) = self.d_matrix {
            let desc = self.steps.desc.accumulate(self.accumulate);
            let seen = self.seen.input::<T>(tokens * hidden);
            let gradient = gradient.out(experts * hidden);
            router_backward::into_weight::<T>(kernels, stream, &desc, d_logits, seen, gradient).map_err(within)?;
            observer(of_matrix);
        }
        if let (Some(gradient), Some(matrix)) = (self.d_input, self.matrix) {
            let desc = self.steps.desc.accumulate(self.added);
            let out = gradient.out::<T>(tokens * hidden);
            match (matrix, T::of_tensor(matrix)) {
                (_, Some(matrix)) => router_backward::into_x::<T, T>(kernels, stream, &desc, d_logits, matrix, out),
                (Tensor::F32(matrix), None) => {
                    router_backward::into_x::<T, f32>(kernels, stream, &desc, d_logits, matrix, out)
                }
                (other, None) => {
                    let (argument, expected, got) = ("router.matrix", Dtype::F32, other.dtype());
                    Err(Error::WrongDtype { operation: OPERATION, argument, expected, got })
                }
            }
            .map_err(within)?;
            observer(of_input);
        }
        Ok(())
    }
}

impl BackwardPlan {
    /// Sums over all tokens, as a router's product with ones: of `rows [T, columns]` of gradients of logits with one column of ones (`[columns, 1]`), or of rows
    /// of any type with gradients of 1 (`[1, columns]`).
    pub(super) fn column_sums<R: Element>(
        &self,
        scope: &Scope<'_>,
        workspace: &Held<'_>,
        rows: In<'_, R>,
        [experts, hidden]: [usize; 2],
        sums: Address<'_>,
    ) -> Result<(), Error> {
        let tokens = self.layer().tokens();
        let ones = workspace.at(self.regions.ones);
        scope.fill(ones, 1f32.to_bits(), tokens)?;
        let desc = RouterBackwardDesc::new(R::DTYPE, tokens, experts, hidden).accumulate(self.desc().accumulate);
        let (kernels, stream, sums) = (scope.kernels, scope.stream, sums.out::<f32>(experts * hidden));
        match f32::of_tensor(R::tensor(rows)).filter(|_| hidden == 1) {
            Some(logits) => {
                router_backward::into_weight::<f32>(kernels, stream, &desc, logits, ones.input::<f32>(tokens), sums)
            }
            None => router_backward::into_weight::<R>(kernels, stream, &desc, ones.input::<f32>(tokens), rows, sums),
        }
        .map_err(|error| error.within(OPERATION))
    }
}
