//! `sluice completions` and `sluice man`: what the command line says of itself, for shells and for `man`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, UNREACHED, complain, say};

/// For which shell.
#[derive(Args)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

/// Where the pages go.
#[derive(Args)]
pub struct Man {
    /// An existing folder for sluice.1, and a page for each command
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// Prints a script that completes the command line.
pub fn completions(options: &Completions) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), "sluice", &mut script);
    // Whoever reads it may have enough of it early.
    let _ = std::io::stdout().write_all(&script);
    ExitCode::SUCCESS
}

/// Writes the pages.
pub fn man(options: &Man) -> ExitCode {
    match clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), &options.folder) {
        Ok(()) => {
            say(format_args!("man pages in {}: sluice.1, and one for each command", options.folder.display()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(format_args!("sluice: cannot write to {}: {error}", options.folder.display()));
            ExitCode::from(UNREACHED)
        }
    }
}
