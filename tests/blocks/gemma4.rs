//! Gemma 4: the router sees a normalised and scaled row, the experts a row that another norm makes of the same.

use cudarc::driver::CudaSlice;
use moe_kernels::experts::Weight;
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::rms_norm::{self, RmsNormArgs, RmsNormDesc};
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, NormWeights, Norms, RouteArgs, RouterWeights,
};
use moe_kernels::rules::{Activation, Gating, Glu, RmsNorm, Score, WeightDesc};
use moe_kernels::{Dtype, Workspace};

use crate::folder::{Folder, gate_up};
use crate::run::{Run, close, same_weights};
use crate::support::compare::Storage;

pub fn gemma4<T: Storage>() {
    block::<T>("gemma4", "model.layers.0.", 16);
}

pub fn diffusion_gemma<T: Storage>() {
    block::<T>("diffusion_gemma", "layers.0.", 24);
}

fn block<T: Storage>(family: &str, prefix: &'static str, intermediate: usize) {
    let (run, folder) = (Run::new(), Folder::open(family, prefix));
    let (hidden, experts, k) = (64, 8, 2);
    let norms = Norms::new()
        .router(Some(RmsNorm::new(1e-6).factor((hidden as f32).powf(-0.5))))
        .experts(Some(RmsNorm::new(1e-6)));
    let desc = LayerDesc::new(T::DTYPE, hidden, intermediate, experts, k)
        .router_dtype(Dtype::F32)
        .gating(Gating::new(Score::Softmax).renormalised().expert_scale(true))
        .mlp(Mlp::swiglu(T::DTYPE).activation(Activation::GeluTanh))
        .norms(norms);
    let router = run.put::<f32>(&folder.weight("router.proj.weight"));
    let by_expert = run.put::<f32>(&folder.weight("router.per_expert_scale"));
    let scale = run.put::<T>(&folder.weight("router.scale"));
    let gain = run.put::<T>(&folder.weight("pre_feedforward_layernorm_2.weight"));
    let gate_up = run.put::<T>(&folder.weight("experts.gate_up_proj"));
    let down = run.put::<T>(&folder.weight("experts.down_proj"));
    let weights = LayerWeights::new(
        RouterWeights::new(&router).norm(&scale).expert_scale(&by_expert),
        ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down)).norms(NormWeights::new().experts(&gain)),
    );

    let x = folder.golden("x");
    let tokens = x.len() / hidden;
    let x = run.put::<T>(&x);
    let plan = desc.plan(tokens, run.kernels.device()).unwrap();
    let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
    let (mut y, mut ids, mut shares) = (run.out::<T>(tokens * hidden), run.out_ints(tokens * k), run.out(tokens * k));
    let mut logits = run.out::<f32>(tokens * experts);
    let route = RouteArgs::new().logits(&mut logits).ids(&mut ids).weights(&mut shares);
    let args = LayerArgs::new(&x, &mut y).route(route);
    plan.forward(run.kernels, &run.stream, &weights, args, &mut workspace).unwrap();
    // What was recorded is the softmax.
    let probabilities: Vec<f64> =
        run.get(&logits).chunks(experts).flat_map(moe_kernels::reference::gating::softmax).collect();
    close("probs", &probabilities, &folder.golden("probs"), T::DTYPE);
    let (want_ids, want_shares) = (folder.golden_ints("ids"), folder.golden("weights"));
    same_weights("weights", (&run.get_ints(&ids), &run.get::<f32>(&shares)), (&want_ids, &want_shares), k, T::DTYPE);
    close("y", &run.get(&y), &folder.golden("y"), T::DTYPE);
    experts_input::<T>(&run, &folder, &x, tokens);
}

/// What the experts see, and with the dense MLP beside them the whole feed-forward part but for its residual: norms as operations of their own.
fn experts_input<T: Storage>(run: &Run, folder: &Folder, x: &CudaSlice<T>, tokens: usize) {
    let desc = RmsNormDesc::new(T::DTYPE, tokens, 64, RmsNorm::new(1e-6));
    let norm = |x: &CudaSlice<T>, name: &str, onto: Option<&CudaSlice<T>>| {
        let gain = run.put::<T>(&folder.weight(name));
        let mut y = run.out::<T>(tokens * 64);
        let mut args = RmsNormArgs::new(x, &mut y).weight(&gain);
        args.residual = onto.map(Into::into);
        rms_norm::forward(run.kernels, &run.stream, &desc, args).unwrap();
        y
    };
    let input = norm(x, "pre_feedforward_layernorm_2.weight", None);
    close("x_experts", &run.get(&input), &folder.golden("x_experts"), T::DTYPE);

    // y_ffn = post(post_1(mlp(pre x)) + post_2(y)).
    let (gate, up) = (folder.weight("mlp.gate_proj.weight"), folder.weight("mlp.up_proj.weight"));
    let intermediate = gate.len() / 64;
    let (dense, down) = (run.put::<T>(&gate_up(&gate, &up, 1)), run.put::<T>(&folder.weight("mlp.down_proj.weight")));
    let rows = Rows::Dense(tokens);
    let first = GemmDesc::new(T::DTYPE, rows, intermediate, 64)
        .weight(WeightDesc::new(T::DTYPE).glu(Glu::Split))
        .activation(Activation::GeluTanh);
    let before = norm(x, "pre_feedforward_layernorm.weight", None);
    let (mut h, mut mlp) = (run.out::<T>(tokens * intermediate), run.out::<T>(tokens * 64));
    gemm::forward(run.kernels, &run.stream, &first, GemmArgs::new(&before, Weight::new(&dense), &mut h)).unwrap();
    let second = GemmDesc::new(T::DTYPE, rows, 64, intermediate);
    gemm::forward(run.kernels, &run.stream, &second, GemmArgs::new(&h, Weight::new(&down), &mut mlp)).unwrap();
    let dense = norm(&mlp, "post_feedforward_layernorm_1.weight", None);
    let routed = run.put::<T>(&folder.golden("y"));
    let both = norm(&routed, "post_feedforward_layernorm_2.weight", Some(&dense));
    let all = norm(&both, "post_feedforward_layernorm.weight", None);
    close("y_ffn", &run.get(&all), &folder.golden("y_ffn"), T::DTYPE);
}
