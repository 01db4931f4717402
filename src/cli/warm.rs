//! `sluice warm`.

use std::path::Path;
use std::process::ExitCode;

use http::Method;

/// Has the running proxy ask for the targets of `[warm]`.
pub fn run(path: &Path) -> ExitCode {
    super::client::call(path, &Method::POST, "/warm")
}
