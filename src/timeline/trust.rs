#![doc = include_str!("trust.md")]

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use foldhash::quality::RandomState;

use super::endpoint::Endpoint;
use super::verdict::{Change, Rules, Scope, Standing, State, Verdict};

/// So many equal checks in a row end a quarantine.
const NEEDED: u32 = 3;
/// So many doubts in a row begin one: a single one may be an order that came in between.
const DOUBTS: u32 = 2;
/// Fewer symbols than this turn no endpoint off.
const FLOOR: usize = 3;
/// So many symbols that were checked last are looked at.
const CHECKED: usize = 64;
/// A symbol in quarantine that nobody has asked about for so long is forgotten where there is no more room, as after a restart.
const FORGOTTEN: Duration = Duration::from_secs(86_400);

/// What is known against an endpoint's answers about a symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Charge {
    /// The other endpoint's differed: orders may be wrong.
    Near,
    /// Its own differed.
    Differed,
    /// Some differed although the orders were fetched anew.
    Proven,
}

/// What keeps an endpoint from answering about a symbol.
#[derive(Clone, Copy, Debug)]
struct Probe {
    charge: Charge,
    /// Equal checks in a row, and different ones.
    equal: u32,
    failures: u32,
    again_at: Duration,
}

/// A symbol that is not open.
#[derive(Debug)]
struct Case {
    since: Duration,
    why: Arc<str>,
    probes: [Option<Probe>; Endpoint::ALL.len()],
    /// When somebody asked about it last.
    asked: Duration,
}

#[derive(Debug, Default)]
struct End {
    equal: u32,
    ties: u32,
    /// Off, and when some symbol may be checked.
    off: Option<Duration>,
    /// The symbols that were checked last, oldest first: whether they differed, and when.
    checked: VecDeque<(Arc<str>, bool, Duration)>,
}

/// Whose answers are served. Moments are durations since some fixed one.
#[derive(Debug)]
pub struct Trust {
    rules: Rules,
    ends: [End; Endpoint::ALL.len()],
    cases: HashMap<Arc<str>, Case, RandomState>,
    /// Doubts in a row.
    doubts: HashMap<Arc<str>, u32, RandomState>,
    random: fastrand::Rng,
}

impl Trust {
    /// Of which nothing was checked yet. `seed` makes pauses differ from other instances'.
    #[must_use]
    pub fn new(rules: Rules, seed: u64) -> Self {
        let (ends, cases, doubts) = Default::default();
        Self { rules, ends, cases, doubts, random: fastrand::Rng::with_seed(seed) }
    }

    /// How an endpoint stands.
    #[must_use]
    pub fn state(&self, endpoint: Endpoint) -> State {
        let End { equal, off, .. } = self.ends[endpoint as usize];
        match off {
            Some(_) => State::Off,
            None if equal >= self.rules.probation => State::On,
            None => State::Probation { equal, of: self.rules.probation },
        }
    }

    /// Whether it is not known yet in which order the backend gives orders of one moment.
    #[must_use]
    pub fn lacks_ties(&self) -> bool {
        self.ends[Endpoint::Orders as usize].ties < self.rules.ties
    }

    /// The symbols that are not open.
    pub fn standings(&self) -> impl Iterator<Item = (&Arc<str>, Standing)> {
        self.cases.iter().map(|(symbol, case)| {
            let probes = || case.probes.iter().flatten();
            let again_at = probes().map(|probe| probe.again_at).min().unwrap_or_default();
            let is_proven = probes().any(|probe| probe.charge == Charge::Proven);
            let closed = case.probes.map(|probe| probe.is_some());
            (symbol, Standing { is_proven, since: case.since, why: Arc::clone(&case.why), again_at, closed })
        })
    }

    /// Whether an answer of an endpoint about a symbol is to be checked, somebody having asked for it. Besides, some are checked by chance.
    pub fn is_due(&mut self, now: Duration, endpoint: Endpoint, symbol: &str) -> bool {
        if let Some(case) = self.cases.get_mut(symbol) {
            case.asked = now;
            if let Some(probe) = case.probes[endpoint as usize] {
                return now >= probe.again_at;
            }
        }
        let pause = self.pause(1);
        let state = self.state(endpoint);
        match &mut self.ends[endpoint as usize].off {
            Some(again_at) if now >= *again_at => {
                *again_at = now + pause;
                true
            }
            Some(_) => false,
            None => matches!(state, State::Probation { .. }),
        }
    }

    /// A check differs, and what it touched is fetched anew: until that is compared, the symbol is suspect.
    pub fn suspect(&mut self, now: Duration, symbol: &Arc<str>, scope: Scope, why: &str) -> Vec<Change> {
        scope.endpoints().for_each(|endpoint| self.begin_anew(endpoint));
        let is_new = !self.cases.contains_key(symbol);
        self.open(now, symbol, why);
        if let Some(case) = self.cases.get_mut(symbol) {
            for endpoint in scope.endpoints() {
                // There is none where the endpoint was released before the other.
                let probe =
                    case.probes[endpoint as usize].get_or_insert(Probe { charge: Charge::Differed, equal: 0, failures: 0, again_at: now });
                probe.charge = probe.charge.max(Charge::Differed);
            }
        }
        let mut changes = Vec::from_iter(is_new.then_some(Change::Suspected));
        self.judge_endpoints(now, &mut changes);
        changes
    }

    /// A check has ended.
    pub fn conclude(&mut self, now: Duration, symbol: &Arc<str>, scope: Scope, verdict: Verdict) -> Vec<Change> {
        let mut changes = Vec::new();
        match verdict {
            Verdict::Equal { ties } => self.note_equal(now, symbol, scope, ties, &mut changes),
            Verdict::Different => self.note_different(now, symbol, scope, &mut changes),
            Verdict::Unanswered => {
                let again_at = now + self.pause(1);
                for endpoint in scope.endpoints() {
                    self.probe(symbol, endpoint, |probe| probe.again_at = probe.again_at.max(again_at));
                }
            }
        }
        self.judge_endpoints(now, &mut changes);
        changes
    }

    /// The source contradicted itself about a symbol.
    pub fn doubt(&mut self, now: Duration, symbol: &Arc<str>, why: &str) -> Vec<Change> {
        if self.doubts.len() >= self.rules.most {
            // Counting begins anew for all. It is only for what is doubted again and again.
            self.doubts.clear();
        }
        let doubts = self.doubts.entry(Arc::clone(symbol)).or_default();
        *doubts += 1;
        if *doubts < DOUBTS {
            return Vec::new();
        }
        self.doubts.remove(symbol);
        let mut changes = Vec::new();
        self.open(now, symbol, why);
        self.note_different(now, symbol, Scope::All, &mut changes);
        self.judge_endpoints(now, &mut changes);
        changes
    }

    /// What the source says in two ways agreed.
    pub fn agree(&mut self, symbol: &str) {
        self.doubts.remove(symbol);
    }
}

impl Trust {
    /// The pause after so many differences in a row.
    fn pause(&mut self, failures: u32) -> Duration {
        let (first, longest) = self.rules.pauses;
        let pause = first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(longest);
        pause.mul_f64(0.75 + self.random.f64() / 2.0)
    }

    /// Has an endpoint that is on probation count anew. One that is on stays so.
    fn begin_anew(&mut self, endpoint: Endpoint) {
        let (rules, end) = (self.rules, &mut self.ends[endpoint as usize]);
        if end.equal < rules.probation {
            end.equal = 0;
        }
        if end.ties < rules.ties {
            end.ties = 0;
        }
    }

    /// Has a case for a symbol, if there is room for one more.
    fn open(&mut self, now: Duration, symbol: &Arc<str>, why: &str) {
        if !self.cases.contains_key(symbol) {
            if self.cases.len() >= self.rules.most {
                self.cases.retain(|_, case| now < case.asked + FORGOTTEN);
            }
            if self.cases.len() >= self.rules.most {
                return;
            }
        }
        let probe = Probe { charge: Charge::Near, equal: 0, failures: 0, again_at: now };
        let fresh = || Case { since: now, why: why.into(), probes: Endpoint::ALL.map(|_| Some(probe)), asked: now };
        let case = self.cases.entry(Arc::clone(symbol)).or_insert_with(fresh);
        case.why = why.into();
    }

    fn probe(&mut self, symbol: &str, endpoint: Endpoint, change: impl FnOnce(&mut Probe)) {
        if let Some(probe) = self.cases.get_mut(symbol).and_then(|case| case.probes[endpoint as usize].as_mut()) {
            change(probe);
        }
    }

    fn note_equal(&mut self, now: Duration, symbol: &Arc<str>, scope: Scope, ties: bool, changes: &mut Vec<Change>) {
        let pause = self.pause(1);
        for endpoint in scope.endpoints() {
            let end = &mut self.ends[endpoint as usize];
            end.equal = end.equal.saturating_add(1);
            end.ties = end.ties.saturating_add(u32::from(ties));
            end.note_checked(symbol, false, now);
            self.probe(symbol, endpoint, |probe| {
                probe.equal += 1;
                probe.again_at = now + pause;
            });
        }
        let Some(case) = self.cases.get_mut(symbol) else { return };
        let was_proven = case.probes.iter().flatten().any(|probe| probe.charge == Charge::Proven);
        for probe in &mut case.probes {
            *probe = probe.filter(|probe| match probe.charge {
                // The orders were fetched anew for both.
                Charge::Near => false,
                Charge::Differed => probe.equal == 0,
                Charge::Proven => probe.equal < NEEDED,
            });
        }
        if case.probes.iter().all(Option::is_none) {
            self.cases.remove(symbol);
            changes.push(if was_proven { Change::Released } else { Change::Healed });
        }
    }

    fn note_different(&mut self, now: Duration, symbol: &Arc<str>, scope: Scope, changes: &mut Vec<Change>) {
        let mut again_at = now;
        let mut new = false;
        for endpoint in scope.endpoints() {
            self.begin_anew(endpoint);
            self.ends[endpoint as usize].note_checked(symbol, true, now);
            // It may have been released for this endpoint and not for the other.
            let known = self.cases.get(symbol).and_then(|case| case.probes[endpoint as usize]);
            new |= known.is_none_or(|probe| probe.charge != Charge::Proven);
            let failures = known.map_or(0, |probe| probe.failures).saturating_add(1);
            again_at = now + self.pause(failures);
            if let Some(case) = self.cases.get_mut(symbol) {
                case.probes[endpoint as usize] = Some(Probe { charge: Charge::Proven, equal: 0, failures, again_at });
            }
        }
        let Some(case) = self.cases.get_mut(symbol) else { return };
        case.probes.iter_mut().flatten().for_each(|probe| probe.charge = Charge::Proven);
        changes.push(Change::Quarantined { new, again_in: again_at - now });
    }

    fn judge_endpoints(&mut self, now: Duration, changes: &mut Vec<Change>) {
        let is_full = self.cases.len() >= self.rules.most;
        for endpoint in Endpoint::ALL {
            let pause = self.pause(1);
            let end = &mut self.ends[endpoint as usize];
            let of_late = || end.checked.iter().filter(|(.., at)| now < *at + self.rules.of_late);
            let (differ, of) = (of_late().filter(|(_, differs, _)| *differs).count(), of_late().count());
            let is_off = is_full || (differ >= FLOOR && differ * 2 > of);
            match (is_off, end.off) {
                (true, None) => {
                    end.off = Some(now + pause);
                    changes.push(Change::Off(endpoint, differ, of));
                }
                (false, Some(_)) => {
                    (end.off, end.equal) = (None, 0);
                    changes.push(Change::Back(endpoint));
                }
                _ => {}
            }
        }
    }
}

impl End {
    fn note_checked(&mut self, symbol: &Arc<str>, differs: bool, now: Duration) {
        self.checked.retain(|(known, ..)| known != symbol);
        self.checked.push_back((Arc::clone(symbol), differs, now));
        if self.checked.len() > CHECKED {
            self.checked.pop_front();
        }
    }
}

#[cfg(test)]
mod simulator;
