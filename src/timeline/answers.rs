//! The timeline as the proxy asks it: which requests it answers, from what it computed a moment ago or anew.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::endpoint::{Endpoint, asked};
use super::engine::{Allowed, Engine, Newness};
use super::fields::Fields;
use super::flights::Flights;
use super::heal::Checks;
use super::kept::{Kept, Weigh};
use super::needs::Needs;
use super::piece::Piece;
use super::report::SymbolReport;
use super::symbol::Symbol;
use super::tags::tags;
use super::unanswered::Unanswered;
use super::verdict::State;
use super::view::Made;
use super::work::{Work, Worked};
use super::{AnswerFuture, Answered, How, Located, OrdersRequest, Report, Spared, Timeline, WORST};
use crate::api::orders::Orders;
use crate::body::BoxError;
use crate::cache::Cache;
use crate::cache::entry::{Checked, Entry};
use crate::cache::key::Key;
use crate::cache::void::{Moment, Validity};
use crate::config::Timeline as Settings;
use crate::config::route::Route;
use crate::http::encoding::accepts_gzip;
use crate::request::secrets::without_secrets;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::carry;

/// Spans that are looked for when somebody asks where they are.
const MOST_LOCATED: usize = 20_000;
/// A check that takes longer is given up.
const LONGEST_CHECK: Duration = Duration::from_secs(900);
/// Requests at one time that found no room and go to the backend: more would make load of overload.
const MOST_INSTEAD: usize = 8;

/// A response that was computed, for whoever asks the same.
struct Recent {
    entry: Arc<Entry>,
    symbol: Arc<Symbol>,
    /// The version of the newest part that it was made from; `None` if it was not needed.
    version: Option<u64>,
    /// When it was begun to be made, and which voids it was checked against since.
    began: Moment,
    checked: Checked,
}

impl Weigh for Recent {
    fn weight(&self) -> u64 {
        self.entry.weight()
    }
}

/// A timeline over a source of orders.
pub struct Answers<S> {
    engine: Arc<Engine<S>>,
    routes: ArcSwap<Vec<Route>>,
    /// Responses that were computed a moment ago, plain and as gzip.
    recent: [Kept<Bytes, Recent>; 2],
    fields: Arc<Fields>,
    /// What is being computed.
    flights: Flights<Result<Worked, Unanswered>>,
    /// For requests that found no room, and go to the backend.
    instead: Arc<Semaphore>,
    checks: Arc<Checks>,
    settings: Settings,
    /// Bodies from this size on are packed for those who take gzip, in bytes.
    compress_above: usize,
    cache: Arc<Cache>,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

/// What a timeline is built from.
pub struct Parts<S> {
    /// What gets orders.
    pub engine: Arc<Engine<S>>,
    /// All rules.
    pub routes: Vec<Route>,
    /// The settings.
    pub settings: Settings,
    /// Checks what is computed.
    pub checks: Arc<Checks>,
    /// Bodies from this size on are packed for those who take gzip, in bytes.
    pub compress_above: usize,
    /// The cache, for its voids.
    pub cache: Arc<Cache>,
    /// Where answers are computed: not where clients are served.
    pub runtime: Handle,
    /// All metrics.
    pub metrics: Arc<Metrics>,
}

impl<S: Orders> Answers<S> {
    /// A timeline of which nothing is known yet.
    ///
    /// # Errors
    /// Never, as long as the configuration was checked.
    pub fn new(parts: Parts<S>) -> Result<Self, BoxError> {
        let Parts { engine, routes, settings, checks, compress_above, cache, runtime, metrics } = parts;
        for reason in Unanswered::ALL {
            metrics.timeline_unanswered.with_label_values(&[reason.name()]);
        }
        Ok(Self {
            engine,
            routes: ArcSwap::from_pointee(routes),
            // An eighth together, for which there is room besides.
            recent: [Kept::new(settings.memory / 16)?, Kept::new(settings.memory / 16)?],
            flights: Flights::default(),
            instead: Arc::new(Semaphore::new(MOST_INSTEAD)),
            fields: Arc::new(if checks.are_of_answers() { Fields::learnt() } else { Fields::own() }),
            checks,
            settings,
            compress_above,
            cache,
            runtime,
            metrics,
        })
    }

    fn state(&self, endpoint: Endpoint) -> State {
        self.engine.judge.state(endpoint)
    }

    /// Has what an answer is made of checked, unless a check is under way.
    fn verify(&self, symbol: &Arc<Symbol>, endpoint: Endpoint, text: &str) {
        let Some(turn) = self.checks.take_turn() else { return };
        let check = turn.check(Arc::clone(&self.engine), Arc::clone(symbol), endpoint, text.to_owned());
        // One that is answered byte by byte does not keep the turn.
        self.runtime.spawn(timeout(LONGEST_CHECK, check));
    }

    /// Now and then.
    fn verify_some(&self, symbol: &Arc<Symbol>, endpoint: Endpoint, text: &str) {
        if fastrand::f64() < self.settings.verify {
            self.verify(symbol, endpoint, text);
        }
    }

    /// Whether what was made from a version of the newest part is still what would be made now.
    fn is_current(&self, symbol: &Symbol, version: u64) -> bool {
        symbol.version() == version && !symbol.is_evicted() && self.engine.has_new_tail(symbol)
    }

    /// Whether a computed response may be served as far as purges, invalidations and checks of its orders go, which may have come since it was
    /// begun to be made.
    fn is_valid(&self, symbol: &Symbol, entry: &Entry, began: Moment, checked: &Checked) -> bool {
        self.cache.voids().check(entry) == Validity::Valid && !self.engine.is_void(symbol, Piece::Derived, began, checked)
    }

    /// Whether an endpoint is answered, and for a symbol.
    ///
    /// # Errors
    /// Why not.
    fn may_answer(&self, endpoint: Endpoint, symbol: &str) -> Result<(), Unanswered> {
        match self.state(endpoint) {
            State::On if self.engine.judge.is_closed(endpoint, symbol) => Err(Unanswered::Quarantined),
            State::On => Ok(()),
            State::Probation { .. } => Err(Unanswered::Probation),
            State::Off => Err(Unanswered::Off),
        }
    }

    async fn compute(&self, request: OrdersRequest<'_>) -> Result<Answered, Unanswered> {
        let (endpoint, name) = asked(request.target).ok_or(Unanswered::Shape)?;
        self.may_answer(endpoint, &name)?;
        let symbol = self.engine.symbol(&name).ok_or(Unanswered::UnknownSymbol)?;
        let gzip = accepts_gzip(request.headers);
        let key = (request.canonical.0.clone(), gzip);
        let (came, allowed) = (Instant::now(), allowed(request.route));
        // Before anything of it is read.
        let mut version = symbol.version();
        let work = || carry(self.work(request, endpoint, &symbol, gzip).run());
        let (flight, mut is_own) = self.flights.join(&self.runtime, key.clone(), version, work);
        let mut worked = flight.made().await.unwrap_or(Err(Unanswered::Lost))?;
        if !is_own && !self.is_for(&worked, &symbol, allowed, came) {
            // It was begun too long before this request came.
            version = symbol.version();
            let (flight, is_new) = self.flights.join_later(&self.runtime, key.clone(), version, came, work);
            is_own = is_new;
            worked = flight.made().await.unwrap_or(Err(Unanswered::Lost))?;
        }
        let Worked { entry, made, began } = worked;
        let checked = Checked::default();
        if !self.is_valid(&symbol, &entry, began, &checked) {
            return Err(Unanswered::Voided);
        }
        // A check may have found it wrong meanwhile.
        self.may_answer(endpoint, &name)?;
        let how = how(&made);
        if is_own && (how == How::Known || how == How::Waited) {
            let version = made.tail.map(|_| version);
            let recent = Recent { entry: Arc::clone(&entry), symbol: Arc::clone(&symbol), version, began, checked };
            self.recent[usize::from(gzip)].insert(key.0, Arc::new(recent));
        }
        self.verify_some(&symbol, endpoint, request.text);
        Ok(Answered { entry, how })
    }

    fn work(&self, request: OrdersRequest<'_>, endpoint: Endpoint, symbol: &Arc<Symbol>, gzip: bool) -> Work<S> {
        Work {
            engine: Arc::clone(&self.engine),
            symbol: Arc::clone(symbol),
            endpoint,
            text: request.text.to_owned(),
            allowed: allowed(request.route),
            headers: request.headers.get_all(header::ORIGIN).iter().map(|origin| (header::ORIGIN, origin.clone())).collect(),
            fields: Arc::clone(&self.fields),
            pack_from: if gzip { self.compress_above } else { usize::MAX },
            varies_from: self.compress_above,
            key: Key::new(request.route, request.target, request.canonical.clone()),
            began: self.cache.ask(),
        }
    }

    /// Whether an answer that another request had begun to compute may be given to one that came later.
    fn is_for(&self, worked: &Worked, symbol: &Symbol, allowed: Allowed, came: Instant) -> bool {
        let is_new = worked.made.tail.as_ref().is_none_or(|tail| {
            let late = tail.asked.elapsed().saturating_sub(self.settings.refresh);
            match worked.made.newness {
                Newness::Fresh => self.engine.is_new(symbol, tail, came),
                Newness::Late(_) => late <= allowed.late,
                Newness::Failing(_) => late <= allowed.failing,
            }
        });
        is_new && self.is_valid(symbol, &worked.entry, worked.began, &Checked::default())
    }
}

/// How late the newest part may be on a rule.
const fn allowed(route: &Route) -> Allowed {
    Allowed { late: route.policy.stale_while_revalidate, failing: route.policy.stale_if_error }
}

/// How an answer came about.
const fn how(made: &Made) -> How {
    match made.newness {
        Newness::Late(late) => How::Late(late),
        Newness::Failing(late) => How::Failing(late),
        Newness::Fresh if made.waited => How::Waited,
        Newness::Fresh => How::Known,
    }
}

impl<S: Orders> Timeline for Answers<S> {
    fn recall(&self, request: OrdersRequest<'_>) -> Option<Answered> {
        let recent = self.recent[usize::from(accepts_gzip(request.headers))].get(&request.canonical.0)?;
        let Recent { entry, symbol, version, began, checked } = &*recent;
        let endpoint = Endpoint::of(&request.target.path)?;
        let is_current = version.is_none_or(|version| self.is_current(symbol, version));
        if !is_current || self.may_answer(endpoint, &symbol.name).is_err() || !self.is_valid(symbol, entry, *began, checked) {
            return None;
        }
        self.engine.want(symbol);
        self.verify_some(symbol, endpoint, request.text);
        Some(Answered { entry: Arc::clone(entry), how: How::Known })
    }

    fn answer<'a>(&'a self, request: OrdersRequest<'a>) -> AnswerFuture<'a> {
        Box::pin(async move {
            let answered = self.compute(request).await;
            if let Err(reason) = &answered {
                if let Some(symbol) = asked(request.target).and_then(|(_, name)| self.engine.symbol(&name)) {
                    symbol.note_left(*reason);
                }
                self.metrics.timeline_unanswered.with_label_values(&[reason.name()]).inc();
                tracing::debug!(
                    request = &*without_secrets(request.text),
                    reason = reason.name(),
                    "the timeline does not answer: {reason}"
                );
            }
            answered
        })
    }

    fn observe(&self, request: OrdersRequest<'_>, status: StatusCode, fields: &HeaderMap) {
        let Some((endpoint, name)) = asked(request.target) else { return };
        self.fields.note(endpoint, request.headers, status, fields);
        // Symbols that do not exist get no further.
        let symbol = match status {
            StatusCode::OK => Some(self.engine.symbol_or_new(&name, || tags(&self.routes.load(), &name))),
            _ => self.engine.symbol(&name),
        };
        let Some(symbol) = symbol else { return };
        let (known, judge) = (self.engine.known_tail(&symbol).is_some(), &self.engine.judge);
        let lacks_ties = endpoint == Endpoint::Orders && judge.lacks_ties() && self.state(endpoint) != State::Off;
        if known && (judge.is_due(endpoint, &symbol.name) || lacks_ties) {
            self.verify(&symbol, endpoint, request.text);
        }
    }

    fn leave_to_backend(&self) -> Option<OwnedSemaphorePermit> {
        // Natively the backend would need the same memory.
        let is_slower = !self.engine.foreign || self.engine.is_slow();
        if is_slower { None } else { Arc::clone(&self.instead).try_acquire_owned().ok() }
    }

    fn follow(&self, routes: &[Route]) {
        self.routes.store(Arc::new(routes.to_vec()));
        // Orders stay; answers of a moment ago do not, since they were stored under the old keys.
        self.engine.follow(|name| tags(routes, name));
        self.recent.iter().for_each(Kept::clear);
    }

    fn update_gauges(&self) {
        let size = self.engine.size();
        let recent: u64 = self.recent.iter().map(Kept::bytes).sum();
        self.metrics.timeline_bytes.set(i64::try_from(size.bytes + recent).unwrap_or(i64::MAX));
        self.metrics.timeline_spans.set(i64::try_from(size.spans).unwrap_or(i64::MAX));
        self.metrics.timeline_questions.set(i64::try_from(size.questions).unwrap_or(i64::MAX));
        let (newest, past) = self.engine.spared();
        self.metrics.breaker_open.with_label_values(&["timeline_newest"]).set(i64::from(newest));
        self.metrics.breaker_open.with_label_values(&["timeline_spans"]).set(i64::from(past));
        let taken = self.engine.room.taken();
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.metrics.timeline_room_bytes.set(count(taken.bytes));
        self.metrics.timeline_room_waiting_bytes.set(count(taken.waiting));
        self.metrics.timeline_computing.set(count(taken.computing));
        self.metrics.timeline_behind.set(i64::try_from(size.behind.as_secs()).unwrap_or(i64::MAX));
        self.metrics.timeline_quarantined.set(i64::try_from(self.engine.judge.closed()).unwrap_or(i64::MAX));
        for endpoint in Endpoint::ALL {
            let on = i64::from(self.state(endpoint) == State::On);
            self.metrics.timeline_on.with_label_values(&[endpoint.name()]).set(on);
        }
    }

    fn report(&self) -> Report {
        let size = self.engine.size();
        let (newest, spans) = self.engine.spared();
        let taken = self.engine.room.taken();
        let left = |reason: Unanswered| (reason.name(), self.metrics.timeline_unanswered.with_label_values(&[reason.name()]).get());
        Report {
            endpoints: Endpoint::ALL.into_iter().map(|endpoint| (endpoint.name(), self.state(endpoint))).collect(),
            symbols: size.symbols,
            newest_parts: size.newest_parts,
            questions: size.questions,
            behind_seconds: size.behind.as_secs_f64(),
            spans: size.spans,
            quarantined: self.engine.judge.closed(),
            bytes: size.bytes + self.recent.iter().map(Kept::bytes).sum::<u64>(),
            capacity: self.settings.memory,
            spared: Spared { newest, spans },
            left_to_backend: Unanswered::ALL.into_iter().map(left).filter(|(_, count)| *count > 0).collect(),
            worst: self.engine.worst(WORST),
            room_bytes: taken.bytes,
            computing: taken.computing,
        }
    }

    fn describe(&self, symbol: &str) -> Option<SymbolReport> {
        let symbol = self.engine.symbol(&symbol.to_ascii_uppercase())?;
        Some(self.engine.describe(&symbol))
    }

    fn locate(&self, needs: &Needs) -> Located {
        let state = self.state(needs.endpoint);
        let off = self.may_answer(needs.endpoint, &needs.symbol).err();
        let Some(symbol) = self.engine.symbol(&needs.symbol) else {
            let unanswered = off.or(Some(Unanswered::UnknownSymbol));
            return Located { state, known: false, in_memory: 0, before_first: 0, newest: None, unanswered, symbol: None };
        };
        let oldest = self.engine.oldest(&symbol).unwrap_or(i64::MIN);
        let starts = needs.spans.clone().into_iter().flat_map(|spans| spans.step_by(usize::try_from(needs.step).unwrap_or(usize::MAX)));
        let (mut in_memory, mut before_first) = (0, 0);
        for start in starts.take(MOST_LOCATED) {
            before_first += i64::from(start < oldest);
            in_memory += i64::from(start >= oldest && self.engine.is_stored(&symbol, start));
        }
        let missing = needs.count() - in_memory - before_first;
        let unanswered = off.or_else(|| self.engine.foresee(&symbol, missing));
        let (newest, symbol) = (self.engine.age(&symbol), Some(self.engine.describe(&symbol)));
        Located { state, known: true, in_memory, before_first, newest, unanswered, symbol }
    }
}
