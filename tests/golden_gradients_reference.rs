//! The reference's gradients against those that autograd recorded of the models' own code: they are only an oracle if they reproduce these.

#[allow(dead_code)] // its part of the one table
#[path = "support/compare.rs"]
mod compare;
#[path = "support/data.rs"]
mod data;
#[path = "../examples/hf_layer/hf/mod.rs"]
mod hf;

use compare::RECORDED_GRADIENT;
use hf::Job;
use hf::backward::compare;
use hf::cli::Options;
use hf::grads::GoldenGradients;
use hf::reference::Reference;
use hf::report::Measure;
use moe_kernels::Dtype;

/// Folders whose record is of something else than the block: NLLB's experts get a mask for numbers in the program that recorded it, so that its y and
/// its gradients are of two of its experts alone, whatever the router chose.
const OF_OTHER_FUNCTIONS: &[&str] = &["nllb_moe"];

#[test]
fn every_family() {
    let mut wrong = Vec::new();
    let mut folders: Vec<_> =
        std::fs::read_dir(data::path("families")).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    for folder in folders {
        let family = folder.file_name().unwrap().to_str().unwrap().to_owned();
        if !OF_OTHER_FUNCTIONS.contains(&family.as_str()) {
            wrong.extend(check(&family, folder));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

/// What is wrong.
fn check(family: &str, folder: std::path::PathBuf) -> Vec<String> {
    let golden = GoldenGradients::open(&folder).unwrap();
    let job = Job::prepare(&Options { folder: Some(folder), ..Options::own(Dtype::F32) }).unwrap();
    let block = job.first().unwrap();
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<f64>>();
    let x = wide(job.x(&block).unwrap());
    let hidden = block.desc().hidden;
    let tokens = x.len() / hidden;
    let (inputs, host) = (job.inputs(&block, tokens).unwrap(), block.load_host(Dtype::F32).unwrap());
    let dy = wide(golden.dy(tokens, hidden).unwrap());
    let got = match Reference::new(&host, tokens, &inputs).backward(&x, &dy, &block.places().unwrap()) {
        Ok(got) => got,
        Err(error) => return vec![format!("\n{family}: {error}")],
    };

    let (_, lines) = compare(&got, &golden.recorded().unwrap(), block.name(), Dtype::F32).unwrap();
    let mut wrong = Vec::new();
    for line in lines {
        let Measure::Relative { error, .. } = line.measure else { continue };
        println!("{family} {} {error:.1e}", line.tensor);
        // NaN is not below anything.
        let passes = error <= RECORDED_GRADIENT;
        if !passes {
            wrong.push(format!("\n{family}: {}: relative error {error:e}", line.tensor));
        }
    }
    wrong
}
