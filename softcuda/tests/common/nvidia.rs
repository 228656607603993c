//! A real driver beside the executor, and a list of what it does otherwise.

use std::io::Write as _;
use std::sync::{Arc, LazyLock};

use cudarc::driver::CudaContext;

/// The real driver's first device: demanded by `MOE_DEVICE=cuda`, forbidden by `MOE_DEVICE=soft`, else taken where there is one.
pub fn context() -> Option<&'static Arc<CudaContext>> {
    static CONTEXT: LazyLock<Option<Arc<CudaContext>>> = LazyLock::new(|| {
        let asked = std::env::var("MOE_DEVICE").unwrap_or_default();
        // SAFETY: loads the driver's library, as any use of cudarc does.
        let present = asked != "soft" && unsafe { cudarc::driver::sys::is_culib_present() };
        assert!(present || asked != "cuda", "MOE_DEVICE=cuda, but no driver loads");
        present.then(|| CudaContext::new(0).expect("the driver has a device"))
    });
    CONTEXT.as_ref()
}

/// A result that is not the executor's: a line of the file that `SOFTCUDA_DIFFERENCES` names, with the program behind a tab, so that one run
/// tells all of them; without the variable the test ends here.
#[track_caller]
pub fn differs(what: &str, program: &str) {
    let Some(file) = std::env::var_os("SOFTCUDA_DIFFERENCES").filter(|file| !file.is_empty()) else {
        panic!("{what}\n{program}");
    };
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = format!("{test}: {}\t{}\n", one_line(what), one_line(program));
    let file = std::fs::OpenOptions::new().create(true).append(true).open(file);
    // One write: tests of one program append side by side.
    file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the list of differences can be written");
}

/// Where two results differ, counted in words of 32 bits (bytes where they are no whole words); none where they are the same.
pub fn difference(got: &[u8], want: &[u8]) -> Option<String> {
    let size = if want.len().is_multiple_of(4) { 4 } else { 1 };
    let hex = |word: &[u8]| word.iter().rev().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut apart = got.chunks(size).zip(want.chunks(size)).enumerate().filter(|(_, (got, want))| got != want);
    let (index, (first, wanted)) = apart.next()?;
    let (first, wanted) = (hex(first), hex(wanted));
    Some(format!(
        "{} of {} words, first [{index}]: 0x{first} on the driver, 0x{wanted} on the executor",
        1 + apart.count(),
        want.len() / size
    ))
}
