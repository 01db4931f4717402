//! Many symbols, a source that lies, is late and is silent, and whoever asks: the invariants of the page hold after each step.

use super::*;
use crate::config::Timeline as Settings;

const REFRESH: Duration = Duration::from_secs(5);
const NAMES: [&str; 8] = ["A", "B", "C", "D", "E", "F", "G", "H"];
const BOTH: [Endpoint; 2] = Endpoint::ALL;

fn rules(probation: u32) -> Rules {
    let settings = Settings { refresh: REFRESH, probation, ..Settings::default() };
    Rules { most: 6, ..Rules::of(&settings, probation > 0) }
}

/// One endpoint's answers about a symbol are served.
fn serves(trust: &Trust, endpoint: Endpoint, symbol: &str) -> bool {
    let closed = trust.standings().any(|(name, standing)| **name == *symbol && standing.closed[endpoint as usize]);
    trust.state(endpoint) == State::On && !closed
}

/// The world beside the machine.
struct World {
    trust: Trust,
    random: fastrand::Rng,
    now: Duration,
    /// The source lies about it, by endpoint.
    lies: [[bool; 2]; NAMES.len()],
    /// What is known here of it is wrong: a late order.
    wrong: [bool; NAMES.len()],
    is_silent: bool,
    /// How many of the symbols ever go wrong.
    faulty: usize,
    /// How the endpoints stood.
    states: [State; 2],
    /// By endpoint: a check found it different, and none found it equal since.
    found: [[bool; 2]; NAMES.len()],
}

impl World {
    fn new(seed: u64, probation: u32, faulty: usize) -> Self {
        let (lies, wrong, found) = Default::default();
        let trust = Trust::new(rules(probation), seed);
        let states = BOTH.map(|endpoint| trust.state(endpoint));
        Self { trust, random: fastrand::Rng::with_seed(seed), now: Duration::ZERO, lies, wrong, is_silent: false, faulty, states, found }
    }

    /// Somebody asks; now and then that is checked.
    fn ask(&mut self, symbol: usize) {
        let endpoint = BOTH[self.random.usize(..2)];
        let name: Arc<str> = NAMES[symbol].into();
        let scope = if self.random.u8(..) < 40 { Scope::All } else { Scope::One(endpoint) };
        let is_due = self.trust.is_due(self.now, endpoint, &name);
        if !is_due && self.random.u8(..) > 25 {
            return;
        }
        let looked = |world: &Self| scope.endpoints().any(|endpoint| world.lies[symbol][endpoint as usize]);
        if self.is_silent {
            self.trust.conclude(self.now, &name, scope, Verdict::Unanswered);
            return;
        }
        if self.wrong[symbol] || looked(self) {
            self.trust.suspect(self.now, &name, scope, "a difference");
            scope.endpoints().for_each(|endpoint| self.found[symbol][endpoint as usize] = true);
            // One for which there is no room is served again once there is, as after a restart: it was fetched anew, at least.
            let is_remembered = self.trust.cases.contains_key(&name);
            self.found[symbol] = self.found[symbol].map(|found| found && is_remembered);
            self.hold();
            // It is fetched anew.
            self.now += Duration::from_millis(self.random.u64(..20_000));
            self.wrong[symbol] = false;
            if self.random.u8(..) < 30 {
                self.trust.conclude(self.now, &name, scope, Verdict::Unanswered);
                return;
            }
        }
        let verdict = if looked(self) { Verdict::Different } else { Verdict::Equal { ties: true } };
        self.trust.conclude(self.now, &name, scope, verdict);
        let differs = verdict == Verdict::Different && self.trust.cases.contains_key(&name);
        scope.endpoints().for_each(|endpoint| self.found[symbol][endpoint as usize] = differs);
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.random.u64(..60_000));
        let (symbol, any) = (self.random.usize(..self.faulty), self.random.usize(..NAMES.len()));
        match self.random.u8(..100) {
            0..4 => self.wrong[symbol] = true,
            4..8 => self.lies[symbol][self.random.usize(..2)] ^= true,
            8..10 => self.is_silent ^= true,
            10..13 => drop(self.trust.doubt(self.now, &NAMES[symbol].into(), "a contradiction")),
            13..15 => self.trust.agree(NAMES[symbol]),
            _ => self.ask(any),
        }
        self.hold();
    }

    /// The invariants.
    fn hold(&mut self) {
        for (symbol, name) in NAMES.into_iter().enumerate() {
            for endpoint in BOTH {
                assert!(
                    !self.found[symbol][endpoint as usize] || !serves(&self.trust, endpoint, name),
                    "{name} is served though it differs"
                );
            }
        }
        assert!(self.trust.cases.len() <= self.trust.rules.most && self.trust.doubts.len() <= self.trust.rules.most);
        for (was, endpoint) in self.states.into_iter().zip(BOTH) {
            let state = self.trust.state(endpoint);
            assert!(was != State::On || !matches!(state, State::Probation { .. }), "on probation without having been off");
            assert!(self.faulty >= FLOOR || state != State::Off, "off because of {} symbols", self.faulty);
        }
        self.states = BOTH.map(|endpoint| self.trust.state(endpoint));
        let longest = self.trust.rules.pauses.1.mul_f64(1.25);
        assert!(self.trust.standings().all(|(_, standing)| standing.again_at <= self.now + longest), "a pause without bound");
    }

    /// The source is right and answers from now on, and everybody asks.
    fn recover(&mut self) {
        (self.lies, self.is_silent) = ([[false; 2]; NAMES.len()], false);
        for _ in 0..20_000 {
            self.now += Duration::from_secs(1);
            let symbol = self.random.usize(..NAMES.len());
            self.ask(symbol);
            self.hold();
        }
        for (name, endpoint) in NAMES.into_iter().flat_map(|name| BOTH.map(|endpoint| (name, endpoint))) {
            assert!(serves(&self.trust, endpoint, name), "{name} is not served again: {:?}", self.trust);
        }
        assert!(!self.trust.lacks_ties());
    }
}

#[test]
fn whatever_happens_what_differs_is_not_served_and_all_is_well_again_after() {
    let begin: u64 = std::env::var("SLUICE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for seed in begin..begin + 200 {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed, if seed % 2 == 0 { 0 } else { 5 }, if seed % 3 == 0 { FLOOR - 1 } else { NAMES.len() });
            (0..400).for_each(|_| world.step());
            world.recover();
        });
        assert!(run.is_ok(), "SLUICE_SEED={seed} repeats it");
    }
}

fn name(number: usize) -> Arc<str> {
    format!("S{number}").into()
}

const EQUAL: Verdict = Verdict::Equal { ties: false };

#[test]
fn a_late_order_heals_and_a_lie_is_in_quarantine_until_it_ends() {
    let (mut trust, scope, symbol) = (Trust::new(rules(0), 1), Scope::One(Endpoint::Orders), name(1));
    let mut now = Duration::from_secs(1);
    assert_eq!(trust.suspect(now, &symbol, scope, "late"), [Change::Suspected]);
    assert!(BOTH.into_iter().all(|endpoint| !serves(&trust, endpoint, &symbol)), "orders may be wrong for both");
    assert_eq!(trust.conclude(now, &symbol, scope, EQUAL), [Change::Healed]);
    trust.suspect(now, &symbol, scope, "lie");
    assert_eq!(trust.conclude(now, &symbol, Scope::One(Endpoint::Liquidations), EQUAL), [], "its lists differed");
    assert!(serves(&trust, Endpoint::Liquidations, &symbol) && !serves(&trust, Endpoint::Orders, &symbol));
    let mut last = Duration::ZERO;
    for failures in 0..12 {
        let changes = trust.conclude(now, &symbol, scope, Verdict::Different);
        let [Change::Quarantined { new, again_in }] = changes[..] else { panic!("{changes:?}") };
        assert!(new == (failures == 0) && again_in >= REFRESH * 3 && again_in <= REFRESH * 150);
        assert!(!trust.is_due(now, Endpoint::Orders, &symbol));
        now += again_in;
        assert!(trust.is_due(now, Endpoint::Orders, &symbol));
        last = again_in;
    }
    assert!(last > REFRESH * 89, "{last:?}");
    for _ in 1..NEEDED {
        assert_eq!(trust.conclude(now, &symbol, scope, EQUAL), []);
        now += REFRESH * 5;
        assert!(trust.is_due(now, Endpoint::Orders, &symbol), "soon again");
    }
    assert_eq!(trust.conclude(now, &symbol, scope, EQUAL), [Change::Released]);
    assert!(serves(&trust, Endpoint::Orders, &symbol));
}

#[test]
fn an_endpoint_is_off_when_most_symbols_differ_and_on_probation_again_once_they_do_not() {
    let mut trust = Trust::new(rules(2), 1);
    let (now, scope) = (Duration::from_secs(1), Scope::One(Endpoint::Liquidations));
    let check = |trust: &mut Trust, number, verdict, now| trust.conclude(now, &name(number), scope, verdict);
    let state = |trust: &Trust| trust.state(Endpoint::Liquidations);
    for number in 1..=2 {
        assert_eq!(state(&trust), State::Probation { equal: number - 1, of: 2 });
        check(&mut trust, 9, EQUAL, now);
    }
    for number in 1..=2 {
        check(&mut trust, number, Verdict::Different, now);
        assert_ne!(state(&trust), State::Off);
    }
    check(&mut trust, 8, EQUAL, now);
    check(&mut trust, 3, Verdict::Different, now);
    assert_eq!((state(&trust), trust.state(Endpoint::Orders)), (State::Off, State::Probation { equal: 0, of: 2 }), "three of five");
    assert!(!trust.is_due(now, Endpoint::Liquidations, "S7") && trust.is_due(now + REFRESH * 5, Endpoint::Liquidations, "S7"));
    assert!(!trust.is_due(now + REFRESH * 5, Endpoint::Liquidations, "S6"), "one after the other");
    assert_eq!(check(&mut trust, 7, EQUAL, now), [Change::Back(Endpoint::Liquidations)]);
    assert_eq!(state(&trust), State::Probation { equal: 0, of: 2 });
    // What differed long ago counts no more.
    check(&mut trust, 4, Verdict::Different, now);
    assert_eq!(state(&trust), State::Off);
    check(&mut trust, 6, EQUAL, now + REFRESH * 721);
    assert_eq!(state(&trust), State::Probation { equal: 0, of: 2 });
}

#[test]
fn two_doubts_in_a_row_and_too_many_symbols_to_remember() {
    let (mut trust, now) = (Trust::new(rules(0), 1), Duration::from_secs(1));
    assert_eq!(trust.doubt(now, &name(1), "cut"), []);
    trust.agree(&name(1));
    assert_eq!(trust.doubt(now, &name(1), "cut"), []);
    assert!(matches!(trust.doubt(now, &name(1), "cut")[..], [Change::Quarantined { new: true, .. }]));
    for number in 2..6 {
        trust.suspect(now, &name(number), Scope::All, "late");
        assert_eq!(trust.state(Endpoint::Orders), State::On);
    }
    trust.suspect(now, &name(6), Scope::All, "late");
    assert_eq!((trust.state(Endpoint::Orders), trust.cases.len()), (State::Off, 6), "the next one could not be remembered");
    let later = now + FORGOTTEN;
    trust.suspect(later, &name(7), Scope::All, "late");
    assert_eq!((trust.state(Endpoint::Orders), trust.cases.len()), (State::On, 1), "those that nobody asked about are forgotten");
}
