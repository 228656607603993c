//! The lane-wise operations as functions, one for each row of the instruction set and each instruction set of the host.

#![allow(non_camel_case_types)]

use super::interpreter::Isa;
use super::lanes::{File, LANES, active1, active2, active3, each1, each2, each3};
use super::numeric::{BF16, BF16x2, F16, F16x2, float, int};
use crate::lower::ir::Op;
use crate::lower::isa::{float_chain, for_each_row};

/// Runs one operation on the lanes of a mask. Unsafe for the reasons of [`File::at`], and because the host must have the
/// instruction set that it was compiled for.
pub type RowFn = unsafe fn(&File, &Op, u32);

type b16 = u16;
type b32 = u32;
type b64 = u64;

/// The functions by operation code.
pub fn table(isa: Isa) -> &'static [RowFn] {
    match isa {
        Isa::Baseline => baseline::TABLE,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::TABLE,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::TABLE,
    }
}

/// Applies a row's function to every lane or to the active ones.
macro_rules! lanes {
    ($each1:ident $each2:ident $each3:ident, $file:ident, $op:ident, $mask:ident, $r:ident, $body:block, $a:ident: $ta:ident) => {{
        #[inline(always)]
        fn f($a: $ta) -> $r $body
        $each1::<$r, $ta>(*$file, $mask, $op.d, $op.a, f)
    }};
    ($each1:ident $each2:ident $each3:ident, $file:ident, $op:ident, $mask:ident, $r:ident, $body:block,
     $a:ident: $ta:ident, $b:ident: $tb:ident) => {{
        #[inline(always)]
        fn f($a: $ta, $b: $tb) -> $r $body
        $each2::<$r, $ta, $tb>(*$file, $mask, $op.d, $op.a, $op.b, f)
    }};
    ($each1:ident $each2:ident $each3:ident, $file:ident, $op:ident, $mask:ident, $r:ident, $body:block,
     $a:ident: $ta:ident, $b:ident: $tb:ident, $c:ident: $tc:ident) => {{
        #[inline(always)]
        fn f($a: $ta, $b: $tb, $c: $tc) -> $r $body
        $each3::<$r, $ta, $tb, $tc>(*$file, $mask, $op.d, $op.a, $op.b, $op.c, f)
    }};
}

/// The `slow` rows, which all instruction sets share.
mod slow {
    #![allow(non_snake_case)]
    use super::*;

    macro_rules! define_slow {
        ($( $speed:ident $class:ident $names:literal $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block )*) => {
            $(define_slow! { @one $speed $code ( $($p: $t),* ) -> $r $body })*
        };
        (@one fast $($rest:tt)*) => {};
        (@one slow $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block) => {
            pub unsafe fn $code(file: &File, op: &Op, mask: u32) {
                // SAFETY: passed on to the caller.
                unsafe { lanes!(active1 active2 active3, file, op, mask, $r, $body, $($p: $t),*) }
            }
        };
    }
    for_each_row!(define_slow);
}

/// The function of a row in the instruction set whose module this is.
macro_rules! row {
    (fast $code:ident) => {
        $code
    };
    (slow $code:ident) => {
        slow::$code
    };
}

/// What every host has.
mod baseline {
    #![allow(non_snake_case)]
    use super::*;

    macro_rules! define_fast {
        ($( $speed:ident $class:ident $names:literal $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block )*) => {
            $(define_fast! { @one $speed $code ( $($p: $t),* ) -> $r $body })*
            pub const TABLE: &[RowFn] = &[$(row!($speed $code)),*];
        };
        (@one slow $($rest:tt)*) => {};
        (@one fast $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block) => {
            unsafe fn $code(file: &File, op: &Op, mask: u32) {
                // SAFETY: passed on to the caller.
                unsafe { lanes!(each1 each2 each3, file, op, mask, $r, $body, $($p: $t),*) }
            }
        };
    }
    for_each_row!(define_fast);
}

/// x86-64-v3.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    #![allow(non_snake_case)]
    use super::*;

    macro_rules! define_fast {
        ($( $speed:ident $class:ident $names:literal $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block )*) => {
            $(define_fast! { @one $speed $code ( $($p: $t),* ) -> $r $body })*
            pub const TABLE: &[RowFn] = &[$(row!($speed $code)),*];
        };
        (@one slow $($rest:tt)*) => {};
        (@one fast $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block) => {
            #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
            unsafe fn $code(file: &File, op: &Op, mask: u32) {
                // SAFETY: passed on to the caller.
                unsafe { lanes!(each1 each2 each3, file, op, mask, $r, $body, $($p: $t),*) }
            }
        };
    }
    for_each_row!(define_fast);
}

/// x86-64-v4.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    #![allow(non_snake_case)]
    use super::*;

    macro_rules! define_fast {
        ($( $speed:ident $class:ident $names:literal $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block )*) => {
            $(define_fast! { @one $speed $code ( $($p: $t),* ) -> $r $body })*
            pub const TABLE: &[RowFn] = &[$(row!($speed $code)),*];
        };
        (@one slow $($rest:tt)*) => {};
        (@one fast $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block) => {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
            unsafe fn $code(file: &File, op: &Op, mask: u32) {
                // SAFETY: passed on to the caller.
                unsafe { lanes!(each1 each2 each3, file, op, mask, $r, $body, $($p: $t),*) }
            }
        };
    }
    for_each_row!(define_fast);
}

/// `lop3`: bit 4a + 2b + c of the table, bit by bit.
#[inline(always)]
pub fn lop3(a: &[u32; LANES], b: &[u32; LANES], c: &[u32; LANES], table: u32) -> [u32; LANES] {
    let term = |i: u32| (table >> i & 1).wrapping_neg();
    let terms: [u32; 8] = std::array::from_fn(|i| term(i as u32));
    let mut d = [0; LANES];
    for i in 0..LANES {
        // A multiplexer tree over the table: c picks within pairs, b between them, a between halves.
        let pick = |s: u32, one: u32, zero: u32| (s & one) | (!s & zero);
        let low = pick(b[i], pick(c[i], terms[3], terms[2]), pick(c[i], terms[1], terms[0]));
        let high = pick(b[i], pick(c[i], terms[7], terms[6]), pick(c[i], terms[5], terms[4]));
        d[i] = pick(a[i], high, low);
    }
    d
}
