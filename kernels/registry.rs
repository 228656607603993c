//! Every kernel variant that exists, listed once.
//!
//! `build.rs` renders a PTX module for each entry of `all`; `src/` selects entries, and takes launch geometry from the
//! same values that the template was rendered with. The file is compiled into both, so it depends on nothing but the kinds.

#[path = "registry/capacity.rs"]
mod capacity;
#[path = "registry/experts.rs"]
mod experts;
#[path = "registry/routers.rs"]
mod routers;
#[path = "registry/tiles.rs"]
mod tiles;

use crate::rules::kinds::{Dtype, Layout, Score};
pub use capacity::{Admission, Dispatch, IDS_BYTES, MAX_CHUNKS, MAX_COUNTED};
use experts::any_width;
pub use experts::{
    COLUMN_PRODUCTS_THREADS, Combine, CombineRagged, Fold, GRADIENT_BUFFERS, GRADIENT_CHUNK, Gemm, GemmAny, GemmHopper,
    GemmSwapped, KGrouped, KGroupedHopper, MAX_UNIT_SHARE, MAX_UNIT_TOP_K, PERMUTE_BATCH, PERMUTE_UNITS,
    RMS_NORM_THREADS, permute_grid,
};
pub use routers::{
    AFFINITY_TOKENS, Gate, LOAD_IMPORTANCE_TOKENS, MAX_PRODUCT_KEYS, MeasuredGate, Noisy, Route, Router,
    RouterBackward, RouterBackwardBoth, RouterShape, Sinkhorn, Spread, WideGate,
};
pub use tiles::{Arch, BLOCK_WARPS, Tile};

/// One compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// Scores of experts.
    Router(Router),
    /// Choice of experts, with dispatch or without.
    Gating(Gate),
    /// Scores of experts, choice and dispatch of a few tokens.
    Route(Route),
    /// Choice of more than 32 experts.
    GatingWide(WideGate),
    /// Slots that experts with a capacity keep by weight.
    KeepLargest,
    /// The correction bias that shares a batch out evenly.
    QuantileBias,
    /// The loss of importance and of loads under noise.
    LoadImportance,
    /// Slots sorted by expert.
    Dispatch(Dispatch),
    /// The same with each expert's rows rounded up to a multiple, and a limit on all rows.
    DispatchRows(Dispatch),
    /// Slots of each expert counted, and the sums of the counts.
    ExpertCounts {
        /// Bytes of an id: 4 or 8.
        ids_bytes: u32,
    },
    /// Expert numbers of each token from its row of a map of all experts.
    MapToIds,
    /// The other way.
    IdsToMap {
        /// Bytes of an id: 4 or 8.
        ids_bytes: u32,
    },
    /// Where rows come from when chunks of rows change places.
    ChunkRows,
    /// Rows of one matrix as another, by number.
    Permute {
        /// Bytes that a thread moves at once.
        unit: u32,
    },
    /// The experts' products.
    Gemm(Gemm),
    /// The experts' products on Hopper.
    GemmHopper(GemmHopper),
    /// The experts' products of few rows.
    GemmSwapped(GemmSwapped),
    /// The experts' products, whatever the rows' width.
    GemmAny(GemmAny),
    /// The second product's way back, with the activation's behind it: a plain product's shape.
    GemmBackward(Gemm),
    /// The same on Hopper.
    GemmBackwardHopper(GemmHopper),
    /// The same whatever the rows' width.
    GemmBackwardAny(GemmAny),
    /// Products over the experts' rows.
    KGrouped(KGrouped),
    /// The same on Hopper.
    KGroupedHopper(KGroupedHopper),
    /// Sums over a token's experts.
    Combine(Combine),
    /// What stands beside a token's sum, where the second product has made that.
    CombineSums(Combine),
    /// Which of its choices a token gets under a capacity.
    Admission(Admission),
    /// Gradients of the weights that it chose among.
    AdmissionBackward,
    /// What each expert thinks of each token.
    Affinity,
    /// Each expert's best tokens.
    ExpertChoice,
    /// The slots of every token.
    TokenSlots,
    /// Sums over as many slots as a token has.
    CombineRagged(CombineRagged),
    /// Balanced assignment (BASE).
    Base,
    /// Balanced routing by optimal transport (S-BASE).
    Sinkhorn(Sinkhorn),
    /// Experts by token id.
    Hash,
    /// Noisy top-k gating with importance, load and their losses.
    Noisy(Noisy),
    /// Choice of experts, with losses and statistics.
    MeasuredGating(MeasuredGate),
    /// Balancing losses of totals.
    BalanceLoss,
    /// The correction bias after a step.
    UpdateBias,
    /// Router's expert numbers to those of a device.
    ExpertMap {
        /// Bytes of an id: 4 or 8.
        ids_bytes: u32,
    },
    /// What is wrong with lists from elsewhere.
    CheckLists,
    /// Lists of rows that lie by expert.
    RowGroups,
    /// Experts drawn from the router's distribution.
    Sampled(Spread),
    /// Multiplicative noise on a matrix.
    Jitter(Dtype),
    /// A noise state moved on.
    NoiseState,
    /// The gradient of a gating's logits.
    GatingBackward {
        /// Every rule and loss, else those of the common models.
        any: bool,
    },
    /// Gradients of the factors of a gating's weights.
    ScaleSums,
    /// Slots of each expert in each sequence.
    SequenceCounts,
    /// The gradients of a noisy gating's products.
    NoisyBackward {
        /// The second level of a hierarchy.
        grouped: bool,
    },
    /// The gradient of sampled routing's logits.
    SampledBackward,
    /// SparseMixer's draws in training.
    SparseMixer,
    /// The gradient of the logits by which experts chose tokens.
    AffinityBackward,
    /// The gradient of the loss of importance and of loads.
    LoadImportanceBackward,
    /// The way back from rows of length 1 to what they were made of, of this type.
    UnitBackward(Dtype),
    /// The gradient of both lists' scores of product keys.
    ProductKeysBackward,
    /// Back through the activation between the products.
    ActivationBackward(Dtype),
    /// Norm, finiteness and clipping factor of gradients.
    GradientNorm,
    /// Gradients times a factor.
    GradientScale,
    /// Back through the sums over a token's experts.
    CombineBackward(Combine),
    /// Back through the router's product.
    RouterBackward(RouterBackward),
    /// Both gradients of a router product.
    RouterBackwardBoth(RouterBackwardBoth),
    /// Rows divided by their root mean square.
    RmsNorm(Dtype),
    /// Back through that.
    RmsNormBackward(Dtype),
    /// Sums down columns of rows times rows.
    ColumnProducts(Dtype),
    /// Experts by the best pairs of keys.
    ProductKeys,
    /// Experts of one hidden unit.
    UnitExperts(Dtype),
    /// Their way back to tokens and weights.
    UnitExpertsBackward(Dtype),
    /// Their way back to their own rows.
    UnitExpertsRows(Dtype),
    /// Gradients of the weights of choices.
    ChoiceBackward(Dtype),
    /// A shared expert's gate, and its slope.
    SigmoidGate,
    /// One expert for the tokens of a sequence.
    BySequence {
        /// Bytes of an index: 4 or 8.
        ids_bytes: u32,
    },
    /// The tokens of each bank of experts, by their types.
    TokenBanks {
        /// Bytes of a type: 4 or 8.
        ids_bytes: u32,
    },
}

impl Kernel {
    /// The whole specialisation in one word: the PTX entry's name, the module's file name, the name of its tests.
    pub fn name(&self) -> String {
        match self {
            Kernel::Router(k) => format!("router_{}_{}_{}", k.x, k.weight, k.shape.name()),
            Kernel::Gating(k) => {
                format!("gating_{}_v{}{}", k.score_name(), k.values, if k.dispatch { "_dispatch" } else { "" })
            }
            Kernel::Route(k) => format!("route_{}_v{}", k.gate().score_name(), k.values),
            Kernel::GatingWide(k) => format!("{}_wide", Kernel::Gating(k.gate()).name()),
            Kernel::Dispatch(k) => format!("dispatch_e{}{}", k.max_experts, wide(k.ids_bytes)),
            Kernel::DispatchRows(k) => format!("dispatch_rows_e{}{}", k.max_experts, wide(k.ids_bytes)),
            Kernel::ExpertCounts { ids_bytes } => format!("expert_counts{}", wide(*ids_bytes)),
            Kernel::MapToIds => "map_to_ids".into(),
            Kernel::IdsToMap { ids_bytes } => format!("ids_to_map{}", wide(*ids_bytes)),
            Kernel::ChunkRows => "chunk_rows".into(),
            Kernel::Permute { unit } => format!("permute_b{unit}"),
            Kernel::Gemm(k) => {
                format!("gemm_{}_{}_{}_{}", k.dtype, k.tile.name(), k.fold.name(), k.layout.name())
            }
            Kernel::GemmHopper(k) => {
                let tile = GemmHopper::TILE.name();
                format!("gemm_{}_{tile}_{}_{}_sm90a", k.dtype, k.fold.name(), k.layout.name())
            }
            Kernel::GemmSwapped(k) => {
                let (tile, end) = (GemmSwapped::TILE.name(), if k.combines { "_combine" } else { "" });
                format!("gemm_{}_{tile}_{}_{}_swapped{end}", k.dtype, k.fold.name(), k.layout.name())
            }
            Kernel::GemmAny(k) => format!("gemm_{}_{}_{}_any", k.dtype, k.tile().name(), k.fold().name()),
            Kernel::GemmBackward(k) => format!("gemm_backward_{}_{}_{}", k.dtype, k.tile.name(), k.layout.name()),
            Kernel::GemmBackwardHopper(k) => {
                format!("gemm_backward_{}_{}_{}_sm90a", k.dtype, GemmHopper::TILE.name(), k.layout.name())
            }
            Kernel::GemmBackwardAny(k) => format!("gemm_backward_{}_{}_any", k.dtype, k.tile().name()),
            Kernel::KGrouped(k) => format!("k_grouped_{}_{}{}", k.dtype, k.tile().name(), any_width(k.any)),
            Kernel::KGroupedHopper(k) => format!("k_grouped_{}_{}_sm90a", k.dtype, k.tile().name()),
            Kernel::Combine(k) => format!("combine_{}{}", k.dtype, any_width(k.any)),
            Kernel::CombineSums(k) => format!("combine_sums_{}{}", k.dtype, any_width(k.any)),
            Kernel::Admission(k) => format!("admission_e{}", k.max_experts),
            Kernel::AdmissionBackward => "admission_backward".into(),
            Kernel::Affinity => "affinity".into(),
            Kernel::ExpertChoice => "expert_choice".into(),
            Kernel::TokenSlots => "token_slots".into(),
            Kernel::CombineRagged(k) => format!("combine_ragged_{}{}", k.dtype, any_width(k.any)),
            Kernel::Base => "base".into(),
            Kernel::Sinkhorn(k) => format!("sinkhorn_e{}", k.max_experts),
            Kernel::Hash => "hash".into(),
            Kernel::Noisy(k) => {
                format!("noisy_{}e{}", if k.grouped { "grouped_" } else { "" }, k.spread.max_experts())
            }
            Kernel::MeasuredGating(k) => format!("{}_measured", Kernel::Gating(k.gate()).name()),
            Kernel::KeepLargest => "keep_largest".into(),
            Kernel::QuantileBias => "quantile_bias".into(),
            Kernel::LoadImportance => "load_importance".into(),
            Kernel::BalanceLoss => "balance_loss".into(),
            Kernel::UpdateBias => "update_bias".into(),
            Kernel::ExpertMap { ids_bytes } => format!("expert_map{}", wide(*ids_bytes)),
            Kernel::CheckLists => "check_lists".into(),
            Kernel::RowGroups => "row_groups".into(),
            Kernel::Sampled(spread) => format!("sampled_e{}", spread.max_experts()),
            Kernel::Jitter(dtype) => format!("jitter_{dtype}"),
            Kernel::NoiseState => "noise_state".into(),
            Kernel::GatingBackward { any } => format!("gating_backward{}", if *any { "_any" } else { "" }),
            Kernel::ScaleSums => "scale_sums".into(),
            Kernel::NoisyBackward { grouped } => format!("noisy_backward{}", if *grouped { "_grouped" } else { "" }),
            Kernel::SequenceCounts => "sequence_counts".into(),
            Kernel::SampledBackward => "sampled_backward".into(),
            Kernel::SparseMixer => "sparse_mixer".into(),
            Kernel::AffinityBackward => "affinity_backward".into(),
            Kernel::LoadImportanceBackward => "load_importance_backward".into(),
            Kernel::ProductKeysBackward => "product_keys_backward".into(),
            Kernel::UnitBackward(dtype) => format!("unit_backward_{dtype}"),
            Kernel::ActivationBackward(dtype) => format!("activation_backward_{dtype}"),
            Kernel::GradientNorm => "gradient_norm".into(),
            Kernel::GradientScale => "gradient_scale".into(),
            Kernel::CombineBackward(k) => format!("combine_backward_{}{}", k.dtype, any_width(k.any)),
            Kernel::RouterBackward(k) => format!("router_backward_{}_{}", k.b, k.out),
            Kernel::RouterBackwardBoth(k) => format!("router_backward_both_{}_{}", k.x, k.weight),
            Kernel::RmsNorm(dtype) => format!("rms_norm_{dtype}"),
            Kernel::RmsNormBackward(dtype) => format!("rms_norm_backward_{dtype}"),
            Kernel::ColumnProducts(dtype) => format!("column_products_{dtype}"),
            Kernel::ProductKeys => "product_keys".into(),
            Kernel::UnitExperts(dtype) => format!("unit_experts_{dtype}"),
            Kernel::UnitExpertsBackward(dtype) => format!("unit_experts_backward_{dtype}"),
            Kernel::UnitExpertsRows(dtype) => format!("unit_experts_rows_{dtype}"),
            Kernel::ChoiceBackward(dtype) => format!("choice_backward_{dtype}"),
            Kernel::SigmoidGate => "sigmoid_gate".into(),
            Kernel::BySequence { ids_bytes } => format!("by_sequence{}", wide(*ids_bytes)),
            Kernel::TokenBanks { ids_bytes } => format!("token_banks{}", wide(*ids_bytes)),
        }
    }

    /// Its parameter list, which variants share: the build makes a struct of this name and `Params`.
    pub const fn entry(&self) -> &'static str {
        match self {
            Kernel::Router(_) => "Router",
            Kernel::Gating(Gate { score: Some(_), dispatch: false, .. }) => "Gating",
            Kernel::Gating(Gate { score: Some(_), dispatch: true, .. }) => "GatingDispatch",
            Kernel::Gating(Gate { score: None, dispatch: false, .. }) => "GatingAny",
            Kernel::Gating(Gate { score: None, dispatch: true, .. }) => "GatingAnyDispatch",
            Kernel::Route(Route { score: Some(_), .. }) => "Route",
            Kernel::Route(Route { score: None, .. }) => "RouteAny",
            Kernel::GatingWide(_) => "Gating",
            Kernel::Dispatch(_) => "Dispatch",
            Kernel::DispatchRows(_) => "DispatchRows",
            Kernel::ExpertCounts { .. } => "ExpertCounts",
            Kernel::MapToIds => "MapToIds",
            Kernel::IdsToMap { .. } => "IdsToMap",
            Kernel::ChunkRows => "ChunkRows",
            Kernel::Permute { .. } => "Permute",
            Kernel::Gemm(_) | Kernel::GemmAny(_) => "Gemm",
            Kernel::GemmHopper(_) => "GemmHopper",
            Kernel::GemmSwapped(_) => "GemmSwapped",
            Kernel::GemmBackward(_) | Kernel::GemmBackwardAny(_) => "GemmBackward",
            Kernel::GemmBackwardHopper(_) => "GemmBackwardHopper",
            Kernel::KGrouped(_) => "KGrouped",
            Kernel::KGroupedHopper(_) => "KGroupedHopper",
            Kernel::Combine(_) | Kernel::CombineSums(_) => "Combine",
            Kernel::Admission(_) => "Admission",
            Kernel::AdmissionBackward => "AdmissionBackward",
            Kernel::Affinity => "Affinity",
            Kernel::ExpertChoice => "ExpertChoice",
            Kernel::TokenSlots => "TokenSlots",
            Kernel::CombineRagged(_) => "CombineRagged",
            Kernel::Base => "Base",
            Kernel::Sinkhorn(_) => "Sinkhorn",
            Kernel::Hash => "Hash",
            Kernel::Noisy(Noisy { grouped: false, .. }) => "Noisy",
            Kernel::Noisy(Noisy { grouped: true, .. }) => "NoisyGrouped",
            Kernel::MeasuredGating(MeasuredGate { score: Some(_), .. }) => "MeasuredGating",
            Kernel::MeasuredGating(MeasuredGate { score: None, .. }) => "MeasuredGatingAny",
            Kernel::KeepLargest => "KeepLargest",
            Kernel::QuantileBias => "QuantileBias",
            Kernel::LoadImportance => "LoadImportance",
            Kernel::BalanceLoss => "BalanceLoss",
            Kernel::UpdateBias => "UpdateBias",
            Kernel::ExpertMap { .. } => "ExpertMap",
            Kernel::CheckLists => "CheckLists",
            Kernel::RowGroups => "RowGroups",
            Kernel::Sampled(_) => "Sampled",
            Kernel::Jitter(_) => "Jitter",
            Kernel::NoiseState => "NoiseState",
            Kernel::GatingBackward { any: false } => "GatingBackward",
            Kernel::GatingBackward { any: true } => "GatingBackwardAny",
            Kernel::ScaleSums => "ScaleSums",
            Kernel::NoisyBackward { grouped: false } => "NoisyBackward",
            Kernel::NoisyBackward { grouped: true } => "NoisyBackwardGrouped",
            Kernel::SequenceCounts => "SequenceCounts",
            Kernel::SampledBackward => "SampledBackward",
            Kernel::SparseMixer => "SparseMixer",
            Kernel::AffinityBackward => "AffinityBackward",
            Kernel::LoadImportanceBackward => "LoadImportanceBackward",
            Kernel::ProductKeysBackward => "ProductKeysBackward",
            Kernel::UnitBackward(_) => "UnitBackward",
            Kernel::ActivationBackward(_) => "ActivationBackward",
            Kernel::GradientNorm => "GradientNorm",
            Kernel::GradientScale => "GradientScale",
            Kernel::CombineBackward(_) => "CombineBackward",
            Kernel::RouterBackward(_) => "RouterBackward",
            Kernel::RouterBackwardBoth(_) => "RouterBackwardBoth",
            Kernel::RmsNorm(_) => "RmsNorm",
            Kernel::RmsNormBackward(_) => "RmsNormBackward",
            Kernel::ColumnProducts(_) => "ColumnProducts",
            Kernel::ProductKeys => "ProductKeys",
            Kernel::UnitExperts(_) => "UnitExperts",
            Kernel::UnitExpertsBackward(_) => "UnitExpertsBackward",
            Kernel::UnitExpertsRows(_) => "UnitExpertsRows",
            Kernel::ChoiceBackward(_) => "ChoiceBackward",
            Kernel::SigmoidGate => "SigmoidGate",
            Kernel::BySequence { .. } => "BySequence",
            Kernel::TokenBanks { .. } => "TokenBanks",
        }
    }

    /// Oldest architecture that runs it.
    pub const fn arch(&self) -> Arch {
        match self {
            Kernel::GemmHopper(_) | Kernel::GemmBackwardHopper(_) | Kernel::KGroupedHopper(_) => Arch::Sm90a,
            _ => Arch::Sm80,
        }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        match self {
            Kernel::Router(k) => k.shape.threads(),
            Kernel::Gating(k) => k.warps() * 32,
            Kernel::Route(k) => k.warps() * 32,
            Kernel::GatingWide(k) => k.gate().warps() * 32,
            Kernel::KeepLargest | Kernel::QuantileBias | Kernel::LoadImportance => BLOCK_WARPS * 32,
            Kernel::Dispatch(k) | Kernel::DispatchRows(k) => k.warps() * 32,
            Kernel::ExpertCounts { .. }
            | Kernel::MapToIds
            | Kernel::IdsToMap { .. }
            | Kernel::ChunkRows
            | Kernel::Permute { .. } => BLOCK_WARPS * 32,
            Kernel::Gemm(k) | Kernel::GemmBackward(k) => k.tile.threads(),
            Kernel::GemmHopper(_) | Kernel::GemmBackwardHopper(_) => GemmHopper::THREADS,
            Kernel::GemmSwapped(_) => GemmSwapped::TILE.threads(),
            Kernel::GemmAny(k) | Kernel::GemmBackwardAny(k) => k.tile().threads(),
            Kernel::KGrouped(k) => k.tile().threads(),
            Kernel::KGroupedHopper(_) => KGroupedHopper::THREADS,
            Kernel::Combine(_) | Kernel::CombineSums(_) | Kernel::CombineRagged(_) => Combine::THREADS,
            Kernel::Admission(k) => k.warps() * 32,
            Kernel::Sinkhorn(k) => k.warps() * 32,
            Kernel::Affinity | Kernel::ExpertChoice | Kernel::TokenSlots | Kernel::Base | Kernel::Hash => {
                BLOCK_WARPS * 32
            }
            Kernel::Noisy(k) => k.spread.warps() * 32,
            Kernel::MeasuredGating(k) => k.gate().warps() * 32,
            Kernel::BalanceLoss | Kernel::UpdateBias | Kernel::ExpertMap { .. } | Kernel::CheckLists => {
                BLOCK_WARPS * 32
            }
            Kernel::Sampled(spread) => spread.warps() * 32,
            Kernel::Jitter(_)
            | Kernel::RowGroups
            | Kernel::GatingBackward { .. }
            | Kernel::ScaleSums
            | Kernel::NoisyBackward { .. }
            | Kernel::SequenceCounts
            | Kernel::SampledBackward
            | Kernel::SparseMixer
            | Kernel::AffinityBackward
            | Kernel::LoadImportanceBackward
            | Kernel::ProductKeysBackward
            | Kernel::UnitBackward(_)
            | Kernel::ActivationBackward(_)
            | Kernel::GradientNorm
            | Kernel::GradientScale
            | Kernel::CombineBackward(_)
            | Kernel::RouterBackward(_)
            | Kernel::RouterBackwardBoth(_) => BLOCK_WARPS * 32,
            Kernel::NoiseState => 32,
            Kernel::ChoiceBackward(_) | Kernel::SigmoidGate | Kernel::AdmissionBackward => BLOCK_WARPS * 32,
            Kernel::RmsNorm(_) | Kernel::RmsNormBackward(_) => RMS_NORM_THREADS,
            Kernel::ColumnProducts(_) => COLUMN_PRODUCTS_THREADS,
            Kernel::ProductKeys
            | Kernel::UnitExperts(_)
            | Kernel::UnitExpertsBackward(_)
            | Kernel::UnitExpertsRows(_)
            | Kernel::BySequence { .. }
            | Kernel::TokenBanks { .. } => BLOCK_WARPS * 32,
        }
    }

    /// Dynamic shared memory in bytes.
    pub const fn shared_bytes(&self) -> u32 {
        match self {
            Kernel::Router(k) => k.shared_bytes(),
            Kernel::Gemm(k) | Kernel::GemmBackward(k) => k.shared_bytes(),
            Kernel::GemmHopper(_) => GemmHopper::SHARED_BYTES,
            Kernel::GemmBackwardHopper(_) => GemmHopper::BACKWARD_SHARED_BYTES,
            Kernel::GemmSwapped(_) => GemmSwapped::SHARED_BYTES,
            Kernel::GemmAny(k) | Kernel::GemmBackwardAny(k) => k.shared_bytes(),
            Kernel::KGrouped(k) => k.shared_bytes(),
            Kernel::KGroupedHopper(_) => KGroupedHopper::SHARED_BYTES,
            Kernel::MeasuredGating(k) => k.shared_bytes(),
            _ => 0,
        }
    }

    /// File below `kernels/` that this variant is rendered from.
    pub const fn template(&self) -> &'static str {
        match self {
            Kernel::Router(Router { shape: RouterShape::Tile | RouterShape::Any, .. }) => {
                "routers/router_tile.ptx.jinja"
            }
            Kernel::Router(Router { shape: RouterShape::Warp, .. }) => "routers/router_warp.ptx.jinja",
            Kernel::Router(Router { shape: RouterShape::Few, .. }) => "routers/router_few.ptx.jinja",
            Kernel::Router(_) => "routers/router_mma.ptx.jinja",
            Kernel::Gating(Gate { dispatch: false, .. }) => "routers/gating.ptx.jinja",
            Kernel::Gating(Gate { dispatch: true, .. }) => "routers/gating_dispatch.ptx.jinja",
            Kernel::Route(k) if k.is_many() => "routers/route_many.ptx.jinja",
            Kernel::Route(_) => "routers/route.ptx.jinja",
            Kernel::GatingWide(_) => "routers/gating_wide.ptx.jinja",
            Kernel::Dispatch(_) | Kernel::DispatchRows(_) => "capacity/dispatch.ptx.jinja",
            Kernel::ExpertCounts { .. } => "capacity/expert_counts.ptx.jinja",
            Kernel::MapToIds => "capacity/map_to_ids.ptx.jinja",
            Kernel::IdsToMap { .. } => "capacity/ids_to_map.ptx.jinja",
            Kernel::ChunkRows => "capacity/chunk_rows.ptx.jinja",
            Kernel::Permute { .. } => "experts/permute.ptx.jinja",
            Kernel::Gemm(_) => "experts/gemm.ptx.jinja",
            Kernel::GemmHopper(_) => "experts/sm90a/gemm.ptx.jinja",
            Kernel::GemmSwapped(_) => "experts/gemm_swapped.ptx.jinja",
            Kernel::GemmAny(_) => "experts/gemm_any.ptx.jinja",
            Kernel::GemmBackward(_) | Kernel::GemmBackwardAny(_) => "experts/gemm_backward.ptx.jinja",
            Kernel::GemmBackwardHopper(_) => "experts/sm90a/gemm_backward.ptx.jinja",
            Kernel::KGrouped(KGrouped { any: false, .. }) => "experts/k_grouped.ptx.jinja",
            Kernel::KGrouped(KGrouped { any: true, .. }) => "experts/k_grouped_any.ptx.jinja",
            Kernel::KGroupedHopper(_) => "experts/sm90a/k_grouped.ptx.jinja",
            Kernel::Combine(_) | Kernel::CombineSums(_) => "experts/combine.ptx.jinja",
            Kernel::Admission(_) => "capacity/admission.ptx.jinja",
            Kernel::AdmissionBackward => "capacity/admission_backward.ptx.jinja",
            Kernel::Affinity => "routers/affinity.ptx.jinja",
            Kernel::ExpertChoice => "routers/expert_choice.ptx.jinja",
            Kernel::TokenSlots => "capacity/token_slots.ptx.jinja",
            Kernel::CombineRagged(_) => "experts/combine_ragged.ptx.jinja",
            Kernel::Base => "routers/base.ptx.jinja",
            Kernel::Sinkhorn(_) => "routers/sinkhorn.ptx.jinja",
            Kernel::Hash => "routers/hash.ptx.jinja",
            Kernel::Noisy(_) => "routers/noisy.ptx.jinja",
            Kernel::MeasuredGating(_) => "routers/gating_measured.ptx.jinja",
            Kernel::KeepLargest => "capacity/keep_largest.ptx.jinja",
            Kernel::QuantileBias => "routers/quantile_bias.ptx.jinja",
            Kernel::LoadImportance => "routers/load_importance.ptx.jinja",
            Kernel::BalanceLoss => "routers/balance_loss.ptx.jinja",
            Kernel::UpdateBias => "routers/update_bias.ptx.jinja",
            Kernel::ExpertMap { .. } => "capacity/expert_map.ptx.jinja",
            Kernel::CheckLists => "capacity/check_lists.ptx.jinja",
            Kernel::RowGroups => "capacity/row_groups.ptx.jinja",
            Kernel::Sampled(_) => "routers/sampled.ptx.jinja",
            Kernel::Jitter(_) => "routers/jitter.ptx.jinja",
            Kernel::NoiseState => "routers/noise_state.ptx.jinja",
            Kernel::GatingBackward { .. } => "routers/gating_backward.ptx.jinja",
            Kernel::ScaleSums => "routers/scale_sums.ptx.jinja",
            Kernel::NoisyBackward { .. } => "routers/noisy_backward.ptx.jinja",
            Kernel::SequenceCounts => "routers/sequence_counts.ptx.jinja",
            Kernel::SampledBackward => "routers/sampled_backward.ptx.jinja",
            Kernel::SparseMixer => "routers/sparse_mixer.ptx.jinja",
            Kernel::AffinityBackward => "routers/affinity_backward.ptx.jinja",
            Kernel::LoadImportanceBackward => "routers/load_importance_backward.ptx.jinja",
            Kernel::ProductKeysBackward => "routers/product_keys_backward.ptx.jinja",
            Kernel::UnitBackward(_) => "routers/unit_backward.ptx.jinja",
            Kernel::ActivationBackward(_) => "experts/activation_backward.ptx.jinja",
            Kernel::GradientNorm | Kernel::GradientScale => "experts/gradient_norm.ptx.jinja",
            Kernel::CombineBackward(_) => "experts/combine_backward.ptx.jinja",
            Kernel::RouterBackward(_) => "routers/router_backward.ptx.jinja",
            Kernel::RouterBackwardBoth(_) => "routers/router_backward_both.ptx.jinja",
            Kernel::RmsNorm(_) => "experts/rms_norm.ptx.jinja",
            Kernel::RmsNormBackward(_) => "experts/rms_norm_backward.ptx.jinja",
            Kernel::ColumnProducts(_) => "experts/column_products.ptx.jinja",
            Kernel::ProductKeys => "routers/product_keys.ptx.jinja",
            Kernel::UnitExperts(_) => "experts/unit_experts.ptx.jinja",
            Kernel::UnitExpertsBackward(_) => "experts/unit_experts_backward.ptx.jinja",
            Kernel::UnitExpertsRows(_) => "experts/unit_experts_rows.ptx.jinja",
            Kernel::ChoiceBackward(_) => "experts/choice_backward.ptx.jinja",
            Kernel::SigmoidGate => "experts/sigmoid_gate.ptx.jinja",
            Kernel::BySequence { .. } => "routers/by_sequence.ptx.jinja",
            Kernel::TokenBanks { .. } => "routers/token_banks.ptx.jinja",
        }
    }

    /// The constants that the template sees, beside `name`, `target` and `threads`.
    pub fn constants(&self) -> Vec<(&'static str, Constant)> {
        use Constant::{Int, Text};
        match self {
            Kernel::Router(k) => {
                let [warps_m, warps_n, stages] = k.shape.tile();
                vec![
                    ("x_dtype", Text(k.x.name())),
                    ("w_dtype", Text(k.weight.name())),
                    ("any", Int(u32::from(matches!(k.shape, RouterShape::Any)))),
                    ("block_tokens", Int(k.shape.block().0)),
                    ("block_experts", Int(k.shape.block().1)),
                    ("warps_m", Int(warps_m)),
                    ("warps_n", Int(warps_n)),
                    ("stages", Int(stages)),
                    ("resident", Int(k.blocks_resident())),
                ]
            }
            Kernel::Gating(k) => vec![
                ("score", Text(k.score_name())),
                ("ids_bytes", Int(4)),
                ("values", Int(k.values)),
                ("certain", Int(k.certain())),
                ("max_experts", Int(k.max_counted())),
                ("warps", Int(k.warps())),
                ("dispatch_resident", Int(k.dispatch_resident())),
            ],
            Kernel::Route(k) if k.is_many() => vec![
                ("score", Text(k.gate().score_name())),
                ("max_experts", Int(k.gate().max_experts())),
                ("warps", Int(k.warps())),
            ],
            Kernel::Route(k) => {
                let gating = Kernel::Gating(k.gate()).constants();
                let own = |(name, value)| (name, if name == "certain" { Int(k.certain()) } else { value });
                gating.into_iter().map(own).collect()
            }
            Kernel::GatingWide(k) => vec![
                ("score", Text(k.score.name())),
                ("values", Int(k.values)),
                ("certain", Int(k.certain())),
                ("max_experts", Int(k.gate().max_experts())),
                ("warps", Int(k.gate().warps())),
            ],
            Kernel::MeasuredGating(k) => vec![
                ("score", Text(k.gate().score_name())),
                ("values", Int(k.values)),
                ("certain", Int(k.certain())),
                ("max_experts", Int(k.gate().max_experts())),
                ("warps", Int(k.gate().warps())),
                ("blocks_resident", Int(k.blocks_resident())),
            ],
            Kernel::Dispatch(k) => {
                vec![("max_experts", Int(k.max_experts)), ("ids_bytes", Int(k.ids_bytes)), ("warps", Int(k.warps()))]
            }
            Kernel::DispatchRows(k) => {
                let mut constants = Kernel::Dispatch(*k).constants();
                constants.push(("row_layout", Int(1)));
                constants
            }
            Kernel::ExpertCounts { ids_bytes } => {
                vec![("warps", Int(BLOCK_WARPS)), ("ids_bytes", Int(*ids_bytes)), ("max_experts", Int(MAX_COUNTED))]
            }
            Kernel::MapToIds => vec![("warps", Int(BLOCK_WARPS))],
            Kernel::IdsToMap { ids_bytes } => vec![("warps", Int(BLOCK_WARPS)), ("ids_bytes", Int(*ids_bytes))],
            Kernel::ChunkRows => vec![("warps", Int(BLOCK_WARPS)), ("max_chunks", Int(MAX_CHUNKS))],
            Kernel::Permute { unit } => vec![("unit", Int(*unit))],
            Kernel::Gemm(k) => {
                let own =
                    [("dtype", Text(k.dtype.name())), ("glu", Text(k.fold.name())), ("layout", Text(k.layout.name()))];
                own.into_iter().chain(k.tile.constants()).collect()
            }
            Kernel::GemmHopper(k) => {
                let own =
                    [("dtype", Text(k.dtype.name())), ("glu", Text(k.fold.name())), ("layout", Text(k.layout.name()))];
                own.into_iter().chain(GemmHopper::TILE.constants()).collect()
            }
            Kernel::GemmSwapped(k) => {
                let own = [
                    ("dtype", Text(k.dtype.name())),
                    ("glu", Text(k.fold.name())),
                    ("layout", Text(k.layout.name())),
                    ("combines", Int(u32::from(k.combines))),
                ];
                own.into_iter().chain(GemmSwapped::TILE.constants()).collect()
            }
            Kernel::GemmAny(k) => {
                let own = [("dtype", Text(k.dtype.name())), ("glu", Text(k.fold().name()))];
                own.into_iter().chain(k.tile().constants()).collect()
            }
            Kernel::GemmBackward(k) => {
                let mut constants = Kernel::Gemm(*k).constants();
                constants.push(("any_width", Int(0)));
                constants
            }
            Kernel::GemmBackwardHopper(k) => {
                let mut constants = Kernel::GemmHopper(*k).constants();
                let sums = [("sums_at", GemmHopper::SHARED_BYTES), ("sums_bytes", GemmHopper::SUMS_BYTES)];
                constants.extend(sums.map(|(name, value)| (name, Int(value))));
                constants
            }
            Kernel::GemmBackwardAny(k) => {
                let mut constants = Kernel::GemmAny(*k).constants();
                constants.push(("any_width", Int(1)));
                constants
            }
            Kernel::KGrouped(k) => {
                std::iter::once(("dtype", Text(k.dtype.name()))).chain(k.tile().constants()).collect()
            }
            Kernel::KGroupedHopper(k) => {
                std::iter::once(("dtype", Text(k.dtype.name()))).chain(k.tile().constants()).collect()
            }
            Kernel::Combine(Combine { dtype, any })
            | Kernel::CombineSums(Combine { dtype, any })
            | Kernel::CombineRagged(CombineRagged { dtype, any }) => {
                let sums = matches!(self, Kernel::CombineSums(_));
                vec![("dtype", Text(dtype.name())), ("any", Int(u32::from(*any))), ("sums", Int(u32::from(sums)))]
            }
            Kernel::Admission(k) => vec![("max_experts", Int(k.max_experts)), ("warps", Int(k.warps()))],
            Kernel::AdmissionBackward => vec![("warps", Int(BLOCK_WARPS))],
            Kernel::Sinkhorn(k) => vec![("max_experts", Int(k.max_experts)), ("warps", Int(k.warps()))],
            Kernel::Affinity | Kernel::Hash | Kernel::CheckLists | Kernel::NoiseState => vec![],
            Kernel::SampledBackward
            | Kernel::SparseMixer
            | Kernel::AffinityBackward
            | Kernel::LoadImportanceBackward
            | Kernel::ProductKeysBackward => vec![("warps", Int(BLOCK_WARPS))],
            Kernel::NoisyBackward { grouped } => {
                vec![("warps", Int(BLOCK_WARPS)), ("grouped", Int(u32::from(*grouped)))]
            }
            Kernel::UnitBackward(dtype) => vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS))],
            Kernel::SequenceCounts => vec![("warps", Int(BLOCK_WARPS)), ("max_experts", Int(4096))],
            Kernel::BalanceLoss | Kernel::UpdateBias | Kernel::ScaleSums => vec![("warps", Int(BLOCK_WARPS))],
            Kernel::GatingBackward { any } => vec![("warps", Int(BLOCK_WARPS)), ("any", Int(u32::from(*any)))],
            Kernel::ExpertMap { ids_bytes } => vec![("warps", Int(BLOCK_WARPS)), ("ids_bytes", Int(*ids_bytes))],
            Kernel::ExpertChoice
            | Kernel::TokenSlots
            | Kernel::Base
            | Kernel::RowGroups
            | Kernel::KeepLargest
            | Kernel::QuantileBias => {
                vec![("warps", Int(BLOCK_WARPS))]
            }
            Kernel::LoadImportance => {
                vec![("warps", Int(BLOCK_WARPS)), ("block_tokens", Int(LOAD_IMPORTANCE_TOKENS))]
            }
            Kernel::Noisy(k) => {
                let mut constants = k.spread.constants();
                constants.push(("grouped", Int(k.grouped as u32)));
                constants
            }
            Kernel::Sampled(spread) => spread.constants(),
            Kernel::Jitter(dtype)
            | Kernel::RmsNorm(dtype)
            | Kernel::RmsNormBackward(dtype)
            | Kernel::ColumnProducts(dtype) => vec![("dtype", Text(dtype.name()))],
            Kernel::ActivationBackward(dtype) => vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS))],
            Kernel::GradientNorm | Kernel::GradientScale => vec![
                ("scales", Int(u32::from(matches!(self, Kernel::GradientScale)))),
                ("buffers", Int(GRADIENT_BUFFERS)),
                ("chunk", Int(GRADIENT_CHUNK)),
                ("warps", Int(BLOCK_WARPS)),
            ],
            Kernel::CombineBackward(Combine { dtype, any }) => {
                vec![("dtype", Text(dtype.name())), ("any", Int(u32::from(*any))), ("warps", Int(BLOCK_WARPS))]
            }
            Kernel::RouterBackward(k) => vec![
                ("b_dtype", Text(k.b.name())),
                ("out_dtype", Text(k.out.name())),
                ("bm", Int(RouterBackward::ROWS)),
                ("bn", Int(RouterBackward::COLUMNS)),
                ("depth", Int(RouterBackward::DEPTH)),
            ],
            Kernel::RouterBackwardBoth(k) => vec![
                ("x_dtype", Text(k.x.name())),
                ("w_dtype", Text(k.weight.name())),
                ("bm", Int(RouterBackward::ROWS)),
                ("bn", Int(RouterBackward::COLUMNS)),
                ("depth", Int(RouterBackward::DEPTH)),
            ],
            Kernel::ProductKeys => vec![("warps", Int(BLOCK_WARPS)), ("max_keys", Int(MAX_PRODUCT_KEYS))],
            Kernel::UnitExperts(dtype) | Kernel::UnitExpertsBackward(dtype) => {
                vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS))]
            }
            Kernel::UnitExpertsRows(dtype) => {
                vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS)), ("most", Int(MAX_UNIT_SHARE))]
            }
            Kernel::ChoiceBackward(dtype) => vec![("dtype", Text(dtype.name())), ("warps", Int(BLOCK_WARPS))],
            Kernel::SigmoidGate => vec![],
            Kernel::BySequence { ids_bytes } | Kernel::TokenBanks { ids_bytes } => vec![("ids_bytes", Int(*ids_bytes))],
        }
    }
}

/// The end of the name of a kernel that takes wide ids.
fn wide(ids_bytes: u32) -> &'static str {
    if ids_bytes == 8 { "_i64" } else { "" }
}

/// A constant of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constant {
    /// A number.
    Int(u32),
    /// A word.
    Text(&'static str),
}

/// All variants, in the order of the embedded table.
pub fn all() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for x in Dtype::ALL {
        for weight in if x == Dtype::F32 { vec![Dtype::F32] } else { vec![x, Dtype::F32] } {
            for shape in RouterShape::ALL {
                kernels.extend(Some(Router { x, weight, shape }).filter(Router::exists).map(Kernel::Router));
            }
        }
    }
    for score in Score::COMMON {
        for values in Gate::VALUES {
            for dispatch in [false, true] {
                kernels.push(Kernel::Gating(Gate { score: Some(score), values, dispatch }));
            }
        }
    }
    for score in Score::COMMON {
        kernels.extend(WideGate::VALUES.map(|values| Kernel::GatingWide(WideGate { score, values })));
    }
    for values in Gate::ANY_VALUES {
        for dispatch in [false, true] {
            kernels.push(Kernel::Gating(Gate { score: None, values, dispatch }));
        }
    }
    for score in Score::COMMON.map(Some).into_iter().chain([None]) {
        let many = score.map(|_| Route::MANY);
        kernels.extend(Route::VALUES.into_iter().chain(many).map(|values| Kernel::Route(Route { score, values })));
    }
    for max_experts in Dispatch::MAX_EXPERTS {
        for ids_bytes in IDS_BYTES {
            let dispatch = Dispatch { max_experts, ids_bytes };
            kernels.extend([Kernel::Dispatch(dispatch), Kernel::DispatchRows(dispatch)]);
        }
    }
    for dtype in Dtype::ALL {
        for &tile in Gemm::tiles(dtype).iter().chain(Gemm::wide_tiles(dtype)) {
            for fold in Fold::ALL {
                for layout in Layout::ALL {
                    kernels.push(Kernel::Gemm(Gemm { dtype, tile, fold, layout }));
                }
            }
        }
    }
    for dtype in GemmHopper::DTYPES {
        for fold in Fold::ALL {
            kernels.extend(Layout::ALL.map(|layout| Kernel::GemmHopper(GemmHopper { dtype, fold, layout })));
        }
    }
    for dtype in GemmSwapped::DTYPES {
        for layout in Layout::ALL {
            let swapped = |fold, combines| Kernel::GemmSwapped(GemmSwapped { dtype, fold, layout, combines });
            kernels.extend(Fold::ALL.map(|fold| swapped(fold, false)));
            kernels.push(swapped(Fold::Plain, true));
        }
    }
    for dtype in Dtype::ALL {
        kernels.extend([false, true].map(|gated| Kernel::GemmAny(GemmAny { dtype, gated })));
    }
    for dtype in Dtype::ALL {
        for &tile in Gemm::tiles(dtype) {
            let backward = |layout| Kernel::GemmBackward(Gemm { dtype, tile, fold: Fold::Plain, layout });
            kernels.extend(Layout::ALL.map(backward));
        }
        if GemmHopper::DTYPES.contains(&dtype) {
            let hopper = |layout| Kernel::GemmBackwardHopper(GemmHopper { dtype, fold: Fold::Plain, layout });
            kernels.extend(Layout::ALL.map(hopper));
        }
        kernels.push(Kernel::GemmBackwardAny(GemmAny { dtype, gated: false }));
    }
    for dtype in Dtype::ALL {
        for any in [false, true] {
            kernels.push(Kernel::KGrouped(KGrouped { dtype, any }));
            kernels.push(Kernel::Combine(Combine { dtype, any }));
            kernels.push(Kernel::CombineSums(Combine { dtype, any }));
            kernels.push(Kernel::CombineBackward(Combine { dtype, any }));
            kernels.push(Kernel::CombineRagged(CombineRagged { dtype, any }));
        }
    }
    for dtype in KGroupedHopper::DTYPES {
        kernels.extend([false, true].map(|gathers_b| Kernel::KGroupedHopper(KGroupedHopper { dtype, gathers_b })));
    }
    for max_experts in Admission::MAX_EXPERTS {
        kernels.push(Kernel::Admission(Admission { max_experts }));
        kernels.push(Kernel::Sinkhorn(Sinkhorn { max_experts }));
    }
    kernels.push(Kernel::AdmissionBackward);
    kernels.extend([Kernel::Affinity, Kernel::ExpertChoice, Kernel::TokenSlots, Kernel::Base, Kernel::Hash]);
    for spread in Spread::ALL {
        kernels.extend([false, true].map(|grouped| Kernel::Noisy(Noisy { spread, grouped })));
        kernels.push(Kernel::Sampled(spread));
    }
    for score in Score::COMMON {
        for values in Gate::VALUES {
            kernels.push(Kernel::MeasuredGating(MeasuredGate { score: Some(score), values }));
        }
    }
    kernels.extend(Gate::ANY_VALUES.map(|values| Kernel::MeasuredGating(MeasuredGate { score: None, values })));
    kernels.extend([Kernel::BalanceLoss, Kernel::UpdateBias, Kernel::CheckLists, Kernel::RowGroups]);
    kernels.extend([Kernel::KeepLargest, Kernel::QuantileBias, Kernel::LoadImportance]);
    kernels.extend(IDS_BYTES.map(|ids_bytes| Kernel::ExpertMap { ids_bytes }));
    kernels.extend(Dtype::ALL.map(Kernel::Jitter));
    kernels.extend([Kernel::NoiseState, Kernel::ScaleSums, Kernel::SequenceCounts]);
    kernels.extend([false, true].map(|grouped| Kernel::NoisyBackward { grouped }));
    kernels.extend([Kernel::SampledBackward, Kernel::SparseMixer, Kernel::AffinityBackward]);
    kernels.extend([Kernel::LoadImportanceBackward, Kernel::ProductKeysBackward]);
    kernels.extend(Dtype::ALL.map(Kernel::UnitBackward));
    kernels.extend([Kernel::GradientNorm, Kernel::GradientScale]);
    kernels.extend([false, true].map(|any| Kernel::GatingBackward { any }));
    kernels.extend(Dtype::ALL.map(Kernel::ActivationBackward));
    for b in Dtype::ALL {
        // Into the weight f32; into x its type, which is that of the weight unless that is f32.
        let outs = Dtype::ALL.into_iter().filter(|&out| b == Dtype::F32 || out == b || out == Dtype::F32);
        kernels.extend(outs.map(|out| Kernel::RouterBackward(RouterBackward { b, out })));
        let weights = Dtype::ALL.into_iter().filter(|&weight| weight == b || weight == Dtype::F32);
        kernels.extend(weights.map(|weight| Kernel::RouterBackwardBoth(RouterBackwardBoth { x: b, weight })));
    }
    for ids_bytes in IDS_BYTES {
        kernels.extend([Kernel::ExpertCounts { ids_bytes }, Kernel::IdsToMap { ids_bytes }]);
    }
    kernels.extend([Kernel::MapToIds, Kernel::ChunkRows]);
    kernels.extend(PERMUTE_UNITS.map(|unit| Kernel::Permute { unit }));
    kernels.extend(Dtype::ALL.map(Kernel::RmsNorm));
    kernels.extend(Dtype::ALL.map(Kernel::RmsNormBackward));
    kernels.extend(Dtype::ALL.map(Kernel::ColumnProducts));
    kernels.push(Kernel::ProductKeys);
    kernels.extend(Dtype::ALL.map(Kernel::UnitExperts));
    kernels.extend(Dtype::ALL.map(Kernel::UnitExpertsBackward));
    kernels.extend(Dtype::ALL.map(Kernel::UnitExpertsRows));
    kernels.extend(Dtype::ALL.map(Kernel::ChoiceBackward));
    kernels.push(Kernel::SigmoidGate);
    kernels.extend(IDS_BYTES.map(|ids_bytes| Kernel::BySequence { ids_bytes }));
    kernels.extend(IDS_BYTES.map(|ids_bytes| Kernel::TokenBanks { ids_bytes }));
    kernels
}
