//! ScatterMoE, `tests/test_mlp.py`: two f32 matrices with GELU between, softmax weights, forth and back.
//!
//! Scaled down: widths 128, 256, 512, 600, 100 to 32, 64, 128, 72, 28; 256 and 512 tokens to 64 and 96. The inner width stays `4 width / k`, so odd
//! ones stay odd.

use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp};
use moe_kernels::rules::{Activation, Gating, Score};

use crate::calls::{self, Experts};
use crate::close::{assert_choice, assert_layer};
use crate::data::{rng, scores, values, wide, wide32};
use crate::formulas::{gelu, linear, softmax};
use crate::gradients;
use crate::suite::{Peer, Section, product};
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let mut section = Section::new("mlp");
    for (tokens, width) in product(&[1, 64, 96], &[32, 64, 128, 72, 28]) {
        for top_k in [2, 3, 4] {
            let name = format!("n={tokens} x={width} k={top_k}");
            let point = name.clone();
            section.point(name, move || mlp_point(&point, tokens, width, 4 * width / top_k, top_k));
        }
    }
    Peer { name: "ScatterMoE", suite: "`tests/test_mlp.py`", sections: vec![section, gradients::layers::scattermoe()] }
}

fn mlp_point(name: &str, tokens: usize, width: usize, inner: usize, top_k: usize) {
    let experts = 8;
    let rng = &mut rng(name);
    let x: Vec<f32> = values(rng, tokens * width);
    let up: Vec<f32> = normals(rng, experts * inner * width, 0.1);
    let down: Vec<f32> = normals(rng, experts * width * inner, 0.1);
    let logits = scores(rng, tokens * experts, Dtype::F32);
    let chosen = calls::gate(&logits, experts, top_k, Gating::new(Score::Softmax), None);
    let logits = wide32(&logits);
    let share = |t: usize| softmax(&logits[t * experts..][..experts]);
    assert_choice(&chosen, top_k, share, |t, ids| ids.iter().map(|&e| share(t)[e]).collect());
    let desc = LayerDesc::new(Dtype::F32, width, inner, experts, top_k)
        .mlp(Mlp::relu(Dtype::F32).activation(Activation::Gelu));
    let layer = Experts {
        desc,
        x: &x,
        chosen: &chosen,
        gate_up: &up,
        gate_up_bias: None,
        down: &down,
        down_bias: None,
        map: None,
    };
    let got = wide(&layer.run());
    let (x, up, down) = (wide(&x), wide(&up), wide(&down));
    let mut want = vec![0.0; tokens * width];
    for (slot, (&id, &weight)) in chosen.ids.iter().zip(&chosen.weights).enumerate() {
        let (t, e) = (slot / top_k, id as usize);
        let h = linear(&x[t * width..][..width], &up[e * inner * width..][..inner * width]);
        let h: Vec<f64> = h.into_iter().map(gelu).collect();
        let out = linear(&h, &down[e * width * inner..][..width * inner]);
        want[t * width..][..width].iter_mut().zip(out).for_each(|(y, out)| *y += f64::from(weight) * out);
    }
    assert_layer(&got, &want, Dtype::F32);
}
