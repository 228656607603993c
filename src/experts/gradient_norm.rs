//! The norm of gradients in any number of buffers, whether they are finite, and what clips them; and the product with such a factor.
//!
//! `norm = scale * sqrt(sum of squares)` over all elements of all buffers, summed in f64 in a fixed order; `overflow` is 1 where any element is infinite or
//! NaN (the check of a scaled loss: Micikevicius et al. 2018, arXiv:1710.03740); `factor = scale * min(1, max_norm / (norm + 1e-6))` is what unscales
//! and clips at once (torch's `clip_grad_norm_`). All stay on the device: no optimiser step waits for the host. [`multiply`] multiplies
//! by the factor in place; an optimiser that reads it needs no such pass.
//!
//! Matrices of frozen experts, whose memory holds no gradient, are left out ([`GradientNormArgs::frozen`]).

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{GRADIENT_BUFFERS, GRADIENT_CHUNK, Kernel};
use crate::rules::Dtype;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Held, SCALAR, Scope, optional};
use crate::runtime::params::{GradientNormParams, GradientScaleParams, Pointer};
use crate::runtime::shape;
use crate::runtime::workspace::BARRIER_HEADER;
use crate::{DeviceInfo, Error, In, Kernels, Out, OutTensor, Selection, Tensor, Workspace};

const OPERATION: &str = "gradient_norm";

/// Blocks a multiprocessor that chunks are shared among.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 4;

/// A buffer of gradients: `groups` matrices of `elements` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GradientShape {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Experts that have a matrix here, or 1.
    pub groups: usize,
    /// Elements of each.
    pub elements: usize,
    /// Whether the mask of frozen experts is for it.
    pub freezes: bool,
}

impl GradientShape {
    /// `elements` elements of one parameter.
    pub const fn new(dtype: Dtype, elements: usize) -> GradientShape {
        GradientShape { dtype, groups: 1, elements, freezes: false }
    }

    /// A matrix of `elements` elements for each of `experts` experts, some of whom may be frozen.
    pub const fn experts(dtype: Dtype, experts: usize, elements: usize) -> GradientShape {
        GradientShape { dtype, groups: experts, elements, freezes: true }
    }

    fn chunks_of_group(&self) -> usize {
        self.elements.div_ceil(GRADIENT_CHUNK as usize)
    }

    fn chunks(&self) -> usize {
        self.groups * self.chunks_of_group()
    }

    fn form(&self) -> u32 {
        let dtype = match self.dtype {
            Dtype::Bf16 => 0,
            Dtype::F16 => 1,
            Dtype::F32 => 2,
        };
        dtype | if self.freezes { 256 } else { 0 }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientNormDesc<'s> {
    /// The buffers.
    pub gradients: &'s [GradientShape],
    /// Factor of all gradients: what undoes the loss's scale.
    pub scale: f32,
    /// Largest norm that is let through; none where nothing is clipped.
    pub max_norm: Option<f32>,
}

impl<'s> GradientNormDesc<'s> {
    /// Of these buffers, neither scaled nor clipped.
    pub const fn new(gradients: &'s [GradientShape]) -> GradientNormDesc<'s> {
        GradientNormDesc { gradients, scale: 1.0, max_norm: None }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        for gradient in self.gradients {
            shape::size(OPERATION, "gradients", gradient.elements)?;
            shape::size(OPERATION, "gradients", gradient.groups)?;
            shape::product(OPERATION, "gradients", &[gradient.groups, gradient.elements])?;
        }
        let chunks = self.gradients.iter().map(GradientShape::chunks).fold(0, usize::saturating_add);
        shape::size(OPERATION, "gradients", chunks)?;
        if !self.scale.is_finite() {
            return Err(Error::invalid(OPERATION, "scale", "a finite number", self.scale));
        }
        match self.max_norm {
            Some(most) if most.is_nan() || most < 0.0 => {
                Err(Error::invalid(OPERATION, "max_norm", "a number from 0 on", most))
            }
            _ => Ok(()),
        }
    }
}

settings!(GradientNormDesc<'_> { scale: f32, max_norm: Option<f32> });

/// Buffers of a norm. What is not asked for is absent.
#[non_exhaustive]
pub struct GradientNormArgs<'a> {
    /// One for each shape of the descriptor, of its type, and at least its elements.
    pub gradients: &'a [Tensor<'a>],
    /// `[E]`: experts with another number than 0 are left out of buffers that freeze.
    pub frozen: Option<In<'a, i32>>,
    /// `[1]`, written.
    pub norm: Option<Out<'a, f32>>,
    /// `[1]`, written.
    pub factor: Option<Out<'a, f32>>,
    /// `[1]`, written: 0 or 1.
    pub overflow: Option<Out<'a, i32>>,
}

impl<'a> GradientNormArgs<'a> {
    /// Of these gradients.
    pub const fn new(gradients: &'a [Tensor<'a>]) -> GradientNormArgs<'a> {
        GradientNormArgs { gradients, frozen: None, norm: None, factor: None, overflow: None }
    }
}

buffers!(GradientNormArgs<'a> { frozen: In<i32>, norm: Out<f32>, factor: Out<f32>, overflow: Out<i32> });

/// Chooses the kernel and its grid, the same for each launch: one for every four buffers, at least one.
///
/// # Errors
/// Those of [`GradientNormDesc::validate`].
pub fn select(desc: &GradientNormDesc<'_>, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(Selection::new(Kernel::GradientNorm, [blocks(desc.gradients, device), 1, 1]))
}

/// Blocks for the most chunks of a launch.
fn blocks(gradients: &[GradientShape], device: &DeviceInfo) -> u32 {
    (chunks_of_launch(gradients) as u32).clamp(1, BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors)
}

/// Most chunks of one launch.
fn chunks_of_launch(gradients: &[GradientShape]) -> usize {
    let chunks = |gradients: &[GradientShape]| gradients.iter().map(GradientShape::chunks).sum::<usize>();
    gradients.chunks(GRADIENT_BUFFERS as usize).map(chunks).max().unwrap_or(0)
}

/// Size of the workspace in bytes: a sum for each chunk of a launch, every 2^15 elements.
///
/// # Errors
/// Those of [`GradientNormDesc::validate`].
pub fn workspace_bytes(desc: &GradientNormDesc<'_>) -> Result<usize, Error> {
    desc.validate()?;
    Ok(BARRIER_HEADER + chunks_of_launch(desc.gradients) * size_of::<f64>())
}

/// A launch's buffers as its parameters; absent ones begin past the last chunk.
struct Table<'a> {
    values: [Pointer<'a>; GRADIENT_BUFFERS as usize],
    elements: [u32; GRADIENT_BUFFERS as usize],
    group_chunks: [u32; GRADIENT_BUFFERS as usize],
    first_chunk: [u32; GRADIENT_BUFFERS as usize],
    form: [u32; GRADIENT_BUFFERS as usize],
    chunks: u32,
}

impl<'a> Table<'a> {
    fn new(shapes: &[GradientShape], held: &'a [Held<'_>]) -> Table<'a> {
        const BUFFERS: usize = GRADIENT_BUFFERS as usize;
        let mut table = Table {
            values: [Pointer::NULL; BUFFERS],
            elements: [0; BUFFERS],
            group_chunks: [1; BUFFERS],
            first_chunk: [u32::MAX; BUFFERS],
            form: [0; BUFFERS],
            chunks: 0,
        };
        for (index, (shape, held)) in shapes.iter().zip(held).enumerate() {
            table.values[index] = held.address().into();
            table.elements[index] = shape.elements as u32;
            table.group_chunks[index] = shape.chunks_of_group().max(1) as u32;
            table.first_chunk[index] = table.chunks;
            table.form[index] = shape.form();
            table.chunks += shape.chunks() as u32;
        }
        table
    }
}

/// What is the same for the buffers of both operations: as many as shapes, each of its type.
fn check_given(
    operation: &'static str,
    shapes: &[GradientShape],
    given: impl Iterator<Item = Dtype>,
) -> Result<(), Error> {
    let given: Vec<Dtype> = given.collect();
    let expected: Vec<Dtype> = shapes.iter().map(|shape| shape.dtype).collect();
    if given != expected {
        let (expected, got) = (format!("buffers of {expected:?}"), format!("{given:?}"));
        return Err(Error::invalid(operation, "gradients", expected, got));
    }
    Ok(())
}

/// Experts that the mask has numbers for.
fn masked(shapes: &[GradientShape]) -> usize {
    shapes.iter().filter(|shape| shape.freezes).map(|shape| shape.groups).max().unwrap_or(0)
}

/// Computes norm, factor and flag.
///
/// Of no gradients the norm is 0.
///
/// # Errors
/// Those of [`GradientNormDesc::validate`]; [`Error::Invalid`] for buffers that are not the descriptor's; those of a buffer: [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GradientNormDesc<'_>,
    args: GradientNormArgs<'_>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    check_given(OPERATION, desc.gradients, args.gradients.iter().map(Tensor::dtype))?;
    let mut held = Vec::new();
    for (shape, &tensor) in desc.gradients.iter().zip(args.gradients) {
        let elements = shape.groups * shape.elements;
        held.push(scope.read_any("gradients", tensor, elements, shape.dtype.bytes().into())?);
    }
    let frozen = scope.read_some("frozen", args.frozen, masked(desc.gradients), SCALAR)?;
    let norm = scope.write_some("norm", args.norm, 1, SCALAR)?;
    let factor = scope.write_some("factor", args.factor, 1, SCALAR)?;
    let overflow = scope.write_some("overflow", args.overflow, 1, SCALAR)?;
    let workspace = workspace.open(&scope, workspace_bytes(desc)?)?;
    const BUFFERS: usize = GRADIENT_BUFFERS as usize;
    let launches = desc.gradients.len().div_ceil(BUFFERS).max(1);
    for index in 0..launches {
        let part = index * BUFFERS..desc.gradients.len().min((index + 1) * BUFFERS);
        let Table { values, elements, group_chunks, first_chunk, form, chunks } =
            Table::new(&desc.gradients[part.clone()], &held[part]);
        scope.launch(
            &selection,
            GradientNormParams {
                values0: values[0],
                group_elements0: elements[0],
                group_chunks0: group_chunks[0],
                first_chunk0: first_chunk[0],
                form0: form[0],
                values1: values[1],
                group_elements1: elements[1],
                group_chunks1: group_chunks[1],
                first_chunk1: first_chunk[1],
                form1: form[1],
                values2: values[2],
                group_elements2: elements[2],
                group_chunks2: group_chunks[2],
                first_chunk2: first_chunk[2],
                form2: form[2],
                values3: values[3],
                group_elements3: elements[3],
                group_chunks3: group_chunks[3],
                first_chunk3: first_chunk[3],
                form3: form[3],
                frozen: optional(&frozen).into(),
                norm: optional(&norm).into(),
                factor: optional(&factor).into(),
                overflow: optional(&overflow).into(),
                workspace: workspace.address().into(),
                scale: desc.scale,
                max_norm: desc.max_norm.unwrap_or(f32::INFINITY),
                begins: u32::from(index == 0),
                ends: u32::from(index + 1 == launches),
                chunks,
            },
        )?;
    }
    Ok(())
}

/// Multiplies every gradient by `factor [1]`, in place, rounded once; matrices of frozen experts are left alone.
///
/// Without gradients nothing is launched.
///
/// # Errors
/// Those of [`GradientNormDesc::validate`] and of [`forward`].
pub fn multiply<'a>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    shapes: &[GradientShape],
    gradients: Vec<OutTensor<'a>>,
    frozen: Option<In<'a, i32>>,
    factor: In<'a, f32>,
) -> Result<(), Error> {
    const SCALING: &str = "gradient_scale";
    GradientNormDesc::new(shapes).validate().map_err(|error| error.within(SCALING))?;
    let scope = Scope::begin(SCALING, kernels, stream)?;
    check_given(SCALING, shapes, gradients.iter().map(OutTensor::dtype))?;
    let selection = Selection::new(Kernel::GradientScale, [blocks(shapes, kernels.device()), 1, 1]);
    let mut held = Vec::new();
    for (shape, tensor) in shapes.iter().zip(gradients) {
        held.push(scope.write_any("gradients", tensor, shape.groups * shape.elements)?);
    }
    let frozen = scope.read_some("frozen", frozen, masked(shapes), SCALAR)?;
    let factor = scope.read("factor", factor, 1, SCALAR)?;
    const BUFFERS: usize = GRADIENT_BUFFERS as usize;
    for (shapes, held) in shapes.chunks(BUFFERS).zip(held.chunks(BUFFERS)) {
        let Table { values, elements, group_chunks, first_chunk, form, chunks } = Table::new(shapes, held);
        if chunks == 0 {
            continue;
        }
        scope.launch(
            &selection,
            GradientScaleParams {
                values0: values[0],
                group_elements0: elements[0],
                group_chunks0: group_chunks[0],
                first_chunk0: first_chunk[0],
                form0: form[0],
                values1: values[1],
                group_elements1: elements[1],
                group_chunks1: group_chunks[1],
                first_chunk1: first_chunk[1],
                form1: form[1],
                values2: values[2],
                group_elements2: elements[2],
                group_chunks2: group_chunks[2],
                first_chunk2: first_chunk[2],
                form2: form[2],
                values3: values[3],
                group_elements3: elements[3],
                group_chunks3: group_chunks[3],
                first_chunk3: first_chunk[3],
                form3: form[3],
                frozen: optional(&frozen).into(),
                factor: factor.address().into(),
                chunks,
            },
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let shapes = [GradientShape::experts(Dtype::Bf16, 8, 1 << 20), GradientShape::new(Dtype::F32, 64)];
        let desc = GradientNormDesc::new(&shapes);
        let fault = |desc: GradientNormDesc<'_>| select(&desc, &A100).unwrap_err().argument().unwrap();
        assert_eq!(select(&desc, &A100).unwrap().grid, [8 * 32 + 1, 1, 1]);
        assert_eq!(workspace_bytes(&desc), Ok(BARRIER_HEADER + 257 * 8));
        assert_eq!(fault(desc.scale(f32::NAN)), "scale");
        assert_eq!(fault(desc.max_norm(Some(-1.0))), "max_norm");
        assert_eq!(fault(desc.max_norm(Some(f32::NAN))), "max_norm");
        let huge = [GradientShape::new(Dtype::F32, 1 << 31)];
        assert_eq!(fault(GradientNormDesc::new(&huge)), "gradients");
        let many = [GradientShape::experts(Dtype::F32, 1 << 20, 1 << 30); 2];
        assert_eq!(fault(GradientNormDesc::new(&many)), "gradients");
        assert_eq!(select(&GradientNormDesc::new(&[]), &A100).unwrap().grid, [1, 1, 1]);
    }
}
