//! The layer on a device: load, run, time, copy back.

use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits};
use half::{bf16, f16};
use moe_kernels::checkpoint::{Block, BlockInputs, BlockRun, DeviceBlock, Kind, Progress};
use moe_kernels::experts::Dispatched;
use moe_kernels::experts::rms_norm::{self, RmsNormArgs, RmsNormDesc};
use moe_kernels::{Dtype, Element, Error, Kernels, Workspace};

use super::error::HfError;

/// A CUDA device, real or software.
pub struct Device {
    pub context: Arc<CudaContext>,
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
    /// An expert for each sequence, of equal length.
    pub index: Option<Vec<i32>>,
    /// `[T]`, types of tokens.
    pub types: Option<Vec<i32>>,
    /// `[T,D]`, the state of the previous layer's router.
    pub previous: Option<Vec<f32>>,
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
    let layer = &loaded.desc;
    let tokens = x.len() / layer.hidden.max(1);
    let copies = Copies { stream };
    let x: Vec<T> = x.iter().map(|&value| T::from_f32(value)).collect();
    let x = copies.copy(&x)?;
    let held = HeldInputs::copy(&copies, inputs)?;
    let beside = held.inputs();
    let mut y = copies.zeros::<T>(tokens * layer.hidden)?;
    let mut run = BlockRun::<T>::new(loaded, tokens, &device.kernels, stream)?;

    let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let mut events: Vec<(&'static str, Result<CudaEvent, DriverError>)> = vec![("start", event())];
    let rows = ((&x).into(), (&mut y).into());
    run.forward(&device.kernels, stream, loaded, rows, beside, &mut |stage| events.push((stage, event())))?;
    stream.synchronize().map_err(failed)?;

    let results = run.results();
    let choices = tokens * layer.all_choices();
    let mut ids = copies.back(&results.ids, choices)?;
    let mut weights = copies.back(&results.weights, choices)?;
    let mut counts = copies.back(&results.counts, layer.local_experts())?;
    if let Some(plan) = run.plan().filter(|_| layer.capacity.is_some()) {
        // The gating's ids know of no capacity; the rows do.
        let mut rows = Dispatched::new(stream, &plan.route().rows())?;
        let (route, router) = (loaded.weights.route(beside.words)?, loaded.weights.layer()?.router);
        let mut workspace = Workspace::new(stream, plan.workspace_bytes())?;
        plan.route().forward(&device.kernels, stream, &router, &x, route, &mut rows, &mut workspace)?;
        drop_full(&mut ids, &copies.back(rows.token_slot(), choices)?);
    }
    if matches!(loaded.kind, Kind::Network(_)) {
        skip(&mut ids, &mut weights, layer.local_experts());
    }

    let mut stages = Vec::new();
    for pair in events.windows(2) {
        let at = |index: usize| pair[index].1.as_ref().map_err(|&error| failed(error));
        stages.push((pair[1].0, at(0)?.elapsed_ms(at(1)?).map_err(failed)?));
    }
    let (appended, columns) = (layer.gating.appended_experts(), layer.gating.appended_columns());
    let own = match &loaded.kind {
        Kind::UnitExperts { keys, .. } => 2 * keys,
        Kind::BySequence { .. } => 0,
        _ => layer.experts,
    };
    let mut router = copies.back(&results.logits, tokens * (own + columns))?;
    if let Some((second, types)) = results.second.as_ref().zip(inputs.types.as_ref()) {
        // Each token's own bank.
        choose(&mut ids, &copies.back(&second.ids, choices)?, types);
        choose(&mut weights, &copies.back(&second.weights, choices)?, types);
        let columns = router.len();
        choose(&mut router, &copies.back(&second.logits, columns)?, types);
        counts.extend(copies.back(&second.counts, layer.local_experts())?);
    }
    let (logits, _) = split(&router, own, columns);
    let (weights, shared_weights) = split(&weights, layer.top_k, appended);
    let probabilities = logits.chunks(own.max(1)).flat_map(softmax).collect();
    let mut extras = vec![("shared_weights", shared_weights), ("probs", probabilities)];
    if let (Kind::Network(network), Some(state)) = (&loaded.kind, &results.state) {
        extras.push(("router_hidden_states", copies.back(state, tokens * network.width)?));
    }
    if let Some((norm, weight)) = layer.norms.experts.zip(loaded.weights.around.experts.as_ref()) {
        // What the layer's norm makes of x on its way to the experts, by the same operation.
        let mut normed = copies.zeros::<T>(tokens * layer.hidden)?;
        let mut args = RmsNormArgs::new(&x, &mut normed);
        args.weight = weight.tensor();
        rms_norm::forward(&device.kernels, stream, &RmsNormDesc::new(T::DTYPE, tokens, layer.hidden, norm), args)?;
        let normed = copies.back(&normed, tokens * layer.hidden)?;
        extras.push(("x_experts", normed.into_iter().map(T::to_f32).collect()));
    }
    Ok(Outputs {
        logits,
        router,
        ids: split(&ids, layer.top_k, appended).0,
        weights,
        extras,
        counts,
        y: copies.back(&y, tokens * layer.hidden)?.into_iter().map(T::to_f32).collect(),
        stages,
    })
}

/// Values as `dtype` holds them.
pub fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::Bf16 => values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
        Dtype::F16 => values.iter().map(|&value| f16::from_f32(value).to_f32()).collect(),
        _ => values.to_vec(),
    }
}

/// [`Inputs`] on the device.
pub struct HeldInputs {
    words: Option<CudaSlice<i32>>,
    index: Option<CudaSlice<i32>>,
    types: Option<CudaSlice<i32>>,
    previous: Option<CudaSlice<f32>>,
    sequences: usize,
}

impl HeldInputs {
    pub fn copy(copies: &Copies<'_>, inputs: &Inputs) -> Result<HeldInputs, HfError> {
        let numbers = |values: &Option<Vec<i32>>| values.as_deref().map(|values| copies.copy(values)).transpose();
        Ok(HeldInputs {
            words: numbers(&inputs.words)?,
            index: numbers(&inputs.index)?,
            types: numbers(&inputs.types)?,
            previous: inputs.previous.as_deref().map(|previous| copies.copy(previous)).transpose()?,
            sequences: inputs.index.as_ref().map_or(0, Vec::len),
        })
    }

    pub fn inputs(&self) -> BlockInputs<'_> {
        let mut inputs = BlockInputs::default();
        inputs.words = self.words.as_ref().map(Into::into);
        inputs.index = self.index.as_ref().map(Into::into);
        inputs.types = self.types.as_ref().map(Into::into);
        inputs.previous = self.previous.as_ref().map(Into::into);
        inputs.sequences = self.sequences;
        inputs
    }
}

/// Takes the rows of tokens of the second bank from there.
pub fn choose<T: Copy>(first: &mut [T], second: &[T], types: &[i32]) {
    let columns = (first.len() / types.len().max(1)).max(1);
    let rows = first.chunks_mut(columns).zip(second.chunks(columns)).zip(types);
    rows.filter(|(_, kind)| **kind > 0).for_each(|((first, second), _)| first.copy_from_slice(second));
}

/// A choice of no expert, as transformers' Zaya gives it: expert 0 with weight 0.
pub fn skip<W: Default>(ids: &mut [i32], weights: &mut [W], experts: usize) {
    for (id, weight) in ids.iter_mut().zip(weights).filter(|(id, _)| **id >= experts as i32) {
        (*id, *weight) = (0, W::default());
    }
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
pub fn failed(source: DriverError) -> HfError {
    Error::Driver { operation: "hf_layer", source }.into()
}

pub struct Copies<'a> {
    pub stream: &'a Arc<CudaStream>,
}

impl Copies<'_> {
    /// One element where there are none: CUDA has no empty allocations.
    pub fn copy<T: DeviceRepr + ValidAsZeroBits>(&self, values: &[T]) -> Result<CudaSlice<T>, HfError> {
        if values.is_empty() { self.zeros(0) } else { self.stream.clone_htod(values).map_err(failed) }
    }

    fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, length: usize) -> Result<CudaSlice<T>, HfError> {
        self.stream.alloc_zeros(length.max(1)).map_err(failed)
    }

    pub fn back<T: DeviceRepr>(&self, buffer: &CudaSlice<T>, length: usize) -> Result<Vec<T>, HfError> {
        let mut values = self.stream.clone_dtoh(buffer).map_err(failed)?;
        values.truncate(length);
        Ok(values)
    }
}
