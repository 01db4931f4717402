//! The cache key: from a request to bytes that only equal requests share.
//!
//! The *canonical request* is the whole truth: length-prefixed fields, so that no two requests run together. The
//! memory tier is keyed by it, and an entry that comes from Redis is compared with it. The *name* is what Redis and
//! operators see: the rule's readable template, marks of its tags for purges, then the canonical request's SHA-256.

use std::cmp::Ordering;
use std::sync::OnceLock;

use bytes::Bytes;
use http::header::{AUTHORIZATION, ORIGIN};
use http::{HeaderMap, HeaderName};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use crate::config::route::Route;
use crate::http::conditional::hex;
use crate::request::fields::API_KEY;
use crate::request::target::{Parameter, Target, unmarked};
use crate::upstream::selecting::Selecting;

/// The longest key name in Redis, in bytes, namespace included. Longer readable parts are cut; the hash is not.
pub const MAX_NAME: usize = 200;

/// The canonical form of a request, which is what equality of requests means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Canonical(pub Bytes);

impl Canonical {
    /// The canonical form of a GET (or of a HEAD, which shares its answers) on `route`.
    ///
    /// It holds the rule (its name and its shape), the decoded path, `Origin` (services answer it without saying `Vary`), and the
    /// parameters that matter: sorted by name, repeated and similar names in their order, case folded where the rule says so.
    /// Reserved characters that were percent-encoded are not those that were not (RFC 3986 §2.2); unreserved ones are.
    /// Fields that the rule lists in `request_headers` follow.
    #[must_use]
    pub fn new(route: &Route, target: &Target<'_>, headers: &HeaderMap) -> Self {
        let matters = |parameter: &Parameter<'_>| route.query.as_ref().is_none_or(|names| !is_ignored(parameter, names));
        let mut parameters: Vec<_> = target.parameters.iter().filter(|parameter| matters(parameter)).collect();
        // Stable: whatever some program might take for one name stays in its order.
        parameters.sort_by(|a, b| by_spelling(a.name(), b.name()));
        let origins = || headers.get_all(ORIGIN).iter();
        // Exactly as much as is needed: the bytes are then shared without being copied again.
        let of_parameters: usize = parameters.iter().map(|p| 9 + p.name().len() + p.value().map_or(0, <[u8]>::len)).sum();
        let of_origins: usize = origins().map(|origin| 5 + origin.len()).sum();
        let listed = || route.request_fields.listed().iter().flat_map(|name| headers.get_all(name).iter().map(move |value| (name, value)));
        let of_listed: usize = listed().map(|(name, value)| 9 + name.as_str().len() + value.len()).sum();
        let mut out = Vec::with_capacity(17 + route.name.len() + target.canonical_path().len() + of_origins + of_parameters + of_listed);
        field(&mut out, route.name.as_bytes());
        out.extend_from_slice(&route.shape);
        field(&mut out, target.canonical_path().as_bytes());
        out.push(0);
        for origin in origins() {
            out.push(1);
            field(&mut out, origin.as_bytes());
        }
        for parameter in parameters {
            out.push(if parameter.value().is_some() { 3 } else { 2 });
            field(&mut out, parameter.name());
            let start = out.len();
            field(&mut out, parameter.value().unwrap_or_default());
            if route.fold_case.iter().any(|name| parameter.is(name)) {
                out[start + 4..].make_ascii_uppercase();
            }
        }
        for (name, value) in listed() {
            out.push(6);
            field(&mut out, name.as_str().as_bytes());
            field(&mut out, value.as_bytes());
        }
        debug_assert_eq!(out.len(), out.capacity(), "counted above");
        Self(Bytes::from(out))
    }

    /// The canonical form of this request for requests with the same values in the fields that the response varies by.
    #[must_use]
    pub fn variant(&self, fields: &[HeaderName], selecting: &Selecting) -> Self {
        let mut out = self.0.to_vec();
        out.push(4);
        out.extend_from_slice(selecting.selected(fields).bytes());
        Self(Bytes::from(out))
    }

    /// The canonical form of this request for those who have the same credentials.
    #[must_use]
    pub fn with_credentials(&self, headers: &HeaderMap) -> Self {
        let mut credentials = Vec::new();
        for name in [AUTHORIZATION, API_KEY] {
            for value in headers.get_all(&name) {
                field(&mut credentials, name.as_str().as_bytes());
                field(&mut credentials, value.as_bytes());
            }
        }
        let mut out = self.0.to_vec();
        out.push(7);
        out.extend_from_slice(&Sha256::digest(&credentials));
        Self(Bytes::from(out))
    }

    /// The canonical form of this request for those who prefer a language to all others.
    #[must_use]
    pub fn language(&self, language: &str) -> Self {
        let mut out = self.0.to_vec();
        out.push(5);
        field(&mut out, language.as_bytes());
        Self(Bytes::from(out))
    }

    /// SHA-256 in lower-case hexadecimal.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut text = String::with_capacity(64);
        hex(&Sha256::digest(&self.0), &mut text);
        text
    }
}

/// Whether a parameter is part of the key under a rule, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept<'a> {
    /// The rule lists none: all are.
    All,
    /// The rule lists it.
    Listed,
    /// The rule does not, but some program could take it for this one, which it lists.
    Like(&'a str),
    /// The rule does not, but it holds characters by which some program could read a part of it as another parameter.
    Odd,
    /// It is not.
    Not,
}

/// Whether [`Canonical::new`] keeps a parameter, and why.
#[must_use]
pub fn kept<'a>(route: &'a Route, parameter: &Parameter<'_>) -> Kept<'a> {
    let Some(names) = &route.query else { return Kept::All };
    if is_ignored(parameter, names) {
        return Kept::Not;
    }
    if names.iter().any(|name| parameter.is(name)) {
        return Kept::Listed;
    }
    let like = names.iter().find(|name| spelling(parameter.name()).eq(spelling(name.as_bytes())));
    like.map_or(Kept::Odd, |name| Kept::Like(name))
}

/// Whether a parameter is left out of the key because it is none of those that `matter`. It goes to the backend all the
/// same, so it must be certain that no program takes it, or a part of it, for one that matters: it and its value are
/// plain, and its name is not another spelling of such a one.
fn is_ignored(parameter: &Parameter<'_>, matter: &[String]) -> bool {
    let plain =
        |text: &[u8]| text.iter().map(|&byte| unmarked(byte)).all(|byte| byte.is_ascii_alphanumeric() || b"-_.~:,/".contains(&byte));
    let alike = |other: &String| spelling(parameter.name()).eq(spelling(other.as_bytes()));
    plain(parameter.name()) && plain(parameter.value().unwrap_or_default()) && !matter.iter().any(alike)
}

/// The order of two names by their spelling. Names that begin with different letters need no closer look.
fn by_spelling(a: &[u8], b: &[u8]) -> Ordering {
    match (a.first(), b.first()) {
        (Some(a), Some(b)) if a != b && a.is_ascii_lowercase() && b.is_ascii_lowercase() => a.cmp(b),
        _ => spelling(a).cmp(spelling(b)),
    }
}

/// What a parameter's name is to the most lenient of programs: blind to case and to leading spaces, one sign as good as
/// another, an index in brackets no part of it.
fn spelling(name: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let bare = name.iter().map(|&byte| unmarked(byte)).take_while(|byte| *byte != b'[').skip_while(u8::is_ascii_whitespace);
    bare.map(|byte| if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'_' })
}

fn field(out: &mut Vec<u8>, bytes: &[u8]) {
    // A target has at most 8 KiB and a header 64 KiB, so 32 bits hold every length.
    out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// A key with everything that stores and operators need of it.
#[derive(Clone, Debug)]
pub struct Key {
    /// What equality means.
    pub canonical: Canonical,
    /// The readable part, from the rule's template: what operators' patterns are matched with.
    pub readable: String,
    /// What an entry under this key is tagged with.
    pub tags: Vec<String>,
    /// A digest of the request without origin and variant: what an invalidation names (RFC 9111 §4.4). 0: nothing names it.
    pub target: u64,
    /// Its name in Redis. Not for others, so that no key is made of parts of another one with that one's name.
    name: MadeName,
}

/// The name of a key, made when it is first asked for. A clone makes its own, since what is cloned is often changed.
#[derive(Debug, Default)]
struct MadeName(OnceLock<Box<str>>);

impl Clone for MadeName {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// A tag that begins so says which keys answers have that are made from this entry, as a glob. A purge of any of them by
/// pattern concerns the entry too.
pub const MADE_INTO: &str = "\u{1}made-into:";

/// More tags than this do not stand in a name.
const MOST_MARKS: usize = 8;
/// Stands in a name in place of marks that do not fit.
const UNMARKED: &str = "~";

/// Five characters that stand for a tag or a target in names, so that a purge finds entries by their names alone.
#[must_use]
pub fn mark(text: &[u8]) -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let digest = xxh3_64(text);
    digest.to_le_bytes()[..5].iter().map(|byte| char::from(LETTERS[usize::from(byte & 31)])).collect()
}

/// The mark of a target.
#[must_use]
pub fn target_mark(target: u64) -> String {
    mark(&target.to_le_bytes())
}

/// What names one entry among all: the beginning of the SHA-256 of its canonical request.
#[must_use]
pub fn entry_digest(canonical: &[u8]) -> u64 {
    Sha256::digest(canonical).iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// What a name in Redis tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameParts<'a> {
    /// The readable part.
    pub readable: &'a str,
    /// The marks of target and tags; `None`: they do not stand there, or the readable part is cut.
    pub marks: Option<&'a str>,
    /// The SHA-256 of the canonical request, in hexadecimal.
    pub digest: &'a str,
}

impl<'a> NameParts<'a> {
    /// Reads a name; `None` if it is that of no entry.
    #[must_use]
    pub fn read(name: &'a [u8], namespace: &str) -> Option<Self> {
        let rest = std::str::from_utf8(name).ok()?.strip_prefix(namespace)?.strip_prefix(':')?;
        let (rest, digest) = rest.rsplit_once(':')?;
        let (readable, marks) = rest.rsplit_once('#')?;
        (digest.len() == 64).then(|| Self { readable, marks: Some(marks).filter(|marks| *marks != UNMARKED), digest })
    }

    /// Whether it is the name of the entry with this digest ([`entry_digest`]).
    #[must_use]
    pub fn is_of(&self, digest: u64) -> bool {
        self.digest.get(..16).is_some_and(|text| u64::from_str_radix(text, 16) == Ok(digest))
    }

    /// Whether a mark stands there. `None`: that is not known.
    #[must_use]
    pub fn has(&self, mark: &str) -> Option<bool> {
        let marks = self.marks?.as_bytes();
        Some(marks.chunks(mark.len()).any(|one| one == mark.as_bytes()))
    }
}

impl Key {
    /// The key of a request on `route`.
    #[must_use]
    pub fn new(route: &Route, target: &Target<'_>, canonical: Canonical) -> Self {
        let value = |name: &str| {
            let text = target.text(name)?;
            let fold = route.fold_case.iter().any(|folded| folded == name);
            Some(if fold { text.to_ascii_uppercase().into() } else { text })
        };
        let tags = route.tags.iter().map(|tag| tag.render(value)).collect();
        let target = xxh3_64(&Canonical::new(route, target, &HeaderMap::new()).0);
        Self::of(canonical, route.key.render(value), tags, target)
    }

    /// The key of these parts.
    #[must_use]
    pub fn of(canonical: Canonical, readable: String, tags: Vec<String>, target: u64) -> Self {
        Self { canonical, readable, tags, target, name: MadeName::default() }
    }

    /// The name in Redis, at most [`MAX_NAME`] bytes: `namespace:readable#marks:sha256`. There is one namespace in a process.
    #[must_use]
    pub fn name(&self, namespace: &str) -> &str {
        self.name.0.get_or_init(|| self.make_name(namespace).into())
    }

    fn make_name(&self, namespace: &str) -> String {
        let digest = self.canonical.digest();
        let tags: Vec<&String> = self.tags.iter().filter(|tag| !tag.starts_with(MADE_INTO)).collect();
        let mut marks = target_mark(self.target);
        tags.iter().for_each(|tag| marks.push_str(&mark(tag.as_bytes())));
        let room = MAX_NAME.saturating_sub(namespace.len() + digest.len() + marks.len() + 3);
        let mut end = self.readable.len().min(room);
        while !self.readable.is_char_boundary(end) {
            end -= 1;
        }
        if end < self.readable.len() || tags.len() > MOST_MARKS {
            UNMARKED.clone_into(&mut marks);
        }
        format!("{namespace}:{}#{marks}:{digest}", &self.readable[..end])
    }

    /// The key of the variant that a request selects.
    #[must_use]
    pub fn variant(&self, fields: &[HeaderName], selecting: &Selecting) -> Self {
        Self { canonical: self.canonical.variant(fields, selecting), ..self.clone() }
    }

    /// The key of this request for those who prefer a language to all others.
    #[must_use]
    pub fn language(&self, language: &str) -> Self {
        Self { canonical: self.canonical.language(language), ..self.clone() }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::tests::routes;
    use crate::upstream::selecting::tests::selecting;
    use http::HeaderValue;
    use proptest::prelude::*;

    fn key(route: &Route, target: &str) -> Key {
        let target = Target::parse(target).unwrap();
        Key::new(route, &target, Canonical::new(route, &target, &HeaderMap::new()))
    }

    fn all() -> Route {
        routes("[[route]]\nname='r'\npath='/*'\nkey='k:{a}'\n").remove(0)
    }

    #[test]
    fn order_of_different_names_and_encoding_do_not_matter() {
        let route = all();
        let same = |a, b| key(&route, a).canonical == key(&route, b).canonical;
        assert!(same("/x?a=1&b=2", "/x?b=2&a=1"));
        assert!(same("/x?a=1&&b=2&", "/x?a=%31&b=2"));
        assert!(!same("/x?a=1&a=2", "/x?a=2&a=1"));
        assert!(!same("/x?a=1", "/x?A=1"));
        assert!(!same("/x?a=1&A=2", "/x?A=2&a=1"));
        assert!(!same("/x?a=1&a[]=2", "/x?a[]=2&a=1"));
        assert!(!same("/x?a=b", "/x?a=B"));
        assert!(!same("/x?a", "/x?a="));
        assert!(!same("/x?a=1%26b=2", "/x?a=1&b=2"));
        assert!(!same("/x?a%3D1", "/x?a=1"));
        assert!(same("/%7Ex?a=%2D%2e", "/~x?a=-."));
        for (one, two) in [("/a,b", "/a%2Cb"), ("/x?a=b:c", "/x?a=b%3Ac"), ("/x?a[]=1", "/x?a%5B%5D=1"), ("/x?a=b/c", "/x?a=b%2fc")] {
            assert!(!same(one, two), "{one} {two}");
        }
        assert!(same("/x?a=b%2fc", "/x?a=b%2Fc"));
    }

    #[test]
    fn only_what_the_rule_declares_is_folded_or_dropped() {
        let route = routes("[[route]]\nname='r'\npath='/x'\nquery=['a','b']\nfold_case=['a']\nkey='k:{a}:{b}'\ntags=['s:{a}']\n").remove(0);
        let (one, two) = (key(&route, "/x?a=btc&b=q&junk=1"), key(&route, "/x?junk=2&b=q&a=BTC"));
        assert_eq!(one.canonical, two.canonical);
        assert_eq!((one.readable.as_str(), &one.tags[..]), ("k:BTC:q", &["s:BTC".to_owned()][..]));
        assert_ne!(one.canonical, key(&route, "/x?a=btc&b=Q").canonical);
    }

    #[test]
    fn no_ignored_parameter_can_be_taken_for_one_that_matters() {
        let route = routes("[[route]]\nname='r'\npath='/x'\nquery=['start_time']\n").remove(0);
        let clean = key(&route, "/x?start_time=1").canonical;
        for harmless in ["&utm_source=a-b.c", "&start=2", "&t=10:30", "&_", "&start_times=2"] {
            assert_eq!(clean, key(&route, &format!("/x?start_time=1{harmless}")).canonical, "{harmless}");
        }
        for cloaked in [
            "&utm=1;start_time=2",
            "&utm=1%26start_time=2",
            "&utm;start_time=2",
            "&Start_Time=2",
            "&start.time=2",
            "&start-time=2",
            "&start_time[]=2",
            "&start_time%00=2",
            "&utm=1%3Bstart_time%3D2",
            "&start_time=2",
            "&%20start_time=2",
        ] {
            let target = format!("/x?start_time=1{cloaked}");
            let same = Target::parse(&target).is_ok_and(|target| Canonical::new(&route, &target, &HeaderMap::new()) == clean);
            assert!(!same, "{cloaked}");
        }
    }

    #[test]
    fn listed_fields_make_keys_of_their_own() {
        let route = routes("[[route]]\nname='r'\npath='/x'\nrequest_headers=['X-Tenant','x-other']\n").remove(0);
        let target = Target::parse("/x").unwrap();
        let with = |fields: &[(&'static str, &'static str)]| {
            let fields = fields.iter().map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
            Canonical::new(&route, &target, &fields.collect())
        };
        let all = [
            with(&[]),
            with(&[("x-tenant", "")]),
            with(&[("x-tenant", "a")]),
            with(&[("x-tenant", "b")]),
            with(&[("x-other", "a")]),
            with(&[("x-other", "a"), ("x-tenant", "a")]),
        ];
        assert_eq!(all.iter().collect::<std::collections::HashSet<_>>().len(), all.len());
        assert_eq!(with(&[("x-unlisted", "a")]), all[0]);
    }

    #[test]
    fn names_are_bounded_and_end_in_the_hash() {
        let route = all();
        let long = key(&route, &format!("/x?a={}", "%C3%A9".repeat(400)));
        let name = long.name("sluice");
        assert!(name.len() <= MAX_NAME && name.starts_with("sluice:k:%C3%A9"), "{name}");
        assert!(name.ends_with(&long.canonical.digest()));
        assert_eq!(NameParts::read(name.as_bytes(), "sluice").unwrap().marks, None, "it is cut");
    }

    #[test]
    fn names_tell_purges_what_they_are_about() {
        let route = routes("[[route]]\nname='r'\npath='/x'\nkey='k#:{a}'\ntags=['s:{a}','all']\n").remove(0);
        let key = key(&route, "/x?a=b%23");
        let name = key.name("ns:x");
        let parts = NameParts::read(name.as_bytes(), "ns:x").unwrap();
        assert_eq!(parts.readable, key.readable);
        for (mark, stands) in
            [(mark(key.tags[0].as_bytes()), true), (mark(b"all"), true), (target_mark(key.target), true), (mark(b"other"), false)]
        {
            assert_eq!(parts.has(&mark), Some(stands), "{name} {mark}");
        }
        for foreign in ["ns:x", "ns:x!voids", "ns:x:a", "ns:xy:a#b:c", "other:k#aaaaa:0"] {
            assert_eq!(NameParts::read(foreign.as_bytes(), "ns:x"), None, "{foreign}");
        }
        let many = Key { tags: (0..9).map(|number| number.to_string()).collect(), ..key.clone() };
        let name = many.name("ns:x");
        assert_eq!(NameParts::read(name.as_bytes(), "ns:x").unwrap().has("aaaaa"), None);
    }

    #[test]
    fn origins_and_variants_are_kept_apart() {
        let route = all();
        let target = Target::parse("/x").unwrap();
        let with = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(ORIGIN, HeaderValue::from_static(value));
            headers
        };
        let plain = Canonical::new(&route, &target, &HeaderMap::new());
        assert_ne!(plain, Canonical::new(&route, &target, &with("a")));
        assert_ne!(Canonical::new(&route, &target, &with("b")), Canonical::new(&route, &target, &with("a")));
        let by = |value: &'static str| plain.variant(&[ORIGIN], &selecting(&[("origin", value)]));
        assert_ne!(by("a"), by("b"));
        let of = |name, value| plain.with_credentials(&HeaderMap::from_iter([(name, HeaderValue::from_static(value))]));
        assert_eq!(of(AUTHORIZATION, "a"), of(AUTHORIZATION, "a"));
        assert!(of(AUTHORIZATION, "a") != of(AUTHORIZATION, "b") && of(AUTHORIZATION, "a") != of(API_KEY, "a"));
    }

    /// A target as RFC 3986 §6.2.2 normalises it: unreserved characters decoded, digits of escapes upper-case.
    fn normalised(text: &str) -> String {
        let (mut out, mut rest) = (String::new(), text);
        while let Some(first) = rest.chars().next() {
            let length = if first == '%' { 3 } else { first.len_utf8() };
            let (one, after) = rest.split_at(length);
            let decoded = one.strip_prefix('%').map(|hex| char::from(u8::from_str_radix(hex, 16).unwrap()));
            match decoded.filter(|byte| byte.is_ascii_alphanumeric() || "-._~".contains(*byte)) {
                Some(unreserved) => out.push(unreserved),
                None if first == '%' => out.push_str(&one.to_ascii_uppercase()),
                None => out.push_str(one),
            }
            rest = after;
        }
        out
    }

    const PIECES: &str =
        "a|%61|b|~|%7e|%7E|.|%2E|:|%3a|%3A|,|%2C|@|%40|!|%21|$|%24|'|%27|(|%28|)|%29|*|%2a|+|%2B|%20|%C3%A9|%22|[|%5B|]|%5D";

    proptest! {
        /// Of two spellings of a target, those share a key that RFC 3986 says are one.
        #[test]
        fn spellings_share_a_key_only_if_they_are_the_same_target(
            one in (proptest::collection::vec(0_usize..40, 0..3), proptest::collection::vec(0_usize..40, 0..3)),
            two in (proptest::collection::vec(0_usize..40, 0..3), proptest::collection::vec(0_usize..40, 0..3)),
        ) {
            let (route, pieces): (_, Vec<&str>) = (all(), PIECES.split('|').chain(["%3D", "=", "%26", "/", "%2F", "?", "%3f"]).collect());
            let text = |numbers: &[usize], most: usize| numbers.iter().map(|number| pieces[number % most]).collect::<String>();
            let target = |(path, value): &(Vec<usize>, Vec<usize>)| format!("/p{}?a={}", text(path, 35), text(value, pieces.len()));
            let (one, two) = (target(&one), target(&two));
            let equal = key(&route, &one).canonical == key(&route, &two).canonical;
            prop_assert_eq!(equal, normalised(&one) == normalised(&two), "{} {}", one, two);
        }

        /// Two parameter lists share a key only if they are equal up to the order of different names.
        #[test]
        fn distinct_requests_never_share_a_key(
            one in proptest::collection::vec(("[ab]{0,2}", "[ab&=+%;é]{0,3}"), 0..4),
            two in proptest::collection::vec(("[ab]{0,2}", "[ab&=+%;é]{0,3}"), 0..4),
        ) {
            let route = all();
            let target = |pairs: &[(String, String)]| {
                let mut query = String::new();
                for (name, value) in pairs {
                    let mut encoded = String::new();
                    crate::config::template::escape(value, &mut encoded);
                    query.push_str(&format!("{name}={}&", encoded.replace('+', "%2B")));
                }
                format!("/x?{query}")
            };
            let sorted = |pairs: &[(String, String)]| { let mut all = pairs.to_vec(); all.sort_by(|a, b| a.0.cmp(&b.0)); all };
            let equal = key(&route, &target(&one)).canonical == key(&route, &target(&two)).canonical;
            prop_assert_eq!(equal, sorted(&one) == sorted(&two));
        }
    }
}
