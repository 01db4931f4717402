//! `sluice stats`.

use std::path::Path;
use std::process::ExitCode;

use http::Method;

/// Prints the statistics of the running proxy.
pub fn run(path: &Path) -> ExitCode {
    super::client::call(path, &Method::GET, "/stats")
}
