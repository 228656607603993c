//! The layer on a device: copy, run, time, copy back.

use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits};
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights, SharedWeights,
};
use moe_kernels::{Dtype, Element, Error, Kernels, Workspace};

use super::error::HfError;
use super::load::{Matrix, RouterWeight, Weights};

/// A CUDA device, real or software.
pub struct Device {
    context: Arc<CudaContext>,
    kernels: Kernels,
    name: String,
}

impl Device {
    /// The first device; the software one where there is no other.
    pub fn open() -> Result<Device, HfError> {
        softcuda::install_if_no_gpu().map_err(|error| HfError::Device(error.to_string()))?;
        let context = moe_kernels::device::open(0)?;
        let kernels = Kernels::new(&context)?;
        let name = context.name().map_err(failed)?;
        Ok(Device { context, kernels, name })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether its times mean nothing for a GPU.
    pub fn is_software(&self) -> bool {
        self.name.contains("softcuda")
    }

    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }
}

/// What the layer computed.
pub struct Outputs {
    /// `[T,E]`.
    pub logits: Vec<f32>,
    /// `[T,k]`.
    pub ids: Vec<i32>,
    /// `[T,k]`.
    pub weights: Vec<f32>,
    /// `[E]`, slots of each expert.
    pub counts: Vec<i32>,
    /// `[T,H]`, widened.
    pub y: Vec<f32>,
    /// Name and duration in milliseconds of each stage, on the device's clock.
    pub stages: Vec<(&'static str, f32)>,
}

/// Runs the layer on rows `x [T,H]`.
pub fn run<T: Element>(device: &Device, layer: &LayerDesc, weights: &Weights<T>, x: &[T]) -> Result<Outputs, HfError> {
    match &weights.router {
        RouterWeight::Same(router) => run_with_router(device, layer, weights, router, x),
        RouterWeight::F32(router) => run_with_router(device, layer, weights, router, x),
    }
}

fn run_with_router<T: Element, W: Element>(
    device: &Device,
    layer: &LayerDesc,
    weights: &Weights<T>,
    router: &[W],
    x: &[T],
) -> Result<Outputs, HfError> {
    let layer = stored_as(layer, T::DTYPE).router_dtype(W::DTYPE);
    let tokens = x.len() / layer.hidden.max(1);
    let plan = layer.plan(tokens, device.kernels.device())?;
    device.kernels.preload(plan.kernels())?;

    let stream = device.context.new_stream().map_err(failed)?;
    let copies = Copies { stream: &stream };
    let router = copies.copy(router)?;
    let router_bias = copies.copy_some(&weights.router_bias)?;
    let correction_bias = copies.copy_some(&weights.correction_bias)?;
    let gate_up = copies.matrix(&weights.gate_up)?;
    let down = copies.matrix(&weights.down)?;
    let shared = match &weights.shared {
        Some((gate_up, down)) => Some((copies.matrix(gate_up)?, copies.matrix(down)?)),
        None => None,
    };
    let x = copies.copy(x)?;
    let mut router = RouterWeights::new(&router);
    router.bias = router_bias.as_ref().map(Into::into);
    router.correction_bias = correction_bias.as_ref().map(Into::into);
    let mut experts = ExpertWeights::new(gate_up.weight(), down.weight());
    experts.shared = shared.as_ref().map(|(gate_up, down)| SharedWeights::new(gate_up.weight(), down.weight()));
    let on_device = LayerWeights::new(router, experts);

    let choices = tokens * layer.top_k;
    let mut logits = copies.zeros::<f32>(tokens * layer.experts)?;
    let mut ids = copies.zeros::<i32>(choices)?;
    let mut choice_weights = copies.zeros::<f32>(choices)?;
    let mut counts = copies.zeros::<i32>(layer.experts)?;
    let mut y = copies.zeros::<T>(tokens * layer.hidden)?;
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes())?;

    let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let mut events: Vec<(&'static str, Result<CudaEvent, DriverError>)> = vec![("start", event())];
    let route = RouteArgs::new().logits(&mut logits).ids(&mut ids).weights(&mut choice_weights).counts(&mut counts);
    let args = LayerArgs::new(&x, &mut y).route(route);
    plan.forward_observed(&device.kernels, &stream, &on_device, args, &mut workspace, &mut |stage| {
        events.push((stage.name(), event()));
    })?;
    stream.synchronize().map_err(failed)?;

    let mut stages = Vec::new();
    for pair in events.windows(2) {
        let at = |index: usize| pair[index].1.as_ref().map_err(|&error| failed(error));
        stages.push((pair[1].0, at(0)?.elapsed_ms(at(1)?).map_err(failed)?));
    }
    Ok(Outputs {
        logits: copies.back(&logits, tokens * layer.experts)?,
        ids: copies.back(&ids, choices)?,
        weights: copies.back(&choice_weights, choices)?,
        counts: copies.back(&counts, layer.experts)?,
        y: copies.back(&y, tokens * layer.hidden)?.into_iter().map(T::to_f32).collect(),
        stages,
    })
}

/// The layer with activations and experts' weights of type `dtype`.
fn stored_as(layer: &LayerDesc, dtype: Dtype) -> LayerDesc {
    let stored = |mlp: &mut Mlp| {
        mlp.gate_up.format = dtype.into();
        mlp.down.format = dtype.into();
    };
    let mut layer = *layer;
    layer.dtype = dtype;
    stored(&mut layer.mlp);
    layer.shared.iter_mut().for_each(|shared| stored(&mut shared.mlp));
    layer
}

/// A driver call of ours that failed, as the library words it.
fn failed(source: DriverError) -> HfError {
    Error::Driver { operation: "hf_layer", source }.into()
}

struct Copies<'a> {
    stream: &'a Arc<CudaStream>,
}

/// A [`Matrix`] on the device.
struct Uploaded<T> {
    weight: CudaSlice<T>,
    bias: Option<CudaSlice<T>>,
}

impl<T: Element> Uploaded<T> {
    fn weight(&self) -> Weight<'_> {
        let weight = Weight::new(&self.weight);
        self.bias.iter().fold(weight, |weight, bias| weight.bias(bias))
    }
}

impl Copies<'_> {
    /// One element where there are none: CUDA has no empty allocations.
    fn copy<T: DeviceRepr + ValidAsZeroBits>(&self, values: &[T]) -> Result<CudaSlice<T>, HfError> {
        if values.is_empty() { self.zeros(0) } else { self.stream.clone_htod(values).map_err(failed) }
    }

    fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, length: usize) -> Result<CudaSlice<T>, HfError> {
        self.stream.alloc_zeros(length.max(1)).map_err(failed)
    }

    fn back<T: DeviceRepr>(&self, buffer: &CudaSlice<T>, length: usize) -> Result<Vec<T>, HfError> {
        let mut values = self.stream.clone_dtoh(buffer).map_err(failed)?;
        values.truncate(length);
        Ok(values)
    }

    fn copy_some<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        values: &Option<Vec<T>>,
    ) -> Result<Option<CudaSlice<T>>, HfError> {
        values.as_deref().map(|values| self.copy(values)).transpose()
    }

    fn matrix<T: Element>(&self, matrix: &Matrix<T>) -> Result<Uploaded<T>, HfError> {
        Ok(Uploaded { weight: self.copy(&matrix.weight)?, bias: self.copy_some(&matrix.bias)? })
    }
}
