//! Loaded kernels of one CUDA context.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError};

use super::driver;
pub use super::embedded::{Embedded, Image, embedded};
use super::launch::{Loaded, Scope};
use super::selection::Kernel;
use crate::registry;
use crate::{DeviceInfo, Error};

/// The kernels of one CUDA context, each loaded when it is first launched.
///
/// Make one for a context and share it: it is `Sync`, and a launch of a loaded kernel takes no lock. During the capture
/// of a CUDA graph no module may be loaded, so call [`Kernels::preload`] or run the operations once before. Modules are
/// unloaded with the value, after the context's work; a graph that was captured from them must not be launched after that. Where
/// several streams are in use the value keeps cudarc ordering them, also after some are dropped.
pub struct Kernels {
    context: Arc<CudaContext>,
    device: DeviceInfo,
    // Before `order`: dropping a loaded kernel waits for the context's work.
    loaded: Vec<OnceLock<Loaded>>,
    loading: Mutex<()>,
    order: OnceLock<Arc<CudaStream>>,
    /// Whether the driver takes programmatic dependent launches, in graphs too.
    launches_dependents: bool,
    /// Blocks that count as resident at most: a device that is shared.
    #[cfg(test)]
    resident_limit: u32,
}

/// The driver that captures programmatic dependent launches into graphs: of CUDA 12.3.
const DEPENDENTS_IN_GRAPHS: i32 = 12030;

impl Kernels {
    /// Oldest compute capability that the kernels are written for.
    pub const MIN_COMPUTE_CAPABILITY: (u32, u32) = (8, 0);

    /// An empty cache for `context`. Loads nothing yet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a device older than [`Kernels::MIN_COMPUTE_CAPABILITY`]; [`Error::Driver`], also where a fault of an
    /// earlier kernel has broken the context.
    pub fn new(context: &Arc<CudaContext>) -> Result<Kernels, Error> {
        driver::check_health(context, "kernels")?;
        let device = DeviceInfo::of(context)?;
        if device.compute_capability < Self::MIN_COMPUTE_CAPABILITY {
            let (major, minor) = device.compute_capability;
            return Err(Error::unsupported(
                "kernels",
                "context",
                "compute capability 8.0 or later",
                format!("a device of compute capability {major}.{minor}"),
            ));
        }
        Ok(Kernels {
            context: context.clone(),
            device,
            loaded: nothing_loaded(),
            loading: Mutex::new(()),
            order: OnceLock::new(),
            launches_dependents: driver::version()? >= DEPENDENTS_IN_GRAPHS,
            #[cfg(test)]
            resident_limit: u32::MAX,
        })
    }

    /// The same, nothing loaded, of no more than `most` multiprocessors, for work beside other work. Kernels whose blocks stay, for one tile after
    /// another or at a grid barrier, are launched with as many blocks as these hold. A grid with a block for each tile is as large as
    /// ever: to bound it too, give the context a partition of the device.
    pub fn on_multiprocessors(self, most: u32) -> Kernels {
        let multiprocessors = self.device.multiprocessors.min(most).max(1);
        self.of_device(|device| DeviceInfo { multiprocessors, ..device })
    }

    /// The same, nothing loaded, for a context whose device launches no grid as a whole: what meets at a grid's barrier takes one block or a launch more.
    pub fn without_cooperative_launch(self) -> Kernels {
        self.of_device(|device| DeviceInfo { cooperative_launch: false, ..device })
    }

    /// The same, nothing loaded, of a device with less.
    fn of_device(self, less: impl FnOnce(DeviceInfo) -> DeviceInfo) -> Kernels {
        Kernels { device: less(self.device), loaded: nothing_loaded(), ..self }
    }

    /// The same, nothing loaded, where no more than `blocks` are resident at once.
    #[cfg(test)]
    pub(crate) fn with_resident_limit(self, blocks: u32) -> Kernels {
        Kernels { resident_limit: blocks, ..self }
    }

    /// The context that the kernels belong to.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Properties of the context's device.
    pub fn device(&self) -> &DeviceInfo {
        &self.device
    }

    /// Whether a launch may be let begin before the one in front of it has ended.
    pub(crate) fn launches_dependents(&self) -> bool {
        self.launches_dependents
    }

    /// Loads `kernels` now rather than at their first launch.
    ///
    /// # Errors
    /// [`Error::ModuleLoad`], [`Error::Driver`].
    pub fn preload(&self, kernels: impl IntoIterator<Item = Kernel>) -> Result<(), Error> {
        kernels.into_iter().try_for_each(|kernel| self.load_kernel(kernel).map(|_| ()))
    }

    /// Loads every kernel of the registry that the device runs.
    ///
    /// # Errors
    /// [`Error::ModuleLoad`], [`Error::Driver`].
    pub fn load_all(&self) -> Result<(), Error> {
        let runs = |kernel: &Kernel| kernel.variant().arch().runs_on(self.device.compute_capability);
        self.preload(sorted().iter().map(|&(kernel, _)| kernel).filter(runs))
    }

    /// The loaded form of `kernel`, for a launch of `scope`.
    pub(crate) fn function(&self, scope: &Scope<'_>, kernel: Kernel) -> Result<&Loaded, Error> {
        match self.loaded[index(kernel)].get() {
            Some(loaded) => Ok(loaded),
            None if scope.is_capturing()? => {
                let missing = "Kernels::preload, or one run of the operation, before the capture began";
                Err(Error::Capture { operation: scope.operation, missing })
            }
            None => self.load_kernel(kernel),
        }
    }

    /// Makes cudarc go on ordering streams as long as these kernels live.
    ///
    /// It does so while it counts a stream of its own making, and a dropped one no longer counts, though its work may be under way:
    /// when the last is gone, nothing waits for it. A stream of ours, on which nothing is ever put, keeps the count above zero.
    pub(crate) fn keep_order(&self) -> Result<(), DriverError> {
        if self.order.get().is_none() {
            // Of two threads that come here at once, one drops its stream again.
            let _ = self.order.set(self.context.new_stream()?);
        }
        Ok(())
    }

    #[cold]
    fn load_kernel(&self, kernel: Kernel) -> Result<&Loaded, Error> {
        let index = index(kernel);
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = self.loaded[index].get() {
            return Ok(loaded);
        }
        let loaded = Loaded::new(&self.context, &embedded()[index], &self.device, &kernel)?;
        #[cfg(test)]
        let loaded = loaded.with_resident_limit(self.resident_limit);
        Ok(self.loaded[index].get_or_init(|| loaded))
    }
}

/// A place for each kernel.
fn nothing_loaded() -> Vec<OnceLock<Loaded>> {
    embedded().iter().map(|_| OnceLock::new()).collect()
}

/// The kernel's place in the embedded table.
fn index(kernel: Kernel) -> usize {
    let table = sorted();
    let place = table.binary_search_by_key(&kernel, |&(key, _)| key).expect("a kernel is only made from the registry");
    table[place].1
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let loaded = self.loaded.iter().filter(|cell| cell.get().is_some()).count();
        f.debug_struct("Kernels")
            .field("device", &self.device)
            .field("loaded", &format_args!("{loaded} of {}", self.loaded.len()))
            .finish()
    }
}

/// Every kernel with its place in the embedded table, sorted by kernel: a launch finds its kernel in a few comparisons of
/// small integers.
fn sorted() -> &'static [(Kernel, usize)] {
    static SORTED: OnceLock<Vec<(Kernel, usize)>> = OnceLock::new();
    SORTED.get_or_init(|| {
        let mut table: Vec<_> =
            registry::all().into_iter().enumerate().map(|(index, kernel)| (kernel.into(), index)).collect();
        table.sort_unstable();
        table
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_table_is_in_registry_order() {
        let names: Vec<_> = registry::all().iter().map(registry::Kernel::name).collect();
        assert_eq!(names, embedded().iter().map(|entry| entry.name).collect::<Vec<_>>());
    }

    #[test]
    fn fewer_multiprocessors_than_the_device_has() {
        softcuda::install_if_no_gpu().expect("a real or a software device can be had");
        let context = crate::device::open(0).unwrap();
        let all = Kernels::new(&context).unwrap().device().multiprocessors;
        let of = |most| Kernels::new(&context).unwrap().on_multiprocessors(most).device().multiprocessors;
        assert_eq!([8, 0, u32::MAX].map(of), [all.min(8), 1, all]);
    }

    #[test]
    fn every_kernel_is_listed_once() {
        assert!(sorted().windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
