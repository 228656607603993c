//! The weights of a block, and the block itself.

use super::kind::Kind;
use super::store::{DeviceBuffer, HostBuffer};
use crate::capacity::Ids;
use crate::experts::Weight;
use crate::layer::{
    ExpertWeights, LatentWeights, LayerDesc, LayerWeights, MapTable, RouteArgs, RouterWeights, SharedWeights,
};
use crate::routers::gating::Given;
use crate::rules::NullOutput;
use crate::{Error, In, Tensor};

/// Weights of a block in the shapes of [`LayerWeights`], each in a buffer `B`.
#[non_exhaustive]
pub struct BlockWeights<B> {
    /// `[E,H]`; none where logits come from elsewhere, or nothing is chosen.
    pub router: Option<B>,
    /// `[E]`, f32.
    pub router_bias: Option<B>,
    /// `[E]`, f32.
    pub correction_bias: Option<B>,
    /// First product of every expert.
    pub gate_up: MatrixWeight<B>,
    /// Second product.
    pub down: MatrixWeight<B>,
    /// Both products of the shared expert.
    pub shared: Option<(MatrixWeight<B>, MatrixWeight<B>)>,
    /// `[1,H]`, of the router's type.
    pub shared_gate: Option<B>,
    /// `[E]`, f32: a factor of each expert's weight.
    pub expert_scale: Option<B>,
    /// `[1]`, f32: a factor of all weights.
    pub global_scale: Option<B>,
    /// `[H]`, added to every token's sum.
    pub output_bias: Option<B>,
    /// Of norms and of projections round the experts.
    pub around: AroundWeights<B>,
    /// `[V,k]`, whole numbers: experts by word.
    pub table: Option<B>,
    /// Rows of the table, `V`.
    pub vocabulary: usize,
    /// `[E]`, whole numbers: which experts have weights, where some yield their input, or nothing.
    pub map: Option<B>,
    /// What experts without weights yield, where there is a map.
    pub weightless: Option<NullOutput>,
}

impl<B> BlockWeights<B> {
    /// What `of` makes of every buffer that has a gradient. Corrections of the choice, tables and maps have none.
    pub(super) fn parameters<C, E>(&self, mut of: impl FnMut(&B) -> Result<C, E>) -> Result<BlockWeights<C>, E> {
        let mut matrix = |weight: &MatrixWeight<B>| weight.map(&mut of);
        let (gate_up, down) = (matrix(&self.gate_up)?, matrix(&self.down)?);
        let shared = self.shared.as_ref().map(|(up, down)| Ok::<_, E>((matrix(up)?, matrix(down)?))).transpose()?;
        let latent = self.around.latent.as_ref();
        let latent = latent.map(|[input, output]| Ok::<_, E>([matrix(input)?, matrix(output)?])).transpose()?;
        let mut some = |buffer: &Option<B>| buffer.as_ref().map(&mut of).transpose();
        Ok(BlockWeights {
            router: some(&self.router)?,
            router_bias: some(&self.router_bias)?,
            correction_bias: None,
            gate_up,
            down,
            shared,
            shared_gate: some(&self.shared_gate)?,
            expert_scale: some(&self.expert_scale)?,
            global_scale: some(&self.global_scale)?,
            output_bias: some(&self.output_bias)?,
            around: AroundWeights {
                router: some(&self.around.router)?,
                experts: some(&self.around.experts)?,
                slots: some(&self.around.slots)?,
                output: some(&self.around.output)?,
                latent,
                latent_norm: some(&self.around.latent_norm)?,
            },
            table: None,
            vocabulary: 0,
            map: None,
            weightless: self.weightless,
        })
    }

    /// Every buffer, where it is there, in an order that is the same for all of a block's.
    pub(super) fn buffers(&self) -> Vec<Option<&B>> {
        fn matrix<B>(weight: Option<&MatrixWeight<B>>) -> [Option<&B>; 2] {
            [weight.map(|weight| &weight.matrix), weight.and_then(|weight| weight.bias.as_ref())]
        }
        let (shared, latent, around) = (self.shared.as_ref(), self.around.latent.as_ref(), &self.around);
        let matrices = [
            Some(&self.gate_up),
            Some(&self.down),
            shared.map(|(gate_up, _)| gate_up),
            shared.map(|(_, down)| down),
            latent.map(|[input, _]| input),
            latent.map(|[_, output]| output),
        ];
        let others = [
            &self.router,
            &self.router_bias,
            &self.correction_bias,
            &self.shared_gate,
            &self.expert_scale,
            &self.global_scale,
            &self.output_bias,
            &around.router,
            &around.experts,
            &around.slots,
            &around.output,
            &around.latent_norm,
            &self.table,
            &self.map,
        ];
        matrices.into_iter().flat_map(matrix).chain(others.map(Option::as_ref)).collect()
    }
}

/// Weights of norms, and of projections to a width of the experts' own.
#[non_exhaustive]
pub struct AroundWeights<B> {
    /// `[H]`, of the norm of the router's input.
    pub router: Option<B>,
    /// `[H]`, of the norm of the experts' input.
    pub experts: Option<B>,
    /// `[H]` or `[L]`, of the norm of each expert's output.
    pub slots: Option<B>,
    /// `[H]`, of the norm of the whole layer's output.
    pub output: Option<B>,
    /// `[L,H]` and `[H,L]`.
    pub latent: Option<[MatrixWeight<B>; 2]>,
    /// `[L]`, of the norm behind the first of these.
    pub latent_norm: Option<B>,
}

/// Weights of one product.
#[non_exhaustive]
pub struct MatrixWeight<B> {
    /// As [`Weight::matrix`].
    pub matrix: B,
    /// As [`Weight::bias`].
    pub bias: Option<B>,
}

impl<B> MatrixWeight<B> {
    pub(super) fn new(matrix: B) -> MatrixWeight<B> {
        MatrixWeight { matrix, bias: None }
    }

    /// What `of` makes of matrix and bias.
    pub(super) fn map<C, E>(&self, mut of: impl FnMut(&B) -> Result<C, E>) -> Result<MatrixWeight<C>, E> {
        Ok(MatrixWeight { matrix: of(&self.matrix)?, bias: self.bias.as_ref().map(of).transpose()? })
    }
}

/// A block in memory.
#[non_exhaustive]
pub struct Loaded<B> {
    /// The layer, with the types and layouts that its weights have: [`Loaded::for_sequence`] is ready to be planned. Of a kind that is no layer,
    /// the sizes.
    pub desc: LayerDesc,
    /// Its weights.
    pub weights: BlockWeights<B>,
    /// What it is beside a layer.
    pub kind: Kind<B>,
    pub(super) capacity: SequenceCapacity,
}

impl<B> Loaded<B> {
    /// The layer for batches of sequences of `tokens` tokens, on which capacities depend in some families.
    pub fn for_sequence(&self, tokens: usize) -> LayerDesc {
        self.capacity.applied(&self.desc, tokens)
    }
}

/// What an expert takes of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum SequenceCapacity {
    /// As much as there is, or what the descriptor says.
    Fixed,
    /// The part of a sequence's tokens, rounded up (NLLB's `moe_eval_capacity_token_fraction`).
    Fraction(f64),
    /// Twice an equal share (NLLB without `expert_capacity`).
    TwoShares,
}

impl SequenceCapacity {
    fn applied(self, desc: &LayerDesc, tokens: usize) -> LayerDesc {
        let mut desc = *desc;
        let tokens = tokens.max(1);
        if let Some(capacity) = &mut desc.capacity {
            capacity.tokens_per_sequence = tokens;
        }
        if let Some(admission) = &mut desc.admission {
            admission.tokens_per_group = tokens;
            match self {
                SequenceCapacity::Fixed => {}
                SequenceCapacity::Fraction(part) => {
                    admission.capacity = ((part * tokens as f64).ceil() as usize).max(1)
                }
                SequenceCapacity::TwoShares => admission.capacity = 2 * tokens.div_ceil(desc.experts),
            }
        }
        desc
    }
}

/// A block on a device.
pub type DeviceBlock = Loaded<DeviceBuffer>;

/// A block in the host's memory: to look at, or for the reference.
pub type HostBlock = Loaded<HostBuffer>;

const OPERATION: &str = "a checkpoint's weights";

pub(super) fn tensor(buffer: &DeviceBuffer) -> Result<Tensor<'_>, Error> {
    let (argument, expected) = ("weight", "numbers with a fraction".into());
    buffer.tensor().ok_or_else(|| Error::Invalid { operation: OPERATION, argument, expected, got: "integers".into() })
}

pub(super) fn weight(weight: &MatrixWeight<DeviceBuffer>) -> Result<Weight<'_>, Error> {
    let matrix = Weight::new(tensor(&weight.matrix)?);
    Ok(match &weight.bias {
        Some(bias) => matrix.bias(tensor(bias)?),
        None => matrix,
    })
}

pub(super) fn some(buffer: &Option<DeviceBuffer>) -> Result<Option<Tensor<'_>>, Error> {
    buffer.as_ref().map(tensor).transpose()
}

fn f32(buffer: &Option<DeviceBuffer>) -> Option<In<'_, f32>> {
    buffer.as_ref().and_then(DeviceBuffer::f32)
}

impl BlockWeights<DeviceBuffer> {
    /// What a layer's plan takes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for weights that are whole numbers, which a loaded block has none of.
    pub fn layer(&self) -> Result<LayerWeights<'_>, Error> {
        let mut router = RouterWeights::of_logits();
        router.matrix = some(&self.router)?;
        router.bias = f32(&self.router_bias);
        router.correction_bias = f32(&self.correction_bias);
        router.expert_scale = f32(&self.expert_scale);
        router.global_scale = f32(&self.global_scale);
        router.norm = some(&self.around.router)?;
        let mut experts = ExpertWeights::new(weight(&self.gate_up)?, weight(&self.down)?);
        if let Some((gate_up, down)) = &self.shared {
            let mut shared = SharedWeights::new(weight(gate_up)?, weight(down)?);
            shared.gate = some(&self.shared_gate)?;
            experts = experts.shared(shared);
        }
        experts.bias = some(&self.output_bias)?;
        experts.norms.experts = some(&self.around.experts)?;
        experts.norms.slots = some(&self.around.slots)?;
        experts.norms.output = some(&self.around.output)?;
        if let Some([input, output]) = &self.around.latent {
            let mut latent = LatentWeights::new(weight(input)?, weight(output)?);
            latent.norm = some(&self.around.latent_norm)?;
            experts = experts.latent(latent);
        }
        Ok(LayerWeights::new(router, experts))
    }

    /// What a route takes: the map of experts that yield their input, and, where experts are looked up by word, `words [T]`.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unexpected`] for `words` where the block is not of that kind.
    pub fn route<'a>(&'a self, words: Option<Ids<'a>>) -> Result<RouteArgs<'a>, Error> {
        let mut args = RouteArgs::new();
        if let Some(map) = self.map.as_ref().and_then(DeviceBuffer::i32) {
            args = args.map(MapTable::new(map));
        }
        let (operation, argument) = (OPERATION, "words");
        match (self.table.as_ref().and_then(DeviceBuffer::i32), words) {
            (None, None) => Ok(args),
            (Some(table), Some(words)) => Ok(args.given(Given::table(table, self.vocabulary, words))),
            (Some(_), None) => {
                Err(Error::Missing { operation, argument, reason: "experts are looked up in a table by word" })
            }
            (None, Some(_)) => Err(Error::Unexpected { operation, argument, reason: "experts are chosen" }),
        }
    }
}
