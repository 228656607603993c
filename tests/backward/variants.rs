//! Every form of a layer, against the reference.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::layer::{BackwardDesc, BackwardStage, LayerDesc, Mlp, SharedDesc};
use moe_kernels::registry::Kernel;
use moe_kernels::rules::{
    Activation, Bound, Capacity, Gating, Glu, Layout, LossGradient, LossScore, NullExperts, Renormalise, Score, Swiglu,
    WeightDesc, Weighting,
};

use crate::case::{Case, check, fits};
use crate::device;
use crate::mlp::{PLAIN, bounded_units};

const TOKENS: usize = 37;

fn layer(dtype: Dtype) -> LayerDesc {
    LayerDesc::new(dtype, 40, 24, 6, 2)
}

fn mlp(dtype: Dtype, glu: Glu, [up, down]: [Layout; 2], activation: Activation) -> Mlp {
    let weight = WeightDesc::new(dtype);
    Mlp::swiglu(dtype).gate_up(weight.layout(up).glu(glu)).down(weight.layout(down)).activation(activation)
}

#[test]
fn types() {
    check::<f32, f32, f32>(Case::new(layer(Dtype::F32), TOKENS));
    check::<bf16, bf16, bf16>(Case::new(layer(Dtype::Bf16), TOKENS));
    check::<f16, f16, f16>(Case::new(layer(Dtype::F16), TOKENS));
    // A vector added to every sum, and a bias of the router.
    check::<bf16, bf16, bf16>(Case { bias: true, router_bias: true, ..Case::new(layer(Dtype::Bf16), TOKENS) });
    let case = Case { bias: true, router_bias: true, ..Case::new(layer(Dtype::F32), TOKENS) };
    check::<f32, f32, f32>(case.back(BackwardDesc::new().accumulate(true)));
    // A router of f32, gradients of f32.
    check::<bf16, f32, f32>(Case::new(layer(Dtype::Bf16).router_dtype(Dtype::F32), TOKENS));
    check::<f16, f16, f32>(Case::new(layer(Dtype::F16), TOKENS));
}

/// Where the forward pass has kernels of its own.
#[test]
fn few_tokens() {
    for tokens in [1, 2, 5, 16] {
        check::<bf16, bf16, bf16>(Case::new(layer(Dtype::Bf16), tokens));
        let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)).gated(true));
        check::<f32, f32, f32>(Case::new(layer(Dtype::F32).shared(shared), tokens));
        let wide = LayerDesc::new(Dtype::Bf16, 256, 512, 6, 2);
        check::<bf16, bf16, bf16>(Case::new(wide, tokens));
    }
}

/// Enough tiles that on Hopper the first weights' gradients have kernels of their own (wgmma), with x gathered on either side, a shared expert's rows and sums for biases in
/// their launch; on other devices the same on theirs.
#[test]
fn many_tiles_of_weights() {
    for layouts in [Layout::Nk, Layout::Kn] {
        let mlp = mlp(Dtype::Bf16, Glu::Split, [layouts; 2], Activation::Silu);
        let desc = LayerDesc::new(Dtype::Bf16, 256, 128, 40, 2).mlp(mlp).shared(Some(SharedDesc::new(128, mlp)));
        let case = Case { biases: true, ..Case::new(desc, 70) };
        let device = crate::device::kernels().device();
        let own = |desc: LayerDesc| {
            let plan = desc.plan(70, device).unwrap().backward_plan(&case.back).unwrap();
            plan.kernels().filter(|kernel| matches!(kernel.variant(), Kernel::KGroupedHopper(_))).count()
        };
        // Both products'.
        assert_eq!(own(desc), if device.compute_capability == (9, 0) { 2 } else { 0 });
        assert_eq!(own(desc.batch_invariant(true)), 0);
        check::<bf16, bf16, f32>(case);
        check::<bf16, bf16, bf16>(case.back(BackwardDesc::new().accumulate(true)));
    }
}

#[test]
fn layouts() {
    for glu in Glu::ALL {
        for up in Layout::ALL {
            for down in Layout::ALL {
                let mlp = mlp(Dtype::F32, glu, [up, down], Activation::Silu);
                let shared = Some(SharedDesc::new(16, mlp));
                let desc = layer(Dtype::F32).mlp(mlp).shared(shared);
                check::<f32, f32, f32>(Case { biases: true, ..Case::new(desc, TOKENS) });
            }
        }
        let mlp = mlp(Dtype::Bf16, glu, [Layout::Nk, Layout::Nk], Activation::Silu);
        check::<bf16, bf16, f32>(Case::new(layer(Dtype::Bf16).mlp(mlp), TOKENS));
    }
}

#[test]
fn activations() {
    for activation in PLAIN.into_iter().chain(bounded_units()) {
        for glu in [Glu::None, Glu::Split, Glu::Interleaved] {
            if fits(activation, glu) {
                let mlp = mlp(Dtype::F32, glu, [Layout::Nk, Layout::Nk], activation);
                check::<f32, f32, f32>(Case { biases: true, ..Case::new(layer(Dtype::F32).mlp(mlp), TOKENS) });
            }
        }
    }
}

/// Sizes whose rows begin on any element.
#[test]
fn odd_sizes() {
    let odd = LayerDesc::new(Dtype::F32, 37, 21, 5, 3);
    check::<f32, f32, f32>(Case::new(odd, TOKENS));
    let weight = Mlp::swiglu(Dtype::Bf16);
    let odd = LayerDesc::new(Dtype::Bf16, 44, 20, 5, 3);
    let shared = Some(SharedDesc::new(12, weight));
    check::<bf16, bf16, bf16>(Case::new(odd.mlp(weight).shared(shared), TOKENS));
    let apart = mlp(Dtype::F32, Glu::Apart, [Layout::Kn, Layout::Nk], Activation::Silu);
    check::<f32, f32, f32>(Case::new(LayerDesc::new(Dtype::F32, 35, 19, 5, 3).mlp(apart), TOKENS));
}

#[test]
fn gatings_and_losses() {
    let losses = LossGradient::new(LossScore::Softmax).balance(0.01).z(0.001);
    for score in [Score::Softmax, Score::TopkSoftmax, Score::Sigmoid, Score::SqrtSoftplus] {
        for renormalise in [None, Some(Renormalise::Plus(1e-3))] {
            let gating = Gating::new(score).renormalise(renormalise).scale(1.5);
            let case = Case { router_bias: true, ..Case::new(layer(Dtype::F32).gating(gating), TOKENS) };
            check::<f32, f32, f32>(case);
            check::<f32, f32, f32>(case.back(BackwardDesc::new().losses(Some(losses))));
        }
    }
}

#[test]
fn dropped_choices_and_null_experts() {
    for padded in [false, true] {
        let capacity = Capacity::new(3, 20).padded(padded);
        check::<f32, f32, f32>(Case::new(layer(Dtype::F32).capacity(Some(capacity)), TOKENS));
        check::<bf16, bf16, bf16>(Case::new(layer(Dtype::Bf16).capacity(Some(capacity)), TOKENS));
    }
    for null in [NullExperts::zero(2), NullExperts::identity(2)] {
        check::<f32, f32, f32>(Case::new(layer(Dtype::F32).null(Some(null)), TOKENS));
        check::<bf16, bf16, f32>(Case::new(layer(Dtype::Bf16).null(Some(null)), TOKENS));
    }
}

#[test]
fn weightings_and_scales() {
    for weighting in [Weighting::Output, Weighting::Input, Weighting::Activation] {
        for [up, down] in [[Layout::Nk, Layout::Nk], [Layout::Kn, Layout::Kn]] {
            let mlp = mlp(Dtype::F32, Glu::Interleaved, [up, down], Activation::Silu);
            let desc = layer(Dtype::F32).mlp(mlp).weighting(weighting).routed_scale(0.5);
            let case = Case { biases: true, ..Case::new(desc, TOKENS) };
            check::<f32, f32, f32>(case);
            check::<f32, f32, f32>(case.back(BackwardDesc::new().recompute(true)));
        }
        check::<bf16, bf16, bf16>(Case::new(layer(Dtype::Bf16).weighting(weighting), TOKENS));
        // Gate and up in a tensor each.
        for [up, down] in [[Layout::Nk, Layout::Nk], [Layout::Kn, Layout::Kn]] {
            let of = |dtype| mlp(dtype, Glu::Apart, [up, down], Activation::Silu);
            let desc = layer(Dtype::F32).mlp(of(Dtype::F32)).weighting(weighting).routed_scale(0.5);
            check::<f32, f32, f32>(Case { biases: true, ..Case::new(desc, TOKENS) });
            for shared in [24, 40] {
                let shared = Some(SharedDesc::new(shared, of(Dtype::Bf16)).gated(shared == 40));
                let desc = layer(Dtype::Bf16).mlp(of(Dtype::Bf16)).weighting(weighting).shared(shared);
                check::<bf16, bf16, f32>(Case { biases: true, ..Case::new(desc, TOKENS) });
            }
        }
    }
}

/// Where both gradients of the router's product share a launch, as there would be more than nine: with a router of either type, a gate, and tokens in parts.
#[test]
fn routers_in_one_launch() {
    let of = |dtype| mlp(dtype, Glu::Apart, [Layout::Nk; 2], Activation::Silu);
    let back = BackwardDesc::new().recompute(true);
    let merged = |case: &Case| {
        let plan = case.desc.plan(case.tokens, device::kernels().device()).unwrap().backward_plan(&case.back).unwrap();
        assert_eq!(plan.launches(), 9);
        assert!(plan.stages().any(|(stage, _)| stage == BackwardStage::RouterBoth));
    };
    for gated in [false, true] {
        let shared = gated.then(|| SharedDesc::new(24, of(Dtype::F32)).gated(true));
        let desc = layer(Dtype::F32).mlp(of(Dtype::F32)).shared(shared);
        let case = Case { router_bias: true, ..Case::new(desc, TOKENS) }.back(back);
        merged(&case);
        check::<f32, f32, f32>(case);
        check::<f32, f32, f32>(case.back(back.accumulate(true)));
    }
    let desc = layer(Dtype::Bf16).mlp(of(Dtype::Bf16));
    let case = Case { router_bias: true, ..Case::new(desc, 600) }.back(back);
    merged(&case);
    check::<bf16, bf16, f32>(case);
    check::<bf16, f32, f32>(Case { desc: desc.router_dtype(Dtype::F32), ..case });
}

#[test]
fn numbers_by_expert() {
    let unit = Swiglu::GPT_OSS.gate(Bound::Clamp(0.5)).up(Bound::Clamp(0.6));
    let mlp = mlp(Dtype::F32, Glu::Interleaved, [Layout::Kn; 2], unit.into());
    let case = Case { by_expert: true, biases: true, ..Case::new(layer(Dtype::F32).mlp(mlp), TOKENS) };
    check::<f32, f32, f32>(case);
    check::<f32, f32, f32>(case.back(BackwardDesc::new().recompute(true)));
}

#[test]
fn shared_experts() {
    let joined = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::Bf16)));
    check::<bf16, bf16, f32>(Case::new(layer(Dtype::Bf16).shared(joined), TOKENS));
    let apart = Some(SharedDesc::new(56, Mlp::relu(Dtype::F32)));
    check::<f32, f32, f32>(Case::new(layer(Dtype::F32).shared(apart), TOKENS));
    for shared in [SharedDesc::new(24, Mlp::swiglu(Dtype::F32)), SharedDesc::new(56, Mlp::relu(Dtype::F32))] {
        let desc = layer(Dtype::F32).shared(Some(shared.gated(true).scale(0.5))).routed_scale(0.25);
        check::<f32, f32, f32>(Case::new(desc, TOKENS));
        check::<f32, f32, f32>(Case::new(desc, TOKENS).back(BackwardDesc::new().accumulate(true)));
    }
    let gated = SharedDesc::new(24, Mlp::swiglu(Dtype::Bf16)).gated(true);
    check::<bf16, f32, f32>(Case::new(layer(Dtype::Bf16).router_dtype(Dtype::F32).shared(Some(gated)), TOKENS));
}

/// Of the others' form in every order of weights, with biases: its rows go along in their launches.
#[test]
fn joined_shared_experts() {
    for glu in Glu::ALL {
        for [up, down] in [[Layout::Nk, Layout::Nk], [Layout::Kn, Layout::Kn], [Layout::Kn, Layout::Nk]] {
            let mlp = mlp(Dtype::F32, glu, [up, down], Activation::Silu);
            let shared =
                SharedDesc::new(24, mlp.activation(Activation::GeluTanh)).gated(down == Layout::Kn).scale(0.75);
            let desc = layer(Dtype::F32).mlp(mlp).shared(Some(shared)).routed_scale(1.5);
            check::<f32, f32, f32>(Case { biases: true, router_bias: true, ..Case::new(desc, TOKENS) });
        }
        let mlp = mlp(Dtype::Bf16, glu, [Layout::Nk; 2], Activation::Silu);
        let desc = layer(Dtype::Bf16).mlp(mlp).shared(Some(SharedDesc::new(24, mlp).gated(true)));
        check::<bf16, bf16, bf16>(Case { biases: true, ..Case::new(desc, TOKENS) });
    }
    // Weights scale the input: the shared expert has none.
    for weighting in [Weighting::Input, Weighting::Activation] {
        let desc = layer(Dtype::F32).weighting(weighting).shared(Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32))));
        check::<f32, f32, f32>(Case { biases: true, ..Case::new(desc, TOKENS) });
    }
    // Tokens in parts at the router, and a gate of its matrix's type.
    let gated = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::Bf16)).gated(true));
    let desc = layer(Dtype::Bf16).router_dtype(Dtype::F32).shared(gated);
    check::<bf16, f32, f32>(Case { router_bias: true, bias: true, ..Case::new(desc, 1100) });
    check::<bf16, f32, f32>(Case::new(desc, 600).back(BackwardDesc::new().accumulate(true)));
    // Rows of any width.
    let odd =
        LayerDesc::new(Dtype::F32, 37, 21, 5, 3).shared(Some(SharedDesc::new(21, Mlp::swiglu(Dtype::F32)).gated(true)));
    check::<f32, f32, f32>(Case { biases: true, ..Case::new(odd, TOKENS) });
}

/// Of another width than the others': its rows go along all the same.
#[test]
fn shared_experts_of_another_width() {
    for (glu, size) in [(Glu::Split, 56), (Glu::Apart, 8), (Glu::None, 40), (Glu::Interleaved, 200)] {
        let mlp = mlp(Dtype::Bf16, glu, [Layout::Nk; 2], Activation::Silu);
        let desc = layer(Dtype::Bf16).mlp(mlp).shared(Some(SharedDesc::new(size, mlp).gated(true).scale(0.5)));
        check::<bf16, bf16, f32>(Case { biases: true, ..Case::new(desc, TOKENS) });
    }
    for weighting in [Weighting::Input, Weighting::Activation] {
        let shared = SharedDesc::new(72, Mlp::swiglu(Dtype::F32));
        let desc = layer(Dtype::F32).weighting(weighting).shared(Some(shared));
        check::<f32, f32, f32>(Case { biases: true, ..Case::new(desc, TOKENS) });
    }
    let odd = |size| SharedDesc::new(size, mlp(Dtype::F32, Glu::Apart, [Layout::Kn, Layout::Nk], Activation::Silu));
    for size in [19, 30] {
        let shared = odd(size);
        let desc = LayerDesc::new(Dtype::F32, 37, 21, 5, 3).mlp(shared.mlp).shared(Some(shared));
        check::<f32, f32, f32>(
            Case { biases: true, ..Case::new(desc, TOKENS) }.back(BackwardDesc::new().accumulate(true)),
        );
    }
    // Several column tiles of either.
    let shared = SharedDesc::new(300, Mlp::swiglu(Dtype::Bf16)).gated(true);
    let desc = LayerDesc::new(Dtype::Bf16, 136, 150, 3, 2).shared(Some(shared));
    check::<bf16, bf16, bf16>(Case::new(desc, 150));
}

#[test]
fn added_to_what_there_is() {
    let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)));
    let case = Case::new(layer(Dtype::F32).shared(shared), TOKENS);
    check::<f32, f32, f32>(case.back(BackwardDesc::new().accumulate(true)));
    let case = Case::new(layer(Dtype::Bf16), TOKENS);
    check::<bf16, bf16, f32>(case.back(BackwardDesc::new().accumulate(true)));
}

#[test]
fn pre_activations_once_more() {
    let shared = Some(SharedDesc::new(24, Mlp::swiglu(Dtype::F32)));
    for desc in [layer(Dtype::F32), layer(Dtype::F32).shared(shared)] {
        check::<f32, f32, f32>(Case::new(desc, TOKENS).back(BackwardDesc::new().recompute(true)));
    }
}

/// Enough rows an expert that a Hopper device takes its own kernels (wgmma) back through both products, with a shared expert's rows in their launches, by numbers
/// where they are gathered, in order where they are not; on other devices the same layer on theirs.
#[test]
fn many_rows_an_expert() {
    let shared = SharedDesc::new(264, Mlp::swiglu(Dtype::Bf16)).gated(true);
    let desc = LayerDesc::new(Dtype::Bf16, 264, 264, 2, 2).shared(Some(shared));
    takes_its_own(desc, 1920);
    let invariant = own(desc.batch_invariant(true), 1920);
    assert!(invariant.iter().all(|kernel| !kernel.ends_with("_sm90a")), "{invariant:?}");
    check::<bf16, bf16, bf16>(Case { biases: true, ..Case::new(desc, 1920) });
    // Of another width: more column tiles than the others', and another depth on the way to the inputs.
    let desc = desc.shared(Some(SharedDesc::new(528, Mlp::swiglu(Dtype::Bf16)).gated(true)));
    takes_its_own(desc, 1920);
    check::<bf16, bf16, bf16>(Case { biases: true, ..Case::new(desc, 1920) });
}

/// The same where weights scale the input, and the first product goes back by the second's kernel.
#[test]
fn many_weighted_rows_an_expert() {
    let mlp = mlp(Dtype::F16, Glu::Interleaved, [Layout::Kn, Layout::Nk], Activation::Silu);
    let desc = LayerDesc::new(Dtype::F16, 264, 264, 2, 1).mlp(mlp).weighting(Weighting::Input);
    takes_its_own(desc, 5800);
    check::<f16, f16, f32>(Case::new(desc, 5800));
}

/// Kernels of the way back.
fn own(desc: LayerDesc, tokens: usize) -> Vec<String> {
    let plan = desc.plan(tokens, device::kernels().device()).unwrap().backward_plan(&BackwardDesc::new()).unwrap();
    plan.kernels().map(|kernel| kernel.name()).collect()
}

fn takes_its_own(desc: LayerDesc, tokens: usize) {
    let names = own(desc, tokens);
    let count = |start: &str| names.iter().filter(|name| name.starts_with(start) && name.ends_with("_sm90a")).count();
    let is_hopper = device::kernels().device().compute_capability == (9, 0);
    let weighs_input = desc.weighting == Weighting::Input;
    let want = if weighs_input { [2, 2] } else { [2, 1] };
    assert_eq!([count("gemm_"), count("gemm_backward_")], if is_hopper { want } else { [0; 2] }, "{names:?}");
}
