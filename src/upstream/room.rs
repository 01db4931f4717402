//! Memory that clients share: one address may hold as much of it as it leaves free, so that it never takes the last of it from others.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::quality::RandomState;
use prometheus::IntGauge;

/// Memory of so many bytes.
#[derive(Clone)]
pub struct Room(Arc<Mutex<Held>>);

/// Bytes that are free, and who holds the others.
struct Held {
    free: usize,
    by_address: HashMap<Option<IpAddr>, usize, RandomState>,
    used: IntGauge,
}

/// Bytes of the room that a client of an address holds, until this is dropped.
pub struct Taken {
    room: Room,
    address: Option<IpAddr>,
    bytes: usize,
}

impl Room {
    /// All of `bytes` are free. `used` says how many are not.
    #[must_use]
    pub fn new(bytes: usize, used: IntGauge) -> Self {
        Self(Arc::new(Mutex::new(Held { free: bytes, by_address: HashMap::default(), used })))
    }

    /// Nothing yet, for a client of an address; all that Sluice does by itself counts as one.
    #[must_use]
    pub fn of(&self, address: Option<IpAddr>) -> Taken {
        Taken { room: self.clone(), address, bytes: 0 }
    }

    /// Whether nobody holds anything, and nobody is known.
    #[cfg(test)]
    pub(super) fn is_free(&self) -> bool {
        let held = self.held();
        held.by_address.is_empty() && held.used.get() == 0
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    /// Takes more. `false`: there is no room, or not for this address.
    pub fn take(&mut self, bytes: usize) -> bool {
        if bytes == 0 {
            return true;
        }
        let mut room = self.room.held();
        let held = room.by_address.get(&self.address).copied().unwrap_or(0).saturating_add(bytes);
        if held > room.free {
            return false;
        }
        room.free -= bytes;
        room.by_address.insert(self.address, held);
        room.used.add(i64::try_from(bytes).unwrap_or(i64::MAX));
        drop(room);
        self.bytes += bytes;
        true
    }

    /// Gives back bytes that are held no longer.
    pub fn give_back(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        if bytes == 0 {
            return;
        }
        self.bytes -= bytes;
        let mut room = self.room.held();
        room.free += bytes;
        room.used.sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        if let Entry::Occupied(mut held) = room.by_address.entry(self.address) {
            *held.get_mut() -= bytes;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_leaves_as_much_as_it_holds() {
        let room = Room::new(100, IntGauge::new("a", "a").unwrap());
        let [one, two] = [1, 2].map(|number| Some(IpAddr::from([10, 0, 0, number])));
        let (mut first, mut second, mut other) = (room.of(one), room.of(one), room.of(two));
        assert!(first.take(0) && first.take(40) && !second.take(30) && second.take(10) && other.take(25) && !other.take(1));
        first.give_back(1000);
        assert!(other.take(20));
        drop((first, second, other));
        assert!(room.is_free());
    }
}
