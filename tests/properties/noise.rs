//! The routers that add noise, over random shapes and values: what is chosen is the reference's choice bit for bit.

use cudarc::driver::CudaSlice;
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::rules::{NoiseSource, NoisyRule, SamplingRule};

use super::*;
use crate::support::compare::{LOGARITHMS, NOISY_SUMS};

fn upload(values: &[f32]) -> CudaSlice<f32> {
    let stream = device::stream();
    stream.clone_htod(if values.is_empty() { &[0.0][..] } else { values }).unwrap()
}

fn assert_distinct(ids: &[i32], top_k: usize, experts: usize) {
    for chosen in ids.chunks(top_k) {
        let mut distinct = chosen.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() == top_k && chosen.iter().all(|&id| (0..experts as i32).contains(&id)), "{chosen:?}");
    }
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn noisy_gating_of_any_logits(
        (experts, top_k, clean, raw) in experts_and_k().prop_flat_map(|(experts, top_k)| {
            (0usize..24).prop_flat_map(move |tokens| {
                let logits = || prop::collection::vec(logit(), tokens * experts);
                (Just(experts), Just(top_k), logits(), logits())
            })
        }),
        noise_epsilon in prop::sample::select(vec![0.0f32, 1e-2, 3.0]),
        (seed, offset, summed) in any::<(u64, u64, bool)>(),
    ) {
        let (kernels, stream) = (device::kernels(), device::stream());
        let tokens = clean.len() / experts;
        let rule = NoisyRule::new(top_k, NoiseSource { seed, offset }).noise_epsilon(noise_epsilon);
        let desc = NoisyDesc::new(tokens, experts, rule);
        let mut ids = stream.alloc_zeros::<i32>((tokens * top_k).max(1)).unwrap();
        let mut counts = stream.alloc_zeros::<i32>(experts).unwrap();
        let [weights, importance, load, losses] =
            &mut [(tokens * top_k).max(1), experts, experts, 2].map(|len| stream.alloc_zeros::<f32>(len).unwrap());
        let bytes = noisy::workspace_bytes(&desc, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let (device_clean, device_raw) = (upload(&clean), upload(&raw));
        let mut args = NoisyArgs::new(NoisyLogits::apart(&device_clean, &device_raw), &mut ids, &mut *weights);
        args.sums =
            summed.then(|| (NoisySums::new(&mut counts, importance, &mut *load, losses), &mut workspace));
        noisy::forward(kernels, &stream, &desc, args).unwrap();
        let want = reference::noisy::noisy_top_k(&clean, &raw, experts, &rule).unwrap();
        let ids = stream.clone_dtoh(&ids).unwrap()[..tokens * top_k].to_vec();
        assert_distinct(&ids, top_k, experts);
        prop_assert_eq!(&ids, &want.ids);
        let weights = stream.clone_dtoh(weights).unwrap()[..tokens * top_k].to_vec();
        assert_weights("weights", &weights, &want.weights, Shares::Softmax(top_k), 0);
        if summed {
            prop_assert_eq!(stream.clone_dtoh(&counts).unwrap(), want.counts);
            for (got, want) in stream.clone_dtoh(load).unwrap().into_iter().zip(want.load) {
                let near = (f64::from(got) - want).abs() <= NOISY_SUMS * want.abs().max(1.0);
                prop_assert!(near || (got.is_nan() && want.is_nan()), "load {}, want {}", got, want);
            }
        }
    }

    #[test]
    fn sampling_from_any_logits(
        (experts, top_k, logits) in experts_and_k().prop_flat_map(|(experts, top_k)| {
            (0usize..24).prop_flat_map(move |tokens| {
                (Just(experts), Just(top_k), prop::collection::vec(logit(), tokens * experts))
            })
        }),
        inverse_temperature in prop::sample::select(vec![0.0f32, 0.3, 1.0, 25.0]),
        (seed, offset) in any::<(u64, u64)>(),
    ) {
        let (kernels, stream) = (device::kernels(), device::stream());
        let tokens = logits.len() / experts;
        let rule = SamplingRule::new(top_k, NoiseSource { seed, offset }).inverse_temperature(inverse_temperature);
        let mut ids = stream.alloc_zeros::<i32>((tokens * top_k).max(1)).unwrap();
        let [weights, logs, entropy] =
            &mut [tokens * top_k, tokens * top_k, tokens].map(|len| stream.alloc_zeros::<f32>(len.max(1)).unwrap());
        let device_logits = upload(&logits);
        let args = SampledArgs::new(&device_logits, &mut ids, &mut *weights)
            .log_probabilities(&mut *logs)
            .entropy(&mut *entropy);
        sampled::forward(kernels, &stream, &SampledDesc::new(tokens, experts, rule), args).unwrap();
        let want = reference::sampled::gumbel_top_k(&logits, experts, &rule).unwrap();
        let ids = stream.clone_dtoh(&ids).unwrap()[..tokens * top_k].to_vec();
        assert_distinct(&ids, top_k, experts);
        prop_assert_eq!(&ids, &want.ids);
        let weights = stream.clone_dtoh(weights).unwrap()[..tokens * top_k].to_vec();
        assert_weights("weights", &weights, &want.weights, Shares::Softmax(experts), 0);
        for (got, want) in [(logs, want.log_probabilities), (entropy, want.entropy)] {
            for (got, want) in stream.clone_dtoh(got).unwrap().into_iter().zip(want) {
                let near = (f64::from(got) - want).abs() <= LOGARITHMS * want.abs().max(1.0) || f64::from(got) == want;
                prop_assert!(near || (got.is_nan() && want.is_nan()), "{}, want {}", got, want);
            }
        }
    }
}
