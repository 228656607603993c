//! Layers of a few tokens: three launches, each multiprocessor with a block, and the sums of any number of tokens.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp, SharedDesc, Stage};
use moe_kernels::rules::{Activation, Gating, Score, Swiglu};

use crate::support::layer_case::{self, Case, check, open, run};

const TOKENS: [usize; 8] = [1, 2, 7, 8, 9, 17, 33, 64];

/// The stages of so many tokens.
fn stages(desc: &LayerDesc, tokens: usize) -> Vec<Stage> {
    desc.plan(tokens, open().kernels.device()).unwrap().stages().map(|(stage, _)| stage).collect()
}

const FEW: [Stage; 3] = [Stage::Route, Stage::GateUp, Stage::DownCombine];

/// The second product is deep enough that blocks share its tiles; one workspace serves all numbers of tokens.
#[test]
fn like_mixtral() {
    let desc = LayerDesc::new(Dtype::Bf16, 136, 1096, 8, 2);
    assert_eq!(stages(&desc, 8), FEW);
    assert_eq!(stages(&desc, 9), [Stage::Router, Stage::GateDispatch, Stage::GateUp, Stage::DownCombine]);
    let mut workspace = None;
    for tokens in TOKENS.into_iter().rev() {
        run::<bf16, bf16>(open(), &Case { residual: tokens % 2 == 0, ..Case::new(desc, tokens) }, &mut workspace);
    }
}

#[test]
fn like_qwen3() {
    let desc = LayerDesc::new(Dtype::Bf16, 72, 40, 128, 8);
    assert_eq!(stages(&desc, 1), FEW);
    TOKENS.into_iter().for_each(|tokens| check::<bf16, bf16>(&Case::new(desc, tokens)));
}

/// More experts than one block's counters hold: chosen from what is best of each eight, up to 16 tokens.
#[test]
fn like_sparsely_gated() {
    for score in Score::COMMON {
        let desc = LayerDesc::new(Dtype::Bf16, 16, 16, 1000, 4).mlp(Mlp::relu(Dtype::Bf16)).gating(Gating::new(score));
        assert_eq!(stages(&desc, 16), FEW);
        assert_eq!(stages(&desc, 17)[..2], [Stage::Router, Stage::GateDispatch]);
        let mut workspace = None;
        for tokens in [17, 16, 9, 1] {
            run::<bf16, bf16>(open(), &Case::new(desc, tokens), &mut workspace);
        }
    }
}

/// Biases everywhere, gate and up by turns, transposed experts.
#[test]
fn like_gpt_oss() {
    let activation = Activation::Swiglu(Swiglu::clamped(0.25).alpha(1.702).offset(1.0));
    let desc = LayerDesc::new(Dtype::Bf16, 72, 72, 32, 4)
        .gating(Gating::new(Score::TopkSoftmax))
        .mlp(Mlp::gpt_oss(Dtype::Bf16).activation(activation));
    assert_eq!(stages(&desc, 8), FEW);
    for tokens in TOKENS {
        check::<bf16, bf16>(&Case { router_bias: true, expert_bias: true, ..Case::new(desc, tokens) });
    }
}

/// A shared expert, with a gate and in tiles of the others' launches; in launches of its own the sum has one too.
#[test]
fn with_a_shared_expert() {
    let gating = Gating::new(Score::Sigmoid).renormalised().scale(2.5);
    let desc = LayerDesc::new(Dtype::F16, 64, 48, 40, 6).gating(gating);
    let shared = |width, gated| desc.shared(Some(SharedDesc::new(width, Mlp::swiglu(Dtype::F16)).gated(gated)));
    assert_eq!(stages(&shared(48, true), 3), FEW);
    assert_eq!(stages(&shared(56, false), 3).last(), Some(&Stage::Combine));
    for tokens in [1, 3, 8, 20] {
        for desc in [shared(48, true), shared(48, false), shared(56, true)] {
            check::<f16, f16>(&Case { correction_bias: true, bias: true, residual: true, ..Case::new(desc, tokens) });
        }
    }
}

/// Bits that do not depend on the batch come from the kernels of every batch.
#[test]
fn invariant_of_the_batch() {
    let desc = LayerDesc::new(Dtype::Bf16, 64, 96, 8, 2).batch_invariant(true);
    let plan = desc.plan(1, open().kernels.device()).unwrap();
    assert!(plan.launches() == 5 && !plan.kernels().any(|kernel| kernel.name().contains("swapped")));
    check::<bf16, bf16>(&Case::new(desc, 1));
}

/// Replayed: counters are as each replay needs them.
#[test]
fn captured_in_a_graph() {
    for tokens in [1, 8] {
        layer_case::captured(&Case::new(LayerDesc::new(Dtype::Bf16, 136, 1096, 8, 2), tokens));
    }
}
