//! Proves, then times, every registered kernel variant, in the manner of checkasm.
//!
//! One case is one variant, named as the variant. `--list` lists them, `MOE_CASES` (globs, separated by commas) or the usual filter selects,
//! `MOE_SEED` changes the inputs, which each case draws from a generator of its own. `MOE_TIME=1` times each launch at the
//! call site of its check, after the check has passed. A fault that breaks the device's context fails the case that
//! caused it and no other: cases that ran beside it or come after it run again in a process of their own.

#[path = "../support/mod.rs"]
mod support;

mod activation_backward;
mod admission;
mod admission_backward;
mod affinity_backward;
mod alone;
mod any_rule;
mod balance;
mod base;
mod by_sequence;
mod choice_backward;
mod chunks;
mod column_products;
mod combine;
mod combine_backward;
mod dispatch;
mod expert_choice;
mod expert_counts;
mod expert_map;
mod gating;
mod gating_backward;
mod gating_backward_any;
mod gemm;
mod gemm_any;
mod gemm_backward;
mod gemm_combine;
mod gradient_norm;
mod gradients;
mod hash;
mod hierarchical;
mod ids;
mod jitter;
mod k_grouped;
mod keep_largest;
mod lists;
mod load_importance;
mod load_importance_backward;
mod mutants;
mod noise_state;
mod noisy;
mod noisy_backward;
mod permute;
mod product_keys;
mod product_keys_backward;
mod registers;
mod rms_norm;
mod rms_norm_backward;
mod route;
mod router;
mod router_backward;
mod routing_map;
mod row_groups;
mod rows;
mod sampled;
mod sampled_backward;
mod sequence_counts;
mod sinkhorn;
mod sparse_mixer;
mod strides;
mod timing;
mod token_banks;
mod token_sums;
mod tokens;
mod unit_backward;
mod unit_experts;
mod unit_experts_backward;

use std::process::{Command, ExitCode};

use alone::ALONE;
use libtest_mimic::{Arguments, Failed, Trial};
use moe_kernels::registry::{self, Kernel};
use support::inputs::run_seed;
use wildmatch::WildMatch;

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(ALONE) {
        alone::run(&name);
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::from_args();
    let globs = std::env::var("MOE_CASES").unwrap_or_else(|_| "*".into());
    let globs: Vec<WildMatch> = globs.split(',').map(WildMatch::new).collect();
    let kernels: Vec<Kernel> =
        registry::all().into_iter().filter(|kernel| globs.iter().any(|glob| glob.matches(&kernel.name()))).collect();
    if kernels.is_empty() {
        eprintln!(
            "MOE_CASES: no kernel is named like any of {:?}",
            globs.iter().map(WildMatch::to_string).collect::<Vec<_>>()
        );
        return ExitCode::FAILURE;
    }
    if let Ok(limit) = std::env::var("MOE_MUTANTS") {
        return mutants::report(&kernels, &limit);
    }
    let trials = kernels.into_iter().map(|kernel| Trial::test(kernel.name(), move || run(kernel))).collect();
    if !arguments.list {
        println!("seed {} (MOE_SEED)", run_seed());
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Every check of the variant, where the device runs it.
fn check(kernel: Kernel) {
    let capability = support::device::kernels().device().compute_capability;
    if !kernel.arch().runs_on(capability) {
        println!(
            "{}: not tested: the device is of compute capability {}.{}",
            kernel.name(),
            capability.0,
            capability.1
        );
        return;
    }
    let rng = &mut support::inputs::generator(&kernel.name());
    match kernel {
        Kernel::Router(variant) => router::check(variant, rng),
        Kernel::Gating(variant) => gating::check(variant, rng),
        Kernel::Route(variant) => route::check(variant, rng),
        Kernel::KeepLargest => keep_largest::check(rng),
        Kernel::QuantileBias => keep_largest::check_bias(rng),
        Kernel::LoadImportance => load_importance::check(rng),
        Kernel::GatingWide(variant) => gating::check_wide(variant, rng),
        Kernel::Dispatch(variant) => dispatch::check(variant, rng),
        Kernel::DispatchRows(variant) => dispatch::check_rows(variant, rng),
        Kernel::ExpertCounts { ids_bytes } => expert_counts::check(ids_bytes, rng),
        Kernel::MapToIds => routing_map::check_to_ids(rng),
        Kernel::IdsToMap { ids_bytes } => routing_map::check_from_ids(ids_bytes, rng),
        Kernel::ChunkRows => chunks::check(rng),
        Kernel::Permute { unit } => permute::check(unit, rng),
        Kernel::Gemm(variant) => gemm::check(variant, rng),
        Kernel::GemmHopper(variant) => gemm::check(variant, rng),
        Kernel::GemmSwapped(variant) if variant.combines => gemm_combine::check(variant, rng),
        Kernel::GemmSwapped(variant) => gemm::check(variant, rng),
        Kernel::GemmAny(variant) => gemm_any::check(variant, rng),
        Kernel::GemmBackward(variant) => gemm_backward::check(variant, rng),
        Kernel::GemmBackwardHopper(variant) => gemm_backward::check_hopper(variant, rng),
        Kernel::GemmBackwardAny(variant) => gemm_backward::check_any(variant, rng),
        Kernel::KGrouped(variant) => k_grouped::check(variant, rng),
        Kernel::KGroupedHopper(variant) => k_grouped::check(variant, rng),
        Kernel::Combine(variant) => combine::check(variant, rng),
        Kernel::CombineSums(variant) => combine::check_sums(variant, rng),
        Kernel::CombineBackward(variant) => combine_backward::check(variant, rng),
        Kernel::Admission(variant) => admission::check(variant, rng),
        Kernel::AdmissionBackward => admission_backward::check(rng),
        Kernel::Affinity => expert_choice::check_affinity(rng),
        Kernel::ExpertChoice => expert_choice::check_choice(rng),
        Kernel::TokenSlots => expert_choice::check_token_slots(rng),
        Kernel::CombineRagged(variant) => expert_choice::check_combine(variant, rng),
        Kernel::Base => base::check(rng),
        Kernel::Sinkhorn(variant) => sinkhorn::check(variant, rng),
        Kernel::Hash => hash::check(rng),
        Kernel::Noisy(variant) => noisy::check(variant, rng),
        Kernel::MeasuredGating(variant) => balance::check(variant, rng),
        Kernel::BalanceLoss => balance::check_losses(rng),
        Kernel::UpdateBias => balance::check_bias(rng),
        Kernel::ExpertMap { ids_bytes } => expert_map::check(ids_bytes, rng),
        Kernel::CheckLists => lists::check(rng),
        Kernel::RowGroups => row_groups::check(rng),
        Kernel::Sampled(variant) => sampled::check(variant, rng),
        Kernel::Jitter(dtype) => jitter::check(dtype, rng),
        Kernel::NoiseState => noise_state::check(rng),
        Kernel::GradientNorm => gradient_norm::check(rng),
        Kernel::GradientScale => gradient_norm::check_scale(rng),
        Kernel::GatingBackward { any: false } => gating_backward::check(rng),
        Kernel::GatingBackward { any: true } => gating_backward_any::check(rng),
        Kernel::ScaleSums => gating_backward_any::check_scale_sums(rng),
        Kernel::SequenceCounts => sequence_counts::check(rng),
        Kernel::NoisyBackward { grouped: false } => noisy_backward::check(rng),
        Kernel::NoisyBackward { grouped: true } => noisy_backward::check_grouped(rng),
        Kernel::SampledBackward => sampled_backward::check(rng),
        Kernel::AffinityBackward => affinity_backward::check(rng),
        Kernel::LoadImportanceBackward => load_importance_backward::check(rng),
        Kernel::UnitBackward(dtype) => unit_backward::check(dtype, rng),
        Kernel::ProductKeysBackward => product_keys_backward::check(rng),
        Kernel::RouterBackward(variant) => router_backward::check(variant, rng),
        Kernel::RouterBackwardBoth(variant) => router_backward::check_both(variant, rng),
        Kernel::ActivationBackward(dtype) => activation_backward::check(dtype, rng),
        Kernel::RmsNorm(dtype) => rms_norm::check(dtype, rng),
        Kernel::RmsNormBackward(dtype) => rms_norm_backward::check(dtype, rng),
        Kernel::ColumnProducts(dtype) => column_products::check(dtype, rng),
        Kernel::ProductKeys => product_keys::check(rng),
        Kernel::SparseMixer => sparse_mixer::check(rng),
        Kernel::UnitExperts(dtype) => unit_experts::check(dtype, rng),
        Kernel::UnitExpertsBackward(dtype) | Kernel::UnitExpertsRows(dtype) => unit_experts_backward::check(dtype, rng),
        Kernel::ChoiceBackward(dtype) => choice_backward::check(dtype, rng),
        Kernel::SigmoidGate => choice_backward::check_gate(rng),
        Kernel::BySequence { ids_bytes } => by_sequence::check(ids_bytes, rng),
        Kernel::TokenBanks { ids_bytes } => token_banks::check(ids_bytes, rng),
    }
}

fn run(kernel: Kernel) -> Result<(), Failed> {
    let healthy = || support::device::context().synchronize().is_ok();
    let outcome = if healthy() {
        std::panic::catch_unwind(|| check(kernel)).map_err(message)
    } else {
        Err("broken context".into())
    };
    let Err(failure) = outcome else { return Ok(()) };
    let reproduce = format!("MOE_SEED={} MOE_CASES={} cargo test --test kernels", run_seed(), kernel.name());
    if healthy() {
        return Err(format!("{failure}\nreproduce: {reproduce}").into());
    }
    // The context is broken, by this case or by one beside it: a process of its own tells.
    let this = std::env::current_exe()?;
    let output = Command::new(this).env(ALONE, kernel.name()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("{text}\nreproduce: {reproduce}").into())
}

fn message(payload: Box<dyn std::any::Any + Send>) -> String {
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => payload.downcast_ref::<&str>().unwrap_or(&"panicked").to_string(),
    }
}
