//! A gating with a known result, on contexts and streams of a test's own.
#![allow(dead_code)] // each test binary uses its own part

use std::ffi::c_void;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, result};
use moe_kernels::routers::gating::GatingDesc;
use moe_kernels::rules::{Gating, Score};
use moe_kernels::{Kernels, device};

pub const T: usize = 33;
pub const E: usize = 8;
pub const K: usize = 2;

/// A value of the device's context of its own: settings and counts of streams are those of the value. On the software device streams
/// run beside each other and the host.
pub fn context() -> Arc<CudaContext> {
    choice();
    device::open(0).expect("device 0 opens")
}

pub fn is_software_device() -> bool {
    matches!(choice(), softcuda::Choice::Soft(_))
}

fn choice() -> &'static softcuda::Choice {
    static CHOICE: OnceLock<softcuda::Choice> = OnceLock::new();
    CHOICE.get_or_init(|| {
        // SAFETY: the only write to the environment, before the driver that reads it is loaded.
        unsafe { std::env::set_var("SOFTCUDA_STREAMS", "concurrent") };
        softcuda::install_if_no_gpu().expect("a real or a software device can be had")
    })
}

/// One test at a time: no call that waits for the whole context may fall into another test's capture.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A gating of `T` tokens, all loaded.
pub struct Problem {
    pub kernels: Kernels,
    pub context: Arc<CudaContext>,
    pub desc: GatingDesc,
}

impl Problem {
    pub fn new(context: &Arc<CudaContext>) -> Problem {
        let kernels = Kernels::new(context).unwrap();
        let desc = GatingDesc::new(T, E, K, Gating::new(Score::Softmax));
        kernels.preload([moe_kernels::routers::gating::select(&desc, kernels.device()).unwrap().kernel]).unwrap();
        Problem { kernels, context: context.clone(), desc }
    }

    pub fn host_logits() -> Vec<f32> {
        (0..T * E).map(|i| (i * 7919 % 251) as f32 / 16.0).collect()
    }

    /// Logits on the device, ids of -7 and weights of NaN. All is done when this returns.
    pub fn buffers(&self) -> (CudaSlice<f32>, CudaSlice<i32>, CudaSlice<f32>) {
        let stream = self.context.default_stream();
        let logits = stream.clone_htod(&Problem::host_logits()).unwrap();
        let ids = stream.clone_htod(&[-7; T * K]).unwrap();
        let weights = stream.clone_htod(&[f32::NAN; T * K]).unwrap();
        stream.synchronize().unwrap();
        (logits, ids, weights)
    }

    /// The ids that the logits lead to.
    pub fn expected(&self) -> Vec<i32> {
        choices(&Problem::host_logits())
    }
}

/// The `K` largest of each token's logits, the lower id first among equals.
pub fn choices(logits: &[f32]) -> Vec<i32> {
    let of_token = |row: &[f32]| {
        let mut order: Vec<usize> = (0..E).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        order.into_iter().take(K).map(|e| e as i32).collect::<Vec<_>>()
    };
    logits.chunks(E).flat_map(of_token).collect()
}

/// Holds back what is put on a stream after it.
pub struct Gate(Sender<()>);

impl Gate {
    pub fn close(stream: &CudaStream) -> Gate {
        unsafe extern "C" fn wait(gate: *mut c_void) {
            // SAFETY: made by `close`, for this one call.
            let gate = unsafe { Box::from_raw(gate.cast::<Receiver<()>>()) };
            // A test that fails leaves the gate, and the stream goes on.
            let _ = gate.recv_timeout(Duration::from_secs(60));
        }
        let (open, gate) = channel();
        stream.context().bind_to_thread().unwrap();
        // SAFETY: the stream is alive, and the function owns its argument and makes no call of CUDA.
        unsafe { result::stream::launch_host_function(stream.cu_stream(), wait, Box::into_raw(Box::new(gate)).cast()) }
            .unwrap();
        Gate(open)
    }

    pub fn open(self) {
        self.0.send(()).unwrap();
    }
}
