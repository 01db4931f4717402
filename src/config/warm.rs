//! `[warm]`: what is asked for before clients do.

use std::time::Duration;

use super::reader::Section;
use super::template::escape_in_url;
use super::units::duration;
use crate::clock::{Wall, millis};
use crate::request::target::Target;

/// What is asked for at the start and on demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warm {
    /// Targets as they are.
    pub targets: Vec<String>,
    /// Targets with places for symbols, timeframes and moments.
    pub templates: Vec<TargetTemplate>,
    /// The symbols; empty: those that the API itself lists.
    pub symbols: Vec<String>,
    /// The target that answers with a JSON array of symbols.
    pub symbols_from: String,
    /// The timeframes.
    pub timeframes: Vec<String>,
    /// Whether warming begins as soon as the program serves.
    pub at_start: bool,
    /// Requests at one time.
    pub concurrency: usize,
    /// So many of the targets that were asked for most are kept in Redis, and asked for too; 0: none.
    pub hottest: usize,
}

/// A target with places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetTemplate(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Symbol,
    Timeframe,
    /// So long before now, in Unix milliseconds.
    Before(Duration),
}

impl TargetTemplate {
    /// Reads text with `{symbol}`, `{timeframe}`, `{now}` and `{now-24h}`.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (mut parts, mut rest) = (Vec::new(), text);
        while let Some((before, after)) = rest.split_once('{') {
            let (name, after) = after.split_once('}').ok_or_else(|| format!("'{text}' has a '{{' without '}}'"))?;
            parts.push(Part::Text(before.to_owned()));
            parts.push(match name {
                "symbol" => Part::Symbol,
                "timeframe" => Part::Timeframe,
                "now" => Part::Before(Duration::ZERO),
                _ => {
                    let span = name.strip_prefix("now-").and_then(|span| duration(span).ok());
                    span.map(Part::Before).ok_or_else(|| format!("'{{{name}}}' is not symbol, timeframe, now or now-24h"))?
                }
            });
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        let template = Self(parts);
        match Target::parse(&template.render("S", "1h", Wall::now())) {
            Ok(_) => Ok(template),
            Err(_) => Err(format!("'{text}' is not a path such as /api/liquidations?symbol={{symbol}}")),
        }
    }

    /// The target for a symbol and a timeframe.
    #[must_use]
    pub fn render(&self, symbol: &str, timeframe: &str, now: Wall) -> String {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Symbol => out.push_str(&escape_in_url(symbol)),
                Part::Timeframe => out.push_str(&escape_in_url(timeframe)),
                Part::Before(span) => out.push_str(&now.as_millis().saturating_sub(millis(*span)).to_string()),
            }
        }
        out
    }

    fn names(&self, part: &Part) -> bool {
        self.0.contains(part)
    }
}

impl Warm {
    /// Whether symbols are needed that the configuration does not name.
    #[must_use]
    pub fn needs_symbols(&self) -> bool {
        self.symbols.is_empty() && self.templates.iter().any(|template| template.names(&Part::Symbol))
    }

    /// All targets, for these symbols.
    #[must_use]
    pub fn expand(&self, symbols: &[String], now: Wall) -> Vec<String> {
        let mut targets = self.targets.clone();
        let once = [String::new()];
        for template in &self.templates {
            let symbols = if template.names(&Part::Symbol) { symbols } else { &once };
            let timeframes = if template.names(&Part::Timeframe) { &self.timeframes[..] } else { &once };
            let pairs = symbols.iter().flat_map(|symbol| timeframes.iter().map(move |timeframe| (symbol, timeframe)));
            targets.extend(pairs.map(|(symbol, timeframe)| template.render(symbol, timeframe, now)));
        }
        targets
    }
}

/// Reads `[warm]`.
pub fn warm(mut section: Section<'_, '_>) -> Warm {
    let targets = section.strings("targets").unwrap_or_default();
    let symbols_from = section.string("symbols_from").unwrap_or_else(|| "/api/symbols".to_owned());
    for (key, target) in targets.iter().map(|target| ("targets", target)).chain([("symbols_from", &symbols_from)]) {
        if Target::parse(target).is_err() {
            section.error(key, format!("'{target}' is not a path such as /api/symbols"));
        }
    }
    let mut templates = Vec::new();
    for text in section.strings("templates").unwrap_or_default() {
        match TargetTemplate::parse(&text) {
            Ok(template) => templates.push(template),
            Err(message) => section.error("templates", message),
        }
    }
    let timeframes = section.strings("timeframes").unwrap_or_default();
    if timeframes.is_empty() && templates.iter().any(|template| template.names(&Part::Timeframe)) {
        section.error("timeframes", "missing: a template has {timeframe}");
    }
    let symbols = section.strings("symbols").unwrap_or_default();
    let at_start = section.boolean("at_start").unwrap_or(false);
    let number = |section: &mut Section<'_, '_>, key, most, default| {
        section.number(key, u64::from(key == "concurrency")..=most).and_then(|number| usize::try_from(number).ok()).unwrap_or(default)
    };
    let concurrency = number(&mut section, "concurrency", 64, 2);
    let hottest = number(&mut section, "hottest", 10_000, 0);
    section.finish();
    Warm { targets, templates, symbols, symbols_from, timeframes, at_start, concurrency, hottest }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;

    fn read(lines: &str) -> (Option<Warm>, Vec<String>) {
        let checked = check("t", &format!("[backend]\nurl='http://127.0.0.1:1'\n[warm]\n{lines}\n"), &|_| None);
        (checked.config.map(|config| config.warm), checked.report)
    }

    #[test]
    fn templates_stand_for_every_symbol_and_timeframe() {
        let (warm, report) =
            read("targets=['/a']\ntemplates=['/b?s={symbol}&t={timeframe}&e={now}&f={now-1m}','/c']\ntimeframes=['1m','1h']");
        let warm = warm.unwrap_or_else(|| panic!("{report:?}"));
        assert!(warm.needs_symbols());
        let targets = warm.expand(&["A B".into(), "C+".into()], Wall::from_millis(100_000));
        assert_eq!(
            targets,
            [
                "/a",
                "/b?s=A%20B&t=1m&e=100000&f=40000",
                "/b?s=A%20B&t=1h&e=100000&f=40000",
                "/b?s=C%2B&t=1m&e=100000&f=40000",
                "/b?s=C%2B&t=1h&e=100000&f=40000",
                "/c"
            ]
        );
        for (lines, expected) in [
            ("templates=['/b?t={timeframe}']", "timeframes: missing"),
            ("templates=['/b?t={time}']", "is not symbol, timeframe, now"),
            ("templates=['/b?t={symbol']", "without '}'"),
            ("templates=['b']", "is not a path such as"),
            ("targets=['b']", "is not a path such as"),
            ("concurrency=0", "from 1 to 64"),
        ] {
            let (_, report) = read(lines);
            assert!(report.iter().any(|line| line.contains(expected)), "{lines}: {report:?}");
        }
    }
}
