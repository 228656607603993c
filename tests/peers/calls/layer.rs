//! A layer by given choices.

use cudarc::driver::CudaSlice;
use moe_kernels::experts::Weight;
use moe_kernels::experts::gemm::SwigluByExpert;
use moe_kernels::layer::{
    Choices, ExpertWeights, LayerArgs, LayerDesc, LayerWeights, MapTable, RouteArgs, RouterWeights,
};
use moe_kernels::{In, Workspace};

use super::{Chosen, down, gpu, junk, up};
use crate::support::compare::Storage;

/// A layer by given choices.
pub struct Experts<'a, T> {
    pub desc: LayerDesc,
    pub x: &'a [T],
    pub chosen: &'a Chosen,
    pub gate_up: &'a [T],
    pub gate_up_bias: Option<&'a [T]>,
    pub down: &'a [T],
    pub down_bias: Option<&'a [T]>,
    /// Where the descriptor has one.
    pub map: Option<&'a [i32]>,
}

impl<T: Storage> Experts<'_, T> {
    pub fn run(&self) -> Vec<T> {
        self.run_with([None; 4])
    }

    /// With numbers of a SwiGLU by expert: alpha, limits of gate and up value, offset.
    pub fn run_with(&self, swiglu: [Option<&[f32]>; 4]) -> Vec<T> {
        let (kernels, stream) = gpu();
        let tokens = self.x.len() / self.desc.hidden;
        let plan = self.desc.plan(tokens, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();
        let buffers = [self.x, self.gate_up, self.down].map(|values| up(&stream, values));
        let [x, gate_up, down_weight] = &buffers;
        let biases = [self.gate_up_bias, self.down_bias].map(|bias| bias.map(|bias| up(&stream, bias)));
        let swiglu = swiglu.map(|values| values.map(|values| up(&stream, values)));
        let [alpha, gate, up_limit, offset] = swiglu.each_ref().map(|values| values.as_ref().map(In::from));
        let mut by_expert = SwigluByExpert::new();
        (by_expert.alpha, by_expert.gate, by_expert.up, by_expert.offset) = (alpha, gate, up_limit, offset);
        let experts =
            ExpertWeights::new(weight(gate_up, &biases[0]), weight(down_weight, &biases[1])).swiglu(by_expert);
        // Choices come from elsewhere, so nobody looks at the router's weight.
        let weights = LayerWeights::new(RouterWeights::new(In::from(x)), experts);
        let (ids, choice_weights) = (up(&stream, &self.chosen.ids), up(&stream, &self.chosen.weights));
        let map = self.map.map(|map| up(&stream, map));
        let mut y = junk::<T>(&stream, self.x.len());
        let mut args = LayerArgs::new(x, &mut y).choices(Choices::new(&ids, &choice_weights));
        if let Some(map) = &map {
            args = args.route(RouteArgs::new().map(MapTable::new(map)));
        }
        plan.forward(kernels, &stream, &weights, args, &mut workspace).unwrap();
        down(&stream, &y, self.x.len())
    }
}

/// A matrix with its bias, if there is one.
pub fn weight<'a, T: Storage>(matrix: &'a CudaSlice<T>, bias: &'a Option<CudaSlice<T>>) -> Weight<'a> {
    match bias {
        Some(bias) => Weight::new(In::from(matrix)).bias(In::from(bias)),
        None => Weight::new(In::from(matrix)),
    }
}
