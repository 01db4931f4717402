//! Request targets that were read before: clients ask for the same ones again and again.

use std::cell::RefCell;
use std::hash::Hash;
use std::sync::Arc;

use foldhash::fast::RandomState;
use quick_cache::UnitWeighter;
use quick_cache::unsync::{Cache, DefaultLifecycle};

use crate::request::refusal::Refusal;
use crate::request::target::Target;

/// Targets that each thread remembers, and how long they may be, in bytes.
const TARGETS: usize = 1024;
const MAX_TARGET: usize = 512;

/// A bounded map of one thread; what was not used for longest is forgotten first.
pub(super) type Remembered<K, V> = Cache<K, V, UnitWeighter, RandomState>;

/// An empty map of at most `most` keys.
pub(super) fn remembered<K: Eq + Hash, V>(most: usize) -> Remembered<K, V> {
    Cache::with(most, most as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default())
}

thread_local!(static READ: RefCell<Remembered<Box<str>, Arc<Target<'static>>>> = RefCell::new(remembered(TARGETS)));

/// What a target says ([`Target::parse`]), which depends on its text alone.
///
/// # Errors
/// A [`Refusal`] for what may not occur.
pub fn read(text: &str) -> Result<Arc<Target<'static>>, Refusal> {
    if let Some(known) = READ.with_borrow_mut(|read| read.get(text).cloned()) {
        return Ok(known);
    }
    let target = Arc::new(Target::parse(text)?.into_owned());
    if text.len() <= MAX_TARGET {
        READ.with_borrow_mut(|read| read.insert(text.into(), Arc::clone(&target)));
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_says_the_same_each_time() {
        let long = format!("/{}", "x".repeat(MAX_TARGET));
        for text in ["/a", "/a?b=c%20d&e&+", "//doubtful", "/a?b=c%20d&e&+", "/%zz", "no path", &long] {
            for _ in 0..3 {
                assert_eq!(
                    read(text).map(|target| format!("{target:?}")),
                    Target::parse(text).map(|target| format!("{target:?}")),
                    "{text}"
                );
            }
        }
    }
}
