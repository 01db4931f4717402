//! `[[limit]]` tables and a rule's `[route.limit]`: how many requests somebody may make.

use std::fmt;
use std::num::NonZeroU32;
use std::time::Duration;

use http::HeaderName;

use super::reader::Section;
use super::units::is_name;
use crate::request::fields::API_KEY;

/// One limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Its name, for metrics, `RateLimit` fields and `explain`.
    pub name: String,
    /// The names of the rules whose requests it counts; `None`: all requests.
    pub routes: Option<Vec<String>>,
    /// Who shares one count.
    pub by: LimitBy,
    /// How many requests in which time.
    pub rate: Rate,
    /// How many requests at once after a rest.
    pub burst: NonZeroU32,
    /// Which requests count.
    pub counts: Counts,
    /// Whether all instances with the same Redis count together.
    pub shared: bool,
    /// Whether requests beyond it are counted and logged, but let through.
    pub report_only: bool,
}

/// Who shares one count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LimitBy {
    /// Requests of one client address; of one /64 with IPv6.
    Address,
    /// Requests with one value of this field; those without it by their address.
    Field(HeaderName),
    /// Requests on one rule.
    Route,
}

/// Which requests count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// All.
    All,
    /// Those that the cache does not answer.
    Backend,
}

/// So many requests in so much time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Requests.
    pub count: NonZeroU32,
    /// In this time: a second, minute, hour or day.
    pub per: Duration,
}

/// The units of time that rates are written with.
const UNITS: [(&str, u64); 4] = [("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)];

impl Rate {
    fn parse(text: &str) -> Result<Self, String> {
        let read = || {
            let (count, unit) = text.split_once('/')?;
            let (_, seconds) = UNITS.iter().find(|(name, _)| *name == unit.trim())?;
            Some(Self { count: count.trim().replace('_', "").parse().ok()?, per: Duration::from_secs(*seconds) })
        };
        read().ok_or_else(|| format!("'{text}' is not a rate such as 50/s, 600/m, 5000/h or 100000/d"))
    }

    /// How long it takes until one more request may be made.
    #[must_use]
    pub fn interval(self) -> Duration {
        (self.per / self.count.get()).max(Duration::from_nanos(1))
    }

    /// What a second brings, and at least one.
    fn of_a_second(self) -> NonZeroU32 {
        let seconds = u32::try_from(self.per.as_secs()).unwrap_or(u32::MAX).max(1);
        NonZeroU32::new(self.count.get().div_ceil(seconds)).unwrap_or(NonZeroU32::MIN)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().find(|(_, seconds)| Duration::from_secs(*seconds) == self.per).map_or("?", |(unit, _)| unit);
        write!(f, "{}/{unit}", self.count)
    }
}

impl RateLimit {
    /// Whether it counts requests on a rule of this name, or (`None`) those that no rule matches.
    #[must_use]
    pub fn counts_on(&self, route: Option<&str>) -> bool {
        self.routes.as_ref().is_none_or(|routes| route.is_some_and(|route| routes.iter().any(|name| name == route)))
    }
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}, {} at once, for each ", self.name, self.rate, self.burst)?;
        match &self.by {
            LimitBy::Address => f.write_str("client address")?,
            LimitBy::Field(name) => write!(f, "value of {name}")?,
            LimitBy::Route => f.write_str("rule")?,
        }
        f.write_str(if self.counts == Counts::All { "; every request counts" } else { "; only what the cache does not answer counts" })?;
        f.write_str(if self.shared { "; one count for all instances" } else { "" })?;
        f.write_str(if self.report_only { "; only reported" } else { "" })
    }
}

/// Reads all `[[limit]]` tables.
pub fn limits(sections: Vec<Section<'_, '_>>) -> Vec<RateLimit> {
    let mut limits: Vec<RateLimit> = Vec::new();
    for mut section in sections {
        let name = section.string("name").unwrap_or_default();
        if !is_name(&name) {
            section.error("name", "every [[limit]] needs one, of 1 to 64 letters, digits, '-', '_' or '.'");
        }
        if limits.iter().any(|other| other.name == name) {
            section.error("name", format!("'{name}' is used twice; metrics and counts need it to be unique"));
        }
        let routes = section.strings("routes");
        limits.extend(limit(section, name, routes));
    }
    limits
}

/// Reads the keys that `[[limit]]` and `[route.limit]` have in common. `None` if a problem was found without which there is none.
pub fn limit(mut section: Section<'_, '_>, name: String, routes: Option<Vec<String>>) -> Option<RateLimit> {
    #[derive(Clone, Copy)]
    enum Word {
        Address,
        ApiKey,
        Route,
    }
    let rate = section.parsed("rate", Rate::parse);
    if !section.has("rate") {
        section.error("rate", "missing: say how many requests in which time, such as rate = \"50/s\"");
    }
    let header = section
        .parsed("header", |text| HeaderName::from_bytes(text.as_bytes()).map_err(|_| format!("'{text}' is not the name of a field")));
    let word = section.choice("by", &[("address", Word::Address), ("api-key", Word::ApiKey), ("route", Word::Route)]);
    let by = match word.unwrap_or(Word::Address) {
        Word::Address => LimitBy::Address,
        Word::ApiKey => LimitBy::Field(header.clone().unwrap_or(API_KEY)),
        Word::Route => LimitBy::Route,
    };
    if header.is_some() && !matches!(by, LimitBy::Field(_)) {
        section.error("header", "has a meaning only with by = \"api-key\"");
    }
    let burst = section.number("burst", 1..=1_000_000).and_then(|burst| NonZeroU32::new(u32::try_from(burst).ok()?));
    let counts = section.choice("count", &[("all", Counts::All), ("backend", Counts::Backend)]).unwrap_or(Counts::All);
    let shared = section.boolean("shared").unwrap_or(false);
    let report_only = section.boolean("report_only").unwrap_or(false);
    section.finish();
    let rate = rate?;
    Some(RateLimit { name, routes, by, rate, burst: burst.unwrap_or_else(|| rate.of_a_second()), counts, shared, report_only })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;

    #[test]
    fn rates() {
        for (text, interval, second) in [("50/s", 20_000, 50), ("600/m", 100_000, 10), ("10/m", 6_000_000, 1), ("1_000/h", 3_600_000, 1)] {
            let rate = Rate::parse(text).unwrap();
            assert_eq!((rate.interval(), rate.of_a_second().get()), (Duration::from_micros(interval), second), "{text}");
            assert_eq!(rate.to_string(), text.replace('_', ""));
        }
        for text in ["", "50", "0/s", "-1/s", "50/w", "5.5/s", "x/s"] {
            assert!(Rate::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn limits_are_read_with_all_their_problems() {
        let base = "[backend]\nurl='http://127.0.0.1:1'\n[cache]\nredis='redis://127.0.0.1:1'\n[[route]]\nname='r'\npath='/x'\n";
        let text = format!(
            "{base}[route.limit]\nrate='5/s'\nby='route'\n[[limit]]\nname='key'\nrate='600/m'\nby='api-key'\ncount='backend'\nshared=true\nburst=7\nroutes=['r']\n"
        );
        let config = check("t", &text, &|_| None).config.unwrap();
        let shown: Vec<String> = config.rate_limits.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "key: 600/m, 7 at once, for each value of x-api-key; only what the cache does not answer counts; one count for all instances",
                "r: 5/s, 5 at once, for each rule; every request counts",
            ]
        );
        assert_eq!(config.rate_limits[1].routes.as_deref(), Some(&["r".to_owned()][..]));
        for (lines, expected) in [
            ("rate='5/s'", "every [[limit]] needs one"),
            ("name='a'", "rate: missing"),
            ("name='a'\nrate='5'", "is not a rate such as"),
            ("name='a'\nrate='5/s'\nheader='X-Key'", "only with by = \"api-key\""),
            ("name='a'\nrate='5/s'\nroutes=['nope']", "there is no rule named 'nope'"),
            ("name='r'\nrate='5/s'\n[[limit]]\nname='r'\nrate='5/s'", "is used twice"),
        ] {
            let report = check("t", &format!("{base}[[limit]]\n{lines}\n"), &|_| None).report;
            assert!(report.iter().any(|line| line.contains(expected)), "{lines}: {report:?}");
        }
    }
}
