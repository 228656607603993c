//! What a layer puts on the device is what its plan says. One test: the software device's log belongs to the process.

use half::bf16;
use moe_kernels::experts::Weight;
use moe_kernels::layer::{
    BackwardArgs, BackwardDesc, ExpertWeights, LayerArgs, LayerDesc, LayerGradients, LayerWeights, Mlp,
    RouterGradients, RouterWeights, Saved, SharedDesc, SharedGradients, SharedWeights, WeightGradients,
};
use moe_kernels::rules::{Glu, WeightDesc};
use moe_kernels::{Dtype, Kernels, Workspace, device};

#[test]
fn launches_are_those_of_the_plan() {
    let choice = softcuda::install_if_no_gpu().expect("a CUDA driver, real or soft");
    let Some(control) = choice.control() else {
        println!("a real driver keeps no log of launches: not tested");
        return;
    };
    let stream = device::open(0).expect("device 0").default_stream();
    let kernels = Kernels::new(stream.context()).expect("a supported device");
    let (hidden, intermediate, experts, tokens) = (64, 48, 8, 200);
    let zeros = |len: usize| stream.alloc_zeros::<bf16>(len).expect("device memory");
    let (router, x, mut y) = (zeros(experts * hidden), zeros(tokens * hidden), zeros(tokens * hidden));
    let (gate_up, down) = (zeros(experts * 2 * intermediate * hidden), zeros(experts * hidden * intermediate));

    let plain = LayerDesc::new(Dtype::Bf16, hidden, intermediate, experts, 2);
    // Of the others' size in their launches, of another in its own.
    let shared = |size: usize, gated: bool| Some(SharedDesc::new(size, Mlp::swiglu(Dtype::Bf16)).gated(gated));
    let [like, other, gated, qwen2] = [(intermediate, false), (40, false), (intermediate, true), (40, true)]
        .map(|(size, gated)| plain.shared(shared(size, gated)));
    // Gate and up in a tensor each.
    let two = Mlp::swiglu(Dtype::Bf16).gate_up(WeightDesc::new(Dtype::Bf16).glu(Glu::Apart));
    let apart = plain.mlp(two);
    let [apart_like, apart_other] = [intermediate, 40].map(|size| apart.shared(Some(SharedDesc::new(size, two))));
    let forms =
        [(plain, 5), (like, 5), (other, 7), (gated, 5), (qwen2, 7), (apart, 5), (apart_like, 5), (apart_other, 7)];
    for (desc, launches) in forms {
        let plan = desc.plan(tokens, kernels.device()).expect("a valid layer");
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).expect("device memory");
        let of_two = desc.mlp == two;
        let gate_up = if of_two { Weight::apart(&gate_up, &gate_up) } else { Weight::new(&gate_up) };
        let down = Weight::new(&down);
        let mut experts = ExpertWeights::new(gate_up, down);
        experts.shared = desc.shared.map(|shared| {
            let weights = SharedWeights::new(gate_up, down);
            if shared.gated { weights.gate(&router) } else { weights }
        });
        let weights = LayerWeights::new(RouterWeights::new(&router), experts);
        control.log_launches(true);
        plan.forward(&kernels, &stream, &weights, LayerArgs::new(&x, &mut y), &mut workspace).expect("enqueued");
        stream.synchronize().expect("the kernels ran");
        let log = control.launches();
        control.log_launches(false);

        assert_eq!(log.len(), launches);
        assert_eq!(plan.launches(), launches);
        for (record, (_, selection)) in log.iter().zip(plan.stages()) {
            assert_eq!(record.kernel, selection.kernel.name());
            assert_eq!(record.grid, selection.grid);
            assert_eq!(record.block, [selection.kernel.threads(), 1, 1]);
            assert_eq!(record.dynamic_shared_bytes, selection.kernel.shared_bytes());
        }

        // And back: never more than nine, whatever the shared expert's width.
        let back = plan.backward_plan(&BackwardDesc::new()).expect("a layer with a way back");
        let bytes = plan.workspace_bytes().max(back.workspace_bytes());
        let mut workspace = Workspace::new(&stream, bytes).expect("device memory");
        let mut saved = Saved::new(&stream, &back).expect("device memory");
        plan.forward_saving(&kernels, &stream, &weights, LayerArgs::new(&x, &mut y), &mut saved, &mut workspace)
            .expect("enqueued");
        let mut dx = zeros(tokens * hidden);
        let [mut d_router, mut d_gate] = [router.len(), hidden].map(|len| stream.alloc_zeros::<f32>(len).unwrap());
        let [mut d_gate_up, mut d_down] = [2, 1].map(|both| zeros(desc.experts * both * intermediate * hidden));
        let [mut d_up, mut d_shared_up_apart] = [desc.experts, 1].map(|experts| zeros(experts * intermediate * hidden));
        let [mut d_shared_up, mut d_shared_down] = [2, 1].map(|both| zeros(both * intermediate * hidden));
        let mut gradients = LayerGradients::new()
            .x(&mut dx)
            .router(RouterGradients::new().matrix(&mut d_router))
            .gate_up(if of_two {
                WeightGradients::apart(&mut d_gate_up, &mut d_up)
            } else {
                WeightGradients::new(&mut d_gate_up)
            })
            .down(WeightGradients::new(&mut d_down));
        if let Some(shared) = desc.shared {
            let of = SharedGradients::new()
                .gate_up(if of_two {
                    WeightGradients::apart(&mut d_shared_up, &mut d_shared_up_apart)
                } else {
                    WeightGradients::new(&mut d_shared_up)
                })
                .down(WeightGradients::new(&mut d_shared_down));
            gradients = gradients.shared(if shared.gated { of.gate(&mut d_gate) } else { of });
        }
        let args = BackwardArgs::new(&x, &x, gradients);
        control.log_launches(true);
        back.backward(&kernels, &stream, &weights, &saved, args, &mut workspace).expect("enqueued");
        stream.synchronize().expect("the kernels ran");
        let log = control.launches();
        control.log_launches(false);
        assert_eq!(log.len(), if of_two { 9 } else { 8 }, "{desc:?}");
        assert_eq!(back.launches(), log.len());
        for (record, (_, selection)) in log.iter().zip(back.stages()) {
            assert_eq!(record.kernel, selection.kernel.name());
            assert_eq!(record.grid, selection.grid);
        }
    }
}
