//! The reference against the recorded outputs of the models' own code: it is only an oracle if it reproduces them.

#[allow(dead_code)] // its part of the one table
#[path = "support/compare.rs"]
mod compare;
#[path = "support/data.rs"]
mod data;
#[path = "../examples/hf_layer/hf/mod.rs"]
mod hf;

use compare::{RECORDED, RECORDED_WEIGHT};
use hf::checkpoint::Checkpoint;
use hf::config::Config;
use hf::families;
use hf::golden::{Golden, run_reference};
use hf::load::load;
use hf::report::relative_error;

fn check(family: &str) {
    let folder = data::path("golden").join(family);
    let config = Config::open(&folder).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let golden = Golden::open(&folder).unwrap();
    let block = families::of(&config).unwrap().locate(&config, &checkpoint, golden.block()).unwrap();
    let weights = load::<f32>(&checkpoint, &block).unwrap();

    let x = golden.x(block.spec.layer.hidden).unwrap();
    let tokens = x.len() / block.spec.layer.hidden;
    let layer = block.spec.desc(tokens);
    let want = golden.expected(&layer, tokens).unwrap();
    let got = run_reference(&layer, &weights, &x).unwrap();

    let close = |name: &str, got: &[f64], want: &[f64]| {
        let error = relative_error(got, want);
        assert!(error <= RECORDED, "{family}: {name}: relative error {error:e}");
    };
    close("y", &got.y, &want.y);
    close("logits", &got.logits, want.logits.as_ref().expect("every family records its logits"));
    let k = layer.top_k;
    let row = |ids: &[i32], weights: &[f64], token: usize| {
        let slots = token * k..(token + 1) * k;
        let mut row: Vec<(i32, f64)> = ids[slots.clone()].iter().copied().zip(weights[slots].iter().copied()).collect();
        if block.spec.unordered {
            row.sort_by_key(|&(id, _)| id);
        }
        row
    };
    // Switch records the weight of its one expert, not the id.
    let ids = want.ids.as_ref().unwrap_or(&got.ids);
    let weights = want.weights.as_ref().unwrap();
    for token in 0..tokens {
        let (got, want) = (row(&got.ids, &got.weights, token), row(ids, weights, token));
        for ((id, weight), (want_id, want_weight)) in got.iter().zip(&want) {
            assert_eq!(id, want_id, "{family}: token {token}");
            let error = (weight - want_weight).abs() / want_weight.abs();
            assert!(
                error <= RECORDED_WEIGHT,
                "{family}: token {token}, expert {id}: weight {weight} is not {want_weight}"
            );
        }
    }
}

#[test]
fn mixtral() {
    check("mixtral");
}

#[test]
fn qwen3_moe() {
    check("qwen3_moe");
}

#[test]
fn deepseek_v3() {
    check("deepseek_v3");
}

#[test]
fn gpt_oss() {
    check("gpt_oss");
}

#[test]
fn switch_transformers() {
    check("switch_transformers");
}
