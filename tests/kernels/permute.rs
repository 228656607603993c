//! Checks of `permute_*`: rows of every width that moves in the variant's units, by lists and by the rows of a dispatch.

use half::{bf16, f16};
use moe_kernels::experts::permute::{self, PermuteArgs, PermuteDesc, Unfilled};
use moe_kernels::experts::{Dispatched, Lists, SlotShape};
use moe_kernels::registry::Kernel;
use moe_kernels::{In, reference};

use crate::support::buffer::Guarded;
use crate::support::compare::Storage;
use crate::support::device;
use crate::timing::time;

pub fn check(unit: u32, rng: &mut fastrand::Rng) {
    check_as::<bf16>(unit, rng);
    check_as::<f16>(unit, rng);
    check_as::<f32>(unit, rng);
}

/// Rows of x, rows of out.
const SHAPES: [[usize; 2]; 5] = [[1, 1], [5, 40], [60, 33], [130, 300], [0, 7]];

fn check_as<T: Storage>(unit: u32, rng: &mut fastrand::Rng) {
    let bytes = T::DTYPE.bytes();
    if unit < bytes {
        return;
    }
    // Rows of one unit, of less than a block's threads, of more than one part of a row.
    for units in [1, 3, 5, 31, 129, 1025, 2051] {
        // An odd number of units, so that no larger unit divides a row; the largest takes all.
        for [from_rows, rows] in SHAPES {
            if units > 1000 && rows > 40 {
                continue;
            }
            for unfilled in [Unfilled::Keep, Unfilled::ZeroGaps, Unfilled::ZeroAll] {
                for by in 0..3 {
                    let width = units * (unit / bytes) as usize;
                    let desc = PermuteDesc::new(T::DTYPE, from_rows, rows, width).unfilled(unfilled);
                    case::<T>(unit, rng, &desc, by);
                }
            }
        }
    }
}

/// What an output holds before: bits that no input has.
const JUNK: u8 = 0xff;

/// `by`: a list, a list with a limit, a dispatch.
fn case<T: Storage>(unit: u32, rng: &mut fastrand::Rng, desc: &PermuteDesc, by: u32) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let name = format!("{desc:?} by={by}");
    assert_eq!(permute::select(desc, kernels.device()).unwrap().kernel.variant(), Kernel::Permute { unit });
    let bytes: Vec<u8> = (0..desc.from_rows * desc.width * size_of::<T>()).map(|_| rng.u8(..0xff)).collect();
    let x: Vec<T> = bytes.chunks(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect();
    let source: Vec<i32> = (0..desc.rows)
        .map(|_| match rng.u32(..6) {
            0 => [-1, desc.from_rows as i32, i32::MAX, i32::MIN][rng.usize(..4)],
            _ => rng.i32(0..=desc.from_rows as i32),
        })
        .collect();
    // Less, all, and what no row reaches.
    let limit = if by == 0 { desc.rows } else { [rng.usize(..=desc.rows), 0, desc.rows, 1 << 30][rng.usize(..4)] };

    let mut want = vec![JUNK; desc.rows * desc.width * size_of::<T>()];
    let rows = reference::permute::permute(&x, &source, desc.width).unwrap();
    for ((r, row), out) in rows.iter().enumerate().zip(want.chunks_mut(desc.width * size_of::<T>())) {
        match (row, desc.unfilled) {
            (Some(row), _) if r < limit => out.copy_from_slice(bytemuck::cast_slice(row)),
            (_, Unfilled::ZeroAll) => out.fill(0),
            (_, Unfilled::ZeroGaps) if r < limit => out.fill(0),
            _ => {}
        }
    }

    let x = Guarded::input(&stream, "x", &x);
    let list = Guarded::input(&stream, "source", &source);
    let limits = Guarded::input(&stream, "limit", &[limit as i32]);
    let shape = SlotShape::new(desc.from_rows, 2, Some(1), desc.rows, 16, 0);
    let dispatched = (by == 2).then(|| {
        let ints = |values: &[i32]| stream.clone_htod(values).unwrap();
        let lists = Lists {
            counts: ints(&[0, 0]),
            offsets: ints(&[0, 0, limit as i32]),
            slot_token: ints(&source),
            token_slot: ints(&vec![-1; desc.from_rows.max(1)]),
            token_offsets: ints(&[0]),
            slot_weight: stream.clone_htod(&vec![0.0; desc.rows]).unwrap(),
            tiles: stream.clone_htod(&[[0; 4]]).unwrap(),
            num_tiles: ints(&[0]),
        };
        // SAFETY: no tile covers a row, and no token has one; a permutation looks at every token itself.
        unsafe { Dispatched::from_lists(&shape, lists) }.unwrap()
    });
    let mut out = Guarded::<T>::output(&stream, "out", desc.rows * desc.width);
    let mut launch = || {
        let (x, list, limits, mut out) = (x.view(), list.view(), limits.view(), out.view_mut());
        let mut args = match &dispatched {
            Some(dispatched) => PermuteArgs::new(&x, dispatched, &mut out),
            None => PermuteArgs::new(&x, &list, &mut out),
        };
        args.limit = (by == 1).then(|| In::from(&limits));
        permute::forward(kernels, &stream, desc, args).unwrap();
    };
    launch();
    time(&stream, &name, &mut launch);
    let got = out.read(&stream);
    assert!(bytemuck::cast_slice::<T, u8>(&got) == want, "{name}: other bytes");
    x.assert_unchanged(&stream);
    list.assert_unchanged(&stream);
}
