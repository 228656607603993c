//! The layer on a device: copy, run, time, copy back.

use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError};
use moe_kernels::layer::{LayerArgs, LayerDesc, LayerWeights, Linear, SharedWeights};
use moe_kernels::{Element, Error, Kernels, Workspace};

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
    let layer = LayerDesc { dtype: T::DTYPE, router_dtype: W::DTYPE, ..*layer };
    let tokens = x.len() / layer.hidden.max(1);
    let plan = layer.plan(tokens, device.kernels.device())?;
    device.kernels.preload(plan.kernels())?;

    let stream = device.context.new_stream().map_err(failed)?;
    let upload = Upload { stream: &stream };
    let router = upload.copy(router)?;
    let router_bias = upload.copy_some(&weights.router_bias)?;
    let correction_bias = upload.copy_some(&weights.correction_bias)?;
    let gate_up = upload.matrix(&weights.gate_up)?;
    let down = upload.matrix(&weights.down)?;
    let shared = match &weights.shared {
        Some((gate_up, down)) => Some((upload.matrix(gate_up)?, upload.matrix(down)?)),
        None => None,
    };
    let x = upload.copy(x)?;
    let on_device = LayerWeights {
        router: &router,
        router_bias: router_bias.as_ref().map(input),
        correction_bias: correction_bias.as_ref().map(input),
        gate_up: gate_up.linear(),
        down: down.linear(),
        shared: shared.as_ref().map(|(gate_up, down)| SharedWeights { gate_up: gate_up.linear(), down: down.linear() }),
    };

    let choices = tokens * layer.top_k;
    let mut logits = stream.alloc_zeros::<f32>(tokens * layer.experts).map_err(failed)?;
    let mut ids = stream.alloc_zeros::<i32>(choices).map_err(failed)?;
    let mut choice_weights = stream.alloc_zeros::<f32>(choices).map_err(failed)?;
    let mut counts = stream.alloc_zeros::<i32>(layer.experts).map_err(failed)?;
    let mut y = stream.alloc_zeros::<T>(tokens * layer.hidden).map_err(failed)?;
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes())?;

    let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let mut events: Vec<(&'static str, Result<CudaEvent, DriverError>)> = vec![("start", event())];
    let args = LayerArgs {
        logits: Some(&mut logits),
        ids: Some(&mut ids),
        weights: Some(&mut choice_weights),
        counts: Some(&mut counts),
        ..LayerArgs::new(&x, &mut y)
    };
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
        logits: stream.clone_dtoh(&logits).map_err(failed)?,
        ids: stream.clone_dtoh(&ids).map_err(failed)?,
        weights: stream.clone_dtoh(&choice_weights).map_err(failed)?,
        counts: stream.clone_dtoh(&counts).map_err(failed)?,
        y: stream.clone_dtoh(&y).map_err(failed)?.into_iter().map(T::to_f32).collect(),
        stages,
    })
}

/// A driver call of ours that failed, as the library words it.
fn failed(source: DriverError) -> HfError {
    Error::Driver { operation: "hf_layer", source }.into()
}

fn input<T>(buffer: &CudaSlice<T>) -> &dyn DevicePtr<T> {
    buffer
}

struct Upload<'a> {
    stream: &'a Arc<CudaStream>,
}

/// A [`Matrix`] on the device.
struct Uploaded<T> {
    weight: CudaSlice<T>,
    bias: Option<CudaSlice<T>>,
}

impl<T: Element> Uploaded<T> {
    fn linear(&self) -> Linear<'_, T> {
        Linear { weight: &self.weight, bias: self.bias.as_ref().map(input) }
    }
}

impl Upload<'_> {
    fn copy<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>, HfError> {
        self.stream.clone_htod(values).map_err(failed)
    }

    fn copy_some<T: DeviceRepr>(&self, values: &Option<Vec<T>>) -> Result<Option<CudaSlice<T>>, HfError> {
        values.as_deref().map(|values| self.copy(values)).transpose()
    }

    fn matrix<T: Element>(&self, matrix: &Matrix<T>) -> Result<Uploaded<T>, HfError> {
        Ok(Uploaded { weight: self.copy(&matrix.weight)?, bias: self.copy_some(&matrix.bias)? })
    }
}
