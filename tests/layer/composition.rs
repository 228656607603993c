//! What families put between and around an expert's matrices, each in a whole layer.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp, SharedDesc};
use moe_kernels::rules::{
    Activation, Bound, Capacity, Gating, Glu, Layout, NullExperts, Score, Swiglu, WeightDesc, Weighting,
};

use crate::support::device;
use crate::support::layer_case::{Case, check};

/// Limits that values of these layers meet.
const LIMIT: f32 = 0.3;

fn sigmoid(dtype: Dtype) -> LayerDesc {
    let gating = Gating::new(Score::Sigmoid).renormalised().scale(1.5);
    LayerDesc::new(dtype, 64, 48, 12, 3).gating(gating)
}

fn unit(dtype: Dtype, unit: Swiglu) -> Mlp {
    Mlp::swiglu(dtype).activation(unit.into())
}

fn launches(desc: &LayerDesc) -> usize {
    desc.plan(19, device::kernels().device()).unwrap().launches()
}

/// Hunyuan 4: routed experts clamp, the shared one does not, and has its place in their launches all the same.
#[test]
fn a_shared_expert_without_the_others_clamp() {
    let dtype = Dtype::Bf16;
    let desc =
        sigmoid(dtype).mlp(unit(dtype, Swiglu::clamped(LIMIT))).shared(Some(SharedDesc::new(48, Mlp::swiglu(dtype))));
    assert_eq!(launches(&desc), 4);
    check::<bf16, bf16>(&Case { correction_bias: true, ..Case::new(desc, 19) });
    let turned = sigmoid(dtype).shared(Some(SharedDesc::new(48, unit(dtype, Swiglu::clamped(LIMIT)))));
    assert_eq!(launches(&turned), 4);
    check::<bf16, bf16>(&Case::new(turned, 19));
}

/// DeepSeek-V4, GLM-5: both clamp.
#[test]
fn clamped_before_the_silu() {
    let mlp = unit(Dtype::F32, Swiglu::clamped(LIMIT));
    let desc = sigmoid(Dtype::F32).mlp(mlp).shared(Some(SharedDesc::new(48, mlp)));
    check::<f32, f32>(&Case::new(desc, 19));
}

/// Step 3.7: clamped after the SiLU, the shared expert by a limit of its own, a factor of the routed sum.
#[test]
fn clamped_after_the_silu() {
    let of = |limit| unit(Dtype::F16, Swiglu::clamped(limit).clamp_after(true));
    let up_first = of(LIMIT).gate_up(WeightDesc::new(Dtype::F16).glu(Glu::UpFirst));
    for mlp in [of(LIMIT), up_first] {
        let desc = sigmoid(Dtype::F16).mlp(mlp).shared(Some(SharedDesc::new(56, of(0.1)))).routed_scale(2.5);
        check::<f16, f16>(&Case { correction_bias: true, residual: true, ..Case::new(desc, 19) });
    }
}

/// MiniMax-M3: gpt-oss's unit on halves, a shared expert of its own width, a factor of the routed sum.
#[test]
fn gpt_oss_unit_on_halves() {
    let mlp = unit(Dtype::Bf16, Swiglu::GPT_OSS.gate(Bound::Clamp(LIMIT)).up(Bound::Clamp(LIMIT)));
    let desc = sigmoid(Dtype::Bf16).mlp(mlp).shared(Some(SharedDesc::new(80, mlp))).routed_scale(2.0);
    check::<bf16, bf16>(&Case::new(desc, 19));
}

/// Inkling 2, Kimi K3: soft bounds; and numbers of each expert's own.
#[test]
fn softly_capped_and_by_expert() {
    let capped = unit(Dtype::F32, Swiglu::softcapped(0.4, 0.5));
    check::<f32, f32>(&Case::new(sigmoid(Dtype::F32).mlp(capped), 19));
    for unit_of in [Swiglu::softcapped(0.4, 0.5), Swiglu::clamped(LIMIT), Swiglu::clamped(LIMIT).clamp_after(true)] {
        let desc = sigmoid(Dtype::F32).mlp(unit(Dtype::F32, unit_of));
        check::<f32, f32>(&Case { by_expert: true, ..Case::new(desc, 19) });
        // A shared expert in the same launch has the descriptor's numbers.
        let desc = desc.shared(Some(SharedDesc::new(48, desc.mlp)));
        assert_eq!(launches(&desc), 5);
        check::<f32, f32>(&Case { by_expert: true, expert_bias: true, ..Case::new(desc, 19) });
    }
}

/// Nemotron-H: relu squared, no gate, a shared expert of the same form and its own width.
#[test]
fn relu_squared() {
    let mlp = Mlp::relu(Dtype::Bf16).activation(Activation::ReluSquared);
    let desc = sigmoid(Dtype::Bf16).mlp(mlp).shared(Some(SharedDesc::new(104, mlp)));
    check::<bf16, bf16>(&Case { correction_bias: true, ..Case::new(desc, 19) });
}

/// NLLB's inner form: ReLU with biases; ViTPose's: GELU.
#[test]
fn ungated_with_biases() {
    for activation in [Activation::Relu, Activation::Gelu] {
        let mlp = Mlp::relu(Dtype::F32).activation(activation);
        check::<f32, f32>(&Case { expert_bias: true, ..Case::new(sigmoid(Dtype::F32).mlp(mlp), 19) });
    }
}

/// Cohere 2: the mean of routed and shared experts; and a gated shared expert with a factor.
#[test]
fn factors_of_both_parts() {
    let shared = SharedDesc::new(48, Mlp::swiglu(Dtype::Bf16)).scale(0.5);
    let desc = sigmoid(Dtype::Bf16).gating(Gating::new(Score::TopkSoftmax)).routed_scale(0.5).shared(Some(shared));
    check::<bf16, bf16>(&Case::new(desc, 19));
    check::<bf16, bf16>(&Case::new(desc.shared(Some(shared.gated(true).scale(-2.0))), 19));
}

/// JetMoE: a vector is added to the sum.
#[test]
fn a_vector_on_the_sum() {
    let desc = LayerDesc::new(Dtype::F16, 72, 40, 8, 2).gating(Gating::new(Score::TopkSoftmax)).routed_scale(0.5);
    check::<f16, f16>(&Case { bias: true, residual: true, ..Case::new(desc, 19) });
    let shared = SharedDesc::new(40, Mlp::swiglu(Dtype::F16)).gated(true);
    check::<f16, f16>(&Case { bias: true, ..Case::new(desc.shared(Some(shared)), 19) });
}

/// Each of the three, in each form of weights, beside a shared expert, which none of them weighs.
#[test]
fn weights_on_input_activation_and_output() {
    let transposed = WeightDesc::new(Dtype::F32).layout(Layout::Kn);
    let kn = Mlp::swiglu(Dtype::F32).gate_up(transposed.glu(Glu::Interleaved)).down(transposed);
    let capped = Activation::Swiglu(Swiglu::softcapped(0.4, 0.5).offset(0.5));
    for weighting in [Weighting::Input, Weighting::Activation, Weighting::Output] {
        for mlp in [Mlp::swiglu(Dtype::F32), Mlp::relu(Dtype::F32), kn.activation(capped)] {
            for width in [48, 24] {
                let shared = Some(SharedDesc::new(width, mlp));
                let desc = sigmoid(Dtype::F32).weighting(weighting).mlp(mlp).shared(shared).routed_scale(1.5);
                check::<f32, f32>(&Case { expert_bias: width == 24, ..Case::new(desc, 11) });
            }
        }
    }
}

/// LongCat-Flash's experts that pass a token on, ZAYA's that skip it: no launch more than without them.
#[test]
fn experts_that_compute_nothing() {
    let softmax = |scale| Gating::new(Score::Softmax).scale(scale);
    for null in [NullExperts::identity(5), NullExperts::zero(1), NullExperts::identity(1), NullExperts::zero(11)] {
        let desc = sigmoid(Dtype::F32).gating(softmax(6.0)).null(Some(null));
        assert_eq!(launches(&desc), 5);
        check::<f32, f32>(&Case { correction_bias: true, ..Case::new(desc, 70) });
        let one = LayerDesc::new(Dtype::F32, 64, 48, 12, 1).gating(softmax(1.0)).null(Some(null));
        let one = one.shared(Some(SharedDesc::new(24, desc.mlp))).routed_scale(0.5);
        check::<f32, f32>(&Case { residual: true, ..Case::new(one, 33) });
        let limited = desc.capacity(Some(Capacity::new(4, 16))).weighting(Weighting::Input);
        check::<f32, f32>(&Case::new(limited, 50));
    }
    // More experts than a lane holds, of which most compute nothing.
    let many = LayerDesc::new(Dtype::Bf16, 32, 16, 300, 12).gating(softmax(6.0)).null(Some(NullExperts::identity(200)));
    check::<bf16, bf16>(&Case::new(many, 40));
}
