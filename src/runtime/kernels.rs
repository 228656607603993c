//! Loaded kernels of one CUDA context.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::CudaContext;

pub use super::embedded::{Embedded, Image, embedded};
use super::launch::{Loaded, Scope};
use super::selection::Kernel;
use crate::registry;
use crate::{DeviceInfo, Error};

/// The kernels of one CUDA context, each loaded when it is first launched.
///
/// Make one for a context and share it: it is `Sync`, and a launch of a loaded kernel takes no lock. During the capture
/// of a CUDA graph no module may be loaded, so call [`Kernels::preload`] or run the operations once before. Modules are
/// unloaded with the value; a graph that was captured from them must not be launched after that.
pub struct Kernels {
    context: Arc<CudaContext>,
    device: DeviceInfo,
    loaded: Vec<OnceLock<Loaded>>,
    loading: Mutex<()>,
}

impl Kernels {
    /// Oldest compute capability that the kernels are written for.
    pub const MIN_COMPUTE_CAPABILITY: (u32, u32) = (8, 0);

    /// An empty cache for `context`. Loads nothing yet.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a device older than [`Kernels::MIN_COMPUTE_CAPABILITY`]; [`Error::Driver`].
    pub fn new(context: &Arc<CudaContext>) -> Result<Kernels, Error> {
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
            loaded: embedded().iter().map(|_| OnceLock::new()).collect(),
            loading: Mutex::new(()),
        })
    }

    /// The context that the kernels belong to.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Properties of the context's device.
    pub fn device(&self) -> &DeviceInfo {
        &self.device
    }

    /// Loads `kernels` now rather than at their first launch.
    ///
    /// # Errors
    /// [`Error::ModuleLoad`], [`Error::Driver`].
    pub fn preload(&self, kernels: impl IntoIterator<Item = Kernel>) -> Result<(), Error> {
        kernels.into_iter().try_for_each(|kernel| self.load_kernel(kernel).map(|_| ()))
    }

    /// Loads every kernel of the registry.
    ///
    /// # Errors
    /// [`Error::ModuleLoad`], [`Error::Driver`].
    pub fn load_all(&self) -> Result<(), Error> {
        self.preload(sorted().iter().map(|&(kernel, _)| kernel))
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

    #[cold]
    fn load_kernel(&self, kernel: Kernel) -> Result<&Loaded, Error> {
        let index = index(kernel);
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = self.loaded[index].get() {
            return Ok(loaded);
        }
        let loaded = Loaded::new(&self.context, &embedded()[index], &self.device, &kernel)?;
        Ok(self.loaded[index].get_or_init(|| loaded))
    }
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
    fn every_kernel_is_listed_once() {
        assert!(sorted().windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
