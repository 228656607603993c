//! What measured gating, expert maps and dropout refuse.

use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::experts::combine::Identity;
use moe_kernels::routers::balance::{
    self, BiasDesc, MeasureDesc, MeasuredArgs, RouterStats, Totals, TotalsDesc, TotalsIn,
};
use moe_kernels::rules::LossScore;
use moe_kernels::rules::{Dropout, NoiseSource};

use super::*;

fn measured() -> MeasureDesc {
    MeasureDesc::new(GatingDesc { tokens: T, experts: E, top_k: K, gating: Gating::new(Score::Softmax) })
}

#[test]
fn measured_buffers() {
    let d = open();
    let desc = measured();
    let bytes = balance::workspace_bytes(&desc, d.kernels.device()).unwrap();
    // Logits, weights, log_sum_exp, probabilities, probability, importance; ids, counts, loss_counts; stats.
    let run = |desc: MeasureDesc, lengths: [usize; 10], workspace: usize, bias: bool| {
        let [logits, weights, lse, shares, probability, importance, ..] = &mut lengths.map(|len| d.zeros::<f32>(len));
        let [_, _, _, _, _, _, ids, counts, loss_counts, _] = &mut lengths.map(|len| d.zeros::<i32>(len));
        let mut stats = d.zeros::<RouterStats>(lengths[9]);
        let correction = d.zeros::<f32>(E);
        let args = MeasuredArgs {
            logits,
            correction_bias: bias.then_some(&correction as _),
            ids,
            weights,
            log_sum_exp: Some(lse),
            probabilities: Some(shares),
            totals: Totals { counts, loss_counts, probability, importance },
            stats: &mut stats,
            workspace: &mut Workspace::new(&d.stream, workspace).unwrap(),
        };
        d.refused(|| balance::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * E, T * K, T, T * E, E, E, T * K, E, E, 1];
    let names = [
        "logits",
        "weights",
        "log_sum_exp",
        "probabilities",
        "totals.probability",
        "totals.importance",
        "ids",
        "totals.counts",
        "totals.loss_counts",
        "stats",
    ];
    for (index, name) in names.into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, lengths, bytes, false), name);
    }
    assert_eq!(run(desc, enough, bytes - 1, false), "workspace");
    let mut other = desc;
    other.gating.gating = Gating::new(Score::TopkSoftmax);
    assert_eq!(run(other, enough, bytes, true), "correction_bias");
    other.rule.score = LossScore::Sigmoid;
    assert_eq!(run(other, enough, bytes, false), "rule.score");
    other.rule.tokens_per_sequence = 0;
    assert_eq!(run(other, enough, bytes, false), "rule.tokens_per_sequence");
}

#[test]
fn totals_and_bias() {
    let d = open();
    let (counts, sums) = (d.zeros::<i32>(E), d.zeros::<f32>(E));
    let (short_counts, short_sums) = (d.zeros::<i32>(E - 1), d.zeros::<f32>(E - 1));
    let losses = |desc: TotalsDesc, short: usize| {
        let ints = |index| if short == index { &short_counts } else { &counts };
        let floats = |index| if short == index { &short_sums } else { &sums };
        let totals = TotalsIn { counts: ints(0), loss_counts: ints(1), probability: floats(2), importance: floats(3) };
        let mut stats = d.zeros::<RouterStats>(1);
        d.refused(|| balance::losses_of_totals(&d.kernels, &d.stream, &desc, totals, &mut stats)).1
    };
    let desc = TotalsDesc { experts: E, tokens: T };
    let names = ["totals.counts", "totals.loss_counts", "totals.probability", "totals.importance"];
    for (index, name) in names.into_iter().enumerate() {
        assert_eq!(losses(desc, index), name);
    }
    assert_eq!(losses(TotalsDesc { tokens: 0, ..desc }, 9), "tokens");
    assert_eq!(losses(TotalsDesc { experts: 5000, ..desc }, 9), "experts");

    let update = |desc: BiasDesc, counts: usize, bias: usize| {
        let (counts, mut bias) = (d.zeros::<i32>(counts), d.zeros::<f32>(bias));
        d.refused(|| balance::update_bias(&d.kernels, &d.stream, &desc, &counts, &mut bias)).1
    };
    let desc = BiasDesc { experts: E, rate: 0.001 };
    assert_eq!(update(desc, E - 1, E), "counts");
    assert_eq!(update(desc, E, E - 1), "bias");
    assert_eq!(update(BiasDesc { rate: f32::INFINITY, ..desc }, E, E), "rate");
}

#[test]
fn expert_map_buffers() {
    let d = open();
    let desc = ExpertMapDesc { tokens: T, experts: E, top_k: K, max_replicas: 2, seed: 0 };
    let run = |desc: ExpertMapDesc, lengths: [usize; 6], sums: bool| {
        let [ids, map, replicas, local_ids, _, _] = &mut lengths.map(|len| d.zeros::<i32>(len));
        let [_, _, _, _, weights, identity_weight] = &mut lengths.map(|len| d.zeros::<f32>(len));
        let args = ExpertMapArgs {
            ids,
            weights: Some(weights),
            map,
            replicas: Some(replicas),
            local_ids,
            identity_weight: if sums { Some(identity_weight) } else { None },
        };
        d.refused(|| expert_map::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * K, 2 * E, E, T * K, T * K, T];
    for (index, name) in ["ids", "map", "replicas", "local_ids", "weights", "identity_weight"].into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, lengths, true), name);
    }
    assert_eq!(run(desc, enough, false), "weights");
    assert_eq!(run(ExpertMapDesc { max_replicas: 0, ..desc }, enough, true), "max_replicas");
}

#[test]
fn identities_and_dropout() {
    let d = open();
    let desc = CombineDesc { dtype: Dtype::F32, tokens: T, top_k: K, hidden: H, slots: T * K };
    let run = |x: usize, weight: usize| {
        let (y_slots, token_slot) = (d.zeros::<f32>(T * K * H), d.zeros::<i32>(T * K));
        let (x, weight, mut y) = (d.zeros::<f32>(x), d.zeros::<f32>(weight), d.zeros::<f32>(T * H));
        let args = CombineArgs {
            y_slots: &y_slots,
            token_slot: &token_slot,
            weights: None,
            residual: None,
            addend: None,
            y: &mut y,
        };
        let identity = Identity { x: &x, weight: &weight };
        d.refused(|| combine::forward_with_identity(&d.kernels, &d.stream, &desc, args, identity)).1
    };
    assert_eq!(run(T * H - 1, T), "identity.x");
    assert_eq!(run(T * H, T - 1), "identity.weight");

    let desc = GemmDesc {
        dtype: Dtype::F32,
        rows: 1,
        a_rows: 1,
        experts: 1,
        n: 8,
        k: 8,
        glu: Glu::None,
        activation: Activation::Identity,
        layout: Layout::Nk,
        schedule: Schedule::Dense,
    };
    for probability in [-0.1, 1.0, f32::NAN] {
        let (a, b, mut out) = (d.zeros::<f32>(8), d.zeros::<f32>(64), d.zeros::<f32>(8));
        let args = GemmArgs { a: &a, b: &b, bias: None, slot_token: None, row_scale: None, tiles: None, out: &mut out };
        let dropout = Dropout { probability, noise: NoiseSource::default() };
        let refused = d.refused(|| gemm::forward_with_dropout(&d.kernels, &d.stream, &desc, args, dropout));
        assert_eq!(refused.1, "dropout.probability");
    }
}
