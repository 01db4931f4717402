//! What `deploy/` says of metrics and log lines is true and whole: each metric is described and each name in the dashboard and the
//! alert rules exists, and each line at warn or above is explained.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sluice::telemetry::metrics::Metrics;
use syn::visit::{self, Visit};

use crate::support::rust_files;

const METRICS: &str = include_str!("../../deploy/METRICS.md");
const OPERATIONS: &str = include_str!("../../deploy/OPERATIONS.md");
const DASHBOARD: &str = include_str!("../../deploy/grafana/dashboard.json");
const ALERTS: &str = include_str!("../../deploy/grafana/alerts.yml");

fn declared() -> BTreeMap<String, BTreeSet<String>> {
    let metrics = Metrics::new().unwrap();
    metrics.declared().iter().map(|metric| (metric.name.clone(), metric.labels.iter().cloned().collect())).collect()
}

#[test]
fn every_metric_is_described_with_its_labels() {
    let described: BTreeMap<String, BTreeSet<String>> = METRICS
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(|metric| match metric.split_once('{') {
            Some((name, labels)) => (name.to_owned(), labels.trim_end_matches('}').split(',').map(str::to_owned).collect()),
            None => (metric.to_owned(), BTreeSet::new()),
        })
        .collect();
    assert_eq!(described, declared());
    for line in METRICS.lines().filter(|line| line.starts_with("| `")) {
        assert!(line.split(" | ").count() == 3 && line.split(" | ").all(|cell| !cell.trim().is_empty()), "{line}");
    }
}

/// The metrics of a query, without their prefix, each with the labels that its selector names.
fn selected(query: &str) -> Vec<(String, BTreeSet<String>)> {
    let mut found = Vec::new();
    for part in query.split("sluice_").skip(1) {
        let end = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        let selector = rest.strip_prefix('{').and_then(|rest| rest.split('}').next()).unwrap_or_default();
        // What is quoted holds neither commas nor equals signs.
        let labels = selector.split(',').filter_map(|pair| pair.split(['=', '!']).next()).filter(|label| !label.is_empty());
        found.push((name.to_owned(), labels.map(str::to_owned).collect()));
    }
    found
}

/// The labels by which a query groups.
fn grouped(query: &str) -> BTreeSet<String> {
    let lists = query.split(" by (").skip(1).chain(query.split(" on (").skip(1));
    let names = lists.filter_map(|rest| rest.split(')').next()).flat_map(|list| list.split(','));
    names.map(|name| name.trim().to_owned()).filter(|name| name.chars().all(|c| c.is_ascii_lowercase())).collect()
}

/// A histogram has three names.
fn without_suffix(name: &str) -> &str {
    ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name)
}

fn check(query: &str) {
    let declared = declared();
    // What Prometheus itself adds.
    let mut known: BTreeSet<String> = ["instance", "job", "le"].map(str::to_owned).into();
    for (name, labels) in selected(query) {
        let own = declared.get(without_suffix(&name)).unwrap_or_else(|| panic!("sluice_{name} is no metric: {query}"));
        for label in labels {
            assert!(own.contains(&label) || known.contains(&label), "sluice_{name} has no {label}: {query}");
        }
        known.extend(own.iter().cloned());
    }
    for label in grouped(query) {
        assert!(known.contains(&label), "nothing has {label}: {query}");
    }
}

fn queries(value: &serde_json::Value, found: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                match value.as_str() {
                    Some(text) if ["expr", "query", "definition"].contains(&name.as_str()) => found.push(text.to_owned()),
                    _ => queries(value, found),
                }
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| queries(value, found)),
        _ => {}
    }
}

#[test]
fn dashboards_and_alerts_ask_for_what_exists() {
    let mut found = Vec::new();
    queries(&serde_json::from_str(DASHBOARD).unwrap(), &mut found);
    assert!(found.len() > 40, "{}", found.len());
    found.iter().for_each(|query| check(query));
    let drawn: BTreeSet<String> =
        found.iter().flat_map(|query| selected(query)).map(|(name, _)| without_suffix(&name).to_owned()).collect();
    for name in declared().keys() {
        assert!(drawn.contains(name), "the dashboard does not draw sluice_{name}");
    }
    let alerts: Vec<&str> = ALERTS.split("- alert: ").skip(1).collect();
    for alert in &alerts {
        let query = alert.split("expr:").nth(1).unwrap().split("labels:").next().unwrap();
        check(query);
        assert!(alert.contains("summary:") && alert.contains("description:") && alert.contains("severity:"), "{alert}");
        for (name, _) in selected(query) {
            let row = METRICS.lines().find(|line| line.starts_with(&format!("| `{name}"))).unwrap();
            assert!(row.contains('†'), "{row}");
        }
    }
    assert!(alerts.len() > 8);
}

/// The messages of lines at warn and above.
#[derive(Default)]
struct Messages(BTreeSet<String>);

impl<'ast> Visit<'ast> for Messages {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if item.ident != "tests" {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let path: Vec<String> = call.path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if path == ["tracing", "warn"] || path == ["tracing", "error"] {
            let tokens = call.tokens.to_string();
            let message = tokens.match_indices('"').find_map(|(at, _)| {
                let literal = syn::parse_str::<syn::LitStr>(&tokens[at..]).ok()?;
                Some(literal.value())
            });
            self.0.insert(message.unwrap_or_else(|| panic!("a line without a message: {tokens}")));
        }
        visit::visit_macro(self, call);
    }
}

#[test]
fn every_line_at_warn_and_above_is_explained() {
    let mut messages = Messages::default();
    for file in rust_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        messages.visit_file(&syn::parse_file(&std::fs::read_to_string(file).unwrap()).unwrap());
    }
    assert!(messages.0.len() > 30, "{:?}", messages.0);
    for message in &messages.0 {
        // What is filled in differs from line to line.
        for part in message.split('{').filter_map(|part| part.rsplit('}').next()).map(str::trim).filter(|part| !part.is_empty()) {
            assert!(OPERATIONS.contains(&format!("| {part} |")), "deploy/OPERATIONS.md does not explain {message:?}");
        }
    }
}
