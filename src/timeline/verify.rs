//! Holding computed answers against the backend's own, in the background: one at a time, over requests like those that clients
//! ask.
//!
//! The requests are not the clients' own: they are moved by some seconds, so that no cache of the backend's answers them. And they ask for no
//! more than both can know: up to the newest order that was known here before the other was asked. Orders may still come late, so both are asked
//! again before a difference counts, the last time for what is settled alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::sleep;

use super::check::nearly;
use super::compute::{Computed, compute};
use super::endpoint::Endpoint;
use super::engine::{Allowed, Engine, whole_millis};
use super::service::Service;
use super::symbol::Symbol;
use super::tail::moment;
use super::times::number_times;
use super::trust::Trust;
use crate::api::orders::Orders;
use crate::clock::Wall;
use crate::config::Timeline as Settings;
use crate::request::secrets::without_secrets;
use crate::request::target::Target;
use crate::request::timestamp;
use crate::telemetry::metrics::Metrics;

/// Both are asked again so often before a difference counts: orders may have come late in between.
const TRIES: u32 = 4;
/// A request is moved by up to so many milliseconds.
const MOVED: i64 = 60_000;

/// What a check found.
enum Found {
    Equal {
        ties: bool,
        /// Only in the last digits of sums, which depend on the order of addition where the table holds DOUBLE.
        nearly: bool,
    },
    Different {
        at: String,
    },
    /// One of them did not answer.
    Nothing,
}

/// Compares computed answers with a service's own.
pub struct Verifier {
    service: Arc<Service>,
    /// How long until the newest part is known anew, and how late orders come, in milliseconds.
    refresh: Duration,
    settle: i64,
    checking: AtomicBool,
    told_of_digits: AtomicBool,
    metrics: Arc<Metrics>,
}

impl Verifier {
    /// Compares with this service's answers.
    #[must_use]
    pub fn new(service: Arc<Service>, settings: &Settings, metrics: Arc<Metrics>) -> Self {
        let (refresh, settle) = (settings.refresh, whole_millis(settings.settle));
        Self { service, refresh, settle, checking: AtomicBool::new(false), told_of_digits: AtomicBool::new(false), metrics }
    }

    /// Takes the turn to check; false if a check is under way.
    pub fn take_turn(&self) -> bool {
        !self.checking.swap(true, Ordering::AcqRel)
    }

    /// Checks an answer to a request like `target`, having taken the turn.
    pub async fn check<S: Orders>(&self, engine: &Arc<Engine<S>>, symbol: &Arc<Symbol>, endpoint: Endpoint, trust: &Trust, target: &str) {
        let (mut request, found) = (String::new(), similar(engine, symbol, endpoint, trust, target));
        let found = match found {
            Some(similar) => self.compare(engine, symbol, endpoint, &similar, &mut request).await,
            None => Found::Nothing,
        };
        let result = match &found {
            Found::Equal { .. } => "equal",
            Found::Different { .. } => "different",
            Found::Nothing => "unanswered",
        };
        self.metrics.timeline_checks.with_label_values(&[endpoint.name(), result]).inc();
        match found {
            Found::Equal { ties, nearly } => {
                symbol.note_verified();
                trust.note_equal(ties);
                if nearly && !self.told_of_digits.swap(true, Ordering::AcqRel) {
                    tracing::info!(
                        "sums of the timeline and of the backend differ in their last digits; so they do where the table holds DOUBLE, since they depend on the order of addition"
                    );
                }
            }
            Found::Different { at } => {
                if trust.note_different() {
                    let request = &*without_secrets(&request);
                    tracing::warn!(
                        endpoint = endpoint.name(),
                        request,
                        at,
                        "the timeline's answer differs from the backend's, which are served from now on; a restart begins anew"
                    );
                }
            }
            Found::Nothing => {}
        }
        self.checking.store(false, Ordering::Release);
    }

    /// Compares the answers to a request, and says which it was.
    async fn compare<S: Orders>(
        &self,
        engine: &Arc<Engine<S>>,
        symbol: &Arc<Symbol>,
        endpoint: Endpoint,
        similar: &Similar,
        request: &mut String,
    ) -> Found {
        let mut at = String::new();
        for attempt in 1..=TRIES {
            let late = if attempt == TRIES { self.settle } else { 1 };
            let Some(newest) = engine.known_tail(symbol).and_then(|tail| tail.newest_until(moment(Wall::now()))) else {
                return Found::Nothing;
            };
            let until = newest.saturating_sub(late);
            let Some(target) = similar.target(&symbol.name, endpoint, until) else { return Found::Nothing };
            *request = target;
            let before = compute(engine, symbol, endpoint, request, Allowed::NOTHING).await;
            let (Some(before), Ok(said)) = (before, self.service.ask(request).await) else { return Found::Nothing };
            if !matches!(said.0, StatusCode::OK | StatusCode::NOT_FOUND) {
                return Found::Nothing;
            }
            let (status, said) = said;
            let compared = |own: &Computed| match similar {
                Similar::Latest { .. } if own.status == status && status == StatusCode::OK => same_until(&own.body, &said, until),
                _ => Some(difference((own.status, &own.body), (status, &said))),
            };
            let after = match compared(&before) {
                Some(Ok(nearly)) => return Found::Equal { ties: before.made.ties, nearly },
                None => return Found::Nothing,
                // An order may have come late after the newest part was asked for.
                Some(Err(_)) => {
                    sleep(self.refresh * 2).await;
                    compute(engine, symbol, endpoint, request, Allowed::NOTHING).await
                }
            };
            let Some(after) = after else { return Found::Nothing };
            match compared(&after) {
                Some(Ok(nearly)) => return Found::Equal { ties: after.made.ties, nearly },
                None => return Found::Nothing,
                Some(Err(difference)) => at = difference,
            }
        }
        Found::Different { at }
    }
}

/// A request like the one that a client asked, but for its end.
enum Similar {
    /// For exactly the orders of one moment: their order shows.
    Tie(i64),
    /// For so many of the newest.
    Latest { limit: u16 },
    /// For a window, with what else is asked of it.
    Window { start: i64, end: i64, rest: String },
}

fn similar<S: Orders>(engine: &Arc<Engine<S>>, symbol: &Arc<Symbol>, endpoint: Endpoint, trust: &Trust, target: &str) -> Option<Similar> {
    if endpoint == Endpoint::Orders
        && trust.lacks_ties()
        && let Some(time) = engine.known_tail(symbol).and_then(|tail| tail.columns.tie())
    {
        return Some(Similar::Tie(time));
    }
    let target = Target::parse(target).ok()?;
    let times = [target.text("start_timestamp"), target.text("end_timestamp")].map(|text| text.and_then(|text| timestamp::parse(&text)));
    let [Some(start), Some(end)] = times else {
        return (endpoint == Endpoint::Orders).then(|| Similar::Latest { limit: fastrand::u16(1..=1000) });
    };
    let moved = fastrand::i64(0..=MOVED).min(start.max(0));
    let rest = match endpoint {
        Endpoint::Liquidations => {
            let timeframe = target.text("timeframe").filter(|text| text.bytes().all(|byte| byte.is_ascii_alphanumeric()))?;
            format!("timeframe={timeframe}")
        }
        Endpoint::Orders => {
            let number = |parameter: &str, default: u16| target.text(parameter).and_then(|text| text.parse().ok()).unwrap_or(default);
            format!("page={}&page_size={}", number("page", 1), number("page_size", 100))
        }
    };
    Some(Similar::Window { start: start - moved, end: end.max(start) - moved, rest })
}

impl Similar {
    /// The request for what there is up to a moment; `None`: nothing is.
    fn target(&self, symbol: &str, endpoint: Endpoint, until: i64) -> Option<String> {
        let path = endpoint.path();
        Some(match self {
            Self::Tie(time) => format!("{path}?symbol={symbol}&start_timestamp={time}&end_timestamp={time}&page_size=1000"),
            Self::Latest { limit } => format!("{path}?symbol={symbol}&limit={limit}"),
            Self::Window { start, end, rest } => {
                let end = (*end).min(until);
                if end < *start {
                    return None;
                }
                format!("{path}?symbol={symbol}&start_timestamp={start}&end_timestamp={end}&{rest}")
            }
        })
    }
}

/// Whether two lists of the newest orders say the same up to a moment, as far as both reach back. `None`: nothing of one of them is left, or it is
/// no such list.
fn same_until(own: &[u8], said: &[u8], until: i64) -> Option<Result<bool, String>> {
    #[derive(Deserialize)]
    struct Timed {
        order_trade_time: i64,
    }
    let cut = |list: &'_ [u8]| -> Option<Vec<String>> {
        let orders: Vec<&RawValue> = serde_json::from_slice(list).ok()?;
        let mut kept = Vec::new();
        for order in orders {
            let Timed { order_trade_time } = serde_json::from_str(order.get()).ok()?;
            if order_trade_time <= until {
                kept.push(order.get().to_owned());
            }
        }
        Some(kept)
    };
    let (own, said) = (cut(own)?, cut(said)?);
    let both = own.len().min(said.len());
    if both == 0 {
        return None;
    }
    let differs = own.iter().zip(&said).position(|(own, said)| own != said);
    Some(differs.map_or(Ok(false), |place| Err(format!("order {place} of {both} that both list up to {until}"))))
}

/// Whether two answers say the same; the flag says that they do but for the last digits of sums.
///
/// # Errors
/// Where they differ, for the log.
fn difference(own: (StatusCode, &Bytes), said: (StatusCode, &Bytes)) -> Result<bool, String> {
    let text = number_times(said.1);
    if own.0 == said.0 && **own.1 == *text {
        return Ok(false);
    }
    if own.0 == said.0 && same_but_digits(own.1, &text) {
        return Ok(true);
    }
    let place = own.1.iter().zip(&*text).position(|(one, two)| one != two).unwrap_or_else(|| own.1.len().min(text.len()));
    let (computed, asked) = ((own.0.as_u16(), own.1.len()), (said.0.as_u16(), text.len()));
    Err(format!("byte {place}: computed {} with {} bytes, the backend {} with {}", computed.0, computed.1, asked.0, asked.1))
}

/// Whether two lists of buckets differ in the last digits of their sums alone.
fn same_but_digits(one: &[u8], two: &[u8]) -> bool {
    const SUM: &str = "\"cumulated_usd_size\":";
    let (Ok(one), Ok(two)) = (std::str::from_utf8(one), std::str::from_utf8(two)) else { return false };
    let (mut one, mut two) = (one.split(SUM), two.split(SUM));
    if one.next() != two.next() {
        return false;
    }
    let sum = |piece: &str| {
        let (sum, rest) = piece.split_once('}')?;
        Some((sum.parse::<f64>().ok()?, rest.to_owned()))
    };
    loop {
        match (one.next(), two.next()) {
            (None, None) => return true,
            (Some(one), Some(two)) => match (sum(one), sum(two)) {
                (Some((one, rest)), Some((two, others))) if nearly(one, two) && rest == others => {}
                _ => return false,
            },
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(own: &str, said: &str) -> Option<bool> {
        difference((StatusCode::OK, &Bytes::copy_from_slice(own.as_bytes())), (StatusCode::OK, &Bytes::copy_from_slice(said.as_bytes())))
            .ok()
    }

    #[test]
    fn lists_are_compared_as_far_as_both_know() {
        let list = |times: &[i64]| {
            let orders: Vec<String> = times.iter().map(|time| format!("{{\"side\":\"buy\",\"order_trade_time\":{time}}}")).collect();
            format!("[{}]", orders.join(",")).into_bytes()
        };
        for (own, said, until, same) in [
            (&[9, 8, 7, 6][..], &[9, 8, 7, 6][..], 8, Some(true)),
            (&[9, 8, 7, 6], &[12, 10, 9, 8], 8, Some(true)),
            (&[9, 8, 7, 6], &[12, 9, 7, 6], 8, Some(false)),
            (&[9, 8, 7], &[], 8, None),
            (&[9, 8, 7], &[12, 11, 10], 8, None),
        ] {
            assert_eq!(same_until(&list(own), &list(said), until).map(|found| found.is_ok()), same, "{own:?} {said:?}");
        }
        assert_eq!(same_until(b"[1]", b"[1]", 8), None);
    }

    #[test]
    fn text_from_the_services_cache_and_last_digits_are_no_differences() {
        let own = r#"[{"timestamp":17,"side":"buy","cumulated_usd_size":100.30000000000001},{"timestamp":18,"side":"buy","cumulated_usd_size":2.0}]"#;
        assert_eq!(compared(own, own), Some(false));
        assert_eq!(compared(own, &own.replace(":17,", ":\"17\",").replace(":18,", ":\"18\",")), Some(false), "D3");
        assert_eq!(compared(own, &own.replace("100.30000000000001", "100.3")), Some(true));
        for (from, to) in [
            ("100.30000000000001", "100.31"),
            ("buy", "sell"),
            ("2.0", "2"),
            (":17,", ":\"x\","),
            ("}]", "},{}]"),
            ("\"side\":\"buy\",", ""),
        ] {
            let said = own.replace(from, to);
            // Another spelling of a number is taken for its last digits: it is sums that are spelled so.
            let expected = if from == "2.0" { Some(true) } else { None };
            assert_eq!(compared(own, &said), expected, "{said}");
        }
        assert!(difference((StatusCode::OK, &Bytes::new()), (StatusCode::NOT_FOUND, &Bytes::new())).is_err());
    }
}
