//! What an operation cannot do without: bytes between device memory and the chip, and operations.

use crate::shapes::Shape;

/// Bytes and operations of one pass, with every input read once and every output written once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Parameters that every pass touches, all of them.
    pub fixed: f64,
    /// Experts' parameters: those of the experts that have rows, which are others in other sets.
    pub weights: f64,
    /// All that a set has of its own.
    pub activations: f64,
    pub flops: f64,
}

impl Work {
    pub fn bytes(&self) -> f64 {
        self.fixed + self.weights + self.activations
    }
}

/// A batch: extents, and how many experts have rows.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    pub shape: Shape,
    pub tokens: usize,
    /// Outputs of the first product for each column of its result: 2 with a gate.
    pub gated: f64,
    pub live_experts: f64,
}

/// Bytes of a bf16, and of an f32 or i32.
const HALF: f64 = 2.0;
const WORD: f64 = 4.0;

impl Batch {
    fn sizes(&self) -> [f64; 5] {
        let Shape { experts, top_k, hidden, intermediate, .. } = self.shape;
        [self.tokens, experts, hidden, intermediate, self.tokens * top_k].map(|size| size as f64)
    }

    pub fn router(&self) -> Work {
        let [t, e, h, ..] = self.sizes();
        Work {
            fixed: HALF * e * h,
            activations: HALF * t * h + WORD * t * e,
            flops: 2.0 * t * e * h,
            ..Work::default()
        }
    }

    /// Reads logits, writes ids and weights.
    pub fn gating(&self) -> Work {
        let [t, e, .., s] = self.sizes();
        Work { activations: WORD * (t * e + 2.0 * s), ..Work::default() }
    }

    /// Reads ids and weights, writes counts, offsets, both orders of the slots and each row's weight.
    pub fn dispatch(&self) -> Work {
        let [_, e, .., s] = self.sizes();
        Work { activations: WORD * (5.0 * s + 2.0 * e), ..Work::default() }
    }

    /// Reads logits, writes what gating and dispatch write.
    pub fn gating_dispatch(&self) -> Work {
        let [t, e, .., s] = self.sizes();
        Work { activations: WORD * (t * e + 5.0 * s + 2.0 * e), ..Work::default() }
    }

    pub fn gate_up(&self) -> Work {
        let [t, _, h, i, s] = self.sizes();
        let outputs = self.gated * i;
        Work {
            weights: HALF * self.live_experts * outputs * h,
            activations: HALF * (t * h + s * i) + WORD * s,
            flops: 2.0 * s * h * outputs,
            ..Work::default()
        }
    }

    pub fn down(&self) -> Work {
        let [_, _, h, i, s] = self.sizes();
        Work {
            weights: HALF * self.live_experts * i * h,
            activations: HALF * (s * i + s * h) + WORD * s,
            flops: 2.0 * s * h * i,
            ..Work::default()
        }
    }

    pub fn combine(&self) -> Work {
        let [t, _, h, _, s] = self.sizes();
        Work { activations: HALF * (s * h + t * h) + WORD * s, ..Work::default() }
    }

    /// Reads x and the weights, writes y: what lies between need not leave the chip.
    pub fn layer(&self) -> Work {
        let [t, _, h, ..] = self.sizes();
        let parts = [self.router(), self.gate_up(), self.down()];
        Work {
            fixed: self.router().fixed,
            weights: parts.iter().map(|part| part.weights).sum(),
            activations: 2.0 * HALF * t * h,
            flops: parts.iter().map(|part| part.flops).sum(),
        }
    }

    /// Distinct bytes that `sets` passes touch.
    pub fn distinct(&self, work: &Work, sets: usize) -> f64 {
        let (sets, all_experts) = (sets as f64, work.weights * self.shape.experts as f64 / self.live_experts.max(1.0));
        work.fixed + (sets * work.weights).min(all_experts) + sets * work.activations
    }
}
