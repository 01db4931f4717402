//! Working off voids in Redis: a walk through the names, a little at a time, by one instance of all.
//!
//! Names tell what a void concerns ([`NameParts`]), and the first bytes of an entry the position up to which it was held against
//! voids, so no entry's body is read, but for the few whose names could not tell.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use redis::Value;
use tokio::time::{sleep, timeout};

use super::key::{NameParts, mark, target_mark};
use super::redis::RedisStore;
use super::void::{ORDERS, Selection, glob};
use super::void_log::{LoggedVoid, Position, VoidLog};

/// Names that one step looks at: a fraction of a millisecond of Redis's time.
const STEP: usize = 400;
/// How long the right to work lasts without being renewed, in milliseconds.
const TURN: u64 = 5000;
/// Soft voids that are so many voids old are made hard, so that the log does not grow for ever.
const SOFT_KEPT: u64 = 500;
/// How long it is waited where another instance works, or Redis is away.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes the right to work, or keeps it. `ARGV`: who, for how long.
const TAKE_TURN: &str = r"
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
";

/// Removes entries that are older than a void, and counts them in the same moment, so that no number is lost with a worker that is cut
/// off. `KEYS`: the counts, and the entries. `ARGV`: the epoch's bytes, then for each entry the void's number, whether it is removed,
/// and the numbers of all voids that count it. Returns which ones are older and were left.
const REMOVE: &str = r"
local left = {}
for i = 2, #KEYS do
  local at = 3 * i - 4
  local stamp = redis.call('GETRANGE', KEYS[i], 0, 15)
  local older = #stamp == 16 and (stamp:sub(1, 8) ~= ARGV[1] or stamp:sub(9, 16) < ARGV[at])
  local removes = ARGV[at + 1] == '1'
  if older and removes then
    redis.call('UNLINK', KEYS[i])
    for seq in ARGV[at + 2]:gmatch('%d+') do redis.call('HINCRBY', KEYS[1], seq, 1) end
  end
  left[i - 1] = older and not removes and 1 or 0
end
redis.call('EXPIRE', KEYS[1], 86400)
return left
";

/// Works voids off for as long as the program runs.
pub async fn run(store: Arc<RedisStore>, log: Arc<VoidLog>) {
    let worker = Worker { name: format!("{}:worker", log.head()), id: format!("{:016x}", fastrand::u64(..)), store, log };
    let mut changes = worker.log.changes();
    let mut worked_off = Position::default();
    loop {
        let (at, undone) = worker.log.undone();
        let same = at.epoch == worked_off.epoch;
        if !undone.iter().any(|(seq, _)| !same || *seq > worked_off.seq) {
            // Looked at now and then too: another instance may have given up half-way.
            let _ = timeout(PAUSE * 50, changes.changed()).await;
            continue;
        }
        match worker.work_off(at, &undone).await {
            Some(()) => worked_off = at,
            None => sleep(PAUSE).await,
        }
    }
}

struct Worker {
    /// The key of the right to work.
    name: String,
    id: String,
    store: Arc<RedisStore>,
    log: Arc<VoidLog>,
}

impl Worker {
    /// Works all of these off; `None`: another instance does, or Redis failed.
    async fn work_off(&self, at: Position, voids: &[(u64, LoggedVoid)]) -> Option<()> {
        // Of what stays, which a walk that was cut off counts anew; what is removed is counted in Redis.
        let mut counts: BTreeMap<u64, u64> = voids.iter().map(|(seq, _)| (*seq, 0)).collect();
        let judged: Vec<Judged<'_>> = voids.iter().map(|(seq, void)| Judged::new(*seq, void, at)).collect();
        let mut cursor = 0_u64;
        let mut step = 0_u32;
        loop {
            if step.is_multiple_of(50) && !self.take_turn(TURN).await {
                return None;
            }
            step = step.wrapping_add(1);
            let names;
            (cursor, names) = self.store.scan(cursor, STEP).await?;
            self.judge(at, &judged, &names, &mut counts).await?;
            if cursor == 0 {
                break;
            }
            // Others' calls come in between.
            tokio::task::yield_now().await;
        }
        let left = judged.iter().filter(|judged| !judged.removes).map(|judged| judged.seq - 1).min();
        let told = self.log.done(Position { seq: left.unwrap_or(at.seq).min(at.seq), ..at }, &counts).await;
        // Others need not wait for the turn to end.
        self.take_turn(1).await;
        told.then_some(())
    }

    /// Takes the right to work, or keeps it, for so long.
    async fn take_turn(&self, millis: u64) -> bool {
        let mut command = redis::cmd("EVAL");
        command.arg(TAKE_TURN).arg(1).arg(&self.name).arg(&self.id).arg(millis);
        matches!(self.store.link().call(&command).await, Ok(Value::Int(1)))
    }

    async fn judge(&self, at: Position, judged: &[Judged<'_>], names: &[Vec<u8>], counts: &mut BTreeMap<u64, u64>) -> Option<()> {
        // For each name that is concerned: the newest void that removes it, or else the newest one that does not, and all that count it.
        let mut found: Vec<(&Vec<u8>, &Judged<'_>, Vec<u64>)> = Vec::new();
        for name in names {
            let Some(parts) = NameParts::read(name, self.store.namespace()) else { continue };
            let mut concerned: Vec<&Judged<'_>> = Vec::new();
            for void in judged {
                let is_concerned = match void.concerns(&parts) {
                    Some(known) => known,
                    None => self.store.read_named(name).await.is_some_and(|entry| void.void.what.concerns(&entry)),
                };
                if is_concerned {
                    concerned.push(void);
                }
            }
            let newest = concerned.iter().filter(|void| void.removes).max_by_key(|void| void.seq);
            let Some(chosen) = newest.or(concerned.last()) else { continue };
            found.push((name, chosen, concerned.iter().map(|void| void.seq).collect()));
        }
        if found.is_empty() {
            return Some(());
        }
        let mut command = redis::cmd("EVAL");
        command.arg(REMOVE).arg(found.len() + 1).arg(self.log.removed_name(at));
        for (name, ..) in &found {
            command.arg(&name[..]);
        }
        command.arg(&at.epoch.to_be_bytes()[..]);
        for (_, chosen, seqs) in &found {
            let counting = seqs.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
            command.arg(&chosen.seq.to_be_bytes()[..]).arg(u8::from(chosen.removes)).arg(counting);
        }
        let answer = self.store.link().call(&command).await.ok()?;
        let left: Vec<i64> = redis::from_redis_value(answer).ok()?;
        for ((_, _, seqs), _) in found.iter().zip(left).filter(|(_, left)| *left == 1) {
            for seq in seqs {
                *counts.entry(*seq).or_default() += 1;
            }
        }
        Some(())
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
            Selection::Pattern(_) => None,
            Selection::Tag(tag) => Some(mark(tag.as_bytes())),
            Selection::Target(target) => Some(target_mark(*target)),
        };
        Self { seq, void, mark, removes: !void.soft || seq + SOFT_KEPT <= at.seq }
    }

    /// Whether it concerns the entry of a name. `None`: the name does not tell.
    fn concerns(&self, parts: &NameParts<'_>) -> Option<bool> {
        match (&self.void.what, &self.mark) {
            (_, Some(mark)) => parts.has(mark),
            (Selection::Pattern(pattern), _) if glob(pattern.as_bytes(), parts.readable.as_bytes()) && parts.marks.is_some() => Some(true),
            (Selection::Pattern(_), _) if parts.marks.is_none() || parts.readable.starts_with(ORDERS) => None,
            _ => Some(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::key::{Canonical, Key};
    use bytes::Bytes;

    fn name(readable: &str, tags: &[&str]) -> String {
        let tags = tags.iter().map(|&tag| tag.to_owned()).collect();
        Key::of(Canonical(Bytes::from_static(b"c")), readable.to_owned(), tags, 9).name("ns").to_owned()
    }

    #[test]
    fn names_tell_what_a_void_concerns() {
        let at = Position { epoch: 1, seq: 600 };
        for (what, readable, tags, expected) in [
            (Selection::Pattern("liq:*".into()), "liq:BTC", &["t"][..], Some(true)),
            (Selection::Pattern("liq:*".into()), "orders:BTC", &[], Some(false)),
            (Selection::Pattern("liq:*".into()), "timeline:BTC:1", &[], None),
            (Selection::Tag("t".into()), "liq:BTC", &["s", "t"], Some(true)),
            (Selection::Tag("t".into()), "timeline:BTC:1", &["s"], Some(false)),
            (Selection::Tag("t".into()), "liq:BTC", &["1", "2", "3", "4", "5", "6", "7", "8", "9"], None),
            (Selection::Target(9), "liq:BTC", &["t"], Some(true)),
            (Selection::Target(8), "liq:BTC", &["t"], Some(false)),
            (Selection::Pattern("*".into()), "timeline:BTC:1", &[], Some(true)),
        ] {
            let void = LoggedVoid { what, soft: false };
            let name = name(readable, tags);
            let parts = NameParts::read(name.as_bytes(), "ns").unwrap();
            assert_eq!(Judged::new(1, &void, at).concerns(&parts), expected, "{void:?} {name}");
        }
    }

    #[test]
    fn soft_voids_remove_nothing_until_they_are_old() {
        let at = Position { epoch: 1, seq: 600 };
        let soft = LoggedVoid { what: Selection::Tag("t".into()), soft: true };
        assert!(!Judged::new(500, &soft, at).removes && Judged::new(100, &soft, at).removes);
    }
}
