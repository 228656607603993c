//! Products over the rows of each expert: groups along K, the depth of the sums.
//!
//! `out[e,i,j] = sum over the rows r of expert e of a[row_a(r),i] * b[row_b(r),j]`, `[E, M, N]`
//!
//! What gradients of weights are made of: where a product gave `v_r = w_e x_r`, `dw_e` is the sum of `dv_r x_r^T`. Also `torch._grouped_mm` of two
//! matrices, and DeepGEMM's k-grouped product; [`crate::capacity::row_groups`] makes the rows of ends or counts. A row is `r` itself, or its token's
//! row `slot_token[r]` of a matrix that is gathered. Rows of no expert are not read, whatever they hold. Sums are f32, in a fixed order.
//!
//! On request the same launch adds up the columns of `a` or of `b` ([`ColumnSums`]), what gradients of biases are made of: `db_e` is the sum of `dv_r`, or of the
//! rows' weights times the output's gradient. A shared expert is one group more ([`KGroupedDesc::shared_rows`]), of its own width
//! ([`KGroupedDesc::shared_sizes`]); gate and up with a gradient each are two matrices a group ([`KGroupedDesc::second`]). Experts that are frozen ([`KGroupedArgs::frozen`]) cost nothing: their blocks read no row and write no gradient.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::dispatched::{Dispatched, SlotShape};
use super::gemm::{KernelSet, ProductOut};
use crate::registry::{KGrouped, Kernel};
use crate::rules::Dtype;
use crate::runtime::builder::{buffers, settings};
use crate::runtime::launch::{Address, Held, SCALAR, Scope, VECTOR, optional};
use crate::runtime::params::KGroupedParams;
use crate::runtime::shape::{self, reach};
use crate::{DeviceInfo, Element, Error, In, Kernels, Selection};

mod hopper;

const OPERATION: &str = "k_grouped";

/// Which matrices have a row for each token, read by way of `slot_token`; another has a row for each slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Gathered {
    /// None.
    Neither,
    /// `a [tokens, M]`.
    A,
    /// `b [tokens, N]`.
    B,
    /// Both. Takes longer.
    Both,
}

/// Distances between elements of a grouped product's matrices, counted in elements.
///
/// A distance of an input may be 0, and columns may lie further apart than rows: a matrix whose rows are contiguous along K. No two elements of `out`
/// may be the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KGroupedStrides {
    /// Of `a`: from a row to the next, from a column to the next.
    pub a: [usize; 2],
    /// Of `b`.
    pub b: [usize; 2],
    /// Of `out`: from an expert to the next, from a row to the next, from a column to the next.
    pub out: [usize; 3],
}

impl KGroupedStrides {
    /// Of packed matrices: what a descriptor without strides has.
    pub const fn packed(m: usize, n: usize) -> KGroupedStrides {
        KGroupedStrides { a: [m, 1], b: [n, 1], out: [m * n, n, 1] }
    }
}

settings!(KGroupedStrides { a: [usize; 2], b: [usize; 2], out: [usize; 3] });

/// Where a second matrix of each group comes from: gradients of gate and up, whose outputs lie side by side, in tensors apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Second {
    /// From columns `M` to `2M` of `a`.
    OfA,
    /// From columns `N` to `2N` of `b`.
    OfB,
}

/// Sizes of a shared expert's product beside experts of another width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedSizes {
    /// Columns of its `a`.
    pub m: usize,
    /// Columns of its `b`.
    pub n: usize,
    /// From a row of its `a` to the next, of its `b`, and of its matrix, in elements. Columns are as far apart as the others'.
    pub rows: [usize; 3],
}

impl SharedSizes {
    /// Packed.
    pub const fn new(m: usize, n: usize) -> SharedSizes {
        SharedSizes { m, n, rows: [m, n, n] }
    }
}

settings!(SharedSizes { rows: [usize; 3] });

/// Shapes and types of a product of groups along K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KGroupedDesc {
    /// Type of `a` and `b`.
    pub dtype: Dtype,
    /// The rows of the dispatch.
    pub rows: SlotShape,
    /// Columns of `a`, rows of each matrix of `out`. Multiples of 8, like those of `n`, are fastest.
    pub m: usize,
    /// Columns of `b`, and of `out`.
    pub n: usize,
    /// Which matrices have rows by token.
    pub gathered: Gathered,
    /// Where elements lie, if not packed.
    pub strides: Option<KGroupedStrides>,
    /// Buffers may begin on any element. Else they begin on 16 bytes if `m`, `n` and the strides let every row do so.
    pub unaligned: bool,
    /// Whether `out` is f32 whatever the type of `a` and `b`.
    pub f32_out: bool,
    /// Whether the sums are added to what `out` holds, in f32 and once, before they are rounded; else they replace it.
    pub accumulate: bool,
    /// Whether the matrix of an expert without rows is left as it is; else it becomes zero, or with `accumulate` stays.
    pub keep_empty: bool,
    /// Rows of a shared expert in the same launch ([`KGroupedArgs::shared`]), neither gathered nor frozen; 0 without.
    pub shared_rows: usize,
    /// Its sizes, where they are not `m` and `n`.
    pub shared_sizes: Option<SharedSizes>,
    /// A second matrix for each group, of further columns of one operand.
    pub second: Option<Second>,
    /// [`f32_out`](Self::f32_out) of second matrices.
    pub second_f32_out: bool,
    /// The same of a shared expert's.
    pub shared_second_f32_out: bool,
    /// [`f32_out`](Self::f32_out) of a shared expert's.
    pub shared_f32_out: bool,
    /// Which kernels may compute it. Between two sets sums differ in their last bits.
    pub kernels: KernelSet,
}

impl KGroupedDesc {
    /// `out [E, M, N]` of `a [slots, M]` and `b [slots, N]`, all packed and of one type.
    pub const fn new(dtype: Dtype, rows: SlotShape, m: usize, n: usize) -> KGroupedDesc {
        KGroupedDesc {
            dtype,
            rows,
            m,
            n,
            gathered: Gathered::Neither,
            strides: None,
            unaligned: false,
            f32_out: false,
            accumulate: false,
            keep_empty: false,
            shared_rows: 0,
            shared_sizes: None,
            second: None,
            second_f32_out: false,
            shared_second_f32_out: false,
            shared_f32_out: false,
            kernels: KernelSet::Fastest,
        }
    }

    fn places(&self) -> KGroupedStrides {
        self.strides.unwrap_or(KGroupedStrides::packed(self.m, self.n))
    }

    /// Without a shared expert's rows.
    pub(crate) fn alone(self) -> KGroupedDesc {
        self.shared_rows(0).shared_sizes(None)
    }

    /// Sizes of a shared expert's product.
    fn shared(&self) -> SharedSizes {
        let KGroupedStrides { a, b, out } = self.places();
        self.shared_sizes.unwrap_or(SharedSizes { m: self.m, n: self.n, rows: [a[0], b[0], out[1]] })
    }

    /// Columns of an operand that are read, of `m` of A and `n` of B.
    fn columns(&self, [m, n]: [usize; 2]) -> [usize; 2] {
        match self.second {
            None => [m, n],
            Some(Second::OfA) => [2 * m, n],
            Some(Second::OfB) => [m, 2 * n],
        }
    }

    /// Rows of `a` and of `b`.
    fn sides(&self) -> [usize; 2] {
        let of = |gathered| if gathered { self.rows.tokens } else { self.rows.slots };
        [
            of(matches!(self.gathered, Gathered::A | Gathered::Both)),
            of(matches!(self.gathered, Gathered::B | Gathered::Both)),
        ]
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.rows.validate(OPERATION)?;
        let (m, n) = (self.m, self.n);
        shape::positive(OPERATION, "m", m)?;
        shape::positive(OPERATION, "n", n)?;
        shape::product(OPERATION, "out", &[self.rows.experts, m, n])?;
        let KGroupedStrides { a, b, out } = self.places();
        let [a_rows, b_rows] = self.sides();
        for (argument, stride) in [("strides.a", a), ("strides.b", b), ("strides.out", [out[1], out[2]])] {
            shape::size(OPERATION, argument, stride[0].max(stride[1]))?;
        }
        for (argument, rows, columns, [row, column]) in
            [("strides.a", a_rows, m, a), ("strides.b", b_rows, n, b), ("strides.out", m, n, [out[1], out[2]])]
        {
            shape::product(OPERATION, argument, &[rows, row])?;
            shape::product(OPERATION, argument, &[columns, column])?;
        }
        shape::size(OPERATION, "shared_rows", self.shared_rows)?;
        let shared = self.shared();
        if self.shared_rows == 0 && self.shared_sizes.is_some() {
            let got = format!("{shared:?}");
            return Err(Error::invalid(OPERATION, "shared_sizes", "none without shared_rows", got));
        }
        shape::positive(OPERATION, "shared_sizes.m", shared.m)?;
        shape::positive(OPERATION, "shared_sizes.n", shared.n)?;
        let [a_row, b_row, out_row] = shared.rows;
        for stride in shared.rows {
            shape::size(OPERATION, "shared_sizes.rows", stride)?;
        }
        shape::product(OPERATION, "shared_rows", &[self.shared_rows, a_row.max(b_row)])?;
        shape::product(OPERATION, "shared_sizes.m", &[shared.m, out_row])?;
        shape::product(OPERATION, "shared_sizes.m", &[2, shared.m, a[1].max(out[1])])?;
        shape::product(OPERATION, "shared_sizes.n", &[2, shared.n, b[1].max(out[2])])?;
        shape::product(OPERATION, "strides.out", &[self.rows.experts, out[0]])?;
        let apart = |inner: (usize, usize), outer: (usize, usize)| inner.1 > 0 && outer.1 > (inner.0 - 1) * inner.1;
        let (row, column) = ((m, out[1]), (n, out[2]));
        if !apart(column, row) && !apart(row, column) || (self.rows.experts > 1 && out[0] < reach(&[row, column])) {
            let expected = "matrices, rows and columns that do not overlap";
            return Err(Error::invalid(OPERATION, "strides.out", expected, format!("{out:?}")));
        }
        let (row, column) = ((shared.m, out_row), (shared.n, out[2]));
        if self.shared_rows > 0 && !apart(column, row) && !apart(row, column) {
            let expected = "rows and columns that do not overlap";
            return Err(Error::invalid(OPERATION, "shared_sizes.rows", expected, format!("{shared:?}")));
        }
        Ok(())
    }

    /// Whether every row begins and ends on 16 bytes, and offsets between a few of them have 32 bits.
    fn packed_in_vectors(&self) -> bool {
        const MOST: usize = 1 << 26;
        let vector = 16 / self.dtype.bytes() as usize;
        let KGroupedStrides { a, b, out } = self.places();
        let SharedSizes { m, n, rows: shared } = self.shared();
        let rows = [a[0], b[0], shared[0], shared[1]].iter().all(|row| row.is_multiple_of(vector) && *row <= MOST);
        let outs = [out[0], out[1], shared[2]].iter().all(|stride| stride.is_multiple_of(vector));
        let columns = [a[1], b[1], out[2]] == [1; 3];
        let whole = [self.m, self.n, m, n].iter().all(|size| size.is_multiple_of(8));
        rows && outs && columns && whole && !self.unaligned && self.gathered != Gathered::Both
    }
}

settings!(KGroupedDesc {
    gathered: Gathered,
    strides: Option<KGroupedStrides>,
    unaligned: bool,
    f32_out: bool,
    accumulate: bool,
    keep_empty: bool,
    shared_rows: usize,
    shared_sizes: Option<SharedSizes>,
    second: Option<Second>,
    second_f32_out: bool,
    shared_second_f32_out: bool,
    shared_f32_out: bool,
    kernels: KernelSet,
});

/// Sums of `a`'s columns, or of `b`'s, over each expert's rows: `out[e,i] = scale * sum over r of weights[r] * a[row_a(r),i]`.
#[non_exhaustive]
pub struct ColumnSums<'a, T> {
    /// `[E, M]`, of `b` `[E, N]`, written, or added to and left alone as the descriptor says of the matrices; of either type whatever theirs is.
    pub out: ProductOut<'a, T>,
    /// Whether the columns are `b`'s: where the weight lies the other way round, and its outputs are columns of the gradient.
    pub of_b: bool,
    /// `[slots]`: a factor for each row; 1 if absent.
    pub weights: Option<In<'a, f32>>,
    /// Factor of all.
    pub scale: f32,
}

impl<'a, T> ColumnSums<'a, T> {
    /// Of `a`, rows without factors.
    pub const fn new(out: ProductOut<'a, T>) -> ColumnSums<'a, T> {
        ColumnSums { out, of_b: false, weights: None, scale: 1.0 }
    }

    /// Of `b`, if so.
    #[must_use]
    pub fn of_b(self, of_b: bool) -> ColumnSums<'a, T> {
        ColumnSums { of_b, ..self }
    }

    /// With a factor of all.
    #[must_use]
    pub fn scale(self, scale: f32) -> ColumnSums<'a, T> {
        ColumnSums { scale, ..self }
    }
}

buffers!(ColumnSums<'a, T> { weights: In<f32> });

/// Buffers of a product of groups along K.
#[non_exhaustive]
pub struct KGroupedArgs<'a, T> {
    /// `[slots, M]`, or where gathered `[tokens, M]`.
    pub a: In<'a, T>,
    /// `[slots, N]`, or where gathered `[tokens, N]`.
    pub b: In<'a, T>,
    /// The dispatch whose rows these are, of the descriptor's shape.
    pub dispatched: &'a Dispatched,
    /// `[E, M, N]`, written.
    pub out: ProductOut<'a, T>,
    /// `[E]`: experts with another number than 0 are left alone, their rows too.
    pub frozen: Option<In<'a, i32>>,
    /// Sums of columns.
    pub sums: Option<ColumnSums<'a, T>>,
    /// The shared expert's; exactly with [`KGroupedDesc::shared_rows`].
    pub shared: Option<SharedGroup<'a, T>>,
    /// Second matrices; exactly with [`KGroupedDesc::second`].
    pub second: Option<SecondOut<'a, T>>,
}

/// Where second matrices go.
#[non_exhaustive]
pub struct SecondOut<'a, T> {
    /// As the first ones'.
    pub out: ProductOut<'a, T>,
    /// Sums of the columns that they are made of, with the factors of the first ones' sums.
    pub sums: Option<ProductOut<'a, T>>,
}

impl<'a, T> SecondOut<'a, T> {
    /// Matrices alone.
    pub const fn new(out: ProductOut<'a, T>) -> SecondOut<'a, T> {
        SecondOut { out, sums: None }
    }

    /// With sums of columns, of the side that has further ones.
    #[must_use]
    pub fn sums(self, sums: ProductOut<'a, T>) -> SecondOut<'a, T> {
        SecondOut { sums: Some(sums), ..self }
    }
}

/// The rows of an expert that every token passes, as one group more.
#[non_exhaustive]
pub struct SharedGroup<'a, T> {
    /// `[shared_rows, M]`, with the strides of the others or by [`KGroupedDesc::shared_sizes`]; so are `b` and `out`.
    pub a: In<'a, T>,
    /// `[shared_rows, N]`.
    pub b: In<'a, T>,
    /// `[M, N]`, written.
    pub out: ProductOut<'a, T>,
    /// Sums of columns, `[M]` or `[N]`, by weights `[shared_rows]`.
    pub sums: Option<ColumnSums<'a, T>>,
    /// Second matrices; exactly with [`KGroupedDesc::second`].
    pub second: Option<SecondOut<'a, T>>,
}

impl<'a, T> SharedGroup<'a, T> {
    /// `a` and `b` to `out`.
    pub fn new(a: impl Into<In<'a, T>>, b: impl Into<In<'a, T>>, out: ProductOut<'a, T>) -> SharedGroup<'a, T> {
        SharedGroup { a: a.into(), b: b.into(), out, sums: None, second: None }
    }

    /// With sums of columns.
    #[must_use]
    pub fn sums(self, sums: ColumnSums<'a, T>) -> SharedGroup<'a, T> {
        SharedGroup { sums: Some(sums), ..self }
    }

    /// With second matrices.
    #[must_use]
    pub fn second(self, second: SecondOut<'a, T>) -> SharedGroup<'a, T> {
        SharedGroup { second: Some(second), ..self }
    }
}

impl<'a, T> KGroupedArgs<'a, T> {
    /// `a` and `b` to `out`, by the rows of `dispatched`.
    pub fn new(
        a: impl Into<In<'a, T>>,
        b: impl Into<In<'a, T>>,
        dispatched: &'a Dispatched,
        out: ProductOut<'a, T>,
    ) -> KGroupedArgs<'a, T> {
        KGroupedArgs { a: a.into(), b: b.into(), dispatched, out, frozen: None, sums: None, shared: None, second: None }
    }

    /// With sums of columns.
    #[must_use]
    pub fn sums(self, sums: ColumnSums<'a, T>) -> KGroupedArgs<'a, T> {
        KGroupedArgs { sums: Some(sums), ..self }
    }

    /// With the rows of a shared expert.
    #[must_use]
    pub fn shared(self, shared: SharedGroup<'a, T>) -> KGroupedArgs<'a, T> {
        KGroupedArgs { shared: Some(shared), ..self }
    }

    /// With second matrices.
    #[must_use]
    pub fn second(self, second: SecondOut<'a, T>) -> KGroupedArgs<'a, T> {
        KGroupedArgs { second: Some(second), ..self }
    }
}

buffers!(KGroupedArgs<'a, T> { frozen: In<i32> });

/// Chooses kernel and grid.
///
/// # Errors
/// Those of [`KGroupedDesc::validate`]; [`Error::Unsupported`] for a device with too little shared memory; [`Error::Overflow`] for a grid
/// past the device's limit.
pub fn select(desc: &KGroupedDesc, device: &DeviceInfo) -> Result<Selection, Error> {
    desc.validate()?;
    let fits = |kernel: &KGrouped| kernel.shared_bytes() <= device.shared_bytes_per_block;
    let any = KGrouped { dtype: desc.dtype, any: true };
    let fast = KGrouped { any: false, ..any };
    let hopper = if desc.kernels == KernelSet::Sm80 { None } else { hopper::candidate(desc, device) };
    match hopper {
        Some(selection) if desc.kernels == KernelSet::Sm90a || hopper::is_ahead(desc, &selection, &fast, device) => {
            return Ok(selection);
        }
        // Without a row there is nothing to multiply.
        None if desc.kernels == KernelSet::Sm90a && desc.rows.slots + desc.shared_rows > 0 => {
            return Err(hopper::refusal(desc, device));
        }
        _ => {}
    }
    let kernel = if desc.packed_in_vectors() && fits(&fast) { fast } else { any };
    if !fits(&kernel) {
        let supported = format!("at least {} bytes of shared memory per block", kernel.shared_bytes());
        let got = format!("a device with {} bytes", device.shared_bytes_per_block);
        return Err(Error::unsupported(OPERATION, "device", supported, got));
    }
    let tile = kernel.tile();
    let tiles = |m: usize, n: usize| m.div_ceil(tile.bm as usize).saturating_mul(n.div_ceil(tile.bn as usize));
    let of_shared = if desc.shared_rows > 0 { tiles(desc.shared().m, desc.shared().n) } else { 0 };
    let blocks = tiles(desc.m, desc.n).saturating_mul(desc.rows.experts).saturating_add(of_shared);
    let tensors = if desc.second.is_some() { 2 } else { 1 };
    let blocks = shape::grid_x(OPERATION, "m", blocks.saturating_mul(tensors) as u64)?;
    Ok(Selection::new(Kernel::KGrouped(kernel), [blocks, 1, 1]))
}

/// Computes `out`.
///
/// # Errors
/// Those of [`select`]; [`Error::Invalid`] for a dispatch of another shape, one whose counts and offsets nobody knows to be right
/// ([`crate::capacity::lists::checked`] of lists that have none), or an `out` of another type than the descriptor's; those of a buffer:
/// [`Error::WrongDtype`], [`Error::BufferTooShort`], [`Error::Misaligned`], [`Error::DifferentContext`]; and those of the driver.
pub fn forward<T: Element>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    desc: &KGroupedDesc,
    args: KGroupedArgs<'_, T>,
) -> Result<(), Error> {
    let operation = OPERATION;
    let selection = select(desc, kernels.device())?;
    let scope = Scope::begin(operation, kernels, stream)?;
    scope.check_dtype::<T>("a", desc.dtype)?;
    if args.dispatched.shape() != &desc.rows {
        let got = format!("{:?}", args.dispatched.shape());
        return Err(Error::invalid(operation, "dispatched", format!("a dispatch of {:?}", desc.rows), got));
    }
    if !args.dispatched.knows_ranges() {
        let expected = "counts and offsets that say which rows the tiles cover";
        return Err(Error::invalid(operation, "dispatched", expected, "checked lists with others"));
    }
    let any = matches!(selection.kernel.variant(), Kernel::KGrouped(KGrouped { any: true, .. }));
    let alignment = if any { desc.dtype.bytes().into() } else { VECTOR };
    let KGroupedStrides { a: a_at, b: b_at, out: out_at } = desc.places();
    let [a_rows, b_rows] = desc.sides();
    let [m, n] = desc.columns([desc.m, desc.n]);
    let a = scope.read("a", args.a, reach(&[(a_rows, a_at[0]), (m, a_at[1])]), alignment)?;
    let b = scope.read("b", args.b, reach(&[(b_rows, b_at[0]), (n, b_at[1])]), alignment)?;
    let elements = reach(&[(desc.rows.experts, out_at[0]), (desc.m, out_at[1]), (desc.n, out_at[2])]);
    let most = if any { SCALAR } else { VECTOR };
    let out = open_out(&scope, "out", args.out, desc.f32_out, [elements as u64, alignment, most])?;
    let frozen = scope.read_some("frozen", args.frozen, desc.rows.experts, SCALAR)?;
    let names = ["sums.out", "sums.weights"];
    let sizes = [desc.rows.experts, desc.rows.slots];
    let sums = args.sums.map(|sums| HeldSums::open(&scope, names, sums, (desc, desc.m, desc.n), sizes)).transpose()?;
    let second = |argument: &'static str, given: bool| match (desc.second, given) {
        (Some(_), false) => Err(Error::Missing { operation, argument, reason: "the descriptor has a second matrix" }),
        (None, true) => Err(Error::Unexpected { operation, argument, reason: "the descriptor has no second matrix" }),
        _ => Ok(()),
    };
    second("second", args.second.is_some())?;
    let place = [elements as u64, alignment, most];
    let of_second = args.second.map(|second| {
        HeldSecond::open(
            &scope,
            ["second.out", "second.sums"],
            second,
            (desc, desc.second_f32_out),
            place,
            [desc.rows.experts, desc.m, desc.n],
        )
    });
    let of_second = of_second.transpose()?;
    if args.shared.is_some() != (desc.shared_rows > 0) {
        let argument = "shared";
        return Err(match &args.shared {
            None => Error::Missing { operation, argument, reason: "the descriptor has shared_rows" },
            Some(_) => Error::Unexpected { operation, argument, reason: "the descriptor has no shared_rows" },
        });
    }
    let shared = args.shared.map(|shared| {
        let rows = desc.shared_rows;
        second("shared.second", shared.second.is_some())?;
        let SharedSizes { m, n, rows: [a_row, b_row, out_row] } = desc.shared();
        let elements = reach(&[(m, out_row), (n, out_at[2])]);
        let [m_read, n_read] = desc.columns([m, n]);
        let names = ["shared.sums.out", "shared.sums.weights"];
        let place = [elements as u64, alignment, most];
        Ok::<_, Error>(HeldShared {
            a: scope.read("shared.a", shared.a, reach(&[(rows, a_row), (m_read, a_at[1])]), alignment)?,
            b: scope.read("shared.b", shared.b, reach(&[(rows, b_row), (n_read, b_at[1])]), alignment)?,
            out: open_out(&scope, "shared.out", shared.out, desc.shared_f32_out, place)?,
            sums: shared.sums.map(|sums| HeldSums::open(&scope, names, sums, (desc, m, n), [1, rows])).transpose()?,
            second: (shared.second)
                .map(|second| {
                    let names = ["shared.second.out", "shared.second.sums"];
                    HeldSecond::open(&scope, names, second, (desc, desc.shared_second_f32_out), place, [1, m, n])
                })
                .transpose()?,
        })
    });
    let shared = shared.transpose()?;
    let form = |f32_out, of_sums: Option<u32>| {
        flag(f32_out, 1) | flag(desc.accumulate, 2) | flag(desc.keep_empty, 4) | of_sums.unwrap_or(0)
    };
    let (sums, of_shared) = (sums.as_ref(), shared.as_ref());
    let shared_sums = of_shared.and_then(|shared| shared.sums.as_ref());
    let shared_second = of_shared.and_then(|shared| shared.second.as_ref());
    let of_second = of_second.as_ref();
    let sizes = desc.shared();
    let lists = args.dispatched.read(&scope)?;
    let at = lists.addresses();
    let params = KGroupedParams {
        a: a.address().into(),
        b: b.address().into(),
        out: out.address().into(),
        slot_token: at.slot_token.into(),
        offsets: at.offsets.into(),
        counts: at.counts.into(),
        frozen: optional(&frozen).into(),
        sums: sums.map(|sums| sums.out.address()).into(),
        sum_weights: sums.and_then(|sums| optional(&sums.weights)).into(),
        sum_scale: sums.map_or(1.0, |sums| sums.scale),
        shared_a: of_shared.map(|shared| shared.a.address()).into(),
        shared_b: of_shared.map(|shared| shared.b.address()).into(),
        shared_out: of_shared.map(|shared| shared.out.address()).into(),
        shared_sums: shared_sums.map(|sums| sums.out.address()).into(),
        shared_sum_weights: shared_sums.and_then(|sums| optional(&sums.weights)).into(),
        shared_sum_scale: shared_sums.map_or(1.0, |sums| sums.scale),
        out_second: of_second.map(|second| second.out.address()).into(),
        sums_second: of_second.and_then(HeldSecond::sums).into(),
        shared_out_second: shared_second.map(|second| second.out.address()).into(),
        shared_sums_second: shared_second.and_then(HeldSecond::sums).into(),
        slots: desc.rows.slots as u32,
        m: desc.m as u32,
        n: desc.n as u32,
        gather: match desc.gathered {
            Gathered::Neither => 0,
            Gathered::A => 1,
            Gathered::B => 2,
            Gathered::Both => 3,
        },
        a_row: a_at[0] as u32,
        a_column: a_at[1] as u32,
        b_row: b_at[0] as u32,
        b_column: b_at[1] as u32,
        out_expert_lo: out_at[0] as u64 as u32,
        out_expert_hi: (out_at[0] as u64 >> 32) as u32,
        out_row: out_at[1] as u32,
        out_column: out_at[2] as u32,
        out_form: form(desc.f32_out, sums.map(|sums| sums.form)),
        shared_rows: desc.shared_rows as u32,
        shared_form: form(desc.shared_f32_out, shared_sums.map(|sums| sums.form)),
        shared_m: sizes.m as u32,
        shared_n: sizes.n as u32,
        shared_a_row: sizes.rows[0] as u32,
        shared_b_row: sizes.rows[1] as u32,
        shared_out_row: sizes.rows[2] as u32,
        second: match desc.second {
            None => 0,
            Some(Second::OfA) => 1,
            Some(Second::OfB) => 2,
        },
        second_form: form(desc.second_f32_out, of_second.and_then(HeldSecond::form)),
        shared_second_form: form(desc.shared_second_f32_out, shared_second.and_then(HeldSecond::form)),
    };
    match selection.kernel.variant() {
        Kernel::KGroupedHopper(kernel) => {
            let shared = of_shared.map(|shared| [shared.a.address(), shared.b.address()]);
            let params = hopper::with_maps(&scope, desc, &kernel, params, [a.address(), b.address()], shared)?;
            scope.launch(&selection, params)
        }
        _ => scope.launch(&selection, params),
    }
}

const fn flag(set: bool, bit: u32) -> u32 {
    if set { bit } else { 0 }
}

/// Opens a product's result: so many elements, which begin on so many bytes, or of f32 on so many.
fn open_out<'a: 'b, 'b, T: Element>(
    scope: &Scope<'b>,
    argument: &'static str,
    out: ProductOut<'a, T>,
    f32_out: bool,
    [elements, rounded, wide]: [u64; 3],
) -> Result<Held<'b>, Error> {
    match (out, f32_out) {
        (ProductOut::Rounded(out), false) => scope.write(argument, out, elements as usize, rounded),
        (ProductOut::F32(out), true) => scope.write(argument, out, elements as usize, wide),
        (_, f32_out) => {
            let (expected, got) = ("a buffer of the type of a", "a buffer of f32");
            let (expected, got) = if f32_out { (got, expected) } else { (expected, got) };
            Err(Error::invalid(scope.operation, argument, expected, got))
        }
    }
}

/// A shared expert's rows, opened.
struct HeldShared<'a> {
    a: Held<'a>,
    b: Held<'a>,
    out: Held<'a>,
    sums: Option<HeldSums<'a>>,
    second: Option<HeldSecond<'a>>,
}

/// Second matrices, opened.
struct HeldSecond<'a> {
    out: Held<'a>,
    sums: Option<HeldSums<'a>>,
}

impl<'a> HeldSecond<'a> {
    fn sums(&self) -> Option<Address<'_>> {
        self.sums.as_ref().map(|sums| sums.out.address())
    }

    /// Bits of `out_form` that the sums have.
    fn form(&self) -> Option<u32> {
        self.sums.as_ref().map(|sums| sums.form)
    }

    /// Of so many groups of matrices of `m` rows and `n` columns.
    fn open<'b: 'a, T: Element>(
        scope: &Scope<'a>,
        [out, sums]: [&'static str; 2],
        second: SecondOut<'b, T>,
        (desc, f32_out): (&KGroupedDesc, bool),
        place: [u64; 3],
        [groups, m, n]: [usize; 3],
    ) -> Result<HeldSecond<'a>, Error> {
        let of_b = desc.second == Some(Second::OfB);
        let columns = second
            .sums
            .map(|out| HeldSums::open(scope, [sums, sums], ColumnSums::new(out).of_b(of_b), (desc, m, n), [groups, 0]));
        Ok(HeldSecond { out: open_out(scope, out, second.out, f32_out, place)?, sums: columns.transpose()? })
    }
}

/// Sums of columns, opened.
struct HeldSums<'a> {
    out: Held<'a>,
    weights: Option<Held<'a>>,
    scale: f32,
    /// Their bits of `out_form`.
    form: u32,
}

impl<'a> HeldSums<'a> {
    /// Of so many groups, of so many rows in all.
    fn open<'b: 'a, T: Element>(
        scope: &Scope<'a>,
        [out, weights]: [&'static str; 2],
        sums: ColumnSums<'b, T>,
        (desc, m, n): (&KGroupedDesc, usize, usize),
        [groups, rows]: [usize; 2],
    ) -> Result<HeldSums<'a>, Error> {
        let elements = groups * if sums.of_b { n } else { m };
        Ok(HeldSums {
            form: flag(matches!(sums.out, ProductOut::F32(_)), 8) | flag(sums.of_b, 16),
            out: match sums.out {
                ProductOut::Rounded(to) => scope.write(out, to, elements, desc.dtype.bytes().into())?,
                ProductOut::F32(to) => scope.write(out, to, elements, SCALAR)?,
            },
            weights: scope.read_some(weights, sums.weights, rows, SCALAR)?,
            scale: sums.scale,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::device::A100;

    fn desc() -> KGroupedDesc {
        KGroupedDesc::new(Dtype::Bf16, SlotShape::new(64, 8, Some(2), 128, 64, 10), 200, 264)
    }

    #[test]
    fn faults_name_their_field() {
        let fault = |desc: KGroupedDesc| select(&desc, &A100).unwrap_err().argument().unwrap();
        let strides = |strides| KGroupedDesc { strides: Some(strides), ..desc() };
        let packed = KGroupedStrides::packed(200, 264);
        assert!(select(&desc(), &A100).is_ok());
        assert_eq!(fault(KGroupedDesc { m: 0, ..desc() }), "m");
        assert_eq!(fault(KGroupedDesc { n: 1 << 31, ..desc() }), "n");
        assert_eq!(fault(strides(packed.a([1 << 31, 1]))), "strides.a");
        assert_eq!(fault(strides(packed.out([200 * 264, 263, 1]))), "strides.out");
        assert_eq!(fault(strides(packed.out([200 * 264 - 1, 264, 1]))), "strides.out");
        assert!(select(&strides(packed.out([200 * 264, 1, 200])), &A100).is_ok());
    }

    #[test]
    fn what_vectors_cannot_read_goes_element_by_element() {
        let any = |desc: KGroupedDesc| match select(&desc, &A100).unwrap().kernel.variant() {
            Kernel::KGrouped(kernel) => kernel.any,
            _ => unreachable!(),
        };
        let strides = |strides| KGroupedDesc { strides: Some(strides), ..desc() };
        let packed = KGroupedStrides::packed(200, 264);
        assert!(!any(desc()));
        assert!(!any(desc().gathered(Gathered::B)));
        assert!(any(desc().gathered(Gathered::Both)));
        assert!(any(KGroupedDesc { m: 201, ..desc() }));
        assert!(any(desc().unaligned(true)));
        assert!(!any(strides(packed.a([208, 1]))));
        assert!(any(strides(packed.b([268, 1]))));
        assert!(any(strides(packed.a([1, 64]))));
        assert_eq!(select(&desc(), &A100).unwrap().grid, [8 * 2 * 3, 1, 1]);
    }
}
