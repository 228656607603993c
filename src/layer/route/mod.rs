//! The first part: which experts each token goes to, and the rows that follow.

mod args;
mod forward;
mod places;
mod plan;

use crate::DeviceInfo;
use crate::capacity::admission::AdmissionDesc;
use crate::capacity::dispatch::DispatchDesc;
use crate::capacity::expert_map::ExpertMapDesc;
use crate::layer::Step;
use crate::layer::desc::LayerDesc;
use crate::routers::gating::GatingDesc;
use crate::routers::gating_dispatch::GatingDispatchDesc;
use crate::routers::measured_gating::MeasuredGatingDesc;
use crate::routers::router::RouterDesc;

pub use args::{Choices, MapTable, Measured, RouteArgs};
use places::Regions;
pub(super) use places::{ChoiceAddresses, HeldRoute, RouteAddresses};

/// A layer's way from tokens to rows: kernels, grids, and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct RoutePlan {
    pub(in crate::layer) desc: LayerDesc,
    device: DeviceInfo,
    tokens: usize,
    router: Step<RouterDesc>,
    /// The same with a shared expert's gate, in a whole layer that has one.
    gated_router: Step<RouterDesc>,
    choice: Choice,
    admission: Option<Step<AdmissionDesc>>,
    map: Option<Step<ExpertMapDesc>>,
    dispatch: Step<DispatchDesc>,
    pub(in crate::layer) regions: Regions,
    workspace_bytes: usize,
}

/// How experts are chosen.
#[derive(Clone, Copy, Debug)]
enum Choice {
    /// In one launch with the dispatch.
    WithDispatch(Step<GatingDispatchDesc>),
    /// In a launch of its own.
    Gating(Step<GatingDesc>),
    /// In a launch of its own that measures the batch.
    Measured(Step<MeasuredGatingDesc>),
}
