//! What the routers that add noise refuse.

use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::jitter::{self, JitterDesc};
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::rules::SamplingRule;
use moe_kernels::rules::{NoiseSource, NoisyRule};

use super::*;

const NOISE: NoiseSource = NoiseSource { seed: 1, offset: 2 };
const RULE: NoisyRule = NoisyRule { top_k: K, noise_epsilon: 0.01, noise: NOISE };

#[test]
fn noisy_buffers() {
    let d = open();
    let desc = NoisyDesc { tokens: T, experts: E, rule: RULE };
    let bytes = noisy::workspace_bytes(&desc, d.kernels.device()).unwrap();
    let run = |desc: NoisyDesc, lengths: [usize; 10], workspace: usize, together: bool| {
        let [clean, raw, weights, noisy, thresholds, importance, load, losses, _, _] =
            &mut lengths.map(|len| d.zeros::<f32>(len));
        let (mut ids, mut counts) = (d.zeros::<i32>(lengths[8]), d.zeros::<i32>(lengths[9]));
        let mut workspace = Workspace::new(&d.stream, workspace).unwrap();
        let logits = if together { NoisyLogits::Together(clean) } else { NoisyLogits::Apart { clean, raw } };
        let sums = NoisySums { counts: &mut counts, importance, load, losses, workspace: &mut workspace };
        let args = NoisyArgs {
            logits,
            ids: &mut ids,
            weights,
            noisy: Some(noisy),
            thresholds: Some(thresholds),
            sums: Some(sums),
        };
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
    assert_eq!(run(NoisyDesc { rule: NoisyRule { top_k: E + 1, ..RULE }, ..desc }, enough, bytes, false), "top_k");
    let negative = NoisyRule { noise_epsilon: -0.5, ..RULE };
    assert_eq!(run(NoisyDesc { rule: negative, ..desc }, enough, bytes, false), "noise_epsilon");
}

#[test]
fn hierarchical_buffers() {
    let d = open();
    const G: usize = 3;
    let secondary = NoisyRule { top_k: 4, ..RULE };
    let desc = HierarchicalDesc { tokens: T, groups: G, experts: E, primary: RULE, secondary };
    let bytes = hierarchical::workspace_bytes(&desc, d.kernels.device()).unwrap();
    let run = |desc: HierarchicalDesc, lengths: [usize; 20], workspace: usize| {
        let floats = &mut lengths.map(|len| d.zeros::<f32>(len));
        let ints = &mut lengths.map(|len| d.zeros::<i32>(len));
        let mut workspace = Workspace::new(&d.stream, workspace).unwrap();
        let [a, b, c, e, _, g, _, i, j, k, l, m, _, o, _, q, r, s, t, u] = floats;
        let [_, _, _, _, f, _, h, _, _, _, _, _, n, _, p, _, _, _, _, _] = ints;
        let args = HierarchicalArgs {
            primary_logits: NoisyLogits::Apart { clean: a, raw: b },
            logits: NoisyLogits::Apart { clean: c, raw: e },
            primary: PrimaryOutputs {
                ids: f,
                weights: g,
                counts: h,
                importance: i,
                load: j,
                losses: k,
                noisy: Some(l),
                thresholds: Some(m),
            },
            ids: n,
            weights: o,
            counts: p,
            importance: q,
            load: r,
            losses: s,
            noisy: Some(t),
            thresholds: Some(u),
            workspace: &mut workspace,
        };
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
    assert_eq!(run(HierarchicalDesc { groups: 0, ..desc }, enough, bytes), "groups");
    assert_eq!(run(HierarchicalDesc { experts: 2000, ..desc }, enough, bytes), "experts");
    let wide = HierarchicalDesc { secondary: NoisyRule { top_k: 8, ..RULE }, groups: 16, ..desc };
    let wide = HierarchicalDesc { primary: NoisyRule { top_k: 5, ..RULE }, ..wide };
    assert_eq!(run(wide, enough, bytes), "top_k");
}

#[test]
fn sampled_buffers() {
    let d = open();
    let rule = SamplingRule { top_k: K, inverse_temperature: 1.0, noise: NOISE };
    let desc = SampledDesc { tokens: T, experts: E, rule };
    let run = |desc: SampledDesc, lengths: [usize; 6]| {
        let [logits, weights, logs, entropy, perturbed, _] = &mut lengths.map(|len| d.zeros::<f32>(len));
        let mut ids = d.zeros::<i32>(lengths[5]);
        let args = SampledArgs {
            logits,
            ids: &mut ids,
            weights,
            log_probabilities: Some(logs),
            entropy: Some(entropy),
            perturbed: Some(perturbed),
        };
        d.refused(|| sampled::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * E, T * K, T * K, T, T * E, T * K];
    let names = ["logits", "weights", "log_probabilities", "entropy", "perturbed", "ids"];
    for (index, name) in names.into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, lengths), name);
    }
    let negative = SamplingRule { inverse_temperature: -1.0, ..rule };
    assert_eq!(run(SampledDesc { rule: negative, ..desc }, enough), "inverse_temperature");
    assert_eq!(run(SampledDesc { experts: 5000, ..desc }, enough), "experts");
}

#[test]
fn jitter_buffers() {
    let d = open();
    let desc = JitterDesc { dtype: Dtype::Bf16, elements: T * H, epsilon: 0.01, noise: NOISE };
    let run = |desc: JitterDesc, x: usize, y: usize| {
        let (x, mut y) = (d.zeros::<bf16>(x), d.zeros::<bf16>(y));
        d.refused(|| jitter::forward(&d.kernels, &d.stream, &desc, &x, &mut y)).1
    };
    assert_eq!(run(desc, T * H - 1, T * H), "x");
    assert_eq!(run(desc, T * H, T * H - 1), "y");
    assert_eq!(run(JitterDesc { dtype: Dtype::F16, ..desc }, T * H, T * H), "x");
    assert_eq!(run(JitterDesc { epsilon: -0.1, ..desc }, T * H, T * H), "epsilon");
    let mut x = d.zeros::<bf16>(T * H);
    let mut view = x.slice_mut(1..);
    let shorter = JitterDesc { elements: T * H - 1, ..desc };
    let (error, argument) = d.refused(|| jitter::forward_in_place(&d.kernels, &d.stream, &shorter, &mut view));
    assert!(matches!(error, Error::Misaligned { needed: 16, .. }) && argument == "x", "{error}");
}
