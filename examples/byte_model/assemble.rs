//! A model from what it is made of.

use std::rc::Rc;

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::rules::LossGradient;

use super::Outcome;
use super::config::Config;
use super::device::Device;
use super::moe::Moe;
use super::plain::dense::Dense;
use super::plain::model::{FeedForward, Model};
use super::plain::parameter::Parameter;

/// How experts are computed and trained.
#[derive(Clone)]
pub struct Experts {
    pub device: Rc<Device>,
    /// bf16 or f32.
    pub dtype: Dtype,
    /// Losses of the router.
    pub losses: LossGradient,
    /// Whether the optimiser leaves their weights as they are.
    pub frozen: bool,
}

/// Random weights.
///
/// # Errors
/// Where a configuration has experts and `experts` is not given, or the layer cannot be.
pub fn assemble(config: &Config, experts: Option<&Experts>, rng: &mut fastrand::Rng) -> Outcome<Model> {
    config.check()?;
    let mut feed_forward = |block: usize| -> Outcome<Box<dyn FeedForward>> {
        let name = format!("blocks.{block}.feed_forward");
        if !config.is_sparse(block) {
            let sizes = [config.sizes.hidden, config.intermediate];
            return Ok(Box::new(Dense::new(&name, sizes, config.rule.unit(), rng)));
        }
        let Experts { device, dtype, losses, frozen } = experts.ok_or("experts need a device")?.clone();
        let desc = config.layer(dtype);
        // Only to have a layer that cannot be refused before anything is drawn for it.
        desc.plan(1, device.kernels.device())?;
        match dtype {
            Dtype::Bf16 => Ok(Box::new(Moe::<bf16>::new(&name, device, desc, losses, frozen, rng))),
            Dtype::F32 => Ok(Box::new(Moe::<f32>::new(&name, device, desc, losses, frozen, rng))),
            other => Err(format!("dtype: expected bf16 or f32, found {other}").into()),
        }
    };
    let feed_forwards = (0..config.blocks).map(&mut feed_forward).collect::<Outcome<_>>()?;
    Ok(Model::new(&config.sizes, feed_forwards, rng))
}

/// Gives each parameter of `model` that `other` has too, by name and extents, the other's value. Returns how many.
pub fn copy_common(model: &mut Model, other: &mut Model) -> usize {
    let others = other.parameters();
    let mut copied = 0;
    for parameter in model.parameters() {
        let same = |other: &&&mut Parameter| other.name == parameter.name && other.shape == parameter.shape;
        if let Some(other) = others.iter().find(same) {
            parameter.value.copy_from_slice(&other.value);
            copied += 1;
        }
    }
    copied
}
