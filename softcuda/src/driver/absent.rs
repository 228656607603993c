//! Entry points that cudarc binds and this driver does not have: without a symbol, cudarc would panic.

use super::api;
use super::status::CUresult;

macro_rules! absent {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            pub extern "C" fn $name() -> CUresult {
                api(stringify!($name), || Err(super::unsupported(stringify!($name))))
            }
        )*
    };
}

absent! {
    cuImportExternalMemory
    cuDestroyExternalMemory
    cuExternalMemoryGetMappedBuffer
}
