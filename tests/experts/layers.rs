//! Layers: what their parts hand on to each other.

use half::{bf16, f16};
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    ExpertWeights, LayerArgs, LayerDesc, LayerWeights, Mlp, RouterWeights, SharedDesc, SharedWeights, Weighting,
};
use moe_kernels::reference;
use moe_kernels::reference::activation::activate_glu;
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::rules::{Activation, Glu, Layout};
use moe_kernels::{Dtype, Workspace};

use crate::device;
use crate::values::{generator, normals, wide};

/// An expert's output lies outside f16, a quarter of it within: it is weighted before it is rounded.
#[test]
fn f16_outputs_are_weighted_before_they_are_rounded() {
    let (hidden, intermediate, experts, top_k) = (8, 8, 4, 4);
    let (kernels, stream) = (device::kernels(), device::stream());
    // x = h = (205, 0, ..); the first expert's rows are (320, 0, ..), the others' are zeros: outputs 65600 and 0.
    let first = |value: f32, row: usize| if row < hidden { f16::from_f32(value) } else { f16::ZERO };
    let down: Vec<f16> = (0..experts * hidden * intermediate)
        .map(|i| if i % intermediate == 0 { first(320.0, i / intermediate) } else { f16::ZERO })
        .collect();
    let up: Vec<f16> = (0..experts * 64).map(|i| f16::from_f32(if i % 64 % 9 == 0 { 1.0 } else { 0.0 })).collect();
    let mut x = [f16::ZERO; 8];
    x[0] = f16::from_f32(205.0);
    let x = stream.clone_htod(&x).unwrap();
    let (up, down) = (stream.clone_htod(&up).unwrap(), stream.clone_htod(&down).unwrap());
    // Equal logits: all four with weight 1/4.
    let router = stream.clone_htod(&vec![f16::ZERO; experts * hidden]).unwrap();

    let mlp = Mlp::relu(Dtype::F16).activation(Activation::Identity);
    let desc = LayerDesc::new(Dtype::F16, hidden, intermediate, experts, top_k).mlp(mlp);
    let plan = desc.plan(1, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let weights =
        LayerWeights::new(RouterWeights::new(&router), ExpertWeights::new(Weight::new(&up), Weight::new(&down)));
    let mut y = stream.alloc_zeros::<f16>(hidden).unwrap();
    plan.forward(kernels, &stream, &weights, LayerArgs::new(&x, &mut y), &mut workspace).unwrap();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), [f16::from_f32(16400.0); 8]);
}

/// A layer with a shared expert like the others, drawn.
struct WithShared {
    desc: LayerDesc,
    tokens: usize,
    x: Vec<bf16>,
    router: Vec<bf16>,
    /// The experts' two matrices, then the shared expert's.
    matrices: [Vec<bf16>; 4],
}

impl WithShared {
    fn draw(rng: &mut fastrand::Rng) -> WithShared {
        let (hidden, intermediate) = (8 * rng.usize(1..20), 8 * rng.usize(1..20));
        let (experts, tokens) = (rng.usize(2..9), rng.usize(1..200));
        let top_k = rng.usize(1..=experts.min(4));
        let weighting = [Weighting::Output, Weighting::Input, Weighting::Activation][rng.usize(..3)];
        let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k).weighting(weighting);
        eprintln!("{tokens} tokens, {desc:?}");
        let (down, up) = ((intermediate as f64).powf(-0.5), (hidden as f64).powf(-0.5));
        let both = 2 * intermediate * hidden;
        WithShared {
            desc: desc.shared(Some(SharedDesc::new(intermediate, desc.mlp))),
            tokens,
            x: normals(rng, tokens * hidden, 1.0),
            router: normals(rng, experts * hidden, up),
            matrices: [(experts * both, up), (experts * both / 2, down), (both, up), (both / 2, down)]
                .map(|(len, scale)| normals(rng, len, scale)),
        }
    }

    /// `y`, and the shared expert's intermediate and what stands before its activation. `apart`: gate and up of the shared expert in two tensors, which
    /// is another form than the experts'.
    fn run(&self, apart: bool) -> [Vec<bf16>; 3] {
        let (kernels, stream) = (device::kernels(), device::stream());
        let LayerDesc { hidden, intermediate, .. } = self.desc;
        let mut desc = self.desc;
        if let (Some(shared), true) = (&mut desc.shared, apart) {
            shared.mlp.gate_up = shared.mlp.gate_up.glu(Glu::Apart);
        }
        let plan = desc.plan(self.tokens, kernels.device()).unwrap();
        assert_eq!(plan.launches(), if apart { 7 } else { 5 });
        let upload = |values: &Vec<bf16>| stream.clone_htod(values).unwrap();
        let [gate_up, down, shared_up, shared_down] = self.matrices.each_ref().map(upload);
        let (x, router) = (upload(&self.x), upload(&self.router));
        let (gate, up) = (shared_up.slice(..intermediate * hidden), shared_up.slice(intermediate * hidden..));
        let shared_up = if apart { Weight::apart(&gate, &up) } else { Weight::new(&shared_up) };
        let experts = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down))
            .shared(SharedWeights::new(shared_up, Weight::new(&shared_down)));
        let weights = LayerWeights::new(RouterWeights::new(&router), experts);
        let zeros = |columns: usize| stream.alloc_zeros::<bf16>(self.tokens * columns).unwrap();
        let [mut y, mut h, mut before] = [hidden, intermediate, 2 * intermediate].map(zeros);
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
        let args = LayerArgs::new(&x, &mut y).shared_hidden(&mut h).shared_pre_activation(&mut before);
        plan.forward(kernels, &stream, &weights, args, &mut workspace).unwrap();
        [&y, &h, &before].map(|values| stream.clone_dtoh(values).unwrap())
    }

    fn reference(&self) -> reference::layer::Forward {
        let LayerDesc { hidden, intermediate, top_k, gating, .. } = self.desc;
        let matrix = |weight, n, k, glu| ExpertMatrix { weight, bias: None, n, k, glu, layout: Layout::Nk };
        let mlp = |i: usize| {
            let (up, down) = (&self.matrices[i][..], &self.matrices[i + 1][..]);
            (matrix(up, intermediate, hidden, Glu::Split), matrix(down, hidden, intermediate, Glu::None))
        };
        let (up, down) = mlp(0);
        let layer = reference::layer::Layer {
            hidden,
            router_weight: &self.router,
            router_bias: None,
            correction_bias: None,
            top_k,
            gating,
            weigh_input: self.desc.weighting == Weighting::Input,
            capacity: None,
            up,
            activation: self.desc.mlp.activation,
            down,
            shared: Some(mlp(2)),
        };
        reference::layer::forward(&self.x, &layer).unwrap()
    }
}

fn close(what: &str, got: &[bf16], want: &[f64]) {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let off = norm(&mut wide(got).iter().zip(want).map(|(got, want)| got - want));
    let norm = norm(&mut want.iter().copied());
    assert!(off <= 1e-2 * norm, "{what}: off by {off:.3e} of {norm:.3e}");
}

/// In the others' launches and in its own it has the same bits: both add in the same order.
#[test]
fn a_shared_expert_joins_the_others() {
    let mut rng = generator("a shared expert", Dtype::Bf16);
    for _ in 0..8 {
        let layer = WithShared::draw(&mut rng);
        let [y, h, before] = layer.run(false);
        assert_eq!([&y, &h, &before], layer.run(true).each_ref());
        let want = layer.reference();
        close("y", &y, &want.y);
        let (gated, shared) = (layer.desc.intermediate, &layer.matrices[2]);
        for (i, h) in h.iter().enumerate() {
            let (t, column) = (i / gated, i % gated);
            let row = &before[t * 2 * gated..][..2 * gated];
            let want = activate_glu(layer.desc.mlp.activation, row[column].to_f64(), row[gated + column].to_f64());
            // Each of both was rounded for itself.
            assert!((h.to_f64() - want).abs() <= 0.03 * want.abs() + 1e-6, "{t}, {column}: {h}, {want}");
        }
        let hidden = layer.desc.hidden;
        let sums: Vec<f64> = (layer.x.chunks(hidden))
            .flat_map(|x| {
                shared.chunks(hidden).map(move |w| x.iter().zip(w).map(|(x, w)| x.to_f64() * w.to_f64()).sum())
            })
            .collect();
        close("before the activation", &before, &sums);
    }
}
