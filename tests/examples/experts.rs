//! The feed-forward of experts as a part of `examples/byte_model`: what comes back from the device is the gradient of the whole model's loss.

use std::rc::Rc;

use byte_model::assemble::{Experts, assemble};
use byte_model::config::{Config, Rule};
use byte_model::device::Device;
use byte_model::plain::cross_entropy::{Target, cross_entropy};
use byte_model::plain::model::{Model, Sizes};
use moe_kernels::Dtype;
use moe_kernels::rules::{LossGradient, LossScore};

#[path = "../../examples/byte_model/mod.rs"]
pub mod byte_model;

const SIZES: Sizes = Sizes { hidden: 16, heads: 2, context: 8 };

fn loss(model: &mut Model, bytes: &[u8], next: &[u8]) -> f64 {
    let logits = model.forward(bytes, SIZES.context).unwrap();
    // In f64 from the logits on: the differences are small.
    let rows = logits.chunks_exact(256).zip(next);
    let loss = |(row, &byte): (&[f32], &u8)| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        sum.ln() - f64::from(row[usize::from(byte)])
    };
    rows.map(loss).sum::<f64>() / next.len() as f64
}

/// Each parameter along its own gradient, in f32: by how much the loss changes is the gradient's norm.
#[test]
fn gradients_through_experts() {
    for rule in [Rule::Switch, Rule::Glam, Rule::Mixtral] {
        let config = Config { rule, sparse: true, sizes: SIZES, blocks: 2, intermediate: 16, experts: 4 };
        let losses = LossGradient::new(LossScore::Softmax);
        let device = Rc::new(Device::open().unwrap());
        let experts = Experts { device, dtype: Dtype::F32, losses, frozen: false };
        let rng = &mut fastrand::Rng::with_seed(12);
        let mut model = assemble(&config, Some(&experts), rng).unwrap();
        // Weights so large that experts and router have a say.
        for parameter in model.parameters() {
            if parameter.name.contains("feed_forward") {
                parameter.value.iter_mut().for_each(|value| *value *= 3.0);
            }
        }
        let bytes: Vec<u8> = (0..6 * SIZES.context).map(|_| rng.u8(..8)).collect();
        let next: Vec<u8> = bytes.iter().map(|_| rng.u8(..8)).collect();
        let logits = model.forward(&bytes, SIZES.context).unwrap();
        let gradient = cross_entropy(&logits, &Target::Bytes(&next)).gradient;
        model.backward(&gradient).unwrap();
        for index in 0..model.parameters().len() {
            let parameter = &model.parameters()[index];
            let (name, value, gradient) = (parameter.name.clone(), parameter.value.clone(), parameter.gradient.clone());
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-3, "{rule:?} {name} has hardly a gradient: {norm:e}");
            let mut at = |step: f64| {
                let moved = value.iter().zip(&gradient).map(|(value, g)| value + (step / norm) as f32 * g);
                model.parameters().swap_remove(index).value = moved.collect();
                let loss = loss(&mut model, &bytes, &next);
                model.parameters().swap_remove(index).value = value.clone();
                loss
            };
            // So small that no token of this seed's changes its experts, where the loss jumps.
            let step = 1e-3;
            let slope = (at(step) - at(-step)) / (2.0 * step);
            assert!((slope / norm - 1.0).abs() < 0.02, "{rule:?} {name}: {norm:e}, finite difference {slope:e}");
        }
    }
}
