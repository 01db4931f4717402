//! What spans and log lines say of a request.

use std::borrow::Cow;

use opentelemetry::KeyValue;

/// What spans and log lines say of a request.
#[derive(Clone, Debug)]
pub struct Told<'a> {
    /// The method.
    pub method: &'a str,
    /// Path and query, without what may be a secret ([`without_secrets`](crate::request::secrets::without_secrets)).
    pub target: Cow<'a, str>,
    /// The rule's name, or `none`.
    pub rule: &'a str,
    /// What became of it, as metrics call it.
    pub outcome: &'static str,
    /// Why; empty where the outcome says it all.
    pub detail: &'static str,
    /// The status.
    pub status: u16,
    /// The request's id.
    pub id: &'a str,
}

impl Told<'_> {
    /// The span's name: few differ, so that they can be grouped by it.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{} {}", self.method, self.rule)
    }

    /// Its attributes, named as OpenTelemetry's conventions for HTTP servers name them where they do.
    #[must_use]
    pub fn attributes(&self) -> Vec<KeyValue> {
        let (path, query) = self.target.split_once('?').unwrap_or((&self.target, ""));
        let texts = [
            ("url.path", path),
            ("url.query", query),
            ("sluice.rule", self.rule),
            ("sluice.outcome", self.outcome),
            ("sluice.detail", self.detail),
            ("sluice.request_id", self.id),
        ];
        let texts = texts.into_iter().filter(|(_, text)| !text.is_empty()).map(|(key, text)| KeyValue::new(key, text.to_owned()));
        texts.chain([KeyValue::new("http.response.status_code", i64::from(self.status))]).collect()
    }
}
