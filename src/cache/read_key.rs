//! Reading a canonical request back, for people: what is shown of a key is made from the key itself.

use super::key::Canonical;
use crate::request::target::{PLUS, unmarked};

/// A part of a canonical request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyPart<'a> {
    /// The path.
    Path(&'a [u8]),
    /// An `Origin`.
    Origin(&'a [u8]),
    /// A parameter that matters; without a value if it has no `=`.
    Parameter(&'a [u8], Option<&'a [u8]>),
    /// A field that the rule lists in `request_headers`.
    Field(&'a [u8], &'a [u8]),
}

impl Canonical {
    /// Its parts, in their order; not what tells variants apart.
    #[must_use]
    pub fn parts(&self) -> Vec<KeyPart<'_>> {
        let mut rest = &self.0[..];
        let mut parts = Vec::new();
        // The rule's name and shape come first.
        let begun = field(&mut rest).and_then(|_| {
            rest = rest.get(8..)?;
            field(&mut rest)
        });
        parts.extend(begun.map(KeyPart::Path));
        rest = rest.get(1..).unwrap_or_default();
        while let Some(part) = next(&mut rest) {
            parts.push(part);
        }
        parts
    }
}

fn next<'a>(rest: &mut &'a [u8]) -> Option<KeyPart<'a>> {
    let (&kind, after) = rest.split_first()?;
    *rest = after;
    match kind {
        1 => field(rest).map(KeyPart::Origin),
        2 | 3 => {
            let (name, value) = (field(rest)?, field(rest)?);
            Some(KeyPart::Parameter(name, (kind == 3).then_some(value)))
        }
        6 => Some(KeyPart::Field(field(rest)?, field(rest)?)),
        _ => None,
    }
}

fn field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first_chunk::<4>()?;
    let (field, after) = after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    *rest = after;
    Some(field)
}

/// The bytes of a name or a value of a canonical request as text: what differs there differs here. Characters are as they are; those
/// that matter encoded or not stand as they stood.
#[must_use]
pub fn spelled(bytes: &[u8]) -> String {
    spell(bytes, "%2B")
}

/// The same for a path, in which a `+` is nothing but that.
#[must_use]
pub fn spelled_path(bytes: &[u8]) -> String {
    spell(bytes, "+")
}

fn spell(bytes: &[u8], plus: &str) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match u8::try_from(u32::from(character)) {
                Ok(PLUS) => text.push('+'),
                Ok(byte) if unmarked(byte) != byte => text.push_str(&format!("%{:02X}", unmarked(byte))),
                Ok(b'+') => text.push_str(plus),
                Ok(b'%') => text.push_str("%25"),
                _ => text.push(character),
            }
        }
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("%{byte:02X}")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::routes;
    use crate::request::target::Target;
    use http::{HeaderMap, HeaderValue};
    use proptest::prelude::*;

    fn canonical(target: &str, headers: &HeaderMap) -> Canonical {
        let route = routes("[[route]]\nname='r'\npath='/*'\nfold_case=['a']\nrequest_headers=['x-tenant']\n").remove(0);
        Canonical::new(&route, &Target::parse(target).unwrap(), headers)
    }

    #[test]
    fn all_parts_are_read_back() {
        let mut headers = HeaderMap::new();
        headers.append("origin", HeaderValue::from_static("http://o"));
        headers.append("x-tenant", HeaderValue::from_static("t"));
        let canonical = canonical("/p%2C?b&a=x", &headers);
        assert_eq!(
            canonical.parts().iter().map(|part| format!("{part:?}")).collect::<Vec<_>>(),
            [
                KeyPart::Path(b"/p\x11"),
                KeyPart::Origin(b"http://o"),
                KeyPart::Parameter(b"a", Some(b"X")),
                KeyPart::Parameter(b"b", None),
                KeyPart::Field(b"x-tenant", b"t"),
            ]
            .map(|part| format!("{part:?}"))
        );
    }

    #[test]
    fn what_matters_encoded_stands_as_it_stood() {
        for (value, shown) in
            [("a+b", "a+b"), ("a%2Bb", "a%2Bb"), ("a%20b", "a b"), ("%2c,", "%2C,"), ("%252C", "%252C"), ("%ff", "%FF"), ("%C3%A9", "é")]
        {
            let canonical = canonical(&format!("/?v={value}"), &HeaderMap::new());
            let KeyPart::Parameter(_, Some(value)) = canonical.parts()[1] else { panic!("{value}") };
            assert_eq!(spelled(value), shown);
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_the_same_if_the_keys_are(
            one in "/[a-c%+,]{0,3}([?][ab]=([a-c+,()]|%2[0B5C]|%[cC]3%[aA]9|%ff){0,3}){0,1}",
            two in "/[a-c%+,]{0,3}([?][ab]=([a-c+,()]|%2[0B5C]|%[cC]3%[aA]9|%ff){0,3}){0,1}",
        ) {
            prop_assume!(Target::parse(&one).is_ok() && Target::parse(&two).is_ok());
            let shown = |target: &str| -> Vec<(String, Option<String>)> {
                let read = canonical(target, &HeaderMap::new());
                read.parts().iter().map(|part| match part {
                    KeyPart::Path(text) | KeyPart::Origin(text) => (spelled_path(text), None),
                    KeyPart::Parameter(name, value) => (spelled(name), value.map(spelled)),
                    KeyPart::Field(name, value) => (spelled(name), Some(spelled(value))),
                }).collect()
            };
            let same = canonical(&one, &HeaderMap::new()) == canonical(&two, &HeaderMap::new());
            prop_assert_eq!(shown(&one) == shown(&two), same, "{} {}", one, two);
        }
    }
}
