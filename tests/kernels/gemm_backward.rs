//! Checks of `gemm_backward_*`: the product, every function, bound and order against the reference, whose own tests are finite differences.

use half::{bf16, f16};
use moe_kernels::experts::SlotShape;
use moe_kernels::experts::gemm::{KernelSet, Rows};
use moe_kernels::experts::gemm_backward::{self, GemmBackwardArgs, GemmBackwardDesc, SharedRowsBackward};
use moe_kernels::experts::tiles::max_tiles;
use moe_kernels::reference::activation::{activate, activate_glu};
use moe_kernels::reference::choice_backward::sigmoid_gate;
use moe_kernels::reference::dispatch::{Dispatched as Plan, dispatch};
use moe_kernels::reference::gemm_backward::{HiddenBackward, HiddenGradients, hidden_backward, product_backward};
use moe_kernels::registry::{Gemm, GemmAny, GemmHopper, Kernel};
use moe_kernels::rules::{Activation, Bound, Dropout, Glu, Layout, NoiseSource, Swiglu, WeightDesc};
use moe_kernels::{Dtype, In, Kernels, Out, Workspace, reference};

use crate::dispatch::rule;
use crate::gemm::{ByExpert, FEW_WALKED, arithmetic, many_walked};
use crate::noise_state::State;
use crate::rows::Rows as Lists;
use crate::support::buffer::Guarded;
use crate::support::compare::{ACTIVATION_GRADIENT, Storage, UNIT, rounding, to_f64};
use crate::support::device;
use crate::support::inputs::{normal, normals};
use crate::timing::time;

/// A kernel, and what it is tried with.
#[derive(Clone, Copy, Debug)]
struct Variant {
    kernel: Kernel,
    dtype: Dtype,
    /// Of the forward product.
    layout: Layout,
    tile_m: usize,
    kernels: KernelSet,
    /// Elements by which buffers begin behind 16 bytes.
    shift: usize,
    /// Whether it is launched for few multiprocessors, whose blocks walk many tiles.
    few: bool,
}

impl Variant {
    fn loaded(&self) -> &'static Kernels {
        if self.few { device::few() } else { device::kernels() }
    }
}

pub fn check(gemm: Gemm, rng: &mut fastrand::Rng) {
    let layout = if gemm.layout == Layout::Nk { Layout::Kn } else { Layout::Nk };
    let (dtype, tile_m, shift) = (gemm.dtype, gemm.tile.bm as usize, 0);
    let variant = Variant {
        kernel: Kernel::GemmBackward(gemm),
        dtype,
        layout,
        tile_m,
        kernels: KernelSet::Sm80,
        shift,
        few: false,
    };
    in_type(&|_| variant, dtype, rng);
}

pub fn check_hopper(gemm: GemmHopper, rng: &mut fastrand::Rng) {
    let layout = if gemm.layout == Layout::Nk { Layout::Kn } else { Layout::Nk };
    let (kernel, kernels) = (Kernel::GemmBackwardHopper(gemm), KernelSet::Sm90a);
    let tile_m = GemmHopper::TILE.bm as usize;
    let variant = Variant { kernel, dtype: gemm.dtype, layout, tile_m, kernels, shift: 0, few: false };
    in_type(&|_| variant, gemm.dtype, rng);
}

pub fn check_any(gemm: GemmAny, rng: &mut fastrand::Rng) {
    let variant = |index: usize| Variant {
        kernel: Kernel::GemmBackwardAny(gemm),
        dtype: gemm.dtype,
        layout: Layout::ALL[index % 2],
        // A block has 64 rows: lists of lower tiles, of its own, and of higher ones, whose last part may be empty.
        tile_m: [16, 64, 128][index % 3],
        kernels: KernelSet::Fastest,
        shift: [1, 3, 0, 5, 2][index % 5],
        few: false,
    };
    in_type(&variant, gemm.dtype, rng);
}

fn in_type(variant: &dyn Fn(usize) -> Variant, dtype: Dtype, rng: &mut fastrand::Rng) {
    match dtype {
        Dtype::Bf16 => check_as::<bf16>(variant, rng),
        Dtype::F16 => check_as::<f16>(variant, rng),
        Dtype::F32 => check_as::<f32>(variant, rng),
        other => unreachable!("no kernel of {other}"),
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    k: usize,
    n: usize,
    glu: Glu,
    activation: Activation,
    gather: bool,
    gather_pre_activation: bool,
    bias: bool,
    weighted: bool,
    /// Whether weights are logits of a gate.
    gate: bool,
    scale: f32,
    /// Hidden rows are asked for; sums are.
    wants: [bool; 2],
    dropout: bool,
}

/// Clamped before the SiLU by 16 bytes; all else column by column.
const SWIGLUS: [Swiglu; 8] = [
    Swiglu::new(),
    Swiglu::GPT_OSS.gate(Bound::Clamp(1.5)).up(Bound::Clamp(1.25)),
    Swiglu::new().up(Bound::Clamp(0.75)).alpha(0.5).factor(-2.0),
    Swiglu::clamped(0.75).clamp_after(true).factor(-2.0),
    Swiglu::softcapped(2.0, 3.0),
    Swiglu::new().up(Bound::Softcap(1.5)).alpha(0.5).offset(0.25),
    // Each bound of the gate beside a bound of the up value that is not of its kind.
    Swiglu::new().gate(Bound::Softcap(1.5)).alpha(2.0),
    Swiglu::new().gate(Bound::Clamp(1.0)).up(Bound::Softcap(2.5)).offset(0.5),
];

/// The next of them, whose bounds of the gate are of another kind.
fn after(unit: Swiglu) -> Swiglu {
    let at = SWIGLUS.iter().position(|&one| one == unit).expect("one of these");
    SWIGLUS[(at + 1) % SWIGLUS.len()]
}

fn check_as<T: Storage>(variant: &dyn Fn(usize) -> Variant, rng: &mut fastrand::Rng) {
    let plain = [Activation::Relu, Activation::ReluSquared, Activation::Gelu, Activation::GeluTanh, Activation::Silu];
    let gated = [[Activation::Silu; 1].as_slice(), &SWIGLUS.map(Activation::from), &plain[..4]].concat();
    let alone = [&[Activation::Identity][..], &plain].concat();
    let all: Vec<(Activation, bool)> =
        gated.into_iter().map(|a| (a, true)).chain(alone.into_iter().map(|a| (a, false))).collect();
    let forms = [Glu::Split, Glu::Interleaved, Glu::UpFirst, Glu::Apart];
    for (index, &(activation, gated)) in all.iter().enumerate() {
        let variant = variant(index);
        let any = matches!(variant.kernel, Kernel::GemmBackwardAny(_));
        let is_hopper = matches!(variant.kernel, Kernel::GemmBackwardHopper(_));
        // K: less than a stage, ragged, several stages; N: less than a tile, ragged, two tiles, three.
        let (k, n) = if any {
            ([37, 8, 136, 65, 100][index % 5], [13, 70, 1, 129, 12][index % 5])
        } else {
            ([40, 8, 200, 72, 16, 264][index % 6], [24, 136, 8, 272, if is_hopper { 520 } else { 72 }][index % 5])
        };
        let case = Case {
            k,
            n,
            glu: if gated { forms[index % 4] } else { Glu::None },
            activation,
            gather: index % 2 == 0,
            gather_pre_activation: index % 5 == 1,
            bias: index % 3 != 1,
            weighted: index % 4 != 3,
            gate: index % 5 >= 2,
            scale: [1.0, -0.75, 2.5][index % 3],
            wants: [index % 4 != 2, index % 6 != 4],
            dropout: index % 3 == 2,
        };
        let bm = variant.tile_m;
        grouped::<T>(variant, rng, &[bm, 0, 1, bm + 1, 0, bm - 1], &case);
        dense::<T>(
            variant,
            rng,
            &Case { dropout: false, glu: if gated { forms[(index + 1) % 4] } else { Glu::None }, ..case },
        );
    }
    let variant = variant(0);
    let case = Case {
        k: 16,
        n: 264,
        glu: Glu::Split,
        activation: Activation::Silu,
        gather: true,
        gather_pre_activation: false,
        bias: true,
        weighted: true,
        gate: false,
        scale: 1.0,
        wants: [true; 2],
        dropout: false,
    };
    // All rows in one expert; none at all.
    grouped::<T>(variant, rng, &[0, 2 * variant.tile_m + 3, 0], &case);
    grouped::<T>(variant, rng, &[0, 0], &case);
    if matches!(variant.kernel, Kernel::GemmBackward(_)) {
        // Few live rows in a tile: a main loop each, up to three quarters, a half and a quarter.
        let bm = variant.tile_m;
        let few = [bm / 2, bm / 4, bm / 2 + 1, bm / 4 + 1, bm - bm / 4, bm - bm / 4 + 1];
        grouped::<T>(variant, rng, &few, &Case { k: 72, n: 24, ..case });
        // Whole stages. The last token and the last output each in every copy of each main loop: what is past the depth is past the end.
        for rows in (1..=4).map(|quarters| bm * quarters / 4) {
            for last in (15..rows).step_by(16) {
                last_token_at::<T>(variant, rng, rows, last, &Case { k: 192, n: last + 1, ..case });
            }
        }
    }
    if !matches!(variant.kernel, Kernel::GemmBackwardHopper(_)) {
        for n in [24, 264] {
            onto_what_there_is::<T>(&variant, rng, n);
        }
    }
    if matches!(variant.kernel, Kernel::GemmBackwardHopper(_)) {
        // Deep: each slot is filled again while products read the one behind it.
        grouped::<T>(variant, rng, &[2, variant.tile_m + 1], &Case { k: 13 * 64 + 8, n: 8, ..case });
        // Lists of half tiles too; rows by number, and in order.
        for (tile_m, gather) in [(variant.tile_m, true), (variant.tile_m / 2, false)] {
            walk::<T>(Variant { tile_m, few: true, ..variant }, rng, &Case { gather, gate: !gather, ..case });
        }
    }
}

/// Added to what lies there, of rows of gradients apart, as a weight of two tensors goes back: what is written otherwise, and one addition.
fn onto_what_there_is<T: Storage>(variant: &Variant, rng: &mut fastrand::Rng, n: usize) {
    let (kernels, stream) = (device::kernels(), device::stream());
    let (k, apart, bm, shared_rows) = (72, [144, 80], variant.tile_m, 9);
    let mut ids: Vec<i32> =
        [bm + 1, 0, 3].iter().zip(0..).flat_map(|(&load, e)| std::iter::repeat_n(e, load)).collect();
    ids.extend([-1; 5]);
    rng.shuffle(&mut ids);
    let rows = ids.len();
    let plan = dispatch(&ids, &rule(3, 1, bm)).unwrap();
    let shape = SlotShape::new(rows, 3, Some(1), rows, bm, max_tiles(rows, 3, bm));
    let lists = Lists::of(&plan).dispatched(&stream, &shape);
    let desc = GemmBackwardDesc::new(variant.dtype, Rows::Grouped(shape), n, k, Activation::Identity)
        .weight(WeightDesc::new(variant.dtype).layout(variant.layout))
        .glu(Glu::None)
        .gather_pre_activation(true)
        .shared_rows(shared_rows)
        .scale(-0.75)
        .kernels(variant.kernels)
        .unaligned(variant.shift > 0);
    let name = format!("{} onto what there is: {desc:?}", variant.kernel.name());
    // Rows of gradients side by side, and the same with something between them.
    let spread = |packed: &[T], row: usize| -> Vec<T> {
        let fill = vec![T::from_f64(f64::NAN); row - k];
        packed.chunks(k).flat_map(|values| [values, &fill[..]].concat()).collect()
    };
    let a = [rows, shared_rows].map(|rows| normals::<T>(rng, rows * k, 1.0));
    let wide = [0, 1].map(|of| spread(&a[of], apart[of]));
    let upload = |values: &[T]| stream.clone_htod(values).unwrap();
    let (a, wide) = (a.each_ref().map(|a| upload(a)), wide.each_ref().map(|a| upload(a)));
    let weights = [3, 1].map(|experts| upload(&normals::<T>(rng, experts * k * n, 0.1)));
    let z = [rows, shared_rows].map(|rows| upload(&normals::<T>(rng, rows * n, 1.0)));
    let of_rows: Vec<f32> = (0..rows).map(|_| rng.f32()).collect();
    let of_rows = stream.clone_htod(&of_rows).unwrap();
    let held = [rows, shared_rows].map(|rows| normals::<T>(rng, rows * n, 1.0));
    let held_sums: Vec<f32> = (0..rows).map(|_| normal(rng) as f32).collect();
    let launch = |a: &[cudarc::driver::CudaSlice<T>; 2], desc: &GemmBackwardDesc| {
        assert_eq!(gemm_backward::select(desc, kernels.device()).unwrap().kernel, variant.kernel.into());
        let mut out = [0, 1].map(|of| Guarded::filled_output(&stream, "d_pre_activation", &held[of], 0));
        let mut sums = Guarded::filled_output(&stream, "d_slot_weight", &held_sums, 0);
        let bytes = gemm_backward::workspace_bytes(desc, kernels.device()).unwrap();
        let mut workspace = Workspace::new(&stream, bytes).unwrap();
        {
            let [own, of_shared] = &mut out.each_mut().map(Guarded::view_mut);
            let mut to_sums = sums.view_mut();
            let mut args = GemmBackwardArgs::<T>::new(&a[0], &weights[0], &z[0], own)
                .dispatched(&lists)
                .slot_weight(&of_rows)
                .d_slot_weight(&mut to_sums);
            args.shared = Some(SharedRowsBackward::new(&a[1], &weights[1], &z[1], of_shared));
            gemm_backward::forward(kernels, &stream, desc, args, &mut workspace).unwrap();
        }
        (out.map(|out| out.read(&stream)), sums.read(&stream))
    };
    let written = launch(&a, &desc);
    assert!(launch(&wide, &desc.a_rows_apart(Some(apart))) == written, "{name}: rows apart");
    let (added, sums) = launch(&wide, &desc.a_rows_apart(Some(apart)).accumulate(true));
    let live = *plan.offsets.last().unwrap() as usize;
    for r in 0..rows {
        let want = if r < live { held_sums[r] + written.1[r] } else { held_sums[r] };
        assert_eq!(sums[r].to_bits(), want.to_bits(), "{name}: sum of row {r}");
    }
    for (of, live) in [live, shared_rows].into_iter().enumerate() {
        for i in 0..held[of].len() {
            let [got, before, alone] = [&added[of][i], &held[of][i], &written.0[of][i]].map(|&v| Into::<f64>::into(v));
            if i / n >= live {
                assert_eq!(got, before, "{name}: row {} is not to be written", i / n);
                continue;
            }
            // The sum is rounded once, what is written alone by itself; two values of f32 are exact.
            let want = before + alone;
            let bound = match T::DTYPE {
                Dtype::F32 => UNIT * want.abs(),
                dtype => rounding(dtype, alone.abs()) + rounding(dtype, want.abs()) + UNIT * want.abs(),
            };
            assert!((got - want).abs() <= bound, "{name}: {of} {i} is {got:e}, want {want:e}, bound {bound:.2e}");
        }
    }
}

/// Clusters that walk several steps, in two or three columns of which the last is narrow; in three the last step is one tile.
fn walk<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, case: &Case) {
    let case = Case { k: 264, n: 2 * 256 + 8, ..*case };
    grouped::<T>(variant, rng, &FEW_WALKED, &case);
    if case.gather {
        grouped::<T>(variant, rng, &many_walked(), &Case { k: 72, n: 256 + 8, ..case });
    }
}

fn grouped<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, loads: &[usize], case: &Case) {
    let (experts, tile_m) = (loads.len(), variant.tile_m);
    let mut ids: Vec<i32> =
        loads.iter().enumerate().flat_map(|(expert, &load)| std::iter::repeat_n(expert as i32, load)).collect();
    // Skipped slots leave rows that no tile covers, whose junk must survive.
    ids.extend([-1; 5]);
    rng.shuffle(&mut ids);
    let tokens = ids.len();
    let plan = dispatch(&ids, &rule(experts, 1, tile_m)).unwrap();
    let shape = SlotShape::new(tokens, experts, Some(1), tokens, tile_m, max_tiles(tokens, experts, tile_m));
    run::<T>(variant, rng, Rows::Grouped(shape), case, &plan);
}

/// One expert for all rows, in a number of them for which the selection takes the variant.
/// A tile of so many rows, of which row `last` is the last token's.
fn last_token_at<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, rows: usize, last: usize, case: &Case) {
    let mut plan = dispatch(&vec![0; rows], &rule(1, 1, variant.tile_m)).unwrap();
    plan.slot_token.rotate_right((last + 1) % rows);
    let shape = SlotShape::new(rows, 1, Some(1), rows, variant.tile_m, max_tiles(rows, 1, variant.tile_m));
    run::<T>(variant, rng, Rows::Grouped(shape), case, &plan);
}

fn dense<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, case: &Case) {
    let bm = variant.tile_m;
    let case = Case { gather: false, gather_pre_activation: false, ..*case };
    let device = variant.loaded().device();
    let takes = |&rows: &usize| {
        let desc = desc(&variant, &case, Rows::Dense(rows));
        gemm_backward::select(&desc, device).unwrap().kernel.variant() == variant.kernel
    };
    let rows = [1, bm - 1, bm + 5, 2 * bm + 5, 4 * bm + 5].into_iter().find(takes);
    let rows = rows.expect("some number of rows takes each variant");
    let plan = dispatch(&vec![0; rows], &rule(1, 1, bm)).unwrap();
    run::<T>(variant, rng, Rows::Dense(rows), &case, &plan);
}

fn desc(variant: &Variant, case: &Case, rows: Rows) -> GemmBackwardDesc {
    GemmBackwardDesc::new(variant.dtype, rows, case.n, case.k, case.activation)
        .weight(WeightDesc::new(variant.dtype).layout(variant.layout))
        .glu(case.glu)
        .gather(case.gather)
        .gather_pre_activation(case.gather_pre_activation)
        .scale(case.scale)
        .gate(case.gate)
        .kernels(variant.kernels)
        .unaligned(variant.shift > 0)
}

/// Values around 0, and now and then far away or at a bound.
fn pre_activations<T: Storage>(rng: &mut fastrand::Rng, len: usize) -> Vec<T> {
    let far = [-300.0, -90.0, -20.0, 20.0, 90.0, 0.0, -0.0, 1.5, -1.25, 0.75];
    (0..len)
        .map(|_| T::from_f64(if rng.u32(..16) == 0 { far[rng.usize(..far.len())] } else { 1.5 * normal(rng) }))
        .collect()
}

/// What rows of an expert, or of each expert, are given, and what they should become.
struct Side<T> {
    d_out: Vec<T>,
    weight: Vec<T>,
    bias: Option<Vec<T>>,
    z: Vec<T>,
    weights: Option<Vec<f32>>,
}

impl<T: Storage> Side<T> {
    fn draw(rng: &mut fastrand::Rng, case: &Case, experts: usize, [a_rows, z_rows, rows]: [usize; 3]) -> Side<T> {
        let Case { k, n, .. } = *case;
        let columns = if case.glu.is_gated() { 2 * n } else { n };
        Side {
            d_out: normals(rng, a_rows * k, 1.0),
            weight: normals(rng, experts * k * n, (k as f64).powf(-0.5)),
            bias: case.bias.then(|| normals(rng, experts * k, 1.0)),
            z: pre_activations(rng, z_rows * columns),
            weights: case.weighted.then(|| {
                let logit =
                    |rng: &mut fastrand::Rng| [6.0 * rng.f32() - 3.0, 30.0, -40.0][rng.usize(..9).saturating_sub(6)];
                (0..rows).map(|_| if case.gate { logit(rng) } else { rng.f32() }).collect()
            }),
        }
    }

    fn of<'a>(
        &'a self,
        variant: &Variant,
        case: &Case,
        activations: &'a [Activation],
        kept: Option<&'a [f64]>,
    ) -> HiddenBackward<'a, T> {
        HiddenBackward {
            d_out: &self.d_out,
            gather: case.gather,
            weight: &self.weight,
            layout: variant.layout,
            bias: self.bias.as_deref(),
            n: case.n,
            k: case.k,
            pre_activation: &self.z,
            gather_pre_activation: case.gather_pre_activation,
            glu: case.glu,
            activations,
            weights: self.weights.as_deref(),
            gate: case.gate,
            scale: f64::from(case.scale),
            kept,
        }
    }
}

/// Outputs of one side.
struct Outs<T> {
    d_pre: Guarded<T>,
    hidden: Guarded<T>,
    d_weight: Guarded<f32>,
}

impl<T: Storage> Outs<T> {
    fn new(case: &Case, rows: usize, shift: usize) -> Outs<T> {
        let stream = device::stream();
        let columns = if case.glu.is_gated() { 2 * case.n } else { case.n };
        let output = |name, len| Guarded::filled_output(&stream, name, &vec![Guarded::<T>::junk(); len], shift);
        Outs {
            d_pre: output("d_pre_activation", rows * columns),
            hidden: output("hidden", rows * case.n),
            d_weight: Guarded::output(&stream, "d_slot_weight", rows),
        }
    }

    fn reset(&mut self) {
        let stream = device::stream();
        self.d_pre.reset(&stream);
        self.hidden.reset(&stream);
        self.d_weight.reset(&stream);
    }

    fn bytes(&self) -> Vec<u8> {
        let stream = device::stream();
        let (d_pre, hidden, sums) = (self.d_pre.read(&stream), self.hidden.read(&stream), self.d_weight.read(&stream));
        [bytemuck::cast_slice(&d_pre), bytemuck::cast_slice(&hidden), bytemuck::cast_slice(&sums)].concat()
    }

    /// Rows up to `plan`'s last are near the reference, the others untouched.
    fn check(&self, name: &str, what: &HiddenBackward<T>, plan: &Plan, wants: [bool; 2]) {
        let stream = device::stream();
        let want = hidden_backward(what, plan).unwrap();
        let bounds = bounds(what, plan, &want);
        let near = |part: &str, got: &[f64], want: &[f64], bounds: &[f64], dtype: Dtype| {
            for (i, ((&got, &want), &bound)) in got.iter().zip(want).zip(bounds).enumerate() {
                // Past the largest number of the type: infinite.
                if dtype == Dtype::F16 && want.abs() > 65500.0 {
                    assert!(got.abs() > 65000.0 && (got > 0.0) == (want > 0.0), "{name}: {part} {i}: {got}, {want}");
                    continue;
                }
                let most = bound + rounding(dtype, want.abs() + bound);
                assert!((got - want).abs() <= most, "{name}: {part} {i} is {got:e}, want {want:e}, bound {most:.2e}");
            }
        };
        let junk = |bytes: &[u8]| bytes.iter().all(|&byte| byte == 0xff);
        let d_pre = self.d_pre.read(&stream);
        near("d_pre_activation", &to_f64(&d_pre), &want.d_pre_activation, &bounds.d_pre_activation, T::DTYPE);
        assert!(
            junk(bytemuck::cast_slice(&d_pre[want.d_pre_activation.len()..])),
            "{name}: a row of nobody was written"
        );
        let (hidden, sums) = (self.hidden.read(&stream), self.d_weight.read(&stream));
        let (mut hidden_live, mut sums_live) = (0, 0);
        if wants[0] {
            near("hidden", &to_f64(&hidden), &want.hidden, &bounds.hidden, T::DTYPE);
            hidden_live = want.hidden.len();
        }
        if wants[1] {
            near("d_slot_weight", &to_f64(&sums), &want.d_weight, &bounds.d_weight, Dtype::F32);
            sums_live = want.d_weight.len();
        }
        assert!(junk(bytemuck::cast_slice(&hidden[hidden_live..])), "{name}: hidden was written, and must not be");
        assert!(junk(bytemuck::cast_slice(&sums[sums_live..])), "{name}: sums were written, and must not be");
    }
}

/// By how much each value may be off before it is rounded: the product's error, carried on, and what functions and factors are off by themselves.
fn bounds<T: Storage>(what: &HiddenBackward<T>, plan: &Plan, want: &HiddenGradients) -> HiddenGradients {
    let &HiddenBackward { n, k, glu, .. } = what;
    let of = |f: fn(f64) -> f64| {
        let map = |values: &[T]| to_f64(values).into_iter().map(f).collect::<Vec<f64>>();
        let (d_out, weight) = (map(what.d_out), map(what.weight));
        let what = HiddenBackward {
            d_out: &d_out[..],
            weight: &weight[..],
            gather: what.gather,
            layout: what.layout,
            bias: None,
            n,
            k,
            pre_activation: &[],
            gather_pre_activation: false,
            glu,
            activations: what.activations,
            weights: None,
            gate: false,
            scale: 1.0,
            kept: None,
        };
        product_backward(&what, plan).unwrap()
    };
    let (magnitudes, squares) = (of(f64::abs), of(|v| v * v));
    let arithmetic = arithmetic(T::DTYPE);
    let mut all = want.clone();
    let columns = if glu.is_gated() { 2 * n } else { n };
    let experts = (0..).zip(&plan.counts).flat_map(|(e, &count)| std::iter::repeat_n(e, count as usize));
    for (row, expert) in experts.enumerate() {
        let expert: usize = expert;
        let of_row = |gathers: bool| if gathers { plan.slot_token[row] as usize } else { row };
        let z = &what.pre_activation[of_row(what.gather_pre_activation) * columns..][..columns];
        let given = what.weights.map(|weights| f64::from(weights[row]));
        let logit = given.filter(|_| what.gate);
        let s = (what.scale * logit.map(|logit| sigmoid_gate(logit, None)).or(given).unwrap_or(1.0)).abs();
        let activation = what.activations[expert];
        let (mut size, mut moved) = (0.0, 0.0);
        for i in 0..n {
            let at = row * n + i;
            let m = what.kept.map_or(1.0, |kept| kept[at]);
            let (d, gate) = (want.d[at], z[i].into());
            let error = arithmetic.sum_bound(k, d, magnitudes[at], squares[at].sqrt());
            // The up value's factor, of a gate whose own is one; and the gate's.
            let (up, value, function) = if glu.is_gated() {
                let up: f64 = z[n + i].into();
                let function = activate(activation, gate);
                (up.abs().max(unit_up(activation, up)), activate_glu(activation, gate, up), function)
            } else {
                (1.0, activate(activation, gate), 1.0)
            };
            let (gate_at, up_at) = match glu {
                Glu::UpFirst => (n + i, i),
                Glu::Interleaved => (2 * i, 2 * i + 1),
                _ => (i, n + i),
            };
            let out = |at: usize| row * columns + at;
            let carried =
                |gradient: f64| if d == 0.0 { s * m * error * up.max(1.0) } else { (gradient / d).abs() * error };
            // A slope is a difference of terms of the size of the value's and 1.
            let gradient = want.d_pre_activation[out(gate_at)];
            all.d_pre_activation[out(gate_at)] =
                carried(gradient) + ACTIVATION_GRADIENT * (4.0 * s * m * d.abs() * up.max(1.0)).max(gradient.abs());
            if glu.is_gated() {
                let gradient = want.d_pre_activation[out(up_at)];
                // 1 - tanh^2 is a difference of numbers up to 1.
                all.d_pre_activation[out(up_at)] = carried(gradient)
                    + ACTIVATION_GRADIENT * gradient.abs().max(s * m * d.abs() * function.abs().max(0.1));
            }
            // A SwiGLU's up value is a sum with an offset, which may be smaller than its terms.
            let offset = if let Activation::Swiglu(unit) = activation { f64::from(unit.offset).abs() } else { 0.0 };
            let terms = value.abs() + 2.0 * offset * function.abs();
            all.hidden[at] = ACTIVATION_GRADIENT * (s * m * terms).max(0.1 * s * m * up);
            size += (d * m * value).abs();
            moved += (m * value).abs() * error;
        }
        let mut bias = 0.0;
        if let Some(values) = what.bias {
            let d_out = &what.d_out[of_row(what.gather) * k..][..k];
            bias = d_out.iter().zip(&values[expert * k..]).map(|(&d, &b)| (d.into() * b.into()).abs()).sum::<f64>();
        }
        let of_weight =
            what.scale.abs() * (moved + 4.0 * ACTIVATION_GRADIENT * size.max(1e-3) + k as f64 * UNIT * bias);
        // Both sigmoids to an ulp, and the roundings of their products.
        all.d_weight[row] = logit
            .map_or(of_weight, |logit| sigmoid_gate(logit, Some(of_weight)) + 8.0 * UNIT * want.d_weight[row].abs());
    }
    all
}

/// The size of an up value behind its bound.
fn unit_up(activation: Activation, up: f64) -> f64 {
    let Activation::Swiglu(unit) = activation else { return 0.0 };
    (f64::from(unit.factor) * up).abs() + f64::from(unit.offset).abs()
}

fn run<T: Storage>(variant: Variant, rng: &mut fastrand::Rng, rows: Rows, case: &Case, plan: &Plan) {
    let (kernels, stream) = (variant.loaded(), device::stream());
    let form = if matches!(rows, Rows::Grouped(_)) { "grouped" } else { "dense" };
    let (experts, count, shift) = (rows.experts(), rows.count(), variant.shift);
    let name = format!("{form} rows={count} E={experts} {case:?} {variant:?}");
    let mut desc = desc(&variant, case, rows);
    let side = Side::<T>::draw(rng, case, experts, [desc.a_rows(), count, count]);
    let by_expert = ByExpert::draw(rng, case.activation, experts);
    let activations = by_expert.activations(case.activation, experts);
    let noise = NoiseSource::new(rng.u64(..), rng.u64(..));
    let dropout = case.dropout.then(|| Dropout::new([0.1, 0.4, 0.75][rng.usize(..3)], noise));
    let state = if case.dropout { State::draw(rng) } else { State::NONE };
    let live = plan.slot_token.len();
    let kept: Option<Vec<f64>> = dropout.map(|dropout| {
        let mut kept = vec![1.0; live * case.n];
        reference::gemm::dropout(&mut kept, dropout.probability, state.of(noise)).unwrap();
        kept
    });

    // A shared expert's rows in the same launch, with everything of their own; beside a SwiGLU always, of bounds of another kind.
    let is_swiglu = matches!(case.activation, Activation::Swiglu(_));
    let some_rows = [0, 1, variant.tile_m + 1][usize::from(is_swiglu)..][rng.usize(..3 - usize::from(is_swiglu))];
    let shared_rows = if matches!(rows, Rows::Grouped(_)) { some_rows } else { 0 };
    let shared_case = Case {
        bias: rng.bool(),
        weighted: rng.bool(),
        gate: rng.bool(),
        scale: 0.5,
        wants: [rng.bool(), rng.bool()],
        gather: false,
        gather_pre_activation: false,
        activation: match case.activation {
            Activation::Identity => Activation::Relu,
            Activation::Swiglu(unit) => Activation::Swiglu(after(unit).alpha(1.25).factor(0.5).offset(-0.25)),
            _ => Activation::Silu,
        },
        dropout: false,
        ..*case
    };
    // Of another width than the others' now and then: fewer and more column tiles, another depth.
    let unit = if variant.shift > 0 { 1 } else { 8 };
    let is_hopper = matches!(variant.kernel, Kernel::GemmBackwardHopper(_));
    let [n, k] = [case.n, case.k].map(|size| match rng.usize(..3) {
        0 => size,
        1 => unit * (1 + rng.usize(..size.div_ceil(unit))),
        _ => size + unit * (1 + rng.usize(..if is_hopper { 300 } else { 150 } / unit)),
    });
    let shared_case = Case { n, k, ..shared_case };
    let own = is_swiglu || rng.bool();
    let shared_case = if own { shared_case } else { Case { activation: case.activation, ..shared_case } };
    if shared_rows > 0 {
        desc = desc
            .shared_rows(shared_rows)
            .shared_scale(0.5)
            .shared_sizes(([n, k] != [case.n, case.k]).then_some([n, k]))
            .shared_gate(shared_case.gate)
            .shared_activation(own.then_some(shared_case.activation));
    }
    let shared_side = Side::<T>::draw(rng, &shared_case, 1, [shared_rows; 3]);
    let shared_plan = dispatch(&vec![0; shared_rows], &rule(1, 1, variant.tile_m)).unwrap();

    assert_eq!(gemm_backward::select(&desc, kernels.device()).unwrap().kernel.variant(), variant.kernel);
    struct Inputs<T> {
        a: Guarded<T>,
        weight: Guarded<T>,
        bias: Option<Guarded<T>>,
        z: Guarded<T>,
        weights: Option<Guarded<f32>>,
    }
    let input = |side: &Side<T>| {
        let shifted = |name, values: &[T]| Guarded::shifted_input(&stream, name, values, shift);
        Inputs {
            a: shifted("a", &side.d_out),
            weight: shifted("weight", &side.weight),
            bias: side.bias.as_ref().map(|bias| Guarded::shifted_input(&stream, "out_bias", bias, 1)),
            z: shifted("pre_activation", &side.z),
            weights: side.weights.as_ref().map(|weights| Guarded::input(&stream, "slot_weight", weights)),
        }
    };
    let (inputs, shared_inputs) = (input(&side), input(&shared_side));
    let by_expert = by_expert.on_device();
    let dispatched = match &rows {
        Rows::Grouped(shape) => Some(Lists::of(plan).dispatched(&stream, shape)),
        _ => None,
    };
    let mut workspace =
        Workspace::new(&stream, gemm_backward::workspace_bytes(&desc, kernels.device()).unwrap()).unwrap();
    let (mut outs, mut shared_outs) =
        (Outs::<T>::new(case, count, shift), Outs::<T>::new(&shared_case, shared_rows, shift));
    let mut launch = |outs: &mut Outs<T>, shared_outs: &mut Outs<T>| {
        let (a, weight, z) = (inputs.a.view(), inputs.weight.view(), inputs.z.view());
        let (bias, weights) = (inputs.bias.as_ref().map(Guarded::view), inputs.weights.as_ref().map(Guarded::view));
        let (mut d_pre, mut hidden, mut sums) =
            (outs.d_pre.view_mut(), outs.hidden.view_mut(), outs.d_weight.view_mut());
        let mut args = GemmBackwardArgs::new(&a, &weight, &z, &mut d_pre);
        args.out_bias = bias.as_ref().map(In::from);
        args.slot_weight = weights.as_ref().map(In::from);
        args.hidden = case.wants[0].then(|| Out::from(&mut hidden));
        args.d_slot_weight = case.wants[1].then(|| Out::from(&mut sums));
        args.dispatched = dispatched.as_ref();
        args.dropout = dropout;
        let state = state.view();
        args.noise_state = state.as_ref().map(In::from);
        let by_expert = by_expert.each_ref().map(|values| values.as_ref().map(Guarded::view));
        let [alpha, gate, up, offset] = by_expert.each_ref().map(|values| values.as_ref().map(In::from));
        args.swiglu.alpha = alpha;
        args.swiglu.gate = gate;
        args.swiglu.up = up;
        args.swiglu.offset = offset;
        let of = &shared_inputs;
        let (a, weight, z) = (of.a.view(), of.weight.view(), of.z.view());
        let (bias, weights) = (of.bias.as_ref().map(Guarded::view), of.weights.as_ref().map(Guarded::view));
        let mut to = (shared_outs.d_pre.view_mut(), shared_outs.hidden.view_mut(), shared_outs.d_weight.view_mut());
        if shared_rows > 0 {
            let mut shared = SharedRowsBackward::new(&a, &weight, &z, &mut to.0);
            shared.out_bias = bias.as_ref().map(In::from);
            shared.row_weight = weights.as_ref().map(In::from);
            shared.hidden = shared_case.wants[0].then(|| Out::from(&mut to.1));
            shared.d_row_weight = shared_case.wants[1].then(|| Out::from(&mut to.2));
            args.shared = Some(shared);
        }
        gemm_backward::forward(kernels, &stream, &desc, args, &mut workspace).unwrap();
    };
    launch(&mut outs, &mut shared_outs);
    let first = (outs.bytes(), shared_outs.bytes());
    outs.reset();
    shared_outs.reset();
    // The same workspace, as the launch before left it.
    launch(&mut outs, &mut shared_outs);
    assert!(first == (outs.bytes(), shared_outs.bytes()), "{name}: another run gave other bits");
    time(&stream, &name, || launch(&mut outs, &mut shared_outs));
    outs.check(&name, &side.of(&variant, case, &activations, kept.as_deref()), plan, case.wants);
    if shared_rows > 0 {
        let activations = [shared_case.activation];
        let what = shared_side.of(&variant, &shared_case, &activations, None);
        shared_outs.check(&format!("{name} shared {shared_case:?}"), &what, &shared_plan, shared_case.wants);
    }
    for side in [&inputs, &shared_inputs] {
        [&side.a, &side.weight, &side.z]
            .into_iter()
            .chain(&side.bias)
            .for_each(|buffer| buffer.assert_unchanged(&stream));
        side.weights.iter().for_each(|weights| weights.assert_unchanged(&stream));
    }
    by_expert.iter().flatten().for_each(|values| values.assert_unchanged(&stream));
    state.assert_unchanged();
}
