//! PyTorch, `torch.nn.functional.grouped_mm` in `test/test_matmul_cuda.py`: forward, at the suite's own sizes.
//!
//! Ends (`offs`) stay on the device. Matrices are views: any of row-major, column-major, rows with space behind them, every second group.

use moe_kernels::Dtype;
use moe_kernels::capacity::row_groups::RowLayout;
use moe_kernels::experts::gemm::{GemmDesc, Rows, Strides};
use moe_kernels::experts::k_grouped::{KGroupedDesc, KGroupedStrides};

use crate::close::assert_rounded;
use crate::data::{rng, values, wide, with_type};
use crate::products::{Product, groups};
use crate::suite::{Peer, Section, product};
use crate::support::compare::Storage;

pub fn peer() -> Peer {
    let suite = "`test/test_matmul_cuda.py`: grouped_mm of two and three dimensions, also of odd sizes";
    let sections = vec![ragged_depths(), ragged_rows(), batched(), ragged_columns()];
    Peer { name: "PyTorch", suite, sections }
}

/// A matrix or several: where element (group, row, column) lies.
#[derive(Clone)]
struct View<T> {
    data: Vec<T>,
    strides: [usize; 3],
}

impl<T: Storage> View<T> {
    /// `groups` matrices of `rows x columns`: row-major or not, with space behind each line and after each group or not.
    fn new(
        rng: &mut fastrand::Rng,
        groups: usize,
        [rows, columns]: [usize; 2],
        row_major: bool,
        line: usize,
        every: usize,
    ) -> View<T> {
        let lines = if row_major { rows } else { columns };
        let size = lines * line * every;
        let data = values(rng, groups * size);
        let strides = if row_major { [size, line, 1] } else { [size, 1, line] };
        View { data, strides }
    }

    fn at(&self, group: usize, row: usize, column: usize) -> f64 {
        let [g, r, c] = self.strides;
        self.data[group * g + row * r + column * c].into()
    }
}

/// Sizes of a point: m, n, k of each group, and ends.
#[derive(Clone, Copy)]
struct Sizes {
    m: usize,
    n: usize,
    k: usize,
    groups: usize,
}

/// The suite's plain sizes, and its odd ones: (m, n, k) beside the ends.
const PLAIN: Sizes = Sizes { m: 16, n: 32, k: 64, groups: 4 };

/// Length of a line of `elements`: itself, twice as long where the suite strides, or up to 16 bytes where it aligns.
fn line(elements: usize, strided: bool, dtype: Dtype, aligned: bool) -> usize {
    let vector = 16 / dtype.bytes() as usize;
    let length = if strided { 2 * elements } else { elements };
    if aligned { length.next_multiple_of(vector) } else { length }
}

/// A group's columns of `a [M, K]` between ends times those of `b [N, K]`; a group without any has a product of zeros.
fn ragged_depths() -> Section {
    let mut section = Section::new("2d_2d");
    for (dtype, strided) in product(&Dtype::ALL, &[false, true]) {
        for (a_rows, b_rows) in product(&[false, true], &[false, true]) {
            let name = format!("{dtype} strided={strided} a_row_major={a_rows} b_row_major={b_rows}");
            let point = name.clone();
            let ends: Vec<i32> = (1..=4).map(|g| 64 * g).collect();
            section.point(name, move || {
                with_type!(dtype, T => {
                    ragged_depths_point::<T>(&point, [PLAIN.m, PLAIN.n], &ends, [a_rows, b_rows], strided, false)
                })
            });
        }
    }
    for (a_rows, b_rows) in product(&[false, true], &[false, true]) {
        let name = format!("odd a_row_major={a_rows} b_row_major={b_rows}");
        let point = name.clone();
        let ends = if a_rows || b_rows { [0, 8, 16, 16, 27] } else { [0, 1, 6, 6, 7] };
        section.point(name, move || {
            ragged_depths_point::<half::bf16>(&point, [3, 7], &ends, [a_rows, b_rows], false, true)
        });
    }
    section
}

fn ragged_depths_point<T: Storage>(
    name: &str,
    [m, n]: [usize; 2],
    ends: &[i32],
    [a_rows, b_rows]: [bool; 2],
    strided: bool,
    odd: bool,
) {
    let depth = *ends.last().unwrap() as usize;
    let rng = &mut rng(name);
    let mut operand = |lines: usize, row_major: bool| {
        let length = line(if row_major { depth } else { lines }, strided, T::DTYPE, odd);
        View::<T>::new(rng, 1, [lines, depth], row_major, length, 1)
    };
    let (a, b) = (operand(m, a_rows), operand(n, b_rows));
    let lists = groups(RowLayout::Ends { rows: depth }, ends.len(), 16, ends);
    // The library's rows are the depths.
    let strides = KGroupedStrides::packed(m, n).a([a.strides[2], a.strides[1]]).b([b.strides[2], b.strides[1]]);
    let desc = KGroupedDesc::new(T::DTYPE, lists.desc.shape(), m, n).strides(Some(strides));
    let got = lists.k_grouped(&desc, &a.data, &b.data, None);
    let mut want = vec![];
    let mut first = 0;
    for &end in ends {
        let depths = first..end as usize;
        for row in 0..m {
            want.extend((0..n).map(|c| depths.clone().map(|d| a.at(0, row, d) * b.at(0, c, d)).sum::<f64>()));
        }
        first = end as usize;
    }
    assert_rounded(&wide(&got), &want, T::DTYPE);
}

/// Rows of `a [M, K]` between ends times the group's `b [K, N]`.
fn ragged_rows() -> Section {
    let mut section = Section::new("2d_3d");
    for (dtype, strided) in product(&Dtype::ALL, &[false, true]) {
        for ((a_rows, b_rows), empty) in product(&product(&[false, true], &[false, true]), &[false, true]) {
            let name = format!("{dtype} strided={strided} a_row_major={a_rows} b_row_major={b_rows} empty={empty}");
            let point = name.clone();
            let mut ends: Vec<i32> = (1..=4).map(|g| 16 * g).collect();
            if empty {
                ends[0] = ends[1];
            }
            section.point(name, move || {
                with_type!(dtype, T => ragged_rows_point::<T>(&point, PLAIN, &ends, [a_rows, b_rows], strided, false))
            });
        }
    }
    for (a_rows, b_rows) in product(&[false, true], &[false, true]) {
        let name = format!("odd a_row_major={a_rows} b_row_major={b_rows}");
        let point = name.clone();
        let ends = if a_rows { [0, 1, 3, 3, 5] } else { [0, 8, 16, 16, 19] };
        section.point(name, move || {
            let sizes = Sizes { m: 0, n: 7, k: 259, groups: 5 };
            ragged_rows_point::<half::bf16>(&point, sizes, &ends, [a_rows, b_rows], false, true)
        });
    }
    section
}

fn ragged_rows_point<T: Storage>(
    name: &str,
    sizes: Sizes,
    ends: &[i32],
    [a_rows, b_rows]: [bool; 2],
    strided: bool,
    odd: bool,
) {
    let Sizes { n, k, groups: count, .. } = sizes;
    let rows = *ends.last().unwrap() as usize;
    let rng = &mut rng(name);
    let lines = [if a_rows { k } else { rows }, if b_rows { k } else { n }];
    let a = View::<T>::new(rng, 1, [rows, k], a_rows, line(lines[0], strided, T::DTYPE, odd), 1);
    let b =
        View::<T>::new(rng, count, [n, k], b_rows, line(lines[1], strided, T::DTYPE, odd), 1 + usize::from(strided));
    let lists = groups(RowLayout::Ends { rows }, count, 16, ends);
    let desc = GemmDesc::new(T::DTYPE, Rows::Grouped(lists.desc.shape()), n, k);
    let desc = desc.strides(Some(Strides::packed(&desc).a(a.strides[1], a.strides[2]).weight(
        b.strides[0],
        b.strides[1],
        b.strides[2],
    )));
    let run = Product {
        desc,
        a: &a.data,
        weight: &b.data,
        bias: None,
        lists: Some((&lists.stream, &lists.dispatched)),
        len: rows * n,
    };
    let got = run.run();
    let mut want = vec![];
    let mut first = 0;
    for (g, &end) in ends.iter().enumerate() {
        for row in first..end as usize {
            want.extend((0..n).map(|c| (0..k).map(|d| a.at(0, row, d) * b.at(g, c, d)).sum::<f64>()));
        }
        first = end as usize;
    }
    assert_rounded(&wide(&got), &want, T::DTYPE);
}

/// A product for each group.
fn batched() -> Section {
    let mut section = Section::new("3d_3d");
    for (dtype, strided) in product(&Dtype::ALL, &[false, true]) {
        for (a_rows, b_rows) in product(&[false, true], &[false, true]) {
            let name = format!("{dtype} strided={strided} a_row_major={a_rows} b_row_major={b_rows}");
            let point = name.clone();
            section.point(
                name,
                move || with_type!(dtype, T => batched_point::<T>(&point, PLAIN, [a_rows, b_rows], strided, false)),
            );
        }
    }
    for (a_rows, b_rows) in product(&[false, true], &[false, true]) {
        let name = format!("odd a_row_major={a_rows} b_row_major={b_rows}");
        let point = name.clone();
        section.point(name, move || {
            let sizes = Sizes { m: 3, n: 7, k: 13, groups: 5 };
            batched_point::<half::bf16>(&point, sizes, [a_rows, b_rows], false, true)
        });
    }
    section
}

fn batched_point<T: Storage>(name: &str, sizes: Sizes, [a_rows, b_rows]: [bool; 2], strided: bool, odd: bool) {
    let Sizes { m, n, k, groups: count } = sizes;
    let rng = &mut rng(name);
    let every = 1 + usize::from(strided);
    let lines = [if a_rows { k } else { m }, if b_rows { k } else { n }];
    let a = View::<T>::new(rng, count, [m, k], a_rows, line(lines[0], strided && a_rows, T::DTYPE, odd), every);
    let b = View::<T>::new(rng, count, [n, k], b_rows, line(lines[1], strided, T::DTYPE, odd), every);
    // Groups lie apart: as many rows from one to the next as fit between, of which each has m.
    let height = a.strides[0] / a.strides[1];
    assert_eq!(a.strides[0] % a.strides[1], 0);
    let lists = groups(RowLayout::Masked { height }, count, 16, &vec![m as i32; count]);
    let desc = GemmDesc::new(T::DTYPE, Rows::Grouped(lists.desc.shape()), n, k);
    let desc = desc.strides(Some(Strides::packed(&desc).a(a.strides[1], a.strides[2]).weight(
        b.strides[0],
        b.strides[1],
        b.strides[2],
    )));
    // The descriptor reaches over every row that there may be.
    let mut data = a.data.clone();
    data.resize((count * height - 1) * a.strides[1] + (k - 1) * a.strides[2] + 1, T::from_f64(f64::NAN));
    let len = count * height * n;
    let run =
        Product { desc, a: &data, weight: &b.data, bias: None, lists: Some((&lists.stream, &lists.dispatched)), len };
    let all = run.run();
    let (mut got, mut want) = (vec![], vec![]);
    for g in 0..count {
        got.extend_from_slice(&all[g * height * n..][..m * n]);
        for row in 0..m {
            want.extend((0..n).map(|c| (0..k).map(|d| a.at(g, row, d) * b.at(g, c, d)).sum::<f64>()));
        }
    }
    assert_rounded(&wide(&got), &want, T::DTYPE);
}

/// A group's `a [M, K]` times the columns of `b [K, N]` between ends: the product of the transposed matrices, whose result is written by columns.
fn ragged_columns() -> Section {
    let mut section = Section::new("3d_2d");
    for (dtype, strided) in product(&Dtype::ALL, &[false, true]) {
        for ((a_rows, b_rows), empty) in product(&product(&[false, true], &[false, true]), &[false, true]) {
            let name = format!("{dtype} strided={strided} a_row_major={a_rows} b_row_major={b_rows} empty={empty}");
            let point = name.clone();
            let mut ends: Vec<i32> = (1..=4).map(|g| 32 * g).collect();
            if empty {
                ends[0] = ends[1];
            }
            section.point(name, move || {
                with_type!(dtype, T => ragged_columns_point::<T>(&point, PLAIN, &ends, [a_rows, b_rows], strided, false))
            });
        }
    }
    for (a_rows, b_rows) in product(&[false, true], &[false, true]) {
        let name = format!("odd a_row_major={a_rows} b_row_major={b_rows}");
        let point = name.clone();
        section.point(name, move || {
            let sizes = Sizes { m: 3, n: 0, k: 13, groups: 5 };
            ragged_columns_point::<half::bf16>(&point, sizes, &[0, 8, 16, 16, 19], [a_rows, b_rows], false, true)
        });
    }
    section
}

fn ragged_columns_point<T: Storage>(
    name: &str,
    sizes: Sizes,
    ends: &[i32],
    [a_rows, b_rows]: [bool; 2],
    strided: bool,
    odd: bool,
) {
    let Sizes { m, k, groups: count, .. } = sizes;
    let columns = *ends.last().unwrap() as usize;
    let rng = &mut rng(name);
    let lines = [if a_rows { k } else { m }, if b_rows { k } else { columns }];
    let a =
        View::<T>::new(rng, count, [m, k], a_rows, line(lines[0], strided, T::DTYPE, odd), 1 + usize::from(strided));
    let b = View::<T>::new(rng, 1, [columns, k], b_rows, line(lines[1], strided, T::DTYPE, odd), 1);
    let lists = groups(RowLayout::Ends { rows: columns }, count, 16, ends);
    let desc = GemmDesc::new(T::DTYPE, Rows::Grouped(lists.desc.shape()), m, k);
    let strides = Strides::packed(&desc).a(b.strides[1], b.strides[2]);
    let strides = strides.weight(a.strides[0], a.strides[1], a.strides[2]).out(1, columns);
    let run = Product {
        desc: desc.strides(Some(strides)),
        a: &b.data,
        weight: &a.data,
        bias: None,
        lists: Some((&lists.stream, &lists.dispatched)),
        len: m * columns,
    };
    let got = run.run();
    let group = |column: usize| ends.iter().position(|&end| column < end as usize).unwrap();
    let want: Vec<f64> = (0..m * columns)
        .map(|i| (i / columns, i % columns))
        .map(|(row, column)| (0..k).map(|d| a.at(group(column), row, d) * b.at(0, column, d)).sum())
        .collect();
    assert_rounded(&wide(&got), &want, T::DTYPE);
}
