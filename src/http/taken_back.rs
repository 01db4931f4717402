//! Whether an answer ends the stored response that it was to validate or to replace (RFC 9111 §4.3.3).

use http::StatusCode;

/// Whether an answer that may not itself be stored ends what is.
///
/// A full response says that what is stored is not the answer any more: it was taken back (404, 410, 451), moved (a redirect), or is
/// not to be kept (a 2xx with `no-store`, `private` and the like). Other 4xx say what one request did wrong: the upstream is sent that
/// client's address, and fields and parameters that the key does not hold, so one client's 403 or 414 says nothing about the others.
/// 5xx say that the upstream failed, which is what `stale-if-error` is for. A part (206) is not the whole.
#[must_use]
pub const fn takes_back(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200..=205 | 207..=299 | 300..=303 | 307 | 308 | 404 | 410 | 451)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_about_the_resource_ends_what_is_stored() {
        let ending = [300, 301, 302, 303, 307, 308, 404, 410, 451];
        for status in 100..=999 {
            let expected = (200..=299).contains(&status) && status != 206 || ending.contains(&status);
            assert_eq!(takes_back(StatusCode::from_u16(status).unwrap()), expected, "{status}");
        }
    }
}
