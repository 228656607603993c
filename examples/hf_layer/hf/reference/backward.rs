//! The block's way back, by the same plain formulas.

use moe_kernels::checkpoint::{BlockWeights, ByName, HostBuffer, Kind, Loaded, MatrixWeight, Network, Places};
use moe_kernels::layer::Weighting;
use moe_kernels::reference::ReferenceError;
use moe_kernels::reference::combine::{add_identity_backward, combine_backward, gate_addend_backward};
use moe_kernels::reference::dispatch::{DispatchRule, dispatch};
use moe_kernels::reference::gating::{BackwardInputs, Gated, gate_backward_by};
use moe_kernels::reference::gemm::{MatrixGradient, dense_backward};
use moe_kernels::reference::product_keys::product_keys_backward;
use moe_kernels::reference::rms_norm::{Rows, rms_norm, rms_norm_backward};
use moe_kernels::reference::router::router;
use moe_kernels::reference::unit_experts::unit_experts_backward;
use moe_kernels::rules::{Activation, KeySplit, RmsNorm};

use super::super::backward::Gradients;
use super::super::device::choose;
use super::super::error::HfError;
use super::super::matrix::{self, Matrix};
use super::{Pass, Reference, norm, rows, some, wide};

impl Gradients {
    fn add_to_x(&mut self, values: &[f64]) {
        self.x.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }

    fn put(&mut self, places: &Option<Places>, gradient: &[f64]) {
        places.iter().for_each(|places| places.put_back(gradient, &mut self.tensors));
    }

    fn put_matrix(&mut self, places: &MatrixWeight<Places>, gradient: &MatrixGradient) {
        places.matrix.put_back(&gradient.weight, &mut self.tensors);
        self.put(&places.bias, gradient.bias.as_deref().unwrap_or(&[]));
    }
}

impl Reference<'_> {
    /// The gradients of `sum dy y`; the choice of experts is constant.
    pub fn backward(&self, x: &[f64], dy: &[f64], places: &Loaded<Places>) -> Result<Gradients, HfError> {
        let (logits, _) = self.logits(x)?;
        let gated = self.gate(&logits, self.correction_bias.as_deref())?;
        let mut back = Gradients { x: vec![0.0; x.len()], previous: None, tensors: ByName::new() };
        let (kind, weights) = (&places.kind, &places.weights);
        match (self.kind, kind) {
            (Kind::UnitExperts { .. }, Kind::UnitExperts { input, output, keys }) => {
                let d_weights = self.units(x, &gated, dy, weights, [input, output], &mut back)?;
                let (ids, shares) = (&gated.ids, &gated.weights);
                let d = product_keys_backward(ids, shares, &d_weights, *keys, self.layer.top_k, KeySplit::Batch)?;
                self.router_product(x, &d, weights, &mut back)?;
            }
            (Kind::BySequence { first, second }, Kind::BySequence { first: of_first, second: of_second }) => {
                let places = [of_first, of_second, &weights.down];
                self.sequences(x, [first, second], &gated, dy, places, &mut back)?;
            }
            (Kind::Network(network), Kind::Network(of_network)) => {
                let d_weights = self.layer_part(x, &self.pass(x, gated.clone())?, dy, weights, &mut back)?;
                let d_logits = self.gating(&logits, &gated.ids, &d_weights, weights, &mut back)?;
                self.network_part(network, x, &d_logits, of_network, &mut back)?;
            }
            (_, Kind::Banks(bank)) => {
                let Some((second, types)) = self.types() else { return Ok(back) };
                let nobody = vec![-1; gated.ids.len()];
                for (reference, weights, other) in [(self, weights, true), (second, &bank.weights, false)] {
                    let mut own = gated.clone();
                    let others: Vec<i32> = types.iter().map(|&kind| i32::from((kind > 0) == other)).collect();
                    choose(&mut own.ids, &nobody, &others);
                    reference.one_layer(x, &logits, own, dy, weights, &mut back)?;
                }
            }
            _ => self.one_layer(x, &logits, gated, dy, weights, &mut back)?,
        }
        Ok(back)
    }

    /// A layer with its router.
    fn one_layer(
        &self,
        x: &[f64],
        logits: &[f64],
        gated: Gated,
        dy: &[f64],
        places: &BlockWeights<Places>,
        back: &mut Gradients,
    ) -> Result<(), HfError> {
        let pass = self.pass(x, gated.clone())?;
        let d_weights = self.layer_part(x, &pass, dy, places, back)?;
        let renormalises = self.layer.admission.is_some_and(|rule| rule.renormalise.is_some());
        // What is divided by a sum are the admitted weights, or all that were chosen.
        let ids = if renormalises { &pass.gated.ids } else { &gated.ids };
        let d_logits = self.gating(logits, ids, &d_weights, places, back)?;
        Ok(self.router_product(x, &d_logits, places, back)?)
    }

    /// From the weights of `ids` to the router's product, and to what else multiplies them.
    fn gating(
        &self,
        logits: &[f64],
        ids: &[i32],
        d_weights: &[f64],
        places: &BlockWeights<Places>,
        back: &mut Gradients,
    ) -> Result<Vec<f64>, ReferenceError> {
        let layer = &self.layer;
        let mut rule = layer.gating;
        rule.renormalise = layer.admission.and_then(|rule| rule.renormalise).or(rule.renormalise);
        let inputs = BackwardInputs {
            expert_scale: self.expert_scale.as_deref(),
            global_scale: self.global_scale,
            logit_rule: layer.logits,
            ..BackwardInputs::default()
        };
        let d = gate_backward_by(logits, ids, d_weights, layer.experts, layer.top_k, &rule, inputs)?;
        back.put(&places.expert_scale, &d.expert_scale);
        back.put(&places.global_scale, &[d.global_scale]);
        Ok(d.logits)
    }

    /// From logits to the router's weights and x.
    fn router_product(
        &self,
        x: &[f64],
        d: &[f64],
        places: &BlockWeights<Places>,
        back: &mut Gradients,
    ) -> Result<(), ReferenceError> {
        let (hidden, weights) = (self.layer.hidden, self.weights);
        let Some(matrix) = &weights.router else { return Ok(()) };
        let (norm_rule, gain) = (self.layer.norms.router, &weights.around.router);
        let seen = norm(x, hidden, norm_rule, gain)?;
        let (matrix, bias) = (wide(matrix), some(&weights.router_bias));
        let product = matrix::dense(&matrix, bias.as_deref(), hidden);
        let through = dense_backward(&seen, &product, Activation::Identity, d)?;
        back.put(&places.router, &through.matrix.weight);
        back.put(&places.router_bias, through.matrix.bias.as_deref().unwrap_or(&[]));
        let d_x = back_through(norm_rule, x, hidden, gain, through.a, &places.around.router, back)?;
        back.add_to_x(&d_x);
        Ok(())
    }

    /// From a layer's output to its choices' weights, and to x but for the router.
    fn layer_part(
        &self,
        x: &[f64],
        pass: &Pass,
        dy: &[f64],
        places: &BlockWeights<Places>,
        back: &mut Gradients,
    ) -> Result<Vec<f64>, HfError> {
        let (layer, weights) = (&self.layer, self.weights);
        let (hidden, width, choices) = (layer.hidden, layer.expert_width(), layer.all_choices());
        let (around, of_around) = (&weights.around, &places.around);
        let dy =
            back_through(layer.norms.output, &pass.y, hidden, &around.output, dy.to_vec(), &of_around.output, back)?;
        let mut d_bias = vec![0.0; hidden];
        dy.chunks(hidden).for_each(|row| d_bias.iter_mut().zip(row).for_each(|(sum, d)| *sum += d));
        back.put(&places.output_bias, &d_bias);
        let [scale, shared_scale] = self.scales();
        let times = |scale: f64| dy.iter().map(|d| scale * d).collect::<Vec<f64>>();
        self.shared_part(x, &times(shared_scale), places, back)?;

        let mut d_sum = times(scale);
        let mut d_weights = vec![0.0; pass.gated.ids.len()];
        if let Some(range) = pass.identities.clone() {
            let given = (x, &pass.gated.ids[..], &pass.gated.weights[..]);
            add_identity_backward(given, choices, range, &d_sum, (&mut back.x, &mut d_weights))?;
        }
        if let Some(([_, after], [_, of_after])) = around.latent.as_ref().zip(of_around.latent.as_ref()) {
            let through =
                Matrix::plain(after, hidden, width).dense_backward(&pass.sum, Activation::Identity, &d_sum)?;
            back.put_matrix(of_after, &through.matrix);
            d_sum = through.a;
        }
        let factors = (layer.weighting != Weighting::Input).then_some(pass.gated.weights.as_slice());
        let sums = combine_backward(&pass.normed, &pass.plan.token_slot, factors, &d_sum, choices, width)?;
        let d_slots =
            back_through(layer.norms.slots, &pass.y_slots, width, &around.slots, sums.y_slots, &of_around.slots, back)?;
        let [first, second] = self.products();
        let down = second.grouped_backward(&pass.between, &pass.plan, false, None, Activation::Identity, &d_slots)?;
        back.put_matrix(&places.down, &down.matrix);
        let scale = pass.row_scale.as_deref();
        let up = first.grouped_backward(&pass.seen, &pass.plan, true, scale, layer.mlp.activation, &down.a)?;
        back.put_matrix(&places.gate_up, &up.matrix);
        let by_slot = pass.plan.token_slot.iter().enumerate().filter(|(_, row)| **row >= 0);
        by_slot.for_each(|(slot, &row)| {
            d_weights[slot] += if scale.is_some() { up.row_scale[row as usize] } else { sums.weights[slot] };
        });

        let mut d_seen = vec![0.0; pass.seen.len()];
        for (row, &token) in up.a.chunks(width).zip(&pass.plan.slot_token) {
            let to = &mut d_seen[token as usize * width..][..width];
            to.iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
        }
        let before =
            around.latent.as_ref().zip(of_around.latent.as_ref()).zip(layer.latent.zip(pass.projected.as_ref()));
        if let Some((([before, _], [of_before, _]), (desc, projected))) = before {
            let gain = &around.latent_norm;
            let d = back_through(desc.norm, projected, width, gain, d_seen, &of_around.latent_norm, back)?;
            let through = Matrix::plain(before, width, hidden).dense_backward(&pass.input, Activation::Identity, &d)?;
            back.put_matrix(of_before, &through.matrix);
            d_seen = through.a;
        }
        let d_x = back_through(layer.norms.experts, x, hidden, &around.experts, d_seen, &of_around.experts, back)?;
        back.add_to_x(&d_x);
        Ok(d_weights)
    }

    fn shared_part(
        &self,
        x: &[f64],
        d: &[f64],
        places: &BlockWeights<Places>,
        back: &mut Gradients,
    ) -> Result<(), ReferenceError> {
        let Some(([first, second], activation)) = self.shared_products() else { return Ok(()) };
        let Some((of_first, of_second)) = &places.shared else { return Ok(()) };
        let (between, mut d) = (first.dense(x, activation)?, d.to_vec());
        if let Some(gate) = some(&self.weights.shared_gate) {
            let (hidden, y) = (self.layer.hidden, second.dense(&between, Activation::Identity)?);
            let (gated, d_gate) = gate_addend_backward(&y, &router(x, &gate, None::<&[f64]>, hidden)?, &d)?;
            let through = dense_backward(x, &matrix::dense(&gate, None, hidden), Activation::Identity, &d_gate)?;
            back.put(&places.shared_gate, &through.matrix.weight);
            back.add_to_x(&through.a);
            d = gated;
        }
        let second = second.dense_backward(&between, Activation::Identity, &d)?;
        let first = first.dense_backward(x, activation, &second.a)?;
        back.put_matrix(of_first, &first.matrix);
        back.put_matrix(of_second, &second.matrix);
        back.add_to_x(&first.a);
        Ok(())
    }

    /// Through a router's network.
    fn network_part(
        &self,
        network: &Network<HostBuffer>,
        x: &[f64],
        d_logits: &[f64],
        places: &Network<Places>,
        back: &mut Gradients,
    ) -> Result<(), HfError> {
        let (hidden, width) = (self.layer.hidden, network.width);
        let Some(state) = self.network(network, x)?.1 else { return Ok(()) };
        let gain = wide(&network.gain);
        let of_norm = Rows { weight: Some(&gain), ..rows(&state, width) };
        let mut seen = vec![rms_norm(&of_norm, &network.norm)?.y];
        for layer in &network.layers {
            seen.push(Matrix::plain(layer, width, width).dense(&seen[seen.len() - 1], Activation::Gelu)?);
        }
        let output = wide(&network.output);
        let through = dense_backward(&seen[2], &matrix::dense(&output, None, width), Activation::Identity, d_logits)?;
        places.output.put_back(&through.matrix.weight, &mut back.tensors);
        let mut d = through.a;
        for (i, layer) in network.layers.iter().enumerate().rev() {
            let through = Matrix::plain(layer, width, width).dense_backward(&seen[i], Activation::Gelu, &d)?;
            back.put_matrix(&places.layers[i], &through.matrix);
            d = through.a;
        }
        let through = rms_norm_backward(&of_norm, &network.norm, &d)?;
        places.gain.put_back(through.weight.as_deref().unwrap_or(&[]), &mut back.tensors);
        let d_state = through.sum;
        if let Some((scale, previous)) = some(&network.state_scale).zip(self.inputs.previous.as_ref()) {
            let mut d_scale = vec![0.0; width];
            let terms = d_state.iter().zip(previous).enumerate();
            terms.for_each(|(i, (d, &previous))| d_scale[i % width] += d * f64::from(previous));
            back.put(&places.state_scale, &d_scale);
            back.previous = Some(d_state.iter().enumerate().map(|(i, d)| scale[i % width] * d).collect());
        }
        let down = Matrix::plain(&network.down, width, hidden).dense_backward(x, Activation::Identity, &d_state)?;
        back.put_matrix(&places.down, &down.matrix);
        back.add_to_x(&down.a);
        Ok(())
    }

    /// Through experts of one unit and the dense MLP beside them, to the choices' weights.
    fn units(
        &self,
        x: &[f64],
        gated: &Gated,
        dy: &[f64],
        places: &BlockWeights<Places>,
        [of_input, of_output]: [&Places; 2],
        back: &mut Gradients,
    ) -> Result<Vec<f64>, HfError> {
        let Kind::UnitExperts { input, output, .. } = self.kind else { return Ok(Vec::new()) };
        let (layer, act) = (&self.layer, self.layer.mlp.activation);
        let [first, second] = self.products();
        let between = first.dense(x, act)?;
        let second = second.dense_backward(&between, Activation::Identity, dy)?;
        let first = first.dense_backward(x, act, &second.a)?;
        back.put_matrix(&places.gate_up, &first.matrix);
        back.put_matrix(&places.down, &second.matrix);
        back.add_to_x(&first.a);
        let (input, output) = (wide(input), wide(output));
        let units = unit_experts_backward(x, &input, &output, &gated.ids, &gated.weights, layer.hidden, act, dy)?;
        of_input.put_back(&units.input, &mut back.tensors);
        of_output.put_back(&units.output, &mut back.tensors);
        back.add_to_x(&units.x);
        Ok(units.weights)
    }

    /// Through a common product, and behind it another common one and that of a sequence's expert.
    fn sequences(
        &self,
        x: &[f64],
        [first, second]: [&MatrixWeight<HostBuffer>; 2],
        gated: &Gated,
        dy: &[f64],
        [of_first, of_second, of_part]: [&MatrixWeight<Places>; 3],
        back: &mut Gradients,
    ) -> Result<(), HfError> {
        let layer = &self.layer;
        let (hidden, inner) = (layer.hidden, layer.intermediate);
        let first = Matrix::plain(first, inner, hidden);
        let between = first.dense(x, layer.mlp.activation)?;
        let second = Matrix::plain(second, hidden, inner).dense_backward(&between, Activation::Identity, dy)?;
        let rule = DispatchRule { experts: layer.experts, top_k: 1, capacity: None, tile_m: 16 };
        let plan = dispatch(&gated.ids, &rule)?;
        let d_slots = combine_backward(&vec![0.0; dy.len()], &plan.token_slot, None, dy, 1, hidden)?.y_slots;
        let part = Matrix::plain(&self.weights.down, hidden, inner);
        let part = part.grouped_backward(&between, &plan, true, None, Activation::Identity, &d_slots)?;
        let mut d_between = second.a;
        for (row, &token) in part.a.chunks(inner).zip(&plan.slot_token) {
            let to = &mut d_between[token as usize * inner..][..inner];
            to.iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
        }
        let first = first.dense_backward(x, layer.mlp.activation, &d_between)?;
        back.put_matrix(of_first, &first.matrix);
        back.put_matrix(of_second, &second.matrix);
        back.put_matrix(of_part, &part.matrix);
        back.add_to_x(&first.a);
        Ok(())
    }
}

/// Through a norm of rows `x`, where there is one.
fn back_through(
    norm: Option<RmsNorm>,
    x: &[f64],
    width: usize,
    gain: &Option<HostBuffer>,
    d: Vec<f64>,
    places: &Option<Places>,
    back: &mut Gradients,
) -> Result<Vec<f64>, ReferenceError> {
    let Some(norm) = norm else { return Ok(d) };
    let gain = some(gain);
    let through = rms_norm_backward(&Rows { weight: gain.as_deref(), ..rows(x, width) }, &norm, &d)?;
    back.put(places, through.weight.as_deref().unwrap_or(&[]));
    Ok(through.sum)
}
