//! Reading the configuration again while it serves: checked as a whole, exchanged at once for requests to come, or refused as a
//! whole.
//!
//! Rules can change so. Whatever holds connections, memory or secrets cannot: a change there is refused by its name, and so nobody
//! believes that half of an edited file serves.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Handle;

use super::anew::Anew;
use crate::cache::void::Selection;
use crate::config::{self, Config};
use crate::proxy::Proxy;
use crate::proxy::rules::Rules;
use crate::request::secrets;
use crate::telemetry::log;

/// Where a configuration comes from.
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// What the command line says instead of it.
    pub adjust: Box<dyn Fn(&mut Config) + Send + Sync>,
}

/// Reads a configuration again.
pub struct Reloader {
    source: Source,
    proxy: Arc<Proxy>,
    /// Where purges run.
    runtime: Handle,
    /// The configuration that serves.
    serving: Mutex<Config>,
}

/// What became of a reload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reloaded {
    /// Other rules serve: so many, from a file with this digest.
    Applied {
        /// How many.
        rules: usize,
        /// The first digits of the file's SHA-256.
        digest: String,
    },
    /// The file is the one that serves.
    Unchanged {
        /// The first digits of its SHA-256.
        digest: String,
    },
}

/// Why a configuration was refused. The one before goes on serving.
#[derive(Debug)]
pub enum ReloadError {
    /// The file cannot be read.
    Unreadable(std::io::Error),
    /// It has these problems, each as `file:line:column: message`.
    Invalid(Vec<String>),
    /// It differs in these parts, which only a restart changes.
    NeedsRestart(Vec<&'static str>),
}

impl std::fmt::Display for ReloadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreadable(error) => write!(f, "the file cannot be read: {error}"),
            Self::Invalid(problems) => write!(f, "{}", problems.join("; ")),
            Self::NeedsRestart(parts) => write!(f, "cannot change while Sluice runs, restart it: {}", parts.join(", ")),
        }
    }
}

impl std::error::Error for ReloadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unreadable(error) => Some(error),
            Self::Invalid(_) | Self::NeedsRestart(_) => None,
        }
    }
}

/// What came of it, in few words for the audit line.
#[must_use]
pub fn result(reloaded: &Result<Reloaded, ReloadError>) -> String {
    match reloaded {
        Ok(Reloaded::Applied { digest, .. }) => format!("applied {digest}"),
        Ok(Reloaded::Unchanged { digest }) => format!("unchanged {digest}"),
        Err(_) => "refused".to_owned(),
    }
}

impl Reloader {
    /// For the proxy that serves this configuration, which came from there. What need not block runs on `runtime`.
    #[must_use]
    pub fn new(source: Source, proxy: Arc<Proxy>, runtime: Handle, serving: Config) -> Self {
        Self { source, proxy, runtime, serving: Mutex::new(serving) }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// Whether the file is not, or no longer, the one that serves. It blocks as [`Self::reload`] does.
    #[must_use]
    pub fn is_outdated(&self) -> bool {
        let file = config::load(&self.source.path).ok().and_then(|checked| checked.config);
        let serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        file.is_none_or(|file| file.digest != serving.digest)
    }

    /// Reads the file and has its rules serve. It blocks on the file for as long as the file system does, and on purges: it is not to
    /// be called on a thread of a runtime.
    ///
    /// # Errors
    /// [`ReloadError`]; nothing has changed then.
    pub fn reload(&self) -> Result<Reloaded, ReloadError> {
        let reloaded = self.read_and_apply();
        let result = match &reloaded {
            Ok(Reloaded::Applied { rules, digest }) => {
                tracing::info!(rules, digest, "the configuration was reloaded; what is stored keeps the lifetimes that it was stored with");
                "applied"
            }
            Ok(Reloaded::Unchanged { digest }) => {
                tracing::info!(digest, "the configuration was read again and has not changed");
                "unchanged"
            }
            Err(error) => {
                let problems = match error {
                    ReloadError::Invalid(problems) => &problems[..],
                    ReloadError::Unreadable(_) | ReloadError::NeedsRestart(_) => &[],
                };
                for problem in problems {
                    tracing::error!("{problem}");
                }
                tracing::error!(%error, "the configuration was not reloaded; the one before goes on serving (sluice check says what is wrong)");
                "refused"
            }
        };
        self.proxy.metrics.config_reloads.with_label_values(&[result]).inc();
        reloaded
    }

    fn read_and_apply(&self) -> Result<Reloaded, ReloadError> {
        // One at a time, so that the file that was read last is the one that serves.
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        let checked = config::load(&self.source.path).map_err(ReloadError::Unreadable)?;
        let Some(mut next) = checked.config else { return Err(ReloadError::Invalid(checked.report)) };
        (self.source.adjust)(&mut next);
        let fixed = serving.fixed_changes(&next);
        if !fixed.is_empty() {
            return Err(ReloadError::NeedsRestart(fixed));
        }
        let digest = next.digest.clone();
        // The environment may say something else than before in the same file.
        let shown = |config: &Config| format!("{:?} {:?} {:?} {:?}", config.routes, config.rate_limits, config.warm, config.log);
        let same_admin = serving.admin == next.admin;
        if serving.digest == digest && same_admin && shown(&serving) == shown(&next) {
            return Ok(Reloaded::Unchanged { digest });
        }
        let previous = self.proxy.rules.load_full();
        let anew = Anew::between(&previous.routes, &next.routes);
        self.purge(anew.before);
        let rules = Arc::new(Rules::new(&next, self.proxy.shared_counts.as_ref(), &self.proxy.metrics, Some(&previous)));
        log::set_level(next.log.level);
        secrets::leave_out(&next.log.redact);
        self.proxy.rules.store(Arc::clone(&rules));
        if let Some(timeline) = &self.proxy.timeline {
            timeline.follow(&rules.routes);
        }
        self.purge(anew.after);
        *serving = next;
        Ok(Reloaded::Applied { rules: rules.routes.len(), digest })
    }

    /// Purges what the rules that begin anew have stored, on every instance. It returns when that is void.
    fn purge(&self, patterns: Vec<String>) {
        let purge = |pattern| {
            tracing::info!(pattern, "the configuration was reloaded, and what a rule of it has stored is not used any more");
            let cache = Arc::clone(&self.proxy.cache);
            self.runtime.spawn(async move { cache.purge(Selection::Pattern(pattern), false).await })
        };
        let purges: Vec<_> = patterns.into_iter().map(purge).collect();
        for purge in purges {
            // It fails only where the program ends.
            let _ = self.runtime.block_on(purge);
        }
    }
}
