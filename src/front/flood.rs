//! Frames of HTTP/2 that cost their receiver more than their sender: how many of them a connection may bring.
//!
//! Each is right by itself (RFC 9113 §10.5): a PING and SETTINGS want an answer; a PRIORITY, an empty DATA and a window that opens by a few
//! bytes are looked at for nothing; and a stream that is reset as soon as it was opened has had its request begun. Clients that mean well
//! send some of them, now and then many at once.

use tokio::time::Instant;

/// How many such frames may come at once, and each second after that.
const BURST: u32 = 1000;
const EACH_SECOND: u32 = 100;
/// A window that opens by less than this many bytes opens for nothing.
const LEAST_OPENING: u32 = 1 << 10;
/// But an answer may be as small as that: this many such openings are allowed for each stream.
const OPENINGS: u32 = 4;
/// From this many reset streams on, most of a connection's streams must end otherwise.
const RESETS: u32 = 100;
/// After this many streams those before count half.
const STREAMS: u32 = 1000;

/// What the client of a connection has sent.
#[derive(Debug)]
pub struct Flood {
    left: u32,
    since: Instant,
    opened: u32,
    reset: u32,
    /// Small openings of windows that are allowed still.
    openings: u32,
}

impl Default for Flood {
    fn default() -> Self {
        Self { left: BURST, since: Instant::now(), opened: 0, reset: 0, openings: 0 }
    }
}

impl Flood {
    /// One more such frame. `false`: the connection is to end.
    #[must_use]
    pub fn may_come(&mut self) -> bool {
        if self.left == 0 {
            let seconds = u32::try_from(self.since.elapsed().as_secs()).unwrap_or(u32::MAX);
            self.left = seconds.saturating_mul(EACH_SECOND).min(BURST);
            self.since = Instant::now();
        }
        let may_come = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may_come
    }

    /// A stream was opened.
    pub fn did_open(&mut self) {
        if self.opened == STREAMS {
            (self.opened, self.reset) = (self.opened / 2, self.reset / 2);
        }
        self.opened += 1;
        self.openings = self.openings.saturating_add(OPENINGS).min(OPENINGS * STREAMS);
    }

    /// A window opens by this many bytes. `false`: the connection is to end.
    #[must_use]
    pub fn may_open(&mut self, bytes: u32) -> bool {
        if bytes >= LEAST_OPENING {
            return true;
        }
        if self.openings > 0 {
            self.openings -= 1;
            return true;
        }
        self.may_come()
    }

    /// The client has reset a stream. `false`: it does so with most of them, and the connection is to end.
    #[must_use]
    pub const fn may_reset(&mut self) -> bool {
        self.reset = self.reset.saturating_add(1);
        self.reset <= RESETS || self.reset <= self.opened / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn many_may_come_at_once_and_some_each_second() {
        let mut flood = Flood::default();
        assert_eq!((0..5000).filter(|_| flood.may_come()).count(), 1000);
        advance(Duration::from_secs(3)).await;
        assert_eq!((0..5000).filter(|_| flood.may_come()).count(), 300);
        let mut steady = Flood::default();
        for _ in 0..3600 {
            assert!((0..EACH_SECOND / 2).all(|_| steady.may_come()));
            advance(Duration::from_secs(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn windows_open_by_little_as_often_as_small_answers_come() {
        let mut flood = Flood::default();
        for _ in 0..10_000 {
            flood.did_open();
            assert!((0..4).all(|_| flood.may_open(1)));
            assert!(flood.may_open(LEAST_OPENING));
        }
        assert_eq!((0..5000).filter(|_| flood.may_open(LEAST_OPENING - 1)).count(), 1000);
    }

    #[test]
    fn who_resets_most_streams_is_told_from_who_resets_some() {
        let resets_each = |each: u32| {
            let mut flood = Flood::default();
            (1..100_000).find(|number| {
                flood.did_open();
                number % each == 0 && !flood.may_reset()
            })
        };
        assert_eq!((resets_each(1), resets_each(2), resets_each(3)), (Some(101), None, None));
    }
}
