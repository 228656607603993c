//! Routers, choices and what is measured of them.

use moe_kernels::routers::balance_loss::{self, BalanceLossArgs, BalanceLossDesc};
use moe_kernels::routers::cosine::{CosineDesc, CosineWeights};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::load_importance::{self, LoadImportanceArgs, LoadImportanceDesc};
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::routers::quantile_bias::{self, QuantileBiasArgs, QuantileBiasDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use moe_kernels::routers::update_bias::{self, UpdateBiasArgs, UpdateBiasDesc};
use moe_kernels::rules::{BalanceRule, Gating, NoiseSource, SamplingRule};
use moe_kernels::{Dtype, In, TokenMask, Workspace};

use super::{Chosen, down, gpu, junk, up};
use crate::data::with_type;
use crate::support::compare::Storage;

/// `logits [T, E]` of f32.
pub fn gate(logits: &[f32], experts: usize, top_k: usize, rule: Gating, bias: Option<&[f32]>) -> Chosen {
    gate_as(Dtype::F32, logits, experts, top_k, rule, bias, None)
}

/// `logits [T, E]`, stored as `dtype`. Appended experts stand behind each token's `top_k`. Tokens of which `padding` is 1 do not count.
pub fn gate_as(
    dtype: Dtype,
    logits: &[f32],
    experts: usize,
    top_k: usize,
    rule: Gating,
    bias: Option<&[f32]>,
    padding: Option<&[u8]>,
) -> Chosen {
    with_type!(dtype, T => {
        let logits: Vec<T> = logits.iter().map(|&l| T::from_f64(l.into())).collect();
        gate_stored(&logits, experts, top_k, rule, bias, padding)
    })
}

fn gate_stored<T: Storage>(
    logits: &[T],
    experts: usize,
    top_k: usize,
    rule: Gating,
    bias: Option<&[f32]>,
    padding: Option<&[u8]>,
) -> Chosen {
    let (kernels, stream) = gpu();
    let tokens = logits.len() / experts;
    let logits = up(&stream, logits);
    let bias = bias.map(|bias| up(&stream, bias));
    let slots = tokens * (top_k + rule.appended_experts());
    let (mut ids, mut weights) = (junk::<i32>(&stream, slots), junk::<f32>(&stream, slots));
    let mut args = GatingArgs::new(&logits, &mut ids, &mut weights);
    args.correction_bias = bias.as_ref().map(In::from);
    let padding = padding.map(|padding| up(&stream, padding));
    if let Some(padding) = &padding {
        args.mask = TokenMask::padding(padding);
    }
    gating::forward(kernels, &stream, &GatingDesc::new(tokens, experts, top_k, rule), args).unwrap();
    Chosen { ids: down(&stream, &ids, slots), weights: down(&stream, &weights, slots) }
}

/// What a measured gating says of a batch.
pub struct MeasuredBatch {
    pub loss_counts: Vec<i32>,
    pub probabilities: Vec<f32>,
    pub stats: RouterStats,
}

/// Gating with losses.
pub fn measure(
    logits: &[f32],
    experts: usize,
    top_k: usize,
    gating: Gating,
    rule: BalanceRule,
    bias: Option<&[f32]>,
) -> MeasuredBatch {
    measure_padded(logits, experts, top_k, gating, rule, bias, None)
}

/// The same with tokens of which `padding` is 1 left out.
pub fn measure_padded(
    logits: &[f32],
    experts: usize,
    top_k: usize,
    gating: Gating,
    rule: BalanceRule,
    bias: Option<&[f32]>,
    padding: Option<&[u8]>,
) -> MeasuredBatch {
    let (kernels, stream) = gpu();
    let tokens = logits.len() / experts;
    let desc = MeasuredGatingDesc::new(GatingDesc::new(tokens, experts, top_k, gating)).rule(rule);
    let (logits, bias) = (up(&stream, logits), bias.map(|bias| up(&stream, bias)));
    let (mut ids, mut weights) = (junk::<i32>(&stream, tokens * top_k), junk::<f32>(&stream, tokens * top_k));
    let (mut counts, mut loss_counts) = (junk::<i32>(&stream, experts), junk::<i32>(&stream, experts));
    let (mut probability, mut importance) = (junk::<f32>(&stream, experts), junk::<f32>(&stream, experts));
    let mut probabilities = junk::<f32>(&stream, tokens * experts);
    let mut stats = junk::<RouterStats>(&stream, 1);
    let bytes = measured_gating::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
    let mut args = MeasuredGatingArgs::new(&logits, &mut ids, &mut weights, totals, &mut stats, &mut workspace)
        .probabilities(&mut probabilities);
    args.correction_bias = bias.as_ref().map(In::from);
    let padding = padding.map(|padding| up(&stream, padding));
    if let Some(padding) = &padding {
        args.mask = TokenMask::padding(padding);
    }
    measured_gating::forward(kernels, &stream, &desc, args).unwrap();
    MeasuredBatch {
        loss_counts: down(&stream, &loss_counts, experts),
        probabilities: down(&stream, &probabilities, tokens * experts),
        stats: down(&stream, &stats, 1)[0],
    }
}

/// The balancing loss of totals of `tokens` tokens.
pub fn balance_loss(counts: &[i32], probability: &[f32], tokens: usize) -> f32 {
    let (kernels, stream) = gpu();
    let (counts_up, probability) = (up(&stream, counts), up(&stream, probability));
    let mut stats = junk::<RouterStats>(&stream, 1);
    let args = BalanceLossArgs::new(&counts_up, &counts_up, &probability, &probability, &mut stats);
    let desc = BalanceLossDesc::new(tokens, counts.len());
    balance_loss::forward(kernels, &stream, &desc, args).unwrap();
    down(&stream, &stats, 1)[0].balance_loss
}

/// The correction bias after a step.
pub fn update_bias(counts: &[i32], bias: &[f32], rate: f32) -> Vec<f32> {
    let (kernels, stream) = gpu();
    let (counts_up, mut bias_up) = (up(&stream, counts), up(&stream, bias));
    let args = UpdateBiasArgs::new(&counts_up, &mut bias_up);
    update_bias::forward(kernels, &stream, &UpdateBiasDesc::new(counts.len(), rate), args).unwrap();
    down(&stream, &bias_up, bias.len())
}

/// Potentials of experts that make a balanced plan of `logits [T, E]`.
pub fn sinkhorn(logits: &[f32], experts: usize, iterations: u32, tolerance: f32) -> Vec<f32> {
    let (kernels, stream) = gpu();
    let tokens = logits.len() / experts;
    let desc = SinkhornDesc::new(tokens, experts, 1, iterations, tolerance);
    let logits = up(&stream, logits);
    let (mut ids, mut potentials) = (junk::<i32>(&stream, tokens), junk::<f32>(&stream, experts));
    let mut status = junk::<u32>(&stream, 2);
    let mut workspace = Workspace::new(&stream, sinkhorn::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
    let args = SinkhornArgs::new(&logits, &mut ids, &mut potentials, &mut status, &mut workspace);
    sinkhorn::forward(kernels, &stream, &desc, args).unwrap();
    down(&stream, &potentials, experts)
}

/// `k` experts drawn for each token, at an inverse temperature.
pub fn draw(logits: &[f32], experts: usize, top_k: usize, inverse_temperature: f32, seed: u64) -> Chosen {
    let (kernels, stream) = gpu();
    let tokens = logits.len() / experts;
    let rule = SamplingRule::new(top_k, NoiseSource::new(seed, 0)).inverse_temperature(inverse_temperature);
    let logits = up(&stream, logits);
    let (mut ids, mut weights) = (junk::<i32>(&stream, tokens * top_k), junk::<f32>(&stream, tokens * top_k));
    let desc = SampledDesc::new(tokens, experts, rule);
    sampled::forward(kernels, &stream, &desc, SampledArgs::new(&logits, &mut ids, &mut weights)).unwrap();
    Chosen { ids: down(&stream, &ids, tokens * top_k), weights: down(&stream, &weights, tokens * top_k) }
}

/// The bias that gives every expert its share, from choices `ids [T, k + 1]` by `scores [T, E]` and `bias`.
pub fn quantile_bias(scores: &[f32], ids: &[i32], bias: &[f32], top_k: usize) -> Vec<f32> {
    let (kernels, stream) = gpu();
    let experts = bias.len();
    let desc = QuantileBiasDesc::new(scores.len() / experts, experts, top_k);
    let (scores, ids, bias) = (up(&stream, scores), up(&stream, ids), up(&stream, bias));
    let mut updated = junk::<f32>(&stream, experts);
    let args = QuantileBiasArgs::new(&scores, &ids, &bias, &mut updated);
    quantile_bias::forward(kernels, &stream, &desc, args).unwrap();
    down(&stream, &updated, experts)
}

/// A router's logits.
pub fn router<T: Storage>(x: &[T], weight: &[T], bias: Option<&[f32]>, hidden: usize) -> Vec<f32> {
    let (kernels, stream) = gpu();
    let (tokens, experts) = (x.len() / hidden, weight.len() / hidden);
    let (x, weight, bias) = (up(&stream, x), up(&stream, weight), bias.map(|bias| up(&stream, bias)));
    let mut logits = junk::<f32>(&stream, tokens * experts);
    let mut args = RouterArgs::new(&x, &weight, &mut logits);
    args.bias = bias.as_ref().map(In::from);
    router::forward(kernels, &stream, &RouterDesc::new(T::DTYPE, tokens, experts, hidden), args).unwrap();
    down(&stream, &logits, tokens * experts)
}

/// The loss of importance and of loads: of `scores` without noise and of `logits` with it, which chose `ids`.
pub fn load_importance(scores: &[f32], logits: &[f32], ids: &[i32], experts: usize, deviation: f32) -> f32 {
    let (kernels, stream) = gpu();
    let tokens = scores.len() / experts;
    let desc = LoadImportanceDesc::new(tokens, experts, ids.len() / tokens, deviation);
    let (scores, logits, ids) = (up(&stream, scores), up(&stream, logits), up(&stream, ids));
    let [mut importance, mut load, mut losses] = [experts, experts, 3].map(|len| junk::<f32>(&stream, len));
    let bytes = load_importance::workspace_bytes(&desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let sums = [&mut importance, &mut load];
    let args = LoadImportanceArgs::new([&scores, &logits], &ids, sums, &mut losses, &mut workspace);
    load_importance::forward(kernels, &stream, &desc, args).unwrap();
    down(&stream, &losses, 3)[0]
}

/// Logits by cosine: of `x`, `projection` with `bias`, and a row of `similar` for each expert.
pub fn cosine(desc: CosineDesc, x: &[f32], projection: &[f32], bias: &[f32], similar: &[f32]) -> Vec<f32> {
    let (kernels, stream) = gpu();
    let (x, projection, bias, similar) =
        (up(&stream, x), up(&stream, projection), up(&stream, bias), up(&stream, similar));
    let mut logits = junk::<f32>(&stream, desc.tokens * desc.experts);
    let plan = desc.plan(kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
    let weights = CosineWeights::new(&projection, &similar).bias(&bias);
    plan.forward::<f32, f32>(kernels, &stream, weights, &x, &mut logits, &mut workspace).unwrap();
    down(&stream, &logits, desc.tokens * desc.experts)
}
