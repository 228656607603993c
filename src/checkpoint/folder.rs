//! A checkpoint folder: `model.safetensors`, or shards named by `model.safetensors.index.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::error::{CheckpointError, Lost};
use super::files;
use super::tensors::{FileTensor, TensorFile};

/// The files of a checkpoint folder, mapped into memory: of the data only what is asked for is read.
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<TensorFile>,
    /// For each tensor its file.
    index: BTreeMap<String, usize>,
    /// Tensors that the index names and that are in no file.
    lost: BTreeMap<String, (PathBuf, Lost)>,
}

impl Checkpoint {
    const SINGLE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Opens the single file if there is one, else the shards of the index that are there.
    ///
    /// A shard that is missing is an error when one of its tensors is asked for: often only a few are downloaded.
    ///
    /// # Errors
    /// [`CheckpointError::NoTensors`], [`CheckpointError::Index`] and those of [`TensorFile::open`].
    pub fn open(folder: &Path) -> Result<Checkpoint, CheckpointError> {
        let (single, index_path) = (folder.join(Self::SINGLE), folder.join(Self::INDEX));
        let mut checkpoint =
            Checkpoint { folder: folder.to_owned(), files: Vec::new(), index: BTreeMap::new(), lost: BTreeMap::new() };
        if files::exists(&single)? {
            let file = TensorFile::open(&single)?;
            checkpoint.index = file.names().into_iter().map(|name| (name, 0)).collect();
            checkpoint.files.push(file);
        } else if files::exists(&index_path)? {
            checkpoint.open_shards(&index_path)?;
        } else {
            return Err(CheckpointError::NoTensors {
                folder: folder.to_owned(),
                single: Self::SINGLE,
                index: Self::INDEX,
            });
        }
        Ok(checkpoint)
    }

    fn open_shards(&mut self, index_path: &Path) -> Result<(), CheckpointError> {
        let invalid = |reason: String| CheckpointError::Index { path: index_path.to_owned(), reason };
        let json = files::read_json(index_path)?;
        let map = json.get("weight_map").and_then(|map| map.as_object());
        let map = map.ok_or_else(|| invalid("no `weight_map` object".into()))?;
        let mut shards: BTreeMap<&str, Option<usize>> = BTreeMap::new();
        for (tensor, shard) in map {
            let shard = shard
                .as_str()
                .filter(|shard| !shard.is_empty() && !shard.contains(['/', '\\']))
                .ok_or_else(|| invalid(format!("`weight_map` gives no file name for `{tensor}`")))?;
            let path = self.folder.join(shard);
            let number = match shards.get(shard) {
                Some(&number) => number,
                None => {
                    let number = if files::exists(&path)? {
                        self.files.push(TensorFile::open(&path)?);
                        Some(self.files.len() - 1)
                    } else {
                        None
                    };
                    shards.insert(shard, number);
                    number
                }
            };
            match number {
                Some(number) if self.files[number].contains(tensor) => {
                    self.index.insert(tensor.clone(), number);
                }
                Some(_) => {
                    self.lost.insert(tensor.clone(), (path, Lost::NotInShard));
                }
                None => {
                    let lost = if path.is_symlink() { Lost::LinkToNothing } else { Lost::NoShard };
                    self.lost.insert(tensor.clone(), (path, lost));
                }
            }
        }
        Ok(())
    }

    /// Whether the tensor can be read.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Whether the checkpoint has the tensor, be it in a shard that is not there.
    pub fn knows(&self, name: &str) -> bool {
        self.contains(name) || self.lost.contains_key(name)
    }

    /// Names of all tensors that begin with `prefix`, also of those in shards that are not there.
    pub fn names_below<'a>(&'a self, prefix: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        fn below<'a, T>(map: &'a BTreeMap<String, T>, prefix: &str) -> impl Iterator<Item = &'a str> + use<'a, T> {
            let prefix = prefix.to_owned();
            let names = map.range(prefix.clone()..).map(|(name, _)| name.as_str());
            names.take_while(move |name| name.starts_with(&prefix))
        }
        below(&self.index, prefix).chain(below(&self.lost, prefix))
    }

    /// Extents of a tensor that can be read.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.files[*self.index.get(name)?].shape(name).ok()
    }

    /// A tensor that must have these extents, as [`TensorFile::read_shaped`] has it.
    ///
    /// # Errors
    /// [`CheckpointError::TensorShape`], and what [`Checkpoint::missing`] says.
    pub fn read_shaped(&self, name: &str, extents: &[usize]) -> Result<FileTensor<'_>, CheckpointError> {
        self.file(name)?.read_shaped(name, extents)
    }

    /// A tensor.
    ///
    /// # Errors
    /// What [`Checkpoint::missing`] says.
    pub fn read(&self, name: &str) -> Result<FileTensor<'_>, CheckpointError> {
        self.file(name)?.read(name)
    }

    /// Has the system read ahead what will be used soon.
    pub(super) fn will_need(&self, name: &str) {
        if let Some(&file) = self.index.get(name) {
            self.files[file].will_need(name);
        }
    }

    fn file(&self, name: &str) -> Result<&TensorFile, CheckpointError> {
        self.index.get(name).map(|&file| &self.files[file]).ok_or_else(|| self.missing(name))
    }

    /// Names of all tensors, also of those in shards that are not there.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().chain(self.lost.keys()).map(String::as_str)
    }

    /// Why a tensor cannot be read: its shard is not there, or there is a quantised form instead, or nothing.
    pub fn missing(&self, name: &str) -> CheckpointError {
        if let Some((shard, lost)) = self.lost.get(name) {
            return CheckpointError::Shard {
                shard: shard.clone(),
                index: Self::INDEX,
                name: name.to_owned(),
                lost: *lost,
            };
        }
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let quantised = ["_blocks", ".qweight", ".weight_packed"].map(|suffix| format!("{stem}{suffix}"));
        for other in quantised {
            if let Some(found) = self.index.get(&other).and_then(|&file| self.files[file].dtype(&other)) {
                return CheckpointError::TensorDtype {
                    name: other,
                    found,
                    expected: "a plain tensor of BF16, F16 or F32",
                };
            }
        }
        CheckpointError::MissingTensor { path: self.folder.clone(), name: name.to_owned() }
    }
}
