//! From tensors of a checkpoint to the packed weights of a layer.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::error::CheckpointError;
use super::family::{Experts, MODULE, Matrices};
use super::folder::Checkpoint;
use super::kind::{Bank, Kind, KindSpec};
use super::locate::{fill, full_name};
use super::spec::BlockSpec;
use super::store::Store;
use super::tensors::FileTensor;
use super::weights::{AroundWeights, BlockWeights, Loaded, MatrixWeight};
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
) -> Result<Loaded<S::Buffer>, CheckpointError> {
    let read = RefCell::default();
    let mut reader = Reader { checkpoint, prefix, read, store, progress, bytes: 0, total, first_expert: 0 };
    let (desc, weights) = reader.bank(spec, dtype)?;
    let kind = match &spec.bank {
        Some(bank) => {
            let (desc, weights) = reader.bank(bank, dtype)?;
            Kind::Banks(Box::new(Bank { desc, weights }))
        }
        None => reader.kind(spec, &desc)?,
    };
    reader.require_all_read(&spec.idle)?;
    Ok(Loaded { desc, weights, kind, capacity: spec.capacity })
}

/// The layer with activations and experts' weights of type `dtype`.
fn stored_as(layer: &LayerDesc, dtype: Dtype) -> LayerDesc {
    let mut layer = *layer;
    layer.dtype = dtype;
    let shared = layer.shared.as_mut().map(|shared| &mut shared.mlp);
    let latent = layer.latent.as_mut();
    for weight in latent.into_iter().flat_map(|latent| [&mut latent.input, &mut latent.output]) {
        weight.format = dtype.into();
    }
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

/// The name of the bias beside a matrix.
fn bias_of(matrix: &str) -> String {
    format!("{}.bias", matrix.strip_suffix(".weight").unwrap_or(matrix))
}

/// Names and extents of one product's tensors of all experts.
struct Together<'a> {
    weight: &'a str,
    bias: Option<&'a str>,
    /// Of experts behind them.
    behind: Option<&'a str>,
    rows: usize,
    columns: usize,
}

pub(super) struct Reader<'a, S: Store> {
    checkpoint: &'a Checkpoint,
    prefix: &'a str,
    /// Names as the family has them.
    read: RefCell<BTreeSet<String>>,
    pub(super) store: &'a mut S,
    progress: &'a mut dyn FnMut(Progress<'_>),
    bytes: u64,
    total: u64,
    /// The number of the first expert in the names of tensors.
    first_expert: usize,
}

impl<'a, S: Store> Reader<'a, S> {
    /// A layer's weights, but for what it is beside a layer.
    fn bank(
        &mut self,
        spec: &BlockSpec,
        dtype: Dtype,
    ) -> Result<(LayerDesc, BlockWeights<S::Buffer>), CheckpointError> {
        self.first_expert = spec.first_expert;
        let mut layer = stored_as(&spec.layer, dtype);
        let router = match spec.router {
            None => None,
            Some(name) => {
                let (rows, columns) = (spec.logit_columns(), layer.hidden);
                let shape = if spec.router_transposed { [columns, rows] } else { [rows, columns] };
                let router = self.tensor(name, &shape)?;
                // A norm of the router's input is not rounded before an f32 router sees it.
                layer.router_dtype = if layer.norms.router.is_some() { Dtype::F32 } else { exact(&router, dtype)? };
                match spec.router_transposed {
                    true => Some(self.turned(&router, shape, layer.router_dtype)?),
                    false => Some(self.whole(&router, layer.router_dtype)?),
                }
            }
        };
        let (gate_up, down) = match spec.kind {
            KindSpec::BySequence { part } => self.parts(spec, &layer, part)?,
            KindSpec::UnitExperts { .. } => self.dense(spec, &layer)?,
            _ => self.experts(spec, &mut layer)?,
        };
        let shared = match (&spec.shared, &layer.shared) {
            (Some(matrices), Some(desc)) => Some(self.each(matrices, [1, desc.intermediate, layer.hidden], dtype)?),
            _ => None,
        };
        let shared_gate = match spec.shared_gate {
            Some(name) => {
                let gate = self.tensor(name, &[1, layer.hidden])?;
                Some(self.whole(&gate, layer.router_dtype)?)
            }
            None => None,
        };
        let (experts, columns) = (layer.experts, layer.logit_columns());
        let mut vector = |name: Option<&str>, length| name.map(|name| self.vector(name, length)).transpose();
        let router_bias = vector(spec.router_bias, columns)?;
        let expert_scale = vector(spec.expert_scale, experts)?;
        let global_scale = vector(spec.global_scale, 1)?;
        let correction_bias = match (spec.correction_bias, spec.correction_row) {
            (None, _) => None,
            (Some(name), None) => Some(self.vector(name, experts)?),
            (Some(name), Some(row)) => {
                let rows = if spec.bank.is_some() || row > 0 { 2 } else { 1 };
                let tensor = self.tensor(name, &[rows, experts])?;
                Some(self.whole(&tensor.part(row * experts, experts), Dtype::F32)?)
            }
        };
        let output_bias = match spec.output_bias {
            Some(name) => {
                let bias = self.tensor(name, &[layer.hidden])?;
                Some(self.whole(&bias, dtype)?)
            }
            None => None,
        };
        let around = self.around(spec, &layer)?;
        let (table, vocabulary) = self.table(spec, &layer)?;
        let map = match spec.weightless {
            None => None,
            Some((count, target)) => {
                let here = experts - count;
                let map: Vec<i32> = (0..experts).map(|e| if e < here { e as i32 } else { target }).collect();
                Some(self.store.numbers(&map)?)
            }
        };
        let weights = BlockWeights {
            router,
            router_bias,
            correction_bias,
            gate_up,
            down,
            shared,
            shared_gate,
            expert_scale,
            global_scale,
            output_bias,
            around,
            table,
            vocabulary,
            map,
        };
        Ok((layer, weights))
    }

    /// A matrix `[columns, rows]` turned to `[rows, columns]`.
    fn turned(
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
        self.store.floats(dtype, &turned)
    }

    /// Whether the block has a tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        self.checkpoint.knows(&self.full(name))
    }

    fn full(&self, name: &str) -> String {
        full_name(self.prefix, name)
    }

    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<FileTensor<'a>, CheckpointError> {
        self.read.borrow_mut().insert(name.to_owned());
        self.checkpoint.read_shaped(&self.full(name), shape)
    }

    /// Both products of the experts that have weights, as they are found; sets their layout.
    fn experts(&mut self, spec: &BlockSpec, layer: &mut LayerDesc) -> Result<Pair<S>, CheckpointError> {
        let dtype = layer.dtype;
        let (intermediate, hidden) = (layer.intermediate, layer.expert_width());
        let sizes = [layer.local_experts() - spec.layer.gating.appended_experts(), intermediate, hidden];
        match self.found_layout(spec)? {
            Experts::Each(matrices) => self.each(&matrices, sizes, dtype),
            Experts::Stacked(matrices) => self.stacked(&matrices, sizes, dtype),
            Experts::Rows(matrices) => {
                layer.mlp.down.layout = Layout::Kn;
                self.rows(&matrices, sizes, dtype)
            }
            Experts::Together { gate_up, gate_up_bias, down, down_bias, glu, layout } => {
                let layout = match layout {
                    Some(layout) => layout,
                    None => self.layout_of(gate_up, down, glu, sizes)?,
                };
                layer.mlp.gate_up.glu = glu;
                (layer.mlp.gate_up.layout, layer.mlp.down.layout) = (layout, layout);
                let experts = sizes[0];
                let rows = if glu.is_gated() { 2 * intermediate } else { intermediate };
                let behind = spec.appended.map_or([None; 2], |names| names.map(Some));
                let count = spec.layer.gating.appended_experts();
                let first = Together { weight: gate_up, bias: gate_up_bias, behind: behind[0], rows, columns: hidden };
                let second =
                    Together { weight: down, bias: down_bias, behind: behind[1], rows: hidden, columns: intermediate };
                let first = self.together(&first, [experts, count], layout, dtype)?;
                Ok((first, self.together(&second, [experts, count], layout, dtype)?))
            }
        }
    }

    /// Weights of norms and of projections round the experts.
    fn around(&mut self, spec: &BlockSpec, layer: &LayerDesc) -> Result<AroundWeights<S::Buffer>, CheckpointError> {
        let (dtype, hidden, width) = (layer.dtype, layer.hidden, layer.expert_width());
        let norms = spec.norms;
        let mut vector = |name: Option<&str>, length: usize| {
            let vector = |name| {
                let tensor = self.tensor(name, &[length])?;
                self.whole(&tensor, dtype)
            };
            name.map(vector).transpose()
        };
        let (router, experts) = (vector(norms.router, hidden)?, vector(norms.experts, hidden)?);
        let (slots, output) = (vector(norms.slots, width)?, vector(norms.output, hidden)?);
        let latent_norm = vector(norms.latent, width)?;
        let latent = match spec.latent {
            None => None,
            Some([input, output]) => {
                let (input, output) = (self.tensor(input, &[width, hidden])?, self.tensor(output, &[hidden, width])?);
                let input = MatrixWeight::new(self.whole(&input, dtype)?);
                Some([input, MatrixWeight::new(self.whole(&output, dtype)?)])
            }
        };
        Ok(AroundWeights { router, experts, slots, output, latent, latent_norm })
    }

    /// The table of experts by word, and how many words it has.
    fn table(&mut self, spec: &BlockSpec, layer: &LayerDesc) -> Result<(Option<S::Buffer>, usize), CheckpointError> {
        let Some(name) = spec.table else { return Ok((None, 0)) };
        let rows = self.checkpoint.shape(&self.full(name)).and_then(|shape| shape.first()).copied().unwrap_or(0);
        let tensor = self.tensor(name, &[rows, layer.top_k])?;
        self.bytes += tensor.bytes() as u64;
        Ok((Some(self.store.integers(&tensor)?), rows))
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

    /// Tensors of each expert, gate rows before up rows.
    pub(super) fn each(
        &mut self,
        matrices: &Matrices,
        [experts, intermediate, hidden]: [usize; 3],
        dtype: Dtype,
    ) -> Result<Pair<S>, CheckpointError> {
        let size = intermediate * hidden;
        let firsts: Vec<&str> = matrices.gate.into_iter().chain([matrices.up]).collect();
        let mut first = self.store.buffer(dtype, experts * firsts.len() * size)?;
        let mut second = self.store.buffer(dtype, experts * size)?;
        let mut bias = |length| matrices.biases.then(|| self.store.buffer(dtype, experts * length)).transpose();
        let (mut first_bias, mut second_bias) = (bias(firsts.len() * intermediate)?, bias(hidden)?);
        for expert in 0..experts {
            let number = self.first_expert + expert;
            if expert + 1 < experts {
                matrices.names().for_each(|name| self.checkpoint.will_need(&self.full(&fill(name, number + 1))));
            }
            for (place, name) in firsts.iter().enumerate() {
                let at = expert * firsts.len() + place;
                let tensor = self.tensor(&fill(name, number), &[intermediate, hidden])?;
                self.put(&mut first, at * size, &tensor)?;
                self.put_bias(&mut first_bias, at * intermediate, &fill(name, number), intermediate)?;
            }
            let tensor = self.tensor(&fill(matrices.down, number), &[hidden, intermediate])?;
            self.put(&mut second, expert * size, &tensor)?;
            self.put_bias(&mut second_bias, expert * hidden, &fill(matrices.down, number), hidden)?;
        }
        Ok((MatrixWeight { matrix: first, bias: first_bias }, MatrixWeight { matrix: second, bias: second_bias }))
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

    /// One tensor for gate and up, or for down, of all experts, and of so many behind them.
    fn together(
        &mut self,
        names: &Together<'_>,
        [experts, count]: [usize; 2],
        layout: Layout,
        dtype: Dtype,
    ) -> Result<MatrixWeight<S::Buffer>, CheckpointError> {
        let &Together { weight, bias, behind, rows, columns } = names;
        let (first, second) = match layout {
            Layout::Nk => (rows, columns),
            Layout::Kn => (columns, rows),
        };
        let size = rows * columns;
        let mut matrix = self.store.buffer(dtype, (experts + count) * size)?;
        let tensor = self.tensor(weight, &[experts, first, second])?;
        for expert in 0..experts {
            self.put(&mut matrix, expert * size, &tensor.part(expert * size, size))?;
        }
        if let Some(behind) = behind {
            let tensor = self.tensor(behind, &[count, first, second])?;
            self.put(&mut matrix, experts * size, &tensor)?;
        }
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
        let first = |experts: &Experts| fill(experts.names()[0], spec.first_expert);
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

    pub(super) fn require_all_read(&self, idle: &[String]) -> Result<(), CheckpointError> {
        let idle: BTreeSet<String> = idle.iter().map(|name| self.full(name)).collect();
        match self.unread().into_iter().find(|name| !idle.contains(*name)) {
            Some(name) => Err(CheckpointError::UnreadTensor { name: name.to_owned() }),
            None => Ok(()),
        }
    }
}

pub(super) type Pair<S> = (MatrixWeight<<S as Store>::Buffer>, MatrixWeight<<S as Store>::Buffer>);
