//! `cuGetExportTable`: interfaces between NVIDIA's libraries that are named by a UUID and documented nowhere.

use std::ffi::c_void;

use super::status::CUresult;
use super::{api, out};

/// No such interface is known here. NVRTC, which keeps its cache through one, compiles without it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetExportTable(table: *mut *const c_void, id: *const [u8; 16]) -> CUresult {
    api("cuGetExportTable", || {
        unsafe { out(table, "ppExportTable", std::ptr::null())? };
        if id.is_null() {
            return Err(CUresult::ERROR_INVALID_VALUE.with("`pExportTableId` is null"));
        }
        // SAFETY: a UUID, by the call's contract.
        let id = u128::from_be_bytes(unsafe { id.read_unaligned() });
        Err(CUresult::ERROR_NOT_FOUND.with(format!("softcuda has no export table {id:032x}")))
    })
}
