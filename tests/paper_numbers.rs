//! The reference against numbers worked out from the papers' formulas apart from it: by hand where they are short, else in f64 by a program
//! that shares no code with the crate (Philox from its paper, the normal distribution from a statistics library).

use moe_kernels::reference::admission::admit;
use moe_kernels::reference::balance::{balance, cv_squared};
use moe_kernels::reference::jitter::jitter;
use moe_kernels::reference::noisy::{hierarchical, noisy_top_k};
use moe_kernels::reference::sampled::gumbel_top_k;
use moe_kernels::reference::{base, expert_choice, sinkhorn};
use moe_kernels::rules::{
    AdmissionRule, Affinity, BalanceRule, LossCounts, LossScore, NoiseSource, NoisyRule, Order, SamplingRule,
    SecondExpert,
};

fn near(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= tolerance, "{got} is not {want}");
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

/// Shazeer et al. 2017, eq. 3 to 11.
#[test]
fn noisy_top_k_of_two_tokens() {
    let rule = NoisyRule::new(2, NoiseSource::new(7, 3)).noise_epsilon(0.0);
    let clean = [0.5, -0.25, 1.0, 0.0, 0.75, -0.5];
    let raw = [0.0, 1.0, -1.0, 0.5, -0.5, 2.0];
    let got = noisy_top_k(&clean, &raw, 3, &rule).unwrap();
    let noisy = [0.6623263, 0.0400314, 0.8984418, 1.9543822, 0.4468257, -0.9740533];
    near(&wide(&got.noisy), &noisy, 2e-6);
    assert_eq!(got.ids, [2, 0, 0, 1]);
    near(&got.weights, &[0.5587561, 0.4412439, 0.8186988, 0.1813012], 1e-6);
    near(&wide(&got.thresholds), &[0.6623263, 0.0400314, 0.4468257, -0.9740533], 2e-6);
    near(&got.importance, &[1.2599426, 0.1813012, 0.5587561], 1e-6);
    near(&got.load, &[1.5878639, 1.2434827, 1.3270112], 4e-6);
    let (importance, load) = got.losses();
    near(&[importance, load], &[0.4494005, 0.0111971], 2e-6);
}

/// Shazeer et al. 2017, appendix B, eq. 12 to 14: two groups of two experts, three tokens.
#[test]
fn hierarchy_of_three_tokens() {
    let rule = |top_k| NoisyRule::new(top_k, NoiseSource::new(7, 3));
    let primary_clean = [0.2, 0.1, -0.3, 0.4, 0.6, -0.2];
    let primary_raw = [0.0, 0.3, 0.1, -0.4, 0.2, 0.5];
    let clean = [0.1, 0.9, 0.3, -0.6, 0.4, 0.2, -0.1, 0.8, 0.7, -0.5, 0.0, 0.25];
    let raw = [0.0, 0.0, 0.5, 0.5, 1.0, -1.0, 0.2, 0.3, -0.7, 0.4, 0.6, -0.2];
    let run = |k1| hierarchical(&primary_clean, &primary_raw, 2, &rule(k1), &clean, &raw, 2, &rule(1)).unwrap();
    let both = run(2);
    assert_eq!(both.ids, [1, 2, 0, 2, 1, 2]);
    near(&both.weights, &[0.5184359, 0.4815641, 0.7591614, 0.2408386, 0.6362268, 0.3637732], 1e-6);
    near(&both.importance, &[0.7591614, 1.1546627, 1.0861759, 0.0], 1e-6);
    near(&both.load, &[1.3833959, 1.1562795, 2.3659674, 1.6659837], 6e-6);
    // All tokens in the first group: the second has no |X|.
    let one = run(1);
    assert_eq!(one.ids, [1, 0, 1]);
    near(&one.load, &[0.5532199, 0.462396, 0.0, 0.0], 4e-6);
}

/// Shazeer et al. 2017, section 4: variance 2/3, mean 2.
#[test]
fn coefficient_of_variation() {
    near(&[cv_squared(&[1.0, 2.0, 3.0])], &[1.0 / 6.0], 1e-10);
}

/// Logits whose softmax is a row of `p`, each row `scale` higher in sum.
fn logits(p: &[[f64; 3]], scale: &[f64]) -> Vec<f64> {
    p.iter().zip(scale).flat_map(|(row, scale)| row.map(|p| (p * scale).ln())).collect()
}

/// Switch eq. 4 to 6, GShard's algorithm 1 line 13, Mixtral's sum over two choices, ST-MoE's eq. 5.
#[test]
fn balancing_losses_of_four_tokens() {
    let p = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]];
    let logits = logits(&p, &[1.0, 2.0, 4.0, 1.0]);
    let rule = BalanceRule::new(LossScore::Softmax, 4);
    let firsts = balance(&logits, &[0, 0, 1, 2], &[1.0; 4], 3, 1, &rule).unwrap();
    // f = 2/4, 1/4, 1/4; P = 1.4/4, 1.3/4, 1.3/4.
    near(&[firsts.totals.loss()], &[3.0 * (0.5 * 0.35 + 0.5 * 0.325)], 1e-12);
    near(&[firsts.z_loss], &[1.25 * 2f64.ln().powi(2)], 1e-12);
    let ids = [0, 1, 0, 2, 1, 0, 2, 1];
    let two = balance(&logits, &ids, &[0.5; 8], 3, 2, &rule).unwrap();
    near(&[two.totals.loss()], &[3.0 * (0.75 * 0.35 + 0.75 * 0.325 + 0.5 * 0.325)], 1e-12);
    let gshard = balance(&logits, &ids, &[0.5; 8], 3, 2, &rule.counts(LossCounts::FirstChoice)).unwrap();
    near(&[gshard.totals.loss() / 9.0], &[(0.5 * 0.35 + 0.25 * 0.325 + 0.25 * 0.325) / 3.0], 1e-12);
}

/// DeepSeek-V3, eq. 17 to 20: a bias sends both tokens to expert 2, which has the least score; eq. 18 counts the largest all the same.
#[test]
fn the_sequence_loss_counts_scores_without_the_bias() {
    let scores = [[0.8, 0.5, 0.2], [0.6, 0.9, 0.3]];
    let logits: Vec<f64> = scores.iter().flatten().map(|s: &f64| (s / (1.0 - s)).ln()).collect();
    // P = (8/15 + 6/18)/2, (5/15 + 9/18)/2, (2/15 + 3/18)/2.
    let p = [13.0 / 30.0, 5.0 / 12.0, 3.0 / 20.0];
    let rule = BalanceRule::new(LossScore::Sigmoid, 2);
    let of = |rule| balance(&logits, &[2, 2], &[1.0; 2], 3, 1, &rule).unwrap();
    let unbiased = of(rule.counts(LossCounts::Scores));
    near(&[unbiased.sequence_loss], &[1.5 * p[0] + 1.5 * p[1]], 1e-12);
    assert_eq!((unbiased.totals.counts, unbiased.counts), (vec![1, 1, 0], vec![0, 0, 2]));
    near(&unbiased.importance, &[0.0, 0.0, 2.0], 0.0);
    near(&[of(rule).sequence_loss], &[3.0 * p[2]], 1e-12);
}

/// GShard, algorithm 1: capacity 1, three experts, four tokens with their normalised gates.
#[test]
fn gshard_gives_all_first_choices_before_second_ones() {
    let ids = [0, 1, 0, 2, 1, 0, 2, 1];
    let gates = [0.6, 0.4, 0.7, 0.3, 0.9, 0.1, 0.8, 0.2];
    let rule = AdmissionRule::new(3, 2, 1, 4);
    let by = |order| admit(&ids, &gates, None, &rule.order(order)).unwrap().ids;
    assert_eq!(by(Order::ByChoice), [0, -1, -1, -1, 1, -1, 2, -1]);
    assert_eq!(by(Order::ByToken), [0, 1, -1, 2, -1, -1, -1, -1]);
}

/// Line 19: `2 g2 > rnd`, with the numbers that the noise yields for tokens 0 to 3; and, as in the authors' code, a second expert that is
/// not drawn takes no place.
#[test]
fn gshard_draws_second_experts_by_twice_their_gate() {
    const RANDOM: [f32; 4] = [0.1003165, 0.6450306, 0.4185204, 0.6952974];
    // Twice the gate a little above and a little below.
    let ids = [0, 1, 0, 1, 0, 1, 0, 1];
    for (delta, drawn) in [(1e-4, [1, 1, 1, 1]), (-1e-4, [-1, -1, -1, -1])] {
        let gates: Vec<f32> = RANDOM.iter().flat_map(|r| [1.0, r / 2.0 + delta]).collect();
        let rule = AdmissionRule::gshard(2, 4, 4, NoiseSource::new(11, 0));
        let got = admit(&ids, &gates, None, &rule).unwrap().ids;
        assert_eq!(got.chunks(2).map(|two| two[1]).collect::<Vec<_>>(), drawn);
    }
    let above = AdmissionRule::new(2, 2, 1, 2).order(Order::ByChoice).second(SecondExpert::Above(0.25));
    assert_eq!(admit(&[0, 1, 0, 1], &[0.9, 0.1, 0.6, 0.4], None, &above).unwrap().ids, [0, -1, -1, 1]);
}

/// Riquelme et al. 2021, section 4.1: tokens sorted by their largest weight, then all first choices, then all second ones.
#[test]
fn v_moe_serves_the_most_certain_token_first() {
    let rule = AdmissionRule::new(2, 2, 1, 2).order(Order::ByChoice).prioritised(true);
    assert_eq!(admit(&[0, 1, 0, 1], &[0.5, 0.3, 0.8, 0.1], None, &rule).unwrap().ids, [-1, -1, 0, 1]);
}

/// Fedus et al. 2021, appendix B: what overflows is passed on after every token has had its first choice.
#[test]
fn no_token_left_behind_goes_in_stages() {
    let ids = [0, 1, 0, 1, 1, 0];
    let weights = [0.6, 0.4, 0.6, 0.4, 0.6, 0.4];
    let rule = AdmissionRule::new(2, 1, 1, 3).candidates(2);
    let by = |order| admit(&ids, &weights, None, &rule.order(order)).unwrap().ids;
    assert_eq!(by(Order::ByChoice), [0, -1, 1]);
    assert_eq!(by(Order::ByToken), [0, 1, -1]);
}

/// Fedus et al. 2021, appendix C: `x U(1 - epsilon, 1 + epsilon)`, element by element.
#[test]
fn jitter_of_four_elements() {
    let u = [0.2477669, 0.0544840, 0.1133848, 0.0609295];
    let got = jitter::<f32, f32>(&[2.0, -1.0, 4.0, 0.5], 0.25, NoiseSource::new(4, 5)).unwrap();
    let want: Vec<f64> = [2.0, -1.0, 4.0, 0.5].iter().zip(u).map(|(x, u)| x * (0.75 + 0.5 * u)).collect();
    near(&got, &want, 1e-6);
}

/// Kool et al. 2019: logits plus Gumbel noise, scaled by the inverse temperature.
#[test]
fn gumbel_noise_on_scaled_logits() {
    let mut row = vec![-1.0f32; 3 * 34];
    (row[68], row[68 + 33]) = (0.5, -0.25);
    let rule = SamplingRule::new(1, NoiseSource::new(9, 1)).inverse_temperature(2.0);
    let got = gumbel_top_k(&row, 34, &rule).unwrap();
    near(&wide(&[got.perturbed[68], got.perturbed[68 + 33]]), &[1.0 + 0.3625489, -0.5 + 1.5161075], 2e-6);
}

/// Zhou et al. 2022: S = softmax over experts, G and I the top k of its columns, G not normalised again.
#[test]
fn expert_choice_takes_columns_of_the_softmax() {
    let logits = logits(&[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1]], &[1.0; 3]);
    let affinities = expert_choice::affinities(&logits, 3, Affinity::Softmax).unwrap();
    let got = expert_choice::choose(&affinities, 3, 2).unwrap();
    assert_eq!(got.slot_token, [0, 1, 0, 2, 0, 1]);
    near(&got.slot_weight, &[0.5, 0.6, 0.3, 0.7, 0.2, 0.3], 1e-12);
}

/// Lewis et al. 2021: the expert's output times the sigmoid of its score. Clark et al. 2022: the router's own probability.
#[test]
fn gates_of_balanced_routers() {
    let scores = [3f32.ln(), 0.0, -1.0, 1f32.ln()];
    near(&base::weights(&scores, &[0, 1], 2).unwrap(), &[0.75, 0.5], 1e-7);
    let logits = logits(&[[0.5, 0.3, 0.2]], &[7.0]);
    near(&sinkhorn::weights(&logits, &[2, 0], 3, 2).unwrap(), &[0.2, 0.5], 1e-12);
}
