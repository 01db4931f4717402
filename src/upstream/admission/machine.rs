//! Who may take which place: counts and a queue, without I/O and without a clock. The rules are those of the page of
//! [`admission`](super).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use foldhash::quality::RandomState;

use crate::request::client::counted_network;

/// The client and the rule that a place is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Party {
    /// The client's address, as far as it counts: [`Party::client`]. `None`: Sluice itself.
    pub address: Option<IpAddr>,
    /// The rule's name.
    pub rule: Arc<str>,
}

impl Party {
    /// A client at `address`, on a rule.
    #[must_use]
    pub fn client(address: IpAddr, rule: &str) -> Self {
        Self { address: Some(counted_network(address)), rule: rule.into() }
    }

    /// Sluice itself, on a rule: no client waits.
    #[must_use]
    pub fn own(rule: &str) -> Self {
        Self { address: None, rule: rule.into() }
    }
}

/// What a place is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A request on its way, to the head of its answer.
    Ask,
    /// A request whose body was not gathered whole, to the head of its answer.
    Upload,
    /// The body of an answer.
    Download,
    /// A body without an end.
    Stream,
}

impl Phase {
    /// Every phase, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Ask, Self::Upload, Self::Download, Self::Stream];

    /// The value of the metric label `phase`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ask => "ask",
            Self::Upload => "upload",
            Self::Download => "download",
            Self::Stream => "stream",
        }
    }

    /// How many times as many places as its rule may still take one address may hold, and how many times as many as are free one rule.
    const fn shares(self) -> (usize, usize) {
        match self {
            Self::Ask => (ADDRESS_SHARE, RULE_SHARE),
            Self::Upload | Self::Download | Self::Stream => (1, usize::MAX),
        }
    }
}

/// The shares where requests are short.
const ADDRESS_SHARE: usize = 7;
const RULE_SHARE: usize = 15;
/// From this wait of the oldest on, the queue is overloaded.
const OVERLOAD: Duration = Duration::from_millis(100);
/// From this wait on, a request is not served before newer ones while the queue is full.
const HOPELESS: Duration = Duration::from_secs(1);

/// How many places there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// `backend.max_in_flight`.
    pub ask: usize,
    /// `backend.max_uploads`.
    pub upload: usize,
    /// `backend.max_downloads`.
    pub download: usize,
    /// `backend.max_streams`.
    pub stream: usize,
    /// `backend.queue`.
    pub queue: usize,
}

/// The number of a request that waits.
pub type Ticket = u64;

/// What an arriving request gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// A place. It must be [ended](Machine::end).
    Admitted,
    /// It waits under this number until it is named by [`Machine::end`], or [leaves](Machine::leave).
    Pending(Ticket),
    /// Nothing, and nothing is left of it.
    Refused,
}

/// What becomes of a request that waits when another party asks for the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// It has a place of that party's.
    Admitted,
    /// It waits as that party's from now on.
    Moved,
    /// It waits as before, or no longer.
    Unchanged,
}

/// Who is charged for a place: an address, or Sluice's own work on a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Holder {
    Client(IpAddr),
    Own(Arc<str>),
}

impl Holder {
    fn of(party: &Party) -> Self {
        party.address.map_or_else(|| Self::Own(Arc::clone(&party.rule)), Self::Client)
    }
}

/// The places of one kind, and who holds them.
#[derive(Debug, Default)]
struct Pool {
    most: usize,
    address_share: usize,
    rule_share: usize,
    held: usize,
    by_address: HashMap<Holder, usize, RandomState>,
    by_rule: HashMap<Arc<str>, usize, RandomState>,
    /// Of those of an address, how many last.
    lasting: HashMap<Holder, usize, RandomState>,
    /// Whether what lasts is held to the share of phases where places are held for long.
    is_scarce: bool,
}

impl Pool {
    fn new(most: usize, (address_share, rule_share): (usize, usize)) -> Self {
        Self { most, address_share, rule_share, ..Self::default() }
    }

    fn of_address(&self, party: &Party) -> usize {
        self.by_address.get(&Holder::of(party)).copied().unwrap_or(0)
    }

    fn lasting_of(&self, party: &Party) -> usize {
        self.lasting.get(&Holder::of(party)).copied().unwrap_or(0)
    }

    fn of_rule(&self, party: &Party) -> usize {
        self.by_rule.get(&party.rule).copied().unwrap_or(0)
    }

    fn may_take(&self, party: &Party) -> bool {
        self.has_place(party, self.most.saturating_sub(self.held), self.of_rule(party))
    }

    /// Whether the party may take a place where so many are free, and its rule holds so many.
    fn has_place(&self, party: &Party, free: usize, of_rule: usize) -> bool {
        self.may_hold(party, self.of_address(party), self.room(free, of_rule))
    }

    /// Whether a party whose address holds so many may have one of those that its rule may still take.
    fn may_hold(&self, party: &Party, of_address: usize, room: usize) -> bool {
        let share = if party.address.is_none() { 1 } else { self.address_share };
        room > 0 && of_address <= room.saturating_mul(share) && (!self.is_scarce || self.lasting_of(party) <= room)
    }

    /// How many more places a rule may take, one after another, where so many are free and it holds so many.
    fn room(&self, free: usize, of_rule: usize) -> usize {
        if self.rule_share == usize::MAX {
            return free;
        }
        let most = free.saturating_mul(self.rule_share);
        match most.checked_sub(of_rule) {
            Some(left) if free > 0 => free.min(left / (self.rule_share + 1) + 1),
            _ => 0,
        }
    }

    /// Whether the party would have a place if a holder's work, which is of use to nobody, were given up.
    fn would_have_place_of(&self, holder: &Party, party: &Party) -> bool {
        let of_rule = self.of_rule(party).saturating_sub(usize::from(holder.rule == party.rule));
        let free = (self.most + 1).saturating_sub(self.held);
        self.has_place(party, free, of_rule)
    }

    /// Whether a holder's address has at least two places more than the party's. Sluice's own work never takes what a client uses.
    fn is_unfair_to(&self, party: &Party, holder: &Party) -> bool {
        party.address.is_some() && self.of_address(holder) >= self.of_address(party) + 2
    }

    /// Whether a holder's address has at least two places that last more than the party's has any.
    fn outlasts(&self, party: &Party, holder: &Party) -> bool {
        party.address.is_some() && self.lasting_of(holder) >= self.of_address(party) + 2
    }

    fn take(&mut self, party: &Party) {
        self.held += 1;
        *self.by_address.entry(Holder::of(party)).or_default() += 1;
        *self.by_rule.entry(Arc::clone(&party.rule)).or_default() += 1;
    }

    fn give_back(&mut self, party: &Party) {
        self.held = self.held.saturating_sub(1);
        less(&mut self.by_address, &Holder::of(party));
        less(&mut self.by_rule, &party.rule);
    }
}

/// One less of `key`, which is forgotten at zero.
fn less<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize, RandomState>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// A request that waits.
#[derive(Debug)]
struct Pending {
    phase: Phase,
    party: Party,
    since: Duration,
    /// The ticket of the newest of those who ask for the same: its own, or what would have been that of one who joined.
    newest: Ticket,
    /// When that one came.
    asked: Duration,
}

/// The requests of one party that wait for a place of one phase. Of each party one alone may be next, or be displaced: so a full queue costs
/// an arrival no more than there are parties in it.
#[derive(Debug, Default)]
struct Line {
    /// By when they came.
    oldest: BTreeSet<Ticket>,
    /// By when they were asked for last: the newest ticket of each, and its own.
    newest: BTreeSet<(Ticket, Ticket)>,
}

/// The lines of a phase.
type Lines = HashMap<Party, Line, RandomState>;

/// A request stands in its party's line from now on.
fn enter(lines: &mut Lines, ticket: Ticket, pending: &Pending) {
    let line = lines.entry(pending.party.clone()).or_default();
    line.oldest.insert(ticket);
    line.newest.insert((pending.newest, ticket));
}

/// It stands there no longer.
fn exit(lines: &mut Lines, ticket: Ticket, pending: &Pending) {
    let Some(line) = lines.get_mut(&pending.party) else { return };
    line.oldest.remove(&ticket);
    line.newest.remove(&(pending.newest, ticket));
    if line.oldest.is_empty() {
        lines.remove(&pending.party);
    }
}

/// All places, and the queue for them.
#[derive(Debug)]
pub struct Machine {
    pools: [Pool; Phase::ALL.len()],
    /// The places in the queue.
    queue: Pool,
    /// Those that wait, the oldest first.
    pending: BTreeMap<Ticket, Pending>,
    /// The same by phase and party.
    lines: [Lines; Phase::ALL.len()],
    /// How many of them wait for a place of each phase.
    waiting: [usize; Phase::ALL.len()],
    next: Ticket,
}

impl Machine {
    /// All places are free.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        let most = [bounds.ask, bounds.upload, bounds.download, bounds.stream];
        let pools = Phase::ALL.map(|phase| Pool::new(most[phase as usize], phase.shares()));
        Self {
            pools,
            queue: Pool::new(bounds.queue, (ADDRESS_SHARE, RULE_SHARE)),
            pending: BTreeMap::new(),
            lines: Default::default(),
            waiting: [0; Phase::ALL.len()],
            next: 0,
        }
    }

    /// How many places of a phase are taken.
    #[must_use]
    pub const fn active(&self, phase: Phase) -> usize {
        self.pools[phase as usize].held
    }

    /// How many requests wait for a place of a phase.
    #[cfg(test)]
    pub(super) const fn waiting(&self, phase: Phase) -> usize {
        self.waiting[phase as usize]
    }

    /// How many requests wait.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.pending.len()
    }

    /// How many requests of a party's address wait.
    #[must_use]
    pub fn queued_of(&self, party: &Party) -> usize {
        self.queue.of_address(party)
    }

    /// How many parties wait for a place of a phase.
    #[must_use]
    pub fn parties_waiting(&self, phase: Phase) -> usize {
        self.lines[phase as usize].len()
    }

    /// Whether nothing is held and nobody waits.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let mut pools = self.pools.iter().chain([&self.queue]);
        let is_empty = |pool: &Pool| pool.held == 0 && pool.by_address.is_empty() && pool.by_rule.is_empty() && pool.lasting.is_empty();
        self.pending.is_empty() && self.lines.iter().all(HashMap::is_empty) && pools.all(is_empty)
    }

    /// Which of the parties that hold places of the phase ask, for work that is of use to nobody, are to lose one so that a request gets it:
    /// the first is to be tried first. Empty: none, or the request finds a place without. Each comes with whether it has been asked for long
    /// ago: if not, it gives way only to an address that holds fewer.
    #[must_use]
    pub fn useless_for<'h, I: Ord + Copy>(&self, party: &Party, holders: impl Iterator<Item = (I, &'h Party, bool)>) -> Vec<I> {
        let pool = &self.pools[Phase::Ask as usize];
        if pool.may_take(party) {
            return Vec::new();
        }
        let gives_way = |holder, is_old| (is_old || pool.is_unfair_to(party, holder)) && pool.would_have_place_of(holder, party);
        in_order(pool, holders.filter(|(_, holder, is_old)| gives_way(holder, *is_old)).map(|(work, holder, _)| (work, holder)))
    }

    /// A place of the phase ask lasts from now on: it has been held for longer than most are.
    pub fn lasts(&mut self, party: &Party) {
        *self.pools[Phase::Ask as usize].lasting.entry(Holder::of(party)).or_default() += 1;
    }

    /// One that lasts is about to [end](Self::end).
    pub fn lasts_no_longer(&mut self, party: &Party) {
        less(&mut self.pools[Phase::Ask as usize].lasting, &Holder::of(party));
    }

    /// Whether places of the phase ask are scarce.
    #[must_use]
    pub const fn is_scarce(&self) -> bool {
        self.pools[Phase::Ask as usize].is_scarce
    }

    /// Says whether places of the phase ask are scarce: whether a request waited in vain beside those that last. Returns those that have a
    /// place from now on.
    #[must_use]
    pub fn set_scarce(&mut self, now: Duration, is_scarce: bool) -> Vec<Ticket> {
        self.pools[Phase::Ask as usize].is_scarce = is_scarce;
        self.admit_next(now, Phase::Ask)
    }

    /// Which of the places of the phase ask that last are to be given up for a request that waits in vain, though somebody waits for each of
    /// them: the first is to be tried first. A place comes with all who wait for it; each of them must have many that last.
    #[must_use]
    pub fn outlasting<I: Ord + Copy>(&self, party: &Party, holders: impl Iterator<Item = (I, Party, Vec<Party>)>) -> Vec<I> {
        let pool = &self.pools[Phase::Ask as usize];
        // Asked first, since it is soon answered.
        let most = || pool.lasting.values().max().copied().unwrap_or(0);
        if pool.may_take(party) || most() < pool.of_address(party) + 2 {
            return Vec::new();
        }
        let gives_way = |holder: &Party, waiting: &[Party]| {
            [holder].into_iter().chain(waiting).all(|one| pool.outlasts(party, one)) && pool.would_have_place_of(holder, party)
        };
        let giving = holders.filter(|(_, holder, waiting)| gives_way(holder, waiting));
        let mut giving: Vec<_> = giving.map(|(place, holder, _)| (usize::MAX - pool.lasting_of(&holder), place)).collect();
        giving.sort_unstable();
        giving.into_iter().map(|(_, place)| place).collect()
    }

    /// Which of the parties that hold places of a phase where places are held for long are to lose one to a request that finds none: the
    /// first is to be tried first.
    ///
    /// `order` says of those of the addresses that hold most in which order they are to be tried, and of which that they are not.
    #[must_use]
    pub fn unfair_to<'h, H, I: Ord + Copy>(
        &self,
        phase: Phase,
        party: &Party,
        holders: impl Iterator<Item = (H, &'h Party)>,
        order: impl Fn(H) -> Option<I>,
    ) -> Vec<I> {
        let pool = &self.pools[phase as usize];
        // Asked first, since it is soon answered.
        let most = || pool.by_address.values().max().copied().unwrap_or(0);
        if pool.held < pool.most || most() < pool.of_address(party) + 2 {
            return Vec::new();
        }
        let unfair = holders.filter(|(_, holder)| pool.is_unfair_to(party, holder));
        in_order(pool, unfair.filter_map(|(work, holder)| Some((order(work)?, holder))))
    }

    /// How many places a party's address holds, of all phases.
    #[must_use]
    pub fn held_by(&self, party: &Party) -> usize {
        self.pools.iter().map(|pool| pool.of_address(party)).sum()
    }

    /// A place of a phase passes from its holder to a request that found none.
    pub fn pass_on(&mut self, phase: Phase, holder: &Party, party: &Party) {
        let pool = &mut self.pools[phase as usize];
        pool.give_back(holder);
        pool.take(party);
    }

    /// A request asks for a place, at `now` after some fixed moment. It waits if there is none and it `may_wait`. Returns also a request that
    /// waits no longer and has no place, since this one has taken its place in the queue.
    pub fn arrive(&mut self, now: Duration, phase: Phase, party: &Party, may_wait: bool) -> (Arrival, Option<Ticket>) {
        // A request that waits may not take any place that is free, so this one passes over none.
        let pool = &mut self.pools[phase as usize];
        if pool.may_take(party) {
            pool.take(party);
            return (Arrival::Admitted, None);
        }
        if !may_wait {
            return (Arrival::Refused, None);
        }
        let mut displaced = None;
        if !self.queue.may_take(party) {
            displaced = self.displaced_by(now, party);
            let Some(ticket) = displaced else { return (Arrival::Refused, None) };
            self.leave(ticket);
        }
        self.queue.take(party);
        let ticket = self.next;
        self.next += 1;
        let pending = Pending { phase, party: party.clone(), since: now, newest: ticket, asked: now };
        enter(&mut self.lines[phase as usize], ticket, &pending);
        self.pending.insert(ticket, pending);
        self.waiting[phase as usize] += 1;
        (Arrival::Pending(ticket), displaced)
    }

    /// The request whose place in the queue another one takes: the oldest of the address that has most in it, if that address has at
    /// least two more there than the other's own. Where there is room, and only the rule has its share, it is one of that rule. One that
    /// has waited for long gives way to one of an address that has fewer: the newest are served first by then.
    fn displaced_by(&self, now: Duration, party: &Party) -> Option<Ticket> {
        let own = self.queue.of_address(party);
        let is_full = self.queue.held >= self.queue.most;
        let lines = self.lines.iter().flatten().filter(|(other, _)| is_full || other.rule == party.rule);
        let counted = lines.filter_map(|(other, line)| {
            let &(newest, ticket) = line.newest.first()?;
            let is_old = now.saturating_sub(self.pending.get(&ticket)?.asked) > HOPELESS;
            Some((self.queue.of_address(other), Ticket::MAX - newest, is_old, ticket))
        });
        counted.filter(|&(held, _, is_old, _)| held >= own + 2 || (is_old && held > own)).max().map(|(.., ticket)| ticket)
    }

    /// Of parties that ask for the same, the one that is to be charged for its place: one that may take it, of those the one that holds fewest.
    #[must_use]
    pub fn least<'p>(&self, phase: Phase, parties: impl Iterator<Item = &'p Party>) -> Option<&'p Party> {
        parties.min_by_key(|party| (!self.pools[phase as usize].may_take(party), self.standing(phase, party)))
    }

    /// How far back a party stands where places are given: Sluice itself behind all clients, since it may hold less.
    fn standing(&self, phase: Phase, party: &Party) -> (bool, usize, usize) {
        (party.address.is_none(), self.pools[phase as usize].of_address(party), self.queue.of_address(party))
    }

    /// Another party asks for what a request that waits is for.
    pub fn join(&mut self, now: Duration, ticket: Ticket, party: &Party) -> Joined {
        let Some(pending) = self.pending.get_mut(&ticket) else { return Joined::Unchanged };
        let (phase, charged) = (pending.phase, pending.party.clone());
        let lines = &mut self.lines[phase as usize];
        exit(lines, ticket, pending);
        (pending.newest, pending.asked, self.next) = (self.next, now, self.next + 1);
        enter(lines, ticket, pending);
        if self.pools[phase as usize].may_take(party) {
            self.leave(ticket);
            self.pools[phase as usize].take(party);
            return Joined::Admitted;
        }
        if self.standing(phase, party) >= self.standing(phase, &charged) {
            return Joined::Unchanged;
        }
        self.queue.give_back(&charged);
        self.queue.take(party);
        if let Some(pending) = self.pending.get_mut(&ticket) {
            exit(&mut self.lines[phase as usize], ticket, pending);
            pending.party = party.clone();
            enter(&mut self.lines[phase as usize], ticket, pending);
        }
        Joined::Moved
    }

    /// A place is free again. Returns those that wait no longer, since they have a place from now on.
    #[must_use]
    pub fn end(&mut self, now: Duration, phase: Phase, party: &Party) -> Vec<Ticket> {
        self.pools[phase as usize].give_back(party);
        self.admit_next(now, phase)
    }

    /// Gives places that are free to those that wait and may take one.
    fn admit_next(&mut self, now: Duration, phase: Phase) -> Vec<Ticket> {
        let mut admitted = Vec::new();
        // A place that is free may let in several: it raises what each party may hold.
        while let Some(ticket) = self.next_of(now, phase) {
            let Some(pending) = self.remove(ticket) else { break };
            self.pools[phase as usize].take(&pending.party);
            admitted.push(ticket);
        }
        admitted
    }

    /// A request waits no longer. `false`: it has a place by now.
    pub fn leave(&mut self, ticket: Ticket) -> bool {
        self.remove(ticket).is_some()
    }

    fn remove(&mut self, ticket: Ticket) -> Option<Pending> {
        let pending = self.pending.remove(&ticket)?;
        exit(&mut self.lines[pending.phase as usize], ticket, &pending);
        self.queue.give_back(&pending.party);
        self.waiting[pending.phase as usize] -= 1;
        Some(pending)
    }

    /// The request that is to be admitted next, if any may be.
    fn next_of(&self, now: Duration, phase: Phase) -> Option<Ticket> {
        let (pool, waiting) = (&self.pools[phase as usize], self.waiting[phase as usize]);
        if pool.held >= pool.most || waiting == 0 {
            return None;
        }
        let lines = &self.lines[phase as usize];
        let first = lines.values().filter_map(|line| line.oldest.first()).min();
        let oldest = first.and_then(|ticket| self.pending.get(ticket)).map_or(now, |pending| pending.since);
        let is_overloaded = waiting * 2 > self.queue.most || now.saturating_sub(oldest) > OVERLOAD;
        let next = |line: &Line| match is_overloaded {
            true => line.newest.last().map(|&(newest, ticket)| (Ticket::MAX - newest, ticket)),
            false => line.oldest.first().map(|&ticket| (ticket, ticket)),
        };
        let free = pool.most.saturating_sub(pool.held);
        let (mut rule, mut of_rule, mut room, mut best) = (None, 0, 0, None);
        for (party, line) in lines {
            // Mostly all wait for one rule.
            if rule != Some(&party.rule) {
                of_rule = pool.of_rule(party);
                (rule, room) = (Some(&party.rule), pool.room(free, of_rule));
            }
            let of_address = pool.of_address(party);
            if let Some((age, ticket)) = next(line).filter(|_| pool.may_hold(party, of_address, room)) {
                let key = ((party.address.is_none(), of_address, of_rule, age), ticket);
                best = Some(best.map_or(key, |best| key.min(best)));
            }
        }
        best.map(|(_, ticket)| ticket)
    }
}

/// Those first whose address holds most.
fn in_order<'h, I: Ord + Copy>(pool: &Pool, holders: impl Iterator<Item = (I, &'h Party)>) -> Vec<I> {
    let mut holders: Vec<_> = holders.map(|(place, holder)| (usize::MAX - pool.of_address(holder), place)).collect();
    holders.sort_unstable();
    holders.into_iter().map(|(_, place)| place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn bounds(ask: usize, queue: usize) -> Bounds {
        Bounds { ask, upload: 4, download: 8, stream: 8, queue }
    }

    fn party(number: u8) -> Party {
        Party::client(IpAddr::from([10, 0, 0, number]), "a")
    }

    fn pending(arrival: Arrival) -> Ticket {
        match arrival {
            Arrival::Pending(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_address_alone_has_all_of_a_few_places_and_most_of_many() {
        for (places, expected) in [(1, 1), (2, 2), (4, 4), (8, 8), (16, 15), (64, 54), (256, 211)] {
            let mut machine = Machine::new(bounds(places, 0));
            let taken = (0..places).filter(|_| machine.arrive(NOW, Phase::Ask, &party(1), true).0 == Arrival::Admitted).count();
            assert_eq!(taken, expected, "of {places}");
        }
    }

    #[test]
    fn an_address_with_nothing_finds_a_place_beside_some_that_take_all_they_can() {
        for (phase, greedy) in [(Phase::Ask, 2), (Phase::Upload, 6), (Phase::Download, 7), (Phase::Stream, 7)] {
            let mut machine = Machine::new(Bounds { ask: 256, upload: 128, download: 256, stream: 256, queue: 100 });
            for number in 0..greedy {
                let party = Party { rule: number.to_string().into(), ..party(number) };
                while machine.arrive(NOW, phase, &party, false).0 == Arrival::Admitted {}
            }
            let last = Party { rule: "other".into(), ..party(99) };
            assert_eq!(machine.arrive(NOW, phase, &last, false).0, Arrival::Admitted, "{phase:?}");
        }
    }

    #[test]
    fn also_where_all_of_them_ask_for_the_same_rule_and_another_rule_has_places_too() {
        for places in [16, 64, 256] {
            let mut machine = Machine::new(bounds(places, 100));
            while machine.arrive(NOW, Phase::Ask, &party(1), false).0 == Arrival::Admitted {}
            assert_eq!(machine.arrive(NOW, Phase::Ask, &party(2), false).0, Arrival::Admitted, "of {places}");
            // All that a rule may have is taken in the end.
            for number in 2..100 {
                while machine.arrive(NOW, Phase::Ask, &party(number), false).0 == Arrival::Admitted {}
            }
            let other = Party { rule: "other".into(), ..party(200) };
            let is_admitted = machine.arrive(NOW, Phase::Ask, &other, false).0 == Arrival::Admitted;
            assert!(is_admitted || places == 16, "of {places}");
        }
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one() {
        let one = Party::client("2001:db8::1".parse().unwrap(), "a");
        assert_eq!(one, Party::client("2001:db8:0:ffff::2".parse().unwrap(), "a"));
        assert_ne!(one, Party::client("2001:db8:1::1".parse().unwrap(), "a"));
        assert_eq!(party(1), Party::client("::ffff:10.0.0.1".parse().unwrap(), "a"));
    }

    #[test]
    fn a_place_goes_to_the_address_that_holds_fewest() {
        let mut machine = Machine::new(bounds(2, 100));
        assert_eq!(machine.arrive(NOW, Phase::Ask, &party(1), true).0, Arrival::Admitted);
        assert_eq!(machine.arrive(NOW, Phase::Ask, &party(1), true).0, Arrival::Admitted);
        let first = pending(machine.arrive(NOW, Phase::Ask, &party(1), true).0);
        let other = pending(machine.arrive(NOW, Phase::Ask, &party(2), true).0);
        assert_eq!(machine.end(NOW, Phase::Ask, &party(1)), [other]);
        assert_eq!(machine.end(NOW, Phase::Ask, &party(1)), [first]);
    }

    #[test]
    fn what_waits_behind_the_share_of_one_goes_on_for_another_that_asks_for_it_too() {
        let mut machine = Machine::new(bounds(16, 100));
        while machine.arrive(NOW, Phase::Ask, &party(1), false).0 == Arrival::Admitted {}
        let waiting = [(); 3].map(|()| pending(machine.arrive(NOW, Phase::Ask, &party(1), true).0));
        assert_eq!(machine.join(NOW, waiting[0], &party(1)), Joined::Unchanged);
        assert_eq!(machine.join(NOW, waiting[0], &party(2)), Joined::Admitted);
        // All places are taken: it is next as the other's.
        assert_eq!(machine.join(NOW, waiting[2], &party(3)), Joined::Moved);
        assert_eq!(machine.join(NOW, waiting[2], &Party::own("a")), Joined::Unchanged);
        assert_eq!(machine.end(NOW, Phase::Ask, &party(1)), [waiting[2]]);
        assert_eq!(machine.join(NOW, waiting[2], &party(4)), Joined::Unchanged, "it has a place");
        let parties = [party(1), Party::own("a"), party(9)];
        assert_eq!(machine.least(Phase::Ask, parties.iter()), Some(&parties[2]));
        assert_eq!(machine.least(Phase::Download, parties[..2].iter()), Some(&parties[0]));
    }

    #[test]
    fn an_upload_that_waits_does_not_turn_the_order_of_others() {
        let mut machine = Machine::new(Bounds { upload: 1, ..bounds(1, 100) });
        for phase in [Phase::Ask, Phase::Upload] {
            assert_eq!(machine.arrive(NOW, phase, &party(1), true).0, Arrival::Admitted);
        }
        pending(machine.arrive(NOW, Phase::Upload, &party(1), true).0);
        let waiting = [(); 2].map(|()| pending(machine.arrive(OVERLOAD * 2, Phase::Ask, &party(1), true).0));
        assert_eq!(machine.end(OVERLOAD * 2, Phase::Ask, &party(1)), waiting[..1]);
    }

    #[test]
    fn the_oldest_is_next_and_under_overload_the_newest() {
        for (later, expected) in [(OVERLOAD, 0), (OVERLOAD * 2, 2)] {
            let mut machine = Machine::new(bounds(1, 100));
            assert_eq!(machine.arrive(NOW, Phase::Ask, &party(1), true).0, Arrival::Admitted);
            let waiting: Vec<_> = (0..3).map(|_| pending(machine.arrive(NOW, Phase::Ask, &party(1), true).0)).collect();
            assert_eq!(machine.end(later, Phase::Ask, &party(1)), [waiting[expected]]);
        }
    }

    #[test]
    fn under_overload_what_somebody_asked_for_last_is_next_also_if_it_waits_for_long() {
        let mut machine = Machine::new(bounds(1, 100));
        assert_eq!(machine.arrive(NOW, Phase::Ask, &party(1), true).0, Arrival::Admitted);
        let waiting = [2, 3, 4].map(|number| pending(machine.arrive(NOW, Phase::Ask, &party(number), true).0));
        assert_eq!(machine.join(NOW, waiting[0], &party(5)), Joined::Moved);
        assert_eq!(machine.end(OVERLOAD * 2, Phase::Ask, &party(1)), waiting[..1]);
    }

    #[test]
    fn sluices_own_work_waits_behind_all_clients() {
        let mut machine = Machine::new(bounds(2, 100));
        for _ in 0..2 {
            assert_eq!(machine.arrive(NOW, Phase::Ask, &party(1), true).0, Arrival::Admitted);
        }
        let [own, client] = [Party::own("b"), party(1)].map(|party| pending(machine.arrive(NOW, Phase::Ask, &party, true).0));
        assert_eq!(machine.end(NOW, Phase::Ask, &party(1)), [client]);
        assert_eq!(machine.end(NOW, Phase::Ask, &party(1)), [own]);
    }

    #[test]
    fn in_a_full_queue_what_waits_for_long_gives_way() {
        let mut machine = Machine::new(bounds(1, 4));
        assert_eq!(machine.arrive(NOW, Phase::Ask, &party(1), true).0, Arrival::Admitted);
        let waiting = [2, 3, 4, 5]
            .map(|number| pending(machine.arrive(NOW, Phase::Ask, &Party { rule: number.to_string().into(), ..party(number) }, true).0));
        let newcomer = Party { rule: "b".into(), ..party(9) };
        assert_eq!(machine.arrive(HOPELESS, Phase::Ask, &newcomer, true), (Arrival::Refused, None));
        assert_eq!(machine.arrive(HOPELESS * 2, Phase::Ask, &newcomer, true).1, Some(waiting[0]));
        assert_eq!(machine.arrive(HOPELESS * 2, Phase::Ask, &newcomer, true), (Arrival::Refused, None), "it has one more");
    }

    #[test]
    fn work_of_use_to_nobody_gives_way_whichever_address_asked_for_it() {
        let mut machine = Machine::new(bounds(4, 100));
        let holders = [1, 2, 3, 4].map(|number| Party { rule: number.to_string().into(), ..party(number) });
        for holder in &holders {
            assert_eq!(machine.arrive(NOW, Phase::Ask, holder, false).0, Arrival::Admitted);
        }
        let of =
            |machine: &Machine, is_old| machine.useless_for(&party(5), (0..4).skip(1).map(|number| (number, &holders[number], is_old)));
        assert_eq!(of(&machine, true), [1, 2, 3]);
        assert!(of(&machine, false).is_empty(), "the backend may be about to answer");
        assert!(machine.end(NOW, Phase::Ask, &holders[1]).is_empty());
        assert!(of(&machine, true).is_empty(), "a place is free");
    }

    #[test]
    fn who_holds_many_slow_bodies_loses_one_to_who_finds_no_place() {
        let mut machine = Machine::new(bounds(1, 0));
        let holders = [1, 1, 1, 1, 2, 2, 3, 4].map(party);
        for holder in &holders {
            assert_eq!(machine.arrive(NOW, Phase::Download, holder, false).0, Arrival::Admitted);
        }
        let of = |machine: &Machine, party: &Party| machine.unfair_to(Phase::Download, party, holders.iter().enumerate(), Some);
        assert_eq!(of(&machine, &party(5)), [0, 1, 2, 3, 4, 5], "those first who hold most");
        assert_eq!(of(&machine, &party(2)), [0, 1, 2, 3], "it has two itself");
        assert!(of(&machine, &Party::own("a")).is_empty());
        machine.pass_on(Phase::Download, &party(1), &party(5));
        machine.pass_on(Phase::Download, &party(1), &party(6));
        assert_eq!(machine.active(Phase::Download), 8);
        assert!(of(&machine, &party(5)).is_empty(), "nobody has two more");
    }

    #[test]
    fn what_lasts_is_given_up_for_who_waits_in_vain_if_all_who_wait_for_it_have_many() {
        let mut machine = Machine::new(bounds(4, 100));
        let holders = [1, 1, 1, 2].map(party);
        for holder in &holders {
            assert_eq!(machine.arrive(NOW, Phase::Ask, holder, false).0, Arrival::Admitted);
        }
        let of = |machine: &Machine, asking: &Party, others: [&[Party]; 4]| {
            machine.outlasting(asking, (0..4).map(|number| (number, holders[number].clone(), others[number].to_vec())))
        };
        assert!(of(&machine, &party(9), [&[]; 4]).is_empty(), "none has been held for long");
        holders.iter().for_each(|holder| machine.lasts(holder));
        assert_eq!(of(&machine, &party(9), [&[], &[], &[], &[]]), [0, 1, 2]);
        assert_eq!(of(&machine, &party(9), [&[party(7)], &[party(2)], &[party(1)], &[]]), [2], "others wait for them");
        assert!(of(&machine, &party(2), [&[], &[], &[], &[]]).len() == 3 && of(&machine, &Party::own("a"), [&[]; 4]).is_empty());
        machine.lasts_no_longer(&party(1));
        assert!(machine.end(NOW, Phase::Ask, &party(1)).is_empty());
        assert!(of(&machine, &party(9), [&[]; 4]).is_empty(), "a place is free");
        // It is for those who hold no more that lasts than are free.
        assert!(machine.set_scarce(NOW, true).is_empty());
        let waiting = pending(machine.arrive(NOW, Phase::Ask, &party(1), true).0);
        assert_eq!(machine.arrive(NOW, Phase::Ask, &party(9), false).0, Arrival::Admitted);
        assert!(machine.end(NOW, Phase::Ask, &party(9)).is_empty());
        assert_eq!(machine.set_scarce(NOW, false), [waiting]);
    }

    #[test]
    fn a_full_queue_refuses_at_once_and_one_address_leaves_room_in_it() {
        let mut machine = Machine::new(bounds(1, 16));
        assert_eq!(machine.arrive(NOW, Phase::Ask, &party(1), true).0, Arrival::Admitted);
        while machine.arrive(NOW, Phase::Ask, &party(1), true).0 != Arrival::Refused {}
        assert_eq!(machine.queued(), 15, "of 16");
        let other = Party { rule: "b".into(), ..party(2) };
        let ticket = pending(machine.arrive(NOW, Phase::Ask, &other, true).0);
        // The queue is full: the next of those takes the place of the oldest of who has most.
        assert_eq!(machine.arrive(NOW, Phase::Ask, &other, true), (Arrival::Pending(ticket + 1), Some(0)));
        assert_eq!(machine.queued(), 16);
        assert_eq!(machine.arrive(NOW, Phase::Ask, &party(1), true), (Arrival::Refused, None));
        assert!(machine.leave(ticket) && !machine.leave(ticket) && !machine.leave(0));
        assert_eq!(machine.arrive(NOW, Phase::Ask, &other, false).0, Arrival::Refused, "it may not wait");
    }
}
