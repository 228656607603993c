//! A loaded block on a device, whatever its kind: the operations that it is made of, one behind the other.
//!
//! A block that is a layer and nothing else needs none of this: [`Loaded::for_sequence`](super::Loaded::for_sequence) and
//! [`BlockWeights::layer`](super::BlockWeights::layer) are what [`crate::layer`] takes.

mod apart;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};

use super::kind::Kind;
use super::weights::{DeviceBlock, tensor, weight};
use crate::capacity::Ids;
use crate::layer::{BanksArgs, BanksPlan, LayerArgs, LayerPlan, RouteArgs};
use crate::routers::network::{NetworkArgs, NetworkDesc, NetworkPlan, NetworkWeights};
use crate::rules::{Dtype, IdFormat};
use crate::{Element, Error, In, Kernels, Out, Workspace};
use apart::{BySequence, UnitExperts};

pub(super) use apart::typed;

const OPERATION: &str = "a checkpoint's block";

/// Everything that a block needs for so many tokens, allocated once.
pub struct BlockRun<T> {
    tokens: usize,
    steps: Steps<T>,
    results: Results,
}

enum Steps<T> {
    Layer { plan: Box<LayerPlan>, workspace: Workspace },
    Network { network: Box<NetworkPlan>, plan: Box<LayerPlan>, workspace: Workspace },
    Banks { plan: Box<BanksPlan<2>>, workspace: Workspace },
    UnitExperts(Box<UnitExperts<T>>),
    BySequence(Box<BySequence<T>>),
}

/// What a block takes beside rows; each exactly where the block has a use for it.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct BlockInputs<'a> {
    /// `[T]`: ids of words, where experts are looked up by word.
    pub words: Option<Ids<'a>>,
    /// `[T]`, of 32 bits: types of tokens, where they say which bank of experts a token goes to.
    pub types: Option<Ids<'a>>,
    /// One expert for each sequence or image, where it is the caller's to say; sequences are of equal length.
    pub index: Option<Ids<'a>>,
    /// How many there are.
    pub sequences: usize,
    /// `[T,D]`: the state of the previous layer's router, where there is one. Absent in a first layer.
    pub previous: Option<In<'a, f32>>,
}

impl BlockInputs<'_> {
    /// Fails for what a block of this kind has no use for.
    pub(super) fn check<B>(&self, kind: &Kind<B>) -> Result<(), Error> {
        let has_state = matches!(kind, Kind::Network(_));
        refuse("previous", self.previous.is_some() && !has_state, "the router has no state")?;
        let by_index = matches!(kind, Kind::BySequence { .. });
        refuse("index", self.index.is_some() && !by_index, "experts are chosen")?;
        let banked = matches!(kind, Kind::Banks(_));
        refuse("types", self.types.is_some() && !banked, "there is one bank of experts")
    }
}

/// What a block yields beside its output.
#[non_exhaustive]
pub struct Results {
    /// `[T, columns]`: [`super::Block::logit_columns`]; empty where there are none.
    pub logits: CudaSlice<f32>,
    /// `[T, k + appended]`, after admission.
    pub ids: CudaSlice<i32>,
    /// Likewise.
    pub weights: CudaSlice<f32>,
    /// `[experts that have weights]`: rows of each; 0 where experts have no rows.
    pub counts: CudaSlice<i32>,
    /// `[T,D]`: the state of the router, where it has one.
    pub state: Option<CudaSlice<f32>>,
    /// The same of a second bank of experts. A token of the other bank has ids -1.
    pub second: Option<Box<Results>>,
}

/// One element where there are none: CUDA has no empty allocations.
fn zeros<V: DeviceRepr + ValidAsZeroBits>(stream: &Arc<CudaStream>, length: usize) -> Result<CudaSlice<V>, Error> {
    stream.alloc_zeros(length.max(1)).map_err(Error::driver(OPERATION))
}

impl<T: Element> BlockRun<T> {
    /// Plans a block for `tokens` tokens, one sequence as far as capacities go, and allocates all that it needs on `stream`.
    ///
    /// # Errors
    /// [`Error::WrongDtype`] for a block of another type than `T`, those of planning, and those of the driver.
    pub fn new(
        block: &DeviceBlock,
        tokens: usize,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
    ) -> Result<BlockRun<T>, Error> {
        let desc = block.for_sequence(tokens);
        if desc.dtype != T::DTYPE {
            let (operation, argument, expected) = (OPERATION, "x", desc.dtype);
            return Err(Error::WrongDtype { operation, argument, expected, got: T::DTYPE });
        }
        let device = kernels.device();
        let mut state = None;
        let steps = match &block.kind {
            Kind::Layer => {
                let plan = Box::new(desc.plan(tokens, device)?);
                kernels.preload(plan.kernels())?;
                Steps::Layer { workspace: Workspace::new(stream, plan.workspace_bytes())?, plan }
            }
            Kind::Network(network) => {
                let plan = Box::new(desc.plan(tokens, device)?);
                let form = NetworkDesc::new(T::DTYPE, tokens, desc.hidden, network.width, desc.experts, network.norm);
                let network_plan = Box::new(form.state(Dtype::F32).plan(device)?);
                let bytes = plan.workspace_bytes().max(network_plan.workspace_bytes());
                kernels.preload(plan.kernels().chain(network_plan.kernels()))?;
                state = Some(zeros(stream, tokens * network.width)?);
                Steps::Network { network: network_plan, plan, workspace: Workspace::new(stream, bytes)? }
            }
            Kind::Banks(bank) => {
                let plan = Box::new(BanksPlan::new(&[desc, bank.desc], tokens, IdFormat::I32, device)?);
                kernels.preload(plan.kernels())?;
                Steps::Banks { workspace: Workspace::new(stream, plan.workspace_bytes())?, plan }
            }
            Kind::UnitExperts { keys, .. } => {
                Steps::UnitExperts(Box::new(UnitExperts::new(&desc, *keys, tokens, stream)?))
            }
            Kind::BySequence { .. } => Steps::BySequence(Box::new(BySequence::new(&desc, tokens, device, stream)?)),
        };
        let columns = match &block.kind {
            Kind::Layer | Kind::Network(_) | Kind::Banks(_) => desc.logit_columns(),
            Kind::UnitExperts { keys, .. } => 2 * keys,
            Kind::BySequence { .. } => 0,
        };
        let choices = tokens * desc.all_choices();
        let results = || {
            Ok::<_, Error>(Results {
                logits: zeros(stream, tokens * columns)?,
                ids: zeros(stream, choices)?,
                weights: zeros(stream, choices)?,
                counts: zeros(stream, desc.local_experts())?,
                state: None,
                second: None,
            })
        };
        let second = matches!(block.kind, Kind::Banks(_)).then(|| results().map(Box::new)).transpose()?;
        let results = Results { state, second, ..results()? };
        Ok(BlockRun { tokens, steps, results })
    }

    /// What the last run yielded beside its output.
    pub fn results(&self) -> &Results {
        &self.results
    }

    /// The layer's plan, of a block that has one.
    pub fn plan(&self) -> Option<&LayerPlan> {
        match &self.steps {
            Steps::Layer { plan, .. } | Steps::Network { plan, .. } => Some(plan),
            _ => None,
        }
    }

    /// Enqueues the block on `stream`: `x [T,H]` to `y [T,H]`. `observer` is called with a stage's name after each has been enqueued.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for inputs against the block's kind, and those of its operations.
    pub fn forward(
        &mut self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        block: &DeviceBlock,
        (x, mut y): (In<'_, T>, Out<'_, T>),
        inputs: BlockInputs<'_>,
        observer: &mut dyn FnMut(&'static str),
    ) -> Result<(), Error> {
        let weights = &block.weights;
        inputs.check(&block.kind)?;
        let Results { logits, ids, weights: shares, counts, state, second } = &mut self.results;
        match (&mut self.steps, &block.kind) {
            (Steps::Layer { plan, workspace }, Kind::Layer) => {
                let route = weights.route(inputs.words)?.logits(logits).ids(ids).weights(shares).counts(counts);
                let args = LayerArgs::new(x, y.reborrow()).route(route);
                plan.forward_observed(kernels, stream, &weights.layer()?, args, workspace, &mut |stage| {
                    observer(stage.name());
                })
            }
            (Steps::Network { network, plan, workspace }, Kind::Network(tensors)) => {
                let [first, second] = &tensors.layers;
                let layers = [weight(first)?, weight(second)?];
                let mut of_network = NetworkWeights::new(weight(&tensors.down)?, layers, tensor(&tensors.output)?);
                of_network.norm = Some(tensor(&tensors.gain)?);
                // In a first layer there are neither factors nor a state.
                let previous = inputs.previous.filter(|_| tensors.state_scale.is_some());
                if previous.is_some() {
                    of_network.state_scale = tensors.state_scale.as_ref().map(tensor).transpose()?;
                }
                let mut args = NetworkArgs::new(x, &mut *logits);
                args.previous = previous;
                args.state = state.as_mut().map(Into::into);
                network.forward::<T, f32>(kernels, stream, &of_network, args, workspace)?;
                observer("router network");
                let route = weights.route(inputs.words)?.ids(ids).weights(shares).counts(counts).given_logits(&*logits);
                let args = LayerArgs::new(x, y.reborrow()).route(route);
                plan.forward_observed(kernels, stream, &weights.layer()?, args, workspace, &mut |stage| {
                    observer(stage.name());
                })
            }
            (Steps::Banks { plan, workspace }, Kind::Banks(bank)) => {
                let reason = "types say which bank a token goes to";
                let missing = Error::Missing { operation: OPERATION, argument: "types", reason };
                let (types, second) = inputs.types.zip(second.as_deref_mut()).ok_or(missing)?;
                let routes = [
                    weights.route(inputs.words)?.logits(logits).ids(ids).weights(shares).counts(counts),
                    RouteArgs::new()
                        .logits(&mut second.logits)
                        .ids(&mut second.ids)
                        .weights(&mut second.weights)
                        .counts(&mut second.counts),
                ];
                let args = BanksArgs::new(x, types, y.reborrow()).routes(routes);
                plan.forward(kernels, stream, [&weights.layer()?, &bank.weights.layer()?], args, workspace)?;
                observer("banks");
                Ok(())
            }
            (Steps::UnitExperts(steps), Kind::UnitExperts { input, output, .. }) => steps.forward(
                kernels,
                stream,
                weights,
                [input, output],
                (x, y.reborrow()),
                (logits, ids, shares),
                observer,
            ),
            (Steps::BySequence(steps), Kind::BySequence { first, second }) => {
                let index = inputs.index.zip(self.tokens.checked_div(inputs.sequences));
                let reason = "an expert for each sequence is the caller's to say";
                let missing = Error::Missing { operation: OPERATION, argument: "index", reason };
                let index = index.ok_or(missing)?;
                steps.forward(
                    kernels,
                    stream,
                    [first, second, &weights.down],
                    index,
                    (x, y.reborrow()),
                    (ids, shares),
                    observer,
                )
            }
            _ => {
                let expected = "the block that the run was made for".into();
                Err(Error::Invalid { operation: OPERATION, argument: "block", expected, got: "another".into() })
            }
        }
    }
}

fn refuse(argument: &'static str, wrong: bool, reason: &'static str) -> Result<(), Error> {
    if wrong { Err(Error::Unexpected { operation: OPERATION, argument, reason }) } else { Ok(()) }
}
