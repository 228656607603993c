//! Checks of `choice_backward_*` and `sigmoid_gate`.

use half::{bf16, f16};
use moe_kernels::capacity::dispatch::{self, DispatchArgs, DispatchDesc};
use moe_kernels::experts::Dispatched;
use moe_kernels::experts::choice_backward::{self, Admitted, ChoiceBackwardArgs, ChoiceBackwardDesc, Identities};
use moe_kernels::experts::sigmoid_gate::{self, SigmoidGateArgs};
use moe_kernels::reference::{admission, choice_backward as reference};
use moe_kernels::routers::gating_backward::{self, GatingBackwardArgs, GatingBackwardDesc, IdentityRows};
use moe_kernels::rules::{AdmissionRule, Capacity, ChoiceBy, Gating, IDENTITY, NONE, Renormalise, Score, capacity};
use moe_kernels::{Dtype, Workspace};

use crate::ids::{self, Stored};
use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Storage, UNIT, assert_bounded, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

pub fn check(dtype: Dtype, rng: &mut fastrand::Rng) {
    match dtype {
        Dtype::Bf16 => typed::<bf16>(rng),
        Dtype::F16 => typed::<f16>(rng),
        Dtype::F32 => typed::<f32>(rng),
        other => unreachable!("no kernel has {other}"),
    }
}

/// Which choices are identities.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Nothing,
    Range,
    Map(usize),
}

fn typed<T: Storage>(rng: &mut fastrand::Rng) {
    for (tokens, hidden, experts, top_k) in
        [(1, 1, 1, 1), (3, 64, 9, 4), (2, 263, 40, 33), (400, 33, 6, 2), (5, 512, 64, 64), (7, 31, 80, 63)]
    {
        for kind in KINDS {
            case::<T>(rng, [tokens, hidden, experts, top_k], kind, false);
        }
    }
    for (tokens, hidden, experts, candidates) in [(1, 1, 1, 1), (67, 33, 7, 3), (130, 64, 9, 31), (5, 263, 40, 32)] {
        for kind in KINDS {
            case::<T>(rng, [tokens, hidden, experts, candidates], kind, true);
        }
    }
    case::<T>(rng, [0, 8, 4, 2], Kind::Range, false);
    case::<T>(rng, [0, 8, 4, 2], Kind::Range, true);
}

const KINDS: [Kind; 4] = [Kind::Nothing, Kind::Range, Kind::Map(1), Kind::Map(3)];

/// Choices, what an admission made of them, and the rows that this became; the last two experts are identities, without rows.
struct Problem<T> {
    name: String,
    kind: Kind,
    rule: Option<AdmissionRule>,
    /// `[T, K]`.
    ids: Vec<i32>,
    weights: Vec<f32>,
    /// `[T, n]`: what tokens got.
    places: Vec<i32>,
    dispatched: Dispatched,
    token_slot: Vec<i32>,
    d_slots: Vec<f32>,
    map: Vec<i32>,
    scale: f32,
    experts: usize,
    hidden: usize,
    x: Vec<T>,
    dy: Vec<T>,
}

impl<T: Storage> Problem<T> {
    fn draw(
        rng: &mut fastrand::Rng,
        [tokens, hidden, experts, top_k]: [usize; 4],
        kind: Kind,
        admits: bool,
    ) -> Problem<T> {
        let (kernels, stream) = (device::kernels(), device::stream());
        // Ids as the router knows them, some of them no expert's.
        let ids: Vec<i32> = (0..tokens * top_k)
            .map(|_| match rng.u32(..12) {
                0 => -1,
                1 => experts as i32 + 2,
                2 => i32::MIN,
                _ => rng.i32(0..experts as i32 + 2),
            })
            .collect();
        let mut weights: Vec<f32> = ids.iter().map(|_| rng.f32()).collect();
        // A token without weight: nothing to divide by.
        weights.iter_mut().take(top_k).for_each(|weight| *weight = 0.0);
        let rule = admits.then(|| {
            let got = 1 + rng.usize(..top_k);
            let slots = capacity(tokens.max(1), experts + 2, got, [0.5, 1.0][rng.usize(..2)]);
            let renormalise = [None, Some(Renormalise::Plus(0.0)), Some(Renormalise::AtLeast(0.7))][rng.usize(..3)];
            AdmissionRule::new(experts + 2, got, slots, tokens.max(1)).candidates(top_k).renormalise(renormalise)
        });
        let places =
            rule.map_or_else(|| ids.clone(), |rule| admission::admit(&ids, &weights, None, &rule).unwrap().ids);
        let got = rule.map_or(top_k, |rule| rule.top_k);
        // With rows for the others, of which few get one.
        let local: Vec<i32> =
            places.iter().map(|&id| if (0..experts as i32).contains(&id) { id } else { -1 }).collect();
        let limit = Capacity::new(1.max(tokens / 8), tokens.max(1));
        let shape = DispatchDesc::new(tokens, experts, got, 16).capacity(Some(limit));
        let mut dispatched = Dispatched::new(&stream, &shape.shape()).unwrap();
        let bytes = dispatch::workspace_bytes(&shape, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        let on_device = stream.clone_htod(if local.is_empty() { &[0][..] } else { &local[..] }).unwrap();
        dispatch::forward(kernels, &stream, &shape, DispatchArgs::new(&on_device, &mut dispatched, &mut workspace))
            .unwrap();
        let mut token_slot = stream.clone_dtoh(dispatched.token_slot()).unwrap();
        token_slot.truncate(places.len());
        let columns = if let Kind::Map(columns) = kind { columns } else { 1 };
        let entry = |at: usize| match (at % columns, at / columns < experts) {
            (0, true) => [NONE, 0, at as i32][at % 3],
            (0, false) => IDENTITY,
            _ => [NONE, IDENTITY][at % 2],
        };
        let map = (0..(experts + 2) * columns).map(entry).collect();
        let d_slots = (0..dispatched.shape().slots).map(|_| normal(rng) as f32).collect();
        let (x, dy) = (normals::<T>(rng, tokens * hidden, 1.0), normals::<T>(rng, tokens * hidden, 1.0));
        let scale = [1.0, -0.375][rng.usize(..2)];
        Problem {
            name: format!("{} T={tokens} H={hidden} E={experts} k={top_k} {kind:?} {rule:?} {scale}", T::DTYPE),
            kind,
            rule,
            ids,
            weights,
            places,
            dispatched,
            token_slot,
            d_slots,
            map,
            scale,
            experts,
            hidden,
            x,
            dy,
        }
    }

    fn identities(&self) -> std::ops::Range<u32> {
        self.experts as u32..self.experts as u32 + 2
    }

    fn identity(&self, place: usize) -> bool {
        self.kind != Kind::Nothing && self.identities().contains(&(self.places[place] as u32))
    }

    /// Gradients of the weights of what tokens got, and how far they may be off.
    fn of_places(&self) -> (Vec<f64>, Vec<f64>) {
        let (x, dy, hidden) = (to_f64(&self.x), to_f64(&self.dy), self.hidden);
        let got = self.dispatched.shape().top_k.unwrap();
        let scale = f64::from(self.scale);
        let scaled: Vec<f64> = dy.iter().map(|dy| scale * dy).collect();
        let of = (&x[..], &scaled[..]);
        let want =
            reference::choice_backward(&to_f64(&self.d_slots), &self.token_slot, |at| self.identity(at), of, got);
        let want = want.unwrap();
        let bound = |at: usize| {
            if self.token_slot[at] >= 0 || !self.identity(at) {
                return 0.0;
            }
            let row = at / got * hidden..at / got * hidden + hidden;
            let terms: Vec<f64> = x[row.clone()].iter().zip(&scaled[row]).map(|(x, d)| x * d).collect();
            let magnitude = terms.iter().map(|term| term.abs()).sum();
            let root = terms.iter().map(|term| term * term).sum::<f64>().sqrt();
            Arithmetic::Fma.sum_bound(hidden, want[at], magnitude, root) + UNIT * want[at].abs()
        };
        let bounds = (0..want.len()).map(bound).collect();
        (want, bounds)
    }

    /// The same of the choices.
    fn of_choices(&self) -> (Vec<f64>, Vec<f64>) {
        let (places, errors) = self.of_places();
        let Some(rule) = &self.rule else { return (places, errors) };
        let want = admission::admit_backward(&self.ids, &self.weights, None, rule, &places).unwrap();
        let sums = admission::admit(&self.ids, &self.weights, None, &rule.renormalise(None)).unwrap().weights;
        // What nobody got has a gradient of 0, exactly.
        let ones = vec![1.0; places.len()];
        let got = admission::admit_backward(&self.ids, &self.weights, None, &rule.renormalise(None), &ones).unwrap();
        // Two sums of at most 32 terms, two quotients and a difference; shares of what the places are off by add up to as much.
        let bound = |at: usize| {
            let token = at / rule.candidates;
            let of = token * rule.top_k..(token + 1) * rule.top_k;
            let most = |values: &[f64]| values[of.clone()].iter().fold(0.0, |most: f64, d| most.max(d.abs()));
            let sum: f64 = sums[of.clone()].iter().map(|&w| f64::from(w)).sum();
            let divisor = match rule.renormalise {
                None => return most(&errors),
                Some(Renormalise::AtLeast(least)) => sum.max(least.into()),
                Some(_) => sum,
            };
            let off = 24.0 * UNIT * most(&places) + 2.0 * most(&errors);
            if divisor == 0.0 || got[at] == 0.0 { 0.0 } else { off / divisor }
        };
        let bounds = (0..want.len()).map(bound).collect();
        (want, bounds)
    }
}

fn case<T: Storage>(rng: &mut fastrand::Rng, sizes: [usize; 4], kind: Kind, admits: bool) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let mut problem = Problem::<T>::draw(rng, sizes, kind, admits);
    let (want, bounds) = problem.of_choices();
    // Nothing of a token without an identity is read, nor weights that are as they were given.
    let (tokens, got) = (sizes[0], problem.dispatched.shape().top_k.unwrap());
    for t in 0..tokens {
        if !(t * got..(t + 1) * got).any(|at| problem.token_slot[at] < 0 && problem.identity(at)) {
            problem.x[t * problem.hidden..][..problem.hidden].fill(T::from_f32(f32::NAN));
            problem.dy[t * problem.hidden..][..problem.hidden].fill(T::from_f32(f32::NAN));
        }
    }
    let divides = problem.rule.is_some_and(|rule| rule.renormalise.is_some());
    if !divides {
        problem.weights.fill(f32::NAN);
    }
    let Problem { name, rule, dispatched, scale, hidden, .. } = &problem;
    let desc = ChoiceBackwardDesc::new(T::DTYPE, *dispatched.shape(), *hidden).identity_scale(*scale);
    let input = |what, values: &[f32]| Guarded::input(&stream, what, values);
    let ints = |what, values: &[i32]| Guarded::input(&stream, what, values);
    let (d_slots, weights) = (input("d_slots", &problem.d_slots), input("weights", &problem.weights));
    let [ids, places, map] =
        [("ids", &problem.ids), ("admitted", &problem.places), ("map", &problem.map)].map(|(what, of)| ints(what, of));
    let bytes = [4, 8][rng.usize(..2)];
    let format = ids::format(rng, bytes);
    // Of admitted ids those alone are read.
    let of_identities = Stored::new(&stream, rng, format, &problem.places, problem.experts + 2);
    let (x, dy) = (Guarded::input(&stream, "x", &problem.x), Guarded::input(&stream, "dy", &problem.dy));
    let mut d_weights = Guarded::<f32>::output(&stream, "d_weights", want.len());
    let mut launch = || {
        d_weights.reset(&stream);
        {
            let (d_slots, weights, ids, places) = (d_slots.view(), weights.view(), ids.view(), places.view());
            let (x, dy, map, mut to) = (x.view(), dy.view(), map.view(), d_weights.view_mut());
            let mut args = ChoiceBackwardArgs::new(&d_slots, dispatched, &mut to);
            if let Some(rule) = rule {
                let mut admitted = Admitted::new(&places, *rule);
                admitted.weights = divides.then_some((&weights).into());
                args = args.admitted(&ids, admitted);
            }
            of_identities.with(|ids| {
                let mut args = args;
                args.identities = match kind {
                    Kind::Nothing => None,
                    Kind::Range => Some(Identities::new(ids, problem.identities(), &x, &dy)),
                    Kind::Map(columns) => Some(Identities::of_map(ids, &map, columns, &x, &dy)),
                };
                choice_backward::forward::<T>(kernels, &stream, &desc, args).unwrap();
            });
        }
        d_weights.read(&stream)
    };
    let got = launch();
    assert_eq!(bits(&got), bits(&launch()), "{name}: another run gave other bits");
    assert_bounded(name, &to_f64(&got), &want, &bounds, Dtype::F32);
    d_slots.assert_unchanged(&stream);
    time(&stream, name, || drop(launch()));
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A gating's way back with the choices' in it: the same bits as both, one behind the other.
pub fn within_gating(rng: &mut fastrand::Rng) {
    for (tokens, hidden, experts, top_k) in [(1, 1, 1, 1), (67, 33, 7, 3), (130, 16, 9, 31), (5, 263, 40, 32)] {
        for kind in KINDS {
            for admits in [false, true] {
                let sizes = [tokens, hidden, experts, top_k];
                gated::<f32>(rng, sizes, kind, admits);
                gated::<bf16>(rng, sizes, kind, admits);
                gated::<f16>(rng, sizes, kind, admits);
            }
        }
    }
    gated::<bf16>(rng, [9, 8, 66, 64], Kind::Range, false);
}

fn gated<T: Storage>(rng: &mut fastrand::Rng, sizes: [usize; 4], kind: Kind, admits: bool) {
    if kind == Kind::Nothing && !admits {
        return;
    }
    let (kernels, stream) = (device::kernels(), device::stream());
    let problem = Problem::<T>::draw(rng, sizes, kind, admits);
    let Problem { name, rule, dispatched, scale, hidden, .. } = &problem;
    let (tokens, experts, top_k) = (sizes[0], sizes[2] + 2, sizes[3]);
    let up = |values: &[f32]| stream.clone_htod(values).unwrap();
    let ints = |values: &[i32]| stream.clone_htod(values).unwrap();
    let logits: Vec<f32> = (0..tokens * experts).map(|_| normal(rng) as f32).collect();
    let (logits, d_slots, weights) = (up(&logits), up(&problem.d_slots), up(&problem.weights));
    let (ids, places, map) = (ints(&problem.ids), ints(&problem.places), ints(&problem.map));
    let (x, dy) = (stream.clone_htod(&problem.x).unwrap(), stream.clone_htod(&problem.dy).unwrap());
    let admitted = rule.map(|rule| {
        let mut admitted = Admitted::new(&places, rule);
        admitted.weights = rule.renormalise.is_some().then_some((&weights).into());
        admitted
    });

    let desc = ChoiceBackwardDesc::new(T::DTYPE, *dispatched.shape(), *hidden).identity_scale(*scale);
    let mut by_choice = stream.alloc_zeros::<f32>(tokens * top_k).unwrap();
    let mut args = ChoiceBackwardArgs::<T>::new(&d_slots, dispatched, &mut by_choice);
    args.identities = match kind {
        Kind::Nothing => None,
        Kind::Range => Some(Identities::new(&places, problem.identities(), &x, &dy)),
        Kind::Map(columns) => Some(Identities::of_map(&places, &map, columns, &x, &dy)),
    };
    (args.candidates, args.admitted) = (admitted.map(|_| (&ids).into()), admitted);
    choice_backward::forward::<T>(kernels, &stream, &desc, args).unwrap();

    let gating = GatingBackwardDesc::new(tokens, experts, top_k, Gating::new(Score::Softmax).choice(ChoiceBy::Given));
    let mut out = [(); 2].map(|()| {
        let what = [("d_logits", tokens * experts), ("d_choices", tokens * top_k)];
        what.map(|(what, len)| Guarded::<f32>::output(&stream, what, len))
    });
    for (fused, out) in out.iter_mut().enumerate() {
        let [d_logits, d_choices] = out;
        let (mut to, mut of_choices) = (d_logits.view_mut(), d_choices.view_mut());
        let d_weights = if fused == 1 { &d_slots } else { &by_choice };
        let mut args = GatingBackwardArgs::new(&logits, &ids, d_weights, &mut to).d_choices(&mut of_choices);
        if fused == 1 {
            (args.dispatched, args.admitted) = (Some(dispatched), admitted);
            args.identities = match kind {
                Kind::Nothing => None,
                Kind::Range => Some(IdentityRows::new(problem.identities(), *hidden, &x, &dy).scale(*scale)),
                Kind::Map(columns) => Some(IdentityRows::of_map(&map, columns, *hidden, &x, &dy).scale(*scale)),
            };
        }
        gating_backward::forward(kernels, &stream, &gating, args).unwrap();
    }
    let [one, fused] = out.map(|out| out.map(|buffer| bits(&buffer.read(&stream))));
    assert_eq!(one, fused, "{name}");
    // Gradients of ids that are no expert's are not used, and become 0.
    let known = |id: i32| (0..experts as i32).contains(&id);
    let by_choice = stream.clone_dtoh(&by_choice).unwrap();
    let want: Vec<f32> = by_choice.iter().zip(&problem.ids).map(|(&d, &id)| if known(id) { d } else { 0.0 }).collect();
    assert_eq!(fused[1], bits(&want), "{name}");
}

pub fn check_gate(rng: &mut fastrand::Rng) {
    let (kernels, stream) = (device::kernels(), device::stream());
    for tokens in [0, 1, 255, 256, 700] {
        let mut logits: Vec<f32> = (0..tokens).map(|_| 6.0 * normal(rng) as f32).collect();
        for (at, odd) in [f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 90.0, -90.0].into_iter().enumerate() {
            if at + 1 < tokens {
                logits[at] = odd;
            }
        }
        let d: Vec<f32> = (0..tokens).map(|_| normal(rng) as f32).collect();
        let (logits_in, d_in) = (Guarded::input(&stream, "logits", &logits), Guarded::input(&stream, "d", &d));
        for back in [false, true] {
            let mut out = Guarded::<f32>::output(&stream, "out", tokens);
            {
                let (logits, d, mut to) = (logits_in.view(), d_in.view(), out.view_mut());
                let args = SigmoidGateArgs::new(&logits, &mut to);
                let args = if back { args.d(&d) } else { args };
                sigmoid_gate::forward(kernels, &stream, tokens, args).unwrap();
            }
            let want: Vec<f64> = logits
                .iter()
                .zip(&d)
                .map(|(&logit, &d)| reference::sigmoid_gate(logit.into(), back.then_some(d.into())))
                .collect();
            // Each sigmoid to a few units in the last place, and a denormal one to the least.
            let bounds: Vec<f64> = want.iter().map(|want| 16.0 * UNIT * want.abs() + 1e-38).collect();
            assert_bounded(&format!("T={tokens} back={back}"), &to_f64(&out.read(&stream)), &want, &bounds, Dtype::F32);
        }
        logits_in.assert_unchanged(&stream);
    }
}
