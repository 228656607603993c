//! From tensors of a checkpoint to the packed weights of a layer.

use std::cell::RefCell;
use std::collections::BTreeSet;

use moe_kernels::Element;
use moe_kernels::layer::LayerDesc;
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::rules::{Glu, Layout};

use super::checkpoint::{Checkpoint, Tensor};
use super::error::HfError;
use super::families::MODULE_EXPERTS;
use super::family::{Experts, Located, Matrices, fill};

/// A layer's weights on the host, in the shapes of [`moe_kernels::layer::LayerWeights`].
pub struct Weights<T> {
    /// `[E,H]`.
    pub router: RouterWeight<T>,
    /// `[E]`.
    pub router_bias: Option<Vec<f32>>,
    /// `[E]`.
    pub correction_bias: Option<Vec<f32>>,
    pub gate_up: Matrix<T>,
    pub down: Matrix<T>,
    /// The shared expert's two matrices.
    pub shared: Option<(Matrix<T>, Matrix<T>)>,
}

/// The router's weight, in a type that holds the checkpoint's values exactly.
pub enum RouterWeight<T> {
    Same(Vec<T>),
    F32(Vec<f32>),
}

impl<T: Element> RouterWeight<T> {
    /// The weight in `T` if that loses nothing, else in f32.
    pub fn exact(values: Vec<f32>) -> RouterWeight<T> {
        let same: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
        if same.iter().zip(&values).all(|(same, value)| same.to_f32() == *value) {
            RouterWeight::Same(same)
        } else {
            RouterWeight::F32(values)
        }
    }

    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            RouterWeight::Same(values) => values.iter().map(|value| value.to_f32()).collect(),
            RouterWeight::F32(values) => values.clone(),
        }
    }
}

/// A matrix for each expert, `weight [E,Nb,K]` or `[E,K,Nb]`, `bias [E,Nb]`.
pub struct Matrix<T> {
    pub weight: Vec<T>,
    pub bias: Option<Vec<T>>,
}

impl<T> Matrix<T> {
    /// What the reference takes.
    pub fn reference(&self, n: usize, k: usize, glu: Glu, layout: Layout) -> ExpertMatrix<'_, T> {
        ExpertMatrix { weight: &self.weight, bias: self.bias.as_deref(), n, k, glu, layout }
    }
}

/// Reads the weights of a block, rounding each value to `T`; biases and corrections of the router stay in f32.
///
/// Fails where the block has a tensor that is not read: it would compute something else.
pub fn load<T: Element>(checkpoint: &Checkpoint, block: &Located) -> Result<Weights<T>, HfError> {
    let Located { prefix, spec } = block;
    let layer = &spec.layer;
    let reader = Reader { checkpoint, prefix, read: RefCell::default() };
    let vector = |name: Option<&str>| -> Result<Option<Vec<f32>>, HfError> {
        name.map(|name| reader.read(name, &[layer.experts])?.to_vec()).transpose()
    };
    let router = RouterWeight::exact(reader.read(spec.router, &[layer.experts, layer.hidden])?.to_vec()?);
    let (gate_up, down) = match reader.found_layout(spec.experts)? {
        Experts::Separate(matrices) => reader.separate(&matrices, layer.experts, layer.hidden, layer.intermediate)?,
        Experts::Packed { gate_up, gate_up_bias, down, down_bias } => {
            let rows = first_rows(layer);
            let mlp = &layer.mlp;
            (
                reader.packed(gate_up, gate_up_bias, layer.experts, rows, layer.hidden, mlp.gate_up.layout)?,
                reader.packed(down, down_bias, layer.experts, layer.hidden, layer.intermediate, mlp.down.layout)?,
            )
        }
    };
    let shared = match (&spec.shared, &layer.shared) {
        (Some(matrices), Some(desc)) => Some(reader.separate(matrices, 1, layer.hidden, desc.intermediate)?),
        _ => None,
    };
    let (router_bias, correction_bias) = (vector(spec.router_bias)?, vector(spec.correction_bias)?);
    reader.require_all_read()?;
    Ok(Weights { router, router_bias, correction_bias, gate_up, down, shared })
}

/// Rows of the first matrix, `Nb`.
fn first_rows(layer: &LayerDesc) -> usize {
    if layer.mlp.gate_up.glu == Glu::None { layer.intermediate } else { 2 * layer.intermediate }
}

struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    prefix: &'a str,
    /// Names below the block's own.
    read: RefCell<BTreeSet<String>>,
}

impl Reader<'_> {
    fn read(&self, name: &str, shape: &[usize]) -> Result<Tensor, HfError> {
        self.read.borrow_mut().insert(name.to_owned());
        self.checkpoint.read_shaped(&self.full(name), shape)
    }

    fn full(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    /// The layout in which the experts are there, if it is the family's own or that of transformers' modules.
    fn found_layout(&self, own: Experts) -> Result<Experts, HfError> {
        let first = |experts: &Experts| match experts {
            Experts::Separate(matrices) => fill(matrices.gate.unwrap_or(matrices.up), 0),
            Experts::Packed { gate_up, .. } => gate_up.to_string(),
        };
        let is_there = |experts: &Experts| self.checkpoint.names(&self.full(&first(experts)));
        if is_there(&own) {
            return Ok(own);
        }
        if matches!(own, Experts::Separate(Matrices { gate: Some(_), .. })) && is_there(&MODULE_EXPERTS) {
            return Ok(MODULE_EXPERTS);
        }
        match self.checkpoint.missing(&self.full(&first(&own))) {
            HfError::MissingTensor { .. } => Err(HfError::ExpertLayout {
                block: self.prefix.to_owned(),
                expected: format!("`{}`", own.names()),
                found: self.others(),
            }),
            // A lost shard or a quantised form.
            other => Err(other),
        }
    }

    /// What the block has that was not read, in words.
    fn others(&self) -> String {
        const SHOWN: usize = 4;
        let prefix = format!("{}.", self.prefix);
        let names = self.checkpoint.names_below(&prefix).map(|name| (name, &name[prefix.len()..]));
        let others: Vec<(&str, &str)> = names.filter(|(_, name)| !self.read.borrow().contains(*name)).collect();
        let described = others.iter().take(SHOWN).map(|(full, name)| match self.checkpoint.shape(full) {
            Some(shape) => format!("`{name}` {shape:?}"),
            None => format!("`{name}`"),
        });
        let text = described.collect::<Vec<_>>().join(", ");
        match others.len() {
            0 => "nothing".into(),
            count if count > SHOWN => format!("{text} and {} more tensors", count - SHOWN),
            _ => text,
        }
    }

    fn require_all_read(&self) -> Result<(), HfError> {
        let prefix = format!("{}.", self.prefix);
        match self.checkpoint.names_below(&prefix).find(|name| !self.read.borrow().contains(&name[prefix.len()..])) {
            Some(name) => Err(HfError::UnreadTensor { name: name.to_owned() }),
            None => Ok(()),
        }
    }

    /// Tensors of each expert, gate rows before up rows.
    fn separate<T: Element>(
        &self,
        matrices: &Matrices,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<(Matrix<T>, Matrix<T>), HfError> {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for expert in 0..experts {
            for name in matrices.gate.iter().chain([&matrices.up]) {
                first.extend(self.read(&fill(name, expert), &[intermediate, hidden])?.to_vec::<T>()?);
            }
            second.extend(self.read(&fill(matrices.down, expert), &[hidden, intermediate])?.to_vec::<T>()?);
        }
        Ok((Matrix { weight: first, bias: None }, Matrix { weight: second, bias: None }))
    }

    /// One tensor for all experts, as it is.
    fn packed<T: Element>(
        &self,
        weight: &str,
        bias: Option<&str>,
        experts: usize,
        rows: usize,
        columns: usize,
        layout: Layout,
    ) -> Result<Matrix<T>, HfError> {
        let shape = match layout {
            Layout::Nk => [experts, rows, columns],
            Layout::Kn => [experts, columns, rows],
            other => unreachable!("no family has matrices {other:?}"),
        };
        Ok(Matrix {
            weight: self.read(weight, &shape)?.to_vec()?,
            bias: bias.map(|bias| self.read(bias, &[experts, rows])?.to_vec()).transpose()?,
        })
    }
}
