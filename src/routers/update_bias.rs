//! The correction bias of the next step: balancing without an auxiliary loss (Wang et al. 2024, algorithm 1; DeepSeek-V3, section
//! 2.1.2).
//!
//! `correction_bias[e] += rate * sign(mean(counts) - counts[e])`.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::Kernel;
use crate::runtime::launch::{SCALAR, Scope};
use crate::runtime::params::UpdateBiasParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "update_bias";

/// Shapes of an update of the correction bias.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct UpdateBiasDesc {
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Step, finite: DeepSeek-V3's "bias update speed", 0.001 there.
    pub rate: f32,
}

impl UpdateBiasDesc {
    /// A step of `rate` for `experts` experts.
    pub const fn new(experts: usize, rate: f32) -> UpdateBiasDesc {
        UpdateBiasDesc { experts, rate }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Unsupported`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::experts(OPERATION, self.experts)?;
        if !self.rate.is_finite() {
            return Err(Error::invalid(OPERATION, "rate", "a finite number", self.rate));
        }
        Ok(())
    }
}

/// Buffers of an update of the correction bias.
#[non_exhaustive]
pub struct UpdateBiasArgs<'a> {
    /// `[E]`: slots of each expert in a whole step, all devices' together.
    pub counts: In<'a, i32>,
    /// `[E]`, added to.
    pub correction_bias: Out<'a, f32>,
}

impl<'a> UpdateBiasArgs<'a> {
    /// A step of `correction_bias` by `counts`.
    pub fn new(counts: impl Into<In<'a, i32>>, correction_bias: impl Into<Out<'a, f32>>) -> UpdateBiasArgs<'a> {
        UpdateBiasArgs { counts: counts.into(), correction_bias: correction_bias.into() }
    }
}

/// Chooses kernel and grid: one block.
///
/// # Errors
/// Those of [`UpdateBiasDesc::validate`].
pub fn select(desc: &UpdateBiasDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    Ok(Selection::new(Kernel::UpdateBias, [1, 1, 1]))
}

/// Updates the correction bias.
///
/// # Errors
/// Those of [`UpdateBiasDesc::validate`]; those of a buffer: [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &UpdateBiasDesc,
    args: UpdateBiasArgs<'_>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let counts = scope.read("counts", args.counts, desc.experts, SCALAR)?;
    let bias = scope.write("correction_bias", args.correction_bias, desc.experts, SCALAR)?;
    scope.launch(
        &selection,
        UpdateBiasParams {
            correction_bias: bias.address().into(),
            counts: counts.address().into(),
            experts: desc.experts as u32,
            rate: desc.rate,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: UpdateBiasDesc| desc.validate().unwrap_err().argument().unwrap();
        assert_eq!(UpdateBiasDesc::new(4096, -0.001).validate(), Ok(()));
        assert_eq!(fault(UpdateBiasDesc::new(0, 0.001)), "experts");
        assert_eq!(fault(UpdateBiasDesc::new(8, f32::NAN)), "rate");
        assert_eq!(fault(UpdateBiasDesc::new(8, f32::INFINITY)), "rate");
    }
}
