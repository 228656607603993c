//! The activation of a product: what is refused, what the kernel is told, and what may differ from expert to expert.

use super::desc::GemmDesc;
use crate::rules::{Activation, Bound, Glu, Swiglu};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::{Error, In};

/// Numbers of a [`Swiglu`] that differ from expert to expert, each `[E]`, taken in place of the descriptor's value. Of what the rules ask of
/// that value nothing is checked. A shared expert's rows take the descriptor's.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct SwigluByExpert<'a> {
    /// [`Swiglu::alpha`].
    pub alpha: Option<In<'a, f32>>,
    /// Limits of the gate's [`Bound`], where it has one.
    pub gate: Option<In<'a, f32>>,
    /// Limits of the up value's, where it has one; the same buffer as `gate` where both are clamped alike.
    pub up: Option<In<'a, f32>>,
    /// [`Swiglu::offset`].
    pub offset: Option<In<'a, f32>>,
}

impl SwigluByExpert<'_> {
    /// None.
    pub const fn new() -> Self {
        SwigluByExpert { alpha: None, gate: None, up: None, offset: None }
    }
}

buffers!(SwigluByExpert<'a> { alpha: In<f32>, gate: In<f32>, up: In<f32>, offset: In<f32> });

impl<'a> SwigluByExpert<'a> {
    /// Opens what is given for `experts` experts with this activation.
    pub(crate) fn open<'b>(
        self,
        scope: &Scope<'b>,
        activation: Activation,
        experts: usize,
    ) -> Result<HeldByExpert<'b>, Error>
    where
        'a: 'b,
    {
        let operation = scope.operation;
        let unbounded = match activation {
            Activation::Swiglu(unit) => [
                ("swiglu.gate", self.gate.is_some() && unit.gate == Bound::None, "the gate has no bound"),
                ("swiglu.up", self.up.is_some() && unit.up == Bound::None, "the up value has no bound"),
            ],
            _ => [("swiglu", self.is_some(), "the activation is no Activation::Swiglu"), ("", false, "")],
        };
        if let Some(&(argument, _, reason)) = unbounded.iter().find(|(_, wrong, _)| *wrong) {
            return Err(Error::Unexpected { operation, argument, reason });
        }
        Ok(HeldByExpert {
            alpha: scope.read_some("swiglu.alpha", self.alpha, experts, SCALAR)?,
            gate: scope.read_some("swiglu.gate", self.gate, experts, SCALAR)?,
            up: scope.read_some("swiglu.up", self.up, experts, SCALAR)?,
            offset: scope.read_some("swiglu.offset", self.offset, experts, SCALAR)?,
        })
    }

    pub(crate) fn is_some(&self) -> bool {
        [self.alpha, self.gate, self.up, self.offset].iter().any(Option::is_some)
    }
}

/// [`SwigluByExpert`] opened for reading.
pub(crate) struct HeldByExpert<'a> {
    alpha: Option<Held<'a>>,
    gate: Option<Held<'a>>,
    up: Option<Held<'a>>,
    offset: Option<Held<'a>>,
}

impl HeldByExpert<'_> {
    pub(crate) fn addresses(&self) -> ByExpertAddresses<'_> {
        ByExpertAddresses {
            alpha: optional(&self.alpha),
            gate: optional(&self.gate),
            up: optional(&self.up),
            offset: optional(&self.offset),
        }
    }
}

/// Where numbers by expert lie.
#[derive(Clone, Copy, Default)]
pub(crate) struct ByExpertAddresses<'a> {
    pub(crate) alpha: Option<Address<'a>>,
    pub(crate) gate: Option<Address<'a>>,
    pub(crate) up: Option<Address<'a>>,
    pub(crate) offset: Option<Address<'a>>,
}

impl ByExpertAddresses<'_> {
    fn is_some(&self) -> bool {
        [self.alpha, self.gate, self.up, self.offset].iter().any(Option::is_some)
    }
}

/// An activation as the kernel has it.
pub(super) struct Unit {
    /// Its number, and from bit 8 on the forms of its bounds.
    pub(super) activation: u32,
    pub(super) alpha: f32,
    pub(super) gate_bound: f32,
    pub(super) up_bound: f32,
    pub(super) factor: f32,
    pub(super) offset: f32,
}

impl Unit {
    pub(super) fn new(activation: Activation, by_expert: ByExpertAddresses<'_>) -> Unit {
        let unit = match activation {
            Activation::Swiglu(unit) => unit,
            _ => Swiglu::new(),
        };
        let value = |bound| match bound {
            Bound::None => f32::INFINITY,
            Bound::Clamp(limit) => limit,
            Bound::Softcap(cap) => cap,
        };
        let caps = |bound| matches!(bound, Bound::Softcap(_));
        let forms = [unit.clamp_after, caps(unit.gate), caps(unit.up)];
        let forms = forms.into_iter().enumerate().map(|(bit, form)| u32::from(form) << (8 + bit)).sum::<u32>();
        let number = match activation {
            Activation::Identity => 0,
            Activation::Relu => 1,
            Activation::Gelu => 2,
            Activation::GeluTanh => 3,
            Activation::Silu => 4,
            Activation::ReluSquared => 6,
            Activation::Swiglu(unit) if by_expert.is_some() || !has_loop(&unit) => 7,
            Activation::Swiglu(unit) if unit == Swiglu::new() => 4,
            Activation::Swiglu(_) => 5,
        };
        Unit {
            activation: number | forms,
            alpha: unit.alpha,
            gate_bound: value(unit.gate),
            up_bound: value(unit.up),
            factor: unit.factor,
            offset: unit.offset,
        }
    }
}

/// Whether the kernel has a loop for it: plain SwiGLU, and gpt-oss's with any limit and steepness.
fn has_loop(unit: &Swiglu) -> bool {
    let alike = unit.gate == unit.up && matches!(unit.gate, Bound::Clamp(_)) && !unit.clamp_after;
    *unit == Swiglu::new() || (alike && unit.factor == 1.0 && unit.offset == 1.0)
}

/// Whether an activation goes with the presence of a gate, and its numbers are in range.
pub(crate) fn check_activation(
    operation: &'static str,
    argument: &'static str,
    activation: Activation,
    glu: Glu,
) -> Result<(), Error> {
    match activation {
        Activation::Identity if glu.is_gated() => {
            Err(Error::unsupported(operation, argument, "a gated unit needs an activation", "Activation::Identity"))
        }
        Activation::Swiglu(_) if !glu.is_gated() => {
            Err(Error::unsupported(operation, argument, "SwiGLU needs a gated unit", "Activation::Swiglu"))
        }
        Activation::Swiglu(unit) => check_swiglu(operation, argument, &unit),
        _ => Ok(()),
    }
}

fn check_swiglu(operation: &'static str, argument: &'static str, unit: &Swiglu) -> Result<(), Error> {
    // Its reciprocal is a normal number too.
    let cap = 2f32.powi(-126)..=2f32.powi(126);
    let bound = |bound| match bound {
        Bound::None => true,
        Bound::Clamp(limit) => limit >= 0.0,
        Bound::Softcap(c) => cap.contains(&c),
    };
    let finite = [unit.alpha, unit.factor, unit.offset].iter().all(|value| value.is_finite());
    let expected = match () {
        () if !finite => "finite alpha, factor and offset",
        () if !bound(unit.gate) || !bound(unit.up) => "clamps of at least 0 and softcaps from 2^-126 to 2^126",
        () if unit.clamp_after && !matches!(unit.gate, Bound::Clamp(_)) => "clamp_after with a clamp of the gate only",
        () => return Ok(()),
    };
    Err(Error::invalid(operation, argument, expected, format!("{unit:?}")))
}

/// The shared expert's rows may have an activation of their own, of the same weight form.
pub(super) fn check_shared(operation: &'static str, desc: &GemmDesc) -> Result<(), Error> {
    let Some(activation) = desc.shared_activation else { return Ok(()) };
    if desc.shared_rows == 0 {
        return Err(Error::invalid(
            operation,
            "shared_activation",
            "none without shared_rows",
            format!("{activation:?}"),
        ));
    }
    check_activation(operation, "shared_activation", activation, desc.weight.glu)
}
