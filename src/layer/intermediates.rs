//! What stands between the products: in the caller's buffers, which a backward pass reads, else in the workspace.

use super::OPERATION;
use super::desc::{LayerDesc, Mlp};
use crate::experts::dispatched::SlotShape;
use crate::runtime::launch::{Address, Held, Scope, optional};
use crate::runtime::shape;
use crate::runtime::workspace::Region;
use crate::{Error, Out};

/// Places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regions {
    /// `[slots, I]`.
    pub(super) hidden: Region,
    /// `[T, I]` of the shared expert: where it has launches of its own, the same place as `hidden`, which is done with then.
    pub(super) shared_hidden: Region,
    /// `[slots, H]`; or `[T, H]` of f32, where the second product adds up each token's rows.
    pub(super) y_slots: Region,
    /// The shared expert's output.
    pub(super) addend: Region,
    /// The logits of its gate.
    pub(super) shared_gate: Region,
    /// Sums that blocks leave of a product's tiles whose depth they share.
    pub(super) partials: Region,
}

/// The caller's buffers.
pub(super) struct Intermediates<'a, T> {
    pub(super) hidden: Option<Out<'a, T>>,
    pub(super) pre_activation: Option<Out<'a, T>>,
    pub(super) shared_hidden: Option<Out<'a, T>>,
    pub(super) shared_pre_activation: Option<Out<'a, T>>,
}

impl<'a, T> Intermediates<'a, T> {
    /// Opens what is given, for the rows of a dispatch.
    pub(super) fn open<'b>(
        self,
        scope: &Scope<'b>,
        desc: &LayerDesc,
        rows: &SlotShape,
    ) -> Result<HeldIntermediates<'b>, Error>
    where
        'a: 'b,
    {
        if desc.shared.is_none() {
            let given =
                [("shared_hidden", &self.shared_hidden), ("shared_pre_activation", &self.shared_pre_activation)];
            if let Some((argument, _)) = given.into_iter().find(|(_, buffer)| buffer.is_some()) {
                let reason = "the descriptor has no shared expert";
                return Err(Error::Unexpected { operation: OPERATION, argument, reason });
            }
        }
        let aligned = |intermediate| shape::row_alignment(desc.dtype, intermediate);
        let write =
            |argument, buffer, elements| scope.write_some(argument, buffer, elements, aligned(desc.intermediate));
        let shared_aligned = aligned(desc.shared.map_or(0, |shared| shared.intermediate));
        let write_shared = |argument, buffer, elements| scope.write_some(argument, buffer, elements, shared_aligned);
        let before = |mlp: &Mlp, hidden: usize| if mlp.gate_up.glu.is_gated() { 2 * hidden } else { hidden };
        let hidden = rows.slots * desc.intermediate;
        let (shared_hidden, shared_before) = desc.shared.map_or((0, 0), |shared| {
            let hidden = rows.tokens * shared.intermediate;
            (hidden, before(&shared.mlp, hidden))
        });
        Ok(HeldIntermediates {
            hidden: write("hidden", self.hidden, hidden)?,
            pre_activation: write("pre_activation", self.pre_activation, before(&desc.mlp, hidden))?,
            shared_hidden: write_shared("shared_hidden", self.shared_hidden, shared_hidden)?,
            shared_pre_activation: write_shared("shared_pre_activation", self.shared_pre_activation, shared_before)?,
        })
    }
}

/// [`Intermediates`] opened for writing.
pub(super) struct HeldIntermediates<'a> {
    hidden: Option<Held<'a>>,
    pre_activation: Option<Held<'a>>,
    shared_hidden: Option<Held<'a>>,
    shared_pre_activation: Option<Held<'a>>,
}

impl HeldIntermediates<'_> {
    /// Where each lies; what the products need and nobody gave, in the workspace.
    pub(super) fn addresses<'a>(&'a self, workspace: &'a Held<'_>, regions: Regions) -> IntermediateAddresses<'a> {
        IntermediateAddresses {
            hidden: optional(&self.hidden).unwrap_or_else(|| workspace.at(regions.hidden)),
            pre_activation: optional(&self.pre_activation),
            shared_hidden: optional(&self.shared_hidden).unwrap_or_else(|| workspace.at(regions.shared_hidden)),
            shared_pre_activation: optional(&self.shared_pre_activation),
        }
    }
}

/// Addresses of what stands between the products.
#[derive(Clone, Copy)]
pub(super) struct IntermediateAddresses<'a> {
    pub(super) hidden: Address<'a>,
    pub(super) pre_activation: Option<Address<'a>>,
    pub(super) shared_hidden: Address<'a>,
    pub(super) shared_pre_activation: Option<Address<'a>>,
}
