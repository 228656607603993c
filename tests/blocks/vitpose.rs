//! ViTPose+: an image's patches go to the expert of its dataset, which yields the last columns of what a common MLP yields the first of.

use moe_kernels::Workspace;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows, Strides};
use moe_kernels::experts::tiles::select_tile;
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::routers::by_sequence::{self, BySequenceArgs, BySequenceDesc};
use moe_kernels::rules::Activation;

use crate::folder::Folder;
use crate::run::{Run, close};
use crate::support::compare::Storage;

pub fn block<T: Storage>() {
    let (run, folder) = (Run::new(), Folder::open("vitpose_backbone", "encoder.layer.0.mlp."));
    let (kernels, stream) = (run.kernels, &run.stream);
    let (hidden, width, part, experts) = (64, 128, 16, 8);
    let x = folder.golden("x");
    let tokens = x.len() / hidden;
    let x = run.put::<T>(&x);
    let put = |name: &str| run.put::<T>(&folder.weight(name));
    let (up, up_bias, down, down_bias) = (put("fc1.weight"), put("fc1.bias"), put("fc2.weight"), put("fc2.bias"));
    let of_experts = run.put::<T>(&folder.stacked("experts.{}.weight", 0..experts));
    let biases = run.put::<T>(&folder.stacked("experts.{}.bias", 0..experts));

    // A recorded index is one of an image of one patch. The last is made one of no dataset.
    let mut datasets = folder.golden_ints("indices");
    *datasets.last_mut().unwrap() = experts as i32;
    let index = run.ints(&datasets);
    let (mut ids, mut shares) = (run.out_ints(tokens), run.out::<f32>(tokens));
    let desc = BySequenceDesc::new(tokens, 1, experts);
    by_sequence::forward(kernels, stream, &desc, BySequenceArgs::new(&index, &mut ids, &mut shares)).unwrap();
    let tile_m = select_tile(T::DTYPE, tokens, experts, kernels.device()).unwrap().bm as usize;
    let desc = DispatchDesc::new(tokens, experts, 1, tile_m);
    let mut rows = Dispatched::new(stream, &desc.shape()).unwrap();
    let bytes = dispatch::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(stream, bytes).unwrap();
    dispatch::forward(kernels, stream, &desc, DispatchArgs::new(&ids, &mut rows, &mut workspace)).unwrap();

    let mut h = run.out::<T>(tokens * width);
    let first = GemmDesc::new(T::DTYPE, Rows::Dense(tokens), width, hidden).activation(Activation::Gelu);
    gemm::forward(kernels, stream, &first, GemmArgs::new(&x, Weight::new(&up).bias(&up_bias), &mut h)).unwrap();

    // The experts' columns of whole rows, whose other columns are zero, then everybody's over these.
    let mut by_expert = stream.alloc_zeros::<T>(tokens * hidden).unwrap();
    let grouped = GemmDesc::new(T::DTYPE, Rows::Grouped(desc.shape()), part, width).gather(true);
    let grouped = grouped.strides(Some(Strides::packed(&grouped).out(hidden, 1)));
    let mut columns = by_expert.slice_mut(hidden - part..);
    let args = GemmArgs::new(&h, Weight::new(&of_experts).bias(&biases), &mut columns).dispatched(&rows);
    gemm::forward(kernels, stream, &grouped, args).unwrap();
    let mut y = run.out::<T>(tokens * hidden);
    let sum = CombineDesc::new(T::DTYPE, desc.shape(), hidden);
    combine::forward(kernels, stream, &sum, CombineArgs::new(&by_expert, &rows, &mut y)).unwrap();
    let common = GemmDesc::new(T::DTYPE, Rows::Dense(tokens), hidden - part, width);
    let common = common.strides(Some(Strides::packed(&common).out(hidden, 1)));
    let args = GemmArgs::new(&h, Weight::new(&down).bias(&down_bias), &mut y);
    gemm::forward(kernels, stream, &common, args).unwrap();

    // A patch of no dataset has nothing but the common columns.
    let mut want = folder.golden("y");
    want[tokens * hidden - part..].fill(0.0);
    close("y", &run.get(&y), &want, T::DTYPE);
}
