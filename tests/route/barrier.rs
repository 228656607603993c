//! The barrier of a grid gives up where its blocks cannot meet, and says where (`kernels/common/grid/barrier.ptx.jinja`).

use moe_kernels::registry::Kernel;
use softcuda::exec::FaultKind;

use crate::device::{Arg, Input, Output, Scratch, launch, launch_one_by_one};

/// Polls after which a block gives up: minutes on a GPU, too many to wait for here.
const BOUND: &str = "268435456";

/// What word 2 says of the first barrier of `token_slots`.
const SITE: u32 = 0x60001;

#[test]
fn blocks_that_cannot_meet_give_up_and_say_where() {
    let (tokens, slots) = (40, 100);
    let slot_token = Input::new(&(0..slots).map(|slot| slot % tokens).collect::<Vec<i32>>());
    let outputs = [Output::new::<u32>(tokens as usize + 1), Output::new::<u32>(slots as usize)];
    let workspace = Scratch::new(32 + 4 * (3 + tokens as u64 + slots as u64));
    workspace.write(0, &[0u32; 4]);
    let mut args = vec![Arg::In(&slot_token)];
    args.extend(outputs.iter().map(Arg::Out));
    args.extend([Arg::U32(tokens as u32), Arg::U32(slots as u32), Arg::Scratch(&workspace)]);
    for seed in 0..2 {
        launch(Kernel::TokenSlots, [3, 1, 1], seed, &args);
        let [arrivals, _, site, seen] = workspace.read::<u32>(0, 4).try_into().unwrap();
        assert_eq!([arrivals << 1, site, seen], [0, 0, 0], "ready for the next launch, with nothing to report");
    }

    // One block alone of three: block 0, which comes first, waits for two.
    workspace.write(0, &[0u32; 4]);
    let fault = launch_one_by_one(Kernel::TokenSlots, [BOUND, "1000"], [3, 1, 1], &args).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Trap, "{fault}");
    assert_eq!(workspace.read::<u32>(8, 2), [SITE, (1 << 31) - 2], "site, and two missing");
}
