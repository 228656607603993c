//! Whole layers on the device against a computation in f64 that knows neither slots nor tiles: token by token, expert by
//! expert.

#[path = "layer/composition.rs"]
mod composition;
#[path = "layer/decode.rs"]
mod decode;
mod support;
#[path = "layer/token_sums.rs"]
mod token_sums;

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp, SharedDesc, Weighting};
use moe_kernels::rules::{Activation, Capacity, Gating, Glu, GroupScore, Groups, Layout, Score, Swiglu};
use support::layer_case::{Case, Device, check, open};

fn mixtral(dtype: Dtype) -> LayerDesc {
    LayerDesc::new(dtype, 64, 96, 8, 2)
}

/// Softmax, renormalised, SwiGLU; enough tokens for several blocks in every stage.
#[test]
fn mixtral_bf16() {
    check::<bf16, bf16>(&Case::new(mixtral(Dtype::Bf16), 150));
}

#[test]
fn mixtral_f16() {
    check::<f16, f16>(&Case::new(mixtral(Dtype::F16), 33));
}

#[test]
fn mixtral_f32() {
    check::<f32, f32>(&Case::new(mixtral(Dtype::F32), 33));
}

/// 60 experts as in Qwen2-MoE, in groups ranked by their best (DeepSeek-V2); weights as they are.
#[test]
fn sixty_experts_f32_router() {
    let groups = Groups::new(6, 2).score(GroupScore::Max);
    let desc = LayerDesc::new(Dtype::Bf16, 72, 40, 60, 4)
        .router_dtype(Dtype::F32)
        .gating(Gating::new(Score::Softmax).groups(Some(groups)));
    check::<bf16, f32>(&Case::new(desc, 37));
}

/// DeepSeek-V3: sigmoid with correction bias, groups, scale, a shared expert.
#[test]
fn deepseek() {
    let gating = Gating::new(Score::Sigmoid).renormalised().scale(2.5).groups(Some(Groups::new(4, 2)));
    let desc = LayerDesc::new(Dtype::F16, 64, 48, 16, 3)
        .gating(gating)
        .router_dtype(Dtype::F32)
        .shared(Some(SharedDesc::new(56, Mlp::swiglu(Dtype::F16))));
    check::<f16, f32>(&Case { correction_bias: true, ..Case::new(desc, 29) });
}

/// gpt-oss: softmax over the chosen, clamped SwiGLU on interleaved transposed weights, biases everywhere.
#[test]
fn gpt_oss() {
    let activation = Activation::Swiglu(Swiglu::clamped(0.25).alpha(1.702).offset(1.0));
    let desc = LayerDesc::new(Dtype::Bf16, 72, 72, 12, 4)
        .gating(Gating::new(Score::TopkSoftmax))
        .mlp(Mlp::gpt_oss(Dtype::Bf16).activation(activation));
    check::<bf16, bf16>(&Case { router_bias: true, expert_bias: true, ..Case::new(desc, 40) });
}

fn switch(padded: bool) -> LayerDesc {
    LayerDesc::new(Dtype::F32, 64, 80, 5, 1)
        .gating(Gating::new(Score::Softmax))
        .mlp(Mlp::relu(Dtype::F32))
        .capacity(Some(Capacity::new(3, 16).padded(padded)))
}

/// Switch: one expert, limited slots per sequence; the last sequence is shorter. A residual goes round the layer.
#[test]
fn switch_with_capacity() {
    check::<f32, f32>(&Case { residual: true, ..Case::new(switch(false), 50) });
}

#[test]
fn switch_padded() {
    check::<f32, f32>(&Case::new(switch(true), 50));
}

/// Llama 4: the sigmoid of the one chosen logit scales the expert's input; transposed weights, a shared expert.
#[test]
fn llama4() {
    let plain = Mlp::swiglu(Dtype::Bf16);
    let mlp = plain.gate_up(plain.gate_up.layout(Layout::Kn)).down(plain.down.layout(Layout::Kn));
    let desc = LayerDesc::new(Dtype::Bf16, 64, 96, 8, 1)
        .gating(Gating::new(Score::Sigmoid))
        .weighting(Weighting::Input)
        .mlp(mlp)
        .shared(Some(SharedDesc::new(104, plain)));
    check::<bf16, bf16>(&Case { residual: true, ..Case::new(desc, 20) });
}

#[test]
fn gelu_glu_and_plain_gelu_tanh() {
    let plain = Mlp::swiglu(Dtype::F32);
    let mlp = plain.activation(Activation::Gelu);
    check::<f32, f32>(&Case::new(mixtral(Dtype::F32).mlp(mlp), 9));
    let mlp = plain.gate_up(plain.gate_up.glu(Glu::None)).activation(Activation::GeluTanh);
    check::<f32, f32>(&Case { expert_bias: true, ..Case::new(mixtral(Dtype::F32).mlp(mlp), 9) });
}

/// Widths that a model split over ranks has; a shared expert as wide as the others.
#[test]
fn widths_of_split_models() {
    for (hidden, intermediate) in [(511, 12), (12, 511), (100, 133), (170, 341), (682, 100), (64, 341), (133, 64)] {
        let desc = |dtype| {
            let plain = LayerDesc::new(dtype, hidden, intermediate, 5, 2);
            plain.shared(Some(SharedDesc::new(intermediate, plain.mlp)))
        };
        check::<bf16, bf16>(&Case { expert_bias: true, ..Case::new(desc(Dtype::Bf16), 19) });
        check::<f16, f32>(&Case { residual: true, ..Case::new(desc(Dtype::F16).router_dtype(Dtype::F32), 3) });
        check::<f32, f32>(&Case { router_bias: true, ..Case::new(desc(Dtype::F32), 11) });
    }
}

#[test]
fn one_token_and_one_expert() {
    check::<bf16, bf16>(&Case::new(mixtral(Dtype::Bf16), 1));
    check::<bf16, bf16>(&Case::new(LayerDesc::new(Dtype::Bf16, 8, 8, 1, 1), 3));
}

/// More choices than a warp has lanes.
#[test]
fn forty_experts_a_token() {
    check::<f32, f32>(&Case::new(LayerDesc::new(Dtype::F32, 16, 8, 48, 40), 7));
    let gating = Gating::new(Score::Sigmoid).renormalised();
    let desc = LayerDesc::new(Dtype::F32, 16, 8, 70, 64).gating(gating);
    check::<f32, f32>(&Case { correction_bias: true, ..Case::new(desc, 5) });
}

/// No tokens: counts are zero, nothing is launched.
#[test]
fn no_tokens() {
    check::<bf16, bf16>(&Case::new(mixtral(Dtype::Bf16), 0));
    check::<f32, f32>(&Case::new(switch(true), 0));
}

/// One workspace serves plans of different sizes, one after the other.
#[test]
fn workspace_is_shared_by_plans() {
    let device: &Device = open();
    let mut workspace = None;
    for tokens in [150, 1, 40] {
        support::layer_case::run::<bf16, bf16>(device, &Case::new(mixtral(Dtype::Bf16), tokens), &mut workspace);
    }
}

/// A captured layer gives the same bits, whatever the workspace held.
#[test]
fn captured_in_a_graph() {
    support::layer_case::captured(&Case::new(mixtral(Dtype::Bf16), 70));
}

/// Enough rows an expert that a Hopper device takes its own kernels (wgmma), with a shared expert's rows in their launches; on other devices the
/// same layer on theirs. `batch_invariant` keeps to the one set that every batch has.
#[test]
fn many_rows_an_expert() {
    let desc = LayerDesc::new(Dtype::Bf16, 256, 256, 2, 1).shared(Some(SharedDesc::new(256, Mlp::swiglu(Dtype::Bf16))));
    let device = open().kernels.device();
    let own = |desc: LayerDesc| {
        let plan = desc.plan(2600, device).unwrap();
        plan.kernels().filter(|kernel| kernel.name().ends_with("_sm90a")).count()
    };
    let is_hopper = device.compute_capability == (9, 0);
    assert_eq!(own(desc) > 0, is_hopper);
    assert_eq!(own(desc.batch_invariant(true)), 0);
    let case = Case { expert_bias: true, ..Case::new(desc, 2600) };
    check::<bf16, bf16>(&case);
    // Their tensor maps lie in the parameters: a graph has copies of its own.
    support::layer_case::captured(&case);
}
