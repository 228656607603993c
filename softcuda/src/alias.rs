//! A second name for a library that is loaded.
//!
//! NVIDIA's driver calls itself `libcuda.so.1`, and is found as `libcuda.so` through a link in a folder of libraries. Here there is
//! no such folder, so that the loader has to be told: it takes a library to be what a bare name asks for if the library calls
//! itself so (`DT_SONAME`). The alias is a library of nothing but that name and a reference (`DT_NEEDED`) to the one that
//! is meant: what is looked up in it is found there. It never has a file: it is loaded from memory.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Program headers, dynamic entries, symbols (the null one) and the hash table of that symbol.
const PROGRAM: usize = 64;
const DYNAMIC: usize = PROGRAM + 3 * 56;
const SYMBOLS: usize = DYNAMIC + 8 * 16;
const HASH: usize = SYMBOLS + 24;
const STRINGS: usize = HASH + 16;

/// The largest page that a loader of this architecture may have.
const PAGE: u64 = if cfg!(target_arch = "x86_64") { 4 << 10 } else { 64 << 10 };

/// An ELF library (System V ABI, "Object Files" and "Dynamic Linking") with a name and one reference. `None` for an architecture
/// whose number is not known here, or a text that cannot stand in it.
fn image(name: &str, target: &str) -> Option<Vec<u8>> {
    let machine: u16 = match std::env::consts::ARCH {
        "x86_64" => 62,
        "aarch64" => 183,
        "riscv64" => 243,
        _ => return None,
    };
    if cfg!(target_endian = "big") || name.contains('\0') || target.contains('\0') {
        return None;
    }
    let strings = format!("\0{name}\0{target}\0");
    let size = (STRINGS + strings.len()) as u64;
    let mut bytes = Vec::with_capacity(size as usize);
    let word = |value: usize| (value as u64).to_le_bytes();
    // 64 bits, little-endian; a shared object without sections.
    bytes.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    bytes.extend([3u16, machine].iter().flat_map(|half| half.to_le_bytes()));
    bytes.extend(1u32.to_le_bytes());
    bytes.extend([0, PROGRAM, 0].iter().flat_map(|&value| word(value)));
    bytes.extend(0u32.to_le_bytes());
    bytes.extend([64u16, 56, 3, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    // PT_LOAD of all, PT_DYNAMIC, PT_GNU_STACK, each readable and writable: loaders write to the dynamic entries.
    let dynamic = (DYNAMIC as u64, (SYMBOLS - DYNAMIC) as u64);
    for (kind, (at, len), align) in [(1u32, (0, size), PAGE), (2, dynamic, 8), (0x6474_e551, (0, 0), 16)] {
        bytes.extend([kind, 6].iter().flat_map(|half| half.to_le_bytes()));
        bytes.extend([at, at, at, len, len, align].iter().flat_map(|value| value.to_le_bytes()));
    }
    // DT_SONAME, DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT
    let entries =
        [(14, 1), (1, 2 + name.len()), (4, HASH), (5, STRINGS), (6, SYMBOLS), (10, strings.len()), (11, 24), (0, 0)];
    bytes.extend(entries.iter().flat_map(|&(tag, value)| [word(tag), word(value)].concat()));
    bytes.extend([0; HASH - SYMBOLS]);
    // One bucket, one symbol, the null one.
    bytes.extend([1u32, 1, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    bytes.extend(strings.as_bytes());
    Some(bytes)
}

/// Makes `name` mean the loaded library at `target`, for the life of the process.
pub(crate) fn load(name: &str, target: &Path) -> io::Result<()> {
    let target = target.canonicalize()?;
    let image = target.to_str().and_then(|target| image(name, target)).ok_or(io::ErrorKind::Unsupported)?;
    // SAFETY: a NUL-terminated name; the descriptor is new.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"softcuda alias".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        std::fs::File::from_raw_fd(fd)
    };
    file.write_all(&image)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: the library has no code.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }.map_err(io::Error::other)?;
    std::mem::forget(library);
    // Kept open: the loader knows the library by this path, and another file must not get it.
    std::mem::forget(file);
    Ok(())
}
