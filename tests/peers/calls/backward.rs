//! Ways back.

use moe_kernels::experts::combine_backward::{self, CombineBackwardArgs, CombineBackwardDesc};
use moe_kernels::layer::{
    BackwardArgs, BackwardDesc, Choices, ExpertWeights, LayerArgs, LayerGradients, LayerWeights, Origin, RouterWeights,
    Saved, WeightGradients,
};
use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use moe_kernels::routers::router_backward::{self, InputArgs, RouterBackwardDesc, WeightArgs};
use moe_kernels::rules::{Gating, LossGradient};
use moe_kernels::{In, Workspace};

use super::{Experts, Sorted, down, gpu, junk, up, weight};
use crate::support::compare::Storage;
use crate::support::device;

/// Losses, and the slots that they count, of each expert and of each sequence and expert.
#[derive(Clone, Copy)]
pub struct Losses<'a> {
    pub rule: LossGradient,
    pub counts: &'a [i32],
    pub sequence_counts: &'a [i32],
    /// Sums of weights of each expert.
    pub importance: &'a [f32],
}

/// The gradient of `logits [T, E]` from those of the weights of `ids [T, k]`, and of losses.
pub fn gate_backward(
    logits: &[f32],
    [experts, top_k]: [usize; 2],
    (ids, d): (&[i32], &[f32]),
    rule: Gating,
    losses: Option<Losses<'_>>,
) -> Vec<f32> {
    let (kernels, stream) = gpu();
    let mut desc = GatingBackwardDesc::new(logits.len() / experts, experts, top_k, rule);
    desc.losses = losses.map(|losses| losses.rule);
    let (logits_up, ids, d) = (up(&stream, logits), up(&stream, ids), up(&stream, d));
    let mut to = junk::<f32>(&stream, logits.len());
    let counts = losses.filter(|losses| losses.rule.balance != 0.0).map(|losses| up(&stream, losses.counts));
    let sequences = losses.filter(|losses| losses.rule.sequence != 0.0);
    let sequence_counts = sequences.map(|losses| up(&stream, losses.sequence_counts));
    let mut args = GatingBackwardArgs::new(&logits_up, &ids, &d, &mut to);
    args.counts = counts.as_ref().map(In::from);
    let importance = losses.filter(|losses| losses.rule.importance != 0.0).map(|losses| up(&stream, losses.importance));
    args.importance = importance.as_ref().map(In::from);
    args.sequence_counts = sequence_counts.as_ref().map(In::from);
    gating_backward::forward(kernels, &stream, &desc, args).unwrap();
    down(&stream, &to, logits.len())
}

/// The gradients of a router's input `[T, H]`, of its weight `[E, H]` and of its bias from those of `logits [T, E]`: by two launches, or by one.
pub fn router_backward<T: Storage>(
    x: &[T],
    weight: &[T],
    d_logits: &[f32],
    hidden: usize,
    together: bool,
) -> (Vec<T>, Vec<f32>, Vec<f32>) {
    let (kernels, stream) = gpu();
    let (tokens, experts) = (x.len() / hidden, weight.len() / hidden);
    let desc = RouterBackwardDesc::new(T::DTYPE, tokens, experts, hidden);
    let (x_up, weight_up, d) = (up(&stream, x), up(&stream, weight), up(&stream, d_logits));
    let mut dx = junk::<T>(&stream, x.len());
    let (mut d_weight, mut d_bias) = (junk::<f32>(&stream, weight.len()), junk::<f32>(&stream, experts));
    let mut workspace = Workspace::new(&stream, router_backward::workspace_bytes(&desc).unwrap()).unwrap();
    let into_x = InputArgs::<T, T>::new(&d, &weight_up, &mut dx);
    let into_weight = WeightArgs::<T>::new(&d, &x_up, &mut d_weight).d_bias(&mut d_bias).workspace(&mut workspace);
    if together {
        router_backward::both(kernels, &stream, &desc, into_x, false, into_weight).unwrap();
    } else {
        router_backward::input(kernels, &stream, &desc, into_x).unwrap();
        router_backward::weight(kernels, &stream, &desc, into_weight).unwrap();
    }
    (down(&stream, &dx, x.len()), down(&stream, &d_weight, weight.len()), down(&stream, &d_bias, experts))
}

impl Sorted {
    /// The way back of a sum of rows with the weights of the slots: the gradients of `rows` and of their weights, by row.
    pub fn unpermute_backward<T: Storage>(
        &self,
        rows: &[T],
        dy: &[T],
        weighted: bool,
        width: usize,
    ) -> (Vec<T>, Vec<f32>) {
        let desc = CombineBackwardDesc::new(T::DTYPE, self.shape, width);
        let mut padded = rows.to_vec();
        padded.resize(self.shape.slots * width, T::from_f64(f64::NAN));
        let (rows_up, dy) = (up(&self.stream, &padded), up(&self.stream, dy));
        let mut d_rows = junk::<T>(&self.stream, self.shape.slots * width);
        let mut d_weights = junk::<f32>(&self.stream, self.shape.slots);
        let mut args = CombineBackwardArgs::new(&dy, &self.dispatched).d_y_slots(&mut d_rows);
        if weighted {
            args = args.slot_weight(self.dispatched.slot_weight()).y_slots(&rows_up).d_slot_weight(&mut d_weights);
        }
        combine_backward::forward(device::kernels(), &self.stream, &desc, args).unwrap();
        let there = self.rows();
        (down(&self.stream, &d_rows, there * width), down(&self.stream, &d_weights, there))
    }
}

/// Gradients of a layer by given choices.
pub struct ExpertsGradients<T> {
    pub x: Vec<T>,
    pub weights: Vec<f32>,
    pub gate_up: Vec<f32>,
    pub gate_up_bias: Vec<f32>,
    pub down: Vec<f32>,
    pub down_bias: Vec<f32>,
}

impl<T: Storage> Experts<'_, T> {
    /// Forth, then back from `dy [T, H]`. Biases are both there or neither.
    pub fn gradients(&self, dy: &[T]) -> ExpertsGradients<T> {
        let (kernels, stream) = gpu();
        let tokens = self.x.len() / self.desc.hidden;
        let plan = self.desc.plan(tokens, kernels.device()).unwrap();
        let back = plan.backward_plan(&BackwardDesc::new().origin(Origin::Choices)).unwrap();
        let bytes = plan.workspace_bytes().max(back.workspace_bytes());
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let mut saved = Saved::new(&stream, &back).unwrap();
        let buffers = [self.x, self.gate_up, self.down, dy].map(|values| up(&stream, values));
        let [x, gate_up, down_weight, dy] = &buffers;
        let biases = [self.gate_up_bias, self.down_bias].map(|bias| bias.map(|bias| up(&stream, bias)));
        let experts = ExpertWeights::new(weight(gate_up, &biases[0]), weight(down_weight, &biases[1]));
        let weights = LayerWeights::new(RouterWeights::of_logits(), experts);
        let (ids, shares) = (up(&stream, &self.chosen.ids), up(&stream, &self.chosen.weights));
        let mut y = junk::<T>(&stream, self.x.len());
        let args = LayerArgs::new(x, &mut y).choices(Choices::new(&ids, &shares));
        plan.forward_saving(kernels, &stream, &weights, args, &mut saved, &mut workspace).unwrap();

        let lengths = [
            self.chosen.weights.len(),
            self.gate_up.len(),
            self.gate_up_bias.map_or(0, <[T]>::len),
            self.down.len(),
            self.down_bias.map_or(0, <[T]>::len),
        ];
        let mut d_x = junk::<T>(&stream, self.x.len());
        let mut out = lengths.map(|len| junk::<f32>(&stream, len));
        let [d_weights, d_up, d_up_bias, d_down, d_down_bias] = &mut out;
        let (mut of_up, mut of_down) = (WeightGradients::new(d_up), WeightGradients::new(d_down));
        if self.gate_up_bias.is_some() {
            (of_up, of_down) = (of_up.bias(d_up_bias), of_down.bias(d_down_bias));
        }
        let gradients = LayerGradients::new().x(&mut d_x).weights(d_weights).gate_up(of_up).down(of_down);
        let args = BackwardArgs::new(x, dy, gradients);
        back.backward(kernels, &stream, &weights, &saved, args, &mut workspace).unwrap();
        let mut values = out.iter().zip(lengths).map(|(buffer, len)| down(&stream, buffer, len));
        let mut next = || values.next().unwrap_or_default();
        let (weights, gate_up, gate_up_bias, down_gradient, down_bias) = (next(), next(), next(), next(), next());
        let x = down(&stream, &d_x, self.x.len());
        ExpertsGradients { x, weights, gate_up, gate_up_bias, down: down_gradient, down_bias }
    }
}
