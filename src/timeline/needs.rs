//! Which spans a request needs, for `explain`.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::endpoint::{Endpoint, asked};
use super::tail::first_moment;
use crate::clock::{Wall, millis};
use crate::config::Timeline as Settings;
use crate::request::target::Target;
use crate::request::timestamp;

/// What a request needs of the timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The symbol, in upper case.
    pub symbol: String,
    /// The first moments of the spans that are over, in milliseconds since 1970, `step` apart.
    pub spans: Option<RangeInclusive<i64>>,
    /// The length of a span, in milliseconds.
    pub step: i64,
    /// Whether it needs the newest part.
    pub newest: bool,
}

/// What a request that is asked at `now` needs; `None` if the timeline does not answer it.
#[must_use]
pub fn needs(settings: &Settings, target: &Target<'_>, now: Wall) -> Option<Needs> {
    let (endpoint, symbol) = asked(target)?;
    let length = |span: Duration| i64::try_from(millis(span)).unwrap_or(i64::MAX);
    let step = length(settings.span);
    if endpoint == Endpoint::Orders && target.has("limit") {
        return Some(Needs { endpoint, symbol, spans: None, step, newest: true });
    }
    let time = |name: &str| target.text(name).and_then(|text| timestamp::parse(&text)).filter(|&time| time >= 0);
    let (start, end) = (time("start_timestamp")?, time("end_timestamp")?);
    if start > end {
        return None;
    }
    // As if there were an order at this moment: the newest part may begin earlier where there was none for long.
    let open = first_moment(None, now, step, length(settings.settle));
    let (first, last) = (start.div_euclid(step) * step, (end.min(open - 1)).div_euclid(step) * step);
    Some(Needs { endpoint, symbol, spans: (first <= last).then_some(first..=last), step, newest: end >= open })
}

impl Needs {
    /// How many spans that are over it needs.
    #[must_use]
    pub fn count(&self) -> i64 {
        self.spans.as_ref().map_or(0, |spans| (spans.end() - spans.start()) / self.step + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_needs_the_spans_that_it_touches_and_perhaps_the_newest_part() {
        const DAY: i64 = 86_400_000;
        let settings = Settings::default();
        let now = Wall::from_millis(u64::try_from(100 * DAY + 3_600_000).unwrap());
        let of = |query: &str| {
            let target = format!("/api/liquidation-orders?symbol=btc&{query}");
            needs(&settings, &Target::parse(&target).unwrap(), now).map(|needs| (needs.count(), needs.newest))
        };
        let window = |start: i64, end: i64| of(&format!("start_timestamp={start}&end_timestamp={end}"));
        assert_eq!(window(99 * DAY + 5, 100 * DAY + 5), Some((1, true)));
        assert_eq!(window(90 * DAY, 92 * DAY - 1), Some((2, false)));
        assert_eq!(window(90 * DAY, 92 * DAY), Some((3, false)));
        assert_eq!(window(101 * DAY, 300 * DAY), Some((0, true)));
        assert_eq!((of("limit=50"), of("start_timestamp=5"), window(2, 1)), (Some((0, true)), None, None));
    }
}
