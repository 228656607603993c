//! Choices for a layer and a number of tokens.

use super::{LayerDesc, Mlp, OPERATION, Stage, Weighting};
use crate::capacity::dispatch::DispatchDesc;
use crate::experts::combine::{self, CombineDesc};
use crate::experts::gemm::{self, GemmDesc, Schedule};
use crate::experts::tiles::select_tile;
use crate::routers::gating_dispatch::{self, GatingDispatchDesc};
use crate::routers::router::{self, RouterDesc};
use crate::rules::Dtype;
use crate::rules::{Activation, Glu};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Error, Kernel, Selection};

/// A launch as planned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step<D> {
    pub(super) desc: D,
    pub(super) selection: Selection,
}

/// Every choice for a layer and a number of tokens: kernels, grids, and where each intermediate lies in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct LayerPlan {
    pub(super) desc: LayerDesc,
    pub(super) device: DeviceInfo,
    pub(super) tokens: usize,
    pub(super) router: Step<RouterDesc>,
    pub(super) dispatch: Step<DispatchDesc>,
    pub(super) gate_up: Step<GemmDesc>,
    pub(super) down: Step<GemmDesc>,
    pub(super) shared: Option<(Step<GemmDesc>, Step<GemmDesc>)>,
    pub(super) combine: Step<CombineDesc>,
    pub(super) regions: Regions,
    pub(super) workspace_bytes: usize,
}

/// Places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regions {
    /// First: the grid barrier and counters of dispatch.
    pub(super) barrier: Region,
    pub(super) logits: Region,
    pub(super) ids: Region,
    pub(super) weights: Region,
    pub(super) counts: Region,
    pub(super) offsets: Region,
    pub(super) slot_token: Region,
    pub(super) token_slot: Region,
    pub(super) slot_weight: Region,
    pub(super) tiles: Region,
    pub(super) num_tiles: Region,
    /// `[slots, I]`, afterwards the shared expert's `[T, I_shared]`.
    pub(super) hidden: Region,
    pub(super) y_slots: Region,
    pub(super) addend: Region,
}

impl LayerPlan {
    /// See [`LayerDesc::plan`].
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn new(desc: &LayerDesc, tokens: usize, device: &DeviceInfo) -> Result<LayerPlan, Error> {
        let &LayerDesc { dtype, router_dtype, hidden, intermediate, experts, top_k, gating, weighting, .. } = desc;
        shape::multiple_of_8(OPERATION, "hidden", hidden)?;
        shape::multiple_of_8(OPERATION, "intermediate", intermediate)?;
        desc.mlp.activation.check(OPERATION, "mlp.activation", desc.mlp.glu)?;
        if let Some(shared) = &desc.shared {
            shape::multiple_of_8(OPERATION, "shared.intermediate", shared.intermediate)?;
            shared.mlp.activation.check(OPERATION, "shared.mlp.activation", shared.mlp.glu)?;
        }

        let router = RouterDesc { x: dtype, weight: router_dtype, tokens, experts, hidden };
        let router = Step { desc: router, selection: router::select(&router, device)? };

        // The height of a tile follows from the number of slots, which is checked by `validate` below.
        let slots = tokens.saturating_mul(top_k);
        let tile_m = select_tile(dtype, slots, experts, device)?.bm as usize;
        let dispatch = DispatchDesc { tokens, experts, top_k, capacity: desc.capacity, tile_m };
        let gating_dispatch = GatingDispatchDesc::new(gating, dispatch);
        let dispatch = Step { desc: dispatch, selection: gating_dispatch::select(&gating_dispatch, device)? };

        let slots = dispatch.desc.slots();
        let schedule = Schedule::Grouped { tile_m, max_tiles: dispatch.desc.max_tiles() };
        let shape = MlpShape { dtype, hidden, intermediate, experts, a_rows: tokens, rows: slots, schedule };
        let (gate_up, down) = shape.steps(&desc.mlp, device)?;
        let shared = desc
            .shared
            .map(|shared| {
                let shape = MlpShape {
                    intermediate: shared.intermediate,
                    experts: 1,
                    rows: tokens,
                    schedule: Schedule::Dense,
                    ..shape
                };
                shape.steps(&shared.mlp, device)
            })
            .transpose()?;

        let combine = CombineDesc { dtype, tokens, top_k, hidden, slots };
        let combine = Step { desc: combine, selection: combine::select(&combine, device)? };

        let mut arena = Arena::new(OPERATION);
        let element = dtype.bytes() as usize;
        let choices = tokens * top_k;
        let input_weighted = weighting == Weighting::Input;
        let shared_intermediate = desc.shared.map_or(0, |shared| shared.intermediate);
        let h = shape::product(OPERATION, "intermediate", &[slots, intermediate])?.max(shape::product(
            OPERATION,
            "shared.intermediate",
            &[tokens, shared_intermediate],
        )?);
        let regions = Regions {
            barrier: arena.region("workspace", gating_dispatch::workspace_bytes(&gating_dispatch, device)?, 1)?,
            logits: arena.region("logits", tokens * experts, 4)?,
            ids: arena.region("ids", choices, 4)?,
            weights: arena.region("weights", choices, 4)?,
            counts: arena.region("counts", experts, 4)?,
            offsets: arena.region("offsets", experts + 1, 4)?,
            slot_token: arena.region("slot_token", slots, 4)?,
            token_slot: arena.region("token_slot", choices, 4)?,
            slot_weight: arena.region("slot_weight", if input_weighted { slots } else { 0 }, 4)?,
            tiles: arena.region("tiles", dispatch.desc.max_tiles(), 16)?,
            num_tiles: arena.region("num_tiles", 1, 4)?,
            hidden: arena.region("intermediate", h, element)?,
            y_slots: arena.region("y_slots", slots * hidden, element)?,
            addend: arena.region("addend", if shared.is_some() { tokens * hidden } else { 0 }, element)?,
        };
        let workspace_bytes = arena.bytes();
        Ok(LayerPlan {
            desc: *desc,
            device: *device,
            tokens,
            router,
            dispatch,
            gate_up,
            down,
            shared,
            combine,
            regions,
            workspace_bytes,
        })
    }

    /// The layer that was planned.
    pub fn desc(&self) -> &LayerDesc {
        &self.desc
    }

    /// Tokens of a batch.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Rows of a tile of both GEMMs.
    pub fn tile_m(&self) -> usize {
        self.dispatch.desc.tile_m
    }

    /// Size of the workspace in bytes.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// The stages of a forward pass with their launches, in order. None with no tokens.
    pub fn stages(&self) -> impl Iterator<Item = (Stage, Selection)> {
        let shared = self.shared.map(|(gate_up, down)| (gate_up.selection, down.selection));
        [
            Some((Stage::Router, self.router.selection)),
            Some((Stage::GateDispatch, self.dispatch.selection)),
            Some((Stage::GateUp, self.gate_up.selection)),
            Some((Stage::Down, self.down.selection)),
            shared.map(|(gate_up, _)| (Stage::SharedGateUp, gate_up)),
            shared.map(|(_, down)| (Stage::SharedDown, down)),
            Some((Stage::Combine, self.combine.selection)),
        ]
        .into_iter()
        .flatten()
        .filter(|_| self.tokens > 0)
    }

    /// Kernel launches of a forward pass.
    pub fn launches(&self) -> usize {
        self.stages().count()
    }

    /// The kernels of a forward pass, for [`crate::Kernels::preload`].
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> {
        self.stages().map(|(_, selection)| selection.kernel)
    }
}

/// The two products of an expert.
#[derive(Clone, Copy)]
struct MlpShape {
    dtype: Dtype,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    /// Rows of the layer's input.
    a_rows: usize,
    /// Rows of the intermediate and of the output.
    rows: usize,
    schedule: Schedule,
}

impl MlpShape {
    fn steps(&self, mlp: &Mlp, device: &DeviceInfo) -> Result<(Step<GemmDesc>, Step<GemmDesc>), Error> {
        let gate_up = GemmDesc {
            dtype: self.dtype,
            rows: self.rows,
            a_rows: self.a_rows,
            experts: self.experts,
            n: self.intermediate,
            k: self.hidden,
            glu: mlp.glu,
            activation: mlp.activation,
            layout: mlp.gate_up_layout,
            schedule: self.schedule,
        };
        let down = GemmDesc {
            a_rows: self.rows,
            n: self.hidden,
            k: self.intermediate,
            glu: Glu::None,
            activation: Activation::Identity,
            layout: mlp.down_layout,
            ..gate_up
        };
        Ok((
            Step { desc: gate_up, selection: gemm::select(&gate_up, device)? },
            Step { desc: down, selection: gemm::select(&down, device)? },
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::SharedDesc;
    use crate::rules::Activation;
    use crate::rules::Capacity;
    use crate::runtime::device::A100;

    fn mixtral() -> LayerDesc {
        LayerDesc::new(Dtype::Bf16, 4096, 14336, 8, 2)
    }

    fn with_everything() -> LayerDesc {
        LayerDesc {
            weighting: Weighting::Input,
            capacity: Some(Capacity { per_expert: 8, tokens_per_sequence: 16, padded: true }),
            shared: Some(SharedDesc { intermediate: 1024, mlp: Mlp::SWIGLU }),
            ..mixtral()
        }
    }

    #[test]
    fn five_launches_seven_with_a_shared_expert() {
        assert_eq!(mixtral().plan(64, &A100).unwrap().launches(), 5);
        assert_eq!(with_everything().plan(64, &A100).unwrap().launches(), 7);
        assert_eq!(mixtral().plan(0, &A100).unwrap().launches(), 0);
    }

    #[test]
    fn regions_do_not_overlap() {
        for desc in [mixtral(), with_everything()] {
            for tokens in [0, 1, 17, 300] {
                let plan = desc.plan(tokens, &A100).unwrap();
                let r = plan.regions;
                let regions = [
                    r.barrier,
                    r.logits,
                    r.ids,
                    r.weights,
                    r.counts,
                    r.offsets,
                    r.slot_token,
                    r.token_slot,
                    r.slot_weight,
                    r.tiles,
                    r.num_tiles,
                    r.hidden,
                    r.y_slots,
                    r.addend,
                ];
                assert_eq!(r.barrier.offset, 0, "all plans share the barrier that the workspace zeroes once");
                for pair in regions.windows(2) {
                    assert!(pair[0].offset + pair[0].bytes <= pair[1].offset, "{pair:?}");
                }
                let last = regions[regions.len() - 1];
                assert_eq!(plan.workspace_bytes(), last.offset + last.bytes);
                let slots = plan.dispatch.desc.slots();
                assert_eq!(r.hidden.bytes, 2 * (slots * 14336).max(tokens * desc.shared.map_or(0, |s| s.intermediate)));
                assert_eq!(r.y_slots.bytes, 2 * slots * 4096);
            }
        }
    }

    #[test]
    fn both_products_follow_the_dispatch() {
        let plan = mixtral().plan(4096, &A100).unwrap();
        assert_eq!(plan.tile_m(), 128);
        for step in [plan.gate_up, plan.down] {
            let crate::registry::Kernel::Gemm(gemm) = step.selection.kernel.variant() else { unreachable!() };
            assert_eq!(gemm.tile.bm as usize, plan.tile_m());
        }
        assert_eq!(mixtral().plan(1, &A100).unwrap().tile_m(), 16);
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: LayerDesc, tokens| desc.plan(tokens, &A100).unwrap_err().argument().unwrap();
        assert_eq!(fault(LayerDesc { hidden: 4100, ..mixtral() }, 1), "hidden");
        assert_eq!(fault(LayerDesc { intermediate: 0, ..mixtral() }, 1), "intermediate");
        assert_eq!(fault(LayerDesc { top_k: 9, ..mixtral() }, 1), "top_k");
        assert_eq!(fault(LayerDesc { experts: 0, ..mixtral() }, 1), "experts");
        assert_eq!(fault(LayerDesc { router_dtype: Dtype::F16, ..mixtral() }, 1), "weight");
        assert_eq!(fault(mixtral(), usize::MAX), "tokens");
        assert_eq!(fault(mixtral(), 1 << 30), "token_slot");
        assert_eq!(
            fault(LayerDesc { mlp: Mlp { activation: Activation::Identity, ..Mlp::SWIGLU }, ..mixtral() }, 1),
            "mlp.activation"
        );
        let shared = Some(SharedDesc { intermediate: 12, mlp: Mlp::SWIGLU });
        assert_eq!(fault(LayerDesc { shared, ..mixtral() }, 1), "shared.intermediate");
    }
}
