//! One batch of tokens with skewed popularity, through every router: who gets how much.
//!
//! `cargo run --release --example routers [-- FILE.svg]` prints each router's load histogram side by side, and writes the same as an SVG
//! (default `routers.svg`); below stands what measured gating says of the batch, and of the same batch once a bias without
//! loss has balanced it.

mod cli;
mod svg;
mod terminal;
#[path = "../support/whole_file.rs"]
mod whole_file;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use cudarc::driver::{CudaSlice, CudaStream};
use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::routers::balance::{self, BiasDesc, MeasureDesc, MeasuredArgs, RouterStats, Totals};
use moe_kernels::routers::base::{self, BaseArgs, BaseDesc};
use moe_kernels::routers::expert_choice::{self, ChoiceArgs, ExpertChoiceDesc};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::hash::{self, HashArgs, HashBy, HashDesc};
use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::jitter::{self, JitterDesc};
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use moe_kernels::rules::Affinity;
use moe_kernels::rules::AuctionRule;
use moe_kernels::rules::Dtype;
use moe_kernels::rules::Gating;
use moe_kernels::rules::NoisyRule;
use moe_kernels::rules::SamplingRule;
use moe_kernels::rules::Score;
use moe_kernels::rules::{AdmissionRule, NoiseSource, Order, SecondExpert};
use moe_kernels::{Kernels, Workspace, device};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const TOKENS: usize = 512;
const EXPERTS: usize = 16;
const NOISE: NoiseSource = NoiseSource { seed: 1, offset: 0 };

/// Steps of the bias update, and by how much a step moves a bias.
const BIAS_STEPS: usize = 60;
const BIAS_RATE: f32 = 0.01;

fn noisy_rule(top_k: usize) -> NoisyRule {
    NoisyRule { top_k, noise_epsilon: 1e-2, noise: NOISE }
}

/// What became of the batch.
pub struct Load {
    /// The router.
    pub name: &'static str,
    /// Tokens of each expert, most popular expert first.
    pub tokens: Vec<usize>,
    /// Tokens that got no expert at all.
    pub left_out: usize,
}

impl Load {
    /// From the ids of all slots, by token.
    fn new(name: &'static str, ids: &[i32], per_token: usize) -> Load {
        let mut tokens = vec![0; EXPERTS];
        ids.iter().filter_map(|&id| usize::try_from(id).ok()).for_each(|id| tokens[id] += 1);
        let left_out = ids.chunks(per_token).filter(|ids| ids.iter().all(|&id| id < 0)).count();
        Load { name, tokens, left_out }
    }

    /// Largest load over mean load: 1 when balanced.
    pub fn imbalance(&self) -> f64 {
        let total: usize = self.tokens.iter().sum();
        let largest = self.tokens.iter().max().copied().unwrap_or(0);
        if total == 0 { 0.0 } else { largest as f64 * self.tokens.len() as f64 / total as f64 }
    }
}

/// A load with what the device measured of it.
struct Measured {
    load: Load,
    stats: RouterStats,
}

/// The batch on the device.
struct Batch<'a> {
    kernels: &'a Kernels,
    stream: &'a Arc<CudaStream>,
    logits: CudaSlice<f32>,
    words: CudaSlice<i32>,
    frequencies: Vec<u64>,
}

fn main() -> ExitCode {
    match run(&cli::Options::parse().file) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(file: &Path) -> Outcome<()> {
    softcuda::install_if_no_gpu()?;
    let context = device::open(0)?;
    println!("device: {}", context.name()?);
    let stream = context.new_stream()?;
    let kernels = Kernels::new(&context)?;
    let batch = Batch::new(&kernels, &stream)?;
    let unbiased = batch.measured("top-2, no bias", 0)?;
    let balanced = batch.measured("top-2, bias", BIAS_STEPS)?;
    let statistics = terminal::statistics(&[unbiased.stats, balanced.stats], ["no bias", "bias"]);
    let loads = [
        batch.top_k("top-1", 1)?,
        batch.top_k("top-2", 2)?,
        balanced.load,
        batch.jittered()?,
        batch.noisy()?,
        batch.hierarchical()?,
        batch.sampled()?,
        batch.admitted("Switch, cf 1.25", 1, 1, Order::ByToken, false, SecondExpert::Always)?,
        batch.admitted("passed on", 4, 1, Order::ByChoice, false, SecondExpert::Always)?,
        batch.admitted("GShard top-2", 2, 2, Order::ByChoice, false, batch.random_second())?,
        batch.admitted("V-MoE top-2", 2, 2, Order::ByChoice, true, SecondExpert::Always)?,
        batch.expert_choice()?,
        batch.base()?,
        batch.sinkhorn()?,
        batch.hashed()?,
        batch.hashed_by_frequency()?,
    ];
    println!("{}", terminal::table(&loads, TOKENS));
    println!("\n{statistics}");
    let drawing = svg::drawing(&loads, TOKENS);
    whole_file::write(file, drawing.as_bytes()).map_err(|error| format!("{}: {error}", file.display()))?;
    println!("{} written", file.display());
    Ok(())
}

impl<'a> Batch<'a> {
    /// Logits whose mean falls by expert like the logarithm of Zipf's law, and words of a Zipf vocabulary.
    fn new(kernels: &'a Kernels, stream: &'a Arc<CudaStream>) -> Outcome<Batch<'a>> {
        let rng = &mut fastrand::Rng::with_seed(7);
        let normal = |rng: &mut fastrand::Rng| (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0;
        let logits: Vec<f32> = (0..TOKENS * EXPERTS).map(|i| normal(rng) - ((i % EXPERTS + 1) as f32).ln()).collect();
        let words: Vec<i32> = (0..TOKENS).map(|_| (512f32.powf(rng.f32()) - 1.0) as i32).collect();
        let mut frequencies = vec![0; 512];
        words.iter().for_each(|&word| frequencies[word as usize] += 1);
        Ok(Batch {
            kernels,
            stream,
            logits: stream.clone_htod(&logits)?,
            words: stream.clone_htod(&words)?,
            frequencies,
        })
    }

    fn choose(&self, top_k: usize) -> Outcome<(CudaSlice<i32>, CudaSlice<f32>)> {
        let gating = Gating { renormalise: true, ..Gating::new(Score::Softmax) };
        let desc = GatingDesc { tokens: TOKENS, experts: EXPERTS, top_k, gating };
        let mut ids = self.stream.alloc_zeros(TOKENS * top_k)?;
        let mut weights = self.stream.alloc_zeros(TOKENS * top_k)?;
        let args = GatingArgs { logits: &self.logits, correction_bias: None, ids: &mut ids, weights: &mut weights };
        gating::forward(self.kernels, self.stream, &desc, args)?;
        Ok((ids, weights))
    }

    fn top_k(&self, name: &'static str, top_k: usize) -> Outcome<Load> {
        let (ids, _) = self.choose(top_k)?;
        Ok(Load::new(name, &self.stream.clone_dtoh(&ids)?, top_k))
    }

    /// The two best by sigmoid scores plus a bias, which `steps` updates by the counts have moved (DeepSeek-V3).
    fn measured(&self, name: &'static str, steps: usize) -> Outcome<Measured> {
        let top_k = 2;
        let gating = Gating::new(Score::Sigmoid).renormalised();
        let gating = GatingDesc { tokens: TOKENS, experts: EXPERTS, top_k, gating };
        let mut desc = MeasureDesc::new(gating);
        desc.rule.capacity = Some(rules::capacity(TOKENS, EXPERTS, top_k, 1.25));
        let stream = self.stream;
        let mut bias = stream.alloc_zeros::<f32>(EXPERTS)?;
        let mut ids = stream.alloc_zeros(TOKENS * top_k)?;
        let mut weights = stream.alloc_zeros(TOKENS * top_k)?;
        let (mut counts, mut loss_counts) = (stream.alloc_zeros(EXPERTS)?, stream.alloc_zeros(EXPERTS)?);
        let (mut probability, mut importance) = (stream.alloc_zeros(EXPERTS)?, stream.alloc_zeros(EXPERTS)?);
        let mut stats = stream.alloc_zeros::<RouterStats>(1)?;
        let bytes = balance::workspace_bytes(&desc, self.kernels.device())?;
        let mut workspace = Workspace::new(stream, bytes)?;
        for step in 0..=steps {
            let args = MeasuredArgs {
                logits: &self.logits,
                correction_bias: Some(&bias),
                ids: &mut ids,
                weights: &mut weights,
                log_sum_exp: None,
                probabilities: None,
                totals: Totals {
                    counts: &mut counts,
                    loss_counts: &mut loss_counts,
                    probability: &mut probability,
                    importance: &mut importance,
                },
                stats: &mut stats,
                workspace: &mut workspace,
            };
            balance::forward(self.kernels, stream, &desc, args)?;
            if step < steps {
                let update = BiasDesc { experts: EXPERTS, rate: BIAS_RATE };
                balance::update_bias(self.kernels, stream, &update, &counts, &mut bias)?;
            }
        }
        let load = Load::new(name, &stream.clone_dtoh(&ids)?, top_k);
        Ok(Measured { load, stats: stream.clone_dtoh(&stats)?[0] })
    }

    /// Logits times a number of 0.9 to 1.1, then the best.
    fn jittered(&self) -> Outcome<Load> {
        let mut logits = self.stream.clone_dtod(&self.logits)?;
        let desc = JitterDesc { dtype: Dtype::F32, elements: TOKENS * EXPERTS, epsilon: 0.1, noise: NOISE };
        jitter::forward_in_place(self.kernels, self.stream, &desc, &mut logits)?;
        let ids = Batch { logits, words: self.words.clone(), frequencies: Vec::new(), ..*self }.choose(1)?.0;
        Ok(Load::new("jitter top-1", &self.stream.clone_dtoh(&ids)?, 1))
    }

    /// Noise of deviation softplus(1) = 1.3.
    fn noisy(&self) -> Outcome<Load> {
        let desc = NoisyDesc { tokens: TOKENS, experts: EXPERTS, rule: noisy_rule(2) };
        let raw = self.stream.clone_htod(&[1f32; TOKENS * EXPERTS])?;
        let mut ids = self.stream.alloc_zeros(TOKENS * 2)?;
        let mut weights = self.stream.alloc_zeros(TOKENS * 2)?;
        let args = NoisyArgs {
            logits: NoisyLogits::Apart { clean: &self.logits, raw: &raw },
            ids: &mut ids,
            weights: &mut weights,
            noisy: None,
            thresholds: None,
            sums: None,
        };
        noisy::forward(self.kernels, self.stream, &desc, args)?;
        Ok(Load::new("noisy top-2", &self.stream.clone_dtoh(&ids)?, 2))
    }

    /// Two of four groups by their experts' mean logit, one expert in each.
    fn hierarchical(&self) -> Outcome<Load> {
        const GROUPS: usize = 4;
        let size = EXPERTS / GROUPS;
        let desc = HierarchicalDesc {
            tokens: TOKENS,
            groups: GROUPS,
            experts: size,
            primary: noisy_rule(2),
            secondary: noisy_rule(1),
        };
        let clean = self.stream.clone_dtoh(&self.logits)?;
        let means: Vec<f32> = clean.chunks(size).map(|group| group.iter().sum::<f32>() / size as f32).collect();
        let primary_clean = self.stream.clone_htod(&means)?;
        let primary_raw = self.stream.clone_htod(&vec![1f32; means.len()])?;
        let raw = self.stream.clone_htod(&vec![1f32; clean.len()])?;
        let floats = |len: usize| self.stream.alloc_zeros::<f32>(len);
        let ints = |len: usize| self.stream.alloc_zeros::<i32>(len);
        let (mut group_ids, mut group_counts) = (ints(TOKENS * 2)?, ints(GROUPS)?);
        let (mut group_weights, mut group_importance) = (floats(TOKENS * 2)?, floats(GROUPS)?);
        let (mut group_load, mut group_losses) = (floats(GROUPS)?, floats(2)?);
        let (mut ids, mut counts, mut weights) = (ints(TOKENS * 2)?, ints(EXPERTS)?, floats(TOKENS * 2)?);
        let (mut importance, mut load, mut losses) = (floats(EXPERTS)?, floats(EXPERTS)?, floats(2)?);
        let bytes = hierarchical::workspace_bytes(&desc, self.kernels.device())?;
        let mut workspace = Workspace::new(self.stream, bytes)?;
        let args = HierarchicalArgs {
            primary_logits: NoisyLogits::Apart { clean: &primary_clean, raw: &primary_raw },
            logits: NoisyLogits::Apart { clean: &self.logits, raw: &raw },
            primary: PrimaryOutputs {
                ids: &mut group_ids,
                weights: &mut group_weights,
                counts: &mut group_counts,
                importance: &mut group_importance,
                load: &mut group_load,
                losses: &mut group_losses,
                noisy: None,
                thresholds: None,
            },
            ids: &mut ids,
            weights: &mut weights,
            noisy: None,
            thresholds: None,
            counts: &mut counts,
            importance: &mut importance,
            load: &mut load,
            losses: &mut losses,
            workspace: &mut workspace,
        };
        hierarchical::forward(self.kernels, self.stream, &desc, args)?;
        Ok(Load::new("hierarchical", &self.stream.clone_dtoh(&ids)?, 2))
    }

    fn sampled(&self) -> Outcome<Load> {
        let rule = SamplingRule { top_k: 1, inverse_temperature: 1.0, noise: NOISE };
        let desc = SampledDesc { tokens: TOKENS, experts: EXPERTS, rule };
        let mut ids = self.stream.alloc_zeros(TOKENS)?;
        let mut weights = self.stream.alloc_zeros(TOKENS)?;
        let args = SampledArgs {
            logits: &self.logits,
            ids: &mut ids,
            weights: &mut weights,
            log_probabilities: None,
            entropy: None,
            perturbed: None,
        };
        sampled::forward(self.kernels, self.stream, &desc, args)?;
        Ok(Load::new("sampled", &self.stream.clone_dtoh(&ids)?, 1))
    }

    fn random_second(&self) -> SecondExpert {
        SecondExpert::Random { threshold: 0.5, noise: NOISE }
    }

    fn admitted(
        &self,
        name: &'static str,
        candidates: usize,
        top_k: usize,
        order: Order,
        prioritised: bool,
        second: SecondExpert,
    ) -> Outcome<Load> {
        let (ids, weights) = self.choose(candidates)?;
        let capacity = rules::capacity(TOKENS, EXPERTS, top_k, 1.25);
        let rule = AdmissionRule {
            experts: EXPERTS,
            candidates,
            top_k,
            capacity,
            tokens_per_group: TOKENS,
            order,
            prioritised,
            second,
        };
        let desc = AdmissionDesc { tokens: TOKENS, rule };
        let mut admitted = self.stream.alloc_zeros(TOKENS * top_k)?;
        let mut admitted_weights = self.stream.alloc_zeros(TOKENS * top_k)?;
        let mut workspace = Workspace::new(self.stream, admission::workspace_bytes(&desc)?)?;
        let args = AdmissionArgs {
            ids: &ids,
            weights: &weights,
            priority: None,
            admitted: &mut admitted,
            admitted_weights: &mut admitted_weights,
            workspace: &mut workspace,
        };
        admission::forward(self.kernels, self.stream, &desc, args)?;
        Ok(Load::new(name, &self.stream.clone_dtoh(&admitted)?, top_k))
    }

    fn expert_choice(&self) -> Outcome<Load> {
        let capacity = rules::capacity(TOKENS, EXPERTS, 1, 1.0);
        let desc = ExpertChoiceDesc { tokens: TOKENS, experts: EXPERTS, capacity };
        let mut affinities = self.stream.alloc_zeros(TOKENS * EXPERTS)?;
        expert_choice::affinity(self.kernels, self.stream, &desc, Affinity::Softmax, &self.logits, &mut affinities)?;
        let mut slot_token = self.stream.alloc_zeros(desc.slots())?;
        let args = ChoiceArgs { affinities: &affinities, slot_token: &mut slot_token, slot_weight: None };
        expert_choice::choose(self.kernels, self.stream, &desc, args)?;
        let mut chosen = vec![false; TOKENS];
        self.stream.clone_dtoh(&slot_token)?.iter().for_each(|&token: &i32| chosen[token as usize] = true);
        let left_out = chosen.iter().filter(|&&chosen| !chosen).count();
        Ok(Load { name: "expert choice", tokens: vec![capacity; EXPERTS], left_out })
    }

    fn base(&self) -> Outcome<Load> {
        let rule = AuctionRule { experts: EXPERTS, epsilon: 0.01, max_rounds: 1 << 16 };
        let desc = BaseDesc { tokens: TOKENS, rule };
        let mut ids = self.stream.alloc_zeros(TOKENS)?;
        let mut status = self.stream.alloc_zeros(2)?;
        let mut workspace = Workspace::new(self.stream, base::workspace_bytes(&desc)?)?;
        let args = BaseArgs {
            scores: &self.logits,
            ids: &mut ids,
            weights: None,
            status: &mut status,
            workspace: &mut workspace,
        };
        base::forward(self.kernels, self.stream, &desc, args)?;
        Ok(Load::new("BASE", &self.stream.clone_dtoh(&ids)?, 1))
    }

    fn sinkhorn(&self) -> Outcome<Load> {
        let desc = SinkhornDesc { tokens: TOKENS, experts: EXPERTS, top_k: 1, iterations: 50, tolerance: 1e-2 };
        let mut ids = self.stream.alloc_zeros(TOKENS)?;
        let mut potentials = self.stream.alloc_zeros(EXPERTS)?;
        let mut status = self.stream.alloc_zeros(2)?;
        let bytes = sinkhorn::workspace_bytes(&desc, self.kernels.device())?;
        let mut workspace = Workspace::new(self.stream, bytes)?;
        let args = SinkhornArgs {
            logits: &self.logits,
            ids: &mut ids,
            weights: None,
            potentials: &mut potentials,
            status: &mut status,
            workspace: &mut workspace,
        };
        sinkhorn::forward(self.kernels, self.stream, &desc, args)?;
        Ok(Load::new("S-BASE", &self.stream.clone_dtoh(&ids)?, 1))
    }

    fn hashed(&self) -> Outcome<Load> {
        self.by_hash("hash", HashBy::Mix { seed: 1 }, None)
    }

    fn hashed_by_frequency(&self) -> Outcome<Load> {
        let table = self.stream.clone_htod(&hash::balanced_table(&self.frequencies, EXPERTS))?;
        self.by_hash("balanced hash", HashBy::Table { vocabulary: self.frequencies.len() }, Some(&table))
    }

    fn by_hash(&self, name: &'static str, hash: HashBy, table: Option<&CudaSlice<i32>>) -> Outcome<Load> {
        let desc = HashDesc { tokens: TOKENS, experts: EXPERTS, top_k: 1, hash };
        let mut ids = self.stream.alloc_zeros(TOKENS)?;
        let args = HashArgs { token_ids: &self.words, table: table.map(|table| table as _), ids: &mut ids };
        hash::forward(self.kernels, self.stream, &desc, args)?;
        Ok(Load::new(name, &self.stream.clone_dtoh(&ids)?, 1))
    }
}
