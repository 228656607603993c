//! Tensors of a checkpoint folder: `model.safetensors`, or shards named by `model.safetensors.index.json`.
//!
//! Only headers are read when a checkpoint is opened, and of the data only the tensors that are asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use moe_kernels::Element;
use safetensors::tensor::{Dtype, Metadata};

use super::error::HfError;

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
        let mut file = File::open(path).map_err(HfError::io(path))?;
        let length = file.metadata().map_err(HfError::io(path))?.len();
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(invalid(format!("truncated: {length} bytes")));
        }
        file.read_exact(&mut prefix).map_err(HfError::io(path))?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > length - 8 {
            return Err(invalid(format!("truncated: a header of {header_bytes} bytes in a file of {length}")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(HfError::io(path))?;
        // Deserialising also checks that shapes, types and offsets agree.
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| invalid(error.to_string()))?;
        let needed = 8 + header_bytes + metadata.data_len() as u64;
        if length < needed {
            return Err(invalid(format!("truncated: {length} bytes, its header describes {needed}")));
        }
        Ok(TensorFile { path: path.to_owned(), metadata, data_start: 8 + header_bytes })
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

    /// Reads a whole tensor.
    pub fn read(&self, name: &str) -> Result<Tensor, HfError> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| HfError::MissingTensor { path: self.path.clone(), name: name.to_owned() })?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        let mut file = File::open(&self.path).map_err(HfError::io(&self.path))?;
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

    /// Fails unless the tensor has these extents; leading extents of 1 are ignored.
    pub fn require_shape(&self, extents: &[usize]) -> Result<(), HfError> {
        let trimmed =
            |shape: &[usize]| -> Vec<usize> { shape.iter().copied().skip_while(|&extent| extent == 1).collect() };
        if trimmed(&self.shape) == trimmed(extents) {
            return Ok(());
        }
        Err(HfError::TensorShape {
            name: self.name.clone(),
            expected: format!("{extents:?}"),
            found: self.shape.clone(),
        })
    }
}

/// The files of a checkpoint folder.
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<TensorFile>,
    /// For each tensor its file.
    index: BTreeMap<String, usize>,
}

impl Checkpoint {
    const SINGLE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";

    /// Opens the single file if there is one, else the shards of the index that are there.
    ///
    /// A shard that is missing is an error when one of its tensors is asked for: often only a few are downloaded.
    pub fn open(folder: &Path) -> Result<Checkpoint, HfError> {
        let (single, index_path) = (folder.join(Self::SINGLE), folder.join(Self::INDEX));
        if single.exists() || !index_path.exists() {
            let file = TensorFile::open(&single)?;
            let index = file.names().into_iter().map(|name| (name, 0)).collect();
            return Ok(Checkpoint { folder: folder.to_owned(), files: vec![file], index });
        }
        let json = read_json(&index_path)?;
        let map = json.get("weight_map").and_then(|map| map.as_object()).ok_or_else(|| HfError::Safetensors {
            path: index_path.clone(),
            reason: "no `weight_map` object".into(),
        })?;
        let mut files: Vec<TensorFile> = Vec::new();
        let mut shards: BTreeMap<&str, Option<usize>> = BTreeMap::new();
        let mut index = BTreeMap::new();
        for (tensor, shard) in map {
            let shard =
                shard.as_str().filter(|shard| !shard.contains(['/', '\\'])).ok_or_else(|| HfError::Safetensors {
                    path: index_path.clone(),
                    reason: format!("`weight_map` gives no file name for `{tensor}`"),
                })?;
            let number = match shards.get(shard) {
                Some(&number) => number,
                None => {
                    let path = folder.join(shard);
                    let number = if path.exists() {
                        files.push(TensorFile::open(&path)?);
                        Some(files.len() - 1)
                    } else {
                        None
                    };
                    shards.insert(shard, number);
                    number
                }
            };
            if let Some(number) = number.filter(|&number| files[number].contains(tensor)) {
                index.insert(tensor.clone(), number);
            }
        }
        Ok(Checkpoint { folder: folder.to_owned(), files, index })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Names of all tensors that begin with `prefix`.
    pub fn names_below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.index
            .range(prefix.to_owned()..)
            .map(|(name, _)| name.as_str())
            .take_while(move |name| name.starts_with(prefix))
    }

    /// Reads a whole tensor.
    pub fn read(&self, name: &str) -> Result<Tensor, HfError> {
        match self.index.get(name) {
            Some(&file) => self.files[file].read(name),
            None => Err(self.missing(name)),
        }
    }

    /// Says what is there instead, where a quantised form of the tensor is.
    fn missing(&self, name: &str) -> HfError {
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

/// Reads and parses a JSON file.
pub fn read_json(path: &Path) -> Result<serde_json::Value, HfError> {
    let text = std::fs::read(path).map_err(HfError::io(path))?;
    serde_json::from_slice(&text).map_err(|source| HfError::Json { path: path.to_owned(), source })
}
