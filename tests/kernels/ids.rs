//! Ids of chosen experts in every integer that kernels take, with numbers that are no expert's in every way there is.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use moe_kernels::capacity::Ids;
use moe_kernels::rules::IdFormat;

use crate::support::buffer::Guarded;

/// Ids on the device.
pub enum Stored {
    I32(Guarded<i32>),
    U32(Guarded<u32>),
    I64(Guarded<i64>),
}

/// A format of ids of so many bytes.
pub fn format(rng: &mut fastrand::Rng, bytes: u32) -> IdFormat {
    match bytes {
        8 => IdFormat::I64,
        4 if rng.bool() => IdFormat::U32,
        4 => IdFormat::I32,
        other => unreachable!("no kernel takes ids of {other} bytes"),
    }
}

impl Stored {
    /// `ids`, where negative ones become what is no number of one of `experts` experts.
    pub fn new(
        stream: &Arc<CudaStream>,
        rng: &mut fastrand::Rng,
        format: IdFormat,
        ids: &[i32],
        experts: usize,
    ) -> Stored {
        let some = rng.usize(..experts) as i64;
        let mut odd = |values: &[i64]| values[rng.usize(..values.len())];
        // Of 64 bits the lower half alone may be an expert's number.
        let wide = [-1, i64::MIN, i64::MAX, experts as i64, 1 << 32 | some, -1 << 32 | some, i64::MIN | some];
        let narrow = [-1, i32::MIN.into(), i32::MAX.into(), experts as i64, i64::from(i32::MIN) | some];
        let mut stored =
            |none: &[i64]| -> Vec<i64> { ids.iter().map(|&id| if id < 0 { odd(none) } else { id.into() }).collect() };
        match format {
            IdFormat::I64 => Stored::I64(Guarded::input(stream, "ids", &stored(&wide))),
            IdFormat::U32 => {
                let ids: Vec<u32> = stored(&narrow).into_iter().map(|id| id as u32).collect();
                Stored::U32(Guarded::input(stream, "ids", &ids))
            }
            _ => {
                let ids: Vec<i32> = stored(&narrow).into_iter().map(|id| id as i32).collect();
                Stored::I32(Guarded::input(stream, "ids", &ids))
            }
        }
    }

    /// As an operation takes them.
    pub fn with<R>(&self, run: impl FnOnce(Ids<'_>) -> R) -> R {
        match self {
            Stored::I32(ids) => run((&ids.view()).into()),
            Stored::U32(ids) => run((&ids.view()).into()),
            Stored::I64(ids) => run((&ids.view()).into()),
        }
    }

    pub fn assert_unchanged(&self, stream: &Arc<CudaStream>) {
        match self {
            Stored::I32(ids) => ids.assert_unchanged(stream),
            Stored::U32(ids) => ids.assert_unchanged(stream),
            Stored::I64(ids) => ids.assert_unchanged(stream),
        }
    }
}
