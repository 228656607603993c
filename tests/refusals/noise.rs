//! What the routers that add noise refuse.

use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::rules::{NoiseSource, NoisyRule, SamplingRule};

use super::*;

const NOISE: NoiseSource = NoiseSource { seed: 1, offset: 2 };
const RULE: NoisyRule = rule(K);

const fn rule(top_k: usize) -> NoisyRule {
    NoisyRule::new(top_k, NOISE)
}

#[test]
fn noisy_buffers() {
    let d = open();
    let desc = NoisyDesc::new(T, E, RULE);
    let bytes = noisy::workspace_bytes(&desc, d.kernels.device()).unwrap();
    let run = |desc: NoisyDesc, lengths: [usize; 10], workspace: usize, together: bool| {
        let [clean, raw, weights, noisy, thresholds, importance, load, losses, _, _] =
            &mut lengths.map(|len| d.zeros::<f32>(len));
        let (mut ids, mut counts) = (d.zeros::<i32>(lengths[8]), d.zeros::<i32>(lengths[9]));
        let mut workspace = Workspace::new(&d.stream, workspace).unwrap();
        let logits = if together { NoisyLogits::together(&*clean) } else { NoisyLogits::apart(&*clean, &*raw) };
        let sums = NoisySums::new(&mut counts, importance, load, losses);
        let args =
            NoisyArgs::new(logits, &mut ids, weights).noisy(noisy).thresholds(thresholds).sums(sums, &mut workspace);
        d.refused(|| noisy::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * E, T * E, T * K, T * E, T * 2, E, E, 2, T * K, E];
    let names = ["clean", "raw", "weights", "noisy", "thresholds", "importance", "load", "losses", "ids", "counts"];
    for (index, name) in names.into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, lengths, bytes, false), name);
    }
    assert_eq!(run(desc, enough, bytes - 1, false), "workspace");
    assert_eq!(run(desc, enough, bytes, true), "logits");
    assert_eq!(run(NoisyDesc::new(T, E, rule(E + 1)), enough, bytes, false), "top_k");
    assert_eq!(run(NoisyDesc::new(T, E, RULE.noise_epsilon(-0.5)), enough, bytes, false), "noise_epsilon");
}

#[test]
fn hierarchical_buffers() {
    let d = open();
    const G: usize = 3;
    let desc = HierarchicalDesc::new(T, G, E, RULE, rule(4));
    let bytes = hierarchical::workspace_bytes(&desc, d.kernels.device()).unwrap();
    let run = |desc: HierarchicalDesc, lengths: [usize; 20], workspace: usize| {
        let floats = &mut lengths.map(|len| d.zeros::<f32>(len));
        let ints = &mut lengths.map(|len| d.zeros::<i32>(len));
        let mut workspace = Workspace::new(&d.stream, workspace).unwrap();
        let [a, b, c, e, _, g, _, i, j, k, l, m, _, o, _, q, r, s, t, u] = floats;
        let [_, _, _, _, f, _, h, _, _, _, _, _, n, _, p, _, _, _, _, _] = ints;
        let primary = PrimaryOutputs::new(f, g, NoisySums::new(h, i, j, k)).noisy(l).thresholds(m);
        let (primary_logits, logits) = (NoisyLogits::apart(&*a, &*b), NoisyLogits::apart(&*c, &*e));
        let sums = NoisySums::new(p, q, r, s);
        let args =
            HierarchicalArgs::new(primary_logits, logits, primary, n, o, sums, &mut workspace).noisy(t).thresholds(u);
        d.refused(|| hierarchical::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let (slots, all) = (T * K, G * E);
    let named = [
        ("primary_logits.clean", T * G),
        ("primary_logits.raw", T * G),
        ("clean", T * all),
        ("raw", T * all),
        ("primary.ids", slots),
        ("primary.weights", slots),
        ("primary.counts", G),
        ("primary.importance", G),
        ("primary.load", G),
        ("primary.losses", 2),
        ("primary.noisy", T * G),
        ("primary.thresholds", 2 * T),
        ("ids", slots * 4),
        ("weights", slots * 4),
        ("counts", all),
        ("importance", all),
        ("load", all),
        ("losses", 2),
        ("noisy", slots * E),
        ("thresholds", slots * 2),
    ];
    let enough = named.map(|(_, len)| len);
    for (index, (name, _)) in named.into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, lengths, bytes), name);
    }
    assert_eq!(run(desc, enough, bytes - 1), "workspace");
    assert_eq!(run(HierarchicalDesc::new(T, 0, E, RULE, rule(4)), enough, bytes), "groups");
    assert_eq!(run(HierarchicalDesc::new(T, G, 2000, RULE, rule(4)), enough, bytes), "experts");
    assert_eq!(run(HierarchicalDesc::new(T, 16, E, rule(5), rule(8)), enough, bytes), "top_k");
}

#[test]
fn sampled_buffers() {
    let d = open();
    let rule = SamplingRule::new(K, NOISE);
    let desc = SampledDesc::new(T, E, rule);
    let run = |desc: SampledDesc, lengths: [usize; 6]| {
        let [logits, weights, logs, entropy, perturbed, _] = &mut lengths.map(|len| d.zeros::<f32>(len));
        let mut ids = d.zeros::<i32>(lengths[5]);
        let args =
            SampledArgs::new(&*logits, &mut ids, weights).log_probabilities(logs).entropy(entropy).perturbed(perturbed);
        d.refused(|| sampled::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * E, T * K, T * K, T, T * E, T * K];
    let names = ["logits", "weights", "log_probabilities", "entropy", "perturbed", "ids"];
    for (index, name) in names.into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, lengths), name);
    }
    assert_eq!(run(SampledDesc::new(T, E, rule.inverse_temperature(-1.0)), enough), "inverse_temperature");
    assert_eq!(run(SampledDesc::new(T, 5000, rule), enough), "experts");
}

#[test]
fn jitter_buffers() {
    let d = open();
    let desc = JitterDesc::new(Dtype::Bf16, T * H, 0.01, NOISE);
    let run = |desc: JitterDesc, x: usize, y: usize| {
        let (x, mut y) = (d.zeros::<bf16>(x), d.zeros::<bf16>(y));
        d.refused(|| jitter::forward(&d.kernels, &d.stream, &desc, JitterArgs::new(&x, &mut y))).1
    };
    assert_eq!(run(desc, T * H - 1, T * H), "x");
    assert_eq!(run(desc, T * H, T * H - 1), "y");
    assert_eq!(run(JitterDesc::new(Dtype::F16, T * H, 0.01, NOISE), T * H, T * H), "y");
    assert_eq!(run(JitterDesc::new(Dtype::Bf16, T * H, -0.1, NOISE), T * H, T * H), "epsilon");
    let mut x = d.zeros::<bf16>(T * H);
    let mut view = x.slice_mut(1..);
    let shorter = JitterDesc::new(Dtype::Bf16, T * H - 1, 0.01, NOISE);
    let args = JitterArgs::in_place(&mut view);
    let (error, argument) = d.refused(|| jitter::forward(&d.kernels, &d.stream, &shorter, args));
    assert!(matches!(error, Error::Misaligned { needed: 16, .. }) && argument == "y", "{error}");
}
