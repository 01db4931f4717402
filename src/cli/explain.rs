//! `sluice explain`.

use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;

use clap::Args;
use clap::builder::{StringValueParser, TypedValueParser as _};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::client::{Client, exit};
use super::{FileOption, NO, load, say};
use crate::admin::explain::{Explainer, Serving, client};
use crate::clock::Wall;
use crate::config::template::escape_in_url;
use crate::request::secrets;

/// What to explain.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    file: FileOption,
    /// A header field of the request; may be repeated. X-Forwarded-For says who asks
    #[arg(short = 'H', long = "header", value_name = "Name: value", value_parser = field)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Ask the running proxy: it knows what is stored and void, and says whether this is a hit and until when, or why not
    #[arg(long)]
    running: bool,
    /// The path and query, as in the request line, or the whole URL
    #[arg(value_name = "TARGET", value_parser = StringValueParser::new().map(|text| path_and_query(&text)))]
    target: String,
}

/// What is asked of the server: a URL as it is copied from a browser begins with more.
fn path_and_query(text: &str) -> String {
    let Some(rest) = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")) else { return text.to_owned() };
    match rest.find(['/', '?']) {
        Some(at) if rest[at..].starts_with('/') => rest[at..].to_owned(),
        Some(at) => format!("/{}", &rest[at..]),
        None => "/".to_owned(),
    }
}

fn field(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("write it as 'Name: value'")?;
    let name = name.trim().parse().map_err(|_| format!("'{name}' is not a field name"))?;
    let value = value.trim().parse().map_err(|_| "the value holds characters that may not occur".to_owned())?;
    Ok((name, value))
}

/// Explains, without asking anybody, or as the running proxy does.
pub fn run(options: &Options) -> ExitCode {
    if options.running {
        return ask(options);
    }
    let config = match load(&options.file.config) {
        Ok(config) => config,
        Err(code) => return code,
    };
    secrets::leave_out(&config.log.redact);
    let headers: HeaderMap = options.headers.iter().cloned().collect();
    let serving = Serving {
        routes: &config.routes,
        limits: config.rate_limits.iter().collect(),
        client: client(&headers, IpAddr::V4(Ipv4Addr::LOCALHOST)),
        foreseen: None,
        voids: None,
        locate: &|_| None,
    };
    let (fine, text) = Explainer::new(&config).explain(&serving, &options.target, &headers, Wall::now());
    say(text.trim_end());
    if fine { ExitCode::SUCCESS } else { ExitCode::from(NO) }
}

fn ask(options: &Options) -> ExitCode {
    let mut target = format!("/explain?target={}", escape_in_url(&options.target));
    for (name, value) in &options.headers {
        let field = format!("{name}: {}", String::from_utf8_lossy(value.as_bytes()));
        target.push_str(&format!("&header={}", escape_in_url(&field)));
    }
    exit(Client::new(&options.file.config).and_then(|client| client.ask(None, &target)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_for_what_they_ask() {
        for (given, asked) in [
            ("/api/symbols?x=http://a/b", "/api/symbols?x=http://a/b"),
            ("http://127.0.0.1:8080/api/symbols?x=1", "/api/symbols?x=1"),
            ("https://api.example", "/"),
            ("https://api.example?x=1/2", "/?x=1/2"),
            ("ftp://x/y", "ftp://x/y"),
        ] {
            assert_eq!(path_and_query(given), asked);
        }
    }
}
