//! From tensors of a checkpoint to the packed weights of a layer.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::error::CheckpointError;
use super::family::{Experts, MODULE, Matrices};
use super::folder::Checkpoint;
use super::locate::{fill, full_name};
use super::spec::BlockSpec;
use super::store::Store;
use super::tensors::FileTensor;
use super::weights::{BlockWeights, MatrixWeight};
use crate::Dtype;
use crate::layer::LayerDesc;
use crate::rules::{Glu, Layout};

/// How far a load has come.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// Bytes of the files that have been read.
    pub bytes: u64,
    /// Bytes that will have been read at the end.
    pub of: u64,
    /// The tensor that was read last.
    pub tensor: &'a str,
}

/// Reads the weights of a block into `store`, rounding each value to `dtype`; biases and corrections of the router stay in f32, and so does its
/// matrix where `dtype` cannot hold it exactly. Sets the types and the layouts that were found in `layer`.
///
/// Fails where the block has a tensor that is not read: it would compute something else.
pub(super) fn load<S: Store>(
    checkpoint: &Checkpoint,
    prefix: &str,
    spec: &BlockSpec,
    dtype: Dtype,
    store: &mut S,
    total: u64,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(LayerDesc, BlockWeights<S::Buffer>), CheckpointError> {
    let mut layer = stored_as(&spec.layer, dtype);
    let read = RefCell::default();
    let mut reader = Reader { checkpoint, prefix, read, store, progress, bytes: 0, total };
    let router = reader.tensor(spec.router, &[layer.experts, layer.hidden])?;
    layer.router_dtype = exact(&router, dtype)?;
    let router = reader.whole(&router, layer.router_dtype)?;
    let found = reader.found_layout(spec)?;
    let sizes = [layer.experts, layer.intermediate, layer.hidden];
    let (gate_up, down) = match found {
        Experts::Each(matrices) => reader.each(&matrices, sizes, dtype)?,
        Experts::Stacked(matrices) => reader.stacked(&matrices, sizes, dtype)?,
        Experts::Rows(matrices) => {
            layer.mlp.down.layout = Layout::Kn;
            reader.rows(&matrices, sizes, dtype)?
        }
        Experts::Together { gate_up, gate_up_bias, down, down_bias, glu, layout } => {
            let layout = match layout {
                Some(layout) => layout,
                None => reader.layout_of(gate_up, down, glu, sizes)?,
            };
            layer.mlp.gate_up.glu = glu;
            (layer.mlp.gate_up.layout, layer.mlp.down.layout) = (layout, layout);
            let [experts, intermediate, hidden] = sizes;
            let rows = if glu.is_gated() { 2 * intermediate } else { intermediate };
            (
                reader.together(gate_up, gate_up_bias, [experts, rows, hidden], layout, dtype)?,
                reader.together(down, down_bias, [experts, hidden, intermediate], layout, dtype)?,
            )
        }
    };
    let shared = match (&spec.shared, &layer.shared) {
        (Some(matrices), Some(desc)) => Some(reader.each(matrices, [1, desc.intermediate, layer.hidden], dtype)?),
        _ => None,
    };
    let shared_gate = match spec.shared_gate {
        Some(name) => {
            let gate = reader.tensor(name, &[1, layer.hidden])?;
            Some(reader.whole(&gate, layer.router_dtype)?)
        }
        None => None,
    };
    let experts = layer.experts;
    let mut vector = |name: Option<&str>| name.map(|name| reader.vector(name, experts)).transpose();
    let (router_bias, correction_bias) = (vector(spec.router_bias)?, vector(spec.correction_bias)?);
    reader.require_all_read(&spec.idle)?;
    let weights = BlockWeights { router, router_bias, correction_bias, gate_up, down, shared, shared_gate };
    Ok((layer, weights))
}

/// The layer with activations and experts' weights of type `dtype`.
fn stored_as(layer: &LayerDesc, dtype: Dtype) -> LayerDesc {
    let mut layer = *layer;
    layer.dtype = dtype;
    let shared = layer.shared.as_mut().map(|shared| &mut shared.mlp);
    for mlp in [&mut layer.mlp].into_iter().chain(shared) {
        mlp.gate_up.format = dtype.into();
        mlp.down.format = dtype.into();
    }
    layer
}

/// The narrower of `dtype` and f32 that holds all values exactly.
fn exact(tensor: &FileTensor<'_>, dtype: Dtype) -> Result<Dtype, CheckpointError> {
    fn holds<T: crate::Element + bytemuck::Pod>(tensor: &FileTensor<'_>) -> Result<bool, CheckpointError> {
        let values = tensor.values::<f32>()?;
        Ok(values.iter().all(|&value| T::from_f32(value).to_f32() == value))
    }
    let same = match dtype {
        Dtype::Bf16 => holds::<half::bf16>(tensor)?,
        Dtype::F16 => holds::<half::f16>(tensor)?,
        _ => true,
    };
    Ok(if same { dtype } else { Dtype::F32 })
}

struct Reader<'a, S: Store> {
    checkpoint: &'a Checkpoint,
    prefix: &'a str,
    /// Names as the family has them.
    read: RefCell<BTreeSet<String>>,
    store: &'a mut S,
    progress: &'a mut dyn FnMut(Progress<'_>),
    bytes: u64,
    total: u64,
}

impl<'a, S: Store> Reader<'a, S> {
    fn full(&self, name: &str) -> String {
        full_name(self.prefix, name)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<FileTensor<'a>, CheckpointError> {
        self.read.borrow_mut().insert(name.to_owned());
        self.checkpoint.read_shaped(&self.full(name), shape)
    }

    /// Puts a tensor's values into a buffer, from element `at` on.
    fn put(&mut self, buffer: &mut S::Buffer, at: usize, values: &FileTensor<'_>) -> Result<(), CheckpointError> {
        self.store.put(buffer, at, values)?;
        self.bytes += values.bytes() as u64;
        (self.progress)(Progress { bytes: self.bytes, of: self.total, tensor: values.name() });
        Ok(())
    }

    /// A buffer of one tensor.
    fn whole(&mut self, tensor: &FileTensor<'_>, dtype: Dtype) -> Result<S::Buffer, CheckpointError> {
        let mut buffer = self.store.buffer(dtype, tensor.elements())?;
        self.put(&mut buffer, 0, tensor)?;
        Ok(buffer)
    }

    /// A buffer of a vector, in f32.
    fn vector(&mut self, name: &str, length: usize) -> Result<S::Buffer, CheckpointError> {
        let tensor = self.tensor(name, &[length])?;
        self.whole(&tensor, Dtype::F32)
    }

    /// Tensors of each expert, gate rows before up rows.
    fn each(
        &mut self,
        matrices: &Matrices,
        [experts, intermediate, hidden]: [usize; 3],
        dtype: Dtype,
    ) -> Result<Pair<S>, CheckpointError> {
        let size = intermediate * hidden;
        let firsts: Vec<&str> = matrices.gate.into_iter().chain([matrices.up]).collect();
        let mut first = self.store.buffer(dtype, experts * firsts.len() * size)?;
        let mut second = self.store.buffer(dtype, experts * size)?;
        for expert in 0..experts {
            if expert + 1 < experts {
                matrices.names().for_each(|name| self.checkpoint.will_need(&self.full(&fill(name, expert + 1))));
            }
            for (place, name) in firsts.iter().enumerate() {
                let tensor = self.tensor(&fill(name, expert), &[intermediate, hidden])?;
                self.put(&mut first, (expert * firsts.len() + place) * size, &tensor)?;
            }
            let tensor = self.tensor(&fill(matrices.down, expert), &[hidden, intermediate])?;
            self.put(&mut second, expert * size, &tensor)?;
        }
        Ok((MatrixWeight::new(first), MatrixWeight::new(second)))
    }

    /// One tensor for all experts' gates, one for their ups, one for their downs.
    fn stacked(
        &mut self,
        matrices: &Matrices,
        [experts, intermediate, hidden]: [usize; 3],
        dtype: Dtype,
    ) -> Result<Pair<S>, CheckpointError> {
        let first = self.beside(matrices, [experts, intermediate * hidden], &[experts, intermediate, hidden], dtype)?;
        let down = self.tensor(matrices.down, &[experts, hidden, intermediate])?;
        Ok((first, MatrixWeight::new(self.by_expert(&down, experts, dtype)?)))
    }

    /// All experts' rows in one matrix, `[E I,H]`: gates, ups, and downs transposed.
    fn rows(
        &mut self,
        matrices: &Matrices,
        [experts, intermediate, hidden]: [usize; 3],
        dtype: Dtype,
    ) -> Result<Pair<S>, CheckpointError> {
        let shape = [experts * intermediate, hidden];
        let first = self.beside(matrices, [experts, intermediate * hidden], &shape, dtype)?;
        let down = self.tensor(matrices.down, &shape)?;
        Ok((first, MatrixWeight::new(self.by_expert(&down, experts, dtype)?)))
    }

    /// Brings each expert's gate and up, of `size` elements, together.
    fn beside(
        &mut self,
        matrices: &Matrices,
        [experts, size]: [usize; 2],
        shape: &[usize],
        dtype: Dtype,
    ) -> Result<MatrixWeight<S::Buffer>, CheckpointError> {
        let names: Vec<&str> = matrices.gate.into_iter().chain([matrices.up]).collect();
        let mut buffer = self.store.buffer(dtype, experts * names.len() * size)?;
        for (place, name) in names.iter().enumerate() {
            let tensor = self.tensor(name, shape)?;
            for expert in 0..experts {
                self.put(&mut buffer, (expert * names.len() + place) * size, &tensor.part(expert * size, size))?;
            }
        }
        Ok(MatrixWeight::new(buffer))
    }

    /// A tensor of all experts as it is, one expert at a time.
    fn by_expert(
        &mut self,
        tensor: &FileTensor<'_>,
        experts: usize,
        dtype: Dtype,
    ) -> Result<S::Buffer, CheckpointError> {
        let size = tensor.elements() / experts.max(1);
        let mut buffer = self.store.buffer(dtype, tensor.elements())?;
        for expert in 0..experts {
            self.put(&mut buffer, expert * size, &tensor.part(expert * size, size))?;
        }
        Ok(buffer)
    }

    /// One tensor for gate and up, or for down, of all experts.
    fn together(
        &mut self,
        weight: &str,
        bias: Option<&str>,
        [experts, rows, columns]: [usize; 3],
        layout: Layout,
        dtype: Dtype,
    ) -> Result<MatrixWeight<S::Buffer>, CheckpointError> {
        let shape = match layout {
            Layout::Nk => [experts, rows, columns],
            Layout::Kn => [experts, columns, rows],
        };
        let tensor = self.tensor(weight, &shape)?;
        let matrix = self.by_expert(&tensor, experts, dtype)?;
        let bias = match bias {
            Some(bias) => {
                let tensor = self.tensor(bias, &[experts, rows])?;
                Some(self.whole(&tensor, dtype)?)
            }
            None => None,
        };
        Ok(MatrixWeight { matrix, bias })
    }

    /// The order of matrices by the shapes of the tensors: both are transposed or neither.
    fn layout_of(
        &self,
        gate_up: &str,
        down: &str,
        glu: Glu,
        [experts, intermediate, hidden]: [usize; 3],
    ) -> Result<Layout, CheckpointError> {
        let rows = if glu.is_gated() { 2 * intermediate } else { intermediate };
        let shape = |name: &str| self.checkpoint.shape(&self.full(name));
        let transposed =
            shape(gate_up) == Some(&[experts, hidden, rows]) && shape(down) == Some(&[experts, intermediate, hidden]);
        Ok(if transposed { Layout::Kn } else { Layout::Nk })
    }

    /// How the experts are there: in the family's own way, or in that of transformers' modules.
    fn found_layout(&self, spec: &BlockSpec) -> Result<Experts, CheckpointError> {
        let own = spec.experts;
        let first = |experts: &Experts| fill(experts.names()[0], 0);
        let is_there = |experts: &Experts| self.checkpoint.knows(&self.full(&first(experts)));
        if is_there(&own) {
            return Ok(own);
        }
        if spec.layer.mlp.gate_up.glu.is_gated() && is_there(&MODULE) {
            return Ok(MODULE);
        }
        match self.checkpoint.missing(&self.full(&first(&own))) {
            CheckpointError::MissingTensor { .. } => Err(CheckpointError::ExpertLayout {
                block: self.prefix.to_owned(),
                expected: format!("`{}`", own.names().join("`, `")),
                found: self.others(),
            }),
            // A lost shard or a quantised form.
            other => Err(other),
        }
    }

    /// The names that belong to the block and have not been read.
    fn unread(&self) -> Vec<&'a str> {
        let read: BTreeSet<String> = self.read.borrow().iter().map(|name| self.full(name)).collect();
        let mut below = vec![format!("{}.", self.prefix)];
        // Of what the block is in, the parts of which something is read.
        let beside = self.read.borrow();
        let beside = beside.iter().filter(|name| name.starts_with('^'));
        below.extend(beside.map(|name| self.full(&format!("{}.", name.split('.').next().unwrap_or(name)))));
        let unread = below.iter().flat_map(|prefix| {
            let names = self.checkpoint.names_below(prefix);
            names.filter(|name| !read.contains(*name)).collect::<Vec<_>>()
        });
        unread.collect()
    }

    /// What the block has that was not read, in words.
    fn others(&self) -> String {
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

    fn require_all_read(&self, idle: &[String]) -> Result<(), CheckpointError> {
        let idle: BTreeSet<String> = idle.iter().map(|name| self.full(name)).collect();
        match self.unread().into_iter().find(|name| !idle.contains(*name)) {
            Some(name) => Err(CheckpointError::UnreadTensor { name: name.to_owned() }),
            None => Ok(()),
        }
    }
}

type Pair<S> = (MatrixWeight<<S as Store>::Buffer>, MatrixWeight<<S as Store>::Buffer>);
