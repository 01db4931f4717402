//! `sluice demo`: a slow sample API behind a real proxy, in one process.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::{ListenOptions, complain, say};
use crate::config::{self, Config};
use crate::proxy::Proxy;
use crate::telemetry::metrics::OutcomeLabel;

/// How to show it.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    listen: ListenOptions,
}

/// The shipped rules, over the sample orders, in memory alone.
const RULES: &str = include_str!("../../proxy.toml");
/// How long a query pretends to take.
const DELAY: Duration = Duration::from_millis(150);
/// How often the live line is looked at.
const TICK: Duration = Duration::from_millis(250);

fn demo_config() -> Option<Config> {
    let unset = |_: &str| None;
    let mut config = config::check("proxy.toml", RULES, &unset).config?;
    config.backend.kind = config::BackendKind::Sample { orders: None, delay: DELAY };
    config.cache.redis = None;
    config.log.access = config::Access::Off;
    Some(config)
}

/// Runs the demonstration until interrupted.
pub fn run(options: &Options) -> ExitCode {
    let Some(mut config) = demo_config() else {
        complain("sluice: the rules of the demonstration are broken");
        return ExitCode::from(super::NO);
    };
    options.listen.apply(&mut config);
    let _logging = crate::telemetry::log::start(&config.log);
    super::serve::run_until_told(&config, None, None, |running| {
        let (address, admin) = (running.address, running.admin);
        say(format_args!(
            "\nA sample liquidation API that takes {} ms a query, behind Sluice. Try, twice each:\n\n  \
             curl -i 'http://{address}/api/symbols'\n  \
             curl -i 'http://{address}/api/liquidation-orders?symbol=BTCUSDT&limit=3'\n  \
             curl -i 'http://{address}/api/liquidations?symbol=BTCUSDT&timeframe=1d&start_timestamp=0&end_timestamp=4102444800000'\n\n\
             The first time Cache-Status says fwd=uri-miss, the second time hit.\n\n\
             The last 24 hours up to now, as dashboards ask for them: another URL each time, and orders go on arriving.\n\n  \
             curl -i \"http://{address}/api/liquidations?symbol=BTCUSDT&timeframe=1m&start_timestamp=$(( $(date +%s%3N) - 86400000 ))&end_timestamp=$(date +%s%3N)\"\n\n\
             After the first two times Cache-Status says hit; detail=timeline.\n\n\
             The API: http://{address}/docs   Metrics: http://{admin}/metrics   Statistics: http://{admin}/stats   Stop: Ctrl-C\n",
            DELAY.as_millis()
        ));
        live(Arc::clone(&running.proxy))
    })
}

/// Shows hits, misses, collapsed and stale answers: in place on a terminal, else a line whenever they changed.
async fn live(proxy: Arc<Proxy>) {
    let terminal = std::io::stdout().is_terminal();
    let mut last = String::new();
    let mut ticks = tokio::time::interval(TICK);
    loop {
        ticks.tick().await;
        let counted = [
            ("hits", OutcomeLabel::Hit),
            ("misses", OutcomeLabel::Miss),
            ("collapsed", OutcomeLabel::Collapsed),
            ("stale", OutcomeLabel::Stale),
            ("passed", OutcomeLabel::Pass),
        ];
        let mut line = counted.map(|(word, outcome)| format!("{word} {}", proxy.metrics.requests_with(outcome))).join("   ");
        let _ = write!(line, "   from the timeline {}", proxy.metrics.timeline_answered());
        if line == last {
            continue;
        }
        if terminal {
            use std::io::Write as _;
            let mut out = std::io::stdout();
            let _ = write!(out, "\r\x1b[K{line}").and_then(|()| out.flush());
        } else {
            say(&line);
        }
        last = line;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_demonstration_has_a_configuration() {
        assert!(super::demo_config().is_some());
    }
}
