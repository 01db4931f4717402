//! `[own]`: which paths of the main listener Sluice answers itself, before any rule. All others are the backend's.

/// Which of these paths are Sluice's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnPaths {
    /// None: every path is the backend's.
    None,
    /// `/health` and `/api/cache/*`, as the liquidation API has them.
    Management,
    /// Those, and the description of the API that is answered here (native mode).
    Whole,
}

/// One of Sluice's own endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint<'a> {
    /// `GET /health`.
    Health,
    /// `GET /api/cache/stats`.
    Stats,
    /// `POST /api/cache/clear`.
    Clear,
    /// `POST /api/cache/invalidate/symbol/{symbol}`.
    InvalidateSymbol(&'a str),
    /// `POST /api/cache/invalidate/symbols`.
    InvalidateSymbols,
    /// `POST /api/cache/warm`.
    Warm,
    /// `GET /openapi.json`, in native mode.
    Description,
    /// `GET /docs`, in native mode.
    Documentation,
}

impl<'a> Endpoint<'a> {
    /// The endpoint of a decoded path, if that is one of Sluice's; the flag says that a slash too many follows it.
    #[must_use]
    pub fn of(path: &'a str, own: OwnPaths) -> Option<(Self, bool)> {
        // What most requests ask for is told apart by the first bytes.
        if own == OwnPaths::None || (path.starts_with("/api/") && !path.starts_with("/api/cache/")) {
            return None;
        }
        let exact = path.strip_suffix('/').unwrap_or(path);
        let endpoint = match exact {
            "/health" => Self::Health,
            "/api/cache/stats" => Self::Stats,
            "/api/cache/clear" => Self::Clear,
            "/api/cache/invalidate/symbols" => Self::InvalidateSymbols,
            "/api/cache/warm" => Self::Warm,
            "/openapi.json" if own == OwnPaths::Whole => Self::Description,
            "/docs" if own == OwnPaths::Whole => Self::Documentation,
            _ => {
                let symbol = exact.strip_prefix("/api/cache/invalidate/symbol/")?;
                if symbol.is_empty() || symbol.contains('/') {
                    return None;
                }
                Self::InvalidateSymbol(symbol)
            }
        };
        Some((endpoint, exact.len() < path.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_sluices_own_endpoints() {
        for (path, expected) in [
            ("/health", Some((Endpoint::Health, false))),
            ("/health/", Some((Endpoint::Health, true))),
            ("/healthy", None),
            ("/livez", None),
            ("/readyz", None),
            ("/api/cache/stats", Some((Endpoint::Stats, false))),
            ("/api/cache/invalidate/symbols", Some((Endpoint::InvalidateSymbols, false))),
            ("/api/cache/invalidate/symbol/BTC USDT", Some((Endpoint::InvalidateSymbol("BTC USDT"), false))),
            ("/api/cache/invalidate/symbol/", None),
            ("/api/cache/invalidate/symbol/a/b", None),
            ("/api/cache", None),
            ("/api/symbols", None),
            ("/docs", None),
            ("/", None),
        ] {
            assert_eq!(Endpoint::of(path, OwnPaths::Management), expected, "{path}");
            assert_eq!(Endpoint::of(path, OwnPaths::None), None, "{path}");
        }
        assert_eq!(Endpoint::of("/docs", OwnPaths::Whole), Some((Endpoint::Documentation, false)));
        assert_eq!(Endpoint::of("/openapi.json", OwnPaths::Whole), Some((Endpoint::Description, false)));
        assert_eq!(Endpoint::of("/openapi.json", OwnPaths::None), None);
    }
}
