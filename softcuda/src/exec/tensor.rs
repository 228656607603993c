//! Tensor copies in tile mode (PTX ISA 9.7.9.27.1), and tensor maps changed by programs (9.7.9.28, 9.7.13.16).

use super::access::{addresses, get, space_of};
use super::bulk::{Convert, Effect, GLOBAL, Piece, Transfer};
use super::copies::policy_of;
use super::fault::FaultKind;
use super::lanes::{File, LANES, active};
use super::mbarrier_ops::Place;
use super::observe::{AccessKind, Engine, ProxyFence, SyncEvent, Touch};
use super::policy::Policy;
use super::state::{Machine, Outcome, Raw};
use crate::lower::ir::AtomOp;
use crate::lower::ir_bulk::{TensorCopy, TensorDirection, TensormapOp, reduction_allowed};
use crate::ptx::ast::{Space, Type};
use crate::tensormap::{BYTES, Element, MAX_RANK, Swizzle, TensorMap};

/// Alignment of a tile in shared memory (CUDA programming guide, alignment of multi-dimensional bulk tensor copies).
const TILE_ALIGN: u64 = 128;
/// Alignment of tensor maps (driver API, `cuTensorMapEncodeTiled`).
const MAP_ALIGN: u64 = 64;

fn illegal<T>(lane: usize, text: String) -> Outcome<T> {
    Err(Raw::new(FaultKind::IllegalInstruction, 1 << lane, text))
}

/// A run of bytes that lie together at both ends: their place in the tile, and in global memory where they are in the tensor.
struct Run {
    tile: u64,
    global: Option<u64>,
    bytes: u32,
}

/// The tile at `corner`, row by row.
fn runs(map: &TensorMap, corner: &[i64; MAX_RANK]) -> Vec<Run> {
    let size = i64::from(map.element.bytes());
    let extents: [u32; MAX_RANK] = std::array::from_fn(|i| if i < map.rank { map.extent(i) } else { 1 });
    let rows: u64 = extents[1..].iter().map(|&n| u64::from(n)).product();
    let width = i64::from(extents[0]);
    // The part of a row that is in the tensor.
    let from = (-corner[0]).clamp(0, width);
    let to = (map.dims[0] as i64 - corner[0]).clamp(from, width);
    let mut out = Vec::with_capacity(rows as usize);
    let mut index = [0u32; MAX_RANK];
    for row in 0..rows {
        let mut inside = true;
        let mut start = map.address as i64 + corner[0] * size;
        for i in 1..map.rank {
            let at = corner[i] + i64::from(index[i]) * i64::from(map.steps[i]);
            inside &= at >= 0 && at < map.dims[i] as i64;
            start += at * map.strides[i - 1] as i64;
        }
        let base = row as i64 * width * size;
        let mut push = |a: i64, b: i64, global: Option<u64>| {
            if a < b {
                out.push(Run { tile: (base + a * size) as u64, global, bytes: ((b - a) * size) as u32 });
            }
        };
        if inside {
            push(0, from, None);
            push(from, to, Some((start + from * size) as u64));
            push(to, width, None);
        } else {
            push(0, width, None);
        }
        for i in 1..map.rank {
            index[i] += 1;
            if index[i] < extents[i] {
                break;
            }
            index[i] = 0;
        }
    }
    out
}

/// Cuts a run where the swizzle takes its bytes apart: calls `f` with offsets in the block's shared memory, how far into the
/// run, and lengths.
fn swizzled(swizzle: Swizzle, at: u64, bytes: u32, mut f: impl FnMut(u64, u64, u32)) {
    if swizzle == Swizzle::None {
        return f(at, 0, bytes);
    }
    let mut done = 0;
    while done < u64::from(bytes) {
        let here = at + done;
        let n = (16 - here % 16).min(u64::from(bytes) - done);
        f(swizzle.apply(here), done, n as u32);
        done += n;
    }
}

/// What elements outside the tensor read as.
fn fill(map: &TensorMap) -> [u8; 8] {
    if !map.fill_nan {
        return [0; 8];
    }
    // A quiet NaN of all ones but for the sign, which no arithmetic makes.
    let mut pattern = [0xff; 8];
    let size = map.element.bytes() as usize;
    pattern.iter_mut().enumerate().filter(|(i, _)| i % size == size - 1).for_each(|(_, b)| *b = 0x7f);
    pattern
}

/// The type in which a reduction combines elements; `None` where there is no such reduction.
fn reduction(op: AtomOp, element: Element) -> Option<Type> {
    let ty = match (op, element.ty()) {
        (AtomOp::And | AtomOp::Or | AtomOp::Xor, Type::U32 | Type::S32) => Type::B32,
        (AtomOp::And | AtomOp::Or | AtomOp::Xor, Type::U64 | Type::S64) => Type::B64,
        (_, Type::F64) => return None,
        (_, ty) => ty,
    };
    reduction_allowed(op, ty, false).then_some(ty)
}

impl Machine<'_, '_> {
    /// Reads the tensor map at a generic address, through its own proxy.
    fn tensor_map(&mut self, address: u64, lane: usize, pc: u32) -> Outcome<TensorMap> {
        let space = space_of(address);
        if !matches!(space, Space::Global | Space::Param) {
            let text = format!("a tensor map at {address:#x}: it must be in param, const or global memory");
            return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << lane, text));
        }
        let bytes = self.map_bytes(None, address, lane)?;
        if space == Space::Global {
            let mut at = [0; LANES];
            (0..8).for_each(|i| at[i] = address + 16 * i as u64);
            let touch = Touch::weak(AccessKind::Read, Some(Space::Global), &at, 0xff, 16);
            self.observe(&Touch { engine: Engine::Tensormap, ..touch }, pc);
        }
        // SAFETY: `map_bytes` has checked all 128.
        match TensorMap::decode(unsafe { &*bytes }) {
            Ok(map) => Ok(map),
            Err(flaw) => illegal(lane, format!("the tensor map at {address:#x} is not usable: {flaw}")),
        }
    }

    /// Host address of a tensor map's bytes, which are all there.
    fn map_bytes(&mut self, space: Option<Space>, address: u64, lane: usize) -> Outcome<*mut [u8; BYTES]> {
        self.resolve_lane(space, address + MAP_ALIGN, lane, MAP_ALIGN as u32)?;
        Ok(self.resolve_lane(space, address, lane, MAP_ALIGN as u32)? as *mut [u8; BYTES])
    }

    pub fn tensor_copy(&mut self, file: File, x: &TensorCopy, lane: usize, pc: u32) -> Outcome<()> {
        let map = self.tensor_map(addresses(file, &x.map)[lane], lane, pc)?;
        if map.rank != x.coordinates.len() {
            let text = format!("{} coordinates for a tensor of {} dimensions", x.coordinates.len(), map.rank);
            return illegal(lane, text);
        }
        let mut corner = [0; MAX_RANK];
        for (c, r) in corner.iter_mut().zip(&x.coordinates) {
            *c = i64::from(get(file, *r)[lane] as i32);
        }
        let Some(tile) = &x.tile else { return Ok(()) };
        let at = addresses(file, tile)[lane];
        if !at.is_multiple_of(TILE_ALIGN) {
            let text = format!("the tile {at:#x} of a tensor copy is not a multiple of {TILE_ALIGN}");
            let mut raw = Raw::new(FaultKind::MisalignedAddress, 1 << lane, text);
            raw.address = Some(at);
            return Err(raw);
        }
        let bytes = map.tile_bytes();
        let (place, host) = self.shared_range(Some(x.tile_space), at, bytes, lane)?;
        let load = x.direction == TensorDirection::Load;
        let mut transfer = Transfer::new(Vec::new(), Effect::Copy);
        transfer.from_shared = !load;
        let mut receivers = vec![place.0];
        if load {
            transfer.fill = fill(&map);
            transfer.convert = match map.element {
                Element::F32Flush => Some(Convert::FlushF32),
                Element::TF32 => Some(Convert::Tf32),
                Element::TF32Flush => Some(Convert::Tf32Flush),
                _ => None,
            };
            let masked = match x.multicast {
                Some(mask) => Some(self.receivers(get(file, mask)[lane] as u32 & 0xffff, lane)?),
                None => None,
            };
            let mbarrier = x.mbarrier.as_ref().map_or(0, |a| addresses(file, a)[lane]);
            let space = Some(x.tile_space);
            transfer.signals = self.signals(mbarrier, place, space, masked.as_deref(), bytes as u32, lane)?;
            receivers = masked.unwrap_or(receivers);
        } else {
            if let Some(i) = (0..map.rank).find(|&i| corner[i] < 0) {
                let text = format!("coordinate {i} of a tensor store is {}; it must not be negative", corner[i]);
                return illegal(lane, text);
            }
            transfer.group = Some(self.warp.bulk_committed[lane]);
            if let TensorDirection::Reduce(op) = x.direction {
                match reduction(op, map.element) {
                    Some(ty) => transfer.effect = Effect::Reduce(op, ty),
                    None => return illegal(lane, format!("a tensor reduction {op:?} of elements {:?}", map.element)),
                }
            }
        }
        for run in runs(&map, &corner) {
            if let Some(global) = run.global {
                self.global_range(global, run.bytes.into(), lane)?;
            } else if !load {
                continue;
            }
            for &rank in &receivers {
                let host = self.same_place(rank, place, host, bytes, lane)?;
                self.add_run(&mut transfer, &map, &run, (rank, place.1), host, lane)?;
            }
        }
        self.warp.policy = policy_of(file, x.policy, lane);
        self.issue(transfer, lane, pc);
        self.warp.policy = Policy::default();
        Ok(())
    }

    /// The pieces of one run between global memory and the tile at `host`, which has this place.
    fn add_run(
        &mut self,
        transfer: &mut Transfer,
        map: &TensorMap,
        run: &Run,
        place: Place,
        host: u64,
        lane: usize,
    ) -> Outcome<()> {
        let load = !transfer.from_shared;
        let (rank, base) = (place.0, u64::from(place.1));
        let size = u64::from(self.block_of(rank).bytes);
        let mut beyond = None;
        swizzled(map.swizzle, base + run.tile, run.bytes, |offset, into, bytes| {
            if offset + u64::from(bytes) > size {
                beyond = Some(offset);
            }
            let shared = host.wrapping_add(offset).wrapping_sub(base);
            let global = run.global.map_or(0, |g| g + into);
            let (rank, to, from) = if load { (rank, shared, global) } else { (GLOBAL, global, shared) };
            transfer.pieces.push(Piece { rank, to, from, bytes });
        });
        match beyond {
            None => Ok(()),
            Some(offset) => {
                let text = format!(
                    "the swizzle takes a tensor copy to {offset:#x}; the block's shared memory is {size} bytes"
                );
                Err(Raw::new(FaultKind::IllegalAddress, 1 << lane, text))
            }
        }
    }

    /// `tensormap.replace` and `tensormap.cp_fenceproxy`; `true` if the running group simply goes on.
    pub fn tensormap_op(&mut self, file: File, x: &TensormapOp, pc: u32, mask: u32) -> Outcome<bool> {
        match x {
            TensormapOp::Replace { space, map, field, value, shift } => {
                let (at, value) = (addresses(file, map), get(file, *value));
                for lane in active(mask) {
                    if space.is_none() && !matches!(space_of(at[lane]), Space::Global | Space::Shared) {
                        let text = format!("a tensor map at {:#x}, neither in global nor in shared memory", at[lane]);
                        return Err(Raw::new(FaultKind::InvalidAddressSpace, 1 << lane, text));
                    }
                    let bytes = self.map_bytes(*space, at[lane], lane)?;
                    self.observe_map(AccessKind::Write, *space, at[lane], pc);
                    // SAFETY: `map_bytes` has checked all 128.
                    if let Err(flaw) = field.replace(unsafe { &mut *bytes }, value[lane] << shift) {
                        return illegal(lane, format!("`tensormap.replace` at {:#x}: {flaw}", at[lane]));
                    }
                }
                Ok(true)
            }
            TensormapOp::CopyFence { to, from, scope } => {
                if !self.converged(pc, mask)? {
                    return Ok(false);
                }
                let mask = self.warp.live();
                let (to, from) = (addresses(file, to), addresses(file, from));
                let lane = mask.trailing_zeros() as usize;
                if active(mask).any(|i| (to[i], from[i]) != (to[lane], from[lane])) {
                    return illegal(lane, "`tensormap.cp_fenceproxy` with operands that differ among the lanes".into());
                }
                let source = self.map_bytes(Some(Space::Shared), from[lane], lane)?;
                let destination = self.map_bytes(Some(Space::Global), to[lane], lane)?;
                self.observe_map(AccessKind::Read, Some(Space::Shared), from[lane], pc);
                self.observe_map(AccessKind::Write, Some(Space::Global), to[lane], pc);
                // SAFETY: `map_bytes` has checked all 128 of both.
                unsafe { *destination = *source };
                let kind = ProxyFence::TensormapRelease(*scope);
                self.observe_sync(SyncEvent::ProxyFence { kind, mask }, pc);
                self.step();
                Ok(false)
            }
        }
    }

    fn observe_map(&mut self, kind: AccessKind, space: Option<Space>, address: u64, pc: u32) {
        let mut at = [0; LANES];
        (0..8).for_each(|i| at[i] = address + 16 * i as u64);
        self.observe(&Touch::weak(kind, space, &at, 0xff, 16), pc);
    }
}
