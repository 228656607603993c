//! Layers whose second product adds onto each token's sum ([`TokenSums::Atomic`]): what they are in order, but for the last bits.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp, SharedDesc, Stage, TokenSums, Weighting};
use moe_kernels::rules::{Capacity, Gating, Layout, NullExperts, Score};

use crate::support::layer_case::{Case, captured, check, open, run};

fn atomic(desc: LayerDesc) -> LayerDesc {
    desc.token_sums(TokenSums::Atomic)
}

fn mixtral(dtype: Dtype) -> LayerDesc {
    atomic(LayerDesc::new(dtype, 64, 96, 8, 2))
}

/// The kernel of a stage of so many tokens.
fn kernel(desc: &LayerDesc, tokens: usize, stage: Stage) -> Option<String> {
    let plan = desc.plan(tokens, open().kernels.device()).unwrap();
    plan.stages().find(|(of, _)| *of == stage).map(|(_, selection)| selection.kernel.name())
}

/// As many launches as in order, and a workspace no larger than that of rows, which have twice a token's bytes in f32.
#[test]
fn planned() {
    let (desc, device) = (mixtral(Dtype::Bf16), open().kernels.device());
    let ordered = desc.token_sums(TokenSums::Ordered).plan(150, device).unwrap();
    let plan = desc.plan(150, device).unwrap();
    assert_eq!([plan.launches(), plan.workspace_bytes()], [ordered.launches(), ordered.workspace_bytes()]);
    assert_eq!(kernel(&desc, 150, Stage::Combine).unwrap(), "combine_sums_bf16");
    assert!(kernel(&desc, 150, Stage::Down).unwrap().ends_with("_plain_nk"));
    // The parts of a layer have rows.
    let of_parts = plan.experts().stages().find(|(stage, _)| *stage == Stage::Combine).unwrap();
    assert_eq!(of_parts.1.kernel.name(), "combine_bf16");
    // Few rows stay in order.
    assert_eq!(
        kernel(&desc, 3, Stage::DownCombine),
        kernel(&desc.token_sums(TokenSums::Ordered), 3, Stage::DownCombine)
    );
    let refused = desc.batch_invariant(true).plan(150, device).unwrap_err();
    assert_eq!(refused.argument(), Some("token_sums"));
}

#[test]
fn every_type() {
    check::<bf16, bf16>(&Case { residual: true, ..Case::new(mixtral(Dtype::Bf16), 150) });
    check::<f16, f16>(&Case { bias: true, ..Case::new(mixtral(Dtype::F16), 150) });
    check::<f32, f32>(&Case { expert_bias: true, ..Case::new(mixtral(Dtype::F32), 150) });
}

/// Kernels for rows of any width.
#[test]
fn odd_widths() {
    let desc = atomic(LayerDesc::new(Dtype::Bf16, 70, 33, 5, 2));
    let shared = SharedDesc::new(33, desc.mlp);
    check::<bf16, bf16>(&Case { residual: true, ..Case::new(desc.shared(Some(shared)), 90) });
    check::<f32, f32>(&Case { expert_bias: true, ..Case::new(atomic(LayerDesc::new(Dtype::F32, 37, 12, 3, 2)), 60) });
}

/// Tokens that are dropped, some of all their experts, and an expert's gaps behind its rows; experts that most tokens do not choose.
#[test]
fn capacities_and_empty_experts() {
    for padded in [false, true] {
        let desc = LayerDesc::new(Dtype::F32, 64, 80, 5, 1)
            .gating(Gating::new(Score::Softmax))
            .mlp(Mlp::relu(Dtype::F32))
            .capacity(Some(Capacity::new(20, 60).padded(padded)));
        check::<f32, f32>(&Case { residual: padded, ..Case::new(atomic(desc), 150) });
    }
    check::<bf16, bf16>(&Case::new(atomic(LayerDesc::new(Dtype::Bf16, 64, 48, 3, 1)), 60));
    check::<bf16, bf16>(&Case::new(mixtral(Dtype::Bf16), 0));
}

/// A shared expert in the others' launches and in its own, with a gate, and factors of both parts.
#[test]
fn shared_experts() {
    let desc = atomic(LayerDesc::new(Dtype::Bf16, 64, 48, 6, 3)).routed_scale(0.5);
    for width in [48, 56] {
        let shared = SharedDesc::new(width, Mlp::swiglu(Dtype::Bf16)).scale(-2.0).gated(true);
        check::<bf16, bf16>(&Case { residual: true, ..Case::new(desc.shared(Some(shared)), 100) });
    }
}

/// Weights elsewhere than on the outputs; transposed weights; experts that compute nothing.
#[test]
fn what_stands_around_the_product() {
    let plain = Mlp::swiglu(Dtype::F16);
    let mlp = plain.gate_up(plain.gate_up.layout(Layout::Kn)).down(plain.down.layout(Layout::Kn));
    let desc = atomic(LayerDesc::new(Dtype::F16, 64, 48, 6, 2)).mlp(mlp);
    for weighting in [Weighting::Input, Weighting::Activation] {
        check::<f16, f16>(&Case::new(desc.weighting(weighting), 80));
    }
    for null in [NullExperts::identity(2), NullExperts::zero(1)] {
        check::<f16, f16>(&Case::new(desc.null(Some(null)), 120));
    }
}

/// One workspace, whatever it held: sums begin at zero each time, also in a graph. One choice a token is one addition, whose bits are the same.
#[test]
fn sums_begin_at_zero() {
    let mut workspace = None;
    for tokens in [150, 2, 90] {
        run::<bf16, bf16>(open(), &Case::new(mixtral(Dtype::Bf16), tokens), &mut workspace);
    }
    captured(&Case::new(atomic(LayerDesc::new(Dtype::Bf16, 64, 96, 4, 1)), 100));
}
