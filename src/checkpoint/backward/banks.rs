//! Two banks of experts, each for the tokens of its types.

use cudarc::driver::CudaSlice;

use super::apart::Apart;
use super::gradients::{BlockGradients, To};
use super::parts::{Queue, Tokens};
use super::{OPERATION, zeros};
use crate::checkpoint::kind::{Bank, Kind};
use crate::checkpoint::run::BlockInputs;
use crate::checkpoint::store::DeviceBuffer;
use crate::checkpoint::weights::DeviceBlock;
use crate::layer::LayerDesc;
use crate::routers::token_banks::{self, TokenBanksArgs, TokenBanksDesc};
use crate::{Element, Error, In, TokenMask};

/// Both passes of each bank.
pub(super) struct Banks<T> {
    split: TokenBanksDesc,
    /// `[2, T]`.
    masks: CudaSlice<u8>,
    first: Apart<T>,
    second: Apart<T>,
    tokens: Tokens,
    /// `[T,H]`: the second bank's part.
    d_x: CudaSlice<T>,
}

impl<T: Element> Banks<T> {
    pub(super) fn new(
        block: &DeviceBlock,
        bank: &Bank<DeviceBuffer>,
        desc: &LayerDesc,
        tokens: usize,
        queue: Queue<'_>,
    ) -> Result<Banks<T>, Error> {
        Ok(Banks {
            split: TokenBanksDesc::new(tokens, 2),
            masks: zeros(queue.stream, 2 * tokens)?,
            first: Apart::new(&Kind::Layer, &block.weights, desc, tokens, queue)?,
            second: Apart::new(&Kind::Layer, &bank.weights, &bank.desc, tokens, queue)?,
            tokens: Tokens::new(tokens, queue)?,
            d_x: zeros(queue.stream, tokens * desc.hidden)?,
        })
    }

    pub(super) fn run(
        &mut self,
        queue: Queue<'_>,
        block: &DeviceBlock,
        (x, dy): (In<'_, T>, In<'_, T>),
        inputs: BlockInputs<'_>,
        gradients: &mut BlockGradients<T>,
    ) -> Result<(), Error> {
        let reason = "types say which bank a token goes to";
        let missing = Error::Missing { operation: OPERATION, argument: "types", reason };
        let types = inputs.types.ok_or(missing)?;
        let (Kind::Banks(bank), Kind::Banks(of_bank)) = (&block.kind, &mut gradients.kind) else { return Ok(()) };
        let mut split = self.split;
        split.types = types.format();
        token_banks::forward(queue.kernels, queue.stream, &split, TokenBanksArgs::new(types, &mut self.masks))?;
        let count = self.tokens.count;
        if count == 0 {
            return Ok(());
        }
        let (first, second) = (self.masks.slice(..count), self.masks.slice(count..2 * count));
        let mut to =
            To { x: &mut gradients.x, previous: None, weights: &mut gradients.weights, kind: &mut Kind::Layer };
        let mask = TokenMask::attention(&first);
        self.first.run(queue, &block.weights, &Kind::Layer, (x, dy), (inputs, mask), &mut to)?;
        let mut to = To { x: &mut self.d_x, previous: None, weights: &mut of_bank.weights, kind: &mut Kind::Layer };
        let mask = TokenMask::attention(&second);
        self.second.run(queue, &bank.weights, &Kind::Layer, (x, dy), (inputs, mask), &mut to)?;
        self.tokens.add(queue, &self.d_x, block.desc.hidden, (&mut gradients.x).into())
    }
}
