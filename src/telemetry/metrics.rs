//! Every metric, declared once with its unit and meaning.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Metric, MetricType};
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::body::lent;

/// Bucket bounds in seconds: fine below a millisecond, where hits live, and wide up to a slow query.
const SECONDS: [f64; 16] = [0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// The statuses whose counters are at hand without a look-up.
const COMMON: [u16; 4] = [200, 304, 404, 400];

/// What the label `result` of answers in shadow tells apart.
pub const SHADOW_RESULTS: [&str; 6] = ["same", "status", "fields", "body", "not_stored", "not_compared"];

/// What the label `kind` of failed calls to a tier tells apart.
const STORE_ERRORS: [&str; 17] = [
    "connection",
    "decode_checksum",
    "decode_content",
    "decode_length",
    "decode_magic",
    "decode_version",
    "dropped",
    "forbidden",
    "foreign",
    "forged",
    "protocol",
    "refused",
    "refused_write",
    "timeout",
    "too_large",
    "unknown_key",
    "unsealed",
];

/// What the label `outcome` tells apart. What an outcome is made of besides (reasons, times) is in `Cache-Status` and the
/// access log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutcomeLabel {
    /// Answered from the cache, fresh.
    Hit,
    /// Answered from the cache, stale.
    Stale,
    /// Fetched from the upstream through the cache.
    Miss,
    /// Answered by a fetch that another request had begun.
    Collapsed,
    /// Passed to the upstream without the cache.
    Pass,
    /// Refused.
    Refused,
    /// The upstream failed and nothing could be served instead.
    Failed,
    /// Answered by Sluice itself.
    Local,
    /// The client left before there was an answer.
    ClientLeft,
}

impl OutcomeLabel {
    /// Every label, in the order of their numbers.
    pub const ALL: [Self; 9] =
        [Self::Hit, Self::Stale, Self::Miss, Self::Collapsed, Self::Pass, Self::Refused, Self::Failed, Self::Local, Self::ClientLeft];

    /// The label's value.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Stale => "stale",
            Self::Miss => "miss",
            Self::Collapsed => "collapsed",
            Self::Pass => "pass",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Local => "local",
            Self::ClientLeft => "client-left",
        }
    }

    /// Statuses, besides the common ones, whose counters exist from the start, so that the first of them is seen as an increase.
    const fn rare(self) -> &'static [u16] {
        match self {
            Self::Failed => &[502, 503, 504],
            Self::Refused => &[429, 431, 503],
            Self::ClientLeft => &[CLIENT_LEFT],
            Self::Miss | Self::Collapsed | Self::Pass => &[500, 502, 503, 504],
            Self::Hit | Self::Stale | Self::Local => &[],
        }
    }
}

/// The status of a request whose client left before there was one to send, as nginx counts it.
pub const CLIENT_LEFT: u16 = 499;

/// A metric as it is declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// Its name, without `sluice_`.
    pub name: String,
    /// Its labels.
    pub labels: Vec<String>,
}

/// The metrics that are made, one after the other.
struct Making {
    registry: Registry,
    declared: RefCell<Vec<Declared>>,
}

impl Making {
    fn keep<C: Collector + Clone + 'static>(&self, made: C) -> Result<C, prometheus::Error> {
        let declared = |desc: &Desc| Declared { name: desc.fq_name.clone(), labels: desc.variable_labels.clone() };
        self.declared.borrow_mut().extend(made.desc().into_iter().map(declared));
        self.registry.register(Box::new(made.clone())).map(|()| made)
    }
}

/// One more of something, until this is dropped.
pub struct OneMore(IntGauge);

impl OneMore {
    /// Counts it.
    #[must_use]
    pub fn of(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for OneMore {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Every metric that Sluice keeps. Names begin with `sluice_`.
pub struct Metrics {
    registry: Registry,
    declared: Vec<Declared>,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    /// `backend_requests_total{route,status}`: answers and failures of the backend's.
    pub backend_requests: IntCounterVec,
    /// `backend_seconds{route}`: to the head of the backend's answer.
    pub backend_seconds: HistogramVec,
    /// `backend_active{phase}`: places that are taken, by phase: `ask`, `upload`, `download` or `stream`.
    pub backend_active: IntGaugeVec,
    /// `backend_pending`: requests that wait for a place.
    pub backend_pending: IntGauge,
    /// `backend_rejected_total{phase,why}`: requests that got no place: the queue, or the phase, was `full`, another address took its place in a
    /// full queue (`displaced`), or none was free in time (`timeout`).
    pub backend_rejected: IntCounterVec,
    /// `upload_bytes`: bodies of requests that are gathered.
    pub upload_bytes: IntGauge,
    /// `collapsed_total{route}`: requests that waited for another's answer.
    pub collapsed: IntCounterVec,
    /// `store_seconds{tier,op}`: calls to the shared tier.
    pub store_seconds: HistogramVec,
    /// `store_errors_total{tier,op,kind}`: calls that failed, and entries that did not decode.
    pub store_errors: IntCounterVec,
    /// `memory_bytes`: what the in-process tier holds, and fills under way.
    pub memory_bytes: IntGauge,
    /// `memory_entries`: how many entries the in-process tier holds.
    pub memory_entries: IntGauge,
    /// `evictions_total{cause}`: entries that left the in-process tier for want of room.
    pub evictions: IntCounterVec,
    /// `purged_total`: entries removed by an operator.
    pub purged: IntCounter,
    /// `breaker_open{of}`: 1 while `backend`, `redis` or `mysql` is left alone, or the timeline's source (for `timeline_newest` orders, or for
    /// `timeline_spans`) is asked by one question at a time.
    pub breaker_open: IntGaugeVec,
    /// `rate_limited_total{route}`: requests refused because of a limit, or because too many were waiting.
    pub rate_limited: IntCounterVec,
    /// `limit_requests_total{limit,result}`: requests that a limit counted: `allowed`, `refused` or, beyond one that is only
    /// reported, `reported`.
    pub limit_requests: IntCounterVec,
    /// `shadow_answers_total{route,result}`: answers of the backend on a rule in shadow, by how they compare with what the cache
    /// would have said: `same`, `status`, `fields`, `body`, `not_stored` or `not_compared`.
    pub shadow: IntCounterVec,
    /// `early_refreshes_total{route}`: responses that were refreshed before they were stale, since they are asked for often.
    pub early_refreshes: IntCounterVec,
    /// `inflight`: requests being answered.
    pub inflight: IntGauge,
    /// `connections`: open client connections.
    pub connections: IntGauge,
    /// `connections_refused_total`: client connections closed because their address had too many, or because all were open and
    /// none was idle.
    pub connections_refused: IntCounter,
    /// `connections_closed_total`: client connections, and streams of them, that Sluice ended, by why.
    pub connections_closed: IntCounterVec,
    /// `unstored_bytes`: large bodies that are stored no more and that clients still read ([`lent`]).
    pub unstored_bytes: IntGauge,
    /// `backend_bodies_beside`: answers to changes that found no place, and are on their way all the same.
    pub bodies_beside: IntGauge,
    /// `waiting_bytes`: requests that wait for another's fetch.
    pub waiting_bytes: IntGauge,
    /// `remembered_bytes`: what is remembered of keys and heads beside what is stored.
    pub remembered_bytes: IntGauge,
    /// `fill_bytes`: bodies on their way into the cache.
    pub fill_bytes: IntGauge,
    /// `mysql_connections`: open connections to the database, idle ones included.
    pub mysql_connections: IntGauge,
    /// `mysql_waiting`: queries that wait for a connection.
    pub mysql_waiting: IntGauge,
    /// `timeline_answers_total{how}`: requests answered from the timeline: `known`, `waited` or `stale`.
    pub timeline_answers: IntCounterVec,
    /// `timeline_unanswered_total{reason}`: requests that the timeline left to the backend, by why.
    pub timeline_unanswered: IntCounterVec,
    /// `timeline_fetches_total{of,result}`: fetches from the source, of the `newest` part or of `spans` that are over.
    pub timeline_fetches: IntCounterVec,
    /// `timeline_checks_total{endpoint,result}`: answers that were compared with the backend's, or (`sums`) sums with the database's.
    pub timeline_checks: IntCounterVec,
    /// `timeline_doubts_total`: what the backend streamed was not what it summed up.
    pub timeline_doubts: IntCounter,
    /// `timeline_quarantined`: symbols that the backend answers, since the timeline's orders differed from its own.
    pub timeline_quarantined: IntGauge,
    /// `timeline_healed_total`: symbols whose orders differed and do not any more.
    pub timeline_healed: IntCounter,
    /// `timeline_texts_total`: answers in which the backend's own cache had made text of timestamps, and that went on with numbers.
    pub timeline_texts: IntCounter,
    /// `timeline_on{endpoint}`: 1 while the timeline answers, 0 on probation and while most symbols differ.
    pub timeline_on: IntGaugeVec,
    /// `timeline_bytes`: what the timeline holds in memory.
    pub timeline_bytes: IntGauge,
    /// `timeline_room_bytes`: what answers take, or may need, that are computed or that clients take.
    pub timeline_room_bytes: IntGauge,
    /// `timeline_room_waiting_bytes`: what those want of it who wait for room.
    pub timeline_room_waiting_bytes: IntGauge,
    /// `timeline_computing`: answers that are being computed.
    pub timeline_computing: IntGauge,
    /// `timeline_spans`: spans that it holds in memory.
    pub timeline_spans: IntGauge,
    /// `timeline_questions`: questions about newest parts that are under way.
    pub timeline_questions: IntGauge,
    /// `timeline_behind_seconds`: for how long the newest part that has waited longest has been due.
    pub timeline_behind: IntGauge,
    /// `config_reloads_total{result}`: reloads that were `applied`, found nothing `unchanged`, or were `refused`.
    pub config_reloads: IntCounterVec,
}

/// The counters of some rules' requests, so that a request need not look for them by name.
pub struct Rows(Vec<[Cell; OutcomeLabel::ALL.len()]>);

/// What is kept for one route and outcome.
struct Cell {
    seconds: Histogram,
    common: Option<[IntCounter; COMMON.len()]>,
}

impl Metrics {
    /// All of them, at zero.
    ///
    /// # Errors
    /// Only if two metrics had one name, which a test rules out.
    pub fn new() -> Result<Self, prometheus::Error> {
        let making = Making { registry: Registry::new_custom(Some("sluice".into()), None)?, declared: RefCell::default() };
        let counter = |name: &str, help: &str| making.keep(IntCounter::new(name, help)?);
        let counters = |name: &str, help: &str, labels: &[&str]| making.keep(IntCounterVec::new(Opts::new(name, help), labels)?);
        let histograms = |name: &str, help: &str, labels: &[&str]| {
            making.keep(HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), labels)?)
        };
        let gauge = |name: &str, help: &str| making.keep(IntGauge::new(name, help)?);
        let gauges = |name: &str, help: &str, labels: &[&str]| making.keep(IntGaugeVec::new(Opts::new(name, help), labels)?);
        let requests = counters("requests_total", "Requests answered, by rule, outcome and status.", &["route", "outcome", "status"])?;
        let request_seconds = histograms("request_seconds", "Seconds from a request's head to its answer's head.", &["route", "outcome"])?;
        let build = gauges("build_info", "1, with the version.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            request_seconds,
            config_reloads: counters("config_reloads_total", "Times that the configuration was read again while serving.", &["result"])?,
            backend_requests: counters(
                "backend_requests_total",
                "Answers and failures of the backend, by rule and status.",
                &["route", "status"],
            )?,
            backend_seconds: histograms("backend_seconds", "Seconds to the head of the backend's answer.", &["route"])?,
            backend_active: gauges("backend_active", "Requests to the backend that hold a place, by phase.", &["phase"])?,
            backend_pending: gauge("backend_pending", "Requests that wait for a place at the backend.")?,
            backend_rejected: counters(
                "backend_rejected_total",
                "Requests that got no place at the backend, by phase and reason.",
                &["phase", "why"],
            )?,
            upload_bytes: gauge("upload_bytes", "Bytes of requests' bodies that are gathered before they are sent.")?,
            collapsed: counters("collapsed_total", "Requests that waited for another request's answer.", &["route"])?,
            store_seconds: histograms("store_seconds", "Seconds a call to the shared tier took.", &["tier", "op"])?,
            store_errors: counters(
                "store_errors_total",
                "Calls to a tier that failed, and entries that did not decode.",
                &["tier", "op", "kind"],
            )?,
            memory_bytes: gauge("memory_bytes", "Bytes that the in-process tier holds.")?,
            memory_entries: gauge("memory_entries", "Entries that the in-process tier holds.")?,
            evictions: counters("evictions_total", "Entries that left the in-process tier without being asked to.", &["cause"])?,
            purged: counter("purged_total", "Entries removed by an operator.")?,
            breaker_open: gauges("breaker_open", "1 while the backend, Redis or MySQL is left alone after failures.", &["of"])?,
            rate_limited: counters(
                "rate_limited_total",
                "Requests refused because of a limit, or because too many were waiting.",
                &["route"],
            )?,
            limit_requests: counters(
                "limit_requests_total",
                "Requests that a limit counted, by what became of them.",
                &["limit", "result"],
            )?,
            shadow: counters(
                "shadow_answers_total",
                "Answers of the backend on a rule in shadow, by how they compare with what the cache would have said.",
                &["route", "result"],
            )?,
            early_refreshes: counters(
                "early_refreshes_total",
                "Responses that were refreshed before they were stale, since they are asked for often.",
                &["route"],
            )?,
            inflight: gauge("inflight", "Requests being answered.")?,
            connections: gauge("connections", "Open client connections.")?,
            connections_refused: counter(
                "connections_refused_total",
                "Client connections closed because their address had too many, or all were open.",
            )?,
            connections_closed: counters(
                "connections_closed_total",
                "Client connections, and streams of HTTP/2, that were ended, by the limit that they were over.",
                &["why"],
            )?,
            unstored_bytes: gauge("unstored_bytes", "Bytes of large answers that are stored no more and that clients still read.")?,
            bodies_beside: gauge("backend_bodies_beside", "Answers to changes that found no place, and are on their way all the same.")?,
            waiting_bytes: gauge("waiting_bytes", "Bytes of requests that wait for another's fetch.")?,
            remembered_bytes: gauge("remembered_bytes", "Bytes of what is remembered of keys and heads beside what is stored.")?,
            fill_bytes: gauge("fill_bytes", "Bytes of bodies on their way into the cache.")?,
            mysql_connections: gauge("mysql_connections", "Open connections to the database, idle ones included.")?,
            mysql_waiting: gauge("mysql_waiting", "Queries that wait for a connection to the database.")?,
            timeline_answers: counters("timeline_answers_total", "Requests answered from the timeline.", &["how"])?,
            timeline_unanswered: counters(
                "timeline_unanswered_total",
                "Requests that the timeline left to the backend, by why.",
                &["reason"],
            )?,
            timeline_fetches: counters(
                "timeline_fetches_total",
                "Fetches of the timeline from the source of its orders.",
                &["of", "result"],
            )?,
            timeline_checks: counters(
                "timeline_checks_total",
                "Answers of the timeline that were compared with the backend's, or sums with the database's.",
                &["endpoint", "result"],
            )?,
            timeline_doubts: counter("timeline_doubts_total", "What the backend streamed was not what it summed up.")?,
            timeline_quarantined: gauge(
                "timeline_quarantined",
                "Symbols that the backend answers, since the timeline's orders differed from its own.",
            )?,
            timeline_healed: counter("timeline_healed_total", "Symbols whose orders differed from the backend's and do not any more.")?,
            timeline_texts: counter(
                "timeline_texts_total",
                "Answers whose timestamps the backend's own cache had made text, given back as numbers.",
            )?,
            timeline_on: gauges(
                "timeline_on",
                "1 while the timeline answers, 0 on probation and while most symbols differ.",
                &["endpoint"],
            )?,
            timeline_bytes: gauge("timeline_bytes", "Bytes that the timeline holds in memory.")?,
            timeline_room_bytes: gauge(
                "timeline_room_bytes",
                "Bytes of computed answers, and of what those may need that are being made.",
            )?,
            timeline_room_waiting_bytes: gauge("timeline_room_waiting_bytes", "Bytes that answers want that wait for room to be made.")?,
            timeline_computing: gauge("timeline_computing", "Answers that are being computed.")?,
            timeline_questions: gauge("timeline_questions", "Questions about newest orders that are under way.")?,
            timeline_behind: gauge(
                "timeline_behind_seconds",
                "For how long the newest orders have been due that have waited longest for their question.",
            )?,
            timeline_spans: gauge("timeline_spans", "Spans that the timeline holds in memory.")?,
            requests,
            declared: making.declared.take(),
            registry: making.registry,
        };
        metrics.begin();
        Ok(metrics)
    }

    /// All that there are, whether they ever moved or not.
    #[must_use]
    pub fn declared(&self) -> &[Declared] {
        &self.declared
    }

    /// The rows of rules with these names; the last is that of requests that no rule matches. A rule that had its name before
    /// counts on.
    #[must_use]
    pub fn rows<'n>(&self, names: impl Iterator<Item = &'n str>) -> Rows {
        let cells = |route: &str| {
            for outcome in OutcomeLabel::ALL {
                for status in outcome.rare() {
                    self.requests.with_label_values(&[route, outcome.name(), &status.to_string()]);
                }
            }
            self.begin_of_route(route);
            OutcomeLabel::ALL.map(|outcome| Cell {
                seconds: self.request_seconds.with_label_values(&[route, outcome.name()]),
                common: match outcome {
                    OutcomeLabel::ClientLeft => None,
                    _ => Some(COMMON.map(|status| self.requests.with_label_values(&[route, outcome.name(), &status.to_string()]))),
                },
            })
        };
        Rows(names.chain(["none"]).map(cells).collect())
    }

    /// Has the counters of a rule that have labels known before anything happens.
    fn begin_of_route(&self, route: &str) {
        self.collapsed.with_label_values(&[route]);
        self.rate_limited.with_label_values(&[route]);
        self.early_refreshes.with_label_values(&[route]);
        for status in ["200", "304", "404", "500", "502", "503", "504", "connect", "reset", "timeout", "invalid", "truncated", "overloaded"]
        {
            self.backend_requests.with_label_values(&[route, status]);
        }
        for result in SHADOW_RESULTS {
            self.shadow.with_label_values(&[route, result]);
        }
    }

    /// The same for those that are about no rule. `increase()` sees nothing of a counter that begins with its first event.
    fn begin(&self) {
        for (counters, labels) in [
            (&self.evictions, &[&["size"][..], &["expired"]][..]),
            (&self.config_reloads, &[&["applied"], &["unchanged"], &["refused"]]),
            (&self.timeline_answers, &[&["known"], &["waited"], &["stale"]]),
            (&self.timeline_fetches, &[&["newest", "answered"], &["newest", "failed"], &["spans", "answered"], &["spans", "failed"]]),
        ] {
            for labels in labels {
                counters.with_label_values(labels);
            }
        }
        for endpoint in ["liquidations", "liquidation-orders", "sums"] {
            for result in ["equal", "different", "unanswered"] {
                self.timeline_checks.with_label_values(&[endpoint, result]);
            }
        }
        for op in ["read", "write"] {
            for kind in STORE_ERRORS {
                self.store_errors.with_label_values(&["redis", op, kind]);
            }
        }
        self.store_errors.with_label_values(&["redis", "connect", "failed"]);
        for of in ["backend", "redis", "mysql", "timeline_newest", "timeline_spans"] {
            self.breaker_open.with_label_values(&[of]);
        }
    }

    /// Counts an answered request, which took so long to the head of its response. `route` is the rule's index, or
    /// [`Rows::no_route`].
    pub fn record(&self, rows: &Rows, route: usize, name: &str, outcome: OutcomeLabel, status: u16, took: Duration) {
        let Some(cell) = rows.0.get(route).map(|row| &row[outcome as usize]) else { return };
        cell.seconds.observe(took.as_secs_f64());
        match cell.common.as_ref().zip(COMMON.iter().position(|&common| common == status)) {
            Some((common, at)) => common[at].inc(),
            None => self.requests.with_label_values(&[name, outcome.name(), &status.to_string()]).inc(),
        }
    }

    /// How many requests had an outcome, those of rules that are gone included.
    #[must_use]
    pub fn requests_with(&self, outcome: OutcomeLabel) -> u64 {
        let families = self.request_seconds.collect();
        let series = families.iter().flat_map(|family| family.get_metric());
        let meant =
            series.filter(|series| series.get_label().iter().any(|label| label.value() == outcome.name() && label.name() == "outcome"));
        meant.map(|series| series.get_histogram().get_sample_count()).sum()
    }

    /// How answers in shadow of a rule compared, those that did in some way at least once.
    #[must_use]
    pub fn shadow_of(&self, route: &str) -> BTreeMap<&'static str, u64> {
        let count = |result: &'static str| self.shadow.get_metric_with_label_values(&[route, result]).map_or(0, |counter| counter.get());
        SHADOW_RESULTS.into_iter().map(|result| (result, count(result))).filter(|(_, count)| *count > 0).collect()
    }

    /// How many requests were answered from the timeline.
    #[must_use]
    pub fn timeline_answered(&self) -> u64 {
        ["known", "waited", "stale"].into_iter().map(|how| self.timeline_answers.with_label_values(&[how]).get()).sum()
    }

    /// All metrics in the text format of Prometheus. Histograms that never moved are left out, to keep the page short.
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        self.unstored_bytes.set(i64::try_from(lent::bytes()).unwrap_or(i64::MAX));
        let mut families = self.registry.gather();
        for family in &mut families {
            let kind = family.get_field_type();
            let metrics: Vec<_> = family.get_metric().iter().filter(|metric| !is_idle(kind, metric)).cloned().collect();
            family.set_metric(metrics);
        }
        families.retain(|family| !family.get_metric().is_empty());
        let mut page = Vec::with_capacity(16 << 10);
        if let Err(error) = TextEncoder::new().encode(&families, &mut page) {
            tracing::error!(%error, "the metrics page could not be written");
        }
        page
    }
}

impl Rows {
    /// The row of requests that no rule matches (`route="none"`).
    #[must_use]
    pub fn no_route(&self) -> usize {
        self.0.len() - 1
    }

    /// How many requests of a route (by its row) had an outcome, and the seconds that they took together.
    #[must_use]
    pub fn requests_of(&self, row: usize, outcome: OutcomeLabel) -> (u64, f64) {
        let seconds = &self.0[row][outcome as usize].seconds;
        (seconds.get_sample_count(), seconds.get_sample_sum())
    }
}

/// A labelled histogram that never moved. Counters show from the start: the first event must be an increase.
fn is_idle(kind: MetricType, metric: &Metric) -> bool {
    kind == MetricType::HISTOGRAM && metric.get_histogram().get_sample_count() == 0 && !metric.get_label().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stand_at_their_numbers() {
        for (number, label) in OutcomeLabel::ALL.into_iter().enumerate() {
            assert_eq!(label as usize, number);
        }
    }

    #[test]
    fn requests_show_under_their_labels_and_idle_series_do_not() {
        let metrics = Metrics::new().unwrap();
        let rows = metrics.rows(["a"].into_iter());
        metrics.record(&rows, 0, "a", OutcomeLabel::Local, 200, Duration::from_millis(1));
        metrics.record(&rows, rows.no_route(), "none", OutcomeLabel::Local, 418, Duration::from_millis(1));
        let page = String::from_utf8(metrics.render()).unwrap();
        assert!(page.contains("sluice_requests_total{outcome=\"local\",route=\"a\",status=\"200\"} 1"), "{page}");
        assert!(page.contains("route=\"none\",status=\"418\"} 1"));
        assert!(page.contains("sluice_build_info{version="));
        assert!(page.contains("sluice_inflight 0"));
        assert!(page.contains("sluice_requests_total{outcome=\"failed\",route=\"a\",status=\"502\"} 0"));
        assert!(page.contains("sluice_config_reloads_total{result=\"refused\"} 0"));
        assert!(!page.contains("sluice_request_seconds_count{outcome=\"hit\",route=\"a\"}"));
    }
}
