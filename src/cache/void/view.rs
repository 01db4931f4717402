//! What one instance knows of the log of voids: a pure state machine without I/O or clock. [`super`] is the page that explains it;
//! [`void_log`](crate::cache::void_log) carries out what it says.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::effect::Effect;
use super::local::Voids;
use super::moment::Moment;
use super::selection::Selection;
use crate::clock::Wall;

/// Counts of purges that are kept.
const COUNTS: usize = 1024;
/// Looks at the log by which it shows what was added to it.
const SHOWN: u32 = 4;

/// The name of one void in the log, random. `0`: a void that an earlier version wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VoidId(pub u64);

impl VoidId {
    /// The text that stands in the log.
    #[must_use]
    pub fn text(self) -> String {
        format!("{:016x}", self.0)
    }

    /// What a text names.
    #[must_use]
    pub fn read(text: &str) -> Self {
        Self(u64::from_str_radix(text, 16).unwrap_or_default())
    }
}

/// A void as the log has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedVoid {
    /// What is void.
    pub what: Selection,
    /// Whether it is only stale.
    #[serde(default)]
    pub soft: bool,
}

/// A void in its place in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InLog {
    /// Its name.
    pub id: VoidId,
    /// The name of the void before it, so that a log that went on from an older state shows. `None`: an earlier version wrote it.
    pub before: Option<VoidId>,
    /// What it says.
    pub void: LoggedVoid,
}

/// The same as texts have it. Redis adds `before`.
#[derive(Serialize, Deserialize)]
struct Named {
    #[serde(flatten)]
    void: LoggedVoid,
    #[serde(default)]
    id: String,
    #[serde(default, skip_serializing)]
    before: Option<String>,
}

impl LoggedVoid {
    /// A void of everything.
    #[must_use]
    pub fn all() -> Self {
        Self { what: Selection::all(), soft: false }
    }

    /// What a text says. What cannot be read, because a later version wrote it or somebody else did, voids everything.
    #[must_use]
    pub fn read(text: &str) -> InLog {
        match serde_json::from_str::<Named>(text) {
            Ok(Named { void, id, before }) => InLog { id: VoidId::read(&id), before: before.map(|name| VoidId::read(&name)), void },
            Err(_) => InLog { id: VoidId::default(), before: None, void: Self::all() },
        }
    }

    /// The text of a void with its name.
    #[must_use]
    pub fn write(&self, id: VoidId) -> String {
        // Texts and a flag always serialise.
        serde_json::to_string(&Named { void: self.clone(), id: id.text(), before: None }).unwrap_or_default()
    }
}

/// A place in the log. Two logs that had the same beginning differ in the name of their newest void.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Which log: one that was lost is another one when it begins anew.
    pub epoch: u64,
    /// The number of the newest void that counts; 0: none yet.
    pub seq: u64,
    /// The name of that void.
    pub last: VoidId,
}

/// The place up to which an entry in Redis was checked against voids, as it is written in front of the entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Which log.
    pub epoch: u64,
    /// The number of a void.
    pub seq: u64,
}

impl Position {
    /// The stamp of an entry that was checked against all voids up to here.
    #[must_use]
    pub const fn stamp(self) -> Stamp {
        Stamp { epoch: self.epoch, seq: self.seq }
    }

    /// The epoch as Redis has it.
    #[must_use]
    pub fn epoch_text(self) -> String {
        format!("{:016x}", self.epoch)
    }
}

/// The newest place of a log, and how far Redis is swept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogHead {
    /// The newest place.
    pub at: Position,
    /// Redis was swept of what the voids up to here concern.
    pub swept: u64,
}

/// How what an instance knows of a log fits the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The newest void that it knows is in the log, under the same number.
    Part,
    /// The log has forgotten that one: others are missing too.
    Forgotten,
    /// The log has another void under that number, is shorter, or is swept less: it went on from an older state.
    Diverged,
}

/// What was read of the log in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    /// There is no log: it is new, or was evicted, or Redis lost its data.
    Absent,
    /// There is one.
    Log(LogPage),
}

/// A part of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogPage {
    /// Its newest place.
    pub head: Position,
    /// Redis was swept of what the voids up to here concern.
    pub swept: u64,
    /// Voids up to here are forgotten.
    pub trimmed: u64,
    /// How the place from which it was read fits it.
    pub standing: Standing,
    /// The number of the first void that follows.
    pub first: u64,
    /// Voids in order, perhaps not up to the newest; `None`: one that should be there and is not.
    pub voids: Vec<Option<InLog>>,
}

/// What is to be done after a page was taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing: all of the log is known.
    Synced,
    /// Read on.
    More,
    /// Begin a log, unless somebody else did, and read it.
    Begin,
    /// Begin another log in place of the one whose newest place is this, and read it.
    Replace(Position),
}

/// What a message was good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// All before it was known.
    InOrder,
    /// Messages before it were lost, or it belongs to another log: the log must be read.
    Gap,
}

/// What came of adding a void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is in the log under this number.
    Shared(u64),
    /// Redis is away or refuses writes: the others get to know it later.
    Waits,
}

/// A void that counts although the log, as far as it is known here, does not have it.
#[derive(Clone, Debug)]
struct Held {
    id: VoidId,
    void: Arc<LoggedVoid>,
    /// Looks at the log before it is added from here: its own instance adds it at once, the others if that one cannot.
    patience: u32,
    /// Where it is in the log, once that was said, and the looks at the log since.
    stands: Option<(Stamp, u32)>,
}

/// How far an instance trusts the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Log {
    /// None is known, or the one that is there must be replaced first: nothing that is in Redis may be used.
    #[default]
    Unknown,
    /// It is known up to here.
    Known(Position),
}

/// Bounds of what is known.
#[derive(Clone, Copy, Debug)]
pub struct ViewBounds {
    /// Voids that are held; beyond that, everything is void.
    pub held: usize,
    /// Looks at the log before another instance's void is added from here.
    pub patience: u32,
    /// Voids that are kept although Redis is swept of what they concern: messages may come twice.
    pub kept: usize,
}

/// The bounds of the program.
pub const BOUNDS: ViewBounds = ViewBounds { held: 1024, patience: 20, kept: 1000 };

/// What one instance knows of the log.
pub struct LogView {
    log: Log,
    /// The greatest epoch that was ever known. An earlier one comes from a restored state of Redis, in which voids are missing.
    greatest: u64,
    /// Redis was swept of what the voids up to here concern.
    swept: u64,
    /// The voids that the log keeps, oldest first.
    voids: VecDeque<(u64, VoidId, LoggedVoid)>,
    held: VecDeque<Held>,
    /// How many entries in Redis each void concerned, once that was counted.
    counts: BTreeMap<u64, u64>,
    /// The newest void that is not kept any more, and when it went. What was asked of Redis before may be from before its sweep.
    gone: (u64, Moment),
    bounds: ViewBounds,
    salt: u64,
}

impl fmt::Debug for LogView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {} voids, held: {:?}", self.log, self.voids.len(), self.held)
    }
}

impl LogView {
    /// Nothing is known yet. `salt` is random, so that names that are made here are those of no other instance.
    #[must_use]
    pub fn new(bounds: ViewBounds, salt: u64) -> Self {
        let (voids, held, counts, gone) = Default::default();
        Self { log: Log::Unknown, greatest: 0, swept: 0, voids, held, counts, gone, bounds, salt }
    }

    /// Up to where the log is known; `None` if it cannot be trusted: then nothing that is in Redis may be used, nor anything written.
    #[must_use]
    pub const fn position(&self) -> Option<Position> {
        match self.log {
            Log::Known(at) => Some(at),
            Log::Unknown => None,
        }
    }

    /// An epoch for a log that begins now, by the wall clock: later than all that are known here. `random` keeps two instances apart.
    #[must_use]
    pub fn new_epoch(&self, now: Wall, random: u16) -> u64 {
        (now.as_millis() << 16 | u64::from(random)).max(self.greatest.saturating_add(1))
    }

    /// Breaks the rule that an earlier epoch is not taken up again.
    #[cfg(test)]
    pub(super) fn forget_epochs(&mut self) {
        self.greatest = 0;
    }

    /// Holds a void no longer: what it concerns is not to be served here any more for another reason.
    pub fn forget(&mut self, id: VoidId) {
        self.held.retain(|held| held.id != id);
    }

    /// From where the log is to be read.
    #[must_use]
    pub fn known(&self) -> LogHead {
        LogHead { at: self.position().unwrap_or_default(), swept: self.swept }
    }

    /// Whether the log is where it is known to be. `asked` is what was known when it was looked at: a log that is swept less went on from
    /// an older state, in which void entries may stand that are thought to be gone.
    #[must_use]
    pub fn is_newest(&self, head: Option<LogHead>, asked: LogHead) -> bool {
        head.is_some_and(|head| Some(head.at) == self.position() && head.swept >= asked.swept)
    }

    /// Whether an entry that was asked of Redis at `asked_at` may be used. `concerned` says which voids concern it.
    #[must_use]
    pub fn admit(&self, stamp: Stamp, asked_at: Moment, concerned: impl Fn(&Selection) -> bool) -> Option<Effect> {
        let Log::Known(at) = self.log else { return Some(Effect::Remove) };
        let crossed_a_sweep = stamp.seq < self.gone.0 && asked_at < self.gone.1;
        if stamp.epoch != at.epoch || crossed_a_sweep {
            return Some(Effect::Remove);
        }
        let newer = self.voids.iter().rev().take_while(|(seq, ..)| *seq > stamp.seq).map(|(_, _, void)| void);
        let mut expires = None;
        for void in newer.chain(self.held.iter().map(|held| &*held.void)).filter(|void| concerned(&void.what)) {
            match Effect::of_purge(void.soft) {
                Effect::Expire => expires = Some(Effect::Expire),
                removes => return Some(removes),
            }
        }
        expires
    }

    /// A void was made here. From now on it counts against all that is read from Redis, until the log shows it. Call it before the void
    /// is added to [`Voids`], so that there is no moment at which neither counts.
    pub fn hold(&mut self, id: VoidId, void: LoggedVoid) {
        self.hold_for(id, void, 0);
    }

    fn hold_for(&mut self, id: VoidId, void: LoggedVoid, patience: u32) {
        // The same void again stands for both. The name of the new one is kept: the other may be on its way into the log.
        self.held.retain(|held| *held.void != void || held.patience > 0);
        if self.held.len() >= self.bounds.held {
            // One void of everything stands for all of them. Its name is its own: the one that came last may get into the log by itself.
            self.held.clear();
            self.held.push_back(Held { id: VoidId(id.0 ^ self.salt), void: Arc::new(LoggedVoid::all()), patience: 0, stands: None });
        } else {
            self.held.push_back(Held { id, void: Arc::new(void), patience, stands: None });
        }
    }

    /// The void that is to be added to the log next. None while the log is unknown: it is about to be replaced.
    #[must_use]
    pub fn next_to_add(&self) -> Option<(VoidId, Arc<LoggedVoid>)> {
        self.position()?;
        let waiting = self.held.iter().find(|held| held.stands.is_none() && held.patience == 0)?;
        Some((waiting.id, Arc::clone(&waiting.void)))
    }

    /// A void was added to the log.
    pub fn added(&mut self, id: VoidId, stands: Stamp) {
        if self.knows(stands, id) {
            self.held.retain(|held| held.id != id);
        } else {
            // A log that was replaced meanwhile does not count.
            let stands = Some((stands, 0)).filter(|(stands, _)| stands.epoch >= self.greatest);
            self.held.iter_mut().filter(|held| held.id == id).for_each(|held| held.stands = stands);
        }
    }

    /// Whether the log as it is known here has this void in this place.
    fn knows(&self, stands: Stamp, id: VoidId) -> bool {
        self.position().is_some_and(|at| at.epoch == stands.epoch)
            && self.voids.iter().rev().any(|(seq, known, _)| (*seq, *known) == (stands.seq, id))
    }

    /// The log was looked at.
    pub fn looked(&mut self) {
        for held in &mut self.held {
            held.patience = held.patience.saturating_sub(1);
            // What the log does not show after a while is not there: it went on from an older state. It is added again.
            held.stands = held.stands.map(|(stands, looks)| (stands, looks + 1)).filter(|(_, looks)| *looks < SHOWN);
        }
    }

    /// How many voids the log, as it is known here, does not have.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.held.len()
    }

    /// The log is gone, or must be replaced. What others voided last cannot be known, so all that was asked for is in doubt.
    fn lose(&mut self, voids: &Voids, now: Wall) {
        if self.position().is_some() {
            self.log = Log::Unknown;
            voids.add(Selection::all(), Effect::Doubt, now);
        }
    }

    /// Another log begins. What is in Redis belongs to the one before, so it is void; what was asked for is in doubt.
    fn begin(&mut self, epoch: u64, voids: &Voids, now: Wall) {
        voids.add(Selection::all(), Effect::Doubt, now);
        self.log = Log::Known(Position { epoch, ..Position::default() });
        self.greatest = epoch;
        self.swept = 0;
        self.gone = Default::default();
        self.voids.clear();
        self.counts.clear();
        // What its own instance has to add is added again; the others' are void here already, and nothing in Redis needs them.
        self.held.retain(|held| held.patience == 0);
        self.held.iter_mut().for_each(|held| held.stands = None);
    }

    /// Takes over what was read of the log.
    pub fn take_page(&mut self, page: Page, voids: &Voids, now: Wall) -> Next {
        let Page::Log(page) = page else {
            self.lose(voids, now);
            return Next::Begin;
        };
        // The log of an earlier version, whose voids cannot be read.
        if page.head.seq > 0 && page.head.last == VoidId::default() {
            self.lose(voids, now);
            return Next::Replace(page.head);
        }
        match self.log {
            Log::Known(at) if at.epoch == page.head.epoch => match page.standing {
                Standing::Part => {}
                Standing::Forgotten => self.miss_up_to(page.trimmed, voids, now),
                Standing::Diverged => {
                    self.lose(voids, now);
                    return Next::Replace(page.head);
                }
            },
            _ if page.head.epoch <= self.greatest => {
                self.lose(voids, now);
                return Next::Replace(page.head);
            }
            _ => {
                self.begin(page.head.epoch, voids, now);
                self.miss_up_to(page.trimmed, voids, now);
            }
        }
        for (seq, void) in (page.first..).zip(page.voids) {
            match void {
                Some(void) if !self.fits(seq, &void) => {
                    self.lose(voids, now);
                    return Next::Replace(page.head);
                }
                Some(void) => self.take_void(seq, void, voids, now),
                None => self.miss_up_to(seq, voids, now),
            }
        }
        self.swept = self.swept.max(page.swept);
        self.let_go(page.trimmed, 0, voids);
        match self.log {
            Log::Known(at) if at.seq >= page.head.seq => {
                // What was said to be in the log and is not there is added again.
                self.held.iter_mut().for_each(|held| held.stands = None);
                Next::Synced
            }
            _ => Next::More,
        }
    }

    /// Lets go of voids up to `until`, all but `kept`.
    fn let_go(&mut self, until: u64, kept: usize, voids: &Voids) {
        let mut last = None;
        while self.voids.len() > kept && self.voids.front().is_some_and(|(seq, ..)| *seq <= until) {
            last = self.voids.pop_front().map(|(seq, ..)| seq);
        }
        if let Some(seq) = last {
            self.gone = (seq, voids.ask());
        }
    }

    /// The voids up to `seq` are not there any more: nobody knows what they concerned.
    fn miss_up_to(&mut self, seq: u64, voids: &Voids, now: Wall) {
        if let Log::Known(at) = &mut self.log
            && seq > at.seq
        {
            voids.add(Selection::all(), Effect::Remove, now);
            (at.seq, at.last) = (seq, VoidId::default());
            self.voids.push_back((seq, VoidId::default(), LoggedVoid::all()));
        }
    }

    /// Whether a void in this place fits what is known of the log. Messages and pages that cross may belong to two logs that had the same
    /// beginning.
    fn fits(&self, seq: u64, void: &InLog) -> bool {
        let Log::Known(at) = self.log else { return false };
        if seq == at.seq + 1 {
            return at.last == VoidId::default() || void.before.is_none_or(|before| before == at.last);
        }
        seq > at.seq || self.voids.iter().rev().find(|(known, ..)| *known == seq).is_none_or(|(_, id, _)| *id == void.id)
    }

    fn take_void(&mut self, seq: u64, InLog { id, void, .. }: InLog, voids: &Voids, now: Wall) {
        let Log::Known(at) = &mut self.log else { return };
        if seq <= at.seq {
            return;
        }
        // One that is held counts here already, and has since before this.
        let held = self.held.len();
        self.held.retain(|held| held.id != id || id == VoidId::default());
        if self.held.len() == held {
            voids.add(void.what.clone(), Effect::of_purge(void.soft), now);
        }
        (at.seq, at.last) = (seq, id);
        self.voids.push_back((seq, id, void));
    }

    /// A message says that a void was added.
    pub fn take_message(&mut self, stands: Stamp, void: InLog, voids: &Voids, now: Wall) -> Heard {
        if let Log::Known(at) = self.log
            && (at.epoch, at.seq + 1) == (stands.epoch, stands.seq)
            && self.fits(stands.seq, &void)
        {
            self.take_void(stands.seq, void, voids, now);
            return Heard::InOrder;
        }
        if self.knows(stands, void.id) {
            return Heard::InOrder;
        }
        // It counts whatever the log turns out to be.
        voids.add(void.void.what, Effect::of_purge(void.void.soft), now);
        Heard::Gap
    }

    /// A message says that another instance has a void that it cannot add, since Redis refuses writes.
    pub fn take_unlogged(&mut self, id: VoidId, void: LoggedVoid, voids: &Voids, now: Wall) {
        let known = self.held.iter().any(|held| held.id == id) || self.voids.iter().any(|(_, known, _)| *known == id);
        if !known {
            self.hold_for(id, void.clone(), self.bounds.patience.max(1));
            voids.add(void.what, Effect::of_purge(void.soft), now);
        }
    }

    /// The voids of which Redis is not swept, with their numbers, and what is known of the log. `None` if it cannot be trusted.
    #[must_use]
    pub fn to_sweep(&self) -> Option<(LogHead, Vec<(u64, LoggedVoid)>)> {
        let undone = self.voids.iter().filter(|(seq, ..)| *seq > self.swept).map(|(seq, _, void)| (*seq, void.clone()));
        self.position().map(|_| (self.known(), undone.collect()))
    }

    /// Redis was swept of what the voids up to `until` concern; `counts` says how many entries each concerned.
    pub fn take_swept(&mut self, epoch: u64, until: u64, counts: BTreeMap<u64, u64>, voids: &Voids) {
        let Log::Known(at) = self.log else { return };
        if at.epoch != epoch {
            return;
        }
        self.swept = self.swept.max(until.min(at.seq));
        self.let_go(self.swept, self.bounds.kept, voids);
        for (seq, count) in counts {
            // A second sweep finds nothing more.
            self.counts.entry(seq).or_insert(count);
        }
        while self.counts.len() > COUNTS {
            self.counts.pop_first();
        }
    }

    /// How many entries in Redis a void concerned, once that is known.
    #[must_use]
    pub fn count(&self, seq: u64) -> Option<u64> {
        self.counts.get(&seq).copied()
    }
}
