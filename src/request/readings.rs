//! What a doubtful target may mean: every path that some program on the way may read in it.
//!
//! Such a target is forwarded verbatim and never cached. Its requests count against the limits of each rule that one of these
//! readings leads to, so that no spelling frees anybody from a limit.

/// The longest path that is worth reading in every way, in bytes: a few hundred times as many are read and written for it.
pub const MAX_READ: usize = 1024;

/// So often a path is decoded: twice encoded means once to some, and not at all to others.
const DECODINGS: usize = 3;

/// The paths that programs may read in a target, each once.
///
/// They differ in how often they decode it, whether they cut it at an encoded `?` or `#`, whether a backslash is a slash, whether
/// `;` begins parameters of a segment (RFC 3986 §3.3), and whether slashes are merged before or after dot segments are removed.
#[must_use]
pub fn paths(target: &str) -> Vec<String> {
    let mut decoded = vec![cut(target, &['?'])];
    for _ in 0..DECODINGS {
        let again = decode(decoded.last().map_or("", String::as_str));
        decoded.push(again);
    }
    let steps: [fn(&str) -> String; 3] = [|path| cut(path, &['?', '#']), |path| path.replace('\\', "/"), without_parameters];
    let mut read = decoded;
    for step in steps {
        let more: Vec<String> = read.iter().map(|path| step(path)).collect();
        read.extend(more);
        unique(&mut read);
    }
    let mut all: Vec<String> = read.iter().flat_map(|path| [without_dots(&merged(path)), merged(&without_dots(path))]).collect();
    all.extend(read);
    // `/a/.` is `/a/` to some, and that is `/a` to others.
    let bare: Vec<String> = all.iter().map(|path| path.trim_end_matches('/').to_owned()).filter(|path| !path.is_empty()).collect();
    all.extend(bare);
    unique(&mut all);
    all
}

fn unique(paths: &mut Vec<String>) {
    paths.sort_unstable();
    paths.dedup();
}

/// A path up to the first of these.
fn cut(path: &str, at: &[char]) -> String {
    path.split(at).next().unwrap_or_default().to_owned()
}

/// A path with its escapes decoded once; what is none stays.
fn decode(path: &str) -> String {
    let (mut bytes, mut rest) = (Vec::with_capacity(path.len()), path.as_bytes());
    while let [first, after @ ..] = rest {
        let hex = after.get(..2).filter(|_| *first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match hex.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A path whose segments have no parameters.
fn without_parameters(path: &str) -> String {
    let segments: Vec<&str> = path.split('/').map(|segment| segment.split(';').next().unwrap_or_default()).collect();
    segments.join("/")
}

/// A path without empty segments but the last.
fn merged(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for letter in path.chars().filter(|letter| *letter != '\0') {
        if letter != '/' || !out.ends_with('/') {
            out.push(letter);
        }
    }
    out
}

/// A path without dot segments (RFC 3986 §5.2.4).
fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            ".." => drop(kept.pop()),
            "." => {}
            other => {
                kept.push(other);
                continue;
            }
        }
        if is_last {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lenient_reading_of_a_path_is_found() {
        for spelling in [
            "/api/./orders",
            "/api//orders",
            "//api/orders",
            "/api/x/../orders",
            "/api/x//../../orders",
            "/api//../orders",
            "/../api/orders",
            "/api/%2e/orders",
            "/api/x/%2e%2E/orders",
            "/api%2Forders",
            "/api%2forders?x=1",
            "/api%252Forders",
            "/api\\orders",
            "/api%5corders",
            "/api/orders;v=1",
            "/api;v=1/orders",
            "/api/orders%3bv",
            "/api/x/..;/orders",
            "/api/x/..;a=b/orders",
            "/api/x/%2e%2e;/orders",
            "/api/orders%3Fx",
            "/api/orders%23x",
            "/api/orders/.",
            "/api/orders/",
            "/api/orders/x/..",
            "/api/orders?a;b",
            "/api/%6frders/./",
        ] {
            assert!(paths(spelling).iter().any(|path| path == "/api/orders"), "{spelling}: {:?}", paths(spelling));
        }
        for other in ["/api/orders2", "/api/ordersx/.", "/other//x", "/api/é"] {
            assert!(!paths(other).iter().any(|path| path == "/api/orders"), "{other}");
        }
    }

    #[test]
    fn readings_are_few_whatever_the_path() {
        let long = format!("/{}", "%255c..;/%2f//.".repeat(500));
        assert!(paths(&long).len() <= 200, "{}", paths(&long).len());
    }
}
