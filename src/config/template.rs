//! `liq:{symbol}:{page:-1}`: the readable part of a key, and tags.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Text with `{parameter}` in it; `{parameter:-default}` stands in for a parameter that is missing or empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Parameter { name: String, default: String },
}

/// The tag that the shipped rules give to answers about a symbol, `symbol:{symbol}` with `fold_case`.
#[must_use]
pub fn symbol_tag(symbol: &str) -> String {
    let mut tag = String::from("symbol:");
    escape(&symbol.to_ascii_uppercase(), &mut tag);
    tag
}

impl Template {
    /// Compiles a template.
    ///
    /// # Errors
    /// A sentence for the operator: an unclosed or stray brace, or an empty name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some(open) = rest.find(['{', '}']) {
            if rest.as_bytes()[open] == b'}' {
                return Err("a '}' without a '{' before it".into());
            }
            if open > 0 {
                pieces.push(Piece::Text(rest[..open].to_owned()));
            }
            let inner = &rest[open + 1..];
            let close = inner.find('}').ok_or("a '{' without a '}' after it")?;
            let (name, default) = inner[..close].split_once(":-").unwrap_or((&inner[..close], ""));
            if name.is_empty() || name.contains('{') {
                return Err("a '{…}' needs the name of a parameter".into());
            }
            pieces.push(Piece::Parameter { name: name.to_owned(), default: default.to_owned() });
            rest = &inner[close + 1..];
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self { pieces })
    }

    /// The parameters that it names.
    pub fn parameters(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Parameter { name, .. } => Some(name.as_str()),
            Piece::Text(_) => None,
        })
    }

    /// Fills it in. Every value is escaped, so that it can neither end its field nor act as a pattern.
    pub fn render<'a>(&self, value: impl Fn(&str) -> Option<Cow<'a, str>>) -> String {
        let mut out = String::with_capacity(64);
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Parameter { name, default } => match value(name) {
                    Some(value) if !value.is_empty() => escape(&value, &mut out),
                    _ => out.push_str(default),
                },
            }
        }
        out
    }

    /// A pattern that everything matches that it renders to with these values, and `*` for the others.
    pub fn pattern<'a>(&self, value: impl Fn(&str) -> Option<Cow<'a, str>>) -> String {
        let mut out = String::with_capacity(64);
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Parameter { name, .. } => match value(name) {
                    Some(value) => escape(&value, &mut out),
                    None => out.push('*'),
                },
            }
        }
        out
    }
}

/// Percent-encodes everything but letters, digits and `-._~+`.
pub fn escape(value: &str, out: &mut String) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'+') {
            out.push(char::from(byte));
        } else {
            let written = write!(out, "%{byte:02X}");
            debug_assert!(written.is_ok(), "a String takes every write");
        }
    }
}

/// A value as it stands in a URL: as [`escape`] writes it, and `+`, which would be a space in a query, by its code.
#[must_use]
pub fn escape_in_url(value: &str) -> String {
    let mut out = String::new();
    escape(value, &mut out);
    out.replace('+', "%2B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_escaped_and_defaults_stand_in() {
        let template = Template::parse("orders:{symbol}:page:{page:-1}").unwrap();
        let value = |name: &str| (name == "symbol").then_some(Cow::Borrowed("a:*é"));
        assert_eq!(template.render(value), "orders:a%3A%2A%C3%A9:page:1");
        assert_eq!(template.pattern(value), "orders:a%3A%2A%C3%A9:page:*");
        assert_eq!(template.parameters().collect::<Vec<_>>(), ["symbol", "page"]);
    }

    #[test]
    fn broken_templates_are_told() {
        for text in ["{", "a{b", "}", "{}", "{:-x}", "{a{b}}"] {
            assert!(Template::parse(text).is_err(), "{text}");
        }
        assert!(Template::parse("").unwrap().render(|_| None).is_empty());
    }
}
