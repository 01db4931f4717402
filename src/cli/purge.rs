//! `sluice purge`.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::FileOption;
use super::client::{Client, exit};
use crate::config::template::escape_in_url;
use crate::config::tokens::Right;

/// What to purge.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    file: FileOption,
    #[command(flatten)]
    what: What,
    /// Only end the entries' freshness: they are served stale while they are refreshed
    #[arg(long)]
    soft: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Entries whose readable key matches, such as 'liq:BTCUSDT:*'
    #[arg(long, value_name = "GLOB")]
    pattern: Option<String>,
    /// Entries about a symbol, in any case
    #[arg(long, value_name = "S")]
    symbol: Option<String>,
    /// Entries with a tag, such as 'symbol:BTCUSDT'
    #[arg(long, value_name = "T")]
    tag: Option<String>,
}

/// Removes entries from the cache of the running proxy.
pub fn run(options: &Options) -> ExitCode {
    let what = &options.what;
    let given = [("pattern", &what.pattern), ("symbol", &what.symbol), ("tag", &what.tag)];
    let mut target = format!("/purge?soft={}", options.soft);
    for (name, value) in given {
        if let Some(value) = value {
            target.push_str(&format!("&{name}={}", escape_in_url(value)));
        }
    }
    exit(purge(options, &target))
}

/// Purges, and waits until it is known how much that concerned.
fn purge(options: &Options, target: &str) -> Result<Value, ExitCode> {
    let client = Client::new(&options.file.config)?;
    let said = client.ask_json(Some(Right::Purge), target)?;
    match said["number"].as_u64() {
        Some(number) if said["waits"] != true => {
            let is_done = |said: &Value| said["purged"].is_u64();
            client.follow(&format!("/purge?number={number}"), is_done, |_| "void already; counting".to_owned())
        }
        _ => Ok(said),
    }
}
