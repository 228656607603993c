//! Plans are pure: what they choose is checked without a device.

use super::*;
use crate::DeviceInfo;
use crate::registry::Kernel;
use crate::rules::{
    Activation, AdmissionRule, BalanceRule, Capacity, Dtype, IdFormat, LossCounts, LossScore, NullExperts, Order,
    RmsNorm, SecondExpert, Sequences,
};
use crate::runtime::device::{A100, H100};

fn mixtral() -> LayerDesc {
    LayerDesc::new(Dtype::Bf16, 4096, 14336, 8, 2)
}

fn with_everything() -> LayerDesc {
    mixtral()
        .weighting(Weighting::Input)
        .capacity(Some(Capacity { per_expert: 8, tokens_per_sequence: 16, padded: true }))
        .shared(Some(SharedDesc::new(1024, Mlp::swiglu(Dtype::Bf16))))
}

/// A shared expert like the others.
fn with_alike() -> LayerDesc {
    mixtral().shared(Some(SharedDesc::new(14336, Mlp::swiglu(Dtype::Bf16))))
}

fn in_many_steps() -> LayerDesc {
    let admission = AdmissionRule {
        experts: 8,
        candidates: 3,
        top_k: 2,
        capacity: 4,
        tokens_per_group: 16,
        groups: Sequences::Following,
        order: Order::ByChoice,
        prioritised: false,
        second: SecondExpert::Always,
        renormalise: None,
    };
    let measure = BalanceRule {
        score: LossScore::Softmax,
        tokens_per_sequence: 64,
        counts: LossCounts::Choice,
        sequences: Sequences::Following,
        capacity: None,
    };
    with_everything().admission(Some(admission)).measure(Some(measure)).map(Some(MapDesc::new(4)))
}

#[test]
fn five_launches_seven_with_a_shared_expert_of_another_form() {
    assert_eq!(mixtral().plan(640, &A100).unwrap().launches(), 5);
    assert_eq!(with_everything().plan(640, &A100).unwrap().launches(), 7);
    assert_eq!(with_alike().plan(640, &A100).unwrap().launches(), 5);
    assert_eq!(mixtral().plan(0, &A100).unwrap().launches(), 0);
    assert_eq!(in_many_steps().plan(64, &A100).unwrap().launches(), 10, "router, gate, admission, map, dispatch first");
}

#[test]
fn three_launches_for_few_tokens() {
    let launches = |desc: LayerDesc, tokens: usize| desc.plan(tokens, &H100).unwrap().launches();
    assert_eq!([1, 8, 9, 64].map(|tokens| launches(mixtral(), tokens)), [3, 3, 4, 4]);
    assert_eq!([1, 8, 9, 33].map(|tokens| launches(with_alike(), tokens)), [3, 3, 4, 4]);
    // Logits and choices from elsewhere.
    let plan = mixtral().plan(1, &H100).unwrap();
    assert_eq!([plan.stages_of_logits().count(), plan.stages_of_choices().count()], [3, 3]);
    // Something between the products and the sum, or beside it.
    assert_eq!(launches(mixtral().null(Some(NullExperts::identity(1))), 1), 4);
    assert_eq!(launches(mixtral().norms(Norms::new().slots(Some(RmsNorm::new(0.0)))), 1), 5);
    assert_eq!(launches(mixtral().batch_invariant(true), 1), 5);
}

#[test]
fn without_cooperative_launches_gating_and_dispatch_are_two() {
    let plain = DeviceInfo { cooperative_launch: false, ..A100 };
    let plan = mixtral().plan(4096, &plain).unwrap();
    let stages: Vec<_> = plan.stages().map(|(stage, _)| stage).collect();
    assert_eq!(stages[..3], [Stage::Router, Stage::Gate, Stage::Dispatch]);
    assert!(plan.stages().all(|(_, selection)| !selection.cooperative));
}

#[test]
fn both_products_follow_the_dispatch() {
    let plan = mixtral().plan(4096, &A100).unwrap();
    assert_eq!(plan.tile_m(), 128);
    let heights: Vec<_> = plan
        .kernels()
        .filter_map(|kernel| match kernel.variant() {
            Kernel::Gemm(gemm) => Some(gemm.tile.bm),
            _ => None,
        })
        .collect();
    assert_eq!(heights, [128, 128]);
    assert_eq!(mixtral().plan(1, &A100).unwrap().tile_m(), 16);
}

/// The input that was found: E 256, k 6 needed less at 683 tokens than at 682.
#[test]
fn a_workspace_for_the_largest_batch_serves_all() {
    let small = LayerDesc::new(Dtype::Bf16, 8, 8, 256, 6);
    for device in [&A100, &H100, &DeviceInfo { cooperative_launch: false, ..A100 }] {
        for desc in [small, mixtral(), with_everything(), with_alike(), in_many_steps()] {
            let bytes = |tokens: usize| desc.plan(tokens, device).unwrap().workspace_bytes();
            let mut most = 0;
            for tokens in (0..1500).chain((1500..60_000).step_by(977)) {
                let needed = bytes(tokens);
                assert!(needed >= most, "{tokens} tokens need {needed} bytes, fewer needed {most}");
                most = needed;
            }
        }
    }
    let bytes = |tokens: usize| small.plan(tokens, &A100).unwrap().workspace_bytes();
    assert!(bytes(683) >= bytes(682));
}

#[test]
fn a_choice_without_regard_to_the_batch_has_one_router() {
    // Of f32, whose kernels add in orders of their own; those of 16 bits have one order.
    let desc = LayerDesc::new(Dtype::F32, 2048, 768, 64, 8).batch_invariant(true);
    let router = |tokens: usize| desc.plan(tokens, &A100).unwrap().kernels().next().unwrap();
    for tokens in [1, 2, 64, 1056, 1057, 40_000] {
        assert_eq!(router(tokens), router(1), "{tokens} tokens");
    }
}

#[test]
fn null_experts_cost_no_launch_and_stand_alone() {
    let identity = mixtral().null(Some(NullExperts::identity(3)));
    let plan = identity.plan(64, &A100).unwrap();
    assert_eq!((plan.launches(), plan.experts().rows().experts), (5, 5));
    let fault = |desc: LayerDesc| desc.plan(1, &A100).unwrap_err().argument().unwrap();
    assert_eq!(fault(mixtral().null(Some(NullExperts::zero(8)))), "null.count");
    assert_eq!(fault(identity.map(Some(MapDesc::new(2)))), "map");
    assert_eq!(fault(identity.admission(in_many_steps().admission)), "admission");
    for null in [NullExperts::zero(3), NullExperts::identity(3)] {
        assert!(mixtral().null(Some(null)).choices(IdFormat::I64).plan(1, &A100).is_ok());
    }
}

#[test]
fn faults_name_their_field() {
    let error = |desc: LayerDesc, tokens| desc.plan(tokens, &A100).unwrap_err();
    let fault = |change: &dyn Fn(&mut LayerDesc), tokens| {
        let mut desc = mixtral();
        change(&mut desc);
        error(desc, tokens).argument().unwrap()
    };
    assert_eq!(fault(&|d| d.hidden = 0, 1), "hidden");
    assert_eq!(fault(&|d| d.intermediate = 0, 1), "intermediate");
    assert_eq!(fault(&|d| d.top_k = 9, 1), "top_k");
    // Nothing is computed with sizes past all limits.
    for many in [1 << 31, 1 << 40, usize::MAX] {
        assert_eq!(fault(&|d| d.hidden = many, 1), "hidden");
        assert_eq!(fault(&|d| d.intermediate = many, 100), "intermediate");
        assert_eq!(fault(&|d| d.top_k = many, 100), "top_k");
        let shared = SharedDesc::new(many, Mlp::swiglu(Dtype::Bf16));
        assert_eq!(fault(&|d| d.shared = Some(shared), 100), "shared.intermediate");
    }
    assert_eq!(fault(&|d| d.experts = 0, 1), "experts");
    assert_eq!(fault(&|d| d.router_dtype = Dtype::F16, 1), "weight");
    assert_eq!(fault(&|_| (), usize::MAX), "tokens");
    assert_eq!(fault(&|_| (), 1 << 30), "token_slot");
    assert_eq!(fault(&|d| d.mlp.activation = Activation::Identity, 1), "mlp.activation");
    assert_eq!(fault(&|d| d.shared = Some(SharedDesc::new(0, Mlp::swiglu(Dtype::Bf16))), 1), "shared.intermediate");
    assert_eq!(fault(&|d| d.map = Some(MapDesc::new(0)), 1), "experts");
    assert_eq!(fault(&|d| (d.admission, d.top_k) = (in_many_steps().admission, 1), 1), "admission");
    assert_eq!(fault(&|d| d.routed_scale = f32::NAN, 1), "routed_scale");
    let shared = SharedDesc::new(8, Mlp::swiglu(Dtype::Bf16)).scale(f32::INFINITY);
    assert_eq!(fault(&|d| d.shared = Some(shared), 1), "shared.scale");
    let wrong = Activation::Swiglu(crate::rules::Swiglu::clamped(-1.0));
    assert_eq!(fault(&|d| d.mlp.activation = wrong, 1), "mlp.activation");
    assert_eq!(fault(&|d| d.shared = Some(shared.scale(1.0).mlp(d.mlp.activation(wrong))), 1), "shared.mlp.activation");
    let text = error(LayerDesc::new(Dtype::Bf16, 64, 64, 8, 9), 1).to_string();
    assert!(text.starts_with("layer: `top_k` is 9"), "an error of a layer names the layer: {text}");
}

/// A list of arguments may be lent for a shorter time: a mask that lives in a closure does not force all of it into there. That this compiles is the test.
#[test]
fn arguments_may_be_lent_for_a_shorter_time() {
    fn forward<'b>(args: LayerArgs<'static, f32>) -> LayerArgs<'b, f32> {
        args
    }
    fn back<'b>(args: BackwardArgs<'static, f32>) -> BackwardArgs<'b, f32> {
        args
    }
    let _ = (forward, back);
}
