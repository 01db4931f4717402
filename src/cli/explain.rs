//! `sluice explain`.

use std::process::ExitCode;

use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::{FileOption, NO, load, say};
use crate::admin::explain::Explainer;
use crate::clock::Wall;

/// What to explain.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    file: FileOption,
    /// A header field of the request; may be repeated
    #[arg(short = 'H', long = "header", value_name = "Name: value", value_parser = field)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// The path and query, as in the request line
    #[arg(value_name = "TARGET")]
    target: String,
}

fn field(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("write it as 'Name: value'")?;
    let name = name.trim().parse().map_err(|_| format!("'{name}' is not a field name"))?;
    let value = value.trim().parse().map_err(|_| "the value holds characters that may not occur".to_owned())?;
    Ok((name, value))
}

/// Explains, without asking anybody.
pub fn run(options: &Options) -> ExitCode {
    let config = match load(&options.file.config) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let headers: HeaderMap = options.headers.iter().cloned().collect();
    let (fine, text) = Explainer::new(&config).explain(&options.target, &headers, Wall::now());
    say(text.trim_end());
    if fine { ExitCode::SUCCESS } else { ExitCode::from(NO) }
}
