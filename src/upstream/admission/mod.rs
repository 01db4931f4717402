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

/// How often a request that waits looks whether another's place is of use to nobody by now.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How many addresses are known of those who ask for one answer. Of more, the first are charged.
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

    /// The address of the first one.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.asking().parties.first().and_then(|party| party.address)
    }

    fn asking(&self) -> MutexGuard<'_, Asking> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more. Returns the request in the queue.
    fn add(&self, party: &Party) -> Option<Ticket> {
        let mut asking = self.asking();
        if asking.parties.len() < MOST_ASKERS && !asking.parties.contains(party) {
            asking.parties.push(party.clone());
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

/// Work that has a place of the phase ask, and may be of use to nobody by now.
pub trait Work: Send + Sync {
    /// Gives it up if nobody waits for it, so that another gets its place. `false`: somebody does. Called under a lock: it only tells.
    fn give_up(&self) -> bool;
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
    /// Those that hold a place and can be given up, the oldest first.
    works: BTreeMap<u64, (Party, Weak<dyn Work>)>,
    next_work: u64,
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
    party: Party,
    /// The number of the work that it is for, if that can be given up.
    work: Option<u64>,
}

impl Place {
    /// Says what the place is for. It is given up if it is of use to nobody when another request needs the place.
    pub fn is_for(&mut self, work: Weak<dyn Work>) {
        let mut state = self.admission.state();
        let number = state.next_work;
        state.next_work += 1;
        state.works.insert(number, (self.party.clone(), work));
        self.work = Some(number);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.end(self.phase, &self.party, self.work);
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
        let state = State { machine: Machine::new(bounds), waiting: HashMap::new(), works: BTreeMap::new(), next_work: 0 };
        let state = Mutex::new(state);
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

    fn place(self: &Arc<Self>, phase: Phase, party: &Party) -> Place {
        Place { admission: Arc::clone(self), phase, party: party.clone(), work: None }
    }

    fn refuse(&self, phase: Phase, why: &str) {
        self.metrics.backend_rejected.with_label_values(&[phase.name(), why]).inc();
    }

    /// A place of a phase, waited for in the queue if need be. A caller that is dropped meanwhile leaves the queue. `None`: the queue
    /// is full, or no place was free in time.
    pub async fn admit(self: &Arc<Self>, phase: Phase, askers: &Askers) -> Option<Place> {
        if phase == Phase::Ask {
            self.take_back(askers, None);
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
                Arrival::Admitted => return Some(self.place(phase, &party)),
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
        let last = Instant::now() + self.patience * 2;
        let mut until = Instant::now() + self.patience;
        while Instant::now() < until {
            let look_again = if phase == Phase::Ask { until.min(Instant::now() + LOOK_AGAIN) } else { until };
            if let Ok(given) = timeout_at(look_again, &mut receiver).await {
                return given.ok();
            }
            self.take_back(askers, Some(waiting.ticket));
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
        let Some(ticket) = askers.add(party) else { return };
        let mut state = self.state();
        match state.machine.join(ticket, party) {
            Joined::Unchanged => {}
            Joined::Moved => {
                if let Some(waiter) = state.waiting.get_mut(&ticket) {
                    (waiter.party, waiter.since) = (party.clone(), Instant::now());
                }
            }
            Joined::Admitted => {
                let admitted = state.waiting.remove(&ticket).map(|waiter| Waiter { party: party.clone(), ..waiter });
                self.tell(&state);
                drop(state);
                self.hand_on(admitted);
            }
        }
    }

    /// A place of a phase that is free now; `None` if there is none for those who ask.
    pub fn try_admit(self: &Arc<Self>, phase: Phase, askers: &Askers) -> Option<Place> {
        let mut state = self.state();
        let party = askers.asking().least(&state.machine, phase);
        let (arrival, _) = state.machine.arrive(self.start.elapsed(), phase, &party, false);
        self.tell(&state);
        drop(state);
        if arrival != Arrival::Admitted {
            self.refuse(phase, "full");
            return None;
        }
        Some(self.place(phase, &party))
    }

    /// Gives up one work that is of use to nobody, if a request finds no place otherwise. One that has left the queue by now, or has a
    /// place, needs none.
    fn take_back(self: &Arc<Self>, askers: &Askers, ticket: Option<Ticket>) {
        let mut state = self.state();
        if state.works.is_empty() || ticket.is_some_and(|ticket| !state.waiting.contains_key(&ticket)) {
            return;
        }
        let waiter = ticket.and_then(|ticket| state.waiting.get(&ticket)).map(|waiter| waiter.party.clone());
        let party = &waiter.unwrap_or_else(|| askers.asking().least(&state.machine, Phase::Ask));
        let holders = state.works.iter().map(|(&number, (holder, _))| (number, holder));
        let in_order = state.machine.to_take_over(Phase::Ask, party, holders);
        let is_given_up = |number: &u64| state.works.get(number).and_then(|(_, work)| work.upgrade()).is_some_and(|work| work.give_up());
        let Some(given_up) = in_order.into_iter().find(is_given_up) else { return };
        let Some((holder, _)) = state.works.remove(&given_up) else { return };
        let admitted = self.ended(&mut state, Phase::Ask, &holder);
        drop(state);
        self.hand_on(admitted);
    }

    /// A place is free again, unless it was taken back from its work.
    fn end(self: &Arc<Self>, phase: Phase, party: &Party, work: Option<u64>) {
        let mut state = self.state();
        if work.is_some_and(|number| state.works.remove(&number).is_none()) {
            return;
        }
        let admitted = self.ended(&mut state, phase, party);
        drop(state);
        self.hand_on(admitted);
    }

    /// Returns those that have a place from now on.
    fn ended(&self, state: &mut State, phase: Phase, party: &Party) -> Vec<Waiter> {
        let admitted = state.machine.end(self.start.elapsed(), phase, party);
        let admitted = admitted.iter().filter_map(|ticket| state.waiting.remove(ticket)).collect();
        self.tell(state);
        admitted
    }

    /// Unlocked: the place of one that has just left is dropped, which ends it.
    fn hand_on(self: &Arc<Self>, admitted: impl IntoIterator<Item = Waiter>) {
        for Waiter { phase, party, told, .. } in admitted {
            drop(told.send(self.place(phase, &party)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        assert_eq!(held.last().unwrap().party, client(2));
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
        assert_eq!(admission.admit(Phase::Ask, &askers).await.unwrap().party.address, client(3).address);
        held.clear();
        assert!(admission.state().machine.is_empty() && admission.state().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once() {
        let admission = admission(1, 0);
        let _first = admission.admit(Phase::Ask, &party(1)).await;
        assert!(admission.admit(Phase::Ask, &party(2)).await.is_none());
        assert_eq!(admission.metrics.backend_rejected.with_label_values(&["ask", "full"]).get(), 1);
    }
}
