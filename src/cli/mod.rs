//! The command line: one file a command.
//!
//! Exit codes: 0 fine, 1 the answer is no, 2 usage, 3 could not reach.

mod check;
mod client;
mod demo;
mod describe;
mod explain;
mod purge;
mod reload;
mod serve;
mod stats;
mod warm;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Config};

/// The answer is no: a broken configuration, a refused call.
const NO: u8 = 1;
/// Something could not be reached: a file, an address, a running proxy.
const UNREACHED: u8 = 3;

/// A caching reverse proxy for JSON APIs: repeated questions cheap, outages invisible.
#[derive(Parser)]
#[command(name = "sluice", version, about, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "Exit codes: 0 fine, 1 the answer is no, 2 usage, 3 could not reach.\nTry it without any service: sluice demo")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::Options,
}

#[derive(Subcommand)]
enum Command {
    /// Serve, as the configuration says (this is what happens without a command)
    Serve(serve::Options),
    /// Check the configuration: every problem as file:line:column, exit 1 if any is an error
    Check(FileOption),
    /// Show what happens to a request: the rule, the key, the freshness, and why (asks nobody)
    Explain(explain::Options),
    /// Show Sluice at work: a slow sample API behind a proxy in one process, no services needed
    Demo(demo::Options),
    /// Print the statistics of the running proxy
    Stats(stats::Options),
    /// Remove entries from the cache of the running proxy
    Purge(purge::Options),
    /// Have the running proxy read its configuration file again
    Reload(FileOption),
    /// Have the running proxy ask for the targets of [warm]
    Warm(FileOption),
    /// Print a script that completes this command line, for bash, zsh, fish, elvish or powershell
    Completions(describe::Completions),
    /// Write the man pages into a folder
    Man(describe::Man),
}

/// `--config`.
#[derive(Args, Clone)]
pub struct FileOption {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "proxy.toml")]
    config: PathBuf,
}

/// `--listen` and `--admin-listen`, which win over the configuration.
#[derive(Args, Clone)]
pub struct ListenOptions {
    /// Where clients are served; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Where the admin listener is; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    admin_listen: Option<SocketAddr>,
}

impl ListenOptions {
    fn apply(&self, config: &mut Config) {
        config.listen = self.listen.unwrap_or(config.listen);
        config.admin.listen = self.admin_listen.unwrap_or(config.admin.listen);
    }
}

/// Runs the command that the arguments name.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(options) => serve::run(&options),
        Command::Check(options) => check::run(&options.config),
        Command::Explain(options) => explain::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Stats(options) => stats::run(&options),
        Command::Purge(options) => purge::run(&options),
        Command::Reload(options) => reload::run(&options.config),
        Command::Warm(options) => warm::run(&options.config),
        Command::Completions(options) => describe::completions(&options),
        Command::Man(options) => describe::man(&options),
    }
}

/// Says something on standard error. A reader that is gone is not worth a panic.
fn complain(text: impl std::fmt::Display) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints a line on standard output.
fn say(text: impl std::fmt::Display) {
    use std::io::Write as _;
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

fn rules(count: u64) -> String {
    if count == 1 { "1 rule".to_owned() } else { format!("{count} rules") }
}

/// The configuration of a file, its problems having been told.
fn load(path: &Path) -> Result<Config, ExitCode> {
    let checked = config::load(path).map_err(|error| {
        complain(format_args!("sluice: cannot read {}: {error} (--config FILE says which file)", path.display()));
        ExitCode::from(UNREACHED)
    })?;
    checked.report.iter().for_each(complain);
    checked.config.ok_or(ExitCode::from(NO))
}
