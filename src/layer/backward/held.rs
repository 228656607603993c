//! Buffers of gradients, opened.

use super::OPERATION;
use super::gradients::{LatentGradients, LayerGradients, SharedGradients, WeightGradients};
use crate::experts::gemm::ProductOut;
use crate::layer::LayerDesc;
use crate::layer::desc::Mlp;
use crate::rules::{Glu, Layout, WeightDesc};
use crate::runtime::launch::{Address, Held, SCALAR, Scope};
use crate::runtime::shape;
use crate::{Dtype, Element, Error, OutTensor};

/// A gradient opened for writing.
pub(super) struct HeldGradient<'a> {
    held: Held<'a>,
    dtype: Dtype,
    elements: usize,
}

impl HeldGradient<'_> {
    /// As a product's result, and whether it is f32 beside another type of activations.
    pub(super) fn product<T: Element>(&self) -> (ProductOut<'_, T>, bool) {
        let address = self.held.address();
        if self.dtype == T::DTYPE {
            (ProductOut::Rounded(address.out(self.elements)), false)
        } else {
            (ProductOut::F32(address.out(self.elements)), true)
        }
    }

    fn zero(&self, scope: &Scope<'_>) -> Result<(), Error> {
        scope.zero(self.held.address(), self.elements * self.dtype.bytes() as usize)
    }
}

/// A product's, opened.
pub(super) struct HeldWeightGradients<'a> {
    pub(super) matrix: Option<HeldGradient<'a>>,
    pub(super) up: Option<HeldGradient<'a>>,
    pub(super) bias: Option<HeldGradient<'a>>,
    pub(super) up_bias: Option<HeldGradient<'a>>,
}

/// What a product's tensors are called in errors.
struct Names {
    matrix: &'static str,
    up: &'static str,
    bias: &'static str,
    up_bias: &'static str,
}

impl<'a> WeightGradients<'a> {
    /// Opens what is given of a weight of `n` outputs and depth `k` for each of `experts` experts.
    fn open<'b>(
        self,
        scope: &Scope<'b>,
        names: &Names,
        desc: &LayerDesc,
        weight: &WeightDesc,
        [experts, n, k]: [usize; 3],
    ) -> Result<HeldWeightGradients<'b>, Error>
    where
        'a: 'b,
    {
        let of_up = [(names.up, self.up.is_some()), (names.up_bias, self.up_bias.is_some())];
        if let Some((argument, _)) = of_up.into_iter().find(|(_, given)| *given && weight.glu != Glu::Apart) {
            let reason = "the descriptor has one tensor";
            return Err(Error::Unexpected { operation: OPERATION, argument, reason });
        }
        let outputs = weight.outputs(n);
        let width = if weight.layout == Layout::Kn { outputs } else { k };
        let elements = experts * outputs * k;
        let open = |argument, tensor: Option<OutTensor<'a>>| {
            tensor.map(|tensor| open_tensor(scope, argument, tensor, desc.dtype, elements, width)).transpose()
        };
        let open_bias = |argument, tensor: Option<OutTensor<'a>>| {
            // One element wide: a bias may begin on any.
            tensor.map(|tensor| open_tensor(scope, argument, tensor, desc.dtype, experts * outputs, 1)).transpose()
        };
        Ok(HeldWeightGradients {
            matrix: open(names.matrix, self.matrix)?,
            up: open(names.up, self.up)?,
            bias: open_bias(names.bias, self.bias)?,
            up_bias: open_bias(names.up_bias, self.up_bias)?,
        })
    }
}

/// Opens `tensor`, of `dtype` or f32.
fn open_tensor<'a: 'b, 'b>(
    scope: &Scope<'b>,
    argument: &'static str,
    tensor: OutTensor<'a>,
    dtype: Dtype,
    elements: usize,
    width: usize,
) -> Result<HeldGradient<'b>, Error> {
    let got = tensor.dtype();
    if got != dtype && got != Dtype::F32 {
        return Err(Error::WrongDtype { operation: OPERATION, argument, expected: dtype, got });
    }
    let alignment = shape::row_alignment(got, width);
    let held = match tensor {
        OutTensor::Bf16(buffer) => scope.write(argument, buffer, elements, alignment)?,
        OutTensor::F16(buffer) => scope.write(argument, buffer, elements, alignment)?,
        OutTensor::F32(buffer) => scope.write(argument, buffer, elements, alignment)?,
    };
    Ok(HeldGradient { held, dtype: got, elements })
}

/// Gradients of an expert's two products.
pub(super) struct HeldMlpGradients<'a> {
    pub(super) gate_up: HeldWeightGradients<'a>,
    pub(super) down: HeldWeightGradients<'a>,
}

impl HeldMlpGradients<'_> {
    /// Whether there are any.
    pub(super) fn is_some(&self) -> bool {
        self.all().next().is_some()
    }

    fn all(&self) -> impl Iterator<Item = &HeldGradient<'_>> {
        let (first, second) = (&self.gate_up, &self.down);
        let of_first = [&first.matrix, &first.up, &first.bias, &first.up_bias];
        of_first.into_iter().chain([&second.matrix, &second.bias]).flatten()
    }
}

/// All of a layer's, opened.
pub(super) struct HeldGradients<'a> {
    pub(super) x: Option<Held<'a>>,
    pub(super) router_x: Option<Held<'a>>,
    pub(super) logits: Option<Held<'a>>,
    pub(super) weights: Option<Held<'a>>,
    pub(super) router: Option<Held<'a>>,
    pub(super) router_bias: Option<Held<'a>>,
    pub(super) expert_scale: Option<Held<'a>>,
    pub(super) global_scale: Option<Held<'a>>,
    pub(super) bias: Option<Held<'a>>,
    pub(super) router_norm: Option<Held<'a>>,
    pub(super) expert_norm: Option<Held<'a>>,
    pub(super) slot_norm: Option<Held<'a>>,
    pub(super) output_norm: Option<Held<'a>>,
    /// Of both projections, and of the norm between them.
    pub(super) latent: [HeldWeightGradients<'a>; 2],
    pub(super) latent_norm: Option<Held<'a>>,
    pub(super) routed: HeldMlpGradients<'a>,
    pub(super) shared: Option<HeldMlpGradients<'a>>,
    pub(super) shared_gate: Option<Held<'a>>,
}

const ROUTED: [Names; 2] = [
    Names {
        matrix: "gradients.gate_up",
        up: "gradients.gate_up.up",
        bias: "gradients.gate_up.bias",
        up_bias: "gradients.gate_up.up_bias",
    },
    Names {
        matrix: "gradients.down",
        up: "gradients.down.up",
        bias: "gradients.down.bias",
        up_bias: "gradients.down.up_bias",
    },
];
const SHARED: [Names; 2] = [
    Names {
        matrix: "gradients.shared.gate_up",
        up: "gradients.shared.gate_up.up",
        bias: "gradients.shared.gate_up.bias",
        up_bias: "gradients.shared.gate_up.up_bias",
    },
    Names {
        matrix: "gradients.shared.down",
        up: "gradients.shared.down.up",
        bias: "gradients.shared.down.bias",
        up_bias: "gradients.shared.down.up_bias",
    },
];

const LATENT: [Names; 2] = [
    Names {
        matrix: "gradients.latent.input",
        up: "gradients.latent.input.up",
        bias: "gradients.latent.input.bias",
        up_bias: "gradients.latent.input.up_bias",
    },
    Names {
        matrix: "gradients.latent.output",
        up: "gradients.latent.output.up",
        bias: "gradients.latent.output.bias",
        up_bias: "gradients.latent.output.up_bias",
    },
];

impl<'a, T: Element> LayerGradients<'a, T> {
    /// Opens what is given, for `tokens` tokens.
    pub(super) fn open<'b>(self, scope: &Scope<'b>, desc: &LayerDesc, tokens: usize) -> Result<HeldGradients<'b>, Error>
    where
        'a: 'b,
    {
        let &LayerDesc { dtype, hidden, intermediate, .. } = desc;
        if self.shared.is_some() && desc.shared.is_none() {
            let reason = "the descriptor has no shared expert";
            return Err(Error::Unexpected { operation: OPERATION, argument: "gradients.shared", reason });
        }
        let alignment = shape::row_alignment(dtype, hidden);
        let columns = desc.logit_columns();
        let width = desc.expert_width();
        let mlp = |names: &[Names; 2],
                   form: &Mlp,
                   gate_up: WeightGradients<'a>,
                   down: WeightGradients<'a>,
                   [experts, intermediate, width]: [usize; 3]| {
            let first = [experts, intermediate, width];
            let second = [experts, width, intermediate];
            Ok::<_, Error>(HeldMlpGradients {
                gate_up: gate_up.open(scope, &names[0], desc, &form.gate_up, first)?,
                down: down.open(scope, &names[1], desc, &form.down, second)?,
            })
        };
        let SharedGradients { gate_up, down, gate } = self.shared;
        if gate.is_some() && !desc.has_shared_gate() {
            let reason = "the descriptor has no gated shared expert";
            return Err(Error::Unexpected { operation: OPERATION, argument: "gradients.shared.gate", reason });
        }
        let LatentGradients { input, norm: latent_norm, output } = self.latent;
        if desc.latent.is_none() && (input.is_some() || output.is_some() || latent_norm.is_some()) {
            let reason = "the descriptor has no latent width";
            return Err(Error::Unexpected { operation: OPERATION, argument: "gradients.latent", reason });
        }
        for (names, of) in LATENT.iter().zip([&input, &output]) {
            if of.bias.is_some() && of.matrix.is_none() {
                let reason = "its bias's gradient is made with it";
                return Err(Error::Missing { operation: OPERATION, argument: names.matrix, reason });
            }
        }
        let plain = WeightDesc::new(dtype);
        let [of_input, of_output] = desc.latent.map_or([plain; 2], |latent| [latent.input, latent.output]);
        let some = |argument, buffer, elements| scope.write_some::<f32>(argument, buffer, elements, SCALAR);
        Ok(HeldGradients {
            x: scope.write_some("gradients.x", self.x, tokens * hidden, alignment)?,
            router_x: scope.write_some("gradients.router_x", self.router_x, tokens * hidden, alignment)?,
            logits: scope.write_some("gradients.logits", self.logits, tokens * columns, SCALAR)?,
            weights: scope.write_some("gradients.weights", self.weights, tokens * desc.candidates(), SCALAR)?,
            router: scope.write_some("gradients.router.matrix", self.router.matrix, columns * hidden, SCALAR)?,
            router_bias: some("gradients.router.bias", self.router.bias, columns)?,
            expert_scale: some("gradients.router.expert_scale", self.router.expert_scale, desc.experts)?,
            global_scale: some("gradients.router.global_scale", self.router.global_scale, 1)?,
            bias: some("gradients.bias", self.bias, hidden)?,
            router_norm: some("gradients.router.norm", self.router.norm, hidden)?,
            expert_norm: some("gradients.norms.experts", self.norms.experts, hidden)?,
            slot_norm: some("gradients.norms.slots", self.norms.slots, width)?,
            output_norm: some("gradients.norms.output", self.norms.output, hidden)?,
            latent: [
                input.open(scope, &LATENT[0], desc, &of_input, [1, width, hidden])?,
                output.open(scope, &LATENT[1], desc, &of_output, [1, hidden, width])?,
            ],
            latent_norm: some("gradients.latent.norm", latent_norm, width)?,
            routed: mlp(&ROUTED, &desc.mlp, self.gate_up, self.down, [desc.local_experts(), intermediate, width])?,
            shared: desc
                .shared
                .map(|shared| mlp(&SHARED, &shared.mlp, gate_up, down, [1, shared.intermediate, hidden]))
                .transpose()?,
            shared_gate: scope.write_some("gradients.shared.gate", gate, desc.hidden, SCALAR)?,
        })
    }
}

impl HeldGradients<'_> {
    /// The result for no tokens: no parameter has a gradient.
    pub(super) fn without_tokens(&self, scope: &Scope<'_>, desc: &LayerDesc, keep_empty: bool) -> Result<(), Error> {
        let zero = |at: Option<Address<'_>>, elements: usize| match at {
            Some(at) => scope.zero(at, elements * size_of::<f32>()),
            None => Ok(()),
        };
        zero(self.router.as_ref().map(Held::address), desc.logit_columns() * desc.hidden)?;
        let words = [
            (&self.shared_gate, desc.hidden),
            (&self.router_bias, desc.logit_columns()),
            (&self.expert_scale, desc.experts),
            (&self.global_scale, 1),
            (&self.bias, desc.hidden),
            (&self.router_norm, desc.hidden),
            (&self.expert_norm, desc.hidden),
            (&self.slot_norm, desc.expert_width()),
            (&self.output_norm, desc.hidden),
            (&self.latent_norm, desc.expert_width()),
        ];
        words.into_iter().try_for_each(|(held, elements)| zero(held.as_ref().map(Held::address), elements))?;
        let projections = self.latent.iter().flat_map(|of| [&of.matrix, &of.bias]).flatten();
        projections.into_iter().try_for_each(|gradient| gradient.zero(scope))?;
        if !keep_empty {
            self.routed.all().try_for_each(|gradient| gradient.zero(scope))?;
        }
        self.shared.iter().flat_map(HeldMlpGradients::all).try_for_each(|gradient| gradient.zero(scope))
    }
}
