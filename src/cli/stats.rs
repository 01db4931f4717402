//! `sluice stats`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::client::Client;
use super::{FileOption, rules, say};

/// What to print.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    file: FileOption,
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
    /// Print anew every two seconds, until interrupted
    #[arg(long)]
    watch: bool,
}

/// Between two pages of `--watch`.
const BETWEEN: Duration = Duration::from_secs(2);

/// Prints the statistics of the running proxy.
pub fn run(options: &Options) -> ExitCode {
    let client = match Client::new(&options.file.config) {
        Ok(client) => client,
        Err(code) => return code,
    };
    loop {
        let page = if options.json { client.ask(None, "/stats") } else { client.ask_json(None, "/stats").map(|stats| page(&stats)) };
        match page {
            // Clears the screen first.
            Ok(page) if options.watch && !options.json => say(format_args!("\x1b[2J\x1b[H{page}")),
            Ok(page) => say(page),
            Err(code) => return code,
        }
        if !options.watch {
            return ExitCode::SUCCESS;
        }
        client.pause(BETWEEN);
    }
}

/// The statistics for people.
fn page(stats: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let mut out = format!(
        "sluice {}   configuration {} since {}   {}\n\n",
        text(&stats["version"]),
        text(&stats["config"]["digest"]),
        text(&stats["config"]["since"]),
        rules(stats["config"]["rules"].as_u64().unwrap_or(0))
    );
    let mut rows = vec![
        ["rule", "requests", "hit ratio", "hits", "stale", "misses", "joined", "passed", "refused", "failed", "hit", "miss", "ttl"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for (name, route) in stats["routes"].as_object().into_iter().flatten().filter(|(_, route)| route["requests"] != 0) {
        rows.push(row(name, route));
    }
    rows.push(row("all", &stats["total"]));
    out.push_str(&table(&rows));
    for (name, route) in stats["routes"].as_object().into_iter().flatten() {
        let compared = route["shadow"].as_object().into_iter().flatten();
        let told: Vec<String> = compared.map(|(result, count)| format!("{} {result}", number(count))).collect();
        if !told.is_empty() {
            out.push_str(&format!("\nin shadow  {name}: {}", told.join(", ")));
        }
    }
    let mut rows = vec![["tier", "state", "entries", "bytes", "of"].map(str::to_owned).to_vec()];
    for tier in stats["tiers"].as_array().into_iter().flatten() {
        let state = if tier["up"] == true { "up" } else { "AWAY" };
        rows.push(vec![text(&tier["tier"]), state.to_owned(), number(&tier["entries"]), bytes(&tier["bytes"]), bytes(&tier["capacity"])]);
    }
    out.push_str(&format!("\n\n{}\n\n", table(&rows)));
    let breakers = &stats["breakers"];
    out.push_str(&format!("backend    {}\n", if breakers["backend"] == "closed" { "answers" } else { "FAILS and is left alone" }));
    out.push_str(&format!("requests   {} under way, {} connections\n", number(&stats["inflight"]), number(&stats["connections"])));
    let voids = &stats["voids"];
    out.push_str(&format!("purged     {} entries", number(&stats["purged"])));
    if voids.is_object() {
        out.push_str(&format!("; {} purges and changes shared, {} wait for Redis", number(&voids["seq"]), number(&voids["waiting"])));
    }
    out
}

/// A line of the table of rules.
fn row(name: &str, counts: &Value) -> Vec<String> {
    let millis = |value: &Value| value.as_f64().map_or_else(|| "-".to_owned(), |millis| format!("{millis:.2} ms"));
    let ratio = counts["hit_ratio"].as_f64().map_or_else(|| "-".to_owned(), |ratio| format!("{:.1} %", ratio * 100.0));
    let mut row = vec![name.to_owned(), number(&counts["requests"]), ratio];
    row.extend(["hits", "stale", "misses", "collapsed", "passed", "refused", "failed"].map(|key| number(&counts[key])));
    row.extend([millis(&counts["mean_hit_ms"]), millis(&counts["mean_miss_ms"])]);
    row.push(
        counts["ttl_seconds"].as_u64().map_or_else(|| "-".to_owned(), |seconds| crate::config::units::show(Duration::from_secs(seconds))),
    );
    row
}

/// A number with its thousands apart.
fn number(value: &Value) -> String {
    let Some(number) = value.as_i64() else { return "-".to_owned() };
    let digits = number.unsigned_abs().to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    format!("{}{}", if number < 0 { "-" } else { "" }, groups.join(","))
}

/// Bytes with a unit.
#[allow(clippy::cast_precision_loss, reason = "rounded for people")]
fn bytes(value: &Value) -> String {
    let Some(bytes) = value.as_u64() else { return "-".to_owned() };
    let units = [(1_u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(size, _)| bytes >= *size) {
        Some((size, unit)) => format!("{:.1} {unit}", bytes as f64 / *size as f64),
        None => format!("{bytes} B"),
    }
}

/// Rows in columns: the first to the left, the others to the right.
fn table(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(column, cell)| match column {
            0 => format!("{cell:<width$}", width = width(column)),
            _ => format!("{cell:>width$}", width = width(column)),
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_for_people() {
        for (given, shown) in
            [(json!(0), "0"), (json!(999), "999"), (json!(1_234_567), "1,234,567"), (json!(-1000), "-1,000"), (json!(null), "-")]
        {
            assert_eq!(number(&given), shown);
        }
        for (given, shown) in [(json!(12), "12 B"), (json!(1536), "1.5 KiB"), (json!(3_u64 << 30), "3.0 GiB"), (json!(null), "-")] {
            assert_eq!(bytes(&given), shown);
        }
    }

    #[test]
    fn a_page_has_its_columns_in_line() {
        let counts = json!({"requests": 1500, "hits": 1400, "stale": 0, "misses": 100, "collapsed": 0, "passed": 0, "refused": 0, "failed": 0,
            "hit_ratio": 0.9333, "mean_hit_ms": 0.05, "mean_miss_ms": 12.5, "ttl_seconds": 300});
        let stats = json!({"version": "1", "config": {"digest": "abc", "since": "now", "rules": 1}, "routes": {"liq": counts}, "total": counts,
            "tiers": [{"tier": "memory", "up": true, "entries": 7, "bytes": 2048, "capacity": 4096}], "breakers": {"backend": "open"},
            "inflight": 1, "connections": 2, "purged": 3, "voids": null});
        let page = page(&stats);
        let lines: Vec<&str> = page.lines().collect();
        assert_eq!(lines[0], "sluice 1   configuration abc since now   1 rule");
        assert_eq!(lines[2], "rule  requests  hit ratio   hits  stale  misses  joined  passed  refused  failed      hit      miss  ttl");
        assert_eq!(lines[3], "liq      1,500     93.3 %  1,400      0     100       0       0        0       0  0.05 ms  12.50 ms   5m");
        assert!(page.contains("memory     up        7  2.0 KiB  4.0 KiB") && page.contains("backend    FAILS"), "{page}");
    }
}
