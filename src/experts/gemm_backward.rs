//! The second product's way back with the activation's behind it, in one launch.
//!
//! Of row `r`, which belongs to expert `e`, with `dO` the gradient of the second product's outputs, `W2` its weight, `z` the pre-activations of the first,
//! `A = act(z)` and `s` the row's weight:
//!
//! - `d = dO[token(r)] W2[e]`, which stays on the chip: the gradient of `s A` (SonicMoE's dA', arXiv:2512.14080);
//! - `d_pre_activation = s d act'(z)`, in the order of the first weight's outputs;
//! - `hidden = s A`, recomputed, what the gradient of `W2` is made with;
//! - `d_slot_weight = <d, A> + <dO[token(r)], b2[e]>`: the gradient of the row's weight, without the experts' outputs.
//!
//! # The way back of a layer's experts
//!
//! The forward pass keeps `x`, `z` ([`crate::layer::ExpertsArgs::pre_activation`]) and the dispatch. The weight is read as it lies, in its other order.
//!
//! | | operation | |
//! |---|---|---|
//! | 1 | this | `dO` gathered, `W2`, `z` to `dZ`, `hidden`, `d_slot_weight` |
//! | 2 | [`super::k_grouped`] | `dW2 = dO^T hidden`, `dO` gathered ([`super::k_grouped::Gathered::A`]) |
//! | 3 | [`super::gemm`] | `dX_slots = dZ W1`, `W1` in its other layout, no gather, no activation |
//! | 4 | [`super::k_grouped`] | `dW1 = dZ^T x`, `x` gathered ([`super::k_grouped::Gathered::B`]) |
//! | 5 | [`super::combine`] | `dx = sum of a token's dX_slots`, without weights |
//!
//! How the row's weight enters depends on [`Weighting`](crate::rules::Weighting):
//!
//! - `Output`: [`slot_weight`](GemmBackwardArgs::slot_weight), and [`out_bias`](GemmBackwardArgs::out_bias) where the second product has a bias.
//! - `Activation`: the same without the bias, which the weight does not reach.
//! - `Input`: no weight in step 1. Step 3 is this operation again, with [`Activation::Identity`], no gate, the weight `W1`, `a = dZ` without a gather, and
//!   as pre-activations the rows of `x` ([`gather_pre_activation`](GemmBackwardDesc::gather_pre_activation)): `d_pre_activation` is then `s dX_slots`,
//!   `d_slot_weight = <dX_slots, x>`, and `hidden = s x` by row, which step 4 takes in place of `x`, ungathered.
//!
//! A factor of all weights ([`crate::layer::LayerDesc::routed_scale`]) is [`scale`](GemmBackwardDesc::scale). A shared expert of the same form has rows in the same
//! launch ([`GemmBackwardDesc::shared_rows`]), of whatever width ([`GemmBackwardDesc::shared_sizes`]), or is a launch of [`Rows::Dense`]; its gate's sigmoid and slope are computed here too ([`GemmBackwardDesc::gate`]).

mod hopper;

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::activation_backward::{Numbered, columns_of};
use super::dispatched::{Dispatched, RowAddresses};
use super::gemm::{
    BAND, ByExpertAddresses, GemmDesc, KernelSet, Rows, SharedDepth, Strides, SwigluByExpert, check_activation,
    check_dropout, select_among,
};
use crate::registry::{GemmHopper, Kernel};
use crate::rules::{
    Activation, Dropout, Dtype, Glu, Layout, NoiseSource, WeightDesc, WeightFormat, drop_below, keep_scale,
};
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, Held, SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::GemmBackwardParams;
use crate::runtime::shape;
use crate::runtime::workspace::{Arena, Region};
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection, Tensor, Workspace};

const OPERATION: &str = "gemm_backward";

/// Shapes and types of a second product's way back.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GemmBackwardDesc {
    /// Type of all matrices.
    pub dtype: Dtype,
    /// Which rows go to which expert.
    pub rows: Rows,
    /// Whether a row reads its token's row of `a`, else its own.
    pub gather: bool,
    /// Columns `I` of `hidden`: the depth of the forward product. Multiples of 8, like those of `k`, are fastest.
    pub n: usize,
    /// Columns `H` of `a`: the outputs of the forward product.
    pub k: usize,
    /// Form of the weight, as the forward product has it. One tensor: not [`Glu::Apart`].
    pub weight: WeightDesc,
    /// What the forward pass made of the pre-activations.
    pub activation: Activation,
    /// Whether they are gate and up value, and in which order the first weight's outputs, and so `d_pre_activation`, are. With [`Glu::Apart`] gates come
    /// first, as with [`Glu::Split`].
    pub glu: Glu,
    /// Whether a row reads its token's row of `pre_activation`, else its own.
    pub gather_pre_activation: bool,
    /// Factor of every row's weight.
    pub scale: f32,
    /// Rows of a shared expert in the same launch ([`GemmBackwardArgs::shared`]), of the same forms; 0 without, as with dense rows.
    pub shared_rows: usize,
    /// Their `[n, k]`, where these are not the others': then the kernels of every device compute all rows.
    pub shared_sizes: Option<[usize; 2]>,
    /// The activation of a shared expert's rows; absent, that of the others.
    pub shared_activation: Option<Activation>,
    /// [`scale`](Self::scale) of a shared expert's rows.
    pub shared_scale: f32,
    /// Whether the rows' weights are logits of a sigmoid, a gate: the row's weight is their sigmoid, and its gradient that of the logit.
    pub gate: bool,
    /// [`gate`](Self::gate) of a shared expert's rows.
    pub shared_gate: bool,
    /// From a row of `a` to the next in elements, where that is not `k`; of a shared expert's [`SharedRowsBackward::a`] the second.
    pub a_rows_apart: Option<[usize; 2]>,
    /// Adds `d_pre_activation` and `d_slot_weight` to what their buffers hold, in f32 and once: of [`Activation::Identity`] without a gate, where the weight has
    /// two tensors and each a launch.
    pub accumulate: bool,
    /// Buffers may begin on any element. Else they begin on 16 bytes if `n` and `k` are multiples of 8.
    pub unaligned: bool,
    /// Which kernels may compute it. None is made for few rows.
    pub kernels: KernelSet,
}

impl GemmBackwardDesc {
    /// Of `rows` whose hidden rows have `n` columns behind a gate, gates first, and whose outputs have `k`: a weight `[E, k, n]`.
    pub const fn new(dtype: Dtype, rows: Rows, n: usize, k: usize, activation: Activation) -> GemmBackwardDesc {
        GemmBackwardDesc {
            dtype,
            rows,
            gather: false,
            n,
            k,
            weight: WeightDesc::new(dtype),
            activation,
            glu: Glu::Split,
            gather_pre_activation: false,
            scale: 1.0,
            shared_rows: 0,
            shared_sizes: None,
            shared_activation: None,
            shared_scale: 1.0,
            gate: false,
            shared_gate: false,
            a_rows_apart: None,
            accumulate: false,
            unaligned: false,
            kernels: KernelSet::Fastest,
        }
    }

    /// Columns of the pre-activations.
    pub const fn columns(&self) -> usize {
        if self.glu.is_gated() { 2 * self.n } else { self.n }
    }

    /// Without a shared expert's rows.
    pub(crate) fn alone(self) -> GemmBackwardDesc {
        let alone = self.shared_rows(0).shared_sizes(None).shared_activation(None);
        // Those of a shared expert may be nearer than this product is deep.
        alone.a_rows_apart(self.a_rows_apart.map(|[row, _]| [row; 2]))
    }

    /// Sizes `[n, k]` of a shared expert's rows, and the columns of its pre-activations.
    fn shared(&self) -> ([usize; 2], usize) {
        let [n, k] = self.shared_sizes.unwrap_or([self.n, self.k]);
        ([n, k], if self.glu.is_gated() { 2 * n } else { n })
    }

    /// Rows of `a`.
    pub fn a_rows(&self) -> usize {
        self.product().a_rows()
    }

    /// Elements that so many rows of `a` reach over, or of a shared expert's.
    fn a_extent(&self, rows: usize, k: usize, which: usize) -> usize {
        let apart = self.a_rows_apart.map_or(k, |apart| apart[which]);
        shape::reach(&[(rows, apart), (k, 1)])
    }

    /// Rows of `pre_activation`.
    fn pre_activation_rows(&self) -> usize {
        match self.rows {
            Rows::Grouped(shape) if self.gather_pre_activation => shape.tokens,
            rows => rows.count(),
        }
    }

    /// The product without what follows it, by the kernels of every device: the weight in its other order.
    fn product(&self) -> GemmDesc {
        let layout = match self.weight.layout {
            Layout::Nk => Layout::Kn,
            Layout::Kn => Layout::Nk,
        };
        let weight = WeightDesc { format: self.weight.format, layout, glu: Glu::None };
        let product = GemmDesc::new(self.dtype, self.rows, self.n, self.k).gather(self.gather).weight(weight);
        let apart = self.a_rows_apart;
        let depth = self.shared_sizes.map(|[_, k]| k).or(apart.map(|_| self.k)).filter(|_| self.shared_rows > 0);
        product
            .strides(apart.map(|[row, _]| Strides::packed(&product).a(row, 1)))
            .shared_rows(self.shared_rows)
            .shared_depth(depth.map(|k| apart.map_or(SharedDepth::new(k), |[_, row]| SharedDepth::new(k).a_row(row))))
            .unaligned(self.unaligned || self.shared_sizes.is_some_and(|[n, _]| !n.is_multiple_of(8)))
            .kernels(KernelSet::Sm80)
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        let operation = OPERATION;
        self.product().check(operation)?;
        if self.weight.glu == Glu::Apart {
            return Err(Error::unsupported(operation, "weight.glu", "one tensor", "Glu::Apart"));
        }
        if self.accumulate && (self.glu.is_gated() || self.activation != Activation::Identity || self.gate) {
            let expected = "false, but of Activation::Identity without a gate";
            return Err(Error::unsupported(operation, "accumulate", expected, true));
        }
        if let Some([row, shared_row]) = self.a_rows_apart {
            let ([_, k], _) = self.shared();
            if row < self.k || shared_row < k {
                let expected = format!("at least {} and {k}", self.k);
                return Err(Error::invalid(operation, "a_rows_apart", expected, format!("{row} and {shared_row}")));
            }
        }
        if self.gather_pre_activation && matches!(self.rows, Rows::Dense(_)) {
            return Err(Error::invalid(operation, "gather_pre_activation", "false for dense rows", true));
        }
        shape::product_i32(operation, "n", &[self.n, 2])?;
        shape::product(operation, "pre_activation", &[self.pre_activation_rows(), self.columns()])?;
        shape::product(operation, "d_pre_activation", &[self.rows.count(), self.columns()])?;
        if let Some([n, _]) = self.shared_sizes {
            shape::positive(operation, "shared_sizes", n)?;
            if self.shared_rows == 0 {
                return Err(Error::invalid(operation, "shared_sizes", "none without shared_rows", n));
            }
            // As an expert's of that width.
            let of_shared = GemmBackwardDesc { shared_sizes: None, n, ..*self }.product();
            of_shared.check(operation)?;
            shape::product_i32(operation, "shared_sizes", &[n, 2])?;
        }
        shape::product(operation, "shared_rows", &[self.shared_rows, self.shared().1])?;
        shape::product_i32(operation, "shared_rows", &[self.shared_rows + self.rows.count(), 1])?;
        check_activation(operation, "activation", self.activation, self.glu)?;
        for (argument, scale) in [("scale", self.scale), ("shared_scale", self.shared_scale)] {
            if !scale.is_finite() {
                return Err(Error::invalid(operation, argument, "a finite number", scale));
            }
        }
        match self.shared_activation {
            Some(activation) if self.shared_rows == 0 => {
                let got = format!("{activation:?}");
                Err(Error::invalid(operation, "shared_activation", "none without shared_rows", got))
            }
            Some(activation) => check_activation(operation, "shared_activation", activation, self.glu),
            None => Ok(()),
        }
    }
}

settings!(GemmBackwardDesc {
    gather: bool,
    weight: WeightDesc,
    glu: Glu,
    gather_pre_activation: bool,
    scale: f32,
    shared_rows: usize,
    shared_sizes: Option<[usize; 2]>,
    shared_activation: Option<Activation>,
    shared_scale: f32,
    gate: bool,
    shared_gate: bool,
    a_rows_apart: Option<[usize; 2]>,
    accumulate: bool,
    unaligned: bool,
    kernels: KernelSet,
});

/// Buffers of a second product's way back.
#[non_exhaustive]
pub struct GemmBackwardArgs<'a, T> {
    /// `[a_rows, K]` ([`GemmBackwardDesc::a_rows`]): the gradient of the product's outputs, before they were weighted.
    pub a: In<'a, T>,
    /// `[E, K, N]` or `[E, N, K]`, by the layout: the forward product's weight.
    pub weight: Tensor<'a>,
    /// The dispatch whose rows these are; exactly with [`Rows::Grouped`], and of the same shape.
    pub dispatched: Option<&'a Dispatched>,
    /// `[rows, 2N]`, gates before ups whatever the weight's order, or `[rows, N]` without a gate; of tokens where they are gathered.
    pub pre_activation: In<'a, T>,
    /// `[rows]`; 1 if absent.
    pub slot_weight: Option<In<'a, f32>>,
    /// `[E, K]`: the product's bias, where the weight scales it too. Read for `d_slot_weight` alone.
    pub out_bias: Option<In<'a, T>>,
    /// `[rows, 2N]` or `[rows, N]`, written: columns in the order of the first weight's outputs. Rows that no tile covers are left as they are, here and in
    /// what follows.
    pub d_pre_activation: Out<'a, T>,
    /// `[rows, N]`, written.
    pub hidden: Option<Out<'a, T>>,
    /// `[rows]`, written.
    pub d_slot_weight: Option<Out<'a, f32>>,
    /// What the forward pass dropped between the products.
    pub dropout: Option<Dropout>,
    /// `[2]`, 8-byte aligned, with `dropout` only: as the forward pass found it. See [`crate::routers::noise_state`].
    pub noise_state: Option<In<'a, u64>>,
    /// The shared expert's rows; exactly with [`GemmBackwardDesc::shared_rows`].
    pub shared: Option<SharedRowsBackward<'a, T>>,
    /// Numbers of the activation that differ from expert to expert.
    pub swiglu: SwigluByExpert<'a>,
}

impl<'a, T> GemmBackwardArgs<'a, T> {
    /// `a`, by way of `weight`, to `d_pre_activation`.
    pub fn new(
        a: impl Into<In<'a, T>>,
        weight: impl Into<Tensor<'a>>,
        pre_activation: impl Into<In<'a, T>>,
        d_pre_activation: impl Into<Out<'a, T>>,
    ) -> GemmBackwardArgs<'a, T> {
        GemmBackwardArgs {
            a: a.into(),
            weight: weight.into(),
            dispatched: None,
            pre_activation: pre_activation.into(),
            slot_weight: None,
            out_bias: None,
            d_pre_activation: d_pre_activation.into(),
            hidden: None,
            d_slot_weight: None,
            dropout: None,
            noise_state: None,
            shared: None,
            swiglu: SwigluByExpert::new(),
        }
    }

    /// By the rows of a dispatch.
    #[must_use]
    pub fn dispatched(self, dispatched: &'a Dispatched) -> GemmBackwardArgs<'a, T> {
        GemmBackwardArgs { dispatched: Some(dispatched), ..self }
    }

    /// With dropout inside the experts.
    #[must_use]
    pub fn dropout(self, dropout: Dropout) -> GemmBackwardArgs<'a, T> {
        GemmBackwardArgs { dropout: Some(dropout), ..self }
    }

    /// With numbers of the activation that differ from expert to expert.
    #[must_use]
    pub fn swiglu(self, swiglu: SwigluByExpert<'a>) -> GemmBackwardArgs<'a, T> {
        GemmBackwardArgs { swiglu, ..self }
    }

    /// With the rows of a shared expert.
    #[must_use]
    pub fn shared(self, shared: SharedRowsBackward<'a, T>) -> GemmBackwardArgs<'a, T> {
        GemmBackwardArgs { shared: Some(shared), ..self }
    }
}

buffers!(GemmBackwardArgs<'a, T> {
    slot_weight: In<f32>,
    out_bias: In<T>,
    hidden: Out<T>,
    d_slot_weight: Out<f32>,
    noise_state: In<u64>,
});

/// Rows of an expert that every token passes, in the launch of the others: without dropout.
#[non_exhaustive]
pub struct SharedRowsBackward<'a, T> {
    /// `[shared_rows, K]`; `K` and `N` are those of [`GemmBackwardDesc::shared_sizes`], where it has some.
    pub a: In<'a, T>,
    /// One expert's.
    pub weight: Tensor<'a>,
    /// `[shared_rows, 2N]` or `[shared_rows, N]`.
    pub pre_activation: In<'a, T>,
    /// `[shared_rows]`; 1 if absent.
    pub row_weight: Option<In<'a, f32>>,
    /// `[K]`.
    pub out_bias: Option<In<'a, T>>,
    /// `[shared_rows, 2N]` or `[shared_rows, N]`, written.
    pub d_pre_activation: Out<'a, T>,
    /// `[shared_rows, N]`, written.
    pub hidden: Option<Out<'a, T>>,
    /// `[shared_rows]`, written.
    pub d_row_weight: Option<Out<'a, f32>>,
}

impl<'a, T> SharedRowsBackward<'a, T> {
    /// `a`, by way of `weight`, to `d_pre_activation`.
    pub fn new(
        a: impl Into<In<'a, T>>,
        weight: impl Into<Tensor<'a>>,
        pre_activation: impl Into<In<'a, T>>,
        d_pre_activation: impl Into<Out<'a, T>>,
    ) -> SharedRowsBackward<'a, T> {
        SharedRowsBackward {
            a: a.into(),
            weight: weight.into(),
            pre_activation: pre_activation.into(),
            row_weight: None,
            out_bias: None,
            d_pre_activation: d_pre_activation.into(),
            hidden: None,
            d_row_weight: None,
        }
    }
}

buffers!(SharedRowsBackward<'a, T> {
    row_weight: In<f32>,
    out_bias: In<T>,
    hidden: Out<T>,
    d_row_weight: Out<f32>,
});

/// Chooses kernel and grid: that of [`super::gemm`] for the product, by the same costs, but none for few rows.
///
/// # Errors
/// Those of [`GemmBackwardDesc::validate`]; [`Error::Unsupported`] for a tile height without a kernel, a device with too little
/// shared memory, or a set of kernels that cannot compute it there; [`Error::Overflow`] for a grid past the device's limit.
pub fn select(desc: &GemmBackwardDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let product = select_among(OPERATION, &desc.product(), &[], device)?;
    if let Some(selection) = hopper::select(desc, &product, device)? {
        return Ok(selection);
    }
    let kernel = match product.kernel.variant() {
        Kernel::Gemm(gemm) => Kernel::GemmBackward(gemm),
        Kernel::GemmAny(gemm) => Kernel::GemmBackwardAny(gemm),
        other => unreachable!("no product of the sm_80 set: {other:?}"),
    };
    let selection = Selection::new(kernel, product.grid);
    let bands = bands(desc, &selection);
    if bands[0].tiles == 0 {
        return Ok(selection);
    }
    let blocks = bands.map(|band| band.tiles.saturating_mul(band.columns) as u64);
    let blocks = shape::grid_x(OPERATION, "shared_sizes", blocks[0].saturating_add(blocks[1]))?;
    Ok(Selection::new(kernel, [blocks, 1, 1]))
}

/// Row tiles in whole bands, and the column tiles that each of them has.
#[derive(Clone, Copy)]
struct Bands {
    tiles: usize,
    columns: usize,
}

/// Those of a shared expert's rows, where its width is another, and those of the others, with a shared expert's where it is not. `selection` has the kernel.
fn bands(desc: &GemmBackwardDesc, selection: &Selection) -> [Bands; 2] {
    let (height, width) = match selection.kernel.variant() {
        Kernel::GemmBackward(gemm) => (gemm.tile.bm as usize, gemm.out_columns() as usize),
        Kernel::GemmBackwardHopper(gemm) => (GemmHopper::TILE.bm as usize, gemm.out_columns() as usize),
        Kernel::GemmBackwardAny(gemm) => (gemm.tile().bm as usize, gemm.out_columns() as usize),
        other => unreachable!("{other:?} is no way back"),
    };
    let own = match desc.rows {
        Rows::Dense(rows) => rows.div_ceil(height),
        Rows::Grouped(shape) => shape.max_tiles.saturating_mul(shape.tile_m.div_ceil(height)),
    };
    let shared = desc.shared_rows.div_ceil(height);
    let ([n, _], _) = desc.shared();
    let (apart, joined) = if n == desc.n { (0, shared) } else { (shared, 0) };
    let band = |tiles: usize, n: usize| Bands { tiles: tiles.next_multiple_of(BAND), columns: n.div_ceil(width) };
    [band(apart, n), band(own.saturating_add(joined), desc.n)]
}

/// Sums of rows that several column tiles share: places in a workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SumRegions {
    /// `[column tiles, shared_rows + rows]` f32.
    pub(crate) parts: Region,
    /// A counter for each row tile, or of the kernels for Hopper for each row.
    pub(crate) arrivals: Region,
}

impl SumRegions {
    /// Lays what the selection needs; nothing where one column tile has all.
    pub(crate) fn lay(arena: &mut Arena, desc: &GemmBackwardDesc, selection: &Selection) -> Result<SumRegions, Error> {
        let bands = bands(desc, selection);
        let columns = bands.iter().filter(|band| band.tiles > 0).map(|band| band.columns).max().unwrap_or(1);
        if columns == 1 {
            return Ok(SumRegions::default());
        }
        let rows = desc.shared_rows + desc.rows.count();
        let arrivals = match selection.kernel.variant() {
            Kernel::GemmBackwardHopper(_) => rows,
            _ => bands[0].tiles + bands[1].tiles,
        };
        Ok(SumRegions {
            arrivals: arena.region("workspace", arrivals, size_of::<u32>())?,
            parts: arena.region(
                "workspace",
                shape::product(OPERATION, "workspace", &[columns, rows])?,
                size_of::<f32>(),
            )?,
        })
    }
}

fn laid(desc: &GemmBackwardDesc, selection: &Selection) -> Result<(SumRegions, usize), Error> {
    let mut arena = Arena::new(OPERATION);
    arena.barrier()?;
    let regions = SumRegions::lay(&mut arena, desc, selection)?;
    Ok((regions, arena.bytes()))
}

/// Size of the workspace in bytes.
///
/// # Errors
/// Those of [`select`].
pub fn workspace_bytes(desc: &GemmBackwardDesc, device: &DeviceInfo) -> Result<usize, Error> {
    Ok(laid(desc, &select(desc, device)?)?.1)
}

/// Computes `d_pre_activation` and what else is asked for.
///
/// With no rows or no tiles nothing is launched. A launch whose `d_slot_weight` has several column tiles is preceded by zeros into their counters (four bytes a
/// row tile; a row on Hopper), no kernel.
///
/// # Errors
/// Those of [`select`]; [`Error::Missing`], [`Error::Unexpected`] or [`Error::Invalid`] for a dispatch or a shared expert against the descriptor, for a
/// dropout's probability outside its range, and for a noise state without dropout; those of a buffer: [`Error::WrongDtype`], [`Error::BufferTooShort`],
/// [`Error::Misaligned`], [`Error::DifferentContext`], [`Error::WorkspaceTooSmall`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GemmBackwardDesc,
    args: GemmBackwardArgs<'_, T>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    let operation = OPERATION;
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(operation, kernels, stream)?;
    scope.check_dtype::<T>("a", desc.dtype)?;
    check_given(desc, args.dispatched, args.shared.is_some())?;
    if let Some(dropout) = args.dropout {
        check_dropout(operation, &dropout)?;
    } else if args.noise_state.is_some() {
        return Err(Error::Unexpected { operation, argument: "noise_state", reason: "there is no dropout" });
    }
    if desc.rows.count() + desc.shared_rows == 0 || selection.grid[0] == 0 {
        return Ok(());
    }
    let any = matches!(selection.kernel.variant(), Kernel::GemmBackwardAny(_));
    let element = u64::from(desc.dtype.bytes());
    let alignment = if any { element } else { VECTOR };
    let (rows, experts, columns) = (desc.rows.count(), desc.rows.experts(), desc.columns());
    let &GemmBackwardDesc { n, k, .. } = desc;
    let a = scope.read("a", args.a, desc.a_extent(desc.a_rows(), k, 0), alignment)?;
    let WeightFormat::Plain(format) = desc.weight.format;
    let weight = scope.read_tensor("weight", args.weight, format, experts * k * n, alignment)?;
    let dispatched = args.dispatched.map(|dispatched| dispatched.read(&scope)).transpose()?;
    let z = desc.pre_activation_rows() * columns;
    let pre_activation = scope.read("pre_activation", args.pre_activation, z, alignment)?;
    let slot_weight = scope.read_some("slot_weight", args.slot_weight, rows, SCALAR)?;
    let out_bias = scope.read_some("out_bias", args.out_bias, experts * k, element)?;
    let d_pre_activation = scope.write("d_pre_activation", args.d_pre_activation, rows * columns, alignment)?;
    let hidden = scope.write_some("hidden", args.hidden, rows * n, alignment)?;
    let d_slot_weight = scope.write_some("d_slot_weight", args.d_slot_weight, rows, SCALAR)?;
    let noise_state = scope.read_noise_state(args.noise_state)?;
    let shared = args.shared.map(|shared| shared.open(&scope, desc, alignment)).transpose()?;
    let swiglu = args.swiglu.open(&scope, desc.activation, experts)?;
    let (regions, bytes) = laid(desc, &selection)?;
    let workspace = workspace.open(&scope, bytes)?;
    let at = Addresses {
        a: a.address(),
        weight: weight.address(),
        rows: dispatched.as_ref().map(|dispatched| dispatched.addresses()),
        pre_activation: pre_activation.address(),
        slot_weight: optional(&slot_weight),
        out_bias: optional(&out_bias),
        d_pre_activation: d_pre_activation.address(),
        hidden: optional(&hidden),
        d_slot_weight: optional(&d_slot_weight),
        noise_state: optional(&noise_state),
        shared: shared.as_ref().map(HeldSharedBackward::addresses),
        swiglu: swiglu.addresses(),
    };
    enqueue(&scope, desc, &selection, at, args.dropout, &workspace, regions)
}

fn check_given(desc: &GemmBackwardDesc, dispatched: Option<&Dispatched>, shared: bool) -> Result<(), Error> {
    let operation = OPERATION;
    match (&desc.rows, dispatched) {
        (Rows::Grouped(_), None) => {
            return Err(Error::Missing { operation, argument: "dispatched", reason: "the rows are Grouped" });
        }
        (Rows::Dense(_), Some(_)) => {
            return Err(Error::Unexpected { operation, argument: "dispatched", reason: "the rows are Dense" });
        }
        (Rows::Grouped(shape), Some(dispatched)) if dispatched.shape() != shape => {
            let got = format!("{:?}", dispatched.shape());
            return Err(Error::invalid(operation, "dispatched", format!("a dispatch of {shape:?}"), got));
        }
        _ => {}
    }
    let argument = "shared";
    match (desc.shared_rows, shared) {
        (1.., false) => Err(Error::Missing { operation, argument, reason: "the descriptor has shared_rows" }),
        (0, true) => Err(Error::Unexpected { operation, argument, reason: "the descriptor has no shared_rows" }),
        _ => Ok(()),
    }
}

/// A shared expert's rows, opened.
struct HeldSharedBackward<'a> {
    a: Held<'a>,
    weight: Held<'a>,
    pre_activation: Held<'a>,
    row_weight: Option<Held<'a>>,
    out_bias: Option<Held<'a>>,
    d_pre_activation: Held<'a>,
    hidden: Option<Held<'a>>,
    d_row_weight: Option<Held<'a>>,
}

impl<'a, T> SharedRowsBackward<'a, T> {
    fn open<'b>(
        self,
        scope: &Scope<'b>,
        desc: &GemmBackwardDesc,
        alignment: u64,
    ) -> Result<HeldSharedBackward<'b>, Error>
    where
        'a: 'b,
    {
        let (rows, ([n, k], columns)) = (desc.shared_rows, desc.shared());
        let WeightFormat::Plain(format) = desc.weight.format;
        Ok(HeldSharedBackward {
            a: scope.read("shared.a", self.a, desc.a_extent(rows, k, 1), alignment)?,
            weight: scope.read_tensor("shared.weight", self.weight, format, k * n, alignment)?,
            pre_activation: scope.read("shared.pre_activation", self.pre_activation, rows * columns, alignment)?,
            row_weight: scope.read_some("shared.row_weight", self.row_weight, rows, SCALAR)?,
            out_bias: scope.read_some("shared.out_bias", self.out_bias, k, desc.dtype.bytes().into())?,
            d_pre_activation: scope.write(
                "shared.d_pre_activation",
                self.d_pre_activation,
                rows * columns,
                alignment,
            )?,
            hidden: scope.write_some("shared.hidden", self.hidden, rows * n, alignment)?,
            d_row_weight: scope.write_some("shared.d_row_weight", self.d_row_weight, rows, SCALAR)?,
        })
    }
}

impl HeldSharedBackward<'_> {
    fn addresses(&self) -> SharedAddresses<'_> {
        SharedAddresses {
            a: self.a.address(),
            weight: self.weight.address(),
            pre_activation: self.pre_activation.address(),
            row_weight: optional(&self.row_weight),
            out_bias: optional(&self.out_bias),
            d_pre_activation: self.d_pre_activation.address(),
            hidden: optional(&self.hidden),
            d_row_weight: optional(&self.d_row_weight),
        }
    }
}

/// What a shared expert's rows read and write.
#[derive(Clone, Copy)]
pub(crate) struct SharedAddresses<'a> {
    pub(crate) a: Address<'a>,
    pub(crate) weight: Address<'a>,
    pub(crate) pre_activation: Address<'a>,
    pub(crate) row_weight: Option<Address<'a>>,
    pub(crate) out_bias: Option<Address<'a>>,
    pub(crate) d_pre_activation: Address<'a>,
    pub(crate) hidden: Option<Address<'a>>,
    pub(crate) d_row_weight: Option<Address<'a>>,
}

/// What the launch reads and writes.
pub(crate) struct Addresses<'a> {
    pub(crate) a: Address<'a>,
    pub(crate) weight: Address<'a>,
    /// Exactly with [`Rows::Grouped`].
    pub(crate) rows: Option<RowAddresses<'a>>,
    pub(crate) pre_activation: Address<'a>,
    pub(crate) slot_weight: Option<Address<'a>>,
    pub(crate) out_bias: Option<Address<'a>>,
    pub(crate) d_pre_activation: Address<'a>,
    pub(crate) hidden: Option<Address<'a>>,
    pub(crate) d_slot_weight: Option<Address<'a>>,
    /// Of the dropout.
    pub(crate) noise_state: Option<Address<'a>>,
    /// Exactly with [`GemmBackwardDesc::shared_rows`].
    pub(crate) shared: Option<SharedAddresses<'a>>,
    pub(crate) swiglu: ByExpertAddresses<'a>,
}

/// The launch, with `regions` of `workspace` for its sums.
pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &GemmBackwardDesc,
    selection: &Selection,
    at: Addresses<'_>,
    dropout: Option<Dropout>,
    workspace: &Held<'_>,
    regions: SumRegions,
) -> Result<(), Error> {
    let own = Numbered::new(desc.activation);
    let shared = Numbered::new(desc.shared_activation.unwrap_or(desc.activation));
    let Dropout { probability, noise } = dropout.unwrap_or(Dropout { probability: 0.0, noise: NoiseSource::default() });
    let [seed_lo, seed_hi, offset_lo, offset_hi] = noise.words_of_source();
    let product = desc.product();
    let [expert, output, depth] = product.weight.strides(desc.n, desc.k);
    let (gate_first, up_first, stride) = columns_of(desc.glu, desc.n as u32);
    let ([shared_n, shared_k], _) = desc.shared();
    let (shared_gate_first, shared_up_first, _) = columns_of(desc.glu, shared_n as u32);
    let [_, shared_output, shared_depth] = product.weight.strides(shared_n, shared_k);
    let sums = at.d_slot_weight.is_some() || at.shared.is_some_and(|shared| shared.d_row_weight.is_some());
    let several = sums && regions != SumRegions::default();
    if several {
        scope.zero(workspace.at(regions.arrivals), regions.arrivals.bytes)?;
    }
    let slot_token = at.rows.map(|rows| rows.slot_token);
    let params = GemmBackwardParams {
        a: at.a.into(),
        b: at.weight.into(),
        slot_token: slot_token.filter(|_| desc.gather).into(),
        tiles: at.rows.map(|rows| rows.tiles).into(),
        num_tiles: at.rows.map(|rows| rows.num_tiles).into(),
        pre_activation: at.pre_activation.into(),
        pre_slot_token: slot_token.filter(|_| desc.gather_pre_activation).into(),
        weight: at.slot_weight.into(),
        out_bias: at.out_bias.into(),
        d_pre_activation: at.d_pre_activation.into(),
        hidden: at.hidden.into(),
        d_weight: at.d_slot_weight.into(),
        shared_a: at.shared.map(|shared| shared.a).into(),
        shared_b: at.shared.map(|shared| shared.weight).into(),
        shared_pre_activation: at.shared.map(|shared| shared.pre_activation).into(),
        shared_weight: at.shared.and_then(|shared| shared.row_weight).into(),
        shared_out_bias: at.shared.and_then(|shared| shared.out_bias).into(),
        shared_d_pre_activation: at.shared.map(|shared| shared.d_pre_activation).into(),
        shared_hidden: at.shared.and_then(|shared| shared.hidden).into(),
        shared_d_weight: at.shared.and_then(|shared| shared.d_row_weight).into(),
        parts: several.then(|| workspace.at(regions.parts)).into(),
        arrivals: several.then(|| workspace.at(regions.arrivals)).into(),
        expert_alpha: at.swiglu.alpha.into(),
        expert_gate_limit: at.swiglu.gate.into(),
        expert_up_limit: at.swiglu.up.into(),
        expert_offset: at.swiglu.offset.into(),
        noise_state: at.noise_state.into(),
        shared_rows: desc.shared_rows as u32,
        shared_n: shared_n as u32,
        shared_k: shared_k as u32,
        shared_a_row: desc.a_rows_apart.map_or(shared_k, |[_, row]| row) as u32,
        shared_b_output: shared_output as u32,
        shared_b_depth: shared_depth as u32,
        shared_gate_first,
        shared_up_first,
        gates: u32::from(desc.gate) | u32::from(desc.shared_gate) << 1,
        m: desc.rows.count() as u32,
        n: desc.n as u32,
        k: desc.k as u32,
        b_outputs: desc.n as u32,
        tile_m: match &desc.rows {
            Rows::Dense(_) => 1,
            Rows::Grouped(shape) => shape.tile_m as u32,
        },
        a_row: desc.a_rows_apart.map_or(desc.k, |[row, _]| row) as u32,
        a_depth: 1,
        b_expert_lo: expert as u64 as u32,
        b_expert_hi: (expert as u64 >> 32) as u32,
        b_output: output as u32,
        b_depth: depth as u32,
        gated: u32::from(desc.glu.is_gated()),
        gate_first,
        up_first,
        stride,
        scale: desc.scale,
        shared_scale: desc.shared_scale,
        activation: own.activation,
        gate_bound: own.gate_bound,
        up_bound: own.up_bound,
        alpha: own.alpha,
        gate_limit: own.gate_limit,
        up_limit: own.up_limit,
        factor: own.factor,
        offset: own.offset,
        shared_activation: shared.activation,
        shared_gate_bound: shared.gate_bound,
        shared_up_bound: shared.up_bound,
        shared_alpha: shared.alpha,
        shared_gate_limit: shared.gate_limit,
        shared_up_limit: shared.up_limit,
        shared_factor: shared.factor,
        shared_offset: shared.offset,
        drop_below: drop_below(probability),
        keep_scale: keep_scale(probability),
        seed_lo,
        seed_hi,
        offset_lo,
        offset_hi,
        accumulate: u32::from(desc.accumulate),
    };
    match selection.kernel.variant() {
        Kernel::GemmBackwardHopper(gemm) => scope.launch(
            selection,
            hopper::with_maps(
                scope,
                desc,
                &gemm,
                params,
                [at.a, at.weight],
                at.shared.map(|shared| [shared.a, shared.weight]),
            )?,
        ),
        _ => scope.launch(selection, params),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::dispatched::SlotShape;
    use crate::rules::Swiglu;
    use crate::runtime::device::{A100, H100};

    fn desc() -> GemmBackwardDesc {
        let rows = Rows::Grouped(SlotShape::new(100, 8, Some(2), 200, 64, 11));
        GemmBackwardDesc::new(Dtype::Bf16, rows, 264, 72, Activation::Silu)
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: GemmBackwardDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        assert!(select(&desc(), &A100).is_ok());
        let dense = GemmBackwardDesc { rows: Rows::Dense(5), ..desc() };
        assert_eq!(fault(GemmBackwardDesc { n: 0, ..desc() }), "n");
        assert_eq!(fault(GemmBackwardDesc { n: 1 << 30, ..desc() }), "n");
        assert_eq!(fault(GemmBackwardDesc { k: 0, ..desc() }), "k");
        assert_eq!(fault(dense.gather(true)), "gather");
        assert_eq!(fault(dense.gather_pre_activation(true)), "gather_pre_activation");
        assert_eq!(fault(dense.shared_rows(1)), "shared_rows");
        assert_eq!(fault(desc().weight(WeightDesc::new(Dtype::Bf16).glu(Glu::Apart))), "weight.glu");
        assert_eq!(fault(desc().weight(WeightDesc::new(Dtype::F16))), "weight.format");
        assert_eq!(fault(GemmBackwardDesc { activation: Activation::Identity, ..desc() }), "activation");
        assert_eq!(
            fault(GemmBackwardDesc { activation: Swiglu::GPT_OSS.into(), ..desc() }.glu(Glu::None)),
            "activation"
        );
        assert_eq!(fault(desc().scale(f32::NAN)), "scale");
        assert_eq!(fault(desc().accumulate(true)), "accumulate");
        assert_eq!(fault(desc().a_rows_apart(Some([71, 72]))), "a_rows_apart");
        assert_eq!(fault(desc().shared_scale(f32::INFINITY)), "shared_scale");
        assert_eq!(fault(desc().shared_activation(Some(Activation::Silu))), "shared_activation");
        assert_eq!(fault(desc().shared_rows(3).shared_activation(Some(Activation::Identity))), "shared_activation");
    }

    #[test]
    fn a_workspace_only_for_several_column_tiles() {
        let bytes = |desc: GemmBackwardDesc| workspace_bytes(&desc, &A100).unwrap();
        let one = bytes(GemmBackwardDesc { n: 128, ..desc() });
        assert!(one <= 256, "{one}");
        // Three column tiles of 200 rows, and a counter for each of 16 row tiles.
        assert!(bytes(desc()) >= 3 * 200 * 4 + 16 * 4);
        assert!(bytes(desc().shared_rows(1000)) >= 3 * 1200 * 4);
    }

    #[test]
    fn hopper_runs_its_own_where_it_is_ahead() {
        // Qwen3-30B's, and a smaller batch.
        let of = |tokens: usize, tile_m: usize, kernels| {
            let tiles = crate::experts::tiles::max_tiles(8 * tokens, 128, tile_m);
            let rows = Rows::Grouped(SlotShape::new(tokens, 128, Some(8), 8 * tokens, tile_m, tiles));
            GemmBackwardDesc::new(Dtype::Bf16, rows, 768, 2048, Activation::Silu).gather(true).kernels(kernels)
        };
        let is_own = |desc: &GemmBackwardDesc, device: &DeviceInfo| {
            matches!(select(desc, device).unwrap().kernel.variant(), Kernel::GemmBackwardHopper(_))
        };
        let large = of(32768, 128, KernelSet::Fastest);
        assert!(is_own(&large, &H100));
        assert_eq!(select(&large, &H100).unwrap().cluster, [2, 1, 1]);
        assert!(!is_own(&large, &A100));
        assert!(!is_own(&large.kernels(KernelSet::Sm80), &H100));
        assert!(!is_own(&large.unaligned(true), &H100));
        assert!(!is_own(&of(128, 16, KernelSet::Fastest), &H100), "lists of low tiles");
        let little = DeviceInfo { shared_bytes_per_block: GemmHopper::BACKWARD_SHARED_BYTES - 1, ..H100 };
        assert!(!is_own(&large, &little));
        for (desc, device) in [
            (of(64, 16, KernelSet::Sm90a), H100),
            (of(64, 128, KernelSet::Sm90a).unaligned(true), H100),
            (of(64, 128, KernelSet::Sm90a), A100),
        ] {
            assert_eq!(select(&desc, &device).unwrap_err().argument(), Some("kernels"));
        }
        let single = GemmBackwardDesc { dtype: Dtype::F32, weight: WeightDesc::new(Dtype::F32), ..large };
        assert!(!is_own(&GemmBackwardDesc { rows: Rows::Dense(4096), ..single.gather(false) }, &H100));
    }

    #[test]
    fn the_weight_is_read_in_its_other_order() {
        let layout = |layout| match select(&desc().weight(WeightDesc::new(Dtype::Bf16).layout(layout)), &A100)
            .unwrap()
            .kernel
            .variant()
        {
            Kernel::GemmBackward(gemm) => gemm.layout,
            other => panic!("{other:?}"),
        };
        assert_eq!(layout(Layout::Nk), Layout::Kn);
        assert_eq!(layout(Layout::Kn), Layout::Nk);
    }
}
