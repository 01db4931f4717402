//! How many connections there may be, in all and from one address.
//!
//! When all are open, those that are idle give way to new ones, beginning with the address that has most. One address, or one /48 of IPv6, may
//! have no more than are free: it never takes the last ones from others (see [`admission`](crate::upstream::admission) for the rule). Trusted
//! proxies have no limit of their own.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::{IntCounter, IntCounterVec, IntGauge};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::deadlines::{Activity, Overdue};
use crate::config::Limits;
use crate::request::client::{counted_address, counted_network};

/// How often the log says that connections are refused.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// How long a new connection waits for one that is told to end.
const ROOM: Duration = Duration::from_millis(500);
/// This many idle connections are told to end at one time, so that the search costs each new one little.
const AT_ONCE: usize = 16;
/// Connections that have been quiet for less are not idle: the next request may be on its way.
const IDLE: Duration = Duration::from_millis(500);

/// The limits that all listeners of a kind share, and the connections that count against them.
#[derive(Clone)]
pub struct ConnectionLimits {
    /// The limits of a connection's requests.
    pub limits: Limits,
    free: Arc<Semaphore>,
    open: Arc<Mutex<Open>>,
    /// When it was last said that connections are refused.
    warned: Arc<Mutex<Option<Instant>>>,
    /// `None`: nobody counts.
    counted: Option<Counted>,
}

/// The metrics of connections.
#[derive(Clone)]
pub struct Counted {
    /// Those that are open.
    pub open: IntGauge,
    /// Those that an address had too many, or for which there was no room.
    pub refused: IntCounter,
    /// Those that were ended, by [why](Overdue::name).
    pub closed: IntCounterVec,
}

/// The connections that are open.
#[derive(Default)]
struct Open {
    /// How many, by address, of those whose number is bounded.
    by_address: HashMap<IpAddr, usize>,
    /// The same by network: [`counted_network`].
    by_network: HashMap<IpAddr, usize>,
    connections: HashMap<u64, OneOpen>,
    next: u64,
}

impl Open {
    /// One less of an address.
    fn give_back(&mut self, address: Option<IpAddr>) {
        let Some(address) = address else { return };
        less(&mut self.by_address, address);
        less(&mut self.by_network, counted_network(address));
    }
}

/// One less of an address, which is forgotten at zero.
fn less(counts: &mut HashMap<IpAddr, usize>, address: IpAddr) {
    if let Some(count) = counts.get_mut(&address) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&address);
        }
    }
}

/// One of them.
struct OneOpen {
    address: Option<IpAddr>,
    activity: Arc<Activity>,
}

impl ConnectionLimits {
    /// Takes as many connections as `limits` say, and counts them.
    #[must_use]
    pub fn new(limits: Limits, counted: Counted) -> Self {
        for why in Overdue::ALL {
            counted.closed.with_label_values(&[why.name()]);
        }
        Self { counted: Some(counted), ..Self::uncounted(limits) }
    }

    /// Takes as many connections as `limits` say.
    #[must_use]
    pub fn uncounted(limits: Limits) -> Self {
        let free = Arc::new(Semaphore::new(limits.connections));
        Self { limits, free, open: Arc::default(), warned: Arc::default(), counted: None }
    }

    /// Admits a connection that was accepted; `None` if its address has as many as it may, or if all are open and none is idle.
    pub async fn admit(&self, peer: IpAddr) -> Option<Admitted> {
        let address = (!self.limits.trusts(peer)).then(|| counted_address(peer));
        if !self.reserve(address) {
            if self.is_due() {
                let limit = self.limits.connections_per_address;
                tracing::warn!(%peer, limit, "an address has too many connections; more are closed (limits.connections_per_address, or trusted_proxies if it is a proxy of yours)");
            }
            return None;
        }
        let permit = match Arc::clone(&self.free).try_acquire_owned() {
            Ok(permit) => Some(permit),
            Err(_) if self.make_room() => timeout(ROOM, Arc::clone(&self.free).acquire_owned()).await.ok().and_then(Result::ok),
            Err(_) => None,
        };
        if permit.is_none() {
            self.open().give_back(address);
            if self.is_due() {
                let limit = self.limits.connections;
                tracing::warn!(%peer, limit, "all connections are open and none is idle; new ones are closed (limits.connections, and LimitNOFILE with it)");
            }
        }
        permit.map(|permit| self.count(address, permit))
    }

    /// Counts one more connection of an address, if it may have one.
    fn reserve(&self, address: Option<IpAddr>) -> bool {
        let Some(address) = address else { return true };
        let free = self.free.available_permits();
        // Where one address may have all, that is the operator's word.
        let may_have_all = self.limits.connections_per_address >= self.limits.connections;
        let mut open = self.open();
        let network = counted_network(address);
        let held = open.by_address.get(&address).copied().unwrap_or(0);
        let of_network = open.by_network.get(&network).copied().unwrap_or(0);
        let may = held < self.limits.connections_per_address && (of_network <= free || may_have_all);
        if may {
            open.by_address.insert(address, held + 1);
            open.by_network.insert(network, of_network + 1);
        }
        may
    }

    fn count(&self, address: Option<IpAddr>, permit: OwnedSemaphorePermit) -> Admitted {
        let mut open = self.open();
        let (number, activity) = (open.next, Arc::new(Activity::default()));
        open.next += 1;
        open.connections.insert(number, OneOpen { address, activity: Arc::clone(&activity) });
        drop(open);
        if let Some(counted) = &self.counted {
            counted.open.inc();
        }
        Admitted { limits: self.clone(), address, number, activity, _permit: permit }
    }

    /// Tells some idle connections to end: of the address that has most those that are idle for longest, then of the others. Whether
    /// there are any.
    fn make_room(&self) -> bool {
        let open = self.open();
        let of_address = |one: &OneOpen| one.address.and_then(|address| open.by_address.get(&address)).copied().unwrap_or(0);
        let idle = open.connections.values().filter_map(|one| {
            let idle_for = one.activity.idle_for().filter(|idle| *idle >= IDLE)?;
            Some((of_address(one), idle_for, &one.activity))
        });
        let mut idle: Vec<_> = idle.collect();
        idle.sort_by_key(|&(most, idle_for, _)| std::cmp::Reverse((most, idle_for)));
        for (.., activity) in idle.iter().take(AT_ONCE) {
            activity.make_way();
        }
        !idle.is_empty()
    }

    /// Counts a connection that is refused. Whether the log is to say so, now and then.
    fn is_due(&self) -> bool {
        if let Some(counted) = &self.counted {
            counted.refused.inc();
        }
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = warned.is_none_or(|at| at.elapsed() >= WARN_EVERY);
        if is_due {
            *warned = Some(Instant::now());
        }
        is_due
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that was admitted, and counts until this is dropped.
pub struct Admitted {
    limits: ConnectionLimits,
    address: Option<IpAddr>,
    number: u64,
    /// When it last moved.
    pub activity: Arc<Activity>,
    _permit: OwnedSemaphorePermit,
}

impl Admitted {
    /// The limits of its requests.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits.limits
    }

    /// What counts those that are ended, if anybody counts.
    #[must_use]
    pub fn closed(&self) -> Option<IntCounterVec> {
        self.limits.counted.as_ref().map(|counted| counted.closed.clone())
    }

    /// Counts it as ended.
    pub fn count_closed(&self, why: Overdue) {
        if let Some(counted) = &self.limits.counted {
            counted.closed.with_label_values(&[why.name()]).inc();
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some(counted) = &self.limits.counted {
            counted.open.dec();
        }
        let mut open = self.limits.open();
        open.connections.remove(&self.number);
        open.give_back(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(lines: &str) -> ConnectionLimits {
        let text = format!("trusted_proxies=['192.0.2.0/24']\n[backend]\nurl='http://127.0.0.1:1'\n[limits]\n{lines}");
        let limits = crate::config::check("t", &text, &|_| None).config.unwrap().limits;
        let metrics = crate::telemetry::metrics::Metrics::new().unwrap();
        let (open, refused) = (metrics.connections.clone(), metrics.connections_refused.clone());
        ConnectionLimits::new(limits, Counted { open, refused, closed: metrics.connections_closed.clone() })
    }

    #[tokio::test]
    async fn an_address_has_so_many_connections_and_a_trusted_proxy_any_number() {
        let limits = limits("connections_per_address=2");
        let Counted { open, refused, .. } = limits.counted.clone().unwrap();
        let admit = async |peer: &str| limits.admit(peer.parse().unwrap()).await;
        let (first, _second) = (admit("198.51.100.1").await, admit("::ffff:198.51.100.1").await);
        assert!(first.is_some() && admit("198.51.100.1").await.is_none() && refused.get() == 1);
        drop(first);
        let _third = admit("198.51.100.1").await.unwrap();
        let _sixth = (admit("2001:db8::1").await.unwrap(), admit("2001:db8::2").await.unwrap());
        assert!(admit("2001:db8::3").await.is_none());
        let _seventh = admit("2001:db8:0:1::3").await.unwrap();
        let mut proxies = Vec::new();
        for _ in 0..5 {
            proxies.push(admit("192.0.2.9").await.unwrap());
        }
        assert_eq!(open.get(), 10);
        drop((_second, _third, _sixth, _seventh, proxies));
        assert!(limits.open().by_address.is_empty() && limits.open().connections.is_empty());
    }

    #[tokio::test]
    async fn a_site_of_ipv6_leaves_room_to_others_from_however_many_of_its_networks_it_comes() {
        let limits = limits("connections=64\nconnections_per_address=40");
        let mut held = Vec::new();
        for network in 0..200_u16 {
            held.extend(limits.admit(format!("2001:db8:0:{network:x}::1").parse().unwrap()).await);
        }
        assert!(held.len() <= 40, "{}", held.len());
        assert!(limits.admit("2001:db8:1::1".parse().unwrap()).await.is_some());
        held.clear();
        assert!(limits.open().by_network.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn some_addresses_leave_room_for_others_and_what_is_idle_gives_way() {
        let limits = limits("connections=64\nconnections_per_address=40");
        let admit = async |peer: u8| limits.admit(IpAddr::from([198, 51, 100, peer])).await;
        let mut held = Vec::new();
        for peer in 0..5 {
            while let Some(admitted) = admit(peer).await {
                held.push(admitted);
            }
        }
        assert!(held.len() < 64, "one that has none gets one");
        for peer in 10..10 + u8::try_from(64 - held.len()).unwrap() {
            held.push(admit(peer).await.unwrap());
        }
        // All are open. The one that asks next makes idle ones of the first address end.
        tokio::time::advance(IDLE).await;
        let is_told = |one: &Admitted| {
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            std::pin::pin!(one.activity.gives_way()).poll(&mut cx).is_ready()
        };
        let (admitted, ()) = tokio::join!(admit(99), async {
            let ending = loop {
                tokio::task::yield_now().await;
                if let Some(ending) = held.iter().position(is_told) {
                    break ending;
                }
            };
            assert!(held[ending].address == held[0].address, "of the address that has most");
            held.remove(ending);
        });
        assert!(admitted.is_some());
        assert!(admit(98).await.is_none(), "the others that were told have not ended");
    }
}
