//! A bar on long loads.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use moe_kernels::checkpoint::Progress;

/// Bytes below which a load is over before one could look at a bar.
const LONG: u64 = 256 << 20;

/// Shows how far a load has come, on standard error and only where that is a terminal.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new(block: &str) -> Bar {
        let bar = ProgressBar::hidden();
        let template = "{prefix} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(block.to_owned());
        Bar(bar)
    }

    pub fn show(&self, progress: &Progress<'_>) {
        if progress.of < LONG {
            return;
        }
        if self.0.length().is_none() {
            self.0.set_length(progress.of);
            self.0.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            self.0.enable_steady_tick(Duration::from_millis(200));
        }
        self.0.set_position(progress.bytes);
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
