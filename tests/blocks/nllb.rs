//! NLLB: two experts a token, with a capacity that all first choices have before any second one; the recorded `y_intended`, which the
//! model's router and experts make together (transformers' own `y` takes the router's mask for numbers of experts).

use moe_kernels::experts::Weight;
use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights};
use moe_kernels::reference::admission::admit;
use moe_kernels::reference::gating::gate;
use moe_kernels::rules::{AdmissionRule, Gating, Order, Renormalise, Score};
use moe_kernels::{Dtype, Workspace};

use crate::folder::Folder;
use crate::run::{Run, close, same_weights};
use crate::support::compare::{Storage, to_f64};

const EXPERTS: usize = 12;
const K: usize = 2;
/// torch's `finfo(float32).eps`: the model's least divisor.
const LEAST: f32 = f32::EPSILON;

pub fn block<T: Storage>() {
    let (run, folder) = (Run::new(), Folder::open("nllb_moe", "model.encoder.layers.0.ffn."));
    let (hidden, intermediate) = (64, 16);
    let x = folder.golden("x");
    let tokens = x.len() / hidden;
    let gating = Gating::new(Score::Softmax).renormalise(Some(Renormalise::AtLeast(LEAST)));
    let rule = AdmissionRule::new(EXPERTS, K, 6, tokens).order(Order::ByChoice);
    let desc = LayerDesc::new(T::DTYPE, hidden, intermediate, EXPERTS, K)
        .router_dtype(Dtype::F32)
        .gating(gating)
        .admission(Some(rule))
        .mlp(Mlp::relu(T::DTYPE))
        // `moe_token_dropout` of 0.2 acts in evaluation too.
        .routed_scale(0.8);
    let router = run.put::<f32>(&folder.weight("router.classifier.weight"));
    let expert = |name: &str| run.put::<T>(&folder.stacked(&format!("experts.expert_{{}}.{name}"), 0..EXPERTS));
    let (up, up_bias) = (expert("fc1.weight"), expert("fc1.bias"));
    let (down, down_bias) = (expert("fc2.weight"), expert("fc2.bias"));
    let weights = LayerWeights::new(
        RouterWeights::new(&router),
        ExpertWeights::new(Weight::new(&up).bias(&up_bias), Weight::new(&down).bias(&down_bias)),
    );
    let x = run.put::<T>(&x);
    let (want_ids, want_shares) = (folder.golden_ints("ids"), folder.golden("weights"));
    assert!(want_ids.contains(&-1), "the recorded batch overflows its capacity");
    let pass = |desc: &LayerDesc| {
        let plan = desc.plan(tokens, run.kernels.device()).unwrap();
        let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
        let mut y = run.out::<T>(tokens * hidden);
        let (mut ids, mut shares) = (run.out_ints(tokens * K), run.out::<f32>(tokens * K));
        let mut logits = run.out::<f32>(tokens * EXPERTS);
        let route = RouteArgs::new().logits(&mut logits).ids(&mut ids).weights(&mut shares);
        let args = LayerArgs::new(&x, &mut y).route(route);
        plan.forward(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
        close("logits", &run.get(&logits), &folder.golden("logits"), T::DTYPE);
        (run.get_ints(&ids), run.get::<f32>(&shares), run.get(&y))
    };
    let (ids, shares, y) = pass(&desc);
    same_weights("weights", (&ids, &shares), (&want_ids, &want_shares), K, T::DTYPE);
    close("y_intended", &y, &folder.golden("y_intended"), T::DTYPE);

    // Normalised after tokens were dropped: what is left of a token adds up to 1.
    let after = Some(Renormalise::AtLeast(LEAST));
    let late = desc.gating(Gating::new(Score::Softmax)).admission(Some(rule.renormalise(after)));
    let (ids, shares, late_y) = pass(&late);
    let logits = folder.golden("logits");
    let chosen = gate::<f32, f32>(&logits, None, EXPERTS, K, &Gating::new(Score::Softmax)).unwrap();
    let given: Vec<f32> = chosen.weights.iter().map(|&weight| weight as f32).collect();
    let admitted = admit(&chosen.ids, &given, None, &rule.renormalise(after)).unwrap();
    same_weights("weights normalised late", (&ids, &shares), (&admitted.ids, &admitted.weights), K, T::DTYPE);
    for (token, (ids, shares)) in ids.chunks(K).zip(shares.chunks(K)).enumerate() {
        let sum: f64 = shares.iter().sum();
        assert!(ids == [-1, -1] || (sum - 1.0).abs() < 1e-6, "token {token}: {sum}");
        // Of a token that lost nothing, nothing changes.
        if !ids.contains(&-1) {
            let of = |y: &[f64]| y[token * hidden..][..hidden].to_vec();
            let same: Vec<f32> = of(&y).iter().map(|&y| y as f32).collect();
            close(&format!("y of token {token}"), &of(&late_y), &same, T::DTYPE);
        }
    }
    assert!(to_f64(&want_shares).iter().any(|share| *share > 0.0));
}
