//! Operations on buffers, streams and contexts of `cust`. Needs a CUDA installation to link: `.ci/cust` makes one of the software device.

use cust::context::legacy;
use cust::device::Device;
use cust::memory::DeviceBuffer;
use cust::stream::{Stream, StreamFlags};
use cust::{CudaFlags, context::Context};
use moe_kernels::experts::Weight;
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, Rows};

use moe_kernels::interop::cust as lend;
use moe_kernels::routers::gating::{self, GatingArgs, GatingDesc};
use moe_kernels::routers::router::{self, RouterArgs, RouterDesc};
use moe_kernels::rules::{Gating, Score};
use moe_kernels::{Dtype, In, Kernels, interop};

const T: usize = 37;
const H: usize = 64;
const E: usize = 8;
const K: usize = 2;
const N: usize = 24;

/// Values of a few bits, so that sums are exact in f32 and bf16 and nothing has to be tolerated.
fn values(n: usize, step: usize) -> Vec<f32> {
    (0..n).map(|i| (i * step % 7) as f32 - 3.0).collect()
}

/// `[rows, n] = a [rows, k] b [n, k]^T`.
fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    a.chunks(k).flat_map(|row| b.chunks(k).map(move |column| dot(row, column))).collect()
}

fn bf16_bits(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&value| half::bf16::from_f32(value).to_bits()).collect()
}

#[test]
fn a_chain_of_operations_on_lent_buffers() {
    cust::init(CudaFlags::empty()).unwrap();
    let own = Context::new(Device::get_device(0).unwrap()).unwrap();
    let context = lend::context(&own).unwrap();
    assert_eq!(context.cu_ctx(), own.as_raw().cast());
    let kernels = Kernels::new(&context).unwrap();
    let own_stream = Stream::new(StreamFlags::DEFAULT, None).unwrap();

    let (x, router_weight, expert) = (values(T * H, 5), values(E * H, 3), values(N * H, 11));
    let x_on_device = DeviceBuffer::from_slice(&bf16_bits(&x)).unwrap();
    let router_on_device = DeviceBuffer::from_slice(&bf16_bits(&router_weight)).unwrap();
    let expert_on_device = DeviceBuffer::from_slice(&bf16_bits(&expert)).unwrap();
    let mut logits = DeviceBuffer::from_slice(&[f32::NAN; T * E]).unwrap();
    let mut ids = DeviceBuffer::from_slice(&[-7i32; T * K]).unwrap();
    let mut weights = DeviceBuffer::from_slice(&[f32::NAN; T * K]).unwrap();
    let mut out = DeviceBuffer::from_slice(&[0u16; T * N]).unwrap();

    let routing = RouterDesc::new(Dtype::Bf16, T, E, H);
    let choice = GatingDesc::new(T, E, K, Gating::new(Score::Softmax));
    let dense = GemmDesc::new(Dtype::Bf16, Rows::Dense(T), N, H);
    // SAFETY: the stream and the buffers live to the end of the test, and are read after the stream was waited for.
    unsafe {
        let stream = lend::stream(&context, &own_stream);
        let x: In<'_, half::bf16> = lend::input(&x_on_device);
        let weight: In<'_, half::bf16> = lend::input(&router_on_device);
        router::forward(&kernels, &stream, &routing, RouterArgs::new(x, weight, lend::out::<f32, f32>(&mut logits)))
            .unwrap();
        // A `DevicePointer` is an address.
        let of_pointer = In::<f32>::from_raw(logits.as_device_ptr().as_raw(), T * E);
        let args = GatingArgs::new(of_pointer, lend::out(&mut ids), lend::out(&mut weights));
        gating::forward(&kernels, &stream, &choice, args).unwrap();
        let expert: In<'_, half::bf16> = lend::input(&expert_on_device);
        let args = GemmArgs::new(x, Weight::new(expert), lend::out(&mut out));
        gemm::forward(&kernels, &stream, &dense, args).unwrap();
        // Too little is refused, as for any buffer.
        let part = x_on_device.index(..T * H - 1);
        let short: In<'_, half::bf16> = lend::input(&part);
        let refused = router::forward(
            &kernels,
            &stream,
            &routing,
            RouterArgs::new(short, weight, lend::out::<f32, f32>(&mut logits)),
        );
        assert_eq!(refused.unwrap_err().argument(), Some("x"));
    }
    own_stream.synchronize().unwrap();

    let expected = product(&x, &router_weight, H);
    assert_eq!(logits.as_host_vec().unwrap(), expected);
    let chosen: Vec<i32> = expected
        .chunks(E)
        .flat_map(|row| {
            let mut order: Vec<usize> = (0..E).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
            order.into_iter().take(K).map(|e| e as i32)
        })
        .collect();
    assert_eq!(ids.as_host_vec().unwrap(), chosen);
    assert!(weights.as_host_vec().unwrap().iter().all(|weight| (0.0..=1.0).contains(weight)));
    assert_eq!(out.as_host_vec().unwrap(), bf16_bits(&product(&x, &expert, H)));
}

#[test]
fn a_context_that_is_not_the_primary_one() {
    cust::init(CudaFlags::empty()).unwrap();
    let device = Device::get_device(0).unwrap();
    let own = legacy::Context::create_and_push(legacy::ContextFlags::SCHED_AUTO, device).unwrap();
    {
        // SAFETY: `own` outlives the block.
        let context = unsafe { interop::current_context() }.unwrap();
        assert!(!context.is_primary());
        let kernels = Kernels::new(&context).unwrap();
        let stream = context.default_stream();
        let logits = stream.clone_htod(&[1.0f32, 3.0, 2.0, 0.0]).unwrap();
        let (mut ids, mut weights) = (stream.alloc_zeros::<i32>(2).unwrap(), stream.alloc_zeros::<f32>(2).unwrap());
        let desc = GatingDesc::new(1, 4, 2, Gating::new(Score::Softmax));
        gating::forward(&kernels, &stream, &desc, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
        assert_eq!(stream.clone_dtoh(&ids).unwrap(), [1, 2]);
    }
    // Still its maker's to destroy, and alive until then.
    legacy::Context::drop(own).map_err(|(error, _)| error).unwrap();
}
