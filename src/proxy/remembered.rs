//! What a thread has read before, and need not read again: clients send the same heads again and again.

use std::cell::RefCell;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::Arc;

use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::fast::RandomState;
use quick_cache::unsync::{Cache, DefaultLifecycle};

use super::rules::Rules;
use crate::cache::entry::allocated;
use crate::fetch::remembered::{Heap, InBytes};
use crate::request::refusal::Refusal;
use crate::request::target::Target;

/// Blocks of fields that each thread remembers (each of at most the bytes that the front reads at once), in bytes, and the room for how many is made.
const BLOCKS: (usize, usize) = (1 << 20, 512);
/// The same of targets, and how long they may be, in bytes.
const TARGETS: (usize, usize) = (2 << 20, 2048);
const MAX_TARGET: usize = 1024;
/// The same of targets that were read, whatever became of them.
const READ_TARGETS: (usize, usize) = (512 << 10, 1024);
const MAX_READ_TARGET: usize = 512;
/// The most parameters of one: each takes many times its text.
const MAX_PARAMETERS: usize = 16;

/// What all threads remember, in bytes.
static ALL: AtomicU64 = AtomicU64::new(0);

/// How many bytes take what all threads remember of heads.
pub(super) fn bytes() -> u64 {
    ALL.load(Ordering::Relaxed)
}

/// A map of one thread, bounded in bytes; what was not used for longest is forgotten first.
struct Remembered<K: Heap, V: Heap> {
    map: Cache<K, V, InBytes, RandomState>,
    /// The bytes that are counted of it.
    counted: u64,
}

impl<K: Eq + Hash + Heap, V: Heap> Remembered<K, V> {
    /// An empty map.
    fn new((bytes, items): (usize, usize)) -> Self {
        Self { map: Cache::with(items, bytes as u64, InBytes, RandomState::default(), DefaultLifecycle::default()), counted: 0 }
    }

    fn insert(&mut self, key: K, value: V) {
        self.map.insert(key, value);
        self.count();
    }

    fn clear(&mut self) {
        self.map.clear();
        self.count();
    }

    fn count(&mut self) {
        let bytes = self.map.weight();
        ALL.fetch_add(bytes.wrapping_sub(self.counted), Ordering::Relaxed);
        self.counted = bytes;
    }
}

impl<K: Heap, V: Heap> Drop for Remembered<K, V> {
    fn drop(&mut self) {
        ALL.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

impl Heap for Box<[u8]> {
    fn heap(&self) -> usize {
        allocated(self.len())
    }
}

impl Heap for Box<str> {
    fn heap(&self) -> usize {
        allocated(self.len())
    }
}

impl<F: Heap> Heap for Option<Rc<F>> {
    fn heap(&self) -> usize {
        self.as_ref().map_or(0, |fields| allocated(size_of::<F>() + 16) + fields.heap())
    }
}

impl Heap for Arc<Target<'static>> {
    fn heap(&self) -> usize {
        allocated(size_of::<Target<'static>>() + 16) + Target::heap(self)
    }
}

/// What a thread remembers of heads: what blocks of fields say (`F`), and what is known of targets for which there were hits (`K`).
pub(super) struct Memo<F: Heap, K: Heap> {
    blocks: Remembered<Box<[u8]>, Option<Rc<F>>>,
    targets: Remembered<Box<[u8]>, K>,
    /// The rules under which `targets` holds.
    rules: Option<Arc<Rules>>,
    /// The key of the target at hand, in memory that is used again.
    key: Vec<u8>,
}

impl<F: Heap, K: Heap> Default for Memo<F, K> {
    fn default() -> Self {
        Self { blocks: Remembered::new(BLOCKS), targets: Remembered::new(TARGETS), rules: None, key: Vec::new() }
    }
}

impl<F: Heap, K: Clone + Heap> Memo<F, K> {
    /// What a block of fields says to `read`, with the empty line that ends it; `None` if that is nothing. It is remembered if it
    /// `repeats`: clients may send the same again.
    pub(super) fn fields(&mut self, block: &[u8], read: fn(&[u8]) -> Option<F>, repeats: fn(&F) -> bool) -> Option<Rc<F>> {
        if let Some(known) = self.blocks.map.get(block) {
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
        self.targets.map.get(&self.key[..]).cloned()
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

thread_local!(static READ: RefCell<Remembered<Box<str>, Arc<Target<'static>>>> = RefCell::new(Remembered::new(READ_TARGETS)));

/// What a target says ([`Target::parse`]), which depends on its text alone.
///
/// # Errors
/// A [`Refusal`] for what may not occur.
pub(super) fn read_target(text: &str) -> Result<Arc<Target<'static>>, Refusal> {
    if let Some(known) = READ.with_borrow_mut(|read| read.map.get(text).cloned()) {
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
    fn what_is_remembered_is_bounded_and_counted_in_bytes() {
        let mut map = Remembered::<Box<str>, Arc<Target<'static>>>::new((64 << 10, 16));
        for number in 0..10_000 {
            let text = format!("/a?b={number}&c={}", "d".repeat(number % 300));
            map.insert(text.as_str().into(), Arc::new(Target::parse(&text).unwrap().into_owned()));
            assert!(map.counted <= 64 << 10);
        }
        assert!(map.counted > 32 << 10 && bytes() >= map.counted);
        map.clear();
        assert_eq!(map.counted, 0);
    }

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
