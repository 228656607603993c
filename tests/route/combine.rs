use bytemuck::Pod;
use half::{bf16, f16};
use moe_kernels::Element;
use moe_kernels::reference::{self, Real};
use moe_kernels::registry::{Combine, Kernel};

use crate::device::{Arg, Input, Output, Scratch, launch, optional};
use crate::random::Random;

#[derive(Clone, Copy)]
struct Extras {
    weights: bool,
    residual: bool,
    addend: bool,
}

const BARE: Extras = Extras { weights: false, residual: false, addend: false };
const WEIGHTED: Extras = Extras { weights: true, ..BARE };
const FULL: Extras = Extras { weights: true, residual: true, addend: true };

/// The kernel's own arithmetic: f32, in the order residual, addend, j ascending, one rounding at the end.
#[allow(clippy::too_many_arguments)]
fn in_order<T: Element>(
    y_slots: &[T],
    token_slot: &[i32],
    weights: Option<&[f32]>,
    residual: Option<&[T]>,
    addend: Option<&[T]>,
    k: usize,
    hidden: usize,
) -> Vec<T> {
    let at = |rows: Option<&[T]>, i: usize| rows.map(|rows| rows[i].to_f32());
    (0..token_slot.len() / k * hidden)
        .map(|i| {
            let (t, h) = (i / hidden, i % hidden);
            let mut sum = at(residual, i).unwrap_or(0.0);
            if let Some(addend) = at(addend, i) {
                sum += addend;
            }
            for j in t * k..(t + 1) * k {
                if let Ok(slot) = usize::try_from(token_slot[j]) {
                    let weight = weights.map_or(1.0, |weights| weights[j]);
                    sum = weight.mul_add(y_slots[slot * hidden + h].to_f32(), sum);
                }
            }
            T::from_f32(sum)
        })
        .collect()
}

fn case<T: Element + Real + Pod>([tokens, k, hidden]: [usize; 3], extras: Extras) {
    let combine = Combine { dtype: T::DTYPE, any: false };
    let what = format!("{} T={tokens} k={k} H={hidden}", Kernel::Combine(combine).name());
    let mut random = Random::new((tokens * k + hidden) as u64);
    let slots = tokens * k;
    let mut y_slots: Vec<T> = random.normals(slots * hidden);
    // The last row belongs to nobody: were it read for a dropped slot, NaN would show.
    y_slots.extend(std::iter::repeat_n(T::from_f32(f32::NAN), hidden));
    let token_slot: Vec<i32> =
        (0..slots).map(|_| if random.below(5) == 0 { -1 } else { random.below(slots) as i32 }).collect();
    let weights: Option<Vec<f32>> = extras.weights.then(|| random.normals(slots));
    let residual: Option<Vec<T>> = extras.residual.then(|| random.normals(tokens * hidden));
    let addend: Option<Vec<T>> = extras.addend.then(|| random.normals(tokens * hidden));
    let want = in_order(&y_slots, &token_slot, weights.as_deref(), residual.as_deref(), addend.as_deref(), k, hidden);
    // That order of sums is the formula.
    let wide: Option<Vec<f64>> = weights.as_ref().map(|weights| weights.iter().map(|&w| w.into()).collect());
    let formula = reference::combine::combine(
        &y_slots,
        &token_slot,
        wide.as_deref(),
        residual.as_deref(),
        addend.as_deref(),
        k,
        hidden,
    )
    .unwrap();
    for (&want, &formula) in want.iter().zip(&formula) {
        let bound = (crate::random::roundoff(T::DTYPE) + 1e-6) * (formula.abs() + 4.0);
        assert!((f64::from(want.to_f32()) - formula).abs() <= bound, "{what}: {formula}");
    }

    let y = Output::new::<T>(tokens * hidden);
    let input = |values: Option<Vec<T>>| values.map(|values| Input::new(&values));
    let (residual, addend) = (input(residual), input(addend));
    let weights = weights.map(|weights| Input::new(&weights));
    launch(
        Kernel::Combine(combine),
        combine.grid(tokens as u32, hidden as u32),
        1,
        &[
            Arg::In(&Input::new(&y_slots)),
            Arg::In(&Input::new(&token_slot)),
            optional(&weights),
            optional(&residual),
            optional(&addend),
            Arg::Null,
            Arg::F32(1.0),
            Arg::F32(1.0),
            Arg::Null,
            Arg::Out(&y),
            Arg::Null,
            Arg::Null,
            Arg::Null,
            Arg::U32(4),
            Arg::F32(1.0),
            Arg::U32(0),
            Arg::U32(0),
            Arg::U32(tokens as u32),
            Arg::U32(k as u32),
            Arg::U32(hidden as u32),
        ],
    );
    let got = y.read::<T>();
    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!(got.to_f32() == want.to_f32(), "{what}: element {at} is {}, should be {}", got.to_f32(), want.to_f32());
    }
}

fn shapes<T: Element + Real + Pod>() {
    case::<T>([5, 2, 64], WEIGHTED);
    case::<T>([7, 5, 8], FULL);
    case::<T>([3, 4, 120], Extras { residual: true, ..BARE });
    case::<T>([2, 9, 2120], Extras { addend: true, ..WEIGHTED });
    case::<T>([300, 1, 16], FULL);
    case::<T>([1, 32, 4096], WEIGHTED);
    case::<T>([33, 8, 2880], BARE);
}

#[test]
fn bf16_in_order() {
    shapes::<bf16>();
}

#[test]
fn f16_in_order() {
    shapes::<f16>();
}

#[test]
fn f32_in_order() {
    shapes::<f32>();
}

#[test]
fn rows_past_two_to_the_31_elements() {
    const HIDDEN: usize = 4096;
    const SLOTS: u64 = 1 << 20;
    let rows = [(3, 1.0_f32), (SLOTS / 2 + 5, 2.0), (SLOTS - 1, 4.0)];
    let y_slots = Scratch::new(SLOTS * HIDDEN as u64 * 2);
    for (row, value) in rows {
        y_slots.write(row * HIDDEN as u64 * 2, &vec![bf16::from_f32(value); HIDDEN]);
    }
    let combine = Combine { dtype: moe_kernels::Dtype::Bf16, any: false };
    let y = Output::new::<bf16>(HIDDEN);
    launch(
        Kernel::Combine(combine),
        combine.grid(1, HIDDEN as u32),
        1,
        &[
            Arg::Scratch(&y_slots),
            Arg::In(&Input::new(&rows.map(|(row, _)| row as i32))),
            Arg::Null,
            Arg::Null,
            Arg::Null,
            Arg::Null,
            Arg::F32(1.0),
            Arg::F32(1.0),
            Arg::Null,
            Arg::Out(&y),
            Arg::Null,
            Arg::Null,
            Arg::Null,
            Arg::U32(4),
            Arg::F32(1.0),
            Arg::U32(0),
            Arg::U32(0),
            Arg::U32(1),
            Arg::U32(3),
            Arg::U32(HIDDEN as u32),
        ],
    );
    assert!(y.read::<bf16>().iter().all(|value| value.to_f32() == 7.0));
}
