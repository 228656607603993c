//! Products as a framework calls them: rows that lie by expert already, strided matrices, f32 results.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use moe_kernels::In;
use moe_kernels::capacity::row_groups::{self, RowGroupsArgs, RowGroupsDesc, RowLayout};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, ProductOut};
use moe_kernels::experts::k_grouped::{self, KGroupedArgs, KGroupedDesc};
use moe_kernels::experts::{Dispatched, Weight};

use crate::calls::{down, junk, up};
use crate::support::compare::Storage;
use crate::support::device;

/// Lists of rows that lie by expert already.
pub struct Groups {
    pub stream: Arc<CudaStream>,
    pub dispatched: Dispatched,
    pub desc: RowGroupsDesc,
}

/// Rows of `experts` experts, so many of each as `numbers` say on the device.
pub fn groups(layout: RowLayout, experts: usize, tile_m: usize, numbers: &[i32]) -> Groups {
    let stream = device::stream();
    let desc = RowGroupsDesc::new(layout, experts, tile_m);
    let mut dispatched = Dispatched::new(&stream, &desc.shape()).unwrap();
    let on_device = up(&stream, numbers);
    let args = match layout {
        RowLayout::Batched { .. } => RowGroupsArgs::batched(&mut dispatched),
        _ => RowGroupsArgs::new(&on_device, &mut dispatched),
    };
    row_groups::forward(device::kernels(), &stream, &desc, args).unwrap();
    Groups { stream, dispatched, desc }
}

impl Groups {
    /// `out[g] = a^T b` over the rows of each group, in the type of `a` and added to `onto` if the descriptor says so.
    pub fn k_grouped<T: Storage>(&self, desc: &KGroupedDesc, a: &[T], b: &[T], onto: Option<&[T]>) -> Vec<T> {
        let stream = &self.stream;
        let (a, b, len) = (up(stream, a), up(stream, b), desc.rows.experts * desc.m * desc.n);
        let mut out = onto.map_or_else(|| junk::<T>(stream, len), |onto| up(stream, onto));
        let args = KGroupedArgs::new(&a, &b, &self.dispatched, ProductOut::Rounded((&mut out).into()));
        k_grouped::forward(device::kernels(), stream, desc, args).unwrap();
        down(stream, &out, len)
    }

    /// The same in f32.
    pub fn k_grouped_f32<T: Storage>(&self, desc: &KGroupedDesc, a: &[T], b: &[T], onto: Option<&[f32]>) -> Vec<f32> {
        let stream = &self.stream;
        let (a, b, len) = (up(stream, a), up(stream, b), desc.rows.experts * desc.m * desc.n);
        let mut out = onto.map_or_else(|| junk::<f32>(stream, len), |onto| up(stream, onto));
        let args = KGroupedArgs::new(&a, &b, &self.dispatched, ProductOut::F32((&mut out).into()));
        k_grouped::forward(device::kernels(), stream, desc, args).unwrap();
        down(stream, &out, len)
    }
}

/// One product.
pub struct Product<'a, T> {
    pub desc: GemmDesc,
    pub a: &'a [T],
    pub weight: &'a [T],
    pub bias: Option<&'a [T]>,
    /// Which rows are whose, and the stream that they are on.
    pub lists: Option<(&'a Arc<CudaStream>, &'a Dispatched)>,
    /// Elements of the result's buffer.
    pub len: usize,
}

impl<T: Storage> Product<'_, T> {
    fn launch<R>(&self, run: impl FnOnce(&Arc<CudaStream>, In<'_, T>, Weight<'_>) -> R) -> R {
        let own = self.lists.is_none().then(device::stream);
        let stream = own.as_ref().unwrap_or_else(|| self.lists.unwrap().0);
        let (a, weight) = (up(stream, self.a), up(stream, self.weight));
        let bias = self.bias.map(|bias| up(stream, bias));
        let weight = match &bias {
            Some(bias) => Weight::new(&weight).bias(bias),
            None => Weight::new(&weight),
        };
        run(stream, (&a).into(), weight)
    }

    /// The result in the type of `a`; bits of one where nothing is written.
    pub fn run(&self) -> Vec<T> {
        self.launch(|stream, a, weight| {
            let mut out = junk::<T>(stream, self.len);
            let mut args = GemmArgs::new(a, weight, &mut out);
            args.dispatched = self.lists.map(|(_, dispatched)| dispatched);
            gemm::forward(device::kernels(), stream, &self.desc, args).unwrap();
            down(stream, &out, self.len)
        })
    }

    /// The result in f32, added to `onto` if the descriptor says so.
    pub fn run_f32(&self, onto: Option<&[f32]>) -> Vec<f32> {
        self.launch(|stream, a, weight| {
            let mut out = onto.map_or_else(|| junk::<f32>(stream, self.len), |onto| up(stream, onto));
            let mut args = GemmArgs::to_f32(a, weight, &mut out);
            args.dispatched = self.lists.map(|(_, dispatched)| dispatched);
            gemm::forward(device::kernels(), stream, &self.desc, args).unwrap();
            down(stream, &out, self.len)
        })
    }
}
