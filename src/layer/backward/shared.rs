//! The shared expert's way back, and its gate's.

use super::held::HeldGradients;
use super::mlp;
use super::pass::{Inputs, Pass, Wanted};
use super::plan::RouterSteps;
use super::router::Matrix;
use super::run::Opened;
use super::{BackwardPlan, BackwardStage, OPERATION, Saved};
use crate::experts::gemm::SwigluByExpert;
use crate::experts::sigmoid_gate::{self, SigmoidGateArgs};
use crate::layer::weights::LayerWeights;
use crate::runtime::launch::{Address, Held, Scope, optional};
use crate::{Element, Error, In};

impl BackwardPlan {
    /// What is done for a shared expert, where there is one and something is asked of it, with `dy` the gradient of the sum that it is in. A gate's values are computed where the second product's bias has a
    /// gradient, which takes them by row.
    pub(super) fn shared_pass<'a, T: Element>(
        &'a self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'a>,
        saved: &'a Saved<T>,
        (at, dy): (&'a Opened<'a>, In<'a, T>),
        workspace: &'a Held<'a>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<Option<Pass<'a, T>>, Error> {
        let gradients = &at.gradients;
        let Some((plan, of_mlp)) = self.shared.as_ref().zip(gradients.shared.as_ref()) else { return Ok(None) };
        let held = saved.shared_pre_activation.as_ref().zip(saved.all_tokens.as_ref());
        let Some((shared, (pre_activation, rows))) = weights.experts.shared.zip(held) else { return Ok(None) };
        let of_gate =
            self.gate.is_some() && (seen_gradient(gradients, at).is_some() || gradients.shared_gate.is_some());
        let wanted = Wanted { weights: of_gate, input: gradients.x.is_some() };
        if !wanted.weights && !wanted.input && !of_mlp.is_some() {
            return Ok(None);
        }
        let (tokens, hidden) = (self.layer().tokens(), self.layer().desc().hidden);
        let elements = tokens * hidden;
        let logits = saved.shared_gate.as_ref();
        let mut bias_weight = None;
        if let Some(logits) = logits.filter(|_| of_mlp.down.bias.is_some()) {
            let values = workspace.at(self.regions.shared_gate);
            let args = SigmoidGateArgs::new(logits, values.out(tokens));
            sigmoid_gate::forward(scope.kernels, scope.stream, tokens, args)
                .map_err(|error| error.within(OPERATION))?;
            observer(BackwardStage::SharedGate);
            bias_weight = Some(values.input(tokens));
        }
        let inputs = Inputs {
            x: at.x.address().input::<T>(elements),
            dy,
            gate_up: shared.gate_up,
            down: shared.down,
            swiglu: SwigluByExpert::new(),
            pre_activation: pre_activation.into(),
            rows,
            row_weight: logits.map(Into::into),
            bias_weight,
            dropout: None,
            noise_state: None,
            frozen: None,
        };
        Ok(Some(Pass { plan, names: mlp::SHARED, at: inputs, gradients: of_mlp, wanted, workspace }))
    }

    /// The gate, where `pass` has made the gradients of its logits.
    pub(super) fn gate_matrix<'a, T: Element>(
        &'a self,
        weights: &LayerWeights<'a>,
        at: &'a Opened<'a>,
        pass: Option<&Pass<'a, T>>,
    ) -> Option<(&'a RouterSteps, Matrix<'a>)> {
        let pass = pass.filter(|pass| pass.wanted.weights)?;
        let matrix = Matrix {
            d_logits: pass.plan.d_row_weight(pass.workspace),
            matrix: weights.experts.shared?.gate,
            d_matrix: optional(&at.gradients.shared_gate),
        };
        Some((self.gate.as_ref()?, matrix))
    }
}

/// Where the gradient of what the router and the gate have seen goes.
pub(super) fn seen_gradient<'a>(gradients: &'a HeldGradients<'_>, at: &Opened<'_>) -> Option<Address<'a>> {
    optional(if at.router_x.is_some() { &gradients.router_x } else { &gradients.x })
}
