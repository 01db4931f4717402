#![doc = include_str!("protocol.md")]

pub mod machine;
#[cfg(test)]
mod simulator;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::telemetry::metrics::Metrics;
use machine::{Arrival, Bounds, Machine, Party, Phase, Ticket};

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
    /// Those that wait, for what, and where they hear that they have a place.
    waiting: HashMap<Ticket, (Phase, Party, oneshot::Sender<Place>)>,
}

/// A place of a phase, until this is dropped.
pub struct Place {
    admission: Arc<Admission>,
    phase: Phase,
    party: Party,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.end(self.phase, &self.party);
    }
}

/// A request in the queue, until this is dropped.
struct Waiting<'a> {
    admission: &'a Admission,
    ticket: Ticket,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.admission.state();
        // If it has a place by now, that ends with the channel that it was sent through.
        state.machine.leave(self.ticket);
        state.waiting.remove(&self.ticket);
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
        let state = Mutex::new(State { machine: Machine::new(bounds), waiting: HashMap::new() });
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
        Place { admission: Arc::clone(self), phase, party: party.clone() }
    }

    fn refuse(&self, phase: Phase, why: &str) {
        self.metrics.backend_rejected.with_label_values(&[phase.name(), why]).inc();
    }

    /// A place of a phase, waited for in the queue if need be. A caller that is dropped meanwhile leaves the queue. `None`: the queue
    /// is full, or no place was free in time.
    pub async fn admit(self: &Arc<Self>, phase: Phase, party: &Party) -> Option<Place> {
        let (waiting, receiver) = {
            let mut state = self.state();
            let (arrival, displaced) = state.machine.arrive(self.start.elapsed(), phase, party, true);
            self.tell(&state);
            // Its channel ends, which tells it.
            if let Some((phase, ..)) = displaced.and_then(|ticket| state.waiting.remove(&ticket)) {
                self.refuse(phase, "displaced");
            }
            match arrival {
                Arrival::Admitted => return Some(self.place(phase, party)),
                Arrival::Refused => {
                    self.refuse(phase, "full");
                    return None;
                }
                Arrival::Pending(ticket) => {
                    let (sender, receiver) = oneshot::channel();
                    state.waiting.insert(ticket, (phase, party.clone(), sender));
                    (Waiting { admission: self, ticket }, receiver)
                }
            }
        };
        let place = timeout(self.patience, receiver).await;
        drop(waiting);
        if place.is_err() {
            self.refuse(phase, "timeout");
        }
        place.ok().and_then(Result::ok)
    }

    /// A place of a phase that is free now; `None` if there is none for this party.
    pub fn try_admit(self: &Arc<Self>, phase: Phase, party: &Party) -> Option<Place> {
        let mut state = self.state();
        let (arrival, _) = state.machine.arrive(self.start.elapsed(), phase, party, false);
        self.tell(&state);
        drop(state);
        if arrival != Arrival::Admitted {
            self.refuse(phase, "full");
            return None;
        }
        Some(self.place(phase, party))
    }

    fn end(self: &Arc<Self>, phase: Phase, party: &Party) {
        let mut state = self.state();
        let admitted = state.machine.end(self.start.elapsed(), phase, party);
        let admitted: Vec<_> = admitted.iter().filter_map(|ticket| state.waiting.remove(ticket)).collect();
        self.tell(&state);
        drop(state);
        // Unlocked: the place of one that has just left is dropped, which ends it.
        for (phase, party, sender) in admitted {
            drop(sender.send(self.place(phase, &party)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn party(number: u8) -> Party {
        Party::client(IpAddr::from([10, 0, 0, number]), "a")
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

    #[tokio::test]
    async fn a_full_queue_refuses_at_once() {
        let admission = admission(1, 0);
        let _first = admission.admit(Phase::Ask, &party(1)).await;
        assert!(admission.admit(Phase::Ask, &party(2)).await.is_none());
        assert_eq!(admission.metrics.backend_rejected.with_label_values(&["ask", "full"]).get(), 1);
    }
}
