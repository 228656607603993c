//! Doge: experts of one hidden unit by product keys, beside a dense MLP. Its routing takes a token's keys from rows of the whole batch, as
//! transformers computes it.

use moe_kernels::experts::Weight;
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::unit_experts::{self, UnitExpertsArgs, UnitExpertsDesc};
use moe_kernels::routers::product_keys::{self, ProductKeysArgs, ProductKeysDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::{Activation, Glu, KeySplit, WeightDesc};
use moe_kernels::{Dtype, In};

use crate::folder::{Folder, gate_up};
use crate::run::{Run, close, same_weights};
use crate::support::compare::Storage;

pub fn block<T: Storage>() {
    let (run, folder) = (Run::new(), Folder::open("doge", "model.layers.0.mlp."));
    let (hidden, intermediate, experts, keys, k) = (64, 24, 64, 8, 4);
    let (kernels, stream) = (run.kernels, &run.stream);
    let x = folder.golden("x");
    let tokens = x.len() / hidden;
    let x = run.put::<T>(&x);

    let router = run.put::<f32>(&folder.weight("router_gate.weight"));
    let mut scores = run.out::<f32>(tokens * 2 * keys);
    let desc = RouterDesc::new(T::DTYPE, tokens, 2 * keys, hidden).weight(Dtype::F32);
    router::forward(kernels, stream, &desc, RouterArgs::new(&x, &router, &mut scores)).unwrap();
    close("logits", &run.get(&scores), &folder.golden("logits"), T::DTYPE);

    let (mut ids, mut shares) = (run.out_ints(tokens * k), run.out::<f32>(tokens * k));
    let desc = ProductKeysDesc::new(tokens, keys, k).split(KeySplit::Batch);
    product_keys::forward(kernels, stream, &desc, ProductKeysArgs::new(&scores, &mut ids, &mut shares)).unwrap();
    let (want_ids, want_shares) = (folder.golden_ints("ids"), folder.golden("weights"));
    same_weights("weights", (&run.get_ints(&ids), &run.get::<f32>(&shares)), (&want_ids, &want_shares), k, T::DTYPE);

    // The dense MLP, then the experts onto it.
    let dense = gate_up(&folder.weight("gate_proj.weight"), &folder.weight("up_proj.weight"), 1);
    let (dense, down) = (run.put::<T>(&dense), run.put::<T>(&folder.weight("down_proj.weight")));
    let (mut h, mut y) = (run.out::<T>(tokens * intermediate), run.out::<T>(tokens * hidden));
    let first = GemmDesc::new(T::DTYPE, Rows::Dense(tokens), intermediate, hidden)
        .weight(WeightDesc::new(T::DTYPE).glu(Glu::Split))
        .activation(Activation::Silu);
    gemm::forward(kernels, stream, &first, GemmArgs::new(&x, Weight::new(&dense), &mut h)).unwrap();
    let second = GemmDesc::new(T::DTYPE, Rows::Dense(tokens), hidden, intermediate);
    gemm::forward(kernels, stream, &second, GemmArgs::new(&h, Weight::new(&down), &mut y)).unwrap();
    let (input, output) =
        (run.put::<T>(&folder.weight("down_embed.weight")), run.put::<T>(&folder.weight("up_embed.weight")));
    let desc = UnitExpertsDesc::new(T::DTYPE, tokens, hidden, experts, k);
    let mut sum = run.out::<T>(tokens * hidden);
    let rows = [In::from(&input), In::from(&output)];
    let args = UnitExpertsArgs::new(&x, rows, &ids, &shares, &mut sum).addend(&y);
    unit_experts::forward(kernels, stream, &desc, args).unwrap();
    close("y", &run.get(&sum), &folder.golden("y"), T::DTYPE);
}
