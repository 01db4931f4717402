//! The shipped alerts: each fires on the first event of its kind and is silent without it, by `promtool test rules`; and what they watch
//! exists before anything happens.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::support::{Backend, Sluice, get, ok, scratch, shipped};

const ALERTS: &str = include_str!("../../deploy/grafana/alerts.yml");
const CASES: &str = include_str!("alerts/cases.yml");

fn names(text: &str, before: &str) -> BTreeSet<String> {
    text.lines().filter_map(|line| line.trim().strip_prefix(before)).map(|name| name.trim().to_owned()).collect()
}

/// Runs promtool, which Debian's package `prometheus` has.
fn promtool(arguments: &[&str], folder: &Path) {
    let run = Command::new("promtool").args(arguments).current_dir(folder).output();
    let output = run.expect("promtool: install Debian's package prometheus");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "promtool {arguments:?}: {}", String::from_utf8_lossy(&said));
}

#[test]
fn each_alert_fires_on_its_first_event_and_not_without_it() {
    let alerts = names(ALERTS, "- alert:");
    assert!(alerts.len() > 10, "{alerts:?}");
    let fires: BTreeSet<String> =
        CASES.split("- eval_time:").filter(|case| case.contains("exp_labels")).flat_map(|case| names(case, "alertname:")).collect();
    let silent: BTreeSet<String> =
        CASES.split("- eval_time:").filter(|case| case.contains("exp_alerts: []")).flat_map(|case| names(case, "alertname:")).collect();
    assert_eq!(fires, alerts, "each has a case in which it fires");
    assert_eq!(silent, alerts, "each has a case in which it is silent");
    let folder = scratch();
    std::fs::write(folder.join("alerts.yml"), ALERTS).unwrap();
    std::fs::write(folder.join("cases.yml"), CASES).unwrap();
    promtool(&["check", "rules", "alerts.yml"], &folder);
    promtool(&["test", "rules", "cases.yml"], &folder);
    std::fs::remove_dir_all(folder).unwrap();
}

/// `name{labels}` of each selector in the alerts, with the labels that it asks for by a plain value.
fn selectors() -> Vec<(String, Vec<String>)> {
    let text = ALERTS.replace("'", "\"");
    let mut found = Vec::new();
    for (at, _) in text.match_indices("sluice_") {
        let rest = &text[at..];
        let name: String = rest.chars().take_while(|letter| letter.is_ascii_alphanumeric() || *letter == '_').collect();
        let labels = rest[name.len()..].strip_prefix('{').and_then(|rest| rest.split('}').next()).unwrap_or_default();
        let plain = labels.split(',').filter(|label| !label.contains("=~") && label.contains("=\"")).map(str::to_owned).collect();
        found.push((name, plain));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_alerts_watch_exists_from_the_start() {
    let backend = Backend::start(|_| ok("", b"[]")).await;
    let sluice = Sluice::start(backend.address, "", &shipped("1h")).await;
    let page = get(sluice.admin, "/metrics", &[]).await.text();
    let selectors = selectors();
    assert!(selectors.len() > 10);
    for (name, labels) in selectors {
        let exists = page.lines().any(|line| line.starts_with(&name) && labels.iter().all(|label| line.contains(label)));
        assert!(exists, "{name} {labels:?} is not on the page of a Sluice that has just started");
    }
    assert!(page.len() < 256 << 10, "{} bytes", page.len());
}
