//! Time on the device: events around replays of a graph.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, sys};

use crate::Result;

/// Microseconds that a graph's passes take at least, all together: an event resolves about half of one.
const GRAPH_US: f64 = 500.0;
const MOST_PASSES: usize = 256;
/// Replays that are timed: until there are enough, or they have taken this long.
const REPLAYS: std::ops::RangeInclusive<usize> = 5..=25;
const REPLAYS_US: f64 = 150_000.0;

/// Times work on one stream.
pub struct Clock {
    stream: Arc<CudaStream>,
    begin: CudaEvent,
    end: CudaEvent,
    /// One pass and one replay: the software device's time says nothing.
    once: bool,
}

/// Microseconds of one pass, over the replays of a graph of several.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    pub us: f64,
    /// The fastest and the slowest replay.
    pub range: [f64; 2],
    pub passes: usize,
    pub replays: usize,
}

impl Clock {
    pub fn new(stream: &Arc<CudaStream>, once: bool) -> Result<Clock> {
        let event = || stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Clock { stream: stream.clone(), begin: event()?, end: event()?, once })
    }

    /// Times passes over `sets` sets of buffers, one after the other: pass `i` is enqueued by `enqueue(i)`.
    pub fn time(&self, sets: usize, enqueue: &mut dyn FnMut(usize) -> Result<()>) -> Result<Timing> {
        // Loads the kernels, and leaves in every set what the next operation reads.
        (0..sets).try_for_each(&mut *enqueue)?;
        let eager = self.between(&mut || (0..sets).try_for_each(&mut *enqueue))?;
        let rounds = if self.once { 1.0 } else { (GRAPH_US / eager.max(1e-3)).ceil() };
        let rounds = (rounds as usize).clamp(1, (MOST_PASSES / sets).max(1));
        let passes = rounds * sets;

        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let captured = (0..passes).try_for_each(|pass| enqueue(pass % sets));
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags);
        captured?;
        let graph = graph?.ok_or("nothing was captured")?;
        let replay = || self.between(&mut || Ok(graph.launch()?));

        if !self.once {
            replay()?;
            replay()?;
        }
        let (mut all, mut spent) = (Vec::new(), 0.0);
        while all.len() < *REPLAYS.end() && (all.len() < *REPLAYS.start() || spent < REPLAYS_US) {
            let us = replay()?;
            spent += us;
            all.push(us / passes as f64);
            if self.once {
                break;
            }
        }
        all.sort_by(f64::total_cmp);
        Ok(Timing { us: all[all.len() / 2], range: [all[0], all[all.len() - 1]], passes, replays: all.len() })
    }

    /// Microseconds between two events around `work`.
    fn between(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.begin.record(&self.stream)?;
        work()?;
        self.end.record(&self.stream)?;
        self.end.synchronize()?;
        Ok(f64::from(self.begin.elapsed_ms(&self.end)?) * 1e3)
    }
}
