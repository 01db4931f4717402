//! Sweeping Redis of what is void: a walk through the names, a little at a time, by one instance of all.
//!
//! A sweep only makes room, and lets the log forget old voids; no request waits for it. Names tell what a void concerns
//! ([`NameParts`]), and the first bytes of an entry the place up to which it was checked against voids, so no entry's body is read,
//! but for the few whose names do not tell.
//!
//! One walk serves all voids that are known when it begins. A walk costs what there is in Redis, other people's keys included, so
//! walks are spaced: after one, none begins for as long as that one took, and what a client's change invalidated waits for company.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use redis::Value;
use tokio::time::{Instant, sleep, timeout};

use super::key::{NameParts, mark, target_mark};
use super::redis::{Named, RedisStore};
use super::void::view::{LogHead, LoggedVoid, Position};
use super::void::{ORDERS, Selection, glob};
use super::void_log::VoidLog;
use super::void_scripts::{Removal, Sweep};

/// Names that one step looks at: a fraction of a millisecond of Redis's time.
const STEP: usize = 400;
/// How long the right to sweep lasts without being renewed, in milliseconds.
const TURN: u64 = 5000;
/// How often it is renewed.
const RENEWAL: Duration = Duration::from_millis(TURN / 4);
/// Soft voids that are this many voids old are made hard, so that the log does not grow for ever.
const SOFT_KEPT: u64 = 500;
/// The pause where another instance sweeps, or Redis is away.
const PAUSE: Duration = Duration::from_millis(100);
/// How long invalidated targets wait for others to be swept with: their own entry was removed at once, only variants are left.
const COMPANY: Duration = Duration::from_secs(10);
/// Invalidated targets that wait no longer.
const CROWD: usize = 1000;
/// How often it is looked whether another instance gave a sweep up half-way.
const LOOK: Duration = Duration::from_secs(5);

/// Takes the right to sweep, or keeps it. `ARGV`: by whom, for how long.
const TAKE_TURN: &str = r"
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
";

/// Sweeps for as long as the program runs.
pub async fn run(store: Arc<RedisStore>, log: Arc<VoidLog>) {
    let worker = Worker { name: format!("{}:worker", log.scripts().head()), id: format!("{:016x}", fastrand::u64(..)), store, log };
    let mut changes = worker.log.changes();
    let mut swept = Position::default();
    let mut waiting_since = None;
    loop {
        let is_new = |at: Position, voids: &[(u64, LoggedVoid)]| at.epoch != swept.epoch || voids.iter().any(|(seq, _)| *seq > swept.seq);
        let Some((known, voids)) = worker.log.to_sweep().filter(|(known, voids)| is_new(known.at, voids)) else {
            waiting_since = None;
            let _ = timeout(LOOK, changes.changed()).await;
            continue;
        };
        let since = *waiting_since.get_or_insert_with(Instant::now);
        let waits = wait_for_company(voids.iter().map(|(_, void)| void), since.elapsed());
        if !waits.is_zero() {
            let _ = timeout(waits, changes.changed()).await;
            continue;
        }
        let began = Instant::now();
        match worker.sweep(known, &voids).await {
            Some(()) => {
                (swept, waiting_since) = (known.at, None);
                sleep(began.elapsed()).await;
            }
            None => sleep(PAUSE.max(began.elapsed())).await,
        }
    }
}

/// How long a sweep for these voids waits, the first of which has waited for a while.
fn wait_for_company<'a>(voids: impl Iterator<Item = &'a LoggedVoid>, waited: Duration) -> Duration {
    let mut count = 0;
    for void in voids {
        count += 1;
        // A purge is waited for: its answer says how many entries it concerned.
        if !matches!(void.what, Selection::Target(_) | Selection::Entry(_)) || count >= CROWD {
            return Duration::ZERO;
        }
    }
    COMPANY.saturating_sub(waited)
}

struct Worker {
    /// The key of the right to sweep.
    name: String,
    id: String,
    store: Arc<RedisStore>,
    log: Arc<VoidLog>,
}

impl Worker {
    /// Sweeps for all of these; `None`: another instance does, or Redis failed.
    async fn sweep(&self, known: LogHead, voids: &[(u64, LoggedVoid)]) -> Option<()> {
        let at = known.at;
        // Of what stays, which a walk that was cut off counts anew; what is removed is counted in Redis.
        let mut counts: BTreeMap<u64, u64> = voids.iter().map(|(seq, _)| (*seq, 0)).collect();
        let judged: Vec<Judged<'_>> = voids.iter().map(|(seq, void)| Judged::new(*seq, void, at)).collect();
        if self.take_turn(TURN).await != Some(true) {
            return None;
        }
        let mut sweep = self.log.sweep(known).await?;
        let walking = self.walk((at, &mut sweep), &judged, &mut counts);
        with_turn(|| self.take_turn(TURN), walking).await?;
        let left = judged.iter().filter(|judged| !judged.removes).map(|judged| judged.seq - 1).min();
        let told = self.log.swept(at, sweep, left.unwrap_or(at.seq).min(at.seq), &counts).await;
        // Others need not wait for the turn to end.
        self.take_turn(1).await;
        told.then_some(())
    }

    /// Walks through all names.
    async fn walk(&self, (at, sweep): (Position, &mut Sweep), judged: &[Judged<'_>], counts: &mut BTreeMap<u64, u64>) -> Option<()> {
        let mut cursor = 0_u64;
        loop {
            let names;
            (cursor, names) = self.store.scan(cursor, STEP).await?;
            self.judge((at, &mut *sweep), judged, &names, counts).await?;
            if cursor == 0 {
                return Some(());
            }
            // Others' calls come in between.
            tokio::task::yield_now().await;
        }
    }

    /// Takes the right to sweep, or keeps it, for this many milliseconds. `None`: Redis did not say.
    async fn take_turn(&self, millis: u64) -> Option<bool> {
        let mut command = redis::cmd("EVAL");
        command.arg(TAKE_TURN).arg(1).arg(&self.name).arg(&self.id).arg(millis);
        match self.store.link().call(&command).await {
            Ok(Value::Int(taken)) => Some(taken == 1),
            _ => None,
        }
    }

    async fn judge(
        &self,
        (at, sweep): (Position, &mut Sweep),
        judged: &[Judged<'_>],
        names: &[Vec<u8>],
        counts: &mut BTreeMap<u64, u64>,
    ) -> Option<()> {
        let mut removals: Vec<Removal<'_>> = Vec::new();
        for name in names {
            let concerned = self.concerned(judged, name).await?;
            // The newest void that removes it, or else the newest one that does not; and all that count it.
            let newest = concerned.iter().filter(|void| void.removes).max_by_key(|void| void.seq);
            let Some(chosen) = newest.or(concerned.last()) else { continue };
            let counted_by = concerned.iter().map(|void| void.seq).collect();
            removals.push(Removal { name, seq: chosen.seq, removes: chosen.removes, counted_by });
        }
        if removals.is_empty() {
            return Some(());
        }
        let left = self.log.remove(at, sweep, &removals).await?;
        for (removal, _) in removals.iter().zip(left).filter(|(_, left)| *left == 1) {
            for seq in &removal.counted_by {
                *counts.entry(*seq).or_default() += 1;
            }
        }
        Some(())
    }

    /// The voids that concern what stands under a name; `None`: Redis failed, and nobody knows. The entry is read where the name does
    /// not tell; one that cannot be read is taken for concerned, since an instance with another key may read it.
    async fn concerned<'j, 'v>(&self, judged: &'j [Judged<'v>], name: &[u8]) -> Option<Vec<&'j Judged<'v>>> {
        let Some(parts) = NameParts::read(name, self.store.namespace()) else { return Some(Vec::new()) };
        let mut read = None;
        let mut concerned = Vec::new();
        for void in judged {
            let is_concerned = match (void.concerns(&parts), &read) {
                (Some(known), _) => known,
                (None, Some(named)) => void.concerns_named(named),
                (None, None) => void.concerns_named(read.insert(self.store.read_named(name).await.ok()?)),
            };
            if is_concerned {
                concerned.push(void);
            }
        }
        Some(concerned)
    }
}

/// Walks while the turn is ours; `None`: another instance has it, or Redis failed. It is renewed by time, however long a step takes: one that
/// reads large entries may take longer than a turn, and whoever took it then would lose it in the same place. A renewal that Redis does
/// not answer ends nothing: if another instance takes the turn, the next one says so.
async fn with_turn<T, R>(renew: impl Fn() -> R, walking: impl Future<Output = Option<T>>) -> Option<T>
where
    R: Future<Output = Option<bool>>,
{
    let lost = async {
        loop {
            sleep(RENEWAL).await;
            if renew().await == Some(false) {
                return;
            }
        }
    };
    tokio::select! {
        walked = walking => walked,
        () = lost => None,
    }
}

/// A void with what is looked for in names.
struct Judged<'a> {
    seq: u64,
    void: &'a LoggedVoid,
    mark: Option<String>,
    removes: bool,
}

impl<'a> Judged<'a> {
    fn new(seq: u64, void: &'a LoggedVoid, at: Position) -> Self {
        let mark = match &void.what {
            Selection::Pattern(_) | Selection::Entry(_) => None,
            Selection::Tag(tag) => Some(mark(tag.as_bytes())),
            Selection::Target(target) => Some(target_mark(*target)),
        };
        Self { seq, void, mark, removes: !void.soft || seq + SOFT_KEPT <= at.seq }
    }

    /// Whether it concerns the entry of a name. `None`: the name does not tell.
    fn concerns(&self, parts: &NameParts<'_>) -> Option<bool> {
        match (&self.void.what, &self.mark) {
            (_, Some(mark)) => parts.has(mark),
            (Selection::Entry(digest), _) => Some(parts.is_of(*digest)),
            (Selection::Pattern(pattern), _) if glob(pattern.as_bytes(), parts.readable.as_bytes()) && parts.marks.is_some() => Some(true),
            (Selection::Pattern(_), _) if parts.marks.is_none() || parts.readable.starts_with(ORDERS) => None,
            _ => Some(false),
        }
    }

    /// Whether it concerns what was read.
    fn concerns_named(&self, named: &Named) -> bool {
        match named {
            Named::Entry(entry) => self.void.what.concerns(entry),
            Named::Unreadable => true,
            Named::Gone => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::key::{Canonical, Key, entry_digest};
    use crate::cache::void::view::VoidId;
    use bytes::Bytes;
    use std::cell::Cell;
    use std::future::{pending, ready};

    fn at(seq: u64) -> Position {
        Position { epoch: 1, seq, last: VoidId(9) }
    }

    fn name(readable: &str, tags: &[&str]) -> String {
        let tags = tags.iter().map(|&tag| tag.to_owned()).collect();
        Key::of(Canonical(Bytes::from_static(b"c")), readable.to_owned(), tags, 9).name("ns").to_owned()
    }

    #[test]
    fn names_tell_what_a_void_concerns() {
        for (what, readable, tags, expected) in [
            (Selection::Pattern("liq:*".into()), "liq:BTC", &["t"][..], Some(true)),
            (Selection::Pattern("liq:*".into()), "orders:BTC", &[], Some(false)),
            (Selection::Pattern("liq:*".into()), "timeline:BTC:1", &[], None),
            (Selection::Tag("t".into()), "liq:BTC", &["s", "t"], Some(true)),
            (Selection::Tag("t".into()), "timeline:BTC:1", &["s"], Some(false)),
            (Selection::Tag("t".into()), "liq:BTC", &["1", "2", "3", "4", "5", "6", "7", "8", "9"], None),
            (Selection::Target(9), "liq:BTC", &["t"], Some(true)),
            (Selection::Target(8), "liq:BTC", &["t"], Some(false)),
            (Selection::Entry(entry_digest(b"c")), "liq:BTC", &["t"], Some(true)),
            (Selection::Entry(entry_digest(b"d")), "liq:BTC", &["t"], Some(false)),
            (Selection::Pattern("*".into()), "timeline:BTC:1", &[], Some(true)),
        ] {
            let void = LoggedVoid { what, soft: false };
            let name = name(readable, tags);
            let parts = NameParts::read(name.as_bytes(), "ns").unwrap();
            assert_eq!(Judged::new(1, &void, at(600)).concerns(&parts), expected, "{void:?} {name}");
        }
    }

    #[test]
    fn soft_voids_remove_nothing_until_they_are_old() {
        let soft = LoggedVoid { what: Selection::Tag("t".into()), soft: true };
        assert!(!Judged::new(500, &soft, at(600)).removes && Judged::new(100, &soft, at(600)).removes);
    }

    #[test]
    fn what_cannot_be_read_counts_as_concerned_and_what_is_no_entry_does_not() {
        let void = LoggedVoid { what: Selection::Tag("t".into()), soft: false };
        let judged = Judged::new(1, &void, at(600));
        assert!(judged.concerns_named(&Named::Unreadable) && !judged.concerns_named(&Named::Gone));
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_renewed_in_time_however_long_a_step_takes() {
        let turn = Duration::from_millis(TURN);
        let until = Cell::new(Instant::now() + turn);
        let tries = Cell::new(0);
        let renew = || {
            assert!(Instant::now() < until.get(), "another instance takes it");
            tries.set(tries.get() + 1);
            // Redis does not answer each time.
            let is_answered = tries.get() % 3 > 0;
            if is_answered {
                until.set(Instant::now() + turn);
            }
            ready(is_answered.then_some(true))
        };
        let step = async {
            sleep(turn * 10).await;
            Some(1)
        };
        assert_eq!(with_turn(renew, step).await, Some(1));
        assert!(tries.get() >= 30 && Instant::now() < until.get());
    }

    #[tokio::test(start_paused = true)]
    async fn a_walk_ends_when_another_instance_has_the_turn() {
        assert_eq!(with_turn(|| ready(Some(false)), pending::<Option<()>>()).await, None);
    }

    #[test]
    fn purges_are_swept_at_once_and_changes_together() {
        let target = LoggedVoid { what: Selection::Target(1), soft: false };
        let purge = LoggedVoid { what: Selection::Tag("t".into()), soft: false };
        let waits = |voids: &[&LoggedVoid], waited| wait_for_company(voids.iter().copied(), Duration::from_secs(waited));
        assert_eq!(waits(&[&target], 3), COMPANY - Duration::from_secs(3));
        assert!(waits(&[&target], 60).is_zero() && waits(&[&target, &purge], 0).is_zero());
        assert!(waits(&vec![&target; CROWD], 0).is_zero());
    }
}
