//! Times a launch where it was checked.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::CudaStream;

/// With `MOE_TIME=1`: runs `launch` again and prints the median time of one call to its end on the device.
///
/// A time on the software device says how long the software takes, and nothing about a GPU.
pub fn time(stream: &Arc<CudaStream>, case: &str, mut launch: impl FnMut()) {
    if std::env::var_os("MOE_TIME").is_none() {
        return;
    }
    let mut times: Vec<_> = (0..5)
        .map(|_| {
            let start = Instant::now();
            launch();
            stream.synchronize().expect("a launch that passed its check runs again");
            start.elapsed()
        })
        .collect();
    times.sort();
    let device = stream.context().name().unwrap_or_default();
    println!("{case}: {:?} on {device}", times[times.len() / 2]);
}
