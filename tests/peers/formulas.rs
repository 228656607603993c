//! What peers' documentation states, in f64 and nothing else: no part of it comes from this library's own reference.

/// `exp(l_e) / sum exp(l)`.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = logits.iter().map(|l| (l - most).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

/// `1 / (1 + exp(-v))`.
pub fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

/// `v sigmoid(v)`.
pub fn silu(v: f64) -> f64 {
    v * sigmoid(v)
}

/// `max(v, 0)`.
pub fn relu(v: f64) -> f64 {
    v.max(0.0)
}

/// `v/2 (1 + erf(v / sqrt 2))`.
pub fn gelu(v: f64) -> f64 {
    0.5 * v * (1.0 + erf(v * std::f64::consts::FRAC_1_SQRT_2))
}

/// `2/sqrt(pi)` times the integral of `exp(-t^2)` from 0 to x: by its series near 0, by the continued fraction of its complement elsewhere.
pub fn erf(x: f64) -> f64 {
    if x < 0.0 {
        return -erf(-x);
    }
    if x < 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    // erfc(x) = exp(-x^2) / (sqrt(pi) (x + 1/2 / (x + 2/2 / (x + 3/2 / ..)))).
    let fraction = (1..=60).rev().fold(0.0, |rest, n| f64::from(n) / 2.0 / (x + rest));
    1.0 - (-x * x).exp() / ((x + fraction) * std::f64::consts::PI.sqrt())
}

/// Indices by falling value, equal ones by rising index.
pub fn order(values: &[f64]) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..values.len()).collect();
    indices.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    indices
}

/// `values` with those of all but the `kept` best groups replaced by `outside`; a group's score is the sum of its `terms` largest.
pub fn group_limited(values: &[f64], groups: usize, kept: usize, terms: usize, outside: f64) -> Vec<f64> {
    let size = values.len() / groups;
    let scores: Vec<f64> =
        values.chunks(size).map(|group| order(group).iter().take(terms).map(|&i| group[i]).sum()).collect();
    let best = &order(&scores)[..kept];
    let limited = |(e, &value): (usize, &f64)| if best.contains(&(e / size)) { value } else { outside };
    values.iter().enumerate().map(limited).collect()
}

/// `out[n] = sum_k w[n,k] x[k]`.
pub fn linear(x: &[f64], w: &[f64]) -> Vec<f64> {
    w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

/// Slots of `ids` by rising expert, equal ones as they come: a stable sort, as `argsort(stable=True)` gives it. Ids outside `0..experts` are left
/// out.
pub fn sorted_slots(ids: &[i32], experts: usize) -> Vec<usize> {
    let mut slots: Vec<usize> = (0..ids.len()).filter(|&s| (0..experts as i32).contains(&ids[s])).collect();
    slots.sort_by_key(|&s| ids[s]);
    slots
}

/// Slots of each expert.
pub fn bincount(ids: &[i32], experts: usize) -> Vec<i32> {
    (0..experts as i32).map(|e| ids.iter().filter(|&&id| id == e).count() as i32).collect()
}

/// 0, then the sums of the first one, two, ... values.
pub fn cumulative(values: &[i32]) -> Vec<i32> {
    std::iter::once(0)
        .chain(values.iter().scan(0, |sum, v| {
            *sum += v;
            Some(*sum)
        }))
        .collect()
}
