//! An expert's two products on their way back: four launches, of routed rows or of a shared expert's, or of both; five where gate and up have a tensor each.
//!
//! A shared expert's rows have a width of their own in each of them: outputs of the first launch, columns of the sums, depth of the product to the inputs.

use super::{BackwardDesc, BackwardStage, OPERATION};
use crate::experts::dispatched::{Dispatched, SlotShape};
use crate::experts::gemm::{self, GemmDesc, KernelSet, Output, Rows, SharedDepth, Strides};
use crate::experts::gemm_backward::{self, GemmBackwardDesc};
use crate::experts::k_grouped::{self, Gathered, KGroupedDesc, KGroupedStrides, Second, SharedSizes};
use crate::layer::Step;
use crate::layer::desc::Mlp;
use crate::rules::{Activation, Dtype, Glu, Layout, WeightDesc, Weighting};
use crate::runtime::launch::{Address, Held};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Error, Selection};

/// Launches of an expert's way back.
#[derive(Clone, Copy, Debug)]
pub(super) struct MlpPlan {
    pub(super) mlp: Mlp,
    pub(super) sizes: Sizes,
    pub(super) hidden: Step<GemmBackwardDesc>,
    pub(super) down: Step<KGroupedDesc>,
    pub(super) input: Input,
    /// Of the first product's weight, of both tensors where it has two.
    pub(super) gate_up: Step<KGroupedDesc>,
    /// Of biases alone.
    pub(super) down_bias: KGroupedDesc,
    pub(super) gate_up_bias: KGroupedDesc,
    /// What its launches keep at the workspace's begin.
    pub(super) scratch_bytes: usize,
    pub(super) regions: Regions,
}

/// From the pre-activations' gradient to that of the rows' inputs.
// A plan is copied, not boxed.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Copy, Debug)]
pub(super) enum Input {
    /// A product, and one of up's tensor, where it has one, onto what gate's left. A shared expert's rows are in both, or in neither.
    Product(Step<GemmDesc>, Option<Step<GemmDesc>>),
    /// A product that weighs each row, has the gradient of that weight and the weighted rows of x; of up's tensor, where it has one, the same onto what gate's
    /// left.
    Weighted(Step<GemmBackwardDesc>, Option<Step<GemmBackwardDesc>>),
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
    /// Whether the rows' weights are logits of a gate.
    pub(super) gate: bool,
    /// Whether each row has a gradient of its outputs of its own, from behind a norm of these; else that of its token.
    pub(super) own_outputs: bool,
    /// A shared expert of the same form, whose rows may join.
    pub(super) shared: Option<Joined>,
}

/// A shared expert in the launches of the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Joined {
    pub(super) rows: usize,
    pub(super) intermediate: usize,
    pub(super) activation: Activation,
    pub(super) scale: f32,
    pub(super) gate: bool,
}

impl Sizes {
    pub(super) fn gathers(&self) -> bool {
        matches!(self.rows, Rows::Grouped(_))
    }

    pub(super) fn weighs_input(&self) -> bool {
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
    pub(super) d_pre_activation: Region,
    /// `[rows]`.
    pub(super) d_slot_weight: Region,
    /// `[rows, H]`: the rows of x, weighted, where the weights scale them.
    pub(super) weighted_x: Region,
    /// `[E, columns, 8]`: products beside the sums of a bias alone.
    pub(super) beside_sums: Region,
}

/// A launch's stages in an expert's way back: the routed experts' or the shared one's.
#[derive(Clone, Copy)]
pub(super) struct Stages {
    pub(super) hidden: BackwardStage,
    pub(super) down: BackwardStage,
    pub(super) down_bias: BackwardStage,
    pub(super) input: BackwardStage,
    pub(super) gate_up: BackwardStage,
    pub(super) gate_up_bias: BackwardStage,
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
pub(super) fn turned(weight: &WeightDesc) -> WeightDesc {
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
        let mut hidden = GemmBackwardDesc::new(dtype, rows, intermediate, width, mlp.activation)
            .gather(sizes.gathers() && !sizes.own_outputs)
            .weight(mlp.down)
            .glu(mlp.gate_up.glu)
            .scale(scale)
            .gate(sizes.gate)
            .kernels(kernels);
        let shared_rows = sizes.shared.map_or(0, |shared| shared.rows);
        let other = sizes.shared.map(|shared| shared.intermediate).filter(|&other| other != intermediate);
        if let Some(Joined { rows, activation, scale, gate, .. }) = sizes.shared {
            hidden = hidden.shared_sizes(other.map(|other| [other, width]));
            hidden = hidden.shared_rows(rows).shared_activation(Some(activation)).shared_scale(scale).shared_gate(gate);
        }
        let columns = hidden.columns();
        let columns_of = |intermediate: usize| columns / sizes.intermediate * intermediate;

        let slots = sizes.groups();
        let sums = |m, n, gathered| {
            let gathered = if sizes.gathers() { gathered } else { Gathered::Neither };
            KGroupedDesc::new(dtype, slots, m, n)
                .gathered(gathered)
                .accumulate(desc.accumulate)
                .keep_empty(desc.keep_empty && sizes.gathers())
                .shared_rows(shared_rows)
                .kernels(kernels)
        };
        let of_dy = |gathered| if sizes.own_outputs { Gathered::Neither } else { gathered };
        let of_down = |intermediate: usize| match mlp.down.layout {
            Layout::Nk => [width, intermediate],
            Layout::Kn => [intermediate, width],
        };
        let [m, n] = of_down(intermediate);
        let down = sums(m, n, of_dy(if mlp.down.layout == Layout::Nk { Gathered::A } else { Gathered::B }));
        let down = down.shared_sizes(other.map(of_down).map(|[m, n]| SharedSizes::new(m, n)));
        let outputs = mlp.gate_up.outputs(intermediate);
        let of_x = |gathered| if sizes.weighs_input() { Gathered::Neither } else { gathered };
        let (gate_up, [m, n]) = match mlp.gate_up.layout {
            Layout::Nk => (sums(outputs, width, of_x(Gathered::B)), [outputs, width]),
            Layout::Kn => (sums(width, outputs, of_x(Gathered::A)), [width, outputs]),
        };
        // Gate's and up's gradients lie side by side in a row: two matrices.
        let apart = (mlp.gate_up.glu == Glu::Apart).then(|| {
            let packed = KGroupedStrides::packed(m, n);
            match mlp.gate_up.layout {
                Layout::Nk => packed.a([columns, 1]),
                Layout::Kn => packed.b([columns, 1]),
            }
        });
        let second = match mlp.gate_up.layout {
            Layout::Nk => Second::OfA,
            Layout::Kn => Second::OfB,
        };
        let of_shared = other.map(|other| {
            let (outputs, columns) = (mlp.gate_up.outputs(other), columns_of(other));
            match mlp.gate_up.layout {
                Layout::Nk => SharedSizes::new(outputs, width).rows([columns, width, width]),
                Layout::Kn => SharedSizes::new(width, outputs).rows([width, columns, outputs]),
            }
        });
        let gate_up = gate_up.strides(apart).second(apart.map(|_| second)).shared_sizes(of_shared);
        // A bias alone: sums of one operand's columns, beside a product with a few of the other's.
        let few = BESIDE.min(intermediate);
        let down_bias = sums(width, few, of_dy(Gathered::A))
            .alone()
            .strides(Some(KGroupedStrides::packed(width, few).b([intermediate, 1])));
        let few = BESIDE.min(width);
        let of_outputs = sums(outputs, few, of_x(Gathered::B));
        let strides = KGroupedStrides::packed(outputs, few).b([width, 1]);
        let gate_up_bias = of_outputs.alone().strides(Some(strides.a([columns, 1])));
        let input = if sizes.weighs_input() {
            let plain = WeightDesc { glu: Glu::None, ..mlp.gate_up };
            let desc = GemmBackwardDesc::new(dtype, rows, width, outputs, Activation::Identity)
                .weight(plain)
                .glu(Glu::None)
                .gather_pre_activation(sizes.gathers())
                .shared_rows(shared_rows)
                .shared_sizes(other.map(|other| [width, mlp.gate_up.outputs(other)]))
                .a_rows_apart(apart.map(|_| [columns, columns_of(other.unwrap_or(intermediate))]))
                .kernels(kernels);
            let up = apart.map(|_| through(desc.accumulate(true))).transpose()?;
            Input::Weighted(through(desc)?, up)
        } else {
            let mut desc = GemmDesc::new(dtype, rows, width, outputs).kernels(kernels).weight(turned(&mlp.gate_up));
            if apart.is_some() {
                desc.strides = Some(Strides::packed(&desc).a(columns, 1));
            }
            let depth = |other| SharedDepth::new(mlp.gate_up.outputs(other)).a_row(columns_of(other));
            let desc = desc.shared_rows(shared_rows).shared_depth(other.map(depth));
            let up = apart.map(|_| product(desc.output(Output::Added))).transpose()?;
            Input::Product(product(desc)?, up)
        };

        // Of whichever kernel a launch with fewer rows chooses: those of every device need most.
        let scratch = |desc: &GemmBackwardDesc| {
            let bytes = |desc: GemmBackwardDesc| gemm_backward::workspace_bytes(&desc, device).map_err(within);
            Ok::<_, Error>(bytes(*desc)?.max(bytes(desc.kernels(KernelSet::Sm80))?))
        };
        let scratch_bytes = match &input {
            Input::Product(..) => scratch(&hidden)?,
            Input::Weighted(step, _) => scratch(&hidden)?.max(scratch(&step.desc)?),
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

    /// Tensors of the first product's weight.
    pub(super) fn tensors(&self) -> usize {
        if self.mlp.gate_up.glu == Glu::Apart { 2 } else { 1 }
    }

    /// Columns of the pre-activations.
    pub(super) fn columns(&self) -> usize {
        self.hidden.desc.columns()
    }

    /// The stages with their launches, in order, where all gradients are asked for.
    pub(super) fn stages(&self, names: Stages) -> impl Iterator<Item = (BackwardStage, Selection)> + use<> {
        let (input, input_of_up) = match self.input {
            Input::Product(step, of_up) => (step.selection, of_up.map(|step| step.selection)),
            Input::Weighted(step, of_up) => (step.selection, of_up.map(|step| step.selection)),
        };
        let gate_up = (names.gate_up, self.gate_up.selection);
        let first = [(names.hidden, self.hidden.selection), (names.down, self.down.selection), (names.input, input)];
        first.into_iter().chain(input_of_up.map(|selection| (names.input, selection))).chain([gate_up])
    }

    /// Whether the launches to the inputs have a joined shared expert's rows.
    pub(super) fn input_joins(&self) -> bool {
        match &self.input {
            Input::Product(step, _) => step.desc.shared_rows > 0,
            Input::Weighted(step, _) => step.desc.shared_rows > 0,
        }
    }

    /// The launch to the inputs.
    pub(super) fn input_selection(&self) -> Selection {
        match &self.input {
            Input::Product(step, _) => step.selection,
            Input::Weighted(step, _) => step.selection,
        }
    }

    /// The gradients of the rows' weights, or of a gate's logits.
    pub(super) fn d_row_weight<'a>(&self, workspace: &'a Held<'_>) -> Address<'a> {
        workspace.at(self.regions.d_slot_weight)
    }
}

/// Columns of the product beside the sums of a bias alone.
const BESIDE: usize = 8;
