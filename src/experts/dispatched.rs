//! Which rows belong to which expert and token: what a dispatch leaves on the device, and products and sums go by.
//!
//! The lists are numbers that kernels use as rows of buffers, so they are one value with what they are of. Only a dispatch fills it,
//! [`crate::capacity::lists::checked`] takes lists from elsewhere after a look at every entry, and [`Dispatched::from_lists`] is `unsafe`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use crate::runtime::launch::{Address, Held, SCALAR, Scope, VECTOR};
use crate::runtime::shape;
use crate::{Error, In};

/// One entry of the tile list: `[expert, first row, last row + 1, 0]`.
pub type TileEntry = [i32; 4];

/// Sizes of a dispatch's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlotShape {
    /// Tokens `T`.
    pub tokens: usize,
    /// Experts that rows go to, `E`.
    pub experts: usize,
    /// Choices of a token `k`; none where tokens have any number of experts (expert choice).
    pub top_k: Option<usize>,
    /// Rows of slot-ordered buffers.
    pub slots: usize,
    /// Rows of a tile.
    pub tile_m: usize,
    /// Entries that the tile list may have.
    pub max_tiles: usize,
}

impl SlotShape {
    /// `slots` rows of `experts` experts, from `tokens` tokens with `top_k` choices each (none: any number), in tiles of `tile_m` rows of which there
    /// are at most `max_tiles`.
    pub const fn new(
        tokens: usize,
        experts: usize,
        top_k: Option<usize>,
        slots: usize,
        tile_m: usize,
        max_tiles: usize,
    ) -> SlotShape {
        SlotShape { tokens, experts, top_k, slots, tile_m, max_tiles }
    }

    /// Entries of `token_slot`: one for each choice, or each slot.
    pub(crate) fn token_slots(&self) -> usize {
        self.top_k.map_or(self.slots, |top_k| self.tokens * top_k)
    }

    /// Entries of `token_offsets`.
    pub(crate) fn token_offsets(&self) -> usize {
        if self.top_k.is_some() { 0 } else { self.tokens + 1 }
    }

    pub(crate) fn validate(&self, operation: &'static str) -> Result<(), Error> {
        shape::size(operation, "rows.tokens", self.tokens)?;
        shape::experts_up_to(operation, self.experts, crate::MAX_COUNTED_EXPERTS)?;
        shape::size(operation, "rows.slots", self.slots)?;
        shape::positive(operation, "rows.tile_m", self.tile_m)?;
        shape::size(operation, "rows.max_tiles", self.max_tiles)?;
        if let Some(top_k) = self.top_k {
            shape::positive(operation, "rows.top_k", top_k)?;
            shape::product_i32(operation, "rows.top_k", &[self.tokens, top_k])?;
        }
        Ok(())
    }
}

/// The rows of every expert and of every token, on the device.
///
/// Made once for the largest shape, filled as often as wanted ([`crate::capacity::dispatch::forward`],
/// [`crate::routers::gating_dispatch::forward`], [`crate::routers::expert_choice::dispatch`]). Before it is filled it has no rows.
#[derive(Debug)]
pub struct Dispatched {
    shape: SlotShape,
    /// What the buffers were made for.
    most: SlotShape,
    /// Whether counts and offsets say which rows the tiles cover.
    ranges: bool,
    counts: CudaSlice<i32>,
    offsets: CudaSlice<i32>,
    slot_token: CudaSlice<i32>,
    token_slot: CudaSlice<i32>,
    token_offsets: CudaSlice<i32>,
    slot_weight: CudaSlice<f32>,
    tiles: CudaSlice<TileEntry>,
    num_tiles: CudaSlice<i32>,
}

impl Dispatched {
    /// Allocates lists for dispatches of at most this shape, in stream order.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`] for the shape; [`Error::Driver`], out of memory included.
    pub fn new(stream: &Arc<CudaStream>, most: &SlotShape) -> Result<Dispatched, Error> {
        const OPERATION: &str = "dispatched";
        most.validate(OPERATION)?;
        let list = |elements: usize| stream.alloc_zeros::<i32>(elements.max(1)).map_err(Error::driver(OPERATION));
        Ok(Dispatched {
            shape: SlotShape { tokens: 0, slots: 0, max_tiles: 0, ..*most },
            most: *most,
            ranges: true,
            counts: list(most.experts)?,
            offsets: list(most.experts + 1)?,
            slot_token: list(most.slots)?,
            token_slot: list(most.token_slots())?,
            token_offsets: list(most.token_offsets())?,
            slot_weight: stream.alloc_zeros(most.slots.max(1)).map_err(Error::driver(OPERATION))?,
            tiles: stream.alloc_zeros(most.max_tiles.max(1)).map_err(Error::driver(OPERATION))?,
            num_tiles: list(1)?,
        })
    }

    /// All of `rows` rows as those of one expert, for products along K that gather nothing: what these do not read is not there.
    pub(crate) fn of_one_expert(stream: &Arc<CudaStream>, rows: usize) -> Result<Dispatched, Error> {
        const OPERATION: &str = "dispatched";
        let shape = Dispatched::shape_of_one_expert(rows);
        let mut lists = Dispatched::new(stream, &SlotShape { tokens: 0, slots: 0, ..shape })?;
        let upload = |values: &[i32], list: &mut CudaSlice<i32>| {
            stream.memcpy_htod(values, list).map_err(Error::driver(OPERATION))
        };
        upload(&[rows as i32], &mut lists.counts)?;
        upload(&[0, rows as i32], &mut lists.offsets)?;
        Ok(Dispatched { shape, ..lists })
    }

    /// The shape of [`Dispatched::of_one_expert`].
    pub(crate) const fn shape_of_one_expert(rows: usize) -> SlotShape {
        SlotShape { tokens: rows, experts: 1, top_k: Some(1), slots: rows, tile_m: 1, max_tiles: 0 }
    }

    /// Bytes of what [`Dispatched::new`] allocates.
    pub(crate) fn bytes_of(most: &SlotShape) -> usize {
        let lists =
            [most.experts, most.experts + 1, most.slots, most.token_slots(), most.token_offsets(), most.slots, 1];
        let words: usize = lists.into_iter().map(|elements| elements.max(1)).sum();
        4 * words + size_of::<TileEntry>() * most.max_tiles.max(1)
    }

    /// Bytes of [`Dispatched::of_one_expert`].
    pub(crate) fn bytes_of_one_expert() -> usize {
        Dispatched::bytes_of(&Dispatched::shape_of_one_expert(0))
    }

    /// Takes lists from elsewhere as they are.
    ///
    /// # Safety
    /// On the stream of every later use, with `shape`:
    /// - `num_tiles[0]` is 0 to `max_tiles`; each of so many entries `[expert, first, end, _]` of `tiles` has an expert in `0..experts`, and
    ///   `0 <= first < end <= slots`, `end - first <= tile_m`, and no two cover the same row;
    /// - `slot_token` of each covered row is in `0..tokens`;
    /// - `token_slot [tokens, top_k]` has rows in `0..slots`, or negative numbers for none. Without `top_k`, `token_offsets [tokens + 1]` rises from
    ///   0 to at most `slots`, and so many first entries of `token_slot` are in `0..slots`;
    /// - where [`crate::experts::k_grouped`] goes by them, each expert's tiles cover the rows `offsets[e]..offsets[e] + counts[e]` and no others.
    ///
    /// # Errors
    /// [`Error::BufferTooShort`], and those of [`Dispatched::new`].
    #[allow(unsafe_code)]
    pub unsafe fn from_lists(shape: &SlotShape, lists: Lists) -> Result<Dispatched, Error> {
        Dispatched::unchecked("dispatched", shape, lists, true)
    }

    /// Lists of which only the lengths are looked at: for whoever looks at the rest. `ranges`: whether counts and offsets agree with the tiles.
    pub(crate) fn unchecked(
        operation: &'static str,
        shape: &SlotShape,
        lists: Lists,
        ranges: bool,
    ) -> Result<Dispatched, Error> {
        shape.validate(operation)?;
        let check = |argument, got: usize, needed: usize| {
            if got < needed {
                return Err(Error::BufferTooShort { operation, argument, needed, got });
            }
            Ok(())
        };
        check("counts", lists.counts.len(), shape.experts)?;
        check("offsets", lists.offsets.len(), shape.experts + 1)?;
        check("slot_token", lists.slot_token.len(), shape.slots)?;
        check("token_slot", lists.token_slot.len(), shape.token_slots())?;
        check("token_offsets", lists.token_offsets.len(), shape.token_offsets())?;
        check("slot_weight", lists.slot_weight.len(), shape.slots)?;
        check("tiles", lists.tiles.len(), shape.max_tiles)?;
        check("num_tiles", lists.num_tiles.len(), 1)?;
        let Lists { counts, offsets, slot_token, token_slot, token_offsets, slot_weight, tiles, num_tiles } = lists;
        Ok(Dispatched {
            shape: *shape,
            most: *shape,
            ranges,
            counts,
            offsets,
            slot_token,
            token_slot,
            token_offsets,
            slot_weight,
            tiles,
            num_tiles,
        })
    }

    /// Whether counts and offsets say which rows the tiles cover.
    pub(crate) fn knows_ranges(&self) -> bool {
        self.ranges
    }

    /// The same where a look at them said so.
    pub(crate) fn with_ranges(self, ranges: bool) -> Dispatched {
        Dispatched { ranges, ..self }
    }

    /// Sizes of what was dispatched last.
    pub fn shape(&self) -> &SlotShape {
        &self.shape
    }

    /// `[E]`: slots of each expert.
    pub fn counts(&self) -> &CudaSlice<i32> {
        &self.counts
    }

    /// `[E + 1]`: first row of each expert, then the number of rows.
    pub fn offsets(&self) -> &CudaSlice<i32> {
        &self.offsets
    }

    /// `[slots]`: token of each row. In the padded layout -1 for an unfilled row; in the other, entries from `offsets[E]` on mean nothing.
    pub fn slot_token(&self) -> &CudaSlice<i32> {
        &self.slot_token
    }

    /// `[T, k]`: row of each slot, -1 for one that was skipped or dropped. For ragged tokens `[slots]`: the rows of each token, ascending,
    /// from `token_offsets[t]` on.
    pub fn token_slot(&self) -> &CudaSlice<i32> {
        &self.token_slot
    }

    /// `[T + 1]` for ragged tokens: where each token's rows begin in `token_slot`.
    pub fn token_offsets(&self) -> &CudaSlice<i32> {
        &self.token_offsets
    }

    /// `[slots]`: weight of each row; as allocated where the dispatch had no weights.
    pub fn slot_weight(&self) -> &CudaSlice<f32> {
        &self.slot_weight
    }

    /// `[max_tiles]`: the tiles of the products.
    pub fn tiles(&self) -> &CudaSlice<TileEntry> {
        &self.tiles
    }

    /// `[1]`: entries of `tiles`.
    pub fn num_tiles(&self) -> &CudaSlice<i32> {
        &self.num_tiles
    }

    /// Opens everything for a dispatch of `shape`; the value is of that shape once the launch is made ([`Filling::filled`]).
    pub(crate) fn fill<'b>(&'b mut self, scope: &Scope<'b>, shape: &SlotShape) -> Result<Filling<'b>, Error> {
        shape.validate(scope.operation)?;
        let most = &self.most;
        let fits = [
            ("dispatched.tokens", most.tokens, shape.tokens),
            ("dispatched.experts", most.experts, shape.experts),
            ("dispatched.slots", most.slots, shape.slots),
            ("dispatched.token_slot", most.token_slots(), shape.token_slots()),
            ("dispatched.token_offsets", most.token_offsets(), shape.token_offsets()),
            ("dispatched.max_tiles", most.max_tiles, shape.max_tiles),
        ];
        for (argument, got, needed) in fits {
            if got < needed {
                return Err(Error::BufferTooShort { operation: scope.operation, argument, needed, got });
            }
        }
        let Dispatched {
            shape: filled,
            ranges,
            counts,
            offsets,
            slot_token,
            token_slot,
            token_offsets,
            slot_weight,
            tiles,
            num_tiles,
            ..
        } = self;
        Ok(Filling {
            counts: scope.write("counts", counts.into(), shape.experts, SCALAR)?,
            offsets: scope.write("offsets", offsets.into(), shape.experts + 1, SCALAR)?,
            slot_token: scope.write("slot_token", slot_token.into(), shape.slots, SCALAR)?,
            token_slot: scope.write("token_slot", token_slot.into(), shape.token_slots(), SCALAR)?,
            token_offsets: scope.write("token_offsets", token_offsets.into(), shape.token_offsets(), SCALAR)?,
            slot_weight: scope.write("slot_weight", slot_weight.into(), shape.slots, SCALAR)?,
            tiles: scope.write("tiles", tiles.into(), shape.max_tiles, VECTOR)?,
            num_tiles: scope.write("num_tiles", num_tiles.into(), 1, SCALAR)?,
            place: (filled, ranges),
            shape: *shape,
        })
    }

    /// Opens everything for reading.
    pub(crate) fn read<'b>(&'b self, scope: &Scope<'b>) -> Result<Reading<'b>, Error> {
        let read = |argument, list: &'b CudaSlice<i32>| scope.read(argument, list.into(), 0, SCALAR);
        Ok(Reading {
            counts: read("counts", &self.counts)?,
            offsets: read("offsets", &self.offsets)?,
            slot_token: read("slot_token", &self.slot_token)?,
            token_slot: read("token_slot", &self.token_slot)?,
            token_offsets: read("token_offsets", &self.token_offsets)?,
            slot_weight: scope.read("slot_weight", In::from(&self.slot_weight), 0, SCALAR)?,
            tiles: scope.read("tiles", In::from(&self.tiles), 0, VECTOR)?,
            num_tiles: read("num_tiles", &self.num_tiles)?,
        })
    }
}

/// Lists that somebody else filled; see [`Dispatched`] for what each holds. One that is not needed may be empty.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Lists {
    pub counts: CudaSlice<i32>,
    pub offsets: CudaSlice<i32>,
    pub slot_token: CudaSlice<i32>,
    pub token_slot: CudaSlice<i32>,
    pub token_offsets: CudaSlice<i32>,
    pub slot_weight: CudaSlice<f32>,
    pub tiles: CudaSlice<TileEntry>,
    pub num_tiles: CudaSlice<i32>,
}

/// Lists opened for a dispatch.
pub(crate) struct Filling<'a> {
    counts: Held<'a>,
    offsets: Held<'a>,
    slot_token: Held<'a>,
    token_slot: Held<'a>,
    token_offsets: Held<'a>,
    slot_weight: Held<'a>,
    tiles: Held<'a>,
    num_tiles: Held<'a>,
    /// Shape of the lists, and whether counts and offsets are those of the tiles.
    place: (&'a mut SlotShape, &'a mut bool),
    shape: SlotShape,
}

impl Filling<'_> {
    pub(crate) fn addresses(&self) -> ListAddresses<'_> {
        ListAddresses {
            counts: self.counts.address(),
            offsets: self.offsets.address(),
            slot_token: self.slot_token.address(),
            token_slot: self.token_slot.address(),
            token_offsets: self.token_offsets.address(),
            slot_weight: self.slot_weight.address(),
            tiles: self.tiles.address(),
            num_tiles: self.num_tiles.address(),
        }
    }

    /// The result for no tokens: counts, offsets and the number of tiles are zero.
    pub(crate) fn zero(&self, scope: &Scope<'_>) -> Result<(), Error> {
        self.addresses().zero(scope, &self.shape)
    }

    /// The lists are of the new shape from here on, in stream order.
    pub(crate) fn filled(self) {
        (*self.place.0, *self.place.1) = (self.shape, true);
    }
}

/// Lists opened for products and sums.
pub(crate) struct Reading<'a> {
    counts: Held<'a>,
    offsets: Held<'a>,
    slot_token: Held<'a>,
    token_slot: Held<'a>,
    token_offsets: Held<'a>,
    slot_weight: Held<'a>,
    tiles: Held<'a>,
    num_tiles: Held<'a>,
}

impl Reading<'_> {
    /// Of `experts` experts: the number of rows, and each row's token.
    pub(crate) fn live(&self, experts: usize) -> (Address<'_>, Address<'_>) {
        (self.offsets.address().offset(experts * size_of::<i32>()), self.slot_token.address())
    }

    pub(crate) fn addresses(&self) -> RowAddresses<'_> {
        RowAddresses {
            counts: self.counts.address(),
            offsets: self.offsets.address(),
            slot_token: self.slot_token.address(),
            token_slot: self.token_slot.address(),
            token_offsets: self.token_offsets.address(),
            slot_weight: self.slot_weight.address(),
            tiles: self.tiles.address(),
            num_tiles: self.num_tiles.address(),
        }
    }
}

/// Where a dispatch writes.
#[derive(Clone, Copy)]
pub(crate) struct ListAddresses<'a> {
    pub(crate) counts: Address<'a>,
    pub(crate) offsets: Address<'a>,
    pub(crate) slot_token: Address<'a>,
    pub(crate) token_slot: Address<'a>,
    pub(crate) token_offsets: Address<'a>,
    pub(crate) slot_weight: Address<'a>,
    pub(crate) tiles: Address<'a>,
    pub(crate) num_tiles: Address<'a>,
}

impl<'a> ListAddresses<'a> {
    /// As products and sums read them.
    pub(crate) fn rows(self) -> RowAddresses<'a> {
        RowAddresses {
            counts: self.counts,
            offsets: self.offsets,
            slot_token: self.slot_token,
            token_slot: self.token_slot,
            token_offsets: self.token_offsets,
            slot_weight: self.slot_weight,
            tiles: self.tiles,
            num_tiles: self.num_tiles,
        }
    }

    /// Of `experts` experts: the number of rows, and each row's token.
    pub(crate) fn live(self, experts: usize) -> (Address<'a>, Address<'a>) {
        (self.offsets.offset(experts * size_of::<i32>()), self.slot_token)
    }

    /// The result for no tokens.
    pub(crate) fn zero(self, scope: &Scope<'_>, shape: &SlotShape) -> Result<(), Error> {
        scope.zero(self.counts, shape.experts * size_of::<i32>())?;
        scope.zero(self.offsets, (shape.experts + 1) * size_of::<i32>())?;
        scope.zero(self.token_offsets, shape.token_offsets() * size_of::<i32>())?;
        scope.zero(self.num_tiles, size_of::<i32>())
    }
}

/// What products and sums read.
#[derive(Clone, Copy)]
pub(crate) struct RowAddresses<'a> {
    pub(crate) counts: Address<'a>,
    pub(crate) offsets: Address<'a>,
    pub(crate) slot_token: Address<'a>,
    pub(crate) token_slot: Address<'a>,
    pub(crate) token_offsets: Address<'a>,
    pub(crate) slot_weight: Address<'a>,
    pub(crate) tiles: Address<'a>,
    pub(crate) num_tiles: Address<'a>,
}
