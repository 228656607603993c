//! Lists of a dispatch that somebody else made, looked at before anything goes by them.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::experts::{Dispatched, Lists, SlotShape};
use crate::registry::Kernel;
use crate::runtime::launch::Scope;
use crate::runtime::params::CheckListsParams;
use crate::{Error, Kernels, Selection};

const OPERATION: &str = "lists";

/// What the kernel calls each list, in its order.
const KINDS: [(&str, &str); 5] = [
    ("num_tiles", "0 to max_tiles"),
    ("tiles", "an expert below `experts`, and 1 to tile_m rows below `slots` behind the tile before it"),
    ("slot_token", "a token below `tokens` for every row of a tile"),
    ("token_slot", "a row below `slots`, or with choices a negative number for none"),
    ("token_offsets", "0, then no less than the one before and at most `slots`"),
];

/// Takes `lists` of `shape` as a dispatch, if every entry that products and sums go by is right.
///
/// Waits for the device, once: meant for lists that are used often. What must hold is what [`Dispatched::from_lists`] asks, and that tiles
/// stand in the order of their rows. Counts and offsets may be anything where nothing goes by them: [`crate::experts::k_grouped`] refuses a
/// dispatch whose are not those of the tiles.
///
/// # Errors
/// [`Error::Invalid`] that names the list and the first entry that is wrong; [`Error::BufferTooShort`], [`Error::Overflow`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn checked(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    shape: &SlotShape,
    lists: Lists,
) -> Result<Dispatched, Error> {
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    let dispatched = Dispatched::unchecked(OPERATION, shape, lists, false)?;
    let mut status = stream.clone_htod(&[u64::MAX]).map_err(Error::driver(OPERATION))?;
    {
        let list = dispatched.read(&scope)?;
        let at = list.addresses();
        let held = scope.write("status", (&mut status).into(), 1, size_of::<u64>() as u64)?;
        let most = shape.max_tiles.max(shape.token_slots()).max(shape.token_offsets());
        let threads = Kernel::CheckLists.threads() as usize;
        let blocks = most.div_ceil(threads).clamp(1, 8 * kernels.device().multiprocessors as usize) as u32;
        scope.launch(
            &Selection::new(Kernel::CheckLists, [blocks, 1, 1]),
            CheckListsParams {
                tiles: at.tiles.into(),
                num_tiles: at.num_tiles.into(),
                slot_token: at.slot_token.into(),
                token_slot: at.token_slot.into(),
                token_offsets: shape.top_k.is_none().then_some(at.token_offsets).into(),
                status: held.address().into(),
                tokens: shape.tokens as u32,
                experts: shape.experts as u32,
                slots: shape.slots as u32,
                tile_m: shape.tile_m as u32,
                max_tiles: shape.max_tiles as u32,
                token_slots: shape.token_slots() as u32,
            },
        )?;
    }
    let [first] = stream.clone_dtoh(&status).map_err(Error::driver(OPERATION))?[..] else {
        return Err(Error::invalid(OPERATION, "status", "one word", status.len()));
    };
    if first == u64::MAX {
        let ranges = dispatched.ranges_of_tiles(stream)?;
        return Ok(dispatched.with_ranges(ranges));
    }
    let (kind, index) = ((first >> 32) as usize, first as u32 as usize);
    let (argument, expected) = KINDS[kind.min(KINDS.len() - 1)];
    let value = dispatched.entry(stream, argument, index)?;
    Err(Error::invalid(OPERATION, argument, expected, format!("{value} at {index}")))
}

impl Dispatched {
    /// Whether counts and offsets say which rows the tiles cover.
    fn ranges_of_tiles(&self, stream: &Arc<CudaStream>) -> Result<bool, Error> {
        let experts = self.shape().experts;
        let read = |list| stream.clone_dtoh::<i32, _>(list).map_err(Error::driver(OPERATION));
        let (counts, offsets, num_tiles) = (read(self.counts())?, read(self.offsets())?, read(self.num_tiles())?);
        let tiles = stream.clone_dtoh(self.tiles()).map_err(Error::driver(OPERATION))?;
        // Tiles in the order of their rows: each begins where its expert's last one ended.
        let mut next: Vec<i64> = offsets[..experts].iter().map(|&first| first.into()).collect();
        for &[expert, first, end, _] in &tiles[..num_tiles[0] as usize] {
            let next = &mut next[expert as usize];
            if *next != i64::from(first) {
                return Ok(false);
            }
            *next = end.into();
        }
        let ends = offsets[..experts].iter().zip(&counts).map(|(&first, &count)| i64::from(first) + i64::from(count));
        Ok(next.into_iter().eq(ends))
    }

    /// Entry `index` of a list, for people to read.
    fn entry(&self, stream: &Arc<CudaStream>, list: &'static str, index: usize) -> Result<String, Error> {
        let failed = Error::driver(OPERATION);
        if list == "tiles" {
            let tile = stream.clone_dtoh(&self.tiles().slice(index..index + 1)).map_err(failed)?;
            return Ok(format!("{:?}", tile[0]));
        }
        let list = match list {
            "num_tiles" => self.num_tiles(),
            "slot_token" => self.slot_token(),
            "token_slot" => self.token_slot(),
            _ => self.token_offsets(),
        };
        Ok(stream.clone_dtoh(&list.slice(index..index + 1)).map_err(failed)?[0].to_string())
    }
}
