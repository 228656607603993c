//! The plain parts of `examples/byte_model` against finite differences, in f64.

use plain::Outcome;
use plain::cross_entropy::{Target, cross_entropy};
use plain::dense::{Dense, Unit};
use plain::model::{FeedForward, Model, Sizes};
use plain::products::{product, transposed};

#[path = "../../examples/byte_model/plain/mod.rs"]
#[allow(dead_code, clippy::useless_conversion)]
mod plain;

/// The programs compute in f32.
pub type Real = f64;

const SIZES: Sizes = Sizes { hidden: 6, heads: 2, context: 5 };
const SEQUENCES: usize = 3;

fn model(unit: Unit, rng: &mut fastrand::Rng) -> Model {
    let dense = |index: usize, rng: &mut fastrand::Rng| -> Box<dyn FeedForward> {
        Box::new(Dense::new(&format!("blocks.{index}.feed_forward"), [SIZES.hidden, 7], unit, rng))
    };
    let feed_forwards = (0..2).map(|index| dense(index, rng)).collect();
    Model::new(&SIZES, feed_forwards, rng)
}

/// Of what the target is: `-sum q ln p` in the mean.
fn loss(model: &mut Model, bytes: &[u8], target: &Target<'_>) -> f64 {
    let logits = model.forward(bytes, SIZES.context).unwrap();
    let (next, teacher, share) = match target {
        Target::Bytes(next) => (next, None, 0.0),
        Target::Mixed { bytes, teacher, share } => (bytes, Some(teacher), *share),
    };
    let rows = |logits: &[f64]| -> Vec<Vec<f64>> {
        let log_shares = |row: &[f64]| {
            let sum = row.iter().map(|logit| logit.exp()).sum::<f64>().ln();
            row.iter().map(|logit| logit - sum).collect()
        };
        logits.chunks_exact(256).map(log_shares).collect()
    };
    let hard = rows(&logits).iter().zip(next.iter()).map(|(row, &byte)| -row[usize::from(byte)]).sum::<f64>();
    let soft = teacher.map_or(0.0, |teacher| {
        let pairs = rows(&logits).into_iter().flatten().zip(rows(teacher).into_iter().flatten());
        -pairs.map(|(ours, theirs)| theirs.exp() * ours).sum::<f64>()
    });
    ((1.0 - share) * hard + share * soft) / next.len() as f64
}

/// Every parameter of the model, at a few places each and along a random direction.
fn check(unit: Unit, share: Option<f64>) -> Outcome<()> {
    let rng = &mut fastrand::Rng::with_seed(5);
    let mut model = model(unit, rng);
    // Norms' gains other than 1, and a bend of a ReLU far from every value.
    for parameter in model.parameters() {
        parameter.value.iter_mut().for_each(|value| *value += 0.3 * (rng.f64() - 0.5));
    }
    let tokens = SEQUENCES * SIZES.context;
    let bytes: Vec<u8> = (0..tokens).map(|_| rng.u8(..4)).collect();
    let next: Vec<u8> = (0..tokens).map(|_| rng.u8(..)).collect();
    let teacher: Vec<f64> = (0..tokens * 256).map(|_| 4.0 * rng.f64()).collect();
    let target = match share {
        None => Target::Bytes(&next),
        Some(share) => Target::Mixed { bytes: &next, teacher: &teacher, share },
    };
    let logits = model.forward(&bytes, SIZES.context)?;
    let found = cross_entropy(&logits, &target);
    assert!((found.bytes - loss(&mut model, &bytes, &Target::Bytes(&next))).abs() < 1e-12);
    model.backward(&found.gradient)?;

    for index in 0..model.parameters().len() {
        let parameter = &model.parameters()[index];
        let (name, length, gradient) = (parameter.name.clone(), parameter.value.len(), parameter.gradient.clone());
        let mut directions = vec![(0..length).map(|_| rng.f64() - 0.5).collect::<Vec<_>>()];
        for _ in 0..4 {
            let mut one = vec![0.0; length];
            // Rows of bytes that do not occur have no gradient, which is no test.
            let nonzero: Vec<usize> = (0..length).filter(|&at| gradient[at] != 0.0).collect();
            assert!(!nonzero.is_empty(), "{name} has no gradient at all");
            one[nonzero[rng.usize(..nonzero.len())]] = 1.0;
            directions.push(one);
        }
        for direction in directions {
            let mut at = |step: f64| {
                let move_by = |model: &mut Model, step: f64| {
                    let values = model.parameters().swap_remove(index).value.iter_mut();
                    values.zip(&direction).for_each(|(value, way)| *value += step * way);
                };
                move_by(&mut model, step);
                let loss = loss(&mut model, &bytes, &target);
                move_by(&mut model, -step);
                loss
            };
            let step = 1e-5;
            let want = (at(step) - at(-step)) / (2.0 * step);
            let got: f64 = gradient.iter().zip(&direction).map(|(gradient, way)| gradient * way).sum();
            let size = gradient.iter().map(|value| value * value).sum::<f64>().sqrt();
            assert!((got - want).abs() <= 1e-6 * size + 1e-9, "{unit:?} {name}: {got:e}, finite difference {want:e}");
        }
    }
    Ok(())
}

#[test]
fn gradients_of_the_model() {
    for unit in [Unit::Relu, Unit::GeluGated, Unit::SiluGated] {
        check(unit, None).unwrap();
    }
}

#[test]
fn gradients_with_a_teacher() {
    check(Unit::Relu, Some(0.25)).unwrap();
}

/// A later byte changes nothing before it.
#[test]
fn the_model_is_causal() {
    let mut model = model(Unit::Relu, &mut fastrand::Rng::with_seed(9));
    let mut bytes = *b"abcde";
    let before = model.forward(&bytes, 5).unwrap();
    bytes[3] = b'x';
    let after = model.forward(&bytes, 5).unwrap();
    assert_eq!(before[..3 * 256], after[..3 * 256]);
    assert_ne!(before[3 * 256..4 * 256], after[3 * 256..4 * 256]);
}

/// Sizes around the four terms that are taken at once, and large enough for several threads.
#[test]
fn products_are_sums() {
    let rng = &mut fastrand::Rng::with_seed(3);
    for [m, k, n] in [[1, 1, 1], [3, 4, 2], [2, 7, 5], [5, 9, 3], [0, 4, 4], [4, 0, 4], [130, 131, 129]] {
        let mut matrix = |rows: usize, columns: usize| (0..rows * columns).map(|_| rng.f64() - 0.5).collect::<Vec<_>>();
        let (a, b) = (matrix(m, k), matrix(k, n));
        let got = product(&a, &b, [m, k, n]);
        let back = transposed(&transposed(&a, [m, k]), [k, m]);
        assert_eq!(back, a);
        for (at, got) in got.iter().enumerate() {
            let want: f64 = (0..k).map(|l| a[at / n * k + l] * b[l * n + at % n]).sum();
            assert!((got - want).abs() < 1e-12, "[{m}, {k}, {n}] at {at}");
        }
    }
}
