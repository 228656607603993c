//! What a layer hands to its gating's way back: the same bits as the operation by itself.

use moe_kernels::Dtype;
use moe_kernels::layer::{BackwardDesc, LayerDesc};
use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use moe_kernels::rules::{Capacity, Gating, LossGradient, LossScore, Score};

use crate::case::{Case, Problem};

const TOKENS: usize = 61;

#[test]
fn every_loss() {
    let losses = LossGradient::new(LossScore::Softmax).balance(0.4).z(0.3).importance(0.2).sequence(0.1);
    let losses = losses.tokens_per_sequence(20);
    let gating = Gating::new(Score::Softmax).scale(1.5);
    let capacity = Some(Capacity::new(12, TOKENS));
    let desc = LayerDesc::new(Dtype::F32, 40, 24, 6, 2).gating(gating).capacity(capacity);
    let mut problem = Problem::<f32, f32>::new(Case::new(desc, TOKENS).back(BackwardDesc::new().losses(Some(losses))));
    problem.forward();
    let (stream, kernels) = (&problem.stream, problem.kernels);
    let counts = problem.loss_counts();
    let importance = stream.clone_htod(&[3.0_f32, 9.0, 1.0, 4.0, 7.0, 2.0]).unwrap();
    let sequence_counts = stream.clone_htod(&(0..24).map(|i| i * 7 % 11).collect::<Vec<i32>>()).unwrap();
    let sequence_tokens = stream.clone_htod(&[20_u32, 19, 20, 1]).unwrap();
    let counted = stream.clone_htod(&[55_u32]).unwrap();

    let mut buffers = problem.buffers::<f32>();
    {
        let args = problem.args(problem.gradients(&mut buffers)).loss_counts(&counts).counted(&counted);
        let args = args.importance(&importance).sequence_counts(&sequence_counts).sequence_tokens(&sequence_tokens);
        problem.enqueue(args).unwrap();
    }
    let found = problem.found(&buffers);
    let of = |name: &str| found.iter().find(|(known, _)| *known == name).unwrap().1.clone();
    let d_weights: Vec<f32> = of("weights").into_iter().map(|value| value as f32).collect();
    let d_weights = stream.clone_htod(&d_weights).unwrap();

    let alone = GatingBackwardDesc::new(TOKENS, 6, 2, gating).losses(Some(losses));
    let mut d_logits = stream.alloc_zeros::<f32>(TOKENS * 6).unwrap();
    let args = GatingBackwardArgs::new(problem.saved.logits(), problem.saved.ids(), &d_weights, &mut d_logits);
    let args = args.counts(&counts).counted(&counted).importance(&importance);
    let args = args.sequence_counts(&sequence_counts).sequence_tokens(&sequence_tokens);
    gating_backward::forward(kernels, stream, &alone, args).unwrap();
    let want = stream.clone_dtoh(&d_logits).unwrap();
    assert!(want.iter().all(|value| value.is_finite() && *value != 0.0));
    let got: Vec<u32> = of("logits").iter().map(|&value| (value as f32).to_bits()).collect();
    assert!(got == want.iter().map(|value| value.to_bits()).collect::<Vec<_>>());
}
