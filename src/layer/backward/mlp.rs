//! An expert's two products on their way back: five launches, of routed rows or of a shared expert's.

use super::gradients::{HeldGradient, HeldMlpGradients};
use super::{BackwardDesc, BackwardStage, OPERATION};
use crate::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use crate::experts::dispatched::{Dispatched, SlotShape};
use crate::experts::gemm::{self, GemmArgs, GemmDesc, KernelSet, Output, Rows, Strides};
use crate::experts::k_grouped::{self, Gathered, KGroupedArgs, KGroupedDesc, KGroupedStrides};
use crate::experts::weight::Weight;
use crate::layer::Step;
use crate::layer::desc::Mlp;
use crate::rules::{Activation, Dtype, Glu, Layout, WeightDesc};
use crate::runtime::launch::{Held, Scope};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Selection};

/// Launches of an expert's way back.
#[derive(Clone, Copy, Debug)]
pub(super) struct MlpPlan {
    mlp: Mlp,
    sizes: Sizes,
    hidden: Step<GemmDesc>,
    activation: Step<ActivationBackwardDesc>,
    down: Step<KGroupedDesc>,
    /// Of each tensor of the first product's weight.
    gate_up: Step<KGroupedDesc>,
    input: Step<GemmDesc>,
    /// The same of up's tensor, where it has one, onto what gate's left.
    input_of_up: Option<Step<GemmDesc>>,
    pub(super) regions: Regions,
}

/// Rows and columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) dtype: Dtype,
    pub(super) rows: Rows,
    /// Columns of the experts' inputs and outputs.
    pub(super) width: usize,
    pub(super) intermediate: usize,
    pub(super) kernels: KernelSet,
}

impl Sizes {
    fn gathers(&self) -> bool {
        matches!(self.rows, Rows::Grouped(_))
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
#[derive(Clone, Copy, Debug)]
pub(super) struct Regions {
    /// `[rows, I]`: gradient of what stands between the products.
    pub(super) d_hidden: Region,
    /// `[rows, I]`: what stands there, weighted.
    pub(super) hidden: Region,
    /// `[rows, 2I]` (`[rows, I]`).
    pub(super) d_pre_activation: Region,
    /// `[rows]`.
    pub(super) d_slot_weight: Region,
    /// `[rows, H]`, in the place of the first two, which are done with then.
    pub(super) d_rows: Region,
}

/// A launch's stages in an expert's way back: the routed experts' or the shared one's.
#[derive(Clone, Copy)]
pub(super) struct Stages {
    pub(super) hidden: BackwardStage,
    pub(super) activation: BackwardStage,
    pub(super) down: BackwardStage,
    pub(super) gate_up: BackwardStage,
    pub(super) input: BackwardStage,
}

pub(super) const ROUTED: Stages = Stages {
    hidden: BackwardStage::Hidden,
    activation: BackwardStage::Activation,
    down: BackwardStage::DownWeight,
    gate_up: BackwardStage::GateUpWeight,
    input: BackwardStage::Input,
};
pub(super) const SHARED: Stages = Stages {
    hidden: BackwardStage::SharedHidden,
    activation: BackwardStage::SharedActivation,
    down: BackwardStage::SharedDownWeight,
    gate_up: BackwardStage::SharedGateUpWeight,
    input: BackwardStage::SharedInput,
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
    pub(super) fn new(
        arena: &mut Arena,
        mlp: &Mlp,
        sizes: Sizes,
        desc: &BackwardDesc,
        device: &DeviceInfo,
    ) -> Result<MlpPlan, Error> {
        let within = |error: Error| error.within(OPERATION);
        let Sizes { dtype, rows, width, intermediate, kernels } = sizes;
        let product =
            |desc: GemmDesc| Ok::<_, Error>(Step { desc, selection: gemm::select_for(OPERATION, &desc, device)? });
        let groups = |desc: KGroupedDesc| {
            Ok::<_, Error>(Step { desc, selection: k_grouped::select(&desc, device).map_err(within)? })
        };
        let through_down = GemmDesc::new(dtype, rows, intermediate, width)
            .gather(sizes.gathers())
            .kernels(kernels)
            .weight(turned(&mlp.down))
            .activation(Activation::Identity);
        let product_of_dy = product(through_down)?;
        let activation =
            ActivationBackwardDesc::new(dtype, rows.count(), intermediate, mlp.activation).glu(mlp.gate_up.glu);
        let through =
            Step { desc: activation, selection: activation_backward::select(&activation, device).map_err(within)? };

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
        let (outputs, columns) = (mlp.gate_up.outputs(intermediate), activation.columns());
        let (gate_up, [m, n]) = match mlp.gate_up.layout {
            Layout::Nk => (sums(outputs, width, Gathered::B), [outputs, width]),
            Layout::Kn => (sums(width, outputs, Gathered::A), [width, outputs]),
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
        let mut input = GemmDesc::new(dtype, rows, width, outputs).kernels(kernels).weight(turned(&mlp.gate_up));
        if apart.is_some() {
            input.strides = Some(Strides::packed(&input).a(columns, 1));
        }
        let input_of_up = apart.map(|_| product(input.output(Output::Added))).transpose()?;

        let element = dtype.bytes() as usize;
        let rows = rows.count();
        let of = |columns: usize, name| shape::product(OPERATION, name, &[rows, columns]);
        let inner = of(intermediate, "intermediate")?;
        let d_pre_activation = arena.region("d_pre_activation", of(columns, "intermediate")?, element)?;
        let d_slot_weight = arena.region("d_slot_weight", rows, 4)?;
        let outer = of(width, "hidden")?;
        let both = arena.region("d_hidden", (2 * inner.next_multiple_of(128)).max(outer), element)?;
        let bytes = inner * element;
        let d_hidden = Region { bytes, ..both };
        let hidden = Region { offset: both.offset + inner.next_multiple_of(128) * element, bytes };
        Ok(MlpPlan {
            mlp: *mlp,
            sizes,
            hidden: product_of_dy,
            activation: through,
            down: groups(down)?,
            gate_up: groups(gate_up)?,
            input: product(input)?,
            input_of_up,
            regions: Regions { d_hidden, hidden, d_pre_activation, d_slot_weight, d_rows: both },
        })
    }

    /// Columns of the pre-activations.
    pub(super) fn columns(&self) -> usize {
        self.activation.desc.columns()
    }

    /// The stages with their launches, in order, where all gradients are asked for.
    pub(super) fn stages(&self, names: Stages) -> [Option<(BackwardStage, Selection)>; 7] {
        let up = self.input_of_up.is_some();
        [
            Some((names.hidden, self.hidden.selection)),
            Some((names.activation, self.activation.selection)),
            Some((names.down, self.down.selection)),
            Some((names.gate_up, self.gate_up.selection)),
            up.then_some((names.gate_up, self.gate_up.selection)),
            Some((names.input, self.input.selection)),
            self.input_of_up.map(|step| (names.input, step.selection)),
        ]
    }

    /// From `dy` to gradients of the weights, of each row's weight, and where `input` asks for it, of each row's input.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn enqueue<T: Element>(
        &self,
        scope: &Scope<'_>,
        names: Stages,
        at: &Inputs<'_, T>,
        workspace: &Held<'_>,
        gradients: &HeldMlpGradients<'_>,
        input: bool,
        observer: &mut dyn FnMut(BackwardStage),
    ) -> Result<(), Error> {
        let within = |error: Error| error.within(OPERATION);
        let (kernels, stream) = (scope.kernels, scope.stream);
        let Sizes { dtype, rows, width, intermediate, .. } = self.sizes;
        let (rows, columns) = (rows.count(), self.activation.desc.columns());
        let inner = rows * intermediate;
        let place = |region: Region| workspace.at(region);
        let Regions { d_hidden, hidden, d_pre_activation, d_slot_weight, d_rows } = self.regions;
        let grouped = self.sizes.gathers().then_some(at.rows);

        let mut product = GemmArgs::new(at.dy, Weight::new(at.down.matrix), place(d_hidden).out::<T>(inner));
        product.dispatched = grouped;
        gemm::forward(kernels, stream, &self.hidden.desc, product).map_err(within)?;
        observer(names.hidden);

        let mut through = ActivationBackwardArgs::new(
            at.pre_activation,
            place(d_hidden).input::<T>(inner),
            place(d_pre_activation).out::<T>(rows * columns),
        );
        let live = at.rows.offsets().slice(at.rows.shape().experts..);
        if grouped.is_some() {
            through.slot_weight = Some(at.rows.slot_weight().into());
            through.live = Some((&live).into());
            through.d_slot_weight = Some(place(d_slot_weight).out(rows));
        }
        if gradients.down.matrix.is_some() {
            through.hidden = Some(place(hidden).out(inner));
        }
        activation_backward::forward(kernels, stream, &self.activation.desc, through).map_err(within)?;
        observer(names.activation);

        let sums = |desc: &KGroupedDesc, a: In<'_, T>, b: In<'_, T>, gradient: &HeldGradient<'_>| {
            let (out, f32_out) = gradient.product::<T>();
            let desc = desc.f32_out(f32_out);
            k_grouped::forward(kernels, stream, &desc, KGroupedArgs::new(a, b, at.rows, out)).map_err(within)
        };
        if let Some(gradient) = &gradients.down.matrix {
            let hidden = place(hidden).input::<T>(inner);
            let (outer, inner) = (at.dy, hidden);
            let [a, b] = if self.mlp.down.layout == Layout::Nk { [outer, inner] } else { [inner, outer] };
            sums(&self.down.desc, a, b, gradient)?;
            observer(names.down);
        }
        // Gate's part, or all, and up's where it has a tensor of its own.
        let part = |number: usize| {
            let skipped = number * intermediate;
            place(d_pre_activation).offset(skipped * dtype.bytes() as usize).input::<T>(rows * columns - skipped)
        };
        for (number, gradient) in [&gradients.gate_up.matrix, &gradients.gate_up.up].into_iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let (outputs, depths) = (part(number), at.x);
            let [a, b] = if self.mlp.gate_up.layout == Layout::Nk { [outputs, depths] } else { [depths, outputs] };
            sums(&self.gate_up.desc, a, b, gradient)?;
            observer(names.gate_up);
        }

        if !input {
            return Ok(());
        }
        let up = at.gate_up.up.map(|(matrix, _)| matrix);
        let products = [(Some(self.input), Some(at.gate_up.matrix)), (self.input_of_up, up)];
        for (number, (step, matrix)) in products.into_iter().enumerate() {
            let Some((step, matrix)) = step.zip(matrix) else { continue };
            let mut product = GemmArgs::new(part(number), Weight::new(matrix), place(d_rows).out::<T>(rows * width));
            product.dispatched = grouped;
            gemm::forward(kernels, stream, &step.desc, product).map_err(within)?;
            observer(names.input);
        }
        Ok(())
    }
}

/// What an expert's way back reads.
pub(super) struct Inputs<'a, T> {
    pub(super) x: In<'a, T>,
    pub(super) dy: In<'a, T>,
    pub(super) gate_up: Weight<'a>,
    pub(super) down: Weight<'a>,
    pub(super) pre_activation: In<'a, T>,
    /// The rows of the routed experts, or all tokens as those of one.
    pub(super) rows: &'a Dispatched,
}
