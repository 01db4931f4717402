#![doc = include_str!("schedule.md")]

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use foldhash::quality::RandomState;

/// The longest pause after failures of one symbol.
const LONGEST: Duration = Duration::from_secs(60);
/// A question that takes longer is given up.
pub const QUESTION: Duration = Duration::from_secs(120);
/// A source hangs that has answered nothing for so long while a question was under way.
const HANGS: Duration = Duration::from_secs(15);
/// What a probe is given at first.
const PROBE: Duration = Duration::from_secs(10);
/// This many failures in a row spare the source.
const FEW: u32 = 3;
/// How long at first, and at most.
const SPARED: Duration = Duration::from_secs(1);
const SPARED_LONGEST: Duration = Duration::from_secs(10);

/// The number of a symbol. None is used twice.
pub type Number = u64;

/// How a question ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With orders, or the certainty that there are none.
    Answered,
    /// The source did not answer.
    Failed,
    /// It answered, and that is nothing to compute with.
    Unfit,
    /// It was not asked: the symbol was evicted just now.
    Unasked,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// A question about this symbol begins now. It must be [ended](Schedule::ended).
    Ask(Number),
    /// Nothing before this moment, unless something else comes.
    At(Duration),
    /// Nothing, unless something comes.
    Wait,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// It is not asked for before this moment.
    Resting(Duration),
    Due(Duration),
    Asking(Duration),
}

#[derive(Clone, Copy, Debug)]
struct Head {
    state: State,
    /// Whether somebody has wanted it since its last question began.
    wanted: bool,
    failures: u32,
    after: After,
}

/// What a symbol's pause comes after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// No question, or one that was answered.
    Answer,
    Failure,
    /// Failures, of which it was brought forward once: not again before it is answered.
    Hurry,
    Unfit,
}

/// When which symbol is asked for. Moments are durations since some fixed one.
#[derive(Debug)]
pub struct Schedule {
    refresh: Duration,
    /// Questions at one time.
    most: usize,
    heads: HashMap<Number, Head, RandomState>,
    /// Those that are due, by when.
    due: BTreeSet<(Duration, Number)>,
    /// Those that are asked for, by since when. Also of those that were forgotten meanwhile.
    asking: BTreeSet<(Duration, Number)>,
    /// When the source answered the last time.
    answered: Duration,
    /// Failures in a row, of any symbol.
    failures: u32,
    spared_until: Duration,
}

impl Schedule {
    /// Nothing is known. A symbol is asked for every `refresh`, and no more than `most` at one time.
    #[must_use]
    pub fn new(refresh: Duration, most: usize) -> Self {
        let (heads, due, asking) = (HashMap::default(), BTreeSet::new(), BTreeSet::new());
        Self { refresh, most, heads, due, asking, answered: Duration::ZERO, failures: 0, spared_until: Duration::ZERO }
    }

    /// Somebody needs the newest part of a symbol. Whether that is news: it was resting.
    pub fn want(&mut self, now: Duration, symbol: Number) -> bool {
        let head = self.heads.entry(symbol).or_insert(Head { state: State::Resting(now), wanted: true, failures: 0, after: After::Answer });
        head.wanted = true;
        let State::Resting(not_before) = head.state else { return false };
        let at = not_before.max(now);
        head.state = State::Due(at);
        self.due.insert((at, symbol));
        true
    }

    /// What is to be done now.
    pub fn next(&mut self, now: Duration) -> Next {
        loop {
            let Some(&(at, symbol)) = self.due.first() else { return Next::Wait };
            let Some(head) = self.heads.get_mut(&symbol) else {
                self.due.remove(&(at, symbol));
                continue;
            };
            if at > now {
                return Next::At(at);
            }
            if !head.wanted {
                head.state = State::Resting(at);
                self.due.remove(&(at, symbol));
                continue;
            }
            if self.asking.len() >= self.most {
                return Next::Wait;
            }
            if let Some(later) = self.spared_until(now) {
                return Next::At(later);
            }
            self.due.remove(&(at, symbol));
            if let Some(head) = self.heads.get_mut(&symbol) {
                (head.state, head.wanted) = (State::Asking(now), false);
            }
            self.asking.insert((now, symbol));
            return Next::Ask(symbol);
        }
    }

    /// Until when no question begins, if the source fails or hangs: then one at a time tries, for as long as that does not hang too.
    fn spared_until(&self, now: Duration) -> Option<Duration> {
        if !self.is_failing() && !self.is_hanging(now) {
            return None;
        }
        let after_probe = self.asking.last().map(|(began, _)| *began + HANGS);
        let failing = self.is_failing().then_some(self.spared_until);
        after_probe.max(failing).filter(|until| *until > now)
    }

    /// Whether the source fails: several questions in a row did.
    #[must_use]
    pub const fn is_failing(&self) -> bool {
        self.failures >= FEW
    }

    /// Whether a question has been under way for long, and nothing was answered since it began.
    fn is_hanging(&self, now: Duration) -> bool {
        self.asking.range((self.answered, 0)..).next().is_some_and(|(began, _)| now.saturating_sub(*began) >= HANGS)
    }

    /// How long a question that begins now may take. One that probes a source that fails is given up sooner at first, so that the next one is
    /// asked soon once it answers again.
    #[must_use]
    pub fn patience(&self) -> Duration {
        match self.failures.checked_sub(FEW) {
            Some(more) => doubled(PROBE, more).min(QUESTION),
            None => QUESTION,
        }
    }

    /// A question has ended.
    pub fn ended(&mut self, now: Duration, symbol: Number, ended: Ended) {
        let was_sparing = self.is_sparing(now);
        if let Some(at) = self.asking.iter().find(|(_, asked)| *asked == symbol).copied() {
            self.asking.remove(&at);
        }
        match ended {
            // What is nothing to compute with is an answer too.
            Ended::Answered | Ended::Unfit => (self.failures, self.answered) = (0, now),
            Ended::Unasked => {}
            Ended::Failed => {
                self.failures = self.failures.saturating_add(1);
                self.spared_until = now + doubled(SPARED, self.failures.saturating_sub(FEW)).min(SPARED_LONGEST);
            }
        }
        if was_sparing && matches!(ended, Ended::Answered | Ended::Unfit) {
            self.ask_again_soon(now);
        }
        let Some(head) = self.heads.get_mut(&symbol) else { return };
        let State::Asking(began) = head.state else { return };
        let took = now.saturating_sub(began);
        head.failures = if ended == Ended::Answered { 0 } else { head.failures.saturating_add(1) };
        head.after = match (ended, head.after) {
            (Ended::Answered, _) => After::Answer,
            (Ended::Unfit, _) => After::Unfit,
            (Ended::Failed, After::Hurry) => After::Hurry,
            (Ended::Failed, _) => After::Failure,
            (Ended::Unasked, after) => after,
        };
        let pause = match ended {
            Ended::Answered | Ended::Unasked => took,
            // One that hung is not left alone for as long as it hung: the source may be back.
            Ended::Failed => doubled(self.refresh, head.failures - 1).max(took).min(LONGEST),
            Ended::Unfit => took.max(LONGEST),
        };
        let at = (began + self.refresh).max(now + pause);
        head.state = State::Due(at);
        self.due.insert((at, symbol));
    }

    /// The source answers again: symbols that pause because it did not are due after `refresh` at most. Each is brought forward once until it is
    /// answered, so that some that always fail do not make the others wait again and again.
    fn ask_again_soon(&mut self, now: Duration) {
        let latest = now + self.refresh;
        for (&symbol, head) in &mut self.heads {
            if head.after != After::Failure {
                continue;
            }
            head.after = After::Hurry;
            match &mut head.state {
                State::Resting(at) => *at = latest.min(*at),
                State::Due(at) if *at > latest => {
                    self.due.remove(&(*at, symbol));
                    self.due.insert((latest, symbol));
                    *at = latest;
                }
                State::Due(_) | State::Asking(_) => {}
            }
        }
    }

    /// A symbol is evicted.
    pub fn forget(&mut self, symbol: Number) {
        if let Some(Head { state: State::Due(at), .. }) = self.heads.remove(&symbol) {
            self.due.remove(&(at, symbol));
        }
    }

    /// Whether the source fails or hangs, and is asked by one question at a time.
    #[must_use]
    pub fn is_sparing(&self, now: Duration) -> bool {
        self.is_failing() || self.is_hanging(now)
    }

    /// How many questions are under way.
    #[must_use]
    pub fn asking(&self) -> usize {
        self.asking.len()
    }

    /// For how long the one that has waited longest has been due.
    #[must_use]
    pub fn behind(&self, now: Duration) -> Duration {
        let wanted = |&&(at, symbol): &&(Duration, Number)| at <= now && self.heads.get(&symbol).is_some_and(|head| head.wanted);
        self.due.iter().take_while(|(at, _)| *at <= now).find(wanted).map_or(Duration::ZERO, |&(at, _)| now - at)
    }

    /// How a symbol stands: whether somebody wants it, when it is due if it is, and its failures in a row.
    #[must_use]
    pub fn standing(&self, symbol: Number) -> (bool, Option<Duration>, u32) {
        self.heads.get(&symbol).map_or((false, None, 0), |head| (head.wanted, self.due(symbol), head.failures))
    }

    /// When a symbol is asked for next, if it is to be; in the past: it waits for its turn.
    #[must_use]
    pub fn due(&self, symbol: Number) -> Option<Duration> {
        match self.heads.get(&symbol)?.state {
            State::Due(at) => Some(at),
            State::Resting(_) | State::Asking(_) => None,
        }
    }
}

/// Doubled so many times.
fn doubled(span: Duration, times: u32) -> Duration {
    span.saturating_mul(1 << times.min(10))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const REFRESH: Duration = Duration::from_secs(5);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_symbol_is_asked_for_once_a_refresh_while_somebody_wants_it() {
        let mut schedule = Schedule::new(REFRESH, 2);
        assert_eq!(schedule.next(s(0)), Next::Wait);
        assert!(schedule.want(s(0), 1) && !schedule.want(s(0), 1));
        assert_eq!((schedule.next(s(0)), schedule.next(s(0))), (Next::Ask(1), Next::Wait));
        assert!(!schedule.want(s(0), 1), "it is being asked for");
        schedule.ended(s(1), 1, Ended::Answered);
        assert_eq!((schedule.next(s(1)), schedule.next(s(5))), (Next::At(s(5)), Next::Ask(1)));
        schedule.ended(s(9), 1, Ended::Answered);
        // It took four seconds, and nobody has wanted it since.
        assert_eq!((schedule.next(s(9)), schedule.next(s(13))), (Next::At(s(13)), Next::Wait));
        assert!(schedule.want(s(20), 1));
        assert_eq!(schedule.next(s(20)), Next::Ask(1));
    }

    #[test]
    fn a_symbol_that_fails_pauses_and_a_source_that_fails_is_spared() {
        let mut schedule = Schedule::new(REFRESH, 8);
        let fail = |schedule: &mut Schedule, now: u64, symbol, ended| {
            schedule.want(s(now), symbol);
            assert_eq!(schedule.next(s(now)), Next::Ask(symbol));
            schedule.want(s(now), symbol);
            schedule.ended(s(now), symbol, ended);
            schedule.due(symbol).unwrap()
        };
        assert_eq!(fail(&mut schedule, 0, 1, Ended::Unfit), s(60));
        assert_eq!(fail(&mut schedule, 0, 2, Ended::Failed), s(5));
        assert_eq!(fail(&mut schedule, 5, 2, Ended::Failed), s(15));
        assert_eq!(fail(&mut schedule, 15, 2, Ended::Failed), s(35));
        // The third in a row: others wait too, one at a time.
        for symbol in 3..6 {
            schedule.want(s(15), symbol);
        }
        assert_eq!((schedule.next(s(15)), schedule.next(s(16)), schedule.next(s(16))), (Next::At(s(16)), Next::Ask(3), Next::At(s(31))));
        schedule.ended(s(16), 3, Ended::Failed);
        assert_eq!((schedule.next(s(16)), schedule.next(s(18))), (Next::At(s(18)), Next::Ask(4)));
        schedule.ended(s(18), 4, Ended::Answered);
        assert_eq!(schedule.next(s(18)), Next::Ask(5));
    }

    #[test]
    fn a_source_that_hangs_is_asked_by_one_question_at_a_time() {
        let mut schedule = Schedule::new(REFRESH, 4);
        schedule.want(s(0), 1);
        assert_eq!((schedule.next(s(0)), schedule.patience()), (Next::Ask(1), QUESTION));
        (2..9).for_each(|symbol| assert!(schedule.want(s(20), symbol)));
        assert!(schedule.is_sparing(s(20)));
        // One probes, until it hangs too.
        assert_eq!((schedule.next(s(20)), schedule.next(s(21)), schedule.next(s(35))), (Next::Ask(2), Next::At(s(35)), Next::Ask(3)));
        assert_eq!((schedule.next(s(36)), schedule.next(s(50)), schedule.next(s(90))), (Next::At(s(50)), Next::Ask(4), Next::Wait));
        // They are given up: now it fails, and a probe is given less time.
        for (at, symbol) in [(120, 1), (140, 2), (155, 3)] {
            schedule.ended(s(at), symbol, Ended::Failed);
        }
        assert_eq!((schedule.next(s(155)), schedule.next(s(156)), schedule.patience()), (Next::At(s(156)), Next::Ask(5), PROBE));
        schedule.ended(s(166), 5, Ended::Failed);
        assert_eq!((schedule.next(s(166)), schedule.patience()), (Next::At(s(168)), PROBE * 2));
        // An answer ends that, though an old question hangs on.
        assert_eq!(schedule.next(s(168)), Next::Ask(6));
        schedule.ended(s(169), 6, Ended::Answered);
        assert_eq!((schedule.next(s(169)), schedule.next(s(169)), schedule.patience()), (Next::Ask(7), Next::Ask(8), QUESTION));
    }

    /// How long a symbol rests at least after a question that took so long.
    fn rest(took: Duration, how: Ended) -> Duration {
        match how {
            Ended::Answered | Ended::Unasked => took,
            Ended::Failed => took.max(REFRESH).min(LONGEST),
            Ended::Unfit => took.max(LONGEST),
        }
    }

    #[test]
    fn a_source_that_is_back_is_asked_about_all_that_failed_meanwhile() {
        let mut schedule = Schedule::new(REFRESH, 8);
        (1..5).for_each(|symbol| assert!(schedule.want(s(0), symbol)));
        (1..5).for_each(|symbol| assert_eq!(schedule.next(s(0)), Next::Ask(symbol)));
        (1..5).for_each(|symbol| assert!(!schedule.want(s(0), symbol)));
        // Three hang until they are given up; the fourth is answered then.
        (1..4).for_each(|symbol| schedule.ended(s(50), symbol, Ended::Failed));
        assert_eq!((1..4).map(|symbol| schedule.due(symbol).unwrap()).collect::<Vec<_>>(), [s(100); 3]);
        schedule.ended(s(60), 4, Ended::Answered);
        assert_eq!((1..4).map(|symbol| schedule.due(symbol).unwrap()).collect::<Vec<_>>(), [s(65); 3]);
        // Those that fail always are not brought forward again and again.
        (1..4).for_each(|symbol| assert_eq!(schedule.next(s(65)), Next::Ask(symbol)));
        (1..4).for_each(|symbol| assert!(!schedule.want(s(65), symbol)));
        (1..4).for_each(|symbol| schedule.ended(s(65), symbol, Ended::Failed));
        assert_eq!((schedule.is_failing(), schedule.due(1)), (true, Some(s(75))));
        assert!(schedule.want(s(66), 5) && schedule.next(s(66)) == Next::Ask(5));
        schedule.ended(s(66), 5, Ended::Answered);
        assert_eq!(schedule.due(1), Some(s(75)));
    }

    /// Drives a schedule through a random run, and checks the page's invariants after each step.
    fn run(seed: u64) -> Result<(), String> {
        let mut random = fastrand::Rng::with_seed(seed);
        let (most, symbols) = (random.usize(1..6), random.u64(1..30));
        // Of the source: when it answered last, and its failures in a row.
        let (mut answered, mut failures) = (Duration::ZERO, 0);
        // When it answered again after it had failed or hung.
        let mut back = None;
        let mut schedule = Schedule::new(REFRESH, most);
        let mut now = Duration::ZERO;
        // Of each symbol: when its question began; or when its last one began and ended, and how.
        let mut asking: BTreeMap<Number, Duration> = BTreeMap::new();
        let mut last: BTreeMap<Number, (Duration, Duration, Ended)> = BTreeMap::new();
        let mut wanted: BTreeSet<Number> = BTreeSet::new();
        for _ in 0..400 {
            match random.u32(..10) {
                0..4 => {
                    let symbol = random.u64(..symbols);
                    schedule.want(now, symbol);
                    wanted.insert(symbol);
                }
                // Now and then for so long that what is asked hangs.
                4..6 => {
                    let most = if random.u8(..16) == 0 { 40_000 } else { 4000 };
                    now += Duration::from_millis(random.u64(..most));
                }
                6..8 => {
                    let Some((&symbol, &began)) = asking.iter().nth(random.usize(..asking.len().max(1))) else { continue };
                    let ended = [Ended::Answered, Ended::Answered, Ended::Failed, Ended::Unfit][random.usize(..4)];
                    let was_sparing = failures >= FEW || asking.values().any(|&began| now - began >= HANGS && answered <= began);
                    if was_sparing && matches!(ended, Ended::Answered | Ended::Unfit) {
                        back = Some(now);
                    }
                    asking.remove(&symbol);
                    schedule.ended(now, symbol, ended);
                    last.insert(symbol, (began, now, ended));
                    match ended {
                        Ended::Failed => failures += 1,
                        Ended::Answered | Ended::Unfit => (answered, failures) = (now, 0),
                        Ended::Unasked => {}
                    }
                }
                8 => {
                    let symbol = random.u64(..symbols);
                    if !asking.contains_key(&symbol) {
                        schedule.forget(symbol);
                        last.remove(&symbol);
                        wanted.remove(&symbol);
                    }
                }
                _ => {
                    let waits: Vec<_> =
                        (0..symbols).filter(|symbol| wanted.contains(symbol)).filter_map(|symbol| schedule.due(symbol)).collect();
                    let is_first = |due: Option<Duration>| due.is_none_or(|due| waits.iter().all(|other| due <= *other));
                    let before: BTreeMap<_, _> = (0..symbols).map(|symbol| (symbol, schedule.due(symbol))).collect();
                    let hangs = asking.values().any(|&began| now - began >= HANGS && answered <= began);
                    let probes = asking.values().any(|&began| now - began < HANGS);
                    let Next::Ask(symbol) = schedule.next(now) else { continue };
                    if (hangs || failures >= FEW) && probes {
                        return Err(format!("{symbol} was asked for beside the one that probes"));
                    }
                    if !wanted.remove(&symbol) {
                        return Err(format!("nobody wanted {symbol}"));
                    }
                    if !is_first(before[&symbol]) {
                        return Err(format!("{symbol} was asked for before one that was due earlier"));
                    }
                    if asking.insert(symbol, now).is_some() {
                        return Err(format!("two questions about {symbol}"));
                    }
                    if let Some(&(began, end, how)) = last.get(&symbol)
                        && let is_back = how == Ended::Failed
                        && back.is_some_and(|back| back >= end && now >= back + REFRESH)
                        && (now < began + REFRESH || (now < end + rest(end - began, how) && !is_back))
                    {
                        return Err(format!("{symbol} was asked for again at {now:?} after {began:?} to {end:?}"));
                    }
                }
            }
            if schedule.asking() != asking.len() || asking.len() > most {
                return Err(format!("{} of {} are under way, of {most}", schedule.asking(), asking.len()));
            }
        }
        for symbol in asking.into_keys() {
            schedule.ended(now, symbol, Ended::Answered);
        }
        (0..symbols).for_each(|symbol| schedule.forget(symbol));
        match schedule.asking() == 0 && schedule.heads.is_empty() && schedule.due.is_empty() {
            true => Ok(()),
            false => Err(format!("something is left: {schedule:?}")),
        }
    }

    #[test]
    fn no_seed_breaks_an_invariant() {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let seeds = number("SLUICE_SEED").map_or_else(|| 0..number("SLUICE_SEEDS").unwrap_or(300), |seed| seed..seed + 1);
        for seed in seeds {
            if let Err(what) = run(seed) {
                panic!("SLUICE_SEED={seed}: {what}");
            }
        }
    }
}
