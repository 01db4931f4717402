//! From a `[[route]]` of the document to a [`Route`]: every key with its default, bounds and meaning in one place.

use http::{HeaderName, Method};
use xxhash_rust::xxh3::xxh3_64;

use super::rate_limit::{self, RateLimit};
use super::reader::Section;
use super::route::{History, PathPattern, RequestFields, Rollout, Route, Written};
use super::template::Template;
use super::units::{duration, is_name};
use crate::http::freshness::FreshnessPolicy;
use crate::request::fields::unlistable;

/// Reads one rule, which is number `index`, and its limit. `None` if a problem was found without which there is no rule.
#[must_use]
pub fn route(mut section: Section<'_, '_>, index: usize) -> Option<(Route, Option<RateLimit>)> {
    let name = section.parsed("name", |text| {
        if is_name(text) && text != "none" {
            Ok(text.to_owned())
        } else {
            Err("expected 1 to 64 letters, digits, '-', '_' or '.', and not 'none'".to_owned())
        }
    });
    let path = section.parsed("path", path_pattern);
    for (key, missing) in [("name", !section.has("name")), ("path", !section.has("path"))] {
        if missing {
            section.error(key, "missing: every [[route]] needs one");
        }
    }
    let cache = section.boolean("cache").unwrap_or(true);
    let methods = methods(&mut section, cache);
    let with = section.strings("with").unwrap_or_default();
    let without = section.strings("without").unwrap_or_default();
    let policy = FreshnessPolicy {
        ttl: section.parsed("ttl", duration).unwrap_or_default(),
        negative_ttl: section.parsed("negative_ttl", duration).unwrap_or_default(),
        stale_while_revalidate: section.parsed("stale_while_revalidate", duration).unwrap_or_default(),
        stale_if_error: section.parsed("stale_if_error", duration).unwrap_or_default(),
        respect_origin: section.choice("origin_headers", &[("respect", true), ("ignore", false)]).unwrap_or(true),
        heuristic: section.boolean("heuristic").unwrap_or(false),
        set_cookie: section.choice("set_cookie", &[("never", false), ("store", true)]).unwrap_or(false),
        authorized: false,
    };
    let authorization = section.choice("authorization", &[("bypass", false), ("respect", true)]).unwrap_or(false);
    let match_language = section.choice("language", &[("exact", false), ("prefer", true)]).unwrap_or(false);
    let complete_ranges = section.choice("parts", &[("whole", false), ("complete", true)]).unwrap_or(false);
    let client_directives = section.choice("client_directives", &[("ignore", false), ("respect", true)]).unwrap_or(false);
    let query = section.strings("query");
    let fold_case = section.strings("fold_case").unwrap_or_default();
    let key = section.parsed("key", Template::parse);
    let tags: Vec<Template> = section
        .strings("tags")
        .unwrap_or_default()
        .iter()
        .filter_map(|tag| Template::parse(tag).map_err(|message| section.error("tags", message)).ok())
        .collect();
    if let Some(query) = &query {
        let keyed = |name: &str| query.iter().any(|known| known == name);
        for template in key.iter().chain(&tags) {
            for name in template.parameters().filter(|name| !keyed(name)) {
                section.error("query", format!("does not list '{name}', which the key or a tag is made from"));
            }
        }
        for name in fold_case.iter().filter(|name| !keyed(name)) {
            section.warn("fold_case", format!("'{name}' is not among the parameters in query, so it is dropped anyway"));
        }
    }
    let request_fields = request_fields(&mut section);
    let rollout = section.parsed("rollout", Rollout::parse).unwrap_or(Rollout::ALL);
    let shadow = section.boolean("shadow").unwrap_or(false);
    let timeline = section.boolean("timeline").unwrap_or(false);
    if timeline {
        let for_all = matches!(&request_fields, RequestFields::Listed(listed) if listed.is_empty());
        check_timeline(&section, path.as_ref(), query.as_ref(), cache && !client_directives && for_all);
    }
    let history = section.has("history").then(|| history(section.table("history", "[route.history]"), query.as_ref()));
    if history.is_none() {
        section.table("history", "[route.history]");
    }
    if !cache && ["ttl", "key", "history", "negative_ttl"].iter().any(|key| section.has(key)) {
        section.warn("cache", "false: this rule passes everything through, so its ttl, key and history do nothing");
    }
    let has_limit = section.has("limit");
    let limit_section = section.table("limit", "[route.limit]");
    section.finish();
    let name = name?;
    let limit = if has_limit { rate_limit::limit(limit_section, name.clone(), Some(vec![name.clone()])) } else { None };
    let key = key.map_or_else(|| Template::parse(&name), Ok).ok()?;
    // Each part is a list or a value that ends where its text says so: no two shapes have one text. What was stored when encoded reserved
    // characters were the same as plain ones is not for requests of today.
    let found_by = format!("reserved:{with:?}{without:?}{query:?}{fold_case:?}{request_fields:?}");
    let voided_by = format!("{key:?}{tags:?}");
    let meant_for = format!("{authorization}{}", policy.set_cookie);
    let shape = xxh3_64(format!("{found_by}{voided_by}{meant_for}").as_bytes()).to_le_bytes();
    let route = Route {
        index,
        shape,
        methods,
        with,
        without,
        cache,
        rollout,
        shadow,
        timeline,
        share_authorized: authorization,
        client_directives,
        match_language,
        complete_ranges,
        policy,
        request_fields,
        key,
        query,
        fold_case,
        tags,
        written: Written::default(),
        history: history.flatten(),
        path: path?,
        name,
    };
    Some((route, limit))
}

/// The paths whose answers are made of orders.
const OF_ORDERS: [&str; 2] = ["/api/liquidations", "/api/liquidation-orders"];

/// The timeline answers some endpoints, and needs all of their parameters in the key.
fn check_timeline(section: &Section<'_, '_>, path: Option<&PathPattern>, query: Option<&Vec<String>>, fits: bool) {
    let parameters: &[&str] = match path {
        Some(PathPattern::Exact(path)) if path == OF_ORDERS[0] => &["symbol", "timeframe", "start_timestamp", "end_timestamp"],
        Some(PathPattern::Exact(path)) if path == OF_ORDERS[1] => &["symbol", "start_timestamp", "end_timestamp", "page", "page_size"],
        Some(_) => {
            return section.error("timeline", format!("true: only for a rule whose path is \"{}\" or \"{}\"", OF_ORDERS[0], OF_ORDERS[1]));
        }
        None => return,
    };
    for name in parameters {
        if query.is_some_and(|query| !query.iter().any(|known| known == name)) {
            section.error("query", format!("does not list '{name}', which answers from the timeline depend on"));
        }
    }
    if !fits {
        section.error("timeline", "true: not together with cache = false, client_directives = \"respect\" or request_headers");
    }
}

/// `request_headers`: a list of names, or "all".
fn request_fields(section: &mut Section<'_, '_>) -> RequestFields {
    let Some(names) = section.strings_or("request_headers", "all") else { return RequestFields::All };
    let mut listed = Vec::new();
    for text in names {
        match HeaderName::from_bytes(text.as_bytes()) {
            Ok(name) => match unlistable(&name) {
                None => listed.push(name),
                Some(why) => section.error("request_headers", format!("'{text}' cannot be listed: {why}")),
            },
            Err(_) => section.error("request_headers", format!("'{text}' is not the name of a field")),
        }
    }
    listed.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    listed.dedup();
    RequestFields::Listed(listed)
}

fn methods(section: &mut Section<'_, '_>, cache: bool) -> Vec<Method> {
    let mut methods = Vec::new();
    for text in section.strings("methods").unwrap_or_else(|| vec!["GET".into()]) {
        match Method::from_bytes(text.as_bytes()) {
            Ok(method) if !cache || matches!(method, Method::GET | Method::HEAD | Method::POST) => methods.push(method),
            Ok(method) => section.error("methods", format!("{method} cannot be cached: only GET, HEAD and answers to POST can")),
            Err(_) => section.error("methods", format!("'{text}' is not a method")),
        }
    }
    if cache && methods.contains(&Method::POST) && !methods.contains(&Method::GET) {
        section.error("methods", "POST cannot be cached by itself: its answers are kept for GET, so name that too");
    }
    methods
}

fn history(mut section: Section<'_, '_>, query: Option<&Vec<String>>) -> Option<History> {
    let parameter = section.string("parameter");
    let older_than = section.parsed("older_than", duration);
    let ttl = section.parsed("ttl", duration);
    for key in ["parameter", "older_than", "ttl"] {
        if !section.has(key) {
            section.error(key, "missing: [route.history] needs parameter, older_than and ttl");
        }
    }
    if let (Some(name), Some(query)) = (&parameter, query)
        && !query.contains(name)
    {
        section.error("parameter", format!("'{name}' is not among the rule's query parameters, so answers would be mixed up"));
    }
    section.finish();
    Some(History { parameter: parameter?, older_than: older_than?, ttl: ttl? })
}

fn path_pattern(text: &str) -> Result<PathPattern, String> {
    if !text.starts_with('/') {
        return Err(format!("'{text}' must begin with '/'"));
    }
    let exact = text.strip_suffix('*').unwrap_or(text);
    if exact.contains(['*', '?', '#', '%']) || exact.contains("//") {
        return Err(format!("'{text}' must be a decoded path, exact or ending in \"/*\""));
    }
    match text.strip_suffix("/*") {
        Some(_) => Ok(PathPattern::Below(exact.to_owned())),
        None if text.ends_with('*') => Err(format!("'{text}' is neither an exact path nor one that ends in \"/*\"")),
        None => Ok(PathPattern::Exact(text.to_owned())),
    }
}
