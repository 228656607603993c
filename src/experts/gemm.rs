//! Matrix products of the experts: one launch for all of them, or one dense product.
//!
//! Row `r` of the output belongs to expert `e` (by the tile list; expert 0 when dense) and reads row `slot_token[r]` of `a`
//! (row `r` without it):
//!
//! `v[n] = row_scale[r] * sum_k a[.,k] * b[e,n,k] + bias[e,n]`
//!
//! and `out[r]` is an activation of `v`, rounded once. See [`Activation`]. Products are summed in f32; f32 inputs
//! keep a relative error of 1e-5. [`forward_with_dropout`] also drops outputs at random.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use crate::capacity::dispatch::TileEntry;
use crate::experts::tiles::{select_tile, tile_of_height};
use crate::registry::{Gemm, Kernel};
use crate::rules::Dtype;
use crate::rules::{Activation, Dropout, Glu, Layout, NoiseSource};
use crate::rules::{drop_below, keep_scale};
use crate::runtime::launch::{Address, SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::GemmParams;
use crate::runtime::shape;
use crate::{DeviceInfo, Element, Error, In, Kernels, Out, Selection};

const OPERATION: &str = "gemm";

/// Largest depth: the kernel's offsets between rows of one tile of `b` have 32 bits.
const MAX_K: usize = 1 << 23;

/// Most weight outputs per expert, for the same reason where they are contiguous.
const MAX_B_COLUMNS: usize = 1 << 26;

impl Activation {
    fn code(self) -> u32 {
        match self {
            Activation::Identity => 0,
            Activation::Relu => 1,
            Activation::Gelu => 2,
            Activation::GeluTanh => 3,
            Activation::Silu => 4,
            Activation::ClampedSwiglu { .. } => 5,
        }
    }

    fn alpha_limit(self) -> (f32, f32) {
        match self {
            Activation::ClampedSwiglu { alpha, limit } => (alpha, limit),
            _ => (0.0, 0.0),
        }
    }

    pub(crate) fn check(self, operation: &'static str, argument: &'static str, glu: Glu) -> Result<(), Error> {
        match (self, glu) {
            (Activation::Identity, Glu::Split | Glu::Interleaved) => {
                Err(Error::unsupported(operation, argument, "a gated unit needs an activation", "Activation::Identity"))
            }
            (Activation::ClampedSwiglu { .. }, Glu::None) => Err(Error::unsupported(
                operation,
                argument,
                "clamped SwiGLU needs a gated unit, Glu::Split or Glu::Interleaved",
                "Activation::ClampedSwiglu",
            )),
            (Activation::ClampedSwiglu { alpha, limit }, _) if !alpha.is_finite() || limit.is_nan() || limit < 0.0 => {
                Err(Error::invalid(
                    operation,
                    argument,
                    "a finite alpha and a limit of at least 0",
                    format!("{self:?}"),
                ))
            }
            _ => Ok(()),
        }
    }
}

/// Which rows go to which expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// All rows to one matrix: a shared expert, a plain linear layer.
    Dense,
    /// By the tile list of a dispatch.
    Grouped {
        /// Rows of a tile, as the dispatch had it.
        tile_m: usize,
        /// Entries that the list may have ([`crate::capacity::dispatch::DispatchDesc::max_tiles`]).
        max_tiles: usize,
    },
}

/// Shapes and type of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GemmDesc {
    /// Type of `a`, `b`, `bias` and `out`.
    pub dtype: Dtype,
    /// Rows of `out` and of `slot_token`.
    pub rows: usize,
    /// Rows of `a`: the number of tokens where `slot_token` gathers, else `rows`.
    pub a_rows: usize,
    /// Experts `E`; 1 when dense.
    pub experts: usize,
    /// Columns `N` of `out`, a multiple of 8.
    pub n: usize,
    /// Columns `K` of `a`, a multiple of 8.
    pub k: usize,
    /// How the weight's outputs fold into columns of `out`.
    pub glu: Glu,
    /// What is applied to the product.
    pub activation: Activation,
    /// How `b` lies in memory.
    pub layout: Layout,
    /// Which rows go to which expert.
    pub schedule: Schedule,
}

impl GemmDesc {
    /// Weight outputs per expert: `N`, or `2 N` with a gated unit.
    pub fn b_columns(&self) -> usize {
        match self.glu {
            Glu::None => self.n,
            Glu::Split | Glu::Interleaved => 2 * self.n,
        }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        shape::size(OPERATION, "rows", self.rows)?;
        shape::size(OPERATION, "a_rows", self.a_rows)?;
        shape::experts(OPERATION, self.experts)?;
        shape::multiple_of_8(OPERATION, "n", self.n)?;
        shape::multiple_of_8(OPERATION, "k", self.k)?;
        shape::size(OPERATION, "n", self.b_columns())?;
        for (argument, value, limit) in [("k", self.k, MAX_K), ("n", self.b_columns(), MAX_B_COLUMNS)] {
            if value > limit {
                let (value, limit) = (value.to_string(), limit as u64);
                return Err(Error::Overflow { operation: OPERATION, argument, value, limit });
            }
        }
        shape::product(OPERATION, "a", &[self.a_rows, self.k])?;
        shape::product(OPERATION, "b", &[self.experts, self.b_columns(), self.k])?;
        shape::product(OPERATION, "out", &[self.rows, self.n])?;
        self.activation.check(OPERATION, "activation", self.glu)?;
        match self.schedule {
            Schedule::Dense if self.experts != 1 => {
                Err(Error::invalid(OPERATION, "experts", "1 with Schedule::Dense", self.experts))
            }
            Schedule::Dense => Ok(()),
            Schedule::Grouped { tile_m, max_tiles } => {
                shape::positive(OPERATION, "tile_m", tile_m)?;
                shape::size(OPERATION, "max_tiles", max_tiles)?;
                Ok(())
            }
        }
    }
}

/// Buffers of a product.
pub struct GemmArgs<'a, T> {
    /// `[a_rows, K]`.
    pub a: In<'a, T>,
    /// `[E, Nb, K]` ([`Layout::Nk`]) or `[E, K, Nb]` ([`Layout::Kn`]), with `Nb` = [`GemmDesc::b_columns`].
    pub b: In<'a, T>,
    /// `[E, Nb]`, in the order of the weight's outputs.
    pub bias: Option<In<'a, T>>,
    /// `[rows]`: the row of `a` that each output row reads. Entries of rows in the tile list must be in `0..a_rows`.
    pub slot_token: Option<In<'a, i32>>,
    /// `[rows]`: factor of each row's product, before the bias (Llama 4 scales the expert's input).
    pub row_scale: Option<In<'a, f32>>,
    /// The tile list as dispatch wrote it; exactly with [`Schedule::Grouped`].
    pub tiles: Option<Tiles<'a>>,
    /// `[rows, N]`. Rows that no tile covers are left as they are.
    pub out: Out<'a, T>,
}

/// A tile list to read.
#[derive(Clone, Copy)]
pub struct Tiles<'a> {
    /// `[max_tiles]`.
    pub tiles: In<'a, TileEntry>,
    /// `[1]`.
    pub num_tiles: In<'a, i32>,
}

/// Tiles that consecutive blocks share a weight over, so that it is read from L2: the kernel's order of blocks.
const BAND: usize = 8;

/// Chooses kernel and grid: the dispatch's tile height, or for a dense product the cheapest one.
///
/// # Errors
/// Those of [`GemmDesc::validate`]; [`Error::Unsupported`] for a tile height without a kernel, or a device with too little
/// shared memory; [`Error::Overflow`] for a grid past the device's limit.
pub fn select(desc: &GemmDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let (tile, tiles) = match desc.schedule {
        Schedule::Dense => {
            let tile = select_tile(desc.dtype, desc.rows, 1, device)?;
            (tile, desc.rows.div_ceil(tile.bm as usize))
        }
        Schedule::Grouped { tile_m, max_tiles } => (tile_of_height(desc.dtype, tile_m, device)?, max_tiles),
    };
    let gemm = Gemm { dtype: desc.dtype, tile, glu: desc.glu, layout: desc.layout };
    let columns = desc.n.div_ceil(gemm.out_columns() as usize);
    let blocks = (tiles.next_multiple_of(BAND) as u64).saturating_mul(columns as u64);
    let blocks = shape::grid_x(OPERATION, "n", blocks)?;
    Ok(Selection::new(Kernel::Gemm(gemm), [blocks, 1, 1]))
}

/// Computes `out`.
///
/// With no rows or no tiles nothing is launched.
///
/// # Errors
/// Those of [`select`]; [`Error::Missing`] or [`Error::Unexpected`] for a tile list against the schedule; those of a buffer:
/// [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the
/// driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GemmDesc,
    args: GemmArgs<'_, T>,
) -> Result<(), Error> {
    run(kernels, stream, desc, args, None)
}

/// Computes `out` and drops some of it, after the activation: [`crate::reference::gemm::dropout`].
///
/// # Errors
/// Those of [`forward`]; [`Error::Invalid`] for a probability outside its range.
pub fn forward_with_dropout<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GemmDesc,
    args: GemmArgs<'_, T>,
    dropout: Dropout,
) -> Result<(), Error> {
    if !(0.0..1.0).contains(&dropout.probability) {
        let expected = "from 0 to below 1";
        return Err(Error::invalid(OPERATION, "dropout.probability", expected, dropout.probability));
    }
    run(kernels, stream, desc, args, Some(dropout))
}

fn run<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &GemmDesc,
    args: GemmArgs<'_, T>,
    dropout: Option<Dropout>,
) -> Result<(), Error> {
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(OPERATION, kernels, stream)?;
    scope.check_dtype::<T>("a", desc.dtype)?;
    check_arguments(desc, &args)?;
    if desc.rows == 0 || selection.grid[0] == 0 {
        return Ok(());
    }
    let a = scope.read("a", args.a, desc.a_rows * desc.k, VECTOR)?;
    let b = scope.read("b", args.b, desc.experts * desc.b_columns() * desc.k, VECTOR)?;
    let bias = scope.read_some("bias", args.bias, desc.experts * desc.b_columns(), VECTOR)?;
    let slot_token = scope.read_some("slot_token", args.slot_token, desc.rows, SCALAR)?;
    let row_scale = scope.read_some("row_scale", args.row_scale, desc.rows, SCALAR)?;
    let max_tiles = match desc.schedule {
        Schedule::Dense => 0,
        Schedule::Grouped { max_tiles, .. } => max_tiles,
    };
    let tiles = scope.read_some("tiles", args.tiles.map(|list| list.tiles), max_tiles, VECTOR)?;
    let num_tiles = scope.read_some("num_tiles", args.tiles.map(|list| list.num_tiles), 1, SCALAR)?;
    let out = scope.write("out", args.out, desc.rows * desc.n, VECTOR)?;
    let addresses = Addresses {
        a: a.address(),
        b: b.address(),
        bias: optional(&bias),
        out: out.address(),
        slot_token: optional(&slot_token),
        row_scale: optional(&row_scale),
        tiles: optional(&tiles),
        num_tiles: optional(&num_tiles),
    };
    scope.launch(&selection, params(desc, addresses, dropout))
}

fn check_arguments<T>(desc: &GemmDesc, args: &GemmArgs<'_, T>) -> Result<(), Error> {
    let (operation, argument) = (OPERATION, "tiles");
    match (desc.schedule, args.tiles.is_some()) {
        (Schedule::Grouped { .. }, false) => {
            return Err(Error::Missing { operation, argument, reason: "the schedule is Grouped" });
        }
        (Schedule::Dense, true) => {
            return Err(Error::Unexpected { operation, argument, reason: "the schedule is Dense" });
        }
        _ => {}
    }
    if args.slot_token.is_none() && desc.a_rows < desc.rows {
        let expected = format!("at least rows = {} without slot_token", desc.rows);
        return Err(Error::invalid(OPERATION, "a_rows", expected, desc.a_rows));
    }
    Ok(())
}

pub(crate) struct Addresses<'a> {
    pub(crate) a: Address<'a>,
    pub(crate) b: Address<'a>,
    pub(crate) bias: Option<Address<'a>>,
    pub(crate) out: Address<'a>,
    pub(crate) slot_token: Option<Address<'a>>,
    pub(crate) row_scale: Option<Address<'a>>,
    pub(crate) tiles: Option<Address<'a>>,
    pub(crate) num_tiles: Option<Address<'a>>,
}

pub(crate) fn enqueue(
    scope: &Scope<'_>,
    desc: &GemmDesc,
    selection: &Selection,
    at: Addresses<'_>,
) -> Result<(), Error> {
    scope.launch(selection, params(desc, at, None))
}

fn params<'a>(desc: &GemmDesc, at: Addresses<'a>, dropout: Option<Dropout>) -> GemmParams<'a> {
    let (alpha, limit) = desc.activation.alpha_limit();
    let Dropout { probability, noise } = dropout.unwrap_or(Dropout { probability: 0.0, noise: NoiseSource::default() });
    let [seed_lo, seed_hi, offset_lo, offset_hi] = noise.words_of_source();
    GemmParams {
        a: at.a.into(),
        b: at.b.into(),
        bias: at.bias.into(),
        out: at.out.into(),
        slot_token: at.slot_token.into(),
        row_scale: at.row_scale.into(),
        tiles: at.tiles.into(),
        num_tiles: at.num_tiles.into(),
        m: desc.rows as u32,
        n: desc.n as u32,
        k: desc.k as u32,
        activation: desc.activation.code(),
        alpha,
        limit,
        drop_below: drop_below(probability),
        keep_scale: keep_scale(probability),
        seed_lo,
        seed_hi,
        offset_lo,
        offset_hi,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::runtime::device::A100;

    fn dense() -> GemmDesc {
        GemmDesc {
            dtype: Dtype::Bf16,
            rows: 100,
            a_rows: 100,
            experts: 1,
            n: 72,
            k: 64,
            glu: Glu::Split,
            activation: Activation::Silu,
            layout: Layout::Nk,
            schedule: Schedule::Dense,
        }
    }

    fn grouped(tile_m: usize, max_tiles: usize) -> GemmDesc {
        GemmDesc { experts: 8, schedule: Schedule::Grouped { tile_m, max_tiles }, ..dense() }
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: GemmDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        assert!(select(&dense(), &A100).is_ok());
        assert!(select(&grouped(64, 10), &A100).is_ok());
        assert_eq!(fault(GemmDesc { n: 12, ..dense() }), "n");
        assert_eq!(fault(GemmDesc { n: 1 << 30, ..dense() }), "n");
        assert_eq!(fault(GemmDesc { k: 0, ..dense() }), "k");
        assert_eq!(fault(GemmDesc { k: (1 << 23) + 8, ..dense() }), "k");
        assert_eq!(fault(GemmDesc { experts: 2, ..dense() }), "experts");
        assert_eq!(fault(GemmDesc { rows: 1 << 32, ..dense() }), "rows");
        assert_eq!(fault(GemmDesc { activation: Activation::Identity, ..dense() }), "activation");
        let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
        assert_eq!(fault(GemmDesc { activation: clamped, glu: Glu::None, ..dense() }), "activation");
        let negative = Activation::ClampedSwiglu { alpha: 1.702, limit: -1.0 };
        assert_eq!(fault(GemmDesc { activation: negative, ..dense() }), "activation");
        assert_eq!(fault(grouped(63, 10)), "tile_m");
        assert_eq!(fault(grouped(0, 10)), "tile_m");
        assert_eq!(fault(GemmDesc { n: 1 << 20, ..grouped(64, 1 << 28) }), "n");
        assert_eq!(fault(GemmDesc { experts: 4096, n: 1 << 25, k: 1 << 23, ..grouped(64, 1) }), "b");
    }

    #[test]
    fn bands_of_tiles_times_columns() {
        let columns = 72_u32.div_ceil(64);
        assert_eq!(select(&grouped(64, 9), &A100).unwrap().grid, [16 * columns, 1, 1]);
        assert_eq!(select(&grouped(64, 0), &A100).unwrap().grid, [0, 1, 1]);
        assert_eq!(select(&GemmDesc { rows: 1, ..dense() }, &A100).unwrap().grid, [8 * columns, 1, 1]);
    }
}
