//! Checks of `expert_counts` and `expert_counts_i64`.

use moe_kernels::capacity::expert_counts::{self, ExpertCountsArgs, ExpertCountsDesc};
use moe_kernels::registry::Kernel;
use moe_kernels::{Out, Workspace, reference};

use crate::ids::{Stored, format};
use crate::support::buffer::Guarded;
use crate::support::device;
use crate::timing::time;

pub fn check(ids_bytes: u32, rng: &mut fastrand::Rng) {
    // One workspace for all: each launch finds the header as the last left it.
    let stream = device::stream();
    let mut workspace = Workspace::new(&stream, expert_counts::workspace_bytes()).unwrap();
    for experts in [1, 2, 31, 60, 256, 257, 4096, 8192] {
        for slots in [1, 31, 33, 1000, 2049, 20_000] {
            for row_multiple in [1, 16, 100] {
                let desc = ExpertCountsDesc::new(slots, experts).ids(format(rng, ids_bytes)).row_multiple(row_multiple);
                case(rng, &desc, &mut workspace);
            }
        }
    }
    nothing(&mut workspace);
}

fn case(rng: &mut fastrand::Rng, desc: &ExpertCountsDesc, workspace: &mut Workspace) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let kernel = Kernel::ExpertCounts { ids_bytes: desc.ids.bytes() };
    assert_eq!(expert_counts::select(desc, kernels.device()).unwrap().kernel.variant(), kernel);
    let (skewed, favourite) = (rng.bool(), rng.usize(..desc.experts) as i32);
    let ids: Vec<i32> = (0..desc.slots)
        .map(|_| match rng.u32(..10) {
            0 => -1,
            1..9 if skewed => favourite,
            _ => rng.usize(..desc.experts) as i32,
        })
        .collect();
    let (want, want_offsets) = reference::expert_counts::expert_counts(&ids, desc.experts, desc.row_multiple).unwrap();
    let ids = Stored::new(&stream, rng, desc.ids, &ids, desc.experts);
    let mut counts = Guarded::<i32>::output(&stream, "counts", desc.experts);
    let mut offsets = Guarded::<i32>::output(&stream, "offsets", desc.experts + 1);
    let mut launch = |counts: &mut Guarded<i32>, offsets: Option<&mut Guarded<i32>>| {
        let mut counts = counts.view_mut();
        let mut offsets = offsets.map(Guarded::view_mut);
        ids.with(|ids| {
            let mut args = ExpertCountsArgs::new(ids, &mut counts, workspace);
            args.offsets = offsets.as_mut().map(Out::from);
            expert_counts::forward(kernels, &stream, desc, args).unwrap();
        });
    };
    launch(&mut counts, None);
    assert_eq!(counts.read(&stream), want, "{desc:?}");
    counts.reset(&stream);
    launch(&mut counts, Some(&mut offsets));
    assert_eq!(counts.read(&stream), want, "{desc:?} with offsets");
    assert_eq!(offsets.read(&stream), want_offsets, "{desc:?}");
    ids.assert_unchanged(&stream);
    time(&stream, &format!("{desc:?}"), || launch(&mut counts, None));
}

/// No slots: zeros, without a launch.
fn nothing(workspace: &mut Workspace) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let desc = ExpertCountsDesc::new(0, 5);
    let ids = stream.alloc_zeros::<i32>(1).unwrap();
    let mut counts = Guarded::<i32>::output(&stream, "counts", 5);
    let mut offsets = Guarded::<i32>::output(&stream, "offsets", 6);
    {
        let (mut counts, mut offsets) = (counts.view_mut(), offsets.view_mut());
        let args = ExpertCountsArgs::new(&ids, &mut counts, workspace).offsets(&mut offsets);
        expert_counts::forward(kernels, &stream, &desc, args).unwrap();
    }
    assert_eq!((counts.read(&stream), offsets.read(&stream)), (vec![0; 5], vec![0; 6]));
}
