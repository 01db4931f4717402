//! The page of the admin listener: three files in the program, which ask `/stats`, `/metrics` and `/explain` and change things with the
//! token that is typed in. Nothing comes from elsewhere, and nothing runs that does not stand in these files.

use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, Response};

use crate::body::Reply;

/// What a browser may do for the page: load its own files, and ask this listener.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; \
                      frame-ancestors 'none'; require-trusted-types-for 'script'";

/// The file at a path, with its type.
fn file(path: &str) -> Option<(&'static str, &'static str)> {
    Some(match path {
        "/" => ("text/html; charset=utf-8", include_str!("console/index.html")),
        "/page.css" => ("text/css; charset=utf-8", include_str!("console/page.css")),
        "/page.js" => ("text/javascript; charset=utf-8", include_str!("console/page.js")),
        _ => return None,
    })
}

/// The page's file at a path; `None`: it has none there.
#[must_use]
pub fn get(path: &str) -> Option<Response<Reply>> {
    let (kind, text) = file(path)?;
    let mut response = super::page(200, kind, text);
    let fields: [(HeaderName, &'static str); 4] = [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // Another version of the program has other files.
        (CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in fields {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    Some(response)
}
