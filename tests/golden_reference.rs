//! The reference against the recorded outputs of the models' own code: it is only an oracle if it reproduces them.

#[allow(dead_code)] // its part of the one table
#[path = "support/compare.rs"]
mod compare;
#[path = "support/data.rs"]
mod data;
#[path = "../examples/hf_layer/hf/mod.rs"]
mod hf;

use compare::{RECORDED, RECORDED_WEIGHT};
use hf::Job;
use hf::cli::Options;
use hf::device::split;
use hf::golden::run_reference;
use hf::report::relative_error;
use moe_kernels::Dtype;

/// Folders of blocks that the reference computes in other pieces.
const APART: &[&str] = &[];

#[test]
fn every_family() {
    for entry in std::fs::read_dir(data::path("families")).unwrap() {
        let folder = entry.unwrap().path();
        let family = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if !APART.contains(&family.as_str()) {
            check(&family, folder);
        }
    }
}

fn check(family: &str, folder: std::path::PathBuf) {
    let options = Options { folder: Some(folder), ..Options::own(Dtype::F32) };
    let job = Job::prepare(&options).unwrap();
    let block = job.first().unwrap();
    let x = job.x(&block).unwrap();
    let layer = *block.desc();
    let tokens = x.len() / layer.hidden;
    let want = job.expected(&block).unwrap().unwrap();
    let inputs = job.inputs(&block, tokens).unwrap();
    let got = run_reference(&block.load_host(Dtype::F32).unwrap(), &x, &inputs).unwrap();

    let close = |name: &str, got: &[f64], want: &[f64]| {
        let error = relative_error(got, want);
        assert!(error <= RECORDED, "{family}: {name}: relative error {error:e}");
    };
    close("y", &got.y, &want.y);
    if let Some(logits) = &want.logits {
        let appended = layer.gating.appended_columns();
        close("logits", &split(&got.logits, block.logit_columns() - appended, appended).0, logits);
    }
    let k = layer.top_k;
    let row = |ids: &[i32], weights: &[f64], token: usize| {
        let slots = token * k..(token + 1) * k;
        let mut row: Vec<(i32, f64)> = ids[slots.clone()].iter().copied().zip(weights[slots].iter().copied()).collect();
        if block.unordered() {
            row.sort_by_key(|&(id, _)| id);
        }
        row
    };
    let Some((ids, weights)) = want.ids.as_ref().zip(want.weights.as_ref()) else { return };
    for token in 0..tokens {
        let (got, want) = (row(&got.ids, &got.weights, token), row(ids, weights, token));
        for ((id, weight), (want_id, want_weight)) in got.iter().zip(&want) {
            assert_eq!(id, want_id, "{family}: token {token}");
            let error = if weight == want_weight { 0.0 } else { (weight - want_weight).abs() / want_weight.abs() };
            assert!(
                error <= RECORDED_WEIGHT,
                "{family}: token {token}, expert {id}: weight {weight} is not {want_weight}"
            );
        }
    }
}
