//! Checks of `row_groups`: data movement, so every list is compared bit for bit.

use moe_kernels::capacity::row_groups::{self, RowGroupsArgs, RowGroupsDesc, RowLayout};
use moe_kernels::experts::TileEntry;
use moe_kernels::reference::row_groups::{by_counts, by_ends, masked};

use crate::support::buffer::Guarded;
use crate::support::{device, lists};
use crate::timing::time;

pub fn check(rng: &mut fastrand::Rng) {
    for (experts, rows, tile_m) in
        [(1, 0, 16), (1, 1, 1), (1, 5000, 16), (5, 300, 64), (256, 3000, 128), (257, 300, 16), (700, 9000, 16)]
    {
        for wild in [false, true] {
            let even: Vec<i32> = (0..experts).map(|_| rng.i32(0..=(2 * rows / experts) as i32)).collect();
            let mut ends: Vec<i32> = (0..experts).map(|_| rng.i32(0..=rows as i32)).collect();
            let mut counts = even.clone();
            if wild {
                // Negative, falling and too large.
                let strange = |number: &mut i32, rng: &mut fastrand::Rng| {
                    if rng.u32(..4) == 0 {
                        *number = [i32::MIN, -1, i32::MAX, rows as i32 + 1][rng.usize(..4)];
                    }
                };
                ends.iter_mut().chain(&mut counts).for_each(|number| strange(number, rng));
            } else {
                ends.sort_unstable();
            }
            let height = (rows / experts).max(1);
            for layout in [
                RowLayout::Ends { rows },
                RowLayout::Counts { rows },
                RowLayout::Masked { height },
                RowLayout::Batched { height },
            ] {
                let numbers = if matches!(layout, RowLayout::Ends { .. }) { &ends } else { &counts };
                case(&RowGroupsDesc::new(layout, experts, tile_m), numbers);
            }
        }
    }
    // One expert has everything: many tiles.
    case(&RowGroupsDesc::new(RowLayout::Ends { rows: 2000 }, 40, 16), &[[0; 30].as_slice(), &[2000; 10]].concat());
    case(&RowGroupsDesc::new(RowLayout::Counts { rows: 2000 }, 300, 1), &[i32::MAX; 300]);
}

fn case(desc: &RowGroupsDesc, numbers: &[i32]) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let shape = desc.shape();
    let name = format!("{desc:?}");
    let (spans, height) = match desc.layout {
        RowLayout::Ends { rows } => (by_ends(numbers, rows), None),
        RowLayout::Counts { rows } => (by_counts(numbers, rows), None),
        RowLayout::Masked { height } => (masked(numbers, height), Some(height)),
        RowLayout::Batched { height } => (masked(&vec![i32::MAX; desc.experts], height), Some(height)),
        other => unreachable!("no case has {other:?}"),
    };
    let mut own = vec![-1; shape.slots];
    let mut tiles: Vec<TileEntry> = vec![];
    for (expert, &(first, end)) in spans.iter().enumerate() {
        (first..end).for_each(|row| own[row] = row as i32);
        let starts = (first..end).step_by(desc.tile_m);
        tiles.extend(starts.map(|at| [expert as i32, at as i32, (at + desc.tile_m).min(end) as i32, 0]));
    }
    let counts: Vec<i32> = spans.iter().map(|&(first, end)| (end - first) as i32).collect();
    let last = height.map_or(spans[desc.experts - 1].1, |height| height * desc.experts);
    let offsets: Vec<i32> = spans.iter().map(|&(first, _)| first as i32).chain([last as i32]).collect();

    let input = Guarded::input(&stream, "numbers", numbers);
    for _ in 0..2 {
        let mut dispatched = lists::junk(&stream, &shape);
        {
            let view = input.view();
            let args = match desc.layout {
                RowLayout::Batched { .. } => RowGroupsArgs::batched(&mut dispatched),
                _ => RowGroupsArgs::new(&view, &mut dispatched),
            };
            row_groups::forward(kernels, &stream, desc, args).unwrap();
        }
        let read = |list: &cudarc::driver::CudaSlice<i32>, len: usize| {
            let all = stream.clone_dtoh(list).unwrap();
            all[..len].to_vec()
        };
        assert_eq!(*dispatched.shape(), shape, "{name}");
        assert_eq!(read(dispatched.counts(), desc.experts), counts, "{name}: counts");
        assert_eq!(read(dispatched.offsets(), desc.experts + 1), offsets, "{name}: offsets");
        assert_eq!(read(dispatched.slot_token(), shape.slots), own, "{name}: slot_token");
        assert_eq!(read(dispatched.token_slot(), shape.slots), own, "{name}: token_slot");
        assert_eq!(read(dispatched.num_tiles(), 1), [tiles.len() as i32], "{name}: num_tiles");
        let got = stream.clone_dtoh(dispatched.tiles()).unwrap();
        assert_eq!(got[..tiles.len()], tiles, "{name}: tiles");
        assert!(tiles.len() <= shape.max_tiles, "{name}: more tiles than there may be");
        let untouched = got[tiles.len()..].iter().flatten().all(|&word| word == -7 || word == 0);
        assert!(untouched, "{name}: a tile behind the last was written");
        time(&stream, &name, || {
            let view = input.view();
            let args = match desc.layout {
                RowLayout::Batched { .. } => RowGroupsArgs::batched(&mut dispatched),
                _ => RowGroupsArgs::new(&view, &mut dispatched),
            };
            row_groups::forward(kernels, &stream, desc, args).unwrap();
        });
    }
    input.assert_unchanged(&stream);
}
