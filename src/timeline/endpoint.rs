//! Which requests the timeline may answer.

use crate::request::target::Target;

/// An endpoint that the timeline answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/api/liquidations`.
    Liquidations,
    /// `/api/liquidation-orders`.
    Orders,
}

/// Pages with numbers of more letters than this may be beyond 64 bits, where backends differ (deviation D2).
const LONGEST_PAGE: usize = 12;
/// The longest symbol, in bytes: as long as the table's column.
const LONGEST_SYMBOL: usize = 32;

impl Endpoint {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Liquidations, Self::Orders];

    /// The endpoint of a decoded path.
    #[must_use]
    pub fn of(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.path() == path)
    }

    /// Its path.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Liquidations => "/api/liquidations",
            Self::Orders => "/api/liquidation-orders",
        }
    }

    /// Its name in metrics and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Liquidations => "liquidations",
            Self::Orders => "liquidation-orders",
        }
    }
}

/// The symbol that a request is about, in upper case, and its endpoint. `None` for what backends may understand differently.
#[must_use]
pub fn asked(target: &Target<'_>) -> Option<(Endpoint, String)> {
    let endpoint = Endpoint::of(&target.path)?;
    if target.text("page").is_some_and(|page| page.len() > LONGEST_PAGE) {
        return None;
    }
    let symbol = target.text("symbol")?;
    // The database does not see trailing spaces.
    let symbol = symbol.trim_end_matches(' ');
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    ((1..=LONGEST_SYMBOL).contains(&symbol.len()) && symbol.bytes().all(plain)).then(|| (endpoint, symbol.to_ascii_uppercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_every_backend_understands_alike_is_answered() {
        let of = |target: &str| asked(&Target::parse(target).unwrap());
        for symbol in ["BTCUSDT", "btcusdt", "BtcUsdt+", "x&symbol=btcusdt", "btcusdt%20%20"] {
            let target = format!("/api/liquidations?symbol={symbol}");
            assert_eq!(of(&target), Some((Endpoint::Liquidations, "BTCUSDT".into())), "{symbol}");
        }
        for query in ["", "symbol=", "symbol=+btc", "symbol=b%C3%A9", "symbol=a'b", "symbol=B&page=0000000000001"] {
            assert_eq!(of(&format!("/api/liquidation-orders?{query}")), None, "{query}");
        }
        assert_eq!(of("/api/symbols?symbol=B"), None);
    }
}
