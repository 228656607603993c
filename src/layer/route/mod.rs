//! The first part: which experts each token goes to, and the rows that follow.

mod args;
mod forward;
mod places;
mod plan;
mod regions;

pub use args::{Choices, MapTable, Measured, RouteArgs};
pub(super) use places::{ChoiceAddresses, HeldRoute, RouteAddresses, format_of};
pub use plan::RoutePlan;
