//! Holding computed answers against the backend's own, in the background: one at a time, over requests like those that clients
//! ask.
//!
//! The requests are not the clients' own: they are moved by some seconds, so that no cache of the backend's answers them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tokio::time::sleep;

use super::check::nearly;
use super::compute::compute;
use super::endpoint::Endpoint;
use super::engine::{Allowed, Engine};
use super::service::Service;
use super::symbol::Symbol;
use super::times::number_times;
use super::trust::Trust;
use crate::api::orders::Orders;
use crate::request::secrets::without_secrets;
use crate::request::target::Target;
use crate::request::timestamp;
use crate::telemetry::metrics::Metrics;

/// Both are asked again so often before a difference counts: orders may have come in between.
const TRIES: u32 = 3;
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
    /// How long until the newest part is known anew.
    refresh: Duration,
    checking: AtomicBool,
    told_of_digits: AtomicBool,
    metrics: Arc<Metrics>,
}

impl Verifier {
    /// Compares with this service's answers.
    #[must_use]
    pub const fn new(service: Arc<Service>, refresh: Duration, metrics: Arc<Metrics>) -> Self {
        Self { service, refresh, checking: AtomicBool::new(false), told_of_digits: AtomicBool::new(false), metrics }
    }

    /// Takes the turn to check; false if a check is under way.
    pub fn take_turn(&self) -> bool {
        !self.checking.swap(true, Ordering::AcqRel)
    }

    /// Checks an answer to a request like `target`, having taken the turn.
    pub async fn check<S: Orders>(&self, engine: &Arc<Engine<S>>, symbol: &Arc<Symbol>, endpoint: Endpoint, trust: &Trust, target: &str) {
        let request = similar(engine, symbol, endpoint, trust, target);
        let found = match &request {
            Some(request) => self.compare(engine, symbol, endpoint, request).await,
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
                trust.note_equal(ties);
                if nearly && !self.told_of_digits.swap(true, Ordering::AcqRel) {
                    tracing::info!(
                        "sums of the timeline and of the backend differ in their last digits; so they do where the table holds DOUBLE, since they depend on the order of addition"
                    );
                }
            }
            Found::Different { at } => {
                if trust.note_different() {
                    let request = request.unwrap_or_default();
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

    async fn compare<S: Orders>(&self, engine: &Arc<Engine<S>>, symbol: &Arc<Symbol>, endpoint: Endpoint, request: &str) -> Found {
        let mut at = String::new();
        for _ in 0..TRIES {
            let before = compute(engine, symbol, endpoint, request, Allowed::NOTHING).await;
            let (Some(before), Ok(said)) = (before, self.service.ask(request).await) else { return Found::Nothing };
            if !matches!(said.0, StatusCode::OK | StatusCode::NOT_FOUND) {
                return Found::Nothing;
            }
            let after = match difference((before.status, &before.body), (said.0, &said.1)) {
                Ok(nearly) => return Found::Equal { ties: before.made.ties, nearly },
                // An order may have come after the newest part was asked for.
                Err(_) => {
                    sleep(self.refresh * 2).await;
                    compute(engine, symbol, endpoint, request, Allowed::NOTHING).await
                }
            };
            let Some(after) = after else { return Found::Nothing };
            match difference((after.status, &after.body), (said.0, &said.1)) {
                Ok(nearly) => return Found::Equal { ties: after.made.ties, nearly },
                Err(difference) => at = difference,
            }
        }
        Found::Different { at }
    }
}

/// A request like the one that a client asked.
fn similar<S: Orders>(engine: &Arc<Engine<S>>, symbol: &Arc<Symbol>, endpoint: Endpoint, trust: &Trust, target: &str) -> Option<String> {
    let name = &symbol.name;
    if endpoint == Endpoint::Orders
        && trust.lacks_ties()
        && let Some(time) = engine.known_tail(symbol).and_then(|tail| tail.columns.tie())
    {
        // Exactly the orders of one moment: their order shows.
        return Some(format!("{}?symbol={name}&start_timestamp={time}&end_timestamp={time}&page_size=1000", endpoint.path()));
    }
    let target = Target::parse(target).ok()?;
    let times = [target.text("start_timestamp"), target.text("end_timestamp")].map(|text| text.and_then(|text| timestamp::parse(&text)));
    let [Some(start), Some(end)] = times else {
        return (endpoint == Endpoint::Orders).then(|| format!("{}?symbol={name}&limit={}", endpoint.path(), fastrand::u16(1..=1000)));
    };
    let moved = fastrand::i64(0..=MOVED).min(start.max(0));
    let window = format!("start_timestamp={}&end_timestamp={}", start - moved, end.max(start) - moved);
    Some(match endpoint {
        Endpoint::Liquidations => {
            let timeframe = target.text("timeframe").filter(|text| text.bytes().all(|byte| byte.is_ascii_alphanumeric()))?;
            format!("{}?symbol={name}&timeframe={timeframe}&{window}", endpoint.path())
        }
        Endpoint::Orders => {
            let number = |parameter: &str, default: u16| target.text(parameter).and_then(|text| text.parse().ok()).unwrap_or(default);
            format!("{}?symbol={name}&{window}&page={}&page_size={}", endpoint.path(), number("page", 1), number("page_size", 100))
        }
    })
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
