//! `sluice warm`.

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use serde_json::Value;

use super::client::Client;
use super::say;
use crate::config::tokens::Right;

/// Has the running proxy ask for what `[warm]` names; on a terminal, shows how far it is.
pub fn run(path: &Path) -> ExitCode {
    match warm(path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(code) => code,
    }
}

fn warm(path: &Path) -> Result<(), ExitCode> {
    let client = Client::new(path)?;
    say(client.ask(Some(Right::Warm), "/warm")?);
    if std::io::stderr().is_terminal() {
        let is_done = |state: &Value| state["running"] != true;
        client.follow("/warm", is_done, |state| format!("{} of {} asked for, {} failed", state["done"], state["of"], state["failed"]))?;
    }
    Ok(())
}
