//! What a checker has to say, and where it is kept.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use super::Checker;
use crate::exec::observe::Site;

/// A thread at a line of PTX.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    pub kernel: String,
    /// One-based line of the PTX; 0 where there is none.
    pub line: u32,
    /// That line's text, trimmed.
    pub text: String,
    pub block: [u32; 3],
    /// Index in the block.
    pub warp: u32,
    pub lane: u32,
}

impl Place {
    /// Lane `lane` of the warp at a site.
    pub fn new(site: &Site, lane: usize) -> Place {
        let text = site.kernel.lines.get((site.line as usize).wrapping_sub(1)).map_or("", |line| line.trim());
        Place {
            kernel: site.kernel.name.clone(),
            line: site.line,
            text: text.to_owned(),
            block: site.block_id,
            warp: site.warp,
            lane: lane as u32,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "kernel `{}`, line {}: `{}`, ", self.kernel, self.line, self.text)?;
        write!(f, "block ({x}, {y}, {z}), warp {}, lane {}", self.warp, self.lane)
    }
}

/// Something that a correct program does not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub checker: Checker,
    /// What is wrong, without the places.
    pub message: String,
    /// Where; `None` for what belongs to no kernel, such as a leak.
    pub place: Option<Place>,
    /// The access that it collides with, or the operation that it should have waited for.
    pub other: Option<Place>,
    /// How often the same was found at the same lines.
    pub times: u64,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.checker, self.message)?;
        if let Some(place) = &self.place {
            write!(f, "; {place}")?;
        }
        if let Some(other) = &self.other {
            write!(f, "; against {other}")?;
        }
        if self.times > 1 {
            write!(f, " ({} times)", self.times)?;
        }
        Ok(())
    }
}

/// Kernel, line and other line: findings at the same ones are one.
type Key = (Checker, &'static str, String, u32, u32);

/// Findings in the order in which they first came, the same ones counted.
#[derive(Debug, Default)]
pub struct Findings {
    inner: Mutex<(Vec<Finding>, HashMap<Key, usize>)>,
}

impl Findings {
    /// Notes a finding; `true` if it is a new one. `class` names the kind of mistake: one is kept for each class and pair of
    /// lines, the first, and the others are counted.
    pub fn report(&self, class: &'static str, finding: Finding) -> bool {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let (list, index) = &mut *inner;
        let line = |p: &Option<Place>| p.as_ref().map_or(0, |p| p.line);
        let kernel = finding.place.as_ref().map_or(String::new(), |p| p.kernel.clone());
        let key = (finding.checker, class, kernel, line(&finding.place), line(&finding.other));
        match index.get(&key) {
            Some(&i) => {
                list[i].times += 1;
                false
            }
            None => {
                index.insert(key, list.len());
                list.push(finding);
                true
            }
        }
    }

    /// All so far.
    pub fn all(&self) -> Vec<Finding> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Forgets all.
    pub fn clear(&self) {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = Default::default();
    }
}
