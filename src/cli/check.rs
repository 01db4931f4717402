//! `sluice check`.

use std::path::Path;
use std::process::ExitCode;

use super::{load, rules, say};

/// Reads the configuration and tells every problem.
pub fn run(path: &Path) -> ExitCode {
    match load(path) {
        Ok(config) => {
            say(format_args!("{}: fine, {}", path.display(), rules(config.routes.len() as u64)));
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}
