//! A model of what the scripts do in Redis ([`void_scripts`](crate::cache::void_scripts)), with smaller bounds, so that pages and
//! trimming are common.

use std::collections::{BTreeMap, BTreeSet};

use super::breaks::{Break, nothing};
use crate::cache::void::view::{InLog, LogHead, LogPage, LoggedVoid, Page, Position, Stamp, Standing, VoidId};

/// Voids that are read in one step.
const PAGE: u64 = 2;
/// Voids that stay in the log once Redis is swept.
const KEPT: u64 = 1;
/// Voids that the log holds at most.
const MOST: u64 = 16;

/// An entry in Redis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    pub stamp: Stamp,
    /// The step at which the backend was read.
    pub value: u64,
    /// Whether it may be served only if a fetch fails.
    pub doubtful: bool,
}

/// The state of one Redis.
#[derive(Clone, Debug, Default)]
pub(super) struct Redis {
    head: Option<Head>,
    pub entries: BTreeMap<usize, Stored>,
    /// Which voids hold for an instance that has read this log. It is the truth, which no instance sees.
    pub reflected: BTreeSet<usize>,
    /// Full, or read-only: reads work.
    pub refuses: bool,
}

#[derive(Clone, Debug, Default)]
struct Head {
    epoch: u64,
    seq: u64,
    last: VoidId,
    swept: u64,
    trimmed: u64,
    /// The sweep under way, and its steps.
    sweep: (u64, u64),
    voids: BTreeMap<u64, InLog>,
}

impl Head {
    fn position(&self) -> Position {
        Position { epoch: self.epoch, seq: self.seq, last: self.last }
    }

    fn has(&self, seq: u64, id: VoidId) -> bool {
        self.voids.get(&seq).is_some_and(|known| known.id == id || id == VoidId::default())
    }
}

impl Redis {
    /// The log is evicted, or somebody deletes it.
    pub fn lose_log(&mut self, broken: Option<Break>) {
        match &mut self.head {
            // As if the voids stood under a key of their own.
            Some(head) if broken == Some(Break::LogBesideHead) => head.voids.clear(),
            _ => {
                self.head = None;
                self.reflected.clear();
            }
        }
    }

    /// Somebody deletes one void.
    pub fn lose_one(&mut self, which: usize) {
        if let Some(head) = self.head.as_mut().filter(|head| !head.voids.is_empty()) {
            let seq = head.voids.keys().copied().nth(which % head.voids.len());
            seq.and_then(|seq| head.voids.remove(&seq));
        }
    }

    pub fn flush(&mut self) {
        *self = Self { refuses: self.refuses, ..Self::default() };
    }

    pub fn look(&self) -> Option<LogHead> {
        self.head.as_ref().map(|head| LogHead { at: head.position(), swept: head.swept })
    }

    fn position(&self) -> Option<Position> {
        self.head.as_ref().map(Head::position)
    }

    pub fn read(&self, known: LogHead, broken: Option<Break>) -> Page {
        let LogHead { at: from, swept } = known;
        let Some(head) = &self.head else { return Page::Absent };
        let mut known = from.seq;
        let standing = if head.epoch != from.epoch {
            known = 0;
            Standing::Part
        } else if known > head.seq || (known == head.seq && head.last != from.last) || head.swept < swept {
            Standing::Diverged
        } else if known < head.trimmed || (known == head.trimmed && known > 0) {
            Standing::Forgotten
        } else if known > 0 && known < head.seq && !head.has(known, from.last) {
            Standing::Diverged
        } else {
            Standing::Part
        };
        let standing = if broken == Some(Break::AlwaysPart) { Standing::Part } else { standing };
        let first = known.max(head.trimmed) + 1;
        let mut voids: Vec<_> = (first..=head.seq.min(first + PAGE - 1)).map(|seq| head.voids.get(&seq).cloned()).collect();
        if broken == Some(Break::LogBesideHead) {
            voids = voids.into_iter().map(|void| void.or_else(|| Some(InLog { id: VoidId(1), before: None, void: nothing() }))).collect();
        }
        Page::Log(LogPage { head: head.position(), swept: head.swept, trimmed: head.trimmed, standing, first, voids })
    }

    /// `false`: refused.
    pub fn begin(&mut self, epoch: u64, made: usize) -> bool {
        if self.refuses {
            return false;
        }
        if self.head.is_none() {
            self.start(epoch, made);
        }
        true
    }

    fn start(&mut self, epoch: u64, made: usize) {
        self.head = Some(Head { epoch, ..Head::default() });
        // Who takes up a new log doubts all that was asked for before.
        self.reflected = (0..made).collect();
    }

    /// `false`: refused.
    pub fn replace(&mut self, read: Position, epoch: u64, made: usize) -> bool {
        if self.refuses {
            return false;
        }
        if self.position() == Some(read) {
            self.start(epoch, made);
        }
        true
    }

    /// Adds a void, which stands for those of the numbers `truths`; `None`: refused.
    pub fn add(&mut self, id: VoidId, void: &LoggedVoid, truths: &[usize], made: usize, epoch: u64) -> Option<(Stamp, InLog)> {
        if self.refuses {
            return None;
        }
        if self.head.as_ref().is_none_or(|head| head.seq - head.trimmed >= MOST) {
            self.start(epoch, made);
        }
        let head = self.head.get_or_insert_default();
        head.seq += 1;
        let void = InLog { id, before: Some(head.last), void: void.clone() };
        head.last = id;
        head.voids.insert(head.seq, void.clone());
        self.reflected.extend(truths);
        Some((Stamp { epoch: head.epoch, seq: head.seq }, void))
    }

    /// `None`: refused; `false`: the log is not where it was.
    pub fn write(&mut self, key: usize, at: Position, entry: Stored, broken: Option<Break>) -> Option<bool> {
        if self.refuses {
            return None;
        }
        let fits = self.position() == Some(at) || broken == Some(Break::WritesAnywhere);
        if fits {
            self.entries.insert(key, entry);
        }
        Some(fits)
    }

    /// Begins a sweep.
    pub fn sweep(&mut self, known: LogHead, name: u64) {
        if let Some(head) = self.head.as_mut().filter(|head| head.epoch == known.at.epoch && head.swept >= known.swept) {
            head.sweep = (name, 0);
        }
    }

    /// Whether this is the next step of the sweep under way.
    pub fn remove(&mut self, key: usize, at: Position, seq: u64, sweep: (u64, u64), broken: Option<Break>) -> bool {
        let Some(head) = self.head.as_mut().filter(|head| head.sweep == sweep) else {
            return false;
        };
        head.sweep.1 += 1;
        let older = |stamp: Stamp| match broken {
            Some(Break::NumbersAsText) => stamp.epoch != at.epoch || stamp.seq.to_string() < seq.to_string(),
            _ => stamp.epoch != at.epoch || stamp.seq < seq,
        };
        if self.entries.get(&key).is_some_and(|entry| older(entry.stamp)) {
            self.entries.remove(&key);
        }
        true
    }

    /// Whether it was noted.
    pub fn swept(&mut self, at: Position, upto: u64, sweep: (u64, u64)) -> bool {
        let Some(head) = self.head.as_mut().filter(|_| !self.refuses) else { return false };
        if head.sweep != sweep {
            return false;
        }
        if head.epoch != at.epoch || at.seq > head.seq || (at.seq > head.trimmed && !head.has(at.seq, at.last)) {
            return false;
        }
        head.swept = head.swept.max(upto);
        let upto = head.swept.min(head.seq.saturating_sub(KEPT));
        if upto > head.trimmed {
            head.voids.retain(|seq, _| *seq > upto);
            head.trimmed = upto;
        }
        true
    }
}
