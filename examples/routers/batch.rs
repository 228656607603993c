//! The batch, and every router's choices for it.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use moe_kernels::experts::Dispatched;
use moe_kernels::layer::Choices;
use moe_kernels::routers::affinity::{self, AffinityArgs, AffinityDesc};
use moe_kernels::routers::base::{self, BaseArgs, BaseDesc};
use moe_kernels::routers::expert_choice::{self, ExpertChoiceDesc};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::hash::{self, HashArgs, HashBy, HashDesc};
use moe_kernels::routers::hierarchical::{self, HierarchicalArgs, HierarchicalDesc, PrimaryOutputs};
use moe_kernels::routers::jitter::{self, JitterArgs, JitterDesc};
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::routers::noisy::{self, NoisyArgs, NoisyDesc, NoisyLogits, NoisySums};
use moe_kernels::routers::sampled::{self, SampledArgs, SampledDesc};
use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use moe_kernels::routers::update_bias::{self, UpdateBiasArgs, UpdateBiasDesc};
use moe_kernels::rules::{
    self, AdmissionRule, Affinity, AuctionRule, Gating, NoiseSource, NoisyRule, Order, SamplingRule, Score,
    SecondExpert,
};
use moe_kernels::{Dtype, Kernels, Workspace};

use crate::layer::Layer;
use crate::{EXPERTS, Load, Outcome, TOKENS, normal};

const NOISE: NoiseSource = NoiseSource::new(1, 0);

/// By how much a step of the bias update moves a bias.
const BIAS_RATE: f32 = 0.01;

/// A load with what the device measured of it.
pub struct Measured {
    pub load: Load,
    pub stats: RouterStats,
}

/// The batch on the device, and the layer that it goes through.
pub struct Batch<'a> {
    kernels: &'a Kernels,
    stream: &'a Arc<CudaStream>,
    logits: CudaSlice<f32>,
    words: CudaSlice<i32>,
    frequencies: Vec<u64>,
    layer: Layer<'a>,
}

impl<'a> Batch<'a> {
    /// Logits whose mean falls by expert like the logarithm of Zipf's law, and words of a Zipf vocabulary.
    pub fn new(kernels: &'a Kernels, stream: &'a Arc<CudaStream>) -> Outcome<Batch<'a>> {
        let rng = &mut fastrand::Rng::with_seed(7);
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
            layer: Layer::new(kernels, stream)?,
        })
    }

    /// The load of choices `[T, k]`, which the layer computes.
    fn load(&self, name: &'static str, top_k: usize, ids: &CudaSlice<i32>, weights: &CudaSlice<f32>) -> Outcome<Load> {
        let norm = self.layer.by_choices(top_k, Choices::new(ids, weights))?;
        Ok(Load::new(name, &self.stream.clone_dtoh(ids)?, top_k, norm))
    }

    /// Room for choices `[T, k]`.
    fn choices(&self, top_k: usize) -> Outcome<(CudaSlice<i32>, CudaSlice<f32>)> {
        Ok((self.stream.alloc_zeros(TOKENS * top_k)?, self.stream.alloc_zeros(TOKENS * top_k)?))
    }

    fn choose(&self, logits: &CudaSlice<f32>, top_k: usize) -> Outcome<(CudaSlice<i32>, CudaSlice<f32>)> {
        let desc = GatingDesc::new(TOKENS, EXPERTS, top_k, Gating::new(Score::Softmax).renormalised());
        let (mut ids, mut weights) = self.choices(top_k)?;
        gating::forward(self.kernels, self.stream, &desc, GatingArgs::new(logits, &mut ids, &mut weights))?;
        Ok((ids, weights))
    }

    pub fn top_k(&self, name: &'static str, top_k: usize) -> Outcome<Load> {
        let (ids, weights) = self.choose(&self.logits, top_k)?;
        self.load(name, top_k, &ids, &weights)
    }

    /// The two best by sigmoid scores plus a bias, which `steps` updates by the counts have moved (DeepSeek-V3).
    pub fn measured(&self, name: &'static str, steps: usize) -> Outcome<Measured> {
        let (stream, top_k) = (self.stream, 2);
        let gating = GatingDesc::new(TOKENS, EXPERTS, top_k, Gating::new(Score::Sigmoid).renormalised());
        let mut desc = MeasuredGatingDesc::new(gating);
        desc.rule.capacity = Some(rules::capacity(TOKENS, EXPERTS, top_k, 1.25));
        let mut bias = stream.alloc_zeros::<f32>(EXPERTS)?;
        let (mut ids, mut weights) = self.choices(top_k)?;
        let (mut counts, mut loss_counts) = (stream.alloc_zeros(EXPERTS)?, stream.alloc_zeros(EXPERTS)?);
        let (mut probability, mut importance) = (stream.alloc_zeros(EXPERTS)?, stream.alloc_zeros(EXPERTS)?);
        let mut stats = stream.alloc_zeros::<RouterStats>(1)?;
        let bytes = measured_gating::workspace_bytes(&desc, self.kernels.device())?;
        let mut workspace = Workspace::new(stream, bytes)?;
        for step in 0..=steps {
            let totals = Totals::new(&mut counts, &mut loss_counts, &mut probability, &mut importance);
            let (ids, weights) = (&mut ids, &mut weights);
            let args = MeasuredGatingArgs::new(&self.logits, ids, weights, totals, &mut stats, &mut workspace)
                .correction_bias(&bias);
            measured_gating::forward(self.kernels, stream, &desc, args)?;
            if step < steps {
                let update = UpdateBiasDesc::new(EXPERTS, BIAS_RATE);
                update_bias::forward(self.kernels, stream, &update, UpdateBiasArgs::new(&counts, &mut bias))?;
            }
        }
        let load = self.load(name, top_k, &ids, &weights)?;
        Ok(Measured { load, stats: stream.clone_dtoh(&stats)?[0] })
    }

    /// Logits times a number of 0.9 to 1.1, then the best.
    pub fn jittered(&self) -> Outcome<Load> {
        let mut logits = self.stream.clone_dtod(&self.logits)?;
        let desc = JitterDesc::new(Dtype::F32, TOKENS * EXPERTS, 0.1, NOISE);
        jitter::forward(self.kernels, self.stream, &desc, JitterArgs::in_place(&mut logits))?;
        let (ids, weights) = self.choose(&logits, 1)?;
        self.load("jitter top-1", 1, &ids, &weights)
    }

    /// Noise of deviation softplus(1) = 1.3.
    pub fn noisy(&self) -> Outcome<Load> {
        let desc = NoisyDesc::new(TOKENS, EXPERTS, NoisyRule::new(2, NOISE));
        let raw = self.stream.clone_htod(&[1f32; TOKENS * EXPERTS])?;
        let (mut ids, mut weights) = self.choices(2)?;
        let args = NoisyArgs::new(NoisyLogits::apart(&self.logits, &raw), &mut ids, &mut weights);
        noisy::forward(self.kernels, self.stream, &desc, args)?;
        self.load("noisy top-2", 2, &ids, &weights)
    }

    /// Two of four groups by their experts' mean logit, one expert in each.
    pub fn hierarchical(&self) -> Outcome<Load> {
        const GROUPS: usize = 4;
        let size = EXPERTS / GROUPS;
        let desc = HierarchicalDesc::new(TOKENS, GROUPS, size, NoisyRule::new(2, NOISE), NoisyRule::new(1, NOISE));
        let clean = self.stream.clone_dtoh(&self.logits)?;
        let means: Vec<f32> = clean.chunks(size).map(|group| group.iter().sum::<f32>() / size as f32).collect();
        let primary_clean = self.stream.clone_htod(&means)?;
        let primary_raw = self.stream.clone_htod(&vec![1f32; means.len()])?;
        let raw = self.stream.clone_htod(&vec![1f32; clean.len()])?;
        let floats = |len: usize| self.stream.alloc_zeros::<f32>(len);
        let ints = |len: usize| self.stream.alloc_zeros::<i32>(len);
        let (mut group_ids, mut group_weights) = self.choices(2)?;
        let (mut group_counts, mut group_importance) = (ints(GROUPS)?, floats(GROUPS)?);
        let (mut group_load, mut group_losses) = (floats(GROUPS)?, floats(2)?);
        let (mut ids, mut weights) = self.choices(2)?;
        let (mut counts, mut importance) = (ints(EXPERTS)?, floats(EXPERTS)?);
        let (mut load, mut losses) = (floats(EXPERTS)?, floats(2)?);
        let bytes = hierarchical::workspace_bytes(&desc, self.kernels.device())?;
        let mut workspace = Workspace::new(self.stream, bytes)?;
        let group_sums = NoisySums::new(&mut group_counts, &mut group_importance, &mut group_load, &mut group_losses);
        let args = HierarchicalArgs::new(
            NoisyLogits::apart(&primary_clean, &primary_raw),
            NoisyLogits::apart(&self.logits, &raw),
            PrimaryOutputs::new(&mut group_ids, &mut group_weights, group_sums),
            &mut ids,
            &mut weights,
            NoisySums::new(&mut counts, &mut importance, &mut load, &mut losses),
            &mut workspace,
        );
        hierarchical::forward(self.kernels, self.stream, &desc, args)?;
        self.load("hierarchical", 2, &ids, &weights)
    }

    pub fn sampled(&self) -> Outcome<Load> {
        let desc = SampledDesc::new(TOKENS, EXPERTS, SamplingRule::new(1, NOISE));
        let (mut ids, mut weights) = self.choices(1)?;
        let args = SampledArgs::new(&self.logits, &mut ids, &mut weights);
        sampled::forward(self.kernels, self.stream, &desc, args)?;
        self.load("sampled", 1, &ids, &weights)
    }

    pub fn random_second(&self) -> SecondExpert {
        SecondExpert::gshard(NOISE)
    }

    /// The layer's own admission, of `candidates` choices a token.
    pub fn admitted(
        &self,
        name: &'static str,
        candidates: usize,
        top_k: usize,
        order: Order,
        prioritised: bool,
        second: SecondExpert,
    ) -> Outcome<Load> {
        let (ids, weights) = self.choose(&self.logits, candidates)?;
        let capacity = rules::capacity(TOKENS, EXPERTS, top_k, 1.25);
        let rule = AdmissionRule::new(EXPERTS, top_k, capacity, TOKENS)
            .candidates(candidates)
            .order(order)
            .prioritised(prioritised)
            .second(second);
        let (norm, admitted) = self.layer.admitted(rule, Choices::new(&ids, &weights))?;
        Ok(Load::new(name, &admitted, top_k, norm))
    }

    pub fn expert_choice(&self) -> Outcome<Load> {
        let mut affinities = self.stream.alloc_zeros(TOKENS * EXPERTS)?;
        let desc = AffinityDesc::new(TOKENS, EXPERTS, Affinity::Softmax);
        let args = AffinityArgs::new(&self.logits, &mut affinities);
        affinity::forward(self.kernels, self.stream, &desc, args)?;

        let capacity = rules::capacity(TOKENS, EXPERTS, 1, 1.0);
        let desc = ExpertChoiceDesc::new(TOKENS, EXPERTS, capacity);
        let tile_m = self.layer.tile_m(desc.slots())?;
        let mut rows = Dispatched::new(self.stream, &expert_choice::rows(&desc, tile_m))?;
        let bytes = expert_choice::workspace_bytes(&desc, self.kernels.device())?;
        let mut workspace = Workspace::new(self.stream, bytes)?;
        let affinities = (&affinities).into();
        expert_choice::dispatch(self.kernels, self.stream, &desc, tile_m, affinities, &mut rows, &mut workspace)?;
        let norm = self.layer.by_rows(&rows)?;
        let count = |list: &CudaSlice<i32>| self.stream.clone_dtoh(list);
        let tokens = count(rows.counts())?.into_iter().map(|tokens| tokens as usize).collect();
        let left_out = count(rows.token_offsets())?.windows(2).filter(|pair| pair[0] == pair[1]).count();
        Ok(Load { name: "expert choice", tokens, left_out, norm })
    }

    pub fn base(&self) -> Outcome<Load> {
        let desc = BaseDesc::new(TOKENS, AuctionRule::new(EXPERTS, 0.01, 1 << 16));
        let (mut ids, mut weights) = self.choices(1)?;
        let mut status = self.stream.alloc_zeros(2)?;
        let mut workspace = Workspace::new(self.stream, base::workspace_bytes(&desc)?)?;
        let args = BaseArgs::new(&self.logits, &mut ids, &mut status, &mut workspace).weights(&mut weights);
        base::forward(self.kernels, self.stream, &desc, args)?;
        self.load("BASE", 1, &ids, &weights)
    }

    pub fn sinkhorn(&self) -> Outcome<Load> {
        let desc = SinkhornDesc::new(TOKENS, EXPERTS, 1, 50, 1e-2);
        let (mut ids, mut weights) = self.choices(1)?;
        let mut potentials = self.stream.alloc_zeros(EXPERTS)?;
        let mut status = self.stream.alloc_zeros(2)?;
        let bytes = sinkhorn::workspace_bytes(&desc, self.kernels.device())?;
        let mut workspace = Workspace::new(self.stream, bytes)?;
        let args = SinkhornArgs::new(&self.logits, &mut ids, &mut potentials, &mut status, &mut workspace)
            .weights(&mut weights);
        sinkhorn::forward(self.kernels, self.stream, &desc, args)?;
        self.load("S-BASE", 1, &ids, &weights)
    }

    pub fn hashed(&self) -> Outcome<Load> {
        self.by_hash("hash", HashBy::Mix { seed: 1 }, None)
    }

    pub fn hashed_by_frequency(&self) -> Outcome<Load> {
        let table = self.stream.clone_htod(&hash::balanced_table(&self.frequencies, EXPERTS))?;
        self.by_hash("balanced hash", HashBy::Table { vocabulary: self.frequencies.len() }, Some(&table))
    }

    /// Every weight is 1.
    fn by_hash(&self, name: &'static str, hash: HashBy, table: Option<&CudaSlice<i32>>) -> Outcome<Load> {
        let mut ids = self.stream.alloc_zeros(TOKENS)?;
        let mut args = HashArgs::new(&self.words, &mut ids);
        args.table = table.map(Into::into);
        hash::forward(self.kernels, self.stream, &HashDesc::new(TOKENS, EXPERTS, 1, hash), args)?;
        let weights = self.stream.clone_htod(&[1f32; TOKENS])?;
        self.load(name, 1, &ids, &weights)
    }
}
