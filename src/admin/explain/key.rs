//! Under which key a request is stored, as the key itself has it.

use std::fmt::Write as _;

use http::header::ORIGIN;
use http::{HeaderMap, HeaderName};

use crate::cache::key::{Canonical, Kept, Key, kept};
use crate::cache::read_key::{KeyPart, spelled, spelled_path};
use crate::config::route::{RequestFields, Route};
use crate::config::template::escape;
use crate::request::fields::may_go_on;
use crate::request::secrets::{LEFT_OUT, is_left_out, text_without_secrets, without_secrets};
use crate::request::target::{Target, as_text};

/// Writes the key of a request, with what is part of it and what is not.
pub(super) fn write_key(
    route: &Route,
    namespace: &str,
    target: &Target<'_>,
    headers: &HeaderMap,
    out: &mut String,
) -> Result<Key, std::fmt::Error> {
    let key = Key::new(route, target, Canonical::new(route, target, headers));
    // Values that may be secret, as keys and tags hold them.
    let mut hidden: Vec<String> = Vec::new();
    for part in key.canonical.parts() {
        match part {
            KeyPart::Path(path) => write!(out, "canonical  {}", without_secrets(&spelled_path(path)))?,
            KeyPart::Origin(origin) => write!(out, "  Origin: {:?}", text_without_secrets(&String::from_utf8_lossy(origin)))?,
            KeyPart::Parameter(name, value) => {
                let text = as_text(value.unwrap_or_default());
                let shown_name = spelled(name);
                match value {
                    None => write!(out, "  {}", text_without_secrets(&shown_name))?,
                    Some(_) if is_left_out(&as_text(name), &text) => {
                        write!(out, "  {shown_name}={LEFT_OUT}")?;
                        let mut kept = String::new();
                        escape(&text, &mut kept);
                        hidden.push(kept);
                    }
                    Some(value) => write!(out, "  {shown_name}={:?}", spelled(value))?,
                }
            }
            // They have lines of their own.
            KeyPart::Field(..) => {}
        }
    }
    writeln!(out)?;
    write_parameters(route, target, out)?;
    write_fields(route, &key, headers, out)?;
    let shown =
        |text: &str| hidden.iter().filter(|value| !value.is_empty()).fold(text.to_owned(), |text, value| text.replace(value, LEFT_OUT));
    writeln!(out, "key        {}", shown(&key.readable))?;
    writeln!(out, "in Redis   {}", shown(key.name(namespace)))?;
    if !key.tags.is_empty() {
        writeln!(out, "tags       {}", shown(&key.tags.join(", ")))?;
    }
    Ok(key)
}

/// Parameters that the rule does not list: those that are no part of the key, and those that are all the same.
fn write_parameters(route: &Route, target: &Target<'_>, out: &mut String) -> std::fmt::Result {
    for parameter in &target.parameters {
        let name = spelled(parameter.name());
        let name = text_without_secrets(&name);
        match kept(route, parameter) {
            Kept::All | Kept::Listed => {}
            Kept::Not => writeln!(out, "ignored    {name} (not in the rule's query)")?,
            Kept::Like(like) => writeln!(out, "kept       {name} (not in the rule's query, but some programs take it for {like})")?,
            Kept::Odd => {
                writeln!(out, "kept       {name} (not in the rule's query, but its characters may mean another parameter to some program)")?
            }
        }
    }
    Ok(())
}

/// Fields that the rule lists, and those that are not sent on.
fn write_fields(route: &Route, key: &Key, headers: &HeaderMap, out: &mut String) -> std::fmt::Result {
    for part in key.canonical.parts() {
        if let KeyPart::Field(name, value) = part {
            // The value may be a credential.
            writeln!(out, "keyed      {}: {} bytes (listed in request_headers)", String::from_utf8_lossy(name), value.len())?;
        }
    }
    if matches!(route.request_fields, RequestFields::Listed(_)) {
        let own = |name: &&HeaderName| may_go_on(name) && **name != ORIGIN && !route.request_fields.listed().contains(name);
        let withheld: Vec<&str> = headers.keys().filter(own).map(HeaderName::as_str).collect();
        if !withheld.is_empty() {
            writeln!(out, "not sent   {} (to the backend, unless it names them in Vary)", withheld.join(", "))?;
        }
    }
    Ok(())
}
