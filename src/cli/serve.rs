//! `sluice serve`.

use std::process::ExitCode;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{FileOption, ListenOptions, UNREACHED, complain, load, say};
use crate::app::{self, Running};
use crate::config::Config;
use crate::telemetry::log;

/// How to serve.
#[derive(Args, Clone)]
pub struct Options {
    #[command(flatten)]
    file: FileOption,
    #[command(flatten)]
    listen: ListenOptions,
}

/// Serves until SIGTERM or SIGINT.
pub fn run(options: &Options) -> ExitCode {
    let mut config = match load(&options.file.config) {
        Ok(config) => config,
        Err(code) => return code,
    };
    options.listen.apply(&mut config);
    let _logging = log::start(&config.log);
    run_until_told(&config, |_| std::future::pending())
}

/// Runs a configuration until a signal comes; `beside` runs meanwhile.
pub fn run_until_told<F, B>(config: &Config, beside: F) -> ExitCode
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
        let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
            complain("sluice: cannot listen for signals");
            return ExitCode::from(UNREACHED);
        };
        let running = match app::start(config) {
            Ok(running) => running,
            Err(error) => {
                complain(format_args!("sluice: {error}"));
                return ExitCode::from(UNREACHED);
            }
        };
        say(format_args!("listening on http://{}", running.address));
        say(format_args!("admin on http://{}", running.admin));
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = beside(&running) => {}
        }
        tracing::info!("stopping: open requests may finish");
        running.stop().await;
        ExitCode::SUCCESS
    });
    // Whatever blocks in the background (a name look-up, say) must not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    code
}
