//! The layer on a device: load, run, time, copy back.

use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits};
use half::{bf16, f16};
use moe_kernels::checkpoint::{Block, DeviceBlock, Progress};
use moe_kernels::experts::Dispatched;
use moe_kernels::layer::{LayerArgs, RouteArgs};
use moe_kernels::{Dtype, Element, Error, Kernels, Workspace};

use super::error::HfError;
use super::golden::for_tokens;

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
    /// `[T, columns]`: the same with those of appended experts.
    pub router: Vec<f32>,
    /// `[T,k]`, -1 for a choice that a capacity dropped.
    pub ids: Vec<i32>,
    /// `[T,k]`.
    pub weights: Vec<f32>,
    /// What some blocks yield beside that: its name in recorded files, and `[T, columns]`.
    pub extras: Vec<(&'static str, Vec<f32>)>,
    /// `[E]`, slots of each expert.
    pub counts: Vec<i32>,
    /// `[T,H]`, widened.
    pub y: Vec<f32>,
    /// Name and duration in milliseconds of each stage, on the device's clock.
    pub stages: Vec<(&'static str, f32)>,
}

/// What a block takes beside rows; each exactly where the block has a use for it.
#[derive(Default)]
pub struct Inputs {
    /// `[T]`, ids of words.
    pub words: Option<Vec<i32>>,
}

/// Loads the block and runs it on rows `x [T,H]`, which are values of `dtype`.
pub fn run(
    device: &Device,
    block: &Block<'_>,
    dtype: Dtype,
    x: &[f32],
    inputs: &Inputs,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Outputs, HfError> {
    let stream = device.context.new_stream().map_err(failed)?;
    let loaded = block.load(&stream, dtype, progress)?;
    match dtype {
        Dtype::Bf16 => run_in::<bf16>(device, &stream, &loaded, x, inputs),
        Dtype::F16 => run_in::<f16>(device, &stream, &loaded, x, inputs),
        Dtype::F32 => run_in::<f32>(device, &stream, &loaded, x, inputs),
        other => {
            let (supported, got) = ("bf16, f16 or f32".into(), other.to_string());
            Err(Error::Unsupported { operation: "hf_layer", argument: "--dtype", supported, got }.into())
        }
    }
}

fn run_in<T: Element>(
    device: &Device,
    stream: &Arc<CudaStream>,
    loaded: &DeviceBlock,
    x: &[f32],
    inputs: &Inputs,
) -> Result<Outputs, HfError> {
    let tokens = x.len() / loaded.desc.hidden.max(1);
    let layer = for_tokens(&loaded.desc, tokens);
    let plan = layer.plan(tokens, device.kernels.device())?;
    device.kernels.preload(plan.kernels())?;

    let copies = Copies { stream };
    let x: Vec<T> = x.iter().map(|&value| T::from_f32(value)).collect();
    let x = copies.copy(&x)?;
    let words = inputs.words.as_deref().map(|words| copies.copy(words)).transpose()?;
    let choices = tokens * layer.all_choices();
    let mut logits = copies.zeros::<f32>(tokens * layer.logit_columns())?;
    let mut ids = copies.zeros::<i32>(choices)?;
    let mut choice_weights = copies.zeros::<f32>(choices)?;
    let mut counts = copies.zeros::<i32>(layer.local_experts())?;
    let mut y = copies.zeros::<T>(tokens * layer.hidden)?;
    let mut workspace = Workspace::new(stream, plan.workspace_bytes())?;

    let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let mut events: Vec<(&'static str, Result<CudaEvent, DriverError>)> = vec![("start", event())];
    let route =
        route_args(loaded, &words)?.logits(&mut logits).ids(&mut ids).weights(&mut choice_weights).counts(&mut counts);
    let args = LayerArgs::new(&x, &mut y).route(route);
    let weights = loaded.weights.layer()?;
    plan.forward_observed(&device.kernels, stream, &weights, args, &mut workspace, &mut |stage| {
        events.push((stage.name(), event()));
    })?;
    stream.synchronize().map_err(failed)?;

    let mut ids = copies.back(&ids, choices)?;
    if layer.capacity.is_some() {
        // The gating's ids know of no capacity; the rows do.
        let mut rows = Dispatched::new(stream, &plan.route().rows())?;
        let route = plan.route();
        route.forward(
            &device.kernels,
            stream,
            &weights.router,
            &x,
            route_args(loaded, &words)?,
            &mut rows,
            &mut workspace,
        )?;
        drop_full(&mut ids, &copies.back(rows.token_slot(), choices)?);
    }

    let mut stages = Vec::new();
    for pair in events.windows(2) {
        let at = |index: usize| pair[index].1.as_ref().map_err(|&error| failed(error));
        stages.push((pair[1].0, at(0)?.elapsed_ms(at(1)?).map_err(failed)?));
    }
    let appended = layer.gating.appended_experts();
    let router = copies.back(&logits, tokens * layer.logit_columns())?;
    let (logits, _) = split(&router, layer.experts, layer.gating.appended_columns());
    let (weights, shared_weights) = split(&copies.back(&choice_weights, choices)?, layer.top_k, appended);
    let probabilities = logits.chunks(layer.experts.max(1)).flat_map(softmax).collect();
    Ok(Outputs {
        logits,
        router,
        ids: split(&ids, layer.top_k, appended).0,
        weights,
        extras: vec![("shared_weights", shared_weights), ("probs", probabilities)],
        counts: copies.back(&counts, layer.local_experts())?,
        y: copies.back(&y, tokens * layer.hidden)?.into_iter().map(T::to_f32).collect(),
        stages,
    })
}

fn route_args<'a>(loaded: &'a DeviceBlock, words: &'a Option<CudaSlice<i32>>) -> Result<RouteArgs<'a>, Error> {
    loaded.weights.route(words.as_ref().map(Into::into))
}

/// Rows of `first` and `second` columns, apart.
pub fn split<T: Copy>(values: &[T], first: usize, second: usize) -> (Vec<T>, Vec<T>) {
    let rows = || values.chunks((first + second).max(1));
    (rows().flat_map(|row| &row[..first]).copied().collect(), rows().flat_map(|row| &row[first..]).copied().collect())
}

/// The probabilities of a token's logits, which some routers give in their place.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let terms: Vec<f64> = logits.iter().map(|&logit| f64::from(logit - most).exp()).collect();
    let sum: f64 = terms.iter().sum();
    terms.into_iter().map(|term| (term / sum) as f32).collect()
}

/// Takes back the choices that have no row.
pub fn drop_full(ids: &mut [i32], token_slot: &[i32]) {
    ids.iter_mut().zip(token_slot).filter(|(_, slot)| **slot < 0).for_each(|(id, _)| *id = -1);
}

/// A driver call of ours that failed, as the library words it.
fn failed(source: DriverError) -> HfError {
    Error::Driver { operation: "hf_layer", source }.into()
}

struct Copies<'a> {
    stream: &'a Arc<CudaStream>,
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
}
