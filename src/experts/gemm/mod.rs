//! Matrix products of the experts: one launch for all of them, or one dense product.
//!
//! Row `r` of the output belongs to expert `e` (by the dispatch's tiles; expert 0 when dense) and reads row `slot_token[r]` of `a`
//! (row `r` without a gather):
//!
//! `v[n] = row_scale[r] * sum_k a[.,k] * b[e,n,k] + bias[e,n]`
//!
//! and `out[r]` is `out_scale[r]` times an activation of `v`, rounded once. See [`Activation`](crate::rules::Activation). Products are summed in f32; f32 inputs
//! keep a relative error of 1e-5, up to the largest; an infinite one makes its sums infinite or NaN.

mod activation;
pub(crate) mod choice;
mod desc;
pub(in crate::experts) mod hopper;
mod shared_rows;
mod strides;
pub(crate) mod swapped;

use std::sync::Arc;

use cudarc::driver::CudaStream;

pub use self::activation::SwigluByExpert;
use self::activation::Unit;
pub(crate) use self::activation::{ByExpertAddresses, HeldByExpert, check_activation};
use self::choice::Candidate;
use self::desc::OPERATION;
pub use self::desc::{GemmDesc, KernelSet, Output, Rows, SharedDepth};
use self::shared_rows::HeldShared;
pub(crate) use self::shared_rows::SharedAddresses;
pub use self::shared_rows::SharedRows;
pub use self::strides::Strides;
use self::strides::outputs_apart;
pub(crate) use self::swapped::most_partial_bytes;
use super::combine::CombineDesc;
use super::dispatched::{Dispatched, RowAddresses};
use super::gemm_combine::SumArgs;
use super::tiles::{select_tile_of, select_tile_of_width, tile_of_height};
use super::weight::{Weight, WeightAddresses, WeightNames};
use crate::registry::{Fold, Gemm, GemmAny, Kernel, Tile};
use crate::rules::{Dropout, Glu, NoiseSource, drop_below, keep_scale};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::GemmParams;
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Workspace};

/// Where a product's results go.
#[non_exhaustive]
pub enum ProductOut<'a, T> {
    /// With [`Output::Rounded`] and [`Output::Added`].
    Rounded(Out<'a, T>),
    /// With the other forms of [`Output`].
    F32(Out<'a, f32>),
}

/// Buffers of a product.
#[non_exhaustive]
pub struct GemmArgs<'a, T> {
    /// `[a_rows, K]` ([`GemmDesc::a_rows`]).
    pub a: In<'a, T>,
    /// `b` and its bias.
    pub weight: Weight<'a>,
    /// The dispatch whose rows these are; exactly with [`Rows::Grouped`], and of the same shape.
    pub dispatched: Option<&'a Dispatched>,
    /// `[rows]`: factor of each row's product, before the bias (Llama 4 scales the expert's input).
    pub row_scale: Option<In<'a, f32>>,
    /// `[rows]`: factor of each row of the result.
    pub out_scale: Option<In<'a, f32>>,
    /// Drops some of the result, before `out_scale`: [`crate::reference::gemm::dropout`].
    pub dropout: Option<Dropout>,
    /// `[2]`, 8-byte aligned, with `dropout` only: see [`crate::routers::noise_state`]. Absent, the dropout's seed and offset are all there is.
    pub noise_state: Option<In<'a, u64>>,
    /// `[rows, N]`. Rows that no tile covers are left as they are. With [`Output::TokenSums`] `[tokens, N]`, to which rows are added.
    pub out: ProductOut<'a, T>,
    /// `[rows, N]`, or with a gate `[rows, 2N]`, gates before ups whatever the weight's order; written: what stands before the activation.
    /// Of 16 bits no value is rounded across the limit of a clamp, where the slope jumps.
    pub pre_activation: Option<Out<'a, T>>,
    /// The shared expert's rows; exactly with [`GemmDesc::shared_rows`].
    pub shared: Option<SharedRows<'a, T>>,
    /// Numbers of the activation that differ from expert to expert.
    pub swiglu: SwigluByExpert<'a>,
    /// At least [`workspace_bytes`]; needed where that is more than 0.
    pub workspace: Option<&'a mut Workspace>,
}

impl<'a, T> GemmArgs<'a, T> {
    /// A dense product.
    pub fn new(a: impl Into<In<'a, T>>, weight: Weight<'a>, out: impl Into<Out<'a, T>>) -> GemmArgs<'a, T> {
        GemmArgs::to(a.into(), weight, ProductOut::Rounded(out.into()))
    }

    /// A dense product to f32, for [`Output::F32`], [`Output::AddedF32`] and [`Output::TokenSums`].
    pub fn to_f32(a: impl Into<In<'a, T>>, weight: Weight<'a>, out: impl Into<Out<'a, f32>>) -> GemmArgs<'a, T> {
        GemmArgs::to(a.into(), weight, ProductOut::F32(out.into()))
    }

    fn to(a: In<'a, T>, weight: Weight<'a>, out: ProductOut<'a, T>) -> GemmArgs<'a, T> {
        GemmArgs {
            a,
            weight,
            dispatched: None,
            row_scale: None,
            out_scale: None,
            dropout: None,
            noise_state: None,
            out,
            pre_activation: None,
            shared: None,
            swiglu: SwigluByExpert::new(),
            workspace: None,
        }
    }

    /// With a workspace, for blocks that share the depth of a tile.
    #[must_use]
    pub fn workspace(self, workspace: &'a mut Workspace) -> GemmArgs<'a, T> {
        GemmArgs { workspace: Some(workspace), ..self }
    }

    /// By the rows of a dispatch.
    #[must_use]
    pub fn dispatched(self, dispatched: &'a Dispatched) -> GemmArgs<'a, T> {
        GemmArgs { dispatched: Some(dispatched), ..self }
    }

    /// With dropout inside the experts.
    #[must_use]
    pub fn dropout(self, dropout: Dropout) -> GemmArgs<'a, T> {
        GemmArgs { dropout: Some(dropout), ..self }
    }

    /// With numbers of the activation that differ from expert to expert.
    #[must_use]
    pub fn swiglu(self, swiglu: SwigluByExpert<'a>) -> GemmArgs<'a, T> {
        GemmArgs { swiglu, ..self }
    }

    /// With the rows of a shared expert.
    #[must_use]
    pub fn shared(self, shared: SharedRows<'a, T>) -> GemmArgs<'a, T> {
        GemmArgs { shared: Some(shared), ..self }
    }
}

buffers!(GemmArgs<'a, T> { row_scale: In<f32>, out_scale: In<f32>, noise_state: In<u64>, pre_activation: Out<T> });

/// Tiles that consecutive blocks share a weight over, so that it is read from L2: the kernel's order of blocks.
pub(crate) const BAND: usize = 8;

/// Chooses kernel and grid: the dispatch's tile height, or for a dense product the cheapest one.
///
/// The kernels for packed rows take `n` and `k` that are multiples of 8, columns (of the weight outputs or depths) side by side, and all other
/// strides multiples of 16 bytes. All else has one kernel, for lists of tiles of any height.
///
/// # Errors
/// Those of [`GemmDesc::validate`]; [`Error::Unsupported`] for a tile height without a kernel, or a device with too little
/// shared memory; [`Error::Overflow`] for a grid past the device's limit.
pub fn select(desc: &GemmDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    select_for(OPERATION, desc, device)
}

/// [`select`] on behalf of `operation`.
pub(crate) fn select_for(operation: &'static str, desc: &GemmDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    select_among(operation, desc, Gemm::wide_tiles(desc.dtype), device)
}

/// The same, with these tiles beside the narrow ones.
pub(crate) fn select_among(
    operation: &'static str,
    desc: &GemmDesc,
    wide: &'static [Tile],
    device: &DeviceInfo,
) -> Result<Selection, Error> {
    desc.check(operation)?;
    let Some(layout) = desc.vector_layout() else {
        return match desc.kernels {
            KernelSet::Sm90a => Err(hopper::refusal(operation, desc, device)),
            _ => select_any(operation, desc, device),
        };
    };
    if let Some(plan) = swapped::plan(operation, desc, layout, device)? {
        return Ok(plan.selection());
    }
    let hopper = hopper::candidate(desc, desc.n, layout, device)
        .filter(|_| desc.kernels != KernelSet::Sm80 && (desc.tile_n.is_none() || desc.kernels == KernelSet::Sm90a));
    match hopper {
        Some((gemm, blocks)) if desc.kernels == KernelSet::Sm90a => {
            return Ok(hopper::selection(Kernel::GemmHopper(gemm), blocks));
        }
        None if desc.kernels == KernelSet::Sm90a => return Err(hopper::refusal(operation, desc, device)),
        _ => {}
    }
    let (tile, tiles) = match &desc.rows {
        Rows::Dense(rows) => {
            let of_width = desc.tile_n.and_then(|width| select_tile_of_width(desc.dtype, *rows, width, device));
            let tile = of_width.map_or_else(|| select_tile_of(KernelSet::Sm80, desc.dtype, *rows, 1, device), Ok)?;
            (tile, rows.div_ceil(tile.bm as usize))
        }
        Rows::Grouped(shape) => (
            tile_of_height(desc.dtype, shape.tile_m, device)?,
            shape.max_tiles + desc.shared_rows.div_ceil(shape.tile_m),
        ),
    };
    let gemm = of_width(operation, desc, choice::of_height(desc, layout, tile.bm, wide, device), device)?;
    if let Some((hopper, blocks)) = hopper
        && Candidate::Hopper(hopper).is_ahead_of(Candidate::sm80(&gemm), desc, desc.n, device)
    {
        return Ok(hopper::selection(Kernel::GemmHopper(hopper), blocks));
    }
    let blocks = grid(operation, tiles, desc.n, gemm.out_columns())?;
    Ok(Selection::new(Kernel::Gemm(gemm), [blocks, 1, 1]))
}

/// The one of these kernels whose width the descriptor asks for, or which takes the fewest cycles (see [`super::cost`]).
fn of_width(
    operation: &'static str,
    desc: &GemmDesc,
    mut kernels: impl Iterator<Item = Gemm>,
    device: &DeviceInfo,
) -> Result<Gemm, Error> {
    if let Some(width) = desc.tile_n {
        return kernels.find(|gemm| gemm.tile.bn as usize == width).ok_or_else(|| {
            let expected = format!("a width of which {} has tiles of this height on this device", desc.dtype);
            Error::unsupported(operation, "tile_n", expected, width)
        });
    }
    let cycles = |gemm: &Gemm| Candidate::sm80(gemm).cycles(desc, desc.n, device);
    let least = kernels.map(|gemm| (cycles(&gemm), gemm)).min_by(|(a, _), (b, _)| a.total_cmp(b));
    Ok(least.expect("a tile of this height was chosen").1)
}

/// The plan of the kernels for few rows, where they compute `desc`.
pub(crate) fn swapped_plan(
    operation: &'static str,
    desc: &GemmDesc,
    device: &DeviceInfo,
) -> Result<Option<swapped::Plan>, Error> {
    desc.vector_layout().map_or(Ok(None), |layout| swapped::plan(operation, desc, layout, device))
}

/// Workspace of [`forward`] in bytes; 0 where it needs none.
///
/// # Errors
/// Those of [`select`].
pub fn workspace_bytes(desc: &GemmDesc, device: &DeviceInfo) -> Result<usize, Error> {
    desc.check(OPERATION)?;
    let plan = swapped_plan(OPERATION, desc, device)?;
    plan.map_or(Ok(0), |plan| workspace_of(&plan).map(|(_, bytes)| bytes))
}

/// Where the partial sums of a product lie in its workspace, and how large that is.
fn workspace_of(plan: &swapped::Plan) -> Result<(Region, usize), Error> {
    let mut arena = Arena::new(OPERATION);
    if plan.counts() {
        arena.barrier()?;
    }
    let partials = arena.region("workspace", plan.partial_bytes(), 1)?;
    Ok((partials, if plan.counts() { arena.bytes() } else { 0 }))
}

/// How the outputs of such a weight fold into columns.
fn fold(glu: Glu) -> Fold {
    match glu {
        Glu::None => Fold::Plain,
        Glu::Split | Glu::UpFirst | Glu::Apart => Fold::Glu,
        Glu::Interleaved => Fold::Iglu,
    }
}

/// The kernel for rows of any width and place. It takes lists of tiles of any height.
fn select_any(operation: &'static str, desc: &GemmDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    let gemm = GemmAny { dtype: desc.dtype, gated: desc.weight.glu.is_gated() };
    let (needed, most) = (gemm.shared_bytes(), device.shared_bytes_per_block);
    if needed > most {
        let supported = format!("at least {needed} bytes of shared memory per block");
        return Err(Error::unsupported(operation, "device", supported, format!("a device with {most} bytes")));
    }
    let height = gemm.tile().bm as usize;
    let tiles = match &desc.rows {
        Rows::Dense(rows) => rows.div_ceil(height),
        Rows::Grouped(shape) => shape.max_tiles.saturating_mul(shape.tile_m.div_ceil(height)),
    };
    let tiles = tiles.saturating_add(desc.shared_rows.div_ceil(height));
    let blocks = grid(operation, tiles, desc.n, gemm.out_columns())?;
    Ok(Selection::new(Kernel::GemmAny(gemm), [blocks, 1, 1]))
}

/// Blocks for so many tiles of rows.
fn grid(operation: &'static str, tiles: usize, n: usize, out_columns: u32) -> Result<u32, Error> {
    let columns = n.div_ceil(out_columns as usize) as u64;
    let tiles = tiles.div_ceil(BAND) as u64 * BAND as u64;
    shape::grid_x(operation, "n", tiles.saturating_mul(columns))
}

/// Computes `out`.
///
/// With no rows or no tiles nothing is launched.
///
/// # Errors
/// Those of [`select`]; [`Error::Missing`], [`Error::Unexpected`] or [`Error::Invalid`] for a dispatch against the descriptor, for a
/// dropout's probability outside its range, for a noise state without dropout, and for a workspace that is needed; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GemmDesc,
    args: GemmArgs<'_, T>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let plan = swapped_plan(OPERATION, desc, kernels.device())?;
    run(kernels, stream, desc, &selection, plan, args, None)
}

/// [`forward`] by a selection; with `sum`, by a plan that combines.
pub(crate) fn run<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GemmDesc,
    selection: &Selection,
    plan: Option<swapped::Plan>,
    args: GemmArgs<'_, T>,
    sum: Option<(&CombineDesc, SumArgs<'_, T>)>,
) -> Result<(), Error> {
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("a", desc.dtype)?;
    check_dispatched(desc, args.dispatched)?;
    shared_rows::check(desc, args.shared.is_some())?;
    if let Some(dropout) = args.dropout {
        check_dropout(OPERATION, &dropout)?;
    } else if args.noise_state.is_some() {
        let reason = "there is no dropout";
        return Err(Error::Unexpected { operation: OPERATION, argument: "noise_state", reason });
    }
    if desc.output == Output::TokenSums {
        let (operation, reason) = (OPERATION, "the output is TokenSums");
        for (argument, given) in
            [("pre_activation", args.pre_activation.is_some()), ("dropout", args.dropout.is_some())]
        {
            if given {
                return Err(Error::Unexpected { operation, argument, reason });
            }
        }
    }
    if desc.rows.count() + desc.shared_rows == 0 || selection.grid[0] == 0 {
        return Ok(());
    }
    let rows = desc.rows.count();
    let places = desc.places();
    let any = matches!(selection.kernel.variant(), Kernel::GemmAny(_));
    let alignment = if any { desc.dtype.bytes().into() } else { VECTOR };
    let a = scope.read("a", args.a, places.a_extent(desc.a_rows(), desc.k), alignment)?;
    let names = WeightNames { matrix: "weight", bias: "weight.bias", up: "weight.up", up_bias: "weight.up_bias" };
    let weight = args.weight.open(&scope, names, &desc.weight, desc.weight_place(desc.rows.experts(), alignment))?;
    let dispatched = args.dispatched.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let row_scale = scope.read_some("row_scale", args.row_scale, rows, SCALAR)?;
    let out_scale = scope.read_some("out_scale", args.out_scale, rows, SCALAR)?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let elements = places.out_extent(desc.out_rows(), desc.n);
    let out = match (desc.output, args.out) {
        (Output::Rounded | Output::Added, ProductOut::Rounded(out)) => scope.write("out", out, elements, alignment)?,
        (Output::F32 | Output::AddedF32 | Output::TokenSums, ProductOut::F32(out)) => {
            scope.write("out", out, elements, if any { SCALAR } else { VECTOR })?
        }
        (output, given) => {
            let given = match given {
                ProductOut::Rounded(_) => "a buffer of the type of a",
                ProductOut::F32(_) => "a buffer of f32 (GemmArgs::to_f32)",
            };
            return Err(Error::invalid(OPERATION, "out", format!("a buffer for Output::{output:?}"), given));
        }
    };
    let columns = desc.pre_activation_columns();
    let pre_activation = scope.write_some("pre_activation", args.pre_activation, rows * columns, alignment)?;
    let shared = args.shared.map(|shared| shared.open(&scope, desc, alignment)).transpose()?;
    let swiglu = args.swiglu.open(&scope, desc.activation, desc.rows.experts())?;
    let plan = plan.filter(swapped::Plan::counts);
    let workspace = plan.map(|plan| {
        let (operation, argument) = (OPERATION, "workspace");
        let reason = "blocks share sums (gemm::workspace_bytes)";
        let given = args.workspace.ok_or(Error::Missing { operation, argument, reason })?;
        let (partials, bytes) = workspace_of(&plan)?;
        Ok::<_, Error>((given.open(&scope, bytes)?, partials))
    });
    let workspace = workspace.transpose()?;
    let sum = sum.map(|(desc, sum)| Ok::<_, Error>((desc, sum.open(&scope, desc)?))).transpose()?;
    let shared = shared.as_ref().map(HeldShared::addresses);
    let rows = dispatched.as_ref().map(|dispatched| dispatched.addresses());
    let addend = shared.map(|shared| shared.out);
    let at = Addresses {
        a: a.address(),
        weight: weight.addresses(),
        out: out.address(),
        pre_activation: optional(&pre_activation),
        rows,
        row_scale: optional(&row_scale),
        out_scale: optional(&out_scale),
        shared,
        noise_state: optional(&noise_state),
        swiglu: swiglu.addresses(),
        scratch: workspace.as_ref().map(|(workspace, partials)| swapped::Scratch {
            partials: workspace.at(*partials),
            counters: workspace.counters(),
        }),
        sum: sum.as_ref().zip(rows).map(|((desc, sum), rows)| sum.addresses(desc, rows, addend)),
    };
    enqueue(&scope, desc, selection, at, args.dropout)
}

fn check_dispatched(desc: &GemmDesc, dispatched: Option<&Dispatched>) -> Result<(), Error> {
    let (operation, argument) = (OPERATION, "dispatched");
    match (&desc.rows, dispatched) {
        (Rows::Grouped(_), None) => Err(Error::Missing { operation, argument, reason: "the rows are Grouped" }),
        (Rows::Dense(_), Some(_)) => Err(Error::Unexpected { operation, argument, reason: "the rows are Dense" }),
        (Rows::Grouped(shape), Some(dispatched)) if dispatched.shape() != shape => {
            let got = format!("{:?}", dispatched.shape());
            Err(Error::invalid(operation, argument, format!("a dispatch of {shape:?}"), got))
        }
        _ => Ok(()),
    }
}

pub(crate) fn check_dropout(operation: &'static str, dropout: &Dropout) -> Result<(), Error> {
    if !(0.0..1.0).contains(&dropout.probability) {
        return Err(Error::invalid(operation, "dropout.probability", "from 0 to below 1", dropout.probability));
    }
    Ok(())
}

/// What a product reads and writes.
pub(crate) struct Addresses<'a> {
    pub(crate) a: Address<'a>,
    pub(crate) weight: WeightAddresses<'a>,
    pub(crate) out: Address<'a>,
    pub(crate) pre_activation: Option<Address<'a>>,
    /// Exactly with [`Rows::Grouped`].
    pub(crate) rows: Option<RowAddresses<'a>>,
    pub(crate) row_scale: Option<Address<'a>>,
    pub(crate) out_scale: Option<Address<'a>>,
    /// Exactly with [`GemmDesc::shared_rows`].
    pub(crate) shared: Option<SharedAddresses<'a>>,
    /// Of the dropout.
    pub(crate) noise_state: Option<Address<'a>>,
    pub(crate) swiglu: ByExpertAddresses<'a>,
    /// Where blocks share sums.
    pub(crate) scratch: Option<swapped::Scratch<'a>>,
    /// Each token's sum: exactly with a kernel that combines.
    pub(crate) sum: Option<swapped::Sum<'a>>,
}

impl<'a> Addresses<'a> {
    /// Of a dense product.
    pub(crate) fn dense(a: Address<'a>, weight: WeightAddresses<'a>, out: Address<'a>) -> Addresses<'a> {
        Addresses {
            a,
            weight,
            out,
            pre_activation: None,
            rows: None,
            row_scale: None,
            out_scale: None,
            shared: None,
            noise_state: None,
            swiglu: ByExpertAddresses::default(),
            scratch: None,
            sum: None,
        }
    }
}

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &GemmDesc,
    selection: &Selection,
    at: Addresses<'_>,
    dropout: Option<Dropout>,
) -> Result<(), Error> {
    let Unit { activation, alpha, gate_bound, up_bound, factor, offset } = Unit::new(desc.activation, at.swiglu);
    let shared = Unit::new(desc.shared_activation.unwrap_or(desc.activation), ByExpertAddresses::default());
    let Dropout { probability, noise } = dropout.unwrap_or(Dropout { probability: 0.0, noise: NoiseSource::default() });
    let [seed_lo, seed_hi, offset_lo, offset_hi] = noise.words_of_source();
    let WeightAddresses { b, b_up, bias, bias_up } = at.weight;
    let shared_weight = at.shared.map(|shared| shared.weight);
    let Strides { a, weight: [expert, output, depth], out } = desc.places();
    let of_shared = desc.shared_places();
    // Where gate and up alternate, the kernel for any rows sees two matrices of every second output.
    let apart = match selection.kernel.variant() {
        Kernel::GemmAny(_) => outputs_apart(desc.weight.glu),
        _ => 1,
    };
    let params = GemmParams {
        a: at.a.into(),
        b: b.into(),
        b_up: b_up.into(),
        bias: bias.into(),
        bias_up: bias_up.into(),
        out: at.out.into(),
        pre_activation: at.pre_activation.into(),
        slot_token: at.rows.filter(|_| desc.gather).map(|rows| rows.slot_token).into(),
        out_token: at.rows.filter(|_| desc.output == Output::TokenSums).map(|rows| rows.slot_token).into(),
        row_scale: at.row_scale.into(),
        out_scale: at.out_scale.into(),
        tiles: at.rows.map(|rows| rows.tiles).into(),
        num_tiles: at.rows.map(|rows| rows.num_tiles).into(),
        shared_a: at.shared.map(|shared| shared.a).into(),
        shared_b: shared_weight.map(|weight| weight.b).into(),
        shared_b_up: shared_weight.and_then(|weight| weight.b_up).into(),
        shared_bias: shared_weight.and_then(|weight| weight.bias).into(),
        shared_bias_up: shared_weight.and_then(|weight| weight.bias_up).into(),
        shared_out: at.shared.map(|shared| shared.out).into(),
        shared_pre_activation: at.shared.and_then(|shared| shared.pre_activation).into(),
        shared_rows: desc.shared_rows as u32,
        shared_k: desc.shared_k() as u32,
        shared_a_row: of_shared.a[0] as u32,
        shared_b_output: (apart * of_shared.weight[1]) as u32,
        m: desc.rows.count() as u32,
        n: desc.n as u32,
        k: desc.k as u32,
        b_outputs: desc.b_outputs() as u32,
        tile_m: match &desc.rows {
            Rows::Dense(_) => 1,
            Rows::Grouped(shape) => shape.tile_m as u32,
        },
        a_row: a[0] as u32,
        a_depth: a[1] as u32,
        b_expert_lo: expert as u64 as u32,
        b_expert_hi: (expert as u64 >> 32) as u32,
        b_output: (apart * output) as u32,
        b_depth: depth as u32,
        bias_output: apart as u32,
        out_row: out[0] as u32,
        out_column: out[1] as u32,
        out_form: match desc.output {
            Output::Rounded => 0,
            Output::F32 => 1,
            Output::Added => 2,
            Output::AddedF32 => 3,
            Output::TokenSums => 4,
        },
        activation,
        alpha,
        gate_bound,
        drop_below: drop_below(probability),
        keep_scale: keep_scale(probability),
        seed_lo,
        seed_hi,
        offset_lo,
        offset_hi,
        noise_state: at.noise_state.into(),
        up_bound,
        factor,
        offset,
        shared_activation: shared.activation,
        shared_alpha: shared.alpha,
        shared_gate_bound: shared.gate_bound,
        shared_up_bound: shared.up_bound,
        shared_factor: shared.factor,
        shared_offset: shared.offset,
        expert_alpha: at.swiglu.alpha.into(),
        expert_gate_bound: at.swiglu.gate.into(),
        expert_up_bound: at.swiglu.up.into(),
        expert_offset: at.swiglu.offset.into(),
    };
    match selection.kernel.variant() {
        Kernel::GemmHopper(gemm) => scope.launch(selection, hopper::with_maps(scope, desc, &gemm, params, &at)?),
        Kernel::GemmSwapped(kernel) => {
            let plan = swapped_plan(scope.operation, desc, scope.kernels.device())?;
            let plan = plan.and_then(|plan| if kernel.combines { plan.combining() } else { Some(plan) });
            let plan = plan.filter(|plan| plan.selection() == *selection && (!plan.counts() || at.scratch.is_some()));
            let plan = plan.expect("the selection is that of the descriptor, with a workspace where it asks for one");
            scope.launch(selection, plan.params(params, at.scratch, at.sum))
        }
        _ => scope.launch(selection, params),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::dispatched::SlotShape;
    use crate::rules::{Activation, Bound, Dtype, Swiglu, WeightDesc};
    use crate::runtime::device::A100;

    fn swiglu() -> WeightDesc {
        WeightDesc::new(Dtype::Bf16).glu(Glu::Split)
    }

    fn dense() -> GemmDesc {
        GemmDesc::new(Dtype::Bf16, Rows::Dense(100), 72, 64).weight(swiglu()).activation(Activation::Silu)
    }

    fn grouped(tile_m: usize, max_tiles: usize) -> GemmDesc {
        GemmDesc { rows: Rows::Grouped(SlotShape::new(100, 8, Some(1), 100, tile_m, max_tiles)), ..dense() }
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: GemmDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        assert!(select(&dense(), &A100).is_ok());
        assert!(select(&grouped(64, 10), &A100).is_ok());
        assert_eq!(fault(GemmDesc { n: 0, ..dense() }), "n");
        assert_eq!(fault(GemmDesc { n: 1 << 30, ..dense() }), "n");
        assert_eq!(fault(GemmDesc { k: 0, ..dense() }), "k");
        assert_eq!(fault(GemmDesc { k: (1 << 23) + 8, ..dense() }), "k");
        assert_eq!(fault(GemmDesc { rows: Rows::Dense(1 << 32), ..dense() }), "rows");
        assert_eq!(fault(dense().gather(true)), "gather");
        assert_eq!(fault(dense().activation(Activation::Identity)), "activation");
        assert_eq!(fault(dense().weight(WeightDesc::new(Dtype::F16).glu(Glu::Split))), "weight.format");
        let swiglu = |unit: Swiglu| dense().activation(unit.into());
        assert_eq!(fault(swiglu(Swiglu::GPT_OSS).weight(WeightDesc::new(Dtype::Bf16))), "activation");
        let limits = [0.0, f32::INFINITY].map(|limit| select(&swiglu(Swiglu::clamped(limit)), &A100).is_ok());
        assert_eq!(limits, [true; 2]);
        for wrong in [
            Swiglu::clamped(-1.0),
            Swiglu::clamped(f32::NAN),
            Swiglu::softcapped(0.0, 1.0),
            Swiglu::softcapped(1.0, f32::INFINITY),
            Swiglu::new().alpha(f32::NAN),
            Swiglu::new().factor(f32::INFINITY),
            Swiglu::new().offset(f32::NAN),
            Swiglu::new().up(Bound::Clamp(1.0)).clamp_after(true),
        ] {
            assert_eq!(fault(swiglu(wrong)), "activation", "{wrong:?}");
        }
        assert_eq!(fault(grouped(64, 10).shared_activation(Some(Activation::Silu))), "shared_activation");
        let plain = grouped(64, 10).shared_rows(1).shared_activation(Some(Activation::Identity));
        assert_eq!(fault(plain), "shared_activation");
        assert_eq!(fault(dense().shared_rows(1)), "shared_rows");
        assert_eq!(fault(grouped(64, 10).shared_rows(1 << 31)), "shared_rows");
        assert_eq!(fault(grouped(63, 10)), "tile_m");
        assert_eq!(fault(grouped(0, 10)), "rows.tile_m");
        assert_eq!(fault(GemmDesc { n: 1 << 20, ..grouped(64, 1 << 28) }), "n");
        let huge = Rows::Grouped(SlotShape::new(1, 4096, Some(1), 1, 64, 1));
        assert_eq!(fault(GemmDesc { rows: huge, n: 1 << 25, k: 1 << 23, ..dense() }), "weight");
    }

    #[test]
    fn bands_of_tiles_times_columns() {
        let columns = 72_u32.div_ceil(64);
        assert_eq!(select(&grouped(64, 9), &A100).unwrap().grid, [16 * columns, 1, 1]);
        assert_eq!(select(&grouped(64, 0), &A100).unwrap().grid, [0, 1, 1]);
        assert_eq!(select(&grouped(64, 7).shared_rows(65), &A100).unwrap().grid, [16 * columns, 1, 1]);
        let one = GemmDesc { rows: Rows::Dense(1), ..dense() }.kernels(KernelSet::Sm80);
        assert_eq!(select(&one, &A100).unwrap().grid, [8 * columns, 1, 1]);
    }
}
