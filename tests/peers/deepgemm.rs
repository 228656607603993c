//! DeepGEMM, `tests/test_bf16.py`: plain products, and grouped ones in its contiguous and masked layouts.
//!
//! Scaled down: outputs and depths by 128, to multiples of 8; 128 and 4096 rows to 16 and 72; rows of a group by 256 (contiguous) and 32 (masked). A
//! group's rows begin on 16 in place of 128.

use half::bf16;
use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::capacity::row_groups::RowLayout;
use moe_kernels::experts::gemm::{GemmDesc, Output, Rows, Strides};
use moe_kernels::experts::k_grouped::{KGroupedDesc, KGroupedStrides};

use crate::calls;
use crate::close::assert_rounded;
use crate::data::{rng, values, wide, wide32};
use crate::formulas::cumulative;
use crate::products::{Groups, Product, groups};
use crate::suite::{Peer, Section, product};
use crate::support::inputs::normals;

pub fn peer() -> Peer {
    let suite = "`tests/test_bf16.py`: products, contiguous and masked groups of rows, groups of depths";
    Peer { name: "DeepGEMM", suite, sections: vec![forward(), backward(), contiguous(), masked(), depths()] }
}

/// Outputs and depths whose result is bf16, and those whose result is f32.
const TO_BF16: [[usize; 2]; 7] =
    [[2112, 7168], [576, 7168], [24576, 1536], [32768, 512], [7168, 16384], [4096, 7168], [7168, 2048]];
const TO_F32: [[usize; 2]; 2] = [[256, 7168], [129280, 7168]];

fn smaller(size: usize) -> usize {
    (size / 128).next_multiple_of(8)
}

/// A matrix of `lines` by depth, depth first or not.
struct Operand {
    data: Vec<bf16>,
    lines: usize,
    depth: usize,
    depth_first: bool,
}

impl Operand {
    fn new(rng: &mut fastrand::Rng, lines: usize, depth: usize, depth_first: bool) -> Operand {
        Operand { data: values(rng, lines * depth), lines, depth, depth_first }
    }

    /// From a line to the next, from a depth to the next.
    fn strides(&self) -> [usize; 2] {
        if self.depth_first { [self.depth, 1] } else { [1, self.lines] }
    }

    fn at(&self, line: usize, depth: usize) -> f64 {
        let [of_line, of_depth] = self.strides();
        self.data[line * of_line + depth * of_depth].into()
    }
}

/// `d = a b^T`, or `d = c + a b^T` in f32.
fn plain(name: &str, [m, n, k]: [usize; 3], [a_depth_first, b_depth_first]: [bool; 2], output: Output) {
    let rng = &mut rng(name);
    let (a, b) = (Operand::new(rng, m, k, a_depth_first), Operand::new(rng, n, k, b_depth_first));
    let onto: Vec<f32> = normals(rng, m * n, 1.0);
    let desc = GemmDesc::new(Dtype::Bf16, Rows::Dense(m), n, k).output(output);
    let [of_row, of_depth] = a.strides();
    let [of_output, of_b_depth] = b.strides();
    let strides = Strides::packed(&desc).a(of_row, of_depth).weight(n * k, of_output, of_b_depth);
    let run =
        Product { desc: desc.strides(Some(strides)), a: &a.data, weight: &b.data, bias: None, lists: None, len: m * n };
    let added = output == Output::AddedF32;
    let got = match output {
        Output::Rounded => wide(&run.run()),
        _ => wide32(&run.run_f32(added.then_some(&onto[..]))),
    };
    let mut want = vec![];
    for row in 0..m {
        for column in 0..n {
            let sum: f64 = (0..k).map(|d| a.at(row, d) * b.at(column, d)).sum();
            want.push(if added { sum + f64::from(onto[row * n + column]) } else { sum });
        }
    }
    assert_rounded(&got, &want, if output == Output::Rounded { Dtype::Bf16 } else { Dtype::F32 });
}

/// `d = c + a b^T`, all bf16: as a product of one group along K, whose sums are added before they are rounded.
fn onto_bf16(name: &str, [m, n, k]: [usize; 3]) {
    let rng = &mut rng(name);
    let (a, b) = (Operand::new(rng, m, k, true), Operand::new(rng, n, k, true));
    let onto: Vec<bf16> = normals(rng, m * n, 8.0);
    let lists = groups(RowLayout::Batched { height: k }, 1, 16, &[]);
    let strides = KGroupedStrides::packed(m, n).a([1, k]).b([1, k]);
    let desc = KGroupedDesc::new(Dtype::Bf16, lists.desc.shape(), m, n).strides(Some(strides)).accumulate(true);
    let got = lists.k_grouped(&desc, &a.data, &b.data, Some(&onto));
    let sum = |i: usize| (0..k).map(|d| a.at(i / n, d) * b.at(i % n, d)).sum::<f64>();
    let want: Vec<f64> = (0..m * n).map(|i| sum(i) + onto[i].to_f64()).collect();
    assert_rounded(&wide(&got), &want, Dtype::Bf16);
}

fn forward() -> Section {
    let mut section = Section::new("forward");
    for rows in [1, 128, 4096] {
        for (shapes, output) in [(&TO_BF16[..], Output::Rounded), (&TO_F32[..], Output::F32)] {
            for &[n, k] in shapes {
                let name = format!("m={rows} n={n} k={k} {output:?}");
                let point = name.clone();
                let m = [(128, 16), (4096, 72)].iter().find(|(from, _)| *from == rows).map_or(rows, |to| to.1);
                section.point(name, move || plain(&point, [m, smaller(n), smaller(k)], [true, true], output));
                if output == Output::Rounded {
                    let name = format!("m={rows} n={n} k={k} onto bf16");
                    let point = name.clone();
                    section.point(name, move || onto_bf16(&point, [m, smaller(n), smaller(k)]));
                }
            }
        }
    }
    section
}

/// Gradients of the input, and of the weight: in bf16, f32, and added to one of f32.
fn backward() -> Section {
    let mut section = Section::new("backward");
    for [n, k] in TO_BF16.into_iter().chain(TO_F32) {
        let [m, small_n, small_k] = [72, smaller(n), smaller(k)];
        let name = format!("dgrad n={n} k={k}");
        let point = name.clone();
        section.point(name, move || plain(&point, [m, small_k, small_n], [true, false], Output::Rounded));
        for output in [Output::AddedF32, Output::Rounded, Output::F32] {
            let name = format!("wgrad n={n} k={k} {output:?}");
            let point = name.clone();
            section.point(name, move || plain(&point, [small_n, m, small_k], [false, false], output));
        }
    }
    section
}

const GROUPED: [[usize; 2]; 4] = [[6144, 7168], [7168, 3072], [4096, 4096], [4096, 2048]];

/// Rows of each group: 0.7 to 1.3 times what is expected.
fn heights(rng: &mut fastrand::Rng, count: usize, expected: usize) -> Vec<usize> {
    (0..count).map(|_| (expected as f64 * (0.7 + 0.6 * rng.f64())) as usize).collect()
}

const ALIGNMENT: usize = 16;

/// Groups one behind another, each from a boundary on: by the group of each row, -1 for rows of nobody, or by the ends of groups.
fn contiguous() -> Section {
    let mut section = Section::new("m_grouped_contiguous");
    for (ends, (count, expected)) in product(&[true, false], &[(4, 8192), (8, 4096)]) {
        for ([n, k], depth_first) in product(&GROUPED, &[true, false]) {
            let name = format!("groups={count} m={expected} n={n} k={k} b_depth_first={depth_first} psum={ends}");
            let point = name.clone();
            let sizes = [count, expected / 256, smaller(n), smaller(k)];
            section.point(name, move || contiguous_point(&point, sizes, depth_first, ends));
        }
    }
    section
}

fn contiguous_point(name: &str, [count, expected, n, k]: [usize; 4], depth_first: bool, by_ends: bool) {
    let rng = &mut rng(name);
    let heights = heights(rng, count, expected);
    let padded: Vec<i32> = heights.iter().map(|h| h.next_multiple_of(ALIGNMENT) as i32).collect();
    let firsts = cumulative(&padded);
    let rows = firsts[count] as usize;
    let live: Vec<(usize, usize)> = (0..count)
        .flat_map(|g| (0..heights[g]).map(move |row| (g, row)))
        .map(|(g, row)| (g, firsts[g] as usize + row))
        .collect();
    let mut a = vec![bf16::ZERO; rows * k];
    for &(_, row) in &live {
        a[row * k..][..k].copy_from_slice(&values::<bf16>(rng, k));
    }
    let b: Vec<Operand> = (0..count).map(|_| Operand::new(rng, n, k, depth_first)).collect();
    let weight: Vec<bf16> = b.iter().flat_map(|b| b.data.clone()).collect();
    let [of_output, of_depth] = b[0].strides();
    let run = |lists, shape, gather| {
        let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(shape), n, k).gather(gather);
        let strides = Strides::packed(&desc).weight(n * k, of_output, of_depth);
        let len = shape.slots * n;
        Product { desc: desc.strides(Some(strides)), a: &a, weight: &weight, bias: None, lists: Some(lists), len }.run()
    };
    let got = if by_ends {
        // Ends with the rows of nobody: what is computed there is not looked at.
        let Groups { stream, dispatched, desc } = groups(RowLayout::Ends { rows }, count, ALIGNMENT, &firsts[1..]);
        run((&stream, &dispatched), desc.shape(), false)
    } else {
        let mut ids = vec![-1; rows];
        live.iter().for_each(|&(g, row)| ids[row] = g as i32);
        let desc = DispatchDesc::new(rows, count, 1, ALIGNMENT).row_multiple(ALIGNMENT);
        let sorted = calls::sort(&ids, None, &desc);
        // Rows stay where they are.
        assert!(live.iter().all(|&(_, row)| sorted.token_slot()[row] == row as i32));
        run((&sorted.stream, &sorted.dispatched), sorted.shape, true)
    };
    compare(&got, &a, &b, live, [n, k]);
}

/// The rows `live`, of (group, row).
fn compare(got: &[bf16], a: &[bf16], b: &[Operand], live: Vec<(usize, usize)>, [n, k]: [usize; 2]) {
    let (mut of_rows, mut want) = (vec![], vec![]);
    for (g, row) in live {
        of_rows.extend_from_slice(&got[row * n..][..n]);
        let a = wide(&a[row * k..][..k]);
        want.extend((0..n).map(|column| (0..k).map(|d| a[d] * b[g].at(column, d)).sum::<f64>()));
    }
    assert_rounded(&wide(&of_rows), &want, Dtype::Bf16);
}

/// `[groups, 4096]` rows of which each group has its first ones; and the same numbers as a contiguous layout of ends.
fn masked() -> Section {
    let mut section = Section::new("m_grouped_masked");
    for ((ends, (count, expected)), [n, k]) in
        product(&product(&[true, false], &[(32, 192), (6, 1024), (32, 20), (6, 20)]), &GROUPED)
    {
        let name = format!("groups={count} m={expected} n={n} k={k} psum={ends}");
        let point = name.clone();
        // 20 rows, fewer than any tile has, stay fewer.
        let rows = if expected == 20 { 3 } else { expected / 32 };
        section.point(name, move || {
            let sizes = [count, rows, smaller(n), smaller(k)];
            if ends { contiguous_point(&point, sizes, true, true) } else { masked_point(&point, sizes) }
        });
    }
    section
}

fn masked_point(name: &str, [count, expected, n, k]: [usize; 4]) {
    let (rng, height) = (&mut rng(name), 48);
    let heights = heights(rng, count, expected);
    let numbers: Vec<i32> = heights.iter().map(|&h| h as i32).collect();
    let a: Vec<bf16> = values(rng, count * height * k);
    let b: Vec<Operand> = (0..count).map(|_| Operand::new(rng, n, k, true)).collect();
    let weight: Vec<bf16> = b.iter().flat_map(|b| b.data.clone()).collect();
    let lists = groups(RowLayout::Masked { height }, count, 16, &numbers);
    let desc = GemmDesc::new(Dtype::Bf16, Rows::Grouped(lists.desc.shape()), n, k);
    let of = Some((&lists.stream, &lists.dispatched));
    let got = Product { desc, a: &a, weight: &weight, bias: None, lists: of, len: count * height * n }.run();
    let live: Vec<_> = (0..count).flat_map(|g| (0..heights[g]).map(move |row| (g, g * height + row))).collect();
    compare(&got, &a, &b, live, [n, k]);
    let past = (0..count).flat_map(|g| (heights[g]..height).map(move |row| g * height + row));
    past.for_each(|row| assert!(got[row * n..][..n].iter().all(|v| v.to_bits() == 0xffff), "row {row} is nobody's"));
}

/// `d[g] += a_g^T b_g` in f32, depths outermost: with depths as drawn, some of them 0, all but one 0; the grid of sm_90, whose depths are multiples of 128 there,
/// of 16 here.
fn depths() -> Section {
    let mut section = Section::new("k_grouped");
    let shapes = [
        (8, 768, 2048, 128),
        (4, 4096, 7168, 8192),
        (4, 7168, 2048, 8192),
        (8, 4096, 7168, 4096),
        (8, 7168, 2048, 4096),
        (16, 4096, 7168, 2048),
        (16, 7168, 2048, 2048),
    ];
    for ((count, m, n, expected), empty) in product(&shapes, &["drawn", "some empty", "all but one empty"]) {
        let name = format!("groups={count} m={m} n={n} k={expected} {empty}");
        let point = name.clone();
        section.point(name, move || {
            let rng = &mut rng(&point);
            let (m, n) = (smaller(m), smaller(n));
            let depth = (expected / 128).max(4);
            let mut depths: Vec<usize> =
                heights(rng, count, depth).iter().map(|k| k.next_multiple_of(ALIGNMENT)).collect();
            match empty {
                "drawn" => {}
                "some empty" => {
                    let last = depths[count - 1];
                    depths.iter_mut().for_each(|k| *k = if rng.f32() < 0.25 { 0 } else { *k });
                    (depths[0], depths[count - 1]) = (0, last);
                }
                _ => depths.iter_mut().enumerate().for_each(|(g, k)| *k = if g == count / 2 { *k } else { 0 }),
            }
            let rows = depths.iter().sum();
            let (a, b): (Vec<bf16>, Vec<bf16>) = (values(rng, rows * m), values(rng, rows * n));
            let onto: Vec<f32> = normals(rng, count * m * n, 1.0);
            let numbers: Vec<i32> = depths.iter().map(|&k| k as i32).collect();
            let lists = groups(RowLayout::Counts { rows }, count, 16, &numbers);
            let desc = KGroupedDesc::new(Dtype::Bf16, lists.desc.shape(), m, n).f32_out(true).accumulate(true);
            let got = lists.k_grouped_f32(&desc, &a, &b, Some(&onto));
            let (a, b) = (wide(&a), wide(&b));
            let mut want = wide32(&onto);
            let mut first = 0;
            for (g, &k) in depths.iter().enumerate() {
                for (d, i) in product(&(first..first + k).collect::<Vec<_>>(), &(0..m).collect::<Vec<_>>()) {
                    let to = &mut want[(g * m + i) * n..][..n];
                    to.iter_mut().zip(&b[d * n..]).for_each(|(sum, b)| *sum += a[d * m + i] * b);
                }
                first += k;
            }
            assert_rounded(&wide32(&got), &want, Dtype::F32);
        });
    }
    section
}
