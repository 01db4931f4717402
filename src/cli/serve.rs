//! `sluice serve`.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::client::Predecessor;
use super::{FileOption, ListenOptions, UNREACHED, complain, load, say};
use crate::admin::audit;
use crate::app::{self, Running};
use crate::config::Config;
use crate::control::reload::{self, Reloader, Source};
use crate::control::watch::FileWatch;
use crate::telemetry::log;

/// How to serve.
#[derive(Args, Clone)]
pub struct Options {
    #[command(flatten)]
    file: FileOption,
    #[command(flatten)]
    listen: ListenOptions,
    /// Start beside the process that serves now, and have it stop once this one serves: no connection is refused
    #[arg(long)]
    take_over: bool,
}

/// Serves until SIGTERM or SIGINT. SIGHUP has the configuration read again.
pub fn run(options: &Options) -> ExitCode {
    let mut config = match load(&options.file.config) {
        Ok(config) => config,
        Err(code) => return code,
    };
    options.listen.apply(&mut config);
    let _logging = log::start(&config.log);
    let listen = options.listen.clone();
    let source = Source { path: options.file.config.clone(), adjust: Box::new(move |config| listen.apply(config)) };
    let before = match options.take_over.then(|| Predecessor::reach(&config)).transpose() {
        Ok(before) => before,
        Err(error) => {
            complain(format_args!("sluice: nothing to take over: no proxy answers at {} (admin.listen): {error}", config.admin.listen));
            return ExitCode::from(UNREACHED);
        }
    };
    run_until_told(&config, Some(source), before, |_| std::future::pending())
}

/// Runs a configuration, which came from `source`, until a signal comes; `beside` runs meanwhile. The process `before` stops once
/// this one serves.
pub fn run_until_told<F, B>(config: &Config, source: Option<Source>, before: Option<Predecessor>, beside: F) -> ExitCode
where
    F: FnOnce(&Running) -> B,
    B: Future<Output = ()>,
{
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("background").build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(format_args!("sluice: cannot start: {error}"));
            return ExitCode::from(UNREACHED);
        }
    };
    let code = runtime.block_on(async {
        let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()));
        let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = signals else {
            complain("sluice: cannot listen for signals");
            return ExitCode::from(UNREACHED);
        };
        let running = match app::start(config, source, before.is_some()).await {
            Ok(running) => running,
            Err(error) => {
                complain(format_args!("sluice: {error}"));
                return ExitCode::from(UNREACHED);
            }
        };
        if let Some(before) = before {
            match before.stop(config) {
                // It has left what it had in memory.
                Ok(()) => running.take_over().await,
                Err(error) => {
                    tracing::error!(%error, "the process before does not stop; stop it by hand (it needs a token that may \"stop\")")
                }
            }
        }
        say(format_args!("listening on http://{}", running.address));
        say(format_args!("admin on http://{}", running.admin));
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = beside(&running) => {}
            () = running.handed_over() => {}
            () = reload_at(&mut hangup, running.reloader.as_ref()) => {}
            () = reload_on_change(running.reloader.as_ref(), config.admin.watch) => {}
        }
        tracing::info!("stopping: open requests may finish");
        running.stop().await;
        ExitCode::SUCCESS
    });
    // Whatever blocks in the background (a name look-up, say) must not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    code
}

/// Has the configuration read again whenever the signal comes; never ends.
async fn reload_at(signal: &mut Signal, reloader: Option<&Arc<Reloader>>) {
    while signal.recv().await.is_some() {
        reload(reloader, "SIGHUP").await;
    }
    std::future::pending().await
}

/// Has the configuration read again whenever its file changes, if that is wanted; never ends.
async fn reload_on_change(reloader: Option<&Arc<Reloader>>, wanted: bool) {
    let Some(reloader) = reloader.filter(|_| wanted) else { return std::future::pending().await };
    let mut file = match FileWatch::new(reloader.path()) {
        Ok(file) => file,
        Err(error) => {
            tracing::error!(%error, "the configuration file cannot be watched (admin.watch); sluice reload and SIGHUP work");
            return std::future::pending().await;
        }
    };
    // It may have changed since it was read at the start.
    let serving = Arc::clone(reloader);
    let mut outdated = tokio::task::spawn_blocking(move || serving.is_outdated()).await.unwrap_or(false);
    loop {
        if outdated {
            reload(Some(reloader), "the changed file").await;
        }
        file.changed().await;
        outdated = true;
    }
}

async fn reload(reloader: Option<&Arc<Reloader>>, told_by: &str) {
    let Some(reloader) = reloader.cloned() else { return };
    // What was wrong is in the log.
    if let Ok(reloaded) = tokio::task::spawn_blocking(move || reloader.reload()).await {
        audit::told_by(told_by, "reload", &reload::result(&reloaded));
    }
}
