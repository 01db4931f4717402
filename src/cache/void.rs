//! What is void. Purges by an operator and invalidations by a client's change (RFC 9111 §4.4) are one idea: *what matches this
//! and was asked for until this moment is not to be used any more*.
//!
//! A void is held against an entry when the entry is read. So it does not matter when the entry was written, or by whom:
//! what a fetch brings that began before the void is void when it is stored. Removing void entries from the stores only makes
//! room.
//!
//! So many purges are remembered. An older one can be forgotten, because nothing is left that it concerns: the purge removed
//! what was stored when it came, and whoever stores a response looks once more afterwards ([`Voids::check_written`]), where a
//! purge that was forgotten counts as matching.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use foldhash::fast::RandomState;
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle};

use super::entry::Entry;
use super::key::Canonical;
use crate::clock::Wall;

/// Purges that are remembered.
const PURGES: usize = 256;
/// Invalidated targets that are remembered; the longest unused is forgotten first. The entry of the target itself is removed
/// at once: this memory is for its variants and for other origins, whose keys cannot be named.
const TARGETS: usize = 16_384;

/// Which entries a purge concerns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Those whose readable key matches a glob (`*`, `?`).
    Pattern(String),
    /// Those that carry a tag.
    Tag(String),
}

impl Selection {
    /// Whether it concerns an entry with this readable key and these tags.
    #[must_use]
    pub fn matches(&self, readable: &str, tags: &[String]) -> bool {
        match self {
            Self::Pattern(pattern) => glob(pattern.as_bytes(), readable.as_bytes()),
            Self::Tag(tag) => tags.contains(tag),
        }
    }
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

type Targets = Cache<Bytes, Wall, UnitWeighter, RandomState, DefaultLifecycle<Bytes, Wall>>;

/// All voids of this process, and the clock that says what came first.
///
/// The clock is wall time, since entries carry it, made to run forwards: a moment of [`Voids::ask`] is later than every void
/// made before, a void's moment is not earlier than everything asked before, and no two voids share one.
pub struct Voids {
    /// The newest void. What was asked for later, as nearly everything was, needs no closer look.
    newest: AtomicU64,
    /// The latest moment at which something was asked for.
    asked: AtomicU64,
    purges: Mutex<Remembered>,
    targets: Targets,
}

#[derive(Default)]
struct Remembered {
    purges: VecDeque<Purge>,
    /// The newest purge that was forgotten.
    forgotten: Wall,
}

impl Default for Voids {
    fn default() -> Self {
        let targets = Cache::with(TARGETS, TARGETS as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default());
        Self { newest: AtomicU64::new(0), asked: AtomicU64::new(0), purges: Mutex::default(), targets }
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
    pub fn purge(&self, what: Selection, soft: bool) -> Purge {
        let mut remembered = self.remembered();
        let purge = Purge { what, soft, at: self.next(&remembered) };
        if remembered.purges.len() == PURGES {
            let oldest = remembered.purges.pop_front();
            remembered.forgotten = oldest.map_or(remembered.forgotten, |oldest| oldest.at);
        }
        remembered.purges.push_back(purge.clone());
        self.newest.store(purge.at.as_millis(), Ordering::Release);
        purge
    }

    /// Voids what is stored for a target, in all its variants and for every origin. `target_uri` is the canonical request
    /// without either.
    pub fn invalidate(&self, target_uri: &Canonical) {
        let remembered = self.remembered();
        let at = self.next(&remembered);
        self.targets.insert(target_uri.0.clone(), at);
        self.newest.store(at.as_millis(), Ordering::Release);
    }

    /// Whether an entry that was read may be used. `target_uri` is the canonical request without origin and variant; it is
    /// made only if it is needed.
    #[must_use]
    pub fn check(&self, entry: &Entry, target_uri: impl FnOnce() -> Canonical) -> Validity {
        let newest = Wall::from_millis(self.newest.load(Ordering::Acquire));
        if entry.asked_at > newest || entry.checked.covers(newest) {
            return Validity::Valid;
        }
        if self.is_invalidated(&target_uri(), entry.asked_at) {
            return Validity::Void;
        }
        let remembered = self.remembered();
        let matching = |purge: &&Purge| purge.at >= entry.asked_at && purge.what.matches(&entry.readable, &entry.tags);
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

    /// Whether an entry that was just written may stay, however long ago it was asked for.
    #[must_use]
    pub fn check_written(&self, entry: &Entry, target_uri: &Canonical) -> Validity {
        if entry.asked_at <= self.remembered().forgotten {
            return Validity::Void;
        }
        self.check(entry, || target_uri.clone())
    }

    /// Whether anything was purged since something was asked for at `asked_at`.
    #[must_use]
    pub fn is_purged_since(&self, asked_at: Wall) -> bool {
        self.remembered().purges.back().is_some_and(|purge| asked_at <= purge.at)
    }

    /// Whether something was invalidated that was asked for at `asked_at` for a target URI.
    #[must_use]
    pub fn is_invalidated(&self, target_uri: &Canonical, asked_at: Wall) -> bool {
        self.targets.get(&target_uri.0).is_some_and(|at| asked_at <= at)
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.purges.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn target() -> Canonical {
        Canonical(Bytes::from_static(b"target"))
    }

    fn entry(voids: &Voids) -> Entry {
        Entry { asked_at: voids.ask(), readable: "liq:BTC".into(), ..stored(b"x", &["t".into()], "v") }
    }

    fn check(voids: &Voids, entry: &Entry) -> Validity {
        voids.check(entry, target)
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
    fn what_was_asked_for_before_a_purge_is_void_and_what_was_asked_for_after_is_not() {
        for what in [Selection::Pattern("liq:*".into()), Selection::Tag("t".into())] {
            let voids = Voids::default();
            let before = entry(&voids);
            assert_eq!(check(&voids, &before), Validity::Valid);
            voids.purge(Selection::Pattern("other".into()), false);
            assert_eq!(check(&voids, &before), Validity::Valid);
            voids.purge(what.clone(), false);
            assert_eq!(check(&voids, &before), Validity::Void, "{what:?}");
            assert_eq!(check(&voids, &entry(&voids)), Validity::Valid, "{what:?}");
        }
    }

    #[test]
    fn a_soft_purge_leaves_a_stale_entry_and_a_hard_one_wins() {
        let voids = Voids::default();
        let before = entry(&voids);
        let purge = voids.purge(Selection::Tag("t".into()), true);
        let Validity::Expired(left) = check(&voids, &before) else { panic!("not expired") };
        assert_eq!((left.lifetimes.fresh, left.stored_at), (Duration::ZERO, purge.at));
        assert_eq!(check(&voids, &left), Validity::Valid, "what is left is not purged again");
        voids.purge(Selection::Tag("t".into()), false);
        assert_eq!((check(&voids, &before), check(&voids, &left)), (Validity::Void, Validity::Void));
    }

    #[test]
    fn an_invalidated_target_is_void_in_all_its_variants() {
        let voids = Voids::default();
        let before = entry(&voids);
        voids.invalidate(&Canonical(Bytes::from_static(b"other")));
        assert_eq!(check(&voids, &before), Validity::Valid);
        voids.invalidate(&target());
        assert_eq!(check(&voids, &before), Validity::Void);
        assert_eq!(check(&voids, &entry(&voids)), Validity::Valid);
        assert!(voids.is_invalidated(&target(), before.asked_at));
    }

    #[test]
    fn no_two_voids_share_a_moment() {
        let voids = Voids::default();
        let old = entry(&voids);
        let moments: Vec<Wall> = (0..50).map(|_| voids.purge(Selection::Tag("x".into()), false).at).collect();
        assert!(moments.is_sorted_by(|a, b| a < b));
        // An entry that was held against the newest is held against the next all the same.
        assert_eq!(check(&voids, &old), Validity::Valid);
        voids.purge(Selection::Tag("t".into()), false);
        assert_eq!(check(&voids, &old), Validity::Void);
    }

    #[test]
    fn a_forgotten_purge_counts_against_what_is_written_and_not_against_what_is_read() {
        let voids = Voids::default();
        let slow = entry(&voids);
        (0..=PURGES).for_each(|_| drop(voids.purge(Selection::Tag("x".into()), false)));
        assert_eq!(voids.check_written(&slow, &target()), Validity::Void);
        assert_eq!(check(&voids, &slow), Validity::Valid);
        let quick = entry(&voids);
        assert_eq!(voids.check_written(&quick, &target()), Validity::Valid);
    }
}
