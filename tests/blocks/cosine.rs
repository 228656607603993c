//! Tutel's cosine gate, with weights in the type of x and in f32.

use moe_kernels::reference::cosine::cosine;
use moe_kernels::routers::cosine::{CosineDesc, CosineWeights};
use moe_kernels::{Dtype, Workspace};

use crate::run::Run;
use crate::support::compare::{Storage, relative_error, to_f64};
use crate::support::inputs::{generator, normals};

pub fn logits<T: Storage>() {
    with_weights::<T, T>();
    with_weights::<T, f32>();
}

fn with_weights<T: Storage, W: Storage>() {
    let run = Run::new();
    for (tokens, hidden, width, experts, temperature) in
        [(21, 40, 24, 7, 0.7), (3, 33, 256, 70, 6.0), (1, 8, 5, 1, -2.0)]
    {
        let mut rng = generator("cosine gate");
        let x = normals::<T>(&mut rng, tokens * hidden, 1.0);
        let projection = normals::<W>(&mut rng, width * hidden, 0.2);
        let bias = normals::<f32>(&mut rng, width, 0.5);
        let mut similar = normals::<W>(&mut rng, experts * width, 0.01);
        if experts > 1 {
            // An expert without a direction.
            similar[width..2 * width].fill(W::from_f64(0.0));
        }
        if experts > 3 && W::DTYPE != Dtype::F16 {
            // Rows about as short as the least length, 1e-12: half of it, and twice.
            for (row, length) in [(2, 0.5e-12), (3, 2e-12)] {
                let row = &mut similar[row * width..][..width];
                let norm = to_f64(row).iter().map(|v| v * v).sum::<f64>().sqrt();
                row.iter_mut().for_each(|v| *v = W::from_f64(Into::<f64>::into(*v) * length / norm));
            }
        }
        let scale = normals::<f32>(&mut rng, experts, 1.0);
        let (x_on, projection_on, similar_on) = (up(&run, &x), up(&run, &projection), up(&run, &similar));
        let (bias_on, scale_on) = (up(&run, &bias), up(&run, &scale));
        let desc = CosineDesc::new(T::DTYPE, tokens, hidden, width, experts).weight(W::DTYPE).temperature(temperature);
        let plan = desc.plan(run.kernels.device()).unwrap();
        let mut workspace = Workspace::new(&run.stream, plan.workspace_bytes()).unwrap();
        let mut got = |weights: CosineWeights<'_, W>| {
            let mut logits = run.out::<f32>(tokens * experts);
            plan.forward::<T, W>(run.kernels, &run.stream, weights, &x_on, &mut logits, &mut workspace).unwrap();
            run.get(&logits)
        };
        let weights = CosineWeights::new(&projection_on, &similar_on);
        let whole = got(weights.bias(&bias_on).expert_scale(&scale_on));
        let plain = got(weights);
        let [x, projection, bias, similar, scale] =
            [to_f64(&x), to_f64(&projection), to_f64(&bias), to_f64(&similar), to_f64(&scale)];
        let bounds = [temperature.into(), f64::from(100.0f32.ln())];
        let want = |bias: &[f64], scale| cosine(&x, &projection, bias, &similar, bounds, scale).unwrap();
        for (name, got, want) in [
            ("with bias and factors", whole, want(&bias, Some(&scale))),
            ("plain", plain, want(&vec![0.0; width], None)),
        ] {
            // All is f32 from the products on, whose inputs are exact.
            let error = relative_error(name, &got, &want);
            assert!(error <= 2e-6, "{name}, {} and {}, {desc:?}: off by {error:e}", T::DTYPE, W::DTYPE);
        }
    }
    let none = CosineDesc::new(Dtype::F32, 0, 8, 8, 2).plan(run.kernels.device()).unwrap();
    let empty = up::<f32>(&run, &[0.0; 64]);
    let mut workspace = Workspace::new(&run.stream, none.workspace_bytes()).unwrap();
    let weights = CosineWeights::new(&empty, &empty);
    let mut logits = run.out::<f32>(1);
    none.forward::<f32, f32>(run.kernels, &run.stream, weights, &empty, &mut logits, &mut workspace).unwrap();
    assert!(run.get(&logits)[0].is_nan(), "no tokens, and something was written");
}

fn up<T: Storage>(run: &Run, values: &[T]) -> cudarc::driver::CudaSlice<T> {
    run.stream.clone_htod(values).unwrap()
}
