//! What memory holds, left in a file for the process that comes next: without Redis a restart would begin with nothing.
//!
//! ```text
//! "SLUHOT" version:2 { length:4 entry }… 0:4 checksum:8
//! ```
//! The file is bounded, readable by its owner alone, and removed as soon as it is read: what is voided later must not come back with
//! it. A file that is not whole is not used.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3Default;

use super::Cache;
use super::codec;
use super::entry::Entry;
use super::void::{Moment, Validity};
use crate::clock::Wall;

const MAGIC: &[u8; 8] = b"SLUHOT\0\x01";

/// The file.
#[derive(Clone, Debug)]
pub struct HotFile {
    path: PathBuf,
    /// The most bytes that are written.
    bytes: u64,
}

impl HotFile {
    /// A file of at most so many bytes.
    #[must_use]
    pub const fn new(path: PathBuf, bytes: u64) -> Self {
        Self { path, bytes }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what was written and not read yet, so that something newer can take its place; `false`: it was read.
    #[must_use]
    pub fn take_back(&self) -> bool {
        fs::remove_file(&self.path).is_ok()
    }

    /// Writes what memory holds and may be used, and says how many entries that were. What fails is logged.
    pub async fn write(&self, cache: &Arc<Cache>) -> usize {
        let (file, cache) = (self.clone(), Arc::clone(cache));
        let writing = tokio::task::spawn_blocking(move || file.write_now(&cache));
        match writing.await.map_err(io::Error::other).and_then(|written| written) {
            Ok(written) => written,
            Err(error) => {
                tracing::warn!(%error, path = %self.path.display(), "what memory holds could not be left for the next process (cache.handover)");
                0
            }
        }
    }

    fn write_now(&self, cache: &Cache) -> io::Result<usize> {
        let now = Wall::now();
        let mut entries: Vec<Arc<Entry>> = Vec::new();
        cache.store().work_off(&mut |entry| {
            let validity = cache.voids().check(entry);
            if validity == Validity::Valid && now.since(entry.stored_at) < entry.lifetimes.kept() {
                entries.push(Arc::new(entry.clone()));
            }
            validity
        });
        let temporary = self.path.with_extension("tmp");
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let (mut out, mut checksum, mut left, mut written) = (BufWriter::new(file), Xxh3Default::new(), self.bytes, 0);
        out.write_all(MAGIC)?;
        for entry in entries {
            let bytes = codec::encode(&entry);
            let Some(rest) = left.checked_sub(bytes.len() as u64 + 4) else { continue };
            let Ok(length) = u32::try_from(bytes.len()) else { continue };
            (left, written) = (rest, written + 1);
            for part in [&length.to_le_bytes()[..], &bytes] {
                checksum.update(part);
                out.write_all(part)?;
            }
        }
        out.write_all(&0_u32.to_le_bytes())?;
        out.write_all(&checksum.digest().to_le_bytes())?;
        out.into_inner()?.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        Ok(written)
    }

    /// Takes over what a process before has left, if anything, as asked for at `asked_at`: what is voided from then on is void of it
    /// too. Says how many entries that were.
    pub async fn read(&self, cache: &Cache, asked_at: Moment) -> usize {
        let path = self.path.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let file = File::open(&path)?;
            // Removed first: whatever becomes of it, it is read once.
            fs::remove_file(&path)?;
            let size = file.metadata()?.len();
            read_entries(BufReader::new(file), size)
        });
        let entries = match reading.await.map_err(io::Error::other).and_then(|read| read) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return 0,
            Err(error) => {
                tracing::warn!(%error, path = %self.path.display(), "what the process before has left could not be read and was not used");
                return 0;
            }
        };
        let (now, mut kept) = (Wall::now(), 0);
        for entry in entries.into_iter().filter(|entry| now.since(entry.stored_at) < entry.lifetimes.kept()) {
            let key = entry.key();
            // What was fetched anew meanwhile stays.
            if cache.store().peek(&key.canonical).is_none() {
                cache.store().put(&key, Arc::new(Entry { asked_at, ..entry })).await;
                kept += 1;
            }
        }
        kept
    }
}

/// Reads what was left from `size` bytes.
///
/// # Errors
/// They are not whole, or not what [`HotFile::write`] wrote.
pub fn read_entries(mut input: impl Read, size: u64) -> io::Result<Vec<Entry>> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged");
    let (mut checksum, mut entries) = (Xxh3Default::new(), Vec::new());
    let mut magic = [0; MAGIC.len()];
    input.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(damaged());
    }
    loop {
        let mut length = [0; 4];
        input.read_exact(&mut length)?;
        let count = u32::from_le_bytes(length);
        if count == 0 {
            break;
        }
        if u64::from(count) > size {
            return Err(damaged());
        }
        let mut bytes = vec![0; usize::try_from(count).map_err(|_| damaged())?];
        input.read_exact(&mut bytes)?;
        checksum.update(&length);
        checksum.update(&bytes);
        // One that another version wrote is left out.
        entries.extend(codec::decode(Bytes::from(bytes)).ok());
    }
    let mut digest = [0; 8];
    input.read_exact(&mut digest)?;
    if u64::from_le_bytes(digest) == checksum.digest() { Ok(entries) } else { Err(damaged()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::codec::tests::entry;
    use crate::cache::memory::Memory;
    use crate::http::freshness::Lifetimes;
    use crate::telemetry::metrics::Metrics;
    use std::time::Duration;
    use tokio::runtime::Handle;

    fn cache() -> Arc<Cache> {
        let metrics = Arc::new(Metrics::new().unwrap());
        let memory = Memory::new(1 << 20, 1 << 18, Arc::clone(&metrics)).unwrap();
        Cache::new(Arc::new(memory), Arc::default(), None, Handle::current(), metrics)
    }

    fn numbered(number: u8, fresh: u64) -> Arc<Entry> {
        let lifetimes = Lifetimes { fresh: Duration::from_secs(fresh), ..Lifetimes::default() };
        let template = entry(&[number; 1000], &["t".to_owned()], "v");
        Arc::new(Entry { canonical: Bytes::from(vec![number]), stored_at: Wall::now(), lifetimes, ..template })
    }

    #[tokio::test]
    async fn what_is_left_is_read_once_and_only_if_it_is_whole() {
        let path = std::env::temp_dir().join(format!("sluice-hot-{}-{}", std::process::id(), fastrand::u64(..)));
        let file = HotFile::new(path.clone(), 1 << 20);
        let cache = cache();
        for number in 0..20 {
            let entry = numbered(number, if number == 3 { 0 } else { 3600 });
            cache.store().put(&entry.key(), entry).await;
        }
        assert_eq!(file.write(&cache).await, 19, "the one that is over is not written");
        let next = self::cache();
        assert_eq!(file.read(&next, next.ask()).await, 19);
        assert!(!path.exists());
        let found = next.store().peek(&numbered(7, 1).key().canonical).unwrap();
        assert_eq!(found.content, numbered(7, 1).content);
        assert_eq!(file.read(&next, next.ask()).await, 0, "it is gone");
        // Cut or changed anywhere, it is not used.
        file.write(&cache).await;
        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len()).step_by(whole.len() / 25) {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            for bad in [&whole[..at], &changed[..]] {
                fs::write(&path, bad).unwrap();
                assert_eq!(file.read(&self::cache(), Moment::default()).await, 0, "{at}");
                assert!(!path.exists());
            }
        }
        // Bounded.
        assert_eq!(HotFile::new(path.clone(), 3000).write(&cache).await, 2);
        fs::remove_file(path).unwrap();
    }
}
