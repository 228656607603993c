//! A layer on the device: its weights, and sets of everything else that passes take in turn.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};
use moe_kernels::experts::{Dispatched, Weight};
use moe_kernels::layer::{ExpertWeights, LayerArgs, LayerDesc, LayerPlan, LayerWeights, Mlp, RouterWeights};
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::gating_dispatch::{self, GatingDispatchArgs, GatingDispatchDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::{Dtype, Kernels, Workspace};

use crate::fill;
use crate::shapes::Shape;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A model's layer with random weights.
pub struct Model<'a> {
    stream: &'a Arc<CudaStream>,
    kernels: &'a Kernels,
    desc: LayerDesc,
    router: CudaSlice<bf16>,
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
}

/// Inputs, intermediates and outputs of one pass.
struct Set {
    x: CudaSlice<bf16>,
    logits: CudaSlice<f32>,
    ids: CudaSlice<i32>,
    weights: CudaSlice<f32>,
    dispatched: Dispatched,
    h: CudaSlice<bf16>,
    y_slots: CudaSlice<bf16>,
    y: CudaSlice<bf16>,
}

/// One operation's pass over set `i`.
pub type Operation<'a> = fn(&mut Passes<'a>, usize) -> Result<()>;

/// A model with the sets of one number of tokens.
pub struct Passes<'a> {
    model: &'a Model<'a>,
    plan: LayerPlan,
    sets: Vec<Set>,
    workspace: Workspace,
}

impl<'a> Model<'a> {
    pub fn new(stream: &'a Arc<CudaStream>, kernels: &'a Kernels, shape: &Shape) -> Result<Model<'a>> {
        let &Shape { model, experts, top_k, hidden, intermediate, .. } = shape;
        let mlp = if model.starts_with("gpt-oss") {
            Mlp::gpt_oss(Dtype::Bf16)
        } else if model.starts_with("switch") || model.starts_with("sparsely") {
            Mlp::relu(Dtype::Bf16)
        } else {
            Mlp::swiglu(Dtype::Bf16)
        };
        let desc = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, top_k).mlp(mlp);
        let deviation = |fan_in: usize| 1.0 / (fan_in as f32).sqrt();
        let values = |len, scale, seed| fill::values(stream, kernels, len, scale, seed);
        Ok(Model {
            stream,
            kernels,
            desc,
            router: values(experts * hidden, deviation(hidden), 1)?,
            gate_up: values(experts * gated(&desc) * intermediate * hidden, deviation(hidden), 2)?,
            down: values(experts * hidden * intermediate, deviation(intermediate), 3)?,
        })
    }

    /// Outputs of the first product for each column of its result.
    pub fn gated(&self) -> usize {
        gated(&self.desc)
    }

    fn weights(&self) -> LayerWeights<'_> {
        let experts = ExpertWeights::new(Weight::new(&self.gate_up), Weight::new(&self.down));
        LayerWeights::new(RouterWeights::new(&self.router), experts)
    }

    /// `sets` sets for batches of `tokens` tokens, each with inputs of its own.
    pub fn passes(&'a self, tokens: usize, sets: usize) -> Result<Passes<'a>> {
        let (stream, device) = (self.stream, self.kernels.device());
        let LayerDesc { hidden, intermediate, experts, top_k, .. } = self.desc;
        let plan = self.desc.plan(tokens, device)?;
        self.kernels.preload(plan.kernels())?;
        let rows = plan.route().rows();
        let set = |index: usize| {
            Ok(Set {
                x: fill::values(stream, self.kernels, tokens * hidden, 1.0, 4 + index as u64)?,
                logits: stream.alloc_zeros(tokens * experts)?,
                ids: stream.alloc_zeros(tokens * top_k)?,
                weights: stream.alloc_zeros(tokens * top_k)?,
                dispatched: Dispatched::new(stream, &rows)?,
                h: stream.alloc_zeros(rows.slots * intermediate)?,
                y_slots: stream.alloc_zeros(rows.slots * hidden)?,
                y: stream.alloc_zeros(tokens * hidden)?,
            })
        };
        let mut passes = Passes {
            model: self,
            plan,
            sets: (0..sets).map(set).collect::<Result<_>>()?,
            workspace: Workspace::new(stream, plan.workspace_bytes())?,
        };
        let alone = [
            gating_dispatch::workspace_bytes(&passes.gating_dispatch_desc(), device)?,
            dispatch::workspace_bytes(&passes.dispatch_desc(), device)?,
            gemm::workspace_bytes(&passes.gate_up_desc(), device)?,
            gemm::workspace_bytes(&passes.down_desc(), device)?,
        ];
        let most = alone.into_iter().fold(plan.workspace_bytes(), usize::max);
        passes.workspace = Workspace::new(stream, most)?;
        Ok(passes)
    }
}

fn gated(desc: &LayerDesc) -> usize {
    if desc.mlp.gate_up.glu.is_gated() { 2 } else { 1 }
}

impl Passes<'_> {
    fn tokens(&self) -> usize {
        self.plan.tokens()
    }

    fn dispatch_desc(&self) -> DispatchDesc {
        DispatchDesc::new(self.tokens(), self.model.desc.experts, self.model.desc.top_k, self.plan.tile_m())
    }

    fn gating_dispatch_desc(&self) -> GatingDispatchDesc {
        GatingDispatchDesc::new(self.model.desc.gating, self.dispatch_desc())
    }

    pub fn plan(&self) -> &LayerPlan {
        &self.plan
    }

    pub fn router(&mut self, i: usize) -> Result<()> {
        let (tokens, Model { stream, kernels, desc, router, .. }) = (self.tokens(), self.model);
        let Set { x, logits, .. } = &mut self.sets[i];
        let desc = RouterDesc::new(Dtype::Bf16, tokens, desc.experts, desc.hidden);
        Ok(router::forward(kernels, stream, &desc, RouterArgs::new(&*x, router, logits))?)
    }

    pub fn gating(&mut self, i: usize) -> Result<()> {
        let (tokens, Model { stream, kernels, desc, .. }) = (self.tokens(), self.model);
        let Set { logits, ids, weights, .. } = &mut self.sets[i];
        let desc = GatingDesc::new(tokens, desc.experts, desc.top_k, desc.gating);
        Ok(gating::forward(kernels, stream, &desc, GatingArgs::new(&*logits, ids, weights))?)
    }

    pub fn dispatch(&mut self, i: usize) -> Result<()> {
        let (desc, Model { stream, kernels, .. }) = (self.dispatch_desc(), self.model);
        let Set { ids, weights, dispatched, .. } = &mut self.sets[i];
        let args = DispatchArgs::new(&*ids, dispatched, &mut self.workspace).weights(&*weights);
        Ok(dispatch::forward(kernels, stream, &desc, args)?)
    }

    pub fn gating_dispatch(&mut self, i: usize) -> Result<()> {
        let (desc, Model { stream, kernels, .. }) = (self.gating_dispatch_desc(), self.model);
        let Set { logits, ids, weights, dispatched, .. } = &mut self.sets[i];
        let args = GatingDispatchArgs::new(&*logits, ids, weights, dispatched, &mut self.workspace);
        Ok(gating_dispatch::forward(kernels, stream, &desc, args)?)
    }

    pub fn gate_up_desc(&self) -> GemmDesc {
        let desc = &self.model.desc;
        let rows = Rows::Grouped(self.plan.route().rows());
        GemmDesc::new(Dtype::Bf16, rows, desc.intermediate, desc.hidden)
            .gather(true)
            .weight(desc.mlp.gate_up)
            .activation(desc.mlp.activation)
            .split(true)
    }

    pub fn down_desc(&self) -> GemmDesc {
        let desc = &self.model.desc;
        let rows = Rows::Grouped(self.plan.route().rows());
        GemmDesc::new(Dtype::Bf16, rows, desc.hidden, desc.intermediate).weight(desc.mlp.down).split(true)
    }

    pub fn gate_up(&mut self, i: usize) -> Result<()> {
        self.gate_up_by(i, &self.gate_up_desc())
    }

    /// By the kernel that `product` leads to.
    pub fn gate_up_by(&mut self, i: usize, product: &GemmDesc) -> Result<()> {
        let Model { stream, kernels, gate_up, .. } = self.model;
        let Set { x, dispatched, h, .. } = &mut self.sets[i];
        let args = GemmArgs::new(&*x, Weight::new(gate_up), h).dispatched(dispatched).workspace(&mut self.workspace);
        Ok(gemm::forward(kernels, stream, product, args)?)
    }

    pub fn down(&mut self, i: usize) -> Result<()> {
        self.down_by(i, &self.down_desc())
    }

    /// By the kernel that `product` leads to.
    pub fn down_by(&mut self, i: usize, product: &GemmDesc) -> Result<()> {
        let Model { stream, kernels, down, .. } = self.model;
        let Set { h, dispatched, y_slots, .. } = &mut self.sets[i];
        let args =
            GemmArgs::new(&*h, Weight::new(down), y_slots).dispatched(dispatched).out_scale(dispatched.slot_weight());
        let args = args.workspace(&mut self.workspace);
        Ok(gemm::forward(kernels, stream, product, args)?)
    }

    pub fn combine(&mut self, i: usize) -> Result<()> {
        let Model { stream, kernels, desc, .. } = self.model;
        let sum = CombineDesc::new(Dtype::Bf16, self.plan.route().rows(), desc.hidden);
        let Set { y_slots, dispatched, y, .. } = &mut self.sets[i];
        Ok(combine::forward(kernels, stream, &sum, CombineArgs::new(&*y_slots, dispatched, y))?)
    }

    pub fn layer(&mut self, i: usize) -> Result<()> {
        let Model { stream, kernels, .. } = self.model;
        let Set { x, y, .. } = &mut self.sets[i];
        let args = LayerArgs::new(&*x, y);
        Ok(self.plan.forward(kernels, stream, &self.model.weights(), args, &mut self.workspace)?)
    }

    /// Experts that have rows, on average over the sets.
    pub fn live_experts(&self) -> Result<f64> {
        let mut live = 0;
        for set in &self.sets {
            let counts = self.model.stream.clone_dtoh(set.dispatched.counts())?;
            live += counts[..self.model.desc.experts].iter().filter(|&&count| count > 0).count();
        }
        Ok(live as f64 / self.sets.len() as f64)
    }

    /// Runs set 0, the parts and then the whole, which must give the same bits, finite and not all zero: a wrong kernel may be fast. Each
    /// operation finds there what it reads.
    pub fn sound(&mut self) -> Result<()> {
        let read = |passes: &Self| passes.model.stream.clone_dtoh(&passes.sets[0].y.slice(..passes.sample()));
        for part in [Self::router, Self::gating_dispatch, Self::gate_up, Self::down, Self::combine] {
            part(self, 0)?;
        }
        let parts = read(self)?;
        self.layer(0)?;
        let whole = read(self)?;
        if parts != whole {
            return Err("the operations one by one give other bits than the layer".into());
        }
        if !whole.iter().all(|y| y.is_finite()) || whole.iter().all(|y| *y == bf16::ZERO) {
            return Err("y is not finite, or zero throughout".into());
        }
        Ok(())
    }

    /// Elements of y that are looked at.
    fn sample(&self) -> usize {
        self.sets[0].y.len().min(1 << 22)
    }
}
