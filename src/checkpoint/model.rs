//! A checkpoint with its family, and a block of it.

use std::path::Path;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::config::Config;
use super::error::CheckpointError;
use super::families;
use super::family::Family;
use super::folder::Checkpoint;
use super::kind::KindSpec;
use super::load::{Progress, load};
use super::locate::{Found, full_name};
use super::places::{Places, ToPlaces};
use super::spec::{BlockSpec, Scene};
use super::store::{Store, ToDevice, ToHost, ToNowhere};
use super::weights::{DeviceBlock, HostBlock, Loaded};
use crate::Dtype;
use crate::layer::LayerDesc;

/// A checkpoint of a family that is known.
pub struct Model {
    config: Config,
    family: Family,
    files: Checkpoint,
}

impl Model {
    /// Opens a folder: reads its configuration, finds the family, maps the files.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownFamily`], and those of [`Config::open`] and [`Checkpoint::open`].
    pub fn open(folder: &Path) -> Result<Model, CheckpointError> {
        let config = Config::open(folder)?;
        let files = Checkpoint::open(folder);
        // An unknown family is said also where no tensors are, and better where they are.
        let family = families::of(&config, files.as_ref().ok())?;
        Ok(Model { config, family, files: files? })
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its family.
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// Its files.
    pub fn files(&self) -> &Checkpoint {
        &self.files
    }

    /// Every MoE block, also those with tensors in shards that are not there.
    ///
    /// # Errors
    /// [`CheckpointError::Config`] for a configuration that describes no block that is known.
    pub fn blocks(&self) -> Result<Vec<Block<'_>>, CheckpointError> {
        self.family.find(&self.files).into_iter().map(|found| self.describe(found)).collect()
    }

    /// The block of this name: its module's path (`model.layers.0.mlp`) or what its tensors' names begin with. Without a name the first
    /// whose router is there.
    ///
    /// # Errors
    /// [`CheckpointError::Block`] where there is none, and those of [`Model::blocks`].
    pub fn block(&self, name: Option<&str>) -> Result<Block<'_>, CheckpointError> {
        self.describe(self.family.locate(&self.files, name)?)
    }

    fn describe(&self, found: Found) -> Result<Block<'_>, CheckpointError> {
        let spec = self.family.describe(&Scene::new(&self.config, &self.files, &found))?;
        Ok(Block { files: &self.files, prefix: found.prefix, spec })
    }
}

/// What a block takes beside rows: [`super::BlockInputs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// Ids of words, below this number.
    pub vocabulary: Option<usize>,
    /// The state of the previous layer's router, of this width.
    pub previous: Option<usize>,
    /// An expert for each sequence.
    pub index: bool,
    /// Types of tokens, 0 for the first bank of experts and 1 for the second.
    pub types: bool,
}

/// An MoE block of a checkpoint.
pub struct Block<'a> {
    files: &'a Checkpoint,
    prefix: String,
    spec: BlockSpec,
}

impl Block<'_> {
    /// What the names of its tensors begin with.
    pub fn name(&self) -> &str {
        &self.prefix
    }

    /// The layer as its configuration has it. Types, and layouts that tensors show, are those of [`Loaded::desc`].
    pub fn desc(&self) -> &LayerDesc {
        &self.spec.layer
    }

    /// Columns of its logits: those of the experts that a choice is among, of appended ones, or of keys; 0 where nothing is chosen by logits.
    pub fn logit_columns(&self) -> usize {
        self.spec.logit_columns()
    }

    /// The model's own code leaves the order of a token's experts open.
    pub fn unordered(&self) -> bool {
        self.spec.unordered
    }

    /// What it takes beside rows.
    pub fn needs(&self) -> Needs {
        let full = |name| full_name(&self.prefix, name);
        let rows = |name| self.files.shape(&full(name)).and_then(|shape| shape.first()).copied().unwrap_or(0);
        let (previous, index) = match self.spec.kind {
            KindSpec::Network { width, .. } => {
                (self.files.knows(&full("gate.router_states_scale")).then_some(width), false)
            }
            KindSpec::BySequence { .. } => (None, true),
            _ => (None, false),
        };
        Needs { vocabulary: self.spec.table.map(rows), previous, index, types: self.spec.bank.is_some() }
    }

    /// Looks for all tensors of the block, their shapes and types, and reads nothing but the router's: the bytes that a load will read.
    ///
    /// # Errors
    /// Those of [`Block::load`] but for values that a type cannot hold.
    pub fn check(&self) -> Result<u64, CheckpointError> {
        let mut store = ToNowhere::default();
        load(self.files, &self.prefix, &self.spec, Dtype::F32, &mut store, 0, &mut |_| ())?;
        Ok(store.bytes)
    }

    /// Reads the weights into device memory, in `dtype` (bf16, f16 or f32, whatever the file's own is). The copies are enqueued on `stream`.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], [`CheckpointError::Shard`], [`CheckpointError::ExpertLayout`], [`CheckpointError::UnreadTensor`],
    /// [`CheckpointError::TensorShape`], [`CheckpointError::TensorDtype`], [`CheckpointError::Range`], and [`CheckpointError::Device`] where
    /// memory is short.
    pub fn load(
        &self,
        stream: &Arc<CudaStream>,
        dtype: Dtype,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<DeviceBlock, CheckpointError> {
        self.load_into(&mut ToDevice { stream }, dtype, progress)
    }

    /// Reads the weights into the host's memory, in the same shapes and types.
    ///
    /// # Errors
    /// Those of [`Block::load`].
    pub fn load_host(&self, dtype: Dtype) -> Result<HostBlock, CheckpointError> {
        self.load_into(&mut ToHost, dtype, &mut |_| ())
    }

    /// Which of the checkpoint's tensors each of the buffers of a load is made of; gradients lie as their weights do.
    ///
    /// # Errors
    /// Those of [`Block::check`].
    pub fn places(&self) -> Result<Loaded<Places>, CheckpointError> {
        self.load_into(&mut ToPlaces, Dtype::F32, &mut |_| ())
    }

    fn load_into<S: Store>(
        &self,
        store: &mut S,
        dtype: Dtype,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Loaded<S::Buffer>, CheckpointError> {
        let total = self.check()?;
        load(self.files, &self.prefix, &self.spec, dtype, store, total, progress)
    }
}
