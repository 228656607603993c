//! Tensors of a checkpoint folder: `model.safetensors`, or shards named by `model.safetensors.index.json`.
//!
//! Only headers are read when a checkpoint is opened, and of the data only the tensors that are asked for.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use moe_kernels::Element;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::error::{HfError, Lost};
use super::files::{self, MAX_JSON};

/// One safetensors file, of which the header is in memory.
pub struct TensorFile {
    path: PathBuf,
    metadata: Metadata,
    data_start: u64,
}

impl TensorFile {
    /// Reads the header and checks that the file is as long as the header says.
    pub fn open(path: &Path) -> Result<TensorFile, HfError> {
        let invalid = |reason: String| HfError::Safetensors { path: path.to_owned(), reason };
        let (mut file, length) = files::open(path)?;
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(invalid(format!("truncated: {length} bytes")));
        }
        file.read_exact(&mut prefix).map_err(HfError::io(path))?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_JSON {
            return Err(invalid(format!("a header of {header_bytes} bytes, expected at most {MAX_JSON}")));
        }
        if header_bytes > length - 8 {
            return Err(invalid(format!("truncated: a header of {header_bytes} bytes in a file of {length}")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(HfError::io(path))?;
        // Deserialising also checks that shapes, types and offsets agree.
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| invalid(error.to_string()))?;
        let needed = 8 + header_bytes + metadata.data_len() as u64;
        match length.cmp(&needed) {
            Ordering::Less => Err(invalid(format!("truncated: {length} bytes, its header describes {needed}"))),
            Ordering::Greater => Err(invalid(format!("{length} bytes, its header describes only {needed}"))),
            Ordering::Equal => Ok(TensorFile { path: path.to_owned(), metadata, data_start: 8 + header_bytes }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A free-text entry of the header.
    pub fn note(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, HfError> {
        let missing = || HfError::MissingTensor { path: self.path.clone(), name: name.to_owned() };
        self.metadata.info(name).ok_or_else(missing)
    }

    /// Extents of a tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], HfError> {
        Ok(&self.info(name)?.shape)
    }

    /// Reads a tensor that must have these extents; leading extents of 1 are ignored. Nothing is read of one that has others.
    pub fn read_shaped(&self, name: &str, extents: &[usize]) -> Result<Tensor, HfError> {
        fn trimmed(shape: &[usize]) -> &[usize] {
            &shape[shape.iter().take_while(|&&extent| extent == 1).count()..]
        }
        let found = self.shape(name)?;
        if trimmed(found) == trimmed(extents) {
            return self.read(name);
        }
        Err(HfError::TensorShape {
            path: self.path.clone(),
            name: name.to_owned(),
            expected: format!("{extents:?}"),
            found: found.to_vec(),
        })
    }

    /// Reads a whole tensor.
    pub fn read(&self, name: &str) -> Result<Tensor, HfError> {
        let info = self.info(name)?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        let (mut file, _) = files::open(&self.path)?;
        file.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(HfError::io(&self.path))?;
        file.read_exact(&mut bytes).map_err(HfError::io(&self.path))?;
        Ok(Tensor { name: name.to_owned(), dtype: info.dtype, shape: info.shape.clone(), bytes })
    }
}

/// A tensor as the file holds it.
pub struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values, each converted exactly to f32 and from there rounded to `T`.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>, HfError> {
        fn convert<const N: usize, T: Element>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<T> {
            let (words, _) = bytes.as_chunks::<N>();
            words.iter().map(|word| T::from_f32(value(*word))).collect()
        }
        match self.dtype {
            Dtype::BF16 => Ok(convert(&self.bytes, |word: [u8; 2]| bf16::from_le_bytes(word).to_f32())),
            Dtype::F16 => Ok(convert(&self.bytes, |word: [u8; 2]| f16::from_le_bytes(word).to_f32())),
            Dtype::F32 => Ok(convert(&self.bytes, f32::from_le_bytes)),
            other => Err(HfError::TensorDtype { name: self.name.clone(), found: format!("{other:?}") }),
        }
    }

    /// The values of an I32 tensor.
    pub fn to_i32(&self) -> Result<Vec<i32>, HfError> {
        match self.dtype {
            Dtype::I32 => Ok(self.bytes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word)).collect()),
            other => Err(HfError::TensorDtype { name: self.name.clone(), found: format!("{other:?}, not I32") }),
        }
    }
}

/// The files of a checkpoint folder.
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

    /// Opens the single file if there is one, else the shards of the index that are there.
    ///
    /// A shard that is missing is an error when one of its tensors is asked for: often only a few are downloaded.
    pub fn open(folder: &Path) -> Result<Checkpoint, HfError> {
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
            return Err(HfError::NoTensors { folder: folder.to_owned(), single: Self::SINGLE, index: Self::INDEX });
        }
        Ok(checkpoint)
    }

    fn open_shards(&mut self, index_path: &Path) -> Result<(), HfError> {
        let invalid = |reason: String| HfError::Index { path: index_path.to_owned(), reason };
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
    pub fn names(&self, name: &str) -> bool {
        self.contains(name) || self.lost.contains_key(name)
    }

    /// Names of all tensors that begin with `prefix`, also of those in shards that are not there.
    pub fn names_below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        fn below<'a, T>(map: &'a BTreeMap<String, T>, prefix: &'a str) -> impl Iterator<Item = &'a str> {
            let names = map.range(prefix.to_owned()..).map(|(name, _)| name.as_str());
            names.take_while(move |name| name.starts_with(prefix))
        }
        below(&self.index, prefix).chain(below(&self.lost, prefix))
    }

    /// Extents of a tensor that can be read.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.files[*self.index.get(name)?].shape(name).ok()
    }

    /// Reads a tensor that must have these extents, as [`TensorFile::read_shaped`] does.
    pub fn read_shaped(&self, name: &str, extents: &[usize]) -> Result<Tensor, HfError> {
        match self.index.get(name) {
            Some(&file) => self.files[file].read_shaped(name, extents),
            None => Err(self.missing(name)),
        }
    }

    /// Why a tensor cannot be read: its shard is not there, or there is a quantised form instead, or nothing.
    pub fn missing(&self, name: &str) -> HfError {
        if let Some((shard, lost)) = self.lost.get(name) {
            return HfError::Shard { shard: shard.clone(), index: Self::INDEX, name: name.to_owned(), lost: *lost };
        }
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let quantised = ["_blocks", ".qweight", ".weight_packed"].map(|suffix| format!("{stem}{suffix}"));
        for other in quantised {
            if let Some(info) = self.index.get(&other).and_then(|&file| self.files[file].metadata.info(&other)) {
                return HfError::TensorDtype { name: other, found: format!("{:?}", info.dtype) };
            }
        }
        HfError::MissingTensor { path: self.folder.clone(), name: name.to_owned() }
    }
}
