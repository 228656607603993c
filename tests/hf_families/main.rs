//! Every model family that the example reads: a tiny checkpoint with the hub's names, loaded by the example's code, run on the
//! device and compared with the model's formula, written down a second time in `models`.

#[allow(dead_code)] // its part of the one table
#[path = "../support/compare.rs"]
mod compare;
#[path = "../support/data.rs"]
mod data;
#[path = "../../examples/hf_layer/hf/mod.rs"]
mod hf;

mod configs;
mod errors;
mod files;
mod layouts;
mod models;
mod report;
mod synth;
mod ties;

use compare::{RECORDED, layer};
use hf::Job;
use hf::cli::Options;
use hf::device::{Device, Inputs};
use hf::golden::run_reference;
use hf::report::{Line, relative_error};
use models::{Block, token};
use moe_kernels::Dtype;
use synth::{Folder, Synthetic, checkpoint};

const TOKENS: usize = 9;

fn options(folder: &Folder, dtype: Dtype) -> Options {
    Options { folder: Some(folder.path().to_owned()), tokens: Some(TOKENS), ..Options::own(dtype) }
}

/// The formula on every row of the job.
fn formula(family: &str, synthetic: &Synthetic, x: &[f32]) -> Vec<f64> {
    let block = Block(synthetic, synthetic.block.clone());
    let rows = x.chunks(synth::HIDDEN).map(|row| row.iter().map(|&value| value.into()).collect::<Vec<f64>>());
    rows.flat_map(|row| token(family, &block, &row)).collect()
}

/// The loaded weights, run by the reference, give what the formula gives on the file's tensors.
fn loads(family: &str) {
    let synthetic = checkpoint(family);
    let (single, sharded) = (Folder::new(), Folder::new());
    synthetic.write(&single);
    synthetic.write_sharded(&sharded);
    for folder in [&single, &sharded] {
        let job = Job::prepare(&options(folder, Dtype::F32)).unwrap();
        assert_eq!(job.blocks, [synthetic.block.as_str()], "{family}");
        let block = job.first().unwrap();
        let x = job.x(&block).unwrap();
        let reference = run_reference(&block.load_host(Dtype::F32).unwrap(), &x, &Inputs::default()).unwrap();
        let error = relative_error(&reference.y, &formula(family, &synthetic, &x));
        assert!(error <= RECORDED, "{family}: the reference on the loaded weights is off by {error:e}");
    }
}

/// The device gives the same.
fn runs(family: &str) {
    let synthetic = checkpoint(family);
    let folder = Folder::new();
    synthetic.write(&folder);
    let device = Device::open().unwrap();

    let job = Job::prepare(&options(&folder, Dtype::F32)).unwrap();
    let block = job.first().unwrap();
    let (outputs, lines) = job.check(&device, &block).unwrap();
    assert!(lines.iter().all(Line::passes), "{family} f32: {}", listed(&lines));
    let y: Vec<f64> = outputs.y.iter().map(|&value| value.into()).collect();
    let error = relative_error(&y, &formula(family, &synthetic, &job.x(&block).unwrap()));
    assert!(error <= layer(Dtype::F32), "{family}: the device is off by {error:e}");

    let job = Job::prepare(&options(&folder, Dtype::Bf16)).unwrap();
    let (_, lines) = job.check(&device, &job.first().unwrap()).unwrap();
    assert!(lines.iter().all(Line::passes), "{family} bf16: {}", listed(&lines));
}

fn listed(lines: &[Line]) -> String {
    lines.iter().map(|line| format!("\n  {line}")).collect()
}

macro_rules! families {
    ($($family:ident)*) => {
        mod load {
            $(#[test] fn $family() { super::loads(stringify!($family)); })*
        }

        mod device {
            $(#[test] fn $family() { super::runs(stringify!($family)); })*
        }

        /// What is made here; other families have recorded checkpoints.
        const MADE: &[&str] = &[$(stringify!($family)),*];
    };
}

families! {
    mixtral qwen3_moe olmoe deepseek_v3 glm4_moe gpt_oss switch_transformers llama4 granitemoe minimax_m2 ernie4_5_moe
    hunyuan_v1_moe bailing_hybrid glm4_moe_lite glm_moe_dsa dots3_note exaone_moe kimi_linear hy_v3 flint lara_mini qwen3_omni_moe
    mistral_large4 granitemoe_swa openai_privacy_filter axk1 beam
}

/// Every `model_type` that has rules of its own has a recorded checkpoint or one that is made here.
#[test]
fn none_is_left_out() {
    let recorded: Vec<String> = std::fs::read_dir(data::path("families"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for family in moe_kernels::checkpoint::families() {
        let name = family.names()[0];
        let tested = MADE.contains(&name) || recorded.iter().any(|folder| folder == name);
        assert!(tested, "{name} has no test");
    }
}
