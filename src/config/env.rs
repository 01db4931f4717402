//! `${NAME}` and `${NAME:-default}` in strings. A default may itself hold references.

/// Looks up an environment variable.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Replaces every reference in `text`. As in a shell, `:-` also stands in for a variable that is set but empty.
///
/// # Errors
/// A sentence for the operator: an unset variable without a default, or a reference that is not closed.
pub fn expand(text: &str, lookup: Lookup<'_>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        out.push_str(&rest[..at]);
        let inner = &rest[at + 2..];
        let close = closing(inner).ok_or("a '${' without its '}'")?;
        let (name, default) = match inner[..close].split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (&inner[..close], None),
        };
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Err(format!("'${{{name}}}' does not name an environment variable"));
        }
        match (lookup(name).filter(|value| default.is_none() || !value.is_empty()), default) {
            (Some(value), _) => out.push_str(&value),
            (None, Some(default)) => out.push_str(&expand(default, lookup)?),
            (None, None) => return Err(format!("the environment variable {name} is not set; write ${{{name}:-default}} to do without it")),
        }
        rest = &inner[close + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

/// Where the reference that `inner` continues is closed, references inside it skipped.
fn closing(inner: &str) -> Option<usize> {
    let mut depth = 0;
    let bytes = inner.as_bytes();
    for (at, &byte) in bytes.iter().enumerate() {
        match byte {
            b'{' if at > 0 && bytes[at - 1] == b'$' => depth += 1,
            b'}' if depth == 0 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        let lookup = |name: &str| match name {
            "A" => Some("1".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        for (text, expected) in [
            ("x${A}y", "x1y"),
            ("${B:-2}${A:-9}", "21"),
            ("${EMPTY:-e}|${EMPTY}", "e|"),
            ("${B:-redis://${A}:${C:-6379}/}", "redis://1:6379/"),
            ("$A {A} }", "$A {A} }"),
            ("${B:-}", ""),
        ] {
            assert_eq!(expand(text, &lookup).as_deref(), Ok(expected), "{text}");
        }
        for text in ["${B}", "${", "${A", "${}", "${a b}", "${B:-${C}}"] {
            assert!(expand(text, &lookup).is_err(), "{text}");
        }
    }
}
