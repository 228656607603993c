//! The router's product on its way back, and sums over all tokens.

use super::pass::typed;
use super::plan::RouterSteps;
use super::{BackwardPlan, BackwardStage, OPERATION};
use crate::routers::router_backward::{self, InputArgs, RouterBackwardDesc, WeightArgs};
use crate::runtime::launch::{Address, Held, Scope};
use crate::{Dtype, Element, Error, In, Tensor};

/// A router's product on its way back, or that of a shared expert's gate.
pub(super) struct RouterBack<'a> {
    pub(super) steps: &'a RouterSteps,
    /// What the router saw.
    pub(super) seen: Address<'a>,
    /// The router's own.
    pub(super) of: Matrix<'a>,
    /// Gradient of the logits' bias, where the matrix has one in its launch.
    pub(super) d_bias: Option<Address<'a>>,
    /// A gate's, of one logit, which goes along in the launches that both have.
    pub(super) gate: Option<(&'a RouterSteps, Matrix<'a>)>,
    pub(super) d_input: Option<Address<'a>>,
    /// Whether parameters' gradients are added to what lies there.
    pub(super) accumulate: bool,
}

/// A matrix of logits: their gradients, and where its own goes.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) d_logits: Address<'a>,
    pub(super) matrix: Option<Tensor<'a>>,
    pub(super) d_matrix: Option<Address<'a>>,
}

/// To the weight, to the input, to both.
pub(super) const ROUTER: [BackwardStage; 3] =
    [BackwardStage::RouterWeight, BackwardStage::RouterInput, BackwardStage::RouterBoth];
pub(super) const GATE: [BackwardStage; 3] =
    [BackwardStage::SharedGateWeight, BackwardStage::SharedGateInput, BackwardStage::SharedGateBoth];

impl RouterBack<'_> {
    /// All gradients that are asked for, the input's written.
    pub(super) fn enqueue<T: Element>(
        &self,
        scope: &Scope<'_>,
        workspace: &Held<'_>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let gate = self.gate.as_ref().map(|(_, gate)| gate);
        let of_gate = gate.and_then(|gate| gate.d_matrix);
        let all = self.of.d_matrix.is_some() && gate.is_none() == of_gate.is_none();
        if let Some(dx) = self.d_input.filter(|_| self.steps.merges && all) {
            let (of, to) = ((self.steps, &self.of), (dx, false));
            both::<T>(scope, workspace, of, gate, (self.seen, self.d_bias), to, self.accumulate)?;
            observer(ROUTER[2]);
            return Ok(());
        }
        if self.of.d_matrix.is_some() {
            self.weight::<T>(scope, workspace, (self.steps, &self.of), gate.filter(|_| of_gate.is_some()))?;
            observer(ROUTER[0]);
        }
        if let Some((steps, gate)) = self.gate.as_ref().filter(|_| of_gate.is_some() && self.of.d_matrix.is_none()) {
            self.weight::<T>(scope, workspace, (steps, gate), None)?;
            observer(GATE[0]);
        }
        if let Some(dx) = self.d_input {
            input::<T>(scope, self.steps, &self.of, gate, dx, false)?;
            observer(ROUTER[1]);
        }
        Ok(())
    }

    fn weight<T: Element>(
        &self,
        scope: &Scope<'_>,
        workspace: &Held<'_>,
        (steps, of): (&RouterSteps, &Matrix<'_>),
        gate: Option<&Matrix<'_>>,
    ) -> Result<(), Error> {
        weight::<T>(scope, workspace, (steps, of), gate, (self.seen, self.d_bias), self.accumulate)
    }
}

/// A shared expert's gate alone: both gradients, each where it is asked for, the input's written or where something lies there added.
pub(super) fn gate_alone<T: Element>(
    scope: &Scope<'_>,
    workspace: &Held<'_>,
    (steps, of): (&RouterSteps, &Matrix<'_>),
    (seen, d_input, added): (Address<'_>, Option<Address<'_>>, bool),
    accumulate: bool,
    observer: &mut dyn FnMut(BackwardStage),
) -> Result<(), Error> {
    if let Some(dx) = d_input.filter(|_| steps.merges && of.d_matrix.is_some()) {
        both::<T>(scope, workspace, (steps, of), None, (seen, None), (dx, added), accumulate)?;
        observer(GATE[2]);
        return Ok(());
    }
    if of.d_matrix.is_some() {
        weight::<T>(scope, workspace, (steps, of), None, (seen, None), accumulate)?;
        observer(GATE[0]);
    }
    if let Some(dx) = d_input {
        input::<T>(scope, steps, of, None, dx, added)?;
        observer(GATE[1]);
    }
    Ok(())
}

/// The gradients of a matrix, of a bias, of a gate beside it, and of what both saw.
#[allow(clippy::too_many_arguments)]
fn both<T: Element>(
    scope: &Scope<'_>,
    workspace: &Held<'_>,
    of: (&RouterSteps, &Matrix<'_>),
    gate: Option<&Matrix<'_>>,
    seen: (Address<'_>, Option<Address<'_>>),
    to: (Address<'_>, bool),
    accumulate: bool,
) -> Result<(), Error> {
    match of.1.matrix.map(|matrix| matrix.dtype()) {
        Some(Dtype::F32) => both_by::<T, f32>(scope, workspace, of, gate, seen, to, accumulate),
        _ => both_by::<T, T>(scope, workspace, of, gate, seen, to, accumulate),
    }
}

#[allow(clippy::too_many_arguments)]
fn both_by<T: Element, W: Element>(
    scope: &Scope<'_>,
    workspace: &Held<'_>,
    (steps, of): (&RouterSteps, &Matrix<'_>),
    gate: Option<&Matrix<'_>>,
    (seen, d_bias): (Address<'_>, Option<Address<'_>>),
    (dx, added): (Address<'_>, bool),
    accumulate: bool,
) -> Result<(), Error> {
    let Some((matrix, d_matrix)) = of.matrix.zip(of.d_matrix) else { return Ok(()) };
    let RouterBackwardDesc { tokens, experts, hidden, .. } = steps.desc;
    let d_logits = of.d_logits.input::<f32>(tokens * experts);
    let mut into_x = InputArgs::<T, W>::new(d_logits, typed("router.matrix", matrix)?, dx.out(tokens * hidden));
    let mut into_weight = WeightArgs::new(d_logits, seen.input::<T>(tokens * hidden), d_matrix.out(experts * hidden));
    if let Some((gate, matrix, to)) = gate.and_then(|gate| Some((gate, gate.matrix?, gate.d_matrix?))) {
        into_x.gate = Some((gate.d_logits.input(tokens), typed("shared.gate", matrix)?));
        into_weight.gate = Some((gate.d_logits.input(tokens), to.out(hidden)));
    }
    into_weight.d_bias = d_bias.map(|sums| sums.out(experts));
    let desc = steps.desc.accumulate(accumulate).gate(into_x.gate.is_some());
    let mut scratch = workspace.part(steps.scratch());
    into_weight.workspace = Some(&mut scratch);
    router_backward::both(scope.kernels, scope.stream, &desc, into_x, added, into_weight)
        .map_err(|error| error.within(OPERATION))
}

/// The gradient of a matrix, of a bias and of a gate beside it, tokens in parts.
fn weight<T: Element>(
    scope: &Scope<'_>,
    workspace: &Held<'_>,
    (steps, of): (&RouterSteps, &Matrix<'_>),
    gate: Option<&Matrix<'_>>,
    (seen, d_bias): (Address<'_>, Option<Address<'_>>),
    accumulate: bool,
) -> Result<(), Error> {
    let Some(d_matrix) = of.d_matrix else { return Ok(()) };
    let RouterBackwardDesc { tokens, experts, hidden, .. } = steps.desc;
    let d_logits = of.d_logits.input::<f32>(tokens * experts);
    let mut args = WeightArgs::new(d_logits, seen.input::<T>(tokens * hidden), d_matrix.out(experts * hidden));
    args.d_bias = d_bias.map(|sums| sums.out(experts));
    args.gate = gate.and_then(|gate| gate.d_matrix.map(|to| (gate.d_logits.input(tokens), to.out(hidden))));
    let desc = steps.desc.accumulate(accumulate).gate(args.gate.is_some());
    let mut scratch = workspace.part(steps.scratch());
    args.workspace = Some(&mut scratch);
    router_backward::weight(scope.kernels, scope.stream, &desc, args).map_err(|error| error.within(OPERATION))
}

/// The gradient of what a router saw, and of what a gate made of it.
fn input<T: Element>(
    scope: &Scope<'_>,
    steps: &RouterSteps,
    of: &Matrix<'_>,
    gate: Option<&Matrix<'_>>,
    dx: Address<'_>,
    added: bool,
) -> Result<(), Error> {
    let Some(matrix) = of.matrix else { return Ok(()) };
    match matrix.dtype() {
        Dtype::F32 => input_by::<T, f32>(scope, steps, (of, matrix), gate, dx, added),
        _ => input_by::<T, T>(scope, steps, (of, matrix), gate, dx, added),
    }
}

fn input_by<T: Element, W: Element>(
    scope: &Scope<'_>,
    steps: &RouterSteps,
    (of, matrix): (&Matrix<'_>, Tensor<'_>),
    gate: Option<&Matrix<'_>>,
    dx: Address<'_>,
    added: bool,
) -> Result<(), Error> {
    let RouterBackwardDesc { tokens, experts, hidden, .. } = steps.desc;
    let (d_logits, out) = (of.d_logits.input::<f32>(tokens * experts), dx.out::<T>(tokens * hidden));
    let mut args = InputArgs::<T, W>::new(d_logits, typed("router.matrix", matrix)?, out);
    if let Some((gate, matrix)) = gate.and_then(|gate| Some((gate, gate.matrix?))) {
        args.gate = Some((gate.d_logits.input(tokens), typed("shared.gate", matrix)?));
    }
    let desc = steps.desc.accumulate(added).gate(args.gate.is_some());
    router_backward::input(scope.kernels, scope.stream, &desc, args).map_err(|error| error.within(OPERATION))
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
        let (ones, mut scratch) = (ones.input::<f32>(tokens), workspace.part(self.regions.scratch));
        match f32::of_tensor(R::tensor(rows)).filter(|_| hidden == 1) {
            Some(logits) => {
                let args = WeightArgs::new(logits, ones, sums).workspace(&mut scratch);
                router_backward::weight::<f32>(kernels, stream, &desc, args)
            }
            None => {
                let args = WeightArgs::<R>::new(ones, rows, sums).workspace(&mut scratch);
                router_backward::weight(kernels, stream, &desc, args)
            }
        }
        .map_err(|error| error.within(OPERATION))
    }
}
