//! ERNIE 4.5 VL: text and vision have a router and experts of their own, chosen by the type of each token; the shared experts are everybody's.

use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    BanksArgs, BanksPlan, ExpertWeights, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights, SharedDesc,
    SharedWeights,
};
use moe_kernels::rules::{Gating, IdFormat, Renormalise, Score};
use moe_kernels::{Dtype, Workspace};

use crate::folder::{Folder, gate_up};
use crate::run::{Run, close, same_weights};
use crate::support::compare::Storage;

const HIDDEN: usize = 64;
const EXPERTS: usize = 8;
const K: usize = 4;
/// Text experts, then vision experts.
const WIDTHS: [usize; 2] = [16, 8];

/// `[H, E]` as the file has it, to `[E, H]`.
fn transposed(matrix: &[f32]) -> Vec<f32> {
    (0..EXPERTS).flat_map(|e| (0..HIDDEN).map(move |h| matrix[h * EXPERTS + e])).collect()
}

pub fn block<T: Storage>() {
    let (run, folder) = (Run::new(), Folder::open("ernie4_5_vl_moe", "model.layers.0.mlp."));
    let x = folder.golden("x");
    let tokens = x.len() / HIDDEN;
    let x = run.put::<T>(&x);
    let types = folder.golden_ints("moe_mm_token_type_ids");
    assert!([0, 1].iter().all(|kind| types.contains(kind)), "the recorded batch has both kinds of tokens");

    let gating = Gating::new(Score::Softmax).renormalise(Some(Renormalise::AtLeast(1e-12)));
    let bank = |width| LayerDesc::new(T::DTYPE, HIDDEN, width, EXPERTS, K).router_dtype(Dtype::F32).gating(gating);
    let [text, vision] = WIDTHS.map(bank);
    let text = text.shared(Some(SharedDesc::new(32, Mlp::swiglu(T::DTYPE))));
    let plan = BanksPlan::new(&[text, vision], tokens, IdFormat::I32, run.kernels.device()).unwrap();

    let routers = ["gate.weight", "gate.weight_1"].map(|name| run.put::<f32>(&transposed(&folder.weight(name))));
    let correction = folder.weight("moe_statics.e_score_correction_bias");
    let biases = [0, EXPERTS].map(|first| run.put::<f32>(&correction[first..][..EXPERTS]));
    let experts = [0, 1].map(|bank| {
        let of =
            |name: &str| folder.stacked(&format!("experts.{{}}.{name}.weight"), bank * EXPERTS..(bank + 1) * EXPERTS);
        let first = gate_up(&of("gate_proj"), &of("up_proj"), EXPERTS);
        [run.put::<T>(&first), run.put::<T>(&of("down_proj"))]
    });
    let of_shared = |name: &str| folder.weight(&format!("shared_experts.{name}.weight"));
    let shared = run.put::<T>(&gate_up(&of_shared("gate_proj"), &of_shared("up_proj"), 1));
    let shared_down = run.put::<T>(&of_shared("down_proj"));
    let weights = [0, 1].map(|bank| {
        let [first, down] = &experts[bank];
        LayerWeights::new(
            RouterWeights::new(&routers[bank]).correction_bias(&biases[bank]),
            ExpertWeights::new(Weight::new(first), Weight::new(down)),
        )
    });
    let [mut of_text, of_vision] = weights;
    of_text.experts = of_text.experts.shared(SharedWeights::new(Weight::new(&shared), Weight::new(&shared_down)));

    let on_device = run.ints(&types);
    let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
    let mut y = run.out::<T>(tokens * HIDDEN);
    let (mut text_ids, mut vision_ids) = (run.out_ints(tokens * K), run.out_ints(tokens * K));
    let (mut text_shares, mut vision_shares) = (run.out::<f32>(tokens * K), run.out::<f32>(tokens * K));
    let (mut text_logits, mut vision_logits) = (run.out::<f32>(tokens * EXPERTS), run.out::<f32>(tokens * EXPERTS));
    let routes = [
        RouteArgs::new().logits(&mut text_logits).ids(&mut text_ids).weights(&mut text_shares),
        RouteArgs::new().logits(&mut vision_logits).ids(&mut vision_ids).weights(&mut vision_shares),
    ];
    let args = BanksArgs::new(&x, &on_device, &mut y).routes(routes);
    plan.forward(run.kernels, &run.stream, [&of_text, &of_vision], args, &mut workspace).unwrap();
    close("y", &run.get(&y), &folder.golden("y"), T::DTYPE);

    // Each token's from its bank; the other bank has nothing of it.
    let ids = [run.get_ints(&text_ids), run.get_ints(&vision_ids)];
    let shares = [run.get(&text_shares), run.get(&vision_shares)];
    let logits = [run.get(&text_logits), run.get(&vision_logits)];
    let bank = |token: usize| usize::from(types[token] > 0);
    for token in 0..tokens {
        assert_eq!(ids[1 - bank(token)][token * K..][..K], [-1; K], "token {token} in the other bank");
    }
    let merged_ids: Vec<i32> = (0..tokens).flat_map(|t| ids[bank(t)][t * K..][..K].to_vec()).collect();
    let merged_shares: Vec<f64> = (0..tokens).flat_map(|t| shares[bank(t)][t * K..][..K].to_vec()).collect();
    let merged_logits: Vec<f64> =
        (0..tokens).flat_map(|t| logits[bank(t)][t * EXPERTS..][..EXPERTS].to_vec()).collect();
    close("logits", &merged_logits, &folder.golden("logits"), T::DTYPE);
    let (want_ids, want_shares) = (folder.golden_ints("ids"), folder.golden("weights"));
    same_weights("weights", (&merged_ids, &merged_shares), (&want_ids, &want_shares), K, T::DTYPE);

    // Onto a residual that y is.
    let residual = run.get(&y);
    let args = BanksArgs::new(&x, &on_device, &mut y).accumulate();
    plan.forward(run.kernels, &run.stream, [&of_text, &of_vision], args, &mut workspace).unwrap();
    let twice: Vec<f32> = residual.iter().map(|&y| 2.0 * y as f32).collect();
    close("y onto itself", &run.get(&y), &twice, T::DTYPE);
}
