//! Counts of this instance, bounded in memory: of so many clients, those that come again and again are kept.

use std::sync::Arc;

use foldhash::fast::RandomState;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed, StateStore};
use quick_cache::UnitWeighter;
use quick_cache::sync::{Cache, DefaultLifecycle};

/// Clients whose counts are kept, at about 100 bytes each.
const CLIENTS: usize = 65_536;

/// Those who share one count: a kind and up to 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bucket([u8; 17]);

impl Bucket {
    /// A bucket of a kind. Kinds never share one.
    #[must_use]
    pub(super) fn new(kind: u8, bytes: &[u8]) -> Self {
        let mut bucket = [0; 17];
        bucket[0] = kind;
        for (place, byte) in bucket[1..].iter_mut().zip(bytes) {
            *place = *byte;
        }
        Self(bucket)
    }

    /// As it is named in Redis.
    #[must_use]
    pub fn hex(&self) -> String {
        let mut text = String::with_capacity(34);
        crate::http::conditional::hex(&self.0, &mut text);
        text
    }
}

type States = Cache<Bucket, Arc<InMemoryState>, UnitWeighter, RandomState, DefaultLifecycle<Bucket, Arc<InMemoryState>>>;

/// The state of each bucket. What is driven out begins anew, which lets a client through that was at rest.
pub struct Table(States);

impl Default for Table {
    fn default() -> Self {
        Self(Cache::with(CLIENTS, CLIENTS as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default()))
    }
}

impl StateStore for Table {
    type Key = Bucket;

    fn measure_and_replace<T, F, E>(&self, key: &Bucket, f: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let state = match self.0.get_or_insert_with(key, || Ok::<_, std::convert::Infallible>(Arc::default())) {
            Ok(state) => state,
            Err(never) => match never {},
        };
        state.measure_and_replace(&NotKeyed::NonKey, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_clients_take_bounded_room_and_the_busy_one_is_remembered() {
        let table = Table::default();
        let busy = Bucket::new(4, &[255; 4]);
        let count = |bucket: &Bucket| {
            let next = |old: Option<Nanos>| Ok::<_, ()>((old.map_or(0, Nanos::as_u64), Nanos::new(old.map_or(0, Nanos::as_u64) + 1)));
            table.measure_and_replace(bucket, next).unwrap()
        };
        for number in 0..1_000_000_u32 {
            count(&Bucket::new(6, &number.to_le_bytes()));
            if number % 10 == 0 {
                assert_eq!(count(&busy), u64::from(number / 10));
            }
        }
        assert!(table.0.len() <= CLIENTS + 1);
    }
}
