//! `sluice purge`.

use std::process::ExitCode;

use clap::Args;
use http::Method;

use super::FileOption;
use crate::config::template::escape;

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
            target.push_str(&format!("&{name}="));
            let mut escaped = String::new();
            escape(value, &mut escaped);
            target.push_str(&escaped.replace('+', "%2B"));
        }
    }
    super::client::call(&options.file.config, &Method::POST, &target)
}
