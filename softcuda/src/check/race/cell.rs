//! Shadow cells: who touched some bytes last. A cell covers a power of two of bytes as one piece for as long as accesses cover
//! it whole, with lanes in order; else it has children, down to single bytes.

use super::clock::Away;
use crate::exec::observe::Scope;

/// An access as remembered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The home's time; 0 for none.
    pub time: u32,
    pub home: u32,
    /// Packed: see the methods.
    what: u64,
}

/// Shift of an access by lanes of which each touched every byte of the piece.
pub const MANY: u32 = 7;

const LINE: (u32, u32) = (0, 20);
const WARP: (u32, u32) = (20, 10);
const LANE: (u32, u32) = (30, 5);
const SHIFT: (u32, u32) = (35, 3);
const STRONG: (u32, u32) = (38, 1);
const SCOPE: (u32, u32) = (39, 2);
const KIND: (u32, u32) = (41, 2);
const LAUNCH: (u32, u32) = (43, 21);

/// A launch's number in a stamp.
pub fn launch_number(grid: u64) -> u32 {
    (grid & ((1 << LAUNCH.1) - 1)) as u32
}

/// What a stamp says besides place and time.
#[derive(Debug, Clone, Copy)]
pub struct What {
    pub line: u32,
    /// Index in the home.
    pub warp: u32,
    pub strong: bool,
    pub scope: Scope,
    /// 0 read, 1 write, 2 atomic.
    pub kind: u32,
    pub launch: u64,
}

impl Stamp {
    pub fn new(time: u32, home: u32, w: &What) -> Stamp {
        let put = |field: (u32, u32), value: u64| (value & ((1 << field.1) - 1)) << field.0;
        let what = put(LINE, u64::from(w.line.min((1 << LINE.1) - 1)))
            | put(WARP, w.warp.into())
            | put(STRONG, w.strong.into())
            | put(SCOPE, w.scope as u64)
            | put(KIND, w.kind.into())
            | put(LAUNCH, w.launch);
        Stamp { time, home, what }
    }

    #[inline(always)]
    fn get(self, field: (u32, u32)) -> u32 {
        (self.what >> field.0 & ((1 << field.1) - 1)) as u32
    }

    pub fn line(self) -> u32 {
        self.get(LINE)
    }

    #[inline(always)]
    pub fn warp(self) -> u32 {
        self.get(WARP)
    }

    pub fn strong(self) -> bool {
        self.get(STRONG) != 0
    }

    pub fn scope(self) -> Scope {
        [Scope::Cta, Scope::Cluster, Scope::Gpu, Scope::Sys][self.get(SCOPE) as usize]
    }

    pub fn kind(self) -> u32 {
        self.get(KIND)
    }

    /// Of the same launch.
    #[inline(always)]
    pub fn same_launch(self, other: Stamp) -> bool {
        (self.what ^ other.what) >> LAUNCH.0 == 0
    }

    /// The launch's number, as far as it is remembered.
    pub fn launch(self) -> u32 {
        self.get(LAUNCH)
    }

    /// The lane that touched the first byte, and the binary logarithm of the bytes of each lane, or [`MANY`].
    pub fn lanes(self) -> (u32, u32) {
        (self.get(LANE), self.get(SHIFT))
    }

    #[inline(always)]
    pub fn with_lanes(self, lane: u32, shift: u32) -> Stamp {
        let clear = !(0x1f << LANE.0 | 0x7 << SHIFT.0);
        Stamp { what: self.what & clear | u64::from(lane & 31) << LANE.0 | u64::from(shift) << SHIFT.0, ..self }
    }

    /// The lane that touched a byte of the piece.
    pub fn lane(self, offset: u32) -> u32 {
        let (lane, shift) = self.lanes();
        if shift == MANY { lane } else { (lane + (offset >> shift)) & 31 }
    }

    /// As seen from `offset` bytes into the piece.
    fn from(self, offset: u32) -> Stamp {
        self.with_lanes(self.lane(offset), self.lanes().1)
    }
}

/// Who accesses, with what it knows.
pub struct Accessor<'a> {
    /// All but the lanes.
    pub stamp: Stamp,
    pub write: bool,
    pub known: &'a [u32],
    pub away: &'a Away,
    /// Up to when all lanes of the warp know one another.
    pub lanes: u32,
    /// For lane m and lane l: up to when m knows l, where that is more.
    pub pairs: Option<&'a [[u32; 32]; 32]>,
    /// Indices of a block in its home.
    pub stride: u32,
    /// An asynchronous engine rather than lanes of a warp.
    pub engine: bool,
    /// Whether a conflict does no harm to the lane, for what it writes.
    pub benign: &'a dyn Fn(&Conflict, u32) -> bool,
    /// Whether nothing orders another launch, by number, before this one.
    pub beside: &'a dyn Fn(u32) -> bool,
    /// Of shared memory: what blocks before have left in its shadow is nothing.
    pub shared: bool,
}

/// The first pair of accesses that nothing orders.
#[derive(Debug, Clone, Copy)]
pub struct Conflict {
    pub other: Stamp,
    pub other_lane: u32,
    pub lane: u32,
}

impl Accessor<'_> {
    /// Whether a stamp tells of an access at all.
    #[inline(always)]
    fn live(&self, stamp: Stamp) -> bool {
        stamp.time != 0 && stamp.same_launch(self.stamp) && !(self.shared && stamp.home != self.stamp.home)
    }

    /// Nothing orders this access to a piece of `size` bytes after an earlier one: by which lanes.
    #[inline(always)]
    fn against(&self, other: Stamp, me: Stamp, size: u32) -> Option<Conflict> {
        if !self.live(other) {
            return if other.time == 0 || self.shared { None } else { self.against_launch(other, me) };
        }
        if other.home == me.home {
            let same_lanes = || other.lanes() == me.lanes() && me.lanes().1 != MANY;
            let warp = other.warp();
            // What an engine did before is known, or not, as what another one did: its copies are in no order.
            if if warp == me.warp() && !self.engine {
                self.lanes >= other.time || same_lanes()
            } else {
                self.known[warp as usize] >= other.time
            } {
                return None;
            }
        }
        self.against_slowly(other, me, size)
    }

    /// Whether a stamp tells of a launch that nothing orders before this one.
    #[inline(always)]
    fn is_beside(&self, stamp: Stamp) -> bool {
        stamp.time != 0 && !self.shared && !stamp.same_launch(self.stamp) && (self.beside)(stamp.launch())
    }

    /// As `against`, for an access of another launch.
    #[inline(never)]
    fn against_launch(&self, other: Stamp, me: Stamp) -> Option<Conflict> {
        let together = other.strong() && me.strong() && other.scope().min(me.scope()) >= Scope::Gpu;
        let conflict = !together && (self.beside)(other.launch());
        conflict.then(|| Conflict { other, other_lane: other.lane(0), lane: me.lane(0) })
    }

    #[inline(never)]
    fn against_slowly(&self, other: Stamp, me: Stamp, size: u32) -> Option<Conflict> {
        if self.together(other, me) {
            return None;
        }
        if other.home != me.home {
            let known = self.away.time(other.home, other.warp()) >= other.time;
            return (!known).then(|| Conflict { other, other_lane: other.lane(0), lane: me.lane(0) });
        }
        if other.warp() != me.warp() || self.engine {
            return Some(Conflict { other, other_lane: other.lane(0), lane: me.lane(0) });
        }
        if other.lanes().1 == MANY {
            // One of many lanes is another one than this.
            let mine = me.lane(0);
            let met = |p: &[[u32; 32]; 32]| (0..32).any(|l| l != mine as usize && p[mine as usize][l] >= other.time);
            let other_lane = if other.lane(0) == mine { (mine + 1) & 31 } else { other.lane(0) };
            return (!self.pairs.is_some_and(met)).then_some(Conflict { other, other_lane, lane: mine });
        }
        (0..size).find_map(|offset| {
            let (theirs, mine) = (other.lane(offset), me.lane(offset));
            let met = self.pairs.is_some_and(|p| p[mine as usize][theirs as usize] >= other.time);
            (theirs != mine && !met).then_some(Conflict { other, other_lane: theirs, lane: mine })
        })
    }

    /// Keeps the first conflict that matters, with a lane that it matters to.
    #[cold]
    fn note(&self, conflict: Conflict, me: Stamp, size: u32, found: &mut Option<Conflict>) {
        if found.is_some() {
            return;
        }
        let same_warp = conflict.other.home == me.home && conflict.other.warp() == me.warp();
        let lanes = if same_warp { conflict.lane..conflict.lane + 1 } else { me.lane(0)..me.lane(size - 1) + 1 };
        let lane = lanes.into_iter().find(|&lane| !(self.benign)(&conflict, lane));
        *found = lane.map(|lane| Conflict { lane, ..conflict });
    }

    /// Morally strong: both accesses are strong, and each one's scope includes the other's thread (PTX ISA 8.6).
    fn together(&self, a: Stamp, b: Stamp) -> bool {
        if !a.strong() || !b.strong() {
            return false;
        }
        let narrow = a.scope().min(b.scope());
        match narrow {
            Scope::Gpu | Scope::Sys => true,
            Scope::Cluster => a.home == b.home,
            Scope::Cta => a.home == b.home && a.warp() / self.stride == b.warp() / self.stride,
        }
    }
}

/// Launches besides the one that reads now whose reads a cell remembers.
const MOST_OTHERS: usize = 16;

/// Some bytes. `R` readers since the last write are remembered.
#[derive(Debug, Clone)]
pub struct Cell<const R: usize> {
    write: Stamp,
    reads: [Stamp; R],
    /// One pointer for all that few cells have: there are many cells, and their size is what the checker costs most by.
    rare: Option<Box<Rare<R>>>,
}

/// What few cells have.
#[derive(Debug, Clone, Default)]
struct Rare<const R: usize> {
    /// A read of each launch that nothing orders before those in the cell's `reads`.
    others: Vec<Stamp>,
    /// Whether accesses have cut the cell into pieces; where not, what `children` hold is stale.
    cut: bool,
    /// The pieces, as many first ones as there are: in place, so that the way to them is one step.
    children: [Cell<R>; MOST_CHILDREN],
}

impl<const R: usize> Default for Cell<R> {
    fn default() -> Self {
        Cell { write: Stamp::default(), reads: [Stamp::default(); R], rare: None }
    }
}

/// Most pieces of a cell.
const MOST_CHILDREN: usize = 8;

/// Bytes of a cell's children.
fn child_size(size: u32) -> u32 {
    match size {
        128 => 16,
        16 => 4,
        _ => 1,
    }
}

impl<const R: usize> Cell<R> {
    /// Lanes in order from `lane` on touch the bytes `from..to` of this cell's `size`, each `1 << shift` of them.
    #[inline(always)]
    pub fn access(
        &mut self,
        size: u32,
        (from, to): (u32, u32),
        lane: u32,
        shift: u32,
        by: &Accessor,
        found: &mut Option<Conflict>,
    ) {
        if from == 0 && to == size && self.rare.as_ref().is_none_or(|rare| !rare.cut) {
            self.touch(size, by.stamp.with_lanes(lane, shift), by, found);
        } else {
            self.access_parts(size, (from, to), (lane, shift), by, found);
        }
    }

    /// [`Cell::access`] piece by piece.
    fn access_parts(
        &mut self,
        size: u32,
        (from, to): (u32, u32),
        (lane, shift): (u32, u32),
        by: &Accessor,
        found: &mut Option<Conflict>,
    ) {
        let child = child_size(size);
        let children = self.children((size / child) as usize, child);
        for i in from / child..to.div_ceil(child) {
            let start = i * child;
            let (a, b) = (from.max(start), to.min(start + child));
            let first = if shift == MANY { lane } else { (lane + ((a - from) >> shift)) & 31 };
            children[i as usize].access(child, (a - start, b - start), first, shift, by, found);
        }
        if from == 0 && to == size && by.write {
            if let Some(rare) = &mut self.rare {
                rare.cut = false;
            }
            self.write = by.stamp.with_lanes(lane, shift);
            self.reads = [Stamp::default(); R];
        }
    }

    /// The `count` pieces of `size` bytes, cut now if they are not yet: each takes over what the whole remembers.
    fn children(&mut self, count: usize, size: u32) -> &mut [Cell<R>] {
        let rare = self.rare.get_or_insert_default();
        if !rare.cut {
            rare.cut = true;
            let others = std::mem::take(&mut rare.others);
            for (i, child) in (0..).zip(&mut rare.children[..count]) {
                child.write = self.write.from(i * size);
                child.reads = self.reads.map(|r| r.from(i * size));
                if let Some(rare) = &mut child.rare {
                    rare.cut = false;
                }
                if !others.is_empty() {
                    child.rare.get_or_insert_default().others.clone_from(&others);
                }
            }
        }
        &mut rare.children[..count]
    }

    fn touch(&mut self, size: u32, me: Stamp, by: &Accessor, found: &mut Option<Conflict>) {
        if !by.write && self.reads[0] == me {
            return;
        }
        if let Some(conflict) = by.against(self.write, me, size) {
            by.note(conflict, me, size, found);
        }
        if by.write {
            for &read in &self.reads {
                if let Some(conflict) = by.against(read, me, size) {
                    by.note(conflict, me, size, found);
                }
            }
            if let Some(rare) = &mut self.rare {
                for read in rare.others.drain(..) {
                    if let Some(conflict) = by.against(read, me, size) {
                        by.note(conflict, me, size, found);
                    }
                }
            }
            self.replace(me, by);
        } else {
            self.remember(me, by, size);
        }
    }

    /// A write takes the place of what was before. Behind a strong one, weak accesses still matter to other strong ones.
    fn replace(&mut self, me: Stamp, by: &Accessor) {
        if me.strong() {
            for read in &mut self.reads {
                if read.strong() {
                    *read = Stamp::default();
                }
            }
            if by.live(self.write) && !self.write.strong() {
                let place = self.reads.iter().position(|r| !by.live(*r)).unwrap_or(0);
                self.reads[place] = self.write;
            }
        } else {
            self.reads = [Stamp::default(); R];
        }
        self.write = me;
    }

    /// Keeps a reader, in place of an older one of the same warp or one that comes before it, if there is such a one.
    fn remember(&mut self, me: Stamp, by: &Accessor, size: u32) {
        let mut dead = None;
        for i in 0..R {
            let old = self.reads[i];
            if !by.live(old) {
                dead = dead.or(Some(i));
            } else if old.home == me.home && old.warp() == me.warp() {
                let met = old.lanes() == me.lanes() || by.lanes >= old.time;
                self.reads[i] = if met { me } else { me.with_lanes(me.lane(0), MANY) };
                self.reads.swap(0, i);
                return;
            }
        }
        let place = dead.or_else(|| self.reads.iter().position(|&r| by.against(r, me, size).is_none()));
        // One of the readers is forgotten: which one is as good as chance.
        let i = place.unwrap_or((me.time.wrapping_mul(0x9e37_79b9) >> 16) as usize % R);
        if by.is_beside(self.reads[i]) {
            self.set_aside(self.reads[i]);
        }
        self.reads[i] = me;
        self.reads.swap(0, i);
    }

    /// Keeps a reader of another launch that later writes may have to wait for as well, the first of its launch.
    #[cold]
    fn set_aside(&mut self, read: Stamp) {
        let rare = self.rare.get_or_insert_default();
        let others = &mut rare.others;
        if others.len() < MOST_OTHERS && !others.iter().any(|other| other.same_launch(read)) {
            others.push(read);
        }
    }
}
