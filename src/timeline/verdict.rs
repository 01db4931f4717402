//! What checks find and what follows: the words in which [`trust`](super::trust) is asked and answers.

use std::sync::Arc;
use std::time::Duration;

use super::endpoint::Endpoint;
use crate::config::Timeline as Settings;

/// So often must orders of one moment have come in the backend's own order before lists are served in which they show.
const TIES: u32 = 3;

/// How an endpoint stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum State {
    /// It answers.
    On,
    /// Its answers are compared with the backend's, which are served.
    Probation {
        /// So many in a row were equal.
        equal: u32,
        /// So many are asked for.
        of: u32,
    },
    /// The answers about most symbols differed: the backend's are served.
    Off,
}

/// What a check concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Answers of one endpoint.
    One(Endpoint),
    /// Orders themselves.
    All,
}

impl Scope {
    /// Which it concerns.
    pub fn endpoints(self) -> impl Iterator<Item = Endpoint> {
        Endpoint::ALL.into_iter().filter(move |endpoint| self == Self::All || self == Self::One(*endpoint))
    }
}

/// What a check found in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Both say the same; `ties`: orders of one moment show in it. Perhaps they do so only once the orders were fetched anew.
    Equal {
        /// Orders of one moment show.
        ties: bool,
    },
    /// They differ although the orders were fetched anew.
    Different,
    /// One of them did not answer.
    Unanswered,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The symbol is suspect.
    Suspected,
    /// The symbol was suspect, and is open.
    Healed,
    /// It is in quarantine, or is so still; it is checked again after this.
    Quarantined {
        /// It was not before.
        new: bool,
        /// The pause.
        again_in: Duration,
    },
    /// Its quarantine is over.
    Released,
    /// The endpoint is off, since so many of so many symbols differ.
    Off(Endpoint, usize, usize),
    /// The endpoint is off no more.
    Back(Endpoint),
}

/// How often is enough, and how long things take.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Equal answers in a row before an endpoint is on.
    pub probation: u32,
    /// Equal lists with orders of one moment before such are served.
    pub ties: u32,
    /// The first pause, and the longest.
    pub pauses: (Duration, Duration),
    /// Checks count for so long.
    pub of_late: Duration,
    /// Symbols that are remembered because they are not open.
    pub most: usize,
}

impl Rules {
    /// Those of the settings, for a source whose word is checked (`foreign`), or for the API's own.
    #[must_use]
    pub fn of(settings: &Settings, foreign: bool) -> Self {
        let refresh = settings.refresh;
        let (probation, ties) = if foreign { (settings.probation, TIES) } else { (0, 0) };
        Self { probation, ties, pauses: (refresh * 4, refresh * 120), of_late: refresh * 720, most: 1024 }
    }
}

/// How a symbol that is not open stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Whether it differed although it was fetched anew: it is in quarantine, and else suspect.
    pub is_proven: bool,
    /// Since when.
    pub since: Duration,
    /// What differed.
    pub why: Arc<str>,
    /// It is not checked again before this.
    pub again_at: Duration,
    /// Which endpoints do not answer about it.
    pub closed: [bool; Endpoint::ALL.len()],
}
