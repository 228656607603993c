//! What stands between an expert's two matrices.

/// What is applied to the product in registers.
///
/// With a gated linear unit ([`super::Glu::Split`], [`super::Glu::Interleaved`]) the weight yields a gate `g` and an up value `u` for each
/// output column, and the output is `act(g) * u` (Shazeer, *GLU Variants Improve Transformer*, 2020).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// The product itself; not with a gated unit.
    Identity,
    /// `max(v, 0)` (Switch).
    Relu,
    /// `v/2 (1 + erf(v / sqrt 2))`.
    Gelu,
    /// `v/2 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3)))`.
    GeluTanh,
    /// `v / (1 + exp(-v))`: with a gated unit SwiGLU (Mixtral, Qwen3, DeepSeek).
    Silu,
    /// gpt-oss: `g = min(g, limit)`, `u = clamp(u, -limit, limit)`, output `(u + 1) g / (1 + exp(-alpha g))`. Only with a gated
    /// unit.
    ClampedSwiglu {
        /// Steepness of the sigmoid; 1.702 in gpt-oss.
        alpha: f32,
        /// Bound on gate and up; 7 in gpt-oss.
        limit: f32,
    },
}
