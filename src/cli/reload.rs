//! `sluice reload`.

use std::path::Path;
use std::process::ExitCode;

use crate::config::tokens::Right;

/// Has the running proxy read its configuration file again.
pub fn run(path: &Path) -> ExitCode {
    super::client::call(path, Some(Right::Reload), "/reload")
}
