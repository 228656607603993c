//! A block's way back on the device, and how far its gradients are from those that are recorded.

use half::{bf16, f16};
use moe_kernels::checkpoint::{Block, BlockBackward, ByName, Values};
use moe_kernels::{Dtype, Element, Error};

use super::device::{Copies, Device, HeldInputs, Inputs, failed};
use super::error::HfError;
use super::grads::{Recorded, of_module};
use super::reference::Reference;
use super::report::{Line, Measure, gradient_tolerance, relative_error};

/// Gradients of a block.
pub struct Gradients {
    /// `[T,H]`, widened.
    pub x: Vec<f64>,
    /// `[T,D]`, of the state of the previous layer's router.
    pub previous: Option<Vec<f64>>,
    /// Of the checkpoint's tensors.
    pub tensors: ByName<f64>,
}

/// A gradient under its name in recorded files.
pub struct Gradient {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Loads the block and goes back from `dy [T,H]`, for rows `x [T,H]`, which are values of `dtype`.
pub fn run(
    device: &Device,
    block: &Block<'_>,
    dtype: Dtype,
    rows: (&[f32], &[f32]),
    inputs: &Inputs,
) -> Result<Gradients, HfError> {
    match dtype {
        Dtype::Bf16 => run_in::<bf16>(device, block, rows, inputs),
        Dtype::F16 => run_in::<f16>(device, block, rows, inputs),
        Dtype::F32 => run_in::<f32>(device, block, rows, inputs),
        other => {
            let (supported, got) = ("bf16, f16 or f32".into(), other.to_string());
            Err(Error::Unsupported { operation: "hf_layer", argument: "--dtype", supported, got }.into())
        }
    }
}

fn run_in<T: Element>(
    device: &Device,
    block: &Block<'_>,
    (x, dy): (&[f32], &[f32]),
    inputs: &Inputs,
) -> Result<Gradients, HfError> {
    let stream = device.context.new_stream().map_err(failed)?;
    let loaded = block.load(&stream, T::DTYPE, &mut |_| ())?;
    let (elements, tokens) = (x.len(), x.len() / block.desc().hidden.max(1));
    let copies = Copies { stream: &stream };
    let copy = |values: &[f32]| copies.copy(&values.iter().map(|&value| T::from_f32(value)).collect::<Vec<T>>());
    let (x, dy) = (copy(x)?, copy(dy)?);
    let held = HeldInputs::copy(&copies, inputs)?;
    let mut back = BlockBackward::<T>::new(&loaded, tokens, device.kernels(), &stream)?;
    back.run(device.kernels(), &stream, &loaded, ((&x).into(), (&dy).into()), held.inputs())?;
    let gradients = back.gradients();
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<f64>>();
    let named = gradients.by_name(&stream, &block.places()?)?.into_iter();
    let widened = named.map(|(name, of)| (name, Values { shape: of.shape, values: wide(of.values) }));
    let previous = gradients.previous.as_ref().zip(inputs.previous.as_ref());
    Ok(Gradients {
        x: copies.back(&gradients.x, elements)?.into_iter().map(|value| value.to_f32().into()).collect(),
        previous: previous.map(|(d, values)| copies.back(d, values.len()).map(wide)).transpose()?,
        tensors: widened.collect(),
    })
}

/// What the reference makes of the same rows, under the names of the checkpoint's tensors.
pub fn by_reference(
    block: &Block<'_>,
    dtype: Dtype,
    (x, dy): (&[f32], &[f32]),
    inputs: &Inputs,
) -> Result<Vec<Recorded>, HfError> {
    let wide = |values: &[f32]| values.iter().map(|&value| value.into()).collect::<Vec<f64>>();
    let (x, dy, hidden) = (wide(x), wide(dy), block.desc().hidden);
    let tokens = x.len() / hidden.max(1);
    let host = block.load_host(dtype)?;
    let of = Reference::new(&host, tokens, inputs).backward(&x, &dy, &block.places()?)?;
    let below = |name: &str| name.strip_prefix(block.name()).map_or(name.to_owned(), |rest| format!("d{rest}"));
    let tensors = of.tensors.into_iter();
    let mut all: Vec<Recorded> = tensors
        .map(|(name, tensor)| Recorded { name: below(&name), shape: tensor.shape, values: tensor.values })
        .collect();
    all.push(Recorded { name: "dx".into(), shape: vec![tokens, hidden], values: of.x });
    Ok(all)
}

/// Brings each recorded gradient's own into its form and compares; the block's tensors' names begin with `prefix`.
pub fn compare(
    got: &Gradients,
    recorded: &[Recorded],
    prefix: &str,
    dtype: Dtype,
) -> Result<(Vec<Gradient>, Vec<Line>), HfError> {
    let (mut gradients, mut lines) = (Vec::new(), Vec::new());
    for Recorded { name, shape, values } in recorded {
        let own = match (name.as_str(), name.strip_prefix("d.")) {
            ("dx", _) => Some(got.x.clone()),
            (_, Some(parameter)) => of_module(parameter, shape, prefix, &got.tensors),
            // `d_in.` before the name of an input.
            _ => got.previous.clone(),
        };
        let own = own.ok_or_else(|| HfError::NoGradient { name: name.clone() })?;
        let (error, tolerance) = (relative_error(&own, values), gradient_tolerance(name, dtype));
        lines.push(Line { tensor: name.clone(), measure: Measure::Relative { error, tolerance } });
        let values = own.into_iter().map(|value| value as f32).collect();
        gradients.push(Gradient { name: name.clone(), shape: shape.clone(), values });
    }
    Ok((gradients, lines))
}
