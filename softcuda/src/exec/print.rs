//! `vprintf`: what kernels print.
//!
//! CUDA gathers the output of a launch in a buffer and writes it to the host's standard output when the host next
//! synchronises; the order between threads is not defined. Here a launch writes when it ends, in the order of its blocks and
//! within a block in the order of execution, and nothing is ever dropped for lack of room. Conversions are the C library's.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_double, c_int, c_longlong, c_void};
use std::io::Write;
use std::sync::{Arc, Mutex};

use super::access::get;
use super::lanes::{File, LANES, active};
use super::state::{Machine, Outcome};
use crate::lower::ir::Reg;

/// Where a launch's output goes.
#[derive(Debug, Clone, Default)]
pub enum Output {
    /// The process's standard output.
    #[default]
    Stdout,
    Buffer(Arc<Mutex<Vec<u8>>>),
}

/// What was printed, by block in launch order.
pub type Printed = BTreeMap<u64, Vec<u8>>;

impl Output {
    pub(super) fn write(&self, printed: &Printed) {
        for text in printed.values() {
            match self {
                // Like the driver, a launch does not fail for a closed standard output.
                Self::Stdout => {
                    let mut out = std::io::stdout().lock();
                    let _ = out.write_all(text).and_then(|()| out.flush());
                }
                Self::Buffer(buffer) => buffer.lock().unwrap_or_else(|e| e.into_inner()).extend(text),
            }
        }
    }
}

/// Longest string, format or argument, that is read from memory.
const LONGEST: usize = 1 << 20;

impl Machine<'_, '_> {
    pub fn print(&mut self, file: File, format: Reg, arguments: Reg, d: Reg, mask: u32) -> Outcome<()> {
        let (formats, blocks) = (get(file, format), get(file, arguments));
        let mut counts = [0; LANES];
        for lane in active(mask) {
            let format = self.string(formats[lane], lane)?;
            let mut arguments = Arguments { machine: self, next: blocks[lane], lane, count: 0 };
            let text = expand(&format, &mut arguments)?;
            counts[lane] = arguments.count;
            self.worker.printed.entry(self.shared.linear).or_default().extend(text);
        }
        // SAFETY: the slot is a 32-bit one of this kernel.
        unsafe { file.store32(d.slot, mask, &counts) };
        Ok(())
    }

    /// A NUL-terminated string in device memory, without its end.
    fn string(&mut self, address: u64, lane: usize) -> Outcome<Vec<u8>> {
        let mut text = Vec::new();
        while text.len() < LONGEST {
            match self.read_bytes(address + text.len() as u64, lane, 1)? {
                0 => break,
                byte => text.push(byte as u8),
            }
        }
        Ok(text)
    }
}

/// The promoted arguments one after another, each at a multiple of its size.
struct Arguments<'r, 'm, 'a> {
    machine: &'r mut Machine<'m, 'a>,
    next: u64,
    lane: usize,
    count: u32,
}

impl Arguments<'_, '_, '_> {
    fn take(&mut self, bytes: u32) -> Outcome<u64> {
        let at = self.next.next_multiple_of(bytes.into());
        self.next = at + u64::from(bytes);
        self.count += 1;
        self.machine.read_bytes(at, self.lane, bytes)
    }
}

fn expand(format: &[u8], arguments: &mut Arguments) -> Outcome<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = format;
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            out.push(first);
            continue;
        }
        let flags = rest.iter().take_while(|c| b"#0- +".contains(c)).count();
        let mut spec = rest[..flags].to_vec();
        rest = &rest[flags..];
        if let Some(tail) = rest.strip_prefix(b"*") {
            spec.extend((arguments.take(4)? as u32 as i32).to_string().bytes());
            rest = tail;
        }
        // Bounded, so that a format cannot ask for endless padding.
        let number = |rest: &mut &[u8], spec: &mut Vec<u8>| {
            let digits = rest.iter().take_while(|c| c.is_ascii_digit()).count();
            spec.extend(&rest[..digits.min(5)]);
            *rest = &rest[digits..];
        };
        number(&mut rest, &mut spec);
        if let Some(tail) = rest.strip_prefix(b".") {
            rest = tail;
            spec.push(b'.');
            if let Some(tail) = rest.strip_prefix(b"*") {
                spec.extend((arguments.take(4)? as u32 as i32).max(0).to_string().bytes());
                rest = tail;
            }
            number(&mut rest, &mut spec);
        }
        let lengths = rest.iter().take_while(|c| b"hljztL".contains(c)).count();
        let wide = rest[..lengths].iter().any(|c| b"ljzt".contains(c));
        let narrow = rest[..lengths].iter().filter(|&&c| c == b'h').count();
        rest = &rest[lengths..];
        let Some((&conversion, tail)) = rest.split_first() else {
            out.push(b'%');
            break;
        };
        rest = tail;
        match conversion {
            b'%' => out.push(b'%'),
            b'd' | b'i' | b'u' | b'o' | b'x' | b'X' => {
                let raw = arguments.take(if wide { 8 } else { 4 })?;
                let signed = matches!(conversion, b'd' | b'i');
                let bits = [if wide { 64 } else { 32 }, 16, 8][narrow.min(2)];
                let shifted = raw << (64 - bits);
                let value = if signed { (shifted as i64 >> (64 - bits)) as u64 } else { shifted >> (64 - bits) };
                out.extend(convert(&spec, b"ll", conversion, |to, n, f| {
                    // SAFETY: the format takes one long long.
                    unsafe { libc::snprintf(to, n, f, value as c_longlong) }
                }));
            }
            b'c' => {
                let value = arguments.take(4)? as c_int;
                // SAFETY: the format takes one int.
                out.extend(convert(&spec, b"", b'c', |to, n, f| unsafe { libc::snprintf(to, n, f, value) }));
            }
            b'e' | b'E' | b'f' | b'F' | b'g' | b'G' | b'a' | b'A' => {
                let value: c_double = f64::from_bits(arguments.take(8)?);
                // SAFETY: the format takes one double.
                out.extend(convert(&spec, b"", conversion, |to, n, f| unsafe { libc::snprintf(to, n, f, value) }));
            }
            b'p' => {
                let value = arguments.take(8)? as usize as *const c_void;
                // SAFETY: the format takes one pointer.
                out.extend(convert(&spec, b"", b'p', |to, n, f| unsafe { libc::snprintf(to, n, f, value) }));
            }
            b's' => {
                let address = arguments.take(8)?;
                let lane = arguments.lane;
                let text = CString::new(arguments.machine.string(address, lane)?).unwrap_or_default();
                let value = text.as_ptr();
                // SAFETY: the format takes one string, which has its end.
                out.extend(convert(&spec, b"", b's', |to, n, f| unsafe { libc::snprintf(to, n, f, value) }));
            }
            // Not a conversion: as it stands.
            other => {
                out.push(b'%');
                out.extend(spec);
                out.push(other);
            }
        }
    }
    Ok(out)
}

/// `%`, flags, length and conversion through `snprintf`, whose buffer, size and format `call` passes on.
fn convert(
    spec: &[u8],
    length: &[u8],
    conversion: u8,
    call: impl Fn(*mut c_char, usize, *const c_char) -> c_int,
) -> Vec<u8> {
    let format = CString::new([b"%", spec, length, &[conversion]].concat()).unwrap_or_default();
    let needed = call(std::ptr::null_mut(), 0, format.as_ptr());
    let Ok(needed) = usize::try_from(needed) else { return Vec::new() };
    let mut text = vec![0u8; needed + 1];
    call(text.as_mut_ptr().cast(), text.len(), format.as_ptr());
    text.truncate(needed);
    text
}
