//! A block by the plain formulas of `moe_kernels::reference`, in f64.

mod backward;

use moe_kernels::checkpoint::{BlockWeights, HostBlock, HostBuffer, Kind, MatrixWeight, Network};
use moe_kernels::layer::{LayerDesc, Weighting};
use moe_kernels::reference::admission::admit;
use moe_kernels::reference::by_sequence::by_sequence;
use moe_kernels::reference::combine::{add_around, add_identity, combine, gate_addend, identity_weight};
use moe_kernels::reference::dispatch::{DispatchRule, Dispatched, dispatch};
use moe_kernels::reference::gating::{Gated, Inputs as GatingInputs, gate_by};
use moe_kernels::reference::product_keys::product_keys;
use moe_kernels::reference::rms_norm::{Rows, rms_norm};
use moe_kernels::reference::router::{finish, router};
use moe_kernels::reference::unit_experts::unit_experts;
use moe_kernels::reference::{Real, ReferenceError};
use moe_kernels::rules::{Activation, IDENTITY, KeySplit, RmsNorm};

use super::device::{Inputs, choose, drop_full, skip, split};
use super::error::HfError;
use super::matrix::Matrix;

/// What a block makes of its rows.
pub struct Forward {
    /// `[T, columns]`, with those of appended experts.
    pub logits: Vec<f64>,
    /// `[T,k]`, -1 for a choice that a capacity dropped.
    pub ids: Vec<i32>,
    /// `[T,k]`.
    pub weights: Vec<f64>,
    /// `[T, appended]`.
    pub appended: Vec<f64>,
    /// `[T,D]`, of a router that has a state.
    pub state: Option<Vec<f64>>,
    /// `[T,H]`.
    pub y: Vec<f64>,
}

/// What a layer computes on the way from its choices to its output.
struct Pass {
    /// After admission.
    gated: Gated,
    /// `[T,H]`: x, or its norm.
    input: Vec<f64>,
    /// `[T,L]`, before its norm, where there is a latent width.
    projected: Option<Vec<f64>>,
    /// `[T, width]`: what the experts see.
    seen: Vec<f64>,
    plan: Dispatched,
    row_scale: Option<Vec<f64>>,
    /// `[rows,I]`.
    between: Vec<f64>,
    /// `[rows, width]`.
    y_slots: Vec<f64>,
    /// The same after their norm.
    normed: Vec<f64>,
    /// `[T, width]`: of a token's rows.
    sum: Vec<f64>,
    /// Numbers of experts that yield their input.
    identities: Option<std::ops::Range<i32>>,
    /// `[T,H]`, before its norm.
    y: Vec<f64>,
}

/// A block's weights as numbers.
pub struct Reference<'a> {
    weights: &'a BlockWeights<HostBuffer>,
    kind: &'a Kind<HostBuffer>,
    layer: LayerDesc,
    /// The second bank of experts, for tokens of other types.
    second: Option<Box<Reference<'a>>>,
    router: Vec<f64>,
    pub correction_bias: Option<Vec<f64>>,
    expert_scale: Option<Vec<f64>>,
    global_scale: Option<f64>,
    /// `[T,k]`, where experts are looked up by word.
    given: Option<Vec<i32>>,
    inputs: &'a Inputs,
}

/// Logits, and the router's state where it has one.
pub type Logits = (Vec<f64>, Option<Vec<f64>>);

fn wide(buffer: &HostBuffer) -> Vec<f64> {
    buffer.to_f32().into_iter().map(f64::from).collect()
}

fn some(buffer: &Option<HostBuffer>) -> Option<Vec<f64>> {
    buffer.as_ref().map(wide)
}

impl<'a> Reference<'a> {
    /// For a batch that is one sequence of `tokens` tokens.
    pub fn new(block: &'a HostBlock, tokens: usize, inputs: &'a Inputs) -> Reference<'a> {
        let mut first = Reference::bank(block.for_sequence(tokens), &block.weights, &block.kind, inputs);
        if let Kind::Banks(bank) = &block.kind {
            let second = Reference::bank(bank.desc, &bank.weights, &Kind::Layer, inputs);
            first.second = Some(Box::new(second));
        }
        first
    }

    fn bank(
        layer: LayerDesc,
        weights: &'a BlockWeights<HostBuffer>,
        kind: &'a Kind<HostBuffer>,
        inputs: &'a Inputs,
    ) -> Reference<'a> {
        let given = weights.table.as_ref().zip(inputs.words.as_ref()).map(|(table, words)| {
            let row = |&word: &i32| table.i32().chunks(layer.top_k).nth(word as usize).unwrap_or(&[]).to_vec();
            words.iter().flat_map(row).collect()
        });
        Reference {
            weights,
            kind,
            layer,
            second: None,
            router: some(&weights.router).unwrap_or_default(),
            correction_bias: some(&weights.correction_bias),
            expert_scale: some(&weights.expert_scale),
            global_scale: some(&weights.global_scale).map(|scale| scale[0]),
            given,
            inputs,
        }
    }

    /// Types of tokens, where there are two banks of experts.
    fn types(&self) -> Option<(&Reference<'a>, &'a [i32])> {
        self.second.as_deref().zip(self.inputs.types.as_deref())
    }

    /// `[T, columns]`.
    pub fn logits(&self, x: &[f64]) -> Result<Logits, ReferenceError> {
        let (layer, weights) = (&self.layer, self.weights);
        match self.kind {
            Kind::Network(network) => return self.network(network, x),
            Kind::BySequence { .. } => return Ok((Vec::new(), None)),
            _ => {}
        }
        let x = norm(x, layer.hidden, layer.norms.router, &weights.around.router)?;
        let logits = router(&x, &self.router, some(&weights.router_bias).as_deref(), layer.hidden)?;
        let mut logits = finish(&logits, layer.logits);
        if let Some((second, types)) = self.types() {
            choose(&mut logits, &second.logits(&x)?.0, types);
        }
        Ok((logits, None))
    }

    /// A router with a network and a state (transformers, `ZayaRouter`).
    fn network(&self, network: &Network<HostBuffer>, x: &[f64]) -> Result<Logits, ReferenceError> {
        let (hidden, width) = (self.layer.hidden, network.width);
        let mut state = Matrix::plain(&network.down, width, hidden).dense(x, Activation::Identity)?;
        if let Some((scale, previous)) = some(&network.state_scale).zip(self.inputs.previous.as_ref()) {
            for (i, (value, &previous)) in state.iter_mut().zip(previous).enumerate() {
                *value += scale[i % width] * f64::from(previous);
            }
        }
        let gain = wide(&network.gain);
        let rows = Rows { weight: Some(&gain), ..rows(&state, width) };
        let mut between = rms_norm(&rows, &network.norm)?.y;
        for layer in &network.layers {
            between = Matrix::plain(layer, width, width).dense(&between, Activation::Gelu)?;
        }
        let logits = router(&between, &wide(&network.output), None::<&[f64]>, width)?;
        Ok((logits, Some(state)))
    }

    /// The choice by these logits, with another correction bias.
    pub fn gate<L: Real>(&self, logits: &[L], correction_bias: Option<&[f64]>) -> Result<Gated, ReferenceError> {
        match self.kind {
            Kind::UnitExperts { keys, .. } => return product_keys(logits, *keys, self.layer.top_k, KeySplit::Batch),
            Kind::BySequence { .. } => return self.by_index(),
            _ => {}
        }
        let inputs = GatingInputs {
            correction_bias,
            expert_scale: self.expert_scale.as_deref(),
            global_scale: self.global_scale,
            given: self.given.as_deref(),
        };
        let mut gated = gate_by(logits, self.layer.experts, self.layer.top_k, &self.layer.gating, inputs)?;
        if let Some((second, types)) = self.types() {
            let other = second.gate(logits, second.correction_bias.as_deref())?;
            choose(&mut gated.ids, &other.ids, types);
            choose(&mut gated.weights, &other.weights, types);
        }
        Ok(gated)
    }

    /// Each row a sequence.
    fn by_index(&self) -> Result<Gated, ReferenceError> {
        let index: Vec<i64> = self.inputs.index.iter().flatten().map(|&index| index.into()).collect();
        let (ids, weights) = by_sequence(&index, index.len(), 1, self.layer.experts)?;
        Ok(Gated { ids, weights: weights.into_iter().map(f64::from).collect() })
    }

    /// The whole block.
    pub fn forward(&self, x: &[f64]) -> Result<Forward, HfError> {
        let logits = self.logits(x)?;
        let gated = self.gate(&logits.0, self.correction_bias.as_deref())?;
        self.forward_gated(x, logits, gated)
    }

    /// The rest of it for experts that are already chosen.
    pub fn forward_gated(&self, x: &[f64], (logits, state): Logits, gated: Gated) -> Result<Forward, HfError> {
        let Some((second, types)) = self.types() else { return self.one_bank(x, (logits, state), gated) };
        let nobody = vec![-1; gated.ids.len()];
        let of = |bank: bool| {
            let mut ids = gated.ids.clone();
            let others: Vec<i32> = types.iter().map(|&kind| i32::from((kind > 0) != bank)).collect();
            choose(&mut ids, &nobody, &others);
            Gated { ids, weights: gated.weights.clone() }
        };
        let first = self.one_bank(x, (logits.clone(), None), of(false))?;
        let second = second.one_bank(x, (Vec::new(), None), of(true))?;
        let y = first.y.iter().zip(&second.y).map(|(first, second)| first + second).collect();
        Ok(Forward { logits, ids: gated.ids, weights: gated.weights, appended: Vec::new(), state, y })
    }

    fn one_bank(&self, x: &[f64], (logits, state): Logits, gated: Gated) -> Result<Forward, HfError> {
        let layer = &self.layer;
        match self.kind {
            Kind::UnitExperts { input, output, .. } => {
                let dense = self.dense(x)?;
                let (input, output) = (wide(input), wide(output));
                let (ids, shares, act) = (&gated.ids, &gated.weights, layer.mlp.activation);
                let y = unit_experts(x, &input, &output, ids, shares, Some(&dense), layer.hidden, act)?;
                return Ok(Forward { logits, ids: gated.ids, weights: gated.weights, appended: Vec::new(), state, y });
            }
            Kind::BySequence { first, second } => {
                let y = self.by_sequence(x, first, second, &gated)?;
                return Ok(Forward { logits, ids: gated.ids, weights: gated.weights, appended: Vec::new(), state, y });
            }
            _ => {}
        }
        let pass = self.pass(x, gated)?;
        let y = norm(&pass.y, layer.hidden, layer.norms.output, &self.weights.around.output)?;
        let appended = layer.gating.appended_experts();
        let (mut ids, _) = split(&pass.gated.ids, layer.top_k, appended);
        if layer.capacity.is_some() {
            drop_full(&mut ids, &pass.plan.token_slot);
        }
        let (mut weights, appended) = split(&pass.gated.weights, layer.top_k, appended);
        if matches!(self.kind, Kind::Network(_)) {
            skip(&mut ids, &mut weights, layer.local_experts());
        }
        Ok(Forward { logits, ids, weights, appended, state, y })
    }

    /// A layer's way from its choices to what its last norm sees.
    fn pass(&self, x: &[f64], gated: Gated) -> Result<Pass, HfError> {
        let (layer, weights) = (&self.layer, self.weights);
        let gated = match &layer.admission {
            None => gated,
            Some(rule) => {
                let given: Vec<f32> = gated.weights.iter().map(|&weight| weight as f32).collect();
                let admitted = admit(&gated.ids, &given, None, rule)?;
                Gated { ids: admitted.ids, weights: admitted.weights.into_iter().map(f64::from).collect() }
            }
        };
        let (hidden, width) = (layer.hidden, layer.expert_width());
        let input = norm(x, hidden, layer.norms.experts, &weights.around.experts)?;
        let latent = weights.around.latent.as_ref().zip(layer.latent);
        let projected = match &latent {
            None => None,
            Some(([before, _], _)) => Some(Matrix::plain(before, width, hidden).dense(&input, Activation::Identity)?),
        };
        let seen = match projected.as_ref().zip(layer.latent) {
            None => input.clone(),
            Some((projected, desc)) => norm(projected, width, desc.norm, &weights.around.latent_norm)?,
        };

        // Experts that yield their input have no rows.
        let here = layer.local_experts() as i32;
        let local: Vec<i32> = gated.ids.iter().map(|&id| if id < here { id } else { -1 }).collect();
        let choices = layer.all_choices();
        let rule =
            DispatchRule { experts: layer.local_experts(), top_k: choices, capacity: layer.capacity, tile_m: 16 };
        let plan = dispatch(&local, &rule)?;
        let weigh_input = layer.weighting == Weighting::Input;
        let row_scale = weigh_input.then(|| plan.slot_weight(&gated.weights));
        let [first, second] = self.products();
        let between = first.grouped(&seen, &plan, true, row_scale.as_deref(), layer.mlp.activation)?;
        let y_slots = second.grouped(&between, &plan, false, None, Activation::Identity)?;
        let normed = norm(&y_slots, width, layer.norms.slots, &weights.around.slots)?;
        let factors = (!weigh_input).then_some(gated.weights.as_slice());
        let sum = combine(&normed, &plan.token_slot, factors, None::<&[f64]>, None, choices, width)?;
        let mut y = match &latent {
            None => sum.clone(),
            Some(([_, after], _)) => Matrix::plain(after, hidden, width).dense(&sum, Activation::Identity)?,
        };
        let identities = weights.map.as_ref().filter(|map| map.i32().contains(&IDENTITY));
        let identities = identities.map(|_| here..layer.experts as i32);
        if let Some(range) = identities.clone() {
            add_identity(&mut y, x, &identity_weight(&gated.ids, &gated.weights, choices, range)?)?;
        }
        let shared = self.shared(x)?;
        let bias = some(&weights.output_bias);
        add_around(&mut y, self.scales(), bias.as_deref(), None, shared.as_deref())?;
        Ok(Pass { gated, input, projected, seen, plan, row_scale, between, y_slots, normed, sum, identities, y })
    }

    /// Both products of every expert.
    fn products(&self) -> [Matrix<'a>; 2] {
        let (layer, weights) = (&self.layer, self.weights);
        let width = layer.expert_width();
        [
            Matrix::sized(&weights.gate_up, layer.intermediate, width, &layer.mlp.gate_up),
            Matrix::sized(&weights.down, width, layer.intermediate, &layer.mlp.down),
        ]
    }

    /// Factors of the routed experts' sum and of the shared expert.
    fn scales(&self) -> [f64; 2] {
        [self.layer.routed_scale, self.layer.shared.map_or(1.0, |shared| shared.scale)].map(f64::from)
    }

    /// The dense MLP beside experts of one unit.
    fn dense(&self, x: &[f64]) -> Result<Vec<f64>, ReferenceError> {
        let (layer, weights) = (&self.layer, self.weights);
        let first = Matrix::sized(&weights.gate_up, layer.intermediate, layer.hidden, &layer.mlp.gate_up);
        let between = first.dense(x, layer.mlp.activation)?;
        Matrix::plain(&weights.down, layer.hidden, layer.intermediate).dense(&between, Activation::Identity)
    }

    /// `fc2(h)` for the first columns, the chosen expert's `W h` for the last, `h = act(fc1 x)` (transformers, `VitPoseBackboneMoeMLP`).
    fn by_sequence(
        &self,
        x: &[f64],
        first: &MatrixWeight<HostBuffer>,
        second: &MatrixWeight<HostBuffer>,
        gated: &Gated,
    ) -> Result<Vec<f64>, ReferenceError> {
        let &LayerDesc { hidden, intermediate, experts, mlp, .. } = &self.layer;
        let between = Matrix::plain(first, intermediate, hidden).dense(x, mlp.activation)?;
        let mut y = Matrix::plain(second, hidden, intermediate).dense(&between, Activation::Identity)?;
        let plan = dispatch(&gated.ids, &DispatchRule { experts, top_k: 1, capacity: None, tile_m: 16 })?;
        let part = Matrix::plain(&self.weights.down, hidden, intermediate);
        let part = part.grouped(&between, &plan, true, None, Activation::Identity)?;
        let part = combine(&part, &plan.token_slot, None, None::<&[f64]>, None, 1, hidden)?;
        y.iter_mut().zip(part).for_each(|(y, part)| *y += part);
        Ok(y)
    }

    /// The shared expert's output, gated.
    fn shared(&self, x: &[f64]) -> Result<Option<Vec<f64>>, ReferenceError> {
        let (layer, weights) = (&self.layer, self.weights);
        let Some(([first, second], activation)) = self.shared_products() else { return Ok(None) };
        let mut y = second.dense(&first.dense(x, activation)?, Activation::Identity)?;
        if let Some(gate) = some(&weights.shared_gate) {
            gate_addend(&mut y, &router(x, &gate, None::<&[f64]>, layer.hidden)?)?;
        }
        Ok(Some(y))
    }

    /// Both products of the shared expert, and what is between them.
    fn shared_products(&self) -> Option<([Matrix<'a>; 2], Activation)> {
        let (layer, weights) = (&self.layer, self.weights);
        let ((first, second), desc) = weights.shared.as_ref().zip(layer.shared)?;
        let first = Matrix::sized(first, desc.intermediate, layer.hidden, &desc.mlp.gate_up);
        let second = Matrix::sized(second, layer.hidden, desc.intermediate, &desc.mlp.down);
        Some(([first, second], desc.mlp.activation))
    }
}

/// Rows through a norm, where there is one.
fn norm(
    x: &[f64],
    width: usize,
    norm: Option<RmsNorm>,
    weight: &Option<HostBuffer>,
) -> Result<Vec<f64>, ReferenceError> {
    let Some(norm) = norm else { return Ok(x.to_vec()) };
    let weight = some(weight);
    Ok(rms_norm(&Rows { weight: weight.as_deref(), ..rows(x, width) }, &norm)?.y)
}

/// Rows and nothing else.
fn rows(x: &[f64], width: usize) -> Rows<'_, f64> {
    Rows { x, width, weight: None, addend: None, addend_scale: None, row_scale: None, residual: None }
}
