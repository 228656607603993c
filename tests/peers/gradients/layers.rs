//! Layers' ways back: ScatterMoE's, MegaBlocks' and SonicMoE's.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::layer::{LayerDesc, Mlp};
use moe_kernels::rules::{Activation, Capacity, Glu, Layout, WeightDesc};

use super::formulas::{Curve, Experts as Formula};
use crate::calls::{Chosen, Experts};
use crate::data::{probabilities, random_ids, rng, wide, wide32};
use crate::suite::{Peer, Section, product, scaled};
use crate::support::compare::{Storage, layer, relative_error};
use crate::support::inputs::normals;

/// One layer.
#[derive(Clone, Copy)]
struct Layer {
    tokens: usize,
    hidden: usize,
    inner: usize,
    experts: usize,
    top_k: usize,
    gated: bool,
    biased: bool,
    transposed: bool,
    curve: Curve,
    capacity: Option<usize>,
}

impl Layer {
    fn mlp(&self, dtype: Dtype) -> Mlp {
        let layout = if self.transposed { Layout::Kn } else { Layout::Nk };
        let weight = WeightDesc::new(dtype).layout(layout);
        let activation = match self.curve {
            Curve::Silu => Activation::Silu,
            Curve::Gelu => Activation::Gelu,
            Curve::GeluTanh => Activation::GeluTanh,
        };
        let glu = if self.gated { Glu::Interleaved } else { Glu::None };
        Mlp::relu(dtype).gate_up(weight.glu(glu)).down(weight).activation(activation)
    }

    /// Within the type's bound of the norm, of each whole and of every expert's part: an expert of few tokens hides behind no other. What nobody
    /// chose is zero.
    fn check<T: Storage>(&self, name: &str) {
        let &Layer { tokens, hidden, inner, experts, top_k, .. } = self;
        let rng = &mut rng(name);
        let width = if self.gated { 2 * inner } else { inner };
        let x: Vec<T> = normals(rng, tokens * hidden, 1.0);
        let dy: Vec<T> = normals(rng, tokens * hidden, 0.02);
        let up: Vec<T> = normals(rng, experts * width * hidden, 0.1);
        let down: Vec<T> = normals(rng, experts * hidden * inner, 0.1);
        let biases =
            self.biased.then(|| (normals::<T>(rng, experts * width, 0.1), normals::<T>(rng, experts * hidden, 0.1)));
        let chosen =
            Chosen { ids: random_ids(rng, tokens, experts, top_k), weights: probabilities(rng, tokens, top_k) };
        let desc = LayerDesc::new(T::DTYPE, hidden, inner, experts, top_k)
            .mlp(self.mlp(T::DTYPE))
            .capacity(self.capacity.map(|capacity| Capacity::new(capacity, tokens)));
        let run = Experts {
            desc,
            x: &x,
            chosen: &chosen,
            gate_up: &up,
            gate_up_bias: biases.as_ref().map(|(bias, _)| &bias[..]),
            down: &down,
            down_bias: biases.as_ref().map(|(_, bias)| &bias[..]),
            map: None,
        };
        let got = run.gradients(&dy);

        // What an expert has no place for passes nothing.
        let mut taken = vec![0; experts];
        let mut ids = chosen.ids.clone();
        for id in &mut ids {
            taken[*id as usize] += 1;
            if self.capacity.is_some_and(|capacity| taken[*id as usize] > capacity) {
                *id = -1;
            }
        }
        let (x, up, down) = (wide(&x), wide(&up), wide(&down));
        let biases = biases.map(|(first, second)| (wide(&first), wide(&second)));
        let formula = Formula {
            hidden,
            inner,
            experts,
            top_k,
            gated: self.gated,
            transposed: self.transposed,
            curve: self.curve,
            x: &x,
            ids: &ids,
            weights: &wide32(&chosen.weights),
            up: &up,
            up_bias: biases.as_ref().map(|(bias, _)| &bias[..]),
            down: &down,
            down_bias: biases.as_ref().map(|(_, bias)| &bias[..]),
        };
        let want = formula.gradients(&wide(&dy));
        let near = |what: &str, got: &[f64], want: &[f64]| {
            let (off, most) = (relative_error(what, got, want), layer(T::DTYPE));
            assert!(off <= most, "{what}: off by {off:.3e} in the norm, at most {most:.3e}");
        };
        near("dx", &wide(&got.x), &want.x);
        near("weights", &wide32(&got.weights), &want.weights);
        let parts = [
            ("first matrix", &got.gate_up, &want.up),
            ("first bias", &got.gate_up_bias, &want.up_bias),
            ("second matrix", &got.down, &want.down),
            ("second bias", &got.down_bias, &want.down_bias),
        ];
        for (what, got, want) in parts.into_iter().filter(|(_, got, _)| !got.is_empty()) {
            let size = want.len() / experts;
            for (e, (got, want)) in got.chunks(size).zip(want.chunks(size)).enumerate() {
                near(&format!("expert {e}: {what}"), &wide32(got), want);
            }
        }
    }
}

/// The grid of the forward half; gradients of the input, of the choices' weights and of both matrices.
pub fn scattermoe() -> Section {
    let mut section = Section::new("mlp_backward");
    for (tokens, hidden) in product(&[1, 64, 96], &[32, 64, 128, 72, 28]) {
        for top_k in [2, 3, 4] {
            let name = format!("n={tokens} x={hidden} k={top_k}");
            let point = name.clone();
            let of = Layer {
                tokens,
                hidden,
                inner: 4 * hidden / top_k,
                experts: 8,
                top_k,
                gated: false,
                biased: false,
                transposed: false,
                curve: Curve::Gelu,
                capacity: None,
            };
            section.point(name, move || of.check::<f32>(&point));
        }
    }
    section
}

const MEGABLOCKS: [[usize; 2]; 13] =
    [[1, 1], [2, 1], [4, 1], [8, 1], [1, 1], [2, 1], [4, 1], [2, 2], [4, 2], [4, 4], [8, 2], [8, 4], [8, 8]];

/// `forward_backward` of the layer with a capacity factor of 1 and of the dropless one, with and without a gate.
pub fn megablocks() -> Vec<Section> {
    let mut capacity = Section::new("moe_backward");
    let mut dropless = Section::new("dmoe_backward");
    let mut glu = Section::new("dmoe_glu_backward");
    for (i, &[experts, top_k]) in MEGABLOCKS.iter().enumerate() {
        let name = format!("{i} ne={experts} topk={top_k}");
        let of = |gated: bool, capacity: Option<usize>| Layer {
            tokens: 64,
            hidden: 64,
            inner: 128,
            experts,
            top_k,
            gated,
            biased: false,
            transposed: true,
            curve: Curve::GeluTanh,
            capacity,
        };
        let layers = [
            (&mut capacity, of(false, Some(top_k * 64 / experts)), true),
            (&mut dropless, of(false, None), false),
            (&mut glu, of(true, None), false),
        ];
        for (section, of, half) in layers {
            let point = name.clone();
            section.point(name.clone(), move || match half {
                true => of.check::<f16>(&point),
                false => of.check::<bf16>(&point),
            });
        }
    }
    vec![capacity, dropless, glu]
}

/// T, H, I, E, k of SonicMoE's suite.
const SONIC: [[usize; 5]; 12] = [
    [8192, 768, 256, 128, 8],
    [8192, 768, 512, 64, 4],
    [8192, 768, 1024, 32, 2],
    [8192, 1536, 256, 128, 8],
    [8192, 1536, 512, 64, 4],
    [8192, 1536, 1024, 32, 2],
    [8192, 4096, 256, 256, 16],
    [8192, 4096, 512, 128, 8],
    [8192, 4096, 1024, 64, 4],
    [8192, 4096, 512, 256, 16],
    [8192, 4096, 1024, 128, 8],
    [8192, 4096, 2048, 64, 4],
];

/// SonicMoE, `tests/moe_test.py`: SwiGLU of alternating rows in bf16, with and without biases. Scaled down: 8192 tokens to 40, widths to a 32nd and at
/// least 24.
pub fn sonic() -> Peer {
    let mut section = Section::new("moe");
    for (shape, biased) in product(&SONIC, &[false, true]) {
        let [tokens, hidden, inner, experts, top_k] = shape;
        let name = format!("T={tokens} H={hidden} I={inner} E={experts} K={top_k} bias={biased}");
        let point = name.clone();
        let of = Layer {
            tokens: scaled(tokens, 40),
            hidden: (hidden / 32).max(24),
            inner: (inner / 32).max(24),
            experts,
            top_k,
            gated: true,
            biased,
            transposed: false,
            curve: Curve::Silu,
            capacity: None,
        };
        section.point(name, move || of.check::<bf16>(&point));
    }
    Peer { name: "SonicMoE", suite: "`tests/moe_test.py`: gradients", sections: vec![section] }
}
