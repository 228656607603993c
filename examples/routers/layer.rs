//! One layer with random weights, which every router's choices go through.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use moe_kernels::experts::combine::CombineArgs;
use moe_kernels::experts::{Dispatched, Weight, tiles};
use moe_kernels::layer::{
    Choices, ExpertWeights, ExpertsArgs, ExpertsPlan, LayerArgs, LayerDesc, LayerWeights, RouteArgs, RouterWeights,
};
use moe_kernels::rules::AdmissionRule;
use moe_kernels::{Dtype, Kernels, Workspace};

use crate::{EXPERTS, Outcome, TOKENS, normal};

const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 32;

/// Rows and weights on the device.
pub struct Layer<'a> {
    kernels: &'a Kernels,
    stream: &'a Arc<CudaStream>,
    x: CudaSlice<bf16>,
    router: CudaSlice<bf16>,
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
}

impl<'a> Layer<'a> {
    pub fn new(kernels: &'a Kernels, stream: &'a Arc<CudaStream>) -> Outcome<Layer<'a>> {
        let rng = &mut fastrand::Rng::with_seed(11);
        let mut matrix = |rows: usize, columns: usize, scale: f32| {
            let values: Vec<bf16> = (0..rows * columns).map(|_| bf16::from_f32(scale * normal(rng))).collect();
            stream.clone_htod(&values)
        };
        let of_depth = |depth: usize| (depth as f32).sqrt().recip();
        Ok(Layer {
            kernels,
            stream,
            x: matrix(TOKENS, HIDDEN, 1.0)?,
            router: matrix(EXPERTS, HIDDEN, of_depth(HIDDEN))?,
            gate_up: matrix(EXPERTS * 2 * INTERMEDIATE, HIDDEN, of_depth(HIDDEN))?,
            down: matrix(EXPERTS * HIDDEN, INTERMEDIATE, of_depth(INTERMEDIATE))?,
        })
    }

    fn desc(&self, top_k: usize) -> LayerDesc {
        LayerDesc::new(Dtype::Bf16, HIDDEN, INTERMEDIATE, EXPERTS, top_k)
    }

    fn weights(&self) -> LayerWeights<'_> {
        let experts = ExpertWeights::new(Weight::new(&self.gate_up), Weight::new(&self.down));
        LayerWeights::new(RouterWeights::new(&self.router), experts)
    }

    /// The norm of `y` for choices `[T, k]`.
    pub fn by_choices(&self, top_k: usize, choices: Choices<'_>) -> Outcome<f64> {
        self.run(&self.desc(top_k), choices, None)
    }

    /// The norm of `y` and the experts that tokens got, `[T, k]`, where an admission decides who gets which of the choices `[T, K]`.
    pub fn admitted(&self, rule: AdmissionRule, choices: Choices<'_>) -> Outcome<(f64, Vec<i32>)> {
        let mut ids = self.stream.alloc_zeros(TOKENS * rule.top_k)?;
        let desc = self.desc(rule.top_k).admission(Some(rule));
        let norm = self.run(&desc, choices, Some(&mut ids))?;
        Ok((norm, self.stream.clone_dtoh(&ids)?))
    }

    /// In one call; `ids` are written.
    fn run(&self, desc: &LayerDesc, choices: Choices<'_>, ids: Option<&mut CudaSlice<i32>>) -> Outcome<f64> {
        let plan = desc.plan(TOKENS, self.kernels.device())?;
        let mut y = self.stream.alloc_zeros(TOKENS * HIDDEN)?;
        let mut workspace = Workspace::new(self.stream, plan.workspace_bytes())?;
        let mut route = RouteArgs::new();
        route.ids = ids.map(Into::into);
        let args = LayerArgs::new(&self.x, &mut y).choices(choices).route(route);
        plan.forward(self.kernels, self.stream, &self.weights(), args, &mut workspace)?;
        self.norm(&y)
    }

    /// Rows of a tile that suits so many rows.
    pub fn tile_m(&self, rows: usize) -> Outcome<usize> {
        Ok(tiles::select_tile(Dtype::Bf16, rows, EXPERTS, self.kernels.device())?.bm as usize)
    }

    /// The norm of `y` where the rows of the experts are laid out already: the rest of the layer, in its parts.
    pub fn by_rows(&self, dispatched: &Dispatched) -> Outcome<f64> {
        let rows = dispatched.shape();
        let plan = ExpertsPlan::new(&self.desc(1), rows, self.kernels.device())?;
        let mut workspace = Workspace::new(self.stream, plan.workspace_bytes())?;
        let mut y_slots = self.stream.alloc_zeros(rows.slots * HIDDEN)?;
        let args = ExpertsArgs::new(&self.x, dispatched, &mut y_slots);
        plan.forward(self.kernels, self.stream, &self.weights().experts, args, &mut workspace)?;
        let mut y = self.stream.alloc_zeros(TOKENS * HIDDEN)?;
        plan.combine(self.kernels, self.stream, CombineArgs::new(&y_slots, dispatched, &mut y))?;
        self.norm(&y)
    }

    fn norm(&self, y: &CudaSlice<bf16>) -> Outcome<f64> {
        let squares = self.stream.clone_dtoh(y)?.into_iter().map(|value| value.to_f64().powi(2));
        Ok(squares.sum::<f64>().sqrt())
    }
}
