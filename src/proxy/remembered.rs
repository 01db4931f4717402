//! What a thread has read before, and need not read again: clients send the same heads again and again.

use std::cell::RefCell;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::Arc;

use foldhash::fast::RandomState;
use quick_cache::UnitWeighter;
use quick_cache::unsync::{Cache, DefaultLifecycle};

use super::rules::Rules;
use crate::request::refusal::Refusal;
use crate::request::target::Target;

/// Blocks of fields that each thread remembers (of at most the bytes that the front reads at once).
const BLOCKS: usize = 512;
/// Targets that each thread remembers, and how long they may be, in bytes.
const TARGETS: usize = 2048;
const MAX_TARGET: usize = 1024;
/// The same of targets that were read, whatever became of them.
const READ_TARGETS: usize = 1024;
const MAX_READ_TARGET: usize = 512;
/// The most parameters of one: each takes many times its text.
const MAX_PARAMETERS: usize = 16;

/// A bounded map of one thread; what was not used for longest is forgotten first.
type Remembered<K, V> = Cache<K, V, UnitWeighter, RandomState>;

/// An empty map of at most `most` keys.
fn remembered<K: Eq + Hash, V>(most: usize) -> Remembered<K, V> {
    Cache::with(most, most as u64, UnitWeighter, RandomState::default(), DefaultLifecycle::default())
}

/// What a thread remembers of heads: what blocks of fields say (`F`), and what is known of targets for which there were hits (`K`).
pub(super) struct Memo<F, K> {
    blocks: Remembered<Box<[u8]>, Option<Rc<F>>>,
    targets: Remembered<Box<[u8]>, K>,
    /// The rules under which `targets` holds.
    rules: Option<Arc<Rules>>,
    /// The key of the target at hand, in memory that is used again.
    key: Vec<u8>,
}

impl<F, K> Default for Memo<F, K> {
    fn default() -> Self {
        Self { blocks: remembered(BLOCKS), targets: remembered(TARGETS), rules: None, key: Vec::new() }
    }
}

impl<F, K: Clone> Memo<F, K> {
    /// What a block of fields says to `read`, with the empty line that ends it; `None` if that is nothing. It is remembered if it
    /// `repeats`: clients may send the same again.
    pub(super) fn fields(&mut self, block: &[u8], read: fn(&[u8]) -> Option<F>, repeats: fn(&F) -> bool) -> Option<Rc<F>> {
        if let Some(known) = self.blocks.get(block) {
            return known.clone();
        }
        let fields = read(block).map(Rc::new);
        if fields.as_ref().is_none_or(|fields| repeats(fields)) {
            self.blocks.insert(block.into(), fields.clone());
        }
        fields
    }

    /// What is known of a target, asked for with this origin, while these rules serve.
    pub(super) fn find(&mut self, rules: &Arc<Rules>, target: &str, origin: Option<&[u8]>) -> Option<K> {
        if !self.holds_under(rules) {
            self.targets.clear();
            self.rules = Some(Arc::clone(rules));
        }
        self.set_key(target, origin);
        self.targets.get(&self.key[..]).cloned()
    }

    /// Notes what is known of it.
    pub(super) fn remember(&mut self, rules: &Arc<Rules>, target: &str, origin: Option<&[u8]>, known: K) {
        self.set_key(target, origin);
        if self.key.len() <= MAX_TARGET && self.holds_under(rules) {
            self.targets.insert(self.key.as_slice().into(), known);
        }
    }

    fn holds_under(&self, rules: &Arc<Rules>) -> bool {
        self.rules.as_ref().is_some_and(|held| Arc::ptr_eq(held, rules))
    }

    /// Neither a target nor an origin has a line end in it.
    fn set_key(&mut self, target: &str, origin: Option<&[u8]>) {
        self.key.clear();
        self.key.extend_from_slice(target.as_bytes());
        if let Some(origin) = origin {
            self.key.push(b'\n');
            self.key.extend_from_slice(origin);
        }
    }
}

thread_local!(static READ: RefCell<Remembered<Box<str>, Arc<Target<'static>>>> = RefCell::new(remembered(READ_TARGETS)));

/// What a target says ([`Target::parse`]), which depends on its text alone.
///
/// # Errors
/// A [`Refusal`] for what may not occur.
pub(super) fn read_target(text: &str) -> Result<Arc<Target<'static>>, Refusal> {
    if let Some(known) = READ.with_borrow_mut(|read| read.get(text).cloned()) {
        return Ok(known);
    }
    let target = Arc::new(Target::parse(text)?.into_owned());
    if text.len() <= MAX_READ_TARGET && target.parameters.len() <= MAX_PARAMETERS {
        READ.with_borrow_mut(|read| read.insert(text.into(), Arc::clone(&target)));
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_says_the_same_each_time() {
        let long = format!("/{}", "x".repeat(MAX_READ_TARGET));
        for text in ["/a", "/a?b=c%20d&e&+", "//doubtful", "/a?b=c%20d&e&+", "/%zz", "no path", &long] {
            for _ in 0..3 {
                assert_eq!(
                    read_target(text).map(|target| format!("{target:?}")),
                    Target::parse(text).map(|target| format!("{target:?}")),
                    "{text}"
                );
            }
        }
    }
}
