//! Checks of `gemm_*`.

use cudarc::driver::CudaView;
use half::{bf16, f16};
use moe_kernels::experts::gemm::{self, GemmArgs, GemmDesc, KernelSet, Output, Rows, SharedDepth, SharedRows};
use moe_kernels::experts::gemm_combine::{self, GemmCombineDesc, SumArgs};
use moe_kernels::experts::tiles::max_tiles;
use moe_kernels::experts::{SlotShape, Weight};
use moe_kernels::reference::activation::sigmoid;
use moe_kernels::reference::dispatch::{Dispatched as Plan, dispatch};
use moe_kernels::reference::gemm::ExpertMatrix;
use moe_kernels::registry::{Fold, Gemm, GemmHopper, GemmSwapped, Kernel};
use moe_kernels::rules::{Activation, Bound, Dropout, Glu, Layout, NoiseSource, Swiglu, WeightDesc, drop_below};
use moe_kernels::{Dtype, In, Kernels, Out, Workspace, reference};

use crate::dispatch::rule;
use crate::noise_state::State;
use crate::rows::Rows as Lists;
use crate::strides::{self, spread};
use crate::support::buffer::Guarded;
use crate::support::compare::{Arithmetic, Bounded, Storage, UNIT, assert_sums, rounding, to_f64, unit_roundoff};
use crate::support::device;
use crate::support::inputs::normals;
use crate::timing::time;
use crate::token_sums;

/// A kernel, and what it is tried with.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    pub kernel: Kernel,
    /// What the selection is asked for.
    pub kernels: KernelSet,
    pub dtype: Dtype,
    pub layout: Layout,
    /// Rows of a tile in the lists.
    pub tile_m: usize,
    /// Weight outputs of a tile, where the selection is asked for them.
    pub tile_n: Option<usize>,
    pub fold: Fold,
    /// Elements by which buffers begin behind 16 bytes.
    pub shift: usize,
    /// Whether it is launched for few multiprocessors, whose blocks walk many tiles.
    pub few: bool,
}

impl From<Gemm> for Variant {
    fn from(gemm: Gemm) -> Variant {
        let Gemm { dtype, tile, fold, layout } = gemm;
        let (kernel, kernels) = (Kernel::Gemm(gemm), KernelSet::Sm80);
        let (tile_m, tile_n) = (tile.bm as usize, Some(tile.bn as usize));
        Variant { kernel, kernels, dtype, layout, tile_m, tile_n, fold, shift: 0, few: false }
    }
}

impl From<GemmHopper> for Variant {
    fn from(gemm: GemmHopper) -> Variant {
        let GemmHopper { dtype, fold, layout } = gemm;
        let (kernel, kernels) = (Kernel::GemmHopper(gemm), KernelSet::Sm90a);
        Variant {
            kernel,
            kernels,
            dtype,
            layout,
            tile_m: GemmHopper::TILE.bm as usize,
            tile_n: None,
            fold,
            shift: 0,
            few: false,
        }
    }
}

impl From<GemmSwapped> for Variant {
    fn from(gemm: GemmSwapped) -> Variant {
        let GemmSwapped { dtype, fold, layout, .. } = gemm;
        let (kernel, kernels) = (Kernel::GemmSwapped(gemm), KernelSet::Fastest);
        Variant {
            kernel,
            kernels,
            dtype,
            layout,
            tile_m: GemmSwapped::TILE.bm as usize,
            tile_n: None,
            fold,
            shift: 0,
            few: false,
        }
    }
}

impl Variant {
    fn loaded(&self) -> &'static Kernels {
        if self.few { device::few() } else { device::kernels() }
    }

    /// Whether it adds up each token's rows too.
    fn combines(&self) -> bool {
        matches!(self.kernel, Kernel::GemmSwapped(GemmSwapped { combines: true, .. }))
    }

    fn is_swapped(&self) -> bool {
        matches!(self.kernel, Kernel::GemmSwapped(_))
    }

    fn workspace_bytes(&self, desc: &GemmDesc) -> usize {
        let device = self.loaded().device();
        let bytes = if self.combines() {
            gemm_combine::workspace_bytes(&GemmCombineDesc::new(*desc), device)
        } else {
            gemm::workspace_bytes(desc, device)
        };
        bytes.unwrap()
    }

    /// What is chosen for `desc`.
    fn selected(&self, desc: &GemmDesc) -> Kernel {
        let device = self.loaded().device();
        let selection = if self.combines() {
            gemm_combine::select(&GemmCombineDesc::new(*desc), device)
        } else {
            gemm::select(desc, device)
        };
        selection.unwrap().kernel.variant()
    }
}

pub fn check(variant: impl Into<Variant>, rng: &mut fastrand::Rng) {
    let variant = variant.into();
    match variant.dtype {
        Dtype::Bf16 => check_as::<bf16>(variant, rng),
        Dtype::F16 => check_as::<f16>(variant, rng),
        Dtype::F32 => check_as::<f32>(variant, rng),
        other => unreachable!("no kernel has {other}"),
    }
}

pub fn activations(fold: Fold) -> Vec<Activation> {
    let all = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::ReluSquared];
    match fold {
        Fold::Plain => [&[Activation::Identity][..], &all].concat(),
        Fold::Glu | Fold::Iglu => [&all[..], &SWIGLUS.map(Activation::Swiglu)].concat(),
    }
}

/// Every bound, alone and with others, low enough that values of unit scale meet it.
const SWIGLUS: [Swiglu; 5] = [
    Swiglu::clamped(0.75).alpha(1.702).offset(1.0),
    Swiglu::clamped(0.25).clamp_after(true).factor(-0.5),
    Swiglu::softcapped(0.75, 1.5),
    // A large cap: what cancels in its hyperbolic tangent would be seen.
    Swiglu::new().gate(Bound::Softcap(1e4)).up(Bound::Clamp(0.5)).alpha(0.5).offset(-1.0),
    Swiglu::new().up(Bound::Softcap(1e4)).factor(2.0).offset(0.25),
];

/// Numbers of a SwiGLU that an expert has in place of the descriptor's: alpha, bound of the gate, of the up value, offset.
fn of_expert(activation: Activation, [alpha, gate, up, offset]: [Option<f32>; 4]) -> Activation {
    let Activation::Swiglu(unit) = activation else { return activation };
    let bound = |bound, value: Option<f32>| match (bound, value) {
        (Bound::Clamp(_), Some(limit)) => Bound::Clamp(limit),
        (Bound::Softcap(_), Some(cap)) => Bound::Softcap(cap),
        (bound, _) => bound,
    };
    let unit = unit.alpha(alpha.unwrap_or(unit.alpha)).offset(offset.unwrap_or(unit.offset));
    unit.gate(bound(unit.gate, gate)).up(bound(unit.up, up)).into()
}

/// The forms of a weight that the variant takes.
pub fn forms(fold: Fold) -> &'static [Glu] {
    match fold {
        Fold::Plain => &[Glu::None],
        Fold::Glu => &[Glu::Split, Glu::UpFirst, Glu::Apart],
        Fold::Iglu => &[Glu::Interleaved],
    }
}

/// Rows of each expert for the grouped cases: none, one, a tile less one, a whole tile, a tile and one more.
fn loads(bm: usize) -> Vec<usize> {
    vec![bm, 0, 1, bm + 1, 0, bm - 1]
}

fn check_as<T: Storage>(variant: Variant, rng: &mut fastrand::Rng) {
    let bm = variant.tile_m;
    let forms = forms(variant.fold);
    let form = |index: usize| forms[index % forms.len()];
    let is_hopper = matches!(variant.kernel, Kernel::GemmHopper(_));
    for (index, activation) in activations(variant.fold).into_iter().enumerate() {
        // K: less than a stage, ragged, several stages; N: less than a tile, ragged, two tiles.
        let k = [40, 8, 200, 328, 72, 16, 24, 80, 8, 40][index];
        let wide = variant.tile_n.is_some_and(|columns| columns > 128);
        let n = [24, 72, 8, 136, 40, 8, 24, 16, 72, 8][index] * if wide && index % 2 == 1 { 2 } else { 1 };
        let (gather, bias) = (index % 2 == 0, index % 3 != 1);
        let (scale, out_scale) = (index % 2 == 0, index % 2 == 1);
        let case =
            Case { k, n, glu: form(index), activation, by_expert: true, gather, bias, scale, out_scale, once: false };
        grouped::<T>(variant, rng, &loads(bm), &case);
        // Every form with a bias and without, every activation with a factor of the result and without.
        // In a number of rows that is no multiple of the tile's.
        let rows = [1, bm - 1, bm + 5, 2 * bm + 5, 4 * bm + 5];
        if variant.combines() {
            continue;
        }
        dense::<T>(variant, rng, &rows, &Case { glu: form(index + 1), out_scale: !out_scale, ..case });
    }
    // The largest depth in use, some hundred stages: few rows and columns, so that it is cheap. On Hopper a quarter: a stage there is 256 columns.
    for (index, loads) in [[2, 0, 3].as_slice(), &[bm + 1]].into_iter().enumerate() {
        let activation = activations(variant.fold)[[0, 2][index]];
        let (glu, first) = (form(index + 1), index == 0);
        let case = Case {
            k: if is_hopper { 4096 } else { 16384 },
            n: 8,
            glu,
            activation,
            by_expert: true,
            gather: first,
            bias: !first,
            scale: first,
            out_scale: first,
            once: false,
        };
        grouped::<T>(variant, rng, loads, &case);
    }
    if is_hopper {
        // Lists of half tiles too; rows by number, and in order.
        for (tile_m, gather) in [(variant.tile_m, true), (variant.tile_m / 2, false)] {
            walk::<T>(Variant { tile_m, few: true, ..variant }, gather, rng);
        }
    }
    if variant.is_swapped() {
        parts::<T>(variant, rng);
    }
    // Few live rows in a tile: a main loop each, up to three quarters, a half and a quarter.
    let case = Case {
        k: 200,
        n: 72,
        glu: form(0),
        activation: activations(variant.fold)[0],
        by_expert: true,
        gather: true,
        bias: false,
        scale: false,
        out_scale: false,
        once: false,
    };
    let few = [bm / 2, bm / 4, bm / 2 + 1, bm / 4 + 1, bm - bm / 4, bm - bm / 4 + 1];
    grouped::<T>(variant, rng, &few.map(|rows| rows.max(1)), &case);
    // Nothing at all to do: no tile.
    grouped::<T>(variant, rng, &[0, 0, 0], &Case { k: 16, n: 16, ..case });
    if !variant.combines() {
        strides::check::<T>(variant, rng);
    }
    if variant.fold != Fold::Plain && variant.dtype != Dtype::F32 {
        beside_limits::<T>(variant, rng);
    }
    if matches!(variant.kernel, Kernel::Gemm(_)) && variant.fold == Fold::Plain {
        token_sums::check::<T>(variant, rng);
    }
    if matches!(variant.kernel, Kernel::Gemm(_)) && variant.fold != Fold::Plain {
        // A clamped SwiGLU whose numbers are the descriptor's has a loop of its own: over all rows of a tile.
        let activation = Activation::Swiglu(SWIGLUS[0]);
        grouped::<T>(variant, rng, &[1, bm], &Case { k: 40, activation, by_expert: false, ..case });
    }
}

/// Tiles whose depth blocks share, in parts of as many stages and not; tiles of up to 8 rows and more, of several columns; more than a band of them.
fn parts<T: Storage>(variant: Variant, rng: &mut fastrand::Rng) {
    let (glu, plain) = (forms(variant.fold)[0], activations(variant.fold)[0]);
    for (k, n, loads) in
        [(1032, 72, [9, 1, 0, 17, 8].as_slice()), (3072, 8, &[3, 16]), (2000, 136, &[1]), (72, 72, &[9; 11])]
    {
        // A clamped SwiGLU whose numbers are the descriptor's has a loop of its own.
        let clamped = glu.is_gated() && loads.len() == 11;
        let activation = if clamped { Activation::Swiglu(SWIGLUS[0]) } else { plain };
        let (gather, bias, scale, out_scale) = (n == 72, n == 136, k == 3072, k == 2000);
        let case = Case { k, n, glu, activation, by_expert: false, gather, bias, scale, out_scale, once: false };
        grouped::<T>(variant, rng, loads, &case);
    }
}

/// Products within a few roundings of the limits of gate and up value, which lie between two numbers of 16 bits, nearer to the upper one or to the
/// lower one: what is kept stays on its side.
fn beside_limits<T: Storage>(variant: Variant, rng: &mut fastrand::Rng) {
    let step = unit_roundoff(variant.dtype);
    let limit = |part: f64| Bound::Clamp((0.75 + part * step) as f32);
    // The limit of a clamp behind the SiLU, which the gate meets there.
    let behind = |part: f64| {
        let gate = 0.75 + part * step;
        Bound::Clamp((gate * sigmoid(gate)) as f32)
    };
    // With an offset of 1, both clamped alike have a loop of their own.
    let before = [[0.3, 0.3], [0.7, 0.7], [0.3, 0.7], [0.7, 0.3]]
        .map(|[gate, up]| Swiglu::new().gate(limit(gate)).up(limit(up)).offset(1.0));
    let after = [0.3, 0.7].map(|part| Swiglu::new().gate(behind(part)).clamp_after(true).up(limit(part)));
    for activation in before.into_iter().chain(after).map(Activation::Swiglu) {
        let (k, n, glu) = (8, 24, forms(variant.fold)[0]);
        let case = Case {
            k,
            n,
            glu,
            activation,
            by_expert: false,
            gather: false,
            bias: true,
            scale: false,
            out_scale: false,
            once: false,
        };
        let b = normals(rng, 2 * n * k, step * (k as f64).powf(-0.5));
        let bias = (0..2 * n).map(|_| T::from_f64(if rng.bool() { 0.75 } else { -0.75 })).collect();
        grouped_of::<T>(variant, rng, &[9], &case, Some(Values { b, bias: Some(bias) }));
    }
}

/// Clusters that walk several pairs of tiles, in three columns of which the last is narrow; the last pair is one tile.
fn walk<T: Storage>(variant: Variant, gather: bool, rng: &mut fastrand::Rng) {
    let n = if variant.fold == Fold::Plain { 2 * 256 + 8 } else { 2 * 128 + 8 };
    let (glu, activation) = (forms(variant.fold)[0], activations(variant.fold)[0]);
    let case = Case {
        k: 264,
        n,
        glu,
        activation,
        by_expert: true,
        gather,
        bias: false,
        scale: false,
        out_scale: false,
        once: false,
    };
    // A block that comes from the shared expert's bias has none here, but a scale, which goes the same way.
    grouped::<T>(variant, rng, &FEW_WALKED, &Case { scale: true, ..case });
    if gather {
        grouped::<T>(variant, rng, &many_walked(), &Case { k: 72, once: true, ..case });
    } else {
        // More row tiles of an expert than a band has; of a clamped SwiGLU whose numbers are the descriptor's, which ends in registers.
        let activation = if glu.is_gated() { Activation::Swiglu(SWIGLUS[0]) } else { Activation::Relu };
        let case = Case { k: 8, activation, by_expert: false, bias: true, once: true, ..case };
        grouped::<T>(variant, rng, &[1, 9 * variant.tile_m + 1], &case);
    }
}

/// Rows of experts with an odd number of tiles, of 128 rows or 64: most have one live row, some more than half of theirs; an expert of two tiles has a
/// pair of its own, or halves of two. For a depth of five stages, one more than slots.
pub const FEW_WALKED: [usize; 8] = [1, 129, 1, 66, 1, 1, 64, 2];

/// The same in more tiles of 128 rows than a window has.
pub fn many_walked() -> Vec<usize> {
    (0..32).map(|expert| [1, 1, 129, 2, 1, 1, 66, 1, 1, 1][expert % 10]).collect()
}

#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub k: usize,
    pub n: usize,
    pub glu: Glu,
    pub activation: Activation,
    /// Whether a SwiGLU may have numbers by expert.
    pub by_expert: bool,
    pub gather: bool,
    pub bias: bool,
    pub scale: bool,
    pub out_scale: bool,
    /// Whether one launch will do: nothing kept, no shared expert, no dropout.
    pub once: bool,
}

impl Case {
    pub fn desc(&self, variant: Variant, rows: Rows) -> GemmDesc {
        GemmDesc::new(variant.dtype, rows, self.n, self.k)
            .gather(self.gather && matches!(rows, Rows::Grouped(_)))
            .weight(WeightDesc::new(variant.dtype).layout(variant.layout).glu(self.glu))
            .activation(self.activation)
            .tile_n(variant.tile_n)
            .kernels(variant.kernels)
            .split(variant.is_swapped())
    }
}

/// `loads[e]` rows for expert `e`, spread over the tokens at random.
pub fn grouped<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, loads: &[usize], case: &Case) {
    grouped_of::<T>(variant, rng, loads, case, None);
}

/// The same of a weight of these values.
fn grouped_of<T: Storage>(
    variant: Variant,
    rng: &mut fastrand::Rng,
    loads: &[usize],
    case: &Case,
    values: Option<Values<T>>,
) {
    let experts = loads.len();
    let tile_m = variant.tile_m;
    let mut ids: Vec<i32> =
        loads.iter().enumerate().flat_map(|(expert, &load)| std::iter::repeat_n(expert as i32, load)).collect();
    // Skipped slots leave rows that no tile covers, whose junk must survive.
    ids.extend([-1; 5]);
    rng.shuffle(&mut ids);
    let tokens = ids.len();
    let plan = dispatch(&ids, &rule(experts, 1, tile_m)).unwrap();
    let shape = SlotShape::new(tokens, experts, Some(1), tokens, tile_m, max_tiles(tokens, experts, tile_m));
    run::<T>(variant, rng, &case.desc(variant, Rows::Grouped(shape)), case, &plan, values);
}

/// One expert for all rows, in one of these numbers, the first for which the selection takes the variant.
pub fn dense<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, rows: &[usize], case: &Case) {
    let desc = |rows| case.desc(variant, Rows::Dense(rows));
    let rows = rows.iter().copied().find(|&rows| variant.selected(&desc(rows)) == variant.kernel);
    let rows = rows.expect("some number of rows takes each variant");
    let plan = dispatch(&vec![0; rows], &rule(1, 1, variant.tile_m)).unwrap();
    run::<T>(variant, rng, &desc(rows), case, &plan, None);
}

/// Gate and up of each expert, out of a tensor that has gate's outputs first.
pub fn apart<T: Storage>(both: &[T], layout: Layout, outputs: usize, k: usize) -> [Vec<T>; 2] {
    // What lies together of either: a matrix, or a row of a matrix.
    let run = if layout == Layout::Nk { outputs * k } else { outputs };
    [0, 1].map(|part| both.chunks(run).skip(part).step_by(2).flatten().copied().collect())
}

/// `plan` says which rows go to which expert; dense rows have one of a single expert.
fn run<T: Storage>(
    variant: Variant,
    rng: &mut fastrand::Rng,
    desc: &GemmDesc,
    case: &Case,
    plan: &Plan,
    values: Option<Values<T>>,
) {
    let kernels = variant.loaded();
    let stream = device::stream();
    let Case { k, n, glu, activation, .. } = *case;
    let (rows, a_rows, experts, gather) = (desc.rows.count(), desc.a_rows(), desc.rows.experts(), desc.gather);
    let form = if matches!(desc.rows, Rows::Grouped(_)) { "grouped" } else { "dense" };
    let name = format!("{form} rows={rows} E={experts} {case:?}");
    let columns = if glu.is_gated() { 2 * n } else { n };
    let a: Vec<T> = normals(rng, a_rows * k, 1.0);
    let values = values.unwrap_or_else(|| Values::draw(rng, case, experts));
    let scale: Option<Vec<f32>> = case.scale.then(|| normals(rng, rows, 1.0));
    let out_scale: Option<Vec<f32>> = case.out_scale.then(|| normals(rng, rows, 1.0));
    let by_expert = if case.by_expert { ByExpert::draw(rng, activation, experts) } else { ByExpert::none() };
    let activations = by_expert.activations(activation, experts);

    let matrix = values.matrix(variant, case);
    let scale64 = scale.as_deref().map(to_f64);
    let live = plan.slot_token.len();
    let scale_live = scale64.as_ref().map(|scale| &scale[..live]);
    let a_live = if gather { &a[..] } else { &a[..live * k] };
    let grouped_gemm = reference::gemm::grouped_gemm_by_expert;
    let mut want = grouped_gemm(a_live, &matrix, plan, gather, scale_live, &activations).unwrap();
    let Products { before, sides, after: mut bounds } =
        products(a_live, &matrix, plan, gather, scale_live, &activations, arithmetic(variant.dtype));
    // The factor of the result, and its own rounding.
    for (i, (want, bound)) in want.iter_mut().zip(&mut bounds).enumerate() {
        let factor = out_scale.as_ref().map_or(1.0, |scale| f64::from(scale[i / n]));
        *want *= factor;
        *bound = *bound * factor.abs() + if case.out_scale { UNIT * want.abs() } else { 0.0 };
    }

    assert_eq!(variant.selected(desc), variant.kernel);
    // One for all launches: each leaves it as the next needs it.
    let mut workspace = Workspace::new(&stream, variant.workspace_bytes(desc)).unwrap();
    let a = Guarded::shifted_input(&stream, "a", &a, variant.shift);
    let weight = values.on_device(variant, case);
    let scale = scale.map(|values| Guarded::input(&stream, "row_scale", &values));
    let out_scale = out_scale.map(|values| Guarded::input(&stream, "out_scale", &values));
    let by_expert = by_expert.on_device();
    let dispatched = match &desc.rows {
        Rows::Grouped(shape) => Some(Lists::of(plan).dispatched(&stream, shape)),
        _ => None,
    };
    let output = |name, len| Guarded::filled_output(&stream, name, &vec![Guarded::<T>::junk(); len], variant.shift);
    let mut out = output("out", rows * n);
    let junk = out.read(&stream);
    let mut kept = output("pre_activation", rows * columns);
    let mut shared =
        (dispatched.is_some() && k < 1000 && !variant.combines()).then(|| Shared::<T>::new(variant, rng, case));
    // Without the shared expert's rows nothing is kept.
    let mut launch = |out: &mut Guarded<T>,
                      dropout: Option<(Dropout, &State)>,
                      more: Option<More<'_, T>>,
                      output: Output| {
        let (a, mut view, weight) = (a.view(), out.view_mut(), weight.views());
        let [scale, out_scale] = [&scale, &out_scale].map(|scale| scale.as_ref().map(Guarded::view));
        let (kept, shared) = more.unzip();
        let (mut desc, mut kept) = (*desc, kept.flatten().map(Guarded::view_mut));
        let mut shared = shared.and_then(Option::as_mut).map(|shared| {
            desc.shared_rows = shared.rows;
            desc.shared_activation = shared.activation;
            desc.shared_depth = shared.depth;
            desc.output = output;
            (shared.a.view(), shared.weight.views(), shared.out.view_mut(), shared.kept.view_mut())
        });
        assert_eq!(variant.selected(&desc), variant.kernel);
        let needed = variant.workspace_bytes(&desc);
        if workspace.bytes() < needed {
            workspace = Workspace::new(&stream, needed).unwrap();
        }
        let mut args = GemmArgs::new(&a, weight.weight(), &mut view).workspace(&mut workspace);
        let keeps = kept.is_some();
        args.pre_activation = kept.as_mut().map(Out::from);
        args.shared = shared.as_mut().map(|(a, weight, out, kept)| {
            let rows = SharedRows::new(&*a, weight.weight(), out);
            if keeps { rows.pre_activation(kept) } else { rows }
        });
        args.dispatched = dispatched.as_ref();
        let by_expert = by_expert.each_ref().map(|values| values.as_ref().map(Guarded::view));
        let [alpha, gate, up, offset] = by_expert.each_ref().map(|values| values.as_ref().map(In::from));
        args.swiglu.alpha = alpha;
        args.swiglu.gate = gate;
        args.swiglu.up = up;
        args.swiglu.offset = offset;
        args.row_scale = scale.as_ref().map(In::from);
        args.out_scale = out_scale.as_ref().map(In::from);
        args.dropout = dropout.map(|(dropout, _)| dropout);
        let state = dropout.and_then(|(_, state)| state.view());
        args.noise_state = state.as_ref().map(In::from);
        if !variant.combines() {
            return gemm::forward(kernels, &stream, &desc, args).unwrap();
        }
        let mut y = Guarded::output(&stream, "y", a_rows * n);
        let sum = GemmCombineDesc::new(desc);
        gemm_combine::forward(kernels, &stream, &sum, args, SumArgs::new(&mut y.view_mut())).unwrap();
        let (rows, y) = (to_f64(&out.read(&stream)), to_f64(&y.read(&stream)));
        for (y, &slot) in y.chunks(n).zip(&plan.token_slot) {
            let zeros = vec![0.0; n];
            assert_eq!(y, if slot < 0 { &zeros } else { &rows[slot as usize * n..][..n] }, "{name}: sum of one row");
        }
    };
    launch(&mut out, None, None, Output::Rounded);
    let first = out.read(&stream);
    assert_sums(&name, &to_f64(&first[..live * n]), &want, &bounds, variant.dtype);
    let same = bytemuck::cast_slice::<T, u8>(&first[live * n..]) == bytemuck::cast_slice::<T, u8>(&junk[live * n..]);
    assert!(same, "{name}: a row that no tile covers was written");
    a.assert_unchanged(&stream);
    weight.assert_unchanged();
    by_expert.iter().flatten().for_each(|values| values.assert_unchanged(&stream));
    time(&stream, &name, || launch(&mut out, None, None, Output::Rounded));
    if case.once {
        return;
    }
    out.reset(&stream);
    launch(&mut out, None, Some((Some(&mut kept), &mut shared)), Output::Rounded);
    let again = out.read(&stream);
    let same = bytemuck::cast_slice::<T, u8>(&again) == bytemuck::cast_slice::<T, u8>(&first);
    assert!(same, "{name}: another run, with more in the launch, gave other bits");
    let values = kept.read(&stream);
    assert_products(&format!("{name}: before the activation"), &values[..live * columns], &before, &sides);
    let untouched = bytemuck::cast_slice::<T, u8>(&values[live * columns..]).iter().all(|&byte| byte == 0xff);
    assert!(untouched, "{name}: before the activation: a row that no tile covers was written");
    shared.iter().for_each(|shared| shared.check(&name));
    if shared.is_some() {
        // Onto what is there: the shared expert's rows too.
        launch(&mut out, None, Some((Some(&mut kept), &mut shared)), Output::Added);
        shared.iter_mut().for_each(|shared| shared.check_added(&name));
    }
    if shared.is_some() && matches!(variant.kernel, Kernel::GemmHopper(_)) {
        // Nothing is kept: the shared expert's rows end in registers too, where their activation does.
        out.reset(&stream);
        shared.iter_mut().for_each(Shared::reset);
        launch(&mut out, None, Some((None, &mut shared)), Output::Rounded);
        let again = out.read(&stream);
        let same = bytemuck::cast_slice::<T, u8>(&again) == bytemuck::cast_slice::<T, u8>(&first);
        assert!(same, "{name}: beside a shared expert it gave other bits");
        shared.iter().for_each(|shared| shared.check_outputs(&name));
    }

    // The mask is the host's, exactly; what is kept is scaled before the one rounding.
    let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
    let dropout = Dropout::new([0.1, 0.4, 0.75][rng.usize(..3)], noise);
    let state = State::draw(rng);
    let noise = state.of(noise);
    reference::gemm::dropout(&mut want, dropout.probability, noise).unwrap();
    reference::gemm::dropout(&mut bounds, dropout.probability, noise).unwrap();
    // The scale is one more f32 product.
    bounds.iter_mut().zip(&want).for_each(|(bound, w)| *bound += UNIT * w.abs());
    out.reset(&stream);
    kept.reset(&stream);
    shared.iter_mut().for_each(Shared::reset);
    let more = rng.bool();
    launch(&mut out, Some((dropout, &state)), more.then_some((Some(&mut kept), &mut shared)), Output::Rounded);
    if more {
        // Nothing is dropped of them.
        assert_products(
            &format!("{name}: before the activation and dropout"),
            &kept.read(&stream)[..live * columns],
            &before,
            &sides,
        );
        shared.iter().for_each(|shared| shared.check(&format!("{name} {dropout:?}")));
    }
    state.assert_unchanged();
    let got = out.read(&stream);
    let name = format!("{name} {dropout:?} {state:?}");
    assert_sums(&name, &to_f64(&got[..live * n]), &want, &bounds, variant.dtype);
    let below = drop_below(dropout.probability);
    for (i, value) in to_f64(&got[..live * n]).into_iter().enumerate() {
        let kept = noise.dropout_word(i as u64) >= below;
        assert!(kept || value == 0.0, "{name}: output {i} is {value}, dropped");
        // ReLU makes zeros of its own, and so does the type of what is smaller than its numbers.
        assert!(
            !kept || value != 0.0 || want[i].abs() <= bounds[i] + rounding(variant.dtype, 0.0),
            "{name}: output {i} is 0, not dropped"
        );
    }
    let same = bytemuck::cast_slice::<T, u8>(&got[live * n..]) == bytemuck::cast_slice::<T, u8>(&junk[live * n..]);
    assert!(same, "{name}: a row that no tile covers was written");
    if variant.is_swapped() && !variant.combines() && k == 200 {
        // Behind a launch that writes other outputs to the same place: this one may begin before that has ended.
        launch(&mut out, Some((dropout, &state)), None, Output::Rounded);
        launch(&mut out, None, None, Output::Rounded);
        let last = out.read(&stream);
        let same = bytemuck::cast_slice::<T, u8>(&last) == bytemuck::cast_slice::<T, u8>(&first);
        assert!(same, "{name}: behind another launch it gave other bits");
    }
}

pub fn arithmetic(dtype: Dtype) -> Arithmetic {
    if dtype == Dtype::F32 { Arithmetic::Tf32x3 } else { Arithmetic::Mma16 }
}

/// Expected products, and by how much each may be off before it is rounded.
pub struct Products {
    /// Before the activation: `[rows, N]`, or `[rows, 2N]` with gates first.
    pub before: Vec<Bounded>,
    /// Clamps of these.
    pub sides: Vec<Side>,
    /// Bounds of the outputs `[rows, N]`.
    pub after: Vec<f64>,
}

/// Where a value's slope jumps: 16 bits do not round across it.
#[derive(Clone, Copy)]
pub enum Side {
    None,
    /// A gate's clamp.
    Above(f64),
    /// An up value's.
    Beyond(f64),
    /// A gate's behind its SiLU of this steepness.
    Behind(f64, f64),
}

impl Side {
    fn of(activation: Activation, is_up: bool) -> Side {
        let Activation::Swiglu(unit) = activation else { return Side::None };
        match (if is_up { unit.up } else { unit.gate }, is_up) {
            (Bound::Clamp(limit), true) => Side::Beyond(limit.into()),
            (Bound::Clamp(limit), false) if unit.clamp_after => Side::Behind(limit.into(), unit.alpha.into()),
            (Bound::Clamp(limit), false) => Side::Above(limit.into()),
            _ => Side::None,
        }
    }

    /// What is compared with the limit, and the limit.
    fn measured(self, value: f64) -> Option<[f64; 2]> {
        match self {
            Side::None => None,
            Side::Above(limit) => Some([value, limit]),
            Side::Beyond(limit) => Some([value.abs(), limit]),
            Side::Behind(limit, alpha) => Some([value * sigmoid(alpha * value), limit]),
        }
    }

    /// Asserts that `got` is on the side of `want`, and says whether it may be the neighbour of what `want` is rounded to.
    fn check(self, name: &str, got: f64, want: Bounded, dtype: Dtype) -> bool {
        let Some([value, limit]) = self.measured(want.value).filter(|[value, _]| value.is_finite()) else {
            return false;
        };
        let near = (value - limit).abs();
        // Of a slope of at most 1.1, and of the threshold behind a SiLU.
        if near > 1.1 * want.error + 1e-5 * limit && dtype != Dtype::F32 {
            let [got, _] = self.measured(got).unwrap();
            assert_eq!(got > limit, value > limit, "{name}: {} is kept across the limit {limit}, as {got}", want.value);
        }
        near <= 4.0 * unit_roundoff(dtype) * limit + 1.1 * want.error
    }
}

/// Each product's bound, carried through scale, bias and activation.
pub fn products<T: Storage>(
    a: &[T],
    matrix: &ExpertMatrix<T>,
    plan: &Plan,
    gather: bool,
    scale: Option<&[f64]>,
    activations: &[Activation],
    arithmetic: Arithmetic,
) -> Products {
    let (columns, n) = (matrix.weight_rows(), matrix.n);
    let plain = |a: &[f64], weight: &[f64], bias: Option<&[f64]>, scale: Option<&[f64]>| {
        let plain = ExpertMatrix { weight, bias, n: columns, k: matrix.k, glu: Glu::None, layout: matrix.layout };
        reference::gemm::grouped_gemm(a, &plain, plan, gather, scale, Activation::Identity).unwrap()
    };
    let (a, weight, bias) = (to_f64(a), to_f64(matrix.weight), matrix.bias.map(to_f64));
    let of = |values: &[f64], f: fn(f64) -> f64| values.iter().map(|&value| f(value)).collect::<Vec<_>>();
    let sums = plain(&a, &weight, bias.as_deref(), scale);
    let products = plain(&a, &weight, None, None);
    let magnitudes = plain(&of(&a, f64::abs), &of(&weight, f64::abs), None, None);
    let squares = plain(&of(&a, |v| v * v), &of(&weight, |v| v * v), None, None);
    let at = |i: usize| {
        let error = arithmetic.sum_bound(matrix.k, products[i], magnitudes[i], squares[i].sqrt());
        Bounded { value: sums[i], error }.scaled(scale.map_or(1.0, |scale| scale[i / columns]))
    };
    let (mut before, mut sides, mut after) = (vec![], vec![], vec![]);
    let experts = (0..).zip(&plan.counts).flat_map(|(e, &count)| std::iter::repeat_n(e, count as usize));
    for (row, expert) in experts.enumerate().map(|(row, expert): (usize, usize)| (row * columns, expert)) {
        let gate_and_up = |c: usize| match matrix.glu {
            Glu::None => (at(row + c), None),
            Glu::Split | Glu::Apart => (at(row + c), Some(at(row + n + c))),
            Glu::UpFirst => (at(row + n + c), Some(at(row + c))),
            Glu::Interleaved => (at(row + 2 * c), Some(at(row + 2 * c + 1))),
            other => unreachable!("no case has {other:?}"),
        };
        let pairs: Vec<(Bounded, Option<Bounded>)> = (0..n).map(gate_and_up).collect();
        before.extend(pairs.iter().map(|(gate, _)| *gate));
        before.extend(pairs.iter().filter_map(|(_, up)| *up));
        let gated = pairs.iter().filter(|(_, up)| up.is_some()).count();
        sides.extend(pairs.iter().map(|_| Side::of(activations[expert], false)));
        sides.extend(pairs[..gated].iter().map(|_| Side::of(activations[expert], true)));
        after.extend(pairs.iter().map(|&(gate, up)| Bounded::activated(activations[expert], gate, up).error));
    }
    Products { before, sides, after }
}

fn assert_products<T: Storage>(name: &str, got: &[T], want: &[Bounded], sides: &[Side]) {
    let values: Vec<f64> = want.iter().map(|want| want.value).collect();
    let all = got.iter().zip(want).zip(sides);
    let bounds: Vec<f64> = all
        .map(|((&got, want), side)| {
            let beside = side.check(name, got.into(), *want, T::DTYPE);
            want.error + if beside { 2.0 * unit_roundoff(T::DTYPE) * want.value.abs() } else { 0.0 }
        })
        .collect();
    assert_sums(name, &to_f64(got), &values, &bounds, T::DTYPE);
}

/// Numbers of a SwiGLU by expert, where they are given: alpha, bounds of gate and up value, offset.
pub struct ByExpert([Option<Vec<f32>>; 4]);

impl ByExpert {
    pub fn none() -> ByExpert {
        ByExpert([const { None }; 4])
    }

    /// Each or none of them, for a SwiGLU that takes it.
    pub fn draw(rng: &mut fastrand::Rng, activation: Activation, experts: usize) -> ByExpert {
        let Activation::Swiglu(unit) = activation else { return ByExpert::none() };
        let bounded = |bound| bound != Bound::None;
        let takes = [true, bounded(unit.gate), bounded(unit.up), true];
        ByExpert(takes.map(|takes| {
            (takes && rng.bool()).then(|| (0..experts).map(|_| 0.25 + 1.5 * rng.f32()).collect::<Vec<f32>>())
        }))
    }

    pub fn activations(&self, activation: Activation, experts: usize) -> Vec<Activation> {
        let of = |expert: usize| self.0.each_ref().map(|values| values.as_ref().map(|values| values[expert]));
        (0..experts).map(|expert| of_expert(activation, of(expert))).collect()
    }

    pub fn on_device(&self) -> [Option<Guarded<f32>>; 4] {
        let input = |values: &Vec<f32>| Guarded::input(&device::stream(), "swiglu", values);
        self.0.each_ref().map(|values| values.as_ref().map(input))
    }
}

/// A weight of `experts` matrices, and its bias.
pub struct Values<T> {
    pub b: Vec<T>,
    pub bias: Option<Vec<T>>,
}

impl<T: Storage> Values<T> {
    /// For products of unit scale.
    pub fn draw(rng: &mut fastrand::Rng, case: &Case, experts: usize) -> Values<T> {
        let columns = experts * if case.glu.is_gated() { 2 * case.n } else { case.n };
        Values {
            b: normals(rng, columns * case.k, (case.k as f64).powf(-0.5)),
            bias: case.bias.then(|| normals(rng, columns, 1.0)),
        }
    }

    pub fn matrix(&self, variant: Variant, case: &Case) -> ExpertMatrix<'_, T> {
        let Case { k, n, glu, .. } = *case;
        ExpertMatrix { weight: &self.b, bias: self.bias.as_deref(), n, k, glu, layout: variant.layout }
    }

    fn on_device(&self, variant: Variant, case: &Case) -> OnDevice<T> {
        let Case { k, n, .. } = *case;
        let input =
            |name| move |values: &Vec<T>| Guarded::shifted_input(&device::stream(), name, values, variant.shift);
        let parts = |values: &Vec<T>, layout, depth| match case.glu {
            Glu::Apart => apart(values, layout, n, depth).to_vec(),
            _ => vec![values.clone()],
        };
        let biases = self.bias.as_ref().map_or(vec![], |bias| parts(bias, Layout::Nk, 1));
        OnDevice {
            weights: parts(&self.b, variant.layout, k).iter().map(input("weight")).collect(),
            biases: biases.iter().map(input("bias")).collect(),
        }
    }
}

/// A weight in one tensor, or gate and up each in its own.
pub struct OnDevice<T> {
    weights: Vec<Guarded<T>>,
    biases: Vec<Guarded<T>>,
}

pub struct Views<'a, T> {
    weights: Vec<CudaView<'a, T>>,
    biases: Vec<CudaView<'a, T>>,
}

impl<T: Storage> OnDevice<T> {
    fn views(&self) -> Views<'_, T> {
        let [weights, biases] = [&self.weights, &self.biases].map(|all| all.iter().map(Guarded::view).collect());
        Views { weights, biases }
    }

    fn assert_unchanged(&self) {
        self.weights.iter().chain(&self.biases).for_each(|input| input.assert_unchanged(&device::stream()));
    }
}

impl<T: Storage> Views<'_, T> {
    fn weight(&self) -> Weight<'_> {
        let weight = match self.weights.as_slice() {
            [gate, up] => Weight::apart(gate, up),
            all => Weight::new(&all[0]),
        };
        self.biases.iter().enumerate().fold(
            weight,
            |weight, (index, bias)| {
                if index == 0 { weight.bias(bias) } else { weight.up_bias(bias) }
            },
        )
    }
}

/// What a launch may have besides: the rows before the activation, kept here, and a shared expert's.
type More<'a, T> = (Option<&'a mut Guarded<T>>, &'a mut Option<Shared<T>>);

/// Rows of a shared expert, neither scaled nor dropped, of a weight like the others', with their activation or another.
struct Shared<T> {
    rows: usize,
    depth: Option<SharedDepth>,
    /// What `check` has found there.
    found: std::cell::RefCell<Vec<f64>>,
    activation: Option<Activation>,
    a: Guarded<T>,
    weight: OnDevice<T>,
    out: Guarded<T>,
    kept: Guarded<T>,
    want: Vec<f64>,
    products: Products,
}

impl<T: Storage> Shared<T> {
    /// One row, or a tile and one more.
    fn new(variant: Variant, rng: &mut fastrand::Rng, case: &Case) -> Shared<T> {
        let stream = device::stream();
        let rows = [1, variant.tile_m + 1][rng.usize(..2)];
        // Where the kernel can, of another depth, rows apart.
        let depth = (!variant.is_swapped() && rng.bool()).then(|| {
            let unit = if matches!(variant.kernel, Kernel::GemmAny(_)) { 1 } else { 8 };
            let k = unit * (1 + rng.usize(..200 / unit));
            SharedDepth::new(k).a_row(k + unit * rng.usize(..3))
        });
        // On Hopper a bias beside rows without one, and none beside a bias: a block goes from one to the other.
        let bias = case.bias != matches!(variant.kernel, Kernel::GemmHopper(_));
        let case = &Case { k: depth.map_or(case.k, |depth| depth.k), bias, ..*case };
        let (a, values): (Vec<T>, _) = (normals(rng, rows * case.k, 1.0), Values::draw(rng, case, 1));
        let a_row = depth.map_or(case.k, |depth| depth.a_row);
        let apart = spread(&a, [1, rows, case.k], [0, a_row, 1], T::from_f64(f64::NAN));
        let plan = dispatch(&vec![0; rows], &rule(1, 1, 16)).unwrap();
        let matrix = values.matrix(variant, case);
        let others = activations(variant.fold);
        // Of a SwiGLU nearly always another, whose numbers are not those of the routed rows.
        let another = rng.u8(..8) < if matches!(case.activation, Activation::Swiglu(_)) { 7 } else { 4 };
        // A walk has the others', which ends in registers.
        let own = (another && !variant.few).then(|| others[rng.usize(..others.len())]);
        let activation = own.unwrap_or(case.activation);
        let want = reference::gemm::grouped_gemm(&a, &matrix, &plan, false, None, activation).unwrap();
        let products = products(&a, &matrix, &plan, false, None, &[activation], arithmetic(variant.dtype));
        Shared {
            rows,
            depth,
            found: vec![].into(),
            activation: own,
            a: Guarded::input(&stream, "shared.a", &apart),
            weight: values.on_device(variant, case),
            out: Guarded::output(&stream, "shared.out", want.len()),
            kept: Guarded::output(&stream, "shared.pre_activation", products.before.len()),
            want,
            products,
        }
    }

    fn reset(&mut self) {
        [&mut self.out, &mut self.kept].into_iter().for_each(|buffer| buffer.reset(&device::stream()));
    }

    /// After a launch onto what [`Shared::check`] has found.
    fn check_added(&self, name: &str) {
        let got = to_f64(&self.out.read(&device::stream()));
        let before = self.found.borrow();
        let want: Vec<f64> = before.iter().zip(&self.want).map(|(before, want)| before + want).collect();
        let bounds: Vec<f64> =
            want.iter().zip(&self.products.after).map(|(sum, bound)| bound + UNIT * (sum.abs() + bound)).collect();
        assert_sums(&format!("{name}: shared expert, twice"), &got, &want, &bounds, T::DTYPE);
    }

    fn check_outputs(&self, name: &str) {
        let (name, out) = (format!("{name}: shared expert"), to_f64(&self.out.read(&device::stream())));
        assert_sums(&name, &out, &self.want, &self.products.after, T::DTYPE);
        *self.found.borrow_mut() = out;
    }

    fn check(&self, name: &str) {
        self.check_outputs(name);
        let (stream, name) = (device::stream(), format!("{name}: shared expert"));
        assert_products(
            &format!("{name}, before the activation"),
            &self.kept.read(&stream),
            &self.products.before,
            &self.products.sides,
        );
        self.a.assert_unchanged(&stream);
        self.weight.assert_unchanged();
    }
}
