//! Batches with padding, and logits of any type.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use half::{bf16, f16};
use moe_kernels::{Dtype, Tensor, TokenMask};

use crate::support::buffer::Guarded;

/// Which tokens are padding, on the device: by a mask of either polarity, by a number of valid tokens, by both, or none at all.
pub struct Padding {
    /// By token.
    pub valid: Vec<bool>,
    attention: Option<Guarded<u8>>,
    padding: Option<Guarded<u8>>,
    first: Option<Guarded<u32>>,
}

impl Padding {
    /// None.
    pub fn none(tokens: usize) -> Padding {
        Padding { valid: vec![true; tokens], attention: None, padding: None, first: None }
    }

    /// The first `padding` of the tokens, by a mask.
    pub fn in_front(stream: &Arc<CudaStream>, padding: usize, tokens: usize) -> Padding {
        let valid: Vec<bool> = (0..tokens).map(|token| token >= padding).collect();
        let bytes: Vec<u8> = valid.iter().map(|&valid| u8::from(valid)).collect();
        Padding { attention: Some(Guarded::input(stream, "mask", &bytes)), valid, ..Padding::none(0) }
    }

    /// No padding in half of the cases.
    pub fn draw(stream: &Arc<CudaStream>, rng: &mut fastrand::Rng, tokens: usize) -> Padding {
        let mut drawn = Padding::none(tokens);
        if rng.bool() {
            return drawn;
        }
        let kind = rng.u32(..6);
        if kind < 4 {
            // Runs of tokens and of padding: short, long, or all the same.
            let stay = [1, 8, 64, u32::MAX][rng.usize(..4)];
            let mut state = rng.bool();
            for valid in &mut drawn.valid {
                *valid = state;
                state ^= rng.u32(..stay.saturating_add(1)) == 0;
            }
            let attention = rng.bool();
            // Any byte but 0 is a one.
            let bytes: Vec<u8> =
                drawn.valid.iter().map(|&valid| if valid == attention { rng.u8(1..) } else { 0 }).collect();
            let bytes = Some(Guarded::input(stream, "mask", &bytes));
            if attention { drawn.attention = bytes } else { drawn.padding = bytes }
        }
        if kind > 2 {
            let first = [rng.usize(..=tokens), 0, tokens + rng.usize(..3)][rng.usize(..5).saturating_sub(2)];
            drawn.valid.iter_mut().skip(first).for_each(|valid| *valid = false);
            drawn.first = Some(Guarded::input(stream, "valid_tokens", &[first as u32]));
        }
        drawn
    }

    /// As an operation takes it.
    pub fn with<R>(&self, run: impl FnOnce(TokenMask<'_>) -> R) -> R {
        let [attention, padding] = [&self.attention, &self.padding].map(|mask| mask.as_ref().map(Guarded::view));
        let first = self.first.as_ref().map(Guarded::view);
        let mask = match (&attention, &padding) {
            (Some(mask), _) => TokenMask::attention(mask),
            (_, Some(mask)) => TokenMask::padding(mask),
            (None, None) => TokenMask::all(),
        };
        run(match &first {
            Some(first) => mask.valid_tokens(first),
            None => mask,
        })
    }

    /// The rows of tokens that count, of `width` elements each.
    pub fn of_tokens<T: Copy>(&self, rows: &[T], width: usize) -> Vec<T> {
        self.rows(rows, width, true)
    }

    /// The rows of padding.
    pub fn of_padding<T: Copy>(&self, rows: &[T], width: usize) -> Vec<T> {
        self.rows(rows, width, false)
    }

    fn rows<T: Copy>(&self, rows: &[T], width: usize, valid: bool) -> Vec<T> {
        let tokens = (0..self.valid.len()).filter(|&t| self.valid[t] == valid);
        tokens.flat_map(|t| &rows[t * width..][..width]).copied().collect()
    }

    /// Ids and weights of tokens that count; padding has ids -1 and weights 0.
    pub fn choices_of_tokens(&self, name: &str, ids: &[i32], weights: &[f32], choices: usize) -> (Vec<i32>, Vec<f32>) {
        assert!(self.of_padding(ids, choices).iter().all(|&id| id == -1), "{name}: ids of padding");
        assert!(self.of_padding(weights, choices).iter().all(|w| w.to_bits() == 0), "{name}: weights of padding");
        (self.of_tokens(ids, choices), self.of_tokens(weights, choices))
    }

    pub fn name(&self) -> String {
        let padding = self.valid.iter().filter(|&&valid| !valid).count();
        let by = [self.attention.is_some(), self.padding.is_some(), self.first.is_some()];
        format!("{padding} of padding by {by:?}")
    }

    pub fn assert_unchanged(&self, stream: &Arc<CudaStream>) {
        [&self.attention, &self.padding].into_iter().flatten().for_each(|mask| mask.assert_unchanged(stream));
        self.first.iter().for_each(|first| first.assert_unchanged(stream));
    }
}

/// Logits on the device.
pub enum LogitsOn {
    Bf16(Guarded<bf16>),
    F16(Guarded<f16>),
    F32(Guarded<f32>),
}

impl LogitsOn {
    /// f32 in half of the cases; else `values` become what 16 bits hold of them.
    pub fn draw(stream: &Arc<CudaStream>, rng: &mut fastrand::Rng, values: &mut [f32]) -> LogitsOn {
        match [Dtype::F32, Dtype::F32, Dtype::Bf16, Dtype::F16][rng.usize(..4)] {
            Dtype::Bf16 => {
                let narrow: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                values.iter_mut().zip(&narrow).for_each(|(value, narrow)| *value = narrow.to_f32());
                LogitsOn::Bf16(Guarded::input(stream, "logits", &narrow))
            }
            Dtype::F16 => {
                let narrow: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
                values.iter_mut().zip(&narrow).for_each(|(value, narrow)| *value = narrow.to_f32());
                LogitsOn::F16(Guarded::input(stream, "logits", &narrow))
            }
            _ => LogitsOn::F32(Guarded::input(stream, "logits", values)),
        }
    }

    /// As an operation takes them.
    pub fn with<R>(&self, run: impl FnOnce(Tensor<'_>) -> R) -> R {
        match self {
            LogitsOn::Bf16(logits) => run((&logits.view()).into()),
            LogitsOn::F16(logits) => run((&logits.view()).into()),
            LogitsOn::F32(logits) => run((&logits.view()).into()),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            LogitsOn::Bf16(_) => "bf16",
            LogitsOn::F16(_) => "f16",
            LogitsOn::F32(_) => "f32",
        }
    }

    pub fn assert_unchanged(&self, stream: &Arc<CudaStream>) {
        match self {
            LogitsOn::Bf16(logits) => logits.assert_unchanged(stream),
            LogitsOn::F16(logits) => logits.assert_unchanged(stream),
            LogitsOn::F32(logits) => logits.assert_unchanged(stream),
        }
    }
}
