//! Whether this instance is worth asking: what a load balancer wants to know.

use crate::cache::store::Tier;
use crate::proxy::Proxy;

/// What an instance can answer from.
pub enum Readiness {
    /// The backend, as far as is known.
    Ready,
    /// The backend fails, and what is stored is served.
    FromStored,
    /// Neither; with a line for each reason.
    No(String),
}

impl Readiness {
    /// That of this instance now.
    #[must_use]
    pub fn of(proxy: &Proxy) -> Self {
        if !proxy.fetcher.failing().upstream() {
            return Self::Ready;
        }
        if serves_stored(proxy) {
            return Self::FromStored;
        }
        let mut reasons = String::from("not ready: the backend fails and is being left alone\n");
        for tier in proxy.cache.store().report() {
            reasons.push_str(&format!("not ready: the {} tier {}\n", tier.tier, if tier.up { "is empty" } else { "cannot be reached" }));
        }
        Self::No(reasons)
    }
}

/// Whether something is stored that could be served while the backend fails.
#[must_use]
pub fn serves_stored(proxy: &Proxy) -> bool {
    let holds = |tier: &Tier| tier.up && tier.entries != Some(0);
    proxy.cache.store().report().iter().any(holds)
}
