//! The tags of a symbol's orders: those of the answers that are made from them, and which keys these have, so that a purge of the
//! answers finds the orders.

use super::piece;
use crate::cache::key::MADE_INTO;
use crate::config::route::Route;

/// The parameter that names a symbol.
const SYMBOL: &str = "symbol";

/// The tags of the orders of a symbol (in upper case) from which these rules' answers are made.
#[must_use]
pub fn tags(routes: &[Route], symbol: &str) -> Vec<String> {
    let mut tags = Vec::new();
    for route in routes.iter().filter(|route| route.timeline) {
        // Without `fold_case` a key holds the symbol as it was spelt, which may be any way.
        let folded = route.fold_case.iter().any(|name| name == SYMBOL);
        let value = |name: &str| (name == SYMBOL && folded).then(|| symbol.into());
        tags.push(format!("{MADE_INTO}{}", route.key.pattern(value)));
        let of_symbol = route.tags.iter().filter(|tag| tag.parameters().all(|name| name == SYMBOL));
        tags.extend(of_symbol.map(|tag| tag.render(|_| Some(symbol.into()))));
    }
    tags.push(piece::tag(symbol));
    tags.sort_unstable();
    tags.dedup();
    tags
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::void::Selection;

    #[test]
    fn purges_of_the_shipped_rules_find_orders() {
        let config = crate::config::check("proxy.toml", include_str!("../../proxy.toml"), &|_| None).config.unwrap();
        let tags = tags(&config.routes, "BTCUSDT");
        let concerned = |selection: Selection| selection.matches("timeline:BTCUSDT", &tags, 0);
        assert!(concerned(Selection::Tag("symbol:BTCUSDT".into())) && !concerned(Selection::Tag("symbol:ETHUSDT".into())));
        for pattern in ["liq:BTCUSDT:*", "liq:*", "orders:BTCUSDT:latest:50", "orders:BTCUSDT:1:2:page:1:size:100", "*:BTCUSDT:*"] {
            assert!(concerned(Selection::Pattern(pattern.into())), "{pattern}");
        }
        for pattern in ["liq:ETHUSDT:*", "symbols:*", "orders:ETH*"] {
            assert!(!concerned(Selection::Pattern(pattern.into())), "{pattern}");
        }
    }
}
