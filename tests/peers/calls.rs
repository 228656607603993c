//! The library as a framework calls it: from host slices to host slices, through the device.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use moe_kernels::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use moe_kernels::capacity::chunks::{self, ChunksArgs, ChunksDesc};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::capacity::expert_counts::{self, ExpertCountsArgs, ExpertCountsDesc};
use moe_kernels::capacity::expert_map::{self, ExpertMapArgs, ExpertMapDesc};
use moe_kernels::capacity::routing_map::{self, FromIdsArgs, RoutingMapDesc, ToIdsArgs};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::SwigluByExpert;
use moe_kernels::experts::permute::{self, PermuteArgs, PermuteDesc, Unfilled};
use moe_kernels::experts::{Dispatched, SlotShape, Weight};
use moe_kernels::layer::{
    Choices, ExpertWeights, LayerArgs, LayerDesc, LayerWeights, MapTable, RouteArgs, RouterWeights,
};
use moe_kernels::routers::balance_loss::{self, BalanceLossArgs, BalanceLossDesc};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::measured_gating::{self, MeasuredGatingArgs, MeasuredGatingDesc, RouterStats, Totals};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::routers::sinkhorn::{self, SinkhornArgs, SinkhornDesc};
use moe_kernels::routers::update_bias::{self, UpdateBiasArgs, UpdateBiasDesc};
use moe_kernels::rules::{AdmissionRule, BalanceRule, Gating, IdFormat};
use moe_kernels::{Dtype, In, Kernels, TokenMask, Workspace};

use crate::data::with_type;
use crate::support::compare::Storage;
use crate::support::device;

/// Values on the device; a buffer has at least one element.
pub fn up<T: DeviceRepr + Clone + Default>(stream: &Arc<CudaStream>, values: &[T]) -> CudaSlice<T> {
    if values.is_empty() { stream.clone_htod(&[T::default()]) } else { stream.clone_htod(values) }
        .expect("device memory")
}

/// A buffer of bits that are all one, NaN or -1: what an operation leaves out does not pass for a result.
pub fn junk<T: DeviceRepr + bytemuck::Pod>(stream: &Arc<CudaStream>, len: usize) -> CudaSlice<T> {
    let ones: T = bytemuck::pod_read_unaligned(&vec![0xff; size_of::<T>()]);
    stream.clone_htod(&vec![ones; len.max(1)]).expect("device memory")
}

/// The first `len` elements.
pub fn down<T: DeviceRepr + Clone + Default>(stream: &Arc<CudaStream>, buffer: &CudaSlice<T>, len: usize) -> Vec<T> {
    let mut values = stream.clone_dtoh(buffer).expect("a result");
    values.truncate(len);
    values
}

fn gpu() -> (&'static Kernels, Arc<CudaStream>) {
    (device::kernels(), device::stream())
}

/// Experts and weights of each token.
#[derive(Clone, Debug)]
pub struct Chosen {
    pub ids: Vec<i32>,
    pub weights: Vec<f32>,
}

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

/// Slots sorted by expert.
pub struct Sorted {
    pub stream: Arc<CudaStream>,
    pub dispatched: Dispatched,
    pub dropped: i32,
    pub shape: SlotShape,
}

/// Sorts the slots of `ids [T, k]`.
pub fn sort(ids: &[i32], weights: Option<&[f32]>, desc: &DispatchDesc) -> Sorted {
    let (kernels, stream) = gpu();
    let mut dispatched = Dispatched::new(&stream, &desc.shape()).unwrap();
    let bytes = dispatch::workspace_bytes(desc, kernels.device()).unwrap();
    let mut workspace = Workspace::new(&stream, bytes).unwrap();
    let (on_device, weights) = (up(&stream, ids), weights.map(|weights| up(&stream, weights)));
    let mut dropped = up(&stream, &[0i32]);
    let mut args = DispatchArgs::new(&on_device, &mut dispatched, &mut workspace);
    args.weights = weights.as_ref().map(In::from);
    if desc.max_rows.is_some() {
        args = args.dropped(&mut dropped);
    }
    dispatch::forward(kernels, &stream, desc, args).unwrap();
    let dropped = down(&stream, &dropped, 1)[0];
    Sorted { dispatched, dropped, shape: desc.shape(), stream }
}

impl Sorted {
    pub fn counts(&self) -> Vec<i32> {
        down(&self.stream, self.dispatched.counts(), self.shape.experts)
    }

    pub fn offsets(&self) -> Vec<i32> {
        down(&self.stream, self.dispatched.offsets(), self.shape.experts + 1)
    }

    /// Of the rows that there are.
    pub fn slot_token(&self) -> Vec<i32> {
        down(&self.stream, self.dispatched.slot_token(), self.rows())
    }

    pub fn token_slot(&self) -> Vec<i32> {
        down(&self.stream, self.dispatched.token_slot(), self.shape.tokens * self.shape.top_k.unwrap())
    }

    /// Of the rows that there are.
    pub fn slot_weight(&self) -> Vec<f32> {
        down(&self.stream, self.dispatched.slot_weight(), self.rows())
    }

    pub fn rows(&self) -> usize {
        self.offsets()[self.shape.experts] as usize
    }

    /// Rows of `x [T, width]` in the order of the slots; as many as there are.
    pub fn permute<T: Storage>(&self, x: &[T], width: usize, unfilled: Unfilled) -> Vec<T> {
        let mut all = self.permute_all(x, width, unfilled);
        all.truncate(self.rows() * width);
        all
    }

    /// The same, of as many rows as there may be.
    pub fn permute_all<T: Storage>(&self, x: &[T], width: usize, unfilled: Unfilled) -> Vec<T> {
        let desc = PermuteDesc::of(T::DTYPE, &self.shape, width).unfilled(unfilled);
        let x = up(&self.stream, x);
        let mut out = junk::<T>(&self.stream, self.shape.slots * width);
        let args = PermuteArgs::new(&x, &self.dispatched, &mut out);
        permute::forward(device::kernels(), &self.stream, &desc, args).unwrap();
        down(&self.stream, &out, self.shape.slots * width)
    }

    /// Each token's sum of its rows of `rows [slots, width]`, weighted by `weights [T, k]`.
    pub fn unpermute<T: Storage>(&self, rows: &[T], weights: Option<&[f32]>, width: usize) -> Vec<T> {
        let desc = CombineDesc::new(T::DTYPE, self.shape, width);
        let mut padded = rows.to_vec();
        padded.resize(self.shape.slots * width, T::from_f64(f64::NAN));
        let rows = up(&self.stream, &padded);
        let weights = weights.map(|weights| up(&self.stream, weights));
        let elements = self.shape.tokens * width;
        let mut y = junk::<T>(&self.stream, elements);
        let mut args = CombineArgs::new(&rows, &self.dispatched, &mut y);
        args.weights = weights.as_ref().map(In::from);
        combine::forward(device::kernels(), &self.stream, &desc, args).unwrap();
        down(&self.stream, &y, elements)
    }
}

/// Ids of all experts to those of a device: -1 where it has none.
pub fn map_ids(ids: &[i64], top_k: usize, map: &[i32]) -> Vec<i32> {
    let (kernels, stream) = gpu();
    let desc = ExpertMapDesc::new(ids.len() / top_k, map.len(), top_k).ids(IdFormat::I64);
    let (on_device, map) = (up(&stream, ids), up(&stream, map));
    let mut local = junk::<i32>(&stream, ids.len());
    expert_map::forward(kernels, &stream, &desc, ExpertMapArgs::new(&on_device, &map, &mut local)).unwrap();
    down(&stream, &local, ids.len())
}

/// Slots of each expert, and where its rows would begin.
pub fn count(ids: &[i32], experts: usize, row_multiple: usize) -> (Vec<i32>, Vec<i32>) {
    let (kernels, stream) = gpu();
    let desc = ExpertCountsDesc::new(ids.len(), experts).row_multiple(row_multiple);
    let on_device = up(&stream, ids);
    let (mut counts, mut offsets) = (junk::<i32>(&stream, experts), junk::<i32>(&stream, experts + 1));
    let mut workspace = Workspace::new(&stream, expert_counts::workspace_bytes()).unwrap();
    let args = ExpertCountsArgs::new(&on_device, &mut counts, &mut workspace).offsets(&mut offsets);
    expert_counts::forward(kernels, &stream, &desc, args).unwrap();
    (down(&stream, &counts, experts), down(&stream, &offsets, experts + 1))
}

/// [`count`] of ids of 64 bits.
pub fn count_wide(ids: &[i64], experts: usize) -> Vec<i32> {
    let (kernels, stream) = gpu();
    let desc = ExpertCountsDesc::new(ids.len(), experts).ids(IdFormat::I64);
    let on_device = up(&stream, ids);
    let mut counts = junk::<i32>(&stream, experts);
    let mut workspace = Workspace::new(&stream, expert_counts::workspace_bytes()).unwrap();
    let args = ExpertCountsArgs::new(&on_device, &mut counts, &mut workspace);
    expert_counts::forward(kernels, &stream, &desc, args).unwrap();
    down(&stream, &counts, experts)
}

/// A routing map's experts as ids, with their probabilities, and how many had no place.
pub fn map_to_ids(map: &[u8], probs: &[f32], experts: usize, top_k: usize) -> (Chosen, i32) {
    let (kernels, stream) = gpu();
    let tokens = map.len() / experts;
    let desc = RoutingMapDesc::new(tokens, experts, top_k);
    let (map, probs) = (up(&stream, map), up(&stream, probs));
    let (mut ids, mut weights) = (junk::<i32>(&stream, tokens * top_k), junk::<f32>(&stream, tokens * top_k));
    let mut over = junk::<i32>(&stream, 1);
    let args = ToIdsArgs::new(&map, &mut ids).probs(&probs).weights(&mut weights).over(&mut over);
    routing_map::to_ids(kernels, &stream, &desc, args).unwrap();
    let chosen = Chosen { ids: down(&stream, &ids, tokens * top_k), weights: down(&stream, &weights, tokens * top_k) };
    (chosen, down(&stream, &over, 1)[0])
}

/// Ids and weights as a routing map and its probabilities.
pub fn ids_to_map(ids: &[i32], weights: &[f32], experts: usize, top_k: usize) -> (Vec<u8>, Vec<f32>) {
    let (kernels, stream) = gpu();
    let tokens = ids.len() / top_k;
    let desc = RoutingMapDesc::new(tokens, experts, top_k);
    let (ids, weights) = (up(&stream, ids), up(&stream, weights));
    let (mut map, mut probs) = (junk::<u8>(&stream, tokens * experts), junk::<f32>(&stream, tokens * experts));
    let args = FromIdsArgs::new(&ids, &mut map).weights(&weights).probs(&mut probs);
    routing_map::from_ids(kernels, &stream, &desc, args).unwrap();
    (down(&stream, &map, tokens * experts), down(&stream, &probs, tokens * experts))
}

/// Rows of `x` with chunks of `sizes` rows in another `order`.
pub fn sort_chunks<T: Storage>(x: &[T], width: usize, sizes: &[i32], order: &[i32]) -> (Vec<T>, Vec<i32>) {
    let (kernels, stream) = gpu();
    let rows = x.len() / width;
    let desc = ChunksDesc::new(sizes.len(), rows);
    let (on_device, sizes_up, order_up) = (up(&stream, x), up(&stream, sizes), up(&stream, order));
    let (mut source, mut new_sizes) = (junk::<i32>(&stream, rows), junk::<i32>(&stream, sizes.len()));
    let args = ChunksArgs::new(&sizes_up, &order_up, &mut source).new_sizes(&mut new_sizes);
    chunks::forward(kernels, &stream, &desc, args).unwrap();
    let mut out = junk::<T>(&stream, rows * width);
    let desc = PermuteDesc::new(T::DTYPE, rows, rows, width);
    permute::forward(kernels, &stream, &desc, PermuteArgs::new(&on_device, &source, &mut out)).unwrap();
    (down(&stream, &out, rows * width), down(&stream, &new_sizes, sizes.len()))
}

/// Who of `chosen` is admitted by `rule`.
pub fn admit(chosen: &Chosen, rule: AdmissionRule) -> Chosen {
    admit_by(chosen, rule, None)
}

/// The same, tokens by their `priority`.
pub fn admit_by(chosen: &Chosen, rule: AdmissionRule, priority: Option<&[f32]>) -> Chosen {
    let (kernels, stream) = gpu();
    let desc = AdmissionDesc::new(chosen.ids.len() / rule.candidates, rule);
    let admitted = desc.tokens * rule.top_k;
    let (ids, weights) = (up(&stream, &chosen.ids), up(&stream, &chosen.weights));
    let (mut to, mut to_weights) = (junk::<i32>(&stream, admitted), junk::<f32>(&stream, admitted));
    let mut workspace = Workspace::new(&stream, admission::workspace_bytes(&desc).unwrap()).unwrap();
    let priority = priority.map(|priority| up(&stream, priority));
    let mut args = AdmissionArgs::new(&ids, &weights, &mut to, &mut to_weights, &mut workspace);
    args.priority = priority.as_ref().map(In::from);
    admission::forward(kernels, &stream, &desc, args).unwrap();
    Chosen { ids: down(&stream, &to, admitted), weights: down(&stream, &to_weights, admitted) }
}

/// A layer by given choices.
pub struct Experts<'a, T> {
    pub desc: LayerDesc,
    pub x: &'a [T],
    pub chosen: &'a Chosen,
    pub gate_up: &'a [T],
    pub gate_up_bias: Option<&'a [T]>,
    pub down: &'a [T],
    pub down_bias: Option<&'a [T]>,
    /// Where the descriptor has one.
    pub map: Option<&'a [i32]>,
}

impl<T: Storage> Experts<'_, T> {
    pub fn run(&self) -> Vec<T> {
        self.run_with([None; 4])
    }

    /// With numbers of a SwiGLU by expert: alpha, limits of gate and up value, offset.
    pub fn run_with(&self, swiglu: [Option<&[f32]>; 4]) -> Vec<T> {
        let (kernels, stream) = gpu();
        let tokens = self.x.len() / self.desc.hidden;
        let plan = self.desc.plan(tokens, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
        let buffers = [self.x, self.gate_up, self.down].map(|values| up(&stream, values));
        let [x, gate_up, down_weight] = &buffers;
        let biases = [self.gate_up_bias, self.down_bias].map(|bias| bias.map(|bias| up(&stream, bias)));
        let swiglu = swiglu.map(|values| values.map(|values| up(&stream, values)));
        let [alpha, gate, up_limit, offset] = swiglu.each_ref().map(|values| values.as_ref().map(In::from));
        let mut by_expert = SwigluByExpert::new();
        (by_expert.alpha, by_expert.gate, by_expert.up, by_expert.offset) = (alpha, gate, up_limit, offset);
        let experts =
            ExpertWeights::new(weight(gate_up, &biases[0]), weight(down_weight, &biases[1])).swiglu(by_expert);
        // Choices come from elsewhere, so nobody looks at the router's weight.
        let weights = LayerWeights::new(RouterWeights::new(In::from(x)), experts);
        let (ids, choice_weights) = (up(&stream, &self.chosen.ids), up(&stream, &self.chosen.weights));
        let map = self.map.map(|map| up(&stream, map));
        let mut y = junk::<T>(&stream, self.x.len());
        let mut args = LayerArgs::new(x, &mut y).choices(Choices::new(&ids, &choice_weights));
        if let Some(map) = &map {
            args = args.route(RouteArgs::new().map(MapTable::new(map)));
        }
        plan.forward(kernels, &stream, &weights, args, &mut workspace).unwrap();
        down(&stream, &y, self.x.len())
    }
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

/// A matrix with its bias, if there is one.
pub fn weight<'a, T: Storage>(matrix: &'a CudaSlice<T>, bias: &'a Option<CudaSlice<T>>) -> Weight<'a> {
    match bias {
        Some(bias) => Weight::new(In::from(matrix)).bias(In::from(bias)),
        None => Weight::new(In::from(matrix)),
    }
}
