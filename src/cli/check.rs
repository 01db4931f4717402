//! `sluice check`.

use std::path::Path;
use std::process::ExitCode;

use super::{load, say};

/// Reads the configuration and tells every problem.
pub fn run(path: &Path) -> ExitCode {
    match load(path) {
        Ok(config) => {
            say(format_args!("{}: fine, {} rules", path.display(), config.routes.len()));
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}
