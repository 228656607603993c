//! A profile: launches and the kernels they are of.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::bounds::{Bound, bounds, greatest};
use super::traffic::{Caches, Traffic};
use super::work::Work;
use crate::device::{Description, Limiter, MAX_REGISTERS_PER_THREAD, WARP_SIZE, occupancy};
use crate::exec::{Counters, LineCounters, MemoryCounters, SharedCounters};

/// What every form of a profile says of itself.
pub const NOTICE: &str = "A model, not a measurement. The kernels ran on a CPU; times are what the units of the modelled GPU \
     would need at least for the work that was counted. No GPU took these times.";

/// Version of the form in which profiles are written.
pub const SCHEMA: u32 = 2;

/// Launches that are listed one by one; of later ones only the sums by kernel are kept.
pub const MOST_LAUNCHES: usize = 1024;

/// The profile of a section of a program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// [`SCHEMA`] of the program that wrote it.
    pub schema: u32,
    /// [`NOTICE`].
    pub notice: String,
    /// Version of softcuda.
    pub softcuda: String,
    /// The devices that kernels ran on, in order of their first launch.
    pub devices: Vec<Device>,
    /// What L2 held at the start of launches, each kind once.
    pub caches: Vec<Caches>,
    /// The first launches, in order, at most [`MOST_LAUNCHES`].
    pub launches: Vec<LaunchProfile>,
    /// All launches, listed or not.
    pub launch_count: u64,
    /// By modelled time, longest first.
    pub kernels: Vec<KernelProfile>,
}

/// The device description that times are computed from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// As in `SOFTCUDA_DEVICE`.
    pub model: String,
    pub sm_count: u32,
    /// Warps that a multiprocessor holds at most.
    pub warps_per_sm: u32,
    pub figures: Vec<DeviceFigure>,
}

/// A number of the description, and where it is from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceFigure {
    pub name: String,
    pub value: String,
    pub document: String,
    pub place: String,
}

/// Registers of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub count: u32,
    pub source: RegisterSource,
}

/// How a number of registers is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegisterSource {
    /// Recorded from what `ptxas` reported.
    Ptxas,
    /// Estimated by softcuda from the PTX.
    Estimate,
}

/// How many blocks and warps a multiprocessor holds at once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OccupancyProfile {
    pub blocks_per_sm: u32,
    pub warps_per_sm: u32,
    /// Of the warps that a multiprocessor can hold, from 0 to 1.
    pub fraction: f64,
    /// What keeps further blocks away.
    pub limiter: Limiter,
}

/// One launch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LaunchProfile {
    /// Position among the profile's launches, from 0.
    pub index: u64,
    pub kernel: String,
    /// The device's model.
    pub device: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads.
    pub block: [u32; 3],
    /// Blocks.
    pub cluster: [u32; 3],
    /// Bytes of a block.
    pub static_shared_bytes: u32,
    /// Bytes of a block.
    pub dynamic_shared_bytes: u32,
    pub registers: Registers,
    pub occupancy: OccupancyProfile,
    pub work: Work,
    pub bounds: Vec<Bound>,
    /// What L2 held at the start.
    pub caches: Caches,
    /// The greatest bound: a lower bound of the device's time, in seconds.
    pub modelled_seconds: f64,
    /// The unit of the greatest bound.
    pub limited_by: String,
}

/// All launches of one kernel on devices of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KernelProfile {
    pub name: String,
    /// The device's model.
    pub device: String,
    pub launches: u64,
    pub registers: Registers,
    /// Of the latest launch.
    pub occupancy: OccupancyProfile,
    pub work: Work,
    /// Sums over the launches.
    pub bounds: Vec<Bound>,
    /// Sum of the launches' modelled times in seconds.
    pub modelled_seconds: f64,
    /// The unit of the greatest bound.
    pub limited_by: String,
    /// Lines that were executed, in order.
    pub lines: Vec<LineProfile>,
}

/// One line of a kernel's PTX.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineProfile {
    /// From 1.
    pub line: u32,
    pub text: String,
    pub warp_instructions: u64,
    pub thread_instructions: u64,
    pub global: MemoryCounters,
    pub shared: SharedCounters,
}

impl LineProfile {
    /// Sectors beyond the ideal.
    pub fn wasted_sectors(&self) -> u64 {
        self.global.sectors.saturating_sub(self.global.ideal_sectors)
    }

    /// Wavefronts beyond those that accesses without conflicts take.
    pub fn conflict_wavefronts(&self) -> u64 {
        self.shared.wavefronts.saturating_sub(self.shared.ideal_wavefronts)
    }
}

/// A launch as the driver reports it.
#[derive(Debug)]
pub struct Launched<'l> {
    pub device: &'l Description,
    pub kernel: &'l str,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    pub static_shared_bytes: u32,
    pub dynamic_shared_bytes: u32,
    pub registers: Registers,
    pub lines: &'l Arc<Vec<String>>,
    pub counters: &'l Counters,
    pub traffic: Traffic,
    pub caches: Caches,
}

/// Launches as they come in.
#[derive(Debug, Default)]
pub struct Collector {
    devices: Vec<Description>,
    caches: Vec<Caches>,
    launches: Vec<LaunchProfile>,
    launch_count: u64,
    /// By name, text and model; the module may have been unloaded since.
    kernels: BTreeMap<(String, usize, &'static str), Sums>,
}

#[derive(Debug)]
struct Sums {
    profile: KernelProfile,
    text: Arc<Vec<String>>,
    lines: Vec<LineCounters>,
}

impl Launched<'_> {
    /// The launch's occupancy on its device; a grid that leaves room is its own limit. Blocks that leave at once take none.
    fn occupancy(&self, working_blocks: u64) -> OccupancyProfile {
        let (l, device) = (self, self.device);
        let threads = l.block.iter().product::<u32>();
        let shared = u64::from(l.static_shared_bytes) + u64::from(l.dynamic_shared_bytes);
        let found = occupancy(device, l.registers.count.min(MAX_REGISTERS_PER_THREAD), threads, shared);
        let share = working_blocks.div_ceil(device.sm_count.into());
        let (blocks_per_sm, limiter) = match u32::try_from(share) {
            Ok(share) if share < found.blocks => (share, Limiter::Grid),
            _ => (found.blocks, found.limiter),
        };
        let warps_per_sm = blocks_per_sm * threads.div_ceil(WARP_SIZE);
        let fraction = f64::from(warps_per_sm * WARP_SIZE) / f64::from(device.threads_per_sm);
        OccupancyProfile { blocks_per_sm, warps_per_sm, fraction, limiter }
    }
}

impl Device {
    fn new(d: &Description) -> Device {
        let figures = d.figures().into_iter().map(|figure| DeviceFigure {
            name: figure.name.into(),
            value: figure.value,
            document: figure.source.document.into(),
            place: figure.source.place.into(),
        });
        Device {
            model: d.model.into(),
            sm_count: d.sm_count,
            warps_per_sm: d.threads_per_sm / WARP_SIZE,
            figures: figures.collect(),
        }
    }
}

impl Collector {
    pub fn add(&mut self, l: &Launched) {
        let work = Work::new(l.counters, l.traffic);
        let bounds = bounds(l.device, &work);
        let (modelled_seconds, limited_by) = greatest(&bounds);
        let occupancy = l.occupancy(work.working_blocks);
        if !self.caches.contains(&l.caches) {
            self.caches.push(l.caches);
        }
        if self.devices.iter().all(|known| known.model != l.device.model) {
            self.devices.push(*l.device);
        }
        let key = (l.kernel.to_owned(), Arc::as_ptr(l.lines) as usize, l.device.model);
        match self.kernels.get_mut(&key) {
            Some(sums) => {
                let k = &mut sums.profile;
                k.launches += 1;
                k.work.add(&work);
                k.modelled_seconds += modelled_seconds;
                k.occupancy = occupancy;
                k.registers = l.registers;
                k.bounds.iter_mut().zip(&bounds).for_each(|(sum, new)| sum.seconds += new.seconds);
                sums.lines.iter_mut().zip(&l.counters.lines).for_each(|(sum, new)| sum.add(new));
            }
            None => {
                let profile = KernelProfile {
                    name: l.kernel.to_owned(),
                    device: l.device.model.into(),
                    launches: 1,
                    registers: l.registers,
                    occupancy,
                    work: work.clone(),
                    bounds: bounds.clone(),
                    modelled_seconds,
                    limited_by: String::new(),
                    lines: Vec::new(),
                };
                let lines = l.counters.lines.clone();
                self.kernels.insert(key, Sums { profile, text: Arc::clone(l.lines), lines });
            }
        }
        if self.launches.len() < MOST_LAUNCHES {
            self.launches.push(LaunchProfile {
                index: self.launch_count,
                kernel: l.kernel.to_owned(),
                device: l.device.model.into(),
                grid: l.grid,
                block: l.block,
                cluster: l.cluster,
                static_shared_bytes: l.static_shared_bytes,
                dynamic_shared_bytes: l.dynamic_shared_bytes,
                registers: l.registers,
                occupancy,
                work,
                bounds,
                caches: l.caches,
                modelled_seconds,
                limited_by,
            });
        }
        self.launch_count += 1;
    }

    /// What has come in so far.
    pub fn profile(&self) -> Profile {
        let mut kernels: Vec<KernelProfile> = self.kernels.values().map(Sums::profile).collect();
        kernels.sort_by(|a, b| b.modelled_seconds.total_cmp(&a.modelled_seconds));
        Profile {
            schema: SCHEMA,
            notice: NOTICE.into(),
            softcuda: env!("CARGO_PKG_VERSION").into(),
            devices: self.devices.iter().map(Device::new).collect(),
            caches: self.caches.clone(),
            launches: self.launches.clone(),
            launch_count: self.launch_count,
            kernels,
        }
    }
}

impl Sums {
    fn profile(&self) -> KernelProfile {
        let mut k = self.profile.clone();
        // Details of one launch do not describe their sum.
        if k.launches > 1 {
            k.bounds.iter_mut().for_each(|bound| bound.detail = format!("sum of {} launches", k.launches));
        }
        k.limited_by = greatest(&k.bounds).1;
        let executed = self.lines.iter().zip(self.text.iter()).enumerate();
        let lines = executed.filter(|(_, (counters, _))| **counters != LineCounters::default());
        k.lines = lines
            .map(|(index, (counters, text))| LineProfile {
                line: index as u32 + 1,
                text: text.trim().into(),
                warp_instructions: counters.warp_instructions,
                thread_instructions: counters.thread_instructions,
                global: counters.global,
                shared: counters.shared,
            })
            .collect();
        k
    }
}

impl Profile {
    /// As JSON, in the form of [`SCHEMA`].
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a profile has neither maps with odd keys nor numbers that JSON lacks")
    }

    /// Writes `STEM.txt`, `STEM.json` and `STEM.html`, and returns their paths.
    ///
    /// # Errors
    /// One of them cannot be written.
    pub fn write(&self, stem: &Path) -> io::Result<[PathBuf; 3]> {
        let path = |ending: &str| {
            let mut path = stem.as_os_str().to_owned();
            path.push(ending);
            PathBuf::from(path)
        };
        let paths = [".txt", ".json", ".html"].map(path);
        let texts = [self.to_text(), self.to_json(), self.to_html()];
        let files = [0, 1, 2].map(|at| (paths[at].as_path(), texts[at].as_bytes()));
        crate::whole::write(&files)?;
        Ok(paths)
    }

    /// Reads what [`Profile::to_json`] wrote.
    ///
    /// # Errors
    /// The text is not a profile of this [`SCHEMA`].
    pub fn from_json(text: &str) -> Result<Profile, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// Models of the devices, in words.
    pub fn models(&self) -> String {
        let models: Vec<&str> = self.devices.iter().map(|device| device.model.as_str()).collect();
        if models.is_empty() { "no device".into() } else { models.join(", ") }
    }

    /// Warps that a multiprocessor of a model holds at most.
    pub(super) fn warps_per_sm(&self, model: &str) -> u32 {
        self.devices.iter().find(|device| device.model == model).map_or(0, |device| device.warps_per_sm)
    }

    /// Sum of the modelled times in seconds.
    pub fn modelled_seconds(&self) -> f64 {
        self.kernels.iter().map(|kernel| kernel.modelled_seconds).sum()
    }
}
