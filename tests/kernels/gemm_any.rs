//! Checks of `gemm_*_any`: widths that are no multiples of 8, buffers that begin on any element, lists of tiles of every height.

use half::{bf16, f16};
use moe_kernels::Dtype;
use moe_kernels::experts::gemm::KernelSet;
use moe_kernels::registry::{Fold, GemmAny, Kernel};
use moe_kernels::rules::{Glu, Layout};

use crate::gemm::{Case, Variant, activations, dense, forms, grouped};
use crate::strides;
use crate::support::compare::Storage;
use crate::token_sums;

pub fn check(variant: GemmAny, rng: &mut fastrand::Rng) {
    match variant.dtype {
        Dtype::Bf16 => check_as::<bf16>(variant, rng),
        Dtype::F16 => check_as::<f16>(variant, rng),
        Dtype::F32 => check_as::<f32>(variant, rng),
        other => unreachable!("no kernel has {other}"),
    }
}

fn check_as<T: Storage>(any: GemmAny, rng: &mut fastrand::Rng) {
    let fold = if any.gated { Fold::Glu } else { Fold::Plain };
    let forms: Vec<Glu> =
        if any.gated { [forms(Fold::Glu), forms(Fold::Iglu)].concat() } else { forms(Fold::Plain).to_vec() };
    for (index, activation) in activations(fold).into_iter().enumerate() {
        for layout in Layout::ALL {
            let second = usize::from(layout == Layout::Kn);
            // A block has 64 rows: lists of lower tiles, of its own, and of higher ones, whose last part may be empty.
            let tile_m = [16, 64, 128][(index + second) % 3];
            // Chunks are read by elements, or by 16 or 4 bytes at once.
            let shift = [1, 3, 0, 5, 2][index % 5];
            let (kernel, kernels) = (Kernel::GemmAny(any), KernelSet::Fastest);
            let variant =
                Variant { kernel, kernels, dtype: any.dtype, layout, tile_m, tile_n: None, fold, shift, few: false };
            // K: one, less than a stage, ragged, several stages; N: one, less than a tile, a tile and one more.
            let [k, n] = [[37, 13], [8, 70], [136, 1], [65, 129], [100, 12]][index % 5];
            let (gather, bias) = (index % 2 == second, index % 3 != 1);
            let (scale, out_scale) = (index % 2 == 0, index % 2 == 1);
            let glu = |more: usize| forms[(index + second + more) % forms.len()];
            let case =
                Case { k, n, glu: glu(0), activation, by_expert: true, gather, bias, scale, out_scale, once: false };
            let loads = [tile_m, 0, 1, tile_m / 2 + 1, 0, tile_m - 1];
            grouped::<T>(variant, rng, &loads, &case);
            let rows = [[1], [63], [65], [133], [9]][index % 5];
            let k = [1, 133, 70, 130, 64][index % 5];
            dense::<T>(variant, rng, &rows, &Case { k, glu: glu(1), out_scale: !out_scale, ..case });
        }
    }
    let (layout, tile_m, shift) = (Layout::Nk, 64, 1);
    let (kernel, kernels) = (Kernel::GemmAny(any), KernelSet::Fastest);
    let variant = Variant { kernel, kernels, dtype: any.dtype, layout, tile_m, tile_n: None, fold, shift, few: false };
    strides::check::<T>(variant, rng);
    if !any.gated {
        token_sums::check::<T>(variant, rng);
    }
}
