#![doc = include_str!("protocol.md")]

pub mod machine;
#[cfg(test)]
mod simulator;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::telemetry::metrics::Metrics;
use machine::{Arrival, Bounds, Joined, Machine, Party, Phase, Ticket};

/// How often a request that waits looks whether another is to give its place up by now: less often where many of its address wait, or many
/// parties, so that all of them together take little time.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const FEW_OF_ADDRESS: usize = 4;
const FEW_PARTIES: usize = 256;

/// A body that has not moved for so long, or a fetch of use to nobody that has taken so long, may lose its place to who finds none.
const AT_REST: Duration = Duration::from_secs(1);

/// A request that waits for so long, while no place comes back for it, has one given up that lasts. Where places are scarce already, it need
/// only have looked once.
const IN_VAIN: Duration = Duration::from_secs(1);

/// Places that were scarce are held to be for so long after a request waited in vain.
const SCARCE: Duration = Duration::from_secs(30);

/// How many addresses are known of those who ask for one answer. Of more, it is those that hold fewest places.
const MOST_ASKERS: usize = 8;

/// Those who ask for one answer, on one rule. Its place is charged to the one of them that holds fewest.
pub struct Askers {
    rule: Arc<str>,
    asking: Mutex<Asking>,
}

struct Asking {
    /// At least one.
    parties: Vec<Party>,
    /// The request in the queue.
    ticket: Option<Ticket>,
}

impl Askers {
    /// One alone.
    #[must_use]
    pub fn one(party: &Party) -> Self {
        Self { rule: Arc::clone(&party.rule), asking: Mutex::new(Asking { parties: vec![party.clone()], ticket: None }) }
    }

    /// The rule's name.
    #[must_use]
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// All of them. `None`: there may be more than are known.
    #[must_use]
    pub fn all(&self) -> Option<Vec<Party>> {
        let asking = self.asking();
        (asking.parties.len() < MOST_ASKERS).then(|| asking.parties.clone())
    }

    /// The address of the first one.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.asking().parties.first().and_then(|party| party.address)
    }

    fn asking(&self) -> MutexGuard<'_, Asking> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more. Returns the request in the queue.
    fn add(&self, party: &Party, machine: &Machine) -> Option<Ticket> {
        let mut asking = self.asking();
        let parties = &mut asking.parties;
        if parties.contains(party) {
            return asking.ticket;
        }
        if parties.len() < MOST_ASKERS {
            parties.push(party.clone());
        } else if let Some(most) = parties.iter_mut().max_by_key(|known| machine.held_by(known))
            && machine.held_by(most) > machine.held_by(party)
        {
            *most = party.clone();
        }
        asking.ticket
    }
}

impl Asking {
    /// The one that is to be charged.
    fn least(&self, machine: &Machine, phase: Phase) -> Party {
        match &self.parties[..] {
            [only] => only.clone(),
            parties => machine.least(phase, parties.iter()).unwrap_or(&parties[0]).clone(),
        }
    }
}

/// What a place is for, as far as it may have to give that up to another.
pub trait Work: Send + Sync {
    /// Gives it up, so that another gets its place. `false`: it goes on, since somebody waits for it. Called under a lock: it only tells.
    fn give_up(&self) -> bool;

    /// Gives it up though somebody waits for it. `false`: it goes on, since it may change something.
    fn take_away(&self) -> bool {
        self.give_up()
    }

    /// Those for whom it is, beside the one who is charged for its place. `None`: they are too many to be known.
    fn askers(&self) -> Option<Vec<Party>> {
        Some(Vec::new())
    }

    /// Since when nothing of it has moved. In the phase ask nobody asks.
    fn rests_since(&self) -> Option<Instant> {
        None
    }

    /// Drops what it holds, having been given up. Called without a lock.
    fn let_go(&self) {}
}

/// Gives places, as the page says.
pub struct Admission {
    state: Mutex<State>,
    start: Instant,
    /// How long a request may wait.
    patience: Duration,
    active: [IntGauge; Phase::ALL.len()],
    metrics: Arc<Metrics>,
}

struct State {
    machine: Machine,
    waiting: HashMap<Ticket, Waiter>,
    /// By phase, the places that are taken, the oldest first.
    places: [BTreeMap<u64, Taken>; Phase::ALL.len()],
    next_place: u64,
    /// The places of the phase ask before this one last.
    first_fresh: u64,
    /// When a request waited in vain last.
    scarce_since: Option<Instant>,
}

/// A place that is taken.
struct Taken {
    party: Party,
    since: Instant,
    /// What it is for, if that can be given up.
    work: Option<Weak<dyn Work>>,
}

impl Taken {
    /// Its work, if that is under way and can be given up.
    fn work(&self) -> Option<Arc<dyn Work>> {
        self.work.as_ref()?.upgrade()
    }
}

impl State {
    /// Takes down a place that was given.
    fn note(&mut self, phase: Phase, party: &Party) -> u64 {
        let number = self.next_place;
        self.next_place += 1;
        self.places[phase as usize].insert(number, Taken { party: party.clone(), since: Instant::now(), work: None });
        number
    }

    /// Forgets a place that is about to end.
    fn forget(&mut self, phase: Phase, number: u64) -> Option<Taken> {
        let taken = self.places[phase as usize].remove(&number)?;
        if phase == Phase::Ask && number < self.first_fresh {
            self.machine.lasts_no_longer(&taken.party);
        }
        Some(taken)
    }

    /// Notes which places of the phase ask have been held for long by now.
    fn age(&mut self, now: Instant) {
        let fresh = self.places[Phase::Ask as usize].range(self.first_fresh..);
        for (&number, taken) in fresh.take_while(|(_, taken)| now.saturating_duration_since(taken.since) >= AT_REST) {
            self.machine.lasts(&taken.party);
            self.first_fresh = number + 1;
        }
    }

    /// How long a request waits until it looks again.
    fn pause(&self, phase: Phase, ticket: Ticket) -> Duration {
        let of_address = self.waiting.get(&ticket).map_or(0, |waiter| self.machine.queued_of(&waiter.party));
        let times = 1 + of_address / FEW_OF_ADDRESS + self.machine.parties_waiting(phase) / FEW_PARTIES;
        LOOK_AGAIN.saturating_mul(u32::try_from(times).unwrap_or(u32::MAX))
    }

    /// Gives up the first of these that can be, though somebody waits for it if `is_taken_away`. Its place is nobody's then.
    fn give_up(&mut self, phase: Phase, in_order: impl IntoIterator<Item = u64>, is_taken_away: bool) -> Option<(Party, Arc<dyn Work>)> {
        let places = &self.places[phase as usize];
        let (number, work) = in_order.into_iter().find_map(|number| {
            let work = places.get(&number)?.work()?;
            let is_given_up = if is_taken_away { work.take_away() } else { work.give_up() };
            is_given_up.then_some((number, work))
        })?;
        self.forget(phase, number).map(|taken| (taken.party, work))
    }
}

/// One that waits.
struct Waiter {
    phase: Phase,
    party: Party,
    /// Since when, as that party's.
    since: Instant,
    /// Where it hears that it has a place.
    told: oneshot::Sender<Place>,
}

/// A place of a phase, until this is dropped.
pub struct Place {
    admission: Arc<Admission>,
    phase: Phase,
    number: u64,
}

impl Place {
    /// What it is a place of.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// Says what the place is for, unless that was said. It is given up when another request is to have the place, as the page says.
    pub fn is_for(&self, work: Weak<dyn Work>) {
        let mut state = self.admission.state();
        if let Some(taken) = state.places[self.phase as usize].get_mut(&self.number) {
            taken.work.get_or_insert(work);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.end(self.phase, self.number);
    }
}

/// A request in the queue, until this is dropped.
struct Waiting<'a> {
    admission: &'a Admission,
    askers: &'a Askers,
    ticket: Ticket,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        // If it has a place by now, that ends with the channel that it was sent through.
        state.machine.leave(self.ticket);
        state.waiting.remove(&self.ticket);
        self.askers.asking().ticket = None;
        self.admission.tell(&state);
    }
}

impl Admission {
    /// All places are free; a request waits for one for at most `patience`.
    #[must_use]
    pub fn new(bounds: Bounds, patience: Duration, metrics: Arc<Metrics>) -> Arc<Self> {
        let active = Phase::ALL.map(|phase| metrics.backend_active.with_label_values(&[phase.name()]));
        for phase in Phase::ALL {
            for why in ["full", "displaced", "timeout"] {
                metrics.backend_rejected.with_label_values(&[phase.name(), why]);
            }
        }
        let state = Mutex::new(State {
            machine: Machine::new(bounds),
            waiting: HashMap::new(),
            places: Default::default(),
            next_place: 0,
            first_fresh: 0,
            scarce_since: None,
        });
        Arc::new(Self { state, start: Instant::now(), patience, active, metrics })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, state: &State) {
        for (phase, gauge) in Phase::ALL.into_iter().zip(&self.active) {
            gauge.set(i64::try_from(state.machine.active(phase)).unwrap_or(i64::MAX));
        }
        self.metrics.backend_pending.set(i64::try_from(state.machine.queued()).unwrap_or(i64::MAX));
    }

    /// A place that the machine has given. Not to be dropped under the lock.
    fn place(self: &Arc<Self>, state: &mut State, phase: Phase, party: &Party) -> Place {
        Place { admission: Arc::clone(self), phase, number: state.note(phase, party) }
    }

    fn refuse(&self, phase: Phase, why: &str) {
        self.metrics.backend_rejected.with_label_values(&[phase.name(), why]).inc();
    }

    /// A place of a phase, waited for in the queue if need be. A caller that is dropped meanwhile leaves the queue. `None`: the queue
    /// is full, or no place was free in time.
    pub async fn admit(self: &Arc<Self>, phase: Phase, askers: &Askers) -> Option<Place> {
        self.look_at_scarcity();
        if let Some(place) = self.take_over(phase, askers, None) {
            return Some(place);
        }
        let (waiting, mut receiver) = {
            let mut state = self.state();
            // Locked until the ticket is in it, so that none who joins meanwhile is missed.
            let mut asking = askers.asking();
            let party = asking.least(&state.machine, phase);
            let (arrival, displaced) = state.machine.arrive(self.start.elapsed(), phase, &party, true);
            self.tell(&state);
            // Its channel ends, which tells it.
            if let Some(waiter) = displaced.and_then(|ticket| state.waiting.remove(&ticket)) {
                self.refuse(waiter.phase, "displaced");
            }
            match arrival {
                Arrival::Admitted => return Some(self.place(&mut state, phase, &party)),
                Arrival::Refused => {
                    self.refuse(phase, "full");
                    return None;
                }
                Arrival::Pending(ticket) => {
                    let (told, receiver) = oneshot::channel();
                    state.waiting.insert(ticket, Waiter { phase, party, since: Instant::now(), told });
                    asking.ticket = Some(ticket);
                    (Waiting { admission: self, askers, ticket }, receiver)
                }
            }
        };
        let began = Instant::now();
        let last = Instant::now() + self.patience * 2;
        let mut until = Instant::now() + self.patience;
        while Instant::now() < until {
            let pause = self.state().pause(phase, waiting.ticket);
            if let Ok(given) = timeout_at(until.min(Instant::now() + pause), &mut receiver).await {
                return given.ok();
            }
            if let Some(place) = self.take_over(phase, askers, Some(waiting.ticket)) {
                return Some(place);
            }
            if phase == Phase::Ask {
                self.take_away(waiting.ticket, began.elapsed());
            }
            // One who joined has patience of its own, within bounds.
            let since = self.state().waiting.get(&waiting.ticket).map(|waiter| waiter.since);
            until = since.map_or(until, |since| last.min(since + self.patience));
        }
        drop(waiting);
        // A place may have been on its way just now.
        let given = receiver.try_recv().ok();
        if given.is_none() {
            self.refuse(phase, "timeout");
        }
        given
    }

    /// Another asks for the same. What waits in the queue goes on as its own, if it holds less.
    pub fn join(self: &Arc<Self>, askers: &Askers, party: &Party) {
        let mut state = self.state();
        let Some(ticket) = askers.add(party, &state.machine) else { return };
        match state.machine.join(self.start.elapsed(), ticket, party) {
            Joined::Unchanged => {}
            Joined::Moved => {
                if let Some(waiter) = state.waiting.get_mut(&ticket) {
                    (waiter.party, waiter.since) = (party.clone(), Instant::now());
                }
            }
            Joined::Admitted => {
                let waiter = state.waiting.remove(&ticket).map(|waiter| Waiter { party: party.clone(), ..waiter });
                let given = self.give(&mut state, waiter);
                self.tell(&state);
                drop(state);
                hand_on(given);
            }
        }
    }

    /// A place of a phase that is free now, or that another gives up; `None` if there is none for those who ask.
    pub fn try_admit(self: &Arc<Self>, phase: Phase, askers: &Askers) -> Option<Place> {
        if let Some(place) = self.take_over(phase, askers, None) {
            return Some(place);
        }
        let mut state = self.state();
        let party = askers.asking().least(&state.machine, phase);
        let (arrival, _) = state.machine.arrive(self.start.elapsed(), phase, &party, false);
        self.tell(&state);
        if arrival != Arrival::Admitted {
            self.refuse(phase, "full");
            return None;
        }
        Some(self.place(&mut state, phase, &party))
    }

    /// Has another give its place up to a request that finds none. The request waits under `ticket`, if it does; one that has left the queue
    /// by now, or has a place, needs none. `None`: nobody gives a place up, or it is handed on as any that is free.
    fn take_over(self: &Arc<Self>, phase: Phase, askers: &Askers, ticket: Option<Ticket>) -> Option<Place> {
        let mut state = self.state();
        let places = &state.places[phase as usize];
        if places.is_empty() || ticket.is_some_and(|ticket| !state.waiting.contains_key(&ticket)) {
            return None;
        }
        let waiter = ticket.and_then(|ticket| state.waiting.get(&ticket)).map(|waiter| waiter.party.clone());
        let party = waiter.unwrap_or_else(|| askers.asking().least(&state.machine, phase));
        let now = Instant::now();
        let is_old = |since: Instant| now.saturating_duration_since(since) >= AT_REST;
        let works = places.iter().filter_map(|(&number, taken)| Some((number, taken, taken.work.as_ref()?)));
        if phase == Phase::Ask {
            let in_order = state.machine.useless_for(&party, works.map(|(number, taken, _)| (number, &taken.party, is_old(taken.since))));
            let (holder, work) = state.give_up(phase, in_order, false)?;
            let given = self.ended(&mut state, phase, &holder);
            drop(state);
            work.let_go();
            hand_on(given);
            return None;
        }
        let at_rest = |work: &Weak<dyn Work>| work.upgrade()?.rests_since().filter(|&since| is_old(since));
        let holders = works.map(|(number, taken, work)| ((number, work), &taken.party));
        let in_order = state.machine.unfair_to(phase, &party, holders, |(number, work)| Some((at_rest(work)?, number)));
        let (holder, work) = state.give_up(phase, in_order.into_iter().map(|(_, number)| number), true)?;
        state.machine.pass_on(phase, &holder, &party);
        if let Some(ticket) = ticket {
            state.machine.leave(ticket);
            state.waiting.remove(&ticket);
        }
        self.tell(&state);
        let place = self.place(&mut state, phase, &party);
        drop(state);
        work.let_go();
        self.refuse(phase, "displaced");
        Some(place)
    }

    /// Has a place of the phase ask given up that lasts, for a request that has `waited` in vain under `ticket`. The place is handed on as any
    /// that is free, and places are scarce from then on.
    fn take_away(self: &Arc<Self>, ticket: Ticket, waited: Duration) {
        let (mut state, now) = (self.state(), Instant::now());
        let given = self.end_scarcity(&mut state, now);
        state.age(now);
        let in_vain = if state.machine.is_scarce() { Duration::ZERO } else { IN_VAIN.min(self.patience / 2) };
        let waiter = state.waiting.get(&ticket).filter(|_| waited >= in_vain).map(|waiter| waiter.party.clone());
        let taken_away = waiter.and_then(|party| {
            let (phase, fresh) = (Phase::Ask, state.first_fresh);
            let lasting = state.places[phase as usize].range(..fresh);
            let holders = lasting.filter_map(|(&number, taken)| Some((number, taken.party.clone(), taken.work()?.askers()?)));
            let in_order = state.machine.outlasting(&party, holders);
            state.give_up(phase, in_order, true)
        });
        let Some((holder, work)) = taken_away else {
            drop(state);
            return hand_on(given);
        };
        state.scarce_since = Some(now);
        let mut given = given;
        // Before places count as scarce: else the one who waits may hold too many by then.
        given.extend(self.ended(&mut state, Phase::Ask, &holder));
        given.extend(self.set_scarce(&mut state, true));
        drop(state);
        self.refuse(Phase::Ask, "displaced");
        work.let_go();
        hand_on(given);
    }

    /// Ends it where it is over, also for what arrives now.
    fn look_at_scarcity(self: &Arc<Self>) {
        let mut state = self.state();
        let given = self.end_scarcity(&mut state, Instant::now());
        drop(state);
        hand_on(given);
    }

    /// Places are scarce no more, if no request has waited in vain for a while.
    fn end_scarcity(self: &Arc<Self>, state: &mut State, now: Instant) -> Vec<Given> {
        match state.scarce_since.take_if(|since| now.saturating_duration_since(*since) >= SCARCE) {
            Some(_) => self.set_scarce(state, false),
            None => Vec::new(),
        }
    }

    fn set_scarce(self: &Arc<Self>, state: &mut State, is_scarce: bool) -> Vec<Given> {
        let admitted = state.machine.set_scarce(self.start.elapsed(), is_scarce);
        let waiters: Vec<_> = admitted.iter().filter_map(|ticket| state.waiting.remove(ticket)).collect();
        self.give(state, waiters)
    }

    /// A place is free again, unless it was taken from its holder.
    fn end(self: &Arc<Self>, phase: Phase, number: u64) {
        let mut state = self.state();
        let now = Instant::now();
        state.age(now);
        let Some(taken) = state.forget(phase, number) else { return };
        let mut given = self.end_scarcity(&mut state, now);
        given.extend(self.ended(&mut state, phase, &taken.party));
        drop(state);
        hand_on(given);
    }

    /// Returns the places of those that have one from now on.
    fn ended(self: &Arc<Self>, state: &mut State, phase: Phase, party: &Party) -> Vec<Given> {
        let admitted = state.machine.end(self.start.elapsed(), phase, party);
        let waiters: Vec<_> = admitted.iter().filter_map(|ticket| state.waiting.remove(ticket)).collect();
        let given = self.give(state, waiters);
        self.tell(state);
        given
    }

    /// The places of those that wait no longer.
    fn give(self: &Arc<Self>, state: &mut State, waiters: impl IntoIterator<Item = Waiter>) -> Vec<Given> {
        let mut given = Vec::new();
        for Waiter { phase, party, told, .. } in waiters {
            given.push((told, self.place(state, phase, &party)));
        }
        given
    }
}

/// A place, and where the one hears of it that waited.
type Given = (oneshot::Sender<Place>, Place);

/// Unlocked: the place of one that has just left is dropped, which ends it.
fn hand_on(given: Vec<Given>) {
    for (told, place) in given {
        drop(told.send(place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::time::timeout;

    fn client(number: u8) -> Party {
        Party::client(IpAddr::from([10, 0, 0, number]), "a")
    }

    fn party(number: u8) -> Askers {
        Askers::one(&client(number))
    }

    fn admission(ask: usize, queue: usize) -> Arc<Admission> {
        let bounds = Bounds { ask, upload: 1, download: 1, stream: 1, queue };
        Admission::new(bounds, Duration::from_secs(5), Arc::new(Metrics::new().unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_handed_on_and_waiting_has_an_end() {
        let admission = admission(1, 10);
        let first = admission.admit(Phase::Ask, &party(1)).await;
        assert!(first.is_some() && admission.metrics.backend_active.with_label_values(&["ask"]).get() == 1);
        assert!(admission.admit(Phase::Ask, &party(2)).await.is_none(), "none was free in time");
        let waiting = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.admit(Phase::Ask, &party(2)).await.is_some() }
        });
        tokio::task::yield_now().await;
        assert_eq!(admission.metrics.backend_pending.get(), 1);
        drop(first);
        assert!(waiting.await.unwrap());
        assert!(admission.state().machine.is_empty() && admission.state().waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_the_queue_leaves_nothing_even_with_a_place_on_its_way() {
        let admission = admission(1, 10);
        for gets_a_place in [false, true] {
            let first = admission.admit(Phase::Ask, &party(1)).await;
            let other = party(2);
            let mut waiting = Box::pin(admission.admit(Phase::Ask, &other));
            assert!(timeout(Duration::from_millis(1), &mut waiting).await.is_err());
            if gets_a_place {
                drop(first);
                drop(waiting);
            } else {
                drop(waiting);
                drop(first);
            }
            assert!(admission.state().machine.is_empty() && admission.state().waiting.is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_who_joins_a_request_in_the_queue_lends_it_a_place_and_patience() {
        let admission = admission(16, 100);
        let (greedy, mut held) = (party(1), Vec::new());
        while let Some(place) = admission.try_admit(Phase::Ask, &greedy) {
            held.push(place);
        }
        // A place is free that the first may not take.
        let askers = party(1);
        let mut waiting = Box::pin(admission.admit(Phase::Ask, &askers));
        assert!(timeout(Duration::from_secs(1), &mut waiting).await.is_err());
        admission.join(&askers, &client(1));
        assert!(timeout(Duration::from_secs(1), &mut waiting).await.is_err());
        admission.join(&askers, &client(2));
        held.push(waiting.await.unwrap());
        let charged = |place: &Place| admission.state().places[Phase::Ask as usize][&place.number].party.clone();
        assert_eq!(charged(held.last().unwrap()), client(2));
        // None is free. The second's patience begins when it joins.
        let askers = party(1);
        let began = Instant::now();
        let mut waiting = Box::pin(admission.admit(Phase::Ask, &askers));
        assert!(timeout(Duration::from_secs(4), &mut waiting).await.is_err());
        admission.join(&askers, &client(3));
        assert!(waiting.as_mut().await.is_none() && began.elapsed().as_secs() == 9);
        drop(waiting);
        // Those who joined before it waits are known too.
        admission.join(&askers, &client(4));
        drop(held.pop());
        let place = admission.admit(Phase::Ask, &askers).await.unwrap();
        assert_eq!(charged(&place).address, client(3).address);
        drop(place);
        held.clear();
        assert!(admission.state().machine.is_empty() && admission.state().waiting.is_empty());
    }

    /// Work that somebody waits for.
    struct Awaited(Vec<Party>, AtomicBool);

    impl Work for Awaited {
        fn give_up(&self) -> bool {
            false
        }

        fn take_away(&self) -> bool {
            !self.1.swap(true, Ordering::Relaxed)
        }

        fn askers(&self) -> Option<Vec<Party>> {
            Some(self.0.clone())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_in_vain_beside_many_that_last_gets_one_of_their_places() {
        let admission = admission(16, 100);
        let (mut held, mut works) = (Vec::new(), Vec::new());
        for number in [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4] {
            let place = admission.try_admit(Phase::Ask, &party(number)).unwrap();
            // One of them is asked for by another address too.
            let askers = if held.is_empty() { vec![client(8)] } else { Vec::new() };
            let work = Arc::new(Awaited(askers, AtomicBool::new(false)));
            let weak: Weak<Awaited> = Arc::downgrade(&work);
            place.is_for(weak);
            held.push(place);
            works.push(work);
        }
        let began = Instant::now();
        let first = admission.admit(Phase::Ask, &party(9)).await;
        assert!(first.is_some() && (1..3).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
        let taken = || works.iter().filter(|work| work.1.load(Ordering::Relaxed)).count();
        assert!(taken() == 1 && !works[0].1.load(Ordering::Relaxed));
        // What it gives back is left to those with few, though the others wait for it.
        let greedy = party(3);
        let mut waiting = Box::pin(admission.admit(Phase::Ask, &greedy));
        assert!(timeout(Duration::from_millis(10), &mut waiting).await.is_err());
        drop(first);
        for _ in 0..3 {
            assert!(timeout(Duration::from_millis(1), admission.admit(Phase::Ask, &party(9))).await.unwrap().is_some());
        }
        assert_eq!(taken(), 1);
        drop(waiting);
        tokio::time::advance(SCARCE).await;
        assert!(admission.admit(Phase::Ask, &greedy).await.is_some(), "nobody else has asked for a while");
        held.clear();
        let state = admission.state();
        assert!(state.machine.is_empty() && state.waiting.is_empty() && state.places.iter().all(BTreeMap::is_empty));
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once() {
        let admission = admission(1, 0);
        let _first = admission.admit(Phase::Ask, &party(1)).await;
        assert!(admission.admit(Phase::Ask, &party(2)).await.is_none());
        assert_eq!(admission.metrics.backend_rejected.with_label_values(&["ask", "full"]).get(), 1);
    }
}
