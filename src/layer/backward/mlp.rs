//! An expert's two products on their way back: four launches, of routed rows or of a shared expert's.

use super::held::HeldMlpGradients;
use super::{BackwardDesc, BackwardStage, OPERATION};
use crate::experts::dispatched::{Dispatched, SlotShape};
use crate::experts::gemm::{self, GemmArgs, GemmDesc, KernelSet, Output, ProductOut, Rows, Strides, SwigluByExpert};
use crate::experts::gemm_backward::{self, GemmBackwardArgs, GemmBackwardDesc};
use crate::experts::k_grouped::{self, ColumnSums, Gathered, KGroupedArgs, KGroupedDesc, KGroupedStrides};
use crate::experts::weight::Weight;
use crate::layer::Step;
use crate::layer::desc::Mlp;
use crate::rules::{Activation, Dropout, Dtype, Glu, Layout, WeightDesc, Weighting};
use crate::runtime::launch::{Address, Held, Scope};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Selection, Tensor};

/// Launches of an expert's way back.
#[derive(Clone, Copy, Debug)]
pub(super) struct MlpPlan {
    mlp: Mlp,
    sizes: Sizes,
    hidden: Step<GemmBackwardDesc>,
    down: Step<KGroupedDesc>,
    input: Input,
    /// Of each tensor of the first product's weight.
    gate_up: Step<KGroupedDesc>,
    /// Of biases alone.
    down_bias: KGroupedDesc,
    gate_up_bias: KGroupedDesc,
    /// What its launches keep at the workspace's begin.
    pub(super) scratch_bytes: usize,
    pub(super) regions: Regions,
}

/// From the pre-activations' gradient to that of the rows' inputs.
// A plan is copied, not boxed.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug)]
enum Input {
    /// A product, and one of up's tensor, where it has one, onto what gate's left.
    Product(Step<GemmDesc>, Option<Step<GemmDesc>>),
    /// A product that weighs each row, has the gradient of that weight and the weighted rows of x.
    Weighted(Step<GemmBackwardDesc>),
}

/// Rows, columns, and how rows are weighted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) dtype: Dtype,
    pub(super) rows: Rows,
    /// Columns of the experts' inputs and outputs.
    pub(super) width: usize,
    pub(super) intermediate: usize,
    pub(super) kernels: KernelSet,
    pub(super) weighting: Weighting,
    /// Factor of all rows' weights.
    pub(super) scale: f32,
}

impl Sizes {
    fn gathers(&self) -> bool {
        matches!(self.rows, Rows::Grouped(_))
    }

    fn weighs_input(&self) -> bool {
        self.weighting == Weighting::Input
    }

    /// The rows as groups along K.
    fn groups(&self) -> SlotShape {
        match self.rows {
            Rows::Grouped(shape) => shape,
            Rows::Dense(rows) => Dispatched::shape_of_one_expert(rows),
        }
    }
}

/// Places in the workspace.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Regions {
    /// `[rows, I]`: what stands between the products, weighted.
    pub(super) hidden: Region,
    /// `[rows, H]`, in the same place: of the rows' inputs, when the second product's weight has its gradient.
    pub(super) d_rows: Region,
    /// `[rows, 2I]` (`[rows, I]`).
    d_pre_activation: Region,
    /// `[rows]`.
    pub(super) d_slot_weight: Region,
    /// `[rows, H]`: the rows of x, weighted, where the weights scale them.
    weighted_x: Region,
    /// `[E, columns, 8]`: products beside the sums of a bias alone.
    beside_sums: Region,
}

/// A launch's stages in an expert's way back: the routed experts' or the shared one's.
#[derive(Clone, Copy)]
pub(super) struct Stages {
    hidden: BackwardStage,
    down: BackwardStage,
    down_bias: BackwardStage,
    input: BackwardStage,
    gate_up: BackwardStage,
    gate_up_bias: BackwardStage,
}

pub(super) const ROUTED: Stages = Stages {
    hidden: BackwardStage::Hidden,
    down: BackwardStage::DownWeight,
    down_bias: BackwardStage::DownBias,
    input: BackwardStage::Input,
    gate_up: BackwardStage::GateUpWeight,
    gate_up_bias: BackwardStage::GateUpBias,
};
pub(super) const SHARED: Stages = Stages {
    hidden: BackwardStage::SharedHidden,
    down: BackwardStage::SharedDownWeight,
    down_bias: BackwardStage::SharedDownBias,
    input: BackwardStage::SharedInput,
    gate_up: BackwardStage::SharedGateUpWeight,
    gate_up_bias: BackwardStage::SharedGateUpBias,
};

/// The form of a weight whose product goes the other way: its outputs are depths.
fn turned(weight: &WeightDesc) -> WeightDesc {
    let layout = match weight.layout {
        Layout::Nk => Layout::Kn,
        Layout::Kn => Layout::Nk,
    };
    WeightDesc { layout, glu: Glu::None, ..*weight }
}

impl MlpPlan {
    /// Without places: [`MlpPlan::lay`].
    pub(super) fn new(mlp: &Mlp, sizes: Sizes, desc: &BackwardDesc, device: &DeviceInfo) -> Result<MlpPlan, Error> {
        let within = |error: Error| error.within(OPERATION);
        let Sizes { dtype, rows, width, intermediate, kernels, scale, .. } = sizes;
        let product =
            |desc: GemmDesc| Ok::<_, Error>(Step { desc, selection: gemm::select_for(OPERATION, &desc, device)? });
        let through = |desc: GemmBackwardDesc| {
            Ok::<_, Error>(Step { desc, selection: gemm_backward::select(&desc, device).map_err(within)? })
        };
        let groups = |desc: KGroupedDesc| {
            Ok::<_, Error>(Step { desc, selection: k_grouped::select(&desc, device).map_err(within)? })
        };
        let hidden = GemmBackwardDesc::new(dtype, rows, intermediate, width, mlp.activation)
            .gather(sizes.gathers())
            .weight(mlp.down)
            .glu(mlp.gate_up.glu)
            .scale(scale);
        let columns = hidden.columns();

        let slots = sizes.groups();
        let sums = |m, n, gathered| {
            let gathered = if sizes.gathers() { gathered } else { Gathered::Neither };
            KGroupedDesc::new(dtype, slots, m, n)
                .gathered(gathered)
                .accumulate(desc.accumulate)
                .keep_empty(desc.keep_empty && sizes.gathers())
        };
        let down = match mlp.down.layout {
            Layout::Nk => sums(width, intermediate, Gathered::A),
            Layout::Kn => sums(intermediate, width, Gathered::B),
        };
        let outputs = mlp.gate_up.outputs(intermediate);
        let of_x = |gathered| if sizes.weighs_input() { Gathered::Neither } else { gathered };
        let (gate_up, [m, n]) = match mlp.gate_up.layout {
            Layout::Nk => (sums(outputs, width, of_x(Gathered::B)), [outputs, width]),
            Layout::Kn => (sums(width, outputs, of_x(Gathered::A)), [width, outputs]),
        };
        // Gate's and up's gradients lie side by side in a row.
        let apart = (mlp.gate_up.glu == Glu::Apart).then(|| {
            let packed = KGroupedStrides::packed(m, n);
            match mlp.gate_up.layout {
                Layout::Nk => packed.a([columns, 1]),
                Layout::Kn => packed.b([columns, 1]),
            }
        });
        let gate_up = gate_up.strides(apart);
        // A bias alone: sums of one operand's columns, beside a product with a few of the other's.
        let (of_dy, few) = (sums(width, BESIDE.min(intermediate), Gathered::A), BESIDE.min(intermediate));
        let down_bias = of_dy.strides(Some(KGroupedStrides::packed(width, few).b([intermediate, 1])));
        let few = BESIDE.min(width);
        let of_outputs = sums(outputs, few, of_x(Gathered::B));
        let strides = KGroupedStrides::packed(outputs, few).b([width, 1]);
        let gate_up_bias = of_outputs.strides(Some(strides.a([columns, 1])));
        let input = if sizes.weighs_input() {
            let plain = WeightDesc { glu: Glu::None, ..mlp.gate_up };
            let desc = GemmBackwardDesc::new(dtype, rows, width, outputs, Activation::Identity)
                .weight(plain)
                .glu(Glu::None)
                .gather_pre_activation(sizes.gathers());
            Input::Weighted(through(desc)?)
        } else {
            let mut desc = GemmDesc::new(dtype, rows, width, outputs).kernels(kernels).weight(turned(&mlp.gate_up));
            if apart.is_some() {
                desc.strides = Some(Strides::packed(&desc).a(columns, 1));
            }
            Input::Product(product(desc)?, apart.map(|_| product(desc.output(Output::Added))).transpose()?)
        };

        let scratch = |desc: &GemmBackwardDesc| gemm_backward::workspace_bytes(desc, device).map_err(within);
        let scratch_bytes = match &input {
            Input::Product(..) => scratch(&hidden)?,
            Input::Weighted(step) => scratch(&hidden)?.max(scratch(&step.desc)?),
        };
        Ok(MlpPlan {
            mlp: *mlp,
            sizes,
            hidden: through(hidden)?,
            down: groups(down)?,
            input,
            gate_up: groups(gate_up)?,
            down_bias: groups(down_bias)?.desc,
            gate_up_bias: groups(gate_up_bias)?.desc,
            scratch_bytes,
            regions: Regions::default(),
        })
    }

    /// Finds places for what lies between the launches.
    pub(super) fn lay(&mut self, arena: &mut Arena) -> Result<(), Error> {
        let Sizes { dtype, rows, width, intermediate, .. } = self.sizes;
        let (columns, weighs_input) = (self.columns(), self.sizes.weighs_input());
        let element = dtype.bytes() as usize;
        let rows = rows.count();
        let of = |columns: usize, name| shape::product(OPERATION, name, &[rows, columns]);
        let (inner, outer) = (of(intermediate, "intermediate")?, of(width, "hidden")?);
        let both = arena.region("hidden", inner.max(outer), element)?;
        self.regions = Regions {
            hidden: Region { bytes: inner * element, ..both },
            d_rows: Region { bytes: outer * element, ..both },
            d_pre_activation: arena.region("d_pre_activation", of(columns, "intermediate")?, element)?,
            d_slot_weight: arena.region("d_slot_weight", rows, 4)?,
            weighted_x: arena.region("weighted_x", if weighs_input { outer } else { 0 }, element)?,
            beside_sums: arena.region(
                "beside_sums",
                BESIDE * self.sizes.groups().experts * width.max(self.mlp.gate_up.outputs(intermediate)),
                element,
            )?,
        };
        Ok(())
    }

    /// Columns of the pre-activations.
    pub(super) fn columns(&self) -> usize {
        self.hidden.desc.columns()
    }

    /// The stages with their launches, in order, where all gradients are asked for.
    pub(super) fn stages(&self, names: Stages) -> impl Iterator<Item = (BackwardStage, Selection)> + use<> {
        let (input, input_of_up) = match self.input {
            Input::Product(step, of_up) => (step.selection, of_up.map(|step| step.selection)),
            Input::Weighted(step) => (step.selection, None),
        };
        let gate_up = (names.gate_up, self.gate_up.selection);
        let first = [(names.hidden, self.hidden.selection), (names.down, self.down.selection), (names.input, input)];
        let tensors = if self.mlp.gate_up.glu == Glu::Apart { 2 } else { 1 };
        first
            .into_iter()
            .chain(input_of_up.map(|selection| (names.input, selection)))
            .chain(std::iter::repeat_n(gate_up, tensors))
    }

    /// From `dy` to gradients of the weights, and where they are wanted of each row's weight and of each row's input.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn enqueue<T: Element>(
        &self,
        scope: &Scope<'_>,
        names: Stages,
        at: &Inputs<'_, T>,
        workspace: &Held<'_>,
        gradients: &HeldMlpGradients<'_>,
        wanted: Wanted,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let Sizes { dtype, rows, width, intermediate, weighting, .. } = self.sizes;
        let (rows, columns) = (rows.count(), self.columns());
        let (inner, outer) = (rows * intermediate, rows * width);
        let place = |region: Region| workspace.at(region);
        let Regions { hidden, d_rows, d_pre_activation, d_slot_weight, weighted_x, beside_sums } = self.regions;
        let scratch = Region { offset: 0, bytes: self.scratch_bytes };
        let grouped = self.sizes.gathers().then_some(at.rows);
        let of_weights = wanted.weights.then(|| place(d_slot_weight));
        let weighs_input = weighting == Weighting::Input;

        let mut through = GemmBackwardArgs::new(
            at.dy,
            at.down.matrix,
            at.pre_activation,
            place(d_pre_activation).out::<T>(rows * columns),
        );
        through.dispatched = grouped;
        if !weighs_input {
            through.slot_weight = at.row_weight;
            through.d_slot_weight = of_weights.map(|place| place.out(rows));
            // A weight of what the activation yields does not reach the bias.
            let bias = at.down.bias.filter(|_| weighting == Weighting::Output && wanted.weights);
            through.out_bias = bias.map(typed::<T>).transpose()?;
        }
        if gradients.down.matrix.is_some() || gradients.down.bias.is_some() {
            through.hidden = Some(place(hidden).out(inner));
        }
        (through.dropout, through.noise_state, through.swiglu) = (at.dropout, at.noise_state, at.swiglu);
        let mut part = workspace.part(scratch);
        gemm_backward::forward(kernels, stream, &self.hidden.desc, through, &mut part).map_err(within)?;
        observer(names.hidden);

        let groups = Groups { scope, rows: at.rows, frozen: at.frozen };
        let beside = |desc: &KGroupedDesc| {
            let elements = desc.rows.experts * desc.m * desc.n;
            (ProductOut::Rounded(place(beside_sums).out::<T>(elements)), false)
        };
        let of_down_bias = gradients.down.bias.as_ref().map(|gradient| {
            let weights = at.row_weight.filter(|_| weighting == Weighting::Output);
            ColumnSums { weights, ..ColumnSums::new(gradient.product::<T>().0).scale(self.sizes.scale) }
        });
        let (outer_rows, inner_rows) = (at.dy, place(hidden).input::<T>(inner));
        match (&gradients.down.matrix, self.mlp.down.layout, of_down_bias) {
            (Some(gradient), Layout::Nk, bias) => {
                groups.sum(&self.down.desc, outer_rows, inner_rows, gradient.product::<T>(), bias)?;
                observer(names.down);
            }
            (gradient, _, bias) => {
                if let Some(gradient) = gradient {
                    groups.sum(&self.down.desc, inner_rows, outer_rows, gradient.product::<T>(), None)?;
                    observer(names.down);
                }
                if let Some(bias) = bias {
                    groups.sum(&self.down_bias, outer_rows, inner_rows, beside(&self.down_bias), Some(bias))?;
                    observer(names.down_bias);
                }
            }
        }
        // Gate's part, or all, and up's where it has a tensor of its own.
        let part = |number: usize| {
            let skipped = number * intermediate;
            place(d_pre_activation).offset(skipped * dtype.bytes() as usize).input::<T>(rows * columns - skipped)
        };
        let of = &gradients.gate_up;
        let of_gate_up = [(&of.matrix, &of.bias), (&of.up, &of.up_bias)];
        // The weighted rows of x, for the weight's gradient or beside the sums of a bias alone.
        let reads_x = of_gate_up[0].0.is_some() || of_gate_up[0].1.is_some();
        match &self.input {
            Input::Product(step, of_up) if wanted.input => {
                let up = at.gate_up.up.map(|(matrix, _)| matrix);
                let products = [(Some(step), Some(at.gate_up.matrix)), (of_up.as_ref(), up)];
                for (number, (step, matrix)) in products.into_iter().enumerate() {
                    let Some((step, matrix)) = step.zip(matrix) else { continue };
                    let mut product = GemmArgs::new(part(number), Weight::new(matrix), place(d_rows).out::<T>(outer));
                    product.dispatched = grouped;
                    gemm::forward(kernels, stream, &step.desc, product).map_err(within)?;
                    observer(names.input);
                }
            }
            Input::Weighted(step) if wanted.input || wanted.weights || reads_x => {
                let (gradient, d_rows) = (part(0), place(d_rows).out::<T>(outer));
                let mut through = GemmBackwardArgs::new(gradient, at.gate_up.matrix, at.x, d_rows);
                through.dispatched = grouped;
                through.slot_weight = at.row_weight;
                through.d_slot_weight = of_weights.map(|place| place.out(rows));
                through.hidden = reads_x.then(|| place(weighted_x).out(outer));
                let mut part = workspace.part(scratch);
                gemm_backward::forward(kernels, stream, &step.desc, through, &mut part).map_err(within)?;
                observer(names.input);
            }
            _ => {}
        }
        let x = if weighs_input { place(weighted_x).input::<T>(outer) } else { at.x };
        for (number, (gradient, bias)) in of_gate_up.into_iter().enumerate() {
            let outputs = part(number);
            let bias = bias.as_ref().map(|gradient| ColumnSums::new(gradient.product::<T>().0));
            match (gradient, self.mlp.gate_up.layout, bias) {
                (Some(gradient), Layout::Nk, bias) => {
                    groups.sum(&self.gate_up.desc, outputs, x, gradient.product::<T>(), bias)?;
                    observer(names.gate_up);
                }
                (gradient, _, bias) => {
                    if let Some(gradient) = gradient {
                        groups.sum(&self.gate_up.desc, x, outputs, gradient.product::<T>(), None)?;
                        observer(names.gate_up);
                    }
                    if let Some(bias) = bias {
                        groups.sum(&self.gate_up_bias, outputs, x, beside(&self.gate_up_bias), Some(bias))?;
                        observer(names.gate_up_bias);
                    }
                }
            }
        }
        Ok(())
    }

    /// The gradients of the rows' weights.
    pub(super) fn d_row_weight<'a>(&self, workspace: &'a Held<'_>) -> Address<'a> {
        workspace.at(self.regions.d_slot_weight)
    }
}

/// Products over the rows of each expert.
struct Groups<'a> {
    scope: &'a Scope<'a>,
    rows: &'a Dispatched,
    frozen: Option<In<'a, i32>>,
}

impl Groups<'_> {
    /// `a^T b` to `out`, which is f32 beside another type or not, and the sums of a bias. These go along with a weight's gradient where they are of the
    /// first operand's columns, else they have a launch of their own.
    fn sum<'b, T: Element>(
        &'b self,
        desc: &KGroupedDesc,
        a: In<'b, T>,
        b: In<'b, T>,
        (out, f32_out): (ProductOut<'b, T>, bool),
        bias: Option<ColumnSums<'b, T>>,
    ) -> Result<(), Error> {
        let mut args = KGroupedArgs::new(a, b, self.rows, out);
        (args.frozen, args.sums) = (self.frozen, bias);
        let Scope { kernels, stream, .. } = *self.scope;
        k_grouped::forward(kernels, stream, &desc.f32_out(f32_out), args).map_err(|error| error.within(OPERATION))
    }
}

/// What is wanted beside gradients of weights.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    /// Gradients of the rows' weights.
    pub(super) weights: bool,
    /// Gradients of the rows' inputs.
    pub(super) input: bool,
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
    /// `[rows]`; 1 if absent.
    pub(super) row_weight: Option<In<'a, f32>>,
    pub(super) dropout: Option<Dropout>,
    pub(super) noise_state: Option<In<'a, u64>>,
    /// `[E]`: experts whose gradients are left alone.
    pub(super) frozen: Option<In<'a, i32>>,
}

/// Columns of the product beside the sums of a bias alone.
const BESIDE: usize = 8;

/// A buffer whose type has been checked.
pub(super) fn typed<T: Element>(tensor: Tensor<'_>) -> Result<In<'_, T>, Error> {
    let got = tensor.dtype();
    T::of_tensor(tensor).ok_or(Error::WrongDtype { operation: OPERATION, argument: "bias", expected: T::DTYPE, got })
}
