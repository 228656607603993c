//! Batches of no tokens, as SGLang's users had them (#38773), on the ways back: no error, nothing written by token, zeros in what is summed up over
//! tokens.

use cudarc::driver::CudaSlice;
use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::experts::activation_backward::{self, ActivationBackwardArgs, ActivationBackwardDesc};
use moe_kernels::experts::column_products::{self, ColumnProductsDesc};
use moe_kernels::experts::rms_norm_backward::{self, Gradient, RmsNormBackwardArgs, RmsNormBackwardDesc};
use moe_kernels::layer::LayerDesc;
use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
use moe_kernels::routers::noisy::NoisyLogits;
use moe_kernels::routers::noisy_backward::{self, NoisyBackwardArgs, NoisyBackwardDesc, NoisyGradients};
use moe_kernels::rules::{Activation, Gating, NoiseSource, NoisyRule, RmsNorm, Score};

use crate::calls::{self, Chosen, Experts, up};
use crate::suite::Section;
use crate::support::device;

/// What a buffer holds that nothing writes.
const KEPT: [f32; 8] = [7.5; 8];

pub fn batches() -> Section {
    let mut section = Section::new("no tokens");
    section.point("gating", || {
        assert!(calls::gate_backward(&[], [4, 2], (&[], &[]), Gating::new(Score::Softmax), None).is_empty());
    });
    section.point("noisy gating", || {
        let (kernels, stream) = (device::kernels(), device::stream());
        let rule = NoisyRule::new(2, NoiseSource::new(1, 2));
        let mut desc = NoisyBackwardDesc::new(0, 4, rule);
        (desc.importance, desc.load) = (0.1, 0.1);
        let (logits, ids, sums) = (up(&stream, &KEPT), up(&stream, &[0i32; 8]), up(&stream, &[1f32; 4]));
        let (mut clean, mut raw) = (up(&stream, &KEPT), up(&stream, &KEPT));
        let logits = NoisyLogits::Apart { clean: (&logits).into(), raw: (&logits).into() };
        let to = NoisyGradients::Apart { clean: (&mut clean).into(), raw: (&mut raw).into() };
        let args = NoisyBackwardArgs::new(logits, &ids, &sums, to).importance(&sums).load(&sums);
        noisy_backward::forward(kernels, &stream, &desc, args).unwrap();
        assert_eq!([read(&clean), read(&raw)], [KEPT; 2]);
    });
    section.point("jitter", || {
        let (kernels, stream) = (device::kernels(), device::stream());
        let mut x = up(&stream, &KEPT);
        let desc = JitterDesc::new(Dtype::F32, 0, 0.5, NoiseSource::new(1, 2));
        jitter::forward(kernels, &stream, &desc, JitterArgs::in_place(&mut x)).unwrap();
        assert_eq!(read(&x), KEPT);
    });
    section.point("RMS norm", || {
        let (kernels, stream) = (device::kernels(), device::stream());
        let desc = RmsNormBackwardDesc::new(Dtype::F32, 0, 8, RmsNorm::new(1e-6));
        let (x, mut dx) = (up(&stream, &KEPT), up(&stream, &KEPT));
        let (mut d_weight, mut factors) = (up(&stream, &KEPT), up(&stream, &KEPT));
        let mut args = RmsNormBackwardArgs::new(&x, Gradient::from(&x), &mut dx).weight(&x);
        (args.d_weight, args.factors) = (Some((&mut d_weight).into()), Some((&mut factors).into()));
        rms_norm_backward::backward(kernels, &stream, &desc, args).unwrap();
        assert_eq!((read(&dx), read(&d_weight)), (KEPT, [0.0; 8]));
        let mut sums = up(&stream, &KEPT);
        let desc = ColumnProductsDesc::new(Dtype::F32, 0, 8);
        column_products::sum::<f32>(kernels, &stream, &desc, &x, Gradient::from(&x), &mut sums).unwrap();
        assert_eq!(read(&sums), [0.0; 8]);
    });
    section.point("activation", || {
        let (kernels, stream) = (device::kernels(), device::stream());
        let (x, mut d) = (up(&stream, &KEPT), up(&stream, &KEPT));
        let desc = ActivationBackwardDesc::new(Dtype::F32, 0, 4, Activation::Silu);
        activation_backward::forward(kernels, &stream, &desc, ActivationBackwardArgs::new(&x, &x, &mut d)).unwrap();
        assert_eq!(read(&d), KEPT);
    });
    section.point("layer", || {
        let (hidden, inner, experts) = (16, 8, 3);
        let (gate_up, down) =
            (vec![bf16::ONE; experts * 2 * inner * hidden], vec![bf16::ONE; experts * hidden * inner]);
        let layer = Experts {
            desc: LayerDesc::new(Dtype::Bf16, hidden, inner, experts, 2),
            x: &[],
            chosen: &Chosen { ids: vec![], weights: vec![] },
            gate_up: &gate_up,
            gate_up_bias: None,
            down: &down,
            down_bias: None,
            map: None,
        };
        let got = layer.gradients(&[]);
        assert!(got.x.is_empty() && got.weights.is_empty());
        assert!(got.gate_up.iter().chain(&got.down).all(|&d| d == 0.0));
    });
    section
}

fn read(buffer: &CudaSlice<f32>) -> [f32; 8] {
    calls::down(&device::stream(), buffer, 8).try_into().expect("eight numbers")
}
