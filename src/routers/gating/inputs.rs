//! What a rule takes beside logits and correction bias: factors that are learned, ids that are given.

use crate::capacity::Ids;
use crate::rules::{ChoiceBy, Gating, IdFormat};
use crate::runtime::builder::buffers;
use crate::runtime::launch::{Address, Held, SCALAR, Scope, optional};
use crate::runtime::shape;
use crate::{Error, In};

/// Buffers that some rules need; each exactly where the rule says so.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct RuleInputs<'a> {
    /// `[E]`, with [`Gating::expert_scale`].
    pub expert_scale: Option<In<'a, f32>>,
    /// `[1]`, with [`Gating::global_scale`].
    pub global_scale: Option<In<'a, f32>>,
    /// With [`ChoiceBy::Given`].
    pub given: Option<Given<'a>>,
}

impl<'a> RuleInputs<'a> {
    /// Nothing.
    pub fn new() -> RuleInputs<'a> {
        RuleInputs::default()
    }

    /// With ids that are given.
    #[must_use]
    pub fn given(self, given: Given<'a>) -> RuleInputs<'a> {
        RuleInputs { given: Some(given), ..self }
    }
}

buffers!(RuleInputs<'a> { expert_scale: In<f32>, global_scale: In<f32> });

/// Ids that are given: each token's, or each word's.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Given<'a> {
    /// `[T, k]`; with a table `[V, k]`.
    pub ids: Ids<'a>,
    /// Where `ids` is a table: which row a token has.
    pub rows: Option<TableRows<'a>>,
}

/// Rows of a table of ids.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct TableRows<'a> {
    /// `[T]`: ids of words. A token whose word is not in the table has ids -1.
    pub words: Ids<'a>,
    /// Words `V`.
    pub vocabulary: usize,
}

impl<'a> Given<'a> {
    /// `ids [T, k]`: of a rollout (router replay).
    pub fn ids(ids: impl Into<Ids<'a>>) -> Given<'a> {
        Given { ids: ids.into(), rows: None }
    }

    /// The rows of `table [V, k]` for `words [T]` (DeepSeek-V4's `tid2eid`, of `i64`).
    pub fn table(table: impl Into<Ids<'a>>, vocabulary: usize, words: impl Into<Ids<'a>>) -> Given<'a> {
        Given { ids: table.into(), rows: Some(TableRows { words: words.into(), vocabulary }) }
    }

    pub(crate) fn open<'b>(self, scope: &Scope<'b>, tokens: usize, top_k: usize) -> Result<HeldGiven<'b>, Error>
    where
        'a: 'b,
    {
        let rows = match self.rows {
            Some(TableRows { words, vocabulary }) => {
                shape::positive(scope.operation, "given.vocabulary", vocabulary)?;
                let format = words.format();
                Some((words.open(scope, "given.words", format, tokens)?, format, vocabulary))
            }
            None => None,
        };
        let of = rows.as_ref().map_or(tokens, |(_, _, vocabulary)| *vocabulary);
        let needed = shape::product(scope.operation, "given.ids", &[of, top_k])?;
        let format = self.ids.format();
        Ok(HeldGiven { ids: self.ids.open(scope, "given.ids", format, needed)?, format, rows })
    }
}

/// Given ids, opened.
pub(crate) struct HeldGiven<'a> {
    ids: Held<'a>,
    format: IdFormat,
    rows: Option<(Held<'a>, IdFormat, usize)>,
}

impl HeldGiven<'_> {
    pub(crate) fn address(&self) -> GivenAddress<'_> {
        let rows = self.rows.as_ref().map(|(words, format, vocabulary)| (words.address(), *format, *vocabulary));
        GivenAddress { ids: self.ids.address(), format: self.format, rows }
    }
}

/// Where given ids lie.
#[derive(Clone, Copy)]
pub(crate) struct GivenAddress<'a> {
    pub(crate) ids: Address<'a>,
    pub(crate) format: IdFormat,
    /// Words, and how many a table has.
    pub(crate) rows: Option<(Address<'a>, IdFormat, usize)>,
}

/// A rule's inputs, opened.
pub(crate) struct HeldInputs<'a> {
    expert_scale: Option<Held<'a>>,
    global_scale: Option<Held<'a>>,
    given: Option<HeldGiven<'a>>,
}

impl<'a> HeldInputs<'a> {
    /// Opens what `gating` asks for, of `tokens` tokens with `top_k` of `experts` experts.
    pub(crate) fn open<'c: 'a>(
        scope: &Scope<'a>,
        gating: &Gating,
        [tokens, experts, top_k]: [usize; 3],
        inputs: RuleInputs<'c>,
    ) -> Result<HeldInputs<'a>, Error> {
        let RuleInputs { expert_scale, global_scale, given } = inputs;
        check_scales(scope.operation, gating, expert_scale.is_some(), global_scale.is_some())?;
        check_given(scope.operation, gating, given.is_some())?;
        Ok(HeldInputs {
            expert_scale: scope.read_some("expert_scale", expert_scale, experts, SCALAR)?,
            global_scale: scope.read_some("global_scale", global_scale, 1, SCALAR)?,
            given: given.map(|given| given.open(scope, tokens, top_k)).transpose()?,
        })
    }

    pub(crate) fn addresses(&self) -> InputAddresses<'_> {
        InputAddresses {
            expert_scale: optional(&self.expert_scale),
            global_scale: optional(&self.global_scale),
            given: self.given.as_ref().map(HeldGiven::address),
        }
    }
}

/// Where a rule's inputs lie.
#[derive(Clone, Copy, Default)]
pub(crate) struct InputAddresses<'a> {
    pub(crate) expert_scale: Option<Address<'a>>,
    pub(crate) global_scale: Option<Address<'a>>,
    pub(crate) given: Option<GivenAddress<'a>>,
}

impl<'a> InputAddresses<'a> {
    /// As the buffers that they are, for an operation that is part of another.
    pub(crate) fn inputs(self, [tokens, experts, top_k]: [usize; 3]) -> RuleInputs<'a> {
        let ids = |address: Address<'a>, format, len| match format {
            IdFormat::I32 => Ids::I32(address.input(len)),
            IdFormat::U32 => Ids::U32(address.input(len)),
            IdFormat::I64 => Ids::I64(address.input(len)),
        };
        let given = self.given.map(|given| match given.rows {
            None => Given { ids: ids(given.ids, given.format, tokens * top_k), rows: None },
            Some((words, format, vocabulary)) => Given {
                ids: ids(given.ids, given.format, vocabulary * top_k),
                rows: Some(TableRows { words: ids(words, format, tokens), vocabulary }),
            },
        });
        RuleInputs {
            expert_scale: self.expert_scale.map(|scale| scale.input(experts)),
            global_scale: self.global_scale.map(|scale| scale.input(1)),
            given,
        }
    }
}

/// Learned factors are there exactly where the rule has them.
pub(crate) fn check_scales(operation: &'static str, gating: &Gating, expert: bool, global: bool) -> Result<(), Error> {
    for (argument, wanted, given) in
        [("expert_scale", gating.expert_scale, expert), ("global_scale", gating.global_scale, global)]
    {
        match (wanted, given) {
            (true, false) => return Err(Error::Missing { operation, argument, reason: "the rule multiplies by it" }),
            (false, true) => {
                return Err(Error::Unexpected { operation, argument, reason: "the rule does not multiply by it" });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Ids are given exactly where the rule does not choose.
pub(crate) fn check_given(operation: &'static str, gating: &Gating, given: bool) -> Result<(), Error> {
    let argument = "given";
    match (gating.choice == ChoiceBy::Given, given) {
        (true, false) => Err(Error::Missing { operation, argument, reason: "the rule is ChoiceBy::Given" }),
        (false, true) => Err(Error::Unexpected { operation, argument, reason: "the rule chooses" }),
        _ => Ok(()),
    }
}
