//! Combine: each token's sum of its experts' outputs.
//!
//! `y[t] = residual[t] + addend[t] + sum_j weights[t,j] * y_slots[token_slot[t,j]]`, added in that order in f32 and rounded
//! once: the same input gives the same bits. A skipped or dropped slot (`token_slot = -1`) adds nothing.
//!
//! [`forward_with_identity`] also adds what experts that pass their input on contribute, `identity_weight[t] * identity[t]`, after the
//! addend: see [`crate::capacity::expert_map`].

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::registry::{Combine, Kernel};
use crate::rules::Dtype;
use crate::runtime::launch::{Address, SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::CombineParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "combine";

/// Shapes and type of a combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CombineDesc {
    /// Type of `y_slots`, `residual`, `addend` and `y`.
    pub dtype: Dtype,
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Experts per token `k`, 1 to 32.
    pub top_k: usize,
    /// Hidden size `H`, a multiple of 8.
    pub hidden: usize,
    /// Rows of `y_slots` ([`crate::capacity::dispatch::DispatchDesc::slots`]).
    pub slots: usize,
}

/// Buffers of a combine.
pub struct CombineArgs<'a, T> {
    /// `[slots, H]`, the experts' outputs by slot. Rows that no token refers to may hold anything.
    pub y_slots: In<'a, T>,
    /// `[T, k]`, the slot of each choice as dispatch wrote it, -1 where there is none. Entries must be less than `slots`.
    pub token_slot: In<'a, i32>,
    /// `[T, k]`; absent, every weight is 1.
    pub weights: Option<In<'a, f32>>,
    /// `[T, H]`, added first.
    pub residual: Option<In<'a, T>>,
    /// `[T, H]`, added second: the shared expert's output.
    pub addend: Option<In<'a, T>>,
    /// `[T, H]`, written.
    pub y: Out<'a, T>,
}

/// The part of experts whose output is their input.
pub struct Identity<'a, T> {
    /// `[T, H]`: the experts' input.
    pub x: In<'a, T>,
    /// `[T]`: the sum of their weights ([`crate::capacity::expert_map::forward`]); where it is 0, `x` is not read.
    pub weight: In<'a, f32>,
}

impl CombineDesc {
    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "tokens", self.tokens)?;
        shape::top_k(OPERATION, self.top_k, usize::MAX)?;
        shape::multiple_of_8(OPERATION, "hidden", self.hidden)?;
        shape::size(OPERATION, "slots", self.slots)?;
        shape::product(OPERATION, "y", &[self.tokens, self.hidden])?;
        shape::product(OPERATION, "y_slots", &[self.slots, self.hidden])?;
        shape::product_i32(OPERATION, "token_slot", &[self.tokens, self.top_k])?;
        Ok(())
    }
}

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`CombineDesc::validate`]; [`Error::Overflow`] where the grid would exceed the device's limit.
pub fn select(desc: &CombineDesc, _device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let combine = Combine { dtype: desc.dtype };
    let grid = combine.grid(desc.tokens as u32, desc.hidden as u32);
    shape::grid_y(OPERATION, "hidden", grid[1])?;
    Ok(Selection::new(Kernel::Combine(combine), grid))
}

/// Computes `y`.
///
/// With no tokens nothing is launched.
///
/// # Errors
/// Those of [`select`]; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`],
/// [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &CombineDesc,
    args: CombineArgs<'_, T>,
) -> Result<(), Error> {
    run(kernels, stream, desc, args, None)
}

/// Computes `y` where some experts are identities.
///
/// # Errors
/// Those of [`forward`].
pub fn forward_with_identity<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &CombineDesc,
    args: CombineArgs<'_, T>,
    identity: Identity<'_, T>,
) -> Result<(), Error> {
    run(kernels, stream, desc, args, Some(identity))
}

fn run<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &CombineDesc,
    args: CombineArgs<'_, T>,
    identity: Option<Identity<'_, T>>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("y_slots", desc.dtype)?;
    if desc.tokens == 0 {
        return Ok(());
    }
    let (elements, choices) = (desc.tokens * desc.hidden, desc.tokens * desc.top_k);
    let y_slots = scope.read("y_slots", args.y_slots, desc.slots * desc.hidden, VECTOR)?;
    let token_slot = scope.read("token_slot", args.token_slot, choices, SCALAR)?;
    let weights = scope.read_some("weights", args.weights, choices, SCALAR)?;
    let residual = scope.read_some("residual", args.residual, elements, VECTOR)?;
    let addend = scope.read_some("addend", args.addend, elements, VECTOR)?;
    let (x, weight) = identity.map(|identity| (identity.x, identity.weight)).unzip();
    let identity = scope.read_some("identity.x", x, elements, VECTOR)?;
    let identity_weight = scope.read_some("identity.weight", weight, desc.tokens, SCALAR)?;
    let y = scope.write("y", args.y, elements, VECTOR)?;
    let addresses = Addresses {
        y_slots: y_slots.address(),
        token_slot: token_slot.address(),
        weights: optional(&weights),
        residual: optional(&residual),
        addend: optional(&addend),
        identity: optional(&identity).zip(optional(&identity_weight)),
        y: y.address(),
    };
    enqueue(&scope, desc, &selection, addresses)
}

pub(crate) struct Addresses<'a> {
    pub(crate) y_slots: Address<'a>,
    pub(crate) token_slot: Address<'a>,
    pub(crate) weights: Option<Address<'a>>,
    pub(crate) residual: Option<Address<'a>>,
    pub(crate) addend: Option<Address<'a>>,
    /// Input and weights of identity experts.
    pub(crate) identity: Option<(Address<'a>, Address<'a>)>,
    pub(crate) y: Address<'a>,
}

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &CombineDesc,
    selection: &Selection,
    at: Addresses<'_>,
) -> Result<(), Error> {
    let (identity, identity_weight) = at.identity.unzip();
    scope.launch(
        selection,
        CombineParams {
            y_slots: at.y_slots.into(),
            token_slot: at.token_slot.into(),
            weights: at.weights.into(),
            residual: at.residual.into(),
            addend: at.addend.into(),
            y: at.y.into(),
            identity: identity.into(),
            identity_weight: identity_weight.into(),
            tokens: desc.tokens as u32,
            top_k: desc.top_k as u32,
            hidden: desc.hidden as u32,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::runtime::device::A100;

    fn desc() -> CombineDesc {
        CombineDesc { dtype: Dtype::Bf16, tokens: 64, top_k: 2, hidden: 2048, slots: 128 }
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: CombineDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        assert!(select(&desc(), &A100).is_ok());
        assert_eq!(fault(CombineDesc { hidden: 4, ..desc() }), "hidden");
        assert_eq!(fault(CombineDesc { hidden: 1 << 30, ..desc() }), "hidden");
        assert_eq!(fault(CombineDesc { top_k: 0, ..desc() }), "top_k");
        assert_eq!(fault(CombineDesc { top_k: 33, ..desc() }), "top_k");
        assert_eq!(fault(CombineDesc { tokens: 1 << 30, ..desc() }), "token_slot");
        assert_eq!(fault(CombineDesc { slots: 1 << 31, ..desc() }), "slots");
    }
}
