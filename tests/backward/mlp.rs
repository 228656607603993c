//! An expert's two products: weights on host and device, gradients.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use moe_kernels::Element;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{Mlp as Form, WeightGradients};
use moe_kernels::reference::gemm::{ExpertMatrix, MatrixGradient};
use moe_kernels::rules::{Activation, Bound, Glu, Layout, Swiglu, WeightDesc};

/// Both products' weights on host and device; of gate and up apart the halves.
pub struct Mlp<T> {
    pub desc: Form,
    sizes: [usize; 3],
    pub up: Vec<T>,
    pub down: Vec<T>,
    /// Of the first product and of the second.
    pub biases: Option<[Vec<T>; 2]>,
    /// Gate or all, up, down, and as many biases.
    on_device: [CudaSlice<T>; 6],
}

/// Activations without numbers.
pub const PLAIN: [Activation; 6] = [
    Activation::Identity,
    Activation::Relu,
    Activation::ReluSquared,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
];

/// Gated units with numbers, bounds among them.
pub fn bounded_units() -> [Activation; 3] {
    [
        Swiglu::GPT_OSS.gate(Bound::Clamp(0.5)).up(Bound::Clamp(0.6)),
        Swiglu::clamped(0.2).clamp_after(true),
        Swiglu::softcapped(0.8, 1.2).alpha(0.8).factor(0.5).offset(-0.25),
    ]
    .map(Activation::from)
}

/// Elements of each gradient: of gate or all, up, down, and as many biases.
pub type Gradients<G> = [CudaSlice<G>; 6];

/// Gate's and up's parts of a tensor in which each expert's gate stands before its up, in rows of `row` elements.
fn halves<T: Copy>(all: &[T], row: usize) -> [Vec<T>; 2] {
    [0, 1].map(|half| all.chunks(2 * row).flat_map(|both| both[half * row..][..row].to_vec()).collect())
}

/// Elements of gate that stand together in a weight.
fn row(weight: &WeightDesc, [n, k]: [usize; 2]) -> usize {
    if weight.layout == Layout::Kn { n } else { n * k }
}

impl<T: Element> Mlp<T> {
    pub fn new(
        stream: &Arc<CudaStream>,
        rng: &mut fastrand::Rng,
        desc: Form,
        [experts, inner, hidden]: [usize; 3],
        biased: bool,
    ) -> Mlp<T> {
        let rows = if desc.gate_up.glu == Glu::None { inner } else { 2 * inner };
        let up = random::<T>(rng, experts * rows * hidden, 1.0 / (hidden as f32).sqrt());
        let down = random::<T>(rng, experts * hidden * inner, 1.0 / (inner as f32).sqrt());
        let biases = biased.then(|| [experts * rows, experts * hidden].map(|len| random::<T>(rng, len, 0.5)));
        let sizes = [experts, inner, hidden];
        let on_device = Mlp::tensors(&desc, sizes, &up, &down, &biases).map(|values| upload(stream, &values));
        Mlp { desc, sizes, up, down, biases, on_device }
    }

    fn tensors(
        desc: &Form,
        [_, inner, hidden]: [usize; 3],
        up: &[T],
        down: &[T],
        biases: &Option<[Vec<T>; 2]>,
    ) -> [Vec<T>; 6] {
        let apart = desc.gate_up.glu == Glu::Apart;
        let split = |all: &[T], row: usize| if apart { halves(all, row) } else { [all.to_vec(), Vec::new()] };
        let [gate, second] = split(up, row(&desc.gate_up, [inner, hidden]));
        let [of_up, of_down] = biases.clone().unwrap_or_default();
        let [gate_bias, second_bias] = split(&of_up, inner);
        [gate, second, down.to_vec(), gate_bias, second_bias, of_down]
    }

    /// Puts the values on the device again, after some were changed.
    pub fn upload(&mut self, stream: &Arc<CudaStream>) {
        let tensors = Mlp::tensors(&self.desc, self.sizes, &self.up, &self.down, &self.biases);
        self.on_device = tensors.map(|values| upload(stream, &values));
    }

    pub fn weights(&self) -> (Weight<'_>, Weight<'_>) {
        let [first, second, down, gate_bias, second_bias, down_bias] = &self.on_device;
        let apart = self.desc.gate_up.glu == Glu::Apart;
        let up = if apart { Weight::apart(first, second) } else { Weight::new(first) };
        let down = Weight::new(down);
        if self.biases.is_none() {
            return (up, down);
        }
        let up = up.bias(gate_bias);
        (if apart { up.up_bias(second_bias) } else { up }, down.bias(down_bias))
    }

    /// Elements of each gradient.
    pub fn lens(&self) -> [usize; 6] {
        Mlp::tensors(&self.desc, self.sizes, &self.up, &self.down, &self.biases).map(|values| values.len())
    }

    pub fn gradients<'a, G: Element>(&self, buffers: &'a mut Gradients<G>) -> [WeightGradients<'a>; 2] {
        let [first, second, down, gate_bias, second_bias, down_bias] = buffers;
        let apart = self.desc.gate_up.glu == Glu::Apart;
        let up = if apart { WeightGradients::apart(first, second) } else { WeightGradients::new(first) };
        let down = WeightGradients::new(down);
        if self.biases.is_none() {
            return [up, down];
        }
        let up = up.bias(gate_bias);
        [if apart { up.up_bias(second_bias) } else { up }, down.bias(down_bias)]
    }

    pub fn wide(&self) -> Wide {
        let wide = |values: &[T]| values.iter().map(|v| v.to_f32().into()).collect::<Vec<f64>>();
        let biases = self.biases.as_ref().map(|biases| biases.each_ref().map(|bias| wide(bias)));
        Wide { up: wide(&self.up), down: wide(&self.down), biases }
    }

    pub fn matrices<'a>(&self, wide: &'a Wide) -> (ExpertMatrix<'a, f64>, ExpertMatrix<'a, f64>) {
        let [_, inner, hidden] = self.sizes;
        let (up, down) = (self.desc.gate_up, self.desc.down);
        let bias = |product: usize| wide.biases.as_ref().map(|biases| &biases[product][..]);
        (
            ExpertMatrix { weight: &wide.up, bias: bias(0), n: inner, k: hidden, glu: up.glu, layout: up.layout },
            ExpertMatrix {
                weight: &wide.down,
                bias: bias(1),
                n: hidden,
                k: inner,
                glu: Glu::None,
                layout: down.layout,
            },
        )
    }

    /// The reference's gradients in the order of the device's.
    pub fn found(&self, up: MatrixGradient, down: MatrixGradient) -> [Vec<f64>; 6] {
        let [_, inner, hidden] = self.sizes;
        let apart = self.desc.gate_up.glu == Glu::Apart;
        let split = |all: Vec<f64>, row: usize| if apart { halves(&all, row) } else { [all, Vec::new()] };
        let [gate, second] = split(up.weight, row(&self.desc.gate_up, [inner, hidden]));
        let [gate_bias, second_bias] = split(up.bias.unwrap_or_default(), inner);
        [gate, second, down.weight, gate_bias, second_bias, down.bias.unwrap_or_default()]
    }
}

/// The values as f64.
pub struct Wide {
    up: Vec<f64>,
    down: Vec<f64>,
    biases: Option<[Vec<f64>; 2]>,
}

pub fn random<T: Element>(rng: &mut fastrand::Rng, len: usize, scale: f32) -> Vec<T> {
    (0..len).map(|_| T::from_f32((2.0 * rng.f32() - 1.0) * scale)).collect()
}

pub fn upload_numbers<E: DeviceRepr + Default + Clone>(stream: &Arc<CudaStream>, values: &[E]) -> CudaSlice<E> {
    let one = [E::default()];
    stream.clone_htod(if values.is_empty() { &one[..] } else { values }).unwrap()
}

pub fn upload<T: Element>(stream: &Arc<CudaStream>, values: &[T]) -> CudaSlice<T> {
    let one = [T::from_f32(0.0)];
    stream.clone_htod(if values.is_empty() { &one[..] } else { values }).unwrap()
}
