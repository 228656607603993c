//! The instruction set as data: every lane-wise instruction is one row that holds its PTX spellings, its operand types and
//! what it computes on one lane.
//!
//! A row reads `fast|slow Class "spellings" Code(operands) -> result { expression }`. The lowering finds a row by the full
//! spelling of an instruction; the interpreter expands the same rows into loops over 32 lanes. `fast` rows are compiled
//! into each instruction-set variant of the interpreter so that they vectorise, `slow` ones once. Rows without a spelling
//! are the micro-operations that richer instructions are composed of.

mod float;
mod integer;

use std::collections::HashMap;
use std::sync::LazyLock;

pub(crate) use float::float_ops;
pub(crate) use integer::integer_ops;

use crate::lower::InstructionClass;
use crate::ptx::ast::Type;

/// Expands `$callback! { rows... }` with the rows of the whole instruction set.
macro_rules! for_each_row {
    ($callback:ident) => {
        $crate::lower::isa::integer_ops! { float_chain!( $callback ) }
    };
}

/// Where an operand lives: 16-bit values occupy 32-bit slots, zero-extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Width {
    Pred,
    W32,
    W64,
}

/// The PTX type that a row's operand token stands for.
macro_rules! operand_type {
    (bool) => {
        Type::Pred
    };
    (u16) => {
        Type::U16
    };
    (i16) => {
        Type::S16
    };
    (b16) => {
        Type::B16
    };
    (u32) => {
        Type::U32
    };
    (i32) => {
        Type::S32
    };
    (b32) => {
        Type::B32
    };
    (u64) => {
        Type::U64
    };
    (i64) => {
        Type::S64
    };
    (b64) => {
        Type::B64
    };
    (f32) => {
        Type::F32
    };
    (f64) => {
        Type::F64
    };
    (F16) => {
        Type::F16
    };
    (BF16) => {
        Type::BF16
    };
    (F16x2) => {
        Type::F16x2
    };
    (BF16x2) => {
        Type::BF16x2
    };
}

/// What the lowering knows about a row.
#[derive(Debug)]
pub struct Row {
    /// Space-separated spellings; empty for micro-operations.
    pub names: &'static str,
    pub code: Code,
    pub class: InstructionClass,
    pub result: Type,
    pub sources: &'static [Type],
}

macro_rules! define_codes {
    ($( $speed:ident $class:ident $names:literal $code:ident ( $($p:ident : $t:ident),* ) -> $r:ident $body:block )*) => {
        /// Operation codes. The first ones are lane-wise rows; those named below need more than three operands or touch
        /// more than registers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Code {
            $($code,)*
            /// Predicate logic on whole masks: `d = a op b`.
            PredAnd, PredOr, PredXor, PredNot, PredMov,
            /// `lop3` with its truth table in `x`.
            Lop3,
            /// Reads special register `x`.
            Special,
            /// Start of block `a` of `x` instructions.
            Enter,
            /// To operation `x`.
            Bra,
            /// Calls of functions with a body of their own, and what such a body begins and ends with.
            Call, Frame, Return,
            /// `vprintf`; `malloc` and `free`.
            Print, Heap,
            BrxIdx, Exit, Trap, Assert, InvalidPc, Nop,
            /// `griddepcontrol.wait`.
            GridWait,
            /// `cp.async.wait_group` of `x`; `wait_all` is a commit and a wait for all.
            Load, Store, Atom, AtomWide, CopyAsync, CopyCommit, CopyWait,
            Arith, Cvt, TestSpace,
            Exchange, Activemask, Barrier, Fence, Sleep,
            LoadMatrix, StoreMatrix, MoveMatrix, Mma,
            Cluster, Mbarrier, Bulk, ProxyFence, Tensormap,
            /// `setmaxnreg` to the low bits of `x`, up where its top bit is set.
            Wgmma, WgmmaSync, WgmmaTouch, SetMaxRegisters,
        }

        /// All rows, in the order of [`Code`].
        pub static ROWS: &[Row] = &[
            $(Row {
                names: $names,
                code: Code::$code,
                class: InstructionClass::$class,
                result: operand_type!($r),
                sources: &[$(operand_type!($t)),*],
            },)*
        ];
    };
}

macro_rules! float_chain {
    ( ($callback:ident) $($rows:tt)* ) => { $crate::lower::isa::float_ops! { $callback!( $($rows)* ) } };
    ( $callback:ident $($rows:tt)* ) => { $crate::lower::isa::float_ops! { $callback!( $($rows)* ) } };
}
pub(crate) use {float_chain, for_each_row};

for_each_row!(define_codes);

/// Rows by full spelling.
pub static BY_NAME: LazyLock<HashMap<&'static str, &'static Row>> =
    LazyLock::new(|| ROWS.iter().flat_map(|r| r.names.split_whitespace().map(move |n| (n, r))).collect());

impl Code {
    /// The row of a lane-wise operation.
    pub fn row(self) -> Option<&'static Row> {
        ROWS.get(self as usize)
    }
}

impl Width {
    /// Where a value of this type lives; `None` for types no register can have.
    pub fn of(ty: Type) -> Option<Self> {
        Some(match ty {
            Type::Pred => Self::Pred,
            Type::B64 | Type::U64 | Type::S64 | Type::F64 | Type::F32x2 => Self::W64,
            Type::B128 => return None,
            _ => Self::W32,
        })
    }

    /// Bytes of one register in the warp's file.
    pub fn file_bytes(self) -> u32 {
        match self {
            Self::Pred => 4,
            Self::W32 => 128,
            Self::W64 => 256,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_the_order_of_their_codes_and_no_spelling_occurs_twice() {
        let mut spellings = 0;
        for (i, row) in ROWS.iter().enumerate() {
            assert_eq!(row.code as usize, i);
            spellings += row.names.split_whitespace().count();
        }
        assert_eq!(spellings, BY_NAME.len());
    }
}
