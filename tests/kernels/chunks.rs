//! Checks of `chunk_rows`.

use moe_kernels::capacity::chunks::{self, ChunksArgs, ChunksDesc};
use moe_kernels::registry::Kernel;
use moe_kernels::{Out, reference};

use crate::support::buffer::Guarded;
use crate::support::device;
use crate::timing::time;

pub fn check(rng: &mut fastrand::Rng) {
    for count in [1, 2, 3, 31, 64, 255, 256, 257, 1000, 2048, 4095, 4096] {
        for largest in [1, 3, 40] {
            // Exactly the rows of all chunks, more, fewer.
            for rows in 0..3 {
                case(rng, count, largest, rows, false);
            }
            let rows = rng.usize(..3);
            case(rng, count, largest, rows, true);
        }
    }
    case(rng, 0, 1, 1, false);
}

/// `spoilt`: negative sizes, and an order with repeats and numbers of no chunk.
fn case(rng: &mut fastrand::Rng, count: usize, largest: i32, rows: usize, spoilt: bool) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let mut sizes: Vec<i32> = (0..count).map(|_| if rng.u32(..3) == 0 { 0 } else { rng.i32(0..=largest) }).collect();
    let mut order: Vec<i32> = (0..count as i32).collect();
    rng.shuffle(&mut order);
    if spoilt {
        for _ in 0..1 + count / 4 {
            sizes[rng.usize(..count)] = [-1, i32::MIN][rng.usize(..2)];
            order[rng.usize(..count)] =
                [-1, count as i32, i32::MAX, i32::MIN, rng.usize(..count) as i32][rng.usize(..5)];
        }
    }
    let all: usize = sizes.iter().map(|&size| size.max(0) as usize).sum();
    let rows = [all, all + 1 + rng.usize(..70), all / 2][rows];
    let name = format!("C={count} R={rows} of {all} spoilt={spoilt}");
    let (mut want, want_sizes) = reference::chunks::chunk_rows(&sizes, &order, rows).unwrap();
    want.truncate(rows);
    let desc = ChunksDesc::new(count, rows);
    assert_eq!(chunks::select(&desc, kernels.device()).unwrap().kernel.variant(), Kernel::ChunkRows);
    let sizes = Guarded::input(&stream, "sizes", &sizes);
    let order = Guarded::input(&stream, "order", &order);
    let mut source = Guarded::<i32>::output(&stream, "source", rows);
    let mut new_sizes = Guarded::<i32>::output(&stream, "new_sizes", count);
    let launch = |source: &mut Guarded<i32>, new_sizes: Option<&mut Guarded<i32>>| {
        let (sizes, order, mut source) = (sizes.view(), order.view(), source.view_mut());
        let mut new_sizes = new_sizes.map(Guarded::view_mut);
        let mut args = ChunksArgs::new(&sizes, &order, &mut source);
        args.new_sizes = new_sizes.as_mut().map(Out::from);
        chunks::forward(kernels, &stream, &desc, args).unwrap();
    };
    launch(&mut source, None);
    assert_eq!(source.read(&stream), want, "{name}");
    new_sizes.assert_unchanged(&stream);
    source.reset(&stream);
    launch(&mut source, Some(&mut new_sizes));
    assert_eq!(source.read(&stream), want, "{name} with sizes");
    assert_eq!(new_sizes.read(&stream), want_sizes, "{name}: sizes");
    time(&stream, &name, || launch(&mut source, None));
    sizes.assert_unchanged(&stream);
    order.assert_unchanged(&stream);
}
