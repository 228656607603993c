//! Checks of `sampled_backward` against the reference, whose own tests are finite differences.

use moe_kernels::In;
use moe_kernels::reference::sampled::{SampledUpstream, gumbel_top_k, sampled_backward as reference};
use moe_kernels::routers::sampled_backward::{self, SampledBackwardArgs, SampledBackwardDesc};
use moe_kernels::rules::{NoiseSource, SamplingRule};

use crate::gradients::{Results, row_norm, upstream};
use crate::noisy::Logits;
use crate::support::buffer::Guarded;
use crate::support::device;

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, top_k) in
        [(0, 4, 2), (1, 1, 1), (37, 8, 2), (200, 5, 5), (60, 33, 4), (9, 130, 8), (5, 300, 32), (3, 1000, 1)]
    {
        for kind in Logits::ALL {
            for given in [0, 1, 2, 4, 7] {
                let inverse_temperature = [1.0, 0.5, 40.0, 0.0][rng.usize(..4)];
                let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
                let rule = SamplingRule::new(top_k, noise).inverse_temperature(inverse_temperature);
                case(rng, SampledBackwardDesc::new(tokens, experts, rule), kind, given);
            }
        }
    }
}

/// Bits of `given`: weights, logarithms, entropy.
fn case(rng: &mut fastrand::Rng, desc: SampledBackwardDesc, kind: Logits, given: u32) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let SampledBackwardDesc { tokens, experts, rule, .. } = desc;
    let (mut logits, _) = kind.draw(rng, tokens * experts, experts);
    // f32::MAX times a temperature is infinite, which the reference and the kernel say alike; among finite ones it is sure of itself.
    logits.iter_mut().filter(|l| **l == f32::MAX).for_each(|l| *l = 60.0);
    let mut ids = gumbel_top_k(&logits, experts, &rule).unwrap().ids;
    if tokens > 3 {
        ids[2 * rule.top_k..3 * rule.top_k].fill(-1);
    }
    let name = format!("{desc:?} {kind:?} given {given}");
    let (dw, dw_wide) = upstream(rng, tokens * rule.top_k);
    let (dlog, dlog_wide) = upstream(rng, tokens * rule.top_k);
    let (dh, dh_wide) = upstream(rng, tokens);
    let has = |bit: u32| given & bit != 0;
    let buffers = [("logits", &logits), ("d_weights", &dw), ("d_logs", &dlog), ("d_entropy", &dh)]
        .map(|(what, values)| Guarded::input(&stream, what, values));
    let ids_on = Guarded::input(&stream, "ids", &ids);
    let results = Results::draw(rng, &[tokens * experts]);
    let desc = desc.accumulate(results.accumulate);
    let got = results.run(&name, |out| {
        let [logits, dw, dlog, dh] = buffers.each_ref().map(Guarded::view);
        let (ids, mut to) = (ids_on.view(), out[0].view_mut());
        let mut args = SampledBackwardArgs::new(&logits, &ids, &mut to);
        args.d_weights = has(1).then(|| In::from(&dw));
        args.d_log_probabilities = has(2).then(|| In::from(&dlog));
        args.d_entropy = has(4).then(|| In::from(&dh));
        sampled_backward::forward(kernels, &stream, &desc, args).unwrap();
    });
    if tokens == 0 {
        return;
    }
    let upstream = SampledUpstream {
        weights: has(1).then_some(&dw_wide[..]),
        log_probabilities: has(2).then_some(&dlog_wide[..]),
        entropy: has(4).then_some(&dh_wide[..]),
    };
    let want = reference(&logits, &ids, experts, &rule, upstream).unwrap();
    // A logarithm of a probability is at most 104 here; exponents of some tens carry their rounding.
    let beta = f64::from(rule.inverse_temperature);
    let scale = |t: usize| {
        beta * (2.0 * row_norm(&dw_wide, rule.top_k, t)
            + 2.0 * row_norm(&dlog_wide, rule.top_k, t)
            + 8.0 * dh_wide[t].abs())
    };
    results.compare(&name, 0, &got[0], &want, experts, scale);
    buffers.iter().for_each(|buffer| buffer.assert_unchanged(&stream));
}
