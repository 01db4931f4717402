//! What every test stands on: the servers that it starts ([`sluice`], [`redis`], [`mariadb`], each a [`process`]), the scripted
//! [`backend`], the existing [`service`] that may lie, the [`client`], the recorded API ([`recorded`]), and waiting for what they do.

pub mod backend;
pub mod browser;
pub mod client;
pub mod frames;
pub mod mariadb;
pub mod process;
pub mod recorded;
pub mod redis;
pub mod relay;
pub mod service;
pub mod sluice;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use backend::{Asked, Backend, Step, ok, reply};
pub use client::{Answer, Connection, connect_from, get};
pub use frames::Http2;
pub use mariadb::{MariaDb, PASSWORD};
pub use process::scratch;
pub use recorded::{Recorded, recorded, recorded_dir};
pub use redis::Redis;
pub use service::Service;
pub use sluice::{Sluice, TOKEN, one_rule, program, shipped};

/// The longest that anything may take: past it, it hangs.
pub const HANG: Duration = Duration::from_secs(60);

/// Waits until `condition` holds, looking again every few milliseconds; panics with `what` if it hangs.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    let work = async {
        while !condition().await {
            ticks.tick().await;
        }
    };
    assert!(tokio::time::timeout(HANG, work).await.is_ok(), "never happened: {what}");
}

/// The number that an environment variable says, for runs by hand that do more than is done each time.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The Rust files of a folder and the folders in it.
pub fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let (folders, files): (Vec<PathBuf>, Vec<PathBuf>) =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).partition(|path| path.is_dir());
    let below = folders.iter().flat_map(|folder| rust_files(folder));
    files.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs")).chain(below).collect()
}

/// The rows of a table kept as text, a line each: empty lines and those that begin with `#` are none.
pub fn rows(text: &'static str) -> Vec<&'static str> {
    text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')).collect()
}

/// The columns of a row, between ` // `; the last one may hold that too.
pub fn columns<const N: usize>(row: &str) -> [&str; N] {
    let columns: Vec<&str> = row.splitn(N, " //").map(str::trim).collect();
    columns.try_into().unwrap_or_else(|columns| panic!("{row:?} has not {N} columns but {columns:?}"))
}

/// Bytes as a table writes them: `\r`, `\n`, `\t` and `\xNN` stand for what they stand for in Rust.
pub fn unescape(text: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, after @ ..] = rest {
        rest = after;
        let (byte, after) = match (first, rest) {
            (b'\\', [b'r', after @ ..]) => (b'\r', after),
            (b'\\', [b'n', after @ ..]) => (b'\n', after),
            (b'\\', [b't', after @ ..]) => (b'\t', after),
            (b'\\', [b'x', high, low, after @ ..]) => {
                let digit = |digit: &u8| u8::try_from(char::from(*digit).to_digit(16).expect("a digit")).expect("a digit");
                (digit(high) << 4 | digit(low), after)
            }
            (byte, after) => (*byte, after),
        };
        bytes.push(byte);
        rest = after;
    }
    bytes
}
