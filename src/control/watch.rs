//! Noticing that the configuration file changed (`admin.watch = true`).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::sleep;

/// Editors write a file in several steps: it is read once nothing has happened for so long.
const QUIET: Duration = Duration::from_millis(300);

/// Tells of changes for as long as it lives.
pub struct FileWatch {
    changes: mpsc::Receiver<()>,
    _watcher: RecommendedWatcher,
}

impl FileWatch {
    /// Watches a file; its folder in truth, since editors put a new file in the place of the old one.
    ///
    /// # Errors
    /// The folder cannot be watched.
    pub fn new(path: &Path) -> Result<Self, notify::Error> {
        let name = path.file_name().map(ToOwned::to_owned);
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        // One change that waits stands for all.
        let (sender, changes) = mpsc::channel(1);
        let sender = Arc::new(sender);
        let mut watcher = notify::recommended_watcher(move |event: Result<notify::Event, notify::Error>| {
            let concerns = |path: &std::path::PathBuf| path.file_name() == name.as_deref();
            if event.is_ok_and(|event| !event.kind.is_access() && event.paths.iter().any(concerns)) {
                let _ = sender.try_send(());
            }
        })?;
        watcher.watch(folder, RecursiveMode::NonRecursive)?;
        Ok(Self { changes, _watcher: watcher })
    }

    /// Waits until the file has changed, and nothing has happened to it since for a moment.
    pub async fn changed(&mut self) {
        if self.changes.recv().await.is_none() {
            // The watcher is gone: nothing changes any more, as far as is known.
            std::future::pending::<()>().await;
        }
        loop {
            sleep(QUIET).await;
            if self.changes.try_recv().is_err() {
                break;
            }
        }
    }
}
