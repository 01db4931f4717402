//! Whether an answer ends the stored response that it was to validate or to replace (RFC 9111 §4.3.3).

use http::StatusCode;

/// Whether an answer that is not stored ends what is.
///
/// A full response says that what is stored is not the answer any more: it was taken back (404, 410), moved (a redirect), or is not
/// to be kept (`no-store`, `private`). Not so where the upstream failed, which is what `stale-if-error` is for, and where the answer
/// is about this one request: it came too late, too early or too often, to the wrong connection, asked for a part, or (`authorized`)
/// had the wrong credentials.
#[must_use]
pub const fn takes_back(status: StatusCode, authorized: bool) -> bool {
    match status.as_u16() {
        100..=199 | 206 | 304 | 408 | 421 | 425 | 429 | 500.. => false,
        401 | 403 | 407 => !authorized,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_about_the_resource_ends_what_is_stored() {
        let of = |status: u16, authorized| takes_back(StatusCode::from_u16(status).unwrap(), authorized);
        for status in [200, 201, 203, 204, 300, 301, 302, 303, 307, 308, 400, 404, 405, 406, 410, 422, 451] {
            assert!(of(status, false) && of(status, true), "{status}");
        }
        for status in [206, 304, 408, 421, 425, 429, 500, 501, 502, 503, 504, 507, 599] {
            assert!(!of(status, false) && !of(status, true), "{status}");
        }
        for status in [401, 403, 407] {
            assert!(of(status, false) && !of(status, true), "{status}");
        }
    }
}
