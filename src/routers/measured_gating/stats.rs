//! The statistics as they lie on the device.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};

/// What a batch says of the router, as it lies in device memory: one struct a layer.
#[repr(C)]
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RouterStats {
    /// Tokens of the call that count.
    pub tokens: u32,
    /// Slots that chose an expert.
    pub slots: u32,
    /// Slots beyond [`crate::rules::BalanceRule::capacity`], counted in each sequence.
    pub dropped: u32,
    /// Slots of the fullest expert.
    pub max_load: u32,
    /// `E sum_e f_e P_e` of the totals (Switch Transformers, eq. 4 to 6; Mixtral over all layers): 1 for balanced first choices.
    pub balance_loss: f32,
    /// Mean over sequences of `sum_e f_e P_e` (DeepSeek-V3, eq. 17 to 20; with [`crate::rules::LossCounts::Scores`] where a correction bias
    /// has a say in the choice): 1 when balanced. Of sequences that have tokens which count.
    pub sequence_loss: f32,
    /// Mean of the squared log-sum-exp (ST-MoE, eq. 5).
    pub z_loss: f32,
    /// Mean entropy of the loss's probabilities, in nats.
    pub entropy: f32,
    /// Squared coefficient of variation of the sums of weights (Shazeer et al. 2017, eq. 6 and 7).
    pub importance_cv2: f32,
    /// The same of the counts, which stand for Shazeer et al.'s smooth load where there is no noise.
    pub load_cv2: f32,
    /// Slots of the fullest expert over the mean: 1 when balanced, 0 without slots.
    pub max_over_mean: f32,
    /// `dropped` over all slots.
    pub dropped_fraction: f32,
}

// SAFETY: twelve words of plain data, of which every pattern of bits, all zeros included, is a value.
unsafe impl DeviceRepr for RouterStats {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for RouterStats {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_are_twelve_words() {
        assert_eq!(size_of::<RouterStats>(), 48);
        assert_eq!(std::mem::offset_of!(RouterStats, dropped_fraction), 44);
    }
}
