//! The numbers of chosen experts, in whatever integers a framework has them.

use cudarc::driver::{CudaSlice, CudaView};

use crate::rules::IdFormat;
use crate::runtime::launch::{Held, Scope};
use crate::{Error, In};

/// A buffer of ids: made with `From` of `i32`, `u32` or `i64` buffers.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum Ids<'a> {
    /// See [`IdFormat::I32`].
    I32(In<'a, i32>),
    /// See [`IdFormat::U32`].
    U32(In<'a, u32>),
    /// See [`IdFormat::I64`].
    I64(In<'a, i64>),
}

impl Ids<'_> {
    /// How they are stored.
    pub fn format(&self) -> IdFormat {
        match self {
            Ids::I32(_) => IdFormat::I32,
            Ids::U32(_) => IdFormat::U32,
            Ids::I64(_) => IdFormat::I64,
        }
    }

    /// Opens `needed` ids, which must be stored as the descriptor says.
    pub(crate) fn open<'b>(
        self,
        scope: &Scope<'b>,
        argument: &'static str,
        expected: IdFormat,
        needed: usize,
    ) -> Result<Held<'b>, Error>
    where
        Self: 'b,
    {
        let got = self.format();
        if got != expected {
            let expected = format!("ids of {expected:?}, as the descriptor says");
            return Err(Error::invalid(scope.operation, argument, expected, format!("ids of {got:?}")));
        }
        let alignment = u64::from(expected.bytes());
        match self {
            Ids::I32(ids) => scope.read(argument, ids, needed, alignment),
            Ids::U32(ids) => scope.read(argument, ids, needed, alignment),
            Ids::I64(ids) => scope.read(argument, ids, needed, alignment),
        }
    }
}

macro_rules! from_buffers {
    ($($member:ident of $element:ty),*) => {
        $(
            impl<'a> From<In<'a, $element>> for Ids<'a> {
                fn from(ids: In<'a, $element>) -> Self {
                    Ids::$member(ids)
                }
            }

            impl<'a> From<&'a CudaSlice<$element>> for Ids<'a> {
                fn from(ids: &'a CudaSlice<$element>) -> Self {
                    Ids::$member(ids.into())
                }
            }

            impl<'a> From<&'a CudaView<'_, $element>> for Ids<'a> {
                fn from(ids: &'a CudaView<'_, $element>) -> Self {
                    Ids::$member(ids.into())
                }
            }
        )*
    };
}

from_buffers!(I32 of i32, U32 of u32, I64 of i64);
