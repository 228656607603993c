//! What measured gating, expert maps and dropout refuse.

use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::experts::combine::Identity;
use moe_kernels::routers::balance_loss::{self, BalanceLossArgs, BalanceLossDesc};
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::routers::update_bias::{self, UpdateBiasArgs, UpdateBiasDesc};
use moe_kernels::rules::{Dropout, LossScore, NoiseSource};

use super::*;

fn measured() -> MeasuredGatingDesc {
    MeasuredGatingDesc::new(GatingDesc::new(T, E, K, Gating::new(Score::Softmax)))
}

#[test]
fn measured_buffers() {
    let d = open();
    let desc = measured();
    let bytes = measured_gating::workspace_bytes(&desc, d.kernels.device()).unwrap();
    // Logits, weights, log_sum_exp, probabilities, probability, importance; ids, counts, loss_counts; stats.
    let run = |desc: MeasuredGatingDesc, lengths: [usize; 10], workspace: usize, bias: bool| {
        let [logits, weights, lse, shares, probability, importance, ..] = &mut lengths.map(|len| d.zeros::<f32>(len));
        let [_, _, _, _, _, _, ids, counts, loss_counts, _] = &mut lengths.map(|len| d.zeros::<i32>(len));
        let mut stats = d.zeros::<RouterStats>(lengths[9]);
        let correction = d.zeros::<f32>(E);
        let totals = Totals::new(counts, loss_counts, probability, importance);
        let mut workspace = Workspace::new(&d.stream, workspace).unwrap();
        let mut args = MeasuredGatingArgs::new(&*logits, ids, weights, totals, &mut stats, &mut workspace)
            .log_sum_exp(lse)
            .probabilities(shares);
        args.correction_bias = bias.then(|| (&correction).into());
        d.refused(|| measured_gating::forward(&d.kernels, &d.stream, &desc, args)).1
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
    let losses = |desc: BalanceLossDesc, short: usize| {
        let ints = |index| if short == index { &short_counts } else { &counts };
        let floats = |index| if short == index { &short_sums } else { &sums };
        let mut stats = d.zeros::<RouterStats>(1);
        let args = BalanceLossArgs::new(ints(0), ints(1), floats(2), floats(3), &mut stats);
        d.refused(|| balance_loss::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let desc = BalanceLossDesc::new(T, E);
    let names = ["counts", "loss_counts", "probability", "importance"];
    for (index, name) in names.into_iter().enumerate() {
        assert_eq!(losses(desc, index), name);
    }
    assert_eq!(losses(BalanceLossDesc::new(0, E), 9), "tokens");
    assert_eq!(losses(BalanceLossDesc::new(T, 5000), 9), "experts");

    let update = |desc: UpdateBiasDesc, counts: usize, bias: usize| {
        let (counts, mut bias) = (d.zeros::<i32>(counts), d.zeros::<f32>(bias));
        d.refused(|| update_bias::forward(&d.kernels, &d.stream, &desc, UpdateBiasArgs::new(&counts, &mut bias))).1
    };
    let desc = UpdateBiasDesc::new(E, 0.001);
    assert_eq!(update(desc, E - 1, E), "counts");
    assert_eq!(update(desc, E, E - 1), "correction_bias");
    assert_eq!(update(UpdateBiasDesc::new(E, f32::INFINITY), E, E), "rate");
}

#[test]
fn expert_map_buffers() {
    let d = open();
    let desc = ExpertMapDesc::new(T, E, K).max_replicas(2);
    let run = |desc: ExpertMapDesc, lengths: [usize; 6], sums: bool| {
        let [ids, map, replicas, local_ids, _, _] = &mut lengths.map(|len| d.zeros::<i32>(len));
        let [_, _, _, _, weights, identity_weight] = &mut lengths.map(|len| d.zeros::<f32>(len));
        let mut args = ExpertMapArgs::new(&*ids, &*map, local_ids).weights(&*weights).replicas(&*replicas);
        args.identity_weight = sums.then(|| identity_weight.into());
        d.refused(|| expert_map::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let enough = [T * K, 2 * E, E, T * K, T * K, T];
    for (index, name) in ["ids", "map", "replicas", "local_ids", "weights", "identity_weight"].into_iter().enumerate() {
        let mut lengths = enough;
        lengths[index] -= 1;
        assert_eq!(run(desc, lengths, true), name);
    }
    assert_eq!(run(desc, enough, false), "weights");
    assert_eq!(run(desc.max_replicas(0), enough, true), "max_replicas");
}

#[test]
fn identities_and_dropout() {
    let d = open();
    let shape = SlotShape::new(T, E, Some(K), T * K, 16, 3);
    let desc = CombineDesc::new(Dtype::F32, shape, H);
    let run = |x: usize, weight: usize| {
        let (y_slots, lists) = (d.zeros::<f32>(T * K * H), no_tiles(d, &shape));
        let (x, weight, mut y) = (d.zeros::<f32>(x), d.zeros::<f32>(weight), d.zeros::<f32>(T * H));
        let args = CombineArgs::new(&y_slots, &lists, &mut y).identity(Identity::new(&x, &weight));
        d.refused(|| combine::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    assert_eq!(run(T * H - 1, T), "identity.x");
    assert_eq!(run(T * H, T - 1), "identity.weight");

    let desc = GemmDesc::new(Dtype::F32, Rows::Dense(1), 8, 8);
    for probability in [-0.1, 1.0, f32::NAN] {
        let (a, b, mut out) = (d.zeros::<f32>(8), d.zeros::<f32>(64), d.zeros::<f32>(8));
        let dropout = Dropout::new(probability, NoiseSource::default());
        let args = GemmArgs::new(&a, Weight::new(&b), &mut out).dropout(dropout);
        let refused = d.refused(|| gemm::forward(&d.kernels, &d.stream, &desc, args));
        assert_eq!(refused.1, "dropout.probability");
    }
}
