//! The voids of one process. A void is noted at once, and an entry is checked when it is used. So it does not matter when the entry was
//! written, or by which instance: what a fetch that began before a void stores is void when it is stored.
//!
//! An entry is checked once against each void: it remembers the newest void that it was checked against ([`Checked`]). Removing void
//! entries from memory ("sweeping") only makes room, and lets old voids be forgotten. An entry that was not checked against a void
//! before that was forgotten is void itself, so no sweep has to be complete.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::effect::Effect;
use super::moment::{Moment, MomentClock};
use super::selection::Selection;
use crate::cache::entry::{Checked, Entry};
use crate::cache::key::entry_digest;
use crate::clock::Wall;

/// How many voids are remembered.
#[derive(Clone, Copy, Debug)]
pub struct VoidBounds {
    /// Purges that are remembered once memory is swept of what they concern, and at most.
    pub purges: (usize, usize),
    /// The same for invalidated targets.
    pub targets: (usize, usize),
}

/// The bounds of the program.
pub const BOUNDS: VoidBounds = VoidBounds { purges: (256, 4096), targets: (16_384, 262_144) };

/// A void: what it concerns, and was asked for before it, is not to be used as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Purge {
    /// What it concerns.
    pub what: Selection,
    /// What it leaves of that.
    pub effect: Effect,
    /// When it was made.
    pub at: Moment,
    /// The same by wall time, to tell people, and for the age of what it expires.
    pub since: Wall,
    /// When the same target was voided before, if it is a target and that is remembered.
    pub before: Option<Moment>,
}

/// What the voids say of an entry.
#[derive(Clone, Debug, PartialEq)]
pub enum Validity {
    /// Nothing: it may be used.
    Valid,
    /// It was purged softly, or is in doubt: this is left of it.
    Expired(Box<Entry>),
    /// It is not to be used.
    Void,
}

/// What the voids say of something that is no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judgement {
    Valid,
    /// The void that expires it most.
    Expired(Effect, Wall),
    Void,
}

/// All voids of this process, and the clock that says what came first.
pub struct Voids {
    clock: MomentClock,
    /// The newest void. What was asked for later, as nearly everything was, needs no closer look.
    newest: AtomicU64,
    remembered: Mutex<Remembered>,
}

struct Remembered {
    bounds: VoidBounds,
    purges: VecDeque<Purge>,
    /// Invalidated targets, and single entries, by their digests; and the same in the order of their moments.
    targets: HashMap<u64, (Moment, Wall)>,
    targets_in_order: VecDeque<(Moment, u64)>,
    /// Whether there are single entries among them.
    has_entries: bool,
    /// Memory was swept of what these voids concern, up to here.
    swept: Moment,
    /// The newest void that was forgotten.
    forgotten: Moment,
}

impl Remembered {
    /// Forgets what need not be remembered any more.
    fn forget(&mut self) {
        let goes =
            |at: Moment, swept: Moment, count: usize, (enough, most): (usize, usize)| count > most || (count > enough && at <= swept);
        while let Some(at) = self.purges.front().map(|purge| purge.at)
            && goes(at, self.swept, self.purges.len(), self.bounds.purges)
        {
            self.purges.pop_front();
            self.forgotten = self.forgotten.max(at);
        }
        while let Some(&(at, target)) = self.targets_in_order.front()
            && goes(at, self.swept, self.targets_in_order.len(), self.bounds.targets)
        {
            self.targets_in_order.pop_front();
            self.forgotten = self.forgotten.max(at);
            if self.targets.get(&target).is_some_and(|(newest, _)| *newest == at) {
                self.targets.remove(&target);
            }
        }
    }

    /// The purges after `seen`, newest first.
    fn purges_after(&self, seen: Moment) -> impl Iterator<Item = &Purge> {
        self.purges.iter().rev().take_while(move |purge| purge.at > seen)
    }

    fn is_invalidated(&self, target: u64, seen: Moment) -> bool {
        self.targets.get(&target).is_some_and(|(at, _)| *at > seen)
    }

    /// Judges what was checked against every void up to `seen`.
    fn judge(&self, seen: Moment, target: Option<u64>, concerned: impl Fn(&Selection) -> bool) -> Judgement {
        if seen < self.forgotten || target.is_some_and(|target| self.is_invalidated(target, seen)) {
            return Judgement::Void;
        }
        let mut judgement = Judgement::Valid;
        for purge in self.purges_after(seen).filter(|purge| concerned(&purge.what)) {
            judgement = match (purge.effect, judgement) {
                (Effect::Remove, _) => return Judgement::Void,
                (Effect::Expire, Judgement::Expired(..)) => judgement,
                (effect, _) => Judgement::Expired(effect, purge.since),
            };
        }
        judgement
    }
}

impl Default for Voids {
    fn default() -> Self {
        Self::with_bounds(BOUNDS)
    }
}

impl Voids {
    /// No voids, and room for these many.
    #[must_use]
    pub fn with_bounds(bounds: VoidBounds) -> Self {
        let (purges, targets, targets_in_order, has_entries, swept, forgotten) = Default::default();
        let remembered = Remembered { bounds, purges, targets, targets_in_order, has_entries, swept, forgotten };
        Self { clock: MomentClock::default(), newest: AtomicU64::new(0), remembered: Mutex::new(remembered) }
    }

    /// Breaks the rule that what was not checked against a forgotten void is void itself.
    #[cfg(test)]
    pub(super) fn deny_forgetting(&self) {
        self.remembered().forgotten = Moment::default();
    }

    /// The moment at which something is asked for. Every void that was made before is earlier.
    #[must_use]
    pub fn ask(&self) -> Moment {
        self.clock.tick()
    }

    /// Voids what `what` concerns and was asked for until now.
    pub fn add(&self, what: Selection, effect: Effect, now: Wall) -> Purge {
        let mut remembered = self.remembered();
        // Only one is made at a time, so that the newest is the last one remembered.
        let mut purge = Purge { what, effect, at: self.clock.tick(), since: now, before: None };
        match &purge.what {
            Selection::Target(target) | Selection::Entry(target) if effect == Effect::Remove => {
                remembered.has_entries |= matches!(purge.what, Selection::Entry(_));
                purge.before = remembered.targets.insert(*target, (purge.at, now)).map(|(at, _)| at);
                remembered.targets_in_order.push_back((purge.at, *target));
            }
            _ => remembered.purges.push_back(purge.clone()),
        }
        remembered.forget();
        self.newest.store(purge.at.number(), Ordering::Release);
        purge
    }

    fn newest(&self) -> Moment {
        Moment::at(self.newest.load(Ordering::Acquire))
    }

    /// Whether an entry may be used. For a hit: two loads, unless something was voided since the last look.
    #[must_use]
    pub fn check(&self, entry: &Entry) -> Validity {
        let newest = self.newest();
        let seen = entry.checked.until().max(entry.asked_at);
        if seen >= newest {
            return Validity::Valid;
        }
        let remembered = self.remembered();
        if remembered.has_entries && remembered.is_invalidated(entry_digest(&entry.canonical), seen) {
            return Validity::Void;
        }
        match remembered.judge(seen, Some(entry.target), |what| what.concerns(entry)) {
            Judgement::Valid => {
                entry.checked.note(newest);
                Validity::Valid
            }
            Judgement::Expired(effect, since) => Validity::Expired(Box::new(entry.expired(since, newest, effect))),
            Judgement::Void => Validity::Void,
        }
    }

    /// Whether anything that concerns this readable key, these tags and this target was voided since something was asked for. For a
    /// request that would join a fetch: the fetch's answer is void for it.
    #[must_use]
    pub fn concern_since(&self, asked_at: Moment, readable: &str, tags: &[String], target: u64) -> bool {
        asked_at < self.newest()
            && self.remembered().judge(asked_at, Some(target), |what| what.matches(readable, tags, target)) != Judgement::Valid
    }

    /// The purges of which memory is not swept yet, and the moment of the newest void.
    #[must_use]
    pub fn to_sweep(&self) -> (Vec<Purge>, Moment) {
        let remembered = self.remembered();
        let mut purges: Vec<Purge> = remembered.purges_after(remembered.swept).cloned().collect();
        purges.reverse();
        (purges, self.newest())
    }

    /// Memory was swept of what the voids up to `until` concern.
    pub fn swept(&self, until: Moment) {
        let mut remembered = self.remembered();
        remembered.swept = remembered.swept.max(until);
        remembered.forget();
    }

    /// Whether memory was swept of what the void of a moment concerns.
    #[must_use]
    pub fn is_swept(&self, at: Moment) -> bool {
        at <= self.remembered().swept
    }

    /// How many invalidated targets are remembered.
    #[must_use]
    pub fn targets(&self) -> usize {
        self.remembered().targets_in_order.len()
    }

    /// The newest void that is forgotten.
    #[must_use]
    pub fn forgotten(&self) -> Moment {
        self.remembered().forgotten
    }

    /// The purges that are remembered and concern what has this readable key, these tags and this target, newest first.
    #[must_use]
    pub fn concerning(&self, readable: &str, tags: &[String], target: u64) -> Vec<Purge> {
        let remembered = self.remembered();
        let concerning = remembered.purges.iter().rev().filter(|purge| purge.what.matches(readable, tags, target));
        let mut found: Vec<Purge> = concerning.cloned().collect();
        found.extend(remembered.targets.get(&target).map(|&(at, since)| Purge {
            what: Selection::Target(target),
            effect: Effect::Remove,
            at,
            since,
            before: None,
        }));
        found
    }

    /// Whether what was asked for at `asked_at` was purged or invalidated since, softly or not. `concerned` says which purges concern it, `target`
    /// what invalidations call it, `checked` which voids it was checked against already. For what is no [`Entry`] and is read again and again.
    #[must_use]
    pub fn is_void(
        &self,
        asked_at: Moment,
        checked: &Checked,
        target: impl FnOnce() -> u64,
        concerned: impl Fn(&Selection) -> bool,
    ) -> bool {
        let newest = self.newest();
        let seen = checked.until().max(asked_at);
        if seen >= newest {
            return false;
        }
        let valid = self.remembered().judge(seen, Some(target()), concerned) == Judgement::Valid;
        if valid {
            checked.note(newest);
        }
        !valid
    }

    /// Whether anything was purged since something was asked for at `asked_at`, or what it was asked for, `target`, was invalidated.
    #[must_use]
    pub fn anything_since(&self, asked_at: Moment, target: u64) -> bool {
        self.remembered().judge(asked_at, Some(target), |_| true) != Judgement::Valid
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::codec::tests::entry as stored;
    use std::time::Duration;

    const NOW: Wall = Wall::from_millis(1_735_689_600_000);

    fn entry(voids: &Voids) -> Entry {
        Entry { asked_at: voids.ask(), readable: "liq:BTC".into(), target: 7, ..stored(b"x", &["t".into()], "v") }
    }

    fn tag(text: &str) -> Selection {
        Selection::Tag(text.into())
    }

    fn remove(voids: &Voids, what: Selection) -> Purge {
        voids.add(what, Effect::Remove, NOW)
    }

    /// Makes purges until the ones before are forgotten.
    fn forget(voids: &Voids) {
        for _ in 0..=BOUNDS.purges.0 {
            remove(voids, tag("x"));
            voids.swept(voids.to_sweep().1);
        }
    }

    #[test]
    fn what_was_asked_for_before_a_purge_is_void_and_what_was_asked_for_after_is_not() {
        for what in [Selection::Pattern("liq:*".into()), tag("t"), Selection::Target(7)] {
            let voids = Voids::default();
            let before = entry(&voids);
            assert_eq!(voids.check(&before), Validity::Valid);
            remove(&voids, Selection::Pattern("other".into()));
            remove(&voids, Selection::Target(8));
            assert_eq!(voids.check(&before), Validity::Valid);
            assert!(!voids.concern_since(before.asked_at, &before.readable, &before.tags, 7));
            remove(&voids, what.clone());
            assert_eq!(voids.check(&before), Validity::Void, "{what:?}");
            assert!(voids.concern_since(before.asked_at, &before.readable, &before.tags, 7), "{what:?}");
            let after = entry(&voids);
            assert_eq!(voids.check(&after), Validity::Valid, "{what:?}");
            assert!(!voids.concern_since(after.asked_at, &after.readable, &after.tags, 7), "{what:?}");
        }
    }

    #[test]
    fn a_soft_purge_leaves_a_stale_entry_and_a_hard_one_wins() {
        let voids = Voids::default();
        let before = entry(&voids);
        let purge = voids.add(tag("t"), Effect::Expire, NOW);
        let Validity::Expired(left) = voids.check(&before) else { panic!("not expired") };
        assert_eq!((left.lifetimes.fresh, left.stored_at), (Duration::ZERO, purge.since));
        assert_eq!(voids.check(&left), Validity::Valid, "what is left is not purged again");
        remove(&voids, tag("t"));
        assert_eq!((voids.check(&before), voids.check(&left)), (Validity::Void, Validity::Void));
    }

    #[test]
    fn what_is_in_doubt_is_used_only_if_a_fetch_fails() {
        let voids = Voids::default();
        let mut before = entry(&voids);
        before.lifetimes.stale_while_revalidate = Duration::from_secs(60);
        before.lifetimes.stale_if_error = Duration::from_secs(60);
        before.stored_at = NOW;
        voids.add(Selection::all(), Effect::Doubt, NOW);
        voids.add(tag("t"), Effect::Expire, NOW);
        let Validity::Expired(left) = voids.check(&before) else { panic!("not expired") };
        let lifetimes = left.lifetimes;
        assert!(lifetimes.fresh.is_zero() && lifetimes.stale_while_revalidate.is_zero() && !lifetimes.stale_if_error.is_zero());
        assert_eq!(voids.check(&entry(&voids)), Validity::Valid);
    }

    #[test]
    fn an_entry_is_checked_once_against_each_void() {
        let (voids, checked) = (Voids::default(), Checked::default());
        let asked_at = voids.ask();
        let tagged = |selection: &Selection| *selection == tag("t");
        let is_void =
            |asked_at, checked: &Checked, concerned: &dyn Fn(&Selection) -> bool| voids.is_void(asked_at, checked, || 7, concerned);
        assert!(!is_void(asked_at, &checked, &tagged));
        remove(&voids, tag("x"));
        assert!(!is_void(asked_at, &checked, &tagged) && !is_void(asked_at, &checked, &|_| panic!("checked twice")));
        remove(&voids, tag("y"));
        assert!(!is_void(asked_at, &checked, &|what| if *what == tag("y") { false } else { panic!("checked twice: {what:?}") }));
        forget(&voids);
        assert!(is_void(asked_at, &Checked::default(), &tagged), "it was never checked against what is forgotten");
        assert!(!is_void(voids.ask(), &Checked::default(), &tagged));
        remove(&voids, Selection::Target(8));
        assert!(!is_void(voids.ask(), &Checked::default(), &tagged), "another target");
        let later = voids.ask();
        remove(&voids, Selection::Target(7));
        assert!(is_void(later, &Checked::default(), &tagged) && !is_void(voids.ask(), &Checked::default(), &tagged));
        voids.add(tag("t"), Effect::Expire, NOW);
        assert!(is_void(voids.to_sweep().0[0].at.min(asked_at), &checked, &tagged));
    }

    #[test]
    fn what_was_not_checked_against_a_forgotten_void_is_void() {
        let voids = Voids::default();
        let (slow, kept) = (entry(&voids), entry(&voids));
        for _ in 0..=BOUNDS.purges.0 {
            remove(&voids, tag("x"));
            assert_eq!(voids.check(&kept), Validity::Valid, "a sweep checks it");
            voids.swept(voids.to_sweep().1);
        }
        assert_eq!(voids.check(&slow), Validity::Void);
        assert_eq!(voids.check(&kept), Validity::Valid);
        assert_eq!(voids.check(&entry(&voids)), Validity::Valid);
    }

    #[test]
    fn voids_are_bounded_although_nothing_is_swept() {
        let voids = Voids::default();
        let old = entry(&voids);
        remove(&voids, tag("t"));
        for _ in 0..BOUNDS.purges.1 - 1 {
            remove(&voids, tag("x"));
        }
        assert_eq!(voids.to_sweep().0.len(), BOUNDS.purges.1);
        let other = Entry { tags: Vec::new(), checked: Checked::default(), ..old.clone() };
        assert_eq!((voids.check(&old), voids.check(&other)), (Validity::Void, Validity::Valid));
        let unchecked = Entry { checked: Checked::default(), ..other };
        remove(&voids, tag("x"));
        assert_eq!(voids.check(&unchecked), Validity::Void, "a purge was forgotten");
        voids.swept(voids.to_sweep().1);
        assert_eq!(voids.to_sweep().0.len(), 0);
        assert_eq!(voids.check(&entry(&voids)), Validity::Valid);
    }

    #[test]
    fn one_entry_is_void_and_others_for_the_same_target_are_not() {
        let voids = Voids::default();
        let (one, other) = (entry(&voids), Entry { canonical: b"other".as_slice().into(), ..entry(&voids) });
        remove(&voids, Selection::Entry(entry_digest(&one.canonical)));
        assert_eq!((voids.check(&one), voids.check(&other)), (Validity::Void, Validity::Valid));
        assert_eq!(voids.check(&entry(&voids)), Validity::Valid);
    }

    #[test]
    fn targets_are_remembered_by_their_last_change() {
        let voids = Voids::default();
        let early = entry(&voids);
        remove(&voids, Selection::Target(7));
        let late = entry(&voids);
        for target in 100..100 + BOUNDS.targets.0 as u64 + 10 {
            remove(&voids, Selection::Target(target));
        }
        assert_eq!((voids.check(&early), voids.check(&late)), (Validity::Void, Validity::Valid));
        voids.swept(voids.to_sweep().1);
        assert!(voids.targets() <= BOUNDS.targets.0);
        assert_eq!((voids.check(&early), voids.check(&late)), (Validity::Void, Validity::Valid));
        assert!(voids.anything_since(early.asked_at, 1) && !voids.anything_since(voids.ask(), 1));
    }
}
