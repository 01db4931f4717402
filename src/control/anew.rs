//! Which rules begin anew when others take the place of those that serve: what is stored for them is purged.
//!
//! A change by a client, and a purge by tag or pattern, finds what is stored by the rule that serves then. So what was stored before is
//! not served after a rule has been away, or another one has been in its way: nobody knows what became void meanwhile.

use crate::config::route::Route;

/// Patterns of readable keys (`cache::void::Selection::Pattern`) that are to be purged.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Anew {
    /// Before the rules are exchanged: what is not to be served by the rules to come.
    pub before: Vec<String>,
    /// After that: what nobody asks for any more. It must not be there when such a rule comes back.
    pub after: Vec<String>,
}

impl Anew {
    /// What is to be purged when `next` takes the place of `previous`.
    #[must_use]
    pub fn between(previous: &[Route], next: &[Route]) -> Self {
        let goes_on = |route: &Route, others: &[Route]| others.iter().position(|other| other.goes_on_as(route));
        let begins = next.iter().enumerate().filter(|(at, route)| match goes_on(route, previous) {
            Some(was_at) => was_hidden(&previous[..was_at], route, &next[..*at]),
            None => true,
        });
        let ends = previous.iter().filter(|route| goes_on(route, next).is_none());
        let ends: Vec<&Route> = ends.collect();
        Self { before: patterns(begins.map(|(_, route)| route)), after: patterns(ends.into_iter()) }
    }
}

/// Whether a rule that stood above `route` took requests which are `route`'s now, and a client has changed something there.
fn was_hidden(above: &[Route], route: &Route, above_now: &[Route]) -> bool {
    let hides = |other: &&Route| other.path.overlaps(&route.path) && !above_now.iter().any(|now| now.goes_on_as(other));
    above.iter().filter(hides).any(|other| other.written.get())
}

/// What the keys of these rules match, as far as they store anything.
fn patterns<'a>(routes: impl Iterator<Item = &'a Route>) -> Vec<String> {
    let mut patterns: Vec<String> = routes.filter(|route| route.cache).map(|route| route.key.pattern(|_| None)).collect();
    patterns.sort_unstable();
    patterns.dedup();
    patterns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::routes;

    fn between(previous: &str, next: &str) -> (String, String) {
        let rules = |text: &str| routes(&text.replace("+ ", "\n[[route]]\n").replace("; ", "\n"));
        let previous = rules(previous);
        previous.iter().filter(|route| route.name == "w").for_each(|route| route.written.note());
        let anew = Anew::between(&previous, &rules(next));
        (anew.before.join(" "), anew.after.join(" "))
    }

    #[test]
    fn rules_that_were_away_or_hidden_begin_anew() {
        const R: &str = "+ name='r'; path='/r/*'; key='r:{a}:x'";
        for (previous, next, before, after) in [
            // The same, or with other lives.
            (R.to_owned(), R.to_owned(), "", ""),
            (format!("{R}; ttl='1h'"), format!("{R}; ttl='2h'; stale_if_error='1h'"), "", ""),
            // It comes, it goes, it goes on under another name.
            (String::new(), R.to_owned(), "r:*:x", ""),
            (R.to_owned(), String::new(), "", "r:*:x"),
            (R.to_owned(), R.replace("name='r'", "name='s'"), "r:*:x", "r:*:x"),
            // It stops caching, and begins to.
            (R.to_owned(), format!("{R}; cache=false"), "", "r:*:x"),
            (format!("{R}; cache=false"), R.to_owned(), "r:*:x", ""),
            // It is found otherwise, voided otherwise, or meant for others.
            (R.to_owned(), format!("{R}; tags=['t']"), "r:*:x", "r:*:x"),
            (R.to_owned(), R.replace("{a}", "{b}"), "r:*:x", "r:*:x"),
            (R.to_owned(), format!("{R}; query=['a']"), "r:*:x", "r:*:x"),
            (R.to_owned(), R.replace("/r/*", "/r/s/*"), "r:*:x", "r:*:x"),
            (format!("{R}; authorization='respect'"), R.to_owned(), "r:*:x", "r:*:x"),
            (format!("{R}; methods=['GET', 'POST']"), R.to_owned(), "", ""),
            // Another one was in its way, and a client changed something there (as on every rule named w).
            (format!("+ name='w'; path='/r/1'; cache=false{R}"), R.to_owned(), "r:*:x", ""),
            (format!("+ name='n'; path='/r/1'; cache=false{R}"), R.to_owned(), "", ""),
            (format!("+ name='w'; path='/s'; cache=false{R}"), R.to_owned(), "", ""),
            (format!("{R}+ name='w'; path='/r/*'; cache=false"), R.to_owned(), "", ""),
            (format!("+ name='w'; path='/r/1'; cache=false{R}"), format!("{R}+ name='w'; path='/r/1'; cache=false"), "r:*:x", ""),
            (R.to_owned(), format!("+ name='w'; path='/r/1'; cache=false{R}"), "", ""),
        ] {
            assert_eq!(between(&previous, &next), (before.to_owned(), after.to_owned()), "{previous} → {next}");
        }
    }
}
