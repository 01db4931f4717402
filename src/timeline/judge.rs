//! Holds what the checks found ([`Trust`]): requests read it without a lock, and each change is a log line.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use foldhash::fast::RandomState;
use tokio::time::Instant;

use super::endpoint::Endpoint;
use super::trust::Trust;
use super::verdict::{Change, Rules, Scope, Standing, State, Verdict};
use crate::telemetry::metrics::Metrics;

/// Whether a symbol's answers are the timeline's, for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quarantine {
    /// They are.
    Open,
    /// An answer differed; the orders are fetched anew and compared again.
    Suspect {
        /// For so long.
        since: Duration,
        /// What differed.
        why: Arc<str>,
    },
    /// They differed although the orders were fetched anew.
    Quarantined {
        /// For so long.
        since: Duration,
        /// What differed.
        why: Arc<str>,
        /// The next check comes with the first request after this.
        again_in: Duration,
    },
}

impl fmt::Display for Quarantine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |span: &Duration| span.as_secs();
        match self {
            Self::Open => f.write_str("open"),
            Self::Suspect { since, why } => write!(f, "suspect for {} s, its orders are being fetched anew: {why}", seconds(since)),
            Self::Quarantined { since, why, again_in } => {
                write!(f, "in quarantine for {} s, checked again in {} s: {why}", seconds(since), seconds(again_in))
            }
        }
    }
}

/// What requests need to know.
struct Seen {
    states: [State; Endpoint::ALL.len()],
    lacks_ties: bool,
    standings: HashMap<Arc<str>, Standing, RandomState>,
}

impl Seen {
    fn of(trust: &Trust) -> Self {
        let standings = trust.standings().map(|(symbol, standing)| (Arc::clone(symbol), standing)).collect();
        Self { states: Endpoint::ALL.map(|endpoint| trust.state(endpoint)), lacks_ties: trust.lacks_ties(), standings }
    }
}

/// What the checks found.
pub struct Judge {
    trust: Mutex<Trust>,
    seen: ArcSwap<Seen>,
    /// What the moments of `trust` count from.
    begun: Instant,
    metrics: Arc<Metrics>,
}

impl Judge {
    /// Of which nothing was checked yet.
    #[must_use]
    pub fn new(rules: Rules, metrics: Arc<Metrics>) -> Self {
        let trust = Trust::new(rules, fastrand::u64(..));
        let seen = ArcSwap::from_pointee(Seen::of(&trust));
        Self { trust: Mutex::new(trust), seen, begun: Instant::now(), metrics }
    }

    /// How an endpoint stands.
    #[must_use]
    pub fn state(&self, endpoint: Endpoint) -> State {
        self.seen.load().states[endpoint as usize]
    }

    /// Whether an endpoint's answers about a symbol are the backend's for now.
    #[must_use]
    pub fn is_closed(&self, endpoint: Endpoint, symbol: &str) -> bool {
        let seen = self.seen.load();
        // Mostly there are none.
        !seen.standings.is_empty() && seen.standings.get(symbol).is_some_and(|standing| standing.closed[endpoint as usize])
    }

    /// Whether it is not known yet in which order the backend gives orders of one moment.
    #[must_use]
    pub fn lacks_ties(&self) -> bool {
        self.seen.load().lacks_ties
    }

    /// How a symbol stands.
    #[must_use]
    pub fn quarantine(&self, symbol: &str) -> Quarantine {
        let (seen, now) = (self.seen.load(), self.begun.elapsed());
        let Some(standing) = seen.standings.get(symbol) else { return Quarantine::Open };
        let (since, why) = (now.saturating_sub(standing.since), Arc::clone(&standing.why));
        match standing.is_proven {
            true => Quarantine::Quarantined { since, why, again_in: standing.again_at.saturating_sub(now) },
            false => Quarantine::Suspect { since, why },
        }
    }

    /// The symbols that are not open, and how they stand.
    #[must_use]
    pub fn quarantines(&self) -> Vec<(Arc<str>, Quarantine)> {
        let seen = self.seen.load();
        seen.standings.keys().map(|symbol| (Arc::clone(symbol), self.quarantine(symbol))).collect()
    }

    /// How many symbols are not open.
    #[must_use]
    pub fn closed(&self) -> usize {
        self.seen.load().standings.len()
    }

    /// Whether an answer of an endpoint about a symbol is to be checked, somebody having asked for it. Besides, some are checked by chance.
    #[must_use]
    pub fn is_due(&self, endpoint: Endpoint, symbol: &str) -> bool {
        {
            let seen = self.seen.load();
            if seen.states[endpoint as usize] == State::On && seen.standings.is_empty() {
                return false;
            }
        }
        let now = self.begun.elapsed();
        self.trust.lock().unwrap_or_else(PoisonError::into_inner).is_due(now, endpoint, symbol)
    }

    /// A check differs: until it is compared again, the symbol is suspect.
    pub fn suspect(&self, symbol: &Arc<str>, scope: Scope, why: &str) {
        self.change(symbol, why, |trust, now| trust.suspect(now, symbol, scope, why));
    }

    /// A check has ended; `why` says what differed, if it did.
    pub fn conclude(&self, symbol: &Arc<str>, scope: Scope, verdict: Verdict, why: &str) {
        self.change(symbol, why, |trust, now| trust.conclude(now, symbol, scope, verdict));
    }

    /// The source contradicted itself about a symbol.
    pub fn doubt(&self, symbol: &Arc<str>, why: &str) {
        self.change(symbol, why, |trust, now| trust.doubt(now, symbol, why));
    }

    /// What the source says in two ways agreed.
    pub fn agree(&self, symbol: &str) {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner).agree(symbol);
    }

    fn change(&self, symbol: &str, why: &str, change: impl FnOnce(&mut Trust, Duration) -> Vec<Change>) {
        let mut trust = self.trust.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = change(&mut trust, self.begun.elapsed());
        self.seen.store(Arc::new(Seen::of(&trust)));
        drop(trust);
        changes.into_iter().for_each(|change| self.tell(symbol, why, &change));
    }

    fn tell(&self, symbol: &str, why: &str, change: &Change) {
        match *change {
            Change::Suspected => tracing::warn!(
                symbol,
                why,
                "the timeline's answer differs from the backend's; the symbol's orders are fetched anew and compared again, and the backend answers meanwhile"
            ),
            Change::Healed => {
                self.metrics.timeline_healed.inc();
                tracing::info!(symbol, "the symbol's orders were fetched anew and are the backend's: the timeline answers again");
            }
            Change::Quarantined { new: true, again_in } => tracing::warn!(
                symbol,
                why,
                ?again_in,
                "the symbol's orders differ although they were fetched anew; it is in quarantine: the backend answers, and they are checked again and again"
            ),
            Change::Quarantined { new: false, again_in } => {
                tracing::debug!(symbol, why, ?again_in, "the symbol in quarantine still differs")
            }
            Change::Released => {
                self.metrics.timeline_healed.inc();
                tracing::info!(symbol, "the symbol's quarantine is over: its answers were the backend's again several times in a row");
            }
            Change::Off(endpoint, differ, of) => tracing::warn!(
                endpoint = endpoint.name(),
                differ,
                of,
                "most symbols differ from the backend (or more than can be remembered); the backend answers this endpoint until they do not"
            ),
            Change::Back(endpoint) => {
                tracing::info!(endpoint = endpoint.name(), "most symbols are the backend's again; the timeline's endpoint begins anew");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Timeline as Settings;

    #[tokio::test(start_paused = true)]
    async fn operators_are_told_in_words() {
        let judge = Judge::new(Rules::of(&Settings::default(), false), Arc::new(Metrics::new().unwrap()));
        let symbol: Arc<str> = "BTC".into();
        assert!(!judge.is_due(Endpoint::Orders, "BTC") && judge.quarantine("BTC") == Quarantine::Open);
        judge.suspect(&symbol, Scope::One(Endpoint::Orders), "byte 7");
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(judge.quarantine("BTC").to_string(), "suspect for 3 s, its orders are being fetched anew: byte 7");
        judge.conclude(&symbol, Scope::One(Endpoint::Orders), Verdict::Different, "byte 7");
        let text = judge.quarantine("BTC").to_string();
        assert!(text.starts_with("in quarantine for 3 s, checked again in ") && text.ends_with(" s: byte 7"), "{text}");
        assert!(judge.is_closed(Endpoint::Orders, "BTC") && !judge.is_closed(Endpoint::Orders, "ETH"));
        assert!(judge.quarantines().len() == 1 && judge.closed() == 1 && judge.state(Endpoint::Orders) == State::On);
    }
}
