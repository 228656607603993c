//! Reads a block's tensors, and knows which of them nobody has read.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::Progress;
use crate::Dtype;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::folder::Checkpoint;
use crate::checkpoint::locate::full_name;
use crate::checkpoint::store::Store;
use crate::checkpoint::tensors::FileTensor;

pub(super) struct Reader<'a, S: Store> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) prefix: &'a str,
    /// Names as the family has them.
    read: RefCell<BTreeSet<String>>,
    pub(super) store: &'a mut S,
    progress: &'a mut dyn FnMut(Progress<'_>),
    pub(super) bytes: u64,
    total: u64,
    /// The number of the first expert in the names of tensors.
    pub(super) first_expert: usize,
}

impl<'a, S: Store> Reader<'a, S> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        prefix: &'a str,
        store: &'a mut S,
        progress: &'a mut dyn FnMut(Progress<'_>),
        total: u64,
    ) -> Reader<'a, S> {
        Reader { checkpoint, prefix, read: RefCell::default(), store, progress, bytes: 0, total, first_expert: 0 }
    }

    /// A matrix `[columns, rows]` turned to `[rows, columns]`.
    pub(super) fn turned(
        &mut self,
        tensor: &FileTensor<'_>,
        [columns, rows]: [usize; 2],
        dtype: Dtype,
    ) -> Result<S::Buffer, CheckpointError> {
        let values = tensor.values::<f32>()?;
        let turned: Vec<f32> = (0..rows)
            .flat_map(|row| (0..columns).map(move |c| (c, row)))
            .map(|(c, row)| values[c * rows + row])
            .collect();
        self.bytes += tensor.bytes() as u64;
        (self.progress)(Progress { bytes: self.bytes, of: self.total, tensor: tensor.name() });
        self.store.turned(dtype, tensor, &turned)
    }

    /// Whether the block has a tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        self.checkpoint.knows(&self.full(name))
    }

    pub(super) fn full(&self, name: &str) -> String {
        full_name(self.prefix, name)
    }

    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<FileTensor<'a>, CheckpointError> {
        self.read.borrow_mut().insert(name.to_owned());
        self.checkpoint.read_shaped(&self.full(name), shape)
    }

    /// Puts a tensor's values into a buffer, from element `at` on.
    pub(super) fn put(
        &mut self,
        buffer: &mut S::Buffer,
        at: usize,
        values: &FileTensor<'_>,
    ) -> Result<(), CheckpointError> {
        self.store.put(buffer, at, values)?;
        self.bytes += values.bytes() as u64;
        (self.progress)(Progress { bytes: self.bytes, of: self.total, tensor: values.name() });
        Ok(())
    }

    /// Puts the bias beside a matrix into a buffer, where there is one.
    pub(super) fn put_bias(
        &mut self,
        buffer: &mut Option<S::Buffer>,
        at: usize,
        matrix: &str,
        length: usize,
    ) -> Result<(), CheckpointError> {
        let Some(buffer) = buffer else { return Ok(()) };
        let name = bias_of(matrix);
        let tensor = self.tensor(&name, &[length])?;
        self.put(buffer, at, &tensor)
    }

    /// A buffer of one tensor.
    pub(super) fn whole(&mut self, tensor: &FileTensor<'_>, dtype: Dtype) -> Result<S::Buffer, CheckpointError> {
        let mut buffer = self.store.buffer(dtype, tensor.elements())?;
        self.put(&mut buffer, 0, tensor)?;
        Ok(buffer)
    }

    /// A buffer of a vector, in f32.
    pub(super) fn vector(&mut self, name: &str, length: usize) -> Result<S::Buffer, CheckpointError> {
        let tensor = self.tensor(name, &[length])?;
        self.whole(&tensor, Dtype::F32)
    }

    /// The names that belong to the block and have not been read.
    fn unread(&self) -> Vec<&'a str> {
        let read: BTreeSet<String> = self.read.borrow().iter().map(|name| self.full(name)).collect();
        let names = self.read.borrow();
        let first = |name: &str| name.split('.').next().unwrap_or(name).to_owned();
        // Of what the block is in, the parts of which something is read; likewise of a block that is a whole layer.
        let is_layer =
            self.prefix.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
        let parts: BTreeSet<String> =
            names.iter().filter(|name| is_layer || name.starts_with('^')).map(|name| first(name)).collect();
        let mut below: Vec<String> = parts.iter().map(|part| self.full(&format!("{part}."))).collect();
        if !is_layer {
            below.push(format!("{}.", self.prefix));
        }
        let unread = below.iter().flat_map(|prefix| {
            let names = self.checkpoint.names_below(prefix);
            names.filter(|name| !read.contains(*name)).collect::<Vec<_>>()
        });
        unread.collect()
    }

    /// What the block has that was not read, in words.
    pub(super) fn others(&self) -> String {
        const SHOWN: usize = 4;
        let others = self.unread();
        let described = others.iter().take(SHOWN).map(|full| {
            let name = full.strip_prefix(self.prefix).and_then(|rest| rest.strip_prefix('.')).unwrap_or(full);
            match self.checkpoint.shape(full) {
                Some(shape) => format!("`{name}` {shape:?}"),
                None => format!("`{name}`"),
            }
        });
        let text = described.collect::<Vec<_>>().join(", ");
        match others.len() {
            0 => "nothing".into(),
            count if count > SHOWN => format!("{text} and {} more tensors", count - SHOWN),
            _ => text,
        }
    }

    pub(super) fn require_all_read(&self, idle: &[String]) -> Result<(), CheckpointError> {
        let idle: BTreeSet<String> = idle.iter().map(|name| self.full(name)).collect();
        match self.unread().into_iter().find(|name| !idle.contains(*name)) {
            Some(name) => Err(CheckpointError::UnreadTensor { name: name.to_owned() }),
            None => Ok(()),
        }
    }
}

/// The name of the bias beside a matrix.
fn bias_of(matrix: &str) -> String {
    format!("{}.bias", matrix.strip_suffix(".weight").unwrap_or(matrix))
}
