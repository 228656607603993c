//! What stands between an expert's two matrices.

use super::settings::settings;

/// What is applied to the product in registers.
///
/// With a gated linear unit (every [`super::Glu`] but `None`) the weight yields a gate `g` and an up value `u` for each output column,
/// and the output is `act(g) * u` (Shazeer, *GLU Variants Improve Transformer*, 2020). NaN stays NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// The product itself; not with a gated unit.
    Identity,
    /// `max(v, 0)` (Switch).
    Relu,
    /// `max(v, 0)^2` (So et al. 2021, *Primer*, arXiv:2109.08668; Nemotron-H, without a gate).
    ReluSquared,
    /// `v/2 (1 + erf(v / sqrt 2))`.
    Gelu,
    /// `v/2 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3)))` (Gemma 4).
    GeluTanh,
    /// `v / (1 + exp(-v))`: with a gated unit SwiGLU (Mixtral, Qwen3, DeepSeek).
    Silu,
    /// SwiGLU with bounds and more. Only with a gated unit.
    Swiglu(Swiglu),
}

impl Activation {
    /// Whether it is defined only for a gate and an up value.
    pub const fn needs_gate(self) -> bool {
        matches!(self, Activation::Swiglu(_))
    }
}

impl From<Swiglu> for Activation {
    fn from(unit: Swiglu) -> Activation {
        Activation::Swiglu(unit)
    }
}

/// A bound on a value.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Bound {
    /// None.
    None,
    /// Clamped at this limit, at least 0: a gate from above, an up value from both sides. Infinity bounds nothing.
    Clamp(f32),
    /// `c tanh(v / c)` for this `c`, above 0.
    Softcap(f32),
}

/// SwiGLU with what models add to it: `out = gate(g) * (factor * up(u) + offset)`.
///
/// | `gate` | `gate(g)` | | `up` | `up(u)` |
/// |---|---|---|---|---|
/// | `None` | `g s(alpha g)` | | `None` | `u` |
/// | `Clamp(L)` | the same of `min(g, L)` | | `Clamp(L)` | `max(min(u, L), -L)` |
/// | `Clamp(L)`, `clamp_after` | `min(g s(alpha g), L)` | | | |
/// | `Softcap(c)` | `c tanh(g / c) s(alpha g)` | | `Softcap(c)` | `c tanh(u / c)` |
///
/// with `s(v) = 1 / (1 + exp(-v))`.
///
/// ```
/// use moe_kernels::rules::{Activation, Swiglu};
///
/// let deepseek_v4 = Swiglu::clamped(10.0);
/// let gpt_oss = Swiglu::clamped(7.0).alpha(1.702).offset(1.0);
/// let step_3_7 = Swiglu::clamped(7.0).clamp_after(true);
/// let kimi_k3 = Swiglu::softcapped(4.0, 25.0);
/// assert_eq!(Activation::from(gpt_oss), Activation::Swiglu(Swiglu::GPT_OSS));
/// # let _ = (deepseek_v4, step_3_7, kimi_k3);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Swiglu {
    /// Steepness of the sigmoid: 1 but for 1.702 in gpt-oss, whose unit then approximates GELU.
    pub alpha: f32,
    /// Bound on the gate.
    pub gate: Bound,
    /// Whether a gate's clamp comes after the SiLU instead of before.
    pub clamp_after: bool,
    /// Bound on the up value.
    pub up: Bound,
    /// Factor of the bounded up value.
    pub factor: f32,
    /// What is then added to it; 1 in gpt-oss.
    pub offset: f32,
}

impl Swiglu {
    /// gpt-oss, MiniMax-M3: both clamped at 7, a steepness of 1.702, `up + 1`.
    pub const GPT_OSS: Swiglu = Swiglu::clamped(7.0).alpha(1.702).offset(1.0);

    /// `g / (1 + exp(-g)) * u`, as [`Activation::Silu`].
    pub const fn new() -> Swiglu {
        Swiglu { alpha: 1.0, gate: Bound::None, clamp_after: false, up: Bound::None, factor: 1.0, offset: 0.0 }
    }

    /// Gate and up value clamped at `limit` before the SiLU (DeepSeek-V4, Hunyuan 4, GLM-5).
    pub const fn clamped(limit: f32) -> Swiglu {
        Swiglu::new().gate(Bound::Clamp(limit)).up(Bound::Clamp(limit))
    }

    /// The gate's linear factor and the up value softly bounded: SiTU-GLU (Kimi K3, Inkling 2: 4 and 25).
    pub const fn softcapped(gate: f32, up: f32) -> Swiglu {
        Swiglu::new().gate(Bound::Softcap(gate)).up(Bound::Softcap(up))
    }
}

impl Default for Swiglu {
    fn default() -> Swiglu {
        Swiglu::new()
    }
}

settings!(Swiglu { alpha: f32, gate: Bound, clamp_after: bool, up: Bound, factor: f32, offset: f32 });
