//! Waits for and writes of values in memory, in stream order: `cuStreamWaitValue*`, `cuStreamWriteValue*`.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::context::Context;
use super::handles::Handle;
use super::status::{CUresult, Outcome};
use super::stream::stream;
use super::work::Op;
use super::{api, driver, registered};

/// Between looks at a value that does not hold yet.
const PAUSE: Duration = Duration::from_micros(20);

/// A value in memory, of 4 or 8 bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Value {
    addr: u64,
    value: u64,
    wide: bool,
    flags: u32,
}

impl Value {
    fn new(addr: u64, value: u64, wide: bool, flags: u32, known: u32) -> Outcome<Value> {
        if flags > known {
            return Err(super::unsupported(format!("a stream memory operation with flags {flags:#x}")));
        }
        Ok(Value { addr, value, wide, flags })
    }

    /// Whether the address can be used.
    pub fn check(&self) -> Outcome {
        let bytes = if self.wide { 8 } else { 4 };
        if !self.addr.is_multiple_of(bytes) {
            return Err(CUresult::ERROR_INVALID_VALUE.with(format!("{:#x} is not aligned to {bytes}", self.addr)));
        }
        if registered::containing(self.addr).is_some_and(|range| bytes <= range.end - self.addr) {
            return Ok(());
        }
        driver()?.memory.check(self.addr, bytes)?;
        Ok(())
    }

    /// Whether a wait for it is over.
    pub fn holds(&self) -> bool {
        // SAFETY: `check` has seen that the place is allocated and aligned; others may write it at the same time.
        let (now, difference) = unsafe {
            if self.wide {
                let now = AtomicU64::from_ptr(self.addr as *mut u64).load(Ordering::Acquire);
                (now, now.wrapping_sub(self.value) as i64)
            } else {
                let now = AtomicU32::from_ptr(self.addr as *mut u32).load(Ordering::Acquire);
                (now.into(), i64::from(now.wrapping_sub(self.value as u32) as i32))
            }
        };
        let mask = if self.wide { u64::MAX } else { u32::MAX.into() };
        match self.flags {
            // CU_STREAM_WAIT_VALUE_GEQ (cyclic), EQ, AND, NOR
            0 => difference >= 0,
            1 => difference == 0,
            2 => now & self.value != 0,
            _ => !(now | self.value) & mask != 0,
        }
    }

    pub fn wait(&self, context: &Context) -> Outcome {
        while !self.holds() {
            context.check()?;
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    pub fn write(&self) {
        super::checks::signalled(self.addr, if self.wide { 8 } else { 4 });
        // SAFETY: as in `holds`.
        unsafe {
            if self.wide {
                AtomicU64::from_ptr(self.addr as *mut u64).store(self.value, Ordering::Release);
            } else {
                AtomicU32::from_ptr(self.addr as *mut u32).store(self.value as u32, Ordering::Release);
            }
        }
    }
}

macro_rules! operations {
    ($($name:ident $op:ident($ty:ty, $wide:literal, $flags:literal);)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(handle: Handle, addr: u64, value: $ty, flags: u32) -> CUresult {
                api(stringify!($name), || {
                    let stream = stream(handle)?;
                    stream.submit(Op::$op(Value::new(addr, value.into(), $wide, flags, $flags)?))
                })
            }
        )*
    };
}

// CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER asks for less order than there is.
operations! {
    cuStreamWaitValue32_v2 WaitValue(u32, false, 3);
    cuStreamWaitValue64_v2 WaitValue(u64, true, 3);
    cuStreamWriteValue32_v2 WriteValue(u32, false, 1);
    cuStreamWriteValue64_v2 WriteValue(u64, true, 1);
}
