//! Distils the sparse model that `train_switch --out MODEL` saved into a dense one, as Switch Transformers does (Fedus et al. 2021,
//! section 4.1): the dense model begins with the weights of the teacher that are no expert's, and its target is the next byte to 0.75 and the
//! teacher's distribution to 0.25.
//!
//! `cargo run --release --example distill_switch -- MODEL [--share S] [--text FILE] ...`
//!
//! A dense model of the same form is trained alone for as many steps on the same batches. Prints what share of the sparse model's gain over
//! it the distilled one keeps. As the distilled one goes on from weights that are trained already, the other is then trained once more, in the
//! same way: what that gains needs no teacher.

#[path = "../byte_model/mod.rs"]
mod byte_model;
mod cli;

use std::process::ExitCode;
use std::rc::Rc;

use byte_model::assemble::{Experts, assemble, copy_common};
use byte_model::device::Device;
use byte_model::evaluate::evaluate;
use byte_model::plain::model::Model;
use byte_model::program::{exit, tell};
use byte_model::sample::sample;
use byte_model::text::Text;
use byte_model::train::{Teacher, train};
use byte_model::{Outcome, chart, file, whole_file};
use clap::Parser;
use cli::Options;
use moe_kernels::Dtype;
use moe_kernels::rules::{LossGradient, LossScore};

fn main() -> ExitCode {
    exit(run(&Options::parse()))
}

fn run(options: &Options) -> Outcome<()> {
    let (config, bytes) = file::open(&options.teacher)?;
    let (sizes, common) = (config.sizes, &options.common);
    let text = Text::open(common.text.as_deref(), sizes.context)?;
    let device = Rc::new(Device::open()?);
    println!("device: {}", device.name);
    let losses = LossGradient::new(LossScore::Softmax);
    let experts = Experts { device, dtype: Dtype::Bf16, losses, frozen: true };
    let mut teacher = file::load(&config, &bytes, Some(&experts))?;
    let training = common.training(sizes.context);
    let looks = [training.sequences, training.eval_batches];
    let sparse = evaluate(&mut teacher, &text, looks, sizes.context)?.loss;
    let size = |model: &mut Model| model.parameters().iter().map(|parameter| parameter.value.len()).sum::<usize>();

    let random = || assemble(&config.dense(), None, &mut fastrand::Rng::with_seed(common.seed));
    let mut dense = random()?;
    println!("teacher: {} parameters, held out {sparse:.3}; dense: {}", size(&mut teacher), size(&mut dense));
    println!("\ndense, alone");
    let alone = train("alone", &mut dense, &text, &training, None, &mut tell)?;
    println!("\nthe same once more");
    let again = train("once more", &mut dense, &text, &training, None, &mut tell)?;

    let mut student = random()?;
    let copied = copy_common(&mut student, &mut teacher);
    println!("\ndense, distilled: {copied} of its {} tensors from the teacher", student.parameters().len());
    let lesson = Teacher { model: &mut teacher, share: options.share };
    let distilled = train("distilled", &mut student, &text, &training, Some(lesson), &mut tell)?;

    let base = alone.end().loss;
    let gain = |loss: f64| base - loss;
    println!("\nheld out, nats a byte, and less than the dense model alone");
    for (name, loss) in [
        ("dense, alone", base),
        ("dense, once more", again.end().loss),
        ("dense, distilled", distilled.end().loss),
        ("sparse", sparse),
    ] {
        println!("{name:>18} {loss:.3} {:>7.3}", gain(loss));
    }
    match gain(sparse) > 0.0 {
        true => {
            let kept = 100.0 * gain(distilled.end().loss) / gain(sparse);
            println!("the distilled model has {kept:.0} % of the sparse one's gain");
        }
        false => println!("the sparse model has no gain of which a share could be kept"),
    }

    if let Some(path) = &options.out {
        file::save(path, &config.dense(), &mut student)?;
        println!("{} written", path.display());
    }
    let drawing =
        chart::compared(&[("alone", &alone), ("once more", &again), ("distilled", &distilled)], text.unigram_entropy());
    whole_file::write(&options.svg, drawing.as_bytes())
        .map_err(|error| format!("{}: {error}", options.svg.display()))?;
    println!("{} written", options.svg.display());
    if common.sample > 0 {
        let written = sample(&mut student, sizes.context, common.sample, &mut fastrand::Rng::with_seed(common.seed))?;
        println!("it writes:\n{written}");
    }
    Ok(())
}
