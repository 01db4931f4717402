//! Orders kept in spans of time, from which windows, pages and lists of the newest are computed.
//!
//! Dashboards ask for the last 24 hours up to this millisecond, so hardly two of their URLs are equal, and a cache keyed by URL
//! answers none of them. But orders of the past do not change. So the orders of a symbol are fetched once, in spans (a day each),
//! and the newest part of them is fetched again every few seconds while somebody asks; whatever is asked is computed from these,
//! by the endpoint code of [`crate::api`], byte for byte as whoever holds the orders would answer.
//!
//! ```text
//! proxy ── answers ── endpoint   which requests, about which symbol
//!              │       judge      and not while they differ: trust decides      ◄── heal: checks by verify or sums
//!              │       fields     of responses, as the backend has them
//!              │       flights    equal requests at one time are computed once
//!              │       room       memory and cores to compute in
//!              └─ compute ── api's endpoints ── view ── engine ── source: MySQL, the sample, or service (over HTTP)
//!                                                 │        ├─ symbol, schedule   one entry a symbol, and when it is asked for
//!                                                 │        ├─ tail     the newest part
//!                                                 │        ├─ turns    to ask for what is over
//!                                                 │        ├─ spans    what is over, in memory
//!                                                 │        └─ fill ── bring ── shared, codec   how that comes: from Redis, or from the source
//!                                                 └─ buckets, columns ── amounts, details   orders in blocks, and sums of them by binary search
//! ```
//!
//! A **block** is some thousand orders that follow one another ([`columns::BLOCK`]), in two halves. **Sums** are what buckets need: twelve bytes an order.
//! **Details** are what lists and pages print: four times as much, with less room, and brought again when somebody asks. A **stretch** is a time of
//! which all orders are known, as one half of one block; small ones that adjoin are joined. A **part** is a stretch with both halves, as the source
//! gives it and as Redis keeps it. A **span** is a day (`timeline.span`): the unit in which operators, checks and purges speak. A day has as many
//! blocks as it needs, so that a symbol with millions of orders a day costs no more at a time than one with ten.
//!
//! What holds, whatever comes: orders of one moment lie in one block; stretches of a symbol never overlap; what is void is a gap; a sum is exact or is not
//! given; no question, no value in Redis and no piece of memory is larger than a few blocks; `weight` is what the allocator holds ([`memory`]).
//!
//! `times` undoes what an existing service's own cache makes of timestamps, here and for what is fetched.
//!
//! What is not known, or not for certain, goes to the backend as if there were no timeline; `unanswered` says why.
//!
//! Knows the API and the cache's stores and voids. Knows neither rules nor clients.

pub mod amounts;
pub mod answers;
pub mod between;
pub mod bring;
pub mod buckets;
pub mod builder;
pub mod check;
pub mod codec;
pub mod columns;
pub mod compute;
#[cfg(test)]
mod dense;
pub mod details;
pub mod endpoint;
pub mod engine;
pub mod fields;
pub mod fill;
pub mod flights;
pub mod halves;
pub mod heal;
pub mod judge;
pub mod kept;
#[cfg(test)]
mod load;
pub mod memory;
pub mod needs;
pub mod piece;
pub mod report;
pub mod room;
pub mod schedule;
pub mod service;
pub mod shared;
pub mod spans;
pub mod sums;
pub mod symbol;
pub mod tags;
pub mod tail;
pub mod times;
pub mod trust;
pub mod turns;
pub mod unanswered;
pub mod verdict;
pub mod verify;
pub mod view;
pub mod work;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use tokio::sync::OwnedSemaphorePermit;

use crate::cache::entry::Entry;
use crate::cache::key::Canonical;
use crate::config::route::Route;
use crate::request::target::Target;
use needs::Needs;
use report::SymbolReport;
use unanswered::Unanswered;
use verdict::State;

/// What the timeline is asked.
#[derive(Clone, Copy)]
pub struct OrdersRequest<'a> {
    /// The rule that serves it.
    pub route: &'a Route,
    /// Path and query, as they were sent.
    pub text: &'a str,
    /// The same, read.
    pub target: &'a Target<'a>,
    /// The request's fields.
    pub headers: &'a HeaderMap,
    /// The canonical request: equal ones have equal answers.
    pub canonical: &'a Canonical,
}

/// An answer.
pub struct Answered {
    /// A response, as if it was stored.
    pub entry: Arc<Entry>,
    /// How it came about.
    pub how: How,
}

/// How an answer came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// From what was known.
    Known,
    /// Something was asked for first.
    Waited,
    /// The newest part of it should have been asked for again so long ago, and is being asked for.
    Late(Duration),
    /// The same, and the source fails.
    Failing(Duration),
}

/// The future of an answer, or of why there is none: then the backend must be asked.
pub type AnswerFuture<'a> = Pin<Box<dyn Future<Output = Result<Answered, Unanswered>> + Send + 'a>>;

/// A timeline, whatever its source.
pub trait Timeline: Send + Sync {
    /// The answer that was computed to an equal request a moment ago, if nothing came since. No I/O, little work.
    fn recall(&self, request: OrdersRequest<'_>) -> Option<Answered>;

    /// Computes an answer, or counts why there is none.
    fn answer<'a>(&'a self, request: OrdersRequest<'a>) -> AnswerFuture<'a>;

    /// Leave to ask the backend for what there was no [room](Unanswered::NoRoom) to compute, for as long as it is held. `None`: that would be of
    /// no use, since the backend needs the same memory or is slower than asking again in a moment, or enough are at it.
    fn leave_to_backend(&self) -> Option<OwnedSemaphorePermit>;

    /// Takes note of the backend's own response to a request, which is 200 or 404, with the fields that the client gets.
    fn observe(&self, request: OrdersRequest<'_>, status: StatusCode, fields: &HeaderMap);

    /// Other rules serve from now on: what purges find orders by follows them.
    fn follow(&self, routes: &[Route]);

    /// Has the gauges say how things stand: before they are read.
    fn update_gauges(&self);

    /// How things stand, for operators.
    fn report(&self) -> Report;

    /// How one symbol (in any case) stands, for operators; `None`: nothing is known of it.
    fn describe(&self, symbol: &str) -> Option<SymbolReport>;

    /// Where what a request needs is, for operators.
    fn locate(&self, needs: &Needs) -> Located;
}

/// How things stand.
#[derive(Debug, serde::Serialize)]
pub struct Report {
    /// Whether each endpoint is answered.
    pub endpoints: BTreeMap<&'static str, State>,
    /// Symbols of which anything is known.
    pub symbols: usize,
    /// Newest parts in memory.
    pub newest_parts: usize,
    /// Questions about newest parts that are under way.
    pub questions: usize,
    /// For how long the one that has waited longest has been due, in seconds.
    pub behind_seconds: f64,
    /// Whether the source fails or hangs and is asked by one question at a time: for the newest orders, and for older ones.
    pub spared: Spared,
    /// Requests that were left to the backend, by why.
    pub left_to_backend: BTreeMap<&'static str, u64>,
    /// The symbols that stand worst: in quarantine, failing or late; at most [`WORST`].
    pub worst: Vec<SymbolReport>,
    /// Spans in memory.
    pub spans: usize,
    /// Symbols that the backend answers, since the timeline's orders differed from its own.
    pub quarantined: usize,
    /// Bytes that all of it takes, answers computed a moment ago included.
    pub bytes: u64,
    /// Bytes that it may take.
    pub capacity: u64,
    /// Bytes that computed answers take besides, or may need that are being made.
    pub room_bytes: usize,
    /// Answers that are being computed.
    pub computing: usize,
}

/// The most symbols that are described since they stand badly.
pub const WORST: usize = 10;

/// Whether the source is spared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Spared {
    /// For the newest orders.
    pub newest: bool,
    /// For older ones.
    pub spans: bool,
}

/// Where what a request needs is.
#[derive(Clone, Debug)]
pub struct Located {
    /// Whether the endpoint is answered.
    pub state: State,
    /// Whether the symbol is known.
    pub known: bool,
    /// Needed spans that are in memory.
    pub in_memory: i64,
    /// Needed spans that lie before the symbol's first order, and so are none.
    pub before_first: i64,
    /// How old the newest part in memory is.
    pub newest: Option<Duration>,
    /// Why it would not be answered at this moment, as far as that is known without asking anything.
    pub unanswered: Option<Unanswered>,
    /// How the symbol stands, if it is known.
    pub symbol: Option<SymbolReport>,
}
