//! What is refused, and how: **the one table** ([`Refusal::row`]). `deploy/refusals.md` shows it to operators, and a test
//! holds the two together.
//!
//! A refusal happens before anything is looked up, fetched or stored, so that bad input can neither lose nor change
//! anything that is cached. Where the end of a bad request is not certain, its connection is closed after the answer:
//! what follows is never taken for another request.

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not `METHOD target HTTP/1.x` with single spaces (RFC 9112 §3).
    RequestLine,
    /// A version other than HTTP/1.0, HTTP/1.1 and HTTP/2 (RFC 9110 §15.6.6).
    Version,
    /// A line that ends in a bare LF, or a CR without LF (RFC 9112 §2.2).
    LineEnd,
    /// A field line that is no `name: value`: white space before the colon, a folded line, a control character (§5).
    FieldLine,
    /// A length that is repeated, signed or no number (RFC 9112 §6.3).
    Length,
    /// A length together with a transfer coding, or a coding in HTTP/1.0 (§6.1, §6.3).
    LengthAndCoding,
    /// A transfer coding that is not known here, before `chunked` (§6.1).
    Coding,
    /// Transfer codings of which `chunked` is not the last, or is named twice, or that are none (§6.1, §6.3).
    CodingOrder,
    /// A head that is too large, or has too many fields (RFC 6585 §5).
    Head,
    /// `CONNECT` and `TRACE` (RFC 9110 §15.6.2).
    Method,
    /// An expectation other than `100-continue` (RFC 9110 §10.1.1).
    Expectation,
    /// A body that ended before its time, or that is malformed (RFC 9112 §7.1, §8).
    BrokenBody,
    /// A body that the client sends too slowly, or not at all (RFC 9110 §15.5.9).
    SlowBody,
    /// A missing, repeated or malformed authority, or two that differ (RFC 9112 §3.2, RFC 9113 §8.3.1).
    BadHost,
    /// A target that is not a path, or an absolute one of another scheme.
    NotAPath,
    /// The URL has over 8 KiB.
    UrlTooLong,
    /// The URL holds a control character, plain or percent-encoded.
    ControlCharacter,
    /// A `%` that two hexadecimal digits do not follow.
    BrokenEscape,
    /// The client made more requests than a limit allows (RFC 6585 §4).
    RateLimited,
    /// Too many requests wait already.
    Overloaded,
    /// The client wants nothing but what is stored, and nothing is that may be served.
    OnlyIfCached,
    /// The admin listener was asked by a name that is not its own (RFC 9110 §15.5.20).
    Misdirected,
    /// A management call without the admin token.
    Forbidden,
    /// A management call with a token that may not do that.
    NotAllowed,
    /// A management call while no admin token is configured.
    NoToken,
    /// A management call while audit lines cannot be written.
    Unaudited,
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The status of the answer.
    pub status: u16,
    /// What `Cache-Status`, the access log and metrics call it.
    pub detail: &'static str,
    /// What the client is told.
    pub sentence: &'static str,
    /// Whether the connection is closed after the answer.
    pub closes: bool,
}

const fn closing(status: u16, detail: &'static str, sentence: &'static str) -> Row {
    Row { status, detail, sentence, closes: true }
}

const fn staying(status: u16, detail: &'static str, sentence: &'static str) -> Row {
    Row { status, detail, sentence, closes: false }
}

impl Refusal {
    /// Every refusal, in the order of the table.
    pub const ALL: [Self; 26] = [
        Self::RequestLine,
        Self::Version,
        Self::LineEnd,
        Self::FieldLine,
        Self::Length,
        Self::LengthAndCoding,
        Self::Coding,
        Self::CodingOrder,
        Self::Head,
        Self::Method,
        Self::Expectation,
        Self::BrokenBody,
        Self::SlowBody,
        Self::BadHost,
        Self::NotAPath,
        Self::UrlTooLong,
        Self::ControlCharacter,
        Self::BrokenEscape,
        Self::RateLimited,
        Self::Overloaded,
        Self::OnlyIfCached,
        Self::Misdirected,
        Self::Forbidden,
        Self::NotAllowed,
        Self::NoToken,
        Self::Unaudited,
    ];

    /// The table.
    #[must_use]
    pub const fn row(self) -> Row {
        match self {
            Self::RequestLine => closing(400, "request-line", "The request line is malformed"),
            Self::Version => closing(505, "http-version", "Only HTTP/1.0, HTTP/1.1 and HTTP/2 are spoken here"),
            Self::LineEnd => closing(400, "line-end", "Lines of a request must end in CR LF"),
            Self::FieldLine => closing(400, "field-line", "A header line is malformed"),
            Self::Length => closing(400, "content-length", "The request needs a single, plain Content-Length, or none"),
            Self::LengthAndCoding => closing(400, "length-and-coding", "Content-Length and Transfer-Encoding contradict each other"),
            Self::Coding => closing(501, "transfer-coding", "The only transfer coding that is understood is chunked"),
            Self::CodingOrder => closing(400, "transfer-encoding", "Transfer-Encoding must end in chunked, named once"),
            Self::Head => closing(431, "head-too-large", "The request's head is too large"),
            Self::Method => closing(501, "method", "This method is not for a gateway"),
            Self::Expectation => closing(417, "expectation", "The only expectation that can be met is 100-continue"),
            Self::BrokenBody => closing(400, "broken-body", "The request's body is malformed, or ended early"),
            Self::SlowBody => closing(408, "slow-body", "The request's body came too slowly"),
            Self::BadHost => staying(400, "bad-host", "The request needs exactly one valid Host, the same as an absolute URL's"),
            Self::NotAPath => staying(400, "not-a-path", "The request target must be a path"),
            Self::UrlTooLong => staying(400, "url-too-long", "The URL is longer than 8192 bytes"),
            Self::ControlCharacter => staying(400, "control-character", "The URL contains a control character"),
            Self::BrokenEscape => staying(400, "broken-escape", "The URL contains a '%' that is not followed by two hexadecimal digits"),
            Self::RateLimited => staying(429, "rate-limited", "Too many requests; Retry-After says when to try again"),
            Self::Overloaded => staying(503, "overloaded", "Too many requests are waiting; try again shortly"),
            Self::OnlyIfCached => staying(504, "only-if-cached", "Nothing is stored that may be served, and only that was asked for"),
            Self::Misdirected => staying(
                421,
                "misdirected",
                "The admin listener does not answer to this Host; hosts in [admin] of proxy.toml lists names that it has",
            ),
            Self::Forbidden => staying(401, "forbidden", "This operation needs the admin token as 'Authorization: Bearer TOKEN'"),
            Self::NotAllowed => staying(403, "not-allowed", "This token may not do that; [[admin.tokens]] says what it may"),
            Self::NoToken => staying(403, "no-token", "Management is switched off: no admin token is configured"),
            Self::Unaudited => staying(503, "unaudited", "Changes cannot be logged now, so none is made: standard error takes no lines"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guide_shows_the_table_as_it_is() {
        let guide = include_str!("../../deploy/refusals.md");
        let shown: Vec<&str> = guide.lines().filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit()).collect();
        let expected: Vec<String> = Refusal::ALL
            .iter()
            .map(|refusal| {
                let row = refusal.row();
                format!("| {} | `{}` | {} | {} |", row.status, row.detail, row.sentence, if row.closes { "closed" } else { "kept" })
            })
            .collect();
        for line in &expected {
            assert!(shown.iter().any(|shown| shown.starts_with(line.trim_end_matches('|'))), "deploy/refusals.md lacks: {line}");
        }
        assert_eq!(shown.len(), expected.len(), "deploy/refusals.md tells of refusals that there are not");
    }
}
