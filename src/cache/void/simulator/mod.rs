//! Drives instances, a model of Redis, messages and clients through a protocol of voids from a seed, with a fault at any step, and checks
//! each answer: it was asked of the backend after every void that held on the instance when the request came.
//!
//! ```text
//! cargo test --lib simulat                        # some thousand seeds
//! SLUICE_SEEDS=1000000 cargo test --lib simulat   # more
//! SLUICE_SEED=17 cargo test --lib simulat         # one seed, told step by step
//! ```
//!
//! The instances use [`Voids`] and [`LogView`] as the program does; what the program does around them stands here a second time, in
//! small. Each [`Break`] breaks one rule of the protocol, and a test sees that it is found.

#![allow(clippy::print_stdout, reason = "a seed is told step by step")]

mod breaks;
mod redis;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::effect::Effect;
use super::local::{Validity, VoidBounds, Voids};
use super::moment::Moment;
use super::selection::Selection;
use super::view::{Heard, InLog, LogHead, LogView, LoggedVoid, Next, Page, Position, Stamp, ViewBounds, VoidId};
use crate::cache::codec::tests::entry as template;
use crate::cache::entry::{Checked, Entry};
use crate::clock::Wall;
use breaks::{BREAKS, Break};
use redis::{Redis, Stored};

const KEYS: usize = 2;
const INSTANCES: usize = 3;
const STEPS: u64 = 400;
const NOW: Wall = Wall::from_millis(1_735_689_600_000);

/// A void, as it truly is.
struct Truth {
    step: u64,
    /// The instance that made it.
    by: u64,
    id: VoidId,
    void: LoggedVoid,
}

/// A request that waits.
#[derive(Clone, Copy, Debug)]
struct Request {
    key: usize,
    /// Whatever it is answered with must have been asked of the backend after this step.
    least: u64,
}

struct Fetch {
    key: usize,
    asked_at: Moment,
    /// The step at which the backend was read.
    value: Option<u64>,
    /// Whether requests may join it.
    open: bool,
    followers: Vec<Request>,
}

/// A call to Redis.
#[derive(Clone, Debug)]
enum Call {
    Get { request: Request, asked_at: Moment },
    Write { key: usize, at: Position, entry: Stored },
    Add { id: VoidId, void: LoggedVoid },
    ReadLog { known: LogHead },
    Begin,
    Replace { read: Position },
    Look { known: LogHead },
    Sweep { known: LogHead, name: u64 },
    Remove { key: usize, at: Position, seq: u64, sweep: (u64, u64) },
    Swept { at: Position, upto: u64, sweep: (u64, u64) },
}

/// What Redis answered, with the voids that its log reflected then.
#[derive(Clone, Debug)]
enum Answer {
    Got(Request, Moment, Option<Stored>),
    Written(bool),
    Added(VoidId, Option<Stamp>),
    Page(Page, BTreeSet<usize>),
    Begun(bool),
    Looked(Option<LogHead>, LogHead, BTreeSet<usize>),
    Nothing,
}

#[derive(Clone)]
enum Message {
    Void(Stamp, InLog),
    Unlogged(VoidId, LoggedVoid),
    Swept(u64, u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Down,
    /// Reads the log; requests do not reach Redis.
    Connecting,
    Up,
}

struct Instance {
    voids: Voids,
    view: LogView,
    memory: BTreeMap<usize, Arc<Entry>>,
    fetches: Vec<Fetch>,
    calls: Vec<Call>,
    answers: Vec<Answer>,
    messages: VecDeque<Message>,
    link: Link,
    reading: bool,
    /// For each key: what was asked of the backend until this step is void here.
    least: [u64; KEYS],
    sweep: Vec<Call>,
    /// Which process it is: one that starts again is another one.
    life: u64,
    /// Redis went on from an older state, and the connections stand: until the next look nobody can know.
    blind: bool,
}

impl Instance {
    fn new(life: u64) -> Self {
        Self {
            life,
            blind: false,
            voids: Voids::with_bounds(VoidBounds { purges: (2, 6), targets: (2, 6) }),
            view: LogView::new(ViewBounds { held: 3, patience: 2, kept: 1 }, salt(life)),
            memory: BTreeMap::new(),
            fetches: Vec::new(),
            calls: Vec::new(),
            answers: Vec::new(),
            messages: VecDeque::new(),
            link: Link::Down,
            reading: false,
            least: [0; KEYS],
            sweep: Vec::new(),
        }
    }

    fn cut(&mut self) {
        self.link = Link::Down;
        self.reading = false;
        self.calls.clear();
        self.answers.clear();
        self.messages.clear();
        self.sweep.clear();
    }

    fn read_log(&mut self) {
        self.reading = true;
        self.calls.push(Call::ReadLog { known: self.view.known() });
    }

    /// Voids hold here from now on.
    fn honour(&mut self, reflected: &BTreeSet<usize>, truths: &[Truth]) {
        for truth in reflected.iter().map(|&index| &truths[index]) {
            self.honour_one(truth);
        }
    }

    fn honour_one(&mut self, truth: &Truth) {
        for key in (0..KEYS).filter(|&key| !truth.void.soft && concerns(&truth.void.what, key)) {
            self.least[key] = self.least[key].max(truth.step);
        }
    }
}

fn facts(key: usize) -> (String, Vec<String>, u64) {
    (format!("k:{key}"), vec![format!("t{key}"), "all".into()], key as u64)
}

fn concerns(what: &Selection, key: usize) -> bool {
    let (readable, tags, target) = facts(key);
    what.matches(&readable, &tags, target)
}

fn entry(key: usize, value: u64, asked_at: Moment) -> Entry {
    let (readable, tags, target) = facts(key);
    let mut entry = template(b"", &tags, "");
    (entry.readable, entry.target, entry.asked_at, entry.stored_at) = (readable, target, asked_at, NOW);
    entry.lifetimes.stale_while_revalidate = entry.lifetimes.fresh;
    // The field that no rule of voids reads holds the value.
    entry.cost = u32::try_from(value).unwrap();
    entry
}

fn salt(life: u64) -> u64 {
    (life + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The numbers of the voids for which one in the log stands: itself, or all that its instance could not add until then.
fn stands_for(truths: &[Truth], id: VoidId) -> Vec<usize> {
    if let Some(number) = truths.iter().position(|truth| truth.id == id) {
        return vec![number];
    }
    let lives = || 0..INSTANCES as u64 + STEPS * 2;
    let made_at = |last: usize| lives().find(|&life| truths[last].id.0 ^ salt(life) == id.0);
    // One that stands for others that stood for others: nothing more is asked of it.
    let Some((last, life)) = (0..truths.len()).find_map(|last| made_at(last).map(|life| (last, life))) else { return Vec::new() };
    (0..=last).filter(|&number| truths[number].by == life).collect()
}

struct World {
    random: fastrand::Rng,
    step: u64,
    redis: Redis,
    snapshots: Vec<Redis>,
    instances: Vec<Instance>,
    truths: Vec<Truth>,
    broken: Option<Break>,
    told: bool,
    hits: u64,
}

impl World {
    fn new(seed: u64, broken: Option<Break>, told: bool) -> Self {
        let instances = (0..INSTANCES).map(|at| Instance::new(at as u64)).collect();
        let (redis, snapshots, truths) = Default::default();
        Self { random: fastrand::Rng::with_seed(seed), step: 0, redis, snapshots, instances, truths, broken, told, hits: 0 }
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if self.told {
            println!("{:4} {}", self.step, what());
        }
    }

    /// Runs one seed.
    fn run(mut self) -> Result<u64, String> {
        // Some runs are quiet, some are full of faults.
        let faults = self.random.u32(0..16);
        while self.step < STEPS {
            self.step += 1;
            let at = self.random.usize(..INSTANCES);
            // Calls, answers and messages are on their way for a while, and all arrive unless a fault takes them.
            for _ in 0..self.random.u8(0..7) {
                let at = self.random.usize(..INSTANCES);
                match self.random.u8(..7) {
                    0..3 => self.execute(at),
                    3..6 => self.deliver(at)?,
                    _ => self.hear(at),
                }
            }
            match self.random.u32(..150 + faults) {
                0..43 => self.request(at)?,
                43..53 => self.void(at),
                53..83 => self.fetch_on(at)?,
                83..90 => self.look(at),
                90..106 => self.sweep(at),
                106..110 => self.sweep_memory(at),
                110..124 => self.connect(at),
                // Memory needs room: what it held is read from Redis again.
                124..150 => drop(self.instances[at].memory.remove(&self.random.usize(..KEYS))),
                _ => self.fail(at),
            }
        }
        self.settle()?;
        Ok(self.hits)
    }

    /// All faults are over, and every call and message arrives: then each instance honours all that the log reflects.
    fn settle(&mut self) -> Result<(), String> {
        self.redis.refuses = false;
        for _ in 0..20 {
            for at in 0..INSTANCES {
                self.step += 1;
                self.connect(at);
                self.look(at);
                while !self.instances[at].calls.is_empty() {
                    self.execute(at);
                }
                while !self.instances[at].answers.is_empty() {
                    self.deliver(at)?;
                }
                while !self.instances[at].messages.is_empty() {
                    self.hear(at);
                }
            }
        }
        self.all_was_said()?;
        for at in 0..INSTANCES {
            self.instances[at].honour(&self.redis.reflected, &self.truths);
            for key in 0..KEYS {
                let request = Request { key, least: self.instances[at].least[key] };
                if let Some(value) = self.look_up(at, key) {
                    self.serve(at, request, value, "hit in the end")?;
                }
                if let Some(stored) = self.redis.entries.get(&key).copied() {
                    let asked_at = self.instances[at].voids.ask();
                    self.got(at, request, asked_at, Some(stored))?;
                }
            }
        }
        Ok(())
    }

    /// Nothing waits to be added to the log any more.
    fn all_was_said(&self) -> Result<(), String> {
        match self.instances.iter().position(|instance| instance.view.waiting() > 0) {
            Some(at) => Err(format!("instance {at} holds voids that it never adds: {:?}", self.instances[at].view)),
            None => Ok(()),
        }
    }

    fn serve(&mut self, at: usize, request: Request, value: u64, how: &str) -> Result<(), String> {
        self.tell(|| format!("{at}: {how} {} with {value} (at least {})", request.key, request.least));
        if value < request.least && !self.instances[at].blind {
            return Err(format!(
                "step {}: instance {at}: {how}: key {} of {value} is void since {}",
                self.step, request.key, request.least
            ));
        }
        Ok(())
    }

    fn request(&mut self, at: usize) -> Result<(), String> {
        let key = self.random.usize(..KEYS);
        let request = Request { key, least: self.instances[at].least[key] };
        if let Some(value) = self.look_up(at, key) {
            self.hits += 1;
            return self.serve(at, request, value, "hit");
        }
        if self.instances[at].link == Link::Up {
            let asked_at = self.instances[at].voids.ask();
            self.instances[at].calls.push(Call::Get { request, asked_at });
        } else {
            self.fetch(at, request);
        }
        Ok(())
    }

    /// What memory holds and may be served, fresh or while it is revalidated.
    fn look_up(&mut self, at: usize, key: usize) -> Option<u64> {
        let instance = &mut self.instances[at];
        let entry = Arc::clone(instance.memory.get(&key)?);
        match instance.voids.check(&entry) {
            Validity::Valid => {}
            Validity::Expired(left) => drop(instance.memory.insert(key, Arc::from(left))),
            Validity::Void => drop(instance.memory.remove(&key)),
        }
        let left = instance.memory.get(&key)?;
        let served = !left.lifetimes.fresh.is_zero() || !left.lifetimes.stale_while_revalidate.is_zero();
        served.then_some(u64::from(left.cost))
    }

    fn fetch(&mut self, at: usize, request: Request) {
        let (step, broken) = (self.step, self.broken);
        let instance = &mut self.instances[at];
        let asked_at = instance.voids.ask();
        let (readable, tags, target) = facts(request.key);
        let voids = &instance.voids;
        let is_void = |asked_at| broken != Some(Break::JoinsAnyFetch) && voids.concern_since(asked_at, &readable, &tags, target);
        let open = instance.fetches.iter_mut().filter(|fetch| fetch.key == request.key && fetch.open);
        for fetch in open {
            if !is_void(fetch.asked_at) {
                fetch.followers.push(request);
                return;
            }
            fetch.open = false;
        }
        if self.told {
            println!("{step:4} {at}: fetches {} at {asked_at:?}", request.key);
        }
        instance.fetches.push(Fetch { key: request.key, asked_at, value: None, open: true, followers: vec![request] });
    }

    /// A fetch goes one step further: the backend is read, or its answer comes.
    fn fetch_on(&mut self, at: usize) -> Result<(), String> {
        if self.instances[at].fetches.is_empty() {
            return Ok(());
        }
        let index = self.random.usize(..self.instances[at].fetches.len());
        let fetch = &mut self.instances[at].fetches[index];
        let Some(value) = fetch.value else {
            fetch.value = Some(self.step);
            return Ok(());
        };
        let Fetch { key, mut asked_at, followers, .. } = self.instances[at].fetches.swap_remove(index);
        for request in followers {
            self.serve(at, request, value, "fetched")?;
        }
        if self.broken == Some(Break::AskedWhenStored) {
            asked_at = self.instances[at].voids.ask();
        }
        self.put(at, key, Arc::new(entry(key, value, asked_at)));
        Ok(())
    }

    /// Stores an entry in memory, and begins to write it to Redis.
    fn put(&mut self, at: usize, key: usize, entry: Arc<Entry>) {
        let instance = &mut self.instances[at];
        instance.memory.insert(key, Arc::clone(&entry));
        if instance.link != Link::Up {
            return;
        }
        let Some(position) = instance.view.position() else { return };
        let (value, doubtful) = match instance.voids.check(&entry) {
            Validity::Valid => (entry.cost, false),
            Validity::Expired(left) => (left.cost, left.lifetimes.stale_while_revalidate.is_zero()),
            Validity::Void => return,
        };
        let stored = Stored { stamp: position.stamp(), value: value.into(), doubtful };
        instance.calls.push(Call::Write { key, at: position, entry: stored });
    }

    fn void(&mut self, at: usize) {
        let key = self.random.usize(..KEYS);
        let what = match self.random.u8(..10) {
            0 => Selection::all(),
            1 => Selection::Pattern(format!("k:{key}*")),
            2..4 => Selection::Tag(format!("t{key}")),
            4..7 => Selection::Tag("none".into()),
            _ => Selection::Target(key as u64),
        };
        let void = LoggedVoid { what, soft: self.random.u8(..6) == 0 };
        let (id, truth) = (VoidId(self.random.u64(2..)), self.truths.len());
        self.tell(|| format!("{at}: void {truth}: {} soft {}", void.what, void.soft));
        let instance = &mut self.instances[at];
        if self.broken != Some(Break::HoldsNothing) {
            instance.view.hold(id, void.clone());
        }
        instance.voids.add(void.what.clone(), Effect::of_purge(void.soft), NOW);
        self.truths.push(Truth { step: self.step, by: instance.life, id, void });
        instance.honour_one(&self.truths[truth]);
        if instance.link == Link::Up {
            instance.calls.push(Call::Add { id, void: self.truths[truth].void.clone() });
        }
    }

    /// Redis carries out a call; or the call, or its answer, is lost.
    fn execute(&mut self, at: usize) {
        let made = self.truths.len();
        if self.instances[at].calls.is_empty() {
            return;
        }
        let index = self.random.usize(..self.instances[at].calls.len());
        let call = self.instances[at].calls.swap_remove(index);
        let epoch = self.instances[at].view.new_epoch(Wall::from_millis(self.step), self.random.u16(..));
        let (broken, redis) = (self.broken, &mut self.redis);
        let answer = match &call {
            Call::Get { request, asked_at } => Answer::Got(*request, *asked_at, redis.entries.get(&request.key).copied()),
            Call::Write { key, at, entry } => Answer::Written(redis.write(*key, *at, *entry, broken).unwrap_or(true)),
            Call::Add { id, void } => {
                let truths = stands_for(&self.truths, *id);
                let added = redis.add(*id, void, &truths, made, epoch);
                let stands = added.as_ref().map(|(stands, _)| *stands);
                self.publish(match added {
                    Some((stands, void)) => Message::Void(stands, void),
                    None => Message::Unlogged(*id, void.clone()),
                });
                Answer::Added(*id, stands)
            }
            Call::ReadLog { known } => Answer::Page(redis.read(*known, broken), redis.reflected.clone()),
            Call::Begin => Answer::Begun(redis.begin(epoch, made)),
            Call::Replace { read } => Answer::Begun(redis.replace(*read, epoch, made)),
            Call::Look { known } => Answer::Looked(redis.look(), *known, redis.reflected.clone()),
            Call::Sweep { known, name } => {
                redis.sweep(*known, *name);
                Answer::Nothing
            }
            Call::Remove { key, at: position, seq, sweep } => {
                if !redis.remove(*key, *position, *seq, *sweep, broken) {
                    self.instances[at].sweep.clear();
                }
                Answer::Nothing
            }
            Call::Swept { at, upto, sweep } => {
                if redis.swept(*at, *upto, *sweep) {
                    self.publish(Message::Swept(at.epoch, *upto));
                }
                Answer::Nothing
            }
        };
        if self.told {
            println!("{:4} {at}: {call:?} -> {answer:?}", self.step);
        }
        self.instances[at].answers.push(answer);
        if matches!(call, Call::Sweep { .. } | Call::Remove { .. })
            && let Some(next) = self.instances[at].sweep.pop()
        {
            self.instances[at].calls.push(next);
        }
    }

    /// All that listen hear of a void; some message may be lost on its way.
    fn publish(&mut self, message: Message) {
        for instance in self.instances.iter_mut().filter(|instance| instance.link != Link::Down) {
            if self.random.u8(..5) > 0 {
                instance.messages.push_back(message.clone());
            }
        }
    }

    fn deliver(&mut self, at: usize) -> Result<(), String> {
        if self.instances[at].answers.is_empty() {
            return Ok(());
        }
        let index = self.random.usize(..self.instances[at].answers.len());
        match self.instances[at].answers.swap_remove(index) {
            Answer::Got(request, asked_at, stored) => return self.got(at, request, asked_at, stored),
            Answer::Written(true) | Answer::Nothing => {}
            Answer::Written(false) => self.catch_up(at),
            Answer::Added(id, stands) => self.added(at, id, stands),
            Answer::Page(page, reflected) => self.take_page(at, page, &reflected),
            Answer::Begun(true) => self.instances[at].read_log(),
            // It goes on without a log that it could trust.
            Answer::Begun(false) => self.log_was_read(at),
            Answer::Looked(head, known, reflected) => {
                if self.instances[at].view.is_newest(head, known) {
                    self.instances[at].blind = false;
                    self.instances[at].honour(&reflected, &self.truths);
                } else {
                    self.catch_up(at);
                }
            }
        }
        Ok(())
    }

    /// An entry came from Redis, or none.
    fn got(&mut self, at: usize, request: Request, mut asked_at: Moment, stored: Option<Stored>) -> Result<(), String> {
        let instance = &mut self.instances[at];
        if self.broken == Some(Break::AskedWhenRead) {
            asked_at = instance.voids.ask();
        }
        if let Some(stored) = stored {
            let effect = instance.view.admit(stored.stamp, asked_at, |what| concerns(what, request.key));
            if effect != Some(Effect::Remove) {
                let mut read = entry(request.key, stored.value, asked_at);
                if stored.doubtful {
                    read = read.expired(NOW, asked_at, Effect::Doubt);
                } else if let Some(effect) = effect {
                    read = read.expired(NOW, asked_at, effect);
                }
                instance.memory.insert(request.key, Arc::new(read));
                if let Some(value) = self.look_up(at, request.key) {
                    self.hits += 1;
                    return self.serve(at, request, value, "hit from Redis");
                }
            }
        }
        self.fetch(at, request);
        Ok(())
    }

    fn added(&mut self, at: usize, id: VoidId, stands: Option<Stamp>) {
        let instance = &mut self.instances[at];
        if let Some(stands) = stands {
            instance.view.added(id, stands);
            if self.broken == Some(Break::HoldsTooShort) {
                instance.view.forget(id);
            }
        }
    }

    fn take_page(&mut self, at: usize, page: Page, reflected: &BTreeSet<usize>) {
        let instance = &mut self.instances[at];
        if self.broken == Some(Break::AnyEpoch) {
            instance.view.forget_epochs();
        }
        let scratch = Voids::default();
        let begins = matches!(&page, Page::Log(page) if instance.view.position().is_none_or(|at| at.epoch != page.head.epoch));
        let voids = if self.broken == Some(Break::NoDoubt) && begins { &scratch } else { &instance.voids };
        let next = instance.view.take_page(page, voids, NOW);
        if next != Next::More {
            instance.blind = false;
        }
        match next {
            Next::Synced => {
                instance.honour(reflected, &self.truths);
                self.log_was_read(at);
            }
            Next::More => instance.read_log(),
            Next::Begin => instance.calls.push(Call::Begin),
            Next::Replace(read) => instance.calls.push(Call::Replace { read }),
        }
    }

    /// The log was read. What waits is added, and a new connection serves.
    fn log_was_read(&mut self, at: usize) {
        let instance = &mut self.instances[at];
        instance.reading = false;
        instance.link = Link::Up;
        self.add_waiting(at);
    }

    fn add_waiting(&mut self, at: usize) {
        let instance = &mut self.instances[at];
        if let Some((id, void)) = instance.view.next_to_add() {
            instance.calls.push(Call::Add { id, void: LoggedVoid::clone(&void) });
        }
    }

    fn catch_up(&mut self, at: usize) {
        let instance = &mut self.instances[at];
        if !instance.reading && self.broken != Some(Break::NeverLooks) {
            instance.read_log();
        }
    }

    fn hear(&mut self, at: usize) {
        let instance = &mut self.instances[at];
        let Some(message) = instance.messages.pop_front() else { return };
        let heard = match message {
            Message::Void(stands, void) => instance.view.take_message(stands, void, &instance.voids, NOW),
            Message::Unlogged(id, void) => {
                instance.view.take_unlogged(id, void, &instance.voids, NOW);
                Heard::InOrder
            }
            Message::Swept(epoch, upto) => {
                instance.view.take_swept(epoch, upto, BTreeMap::new(), &instance.voids);
                Heard::InOrder
            }
        };
        if heard == Heard::Gap && instance.link == Link::Up {
            self.catch_up(at);
        }
    }

    fn look(&mut self, at: usize) {
        let instance = &mut self.instances[at];
        if instance.link == Link::Up {
            instance.view.looked();
            instance.calls.push(Call::Look { known: instance.view.known() });
            self.add_waiting(at);
        }
    }

    /// An instance begins to sweep Redis: a call for each entry that a void concerns, one after the other.
    fn sweep(&mut self, at: usize) {
        let half = self.broken == Some(Break::SweepsHalf);
        let instance = &mut self.instances[at];
        if instance.link != Link::Up || !instance.sweep.is_empty() {
            return;
        }
        let Some((known, voids)) = instance.view.to_sweep() else { return };
        let position = known.at;
        let hard = || voids.iter().filter(|(_, void)| !void.soft);
        let upto = voids.iter().filter(|(_, void)| void.soft).map(|(seq, _)| seq - 1).min().unwrap_or(position.seq);
        let name = self.random.u64(1..);
        let mut steps = 0;
        for key in (0..KEYS).filter(|_| !half) {
            if let Some(seq) = hard().filter(|(_, void)| concerns(&void.what, key)).map(|(seq, _)| *seq).max() {
                instance.sweep.push(Call::Remove { key, at: position, seq, sweep: (name, steps) });
                steps += 1;
            }
        }
        instance.sweep.reverse();
        instance.sweep.insert(0, Call::Swept { at: position, upto, sweep: (name, steps) });
        instance.calls.push(Call::Sweep { known, name });
    }

    fn sweep_memory(&mut self, at: usize) {
        let (_, newest) = self.instances[at].voids.to_sweep();
        for key in 0..KEYS {
            // A sweep may miss an entry that is written meanwhile.
            if self.random.u8(..4) > 0 {
                self.look_up(at, key);
            }
        }
        let instance = &mut self.instances[at];
        instance.voids.swept(newest);
        if self.broken == Some(Break::ForgetsSilently) {
            instance.voids.deny_forgetting();
        }
    }

    fn connect(&mut self, at: usize) {
        let instance = &mut self.instances[at];
        if instance.link == Link::Down {
            instance.link = Link::Connecting;
            instance.read_log();
        }
    }

    fn fail(&mut self, at: usize) {
        let what = self.random.u8(..16);
        self.tell(|| format!("{at}: fault {what}"));
        match what {
            0..3 => self.instances[at].cut(),
            3 => drop(self.instances[at].messages.pop_front()),
            4 => self.redis.refuses = !self.redis.refuses,
            5 => {
                self.snapshots.push(self.redis.clone());
                self.redis.lose_log(self.broken);
            }
            6 => drop(self.redis.entries.remove(&self.random.usize(..KEYS))),
            7 => {
                self.snapshots.push(self.redis.clone());
                self.redis.flush();
            }
            8..10 => self.snapshots.push(self.redis.clone()),
            10..12 => self.restore(true),
            12..14 => self.restore(false),
            14 => self.redis.lose_one(self.random.usize(..)),
            _ => self.instances[at] = Instance::new(INSTANCES as u64 + self.step),
        }
    }

    /// Redis goes on from an older state, or a replica that lagged takes over; connections break, or (`REPLICAOF`) do not.
    fn restore(&mut self, breaks: bool) {
        if self.snapshots.is_empty() {
            return;
        }
        self.redis = self.snapshots[self.random.usize(..self.snapshots.len())].clone();
        for instance in &mut self.instances {
            match breaks {
                true => instance.cut(),
                false => instance.blind = true,
            }
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn simulated_instances_serve_nothing_void() {
    if let Some(seed) = number("SLUICE_SEED") {
        World::new(seed, None, true).run().unwrap();
        return;
    }
    let (mut hits, seeds) = (0, number("SLUICE_SEEDS").unwrap_or(8000));
    for seed in 0..seeds {
        match World::new(seed, None, false).run() {
            Ok(found) => hits += found,
            Err(error) => panic!("SLUICE_SEED={seed}: {error}"),
        }
    }
    assert!(hits > seeds * 5, "{hits} hits in {seeds} runs: little was tried");
}

#[test]
fn the_simulator_finds_each_rule_that_is_broken() {
    let missed: Vec<Break> = BREAKS
        .into_iter()
        .filter(|&broken| {
            let found = (0..8000).find_map(|seed| World::new(seed, Some(broken), false).run().err().map(|error| (seed, error)));
            println!("{broken:?}: {found:?}");
            found.is_none()
        })
        .collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn the_same_seed_runs_the_same() {
    let run = |seed| World::new(seed, None, false).run();
    assert!((0..20).all(|seed| run(seed) == run(seed)));
}

#[test]
fn what_is_checked_is_no_part_of_an_entry() {
    let (one, other) = (entry(1, 7, Moment::default()), entry(1, 7, Moment::default()));
    one.checked.note(Moment::at(5));
    assert!(one == other && Checked::default() == one.checked);
}
