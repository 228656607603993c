//! What a layer with norms and projections refuses, and by which name.

use cudarc::driver::CudaSlice;
use moe_kernels::experts::Weight;
use moe_kernels::experts::rms_norm::{self, RmsNormArgs, RmsNormDesc};
use moe_kernels::layer::{
    BanksArgs, BanksPlan, ExpertWeights, LatentDesc, LatentWeights, LayerArgs, LayerDesc, LayerWeights, Mlp,
    NormWeights, Norms, RouteArgs, RouterWeights, SharedDesc,
};
use moe_kernels::rules::{Gain, IdFormat, RmsNorm};
use moe_kernels::{Dtype, Error, TokenMask, Workspace};

use crate::run::Run;

const T: usize = 5;
const H: usize = 16;

struct Problem {
    run: Run,
    /// Long enough for any matrix here.
    ones: CudaSlice<f32>,
}

impl Problem {
    fn new() -> Problem {
        let run = Run::new();
        let ones = run.put::<f32>(&[1.0; 4096]);
        Problem { run, ones }
    }

    fn layer() -> LayerDesc {
        LayerDesc::new(Dtype::F32, H, 8, 4, 2)
    }

    fn experts(&self) -> ExpertWeights<'_> {
        ExpertWeights::new(Weight::new(&self.ones), Weight::new(&self.ones))
    }

    fn latent(&self) -> LatentWeights<'_> {
        LatentWeights::new(Weight::new(&self.ones), Weight::new(&self.ones))
    }

    /// The error of a pass.
    fn refused(&self, desc: LayerDesc, router: RouterWeights<'_>, experts: ExpertWeights<'_>) -> (Error, &'static str) {
        let Run { kernels, stream } = &self.run;
        let plan = desc.plan(T, kernels.device()).unwrap();
        let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
        let mut y = self.run.out::<f32>(T * H);
        let args = LayerArgs::new(&self.ones, &mut y);
        let weights = LayerWeights::new(router, experts);
        let error = plan.forward(kernels, stream, &weights, args, &mut workspace).unwrap_err();
        let argument = error.argument().unwrap();
        (error, argument)
    }
}

#[test]
fn weights_of_norms_and_projections() {
    let p = Problem::new();
    let router = RouterWeights::new(&p.ones);
    let norm = Some(RmsNorm::new(1e-5));
    let plain = Some(RmsNorm::new(1e-5).gain(Gain::One));
    let missing = |desc, router, experts| match p.refused(desc, router, experts) {
        (Error::Missing { .. }, argument) => argument,
        (error, _) => panic!("{error}"),
    };
    let layer = Problem::layer();
    assert_eq!(missing(layer.norms(Norms::new().router(norm)), router, p.experts()), "router.norm");
    assert_eq!(missing(layer.norms(Norms::new().experts(norm)), router, p.experts()), "norms.experts");
    assert_eq!(missing(layer.norms(Norms::new().slots(norm)), router, p.experts()), "norms.slots");
    assert_eq!(missing(layer.norms(Norms::new().output(norm)), router, p.experts()), "norms.output");
    let latent = LatentDesc::new(Dtype::F32, 8);
    assert_eq!(missing(layer.latent(Some(latent)), router, p.experts()), "latent");
    let with = p.experts().latent(p.latent());
    assert_eq!(missing(layer.latent(Some(latent.norm(norm))), router, with), "latent.norm");
    assert_eq!(missing(layer, RouterWeights::of_logits(), p.experts()), "router.matrix");

    let unexpected = |desc, router, experts| match p.refused(desc, router, experts) {
        (Error::Unexpected { .. }, argument) => argument,
        (error, _) => panic!("{error}"),
    };
    assert_eq!(unexpected(layer, router.norm(&p.ones), p.experts()), "router.norm");
    let gained = p.experts().norms(NormWeights::new().output(&p.ones));
    assert_eq!(unexpected(layer.norms(Norms::new().output(plain)), router, gained), "norms.output");
    assert_eq!(unexpected(layer, router, p.experts().latent(p.latent())), "latent");
}

#[test]
fn logits_that_are_given() {
    let p = Problem::new();
    let (layer, router) = (Problem::layer(), RouterWeights::new(&p.ones));
    let mut logits = p.run.out::<f32>(T * 4);
    let Run { kernels, stream } = &p.run;
    let plan = layer.plan(T, kernels.device()).unwrap();
    let mut workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
    let mut y = p.run.out::<f32>(T * H);
    let route = RouteArgs::new().given_logits(&p.ones).logits(&mut logits);
    let args = LayerArgs::new(&p.ones, &mut y).route(route);
    let weights = LayerWeights::new(router, p.experts());
    let error = plan.forward(kernels, stream, &weights, args, &mut workspace).unwrap_err();
    assert_eq!(error.argument(), Some("logits"), "{error}");
    // Nor has a router anything to look at.
    let args = LayerArgs::new(&p.ones, &mut y).router_x(&p.ones).route(RouteArgs::new().given_logits(&p.ones));
    let error = plan.forward(kernels, stream, &weights, args, &mut workspace).unwrap_err();
    assert_eq!(error.argument(), Some("router_x"), "{error}");
}

#[test]
fn what_does_not_go_together() {
    let p = Problem::new();
    let device = p.run.kernels.device();
    let gated = SharedDesc::new(8, Mlp::swiglu(Dtype::F32)).gated(true);
    let normed = Problem::layer().norms(Norms::new().router(Some(RmsNorm::new(0.0)))).shared(Some(gated));
    assert_eq!(normed.plan(T, device).unwrap_err().argument(), Some("norms.router"));
    let narrow = Problem::layer().latent(Some(LatentDesc::new(Dtype::F32, 0)));
    assert_eq!(narrow.plan(T, device).unwrap_err().argument(), Some("latent.width"));

    // Types say which tokens a bank has: no mask besides.
    let banks = BanksPlan::new(&[Problem::layer(); 2], T, IdFormat::I32, device).unwrap();
    let mut workspace = Workspace::new(&p.run.stream, banks.workspace_bytes()).unwrap();
    let (types, mut y) = (p.run.ints(&[0; T]), p.run.out::<f32>(T * H));
    let mask = p.run.stream.alloc_zeros::<u8>(T).unwrap();
    let routes = [RouteArgs::new(), RouteArgs::new().mask(TokenMask::padding(&mask))];
    let args = BanksArgs::new(&p.ones, &types, &mut y).routes(routes);
    let weights = LayerWeights::new(RouterWeights::new(&p.ones), p.experts());
    let error = banks.forward(p.run.kernels, &p.run.stream, [&weights; 2], args, &mut workspace).unwrap_err();
    assert_eq!(error.argument(), Some("routes.mask"), "{error}");

    // A sum is that with an addend, and f32 rows go to f32 buffers.
    let desc = RmsNormDesc::new(Dtype::Bf16, 1, 8, RmsNorm::new(0.0).gain(Gain::One));
    let x = p.run.put::<half::bf16>(&[1.0; 8]);
    let (mut y, mut sum) = (p.run.out::<half::bf16>(8), p.run.out::<half::bf16>(8));
    let args = RmsNormArgs::new(&x, &mut y).sum(&mut sum);
    let error = rms_norm::forward(p.run.kernels, &p.run.stream, &desc, args).unwrap_err();
    assert_eq!(error.argument(), Some("sum"), "{error}");
    let args = RmsNormArgs::new(&x, &mut y);
    let wide = desc.output(Dtype::F32);
    let error = rms_norm::forward(p.run.kernels, &p.run.stream, &wide, args).unwrap_err();
    assert!(matches!(error, Error::WrongDtype { argument: "y", .. }), "{error}");
}
