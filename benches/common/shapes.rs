//! The shapes of models in use, and how much of them a device is asked to do.

/// A layer's extents.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub model: &'static str,
    pub experts: usize,
    pub top_k: usize,
    pub hidden: usize,
    pub intermediate: usize,
    /// Batch sizes in tokens.
    pub tokens: &'static [usize],
}

const fn shape(
    model: &'static str,
    [experts, top_k, hidden, intermediate]: [usize; 4],
    tokens: &'static [usize],
) -> Shape {
    Shape { model, experts, top_k, hidden, intermediate, tokens }
}

/// Sizes of the models as published.
pub const SHAPES: &[Shape] = &[
    shape("mixtral-8x7b", [8, 2, 4096, 14336], &[1, 8, 64, 512, 4096]),
    shape("qwen3-30b-a3b", [128, 8, 2048, 768], &[1, 8, 64, 512, 4096, 32768]),
    shape("qwen3-235b", [128, 8, 4096, 1536], &[32768]),
    shape("qwen3-next", [512, 10, 2048, 512], &[1, 64, 32768]),
    shape("deepseek-v3", [256, 8, 7168, 2048], &[1, 64, 16384]),
    shape("olmoe", [64, 8, 2048, 1024], &[1, 64, 32768]),
    shape("qwen2-moe", [60, 4, 2048, 1408], &[1, 64, 4096]),
    shape("gpt-oss-20b", [32, 4, 2880, 2880], &[1, 64, 8192]),
    shape("gpt-oss-120b", [128, 4, 2880, 2880], &[1, 64, 8192]),
    shape("llama4-maverick", [128, 1, 5120, 8192], &[128, 1024]),
    shape("switch-base-64", [64, 1, 768, 3072], &[32768]),
    shape("sparsely-gated-2017", [4096, 4, 512, 1024], &[32768]),
    // Those of the figures in SonicMoE's paper (2025): as many operations in experts of other widths.
    shape("sonic-n256", [256, 16, 4096, 256], &[32768]),
    shape("sonic-n512", [128, 8, 4096, 512], &[32768]),
    shape("sonic-n1024", [64, 4, 4096, 1024], &[32768]),
];

/// What the software device is asked to do: widths divided by `WIDTH`, tokens by `TOKENS`, experts and k as they are.
///
/// A layer costs `6 T k H I` operations, so it shrinks by `WIDTH^2 * TOKENS`. Ratios between shapes are not those of a GPU.
pub const WIDTH: usize = 32;
pub const TOKENS: usize = 128;

impl Shape {
    /// The shape scaled down, with `tokens`, for the software device.
    pub fn scaled(self, tokens: usize) -> (Shape, usize) {
        let width = |value: usize| (value / WIDTH).next_multiple_of(8).max(8);
        let shape = Shape { hidden: width(self.hidden), intermediate: width(self.intermediate), ..self };
        (shape, tokens.div_ceil(TOKENS))
    }
}

/// Whether the command line's filter leaves anything of a model: one that names models leaves no others.
#[allow(dead_code)] // each bench uses its own part
pub fn asked_for(model: &str) -> bool {
    let filters: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let names = |model: &str| filters.iter().any(|filter| filter.contains(model));
    names(model) || !SHAPES.iter().any(|shape| names(shape.model))
}
