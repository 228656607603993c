//! Near ties: a choice that f32 can settle either way is right either way, any other choice is wrong.

use moe_kernels::Dtype;
use moe_kernels::layer::LayerDesc;
use moe_kernels::rules::{Gating, Score};

use crate::hf::device::Outputs;
use crate::hf::golden::settle;
use moe_kernels::reference::gating::gate;

/// One token, whose biased scores are nearly equal for experts 0 and 1, and much lower for 2.
fn expected_ids(chosen: &[i32], gap: f32) -> Vec<i32> {
    let layer = LayerDesc::new(Dtype::F32, 8, 8, 3, 1).gating(Gating::new(Score::Sigmoid));
    let got = Outputs {
        logits: vec![0.0; 3],
        router: vec![0.0; 3],
        ids: chosen.to_vec(),
        weights: vec![0.5],
        counts: vec![0; 3],
        y: vec![0.0; 8],
        extras: Vec::new(),
        stages: Vec::new(),
    };
    let bias = [f64::from(gap), 0.0, -0.25];
    let by = |bias: &[f64]| Ok(gate(&got.router, Some(bias), 3, 1, &layer.gating)?);
    let mut expected = by(&bias).unwrap();
    settle(&mut expected, &bias, 1, &got, by).unwrap();
    assert_eq!(expected.weights, [0.5], "the bias is no part of the weight");
    expected.ids
}

#[test]
fn either_of_two_nearly_equal_experts() {
    assert_eq!(expected_ids(&[0], 2e-7), [0]);
    assert_eq!(expected_ids(&[1], 2e-7), [1]);
}

#[test]
fn nothing_else() {
    assert_eq!(expected_ids(&[1], 1e-5), [0]);
    assert_eq!(expected_ids(&[2], 2e-7), [0]);
    assert_eq!(expected_ids(&[-1], 2e-7), [0]);
    assert_eq!(expected_ids(&[7], 2e-7), [0]);
}
