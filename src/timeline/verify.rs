//! Comparing computed answers with the backend's own, over requests like those that clients ask.
//!
//! The requests are not the clients' own: they are moved by some seconds, so that no cache of the backend's answers them. And they ask for no
//! more than both can know: up to the newest order that was known here before the other was asked. Orders may still come late, so both are asked
//! again before a difference counts, the last time for what is settled alone. What [no late order explains](super::between) counts also where it
//! is not settled yet.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::sleep;

use super::between::is_between;
use super::check::nearly;
use super::compute::{Computed, compute};
use super::endpoint::Endpoint;
use super::engine::{Allowed, Engine, whole_millis};
use super::service::Service;
use super::symbol::Symbol;
use super::tail::moment;
use super::times::number_times;
use crate::api::orders::{Orders, Span};
use crate::clock::Wall;
use crate::config::Timeline as Settings;
use crate::request::secrets::without_secrets;
use crate::request::target::Target;
use crate::request::timestamp;

/// A request is moved by up to so many milliseconds.
const MOVED: i64 = 60_000;
/// So many differences that no late order explains are one: an order may be deleted while both are asked.
const UNEXPLAINED: u32 = 2;

/// What a comparison found.
pub enum Found {
    /// Both say the same.
    Equal {
        /// The order of orders of one moment shows.
        ties: bool,
        /// They do but for the last digits of sums, which depend on the order of addition where the table holds DOUBLE.
        nearly: bool,
    },
    /// They say what differs.
    Different {
        /// Where, and to which request: for the log, without secrets.
        why: String,
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
}

impl Verifier {
    /// Compares with this service's answers.
    #[must_use]
    pub fn new(service: Arc<Service>, settings: &Settings) -> Self {
        Self { service, refresh: settings.refresh, settle: whole_millis(settings.settle) }
    }

    /// Compares the answers to a request, `tries` times at most before a difference counts.
    pub(super) async fn compare<S: Orders>(
        &self,
        engine: &Arc<Engine<S>>,
        symbol: &Arc<Symbol>,
        endpoint: Endpoint,
        similar: &Similar,
        tries: u32,
    ) -> Found {
        let mut found = Found::Nothing;
        // Differences that no late order explains, and the last of them.
        let (mut unexplained, mut last) = (0, String::new());
        let mut asked = String::new();
        for attempt in 1..=tries {
            let late = if attempt == tries { self.settle } else { 1 };
            let Some(newest) = engine.known_tail(symbol).and_then(|tail| tail.newest_until(moment(Wall::now()))) else {
                return Found::Nothing;
            };
            let until = newest.saturating_sub(late);
            let Some(request) = similar.target(&symbol.name, endpoint, until) else { return Found::Nothing };
            let before = compute(engine, symbol, endpoint, &request, Allowed::NOTHING).await;
            let (Some(before), Ok(said)) = (before, self.service.ask(&request).await) else { return Found::Nothing };
            if !matches!(said.0, StatusCode::OK | StatusCode::NOT_FOUND) {
                return Found::Nothing;
            }
            let compared = |own: &Computed| similar.compare(own, &said, until);
            if let Some(Err(_)) = compared(&before) {
                // An order may have come late after the newest part was asked for.
                sleep(self.refresh * 2).await;
                let after = compute(engine, symbol, endpoint, &request, Allowed::NOTHING).await;
                let Some(after) = after else { return Found::Nothing };
                if let Some(Err(at)) = compared(&after)
                    && !is_between(&before.body, &number_times(&said.1), &after.body, request != asked)
                {
                    (unexplained, last) = (unexplained + 1, at);
                }
                found = Found::of(compared(&after), similar.shows_ties(&after), &request);
            } else {
                found = Found::of(compared(&before), similar.shows_ties(&before), &request);
            }
            let is_found = unexplained >= UNEXPLAINED.min(tries - 1);
            if unexplained > 0 && is_found {
                return Found::of(Some(Err(format!("{last} (no late order explains it)"))), false, &request);
            }
            if !matches!(found, Found::Different { .. }) {
                break;
            }
            asked = request;
        }
        found
    }
}

impl Found {
    fn of(compared: Option<Result<bool, String>>, ties: bool, request: &str) -> Self {
        match compared {
            Some(Ok(nearly)) => Self::Equal { ties, nearly },
            Some(Err(at)) => Self::Different { why: format!("{at}, in the answer to {}", without_secrets(request)) },
            None => Self::Nothing,
        }
    }
}

/// A request like the one that a client asked, but for its end.
pub(super) enum Similar {
    /// For exactly the orders of one moment: their order shows.
    Tie(i64),
    /// For so many of the newest.
    Latest { limit: u16 },
    /// For a window, with what else is asked of it.
    Window { start: i64, end: i64, rest: String },
}

/// A request like `target`, which a client asked; `None`: there is none.
pub(super) fn similar<S: Orders>(engine: &Arc<Engine<S>>, symbol: &Arc<Symbol>, endpoint: Endpoint, target: &str) -> Option<Similar> {
    if endpoint == Endpoint::Orders
        && engine.judge.lacks_ties()
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
    /// Of which orders its answer is made, where `listed` is the time of the oldest of the newest orders.
    #[must_use]
    pub fn span(&self, listed: i64) -> Span {
        match *self {
            Self::Tie(time) => Span { start: time, end: time },
            Self::Latest { .. } => Span { start: listed, end: i64::MAX },
            Self::Window { start, end, .. } => Span { start, end },
        }
    }

    /// Whether an answer shows in which order a stream gives orders of one moment. Lists of the newest may hold some that came in a list.
    fn shows_ties(&self, own: &Computed) -> bool {
        own.made.ties && !matches!(self, Self::Latest { .. })
    }

    /// Whether an answer is what the service says up to a moment; `None`: they cannot be compared.
    fn compare(&self, own: &Computed, (status, said): &(StatusCode, Bytes), until: i64) -> Option<Result<bool, String>> {
        match self {
            Self::Latest { .. } if own.status == *status && *status == StatusCode::OK => same_until(&own.body, said, until),
            _ => Some(difference((own.status, &own.body), (*status, said))),
        }
    }

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
