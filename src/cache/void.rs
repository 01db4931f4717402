//! What is void. Purges by an operator and invalidations by a client's change (RFC 9111 §4.4) are one idea: *what matches this
//! and was asked for until this moment is not to be used any more*.
//!
//! A void is noted in no time, and held against an entry when the entry is read. So it does not matter when the entry was written,
//! or by whom: what a fetch brings that began before the void is void when it is stored. Removing void entries from the stores
//! only makes room; that is done in the background, a little at a time (as Varnish does with its bans).
//!
//! Voids of other instances come through [`void_log`](super::void_log), and are voids of this one from then on.
//!
//! So many voids are remembered. An older one can be forgotten once it is worked off, because nothing is left that it concerns,
//! and whoever stores a response looks once more afterwards ([`Voids::check_written`]), where a void that was forgotten counts as
//! matching.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::entry::{Checked, Entry};
use super::key::MADE_INTO;
use crate::clock::Wall;

/// Purges that are remembered, and how many at most while they are not worked off.
const PURGES: (usize, usize) = (256, 4096);
/// The same for invalidated targets.
const TARGETS: (usize, usize) = (16_384, 262_144);

/// Which entries a purge concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// Those whose readable key matches a glob (`*`, `?`).
    Pattern(String),
    /// Those that carry a tag.
    Tag(String),
    /// Those for a target URI, in all variants and for every origin ([`Key::target`](super::key::Key::target)).
    Target(u64),
}

impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pattern(pattern) => write!(f, "pattern {pattern}"),
            Self::Tag(tag) => write!(f, "tag {tag}"),
            Self::Target(target) => write!(f, "target {target:016x}"),
        }
    }
}

impl Selection {
    /// Whether it concerns an entry.
    #[must_use]
    pub fn concerns(&self, entry: &Entry) -> bool {
        self.matches(&entry.readable, &entry.tags, entry.target)
    }

    /// Whether it concerns an entry with this readable key, these tags and this target.
    #[must_use]
    pub fn matches(&self, readable: &str, tags: &[String], target: u64) -> bool {
        match self {
            Self::Pattern(pattern) => {
                let made = || tags.iter().filter_map(|tag| tag.strip_prefix(MADE_INTO));
                glob(pattern.as_bytes(), readable.as_bytes()) || made().any(|keys| overlap(pattern.as_bytes(), keys.as_bytes()))
            }
            Self::Tag(tag) => tags.contains(tag),
            Self::Target(voided) => *voided == target,
        }
    }
}

/// The readable keys of entries with such tags begin so: whether a pattern concerns them, their names alone do not say.
pub const ORDERS: &str = "timeline:";

/// Whether some text matches two patterns of `*` and `?` both.
#[must_use]
pub fn overlap(one: &[u8], two: &[u8]) -> bool {
    // Row by row from the end: whether what is left of `one` and of `two` can be the same.
    let mut below = vec![false; two.len() + 1];
    for at in (0..=one.len()).rev() {
        let mut row = vec![false; two.len() + 1];
        for other in (0..=two.len()).rev() {
            row[other] = match (one.get(at), two.get(other)) {
                (None, None) => true,
                (Some(b'*'), None) => below[other],
                (None, Some(b'*')) => row[other + 1],
                (Some(b'*'), Some(_)) | (Some(_), Some(b'*')) => below[other] || row[other + 1],
                (Some(a), Some(b)) => (a == b || *a == b'?' || *b == b'?') && below[other + 1],
                _ => false,
            };
        }
        below = row;
    }
    below[0]
}

/// Whether `text` matches a pattern of `*` and `?`. Linear in practice: only the last `*` is ever tried again.
#[must_use]
pub fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t, mut retry) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p, t));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[t] => (p, t) = (p + 1, t + 1),
            _ => match retry {
                Some((star, from)) => {
                    retry = Some((star, from + 1));
                    (p, t) = (star + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

/// A purge: what it concerns is void from a moment on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Purge {
    /// What it concerns.
    pub what: Selection,
    /// What it concerns is stale rather than gone: it may be served while it is revalidated, or while the upstream fails.
    pub soft: bool,
    /// What was asked for until then.
    pub at: Wall,
}

impl Purge {
    /// What a soft purge leaves of an entry.
    #[must_use]
    pub fn expire(&self, entry: &Entry) -> Entry {
        entry.expired(self.at, after(self.at))
    }
}

/// What the voids say of an entry.
#[derive(Clone, Debug, PartialEq)]
pub enum Validity {
    /// Nothing: it may be used.
    Valid,
    /// It was softly purged: this is left of it.
    Expired(Box<Entry>),
    /// It is not to be used.
    Void,
}

/// All voids of this process, and the clock that says what came first.
///
/// The clock is wall time, since entries carry it, made to run forwards: a moment of [`Voids::ask`] is later than every void
/// made before, a void's moment is not earlier than everything asked before, and no two voids share one.
#[derive(Default)]
pub struct Voids {
    /// The newest void. What was asked for later, as nearly everything was, needs no closer look.
    newest: AtomicU64,
    /// The latest moment at which something was asked for.
    asked: AtomicU64,
    remembered: Mutex<Remembered>,
}

#[derive(Default)]
struct Remembered {
    purges: VecDeque<Purge>,
    /// Invalidated targets, and the same in the order of their moments.
    targets: HashMap<u64, Wall>,
    targets_in_order: VecDeque<(Wall, u64)>,
    /// All voids until then are worked off in memory.
    worked_off: Wall,
    /// The newest void that was forgotten.
    forgotten: Wall,
    /// The newest void that was forgotten before it was worked off: all that was asked for until then is void.
    floor: Wall,
}

impl Remembered {
    /// Forgets what need not be remembered any more.
    fn forget(&mut self) {
        while let Some(oldest) = self.purges.front().map(|purge| purge.at)
            && self.may_forget(oldest, self.purges.len(), PURGES)
        {
            self.purges.pop_front();
        }
        while let Some(&(oldest, target)) = self.targets_in_order.front()
            && self.may_forget(oldest, self.targets_in_order.len(), TARGETS)
        {
            self.targets_in_order.pop_front();
            if self.targets.get(&target) == Some(&oldest) {
                self.targets.remove(&target);
            }
        }
    }

    /// Whether the oldest of `count` voids goes, and what that means.
    fn may_forget(&mut self, oldest: Wall, count: usize, (enough, most): (usize, usize)) -> bool {
        let worked_off = oldest <= self.worked_off;
        let goes = count > most || (count > enough && worked_off);
        if goes {
            self.forgotten = self.forgotten.max(oldest);
            if !worked_off {
                self.floor = self.floor.max(oldest);
            }
        }
        goes
    }

    fn is_invalidated(&self, target: u64, asked_at: Wall) -> bool {
        asked_at <= self.floor || self.targets.get(&target).is_some_and(|&at| asked_at <= at)
    }
}

/// The moment after a moment.
fn after(moment: Wall) -> Wall {
    moment + Duration::from_millis(1)
}

impl Voids {
    /// The moment at which something is asked of the upstream.
    #[must_use]
    pub fn ask(&self) -> Wall {
        let now = Wall::now().as_millis().max(self.newest.load(Ordering::Acquire) + 1);
        self.asked.fetch_max(now, Ordering::AcqRel);
        Wall::from_millis(now)
    }

    /// Voids what matches `what`: for ever, or with `soft` its freshness.
    pub fn add(&self, what: Selection, soft: bool) -> Purge {
        let mut remembered = self.remembered();
        let purge = Purge { what, soft, at: self.next(&remembered) };
        match &purge.what {
            Selection::Target(target) if !soft => {
                remembered.targets.insert(*target, purge.at);
                remembered.targets_in_order.push_back((purge.at, *target));
            }
            _ => remembered.purges.push_back(purge.clone()),
        }
        remembered.forget();
        self.newest.store(purge.at.as_millis(), Ordering::Release);
        purge
    }

    /// Whether an entry that was read may be used.
    #[must_use]
    pub fn check(&self, entry: &Entry) -> Validity {
        let newest = Wall::from_millis(self.newest.load(Ordering::Acquire));
        if entry.asked_at > newest || entry.checked.covers(newest) {
            return Validity::Valid;
        }
        let remembered = self.remembered();
        if remembered.is_invalidated(entry.target, entry.asked_at) {
            return Validity::Void;
        }
        let matching = |purge: &&Purge| purge.at >= entry.asked_at && purge.what.concerns(entry);
        let mut softest = None;
        for purge in remembered.purges.iter().rev().filter(matching) {
            if !purge.soft {
                return Validity::Void;
            }
            softest = softest.or(Some(purge));
        }
        match softest {
            Some(purge) => Validity::Expired(Box::new(purge.expire(entry))),
            None => {
                entry.checked.note(newest);
                Validity::Valid
            }
        }
    }

    /// Whether an entry that was just written, or is about to be, may stay, however long ago it was asked for.
    #[must_use]
    pub fn check_written(&self, entry: &Entry) -> Validity {
        if entry.asked_at <= self.remembered().forgotten {
            return Validity::Void;
        }
        self.check(entry)
    }

    /// The purges that are not worked off in memory yet, and the moment of the newest void.
    #[must_use]
    pub fn to_work_off(&self) -> (Vec<Purge>, Wall) {
        let remembered = self.remembered();
        let purges = remembered.purges.iter().filter(|purge| purge.at > remembered.worked_off).cloned().collect();
        (purges, Wall::from_millis(self.newest.load(Ordering::Acquire)))
    }

    /// All voids until `at` are worked off in memory.
    pub fn worked_off(&self, at: Wall) {
        let mut remembered = self.remembered();
        remembered.worked_off = remembered.worked_off.max(at);
        remembered.forget();
    }

    /// How many invalidated targets are remembered.
    #[must_use]
    pub fn targets(&self) -> usize {
        self.remembered().targets_in_order.len()
    }

    /// The purges that are remembered and concern what has this readable key, these tags and this target, newest first.
    #[must_use]
    pub fn concerning(&self, readable: &str, tags: &[String], target: u64) -> Vec<Purge> {
        let remembered = self.remembered();
        let mut found: Vec<Purge> =
            remembered.purges.iter().rev().filter(|purge| purge.what.matches(readable, tags, target)).cloned().collect();
        found.extend(remembered.targets.get(&target).map(|&at| Purge { what: Selection::Target(target), soft: false, at }));
        found
    }

    /// Whether what was asked for at `asked_at` was purged since, softly or not. `concerned` says which purges concern it,
    /// `checked` which it was held against already. For what is no [`Entry`] and is read again and again.
    #[must_use]
    pub fn is_purged(&self, asked_at: Wall, checked: &Checked, concerned: impl Fn(&Selection) -> bool) -> bool {
        let newest = Wall::from_millis(self.newest.load(Ordering::Acquire));
        if asked_at > newest || checked.covers(newest) {
            return false;
        }
        let remembered = self.remembered();
        let forgotten = asked_at <= remembered.floor || (asked_at <= remembered.forgotten && !checked.covers(remembered.forgotten));
        let mut since = remembered.purges.iter().rev().take_while(|purge| purge.at >= asked_at);
        if forgotten || since.any(|purge| concerned(&purge.what)) {
            return true;
        }
        checked.note(newest);
        false
    }

    /// Whether anything was purged since something was asked for at `asked_at`.
    #[must_use]
    pub fn is_purged_since(&self, asked_at: Wall) -> bool {
        {
            let remembered = self.remembered();
            asked_at <= remembered.floor || remembered.purges.back().is_some_and(|purge| asked_at <= purge.at)
        }
    }

    /// Whether something was invalidated that was asked for at `asked_at` for a target.
    #[must_use]
    pub fn is_invalidated(&self, target: u64, asked_at: Wall) -> bool {
        self.remembered().is_invalidated(target, asked_at)
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The moment of a new void. Only one is made at a time: whoever makes one holds the lock.
    fn next(&self, _lock: &MutexGuard<'_, Remembered>) -> Wall {
        let asked = self.asked.load(Ordering::Acquire);
        let newest = self.newest.load(Ordering::Acquire);
        Wall::from_millis(Wall::now().as_millis().max(asked).max(newest + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::codec::tests::entry as stored;
    use proptest::prelude::*;

    fn entry(voids: &Voids) -> Entry {
        Entry { asked_at: voids.ask(), readable: "liq:BTC".into(), target: 7, ..stored(b"x", &["t".into()], "v") }
    }

    /// So many purges that the ones before are forgotten.
    fn forget(voids: &Voids) {
        for _ in 0..=PURGES.0 {
            voids.add(Selection::Tag("x".into()), false);
            voids.worked_off(voids.to_work_off().1);
        }
    }

    fn check(voids: &Voids, entry: &Entry) -> Validity {
        voids.check(entry)
    }

    #[test]
    fn globs() {
        for (pattern, text, matches) in [
            ("*", "", true),
            ("liq:BTC*:*", "liq:BTCUSDT:1m", true),
            ("liq:?:*", "liq:BTC:1m", false),
            ("a*b*c", "aXbYbZc", true),
            ("a*b", "abc", false),
            ("", "a", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), matches, "{pattern} {text}");
        }
    }

    #[test]
    fn purges_by_pattern_find_what_the_answers_that_they_name_are_made_from() {
        let tags = ["symbol:BTCUSDT".to_owned(), format!("{MADE_INTO}liq:BTCUSDT:*:*"), format!("{MADE_INTO}orders:BTCUSDT:*")];
        let concerned = |pattern: &str| Selection::Pattern(pattern.into()).matches("timeline:BTCUSDT", &tags, 0);
        for pattern in ["*", "liq:*", "liq:BTC*:1m:*", "liq:BTCUSDT:1m:1:2", "orders:?TCUSDT:latest:50", "*USDT*", "timeline:*"] {
            assert!(concerned(pattern), "{pattern}");
        }
        for pattern in ["", "liq", "liq:ETH*", "symbols:all", "other:*"] {
            assert!(!concerned(pattern), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn patterns_that_match_one_text_overlap(one in "[ab*?]{0,6}", two in "[ab*?]{0,6}", text in "[ab]{0,6}") {
            if glob(one.as_bytes(), text.as_bytes()) && glob(two.as_bytes(), text.as_bytes()) {
                prop_assert!(overlap(one.as_bytes(), two.as_bytes()));
            }
            prop_assert_eq!(overlap(one.as_bytes(), text.as_bytes()), glob(one.as_bytes(), text.as_bytes()));
        }
    }

    #[test]
    fn what_was_asked_for_before_a_purge_is_void_and_what_was_asked_for_after_is_not() {
        for what in [Selection::Pattern("liq:*".into()), Selection::Tag("t".into())] {
            let voids = Voids::default();
            let before = entry(&voids);
            assert_eq!(check(&voids, &before), Validity::Valid);
            voids.add(Selection::Pattern("other".into()), false);
            assert_eq!(check(&voids, &before), Validity::Valid);
            voids.add(what.clone(), false);
            assert_eq!(check(&voids, &before), Validity::Void, "{what:?}");
            assert_eq!(check(&voids, &entry(&voids)), Validity::Valid, "{what:?}");
        }
    }

    #[test]
    fn a_soft_purge_leaves_a_stale_entry_and_a_hard_one_wins() {
        let voids = Voids::default();
        let before = entry(&voids);
        let purge = voids.add(Selection::Tag("t".into()), true);
        let Validity::Expired(left) = check(&voids, &before) else { panic!("not expired") };
        assert_eq!((left.lifetimes.fresh, left.stored_at), (Duration::ZERO, purge.at));
        assert_eq!(check(&voids, &left), Validity::Valid, "what is left is not purged again");
        voids.add(Selection::Tag("t".into()), false);
        assert_eq!((check(&voids, &before), check(&voids, &left)), (Validity::Void, Validity::Void));
    }

    #[test]
    fn an_invalidated_target_is_void_in_all_its_variants() {
        let voids = Voids::default();
        let before = entry(&voids);
        voids.add(Selection::Target(8), false);
        assert_eq!(check(&voids, &before), Validity::Valid);
        voids.add(Selection::Target(7), false);
        assert_eq!(check(&voids, &before), Validity::Void);
        assert_eq!(check(&voids, &entry(&voids)), Validity::Valid);
        assert!(voids.is_invalidated(7, before.asked_at));
    }

    #[test]
    fn no_two_voids_share_a_moment() {
        let voids = Voids::default();
        let old = entry(&voids);
        let moments: Vec<Wall> = (0..50).map(|_| voids.add(Selection::Tag("x".into()), false).at).collect();
        assert!(moments.is_sorted_by(|a, b| a < b));
        // An entry that was held against the newest is held against the next all the same.
        assert_eq!(check(&voids, &old), Validity::Valid);
        voids.add(Selection::Tag("t".into()), false);
        assert_eq!(check(&voids, &old), Validity::Void);
    }

    #[test]
    fn what_is_no_entry_is_held_against_every_purge_once() {
        let (voids, checked) = (Voids::default(), Checked::default());
        let asked_at = voids.ask();
        let tagged = |selection: &Selection| *selection == Selection::Tag("t".into());
        assert!(!voids.is_purged(asked_at, &checked, tagged));
        voids.add(Selection::Tag("x".into()), false);
        assert!(!voids.is_purged(asked_at, &checked, tagged) && !voids.is_purged(asked_at, &checked, |_| panic!("held against twice")));
        forget(&voids);
        assert!(voids.is_purged(asked_at, &Checked::default(), tagged), "a purge was forgotten that it was never held against");
        assert!(!voids.is_purged(voids.ask(), &Checked::default(), tagged));
        voids.add(Selection::Tag("t".into()), true);
        assert!(voids.is_purged(asked_at, &checked, tagged));
    }

    #[test]
    fn a_forgotten_purge_counts_against_what_is_written_and_not_against_what_is_read() {
        let voids = Voids::default();
        let slow = entry(&voids);
        forget(&voids);
        assert_eq!(voids.check_written(&slow), Validity::Void);
        assert_eq!(check(&voids, &slow), Validity::Valid);
        let quick = entry(&voids);
        assert_eq!(voids.check_written(&quick), Validity::Valid);
    }

    #[test]
    fn what_is_not_worked_off_is_remembered_or_voids_everything() {
        let voids = Voids::default();
        let (old, purged) = (entry(&voids), voids.add(Selection::Tag("t".into()), false));
        for _ in 0..PURGES.1 - 1 {
            voids.add(Selection::Tag("x".into()), false);
        }
        assert_eq!(voids.to_work_off().0.len(), PURGES.1);
        assert_eq!(check(&voids, &old), Validity::Void);
        let other = Entry { tags: Vec::new(), ..old.clone() };
        assert_eq!(check(&voids, &other), Validity::Valid);
        let unchecked = Entry { checked: Checked::default(), ..other };
        voids.add(Selection::Tag("x".into()), false);
        assert_eq!(check(&voids, &unchecked), Validity::Void, "the purge at {:?} was forgotten", purged.at);
        voids.worked_off(voids.to_work_off().1);
        assert_eq!(voids.to_work_off().0.len(), 0);
        assert_eq!(check(&voids, &entry(&voids)), Validity::Valid);
    }

    #[test]
    fn targets_are_remembered_by_their_last_change() {
        let voids = Voids::default();
        let early = entry(&voids);
        voids.add(Selection::Target(7), false);
        let late = entry(&voids);
        for target in 100..100 + TARGETS.0 as u64 + 10 {
            voids.add(Selection::Target(target), false);
        }
        assert_eq!((check(&voids, &early), check(&voids, &late)), (Validity::Void, Validity::Valid));
        voids.worked_off(voids.to_work_off().1);
        assert!(voids.targets() <= TARGETS.0);
        assert_eq!(voids.check_written(&early), Validity::Void);
    }
}
