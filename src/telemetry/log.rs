//! The log: text or JSON lines on standard error.

use std::sync::OnceLock;

use tracing::Level;
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::{Layer as _, Registry, reload};

use crate::config::Log;

/// The target of audit lines, which are logged whatever the level.
pub const AUDIT: &str = "audit";

/// What decides which lines are logged.
static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Starts the log; `None` if it was started before. What is left is written when the guard is dropped.
///
/// Lines go through a bounded queue to a thread of their own. When it is full they are dropped: a slow reader of the log must
/// not hold up requests.
#[must_use]
pub fn start(config: &Log) -> Option<WorkerGuard> {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.set(()).ok()?;
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    let (filter, handle) = reload::Layer::new(filter(config.level));
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_target(false);
    let lines = if config.json {
        lines.json().flatten_event(true).boxed()
    } else {
        let color = std::io::IsTerminal::is_terminal(&std::io::stderr());
        lines.with_ansi(color).boxed()
    };
    let started = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(lines.with_filter(filter)));
    started.ok().map(|()| {
        // Only the first log is ever started.
        let _ = FILTER.set(handle);
        guard
    })
}

/// Changes from which level on lines are logged.
pub fn set_level(level: Level) {
    if let Some(handle) = FILTER.get()
        && handle.reload(filter(level)).is_err()
    {
        tracing::error!("the log level could not be changed");
    }
}

fn filter(level: Level) -> Targets {
    Targets::new().with_default(level).with_target(AUDIT, Level::INFO.max(level))
}
