//! Voids that two processes at one address tell each other while one takes over from the other (`--take-over`). Without Redis
//! there is no log of voids that both read.
//!
//! The process that serves listens at a Unix socket beside the hot file. The one that takes over connects before it serves its
//! first request. Both greet; from then on, until either ends, what one voids it tells the other before its own client gets an
//! answer, and the other has noted it by then. So the snapshot that is handed over, and all that either serves beside the other,
//! is without what was void.
//!
//! ```text
//! { length:4 JSON }…   {"hello":{"version":1,"rules":R}}     first, from both
//!                      {"void":{"number":N,"what":…,"soft":…}}
//!                      {"noted":N}
//!                      "bye"                                  all has been told
//! ```
//! A connection that ends without a bye, or on which something is noted too late, has lost voids: each side that is left then
//! voids all that it has. Everything is bounded: a message, what waits, the connections, and how long anyone waits.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};

use super::Cache;
use super::peers::{MOST, Message, PATIENCE, ToTell};
use super::void::view::LoggedVoid;
use super::void::{Effect, Selection};
use crate::clock::Wall;

/// What the messages mean, and how a target is made into its digest.
const VERSION: u32 = 1;
/// Processes that are greeted at a time.
const GREETED: usize = 16;

/// A connection's number, and what is to be told over it.
type Joined = (u64, mpsc::Receiver<ToTell>);

/// The socket at which a process is found by the one that takes over from it.
pub struct PeerSocket {
    path: PathBuf,
    /// Which file it is, since another process may have put its own there.
    file: (u64, u64),
}

impl PeerSocket {
    /// Its path beside a hot file.
    #[must_use]
    pub fn beside(hot: &Path) -> PathBuf {
        let mut name = hot.as_os_str().to_owned();
        name.push(".voids");
        name.into()
    }

    /// Listens there from now on, in place of who did before. `rules` says what the rules are that serve.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn listen(path: PathBuf, cache: &Arc<Cache>, rules: impl Fn() -> u64 + Send + 'static) -> io::Result<Self> {
        // Made under another name first, so that nobody finds it before it is for its owner alone.
        let mut name = path.clone().into_os_string();
        name.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(name);
        let _ = std::fs::remove_file(&temporary);
        let listener = UnixListener::bind(&temporary)?;
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&temporary, &path)?;
        let file = identity(&path)?;
        cache.runtime.spawn(accept(listener, Arc::clone(cache), rules));
        Ok(Self { path, file })
    }
}

impl Drop for PeerSocket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// Greets processes that connect, a few at a time.
async fn accept(listener: UnixListener, cache: Arc<Cache>, rules: impl Fn() -> u64) {
    let greeting = Arc::new(Semaphore::new(GREETED));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, say.
            sleep(PATIENCE / 10).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&greeting).try_acquire_owned() else { continue };
        let (cache, rules) = (Arc::clone(&cache), rules());
        tokio::spawn(async move {
            match greet(&cache, stream, rules).await {
                Ok((talk, link, same_rules)) => {
                    drop(permit);
                    converse(cache, talk, link, same_rules).await;
                }
                Err(error) => tracing::debug!(%error, "a process that wants to take over"),
            }
        });
    }
}

/// A process wants to take over from this one.
async fn greet(cache: &Cache, stream: UnixStream, rules: u64) -> io::Result<(Talk, Joined, bool)> {
    let mut talk = Talk::new(stream);
    let theirs = talk.hello().await?;
    // First what is void from now on is kept for it, then it is told so.
    let link = cache.peers.join().ok_or(io::ErrorKind::QuotaExceeded)?;
    if let Err(error) = talk.say(&Message::Hello { version: VERSION, rules }).await {
        cache.peers.cut_off(link.0);
        return Err(error);
    }
    Ok((talk, link, theirs == rules))
}

/// Connects to the process that serves, and returns when each tells the other of its voids.
///
/// # Errors
/// Nobody is there, or a version that speaks otherwise.
pub async fn connect(path: &Path, cache: &Arc<Cache>, rules: u64) -> io::Result<()> {
    let mut talk = Talk::new(timeout(PATIENCE, UnixStream::connect(path)).await??);
    talk.say(&Message::Hello { version: VERSION, rules }).await?;
    let theirs = talk.hello().await?;
    let link = cache.peers.join().ok_or(io::ErrorKind::QuotaExceeded)?;
    cache.runtime.spawn(converse(Arc::clone(cache), talk, link, theirs == rules));
    Ok(())
}

/// Messages over a socket.
struct Talk {
    stream: UnixStream,
    read: BytesMut,
}

impl Talk {
    fn new(stream: UnixStream) -> Self {
        Self { stream, read: BytesMut::new() }
    }

    async fn say(&mut self, message: &Message) -> io::Result<()> {
        timeout(PATIENCE, self.stream.write_all(&message.encode())).await?
    }

    /// The next message. May be given up and called again.
    async fn next(&mut self) -> io::Result<Message> {
        loop {
            if let Some(message) = Message::take(&mut self.read)? {
                return Ok(message);
            }
            if self.stream.read_buf(&mut self.read).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The digest of the other one's rules.
    async fn hello(&mut self) -> io::Result<u64> {
        match timeout(PATIENCE, self.next()).await?? {
            Message::Hello { version: VERSION, rules } => Ok(rules),
            other => Err(io::Error::other(format!("it says {other:?}"))),
        }
    }
}

/// Tells and is told until either says bye. With other rules, a target that is void there may be any target here.
async fn converse(cache: Arc<Cache>, mut talk: Talk, (number, mut queue): Joined, same_rules: bool) {
    let mut waiting: HashMap<u64, (usize, oneshot::Sender<()>)> = HashMap::new();
    // Both may tell at once: what is on its way each way fits into the socket.
    let (mut told, mut on_its_way) = (0, 0);
    let ended = loop {
        let step = tokio::select! {
            next = queue.recv(), if on_its_way < MOST => match next {
                Some(ToTell::Void(void, noted)) => {
                    told += 1;
                    let message = sendable(told, void);
                    let bytes = message.encode().len();
                    on_its_way += bytes;
                    waiting.insert(told, (bytes, noted));
                    talk.say(&message).await
                }
                Some(ToTell::Bye(said)) => {
                    let done = talk.say(&Message::Bye).await;
                    let _ = said.send(());
                    break done;
                }
                None => break Err(io::ErrorKind::TimedOut.into()),
            },
            message = talk.next() => match message {
                Ok(Message::Void { number: told, void }) => {
                    note(&cache, void, same_rules, number);
                    talk.say(&Message::Noted(told)).await
                }
                Ok(Message::Noted(told)) => {
                    if let Some((bytes, noted)) = waiting.remove(&told) {
                        on_its_way -= bytes;
                        let _ = noted.send(());
                    }
                    Ok(())
                }
                Ok(Message::Bye) => break Ok(()),
                Ok(Message::Hello { .. }) => Err(io::Error::other("it greets again")),
                Err(error) => Err(error),
            },
        };
        if let Err(error) = step {
            break Err(error);
        }
    };
    cache.peers.cut_off(number);
    if let Err(error) = ended {
        tracing::warn!(%error, "the other process at this address ended without a word, or was late: what is stored here counts as void");
        note(&cache, everything(), true, number);
    }
}

fn everything() -> LoggedVoid {
    LoggedVoid { what: Selection::Pattern("*".to_owned()), soft: false }
}

fn sendable(number: u64, void: LoggedVoid) -> Message {
    let message = Message::Void { number, void };
    if message.encode().len() <= MOST { message } else { Message::Void { number, void: everything() } }
}

/// Something is void at another process, and so it is here; the others are told too.
fn note(cache: &Arc<Cache>, void: LoggedVoid, same_rules: bool, from: u64) {
    let void = if same_rules || !matches!(void.what, Selection::Target(_)) { void } else { everything() };
    cache.voids.add(void.what.clone(), Effect::of_purge(void.soft), Wall::now());
    for (number, queued) in cache.peers.queue(&void, Some(from)) {
        if queued.is_none() {
            cache.peers.cut_off(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::codec::tests::entry;
    use super::super::entry::Entry;
    use super::super::key::Canonical;
    use super::super::memory::Memory;
    use super::*;
    use crate::telemetry::metrics::Metrics;
    use bytes::Bytes;
    use tokio::runtime::Handle;

    fn cache() -> Arc<Cache> {
        let metrics = Arc::new(Metrics::new().unwrap());
        let memory = Memory::new(1 << 20, 1 << 18, Arc::clone(&metrics)).unwrap();
        Cache::new(Arc::new(memory), Arc::default(), None, Handle::current(), metrics)
    }

    async fn store(cache: &Cache, target: u64) {
        let template = entry(b"body", &["t".to_owned()], "v");
        let canonical = Bytes::from(target.to_be_bytes().to_vec());
        let entry = Arc::new(Entry { canonical, target, asked_at: cache.ask(), ..template });
        cache.put(&entry.key(), entry).await;
        assert!(has(cache, target));
    }

    fn has(cache: &Cache, target: u64) -> bool {
        cache.peek(&Canonical(Bytes::from(target.to_be_bytes().to_vec()))).is_some()
    }

    fn path() -> PathBuf {
        std::env::temp_dir().join(format!("sluice-peers-{}-{:x}", std::process::id(), fastrand::u32(..)))
    }

    fn target(target: u64) -> LoggedVoid {
        LoggedVoid { what: Selection::Target(target), soft: false }
    }

    async fn eventually(condition: impl Fn() -> bool) {
        let work = async {
            while !condition() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        timeout(std::time::Duration::from_secs(30), work).await.expect("it never happened");
    }

    #[tokio::test]
    async fn each_notes_what_the_other_voids_before_the_other_goes_on() {
        let (old, new, path) = (cache(), cache(), path());
        let socket = PeerSocket::listen(path.clone(), &old, || 7).unwrap();
        connect(&path, &new, 7).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for (one, other) in [(&old, &new), (&new, &old)] {
            store(other, 1).await;
            store(other, 2).await;
            one.peers.tell(&target(1)).await;
            assert!(!has(other, 1) && has(other, 2));
            one.purge(Selection::Tag("t".into()), false).await;
            assert!(!has(other, 2));
        }
        store(&old, 3).await;
        new.peers.leave().await;
        eventually(|| !old.peers.are_there()).await;
        assert!(has(&old, 3), "with a bye nothing is lost");
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn without_a_bye_or_with_nonsense_all_is_void_and_without_a_greeting_nothing_is() {
        let (old, path) = (cache(), path());
        let _socket = PeerSocket::listen(path.clone(), &old, || 7).unwrap();
        store(&old, 1).await;
        let hello = Message::Hello { version: VERSION, rules: 7 }.encode();
        let other = Message::Hello { version: VERSION + 1, rules: 7 }.encode();
        for greeting in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &hello[..9], &Message::Bye.encode(), &other] {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(greeting).await.unwrap();
            stream.shutdown().await.unwrap();
            // It says nothing and ends.
            let mut said = Vec::new();
            stream.read_to_end(&mut said).await.unwrap_or_default();
            assert!(said.is_empty() && has(&old, 1), "{greeting:?}");
        }
        for nonsense in [&b""[..], b"\xff\xff\xff\xff", b"\0\0\0\x02{}", &hello] {
            store(&old, 1).await;
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(&hello).await.unwrap();
            stream.read_u32().await.unwrap();
            stream.write_all(nonsense).await.unwrap();
            drop(stream);
            eventually(|| !has(&old, 1) && !old.peers.are_there()).await;
        }
    }

    #[tokio::test]
    async fn with_other_rules_a_target_may_be_any() {
        let (old, new, path) = (cache(), cache(), path());
        let _socket = PeerSocket::listen(path.clone(), &old, || 7).unwrap();
        connect(&path, &new, 8).await.unwrap();
        store(&new, 2).await;
        old.peers.tell(&target(1)).await;
        assert!(!has(&new, 2));
    }

    #[tokio::test]
    async fn very_many_voids_at_once_both_ways_all_arrive() {
        let (old, new, path) = (cache(), cache(), path());
        let _socket = PeerSocket::listen(path.clone(), &old, || 7).unwrap();
        connect(&path, &new, 7).await.unwrap();
        let long = "x".repeat(MOST);
        let flood = |cache: Arc<Cache>| {
            let long = long.clone();
            async move {
                for number in 0..500 {
                    let what = if number % 100 == 0 { Selection::Tag(long.clone()) } else { Selection::Target(number) };
                    cache.peers.tell(&LoggedVoid { what, soft: false }).await;
                }
            }
        };
        tokio::join!(flood(Arc::clone(&old)), flood(Arc::clone(&new)));
        assert!(old.peers.are_there() && new.peers.are_there());
    }
}
