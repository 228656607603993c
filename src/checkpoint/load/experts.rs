//! The experts' matrices, however a checkpoint holds them.

use super::reader::Reader;
use crate::Dtype;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::facts::{Experts, MODULE, Matrices};
use crate::checkpoint::locate::fill;
use crate::checkpoint::spec::BlockSpec;
use crate::checkpoint::store::Store;
use crate::checkpoint::tensors::FileTensor;
use crate::checkpoint::weights::MatrixWeight;
use crate::layer::LayerDesc;
use crate::rules::{Glu, Layout};

/// Names and extents of one product's tensors of all experts.
struct Together<'a> {
    weight: &'a str,
    bias: Option<&'a str>,
    /// Of experts behind them.
    behind: Option<&'a str>,
    rows: usize,
    columns: usize,
}

impl<S: Store> Reader<'_, S> {
    /// Both products of the experts that have weights, as they are found; sets their layout.
    pub(super) fn experts(&mut self, spec: &BlockSpec, layer: &mut LayerDesc) -> Result<Pair<S>, CheckpointError> {
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
}

pub(super) type Pair<S> = (MatrixWeight<<S as Store>::Buffer>, MatrixWeight<<S as Store>::Buffer>);
