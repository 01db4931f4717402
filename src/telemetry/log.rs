//! The log: text or JSON lines on standard error.

use std::sync::OnceLock;

use tracing_appender::non_blocking::WorkerGuard;

use crate::config::Log;

/// Starts the log; `None` if it was started before. What is left is written when the guard is dropped.
///
/// Lines go through a bounded queue to a thread of their own. When it is full they are dropped: a slow reader of the log must
/// not hold up requests.
#[must_use]
pub fn start(config: &Log) -> Option<WorkerGuard> {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.set(()).ok()?;
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    let lines = tracing_subscriber::fmt().with_max_level(config.level).with_writer(writer).with_target(false);
    let started = if config.json {
        tracing::subscriber::set_global_default(lines.json().flatten_event(true).finish())
    } else {
        let color = std::io::IsTerminal::is_terminal(&std::io::stderr());
        tracing::subscriber::set_global_default(lines.with_ansi(color).finish())
    };
    started.ok().map(|()| guard)
}
