//! Kinds that kernels, library and reference name alike: storage types, scores, forms of a gated unit, orders of a matrix.
//!
//! `build.rs` compiles this file too, so it depends on nothing.

/// Storage type of activations and expert weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Dtype {
    /// bfloat16: 8 bits of exponent, 7 of mantissa.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Every type.
    pub const ALL: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

    /// Size of one element in bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// The word in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How the numbers of chosen experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum IdFormat {
    /// `i32`: what this library writes. Negative is a choice of nothing.
    I32,
    /// `u32`. One that is no expert's number is a choice of nothing.
    U32,
    /// `i64` (torch's indices). Likewise.
    I64,
}

impl IdFormat {
    /// Size of an id in bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            IdFormat::I32 | IdFormat::U32 => 4,
            IdFormat::I64 => 8,
        }
    }
}

/// How logits become scores and which come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Score {
    /// Softmax over all experts, then top-k of the probabilities (Switch, Mixtral, Qwen3, OLMoE, ERNIE 4.5).
    Softmax,
    /// Top-k of the logits, then softmax over the chosen (gpt-oss, GraniteMoE).
    TopkSoftmax,
    /// Sigmoid of each logit (DeepSeek-V3, GLM-4, MiniMax, Llama 4).
    Sigmoid,
    /// `sqrt(ln(1 + exp(l)))` of each logit (DeepSeek-V4).
    SqrtSoftplus,
    /// Each choice by a softmax over the logits near the largest of those that are left; k is 1 or 2 (PhiMoE, evaluation).
    SparseMixer,
}

impl Score {
    /// Every rule.
    pub const ALL: [Score; 5] =
        [Score::Softmax, Score::TopkSoftmax, Score::Sigmoid, Score::SqrtSoftplus, Score::SparseMixer];

    /// Those of the common models, which have kernels of their own.
    pub const COMMON: [Score; 3] = [Score::Softmax, Score::TopkSoftmax, Score::Sigmoid];

    /// The word in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            Score::Softmax => "softmax",
            Score::TopkSoftmax => "topksoftmax",
            Score::Sigmoid => "sigmoid",
            Score::SqrtSoftplus => "sqrtsoftplus",
            Score::SparseMixer => "sparsemixer",
        }
    }

    /// Whether an expert has a score before it is chosen.
    pub const fn precedes_choice(self) -> bool {
        matches!(self, Score::Softmax | Score::Sigmoid | Score::SqrtSoftplus)
    }
}

/// Where gate and up of a gated linear unit lie in the weights of an expert's first product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Glu {
    /// No gate: `act(a W)`, or a plain product.
    None,
    /// One tensor, gate's outputs before up's: `w_gate_up [E,2I,H]` (most models).
    Split,
    /// One tensor, up's outputs before gate's.
    UpFirst,
    /// One tensor, gate and up alternate: output `2i` is gate `i`, output `2i+1` is up `i` (gpt-oss).
    Interleaved,
    /// Two tensors, each `[E,I,H]`.
    Apart,
}

impl Glu {
    /// Every form.
    pub const ALL: [Glu; 5] = [Glu::None, Glu::Split, Glu::UpFirst, Glu::Interleaved, Glu::Apart];

    /// Whether there is a gate.
    pub const fn is_gated(self) -> bool {
        !matches!(self, Glu::None)
    }
}

/// How an expert's weight matrix lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Layout {
    /// `[E, N, K]`, K contiguous, as `nn.Linear` holds it.
    Nk,
    /// `[E, K, N]`, N contiguous (gpt-oss, Llama 4).
    Kn,
}

impl Layout {
    /// Both orders.
    pub const ALL: [Layout; 2] = [Layout::Nk, Layout::Kn];

    /// The word in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            Layout::Nk => "nk",
            Layout::Kn => "kn",
        }
    }
}
