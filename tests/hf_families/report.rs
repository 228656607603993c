//! What counts as equal.

use moe_kernels::Dtype;

use crate::hf::device::Outputs;
use crate::hf::golden::Expected;
use crate::hf::report::{Line, compare, relative_error};

fn outputs(ids: &[i32], weights: &[f32], y: &[f32]) -> Outputs {
    Outputs {
        logits: vec![1.0, 2.0],
        router: vec![1.0, 2.0],
        ids: ids.to_vec(),
        weights: weights.to_vec(),
        counts: vec![1, 1],
        y: y.to_vec(),
        extras: Vec::new(),
        stages: Vec::new(),
    }
}

fn verdicts(got: &Outputs, unordered: bool) -> Vec<bool> {
    let want = Expected {
        logits: Some(vec![1.0, 2.0]),
        ids: Some(vec![1, 0]),
        weights: Some(vec![0.75, 0.25]),
        extras: Vec::new(),
        y: vec![3.0, 4.0],
    };
    compare(got, &want, Dtype::F32, 2, unordered).iter().map(Line::passes).collect()
}

#[test]
fn equal_tensors_pass() {
    assert_eq!(verdicts(&outputs(&[1, 0], &[0.75, 0.25], &[3.0, 4.0]), false), [true; 4]);
}

#[test]
fn order_counts_unless_it_is_open() {
    let swapped = outputs(&[0, 1], &[0.25, 0.75], &[3.0, 4.0]);
    assert_eq!(verdicts(&swapped, false), [true, false, false, true]);
    assert_eq!(verdicts(&swapped, true), [true; 4]);
    let unmoved_weights = outputs(&[0, 1], &[0.75, 0.25], &[3.0, 4.0]);
    assert_eq!(verdicts(&unmoved_weights, true), [true, true, false, true]);
}

#[test]
fn nan_and_missing_rows_fail() {
    assert_eq!(verdicts(&outputs(&[1, 0], &[0.75, 0.25], &[3.0, f32::NAN]), false), [true, true, true, false]);
    assert_eq!(verdicts(&outputs(&[1, 0], &[0.75, 0.25], &[3.0]), false), [true, true, true, false]);
    assert!(relative_error(&[1.0], &[0.0]).is_infinite());
    assert_eq!(relative_error(&[0.0], &[0.0]), 0.0);
    assert_eq!(relative_error(&[], &[]), 0.0);
}

#[test]
fn the_error_is_relative_to_the_norm() {
    assert!((relative_error(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-15);
}
