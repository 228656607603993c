//! What a product is.

use super::activation::{check_activation, check_shared};
use super::strides::Strides;
use crate::Error;
use crate::experts::dispatched::SlotShape;
use crate::experts::weight::WeightPlace;
use crate::rules::{Activation, Dtype, Glu, WeightDesc, WeightFormat};
use crate::runtime::builder::settings;
use crate::runtime::shape;

pub(super) const OPERATION: &str = "gemm";

/// Largest depth: the kernel's offsets between rows of one tile of `b` have 32 bits.
const MAX_K: usize = 1 << 23;

/// Most weight outputs per expert, for the same reason where they are contiguous.
const MAX_B_OUTPUTS: usize = 1 << 26;

/// Which rows go to which expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rows {
    /// So many rows, all to one matrix: a shared expert, a plain linear layer.
    Dense(usize),
    /// The rows of a dispatch of this shape.
    Grouped(SlotShape),
}

impl Rows {
    /// Rows of the output.
    pub fn count(&self) -> usize {
        match self {
            Rows::Dense(rows) => *rows,
            Rows::Grouped(shape) => shape.slots,
        }
    }

    /// Experts that have a matrix.
    pub fn experts(&self) -> usize {
        match self {
            Rows::Dense(_) => 1,
            Rows::Grouped(shape) => shape.experts,
        }
    }
}

/// Shapes and type of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GemmDesc {
    /// Type of `a` and `out`.
    pub dtype: Dtype,
    /// Which rows go to which expert.
    pub rows: Rows,
    /// Whether a row reads its token's row of `a`, else its own.
    pub gather: bool,
    /// Columns `N` of `out`. Multiples of 8, like those of `k`, are fastest.
    pub n: usize,
    /// Columns `K` of `a`.
    pub k: usize,
    /// Form of the weight.
    pub weight: WeightDesc,
    /// What is applied to the product.
    pub activation: Activation,
    /// Rows of a shared expert in the same launch (`GemmArgs::shared`), of the same `n` and weight form; 0 without, as with dense
    /// rows.
    pub shared_rows: usize,
    /// Their depth, where it is not `k`: only the `sm_80` set takes another.
    pub shared_depth: Option<SharedDepth>,
    /// The activation of a shared expert's rows; absent, that of the others.
    pub shared_activation: Option<Activation>,
    /// Where elements lie, if not packed.
    pub strides: Option<Strides>,
    /// Buffers may begin on any element. Else they begin on 16 bytes if `n`, `k` and the strides let every row do so.
    pub unaligned: bool,
    /// Weight outputs of a block, of those that blocks of the `sm_80` set with rows of these tiles have (128 and 256 of 16-bit types); absent, what is fastest
    /// by [`crate::experts::cost`].
    pub tile_n: Option<usize>,
    /// What becomes of a result.
    pub output: Output,
    /// Which kernels may compute it.
    pub kernels: KernelSet,
    /// Several blocks may share a tile's depth where there are fewer tiles than multiprocessors, by way of a workspace
    /// ([`crate::experts::gemm::workspace_bytes`]). Which parts a sum has then depends on the device and on the number of rows.
    pub split: bool,
}

/// Kernels by the architecture that they are written for. Each set gives the same bits wherever it runs; between two, sums differ in their last bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KernelSet {
    /// Those that a model of the device finds fastest. For few rows an expert these are kernels of their own, which add in another order.
    Fastest,
    /// `sm_80`: they run on every device.
    Sm80,
    /// `sm_90a`, on compute capability 9.0 alone: 16-bit products of dense rows or tiles of 64 or 128, of weights whose rows begin on 16 bytes.
    Sm90a,
}

/// What becomes of a product's results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Output {
    /// Rounded to the type of `a`.
    Rounded,
    /// Added to what `out` holds, in f32 and after all else, and rounded to the type of `a`.
    Added,
    /// Stored as f32, as it was summed.
    F32,
    /// Added to what `out`, of f32, holds: one addition after all else.
    AddedF32,
    /// Of the rows of a dispatch: each added to its token's row of `out` `[tokens, N]`, of f32, atomically. With weights as `GemmArgs::out_scale` that is what
    /// [`crate::experts::combine`] makes of rows, without these. A token's experts are added in the order in which their blocks end, so the last bits of a sum
    /// differ from run to run; denormals may become zero. By the `sm_80` set, without gate, activation and dropout. Rows of a shared expert are
    /// [`Output::Rounded`] beside it.
    TokenSums,
}

/// The depth of a shared expert's product beside experts of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedDepth {
    /// Columns of the shared rows that are summed over; the shared weight is packed, in the layout of the others.
    pub k: usize,
    /// From one of those rows to the next, in elements.
    pub a_row: usize,
}

impl SharedDepth {
    /// Of packed rows.
    pub const fn new(k: usize) -> SharedDepth {
        SharedDepth { k, a_row: k }
    }
}

settings!(SharedDepth { a_row: usize });

impl GemmDesc {
    /// `out [rows, N] = a [rows, K] b^T`, nothing else, with a weight `[E, N, K]` of the same type.
    pub const fn new(dtype: Dtype, rows: Rows, n: usize, k: usize) -> GemmDesc {
        let weight = WeightDesc::new(dtype);
        GemmDesc {
            dtype,
            rows,
            gather: false,
            n,
            k,
            weight,
            activation: Activation::Identity,
            shared_rows: 0,
            shared_depth: None,
            shared_activation: None,
            strides: None,
            unaligned: false,
            tile_n: None,
            output: Output::Rounded,
            kernels: KernelSet::Fastest,
            split: false,
        }
    }

    /// Rows of `a`.
    pub fn a_rows(&self) -> usize {
        match self.rows {
            Rows::Grouped(shape) if self.gather => shape.tokens,
            rows => rows.count(),
        }
    }

    /// Rows of `out`.
    pub fn out_rows(&self) -> usize {
        match self.rows {
            Rows::Grouped(shape) if self.output == Output::TokenSums => shape.tokens,
            rows => rows.count(),
        }
    }

    /// Outputs of one tensor of the weight.
    pub(crate) fn b_outputs(&self) -> usize {
        self.weight.outputs(self.n)
    }

    /// Columns of what stands before the activation: `N`, or with a gate `2N`.
    pub fn pre_activation_columns(&self) -> usize {
        if self.weight.glu.is_gated() { 2 * self.n } else { self.n }
    }

    /// Sizes and places of a weight's tensors, of so many experts.
    pub(super) fn weight_place(&self, experts: usize, alignment: u64) -> WeightPlace {
        WeightPlace { experts, n: self.n, k: self.k, strides: self.places().weight, alignment }
    }

    /// Checks all that can be checked without buffers.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unsupported`] or [`Error::Overflow`], naming the field.
    pub fn validate(&self) -> Result<(), Error> {
        self.check(OPERATION)
    }

    pub(in crate::experts) fn check(&self, operation: &'static str) -> Result<(), Error> {
        match &self.rows {
            Rows::Dense(rows) => shape::size(operation, "rows", *rows).map(drop)?,
            Rows::Grouped(shape) => shape.validate(operation)?,
        }
        if self.gather && matches!(self.rows, Rows::Dense(_)) {
            return Err(Error::invalid(operation, "gather", "false for dense rows", true));
        }
        if self.shared_rows > 0 && matches!(self.rows, Rows::Dense(_)) {
            return Err(Error::invalid(operation, "shared_rows", "0 for dense rows", self.shared_rows));
        }
        shape::size(operation, "shared_rows", self.shared_rows)?;
        shape::positive(operation, "n", self.n)?;
        shape::positive(operation, "k", self.k)?;
        if self.shared_rows > 0 && !matches!(self.output, Output::Rounded | Output::Added | Output::TokenSums) {
            let expected = "Output::Rounded, Output::Added or Output::TokenSums with shared_rows";
            return Err(Error::unsupported(operation, "output", expected, format!("{:?}", self.output)));
        }
        self.check_shared_depth(operation)?;
        if self.output == Output::TokenSums {
            let plain = self.weight.glu == Glu::None && self.activation == Activation::Identity;
            if !plain || matches!(self.rows, Rows::Dense(_)) || self.kernels == KernelSet::Sm90a {
                let expected = "another form, unless of a dispatch's rows, without gate and activation, by KernelSet::Fastest or Sm80";
                return Err(Error::unsupported(operation, "output", expected, "Output::TokenSums"));
            }
        }
        let outputs = shape::product_i32(operation, "n", &[self.n, if self.weight.glu.is_gated() { 2 } else { 1 }])?;
        let shared_k = self.shared_k();
        for (argument, value, limit) in
            [("k", self.k, MAX_K), ("shared_depth.k", shared_k, MAX_K), ("n", outputs, MAX_B_OUTPUTS)]
        {
            if value > limit {
                let (value, limit) = (value.to_string(), limit as u64);
                return Err(Error::Overflow { operation, argument, value, limit });
            }
        }
        shape::product(operation, "a", &[self.a_rows(), self.k])?;
        shape::product(operation, "weight", &[self.rows.experts(), self.b_outputs(), self.k])?;
        shape::product(operation, "out", &[self.out_rows(), self.n])?;
        let widest = self.pre_activation_columns().max(self.k).max(self.shared_places().a[0]).max(shared_k);
        shape::product(operation, "shared_rows", &[self.shared_rows, widest])?;
        shape::product(operation, "pre_activation", &[self.rows.count(), self.pre_activation_columns()])?;
        if let Some(strides) = &self.strides {
            strides.check(operation, self)?;
        }
        let WeightFormat::Plain(weight) = self.weight.format;
        if weight != self.dtype {
            let supported = format!("the type of a ({})", self.dtype);
            return Err(Error::unsupported(operation, "weight.format", supported, weight));
        }
        check_activation(operation, "activation", self.activation, self.weight.glu)?;
        check_shared(operation, self)
    }

    /// Without a shared expert's rows.
    pub(crate) fn alone(self) -> GemmDesc {
        self.shared_rows(0).shared_depth(None).shared_activation(None)
    }

    /// Depth of a shared expert's rows.
    pub(super) fn shared_k(&self) -> usize {
        self.shared_depth.map_or(self.k, |depth| depth.k)
    }

    /// A shared expert's rows alone, of so many outputs.
    pub(in crate::experts) fn of_shared(&self, n: usize) -> GemmDesc {
        let (places, k) = (self.shared_places(), self.shared_k());
        let weight = if n == self.n { places.weight } else { self.weight.strides(n, k) };
        let rows = Rows::Dense(self.shared_rows);
        GemmDesc { rows, n, k, gather: false, strides: Some(Strides { weight, ..places }), ..self.alone() }
    }

    fn check_shared_depth(&self, operation: &'static str) -> Result<(), Error> {
        let Some(SharedDepth { k, a_row }) = self.shared_depth else { return Ok(()) };
        if self.shared_rows == 0 {
            return Err(Error::invalid(operation, "shared_depth", "none without shared_rows", k));
        }
        shape::positive(operation, "shared_depth.k", k)?;
        shape::size(operation, "shared_depth.a_row", a_row)?;
        // Depths of the one lie as far apart as those of the others.
        let [_, _, depth] = self.places().weight;
        let [_, _, own] = self.shared_places().weight;
        if depth != own {
            return Err(Error::unsupported(operation, "strides.weight", "a packed weight with shared_depth", depth));
        }
        Ok(())
    }
}

settings!(GemmDesc {
    gather: bool,
    weight: WeightDesc,
    activation: Activation,
    shared_rows: usize,
    shared_depth: Option<SharedDepth>,
    shared_activation: Option<Activation>,
    strides: Option<Strides>,
    unaligned: bool,
    tile_n: Option<usize>,
    output: Output,
    kernels: KernelSet,
    split: bool,
});
