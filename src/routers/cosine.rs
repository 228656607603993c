//! A router by cosine (Tutel's `CosineTopKGate`).
//!
//! ```text
//! p[t]        = W x[t] + b                                                             [T, D]
//! logits[t,e] = exp(min(temperature, most)) f[e] (p[t] / |p[t]|) . (s[e] / |s[e]|)     [T, E]
//! ```
//!
//! A length is `max(|v|, 1e-12)`, as in torch's `F.normalize`, which Tutel calls: a row of zeros has cosine 0. Beyond the products' inputs all is f32. The logits go to a gating, or a layer
//! ([`crate::layer::RouteArgs::given_logits`]).
//!
//! The way back is [`CosineBackwardPlan`].
//!
//! The temperature is a number of the descriptor: no kernel here takes an exponential of a number on the device. Where it is trained or a CUDA graph must see it change,
//! leave it 0 and write its exponential as [`CosineWeights::expert_scale`], which is read when the work runs.

mod backward;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::router::{self, RouterDesc};
use crate::experts::rms_norm::{self, RmsNormDesc};
use crate::rules::{Dtype, Gain, LogitRule, RmsNorm};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Kernel, Kernels, Out, Selection, Workspace};

pub use backward::{CosineBackwardPlan, CosineGradients};

const OPERATION: &str = "cosine";

/// Shapes, types and temperature of a router by cosine.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct CosineDesc {
    /// Type of `x`.
    pub dtype: Dtype,
    /// Type of the projection and of the experts' rows: `dtype`, or f32 (Tutel's `fp32_gate`).
    pub weight: Dtype,
    /// Tokens `T`; 0 is allowed.
    pub tokens: usize,
    /// Hidden size `H`.
    pub hidden: usize,
    /// Width of the projection `D`, 1 to 4096; 256 in Tutel.
    pub width: usize,
    /// Experts `E`, 1 to 4096.
    pub experts: usize,
    /// Logarithm of the factor of the cosines; at first ln 2 in Tutel.
    pub temperature: f32,
    /// The temperature's upper bound; ln 100 in Tutel.
    pub most: f32,
    /// One kernel for any number of tokens: see [`RouterDesc::batch_invariant`].
    pub batch_invariant: bool,
}

impl CosineDesc {
    /// `experts` logits for `tokens` rows of `hidden` elements, with Tutel's first temperature and bound.
    pub fn new(dtype: Dtype, tokens: usize, hidden: usize, width: usize, experts: usize) -> CosineDesc {
        let [temperature, most] = [2.0f32, 100.0].map(f32::ln);
        let (weight, batch_invariant) = (dtype, false);
        CosineDesc { dtype, weight, tokens, hidden, width, experts, temperature, most, batch_invariant }
    }

    /// Chooses kernels and places.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn plan(&self, device: &DeviceInfo) -> Result<CosinePlan, Error> {
        CosinePlan::new(self, device)
    }
}

settings!(CosineDesc { weight: Dtype, temperature: f32, most: f32, batch_invariant: bool });

/// Weights of a router by cosine.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct CosineWeights<'a, W> {
    /// `[D, H]`.
    pub projection: In<'a, W>,
    /// `[D]`: `b`; 0 where absent.
    pub bias: Option<In<'a, f32>>,
    /// `[E, D]`: `s`, a row an expert (Tutel's `sim_matrix`, transposed).
    pub similar: In<'a, W>,
    /// `[E]`: `f`; 1 where absent.
    pub expert_scale: Option<In<'a, f32>>,
}

impl<'a, W> CosineWeights<'a, W> {
    /// Without a bias and without factors of experts.
    pub fn new(projection: impl Into<In<'a, W>>, similar: impl Into<In<'a, W>>) -> CosineWeights<'a, W> {
        CosineWeights { projection: projection.into(), bias: None, similar: similar.into(), expert_scale: None }
    }
}

buffers!(CosineWeights<'a, W> { bias: In<f32>, expert_scale: In<f32> });

/// Every choice for a router by cosine and a number of tokens: four launches.
#[derive(Clone, Copy, Debug)]
pub struct CosinePlan {
    desc: CosineDesc,
    projection: (RouterDesc, Selection),
    /// Of tokens, of experts.
    norms: [(RmsNormDesc, Selection); 2],
    output: (RouterDesc, Selection),
    /// `[T, D]` and `[E, D]`: unit rows.
    regions: [Region; 2],
    workspace_bytes: usize,
}

impl CosinePlan {
    /// See [`CosineDesc::plan`].
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn new(desc: &CosineDesc, device: &DeviceInfo) -> Result<CosinePlan, Error> {
        let &CosineDesc { dtype, weight, tokens, hidden, width, experts, temperature, most, batch_invariant } = desc;
        shape::positive(OPERATION, "hidden", hidden)?;
        shape::positive(OPERATION, "width", width)?;
        if width > crate::MAX_EXPERTS {
            return Err(Error::unsupported(OPERATION, "width", format!("at most {}", crate::MAX_EXPERTS), width));
        }
        let scale = temperature.min(most).exp();
        if temperature.is_nan() || most.is_nan() || !scale.is_finite() {
            let expected = "a number with a finite exponential, as its bound";
            return Err(Error::invalid(OPERATION, "temperature", expected, temperature));
        }
        let product = |desc: RouterDesc| {
            let desc = desc.batch_invariant(batch_invariant);
            Ok::<_, Error>((desc, router::select(&desc, device).map_err(|error: Error| error.within(OPERATION))?))
        };
        // v / |v| = D^-0.5 v / sqrt(mean(v^2)), of squares whose sum is at least 1e-24.
        let norm = RmsNorm::new(0.0).least((1e-24 / width as f64) as f32).gain(Gain::One);
        let norm = norm.factor((1.0 / (width as f64).sqrt()) as f32);
        let unit = |dtype: Dtype, rows: usize| {
            let desc = RmsNormDesc::new(dtype, rows, width, norm).output(Dtype::F32);
            Ok::<_, Error>((desc, rms_norm::select_for(OPERATION, &desc, device)?))
        };
        let logits = LogitRule::PLAIN.factor(scale);
        let projection = product(RouterDesc::new(dtype, tokens, width, hidden).weight(weight))?;
        let output = product(RouterDesc::new(Dtype::F32, tokens, experts, width).logits(logits))?;
        let mut arena = Arena::new(OPERATION);
        arena.barrier()?;
        let mut region = |rows: usize| {
            let elements = shape::product(OPERATION, "width", &[rows, width])?;
            arena.region("width", elements, size_of::<f32>())
        };
        let regions = [region(tokens)?, region(experts)?];
        let norms = [unit(Dtype::F32, tokens)?, unit(weight, experts)?];
        Ok(CosinePlan { desc: *desc, projection, norms, output, regions, workspace_bytes: arena.bytes() })
    }

    /// The router that was planned.
    pub fn desc(&self) -> &CosineDesc {
        &self.desc
    }

    /// Size of the workspace in bytes.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// The kernels, for [`crate::Kernels::preload`].
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> + use<> {
        let [tokens, experts] = self.norms.map(|(_, selection)| selection);
        [self.projection.1, tokens, experts, self.output.1].into_iter().map(|selection| selection.kernel)
    }

    /// Computes the logits `[T, E]` of `x` `[T, H]`: [`crate::reference::cosine`].
    ///
    /// With no tokens nothing is launched.
    ///
    /// # Errors
    /// Those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`],
    /// [`Error::WorkspaceTooSmall`]; and those of the driver.
    pub fn forward<'a, T: Element, W: Element>(
        &self,
        kernels: &Kernels,
        stream: &Arc<CudaStream>,
        weights: CosineWeights<'_, W>,
        x: impl Into<In<'a, T>>,
        logits: impl Into<Out<'a, f32>>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scope = Scope::begin(OPERATION, kernels, stream)?;
        let CosineDesc { dtype, weight, tokens, hidden, width, experts, .. } = self.desc;
        scope.check_dtype::<T>("x", dtype)?;
        scope.check_dtype::<W>("weight", weight)?;
        if tokens == 0 {
            return Ok(());
        }
        let row = shape::row_alignment;
        let projection = scope.read("projection", weights.projection, width * hidden, row(weight, hidden))?;
        let bias = scope.read_some("bias", weights.bias, width, SCALAR)?;
        let similar = scope.read("similar", weights.similar, experts * width, row(weight, width))?;
        let expert_scale = scope.read_some("expert_scale", weights.expert_scale, experts, SCALAR)?;
        let x = scope.read("x", x.into(), tokens * hidden, row(dtype, hidden))?;
        let logits = scope.write("logits", logits.into(), tokens * experts, SCALAR)?;
        let workspace = workspace.open(&scope, self.workspace_bytes)?;

        let [of_tokens, of_experts] = self.regions.map(|region| workspace.at(region));
        let product = |(desc, selection): &(RouterDesc, Selection), [x, weight, logits]: [Address<'_>; 3], bias| {
            let (weight, logits) = (Some(weight), Some(logits));
            let at = router::Addresses { x, weight, bias, logits, logits_dtype: Dtype::F32, gate: None };
            router::enqueue(&scope, desc, selection, at)
        };
        let [tokens, experts] = &self.norms;
        let projected = [x.address(), projection.address(), of_tokens];
        product(&self.projection, projected, optional(&bias))?;
        rms_norm::enqueue(&scope, &tokens.0, &tokens.1, rms_norm::Addresses::new(of_tokens, of_tokens))?;
        let at = rms_norm::Addresses {
            row_scale: optional(&expert_scale),
            ..rms_norm::Addresses::new(similar.address(), of_experts)
        };
        rms_norm::enqueue(&scope, &experts.0, &experts.1, at)?;
        product(&self.output, [of_tokens, of_experts, logits.address()], None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    #[test]
    fn faults_name_their_field() {
        let desc = CosineDesc::new(Dtype::Bf16, 10, 64, 16, 11);
        let fault = |desc: CosineDesc| desc.plan(&A100).unwrap_err().argument().unwrap();
        assert_eq!(desc.plan(&A100).unwrap().kernels().count(), 4);
        assert_eq!(fault(CosineDesc { hidden: 0, ..desc }), "hidden");
        assert_eq!(fault(CosineDesc { width: 0, ..desc }), "width");
        assert_eq!(fault(CosineDesc { width: 4097, ..desc }), "width");
        assert_eq!(fault(CosineDesc { experts: 0, ..desc }), "experts");
        assert_eq!(fault(CosineDesc { weight: Dtype::F16, ..desc }), "weight");
        assert_eq!(fault(CosineDesc { temperature: f32::NAN, ..desc }), "temperature");
        assert_eq!(fault(CosineDesc { temperature: 99.0, most: 99.0, ..desc }), "temperature");
    }
}
