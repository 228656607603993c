//! A layer whose router and experts are gone back through one by one: with norms or projections around them, a router with a network, or an
//! admission that weighs anew.

use cudarc::driver::CudaSlice;

use super::core::{Core, experts_alone, of_products, of_shared, without_map};
use super::gradients::To;
use super::network::NetworkPass;
use super::parts::{Dense, Norm, Product, Queue, Tokens};
use super::slots::Slots;
use super::{OPERATION, no_way_back, zeros};
use crate::capacity::admission::{self, AdmissionArgs, AdmissionDesc};
use crate::checkpoint::kind::Kind;
use crate::checkpoint::run::BlockInputs;
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::{BlockWeights, tensor};
use crate::experts::rms_norm::RmsNormArgs;
use crate::experts::rms_norm_backward::Gradient;
use crate::layer::{Choices, LayerDesc, Norms, RouteArgs};
use crate::routers::gating::{self, GatingArgs, GatingDesc, RuleInputs};
use crate::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc};
use crate::routers::router::{self, RouterArgs, RouterDesc};
use crate::rules::Activation;
use crate::{Dtype, Element, Error, In, Out, Tensor, TokenMask, Workspace};

/// Both passes.
pub(super) struct Apart<T> {
    desc: LayerDesc,
    tokens: Tokens,
    router: Logits<T>,
    gating: GatingDesc,
    gating_back: GatingBackwardDesc,
    sums: Workspace,
    admission: Option<Admission>,
    choices: Buffers,
    before: Before<T>,
    experts: Experts<T>,
    shared: Option<Shared<T>>,
}

/// The experts, by choices from elsewhere.
enum Experts<T> {
    Core(Box<Core<T>>),
    /// With a norm of each one's output.
    Slots(Box<Slots<T>>),
}

/// Where logits are from.
enum Logits<T> {
    Router(RouterPass<T>),
    Network(Box<NetworkPass>),
}

/// The layer's own router.
struct RouterPass<T> {
    norm: Option<Norm>,
    /// `[T,H]`, of the norm: rounded, or not where the router is of f32.
    normed: Option<Rows<T>>,
    /// The gradient of these.
    d_normed: Option<Rows<T>>,
}

/// Rows of the type of `x`, or of f32.
enum Rows<T> {
    Rounded(CudaSlice<T>),
    F32(CudaSlice<f32>),
}

/// `[T, columns]` each, or `[T, k + appended]`.
struct Buffers {
    logits: CudaSlice<f32>,
    d_logits: CudaSlice<f32>,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    d_weights: CudaSlice<f32>,
}

/// Who gets the experts that were chosen.
struct Admission {
    desc: AdmissionDesc,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    workspace: Workspace,
}

/// What stands between `x` and the experts, and behind their sum. Rows as they are named, and their gradients.
struct Before<T> {
    norm: Option<Norm>,
    normed: Option<[CudaSlice<T>; 2]>,
    latent: Option<Latent<T>>,
    /// `[T,L]`, where there is a latent width: the gradient of the experts' sum.
    d_sum: Option<CudaSlice<T>>,
}

/// Projections to a width of the experts' own and back.
struct Latent<T> {
    input: Dense,
    output: Dense,
    norm: Option<Norm>,
    /// `[T,L]`.
    projected: [CudaSlice<T>; 2],
    /// `[T,L]`, after the norm.
    normed: Option<[CudaSlice<T>; 2]>,
}

/// A shared expert beside experts that see other rows than it: a layer of one expert that all tokens choose.
struct Shared<T> {
    core: Core<T>,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    d_x: CudaSlice<T>,
}

impl<T: Element> Apart<T> {
    pub(super) fn new(
        kind: &Kind<DeviceBuffer>,
        weights: &BlockWeights<DeviceBuffer>,
        desc: &LayerDesc,
        count: usize,
        queue: Queue<'_>,
    ) -> Result<Apart<T>, Error> {
        let stream = queue.stream;
        if desc.norms.output.is_some() {
            return Err(no_way_back("a norm of the whole output"));
        }
        let desc = without_map(desc, weights);
        let (hidden, width) = (desc.hidden, desc.expert_width());
        let rows = |width: usize| Ok::<_, Error>([zeros::<T>(stream, count * width)?, zeros(stream, count * width)?]);
        let norm = |rule: Option<_>, width| rule.map(|rule| Norm::new(rule, width, count, stream)).transpose();
        let router = match kind {
            Kind::Network(network) => Logits::Network(Box::new(NetworkPass::new(network, &desc, count, queue)?)),
            _ => {
                let normed = || {
                    Ok::<_, Error>(match desc.router_dtype == Dtype::F32 {
                        true => Rows::F32(zeros(stream, count * hidden)?),
                        false => Rows::Rounded(zeros(stream, count * hidden)?),
                    })
                };
                let has = desc.norms.router.is_some();
                let normed = || has.then(normed).transpose();
                Logits::Router(RouterPass {
                    norm: norm(desc.norms.router, hidden)?,
                    normed: normed()?,
                    d_normed: normed()?,
                })
            }
        };
        let before = Before {
            norm: norm(desc.norms.experts, hidden)?,
            normed: desc.norms.experts.map(|_| rows(hidden)).transpose()?,
            latent: match &desc.latent {
                None => None,
                Some(latent) => Some(Latent {
                    input: Dense::new(desc.dtype, width, hidden),
                    output: Dense::new(desc.dtype, hidden, width),
                    norm: norm(latent.norm, width)?,
                    projected: rows(width)?,
                    normed: latent.norm.map(|_| rows(width)).transpose()?,
                }),
            },
            d_sum: desc.latent.map(|_| zeros(stream, count * width)).transpose()?,
        };
        let gating = GatingDesc::new(count, desc.experts, desc.top_k, desc.gating);
        // What is divided by a sum are the admitted weights, or all that were chosen.
        let mut rule = desc.gating;
        rule.renormalise = desc.admission.and_then(|rule| rule.renormalise).or(rule.renormalise);
        let gating_back = GatingBackwardDesc::new(count, desc.experts, desc.top_k, rule).logit_rule(desc.logits);
        let all = count * desc.all_choices();
        let columns = count * desc.logit_columns();
        let mut core = LayerDesc { hidden: width, latent: None, norms: Norms::new(), admission: None, ..desc };
        let others_rows = desc.latent.is_some() || desc.norms.experts.is_some();
        let shared = match core.shared.take_if(|_| others_rows) {
            None => None,
            Some(shared) if shared.gated || shared.scale != 1.0 => {
                return Err(no_way_back("a gated or scaled shared expert beside experts that see other rows"));
            }
            Some(shared) => {
                let alone = LayerDesc::new(desc.dtype, hidden, shared.intermediate, 1, 1).mlp(shared.mlp);
                Some(Shared {
                    core: Core::chosen(&alone, count, queue)?,
                    ids: zeros(stream, count)?,
                    weights: stream.clone_htod(&vec![1.0; count.max(1)]).map_err(Error::driver(OPERATION))?,
                    d_x: zeros(stream, count * hidden)?,
                })
            }
        };
        Ok(Apart {
            tokens: Tokens::new(count, queue)?,
            router,
            gating,
            sums: Workspace::new(stream, gating_backward::workspace_bytes(&gating_back)?)?,
            gating_back,
            admission: match &desc.admission {
                None => None,
                Some(rule) => {
                    let admission = AdmissionDesc::new(count, *rule);
                    let bytes = admission::workspace_bytes(&admission)?;
                    Some(Admission {
                        desc: admission,
                        ids: zeros(stream, all)?,
                        weights: zeros(stream, all)?,
                        workspace: Workspace::new(stream, bytes)?,
                    })
                }
            },
            choices: Buffers {
                logits: zeros(stream, columns)?,
                d_logits: zeros(stream, columns)?,
                ids: zeros(stream, all)?,
                weights: zeros(stream, all)?,
                d_weights: zeros(stream, all)?,
            },
            before,
            experts: match desc.norms.slots {
                None => Experts::Core(Box::new(Core::chosen(&core, count, queue)?)),
                Some(rule) => Experts::Slots(Box::new(Slots::new(&core, rule, weights, count, queue)?)),
            },
            shared,
            desc,
        })
    }

    /// Both passes for the tokens of a mask; the gradient of `x` is written.
    pub(super) fn run(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        kind: &Kind<DeviceBuffer>,
        (x, dy): (In<'_, T>, In<'_, T>),
        (inputs, mask): (BlockInputs<'_>, TokenMask<'_>),
        to: &mut To<'_, T>,
    ) -> Result<(), Error> {
        self.choose(queue, weights, kind, x, (inputs, mask))?;
        self.experts(queue, weights, (x, dy), to)?;
        self.back_to_logits(queue, weights, mask, to)?;
        let (dx, of, of_kind, previous) = (&mut *to.x, &mut *to.weights, &mut *to.kind, to.previous.as_deref_mut());
        let (tokens, d_logits) = (&self.tokens, (&self.choices.d_logits).into());
        match (&mut self.router, kind, of_kind) {
            (Logits::Network(pass), Kind::Network(network), Kind::Network(of)) => {
                pass.backward(queue, tokens, network, (x, d_logits), inputs.previous, of, (dx.into(), previous))
            }
            (Logits::Router(pass), ..) => {
                let Some(matrix) = &weights.router else { return Ok(()) };
                let columns = self.desc.logit_columns();
                if let Some(bias) = &mut of.router_bias {
                    tokens.columns(queue, d_logits, columns, bias)?;
                }
                let (hidden, matrix) = (self.desc.hidden, tensor(matrix)?);
                let around = (&weights.around.router, of.around.router.as_mut());
                pass.backward(
                    queue,
                    tokens,
                    [columns, hidden],
                    (x, d_logits, matrix),
                    around,
                    of.router.as_mut(),
                    dx.into(),
                )
            }
            _ => Ok(()),
        }
    }

    /// Logits, and choices by them.
    fn choose(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        kind: &Kind<DeviceBuffer>,
        x: In<'_, T>,
        (inputs, mask): (BlockInputs<'_>, TokenMask<'_>),
    ) -> Result<(), Error> {
        let Queue { kernels, stream } = queue;
        let Buffers { logits, ids, weights: shares, .. } = &mut self.choices;
        match (&mut self.router, kind) {
            (Logits::Network(pass), Kind::Network(network)) => {
                pass.forward(queue, &self.tokens, network, x, inputs.previous, logits)?;
            }
            (Logits::Router(pass), _) => {
                let desc = RouterDesc::new(T::DTYPE, self.tokens.count, self.desc.logit_columns(), self.desc.hidden)
                    .weight(self.desc.router_dtype)
                    .logits(self.desc.logits);
                pass.forward(queue, self.tokens.count, &desc, weights, x, logits)?;
            }
            _ => {}
        }
        let RouteArgs { given, .. } = weights.route(inputs.words)?;
        let mut rule = RuleInputs::new();
        rule.given = given;
        rule.expert_scale = weights.expert_scale.as_ref().and_then(DeviceBuffer::f32);
        rule.global_scale = weights.global_scale.as_ref().and_then(DeviceBuffer::f32);
        let mut args = GatingArgs::new(&*logits, &mut *ids, &mut *shares).rule(rule).mask(mask);
        args.correction_bias = weights.correction_bias.as_ref().and_then(DeviceBuffer::f32);
        gating::forward(kernels, stream, &self.gating, args)?;
        if let Some(admission) = &mut self.admission {
            let Admission { desc, ids: to_ids, weights: to_weights, workspace } = admission;
            let args = AdmissionArgs::new(&*ids, &*shares, to_ids, to_weights, workspace);
            admission::forward(kernels, stream, desc, args)?;
        }
        Ok(())
    }

    /// The experts, forth and back: to the gradients of choices' weights, and to that of `x`, written.
    fn experts(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        (x, dy): (In<'_, T>, In<'_, T>),
        to: &mut To<'_, T>,
    ) -> Result<(), Error> {
        let (tokens, count) = (&self.tokens, self.tokens.count);
        let (dx, of) = (&mut *to.x, &mut *to.weights);
        let Before { norm, normed, latent, d_sum } = &mut self.before;
        let around = &weights.around;

        // Forth to what the experts see.
        if let (Some(norm), Some([to, _])) = (&*norm, &mut *normed) {
            norm.forward(queue, count, RmsNormArgs::new(x, to), &around.experts, T::DTYPE)?;
        }
        let input: In<'_, T> = normed.as_ref().map_or(x, |[normed, _]| normed.into());
        if let (Some(latent), Some([matrix, _])) = (&mut *latent, &around.latent) {
            let [to, _] = &mut latent.projected;
            latent.input.forward(queue, tokens, (input, matrix), Activation::Identity, to, None)?;
            if let (Some(norm), Some([normed, _])) = (&latent.norm, &mut latent.normed) {
                norm.forward(queue, count, RmsNormArgs::new(&*to, normed), &around.latent_norm, T::DTYPE)?;
            }
        }
        let seen: In<'_, T> = match latent.as_ref() {
            None => input,
            Some(Latent { normed: Some([normed, _]), .. }) => normed.into(),
            Some(Latent { projected: [projected, _], .. }) => projected.into(),
        };
        let (ids, shares) = match &self.admission {
            None => (&self.choices.ids, &self.choices.weights),
            Some(admission) => (&admission.ids, &admission.weights),
        };
        let mut experts = experts_alone(&weights.gate_up, &weights.down)?;
        let own_shared = self.shared.is_none();
        if own_shared {
            experts.experts.shared = weights.layer()?.experts.shared;
        }
        match &mut self.experts {
            Experts::Core(core) => core.forward_chosen(queue, &experts, seen, Choices::new(ids, shares))?,
            Experts::Slots(slots) => slots.forward(queue, weights, seen, (ids, shares))?,
        }

        // Back through the projection of the sum.
        let places = (&mut *d_sum, &around.latent, &mut of.around.latent);
        if let (Some(latent), (Some(d_sum), Some([_, matrix]), Some([_, of_output]))) = (latent.as_ref(), places) {
            let y = match &self.experts {
                Experts::Core(core) => core.y().into(),
                Experts::Slots(slots) => slots.y().into(),
            };
            latent.output.back_to_weight(queue, tokens, (dy, y), of_output)?;
            latent.output.back_to_input(queue, tokens, (dy, matrix), false, d_sum.into())?;
        }
        let d_sum: In<'_, T> = d_sum.as_ref().map_or(dy, Into::into);
        if let Some(bias) = &mut of.output_bias {
            tokens.columns(queue, dy, self.desc.hidden, bias)?;
        }

        // Back through the experts, to what they have seen.
        let (seen, d_seen): (In<'_, T>, &mut CudaSlice<T>) = match (latent.as_mut(), normed.as_mut()) {
            (Some(Latent { normed: Some([seen, d]), .. }), _) => ((&*seen).into(), d),
            (Some(Latent { projected: [seen, d], .. }), _) => ((&*seen).into(), d),
            (None, Some([seen, d])) => ((&*seen).into(), d),
            (None, None) => (x, &mut *dx),
        };
        match &mut self.experts {
            Experts::Slots(slots) => slots.backward(queue, weights, (seen, d_sum), of, d_seen.into())?,
            Experts::Core(core) => {
                let mut gradients = of_products(&mut of.gate_up, &mut of.down);
                if let (true, Some((gate_up, down))) = (own_shared, &mut of.shared) {
                    let mut shared = of_shared(gate_up, down);
                    shared.gate = of.shared_gate.as_mut().map(Into::into);
                    gradients = gradients.shared(shared);
                }
                gradients.weights = Some((&mut self.choices.d_weights).into());
                core.backward(queue, &experts, (seen, d_sum), gradients.x(d_seen))?;
            }
        }
        Before::back(&mut self.before, queue, tokens, weights, x, of, dx)?;
        if let (Some(shared), Some((gate_up, down)), Some((of_gate_up, of_down))) =
            (&mut self.shared, &weights.shared, &mut of.shared)
        {
            let experts = experts_alone(gate_up, down)?;
            let choices = Choices::new(&shared.ids, &shared.weights);
            shared.core.forward_chosen(queue, &experts, x, choices)?;
            let to = of_products(of_gate_up, of_down).x(&mut shared.d_x);
            shared.core.backward(queue, &experts, (x, dy), to)?;
            tokens.add(queue, &shared.d_x, self.desc.hidden, dx.into())?;
        }
        Ok(())
    }

    /// From the gradients of choices' weights to those of logits and of learned factors.
    fn back_to_logits(
        &mut self,
        queue: Queue<'_>,
        weights: &BlockWeights<DeviceBuffer>,
        mask: TokenMask<'_>,
        to: &mut To<'_, T>,
    ) -> Result<(), Error> {
        let of = &mut *to.weights;
        let renormalises = self.desc.admission.is_some_and(|rule| rule.renormalise.is_some());
        let Buffers { logits, d_logits, ids, d_weights, .. } = &mut self.choices;
        let ids = match self.admission.as_ref().filter(|_| renormalises) {
            Some(admission) => &admission.ids,
            None => ids,
        };
        let mut args = match &self.experts {
            Experts::Core(_) => GatingBackwardArgs::new(&*logits, ids, &*d_weights, d_logits),
            Experts::Slots(slots) => {
                let (rows, d_weights) = slots.d_weights();
                GatingBackwardArgs::new(&*logits, ids, d_weights, d_logits).dispatched(rows)
            }
        }
        .mask(mask);
        args.expert_scale = weights.expert_scale.as_ref().and_then(DeviceBuffer::f32);
        args.global_scale = weights.global_scale.as_ref().and_then(DeviceBuffer::f32);
        args.d_expert_scale = of.expert_scale.as_mut().map(Into::into);
        args.d_global_scale = of.global_scale.as_mut().map(Into::into);
        if args.d_expert_scale.is_some() || args.d_global_scale.is_some() {
            args.workspace = Some(&mut self.sums);
        }
        gating_backward::forward(queue.kernels, queue.stream, &self.gating_back, args)
    }
}

impl<T: Element> Before<T> {
    /// From the gradient of what the experts have seen to that of `x`, written. Where they have seen `x` it lies there already.
    fn back(
        &mut self,
        queue: Queue<'_>,
        tokens: &Tokens,
        weights: &BlockWeights<DeviceBuffer>,
        x: In<'_, T>,
        of: &mut BlockWeights<CudaSlice<f32>>,
        dx: &mut CudaSlice<T>,
    ) -> Result<(), Error> {
        let (around, of, count) = (&weights.around, &mut of.around, tokens.count);
        if let (Some(latent), Some([matrix, _]), Some([of_input, _])) =
            (&mut self.latent, &around.latent, &mut of.latent)
        {
            let [projected, d_projected] = &mut latent.projected;
            if let (Some(norm), Some([_, d])) = (&mut latent.norm, &latent.normed) {
                let (gains, rows) = ((&around.latent_norm, of.latent_norm.as_mut()), (&*projected).into());
                norm.backward(queue, count, (rows, Gradient::from(d)), gains, false, (&mut *d_projected).into())?;
            }
            let (d, input) = ((&*d_projected).into(), self.normed.as_ref().map_or(x, |[normed, _]| normed.into()));
            latent.input.back_to_weight(queue, tokens, (d, input), of_input)?;
            let to: Out<'_, T> = match &mut self.normed {
                Some([_, d]) => d.into(),
                None => (&mut *dx).into(),
            };
            latent.input.back_to_input(queue, tokens, (d, matrix), false, to)?;
        }
        if let (Some(norm), Some([_, d])) = (&mut self.norm, &self.normed) {
            let gains = (&around.experts, of.experts.as_mut());
            norm.backward(queue, count, (x, Gradient::from(d)), gains, false, dx.into())?;
        }
        Ok(())
    }
}

impl<T: Element> RouterPass<T> {
    fn forward(
        &mut self,
        queue: Queue<'_>,
        rows: usize,
        desc: &RouterDesc,
        weights: &BlockWeights<DeviceBuffer>,
        x: In<'_, T>,
        logits: &mut CudaSlice<f32>,
    ) -> Result<(), Error> {
        let gain = &weights.around.router;
        let missing = Error::Missing { operation: OPERATION, argument: "router", reason: "logits are a router's" };
        let matrix = tensor(weights.router.as_ref().ok_or(missing)?)?;
        let bias = weights.router_bias.as_ref().and_then(DeviceBuffer::f32);
        match (&self.norm, &mut self.normed) {
            (Some(norm), Some(Rows::Rounded(to))) => {
                norm.forward(queue, rows, RmsNormArgs::new(x, &mut *to), gain, T::DTYPE)?;
                product(queue, desc, (&*to).into(), matrix, bias, logits)
            }
            (Some(norm), Some(Rows::F32(to))) => {
                norm.forward(queue, rows, RmsNormArgs::to_f32(x, &mut *to), gain, Dtype::F32)?;
                let desc = RouterDesc { x: Dtype::F32, ..*desc };
                product::<f32>(queue, &desc, (&*to).into(), matrix, bias, logits)
            }
            _ => product(queue, desc, x, matrix, bias, logits),
        }
    }

    /// To the matrix's gradient, and to that of `x`, added to what is there.
    #[allow(clippy::too_many_arguments)] // a router's inputs and outputs
    fn backward(
        &mut self,
        queue: Queue<'_>,
        tokens: &Tokens,
        [columns, hidden]: [usize; 2],
        (x, d_logits, matrix): (In<'_, T>, In<'_, f32>, Tensor<'_>),
        (gain, d_gain): (&Option<DeviceBuffer>, Option<&mut CudaSlice<f32>>),
        d_matrix: Option<&mut CudaSlice<f32>>,
        dx: Out<'_, T>,
    ) -> Result<(), Error> {
        let (rounded, wide) = (Product::new(T::DTYPE, columns, hidden), Product::new(Dtype::F32, columns, hidden));
        let weight = |seen: In<'_, T>, d_matrix: Option<&mut CudaSlice<f32>>| match d_matrix {
            Some(d_matrix) => rounded.back_to_weight(queue, tokens, (d_logits, seen), d_matrix),
            None => Ok(()),
        };
        match (&mut self.norm, &self.normed, &mut self.d_normed) {
            (Some(norm), Some(Rows::Rounded(seen)), Some(Rows::Rounded(d))) => {
                weight(seen.into(), d_matrix)?;
                rounded.back_to_input(queue, tokens, (d_logits, matrix), false, (&mut *d).into())?;
                norm.backward(queue, tokens.count, (x, Gradient::from(&*d)), (gain, d_gain), true, dx)
            }
            (Some(norm), Some(Rows::F32(seen)), Some(Rows::F32(d))) => {
                if let Some(d_matrix) = d_matrix {
                    wide.back_to_weight::<f32>(queue, tokens, (d_logits, seen.into()), d_matrix)?;
                }
                wide.back_to_input::<f32>(queue, tokens, (d_logits, matrix), false, (&mut *d).into())?;
                norm.backward(queue, tokens.count, (x, Gradient::F32((&*d).into())), (gain, d_gain), true, dx)
            }
            _ => {
                weight(x, d_matrix)?;
                rounded.back_to_input(queue, tokens, (d_logits, matrix), true, dx)
            }
        }
    }
}

/// Logits of rows of type `X`.
pub(super) fn product<X: Element>(
    queue: Queue<'_>,
    desc: &RouterDesc,
    x: In<'_, X>,
    matrix: Tensor<'_>,
    bias: Option<In<'_, f32>>,
    logits: &mut CudaSlice<f32>,
) -> Result<(), Error> {
    fn typed<'a, X: Element, W: Element>(
        queue: Queue<'_>,
        desc: &RouterDesc,
        mut args: RouterArgs<'a, X, W>,
        bias: Option<In<'a, f32>>,
    ) -> Result<(), Error> {
        args.bias = bias;
        router::forward(queue.kernels, queue.stream, desc, args)
    }
    match matrix {
        Tensor::Bf16(matrix) => typed(queue, desc, RouterArgs::new(x, matrix, logits), bias),
        Tensor::F16(matrix) => typed(queue, desc, RouterArgs::new(x, matrix, logits), bias),
        Tensor::F32(matrix) => typed(queue, desc, RouterArgs::new(x, matrix, logits), bias),
    }
}
