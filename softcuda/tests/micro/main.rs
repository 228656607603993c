//! One small program for each instruction family, checked against the definition in the PTX ISA manual (sections are named
//! in each file), with its edge cases.

// Comparisons are spelled out as the manual defines them, NaN included.
#![allow(clippy::double_comparisons, clippy::neg_cmp_op_on_partial_ord, clippy::precedence, clippy::type_complexity)]
#![allow(clippy::result_large_err, clippy::needless_range_loop, clippy::manual_is_multiple_of)]

mod barriers;
mod bits;
mod bulk;
mod call_names;
mod calls;
mod clusters;
mod compare;
mod convert;
mod copies;
mod counters;
mod device;
mod double;
mod errors;
mod float;
mod flow;
mod half_precision;
mod heap;
mod hopper;
mod instruction_sets;
mod integer;
mod matrix;
mod matrix_hopper;
mod mbarriers;
mod memory;
#[path = "../common/nvidia.rs"]
mod nvidia;
mod real;
mod spellings;
mod tensors;
mod traffic;
mod truncated;
mod warp;
mod warpgroup;
mod wgmma;
mod wgmma_async;
mod wgmma_registers;
mod wide;
