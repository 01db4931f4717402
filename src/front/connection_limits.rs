//! How many connections there may be, in all and from one address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::{IntCounter, IntGauge};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::config::Limits;

/// How often the log says that an address has too many connections.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The limits that all listeners of a kind share, and the connections that count against them.
#[derive(Clone)]
pub struct ConnectionLimits {
    /// The limits of a connection's requests.
    pub limits: Limits,
    free: Arc<Semaphore>,
    /// Open connections by address, of those whose number is bounded.
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
    /// When it was last said that an address has too many.
    warned: Arc<Mutex<Option<Instant>>>,
    /// Open connections, and those that were refused; `None`: nobody counts.
    counted: Option<(IntGauge, IntCounter)>,
}

impl ConnectionLimits {
    /// Takes as many connections as `limits` say, shows how many are `open`, and counts in `refused` those that an address
    /// has too many.
    #[must_use]
    pub fn new(limits: Limits, open: IntGauge, refused: IntCounter) -> Self {
        Self { counted: Some((open, refused)), ..Self::uncounted(limits) }
    }

    /// Takes as many connections as `limits` say.
    #[must_use]
    pub fn uncounted(limits: Limits) -> Self {
        let free = Arc::new(Semaphore::new(limits.connections));
        Self { limits, free, by_address: Arc::default(), warned: Arc::default(), counted: None }
    }

    /// Waits until there may be another connection.
    pub async fn free(&self) -> OwnedSemaphorePermit {
        match Arc::clone(&self.free).acquire_owned().await {
            Ok(permit) => permit,
            // Nobody closes the semaphore.
            Err(_) => std::future::pending().await,
        }
    }

    /// Admits a connection; `None` if its address has as many as it may.
    #[must_use]
    pub fn admit(&self, peer: IpAddr, permit: OwnedSemaphorePermit) -> Option<Admitted> {
        let address = (!self.limits.trusts(peer)).then(|| counted_address(peer));
        if let Some(address) = address {
            let mut by_address = self.by_address();
            let count = by_address.entry(address).or_insert(0);
            if *count >= self.limits.connections_per_address {
                drop(by_address);
                self.refuse(peer);
                return None;
            }
            *count += 1;
        }
        if let Some((open, _)) = &self.counted {
            open.inc();
        }
        Some(Admitted { limits: self.clone(), address, _permit: permit })
    }

    fn refuse(&self, peer: IpAddr) {
        if let Some((_, refused)) = &self.counted {
            refused.inc();
        }
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            let limit = self.limits.connections_per_address;
            tracing::warn!(%peer, limit, "an address has too many connections; more are closed (limits.connections_per_address, or trusted_proxies if it is a proxy of yours)");
        }
    }

    fn by_address(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The address by which a connection is counted. Whoever has one address of an IPv6 /64 has all of them, so these count as
/// one.
fn counted_address(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address @ IpAddr::V4(_) => address,
    }
}

/// A connection that was admitted, and counts until this is dropped.
pub struct Admitted {
    limits: ConnectionLimits,
    address: Option<IpAddr>,
    _permit: OwnedSemaphorePermit,
}

impl Admitted {
    /// The limits of its requests.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits.limits
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some((open, _)) = &self.limits.counted {
            open.dec();
        }
        let Some(address) = self.address else { return };
        let mut by_address = self.limits.by_address();
        if let Some(count) = by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_has_so_many_connections_and_a_trusted_proxy_any_number() {
        let text = "trusted_proxies=['192.0.2.0/24']\n[backend]\nurl='http://127.0.0.1:1'\n[limits]\nconnections_per_address=2";
        let limits = crate::config::check("t", text, &|_| None).config.unwrap().limits;
        let (open, refused) = (IntGauge::new("a", "a").unwrap(), IntCounter::new("b", "b").unwrap());
        let limits = ConnectionLimits::new(limits, open.clone(), refused.clone());
        let admit = |peer: &str| limits.admit(peer.parse().unwrap(), Arc::clone(&limits.free).try_acquire_owned().unwrap());
        let (first, _second) = (admit("198.51.100.1"), admit("::ffff:198.51.100.1"));
        assert!(first.is_some() && admit("198.51.100.1").is_none() && refused.get() == 1);
        drop(first);
        let _third = admit("198.51.100.1").unwrap();
        let _sixth = (admit("2001:db8::1").unwrap(), admit("2001:db8::2").unwrap());
        assert!(admit("2001:db8::3").is_none() && admit("2001:db8:0:1::3").is_some());
        let _proxies: Vec<_> = (0..5).map(|_| admit("192.0.2.9").unwrap()).collect();
        assert_eq!(open.get(), 9);
        drop((_second, _third, _sixth, _proxies));
        assert!(limits.by_address().is_empty());
    }
}
