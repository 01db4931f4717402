//! The rules of the protocol, each to be broken on purpose: the simulator must find it.

use crate::cache::void::selection::Selection;
use crate::cache::void::view::LoggedVoid;

/// A rule of the protocol that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Break {
    /// A request joins a fetch that began before a void.
    JoinsAnyFetch,
    /// What is fetched counts as asked for when it is stored.
    AskedWhenStored,
    /// What is read from Redis counts as asked for when it came.
    AskedWhenRead,
    /// A void that is not in the log counts in memory alone.
    HoldsNothing,
    /// A void is not held any more as soon as the log took it, though what is known of the log lacks it.
    HoldsTooShort,
    /// A log that went on from an older state is taken for the one that is known.
    AlwaysPart,
    /// A log of an earlier epoch is taken up.
    AnyEpoch,
    /// What was asked for before another log began stays in use.
    NoDoubt,
    /// Entries are written although something was voided since they were checked.
    WritesAnywhere,
    /// Numbers are compared as texts.
    NumbersAsText,
    /// The voids stand under another key than the numbers do, and are evicted alone.
    LogBesideHead,
    /// Redis counts as swept before the walk is over.
    SweepsHalf,
    /// Old voids are forgotten, and what was not checked against them stays in use.
    ForgetsSilently,
    /// A lost message is not noticed, nor is the log looked at.
    NeverLooks,
}

/// All of them.
pub(super) const BREAKS: [Break; 14] = [
    Break::JoinsAnyFetch,
    Break::AskedWhenStored,
    Break::AskedWhenRead,
    Break::HoldsNothing,
    Break::HoldsTooShort,
    Break::AlwaysPart,
    Break::AnyEpoch,
    Break::NoDoubt,
    Break::WritesAnywhere,
    Break::NumbersAsText,
    Break::LogBesideHead,
    Break::SweepsHalf,
    Break::ForgetsSilently,
    Break::NeverLooks,
];

/// A void that concerns nothing.
pub(super) fn nothing() -> LoggedVoid {
    LoggedVoid { what: Selection::Tag("none".into()), soft: false }
}
