//! The `sm_90a` kernels of the way back: when they are chosen, and their tensor maps.

use super::{GemmBackwardDesc, OPERATION};
use crate::experts::gemm::choice::Candidate;
use crate::experts::gemm::{GemmDesc, KernelSet, hopper};
use crate::registry::{GemmHopper, Kernel};
use crate::runtime::launch::{Address, Scope};
use crate::runtime::params::{GemmBackwardHopperMore, GemmBackwardHopperParams, GemmBackwardParams};
use crate::{DeviceInfo, Error, Selection};

/// The kernel, which takes packed rows alone and adds to nothing, where the set asks for it, or where it is ahead of the one of the `sm_80` set that `other` launches, by [`crate::experts::cost`].
pub(super) fn select(
    desc: &GemmBackwardDesc,
    other: &Selection,
    device: &DeviceInfo,
) -> Result<Option<Selection>, Error> {
    let product = desc.product();
    let ([shared_n, _], _) = desc.shared();
    let found = product
        .vector_layout()
        .and_then(|layout| hopper::candidate(&product, shared_n, layout, device))
        .filter(|_| device.shared_bytes_per_block >= GemmHopper::BACKWARD_SHARED_BYTES)
        .filter(|_| desc.a_rows_apart.is_none() && !desc.accumulate);
    let is_ahead = |gemm: GemmHopper| match other.kernel.variant() {
        Kernel::Gemm(sm80) => Candidate::Hopper(gemm).is_ahead_of(Candidate::sm80(&sm80), &product, shared_n, device),
        _ => false,
    };
    let chosen = match desc.kernels {
        KernelSet::Sm80 => None,
        KernelSet::Sm90a => Some(found.ok_or_else(|| hopper::refusal(OPERATION, &product, device))?),
        KernelSet::Fastest => found.filter(|(gemm, _)| is_ahead(*gemm)),
    };
    Ok(chosen.map(|(gemm, blocks)| hopper::selection(Kernel::GemmBackwardHopper(gemm), blocks)))
}

/// The launch's parameters with the maps of rows and weights: `at` and `shared` are a pair of both.
pub(super) fn with_maps<'a>(
    scope: &Scope<'_>,
    desc: &GemmBackwardDesc,
    gemm: &GemmHopper,
    params: GemmBackwardParams<'a>,
    [a, weight]: [Address<'_>; 2],
    shared: Option<[Address<'_>; 2]>,
) -> Result<GemmBackwardHopperParams<'a>, Error> {
    let product = desc.product();
    let ([shared_n, _], _) = desc.shared();
    let of = |product: &GemmDesc, weight| hopper::weight_map(scope, product, gemm, weight);
    let map_b = of(&product, weight)?;
    // Those that the kernel does not use are the weight's.
    let map_shared_b = shared.map_or(Ok(map_b), |[_, weight]| of(&product.of_shared(shared_n), weight))?;
    let [map_a, map_shared_a] = hopper::a_maps(scope, &product, a, shared.map(|[a, _]| a), map_b)?;
    let more = GemmBackwardHopperMore { map_b, map_shared_b, map_a, map_shared_a };
    Ok(GemmBackwardHopperParams::with(params, more))
}
