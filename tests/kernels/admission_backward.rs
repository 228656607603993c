//! Checks of `admission_backward`: candidates passed over, dropped and admitted, by place and by row, divided by what is left or not.

use moe_kernels::capacity::admission::AdmissionDesc;
use moe_kernels::capacity::admission_backward::{self, AdmissionBackwardArgs};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::Dispatched;
use moe_kernels::reference::admission as reference;
use moe_kernels::rules::{AdmissionRule, Capacity, Order, Renormalise, SecondExpert, capacity};
use moe_kernels::{Dtype, Workspace};

use crate::support::buffer::Guarded;
use crate::support::compare::{UNIT, assert_bounded, to_f64};
use crate::support::device;
use crate::support::inputs::normal;
use crate::timing::time;

pub fn check(rng: &mut fastrand::Rng) {
    for (tokens, experts, candidates, group) in
        [(0, 4, 2, 8), (1, 1, 1, 1), (67, 7, 2, 67), (300, 64, 4, 100), (9, 40, 32, 9), (130, 33, 31, 50), (3, 4, 3, 3)]
    {
        for (order, passed_on) in [(Order::ByToken, false), (Order::ByToken, true), (Order::ByChoice, true)] {
            for renormalise in [None, Some(0.0), Some(0.7)] {
                let top_k = if passed_on { 1 + rng.usize(..candidates) } else { candidates };
                let second = if top_k == 2 && rng.bool() { SecondExpert::Above(0.3) } else { SecondExpert::Always };
                let kind = if rng.bool() { Renormalise::Plus } else { Renormalise::AtLeast };
                let slots = capacity(group.min(tokens).max(1), experts, top_k, [0.5, 1.0][rng.usize(..2)]);
                let rule = AdmissionRule::new(experts, top_k, slots, group)
                    .candidates(candidates)
                    .order(order)
                    .second(second)
                    .renormalise(renormalise.map(kind));
                case(rng, &AdmissionDesc::new(tokens, rule));
            }
        }
    }
}

/// Choices of each token, in some tokens one expert several times; one in ten is no expert.
fn choices(rng: &mut fastrand::Rng, desc: &AdmissionDesc) -> Vec<i32> {
    let (experts, candidates) = (desc.rule.experts, desc.rule.candidates);
    let mut order: Vec<i32> = (0..experts as i32).collect();
    let mut ids = Vec::new();
    for _ in 0..desc.tokens {
        rng.shuffle(&mut order);
        let few = if rng.u32(..3) == 0 { 1 + rng.usize(..2) } else { experts };
        ids.extend((0..candidates).map(|j| match rng.u32(..10) {
            0 => [-1, i32::MIN, i32::MAX, experts as i32][rng.usize(..4)],
            _ => order[j % few.min(experts)],
        }));
    }
    ids
}

fn case(rng: &mut fastrand::Rng, desc: &AdmissionDesc) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (rule, tokens) = (&desc.rule, desc.tokens);
    let name = format!("{desc:?}");
    let ids = choices(rng, desc);
    let mut weights: Vec<f32> = ids.iter().map(|_| rng.f32()).collect();
    // A token without weight: nothing to divide by.
    weights.iter_mut().take(rule.candidates).for_each(|weight| *weight = 0.0);
    let admitted = reference::admit(&ids, &weights, None, rule).unwrap();
    let places: Vec<f32> = admitted.ids.iter().map(|_| normal(rng) as f32).collect();
    // Fewer rows than were admitted: not every one is here.
    let shape = DispatchDesc::new(tokens, rule.experts, rule.top_k, 16)
        .capacity(Some(Capacity::new((tokens / 4).max(1), tokens.max(1))));
    let mut dispatched = Dispatched::new(&stream, &shape.shape()).unwrap();
    let mut workspace = Workspace::new(&stream, dispatch::workspace_bytes(&shape, kernels.device()).unwrap()).unwrap();
    let admitted_ids = Guarded::input(&stream, "admitted", &admitted.ids);
    dispatch::forward(
        kernels,
        &stream,
        &shape,
        DispatchArgs::new(&admitted_ids.view(), &mut dispatched, &mut workspace),
    )
    .unwrap();
    let rows = stream.clone_dtoh(dispatched.token_slot()).unwrap();
    let by_row: Vec<f32> = (0..dispatched.shape().slots).map(|_| normal(rng) as f32).collect();
    let of_rows: Vec<f32> =
        rows.iter().take(places.len()).map(|&row| usize::try_from(row).map_or(0.0, |row| by_row[row])).collect();

    let anew = rule.renormalise.is_some();
    // Weights that are as they were given are not read.
    let read = if anew { weights.clone() } else { vec![f32::NAN; weights.len()] };
    let ids_in = Guarded::input(&stream, "ids", &ids);
    let weights_in = Guarded::input(&stream, "weights", &read);
    for (gradients, rows) in [(&places, None), (&by_row, Some(&dispatched))] {
        let at_places = if rows.is_some() { &of_rows } else { &places };
        let want = reference::admit_backward(&ids, &weights, None, rule, &to_f64(at_places)).unwrap();
        let d_in = Guarded::input(&stream, "d_admitted", gradients);
        let mut d_weights = Guarded::<f32>::output(&stream, "d_weights", ids.len());
        let mut launch = || {
            d_weights.reset(&stream);
            {
                let (ids, weights, admitted, d) = (ids_in.view(), weights_in.view(), admitted_ids.view(), d_in.view());
                let mut to = d_weights.view_mut();
                let mut args = AdmissionBackwardArgs::new(&ids, &admitted, &d, &mut to);
                args.weights = anew.then_some((&weights).into());
                args.dispatched = rows;
                admission_backward::forward(kernels, &stream, desc, args).unwrap();
            }
            d_weights.read(&stream)
        };
        let got = launch();
        assert_eq!(
            got.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            launch().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        );
        // Two sums of at most 32 terms, two quotients and a difference.
        let bounds: Vec<f64> = (0..ids.len())
            .map(|at| {
                let t = at / rule.candidates;
                let of = t * rule.top_k..(t + 1) * rule.top_k;
                let largest = at_places[of.clone()].iter().fold(0.0, |most: f64, &d| most.max(f64::from(d).abs()));
                let sum: f64 = admitted_sum(&ids, &weights, rule, t);
                let divisor = match rule.renormalise {
                    None => return 0.0,
                    Some(Renormalise::AtLeast(least)) => sum.max(least.into()),
                    Some(Renormalise::Plus(plus)) => sum + f64::from(plus),
                    Some(_) => sum,
                };
                if divisor == 0.0 || want[at] == 0.0 { 0.0 } else { 24.0 * UNIT * largest / divisor }
            })
            .collect();
        assert_bounded(&name, &to_f64(&got), &want, &bounds, Dtype::F32);
        time(&stream, &name, || drop(launch()));
    }
    ids_in.assert_unchanged(&stream);
}

/// What token `t` got, before it is divided.
fn admitted_sum(ids: &[i32], weights: &[f32], rule: &AdmissionRule, t: usize) -> f64 {
    let plain = rule.renormalise(None);
    let admitted = reference::admit(ids, weights, None, &plain).unwrap();
    admitted.weights[t * rule.top_k..(t + 1) * rule.top_k].iter().map(|&w| f64::from(w)).sum()
}
