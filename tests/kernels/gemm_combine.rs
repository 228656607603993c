//! Checks of `gemm_*_combine`: those of the product, and sums with the bits of a combine in a launch of its own.

use half::{bf16, f16};
use moe_kernels::experts::combine::{self, CombineArgs, CombineDesc};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows, SharedRows};
use moe_kernels::experts::gemm_combine::{self, GemmCombineDesc, SumArgs};
use moe_kernels::experts::tiles::max_tiles;
use moe_kernels::experts::{Dispatched, SlotShape, Weight};
use moe_kernels::layer::{
    Choices, ExpertWeights, ExpertsArgs, LayerArgs, LayerDesc, LayerWeights, Mlp, RouteArgs, RouterWeights, SharedDesc,
    SharedWeights,
};
use moe_kernels::reference::dispatch::dispatch;
use moe_kernels::registry::{GemmSwapped, Kernel};
use moe_kernels::rules::WeightDesc;
use moe_kernels::{Dtype, In, Workspace};

use crate::dispatch::rule;
use crate::rows::Rows as Lists;
use crate::support::buffer::Guarded;
use crate::support::compare::Storage;
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

pub fn check(variant: GemmSwapped, rng: &mut fastrand::Rng) {
    crate::gemm::check(variant, rng);
    // Tokens, experts, k, N, K: one token and more than a block takes at once; one column tile, a ragged second one; depth in parts or not.
    let shapes =
        [[1, 4, 2, 72, 40], [19, 3, 3, 64, 1032], [33, 9, 8, 136, 24], [5, 2, 1, 8, 2048], [2, 40, 7, 200, 72]];
    match variant.dtype {
        Dtype::Bf16 => layers::<bf16>(variant, rng),
        _ => layers::<f16>(variant, rng),
    }
    for shape in shapes {
        for options in 0..4 {
            match variant.dtype {
                Dtype::Bf16 => case::<bf16>(variant, rng, shape, options),
                _ => case::<f16>(variant, rng, shape, options),
            }
        }
    }
}

/// The end of a layer, which may begin before the first product has ended: the bits of its parts, in launches of their own. The second product is as
/// deep as the layer's intermediate size: less than a stage, more than are on their way, in two parts.
fn layers<T: Storage>(variant: GemmSwapped, rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for (index, shape) in
        [[1, 4, 2, 72, 40], [8, 3, 2, 136, 1032], [5, 6, 3, 64, 520], [3, 2, 1, 8, 200]].into_iter().enumerate()
    {
        let [tokens, experts, top_k, hidden, intermediate] = shape;
        let name = format!("layer of T={tokens} E={experts} k={top_k} H={hidden} I={intermediate}");
        let mlp = Mlp::swiglu(variant.dtype).down(WeightDesc::new(variant.dtype).layout(variant.layout));
        let is_shared = index % 2 == 1;
        let desc = LayerDesc::new(variant.dtype, hidden, intermediate, experts, top_k)
            .mlp(mlp)
            .shared(is_shared.then(|| SharedDesc::new(intermediate, mlp)));
        let plan = desc.plan(tokens, kernels.device()).unwrap();
        let launches: Vec<Kernel> = plan.kernels().map(|kernel| kernel.variant()).collect();
        assert!(launches.contains(&Kernel::GemmSwapped(variant)), "{name}: {launches:?}");

        let mut matrix = |name, experts: usize, rows: usize, depth: usize| {
            let values: Vec<T> = normals(rng, experts * rows * depth, (depth as f64).powf(-0.5));
            Guarded::input(&stream, name, &values)
        };
        let x = matrix("x", 1, tokens, hidden);
        let (gate_up, down) =
            (matrix("gate_up", experts, 2 * intermediate, hidden), matrix("down", experts, hidden, intermediate));
        let (shared_gate_up, shared_down) =
            (matrix("shared.gate_up", 1, 2 * intermediate, hidden), matrix("shared.down", 1, hidden, intermediate));
        let router = matrix("router", 1, experts, hidden);
        let ids: Vec<i32> = (0..tokens)
            .flat_map(|_| {
                let mut all: Vec<i32> = (0..experts as i32).collect();
                rng.shuffle(&mut all);
                all.into_iter().take(top_k).map(|id| if rng.u32(..8) == 0 { -1 } else { id }).collect::<Vec<_>>()
            })
            .collect();
        let ids = Guarded::input(&stream, "ids", &ids);
        let weights_of_ids = Guarded::input(&stream, "weights", &normals::<f32>(rng, tokens * top_k, 1.0));
        let (x, router, ids, weights_of_ids) = (x.view(), router.view(), ids.view(), weights_of_ids.view());
        let (gate_up, down, shared_gate_up, shared_down) =
            (gate_up.view(), down.view(), shared_gate_up.view(), shared_down.view());
        let mut of_experts = ExpertWeights::new(Weight::new(&gate_up), Weight::new(&down));
        if is_shared {
            of_experts = of_experts.shared(SharedWeights::new(Weight::new(&shared_gate_up), Weight::new(&shared_down)));
        }
        let choices = || Choices::new(&ids, &weights_of_ids);
        let mut workspace = Workspace::new(&stream, plan.workspace_bytes()).unwrap();

        let mut want = Guarded::<T>::output(&stream, "y", tokens * hidden);
        {
            let mut dispatched = Dispatched::new(&stream, &plan.route().rows()).unwrap();
            plan.route()
                .forward_choices(kernels, &stream, choices(), RouteArgs::new(), &mut dispatched, &mut workspace)
                .unwrap();
            let mut rows = Guarded::<T>::output(&stream, "y_slots", plan.experts().rows().slots * hidden);
            let mut addend = Guarded::<T>::output(&stream, "addend", tokens * hidden);
            let (mut rows, mut addend) = (rows.view_mut(), addend.view_mut());
            let mut args = ExpertsArgs::new(&x, &dispatched, &mut rows);
            args.shared = is_shared.then_some((&mut addend).into());
            plan.experts().forward(kernels, &stream, &of_experts, args, &mut workspace).unwrap();
            let mut y = want.view_mut();
            let mut args = CombineArgs::new(&rows, &dispatched, &mut y);
            args.addend = is_shared.then_some((&addend).into());
            plan.experts().combine(kernels, &stream, args).unwrap();
        }
        let bits = |buffer: &Guarded<T>| bytemuck::cast_slice::<T, u8>(&buffer.read(&stream)).to_vec();
        let weights = LayerWeights::new(RouterWeights::new(&router), of_experts);
        let mut y = Guarded::<T>::output(&stream, "y", tokens * hidden);
        // The second time in the workspace as the first has left it.
        for _ in 0..2 {
            {
                let mut to = y.view_mut();
                let args = LayerArgs::new(&x, &mut to).choices(choices());
                plan.forward(kernels, &stream, &weights, args, &mut workspace).unwrap();
            }
            assert!(bits(&y) == bits(&want), "{name}: other sums than those of its parts");
            y.reset(&stream);
        }
    }
}

/// Bits of `options`: residual, bias and factors; the rows of a shared expert as addend.
fn case<T: Storage>(
    variant: GemmSwapped,
    rng: &mut fastrand::Rng,
    [tokens, experts, top_k, n, k]: [usize; 5],
    options: u32,
) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let name = format!("T={tokens} E={experts} k={top_k} N={n} K={k} options={options:02b}");
    let mut ids: Vec<i32> = (0..tokens)
        .flat_map(|_| {
            let mut all: Vec<i32> = (0..experts as i32).collect();
            rng.shuffle(&mut all);
            (0..top_k).map(|j| all.get(j).copied().unwrap_or(-1)).collect::<Vec<_>>()
        })
        .collect();
    // Skipped choices, and now and then a token without any.
    ids.iter_mut().filter(|_| rng.u32(..6) == 0).for_each(|id| *id = -1);
    if rng.bool() {
        ids[..top_k].fill(-1);
    }
    let plan = dispatch(&ids, &rule(experts, top_k, 16)).unwrap();
    let slots = tokens * top_k;
    let shape = SlotShape::new(tokens, experts, Some(top_k), slots, 16, max_tiles(slots, experts, 16));
    let (around, shares) = (options & 1 != 0, options & 2 != 0);
    let product = GemmDesc::new(variant.dtype, Rows::Grouped(shape), n, k)
        .weight(WeightDesc::new(variant.dtype).layout(variant.layout))
        .shared_rows(if shares { tokens } else { 0 })
        .split(true);
    let mut factor = || if around { normal(rng) as f32 } else { 1.0 };
    let [scale, addend_scale] = [factor(), factor()];
    let desc = GemmCombineDesc::new(product).scale(scale).addend_scale(addend_scale);
    let selection = gemm_combine::select(&desc, kernels.device()).unwrap();
    assert_eq!(selection.kernel.variant(), Kernel::GemmSwapped(variant), "{name}");

    let input = |name, values: Vec<T>| Guarded::input(&stream, name, &values);
    let a = input("a", normals(rng, slots * k, 1.0));
    let weight = input("weight", normals(rng, experts * n * k, (k as f64).powf(-0.5)));
    let shared_a = input("shared.a", normals(rng, tokens * k, 1.0));
    let shared_weight = input("shared.weight", normals(rng, n * k, (k as f64).powf(-0.5)));
    let out_scale = Guarded::input(&stream, "out_scale", &normals::<f32>(rng, slots, 1.0));
    let residual = around.then(|| input("residual", normals(rng, tokens * n, 1.0)));
    let bias = around.then(|| input("bias", normals(rng, n, 1.0)));
    let gate =
        (shares && rng.bool()).then(|| Guarded::input(&stream, "addend_gate", &normals::<f32>(rng, tokens, 2.0)));
    let dispatched = Lists::of(&plan).dispatched(&stream, &shape);
    let output = |name, rows: usize| Guarded::<T>::output(&stream, name, rows * n);

    let mut workspace =
        Workspace::new(&stream, gemm_combine::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
    let mut launch = |sum: Option<(&mut Guarded<T>, bool)>| {
        let (mut rows, mut addend) = (output("out", slots), output("shared.out", tokens));
        {
            let (a, weight, scale) = (a.view(), weight.view(), out_scale.view());
            let (shared_a, shared_weight) = (shared_a.view(), shared_weight.view());
            let (mut out, mut addend_out) = (rows.view_mut(), addend.view_mut());
            let mut sum = sum.map(|(y, accumulate)| (y.view_mut(), accumulate));
            // Twice, where that gives the same: the second launch may begin before the first has ended, and counts with the same counters.
            let times = if matches!(sum, Some((_, false))) { 2 } else { 1 };
            for _ in 0..times {
                let mut args =
                    GemmArgs::new(&a, Weight::new(&weight), &mut out).dispatched(&dispatched).workspace(&mut workspace);
                args.out_scale = Some((&scale).into());
                if shares {
                    args = args.shared(SharedRows::new(&shared_a, Weight::new(&shared_weight), &mut addend_out));
                }
                let Some((y, accumulate)) = &mut sum else {
                    gemm::forward(kernels, &stream, &product, args).unwrap();
                    continue;
                };
                let mut args_of_sum = SumArgs::new(y);
                let [residual, bias] = [&residual, &bias].map(|buffer| buffer.as_ref().map(Guarded::view));
                let gate = gate.as_ref().map(Guarded::view);
                args_of_sum.bias = bias.as_ref().map(In::from);
                args_of_sum.addend_gate = gate.as_ref().map(In::from);
                if *accumulate {
                    args_of_sum = args_of_sum.accumulate();
                } else {
                    args_of_sum.residual = residual.as_ref().map(In::from);
                }
                gemm_combine::forward(kernels, &stream, &desc, args, args_of_sum).unwrap();
            }
        }
        (rows, addend)
    };

    let (rows, addend) = launch(None);
    let mut want = output("y", tokens);
    {
        let (rows, addend, mut y) = (rows.view(), addend.view(), want.view_mut());
        let desc = CombineDesc::new(variant.dtype, shape, n).scale(scale).addend_scale(addend_scale);
        let [residual, bias] = [&residual, &bias].map(|buffer| buffer.as_ref().map(Guarded::view));
        let gate = gate.as_ref().map(Guarded::view);
        let mut args = CombineArgs::new(&rows, &dispatched, &mut y);
        args.residual = residual.as_ref().map(In::from);
        args.bias = bias.as_ref().map(In::from);
        args.addend = shares.then_some((&addend).into());
        args.addend_gate = gate.as_ref().map(In::from);
        combine::forward(kernels, &stream, &desc, args).unwrap();
    }
    let bits = |buffer: &Guarded<T>| bytemuck::cast_slice::<T, u8>(&buffer.read(&stream)).to_vec();
    let mut y = output("y", tokens);
    let (got, got_addend) = launch(Some((&mut y, false)));
    assert!(bits(&got) == bits(&rows), "{name}: other rows than a product's");
    assert!(bits(&got_addend) == bits(&addend), "{name}: other rows of the shared expert than a product's");
    assert!(bits(&y) == bits(&want), "{name}: other sums than a combine's");
    time(&stream, &name, || drop(launch(Some((&mut y, false)))));
    // Onto the residual, in the workspace as it was left.
    let zeros = vec![T::from_f64(0.0); tokens * n];
    let values = residual.as_ref().map_or(zeros, |residual| residual.read(&stream));
    let mut y = Guarded::filled_output(&stream, "y", &values, 0);
    launch(Some((&mut y, true)));
    assert!(bits(&y) == bits(&want), "{name}: onto the residual other sums");
    [Some(&a), Some(&weight), residual.as_ref(), bias.as_ref()]
        .into_iter()
        .flatten()
        .for_each(|input| input.assert_unchanged(&stream));
}
