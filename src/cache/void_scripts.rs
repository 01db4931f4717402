//! The log of voids as Redis keeps it: the scripts that read and change it, and what they answer.
//!
//! ```text
//! NAMESPACE!voids                  hash: epoch, seq and last (the newest void's number and name), swept, trimmed,
//!                                  sweep and steps (of the sweep under way), and each void that is kept, as JSON, under
//!                                  its number
//! NAMESPACE!voids                  channel: "void EPOCH SEQ JSON", "unlogged 0 JSON", "swept EPOCH JSON"
//! NAMESPACE!voids:removed:EPOCH    hash: how many entries were removed for each void
//! ```
//!
//! All of the log is one key, so that it is evicted or lost as a whole, which is noticed. Each script takes one step, or none.
//! Numbers are compared as numbers: what Lua says of two texts depends on the locale of the server.

use std::collections::BTreeMap;

use redis::{Cmd, ErrorKind, RedisError, Value};
use serde::Deserialize;

use super::void::view::{InLog, LogHead, LogPage, LoggedVoid, Page, Position, Stamp, Standing, VoidId};

/// Voids that are read in one step.
const PAGE: u64 = 1000;
/// Voids that stay in the log although Redis is swept of what they concern, for instances that were away.
const KEPT: u64 = 1000;
/// Voids that the log holds at most. If nobody sweeps Redis (the user may not `SCAN`, say), it begins anew then.
const MOST: u64 = 100_000;

/// Reads what follows a position. `ARGV`: its epoch, seq and last, how many voids at most, and how far Redis is known to be swept. Writes
/// nothing, so it runs on a Redis
/// that is full or read-only.
const READ: &str = r#"
local head = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'last', 'swept', 'trimmed')
if not head[1] then return {} end
local seq, trimmed, known = tonumber(head[2] or '0'), tonumber(head[5] or '0'), tonumber(ARGV[2])
local standing = 'part'
if head[1] ~= ARGV[1] then
  known = 0
elseif known > seq or (known == seq and (head[3] or '') ~= ARGV[3]) or tonumber(head[4] or '0') < tonumber(ARGV[5]) then
  standing = 'diverged'
elseif known < trimmed or (known == trimmed and known > 0) then
  standing = 'forgotten'
elseif known > 0 and known < seq then
  local text = redis.call('HGET', KEYS[1], ARGV[2])
  if not text or not text:find('"id":"' .. ARGV[3], 1, true) then standing = 'diverged' end
end
local first = math.max(known, trimmed) + 1
local names = {}
for number = first, math.min(seq, first + tonumber(ARGV[4]) - 1) do names[#names + 1] = string.format('%d', number) end
local voids = {}
if #names > 0 then voids = redis.call('HMGET', KEYS[1], unpack(names)) end
return {head[1], seq, head[3] or '', tonumber(head[4] or '0'), trimmed, standing, first, voids}
"#;

/// Begins a log where there is none. `ARGV`: the epoch.
const BEGIN: &str = r"
return redis.call('HSETNX', KEYS[1], 'epoch', ARGV[1])
";

/// Begins a log in place of another one, if that is still what was read. `ARGV`: its epoch, seq and last; the epoch.
const REPLACE: &str = r"
local head = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'last')
if head[1] ~= ARGV[1] or tonumber(head[2] or '0') ~= tonumber(ARGV[2]) or (head[3] or '') ~= ARGV[3] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'epoch', ARGV[4])
return 1
";

/// Adds a void. `ARGV`: the epoch to begin with, the void, its name, how many voids a log holds. Returns the epoch and the number.
const ADD: &str = r#"
local head = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'trimmed', 'last')
local epoch, before = head[1], head[4] or ''
if epoch and tonumber(head[2] or '0') - tonumber(head[3] or '0') >= tonumber(ARGV[4]) then
  redis.call('DEL', KEYS[1])
  epoch = false
end
if not epoch then
  epoch, before = ARGV[1], ''
  redis.call('HSET', KEYS[1], 'epoch', epoch)
end
local text = ARGV[2]:sub(1, -2) .. ',"before":"' .. before .. '"}'
local seq = string.format('%d', redis.call('HINCRBY', KEYS[1], 'seq', 1))
redis.call('HSET', KEYS[1], seq, text, 'last', ARGV[3])
redis.call('PUBLISH', KEYS[1], 'void ' .. epoch .. ' ' .. seq .. ' ' .. text)
return {epoch, seq}
"#;

/// Begins a sweep. `ARGV`: the epoch; how far Redis is thought to be swept, from where on the sweep goes; the sweep's name.
const SWEEP: &str = r"
local head = redis.call('HMGET', KEYS[1], 'epoch', 'swept')
if head[1] ~= ARGV[1] or tonumber(head[2] or '0') < tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], 'sweep', ARGV[3], 'steps', 0)
return 1
";

/// Notes that Redis is swept of what voids concern, forgets old ones of them, and says how many entries each concerned: those that were
/// left, and those that the second key counted as they were removed. Not if Redis went on from an older state since the sweep began:
/// then removed entries are back. `ARGV`: epoch, seq and last of the position up to which voids are known; the number up to which
/// Redis is swept; how many voids are kept; the sweep's name and its steps; then each void's number and how many were left.
/// Returns what it says.
const SWEPT: &str = r#"
local head = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'swept', 'trimmed', 'sweep', 'steps')
if head[1] ~= ARGV[1] or head[5] ~= ARGV[6] or head[6] ~= ARGV[7] then return 0 end
local seq, trimmed, known = tonumber(head[2] or '0'), tonumber(head[4] or '0'), tonumber(ARGV[2])
local text = redis.call('HGET', KEYS[1], ARGV[2])
if known > seq or (known > trimmed and not (text and text:find('"id":"' .. ARGV[3], 1, true))) then return 0 end
local counts = {}
for i = 8, #ARGV, 2 do
  counts[ARGV[i]] = tonumber(ARGV[i + 1]) + tonumber(redis.call('HGET', KEYS[2], ARGV[i]) or 0)
end
-- Kept for an instance that does not get this answer and asks again.
if redis.call('HLEN', KEYS[2]) > 10000 then redis.call('DEL', KEYS[2]) end
local swept = math.max(tonumber(ARGV[4]), tonumber(head[3] or '0'))
redis.call('HSET', KEYS[1], 'swept', string.format('%d', swept))
local upto = math.min(swept, seq - tonumber(ARGV[5]))
if upto > trimmed then
  for number = trimmed + 1, upto do redis.call('HDEL', KEYS[1], string.format('%d', number)) end
  redis.call('HSET', KEYS[1], 'trimmed', string.format('%d', upto))
end
local told = 'swept ' .. ARGV[1] .. ' ' .. cjson.encode({upto = tonumber(ARGV[4]), counts = counts})
redis.call('PUBLISH', KEYS[1], told)
return told
"#;

/// Writes an entry if the log is where it was when the entry was checked against it. `ARGV`: epoch, seq, last, entry, lifetime in
/// milliseconds.
const WRITE: &str = r"
local head = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'last')
if head[1] ~= ARGV[1] or (head[2] or '0') ~= ARGV[2] or (head[3] or '') ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[5])
return 1
";

/// Removes entries that are older than a void, and counts them in the same step, so that no count is lost with an instance that is cut
/// off. `KEYS`: the head, the counts, and the entries. `ARGV`: the sweep's name and its steps so far, the epoch's bytes, then for each
/// entry the void's number, whether it is removed, and the numbers of all voids that count it. Returns which ones are older and were
/// left; nothing if this is not the next step of that sweep.
const REMOVE: &str = r"
local function number(bytes)
  local value = 0
  for i = 1, 8 do value = value * 256 + bytes:byte(i) end
  return value
end
local sweep = redis.call('HMGET', KEYS[1], 'sweep', 'steps')
if sweep[1] ~= ARGV[1] or sweep[2] ~= ARGV[2] then return {} end
redis.call('HINCRBY', KEYS[1], 'steps', 1)
local left, removed = {}, {}
for i = 3, #KEYS do
  local at = 3 * i - 5
  local stamp = redis.call('GETRANGE', KEYS[i], 0, 15)
  local older = #stamp == 16 and (stamp:sub(1, 8) ~= ARGV[3] or number(stamp:sub(9, 16)) < tonumber(ARGV[at]))
  local removes = ARGV[at + 1] == '1'
  if older and removes then
    redis.call('UNLINK', KEYS[i])
    for seq in ARGV[at + 2]:gmatch('%d+') do removed[seq] = (removed[seq] or 0) + 1 end
  end
  left[i - 2] = older and not removes and 1 or 0
end
for seq, count in pairs(removed) do redis.call('HINCRBY', KEYS[2], seq, count) end
redis.call('EXPIRE', KEYS[2], 86400)
return left
";

/// A sweep under way: its name, and how often it has removed something. A Redis that went on from an older state does not know it, or
/// knows fewer steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    name: u64,
    steps: u64,
}

impl Sweep {
    /// One that begins.
    #[must_use]
    pub fn begin() -> Self {
        Self { name: fastrand::u64(1..), steps: 0 }
    }

    /// It has removed something once more.
    pub const fn step(&mut self) {
        self.steps += 1;
    }
}

/// Entries that one step of a sweep removes or leaves.
pub struct Removal<'a> {
    /// The name of the entry.
    pub name: &'a [u8],
    /// The number of the void: older entries are removed, or left.
    pub seq: u64,
    /// Whether they are removed.
    pub removes: bool,
    /// The numbers of all voids that count them.
    pub counted_by: Vec<u64>,
}

/// What a message says.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// A void was added.
    Void(Stamp, InLog),
    /// An instance has a void that it cannot add.
    Unlogged(InLog),
    /// Redis is swept of what the voids up to a number concern, and how many entries each concerned.
    Swept(u64, u64, BTreeMap<u64, u64>),
}

fn malformed() -> RedisError {
    RedisError::from((ErrorKind::Parse, "the log of voids is malformed"))
}

fn script(text: &str, keys: &[&str]) -> Cmd {
    let mut command = redis::cmd("EVAL");
    command.arg(text).arg(keys.len()).arg(keys);
    command
}

/// The name of a log's newest void as Redis has it: nothing before the first.
fn last_text(last: VoidId) -> String {
    if last == VoidId::default() { String::new() } else { last.text() }
}

fn epoch_text(epoch: u64) -> String {
    Position { epoch, ..Position::default() }.epoch_text()
}

/// Commands for the log of one namespace.
pub struct Scripts {
    head: String,
}

impl Scripts {
    /// Those of a namespace.
    #[must_use]
    pub fn new(namespace: &str) -> Self {
        Self { head: format!("{namespace}!voids") }
    }

    /// The log's key, which is the name of the channel too.
    #[must_use]
    pub fn head(&self) -> &str {
        &self.head
    }

    /// Where sweeps count what they remove.
    fn removed(&self, epoch: u64) -> String {
        format!("{}:removed:{}", self.head, epoch_text(epoch))
    }

    /// Reads what follows a position: [`page`].
    #[must_use]
    pub fn read(&self, known: LogHead) -> Cmd {
        let LogHead { at, swept } = known;
        let mut command = script(READ, &[&self.head]);
        command.arg(at.epoch_text()).arg(at.seq).arg(last_text(at.last)).arg(PAGE).arg(swept);
        command
    }

    /// Reads the head of the log alone: [`head`].
    #[must_use]
    pub fn look(&self) -> redis::Pipeline {
        let mut look = redis::pipe();
        look.cmd("HMGET").arg(&self.head).arg("epoch").arg("seq").arg("last").arg("swept");
        look
    }

    /// Begins a log.
    #[must_use]
    pub fn begin(&self, epoch: u64) -> Cmd {
        let mut command = script(BEGIN, &[&self.head]);
        command.arg(epoch_text(epoch));
        command
    }

    /// Begins a log in place of one.
    #[must_use]
    pub fn replace(&self, read: Position, epoch: u64) -> Cmd {
        let mut command = script(REPLACE, &[&self.head]);
        command.arg(read.epoch_text()).arg(read.seq).arg(last_text(read.last)).arg(epoch_text(epoch));
        command
    }

    /// Adds a void: [`added`].
    #[must_use]
    pub fn add(&self, id: VoidId, void: &LoggedVoid, epoch: u64) -> Cmd {
        let mut command = script(ADD, &[&self.head]);
        command.arg(epoch_text(epoch)).arg(void.write(id)).arg(id.text()).arg(MOST);
        command
    }

    /// Says to those that listen what cannot be added, since Redis refuses writes.
    #[must_use]
    pub fn publish_unlogged(&self, id: VoidId, void: &LoggedVoid) -> Cmd {
        let mut command = redis::cmd("PUBLISH");
        command.arg(&self.head).arg(format!("unlogged 0 {}", void.write(id)));
        command
    }

    /// Begins a sweep.
    #[must_use]
    pub fn sweep(&self, known: LogHead, sweep: Sweep) -> Cmd {
        let mut command = script(SWEEP, &[&self.head]);
        command.arg(known.at.epoch_text()).arg(known.swept).arg(sweep.name);
        command
    }

    /// Notes that Redis is swept of what the voids up to `upto` concern: those that are known up to `at`.
    #[must_use]
    pub fn swept(&self, at: Position, sweep: Sweep, upto: u64, left: &BTreeMap<u64, u64>) -> Cmd {
        let mut command = script(SWEPT, &[&self.head, &self.removed(at.epoch)]);
        command.arg(at.epoch_text()).arg(at.seq).arg(last_text(at.last)).arg(upto).arg(KEPT).arg(sweep.name).arg(sweep.steps);
        for (seq, count) in left {
            command.arg(*seq).arg(*count);
        }
        command
    }

    /// Writes an entry that was checked up to `at`.
    #[must_use]
    pub fn write(&self, at: Position, name: &str, entry: &[u8], millis: u64) -> Cmd {
        let mut command = script(WRITE, &[&self.head, name]);
        command.arg(at.epoch_text()).arg(at.seq).arg(last_text(at.last)).arg(entry).arg(millis);
        command
    }

    /// Removes entries.
    #[must_use]
    pub fn remove(&self, at: Position, sweep: Sweep, removals: &[Removal<'_>]) -> Cmd {
        let mut command = redis::cmd("EVAL");
        command.arg(REMOVE).arg(removals.len() + 2).arg(&self.head).arg(self.removed(at.epoch));
        for removal in removals {
            command.arg(removal.name);
        }
        command.arg(sweep.name).arg(sweep.steps).arg(&at.epoch.to_be_bytes()[..]);
        for removal in removals {
            let counted_by = removal.counted_by.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
            command.arg(removal.seq).arg(u8::from(removal.removes)).arg(counted_by);
        }
        command
    }
}

/// What [`Scripts::read`] was answered with.
///
/// # Errors
/// Somebody else writes to the log.
pub fn page(answer: &Value) -> Result<Page, RedisError> {
    type Read = (String, u64, String, u64, u64, String, u64, Vec<Option<String>>);
    if matches!(answer, Value::Array(parts) if parts.is_empty()) {
        return Ok(Page::Absent);
    }
    let (epoch, seq, last, swept, trimmed, standing, first, voids) =
        redis::from_redis_value_ref::<Read>(answer).map_err(|_| malformed())?;
    let epoch = u64::from_str_radix(&epoch, 16).map_err(|_| malformed())?;
    let standing = match standing.as_str() {
        "part" => Standing::Part,
        "forgotten" => Standing::Forgotten,
        _ => Standing::Diverged,
    };
    let voids = voids.into_iter().map(|text| text.map(|text| LoggedVoid::read(&text))).collect();
    Ok(Page::Log(LogPage { head: Position { epoch, seq, last: VoidId::read(&last) }, swept, trimmed, standing, first, voids }))
}

/// What [`Scripts::look`] was answered with: the head of the log, if there is one.
#[must_use]
pub fn head(answer: &[Value]) -> Option<LogHead> {
    type Head = (Option<String>, Option<u64>, Option<String>, Option<u64>);
    let (epoch, seq, last, swept) = redis::from_redis_value_ref::<Head>(answer.first()?).ok()?;
    let epoch = u64::from_str_radix(&epoch?, 16).ok()?;
    let at = Position { epoch, seq: seq.unwrap_or(0), last: VoidId::read(&last.unwrap_or_default()) };
    Some(LogHead { at, swept: swept.unwrap_or(0) })
}

/// What [`Scripts::add`] was answered with: where the void stands.
#[must_use]
pub fn added(answer: &Value) -> Option<Stamp> {
    let (epoch, seq) = redis::from_redis_value_ref::<(String, u64)>(answer).ok()?;
    Some(Stamp { epoch: u64::from_str_radix(&epoch, 16).ok()?, seq })
}

/// Reads a message. `None`: it is none that is known here.
#[must_use]
pub fn message(text: &str) -> Option<Message> {
    #[derive(Deserialize)]
    struct Swept {
        upto: u64,
        counts: BTreeMap<u64, u64>,
    }
    let mut words = text.splitn(3, ' ');
    let (kind, epoch, rest) = (words.next()?, words.next()?, words.next()?);
    let epoch = u64::from_str_radix(epoch, 16).ok()?;
    match kind {
        "void" => {
            let (seq, text) = rest.split_once(' ')?;
            Some(Message::Void(Stamp { epoch, seq: seq.parse().ok()? }, LoggedVoid::read(text)))
        }
        "unlogged" => Some(Message::Unlogged(LoggedVoid::read(rest))),
        "swept" => {
            let Swept { upto, counts } = serde_json::from_str(rest).ok()?;
            Some(Message::Swept(epoch, upto, counts))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::void::Selection;

    #[test]
    fn messages_are_read_or_refused() {
        let void = LoggedVoid { what: Selection::Tag("a b".into()), soft: true };
        let text = void.write(VoidId(7));
        let in_log = InLog { id: VoidId(7), before: None, void };
        assert_eq!(message(&format!("void 1f 12 {text}")), Some(Message::Void(Stamp { epoch: 31, seq: 12 }, in_log.clone())));
        assert_eq!(message(&format!("unlogged 0 {text}")), Some(Message::Unlogged(in_log)));
        assert_eq!(message("swept 1f {\"upto\":5,\"counts\":{\"4\":2}}"), Some(Message::Swept(31, 5, BTreeMap::from([(4, 2)]))));
        assert_eq!(
            message("void 1f 12 {\"what\":\"later\"}"),
            Some(Message::Void(Stamp { epoch: 31, seq: 12 }, InLog { id: VoidId(0), before: None, void: LoggedVoid::all() })),
            "what cannot be read voids everything"
        );
        for text in ["", "void", "void 1f", "void xyz 12 {}", "void 1f -1 {}", "swept 1f {}", "done 1f {\"upto\":5,\"counts\":{}}"] {
            assert_eq!(message(text), None, "{text}");
        }
    }
}
