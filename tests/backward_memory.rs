//! What a forward pass keeps for the way back, counted on the device: alone in its process, as all of it allocates there.

#[path = "support/device.rs"]
#[allow(dead_code)]
mod device;

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::layer::{BackwardDesc, LayerDesc, MapDesc, Mlp, Origin, Saved, SharedDesc};
use moe_kernels::rules::{Capacity, NullExperts};

/// Bytes that the device gave for it, and those of the formula: each of its buffers begins on a boundary of the device's.
#[test]
fn what_is_kept_is_what_is_said() {
    const TOKENS: usize = 1024;
    let (kernels, stream) = (device::kernels(), device::stream());
    let base = LayerDesc::new(Dtype::Bf16, 256, 384, 16, 4);
    let shared = SharedDesc::new(512, Mlp::swiglu(Dtype::Bf16)).gated(true);
    let descs = [
        base,
        base.shared(Some(shared)),
        base.mlp(Mlp::relu(Dtype::Bf16)),
        base.null(Some(NullExperts::identity(3))),
        base.map(Some(MapDesc::new(5))),
        base.capacity(Some(Capacity::new(100, TOKENS).padded(true))),
    ];
    for desc in descs {
        for origin in [Origin::Router, Origin::Logits, Origin::Choices] {
            for recompute in [false, true] {
                let plan = desc.plan(TOKENS, kernels.device()).unwrap();
                let back = plan.backward_plan(&BackwardDesc::new().origin(origin).recompute(recompute)).unwrap();
                let free = || {
                    stream.synchronize().unwrap();
                    stream.context().mem_get_info().unwrap().0
                };
                let before = free();
                let saved = Saved::<bf16>::new(&stream, &back).unwrap();
                let taken = before - free();
                let said = back.saved_bytes();
                assert!(said <= taken && taken <= said + 20 * 512, "{desc:?}: {taken} bytes, said {said}");
                drop(saved);
            }
        }
    }
    // The formula of the documentation, by hand: b S c I of pre-activations, and 4 E + 16 k a token beside them.
    let back = base.plan(TOKENS, kernels.device()).unwrap().backward_plan(&BackwardDesc::new()).unwrap();
    let by_token = back.saved_bytes() as f64 / TOKENS as f64;
    let (kept, lists) = (2 * 4 * 2 * 384, 4 * 16 + 4 * 4 + (4 * 4 + 8 * 4));
    assert!((by_token - (kept + lists) as f64).abs() < 4.0, "{by_token} bytes a token, {kept} and {lists}");
    let again = base.plan(TOKENS, kernels.device()).unwrap();
    let again = again.backward_plan(&BackwardDesc::new().recompute(true)).unwrap();
    assert_eq!(back.saved_bytes() - again.saved_bytes(), kept * TOKENS);
}
