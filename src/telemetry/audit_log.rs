//! The way of audit lines to standard error, past the queue of other lines, which drops when it is full.
//!
//! An action that is to be audited takes a [`Slot`] before it begins, and gives it back once its line is written. Slots are
//! few, so what waits here is bounded, and no line of an action is ever dropped: while standard error takes nothing, no action begins
//! any more. Anybody can cause lines about attempts that were refused. They have slots of their own; where none is free they are
//! counted, and a line says later how many there were.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tracing_subscriber::fmt::MakeWriter;

/// The target of audit lines, which are logged whatever the level.
pub const AUDIT: &str = "audit";

/// Actions at one time, and lines of theirs that wait.
const ACTIONS: usize = 256;
/// Lines about refused attempts that wait.
const REFUSALS: usize = 256;
/// How long an action waits for a slot.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the end of the program waits for lines to be written.
const LAST: Duration = Duration::from_secs(5);
/// Before standard error is tried again that takes nothing now, such as a file on a full disk.
const PAUSE: Duration = Duration::from_millis(100);

static STARTED: OnceLock<Arc<AuditLog>> = OnceLock::new();

/// What waits to be written.
pub struct AuditLog {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    actions: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    /// Refused attempts of which there is no line.
    missed: AtomicU64,
}

#[derive(Default)]
struct Waiting {
    items: VecDeque<Item>,
    is_writing: bool,
}

enum Item {
    Line(Vec<u8>),
    /// The lines before this are written.
    Done(OwnedSemaphorePermit),
}

/// Room for the line of one action or attempt. The line is to be written while it is held.
pub struct Slot(Option<OwnedSemaphorePermit>);

impl Slot {
    /// For an action. `None`: audit lines cannot be written now, and have not been for some seconds.
    pub async fn for_action() -> Option<Self> {
        let Some(log) = STARTED.get() else { return Some(Self(None)) };
        let permit = timeout(PATIENCE, Arc::clone(&log.actions).acquire_owned()).await;
        permit.ok()?.ok().map(|permit| Self(Some(permit)))
    }

    /// For an attempt that is refused. `None`: it is counted instead.
    #[must_use]
    pub fn for_refusal() -> Option<Self> {
        let Some(log) = STARTED.get() else { return Some(Self(None)) };
        let permit = Arc::clone(&log.refusals).try_acquire_owned();
        if permit.is_err() {
            log.missed.fetch_add(1, Ordering::Relaxed);
        }
        permit.ok().map(|permit| Self(Some(permit)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let (Some(log), Some(permit)) = (STARTED.get(), self.0.take()) {
            log.add(Item::Done(permit));
        }
    }
}

/// Where the log's formatter writes audit lines, each with one call.
#[derive(Clone)]
pub struct AuditWriter(Arc<AuditLog>);

impl Write for AuditWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.add(Item::Line(line.to_vec()));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for AuditWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Waits, when it is dropped, until what waits is written, for some seconds.
pub struct Flush(Arc<AuditLog>);

impl Drop for Flush {
    fn drop(&mut self) {
        let is_left = |waiting: &mut Waiting| waiting.is_writing || !waiting.items.is_empty();
        // Whatever is left when time is up stays unwritten: the program must end.
        drop(self.0.changed.wait_timeout_while(self.0.lock(), LAST, is_left));
    }
}

impl AuditLog {
    /// Starts the thread that writes. Once in a process.
    ///
    /// # Errors
    /// There is no standard error, or no thread.
    pub fn start() -> io::Result<(AuditWriter, Flush)> {
        // Not by the lock of standard error: a writer of other lines may hold it for long.
        let out = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let log = Arc::new(Self::new());
        let writing = Arc::clone(&log);
        thread::Builder::new().name("audit".to_owned()).spawn(move || writing.write_to(out))?;
        let _ = STARTED.set(Arc::clone(&log));
        Ok((AuditWriter(Arc::clone(&log)), Flush(log)))
    }

    fn new() -> Self {
        Self {
            waiting: Mutex::default(),
            changed: Condvar::new(),
            actions: Arc::new(Semaphore::new(ACTIONS)),
            refusals: Arc::new(Semaphore::new(REFUSALS)),
            missed: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, item: Item) {
        self.lock().items.push_back(item);
        self.changed.notify_all();
    }

    fn write_to(&self, mut out: impl Write) {
        loop {
            let next = {
                let mut waiting = self.lock();
                waiting.is_writing = false;
                if waiting.items.is_empty() {
                    self.changed.notify_all();
                }
                let is_idle = |waiting: &mut Waiting| waiting.items.is_empty();
                let mut waiting = self.changed.wait_while(waiting, is_idle).unwrap_or_else(PoisonError::into_inner);
                waiting.is_writing = true;
                waiting.items.pop_front()
            };
            match next {
                Some(Item::Line(line)) => write(&mut out, &line),
                Some(Item::Done(permit)) => drop(permit),
                None => {}
            }
            let missed = self.missed.swap(0, Ordering::Relaxed);
            if missed > 0 {
                tracing::warn!(target: AUDIT, missed, "audit");
            }
        }
    }
}

/// What Linux says of a terminal that is gone, and of a file that is not open: neither comes back.
const EIO: i32 = 5;
const EBADF: i32 = 9;

/// Writes a line, however long that takes, unless nobody can ever read it.
fn write(out: &mut impl Write, mut line: &[u8]) {
    while !line.is_empty() {
        match out.write(line) {
            Ok(written) => line = &line[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe || matches!(error.raw_os_error(), Some(EIO | EBADF)) => return,
            Err(_) => thread::park_timeout(PAUSE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a few bytes at a time, and nothing each other time.
    struct Reluctant(Vec<u8>, bool);

    impl Write for Reluctant {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::Error::from(ErrorKind::WouldBlock));
            }
            self.0.extend_from_slice(&bytes[..bytes.len().min(3)]);
            Ok(bytes.len().min(3))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Fails each time with the same error of the system.
    struct Gone(i32);

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(self.0))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_given_up_where_nobody_can_read_it() {
        const EPIPE: i32 = 32;
        for error in [EIO, EBADF, EPIPE] {
            write(&mut Gone(error), b"a line\n");
        }
    }

    #[test]
    fn a_line_is_written_whole_however_reluctantly_it_is_taken() {
        let mut out = Reluctant(Vec::new(), false);
        write(&mut out, b"a line\n");
        assert_eq!(out.0, b"a line\n");
    }
}
