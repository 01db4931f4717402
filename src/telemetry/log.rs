//! The log: text or JSON lines on standard error.

use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing::{Level, Subscriber};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry, reload};

use super::audit_log::{AUDIT, AuditLog, Flush};
use crate::config::Log;

/// Lines that wait to be written: some megabytes, since each has an upper bound.
const LINES: usize = 16_384;

/// What decides which lines are logged.
static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Writes what is left when it is dropped.
pub struct Logging {
    _audit: Flush,
    _lines: WorkerGuard,
}

/// Starts the log; `None` if it was started before.
///
/// Lines go through a bounded queue to a thread of their own. When it is full they are dropped: a slow reader of the log must
/// not hold up requests. Audit lines have a way of their own, on which none is ([`audit_log`](super::audit_log)).
#[must_use]
pub fn start(config: &Log) -> Option<Logging> {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.set(()).ok()?;
    let (writer, guard) = NonBlockingBuilder::default().buffered_lines_limit(LINES).finish(std::io::stderr());
    let (audit_writer, flush) = AuditLog::start().ok()?;
    let (filter, handle) = reload::Layer::new(filter(config.level));
    let audit = Targets::new().with_target(AUDIT, Level::TRACE);
    let lines = layer(config.json, writer).with_filter(filter);
    let registry = tracing_subscriber::registry().with(lines).with(layer(config.json, audit_writer).with_filter(audit));
    tracing::subscriber::set_global_default(registry).ok().map(|()| {
        // Only the first log is ever started.
        let _ = FILTER.set(handle);
        Logging { _audit: flush, _lines: guard }
    })
}

fn layer<S, W>(json: bool, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_target(false);
    if json {
        lines.json().flatten_event(true).boxed()
    } else {
        let color = std::io::IsTerminal::is_terminal(&std::io::stderr());
        lines.with_ansi(color).boxed()
    }
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
    // What the HTTP library warns of are single clients, as many times as they like.
    let library = if level > Level::INFO { level } else { Level::ERROR };
    Targets::new().with_default(level).with_target("h2", library).with_target(AUDIT, LevelFilter::OFF)
}
