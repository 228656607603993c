//! What is in flight in a cluster, and which words of shared memory it holds.

use rustc_hash::FxHashMap;
use std::collections::BTreeMap;

use crate::check::Place;
use crate::exec::observe::Site;
use crate::lower::Kernel;

/// Bytes of a word.
pub const WORD: u64 = 4;

/// A lane at a line of the launch's kernel: a [`Place`] that costs nothing until it is told.
#[derive(Debug, Clone, Copy)]
pub struct Spot {
    line: u32,
    block: [u32; 3],
    warp: u32,
    lane: u32,
}

impl Spot {
    pub fn new(site: &Site, lane: usize) -> Spot {
        Spot { line: site.line, block: site.block_id, warp: site.warp, lane: lane as u32 }
    }

    pub fn place(self, kernel: &Kernel) -> Place {
        let text = kernel.lines.get((self.line as usize).wrapping_sub(1)).map_or("", |line| line.trim());
        Place {
            kernel: kernel.name.clone(),
            line: self.line,
            text: text.to_owned(),
            block: self.block,
            warp: self.warp,
            lane: self.lane,
        }
    }
}

/// An operation in flight.
#[derive(Debug)]
pub struct Operation {
    pub kind: Kind,
    /// The block that issued it, and its warp there.
    pub block: u64,
    pub warp: u32,
    pub place: Spot,
    /// Its source has been read.
    pub read: bool,
}

// Copies are most of what is in flight.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Kind {
    /// `cp.async` of the lanes of a mask, each with the group that it belongs to.
    Copy {
        mask: u32,
        to: [u64; 32],
        bytes: u32,
        group: [u32; 32],
    },
    Product {
        number: u64,
    },
    Bulk {
        atomic: bool,
    },
}

impl Operation {
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Copy { .. } => "`cp.async`",
            Kind::Product { .. } => "`wgmma`",
            Kind::Bulk { .. } => "bulk copy",
        }
    }

    /// Whether it still writes a word.
    pub fn writes(&self, word: u64) -> bool {
        match &self.kind {
            Kind::Copy { mask, to, bytes, .. } => {
                let holds = |i: usize| to[i] / WORD <= word && word < (to[i] + u64::from(*bytes)).div_ceil(WORD);
                (0..32).any(|i| mask >> i & 1 != 0 && holds(i))
            }
            Kind::Product { .. } => false,
            Kind::Bulk { .. } => true,
        }
    }
}

/// A block's shared memory, word by word.
#[derive(Debug, Default)]
pub struct Words {
    /// The operation that writes it, and the one that reads it; 0 for none, and those that are no more mean none.
    pub written_by: Vec<u64>,
    pub read_by: Vec<u64>,
    /// The warp that wrote it last through the generic proxy, and when.
    pub generic: Vec<(u32, u32)>,
}

/// What a warp has done.
#[derive(Debug, Default)]
pub struct Warp {
    /// Groups of `cp.async` committed by each lane.
    pub committed: [u32; 32],
    /// Bulk groups committed by each lane.
    pub bulk_committed: [u32; 32],
    /// When it last executed a proxy fence.
    pub fenced: u32,
    pub wgmma_fenced: bool,
}

/// A bulk copy in a bulk group that its thread has not waited for yet.
#[derive(Debug)]
pub struct Unwaited {
    pub block: u64,
    pub warp: u32,
    pub lane: u32,
    pub group: u32,
    pub reads_shared: bool,
    pub place: Spot,
}

/// Copies that an arrival at an mbarrier waits for.
#[derive(Debug)]
pub struct Arrival {
    pub block: u64,
    pub warp: u32,
    pub lanes: u32,
    pub before: u64,
}

/// A cluster.
#[derive(Debug, Default)]
pub struct Flight {
    pub words: FxHashMap<u64, Words>,
    pub warps: FxHashMap<(u64, u32), Warp>,
    /// By number, which is never 0.
    pub operations: BTreeMap<u64, Operation>,
    /// The numbers of bulk transfers as the executor counts them.
    pub bulk: FxHashMap<u64, u64>,
    pub arrivals: FxHashMap<u64, Arrival>,
    pub unwaited: Vec<Unwaited>,
    issued: u64,
    /// The operation whose accesses are being told.
    pub current: u64,
    /// Counts generic writes and fences.
    pub now: u32,
    pub blocks: u32,
}

impl Flight {
    pub fn begin(&mut self, block: u64, bytes: u32) {
        let n = (u64::from(bytes)).div_ceil(WORD) as usize;
        let words = self.words.entry(block).or_default();
        (words.written_by, words.read_by, words.generic) = (vec![0; n], vec![0; n], vec![(0, 0); n]);
        self.blocks += 1;
    }

    pub fn issue(&mut self, operation: Operation) -> u64 {
        self.issued += 1;
        self.operations.insert(self.issued, operation);
        self.current = self.issued;
        self.issued
    }

    pub fn issued(&self) -> u64 {
        self.issued
    }

    /// The least number of an operation in flight. Most words hold older ones: no need to look those up.
    pub fn oldest(&self) -> u64 {
        self.operations.first_key_value().map_or(u64::MAX, |(&number, _)| number)
    }

    /// The operation of this number that is not `own` and still in flight; `oldest` is from [`Flight::oldest`].
    #[inline(always)]
    pub fn alive(&self, number: u64, own: u64, oldest: u64) -> Option<&Operation> {
        if number < oldest || number == own {
            return None;
        }
        self.operations.get(&number)
    }

    /// Copies of a warp's lanes have landed: those for which `due` gives lanes. Their data counts as written by then.
    pub fn land(&mut self, block: u64, warp: u32, proxied: bool, due: impl Fn(u64, &[u32; 32]) -> u32) {
        self.now += 1;
        let (now, words) = (self.now, &mut self.words);
        self.operations.retain(|&number, o| {
            let Kind::Copy { mask, to, bytes, group } = &mut o.kind else { return true };
            if o.block != block || o.warp != warp {
                return true;
            }
            let landed = due(number, group) & *mask;
            *mask &= !landed;
            if proxied && let Some(words) = words.get_mut(&block) {
                for i in (0..32).filter(|i| landed >> i & 1 != 0) {
                    for word in to[i] / WORD..(to[i] + u64::from(*bytes)).div_ceil(WORD) {
                        if let Some(g) = words.generic.get_mut(word as usize) {
                            *g = (warp, now);
                        }
                    }
                }
            }
            *mask != 0
        });
    }
}
