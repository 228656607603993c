//! The feed-forward of experts, as a part of the model: what goes to the device and comes back.

use std::rc::Rc;

use cudarc::driver::CudaSlice;
use moe_kernels::Element;
use moe_kernels::layer::LayerDesc;
use moe_kernels::rules::LossGradient;

use super::Outcome;
use super::device::Device;
use super::plain::model::{FeedForward, Routed};
use super::plain::parameter::Parameter;
use super::step::{self, Pass, Weights};

/// Variance of an expert's weights times their inputs: a tenth of what is usual (Switch Transformers, section 2.4).
const SCALE: f64 = 0.1;

/// An MoE layer whose activations and experts are of type `T` on the device; the router and what the optimiser moves are f32.
pub struct Moe<T> {
    device: Rc<Device>,
    desc: LayerDesc,
    losses: LossGradient,
    /// `[E, H]`.
    router: Parameter,
    /// `[E, I or 2I, H]`, gates first, and `[E, H, I]`.
    experts: [Parameter; 2],
    /// Of the last forward pass, until the way back has used it.
    pass: Option<Pass<T>>,
    routed: Routed,
}

impl<T: Element> Moe<T> {
    /// `desc` with random weights, trained with `losses` of its router; with `frozen`, experts stay as they are.
    pub fn new(
        name: &str,
        device: Rc<Device>,
        desc: LayerDesc,
        losses: LossGradient,
        frozen: bool,
        rng: &mut fastrand::Rng,
    ) -> Moe<T> {
        let LayerDesc { hidden, intermediate, experts, mlp, .. } = desc;
        let rows = if mlp.gate_up.glu.is_gated() { 2 * intermediate } else { intermediate };
        let mut normal = |part: &str, shape: &[usize]| {
            let deviation = (SCALE / shape[shape.len() - 1] as f64).sqrt();
            Parameter::normal(format!("{name}.{part}"), shape, deviation, rng)
        };
        let router = normal("router", &[experts, hidden]);
        let experts = [
            normal("experts.gate_up", &[experts, rows, hidden]),
            normal("experts.down", &[experts, hidden, intermediate]),
        ];
        let experts = experts.map(|parameter| Parameter { frozen, ..parameter });
        Moe { device, desc, losses, router, experts, pass: None, routed: Routed::default() }
    }

    fn upload(&self, values: &[f32]) -> Outcome<CudaSlice<T>> {
        let rounded: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
        Ok(self.device.stream.clone_htod(&rounded)?)
    }

    fn download(&self, values: &CudaSlice<T>) -> Outcome<Vec<f32>> {
        Ok(self.device.stream.clone_dtoh(values)?.into_iter().map(T::to_f32).collect())
    }
}

impl<T: Element> FeedForward for Moe<T> {
    fn forward(&mut self, x: Vec<f32>) -> Outcome<Vec<f32>> {
        let [gate_up, down] = &self.experts;
        let weights = Weights {
            router: self.device.stream.clone_htod(&self.router.value)?,
            experts: [self.upload(&gate_up.value)?, self.upload(&down.value)?],
        };
        let (y, pass) = step::forward(&self.device, &self.desc, self.losses, weights, self.upload(&x)?)?;
        let load = self.device.stream.clone_dtoh(&pass.counts)?;
        let stats = self.device.stream.clone_dtoh(&pass.stats)?[0];
        self.routed = Routed { load, balance: stats.balance_loss, z: stats.z_loss };
        self.pass = Some(pass);
        self.download(&y)
    }

    fn backward(&mut self, dy: &[f32]) -> Outcome<Vec<f32>> {
        let pass = self.pass.take().ok_or("a backward pass follows a forward pass")?;
        let gradients = step::backward(&self.device, pass, &self.upload(dy)?, self.experts[0].frozen)?;
        let stream = &self.device.stream;
        let add = |parameter: &mut Parameter, gradient: &CudaSlice<f32>| -> Outcome<()> {
            let gradient = stream.clone_dtoh(gradient)?;
            parameter.gradient.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
            Ok(())
        };
        add(&mut self.router, &gradients.router)?;
        for (parameter, gradient) in self.experts.iter_mut().zip(gradients.experts.iter().flatten()) {
            add(parameter, gradient)?;
        }
        self.download(&gradients.x)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let [gate_up, down] = &mut self.experts;
        vec![&mut self.router, gate_up, down]
    }

    fn routed(&self) -> Option<&Routed> {
        Some(&self.routed)
    }
}
