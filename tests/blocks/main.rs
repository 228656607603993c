//! Blocks of models that are more than a router and experts, computed through the public API and compared with what the models' own code
//! made of a tiny checkpoint (`tests/data/families`), in every storage type.

#[path = "../support/data.rs"]
mod data;
#[path = "../support/mod.rs"]
mod support;

mod composed;
mod cosine;
mod doge;
mod ernie_vl;
mod folder;
mod gemma4;
mod muse_spark;
mod nemotron_h;
mod nllb;
mod refusals;
mod run;
mod vitpose;
mod zaya;

/// A test of this name in each storage type.
macro_rules! in_every_type {
    ($($(#[$attribute:meta])* $name:ident => $room:ident::$run:ident;)*) => {
        $(
            $(#[$attribute])*
            #[test]
            fn $name() {
                $room::$run::<half::bf16>();
                $room::$run::<half::f16>();
                $room::$run::<f32>();
            }
        )*
    };
}

in_every_type! {
    norms_and_projections_alone_and_together => composed::parts;
    tutel_cosine_gate => cosine::logits;
    gemma4_normed_and_scaled_router => gemma4::gemma4;
    diffusion_gemma_normed_and_scaled_router => gemma4::diffusion_gemma;
    muse_spark_norms_and_projections => muse_spark::block;
    nemotron_h_projections => nemotron_h::block;
    zaya_network_and_state => zaya::block;
    zaya_first_layer => zaya::first_layer;
    doge_product_keys => doge::block;
    nllb_top_two_with_capacity => nllb::block;
    ernie_vl_banks_by_token_type => ernie_vl::block;
    vitpose_expert_of_the_dataset => vitpose::block;
}
