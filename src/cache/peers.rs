//! Processes that hear what is void here, and the messages in which it is said: see [`handover`](super::handover).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::void::view::LoggedVoid;

/// The longest message, in bytes.
pub const MOST: usize = 64 << 10;
/// How long another process may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Voids that wait to be told.
const QUEUE: usize = 1024;
/// Processes that are connected at a time.
const LINKS: usize = 4;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Message {
    /// Who this is.
    Hello {
        /// What it understands.
        version: u32,
        /// A digest of its rules: under others a target has another digest.
        rules: u64,
    },
    /// Something is void.
    Void {
        /// By which it is said to be noted.
        number: u64,
        /// What is void.
        #[serde(flatten)]
        void: LoggedVoid,
    },
    /// It is noted.
    Noted(u64),
    /// All has been told.
    Bye,
}

impl Message {
    /// Its bytes, length included.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let text = serde_json::to_vec(self).unwrap_or_default();
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        [&length.to_be_bytes()[..], &text].concat()
    }

    /// Takes the next one off `bytes`; `None`: it is not whole yet.
    ///
    /// # Errors
    /// It is too long, or no message.
    pub fn take(bytes: &mut BytesMut) -> io::Result<Option<Self>> {
        let Some(length) = bytes.first_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize) else { return Ok(None) };
        if length > MOST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
        }
        if bytes.len() < 4 + length {
            return Ok(None);
        }
        bytes.advance(4);
        serde_json::from_slice(&bytes.split_to(length)).map(Some).map_err(io::Error::other)
    }
}

/// What is to be told.
pub(super) enum ToTell {
    /// A void, and whom to tell that it is noted.
    Void(LoggedVoid, oneshot::Sender<()>),
    /// Nothing more comes.
    Bye(oneshot::Sender<()>),
}

struct Link {
    number: u64,
    queue: mpsc::Sender<ToTell>,
}

/// The processes that are told what is void.
#[derive(Default)]
pub struct Peers {
    links: Mutex<Vec<Link>>,
    next: AtomicU64,
}

impl Peers {
    fn links(&self) -> MutexGuard<'_, Vec<Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any other process is connected.
    #[must_use]
    pub fn are_there(&self) -> bool {
        !self.links().is_empty()
    }

    /// Tells the others of a void that holds here already, and waits until they have noted it. One that does not in time is cut off,
    /// and voids all that it has when it notices.
    pub async fn tell(&self, void: &LoggedVoid) {
        let queued = self.queue(void, None);
        let deadline = Instant::now() + PATIENCE;
        for (number, noted) in queued {
            let noted = match noted {
                Some(noted) => timeout_at(deadline, noted).await.is_ok_and(|noted| noted.is_ok()),
                None => false,
            };
            if !noted {
                self.cut_off(number);
            }
        }
    }

    /// Puts a void into all queues but one.
    pub(super) fn queue(&self, void: &LoggedVoid, but: Option<u64>) -> Vec<(u64, Option<oneshot::Receiver<()>>)> {
        let links = self.links();
        let others = links.iter().filter(|link| Some(link.number) != but);
        let put = |link: &Link| {
            let (sender, noted) = oneshot::channel();
            let is_queued = link.queue.try_send(ToTell::Void(void.clone(), sender)).is_ok();
            (link.number, is_queued.then_some(noted))
        };
        others.map(put).collect()
    }

    /// Ends a connection without a bye.
    pub(super) fn cut_off(&self, number: u64) {
        self.links().retain(|link| link.number != number);
    }

    /// A connection is there: its number, and what is to be told over it. `None`: there are too many.
    pub(super) fn join(&self) -> Option<(u64, mpsc::Receiver<ToTell>)> {
        let mut links = self.links();
        if links.len() >= LINKS {
            return None;
        }
        let (queue, waiting) = mpsc::channel(QUEUE);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        links.push(Link { number, queue });
        Some((number, waiting))
    }

    /// Says that nothing more will be void here. To be called when nothing is served any more.
    pub async fn leave(&self) {
        let links: Vec<Link> = std::mem::take(&mut *self.links());
        let deadline = Instant::now() + PATIENCE;
        for link in links {
            let (sender, said) = oneshot::channel();
            if timeout_at(deadline, link.queue.send(ToTell::Bye(sender))).await.is_ok() {
                let _ = timeout_at(deadline, said).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::void::Selection;
    use super::*;
    use proptest::prelude::*;

    fn void(what: Selection) -> LoggedVoid {
        LoggedVoid { what, soft: true }
    }

    #[test]
    fn messages_come_out_as_they_went_in_however_they_are_cut() {
        let what = [Selection::Tag("t".into()), Selection::Pattern("a*\"\u{1F600}".into()), Selection::Target(u64::MAX)];
        let mut sent: Vec<Message> =
            what.into_iter().enumerate().map(|(number, what)| Message::Void { number: number as u64, void: void(what) }).collect();
        sent.extend([Message::Hello { version: 1, rules: u64::MAX }, Message::Noted(7), Message::Bye]);
        let bytes: Vec<u8> = sent.iter().flat_map(Message::encode).collect();
        for piece in [1, 3, 7, bytes.len()] {
            let (mut buffer, mut came) = (BytesMut::new(), Vec::new());
            for piece in bytes.chunks(piece) {
                buffer.extend_from_slice(piece);
                while let Some(message) = Message::take(&mut buffer).unwrap() {
                    came.push(message);
                }
            }
            assert_eq!(came, sent);
            assert!(buffer.is_empty());
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_within_bounds(bytes in prop::collection::vec(any::<u8>(), 0..300), length in 0_u32..400) {
            for text in [bytes.clone(), [&length.to_be_bytes()[..], &bytes].concat()] {
                let mut buffer = BytesMut::from(&text[..]);
                // It ends: each step takes something off, or says that it cannot.
                while let Ok(Some(_)) = Message::take(&mut buffer) {}
                prop_assert!(buffer.len() <= text.len());
            }
        }
    }

    #[test]
    fn a_length_beyond_the_longest_is_refused_before_anything_is_kept() {
        assert!(Message::take(&mut BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..])).is_err());
        assert!(Message::take(&mut BytesMut::from(&[0, 1, 0, 0][..])).unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_notes_nothing_is_waited_for_so_long_and_then_cut_off() {
        let peers = Peers::default();
        peers.tell(&void(Selection::Target(1))).await;
        let (_, queue) = peers.join().unwrap();
        let began = Instant::now();
        peers.tell(&void(Selection::Target(1))).await;
        assert_eq!(began.elapsed().as_secs(), PATIENCE.as_secs());
        assert!(!peers.are_there());
        drop(queue);
        // Nor does a crowd of them come in.
        let joined: Vec<_> = (0..10).filter_map(|_| peers.join()).collect();
        assert_eq!(joined.len(), LINKS);
    }
}
