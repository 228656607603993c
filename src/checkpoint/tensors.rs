//! One safetensors file, mapped into memory: its header is read when it is opened, its data when it is used.

#![allow(unsafe_code)]

use std::borrow::Cow;
use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Advice, Mmap, MmapOptions};
use safetensors::tensor::{Dtype as FileDtype, Metadata, TensorInfo};

use super::error::CheckpointError;
use super::files::{self, MAX_JSON};
use crate::Element;

// Bytes of a file are taken as numbers as they are.
const _: () = assert!(cfg!(target_endian = "little"), "safetensors files are little-endian");

/// A safetensors file. While it is open nothing may shorten it: reading what is gone ends the process, as with every mapped file.
pub struct TensorFile {
    path: PathBuf,
    metadata: Metadata,
    /// The tensors' data; none where there is not a byte of it.
    data: Option<Mmap>,
}

impl TensorFile {
    /// Reads the header and checks that the file is as long as the header says.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::NoFile`], [`CheckpointError::Safetensors`].
    pub fn open(path: &Path) -> Result<TensorFile, CheckpointError> {
        let invalid = |reason: String| CheckpointError::Safetensors { path: path.to_owned(), reason };
        let (mut file, length) = files::open(path)?;
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(invalid(format!("truncated: {length} bytes")));
        }
        std::io::Read::read_exact(&mut file, &mut prefix).map_err(CheckpointError::io(path))?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_JSON {
            return Err(invalid(format!("a header of {header_bytes} bytes, expected at most {MAX_JSON}")));
        }
        if header_bytes > length - 8 {
            return Err(invalid(format!("truncated: a header of {header_bytes} bytes in a file of {length}")));
        }
        let mut header = vec![0; header_bytes as usize];
        std::io::Read::read_exact(&mut file, &mut header).map_err(CheckpointError::io(path))?;
        // Deserialising also checks that shapes, types and offsets agree.
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| invalid(error.to_string()))?;
        let bytes = metadata.data_len() as u64;
        let needed = 8 + header_bytes + bytes;
        match length.cmp(&needed) {
            Ordering::Less => return Err(invalid(format!("truncated: {length} bytes, its header describes {needed}"))),
            Ordering::Greater => return Err(invalid(format!("{length} bytes, its header describes only {needed}"))),
            Ordering::Equal => {}
        }
        let data = if bytes == 0 {
            None
        } else {
            let length =
                usize::try_from(bytes).map_err(|_| invalid(format!("{bytes} bytes, more than can be mapped")))?;
            // SAFETY: the map is only read. What it holds may be anything, also while it changes; that the file is not shortened is the
            // contract of this type.
            let map = unsafe { MmapOptions::new().offset(8 + header_bytes).len(length).map(&file) };
            Some(map.map_err(CheckpointError::io(path))?)
        };
        Ok(TensorFile { path: path.to_owned(), metadata, data })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A free-text entry of the header.
    pub fn note(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Whether it has a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The names of its tensors.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        let missing = || CheckpointError::MissingTensor { path: self.path.clone(), name: name.to_owned() };
        self.metadata.info(name).ok_or_else(missing)
    }

    /// Extents of a tensor.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<&[usize], CheckpointError> {
        Ok(&self.info(name)?.shape)
    }

    /// The type of a tensor, in words.
    pub(super) fn dtype(&self, name: &str) -> Option<String> {
        self.metadata.info(name).map(|info| format!("{:?}", info.dtype))
    }

    /// A tensor that must have these extents; leading extents of 1 are ignored.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`], [`CheckpointError::TensorShape`].
    pub fn read_shaped(&self, name: &str, extents: &[usize]) -> Result<FileTensor<'_>, CheckpointError> {
        fn trimmed(shape: &[usize]) -> &[usize] {
            &shape[shape.iter().take_while(|&&extent| extent == 1).count()..]
        }
        let found = self.shape(name)?;
        if trimmed(found) == trimmed(extents) {
            return self.read(name);
        }
        Err(CheckpointError::TensorShape {
            path: self.path.clone(),
            name: name.to_owned(),
            expected: format!("{extents:?}"),
            found: found.to_vec(),
        })
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`].
    pub fn read(&self, name: &str) -> Result<FileTensor<'_>, CheckpointError> {
        let info = self.info(name)?;
        let (start, end) = info.data_offsets;
        let (path, name) = (self.path.as_path(), name.to_owned());
        // The header's offsets lie within the file: it was checked when it was opened.
        let bytes = self.data.as_deref().map_or(&[][..], |data| &data[start..end]);
        Ok(FileTensor { path, name, dtype: info.dtype, shape: info.shape.clone(), bytes, whole: None })
    }

    /// Has the system read ahead what will be used soon.
    pub(super) fn will_need(&self, name: &str) {
        if let (Some(info), Some(data)) = (self.metadata.info(name), &self.data) {
            let (start, end) = info.data_offsets;
            // Only a hint, which a system may not know.
            data.advise_range(Advice::WillNeed, start, end - start).ok();
        }
    }
}

/// A tensor as its file holds it.
#[derive(Clone)]
pub struct FileTensor<'a> {
    path: &'a Path,
    name: String,
    dtype: FileDtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
    /// Of a part, the extents of the whole, and its first element there.
    whole: Option<(Vec<usize>, usize)>,
}

const FLOATS: &str = "BF16, F16 or F32";
const INTEGERS: &str = "I32 or I64";

impl<'a> FileTensor<'a> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its size in the file, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// `elements` elements from `start` on, as a tensor of one extent.
    pub(super) fn part(&self, start: usize, elements: usize) -> FileTensor<'a> {
        let size = self.bytes.len().checked_div(self.elements()).unwrap_or(0);
        let bytes = &self.bytes[start * size..][..elements * size];
        let (extents, first) = self.whole();
        let whole = Some((extents.to_vec(), first + start));
        FileTensor { path: self.path, name: self.name.clone(), dtype: self.dtype, shape: vec![elements], bytes, whole }
    }

    /// The extents of the whole tensor, and the number there of the first element here.
    pub(super) fn whole(&self) -> (&[usize], usize) {
        self.whole.as_ref().map_or((&self.shape, 0), |(extents, first)| (extents, *first))
    }

    /// Fails unless it is of a type that is read.
    pub(super) fn check_floats(&self) -> Result<(), CheckpointError> {
        match self.dtype {
            FileDtype::BF16 | FileDtype::F16 | FileDtype::F32 => Ok(()),
            _ => Err(self.wrong_type(FLOATS)),
        }
    }

    /// Fails unless it holds whole numbers.
    pub(super) fn check_integers(&self) -> Result<(), CheckpointError> {
        match self.dtype {
            FileDtype::I32 | FileDtype::I64 => Ok(()),
            _ => Err(self.wrong_type(INTEGERS)),
        }
    }

    fn wrong_type(&self, expected: &'static str) -> CheckpointError {
        CheckpointError::TensorDtype { name: self.name.clone(), found: format!("{:?}", self.dtype), expected }
    }

    /// The values in `T`: the file's own memory where that is their type, else converted, each exactly to f32 and from there to nearest
    /// even.
    ///
    /// # Errors
    /// [`CheckpointError::TensorDtype`] for anything but BF16, F16 and F32; [`CheckpointError::Range`] for a value that becomes infinite.
    pub fn values<T: Element + bytemuck::Pod>(&self) -> Result<Cow<'a, [T]>, CheckpointError> {
        let same = match self.dtype {
            FileDtype::BF16 => T::DTYPE == crate::Dtype::Bf16,
            FileDtype::F16 => T::DTYPE == crate::Dtype::F16,
            FileDtype::F32 => T::DTYPE == crate::Dtype::F32,
            _ => return Err(self.wrong_type(FLOATS)),
        };
        // The format does not align data.
        if let (true, Ok(values)) = (same, bytemuck::try_cast_slice(self.bytes)) {
            return Ok(Cow::Borrowed(values));
        }
        let converted = match self.dtype {
            FileDtype::BF16 => self.convert(|word: [u8; 2]| bf16::from_le_bytes(word).to_f32()),
            FileDtype::F16 => self.convert(|word: [u8; 2]| f16::from_le_bytes(word).to_f32()),
            _ => self.convert(f32::from_le_bytes),
        };
        converted.map(Cow::Owned)
    }

    fn convert<const N: usize, T: Element>(&self, value: impl Fn([u8; N]) -> f32) -> Result<Vec<T>, CheckpointError> {
        let mut lost = None;
        let (words, _) = self.bytes.as_chunks::<N>();
        let converted = words.iter().map(|word| {
            let value = value(*word);
            let rounded = T::from_f32(value);
            if value.is_finite() && !rounded.to_f32().is_finite() {
                lost = Some(value);
            }
            rounded
        });
        let converted = converted.collect();
        match lost {
            None => Ok(converted),
            Some(value) => Err(CheckpointError::Range { name: self.name.clone(), value, dtype: T::DTYPE }),
        }
    }

    /// The values of a tensor of whole numbers.
    ///
    /// # Errors
    /// [`CheckpointError::TensorDtype`] for anything but I32 and I64, and for numbers that 32 bits cannot hold.
    pub fn integers(&self) -> Result<Vec<i32>, CheckpointError> {
        match self.dtype {
            FileDtype::I32 => Ok(self.bytes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word)).collect()),
            FileDtype::I64 => {
                let words = self.bytes.as_chunks::<8>().0.iter().map(|word| i64::from_le_bytes(*word));
                let narrow = words.map(|word| i32::try_from(word).ok()).collect::<Option<Vec<i32>>>();
                narrow.ok_or_else(|| CheckpointError::TensorDtype {
                    name: self.name.clone(),
                    found: "I64 with numbers beyond 32 bits".into(),
                    expected: INTEGERS,
                })
            }
            _ => Err(self.wrong_type(INTEGERS)),
        }
    }

    /// The file that it is from.
    pub fn path(&self) -> &Path {
        self.path
    }
}
