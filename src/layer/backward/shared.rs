//! The shared expert's way back, and its gate's.

use super::mlp::{self, Inputs, Wanted};
use super::router::RouterBack;
use super::run::Opened;
use super::{BackwardPlan, BackwardStage, OPERATION, Saved};
use crate::experts::gemm::SwigluByExpert;
use crate::experts::sigmoid_gate::{self, SigmoidGateArgs};
use crate::layer::weights::LayerWeights;
use crate::runtime::launch::{Held, Scope, optional};
use crate::{Element, Error};

impl BackwardPlan {
    /// The shared expert, where there is one and something is asked of it; whether its gate has `written` to the gradient of what it saw, or added
    /// where something was `written`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn enqueue_shared<T: Element>(
        &self,
        scope: &Scope<'_>,
        weights: &LayerWeights<'_>,
        saved: &Saved<T>,
        at: &Opened<'_>,
        workspace: &Held<'_>,
        written: bool,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<bool, Error> {
        let gradients = &at.gradients;
        let Some((plan, of_mlp)) = self.shared.as_ref().zip(gradients.shared.as_ref()) else { return Ok(false) };
        let held = saved.shared_pre_activation.as_ref().zip(saved.all_tokens.as_ref());
        let Some((shared, (pre_activation, rows))) = weights.experts.shared.zip(held) else { return Ok(false) };
        let input = if at.router_x.is_some() { &gradients.router_x } else { &gradients.x };
        let input = input.as_ref().map(Held::address);
        let gate = self.gate.as_ref().zip(saved.shared_gate.as_ref());
        let of_gate = gate.is_some() && (input.is_some() || gradients.shared_gate.is_some());
        let wanted = Wanted { weights: of_gate, input: gradients.x.is_some() };
        if !wanted.weights && !wanted.input && !of_mlp.is_some() {
            return Ok(false);
        }
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let (tokens, hidden) = (self.layer().tokens(), self.layer().desc().hidden);
        let elements = tokens * hidden;
        let values = workspace.at(self.regions.shared_gate);
        if let Some((_, logits)) = gate {
            let args = SigmoidGateArgs::new(logits, values.out(tokens));
            sigmoid_gate::forward(kernels, stream, tokens, args).map_err(within)?;
            observer(BackwardStage::SharedGate);
        }
        let inputs = Inputs {
            x: at.x.address().input::<T>(elements),
            dy: at.dy.address().input::<T>(elements),
            gate_up: shared.gate_up,
            down: shared.down,
            swiglu: SwigluByExpert::new(),
            pre_activation: pre_activation.into(),
            rows,
            row_weight: gate.map(|_| values.input(tokens)),
            dropout: None,
            noise_state: None,
            frozen: None,
        };
        plan.enqueue(scope, mlp::SHARED, &inputs, workspace, of_mlp, wanted, observer)?;
        let Some((steps, logits)) = gate.filter(|_| of_gate) else { return Ok(false) };
        let d_logits = workspace.at(self.regions.d_shared_gate);
        let d = plan.d_row_weight(workspace).input(tokens);
        let args = SigmoidGateArgs::new(logits, d_logits.out(tokens)).d(d);
        sigmoid_gate::forward(kernels, stream, tokens, args).map_err(within)?;
        observer(BackwardStage::SharedGateLogit);
        let back = RouterBack {
            steps: &steps.router,
            d_logits,
            seen: optional(&at.router_x).unwrap_or_else(|| at.x.address()),
            matrix: shared.gate,
            d_matrix: optional(&gradients.shared_gate),
            d_input: input,
            added: written,
            accumulate: self.desc().accumulate,
        };
        let stages = [BackwardStage::SharedGateWeight, BackwardStage::SharedGateInput];
        back.enqueue::<T>(scope, stages, observer)?;
        Ok(input.is_some())
    }
}
