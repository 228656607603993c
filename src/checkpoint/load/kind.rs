//! Tensors of blocks that are more, or other, than a layer.

use super::experts::Pair;
use super::reader::Reader;
use crate::Dtype;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::facts::Experts;
use crate::checkpoint::kind::{Kind, KindSpec, Network};
use crate::checkpoint::locate::fill;
use crate::checkpoint::spec::BlockSpec;
use crate::checkpoint::store::Store;
use crate::checkpoint::weights::MatrixWeight;
use crate::layer::LayerDesc;

impl<S: Store> Reader<'_, S> {
    /// What the block is beside a layer.
    pub(super) fn kind(&mut self, spec: &BlockSpec, layer: &LayerDesc) -> Result<Kind<S::Buffer>, CheckpointError> {
        let (dtype, hidden, inner) = (layer.dtype, layer.hidden, layer.intermediate);
        match spec.kind {
            KindSpec::Layer => Ok(Kind::Layer),
            KindSpec::Network { width, norm } => {
                let down = self.matrix("gate.down_proj.weight", [width, hidden], dtype)?;
                let state_scale = match self.has("gate.router_states_scale") {
                    true => Some(self.vector("gate.router_states_scale", width)?),
                    false => None,
                };
                let gain = self.vector("gate.router_mlp.norm.weight", width)?;
                let layers = [
                    self.matrix("gate.router_mlp.fc1.weight", [width, width], Dtype::F32)?,
                    self.matrix("gate.router_mlp.fc2.weight", [width, width], Dtype::F32)?,
                ];
                let output = self.tensor("gate.router_mlp.out_proj.weight", &[layer.experts, width])?;
                let output = self.whole(&output, Dtype::F32)?;
                Ok(Kind::Network(Network { width, norm, down, state_scale, gain, layers, output }))
            }
            KindSpec::UnitExperts { keys } => {
                let mut matrix = |name: &str| {
                    let tensor = self.tensor(name, &[layer.experts, hidden])?;
                    self.whole(&tensor, dtype)
                };
                Ok(Kind::UnitExperts { input: matrix("down_embed.weight")?, output: matrix("up_embed.weight")?, keys })
            }
            KindSpec::BySequence { part } => {
                let first = self.matrix("fc1.weight", [inner, hidden], dtype)?;
                let mut second = self.store.buffer(dtype, hidden * inner)?;
                let tensor = self.tensor("fc2.weight", &[hidden - part, inner])?;
                self.put(&mut second, 0, &tensor)?;
                let mut bias = Some(self.store.buffer(dtype, hidden)?);
                self.put_bias(&mut bias, 0, "fc2.weight", hidden - part)?;
                Ok(Kind::BySequence { first, second: MatrixWeight { matrix: second, bias } })
            }
        }
    }

    /// The dense MLP beside experts of one unit, as that of one expert.
    pub(super) fn dense(&mut self, spec: &BlockSpec, layer: &LayerDesc) -> Result<Pair<S>, CheckpointError> {
        let Experts::Each(matrices) = spec.experts else {
            return Err(CheckpointError::ExpertLayout {
                block: "dense".into(),
                expected: "one tensor for each matrix".into(),
                found: spec.experts.names().join(", "),
            });
        };
        self.each(&matrices, [1, layer.intermediate, layer.hidden], layer.dtype)
    }

    /// Experts that make the last `part` columns of the output, with zeros for the others; nothing for the first product.
    pub(super) fn parts(
        &mut self,
        spec: &BlockSpec,
        layer: &LayerDesc,
        part: usize,
    ) -> Result<Pair<S>, CheckpointError> {
        let (dtype, hidden, inner) = (layer.dtype, layer.hidden, layer.intermediate);
        let mut matrix = self.store.buffer(dtype, layer.experts * hidden * inner)?;
        let mut bias = Some(self.store.buffer(dtype, layer.experts * hidden)?);
        for expert in 0..layer.experts {
            let name = fill(spec.experts.names()[0], expert);
            let row = expert * hidden + hidden - part;
            let tensor = self.tensor(&name, &[part, inner])?;
            self.put(&mut matrix, row * inner, &tensor)?;
            self.put_bias(&mut bias, row, &name, part)?;
        }
        let nothing = self.store.buffer(dtype, 0)?;
        Ok((MatrixWeight::new(nothing), MatrixWeight { matrix, bias }))
    }

    /// A matrix and the bias beside it.
    fn matrix(
        &mut self,
        name: &str,
        [rows, columns]: [usize; 2],
        dtype: Dtype,
    ) -> Result<MatrixWeight<S::Buffer>, CheckpointError> {
        let tensor = self.tensor(name, &[rows, columns])?;
        let matrix = self.whole(&tensor, dtype)?;
        let mut bias = Some(self.store.buffer(dtype, rows)?);
        self.put_bias(&mut bias, 0, name, rows)?;
        Ok(MatrixWeight { matrix, bias })
    }
}
