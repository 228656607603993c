//! The routing kernels (router, gate, dispatch, combine) against `moe_kernels::reference`, launched on softcuda's executor
//! itself: grids, cooperation and counters are this test's choice, not the launch layer's.

mod balance;
mod barrier;
mod combine;
mod device;
mod dispatch;
mod gate;
mod noise;
mod random;
mod router;
