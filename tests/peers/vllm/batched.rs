//! The batched layout, `[E, rows]` of which each expert has its first ones, and sums over choices.

use moe_kernels::Dtype;
use moe_kernels::capacity::dispatch::DispatchDesc;
use moe_kernels::capacity::row_groups::RowLayout;
use moe_kernels::experts::gemm::{GemmDesc, Rows};

use crate::calls;
use crate::close::assert_rounded;
use crate::data::{rng, values, wide, with_type};
use crate::products::{Product, groups};
use crate::suite::{Section, product, scaled};
use crate::support::compare::Storage;
use crate::support::inputs::normals;

/// Blocks of one expert each, from counts: the expert and the rows of each.
pub fn align() -> Section {
    let mut section = Section::new("batched_align");
    for ((height, experts), (block, empty)) in
        product(&product(&[16usize, 32, 256, 512], &[8, 16, 32, 64]), &product(&[8, 16, 32, 64], &[false, true]))
    {
        let name = format!("max={height} e={experts} block={block} empty={empty}");
        let point = name.clone();
        section.point(name, move || {
            let rng = &mut rng(&point);
            let mut numbers: Vec<i32> = (0..experts).map(|_| rng.i32(0..height as i32)).collect();
            if empty {
                (0..experts / 2).for_each(|_| numbers[rng.usize(..experts)] = 0);
            }
            let lists = groups(RowLayout::Masked { height }, experts, block, &numbers);
            let count = calls::down(&lists.stream, lists.dispatched.num_tiles(), 1)[0] as usize;
            let tiles = lists.stream.clone_dtoh(lists.dispatched.tiles()).unwrap();
            let got: Vec<[i32; 3]> = tiles[..count].iter().map(|tile| [tile[0], tile[1], tile[2]]).collect();
            let mut want = vec![];
            for (e, &number) in numbers.iter().enumerate() {
                let first = (e * height) as i32;
                for row in (0..number).step_by(block) {
                    want.push([e as i32, first + row, first + number.min(row + block as i32)]);
                }
            }
            assert_eq!(got, want);
        });
    }
    section
}

/// `c[e] = a[e] b[e]^T` of the first rows of each expert. All sizes are a sixteenth of the suite's.
pub fn products() -> Section {
    let mut section = Section::new("batched_mm");
    let heights = [32, 64, 128, 192, 224, 256, 512];
    for ((experts, height), (k, n)) in
        product(&product(&[16usize, 32], &heights), &product(&[128, 256, 1024], &[128, 256, 512, 1024]))
    {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let name = format!("e={experts} max={height} k={k} n={n} {dtype}");
            let point = name.clone();
            let sizes = [experts, height / 16, n / 16, k / 16];
            section.point(name, move || with_type!(dtype, T => product_point::<T>(&point, sizes)));
        }
    }
    section.refuse(168, "8-bit floats: quantised types come with their products");
    section
}

fn product_point<T: Storage>(name: &str, [experts, height, n, k]: [usize; 4]) {
    let rng = &mut rng(name);
    let a: Vec<T> = normals(rng, experts * height * k, 0.1);
    let weight: Vec<T> = values(rng, experts * n * k);
    let numbers: Vec<i32> = (0..experts).map(|_| rng.i32(0..height as i32)).collect();
    let lists = groups(RowLayout::Masked { height }, experts, 16, &numbers);
    let desc = GemmDesc::new(T::DTYPE, Rows::Grouped(lists.desc.shape()), n, k);
    let of = Some((&lists.stream, &lists.dispatched));
    let all = Product { desc, a: &a, weight: &weight, bias: None, lists: of, len: experts * height * n }.run();
    let (a, weight) = (wide(&a), wide(&weight));
    let (mut got, mut want) = (vec![], vec![]);
    for (e, &number) in numbers.iter().enumerate() {
        for row in e * height..e * height + number as usize {
            got.extend_from_slice(&all[row * n..][..n]);
            want.extend((0..n).map(|j| -> f64 {
                a[row * k..][..k].iter().zip(&weight[(e * n + j) * k..]).map(|(a, b)| a * b).sum()
            }));
        }
    }
    assert_rounded(&wide(&got), &want, T::DTYPE);
}

/// `[T, k, H]` summed over k.
pub fn moe_sum() -> Section {
    let mut section = Section::new("moe_sum");
    for ((tokens, top_k), (width, dtype)) in
        product(&product(&[1, 33, 222], &[2, 6]), &product(&[128, 511, 1024], &[Dtype::F32, Dtype::Bf16]))
    {
        let name = format!("m={tokens} topk={top_k} k={width} {dtype}");
        let point = name.clone();
        let tokens = scaled(tokens, 96);
        section.point(name, move || with_type!(dtype, T => sum_point::<T>(&point, tokens, top_k, width)));
    }
    section
}

fn sum_point<T: Storage>(name: &str, tokens: usize, top_k: usize, width: usize) {
    let rows: Vec<T> = values(&mut rng(name), tokens * top_k * width);
    // Slots of one expert stay in their order.
    let sorted = calls::sort(&vec![0; tokens * top_k], None, &DispatchDesc::new(tokens, 1, top_k, 16));
    let got = wide(&sorted.unpermute(&rows, None, width));
    let rows = wide(&rows);
    let at = |t: usize, j: usize, i: usize| rows[(t * top_k + j) * width + i];
    let want: Vec<f64> = (0..tokens * width).map(|i| (0..top_k).map(|j| at(i / width, j, i % width)).sum()).collect();
    assert_rounded(&got, &want, T::DTYPE);
}
