//! Our side: what the library selects for a layer by its public API.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    Choices, ExpertWeights, LayerArgs, LayerDesc, LayerPlan, LayerWeights, RouterWeights, Stage, TokenSums,
};
use moe_kernels::{Dtype, Kernels, Workspace};

use crate::Result;
use crate::cases::Case;
use crate::inputs::{Batch, Weights};

/// A layer's plan with its buffers.
pub struct Prepared {
    plan: LayerPlan,
    workspace: Workspace,
    /// Not asked: the choices are given.
    router: CudaSlice<bf16>,
    y: CudaSlice<bf16>,
}

/// What a launch belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Lists of rows: none of Triton's four launches makes them either.
    Lists,
    /// To the hidden rows, the activation included.
    First,
    /// To y, the sum over a token's choices included.
    Second,
}

impl Prepared {
    pub fn new(stream: &Arc<CudaStream>, kernels: &Kernels, case: &Case, token_sums: TokenSums) -> Result<Prepared> {
        let shape = &case.shape;
        let desc = LayerDesc::new(Dtype::Bf16, shape.hidden, shape.intermediate, shape.experts, shape.top_k);
        let plan = desc.token_sums(token_sums).plan(case.tokens, kernels.device())?;
        kernels.preload(plan.stages_of_choices().map(|(_, selection)| selection.kernel))?;
        Ok(Prepared {
            workspace: Workspace::new(stream, plan.workspace_bytes())?,
            plan,
            router: stream.alloc_zeros(shape.experts * shape.hidden)?,
            y: stream.alloc_zeros(case.tokens * shape.hidden)?,
        })
    }

    /// The launches of [`Prepared::run`] in order: kernel, and what it belongs to.
    pub fn launches(&self) -> Vec<(String, Part)> {
        let part = |stage| match stage {
            Stage::GateUp => Part::First,
            Stage::Down | Stage::DownCombine | Stage::Combine => Part::Second,
            _ => Part::Lists,
        };
        self.plan.stages_of_choices().map(|(stage, selection)| (selection.kernel.name(), part(stage))).collect()
    }

    pub fn run(&mut self, stream: &Arc<CudaStream>, kernels: &Kernels, weights: &Weights, batch: &Batch) -> Result<()> {
        let experts = ExpertWeights::new(Weight::new(&weights.gate_up), Weight::new(&weights.down));
        let weights = LayerWeights::new(RouterWeights::new(&self.router), experts);
        let args =
            LayerArgs::new(&batch.x, &mut self.y).choices(Choices::new(&batch.device_ids, &batch.device_weights));
        Ok(self.plan.forward(kernels, stream, &weights, args, &mut self.workspace)?)
    }

    /// `[T, H]`.
    pub fn y(&self, stream: &Arc<CudaStream>) -> Result<Vec<bf16>> {
        Ok(stream.clone_dtoh(&self.y)?)
    }
}
