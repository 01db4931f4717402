//! From `[timeline]` of the document to [`Timeline`]: every key with its default, bounds and meaning in one place.

use super::reader::Section;
use super::settings::Timeline;
use super::units::{duration, positive_duration, size};

/// The least memory with which anything can be kept, in bytes.
const LEAST_MEMORY: u64 = 1 << 20;

/// Reads the table.
#[must_use]
pub fn timeline(mut section: Section<'_, '_>) -> Timeline {
    let default = Timeline::default();
    let whole_minutes = |text: &str| {
        let span = duration(text)?;
        let seconds = span.as_secs();
        let fits = seconds >= 60 && seconds.is_multiple_of(60) && span.subsec_millis() == 0 && seconds <= 31 * 86_400;
        if fits { Ok(span) } else { Err("expected whole minutes, from 1m to 31d, such as \"1d\"".to_owned()) }
    };
    let memory = |text: &str| match size(text)? {
        bytes if bytes >= LEAST_MEMORY => Ok(bytes),
        _ => Err("expected 1MiB or more; enabled = false turns the timeline off".to_owned()),
    };
    let fraction = |text: &str| match text.parse::<f64>() {
        Ok(fraction) if (0.0..=1.0).contains(&fraction) => Ok(fraction),
        _ => Err(format!("expected a fraction from 0.0 to 1.0, found '{text}'")),
    };
    let count = |number: Option<u64>, default: u32| number.and_then(|number| u32::try_from(number).ok()).unwrap_or(default);
    let timeline = Timeline {
        enabled: section.boolean("enabled").unwrap_or(default.enabled),
        span: section.parsed("span", whole_minutes).unwrap_or(default.span),
        settle: section.parsed("settle", duration).unwrap_or(default.settle),
        refresh: section.parsed("refresh", positive_duration).unwrap_or(default.refresh),
        memory: section.parsed("memory", memory).unwrap_or(default.memory),
        probation: count(section.number("probation", 0..=1_000_000), default.probation),
        verify: section.parsed("verify", fraction).unwrap_or(default.verify),
        concurrency: section.number("concurrency", 1..=64).and_then(|number| usize::try_from(number).ok()).unwrap_or(default.concurrency),
        questions: section.number("questions", 1..=256).and_then(|number| usize::try_from(number).ok()).unwrap_or(default.questions),
    };
    section.finish();
    timeline
}
