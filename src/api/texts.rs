//! Texts that occur again and again in rows, each held once.

use std::sync::Arc;

use super::orders::Text;

/// Texts seen so far.
#[derive(Default)]
pub struct Texts(Vec<Arc<str>>);

/// More different texts than this are not looked through.
const SHARED: usize = 64;

impl Texts {
    /// The text, shared with those before it.
    pub fn share(&mut self, text: &str) -> Text {
        if let Some(known) = self.0.iter().find(|known| &***known == text) {
            return Some(Arc::clone(known));
        }
        let new: Arc<str> = text.into();
        if self.0.len() < SHARED {
            self.0.push(Arc::clone(&new));
        }
        Some(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_repeats_is_shared_and_what_does_not_is_not_looked_for_long() {
        let mut texts = Texts::default();
        let (first, again) = (texts.share("buy").unwrap(), texts.share("buy").unwrap());
        assert!(Arc::ptr_eq(&first, &again));
        for number in 0..1000 {
            assert_eq!(texts.share(&number.to_string()).as_deref(), Some(number.to_string().as_str()));
        }
        assert_eq!(texts.0.len(), SHARED);
    }
}
