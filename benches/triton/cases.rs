//! What is compared: shapes of models in use, cut where a CPU cannot run them whole.

use crate::shapes::{SHAPES, Shape};
use crate::tiles::{self, Tile};

/// A layer and a batch.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// As published.
    pub whole: Shape,
    pub whole_tokens: usize,
    /// As it runs.
    pub shape: Shape,
    pub tokens: usize,
}

/// What one side may cost.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Multiply-adds of live rows.
    pub multiply_adds: f64,
    /// Of the experts' weights.
    pub bytes: f64,
}

/// Widths are not halved below this.
const LEAST_WIDTH: usize = 1024;

impl Case {
    /// A batch of `tokens`, cut to the budget in this order until it fits: experts and tokens together, so that an expert keeps its rows, as long as
    /// there are twice as many experts as choices and at least eight; then the greater of both widths; then tokens alone.
    pub fn new(whole: Shape, whole_tokens: usize, budget: Budget) -> Case {
        let mut case = Case { whole, whole_tokens, shape: whole, tokens: whole_tokens };
        while case.multiply_adds() > budget.multiply_adds || case.weight_bytes() > budget.bytes {
            let Shape { experts, top_k, hidden, intermediate, .. } = case.shape;
            let fits_memory = case.weight_bytes() <= budget.bytes;
            if experts % 2 == 0 && experts / 2 >= (2 * top_k).max(8) && (case.tokens > 1 || !fits_memory) {
                case.shape.experts /= 2;
                case.tokens = (case.tokens / 2).max(1);
            } else if hidden.max(intermediate) > LEAST_WIDTH {
                let halved = |width: usize| (width / 2).next_multiple_of(32);
                match hidden > intermediate {
                    true => case.shape.hidden = halved(hidden),
                    false => case.shape.intermediate = halved(intermediate),
                }
            } else if case.tokens > 1 {
                case.tokens /= 2;
            } else {
                break;
            }
        }
        case
    }

    /// All of them, in the order of [`SHAPES`].
    pub fn all(budget: Budget) -> impl Iterator<Item = Case> {
        let batches = SHAPES.iter().flat_map(|shape| shape.tokens.iter().map(move |&tokens| (*shape, tokens)));
        batches.map(move |(shape, tokens)| Case::new(shape, tokens, budget))
    }

    pub fn name(&self) -> String {
        format!("{}/{}", self.whole.model, self.whole_tokens)
    }

    /// What was cut, in words; empty where nothing was.
    pub fn cut(&self) -> String {
        let pairs = [
            ("E", self.whole.experts, self.shape.experts),
            ("T", self.whole_tokens, self.tokens),
            ("H", self.whole.hidden, self.shape.hidden),
            ("I", self.whole.intermediate, self.shape.intermediate),
        ];
        let cut = pairs.iter().filter(|(_, whole, cut)| whole != cut);
        cut.map(|(name, _, cut)| format!("{name} {cut}")).collect::<Vec<_>>().join(", ")
    }

    /// Slots: rows that experts compute.
    pub fn slots(&self) -> usize {
        self.tokens * self.shape.top_k
    }

    fn multiply_adds(&self) -> f64 {
        3.0 * (self.slots() * self.shape.hidden) as f64 * self.shape.intermediate as f64
    }

    fn weight_bytes(&self) -> f64 {
        6.0 * (self.shape.experts * self.shape.hidden) as f64 * self.shape.intermediate as f64
    }

    /// Triton's tile: that of the whole shape, since a cut keeps an expert's rows as long as it can.
    pub fn tile(&self, arch: u32) -> Tile {
        tiles::tuned(arch, self.whole.experts, self.whole.intermediate, self.whole_tokens)
    }
}
