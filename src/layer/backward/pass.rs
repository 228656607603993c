//! The launches of an expert's way back, each of routed rows, of a shared expert's, or of both.

use super::held::{HeldGradient, HeldMlpGradients};
use super::mlp::{Input, MlpPlan, Regions, Stages};
use super::{BackwardStage, OPERATION};
use crate::experts::dispatched::Dispatched;
use crate::experts::gemm::{self, GemmArgs, ProductOut, SharedRows, SwigluByExpert};
use crate::experts::gemm_backward::{self, GemmBackwardArgs, SharedRowsBackward};
use crate::experts::k_grouped::{self, ColumnSums, KGroupedArgs, KGroupedDesc, SecondOut, SharedGroup};
use crate::experts::weight::Weight;
use crate::rules::{Dropout, Layout, Weighting};
use crate::runtime::launch::{Held, Scope};
use crate::runtime::workspace::Region;
use crate::{Element, Error, In, Out, Tensor};

/// What is wanted beside gradients of weights.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    /// Gradients of the rows' weights.
    pub(super) weights: bool,
    /// Gradients of the rows' inputs.
    pub(super) input: bool,
}

impl Wanted {
    pub(super) fn any(self) -> bool {
        self.weights || self.input
    }
}

/// What an expert's way back reads.
pub(super) struct Inputs<'a, T> {
    pub(super) x: In<'a, T>,
    pub(super) dy: In<'a, T>,
    pub(super) gate_up: Weight<'a>,
    pub(super) down: Weight<'a>,
    pub(super) swiglu: SwigluByExpert<'a>,
    pub(super) pre_activation: In<'a, T>,
    /// The rows of the routed experts, or all tokens as those of one.
    pub(super) rows: &'a Dispatched,
    /// `[rows]`, of a gate its logits; 1 if absent.
    pub(super) row_weight: Option<In<'a, f32>>,
    /// `[rows]`: what the second product's bias was multiplied by, where it has a gradient; of a gate not its logits.
    pub(super) bias_weight: Option<In<'a, f32>>,
    pub(super) dropout: Option<Dropout>,
    pub(super) noise_state: Option<In<'a, u64>>,
    /// `[E]`: experts whose gradients are left alone.
    pub(super) frozen: Option<In<'a, i32>>,
}

/// The way back of some rows: what is read, what is asked for, and where the rest lies.
pub(super) struct Pass<'a, T> {
    pub(super) plan: &'a MlpPlan,
    pub(super) names: Stages,
    pub(super) at: Inputs<'a, T>,
    pub(super) gradients: &'a HeldMlpGradients<'a>,
    pub(super) wanted: Wanted,
    pub(super) workspace: &'a Held<'a>,
}

/// A weight's gradient and its bias's: the rows of its outputs' gradients, those of its inputs, and what is asked for.
struct WeightSums<'a, T> {
    outputs: In<'a, T>,
    inputs: In<'a, T>,
    matrix: Option<&'a HeldGradient<'a>>,
    bias: Option<ColumnSums<'a, T>>,
    /// A second tensor's matrix and bias, whose outputs stand behind the first's.
    second: Option<(&'a HeldGradient<'a>, Option<&'a HeldGradient<'a>>)>,
}

impl<'a, T: Element> WeightSums<'a, T> {
    /// Both operands: the rows of the gradient are the weight's.
    fn sides(&self, layout: Layout) -> [In<'a, T>; 2] {
        match layout {
            Layout::Nk => [self.outputs, self.inputs],
            Layout::Kn => [self.inputs, self.outputs],
        }
    }

    /// Where the second tensor's go, and whether its matrix is f32 beside another type.
    fn second_out(&self) -> Option<(SecondOut<'a, T>, bool)> {
        let (matrix, bias) = self.second?;
        let (out, f32_out) = matrix.product::<T>();
        let second = SecondOut::new(out);
        let second = match bias {
            Some(bias) => second.sums(bias.product::<T>().0),
            None => second,
        };
        Some((second, f32_out))
    }
}

impl<'a, T: Element> Pass<'a, T> {
    /// From `dy` to gradients of the weights, and where they are wanted of each row's weight and of each row's input; of `shared` rows in the same launches
    /// where these have what both ask for.
    pub(super) fn enqueue(
        &self,
        scope: &Scope<'_>,
        shared: Option<&Pass<'a, T>>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        self.through_down(scope, shared)?;
        observer(self.names.hidden);
        let plan = self.plan;
        let descs = |plan: &MlpPlan| (plan.down.desc, plan.down_bias, plan.mlp.down.layout);
        let both = [Some(self), shared]
            .map(|pass| pass.map(|pass| (pass, pass.down_sums(), pass.names.down, pass.names.down_bias)));
        sum(scope, both, descs, observer)?;
        self.to_input(scope, shared, observer)?;
        let descs = |plan: &MlpPlan| (plan.gate_up.desc, plan.gate_up_bias, plan.mlp.gate_up.layout);
        let together = [Some(self), shared].into_iter().flatten().all(Pass::has_both_tensors);
        let numbers = if together { 1 } else { plan.tensors() };
        for number in 0..numbers {
            let both = [Some(self), shared].map(|pass| {
                let sums = pass.map(|pass| pass.gate_up_sums(number, together));
                pass.zip(sums).map(|(pass, sums)| (pass, sums, pass.names.gate_up, pass.names.gate_up_bias))
            });
            sum(scope, both, descs, observer)?;
        }
        Ok(())
    }

    /// Whether gate and up have a tensor each, and the gradients of both are asked for.
    fn has_both_tensors(&self) -> bool {
        let of = &self.gradients.gate_up;
        self.plan.tensors() == 2 && of.matrix.is_some() && of.up.is_some()
    }

    fn rows(&self) -> usize {
        self.plan.sizes.rows.count()
    }

    fn input_at(&self, region: Region, columns: usize) -> In<'a, T> {
        self.workspace.at(region).input::<T>(self.rows() * columns)
    }

    fn out_at(&self, region: Region, columns: usize) -> Out<'a, T> {
        self.workspace.at(region).out::<T>(self.rows() * columns)
    }

    fn grouped(&self) -> Option<&'a Dispatched> {
        self.plan.sizes.gathers().then_some(self.at.rows)
    }

    /// Gate's part of the pre-activations' gradient, or all, and up's where it has a tensor of its own.
    fn outputs(&self, number: usize) -> In<'a, T> {
        let skipped = number * self.plan.sizes.intermediate;
        let at = self.workspace.at(self.plan.regions.d_pre_activation);
        let at = at.offset(skipped * self.plan.sizes.dtype.bytes() as usize);
        at.input::<T>(self.rows() * self.plan.columns() - skipped)
    }

    /// Through the second product and the activation.
    fn through_down(&self, scope: &Scope<'_>, shared: Option<&Pass<'a, T>>) -> Result<(), Error> {
        let plan = self.plan;
        let mut args =
            GemmBackwardArgs::new(self.at.dy, self.at.down.matrix, self.at.pre_activation, self.d_pre_activation());
        args.dispatched = self.grouped();
        if !plan.sizes.weighs_input() {
            args.slot_weight = self.at.row_weight;
            args.d_slot_weight = self.d_row_weight();
            args.out_bias = self.out_bias()?;
        }
        args.hidden = self.hidden();
        (args.dropout, args.noise_state, args.swiglu) = (self.at.dropout, self.at.noise_state, self.at.swiglu);
        let mut desc = plan.hidden.desc;
        match shared {
            Some(shared) => {
                let at = &shared.at;
                let (weight, d) = (at.down.matrix, shared.d_pre_activation());
                let mut rows = SharedRowsBackward::new(at.dy, weight, at.pre_activation, d);
                rows.row_weight = at.row_weight;
                rows.d_row_weight = shared.d_row_weight();
                rows.out_bias = shared.out_bias()?;
                rows.hidden = shared.hidden();
                args.shared = Some(rows);
            }
            None => desc = desc.alone(),
        }
        let mut scratch = self.scratch();
        gemm_backward::forward(scope.kernels, scope.stream, &desc, args, &mut scratch).map_err(within)
    }

    fn scratch(&self) -> crate::Workspace {
        self.workspace.part(Region { offset: 0, bytes: self.plan.scratch_bytes })
    }

    fn d_pre_activation(&self) -> Out<'a, T> {
        self.out_at(self.plan.regions.d_pre_activation, self.plan.columns())
    }

    fn d_row_weight(&self) -> Option<Out<'a, f32>> {
        let place = self.workspace.at(self.plan.regions.d_slot_weight);
        self.wanted.weights.then(|| place.out(self.rows()))
    }

    /// The second product's bias, where its rows' weights have gradients that it is part of: a weight of what the activation yields does not reach it.
    fn out_bias(&self) -> Result<Option<In<'a, T>>, Error> {
        let reached = self.plan.sizes.weighting == Weighting::Output && self.wanted.weights;
        self.at.down.bias.filter(|_| reached).map(|bias| typed::<T>("bias", bias)).transpose()
    }

    /// What stands between the products, where a gradient is made with it.
    fn hidden(&self) -> Option<Out<'a, T>> {
        let down = &self.gradients.down;
        let made = down.matrix.is_some() || down.bias.is_some();
        made.then(|| self.out_at(self.plan.regions.hidden, self.plan.sizes.intermediate))
    }

    fn down_sums(&self) -> WeightSums<'a, T> {
        let of = &self.gradients.down;
        let bias = of.bias.as_ref().map(|gradient| {
            let weights = self.at.bias_weight.filter(|_| self.plan.sizes.weighting == Weighting::Output);
            ColumnSums { weights, ..ColumnSums::new(gradient.product::<T>().0).scale(self.plan.sizes.scale) }
        });
        let inputs = self.input_at(self.plan.regions.hidden, self.plan.sizes.intermediate);
        WeightSums { outputs: self.at.dy, inputs, matrix: of.matrix.as_ref(), bias, second: None }
    }

    /// Of the first tensor or the second, or of both.
    fn gate_up_sums(&self, number: usize, both: bool) -> WeightSums<'a, T> {
        let of = &self.gradients.gate_up;
        let (matrix, bias) = [(&of.matrix, &of.bias), (&of.up, &of.up_bias)][number];
        let inputs = match self.plan.sizes.weighs_input() {
            true => self.input_at(self.plan.regions.weighted_x, self.plan.sizes.width),
            false => self.at.x,
        };
        let bias = bias.as_ref().map(|gradient| ColumnSums::new(gradient.product::<T>().0));
        let second = of.up.as_ref().filter(|_| both).map(|up| (up, of.up_bias.as_ref()));
        WeightSums { outputs: self.outputs(number), inputs, matrix: matrix.as_ref(), bias, second }
    }

    /// Through the first product.
    fn to_input(
        &self,
        scope: &Scope<'_>,
        shared: Option<&Pass<'a, T>>,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let (plan, wanted) = (self.plan, self.wanted);
        let Regions { d_rows, weighted_x, .. } = plan.regions;
        let (kernels, stream) = (scope.kernels, scope.stream);
        let (shared, beside) = if plan.input_joins() { (shared, None) } else { (None, shared) };
        if let Some(shared) = beside {
            shared.to_input(scope, None, observer)?;
        }
        match &plan.input {
            Input::Product(step, of_up) if wanted.input => {
                let mut args = GemmArgs::new(self.outputs(0), Weight::new(self.at.gate_up.matrix), self.d_rows());
                args.dispatched = self.grouped();
                args.shared = shared.map(|shared| {
                    SharedRows::new(shared.outputs(0), Weight::new(shared.at.gate_up.matrix), shared.d_rows())
                });
                let desc = if shared.is_some() { step.desc } else { step.desc.alone() };
                gemm::forward(kernels, stream, &desc, args).map_err(within)?;
                observer(self.names.input);
                if of_up.is_some() {
                    self.add_up(scope, shared)?;
                    observer(self.names.input);
                }
            }
            Input::Weighted(step, of_up) => {
                // The weighted rows of x, for a weight's gradient or beside the sums of a bias alone.
                let of = &self.gradients.gate_up;
                let reads_x = [&of.matrix, &of.up, &of.bias, &of.up_bias].into_iter().any(Option::is_some);
                let shared = shared.filter(|_| wanted.input);
                if wanted.input || wanted.weights || reads_x {
                    for (number, step) in [Some(step), of_up.as_ref()].into_iter().flatten().enumerate() {
                        let Some(weight) = self.tensor(number) else { continue };
                        let to = self.out_at(d_rows, plan.sizes.width);
                        let mut args = GemmBackwardArgs::new(self.outputs(number), weight, self.at.x, to);
                        args.dispatched = self.grouped();
                        args.slot_weight = self.at.row_weight;
                        args.d_slot_weight = self.d_row_weight();
                        args.hidden = (reads_x && number == 0).then(|| self.out_at(weighted_x, plan.sizes.width));
                        args.shared = shared.and_then(|shared| {
                            let (d, weight) = (shared.outputs(number), shared.tensor(number)?);
                            Some(SharedRowsBackward::new(d, weight, shared.at.x, shared.d_rows()))
                        });
                        let desc = if shared.is_some() { step.desc } else { step.desc.alone() };
                        let mut scratch = self.scratch();
                        gemm_backward::forward(kernels, stream, &desc, args, &mut scratch).map_err(within)?;
                        observer(self.names.input);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The first product's tensor of all its outputs or the gate's, or that of the up values.
    fn tensor(&self, number: usize) -> Option<Tensor<'a>> {
        match number {
            0 => Some(self.at.gate_up.matrix),
            _ => self.at.gate_up.up.map(|(matrix, _)| matrix),
        }
    }

    fn d_rows(&self) -> Out<'a, T> {
        self.out_at(self.plan.regions.d_rows, self.plan.sizes.width)
    }

    /// Onto the gate's part of the inputs' gradients the up's, from a tensor of its own.
    fn add_up(&self, scope: &Scope<'_>, shared: Option<&Pass<'a, T>>) -> Result<(), Error> {
        let Input::Product(_, Some(step)) = &self.plan.input else { return Ok(()) };
        let Some((matrix, _)) = self.at.gate_up.up else { return Ok(()) };
        let mut args = GemmArgs::new(self.outputs(1), Weight::new(matrix), self.d_rows());
        args.dispatched = self.grouped();
        args.shared = shared.and_then(|shared| {
            let (matrix, _) = shared.at.gate_up.up?;
            Some(SharedRows::new(shared.outputs(1), Weight::new(matrix), shared.d_rows()))
        });
        let desc = if shared.is_some() { step.desc } else { step.desc.alone() };
        gemm::forward(scope.kernels, scope.stream, &desc, args).map_err(within)
    }

    /// `a^T b` of one side alone, to a weight's gradient and its bias's.
    fn sum_alone(
        &self,
        scope: &Scope<'_>,
        desc: KGroupedDesc,
        [a, b]: [In<'a, T>; 2],
        to: To<'a, T>,
    ) -> Result<(), Error> {
        let (out, f32_out) = to.out;
        let mut args = KGroupedArgs::new(a, b, self.at.rows, out);
        (args.frozen, args.sums) = (self.at.frozen, to.sums);
        let (second, second_f32_out) = to.second.unzip();
        let desc = desc.alone().f32_out(f32_out).second(desc.second.filter(|_| second.is_some()));
        let desc = desc.second_f32_out(second_f32_out.unwrap_or(false));
        args.second = second;
        k_grouped::forward(scope.kernels, scope.stream, &desc, args).map_err(within)
    }
}

/// Where a product along the rows goes, f32 beside another type or not, sums of a bias, and where a second tensor's goes.
struct To<'a, T> {
    out: (ProductOut<'a, T>, bool),
    sums: Option<ColumnSums<'a, T>>,
    second: Option<(SecondOut<'a, T>, bool)>,
}

/// The gradients of a weight and its bias, of both in one launch where both have the weight's; sums of a bias alone have a launch of their own.
#[allow(clippy::type_complexity)] // a pass with its sums and stages, for routed rows and a shared expert's
fn sum<'a, T: Element>(
    scope: &Scope<'_>,
    [own, shared]: [Option<(&Pass<'a, T>, WeightSums<'a, T>, BackwardStage, BackwardStage)>; 2],
    descs: impl Fn(&MlpPlan) -> (KGroupedDesc, KGroupedDesc, Layout),
    observer: &mut dyn FnMut(BackwardStage),
) -> Result<(), Error> {
    let (own, shared) = match (own, shared) {
        (Some((pass, own, stage, _)), Some((_, shared, ..))) if own.matrix.is_some() && shared.matrix.is_some() => {
            let (desc, _, layout) = descs(pass.plan);
            let of_b = layout == Layout::Kn;
            let ([a, b], [shared_a, shared_b]) = (own.sides(layout), shared.sides(layout));
            let Some((matrix, shared_matrix)) = own.matrix.zip(shared.matrix) else { return Ok(()) };
            let ((out, f32_out), (shared_out, shared_f32_out)) = (matrix.product::<T>(), shared_matrix.product::<T>());
            let mut group = SharedGroup::new(shared_a, shared_b, shared_out);
            let (second, shared_second) = (own.second_out().unzip(), shared.second_out().unzip());
            group.sums = shared.bias.map(|bias| bias.of_b(of_b));
            group.second = shared_second.0;
            let mut args = KGroupedArgs::new(a, b, pass.at.rows, out).shared(group);
            (args.frozen, args.sums) = (pass.at.frozen, own.bias.map(|bias| bias.of_b(of_b)));
            let desc = desc.f32_out(f32_out).shared_f32_out(shared_f32_out);
            let desc = desc.second(desc.second.filter(|_| second.0.is_some()));
            let desc = desc.second_f32_out(second.1.unwrap_or(false));
            let desc = desc.shared_second_f32_out(shared_second.1.unwrap_or(false));
            args.second = second.0;
            k_grouped::forward(scope.kernels, scope.stream, &desc, args).map_err(within)?;
            observer(stage);
            return Ok(());
        }
        both => both,
    };
    for (pass, sums, stage, bias_stage) in [own, shared].into_iter().flatten() {
        let (desc, of_bias, layout) = descs(pass.plan);
        let (sides, second) = (sums.sides(layout), sums.second_out());
        match (sums.matrix, sums.bias) {
            (Some(matrix), bias) => {
                let bias = bias.map(|bias| bias.of_b(layout == Layout::Kn));
                pass.sum_alone(scope, desc, sides, To { out: matrix.product::<T>(), sums: bias, second })?;
                observer(stage);
            }
            (None, Some(bias)) => {
                let elements = of_bias.rows.experts * of_bias.m * of_bias.n;
                let beside = pass.workspace.at(pass.plan.regions.beside_sums).out::<T>(elements);
                let to = To { out: (ProductOut::Rounded(beside), false), sums: Some(bias), second: None };
                pass.sum_alone(scope, of_bias, [sums.outputs, sums.inputs], to)?;
                observer(bias_stage);
            }
            (None, None) => {}
        }
    }
    Ok(())
}

fn within(error: Error) -> Error {
    error.within(OPERATION)
}

/// A buffer whose type has been checked.
pub(super) fn typed<'a, T: Element>(argument: &'static str, tensor: Tensor<'a>) -> Result<In<'a, T>, Error> {
    let got = tensor.dtype();
    T::of_tensor(tensor).ok_or(Error::WrongDtype { operation: OPERATION, argument, expected: T::DTYPE, got })
}
