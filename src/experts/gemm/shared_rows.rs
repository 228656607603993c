//! Rows of a shared expert as part of the others' products.

use super::desc::{GemmDesc, OPERATION};
use crate::experts::weight::{HeldWeight, Weight, WeightAddresses, WeightNames, WeightPlace};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, Held, Scope, optional};
use crate::{Error, In, Out};

/// Rows of an expert that every token passes, in the launch of the others: neither scaled nor dropped.
#[non_exhaustive]
pub struct SharedRows<'a, T> {
    /// `[shared_rows, K]`, with the strides of the others' `a`, or as [`GemmDesc::shared_depth`] says; so are weight and `out`.
    pub a: In<'a, T>,
    /// One expert's.
    pub weight: Weight<'a>,
    /// `[shared_rows, N]`, written.
    pub out: Out<'a, T>,
    /// As that of the others' products, of these rows.
    pub pre_activation: Option<Out<'a, T>>,
}

impl<'a, T> SharedRows<'a, T> {
    /// `a` to `out`.
    pub fn new(a: impl Into<In<'a, T>>, weight: Weight<'a>, out: impl Into<Out<'a, T>>) -> SharedRows<'a, T> {
        SharedRows { a: a.into(), weight, out: out.into(), pre_activation: None }
    }
}

buffers!(SharedRows<'a, T> { pre_activation: Out<T> });

/// Whether rows are given where the descriptor has them, and only there.
pub(super) fn check(desc: &GemmDesc, given: bool) -> Result<(), Error> {
    let (operation, argument) = (OPERATION, "shared");
    match (desc.shared_rows, given) {
        (1.., false) => Err(Error::Missing { operation, argument, reason: "the descriptor has shared_rows" }),
        (0, true) => Err(Error::Unexpected { operation, argument, reason: "the descriptor has no shared_rows" }),
        _ => Ok(()),
    }
}

/// A shared expert's rows, opened.
pub(super) struct HeldShared<'a> {
    a: Held<'a>,
    weight: HeldWeight<'a>,
    out: Held<'a>,
    pre_activation: Option<Held<'a>>,
}

impl<'a, T> SharedRows<'a, T> {
    pub(super) fn open<'b>(self, scope: &Scope<'b>, desc: &GemmDesc, alignment: u64) -> Result<HeldShared<'b>, Error>
    where
        'a: 'b,
    {
        let names = WeightNames {
            matrix: "shared.weight",
            bias: "shared.weight.bias",
            up: "shared.weight.up",
            up_bias: "shared.weight.up_bias",
        };
        let (places, rows) = (desc.shared_places(), desc.shared_rows);
        let place = WeightPlace { experts: 1, n: desc.n, k: desc.shared_k(), strides: places.weight, alignment };
        Ok(HeldShared {
            a: scope.read("shared.a", self.a, places.a_extent(rows, desc.shared_k()), alignment)?,
            weight: self.weight.open(scope, names, &desc.weight, place)?,
            out: scope.write("shared.out", self.out, places.out_extent(rows, desc.n), alignment)?,
            pre_activation: scope.write_some(
                "shared.pre_activation",
                self.pre_activation,
                rows * desc.pre_activation_columns(),
                alignment,
            )?,
        })
    }
}

impl HeldShared<'_> {
    pub(super) fn addresses(&self) -> SharedAddresses<'_> {
        SharedAddresses {
            a: self.a.address(),
            weight: self.weight.addresses(),
            out: self.out.address(),
            pre_activation: optional(&self.pre_activation),
        }
    }
}

/// What a shared expert's rows read and write.
#[derive(Clone, Copy)]
pub(crate) struct SharedAddresses<'a> {
    pub(crate) a: Address<'a>,
    pub(crate) weight: WeightAddresses<'a>,
    pub(crate) out: Address<'a>,
    pub(crate) pre_activation: Option<Address<'a>>,
}
